"""Claims about curate.py -> evidence.

What should not be trained on is found, shown, counted, and left out on request only.
"""
import io
import json
import runpy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import curate
import data
import text_encoders as te
from run_folder import save_part


def emoji(n):
    return [entry.picture.resize((96, 96), Image.Resampling.BICUBIC)
            for entry in data.list_pictures("emoji").entries[:n]]


def blur(seed, size=96):
    """A picture unlike any other: a few soft colours."""
    colours = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(picture, quality):
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=quality)
    return Image.open(stream).convert("RGB")


def fill(folder, pictures):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text("whole")


def distance(a, b):
    return float(np.linalg.norm(curate.look(a)[1] - curate.look(b)[1]))


@pytest.mark.parametrize("change", [
    lambda p: p.resize((50, 50)), lambda p: p.resize((192, 192), Image.Resampling.LANCZOS),
    lambda p: p.resize((61, 67)), lambda p: jpeg(p, 60), lambda p: ImageEnhance.Contrast(p).enhance(1.1),
    lambda p: ImageEnhance.Brightness(p).enhance(0.95)])
def test_resized_recompressed_and_relit_copies_look_the_same(change):
    distances = [distance(p, change(p)) for p in emoji(60)]
    assert max(distances) < curate.SAME_LOOK


def test_different_pictures_look_different():
    vectors = torch.stack([torch.from_numpy(curate.look(blur(seed))[1]) for seed in range(400)])
    apart = torch.cdist(vectors, vectors) + torch.eye(400)
    assert apart.min() > curate.SAME_CONTENT[1] > curate.SAME_LOOK
    everyday = torch.stack([torch.from_numpy(curate.look(p)[1]) for p in emoji(1026)])
    apart = torch.cdist(everyday, everyday) + torch.eye(1026)
    assert (apart.min(1).values < curate.SAME_LOOK).sum() <= 6         # faces that differ by an eyebrow
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (50, 50), "blue")
    assert distance(red, blue) > curate.SAME_LOOK > distance(red, Image.new("RGB", (80, 80), (250, 0, 0)))
    assert everyday[:, :768].norm(dim=1).max() == pytest.approx(1, abs=1e-3)
    assert distance(red, Image.new("RGB", (50, 50), "orange")) > curate.SAME_LOOK
    grain = [Image.effect_noise((64, 64), 4) for _ in range(2)]         # hardly any: blank, but for a scanner
    assert distance(*grain) < curate.SAME_LOOK and distance(red.convert("L"), red.convert("L")) == 0


@given(st.integers(0, 10 ** 6), st.integers(1, 80), st.floats(0.05, 1.0))
def test_each_copy_is_near_the_one_that_is_kept_and_the_kept_are_far_apart(seed, n, limit):
    g = torch.Generator().manual_seed(seed)
    vectors, rank = torch.rand(n, 3, generator=g), torch.randperm(n, generator=g).numpy()
    found = curate.copies(rank, (vectors, limit))
    apart = torch.cdist(vectors, vectors)
    assert all(apart[a, b] < limit + 1e-6 and rank[b] < rank[a] and b not in found for a, b in found.items())
    kept = [i for i in range(n) if i not in found]
    assert all(apart[a, b] >= limit - 1e-6 for a in kept for b in kept if a < b)


def test_of_two_that_are_kept_a_copy_is_the_firsts_by_rank_and_more_than_1024_are_compared():
    line = torch.tensor([[0.0], [0.15], [0.08]])
    assert curate.copies(np.array([0, 1, 2]), (line, 0.1)) == {2: 0}
    assert curate.copies(np.array([1, 0, 2]), (line, 0.1)) == {2: 1}
    many = torch.arange(1030.0)[:, None]
    many[1029] = many[1027]
    assert curate.copies(np.arange(1030), (many, 0.5)) == {1029: 1027}


def test_clusters_part_hardly_any_copies(monkeypatch):
    monkeypatch.setattr(curate, "CLUSTER", 100)
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(1000, 32, generator=g) / 32 ** 0.5
    vectors = torch.cat([vectors, vectors + 0.004 * torch.randn(1000, 32, generator=g)])
    assert sorted(np.concatenate(curate.clusters(vectors)).tolist()) == list(range(2000))
    assert len(curate.clusters(vectors)) > 10
    found = curate.copies(np.arange(2000), (vectors, 0.1))
    assert sum(found.get(1000 + i) == i for i in range(1000)) > 970 and min(found) >= 1000


def test_where_half_are_equal_the_others_stay_in_clusters_of_their_own(monkeypatch):
    monkeypatch.setattr(curate, "CLUSTER", 10)
    others = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = curate.clusters(torch.cat([others, torch.zeros(50, 8)]))    # of which several are first centres
    assert sorted(np.concatenate(found).tolist()) == list(range(100)) and len(found) > 4


def faulty(folder):
    """20 good pictures with a score and one of each fault; -> names by the step that should find them."""
    folder.mkdir()
    pictures = emoji(20)
    rows = []

    def add(name, picture, **about):
        picture.save(folder / name)
        rows.append({"file": name, "captions": [f"the caption of {name}"], **about})

    for i, picture in enumerate(pictures):
        add(f"{i:02}.png", picture, aesthetic=5 + i / 10)
    add("copy.jpg", jpeg(pictures[3].resize((70, 70)), 70), aesthetic=9)
    add("larger.png", pictures[7].resize((200, 200), Image.Resampling.BICUBIC), aesthetic=9)
    add("small.png", pictures[1].resize((20, 40)), aesthetic=9)
    add("long.png", pictures[2].resize((400, 64)), aesthetic=9)
    add("ugly.png", ImageEnhance.Color(pictures[4]).enhance(0).rotate(90), aesthetic=1.5)
    add("unscored.png", pictures[5].rotate(180))
    (folder / "bad.png").write_bytes(b"text")
    rows.append({"file": "bad.png", "captions": ["x"], "aesthetic": 9})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{nonsense\n")
    return {"unusable": ["captions.jsonl:28", "bad.png"], "small": ["small.png"], "long": ["long.png"],
            "aesthetic>=4.5": ["ugly.png", "unscored.png"], "copy": ["07.png", "copy.jpg"]}


def test_each_step_removes_its_fault_counts_it_and_shows_it(tmp_path):
    expected, said = faulty(tmp_path / "a"), []
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    found = curate.check(tmp_path / "a", min_side=32, scores=["aesthetic>=4.5"] * 2,
                          out=tmp_path / "report", say=said.append)
    assert {step: sorted(n for n, _ in items) for step, items in found.items()} == {
        step: sorted(names) for step, names in expected.items()}
    assert dict(found["copy"])["07.png"] == "like larger.png"           # the one with more pixels stays
    assert dict(found["aesthetic>=4.5"]) == {"ugly.png": "1.5", "unscored.png": "no such score"}
    sheets = sorted(p.name for p in (tmp_path / "report").glob("*.png"))
    assert sheets == ["1-unusable.png", "2-small.png", "3-long.png", "4-aesthetic-4-5.png", "5-copy.png"]
    with Image.open(tmp_path / "report" / "5-copy.png") as sheet:
        assert sheet.width > 4 * 128 and len(sheet.getcolors(1 << 20)) > 100
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["kept"] == 20 and "kept                      20" in "\n".join(said)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before       # nothing was touched


def test_apply_leaves_out_of_training_what_was_found_and_a_second_check_finds_nothing(tmp_path):
    faulty(tmp_path / "a")
    curate.check(tmp_path / "a", min_side=32, scores=["aesthetic>=4.5"], out=tmp_path / "r", apply=True,
                  say=lambda line: None)
    loaded = data.load_pictures(tmp_path / "a", 16)
    assert len(loaded.images) == 20 and loaded.excluded == 7
    assert [name for name, _ in loaded.skipped] == ["captions.jsonl:28"]                # still told: no name
    assert "the caption of larger.png" in {c for captions in loaded.captions for c in captions}
    again, said = tmp_path / "again", []
    found = curate.check(tmp_path / "a", min_side=32, scores=["aesthetic>=4.5"], out=again, say=said.append)
    assert [n for items in found.values() for n, _ in items] == ["captions.jsonl:28"]
    assert "7 excluded" in said[0]


def test_a_runs_clip_finds_crops_that_thumbnails_miss(tmp_path):
    torch.manual_seed(0)
    save_part(tmp_path / "run", "clip_l_image", te.CLIPImageEncoder(te.CLIPImageConfig.preset("tiny")))
    pictures = [blur(seed) for seed in range(12)]
    fill(tmp_path / "a", pictures)
    crop = pictures[2].crop((2, 2, 94, 94))
    assert curate.SAME_LOOK < distance(pictures[2], crop) < curate.SAME_CONTENT[1]
    crop.save(tmp_path / "a" / "crop.png")
    (tmp_path / "a" / "crop.txt").write_text("a crop")
    quiet = dict(out=tmp_path / "r", say=lambda line: None)
    assert curate.check(tmp_path / "a", **quiet)["copy"] == []
    found = curate.check(tmp_path / "a", run=tmp_path / "run", **quiet)
    assert found["copy"] == [] and found["near copy (CLIP)"] == [("crop.png", "like 02.png")]


def test_bounds_are_kept_the_upright_size_counts_and_the_copy_with_most_pixels_stays(tmp_path):
    sizes = {"bound": (48, 64), "below": (47, 64), "low": (64, 47), "three": (144, 48),
             "more": (145, 48), "high": (48, 145)}
    fill(tmp_path / "a", [])
    for i, (name, size) in enumerate(sizes.items()):
        blur(i).resize(size).save(tmp_path / "a" / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                                  # stored on its side
    blur(5).resize((64, 47)).save(tmp_path / "a" / "turned.jpg", exif=turned)
    blur(6).resize((60, 60)).save(tmp_path / "a" / "z square.png")      # behind those that are removed
    blur(6).resize((66, 48)).save(tmp_path / "a" / "wide.png")
    for picture in list((tmp_path / "a").iterdir()):
        picture.with_suffix(".txt").write_text("a picture")
    blur(7, 600).save(tmp_path / "a" / "large.jpg")
    (tmp_path / "a" / "large.txt").write_text("a picture")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "1-unusable.png").touch()                         # of an earlier report
    quiet = dict(size=32, out=tmp_path / "r", say=lambda line: None)
    found = curate.check(tmp_path / "a", min_side=48, **quiet)
    assert not (tmp_path / "r" / "1-unusable.png").exists()
    assert {step: sorted(items) for step, items in found.items()} == {
        "unusable": [],
        "small": [("below.png", "47 x 64"), ("low.png", "64 x 47"), ("turned.jpg", "47 x 64")],
        "long": [("high.png", "48 x 145"), ("more.png", "145 x 48")],
        "copy": [("wide.png", "like z square.png")]}
    assert curate.check(tmp_path / "a", **quiet)["small"] == []         # without --min-side: --size
    assert curate.look(tmp_path / "a" / "large.jpg")[0] == (600, 600)   # however small it was decoded


def test_the_report_counts_of_all_pictures_and_tells_captions_and_buckets(tmp_path):
    fill(tmp_path / "a", [*(blur(i).resize((128, 64)) for i in range(3)), blur(9).resize((96, 96)),
                          blur(7).resize((10, 10))])
    (tmp_path / "a" / "00.txt").write_text("one two three\nfour five six seven")
    (tmp_path / "a" / "04.txt").write_text("of a small picture that is left out in the end")
    (tmp_path / "a" / "05.png").write_bytes(b"text")
    (tmp_path / "a" / "05.txt").write_text("x")
    blur(8).save(tmp_path / "a" / "06.png")                             # without a caption
    said = []
    curate.check(tmp_path / "a", size=64, out=tmp_path / "r", say=said.append)
    lines = [" ".join(line.split()) for line in said]
    assert lines[0].endswith(": 7 entries") and lines[1].startswith("unusable 2 28.6 %")
    assert "kept 4 57.1 %" in lines and any(line.startswith("small 1 14.3 %") for line in lines)
    told, = [line for line in lines if line.startswith("buckets for --size 64")]
    width, height = map(int, told.split(": ")[1].split()[0].split("x"))
    assert width > height and told.endswith("64x64 1")
    assert ("captions: 1 of 4 pictures have synthetic ones beside the original; the longest has 4 words; "
            "3 times 'whole'") in lines


def test_a_long_list_is_shown_from_its_first_to_its_last_with_what_is_kept(tmp_path):
    pictures = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(240)]
    entries = [data.Entry(str(i), picture, ("x",), {}) for i, picture in enumerate(pictures)]
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "contact_sheet", lambda rows: shown.extend(rows.values()))
        curate.contact([(e.name, "why", i, None) for i, e in enumerate(entries)], entries, "small")
        assert [int(tile[0, 0, 0]) for row in shown for tile, _ in row] == list(range(0, 240, 10))
        assert [len(row) for row in shown] == [8, 8, 8]
        shown.clear()
        curate.contact([("5", "like 0", 5, 0)], entries, "copy")
        clear = data.Entry("clear.png", Image.new("RGBA", (32, 16)), ("x",), {})
        curate.contact([("clear.png", "why", 0, None)], [clear], "long")
    assert shown[1][0][0][[0, 64], 64].tolist() == [[128] * 3, [255] * 3]       # all of it, on white
    assert [(int(tile[0, 0, 0]), text) for tile, text in shown[0]] == [(5, ["5", "like 0"]), (0, ["kept: 0"])]


def test_pictures_are_embedded_64_at_a_time_each_once(tmp_path, monkeypatch):
    tower = te.CLIPImageEncoder(te.CLIPImageConfig.preset("tiny"))
    save_part(tmp_path / "run", "clip_l_image", tower)
    fill(tmp_path / "a", [blur(seed, 64) for seed in range(66)])
    listing = data.list_pictures(tmp_path / "a")
    entries, sizes, thumbs, embeds, lost = curate.examine(listing, tmp_path / "run")
    assert (len(entries), len(sizes), len(thumbs), lost) == (66, 66, 66, [])
    x = torch.stack([torch.from_numpy(np.array(blur(seed, 64))) for seed in (0, 63, 64, 65)])
    with torch.no_grad():
        own = tower(x.permute(0, 3, 1, 2) / 255)
    expected = torch.nn.functional.normalize(own, dim=1)
    assert len(embeds) == 66 and torch.allclose(embeds[[0, 63, 64, 65]], expected, atol=1e-4)
    seen, copies = [], curate.copies
    monkeypatch.setattr(curate, "copies", lambda rank, *spaces: seen.append(spaces) or copies(rank, *spaces))
    curate.check(tmp_path / "a", run=tmp_path / "run", out=tmp_path / "r", say=lambda line: None)
    (_, cosine), (_, thumbnail) = seen[1]
    assert cosine == pytest.approx((0.03 ** 2 + 1 - 0.97 ** 2) ** 0.5) and thumbnail == 0.35    # a chord


@pytest.mark.parametrize("rule, row, verdict", [
    ("aesthetic>=5", {"aesthetic": 5}, True), ("aesthetic >= 5.5", {"aesthetic": 5}, False),
    (" clip-score >=0", {"clip-score": 0}, True), ("nsfw<=0.05", {"nsfw": 0.05}, True),
    ("nsfw<=1e-3", {"nsfw": 0.05}, False), ("nsfw<=1", {}, None),
    ("nsfw<=1", {"nsfw": "0.05"}, True), ("nsfw<=1", {"nsfw": "6.0"}, False),
    ("nsfw<=1", {"nsfw": "no"}, None), ("nsfw<=1", {"nsfw": "nan"}, None),
    ("nsfw<=1", {"nsfw": float("nan")}, None),
    ("a<=1", {"a": True}, None), ("a<=1", {"a": [0]}, None), ("a<=1", {"a": None}, None),
    ("a<=1", {"a": -10 ** 400}, None)])
def test_scores_are_compared_as_numbers_and_missing_ones_pass_nothing(tmp_path, rule, row, verdict):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.png", "captions": ["a"], **row}))
    entry, = data.list_pictures(tmp_path).entries
    assert curate.passes(entry.about, rule) is verdict


def test_the_command_reports_and_errors_are_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "check-pics").mkdir(parents=True)              # of a check that was interrupted
    fill(tmp_path / "pics", [blur(i).resize([(40, 40), (50, 30), (30, 50)][i % 3]) for i in range(12)])
    curate.main(["check", "pics", "--min-side", "16", "--size", "32"])
    out = capsys.readouterr().out
    assert "kept                      12 100.0 %" in out and "buckets for --size 32: " in out
    assert "report.json; --apply leaves them out" in out
    assert (tmp_path / "runs" / "check-pics" / "report.json").is_file()
    curate.main(["check", "pics", "--max-ratio", "1.5", "--min-side", "16", "--size", "32", "--apply"])
    out = capsys.readouterr().out                                       # of 50 x 30 and 30 x 50:
    assert "long                       8  66.7 %" in out and "excluded.txt leaves them out from now on" in out
    assert "for example 01.png: 50 x 30" in out
    assert len((tmp_path / "pics" / "excluded.txt").read_text().split()) == 8
    for wrong, message in ((["gone"], "no such folder"), (["pics", "--score", "x>>2"], "is not a rule"),
                           (["pics", "--score", "x>=2"], "no scores at all"),
                           (["emoji"], "comes with the project"), (["drawn"], "comes with the project"),
                           (["pics", "--size", "50"], "not a multiple of 16"),
                           (["pics", "--size", "x"], "invalid int value"),
                           (["pics", "--run", "gone"], "clip_l_image.safetensors is missing")):
        with pytest.raises(SystemExit) as stop:
            curate.main(["check", *wrong])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("wrong, message", [
    (["--size", "100"], "try 96"), (["--score", "aesthetic>5"], "is not a rule"),
    (["--score", "aesthetic>=5,nsfw<=1"], "is not a rule"), (["--score", "aesthetic>=5-6"], "is not a rule"),
    (["--score", "aesthetics>=5"], "there are aesthetic"),
    (["--score", "x>=1", "--score", "aesthetic>=5"], "the score of 'x>=1'"),
    (["--max-ratio", "0"], "no ratio is below 1"), (["--max-ratio", "nan"], "no ratio is below 1"),
    (["--min-side", "0"], "it must be 1 or more"), (["--out", "pics/00.png"], "choose another --out")])
def test_bad_flags_are_refused_before_any_picture_is_decoded(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pics", [blur(i, 40) for i in range(3)])
    (tmp_path / "pics" / "00.json").write_text('{"aesthetic": 5}')
    monkeypatch.setattr(curate, "look", lambda *_, **how: pytest.fail("decoded"))
    with pytest.raises(SystemExit):
        curate.main(["check", "pics", *wrong, "--apply"])
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert not (tmp_path / "pics" / "excluded.txt").exists()


def test_pictures_that_captions_jsonl_passes_over_are_counted(tmp_path):
    fill(tmp_path / "pics", [blur(i) for i in range(5)])
    lines = [json.dumps({"file": f"{i:02}.png", "captions": ["x"]}) for i in range(3)]
    (tmp_path / "pics" / "captions.jsonl").write_text("\n".join(lines))
    said = []
    (tmp_path / "pics" / "excluded.txt").write_text("01.png\n")
    curate.check(tmp_path / "pics", out=tmp_path / "r", say=said.append)
    assert "2 entries and 1 excluded" in said[0]
    assert "2 pictures or shards for which captions.jsonl has no usable line" in said[1]


def test_pictures_that_are_missing_and_then_excluded_leave_none_beside(tmp_path):
    fill(tmp_path / "pics", [blur(i) for i in range(6)])
    lines = [json.dumps({"file": f"{i:02}.png", "captions": ["x"]}) for i in range(9)]
    (tmp_path / "pics" / "captions.jsonl").write_text("\n".join(lines))
    for excluded in range(2):
        said = []
        curate.check(tmp_path / "pics", out=tmp_path / "r", apply=True, say=said.append)
        assert not any("besides" in line for line in said)
    assert "6 entries and 3 excluded" in said[0]


def test_excluded_txt_holds_names_with_the_line_ends_of_unicode_and_grows_without_blank_lines(tmp_path):
    folder = tmp_path / "pics"
    fill(folder, [blur(i) for i in range(3)])
    names = [f"c{end}d.png" for end in "\u2028\u2029\x85"]
    for name in names:
        blur(9).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("odd")
    (folder / "excluded.txt").write_text("\n00.png\n\n", encoding="utf-8-sig")
    for source in (folder / "one of its.tar", folder):
        curate.exclude(source, ["captions.jsonl:3", *names])
        written = (folder / "excluded.txt").read_text(encoding="utf-8")
        assert written == "\n".join(["00.png", *names]) + "\n"
    assert [entry.name for entry in data.list_pictures(folder).entries] == ["01.png", "02.png"]


def test_names_that_a_console_cannot_show_stop_nothing(tmp_path, monkeypatch):
    """Into a file or a pipe Windows writes cp1252."""
    (tmp_path / "\u661f.png").write_bytes(b"no picture")
    (tmp_path / "\u661f.txt").write_text("a star")
    for i, picture in enumerate(emoji(4)):
        picture.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("an emoji")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    curate.main(["check", str(tmp_path), "--out", str(tmp_path / "report"), "--min-side", "8", "--apply"])
    assert "\u661f.png" in (tmp_path / "excluded.txt").read_text(encoding="utf-8")


def test_pictures_that_cannot_be_read_do_not_stop_the_check_that_leaves_them_out(tmp_path):
    save_part(tmp_path / "run", "clip_l_image", te.CLIPImageEncoder(te.CLIPImageConfig.preset("tiny")))
    fill(tmp_path / "a", [])
    for i in range(data.PATIENCE + 1):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
        (tmp_path / "a" / f"{i}.txt").write_text("empty")
    blur(0).save(tmp_path / "a" / "0.png")
    content = bytearray((tmp_path / "a" / "0.png").read_bytes())
    content[content.rindex(b"IEND") - 5] ^= 1                           # its checksum, which loading verifies
    (tmp_path / "a" / "0.png").write_bytes(content)
    found, again = [curate.check(tmp_path / "a", run=tmp_path / "run", out=tmp_path / "r", apply=True,
                                 say=lambda line: None) for _ in range(2)]
    assert len(found["unusable"]) == data.PATIENCE + 1 and not any(again.values())


def test_a_folder_of_caption_files_alone_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("whole")
    with pytest.raises(SystemExit):
        curate.main(["check", str(tmp_path)])
    assert "a.txt: no picture of this name" in capsys.readouterr().err


def test_the_report_on_another_folder_of_the_same_name_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        fill(tmp_path / place / "pics", [blur(i, 40) for i in range(3)])
    curate.main(["check", "a/pics"])
    curate.main(["check", str(tmp_path / "a" / "pics")])            # the same folder: its report is renewed
    with pytest.raises(SystemExit):
        curate.main(["check", "b/pics"])
    held = str(tmp_path / "a" / "pics")
    assert f"the report on {held}: choose another folder with --out" in capsys.readouterr().err
    report = json.loads((tmp_path / "runs" / "check-pics" / "report.json").read_text())
    assert report["source"] == held
    curate.main(["check", "b/pics", "--out", "runs/check-pics"])


def test_data_py_check_is_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data.py", "check", "pics"])
    fill(tmp_path / "pics", [*(blur(i, 40) for i in range(4)), blur(4).resize((160, 64))])
    runpy.run_path(data.__file__, run_name="__main__")
    out = capsys.readouterr().out                                       # of 64 pixels and 3 to one by default
    assert "small                      4  80.0 %" in out and "kept                       1  20.0 %" in out
    monkeypatch.setattr("sys.argv", ["data.py", "chek", "pics"])        # no call without a command
    with pytest.raises(SystemExit):
        runpy.run_path(data.__file__, run_name="__main__")
    assert "invalid choice: 'chek'" in capsys.readouterr().err


def test_a_runs_clip_is_shown_pictures_in_the_range_that_it_has_learned(tmp_path, monkeypatch):
    save_part(tmp_path / "run", "clip_l_image", te.CLIPImageEncoder(te.CLIPImageConfig.preset("tiny")))
    fill(tmp_path / "a", [blur(0), blur(1)])
    seen, look = [], te.CLIPImageEncoder.forward
    monkeypatch.setattr(te.CLIPImageEncoder, "forward", lambda self, x: seen.append(x) or look(self, x))
    curate.check(tmp_path / "a", run=tmp_path / "run", out=tmp_path / "r", say=lambda line: None)
    [x] = seen
    assert len(x) == 2 and 0 <= x.min() < 0.4 and 0.6 < x.max() <= 1        # as in stages.py, not from -1
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("lime", (32, 0, 64, 32))
    assert (curate.look(wide, 32)[2] == (0, 255, 0)).all()                  # the middle, not stretched
    Image.effect_noise((256, 256), 90).save(tmp_path / "fine.jpg")
    with Image.open(tmp_path / "fine.jpg") as fine:                         # nor of a smaller decoding
        sharp = np.array(fine.convert("RGB").resize((128, 128)))
    assert np.array_equal(curate.look(tmp_path / "fine.jpg", 128)[2], sharp)
