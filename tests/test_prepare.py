"""Claims about prepare.py -> evidence.

Order: every batch is of one bucket, every picture comes once an epoch, any step can be computed alone, N
ranks see what one sees. Cache: it holds what the encoders say, goes on after an interruption, is made by any
number of ranks, notices other data and other encoders, and is fast.
"""

import io
import json
import pickle
import struct
import threading
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import prepare
import text_encoders as te
import tokens
from conftest import names_of
from prepare import Batches, Cache, Order, Survey, write_cache
from run_folder import load_tensors, save_tensors
from vae import AutoencoderKL, VAEConfig


# --- Buckets ---

@example(64)
@given(st.integers(1, 64).map(lambda n: 16 * n))
def test_buckets_are_multiples_of_16_of_about_equal_area_and_at_most_2_to_1(size):
    shapes = prepare.bucket_shapes(size)
    assert shapes[0] == (size, size) and len(set(shapes)) == len(shapes)
    assert all(w % 16 == 0 == h % 16 and max(w, h) <= 2 * min(w, h) for w, h in shapes)
    assert all((h, w) in shapes for w, h in shapes)
    if size >= 64:
        assert all(0.8 < w * h / size ** 2 < 1.25 for w, h in shapes) and len(shapes) >= 5
    if size >= 256:
        assert all(0.94 < w * h / size ** 2 < 1.06 for w, h in shapes)


@example(30, 20)
@given(st.integers(20, 2000), st.integers(20, 2000))
def test_a_picture_up_to_2_to_1_loses_at_most_a_tenth_to_its_bucket(width, height):
    shapes = prepare.bucket_shapes(256)
    w, h = shapes[prepare.nearest_bucket(width, height, shapes)]
    kept = min(width / height, w / h) / max(width / height, w / h)
    assert kept == max(min(width / height, a / b) / max(width / height, a / b) for a, b in shapes)
    assert kept > 0.9 or max(width, height) > 1.9 * min(width, height)


def test_a_side_that_no_bucket_can_have_is_refused_with_the_nearest_that_one_can():
    for size, near in ((0, 16), (7, 16), (90, 96), (100, 96)):
        with pytest.raises(ValueError, match=f"size {size} is not a multiple of 16: try {near}$"):
            prepare.bucket_shapes(size)


def test_the_size_is_that_of_the_upright_picture_and_costs_no_decoding(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "plain.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    sizes = [prepare.identify(tmp_path / name)[0] for name in ("turned.jpg", "turned.png", "plain.png")]
    assert sizes == [(20, 40), (20, 40), (40, 20)]


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def png_with(chunk, body, late):
    """40 x 20 pixels, with a chunk before or after them."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 20)).save(stream, "png")
    whole = stream.getvalue()
    place = whole.index(b"IEND" if late else b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return whole[:place] + chunk + whole[place:]


@pytest.mark.parametrize("name, turned", [
    ("exif.jpg", True), ("xmp.jpg", True), ("9.jpg", False), ("exif.png", True), ("xmp.png", True),
    ("late exif.png", False), ("late xmp.png", False), ("exif.webp", True), ("exif.tif", True),
    ("lzw.tif", True)])
def test_the_size_is_that_of_the_picture_as_it_is_loaded(tmp_path, name, turned):
    kind, suffix, exif = name.split(".")[0], name.split(".")[1], Image.Exif()
    exif[0x0112] = 9 if kind == "9" else 6
    path, picture = tmp_path / name, Image.new("RGB", (40, 20))
    if suffix == "png":
        chunk = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) if "xmp" in kind else (
            b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(png_with(*chunk, late="late" in kind))
    elif kind == "xmp":
        picture.save(path, xmp=XMP)
    else:
        picture.save(path, exif=exif, **({"compression": "tiff_lzw"} if kind == "lzw" else {}))
    with data.opened(path) as image:
        first = prepare.upright_size(image), data.upright(image, 64).size      # as curate does, in one go
    with data.opened(path, whole=True) as image:
        loaded = data.upright(image, 64).size
    assert {*first, loaded, prepare.identify(path)[0]} == {(20, 40) if turned else (40, 20)}


def test_all_eight_orientations_give_the_size_of_the_turned_picture(tmp_path):
    for k in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = k
        Image.new("RGB", (30, 20)).save(tmp_path / f"{k}.jpg", exif=exif)
        assert prepare.identify(tmp_path / f"{k}.jpg")[0] == ((20, 30) if k >= 5 else (30, 20))


# --- Order ---

buckets_of = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@settings(max_examples=60)
@given(buckets_of, st.integers(1, 20), st.integers(0, 2 ** 32), st.integers(1, 6))
def test_every_batch_is_of_one_bucket_and_every_picture_comes_once_an_epoch(buckets, batch, seed, epochs):
    order, seen = Order(buckets, batch, seed), Counter()
    for step in range(order.before(epochs)):
        pictures = order.at(step)
        assert len(pictures) == batch and len({buckets[i] for i in pictures}) == 1
        assert 0 <= order.epoch_of(step) < epochs
        seen.update(pictures.tolist())
    for bucket, n in Counter(buckets).items():      # less than a batch of a bucket is still to come
        counts = [seen[i] for i, b in enumerate(buckets) if b == bucket]
        assert max(counts) <= epochs and max(counts) - min(counts) <= 1
        assert n * epochs - sum(counts) < batch


@given(buckets_of, st.integers(1, 20), st.integers(0, 99), st.integers(0, 10 ** 6))
def test_any_step_can_be_computed_alone(buckets, batch, seed, step):
    alone, run = Order(buckets, batch, seed), Order(buckets, batch, seed)
    first = max(0, step - 30)
    assert all(np.array_equal(run.at(s), Order(buckets, batch, seed).at(s)) for s in range(first, step, 10))
    assert np.array_equal(alone.at(step), run.at(step))


def test_epochs_and_seeds_differ_and_buckets_are_mixed_within_an_epoch():
    buckets = [0] * 64 + [1] * 64
    order = Order(buckets, 8, 0)
    epochs = [[tuple(order.at(s)) for s in range(16 * e, 16 * e + 16)] for e in range(3)]
    assert len({tuple(e) for e in epochs}) == 3 and Order(buckets, 8, 1).at(0).tolist() != list(epochs[0][0])
    assert all(sorted(sum(map(list, e), [])) == list(range(128)) for e in epochs)
    runs = [buckets[batch[0]] for batch in epochs[0]]
    assert 3 < sum(a != b for a, b in zip(runs, runs[1:]))              # not one bucket after the other
    assert len({tuple(buckets[batch[0]] for batch in e) for e in epochs}) == 3 and len(order.kept) <= 7
    assert len({tuple(i % 64 for i in batch) for e in epochs for batch in e}) == 3 * 16     # nor in one order


def test_order_refuses_no_pictures_and_bad_numbers():
    for wrong in (([], 1, 0), ([0], 0, 0), ([0], 1, -1)):
        with pytest.raises(ValueError, match="at least"):
            Order(*wrong)


# --- The cache ---

class Encoders:
    """Tiny and untrained, but real; how often the autoencoder is called is counted."""

    def __init__(self, folder, captions):
        torch.manual_seed(0)
        tokens.train_clip_tokenizer(captions, folder / "clip", 600)
        tokens.train_t5_tokenizer(captions, folder / "t5", 600)
        words = [tokens.load_clip_tokenizer(folder / "clip", pad, 12) for pad in (tokens.EOS, "!")]
        words += [tokens.load_t5_tokenizer(folder / "t5", 16)]
        l, g = (te.CLIPTextEncoder(te.CLIPTextConfig.preset(
            f"tiny_{x}", vocab_size=words[0].vocab_size, context_length=12)) for x in "lg")
        t5 = te.T5Encoder(te.T5Config.preset("tiny", vocab_size=words[2].vocab_size))
        self.text, self.vae = te.TextEncoders(l, g, t5, words).eval(), AutoencoderKL(
            VAEConfig.preset("tiny", shift=0.1, scale=1.5))
        self.calls, encode = 0, self.vae.encode

        def counted(x):
            self.calls += 1
            return encode(x)
        self.vae.encode = counted

    def write(self, folder, survey, **kw):
        kw = {"vae_print": "v", "text_print": "t", "t5_length": 16, "say": lambda line: None} | kw
        return write_cache(folder, survey, self.vae, self.text, **kw)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return Encoders(tmp_path_factory.mktemp("words"), ["a red field", "a wide blue one", "number twelve"] * 4)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 8)


def fill(folder, n=30, start=0):
    """n noisy pictures, a third of them wide, a third tall, half of them with a synthetic caption."""
    folder.mkdir(exist_ok=True)
    for i in range(start, start + n):
        shape = [(40, 40), (50, 30), (30, 50)][i % 3]
        noise = np.random.default_rng(i).integers(0, 255, (*shape[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.png")
        captions = [f"number {i}"] + [f"a noisy field, number {i}"] * (i % 2)
        (folder / f"{i:03}.txt").write_text("\n".join(captions))
    return folder


def surveyed(folder, size=64):
    return Survey(data.list_pictures(folder).entries, size)


def close(stored, said):
    """Within bfloat16's rounding, for the same caption encoded in another batch."""
    return stored.dtype == torch.bfloat16 and torch.allclose(stored.float(), said, rtol=0.01, atol=0.002)


def test_a_cache_goes_to_another_process_and_knows_how_many_captions_a_picture_has(tmp_path, encoders):
    encoders.write(tmp_path / "cache", surveyed(fill(tmp_path / "a", 3)))
    cache, pictures = Cache(tmp_path / "cache"), np.array([1])
    last = cache.counts[pictures] - 1
    for a, b in zip(cache.read(pictures, last), pickle.loads(pickle.dumps(cache)).read(pictures, last)):
        assert torch.equal(a, b)
    for beyond in (last + 1, last * 0 - 1):
        with pytest.raises(IndexError, match="captions"):
            cache.read(pictures, beyond)
    with pytest.raises(IndexError, match="captions"):           # one of them is enough
        cache.text(np.arange(3), cache.counts - torch.tensor([1, 1, 0]))


def test_nan_text_features_are_refused(tmp_path, encoders, monkeypatch):
    weight = encoders.text.t5.encoder.final_layer_norm.weight
    monkeypatch.setattr(weight, "data", weight.data * torch.nan)
    with pytest.raises(ValueError, match="a text encoder gives NaN"):
        encoders.write(tmp_path / "cache", surveyed(fill(tmp_path / "a", 3)))


def test_the_cache_holds_what_the_encoders_say(tmp_path, encoders, small_shards):
    survey = surveyed(fill(tmp_path / "a"))
    assert encoders.write(tmp_path / "cache", survey) == [] and survey.captions == sorted(survey.captions)
    cache = Cache(tmp_path / "cache")
    assert len(cache) == 30 and sorted(names_of(cache)) == [f"{i:03}.png" for i in range(30)]
    assert set(cache.shapes) == {"64x64", "80x48", "48x80"} and cache.index["size"] == 64
    clip = load_tensors(cache.folder / cache.files["text"][0])[0]["clip"]
    assert clip.shape[1:] == (12, sum(encoders.text.widths[:2]))        # without the zeros that pad it
    for i in (0, 13, 29):
        entry = next(e for e in survey.entries if e.name == names_of(cache)[i])
        box = survey.shapes[survey.buckets[survey.entries.index(entry)]]
        x = torch.from_numpy(data.read_picture(entry.picture, box)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = encoders.vae.encode(x)
        for k, caption in enumerate(entry.captions):
            mean, std, context, pooled = cache.read(np.array([i]), torch.tensor([k]))
            said = encoders.text([caption], 16)
            assert mean.shape == posterior.mean.shape == (1, 16, box[1] // 8, box[0] // 8)
            assert (mean - encoders.vae.to_latent(posterior.mean)).abs().max() < 2e-3
            assert torch.allclose(std.float(), 1.5 * torch.exp(0.5 * posterior.logvar), rtol=2e-3)
            assert close(context, said.context) and close(pooled, said.pooled)
        assert tuple(cache.texts(i)) == entry.captions
    rows = torch.tensor([cache.counts[i] - 1 for i in range(10)])       # and in a batch as alone
    batch = cache.read(np.arange(10), rows)
    for i in range(10):
        alone = cache.read(np.array([i]), rows[i:i + 1])
        assert all(torch.equal(x[i:i + 1], y) for x, y in zip(batch, alone))


def test_latents_of_256_pixels_take_the_papers_65_kilobytes(tmp_path, encoders):
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black")
    vae = AutoencoderKL(VAEConfig.preset("tiny"))
    write_cache(tmp_path / "cache", surveyed(tmp_path, 256), vae, encoders.text, vae_print="", text_print="",
                t5_length=16, say=lambda line: None)
    size = (tmp_path / "cache" / "latents-256x256-00000.safetensors").stat().st_size
    assert 65_536 < size < 65_536 + 1_000                       # the rest is the header


def test_an_interrupted_cache_is_finished_without_doing_anything_twice(tmp_path, encoders, small_shards):
    survey = surveyed(fill(tmp_path / "a"))
    encoders.calls = 0
    encoders.write(tmp_path / "whole", survey)
    needed, encode = encoders.calls, encoders.vae.encode
    encoders.calls = 0

    def killed(x):
        if encoders.calls == 3:
            raise KeyboardInterrupt
        return encode(x)

    encoders.vae.encode = killed
    with pytest.raises(KeyboardInterrupt):
        encoders.write(tmp_path / "cut", survey)
    encoders.vae.encode = encode
    with pytest.raises(ValueError, match="not finished"):
        Cache(tmp_path / "cut")
    encoders.write(tmp_path / "cut", survey)
    assert encoders.calls == needed
    encoders.write(tmp_path / "cut", survey)                    # and a third time nothing is left to do
    assert encoders.calls == needed
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "cut").iterdir())
    for step in range(10):
        both = [Batches(Cache(tmp_path / name), 8, 0).at(step) for name in ("whole", "cut")]
        assert all(map(torch.equal, *both))


def test_any_number_of_ranks_make_the_same_cache(tmp_path, encoders, small_shards):
    survey = surveyed(fill(tmp_path / "a"))
    encoders.write(tmp_path / "one", survey)
    for rank in (2, 0):
        encoders.write(tmp_path / "three", survey, rank=rank, world=3)
        assert (tmp_path / "three" / "index.json").exists() == (rank == 0)
    with pytest.raises(ValueError, match="not finished"):       # rank 1's files are missing
        Cache(tmp_path / "three")
    encoders.write(tmp_path / "three", survey, rank=1, world=3)
    one, three = Cache(tmp_path / "one"), Cache(tmp_path / "three")
    assert names_of(one) == names_of(three)
    for step in range(10):
        assert all(map(torch.equal, Batches(one, 8, 0).at(step), Batches(three, 8, 0).at(step)))


def test_a_picture_more_changes_one_file_also_where_a_new_cache_would_have_more_files(
        tmp_path, encoders, small_shards):
    def squares(n, rank=0, world=1):
        survey = Survey(data.list_pictures(fill(tmp_path / "a", n)).entries, 64, bucketed=False)
        encoders.write(tmp_path / "cache", survey, rank=rank, world=world)
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.safetensors")}

    before = squares(16)                                        # two shards of 8; of 17 there would be 4
    after = squares(17)
    assert sum(after[name] != before[name] for name in before) == 2         # latents, and their caption's
    assert after.keys() == before.keys() == set(prepare._files(tmp_path / "cache"))
    assert len(Cache(tmp_path / "cache")) == 17
    for rank in (1, 0, 2):                                      # rank 0 writes another index in between
        squares(32, rank, 3)
    assert len(Cache(tmp_path / "cache")) == 32
    assert sum("latents" in name for name in squares(32)) == 2
    assert sum("latents" in name for name in squares(33)) > 2               # at last they are too large
    made = [f"text-{k:05}.safetensors" for k in range(8)]                   # of 2 texts each, or hardly one
    many, few = (len(prepare._shards("text", [*map(str, range(n))], made)) for n in (16, 8))
    assert many > 2 and few == 1


@given(st.integers(1, 40), st.integers(1, 400), st.integers(0, 3))
def test_ranks_agree_on_the_files_whether_rank_0_has_written_its_index_or_not(one, other, seed):
    def files(n, made):
        shards = prepare._shards("text", [f"{seed} {i}" for i in range(n)], made)
        assert sorted(i for _, part in shards for i in part) == list(range(n))
        return [f"text-{k:05}.safetensors" for k, _ in shards]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD", 32)
        assert prepare.key("a red star") == -1334348713213267625       # in any process
        then = files(10 * one, [])
        now = files(other, then)
        assert files(other, now) == now


@pytest.fixture(scope="module")
def cache(tmp_path_factory, encoders):
    folder = tmp_path_factory.mktemp("shared")
    encoders.write(folder / "cache", surveyed(fill(folder / "a")))
    return Cache(folder / "cache")


@pytest.mark.parametrize("world", [2, 4])
def test_n_ranks_together_see_the_batch_of_one(cache, world):
    rows = [slice(rank * 8 // world, (rank + 1) * 8 // world) for rank in range(world)]
    for step in (0, 1, 17):
        shares = [Batches(cache, 8, 3).at(step, rows=mine) for mine in rows]
        assert all(map(torch.equal, map(torch.cat, zip(*shares)), Batches(cache, 8, 3).at(step)))


def test_a_batch_is_of_one_shape_and_the_same_at_every_asking(cache):
    batches, shapes = Batches(cache, 8, 0), set()
    for step in range(20):
        mean, std, context, pooled = batches.at(step)
        shapes.add(tuple(mean.shape))
        assert mean.shape == std.shape and len(context) == len(pooled) == 8 and mean.dtype == torch.float32
    assert shapes == {(8, 16, 8, 8), (8, 16, 6, 10), (8, 16, 10, 6)}
    later = Batches(cache, 8, 0)
    assert all(map(torch.equal, later.at(13), batches.at(13)))
    assert not torch.equal(batches.at(13)[0], Batches(cache, 8, 1).at(13)[0])


@pytest.fixture
def cards(monkeypatch):
    """On a machine with four, of which this process uses the last -> who has chosen which, (thread, card)."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: chosen.append((threading.get_ident(), card)))
    return chosen


def test_the_thread_that_reads_ahead_uses_its_processs_own_card(cache, cards):
    assert Batches(cache, 8, 0).thread.submit(threading.get_ident).result() and not cards
    reader = Batches(cache, 8, 0, locked=True).thread.submit(threading.get_ident).result()
    assert cards == [(reader, 3)] and reader != threading.get_ident()


def test_what_is_read_ahead_is_what_would_have_been_read_and_is_read_once(cache, monkeypatch, cards):
    asked, read = [], Batches._read
    monkeypatch.setattr(Batches, "_read",
                        lambda self, step, rows: asked.append((step, rows.start)) or read(self, step, rows))
    batches, halves = Batches(cache, 8, 0, locked=True), (slice(0, 4), slice(4, 8))
    steps = 5, 6, 7, 3, 4, 90                                   # with two jumps, which nobody expected
    for step in steps:
        for rows in halves:
            found = batches.at(step, "cpu", rows)
            batches.expect(step + 1, rows)
            batches.at(step, "cpu", slice(0, 1))                # another part, which nobody expected either
            assert all(map(torch.equal, found, Batches(cache, 8, 0).at(step, rows=rows)))
        assert len(batches.ahead) == 2
    once = [(step, rows.start) for step in (5, 6, 7, 8, 3, 4, 5, 90, 91) for rows in halves]
    assert sorted(asked) == sorted(once + [(step, k) for step in steps for k in (0, 0, 0, 4)])


def test_an_error_while_reading_ahead_is_raised_where_the_batch_is_needed(cache, monkeypatch):
    batches = Batches(cache, 8, 0)
    batches.at(0)
    monkeypatch.setattr(cache, "read", lambda *_: 1 / 0)
    batches.expect(1)
    with pytest.raises(ZeroDivisionError):
        batches.at(1)
    monkeypatch.undo()
    assert all(map(torch.equal, batches.at(1), Batches(cache, 8, 0).at(1)))


def test_reading_rows_as_large_as_those_of_sd3s_encoders_costs_hardly_more_than_copying_them(monkeypatch):
    """into memory that was used before, as page-locked memory is; new memory costs as much again"""
    cache, n, kept, room = Cache.__new__(Cache), 32, {}, prepare.room
    monkeypatch.setattr(prepare, "room", lambda shape, *how: kept.setdefault(shape, room(shape, *how)))
    cache.files, cache.first = {"text": ["a", "b"]}, torch.arange(2 * n)
    cache.counts = torch.ones_like(cache.first)
    cache.rows = np.random.default_rng(0).permutation(2 * n)
    cache.text_place = np.stack([np.repeat([0, 1], n), np.tile(np.arange(n), 2)], 1)
    sizes = {"clip": (77, 2048), "t5": (77, 4096), "pooled": (2048,)}
    there = {name: {kind: torch.randn(n, *size).bfloat16() for kind, size in sizes.items()} for name in "ab"}
    cache._mapped = there.get
    seconds, copy = {"read": [], "copy": []}, torch.zeros(n, 154, 4096, dtype=torch.bfloat16)
    for _ in range(7):
        start = time.process_time()
        context, pooled = cache.text(np.arange(n), torch.zeros(n, dtype=torch.long))
        half = time.process_time()
        copy.copy_(context)
        seconds["read"].append(half - start)
        seconds["copy"].append(time.process_time() - half)
    for row, (shard, i) in zip(context, cache.text_place[cache.rows[:n]]):
        said = there["ab"[shard]]
        assert torch.equal(row[:77, :2048], said["clip"][i]) and torch.equal(row[77:], said["t5"][i])
        assert not row[:77, 2048:].any()
    assert torch.equal(copy, context) and min(seconds["read"]) < 2.5 * min(seconds["copy"]), seconds


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux, which lists a process's maps")
def test_a_cache_of_any_number_of_files_maps_no_more_of_them_than_a_process_may(
        tmp_path, encoders, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 4)
    monkeypatch.setattr(prepare, "MAPS", 3)
    encoders.write(tmp_path / "cache", surveyed(fill(tmp_path / "a")))
    batches = Batches(Cache(tmp_path / "cache"), 8, 0)
    mapped = lambda: {line.split()[-1] for line in open("/proc/self/maps") if str(tmp_path) in line}
    assert len(batches.cache.files["latents"]) > 6 and not mapped()             # opening it keeps none
    found = [batches.at(step) for step in range(10)]
    assert 0 < len(mapped()) <= 3
    monkeypatch.setattr(prepare, "MAPS", 99)
    all_mapped = Batches(Cache(tmp_path / "cache"), 8, 0)
    assert all(all(map(torch.equal, x, all_mapped.at(step))) for step, x in enumerate(found))


def test_a_dataset_smaller_than_a_batch_fills_it(tmp_path, encoders):
    encoders.write(tmp_path / "cache", surveyed(fill(tmp_path / "a", 3)))
    batches = Batches(Cache(tmp_path / "cache"), 16, 0)
    assert all(len(batches.at(step)[0]) == 16 for step in range(5))


def test_synthetic_captions_come_half_of_the_time_where_there_are_any(cache):
    def share(synthetic):
        taken, pictures = [], []
        for step in range(60):
            batches = Batches(cache, 8, 0, synthetic=synthetic)
            chosen, read = [], cache.read
            cache.read = lambda p, c, *how: chosen.append((p, c)) or read(p, c, *how)
            batches.at(step)
            del cache.read
            pictures += chosen[0][0].tolist()
            taken += chosen[0][1].tolist()
        both = [t for p, t in zip(pictures, taken) if cache.counts[p] > 1]
        assert not any(t for p, t in zip(pictures, taken) if cache.counts[p] == 1)
        return sum(both) / len(both)

    assert abs(share(0.5) - 0.5) < 0.12 and share(0.0) == 0 and share(1.0) == 1


def test_unreadable_pictures_are_told_and_left_out(tmp_path, encoders, small_shards):
    folder = fill(tmp_path / "a")
    whole = (folder / "004.png").read_bytes()
    (folder / "004.png").write_bytes(whole[:len(whole) // 2])   # the header is fine: only decoding tells
    (folder / "007.png").write_bytes(b"text")
    survey = surveyed(folder)
    assert [name for name, reason in survey.skipped if reason] == ["007.png"]
    assert [name for name, _ in encoders.write(tmp_path / "cache", survey)] == ["004.png"]
    cache = Cache(tmp_path / "cache")
    assert len(cache) == 28 and [name for name, _ in cache.skipped] == ["004.png"]
    assert len(Batches(cache, 8, 0).at(5)[0]) == 8


def test_a_cache_that_lacks_most_of_its_pictures_is_refused(tmp_path, encoders):
    folder = fill(tmp_path / "a", 5)
    for i in range(3):
        (folder / f"{i:03}.png").write_bytes((folder / f"{i:03}.png").read_bytes()[:100])
    survey = surveyed(folder)
    assert len(encoders.write(tmp_path / "cache", survey)) == 3
    for _ in range(2):                                          # also when nothing is left to encode
        with pytest.raises(ValueError, match="3 of 5 entries are unusable"):
            Cache(tmp_path / "cache")
        encoders.write(tmp_path / "cache", survey)


def test_a_thousand_pictures_with_bad_ones_are_cached_and_read_to_the_end(tmp_path, encoders):
    for i in range(1000):
        name = tmp_path / f"{i:04}.png"
        Image.new("RGB", (16, 16), (i % 256, i // 4, 90)).save(name)
        name.with_suffix(".txt").write_text(f"number {i % 50}")
        if i % 20 == 3:
            name.write_bytes([name.read_bytes()[:60], b"", b"<html>"][i // 20 % 3])
    listing = data.list_pictures(tmp_path)
    survey = Survey(listing.entries, 16)
    lost = survey.skipped + encoders.write(tmp_path / "cache", survey, batch=128)
    assert sorted(name for name, _ in lost) == [f"{i:04}.png" for i in range(3, 1000, 20)]
    batches = Batches(Cache(tmp_path / "cache"), 50, 0)
    assert sum(len(batches.at(step)[0]) for step in range(19)) == 950 == len(batches.cache)


@pytest.mark.parametrize("change", [
    lambda a: (a / "003.txt").write_text("another caption"),
    lambda a: (a / "003.png").write_bytes((a / "006.png").read_bytes()),
    lambda a: fill(a, 2, start=50),
    lambda a: (a / "005.png").unlink() or (a / "005.txt").unlink(),
    lambda a: (a / "excluded.txt").write_text("002.png\n008.png")])
def test_changed_data_is_noticed_and_only_its_files_are_made_again(tmp_path, encoders, small_shards, change):
    folder, said = fill(tmp_path / "a"), []
    encoders.write(tmp_path / "cache", surveyed(folder))
    encoders.write(tmp_path / "cache", surveyed(folder), say=said.append)
    assert not any("other pictures" in line for line in said)
    change(folder)
    survey, said = surveyed(folder), []
    encoders.calls = 0
    encoders.write(tmp_path / "cache", survey, say=said.append)
    assert encoders.calls <= 2 and "other pictures or captions" in said[0]
    cache, entries = Cache(tmp_path / "cache"), {e.name: e for e in survey.entries}
    assert cache.index["data"] == survey.fingerprint and sorted(names_of(cache)) == sorted(entries)
    for i, name in enumerate(names_of(cache)):            # old latents go with new text
        assert tuple(cache.texts(i)) == entries[name].captions
        *_, context, pooled = cache.read(np.array([i]), torch.tensor([0]))
        assert close(pooled, encoders.text([entries[name].captions[0]], 16).pooled)


def test_a_picture_repainted_at_equal_length_is_noticed(tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{colour}.bmp")
    (tmp_path / "red.txt").write_text("a field")
    (tmp_path / "blue.txt").write_text("a field")
    before = surveyed(tmp_path).fingerprint
    (tmp_path / "red.bmp").write_bytes((tmp_path / "blue.bmp").read_bytes())
    assert surveyed(tmp_path).fingerprint != before
    (tmp_path / "red.txt").write_text("a field\nall red")
    before = surveyed(tmp_path).fingerprint
    (tmp_path / "red.txt").write_text("a field\nall blue")
    assert surveyed(tmp_path).fingerprint != before


def test_a_pictures_digest_knows_its_length_and_32_kilobytes_from_either_end(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (200, 200)).save(path)
    whole = path.read_bytes()
    changed = {whole, whole + bytes(100)}
    changed |= {whole[:k] + b"x" + whole[k + 1:] for k in (32_000, len(whole) - 32_000)}
    digests = {path.write_bytes(content) and prepare.identify(path)[1] for content in changed}
    assert len(digests) == 4 and prepare.digest(b"ab", b"c") != prepare.digest(b"a", b"bc")


def test_the_fingerprint_knows_files_tars_emoji_and_drawings(tmp_path):
    from test_data import shard
    folder = fill(tmp_path / "a", 6)
    shard(tmp_path / "x.tar", [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())])
    tar = Survey(data.list_pictures(tmp_path / "x.tar").entries, 64)
    assert tar.digests == surveyed(folder).digests and tar.fingerprint == surveyed(folder).fingerprint
    drawn = [Survey(data.list_pictures("drawn", count=5, seed=s).entries, 32).fingerprint for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    emoji = Survey(data.list_pictures("emoji").entries[:50], 64)
    assert len(set(emoji.digests)) == 50
    alike = [*emoji.entries, *data.list_pictures("drawn", count=5).entries]            # but for the picture
    assert len({prepare.identify(entry.picture) for entry in alike}) == 55


def test_other_encoders_are_refused_and_make_their_own_files_again(tmp_path, encoders, small_shards):
    survey, said = surveyed(fill(tmp_path / "a")), []
    encoders.write(tmp_path / "cache", survey)
    with pytest.raises(ValueError, match=r"another autoencoder \(fingerprint v\) than this run's \(other\)"):
        Cache(tmp_path / "cache").compare("other", "t")
    with pytest.raises(ValueError, match="made by other text encoders"):
        Cache(tmp_path / "cache").compare("v", "other")
    encoders.calls = 0
    encoders.write(tmp_path / "cache", survey, text_print="other", say=said.append)
    assert encoders.calls == 0 and "by other text encoders" in said[0]
    Cache(tmp_path / "cache").compare("v", "other")
    encoders.write(tmp_path / "cache", survey, text_print="other", t5_length=8)         # a setting counts too
    assert Cache(tmp_path / "cache").read(np.array([0]), torch.tensor([0]))[2].shape[1] == 12 + 8
    plans = [prepare._plan(survey, [], *by) for by in (         # vae, text, t5_length, clip_length
        ("v", "t", 16, 12), ("w", "t", 16, 12), ("v", "u", 16, 12), ("v", "t", 8, 12), ("v", "t", 16, 10))]
    for kind, differ in zip(zip(*plans), ([1, 0, 0, 0], [0, 1, 1, 1])):
        before, *after = ({mark for _, mark, _ in jobs} for jobs in kind)
        assert [before.isdisjoint(now) for now in after] == differ


def test_the_encoders_fingerprint_changes_with_any_byte(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    (tmp_path / "b").write_bytes(b"x")
    both = [tmp_path / "a", tmp_path / "b"]
    before = prepare.files_fingerprint(both)
    assert before == prepare.files_fingerprint(reversed(both))
    (tmp_path / "moved").mkdir()
    both = [path.rename(tmp_path / "moved" / path.name) for path in both]
    assert before == prepare.files_fingerprint(both)
    both[0].write_bytes(bytes(1_500_000) + b"\1" + bytes(1_499_999))
    assert prepare.files_fingerprint(both) != before


def test_a_published_parts_fingerprint_knows_names_shapes_and_the_first_1024_numbers_but_not_the_place():
    def printed(names="ab", place="x", shape=(2000,), value=0.0):
        tensor = torch.zeros(2000).index_fill(0, torch.tensor(1023), value)
        return prepare.tensors_fingerprint(SimpleNamespace(
            index={name: (place, "F32", shape) for name in names}, read=lambda name: tensor))

    same = {printed(), printed("ba"), printed(place="y")}
    assert len(same) == 1
    assert len({*same, printed("ac"), printed(shape=(20, 100)), printed(value=1.0)}) == 4


def test_damaged_and_foreign_caches_are_refused_with_the_way_out_and_mended(tmp_path, encoders, small_shards):
    survey, folder = surveyed(fill(tmp_path / "a")), tmp_path / "cache"
    encoders.write(folder, survey)
    for name in ("latents-64x64-00000.safetensors", "text-00001.safetensors"):
        whole = (folder / name).read_bytes()
        for broken in (whole[:-10], whole[:4], b"", whole + b"xx"):
            (folder / name).write_bytes(broken)
            with pytest.raises(ValueError, match=f"not finished: 1 of .*{name}.*repeat the command"):
                Cache(folder)
        encoders.write(folder, survey)
        assert (folder / name).read_bytes() == whole
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))        # still a well-formed file
        said = []
        encoders.write(folder, survey, say=said.append)
        assert "verifying" in said[0] and name in said[1] and "damaged" in said[1]
        assert (folder / name).read_bytes() == whole
    older = [folder / f"{name}.safetensors" for name in ("latents-48x1024-00000", "text-00999")]
    for path in older:
        path.write_bytes(b"of an older plan")
    (folder / "mine.safetensors").write_bytes(b"not ours to delete")
    encoders.write(folder, survey)
    assert not any(path.exists() for path in older)
    assert (folder / "mine.safetensors").exists()
    for broken in ("{", "[]"):
        (folder / "index.json").write_text(broken)
        said = []
        encoders.write(folder, survey, say=said.append)
        assert "index.json is damaged" in said[0] and len(Cache(folder)) == 30
    for kind, name, wrong, words in (
            ("text", "keys", lambda x: torch.arange(len(x)) - 2 ** 63, "lacks the text of some captions"),
            ("latents", "counts", lambda x: torch.cat([x[:1] * 0, x[1:2] + x[:1], x[2:]]), "damaged, its")):
        file = next(folder.glob(f"{kind}-*"))
        whole, (tensors, about) = file.read_bytes(), load_tensors(file)
        save_tensors(file, tensors | {name: wrong(tensors[name])}, about)
        with pytest.raises(ValueError, match=words):
            Cache(folder)
        file.write_bytes(whole)
    index = json.loads((folder / "index.json").read_text())
    stale = [[index["texts"][0][0], "of other texts"], *index["texts"][1:]]
    (folder / "index.json").write_text(json.dumps(index | {"texts": stale}))
    with pytest.raises(ValueError, match=f"not finished: 1 of .* out of date .{stale[0][0]}"):
        Cache(folder)
    for key in ("latents", "texts", "vae", "text", "data", "size"):
        (folder / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != key}))
        with pytest.raises(ValueError, match=f"index.json lacks {key}: it is damaged"):
            Cache(folder)
    (folder / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this code reads 1"):
        Cache(folder)
    with pytest.raises(ValueError, match="has no index.json"):
        Cache(tmp_path / "gone")


def test_nan_latents_are_refused(tmp_path, encoders):
    vae = AutoencoderKL(VAEConfig.preset("tiny"))
    for wrong in (torch.nan, torch.inf):
        vae.encoder.conv_out.bias.data[0] = wrong
        with pytest.raises(ValueError, match="the autoencoder gives NaN"):
            write_cache(tmp_path / "cache", surveyed(fill(tmp_path / "a", 3)), vae, encoders.text,
                        vae_print="", text_print="", t5_length=16)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, encoders, small_shards):
    import signal
    resource = pytest.importorskip("resource", reason="limits on a file's size need POSIX")
    survey = surveyed(fill(tmp_path / "a"))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))      # latents fit, text does not
    try:
        with pytest.raises(OSError, match="text-0.* cannot be written .*make room"):
            encoders.write(tmp_path / "cache", survey)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    encoders.calls = 0
    encoders.write(tmp_path / "cache", survey)
    assert encoders.calls == 0 and len(Cache(tmp_path / "cache")) == 30


def test_bytes_and_time_a_picture_are_told(tmp_path, encoders):
    said = []
    encoders.write(tmp_path / "cache", surveyed(fill(tmp_path / "a", 9)), say=said.append)
    assert [" pictures encoded, " in line or " captions encoded, " in line for line in said] == [True, True]
    assert all(" ms and " in line and " kB a " in line for line in said)


def test_progress_is_told_every_15_seconds_and_at_the_end_what_all_took(tmp_path, encoders, monkeypatch):
    folder, said = fill(tmp_path / "a", 9), []
    survey = surveyed(folder)
    for name in ("000.png", "003.png", "006.png"):              # all squares, which are encoded first
        (folder / name).write_bytes(b"gone")
    clock = iter([0, 1, 21, 22, 32, 33, 43, 44, 57])            # three files of pictures, one of captions
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=clock.__next__))
    encoders.write(tmp_path / "cache", survey, say=said.append)
    size = [sum(p.stat().st_size for p in (tmp_path / "cache").glob(f"{kind}-*"))
            for kind in ("latents", "text")]
    assert said == ["cache: 0 of 9 pictures, 20000.0 ms each, 180 s left for pictures",
                    "cache: 6 of 9 pictures, 6666.7 ms each, 20 s left for pictures",
                    f"cache: 6 pictures encoded, 6666.67 ms and {size[0] / 6000:.1f} kB a picture",
                    f"cache: 13 captions encoded, 1000.00 ms and {size[1] / 13000:.1f} kB a caption"]
    assert len(Batches(Cache(tmp_path / "cache"), 6, 0).at(0)[0]) == 6      # a file of none does no harm


def test_larger_pictures_are_encoded_fewer_at_a_time(tmp_path, encoders, monkeypatch):
    seen, casts, entries = [], [], data.list_pictures(fill(tmp_path / "a", 7)).entries

    def encode(x):
        seen.append(len(x))
        return SimpleNamespace(mean=torch.zeros(len(x), 16, 1, 1), std=torch.zeros(len(x), 16, 1, 1))

    monkeypatch.setattr(encoders.vae, "encode", encode)
    for size, batch, expected in ((64, 4, [4, 3]), (512, 8, [2, 2, 2, 1]), (512, 3, [1] * 7)):
        seen.clear(), casts.clear()
        encoders.write(tmp_path / f"{size} {batch}", Survey(entries, size, bucketed=False), batch=batch,
                       autocast=lambda: casts.append(size) or nullcontext())
        assert seen == expected and len(casts) == len(seen) + -(-10 // batch)      # captions, too


def test_a_hundred_pictures_in_a_row_that_are_gone_stop_the_encoding(tmp_path, encoders):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    entries = [data.Entry(str(i), tmp_path / "a.png", ("black",), {}) for i in range(100)]
    few, many = Survey(entries[:99], 16), Survey(entries, 16)
    (tmp_path / "a.png").unlink()
    assert len(encoders.write(tmp_path / "few", few)) == 99
    with pytest.raises(ValueError, match="100 pictures in a row cannot be read"):
        encoders.write(tmp_path / "many", many)


def test_encoders_visit_the_device_in_turn_and_only_if_they_are_needed(
        tmp_path, encoders, small_shards, monkeypatch):
    survey, visits = surveyed(fill(tmp_path / "a")), []
    for part in (encoders.vae, encoders.text):
        monkeypatch.setattr(part, "to", lambda where, part=part: visits.append((part, where)))
    for _ in range(2):
        encoders.write(tmp_path / "cache", survey, device="there")
        assert visits == [(encoders.vae, "there"), (encoders.text, "cpu"),
                          (encoders.vae, "cpu"), (encoders.text, "there")]


def test_the_reader_gives_5000_samples_of_64_pixels_a_second(tmp_path):
    """On latents and texts of nearly the tiny run's shapes, from 24 files of each kind. A second of the
    processor, all threads together: other programs' load does not count."""
    n, about = 256, {"fingerprint": "", "names": [""] * 256, "skipped": []}
    text = {"clip": torch.zeros(n, 12, 160), "t5": torch.zeros(n, 20, 192), "pooled": torch.zeros(n, 160)}
    text = {name: value.bfloat16() for name, value in text.items()}
    for k in range(24):
        save_tensors(tmp_path / f"text-{k:05}.safetensors", text | {"keys": torch.arange(n * k, n * k + n)},
                     about)
        save_tensors(tmp_path / f"latents-64x64-{k:05}.safetensors",
                     {"latents": torch.zeros(n, 2, 16, 8, 8).half(),
                      "counts": torch.ones(n).long(), "captions": torch.arange(n * k, n * k + n)}, about)
    names = [[(f"{kind}-{k:05}.safetensors", "") for k in range(24)] for kind in ("latents-64x64", "text")]
    (tmp_path / "index.json").write_text(json.dumps(dict.fromkeys(
        ("vae", "text", "data", "size"), "") | {"format": 1, "latents": names[0], "texts": names[1]}))
    batches, best = Batches(Cache(tmp_path), 256, 0), 0
    assert len(batches.cache) == 24 * n
    for trial in range(3):
        start = time.process_time()
        for step in range(20 * trial, 20 * trial + 20):
            batches.at(step)
        best = max(best, 20 * 256 / (time.process_time() - start))
    assert best > 5000, f"{best:,.0f} samples a second"
