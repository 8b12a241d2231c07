"""Claims about data.py -> evidence.

Every picture comes out upright, on white, in 8 bits and not stretched; what is bad is skipped with a reason;
nothing outside the folder is read; a tar shard gives what the same files in a folder give.
"""
import io
import json
import os
import re
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import prepare
from drawn_world import COLOURS, draw, scene

# --- load_pictures: drawings and emoji ---

def test_drawing_i_depends_on_seed_and_i_alone():
    many = data.load_pictures("drawn", 32, count=12, seed=5)
    few = data.load_pictures("drawn", 32, count=4, seed=5)
    assert many.images.shape == (12, 3, 32, 32) and many.images.dtype == torch.uint8 and not many.skipped
    assert torch.equal(many.images[:4], few.images) and many.captions[:4] == few.captions
    assert not torch.equal(data.load_pictures("drawn", 32, count=4, seed=6).images, few.images)
    third = scene(np.random.default_rng((5, 3)))
    assert few.captions[3] == third.captions
    assert torch.equal(few.images[3], torch.from_numpy(draw(third.things, 32)).permute(2, 0, 1))


def test_the_emoji_sheet_holds_1026_captioned_pictures_on_white():
    emoji = data.load_pictures("emoji")
    assert emoji.images.shape == (1026, 3, 64, 64) and len(emoji.captions) == 1026 and not emoji.skipped
    assert emoji.captions[0][0] == "grinning face, twemoji style"
    assert all(len(texts) == 2 for texts in emoji.captions)
    assert (emoji.images == 255).all(dim=1).flatten(1).any(dim=1).float().mean() > 0.99
    by_name = {texts[0].split(",")[0]: image for texts, image in zip(emoji.captions, emoji.images)}
    for name, strongest in (("red heart", 0), ("green heart", 1), ("blue heart", 2)):  # its tile
        image = by_name[name].float()
        inked = image[:, (image.mean(dim=0) < 250)]
        assert inked.mean(dim=1).argmax() == strongest and inked.shape[1] > 1000
    tiles = np.stack([np.asarray(entry.picture) for entry in data.list_pictures("emoji").entries])
    assert np.array_equal(emoji.images.permute(0, 2, 3, 1), tiles)              # neither turned nor mirrored


def test_count_takes_a_random_part_of_the_emoji_and_size_resizes():
    part = data.load_pictures("emoji", 32, count=20, seed=1)
    assert part.images.shape == (20, 3, 32, 32) and len(set(part.captions)) == 20
    assert part.captions == data.load_pictures("emoji", 16, count=20, seed=1).captions
    assert part.captions != data.load_pictures("emoji", 16, count=20, seed=2).captions


def test_the_emoji_licence_is_named_beside_the_sheet():
    text = (data.ASSETS / "LICENSE-twemoji.md").read_text()
    assert "creativecommons.org/licenses/by/4.0" in text and "Twitter, Inc and other contributors" in text


def test_a_packed_sheet_holds_the_folder_again(tmp_path, monkeypatch):
    folder = fill(tmp_path / "in", noto_red=flat("red", (64, 64)))
    fill(folder, **{f"twemoji_{c}": flat(rgb, (64, 64)) for c, rgb in COLOURS.items()})
    data.pack_sheet(folder, tmp_path)
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    back = data.load_pictures("emoji")
    assert back.captions == [(f"twemoji_{c}",) for c in sorted(COLOURS)]
    for image, c in zip(back.images, sorted(COLOURS)):
        assert tuple(image[:, 0, 0].tolist()) == COLOURS[c] and len(image.flatten(1).unique(dim=1)[0]) == 1


# --- load_pictures: folders ---

def fill(folder, **pictures):
    """Write pictures (PIL images, or bytes as they are) as name.png with name.txt."""
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (folder / f"{name}.png").write_bytes(picture)
        else:
            picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def flat(colour="red", size=(20, 20)):
    return Image.new("RGB", size, colour)


def pixel(picture):
    """The centre pixel of a path or PIL image after loading."""
    return tuple(data.read_picture(picture, 8)[4, 4].tolist())


def test_text_files_and_captions_jsonl_give_the_same_pictures(tmp_path):
    folder = fill(tmp_path / "a", red=flat("red"), blue=flat("blue"))
    fill(folder / "deep", green=flat("lime"))
    (folder / "red.txt").write_text("\ufeffa red field\n\n  the whole picture   is red\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not a caption: no picture has this name")
    texts = data.load_pictures(folder, 16)
    assert texts.captions == [("blue",), ("green",), ("a red field", "the whole picture is red")]
    assert texts.images[:, :, 8, 8].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert [name for name, _ in texts.skipped] == ["notes.txt"]
    files = ("blue.png", "deep/green.png", "red.png")
    rows = [{"file": f, "captions": c} for f, c in zip(files, texts.captions)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    lines = data.load_pictures(str(folder), 16)
    assert lines.captions == texts.captions and torch.equal(lines.images, texts.images)
    assert not lines.skipped and not lines.unnamed


def test_a_caption_file_whose_picture_is_missing_or_of_an_unknown_kind_is_told(tmp_path):
    folder = fill(tmp_path, a=flat(), b=flat(), c=flat(), d=flat())
    flat().save(folder / "e.ppm")
    flat().save(folder / "f", format="PNG")
    for name in "efg":
        (folder / f"{name}.txt").write_text(name)
    (folder / "excluded.txt").write_text("d.png\n")                             # is no caption
    got = data.load_pictures(folder, 8)
    assert got.captions == [("a",), ("b",), ("c",)]
    assert [name for name, _ in got.skipped] == ["e.txt", "f.txt", "g.txt"]
    assert all("no picture of this name; known are .avif" in reason for _, reason in got.skipped)
    for name in "abc":
        (folder / f"{name}.png").unlink()
    (folder / "d.png").unlink()
    with pytest.raises(ValueError, match=r"no captioned pictures here \(a.txt: no picture of this.*name.txt"):
        data.list_pictures(folder)


def test_caption_files_may_have_a_suffix_in_capitals(tmp_path):
    folder = fill(tmp_path, a=flat(), b=flat())
    (folder / "a.txt").rename(folder / "a.TXT")
    (folder / "b.txt").unlink()
    (folder / "b.JSON").write_text('{"captions": ["from JSON"]}')
    shard(folder / "c.TAR", [("c.png", png()), ("c.txt", b"from a shard")])
    got = data.list_pictures(folder)
    assert [entry.captions for entry in got.entries] == [("a",), ("from JSON",), ("from a shard",)]
    assert not got.skipped and len(data.list_pictures(folder / "c.TAR").entries) == 1


def test_pictures_that_captions_jsonl_does_not_name_are_counted_and_are_no_fault(tmp_path):
    folder = fill(tmp_path / "a", **{f"p{i:02}": flat() for i in range(30)})
    fill(folder / ".trash", hidden=flat())
    shard(folder / "x.tar", [("c.png", png()), ("c.txt", b"fine")])
    rows = [json.dumps({"file": f"./p{i:02}.png", "captions": ["x"]}) for i in range(5)]
    (folder / "captions.jsonl").write_text("\n".join([*rows, '{"file": "p05.png", "captions": [""]}']))
    for got in (data.list_pictures(folder), data.load_pictures(folder, 8)):
        assert got.unnamed == 26 and [name for name, _ in got.skipped] == ["captions.jsonl:6"]
    assert data.list_pictures("drawn", count=1).unnamed == data.list_pictures("emoji").unnamed == 0


def test_a_picture_under_four_spellings_counts_once(tmp_path):
    folder = fill(tmp_path, a=flat("red"), b=flat("blue"), c=flat("pink"))
    (folder / "x").mkdir()
    (folder.with_name("link")).symlink_to(folder)
    files = ("a.png", "./a.png", "b.png", "x/../a.png", str(folder.with_name("link") / "a.png"), "c.png")
    (folder / "captions.jsonl").write_text("\n".join(
        json.dumps({"file": file, "captions": [file]}) for file in files))
    got = data.load_pictures(folder.with_name("link"), 8)
    assert got.captions == [("a.png",), ("b.png",), ("c.png",)] and not got.unnamed
    assert [name for name, _ in got.skipped] == [f"captions.jsonl:{n}" for n in (2, 4, 5)]
    assert all("listed before" in reason for _, reason in got.skipped)


@pytest.mark.skipif(os.sep == "\\", reason="there the path is right")
def test_a_windows_path_in_captions_jsonl_is_told_how_to_be_written(tmp_path):
    folder = fill(tmp_path / "a", a=flat(), b=flat())
    files = ("a.png", "b.png", "cats\\1.png", "gone.png")
    (folder / "captions.jsonl").write_text("\n".join(
        json.dumps({"file": file, "captions": ["x"]}) for file in files))
    assert dict(data.load_pictures(folder, 8).skipped) == {
        "cats\\1.png": "no such file: write / for each \\ in its path", "gone.png": "no such file"}


@pytest.mark.parametrize("size", [(96, 32), (33, 70), (20, 50)])
def test_the_shorter_side_becomes_size_and_the_centre_is_kept(size):
    picture = Image.new("RGB", size, "red")
    picture.paste(Image.effect_noise((20, 20), 90), ((size[0] - 20) // 2, (size[1] - 20) // 2))
    scale = 16 / min(size)
    wide = picture.resize([round(side * scale) for side in size], Image.Resampling.BICUBIC)
    left, top = (wide.width - 16) // 2, (wide.height - 16) // 2
    expected = np.asarray(wide.crop((left, top, left + 16, top + 16))).astype(int)
    image = data.read_picture(picture, 16)
    assert image.shape == (16, 16, 3) and abs(image - expected).mean() < 6


def test_pictures_of_any_mode_become_rgb(tmp_path):
    grey = np.full((9, 9), 40_000, np.uint16)
    cases = {
        "1": (Image.new("1", (9, 9), 1), (255, 255, 255)),
        "L": (Image.new("L", (9, 9), 100), (100, 100, 100)),
        "P": (flat("red").convert("P", palette=Image.Palette.ADAPTIVE), (255, 0, 0)),
        "CMYK": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), (255, 0, 0)),
        "I;16": (Image.fromarray(grey), (156, 156, 156)),                       # 40000 / 65535 * 255
        "I": (Image.fromarray(grey.astype(np.int32)), (156, 156, 156)),
        "F": (Image.fromarray(np.full((9, 9), 0.5, np.float32)), (128, 128, 128)),
        "RGBA": (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), (255, 255, 255)),     # hidden black must not show
        "LA": (Image.new("LA", (9, 9), (0, 51)), (204, 204, 204)),              # a fifth of black on white
    }
    for mode, (picture, expected) in cases.items():
        assert picture.mode == mode and pixel(picture) == expected, mode
    for mode in ("1", "L", "P", "I;16", "RGBA", "LA"):                          # and the same from a file
        cases[mode][0].save(tmp_path / "x.png")
        assert pixel(tmp_path / "x.png") == cases[mode][1], mode
    picture = Image.new("P", (9, 9), 0)
    picture.putpalette([0, 0, 0])
    picture.save(tmp_path / "p.png", transparency=0)                            # a palette with a clear entry
    assert pixel(tmp_path / "p.png") == (255, 255, 255)


def test_exif_orientation_is_respected(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", [0, 0, 20, 20])                                       # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6        # shown turned clockwise: blue on top
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    picture.save(tmp_path / "y.jpg", quality=95, subsampling=0)
    turned, plain = (data.read_picture(tmp_path / name, 20) for name in ("x.jpg", "y.jpg"))
    assert (turned[2, :, 2] > 200).all() and (turned[-3, :, 0] > 200).all()
    assert (plain[:, 2, 2] > 200).all() and (plain[:, -3, 0] > 200).all()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_the_smallest_and_thinnest_pictures_load(size):
    assert (data.read_picture(Image.new("RGB", size, "lime"), 64) == (0, 255, 0)).all()


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims width x height."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def bad_pictures():
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "png")
    good = stream.getvalue()
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "jpeg")
    return {
        "truncated": good[:len(good) // 2], "jpeg_truncated": stream.getvalue()[:700], "empty": b"",
        "text": b"hello",
        "broken_data": good[:200] + bytes(200) + good[400:], "html": b"<html><body>404</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>', "bomb": png_claiming(30_000, 30_000),
        "big": png_claiming(8_001, 8_000),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_pictures_are_skipped_and_counted(tmp_path):
    bad = bad_pictures()
    folder = fill(tmp_path / "a", **bad, **{f"good{i:02}": flat() for i in range(12)})
    flat().save(folder / "good_without_text.png")
    got = data.load_pictures(folder, 8)
    assert got.captions == [(f"good{i:02}",) for i in range(12)] and len(got.images) == 12
    assert {name for name, _ in got.skipped} == {f"{name}.png" for name in [*bad, "good_without_text"]}
    reasons = dict(got.skipped)
    assert all(reasons.values()) and "64,000,000" in reasons["big.png"]


def test_a_kind_of_picture_without_a_decoder_is_skipped_and_told_not_passed_over(tmp_path):
    fill(tmp_path, a=flat(), b=flat())
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "c.txt").write_text("from a telephone")
    flat().save(tmp_path / "d.jfif", format="JPEG")
    (tmp_path / "d.txt").write_text("a JPEG by its older name")
    pictures = data.load_pictures(tmp_path, 16)
    assert len(pictures.captions) == 3 and [name for name, _ in pictures.skipped] == ["c.heic"]


def test_large_pictures_are_refused_by_their_header_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png_claiming(8_001, 8_000))
    monkeypatch.setattr(Image.Image, "convert", None)       # decoding would fail otherwise
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(ValueError, match="8001 x 8000 pixels"):
        data.read_picture(tmp_path / "x.png", 64)


def test_bad_lines_of_captions_jsonl_are_skipped_with_a_reason(tmp_path):
    folder, outside = fill(tmp_path / "a", a=flat()), tmp_path / "secret.png"
    flat().save(outside)
    os.symlink(outside, folder / "link.png")
    os.symlink("loop.png", folder / "loop.png")
    line = lambda file, *captions: json.dumps({"file": file, "captions": captions}).encode()
    bad = {
        "JSON": b'{"file": "a.png", "captions": ["x"',
        "utf-8": b'{"file": "a.png", "captions": ["\xff\xfe"]}',
        "empty": line("a.png", "x", "  "), "NUL": line("a.png", "x\0y"), "long": line("a.png", "x" * 2001),
        "surrogate": line("a.png", "\ud83d"), "none": line("a.png"), "number": line("a.png", 3),
        "string": b'{"file": "a.png", "captions": "x"}', "list": b"[1]", "no file": b'{"captions": ["x"]}',
        "deep": b"[" * 100_000, "dots": line("../secret.png", "x"), "absolute": line(str(outside), "x"),
        "symlink": line("link.png", "x"), "loop": line("loop.png", "x"), "NUL path": line("a\0.png", "x"),
        "missing": line("gone.png", "x"), "folder": line(".", "x"),
        "twice": line("p3.png", "listed in line 4 already"),
    }
    fill(folder, **{f"p{i}": flat() for i in range(20)})
    words = "a fine\tred  caption \U0001f468\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd "
    words += "x" * (2000 - len(words))                                          # as long as it may be
    good = [line(f"p{i}.png", words) for i in range(20)]
    (folder / "captions.jsonl").write_bytes(b"\n".join(good + list(bad.values())))
    got = data.load_pictures(folder, 8)
    assert got.captions == [(" ".join(words.split()),)] * 20
    assert len(got.skipped) == len(bad) and all(reason for _, reason in got.skipped)
    reasons = dict(got.skipped)
    for kind in ("dots", "absolute", "symlink"):
        assert "out of the folder" in reasons[f"captions.jsonl:{21 + list(bad).index(kind)}"]


def test_a_caption_file_that_links_out_of_the_folder_is_not_read(tmp_path):
    folder = fill(tmp_path / "a", a=flat(), b=flat())
    (tmp_path / "secret.txt").write_text("password")
    (folder / "b.txt").unlink()
    os.symlink(tmp_path / "secret.txt", folder / "b.txt")
    got = data.load_pictures(folder, 8)
    assert got.captions == [("a",)] and got.skipped == [("b.png", "the path leads out of the folder")]


def test_a_folder_that_is_mostly_bad_is_refused_and_the_first_causes_named(tmp_path):
    folder = fill(tmp_path / "a", a=flat(), b=b"text", c=flat())
    assert len(data.load_pictures(folder, 8).skipped) == 1
    fill(folder, d=b"", e=b"<html>")
    with pytest.raises(ValueError, match=r"3 of 5 entries are unusable.*b\.png: cannot identify"):
        data.load_pictures(folder, 8)
    for name in "ac":
        (folder / f"{name}.txt").write_text("")
    with pytest.raises(ValueError, match="5 of 5 .*empty caption"):
        data.load_pictures(folder, 8)


def test_a_folder_without_captions_and_a_missing_one_are_told_the_format(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.load_pictures(tmp_path / "gone")
    with pytest.raises(ValueError, match="name.txt beside each name.png"):
        data.load_pictures(tmp_path)
    flat().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="name.txt beside each name.png"):
        data.load_pictures(tmp_path)
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="captions.jsonl with a line"):
        data.load_pictures(tmp_path)


def test_count_limits_a_folder_at_random_and_reads_no_further(tmp_path):
    folder = fill(tmp_path / "a", **{f"p{i:02}": flat() for i in range(20)})
    six = data.load_pictures(folder, 8, count=6, seed=1)
    assert len(six.images) == len(set(six.captions)) == 6
    assert six.captions == data.load_pictures(folder, 8, count=6, seed=1).captions
    assert six.captions != data.load_pictures(folder, 8, count=6, seed=2).captions
    everything = data.load_pictures(folder, 8, count=50)
    assert everything.captions == [(f"p{i:02}",) for i in range(20)] and len(everything.images) == 20


@pytest.mark.parametrize("wrong", [dict(size=0), dict(count=0), dict(count=-3), dict(seed=-1)])
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        data.load_pictures("drawn", **{"count": 1, **wrong})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=40) | st.from_regex(r'\{"file": ".{0,9}", "captions": \[.{0,9}\]\}')
                .map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=5))
def test_no_captions_jsonl_whatever_crashes_the_loader(tmp_path_factory, lines):
    folder = fill(tmp_path_factory.mktemp("any"), a=flat(), **{f"p{i}": flat() for i in range(12)})
    rows = b"".join(b'{"file": "p%d.png", "captions": ["fine"]}\n' % i for i in range(12))
    (folder / "captions.jsonl").write_bytes(rows + b"\n".join(lines))
    got = data.load_pictures(folder, 4)
    assert got.captions[:12] == [("fine",)] * 12 and len(got.captions) == len(got.images)


def test_a_bomb_of_compressed_text_is_skipped(tmp_path):
    body = b"note\0\0" + zlib.compress(bytes(2_000_000))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    stream = io.BytesIO()
    flat().save(stream, "png")
    good = stream.getvalue()
    folder = fill(tmp_path / "a", a=flat(), b=flat(), bomb=good[:33] + chunk + good[33:])       # after IHDR
    got = data.load_pictures(folder, 8)
    assert got.captions == [("a",), ("b",)] and got.skipped[0][0] == "bomb.png"
    assert "too large" in got.skipped[0][1]


def test_a_hundred_unreadable_pictures_in_a_row_stop_the_loading(tmp_path):
    folder = fill(tmp_path / "a", **{f"a{i:03}": flat() for i in range(150)},
                  **{f"b{i:03}": b"" for i in range(99)}, **{f"c{i:03}": flat() for i in range(2)})
    assert len(data.load_pictures(folder, 4).skipped) == 99
    fill(folder, b099=b"")
    with pytest.raises(ValueError, match=r"100 pictures in a row .* b099\.png .*check DIR --apply"):
        data.load_pictures(folder, 4)


def kinds_of_bad_file():
    """Kind -> (bytes of name.png, bytes of name.txt): everything that can be wrong with one sample."""
    stream = io.BytesIO()
    flat().save(stream, "png")
    good = stream.getvalue()
    return {kind: (content, b"a caption") for kind, content in bad_pictures().items()} | {
        "caption_empty": (good, b" \n"), "caption_nul": (good, b"a\0b"), "caption_long": (good, b"x" * 2001),
        "caption_latin1": (good, "caf\u00e9".encode("latin-1")), "caption_huge": (good, b"x" * 10_000_000),
        "caption_missing": (good, None)}


def test_a_thousand_pictures_with_five_in_a_hundred_of_bad_files_load_with_a_report(tmp_path):
    kinds, picture = kinds_of_bad_file(), io.BytesIO()
    flat().save(picture, "png")
    for i in range(1000):
        kind = list(kinds)[i // 20 % len(kinds)] if i % 20 == 7 else None       # every twentieth, in turn
        content, caption = kinds[kind] if kind else (picture.getvalue(), f"number {i}".encode())
        (tmp_path / f"{i:04}-{kind or 'good'}.png").write_bytes(content)
        if caption is not None:
            (tmp_path / f"{i:04}-{kind or 'good'}.txt").write_bytes(caption)
    got = data.load_pictures(tmp_path, 8)
    assert len(got.images) == 950 and got.captions[-1] == ("number 999",)
    assert len(got.skipped) == 50 and all(reason for _, reason in got.skipped)
    assert {name[5:-4] for name, _ in got.skipped} == set(kinds)


def test_even_five_in_a_hundred_of_each_kind_of_bad_picture_load(tmp_path):
    kinds, picture = bad_pictures(), io.BytesIO()                               # nine kinds: 45 in a hundred
    flat().save(picture, "png")
    for i in range(1000):
        kind = [*kinds, *["good"] * (20 - len(kinds))][7 * i % 20]
        (tmp_path / f"{i:04}-{kind}.png").write_bytes(kinds.get(kind, picture.getvalue()))
        (tmp_path / f"{i:04}-{kind}.txt").write_text(kind)
    got = data.load_pictures(tmp_path, 8)
    assert got.captions == [("good",)] * 550 and len(got.skipped) == 450


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([(16, 16), (48, 32), (32, 80)]))
def test_a_picture_covers_any_box_unstretched(width, height, box):
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = (np.arange(width) * 255 / max(1, width - 1)).round()[None, :]        # red grows rightwards
    ramp[..., 1] = (np.arange(height) * 255 / max(1, height - 1)).round()[:, None]      # green downwards
    image = data.read_picture(Image.fromarray(ramp), box).astype(float)
    assert image.shape == (box[1], box[0], 3)
    scale = max(box[0] / width, box[1] / height)                                # pixels of the box per pixel
    if min(width, height) >= 20:
        across = (image[8, -5, 0] - image[8, 4, 0]) / (box[0] - 9) * (width - 1) / 255
        down = (image[-5, 8, 1] - image[4, 8, 1]) / (box[1] - 9) * (height - 1) / 255
        assert abs(across * scale - 1) < 0.12 and abs(down * scale - 1) < 0.12


def test_the_original_caption_and_the_synthetic_ones_are_taken_half_and_half():
    def picks(captions, **kw):
        chosen = data.pick_captions([captions] * 4000, torch.Generator().manual_seed(0), **kw)
        return torch.bincount(chosen, minlength=3) / 4000

    assert (picks(3) - torch.tensor([0.5, 0.25, 0.25])).abs().max() < 0.03
    assert (picks(2) - torch.tensor([0.5, 0.5, 0])).abs().max() < 0.03
    assert picks(1)[0] == 1                                                     # there is nothing else
    assert picks(2, synthetic=0)[0] == 1 and picks(2, synthetic=1)[1] == 1
    assert data.pick_captions([1, 5, 1], torch.Generator(), 1.0).gt(0).tolist() == [False, True, False]


# --- Tar shards ---

def png(colour="red", size=(20, 20)):
    stream = io.BytesIO()
    flat(colour, size).save(stream, "png")
    return stream.getvalue()


def shard(path, files):
    """A tar of [(name, bytes), ...] in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_shard_gives_what_the_same_files_in_a_folder_give(tmp_path):
    files = [("b.png", png("red")), ("b.txt", b"a red field\n\nall of it is red"), ("a/c.png", png("lime")),
             ("a/c.json", b'{"captions": ["green", "all green"], "aesthetic": 6.5}'),
             ("d.txt", b"blue"), ("d.json", b'{"nsfw": 0.1, "caption": "not this"}'), ("d.PNG", png("blue"))]
    for name, content in files:
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    folder = data.list_pictures(tmp_path / "files")
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "000.tar", files[:2])
    shard(tmp_path / "shards" / "001.tar", files[2:])
    shards = data.list_pictures(tmp_path / "shards")
    assert not folder.skipped and not shards.skipped
    assert [e.name for e in shards.entries] == ["000.tar/b.png", "001.tar/a/c.png", "001.tar/d.PNG"]
    rest = lambda listing: sorted((e.captions, str(e.about)) for e in listing.entries)
    assert rest(folder) == rest(shards)
    assert rest(shards)[0] == (("a red field", "all of it is red"), "{}")
    assert shards.entries[1].about == {"aesthetic": 6.5} and shards.entries[2].captions == ("blue",)
    pictures = data.load_pictures(tmp_path / "shards", 8)
    assert pictures.images[:, :, 4, 4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert data.load_pictures(tmp_path / "shards" / "001.tar", 8).captions == pictures.captions[1:]


def test_a_shard_is_read_in_any_order_without_reading_what_lies_before(tmp_path, monkeypatch):
    shard(tmp_path / "x.tar", [(f"{i:03}.{kind}", content) for i in range(50)
                               for kind, content in (("txt", b"number %d" % i), ("png", png((i, 0, 0))))])
    entries = data.list_pictures(tmp_path / "x.tar").entries
    monkeypatch.setattr(tarfile, "open", None)                          # the index is all that is needed
    for i in np.random.default_rng(0).permutation(50).tolist():
        assert data.read_picture(entries[i].picture, 4)[0, 0].tolist() == [i, 0, 0]
        assert entries[i].captions == (f"number {i}",)


def test_a_picture_in_a_shard_is_what_its_file_is_and_its_size_takes_only_the_header(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8))
    kinds, files = ("png", "jpeg", "webp", "gif", "tiff", "bmp"), []
    for kind in kinds:
        noise.save(tmp_path / f"{kind}.{kind}", **{"quality": 95} if kind in ("jpeg", "webp") else {})
        files += [(f"{kind}.{kind}", (tmp_path / f"{kind}.{kind}").read_bytes()), (f"{kind}.txt", b"noise")]
    entries = data.list_pictures(shard(tmp_path / "x.tar", files)).entries
    read, readinto = [], data.Window.readinto
    monkeypatch.setattr(data.Window, "readinto", lambda *a: read.append(readinto(*a)) or read[-1])
    for entry in entries:
        path = tmp_path / Path(entry.name).name
        read.clear()
        assert prepare.identify(entry.picture)[0] == (500, 700)
        size = path.stat().st_size
        assert 0 < sum(read) <= (size if path.suffix == ".webp" else 70_000) < 1.1 * size   # no WebP header
        assert np.array_equal(data.read_picture(entry.picture, 64), data.read_picture(path, 64))
    assert len(entries) == len(kinds)


def test_a_transparent_grey_of_16_bits_becomes_white_as_one_of_8_bits_does(tmp_path):
    for bits, dtype, clear, seen in ((8, np.uint8, 40, 200), (16, np.uint16, 300, 30_000)):
        values = np.full((8, 8), clear, dtype)
        values[:4] = seen
        stream, path = io.BytesIO(), tmp_path / f"{bits}.png"
        Image.fromarray(values).save(stream, "png")
        content, chunk = stream.getvalue(), b"tRNS" + clear.to_bytes(2, "big")
        before = content.index(b"IDAT") - 4
        path.write_bytes(content[:before] + (2).to_bytes(4, "big") + chunk
                         + zlib.crc32(chunk).to_bytes(4, "big") + content[before:])
        picture = data.read_picture(path, 8)[..., 0]
        assert picture[0, 0] == round(seen * 255 / np.iinfo(dtype).max) and picture[7, 7] == 255


def test_a_cut_or_damaged_shard_gives_the_samples_before_the_damage_and_says_so(tmp_path):
    whole = shard(tmp_path / "x.tar", [(f"{i}.{kind}", content) for i in range(10)
                                       for kind, content in (("txt", b"fine"), ("png", png()))]).read_bytes()
    eighth = 8 * 2048                                                           # four blocks of 512 a sample
    for name, content, good, reason in (
            ("cut in a picture", whole[:eighth + 1536 + 40], 8, "the shard ends within it"),
            ("cut in a header", whole[:eighth + 300], 8, "unexpected end|cut short"),
            ("cut between files", whole[:eighth], 8, "unexpected end|cut short"),
            ("damaged header", whole[:eighth] + b"x" * 300 + whole[eighth + 300:], 8, "damaged at byte 16"),
            ("no tar", b"hello" * 500, 0, "not a whole tar"), ("empty", b"", 0, "not a whole tar")):
        (tmp_path / "x.tar").write_bytes(content)
        listing = data.list_pictures(tmp_path / "x.tar") if good else data._shard("x.tar", tmp_path / "x.tar")
        assert len(listing[0]) == good, name
        assert any(re.search(reason, why) for _, why in listing[1]), (name, listing[1])


def test_bad_samples_of_a_shard_are_skipped_with_a_reason(tmp_path):
    good = [(f"{i}.{kind}", content) for i in range(9)
            for kind, content in (("txt", b"fine"), ("png", png()))]
    shard(tmp_path / "x.tar", good + [
        ("lone.txt", b"no picture"), ("two.png", png()), ("two.jpg", png()), ("two.txt", b"x"),
        ("mute.png", png()), ("twice.txt", b"x"), ("twice.png", png()), ("twice.png", png()),
        ("json.png", png()), ("json.json", b"{"), ("huge.png", png()), ("huge.txt", b"x" * 1_000_001),
        ("bad.png", b"text"), ("bad.txt", b"x"), ("../../out.png", png()), ("../../out.txt", b"only a name"),
        ("__meta__", b"no suffix: not part of a sample")])
    got = data.load_pictures(tmp_path / "x.tar", 4)
    assert got.captions == [("fine",)] * 9 + [("only a name",)]
    reasons = {name.removeprefix("x.tar/").split(".")[0]: reason for name, reason in got.skipped}
    assert set(reasons) == {"lone", "two", "mute", "twice", "json", "huge", "bad"}
    assert "0 pictures" in reasons["lone"] and "2 pictures" in reasons["two"]
    assert "1,000,000" in reasons["huge"]


def test_a_compressed_shard_is_named_with_the_remedy(tmp_path):
    shard(tmp_path / "x.tar", [("a.png", png()), ("a.txt", b"fine")])
    (tmp_path / "y.tar.gz").write_bytes(b"\x1f\x8b")
    listing = data.list_pictures(tmp_path)
    assert len(listing.entries) == 1 and "gunzip" in dict(listing.skipped)["y.tar.gz"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_linked_and_hidden_folders_are_skipped_and_told(tmp_path):
    folder, picture = tmp_path / "d", Image.new("RGB", (8, 8))
    fill(folder, a=picture)
    (folder / ".trash" / "files").mkdir(parents=True)
    for name in (b"caf\xe9", b".trash/files/b"):
        picture.save(odd := Path(os.fsdecode(bytes(folder) + b"/" + name + b".png")))
        odd.with_suffix(".txt").write_text("odd")
    fill(tmp_path / "elsewhere", c=picture)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "excluded.txt").write_text("a.png\n", encoding="utf-8-sig")
    got = data.list_pictures(folder, 8)
    assert not got.entries and got.excluded == 1
    assert sorted(got.skipped) == [("caf\\udce9.png", "its name is not one line of UTF-8 text: rename it"), (
        "link", "a link to a folder, which is not followed: put the folder itself there")]
    (folder / "excluded.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="excluded.txt is not UTF-8 text"):
        data.list_pictures(folder, 8)


def test_one_wrong_bit_makes_a_picture_unreadable_not_another(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    fill(tmp_path / "d", a=Image.fromarray(noise))
    path = tmp_path / "d" / "a.png"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="checksum"):
        data.read_picture(path, 8)


def test_what_excluded_txt_names_is_left_out_and_counted(tmp_path):
    folder = fill(tmp_path / "a", a=flat(), b=flat(), c=flat(), d=b"bad")
    (folder / "excluded.txt").write_text("b.png\nd.png\ngone.png\n")
    got = data.load_pictures(folder, 4)
    assert got.captions == [("a",), ("c",)] and not got.skipped and got.excluded == 2
    assert got.names == ["a.png", "c.png"]
    (folder / "excluded.txt").write_text("a.png\nb.png\nc.png\nd.png\n")
    with pytest.raises(ValueError, match="excluded.txt leaves out every picture"):
        data.load_pictures(folder, 4)


@pytest.mark.skipif(os.sep == "\\", reason="Windows refuses such names")
def test_a_name_of_two_lines_is_skipped_for_excluded_txt_has_one_a_line(tmp_path):
    fill(tmp_path / "a", **{"a\nb": flat(), "c\rd": flat(), "b": flat(), "e\u2028f": flat()})
    skipped = [("a\\nb.png", "its name is not one line of UTF-8 text: rename it"),
               ("c\\rd.png", "its name is not one line of UTF-8 text: rename it")]
    got = data.list_pictures(tmp_path / "a")
    assert [e.name for e in got.entries] == ["b.png", "e\u2028f.png"] and got.skipped == skipped
    rows = [json.dumps({"file": file, "captions": ["x"]}) for file in ("a\nb.png", "b.png")]
    (tmp_path / "a" / "captions.jsonl").write_text("\n".join(rows))
    got = data.list_pictures(tmp_path / "a")
    assert [e.name for e in got.entries] == ["b.png"] and got.skipped == [("captions.jsonl:1", skipped[0][1])]
    shard(tmp_path / "x.tar", [("a\nb.txt", b"alone"), ("c.png", png()), ("c.txt", b"fine")])
    assert [name for name, _ in data.list_pictures(tmp_path / "x.tar").skipped] == ["x.tar/a\\nb"]
