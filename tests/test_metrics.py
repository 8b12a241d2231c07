"""Claims of metrics.py: its numbers are those of the formulas, and do not depend on batches; folders of
pictures are GenEval's, and are drawn once."""
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import drawn_world as world
import evaluate
import flow
import metrics
from metrics import Job, Statistics, fid, kid, nearest, retrieval
from pipeline import settings_of
from tensor_files import CheckpointError, write_json
from text_encoders import CLIPTextConfig, CLIPTextEncoder
from tokens import train_clip_tokenizer
from vae import Posterior

PARITY = Path(__file__).parent / "fixtures" / "parity"
few = settings(deadline=None, max_examples=15)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_set(n, mean, covariance, seed):
    """n points whose own mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


# --- FID and KID ------------------------------------------------------------------------------------------

@few
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_fid_of_two_gaussian_sets_is_the_formulas(D, seed):
    turn = torch.linalg.qr(normal(D, D, seed=seed))[0]
    a, b = (0.1 + 3 * normal(D, seed=seed + k).abs() for k in (1, 2))           # eigenvalues; they commute
    m1, m2 = normal(D, seed=seed + 3), normal(D, seed=seed + 4)
    x = gaussian_set(50, m1, turn @ a.diag() @ turn.T, seed)
    y = gaussian_set(70, m2, turn @ b.diag() @ turn.T, seed + 1)
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found, back = fid(Statistics(x), Statistics(y)), fid(Statistics(y), Statistics(x))
    assert found == pytest.approx(expected.item(), rel=1e-6) and back == pytest.approx(found, rel=1e-6)
    assert abs(fid(Statistics(x), Statistics(x))) < 1e-5


def test_fid_of_covariances_that_do_not_commute_is_the_2_by_2_formula():
    A, B = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    zero = torch.zeros(2).double()
    x, y = gaussian_set(40, zero, A, 0), gaussian_set(40, zero + 3, B, 1)
    root = ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt()
    assert fid(Statistics(x), Statistics(y)) == pytest.approx((18 + 10 - 2 * root).item(), rel=1e-8)


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9), st.floats(0, 1000))
def test_streamed_statistics_are_exact_whatever_the_batches(sizes, D, offset):
    x, stats = normal(sum(sizes) + 2, D, seed=len(sizes)) + offset, Statistics()
    for batch in x.split([*sizes, 2]):
        stats.update(batch)
    assert stats.n == len(x) and torch.allclose(stats.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(stats.covariance, torch.cov(x.T).reshape(D, D), rtol=1e-6, atol=1e-9)
    assert torch.equal(stats.kept, x.float()[:metrics.KEPT])


def test_statistics_keep_no_more_features_than_they_say(monkeypatch):
    monkeypatch.setattr(metrics, "KEPT", 7)
    stats = Statistics()
    for batch in normal(20, 3).split(4):
        stats.update(batch)
    assert torch.equal(stats.kept, normal(20, 3)[:7].float()) and stats.n == 20


@pytest.mark.parametrize("features", [torch.zeros(0, 3), torch.zeros(3), torch.full((2, 2), torch.nan)])
def test_features_that_are_none_are_refused(features):
    with pytest.raises(ValueError, match="at least one row, and finite"):
        Statistics(features)
    with pytest.raises(ValueError, match="two pictures or more"):
        Statistics(torch.ones(1, 3)).covariance


def test_kid_is_unbiased_its_error_honest_and_a_shift_is_seen():
    draws = [kid(normal(30, 6, seed=2 * i), normal(50, 6, seed=2 * i + 1)) for i in range(400)]
    values, errors = np.array(draws).T
    assert abs(values.mean()) < 4 * values.std() / 20       # the mean of 400, within four standard errors
    assert (values < 0).mean() > 0.3
    assert 0.4 < errors.mean() / values.std() < 1.5         # it leaves out what the second set's choice adds
    shifted, error = kid(normal(30, 6) + 1, normal(50, 6, seed=1))
    assert shifted > 4 * error > 0


def test_kid_is_the_formula_written_out():
    x, y = normal(5, 3), normal(4, 3, seed=1)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    assert kid(x, y)[0] == pytest.approx(xx + yy - 2 * np.mean([k(a, b) for a in x for b in y]))
    for numbers, left in ((None, [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]),
                          ([7, 7, 90, 90, 8], [[2, 3, 4], [0, 1, 4], [0, 1, 2, 3]])):
        others, n = [kid(x[i], y)[0] for i in left], len(left)
        assert kid(x, y, numbers)[1] == pytest.approx(np.std(others, ddof=1) * (n - 1) / n ** 0.5)
    assert kid(x, y, [7] * 5)[1] is None
    with pytest.raises(ValueError, match="three pictures or more"):
        kid(x[:2], y)


# --- CLIP -------------------------------------------------------------------------------------------------

def test_blind_towers_retrieve_at_chance_and_seeing_ones_always():
    assert retrieval(torch.ones(4), torch.ones(8, 4)) == 1 / 8                  # all alike: ties share
    blind = [retrieval(normal(16, seed=i), normal(8, 16, seed=1000 + i)) for i in range(600)]
    assert abs(np.mean(blind) - 1 / 8) < 4 * (7 / 64 / 600) ** 0.5
    eye = torch.eye(8)
    assert [retrieval(eye[i], eye) for i in range(8)] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert retrieval(eye[0], eye[:1]) == 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP in one file, under transformers' names: the parity fixtures' image tower, a text tower."""
    folder = tmp_path_factory.mktemp("clip")
    train_clip_tokenizer(["a red star", "a blue ring"], folder, 600)
    words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    torch.manual_seed(0)
    image = load_file(PARITY / "clip_image" / "model.safetensors")
    E = image["visual_projection.weight"].shape[0]
    text = CLIPTextEncoder(CLIPTextConfig(words, 64, 2, 2, 128, "quick_gelu", 20, E))
    rest = {"logit_scale": torch.tensor(4.6), "text_model.embeddings.position_ids": torch.arange(20)[None]}
    save_file({**image, **text.state_dict(), **rest}, folder / "model.safetensors")
    return folder, text


def write_config(folder, **vision):
    (folder / "config.json").write_text(json.dumps({
        "vision_config": vision, "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"}}))


def test_a_clip_of_transformers_loads_with_both_towers(clip):
    folder, text = clip
    io = load_file(PARITY / "clip_image" / "io.safetensors")
    write_config(folder, num_attention_heads=4, hidden_act="quick_gelu")
    towers = metrics.load_towers(folder)
    assert torch.allclose(towers.image(io["images"]), io["embeds"], atol=1e-5)
    ids = towers.tokenizer(["a red star"])
    assert torch.equal(towers.text(ids)[1], text(ids)[1]) and ids.shape == (1, 20)
    assert torch.allclose(towers.read(["a star"] * 257).norm(dim=1), torch.full((257,), 4.0))
    picture = np.random.default_rng(0).integers(0, 256, io["images"].shape[2:] + (3,), dtype=np.uint8)
    exact = towers.image(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    for seen in (picture, np.pad(picture, ((0, 0), (7, 7), (0, 0)))):          # its centre square
        (features,) = towers.look([seen])
        assert torch.allclose(features, 4 * exact / exact.norm(), atol=1e-5)
    (folder / "config.json").write_text("{}")
    about = metrics.load_towers(folder).text.config
    assert (about.width, about.heads, about.activation) == (64, 1, "quick_gelu")
    assert not any(p.requires_grad for p in (*towers.image.parameters(), *towers.text.parameters()))


def test_features_and_scores_do_not_depend_on_the_batch(clip):
    write_config(clip[0], num_attention_heads=4)
    towers = metrics.load_towers(clip[0])
    pictures = [world.draw(world.scene(np.random.default_rng(i)).things, 48 + 8 * i) for i in range(7)]
    one, three, all_ = (torch.cat(list(towers.look(pictures, batch))) for batch in (1, 3, 64))
    assert torch.allclose(one, all_, atol=1e-5) and torch.allclose(three, all_, atol=1e-5)
    assert fid(Statistics(one), Statistics(all_)) == pytest.approx(0, abs=1e-6)


def test_what_is_no_clip_is_refused_in_one_line(clip, tmp_path):
    folder, _ = clip
    with pytest.raises(CheckpointError, match="holds no CLIP"):
        metrics.load_towers(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    write_config(tmp_path)
    save_file({k: v for k, v in tensors.items() if not k.startswith("text_")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="both towers"):
        metrics.load_towers(tmp_path)
    save_file(tensors | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unknown"):
        metrics.load_towers(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, num_attention_heads=4)
    train_clip_tokenizer(["a red star"], tmp_path, 520)
    with pytest.raises(CheckpointError, match="the tokenizer ends a text with"):
        metrics.load_towers(tmp_path)


class Eye:
    """Towers that see the mean colour; counts what it is asked."""
    name, seen = "eye", 0

    def look(self, pictures, batch=5):
        for start in range(0, len(pictures), batch):
            part = np.stack([np.asarray(p) for p in pictures[start:start + batch]])
            Eye.seen += len(part)
            yield torch.from_numpy(part).float().mean((1, 2))


def test_reference_statistics_are_cached_with_the_datas_fingerprint(tmp_path):
    images, eye = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), Eye()
    Eye.seen = 0
    first = metrics.reference(eye, images, tmp_path)
    again = metrics.reference(eye, images, tmp_path)
    assert Eye.seen == 12 and again.n == first.n == 12
    for name in ("mean", "covariance", "kept"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    other = images.clone()
    other[3, 0, 0, 0] ^= 1
    metrics.reference(eye, other, tmp_path)
    assert Eye.seen == 24 and len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(metrics.reference(eye, images, tmp_path).mean, first.mean) and Eye.seen == 36
    for path in tmp_path.iterdir():                         # whole, but not what is written here
        save_file({"mean": first.mean}, path)
    assert torch.equal(metrics.reference(eye, images, tmp_path).mean, first.mean) and Eye.seen == 48
    eye.name = "another"
    metrics.reference(eye, images, tmp_path)
    assert Eye.seen == 60 and len(list(tmp_path.iterdir())) == 3


def test_a_fingerprint_changes_with_any_byte_and_with_the_size(tmp_path):
    path, prints = tmp_path / "weights", set()
    zeros = bytes(3 * 10**6)
    for content in (zeros, zeros + b"x", zeros[1:] + b"x", b"x" + zeros[1:], b""):
        path.write_bytes(content)
        prints.add(metrics.fingerprint(path))
        assert metrics.fingerprint(path) in prints
    assert len(prints) == 5


def test_large_pictures_are_given_to_a_model_a_few_at_a_time():
    assert [metrics.together(side, side) for side in (32, 64, 256, 1024, 2048)] == [64, 64, 4, 1, 1]


# --- The model --------------------------------------------------------------------------------------------

class Nowhere:
    """In the place of offload.Places."""
    device = torch.device("cpu")

    def at_work(self, module):
        from contextlib import nullcontext
        return nullcontext()


def test_what_is_kept_of_a_reference_is_a_random_part_of_it(tmp_path):
    images, eye = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), Eye()
    kept = metrics.reference(eye, images, tmp_path).kept
    listed = torch.cat(list(eye.look(images.permute(0, 2, 3, 1).numpy()))).float()
    assert not torch.equal(kept, listed) and torch.equal(kept, listed[metrics.any_order(12)])


def pipeline(model):
    """A Pipeline of which only the velocity is interesting: the VAE but halves each side."""
    def encode(x):
        z = torch.nn.functional.avg_pool2d(x, 2)
        return Posterior(z, torch.full_like(z, -2.0))

    vae = SimpleNamespace(encode=encode, to_latent=lambda z: 3 * z)

    def say(texts):
        lengths = torch.tensor([[[float(len(t))]] for t in texts])
        return SimpleNamespace(context=lengths, pooled=torch.zeros(len(texts), 1))

    return SimpleNamespace(mmdit=model, vae=vae, dtype=None, places=Nowhere(), encode=say)


def test_the_validation_loss_is_the_formula_at_equidistant_times_below_1():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    captions, seen = ["a", "bb", "ccc", "d", "e"], []

    def model(x, t, context, pooled):
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((t.tolist(), context.flatten().tolist(), half))
        return torch.zeros_like(x)

    losses = metrics.validation_loss(pipeline(model), images, captions)
    mean = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 2)
    assert losses.shape == (7, 5) and metrics.LEVELS == (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    assert [t for t, *_ in seen] == [[t] * 5 for t in metrics.LEVELS] and seen[0][1] == [1, 2, 3, 1, 1]
    assert torch.equal(losses, losses[:1].expand(7, 5))     # the same noise at every t
    assert [d for *_, d in seen] == [None] * 7
    pipe = pipeline(model)
    pipe.dtype = torch.float16
    metrics.validation_loss(pipe, images, captions)
    assert [d for *_, d in seen[7:]] == [torch.float16] * 7
    own = [torch.Generator().manual_seed(i) for i in range(5)]
    x0 = 3 * (mean + math.exp(-1) * flow.draw_noise(mean.shape, own))       # a sample of the posterior
    eps = flow.draw_noise(mean.shape, own)
    assert torch.allclose(losses[0], (eps - x0).square().mean((1, 2, 3)), atol=1e-4)


@few
@given(st.integers(1, 6))
def test_the_validation_loss_is_the_same_every_time_and_in_any_batch(batch):
    images = torch.arange(5 * 3 * 64).reshape(5, 3, 8, 8).remainder(256).byte()

    def model(x, t, context, pooled):
        return x * t[:, None, None, None] + context[..., None]

    pipe, captions = pipeline(model), ["a", "bb", "ccc", "d", "e"]
    first = metrics.validation_loss(pipe, images, captions)
    assert torch.allclose(metrics.validation_loss(pipe, images, captions, batch=batch), first, atol=1e-5)
    swapped = metrics.validation_loss(pipe, images[:3], captions[:3])
    assert torch.allclose(swapped, first[:, :3], atol=1e-5)


def test_a_straight_path_is_as_long_as_its_ends_are_apart_and_a_bent_one_longer():
    ts, target = flow.schedule(20, 3.0, "clean"), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    straight = metrics.PathLength(ts)
    flow.sample(lambda x, t: (x - target) / t[:, None], torch.zeros(2, 2), ts, callback=straight)
    assert torch.allclose(straight.length, torch.tensor([5.0, 1.0])) and torch.allclose(
        straight.straight, straight.length)
    bent, ts = metrics.PathLength(flow.schedule(1000, 1.0, "clean")), flow.schedule(1000, 1.0, "clean")

    def circle(x, t):               # a half circle of radius 1, once: length pi, ends 2 apart
        angle = torch.pi * (1 - t)
        return torch.pi * torch.stack([angle.sin(), -angle.cos()], dim=1)

    flow.sample(circle, torch.tensor([[1.0, 0.0]]), ts, callback=bent)
    assert bent.length.item() == pytest.approx(torch.pi, rel=1e-3)
    assert bent.straight.item() == pytest.approx(2, rel=1e-2)


# --- Copies -----------------------------------------------------------------------------------------------

@few
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_the_nearest_picture_is_the_nearest_in_any_chunks(n, chunk, seed):
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(rng.integers(0, 256, (k, 3, 4, 4), dtype=np.uint8)) for k in (4, n))
    index, far = nearest(x, y, chunk)
    apart = (x[:, None].double() - y[None].double()).square().mean((2, 3, 4)).sqrt()
    assert torch.allclose(far, apart.min(1).values, atol=1e-6)
    assert torch.allclose(apart[torch.arange(4), index], far)


def test_a_copy_is_found_exactly_and_sizes_must_agree():
    training = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 16, 16), dtype=np.uint8))
    index, far = nearest(training[[7, 3]], training)
    assert index.tolist() == [7, 3] and far.tolist() == [0, 0]
    for pictures in (training[:0], training[..., :8, :8]):
        with pytest.raises(ValueError, match="of one size"):
            nearest(pictures, training)


# --- GenEval's prompts and folders ------------------------------------------------------------------------

def test_genevals_prompts_are_the_published_553_byte_for_byte():
    rows = metrics.geneval_prompts()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")     # of evaluation_metadata.jsonl
    assert Counter(row["tag"] for row in rows) == dict(
        single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100)
    numbers = Counter(row["include"][0]["count"] for row in rows if row["tag"] == "counting")
    assert numbers == {2: 26, 3: 28, 4: 26}


def test_metadata_is_read_from_a_file_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in metrics.geneval_prompts()), encoding="utf-8")
    assert metrics.read_prompts(path) == metrics.geneval_prompts()
    for text, message in (('{"prompt": "a"}\n{"prompt": \n', "jsonl:2 is not metadata"),
                          ('{"tag": "x"}', ':1 .*no "prompt"'), ("\n\n", "is empty"),
                          ("[1]", ':1 .*no "prompt"'), ("[" * 200_000, ":1 .*nested")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            metrics.read_prompts(path)
    with pytest.raises(ValueError, match="is not a file"):
        metrics.read_prompts(tmp_path)
    path.write_text('{"prompt": "caf\u00e9"}', encoding="latin-1")
    with pytest.raises(ValueError, match="jsonl is not UTF-8 text"):
        metrics.read_prompts(path)
    path.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert metrics.read_prompts(path) == [{"prompt": "a"}]


class Painter:
    """A Pipeline that paints the seed, and counts."""
    size, shift, kind, steps, guidance, drawn = (16, 16), 3.0, "clean", 2, 1.0, 0

    def __call__(self, prompts, *, seed, steps, guidance, output, callback):
        Painter.drawn += len(prompts)
        noise = torch.tensor([[[[float(s)]]] for s in seed])
        ts = flow.schedule(steps, self.shift, self.kind)
        flow.sample(lambda x, t: x * (t[0] - 0.9), noise, ts, callback=callback)
        return (torch.tensor(seed) % 251 / 255)[:, None, None, None].expand(-1, 3, 16, 16)


def jobs_for(n, per_prompt=2):
    return [Job(7 * i, k, 100 * i + k, {"tag": "colors", "include": [], "prompt": f"p{i}"})
            for i in range(n) for k in range(per_prompt)]


def test_pictures_are_drawn_once_in_genevals_layout_and_go_on_where_they_stopped(tmp_path):
    jobs = jobs_for(40)             # 80, of which 77 are left: two batches
    Painter.drawn = 0
    paths = metrics.draw_folder(Painter(), jobs[1:4], tmp_path, 2, 1.0)
    assert Painter.drawn == 3 and [metrics.draw_folder(Painter(), jobs[1:4], tmp_path, 2, 1.0)] == [paths]
    assert Painter.drawn == 3 and len(metrics.read_folder(tmp_path)[0]) == 3
    paths = metrics.draw_folder(Painter(), jobs, tmp_path, 2, 1.0)
    assert Painter.drawn == 80
    for i, damage in ((3, b""), (4, paths[4].read_bytes()[:80])):               # a copy that stopped
        paths[i].write_bytes(damage)
    metrics.draw_folder(Painter(), jobs, tmp_path, 2, 1.0)
    assert Painter.drawn == 82
    for job, path in zip(jobs, paths):
        assert (metrics.open_picture(path) == job.seed % 251).all()
        told = settings_of(path)
        assert (told["seed"], told["steps"], told["prompt"]) == (job.seed, 2, job.metadata["prompt"])
        assert told["path"] >= told["straight"] >= 0 and path.parent.name == "samples"
    assert told["path"] > told["straight"]                                      # there, and back a little
    # as the public scorer looks for them
    folders = sorted(p for p in tmp_path.iterdir())
    assert all(p.is_dir() and p.name.isdigit() and len(p.name) == 5 for p in folders) and len(folders) == 40
    told = [json.loads((p / "metadata.jsonl").read_text()) for p in folders]
    assert [m["prompt"] for m in told] == [f"p{i}" for i in range(40)]
    assert all(re.match(r"\d+\.png", q.name) for p in folders for q in (p / "samples").iterdir())
    found, seen, skipped = metrics.read_folder(tmp_path)
    assert seen == paths and not skipped and [j[:2] for j in found] == [j[:2] for j in jobs]


def test_what_is_wrong_in_a_folder_is_skipped_and_named(tmp_path):
    metrics.draw_folder(Painter(), jobs_for(6), tmp_path, 2, 1.0)
    (tmp_path / "00000" / "samples" / "00001.png").write_bytes(b"no picture")
    (tmp_path / "00007" / "metadata.jsonl").unlink()
    (tmp_path / "00014" / "metadata.jsonl").write_text("{")
    (tmp_path / "00021" / "metadata.jsonl").write_text('["a"]')
    shutil.copytree(tmp_path / "00028", tmp_path / "28")
    (tmp_path / "00028" / "samples" / "grid.png").write_bytes(b"")              # not a number: not a sample
    (tmp_path / "00028" / "samples" / "00000.png").rename(tmp_path / "00028" / "samples" / "00000.PNG")
    (tmp_path / "00028" / "samples" / "notes.txt").write_text("no picture at all")
    for name in ("notes", "00040", "00041/samples", "²/samples"):
        (tmp_path / name).mkdir(parents=True)
        write_json(tmp_path / name.split("/")[0] / "metadata.jsonl", {"prompt": "a star"})
    for name, text in (("00042", "[" * 200_000), ("00043", json.dumps({"prompt": "a \ud800 star"}))):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "metadata.jsonl").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.jpg")
    jobs, paths, skipped = metrics.read_folder(tmp_path)
    assert len(jobs) == len(paths) == 4
    assert [name for name, _ in skipped] == [
        "loose.jpg", "²", "00000/samples/00001.png", "00007/metadata.jsonl", "00014/metadata.jsonl",
        "00021/metadata.jsonl", "00028/samples/00000.PNG", "00028/samples/grid.png", "28", "00040/samples",
        "00041/samples", "00042/metadata.jsonl", "00043/metadata.jsonl"]
    assert str(tmp_path) not in json.dumps(skipped)


def test_metadata_with_a_byte_order_mark_is_read(tmp_path):
    paths = metrics.draw_folder(Painter(), jobs_for(1), tmp_path, 2, 1.0)
    file = paths[0].parent.parent / "metadata.jsonl"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert metrics.read_folder(tmp_path)[1] == paths


def test_no_wrong_bit_in_a_png_makes_another_picture(tmp_path):
    path = tmp_path / "star.png"
    pixels = evaluate.illustrate(world.prompts("colors", 1)[0], np.random.default_rng(0))
    Image.fromarray(pixels).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    decoded = 0
    for i in rng.integers(8 * len(whole), size=300).tolist():
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            assert (metrics.open_picture(path) == pixels).all(), i      # such as of the last chunk's checksum
        except ValueError:
            pass
        try:
            with Image.open(path) as image:             # Pillow alone would take some of them for pictures
                decoded += (np.asarray(image.convert("RGB")) != pixels).any()
        except Exception:
            pass
    assert decoded > 0


@pytest.mark.parametrize("how", ["16 bits", "transparent", "turned"])
def test_pictures_are_judged_as_they_are_seen(how, tmp_path):
    path, seen = tmp_path / "a.png", np.full((8, 16, 3), 255, np.uint8)
    seen[:, :8] = 0
    if how == "16 bits":
        Image.fromarray(seen[..., 0].astype(np.uint16) * 257).save(path)
    elif how == "transparent":                          # red where nobody sees it
        alpha = 255 - seen[..., :1]
        Image.fromarray(np.concatenate([seen & [255, 0, 0], alpha], 2).astype(np.uint8), "RGBA").save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6                                # to be turned by a quarter, clockwise
        Image.fromarray(np.rot90(seen).copy()).save(path, exif=exif)
    assert (metrics.open_picture(path) == seen).all()


def test_pictures_of_another_prompt_or_seed_are_drawn_anew(tmp_path):
    jobs = jobs_for(3)
    Painter.drawn = 0
    metrics.draw_folder(Painter(), jobs, tmp_path, 2, 1.0)
    changed = [jobs[0]._replace(metadata={**jobs[0].metadata, "prompt": "another"}),
               jobs[1]._replace(seed=jobs[1].seed + 1), *jobs[2:]]
    paths = metrics.draw_folder(Painter(), changed, tmp_path, 2, 1.0)
    assert Painter.drawn == len(jobs) + 2
    told = [settings_of(path) for path in paths]
    assert [(t["prompt"], t["seed"]) for t in told] == [(j.metadata["prompt"], j.seed) for j in changed]
    assert json.loads((paths[0].parent.parent / "metadata.jsonl").read_text())["prompt"] == "another"


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folders"):
        metrics.read_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        metrics.read_folder(tmp_path / "nowhere")
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "00000" / "samples" / "00000.png")
    with pytest.raises(ValueError, match="00000/metadata.jsonl: missing"):
        metrics.read_folder(tmp_path)
