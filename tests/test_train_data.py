"""Claims about what training is fed.

The transformer learns from a cache on disk that is made once, ahead or on the spot, and holds neither the
autoencoder nor T5 meanwhile; changed data are noticed; pictures keep their shapes; captions are mixed; a
finished run goes on with larger pictures; what is bad ends in a count or in one line.
"""
import contextlib
import dataclasses
import gc
import io
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import finetune
import make_fake_checkpoint
import offload
import pipeline
import prepare
import sample
import settings
import stages
import train as training
from conftest import MICRO, names_of
from data import Pictures
from mmdit import MMDiT, MMDiTConfig
from pipeline import Pipeline
from prepare import Batches, Cache
from run_folder import (bare_encoders, load_part, load_tensors, load_tokenizers, read_json, run_configs,
                        save_part, save_tensors, sole_writer)
from text_encoders import ENCODERS, CLIPTextConfig, T5Config
from train import TrainConfig, parse, train
from weights import load_mmdit, load_text_encoders, load_vae, locate

pytestmark = pytest.mark.usefixtures("miniature")


def modules():
    """All in memory that have numbers, not shapes alone."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.nn.Module)]
    return [x for x in found if not any(p.is_meta for p in x.parameters())]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run, all drawings that were drawn for it, and what was in memory when the flow began: the kinds of
    module, and "pixels"."""
    drawn, alive, draw, fit = [], set(), data.draw, training.fit

    others = set(modules())                                     # other tests'

    def watching(run, stage, *rest):
        if stage.name == "flow":
            alive.update(type(x).__name__ for x in modules() if x not in others)
            alive.update("pixels" for x in gc.get_objects() if type(x) is torch.Tensor
                         and x.dtype == torch.uint8 and x.untyped_storage().nbytes() >= 48 * 3 * 64 * 64)
        return fit(run, stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "draw", lambda *args: drawn.append(args) or draw(*args))
        patch.setattr(training, "fit", watching)
        folder = train(TrainConfig(**MICRO, out=str(tmp_path_factory.mktemp("runs") / "first")))
    return folder, drawn, alive


@pytest.fixture
def finished(watched):
    return watched[0]


def fill(folder, n, shape=lambda i: (90, 70), mode="RGB"):
    folder.mkdir()
    for i in range(n):
        Image.new(mode, shape(i), (20 * i % 255, 100, (200 - 10 * i) % 255)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a plain picture number {i}\nan even colour, {i}", encoding="utf-8")
    return folder


def refused(flags, capsys):
    """What the command says before it exits with code 2: one line."""
    with pytest.raises(SystemExit) as end:
        training.main([str(flag) for flag in flags])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(said.splitlines()) == 1, said
    return said


def flags_of(**settings):
    return [x for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def cache_flags(**settings):
    """Of a cache command that times no dtypes."""
    return ["cache", *flags_of(**{"dtype": "float32", "device": "cpu"} | settings)]


def power_cut(original, at):
    """Of Run.generator: the process ends when a step asks for its random numbers."""
    def generator(self, name, step):
        if step == at and (self.folder / "metrics.csv").exists():           # else its time is only estimated
            raise KeyboardInterrupt
        return original(self, name, step)
    return generator


# --- The cache ---

def test_the_transformer_learns_while_neither_encoders_nor_pixels_are_in_memory(watched):
    alive = watched[2]
    assert "MMDiT" in alive
    assert not {"pixels", "AutoencoderKL", "T5Encoder", "CLIPTextEncoder", "CLIPImageEncoder"} & alive


def test_each_drawing_is_drawn_once(watched):
    assert len(watched[1]) == MICRO["pictures"]


def test_a_resumed_run_warns_in_one_line_if_the_data_changed_and_in_none_if_not(finished, tmp_path, capsys):
    pictures = fill(tmp_path / "mine", 10)
    run = train(*parse(["--from", str(finished), "--out", str(tmp_path / "run"), "--data", str(pictures),
                        *flags_of(flow_steps=1, flow_batch=2)]))
    told = []
    changes = (lambda: None, lambda: (pictures / "3.txt").write_text("another caption"), lambda: None)
    for change in changes:
        change()
        (run / "mmdit.safetensors").unlink()
        capsys.readouterr()
        train(*parse(["--resume", "--out", str(run)]))
        told.append([line for line in capsys.readouterr().out.splitlines() if "made of other pictures" in line
                     or "the data has changed" in line])
    assert [len(lines) for lines in told] == [0, 1, 0]


def test_a_cache_that_was_made_ahead_is_what_the_run_would_have_made(finished, tmp_path, capsys):
    out = tmp_path / "ahead"
    training.main(["cache", "--run", str(finished), "--data", "drawn", "--pictures", "48", "--out", str(out),
                   "--dtype", "float32", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "kB a picture" in said and "ms and" in said and f"--cache {out}" in said
    own, ahead = Cache(finished / "cache"), Cache(out)
    assert own.index == ahead.index
    for name, _ in own.index["latents"] + own.index["texts"]:
        a, b = load_tensors(own.folder / name)[0], load_tensors(out / name)[0]
        assert all(torch.allclose(a[k].float(), b[k].float(), rtol=0.01, atol=1e-3) for k in a)


def test_a_cache_of_drawings_holds_as_many_as_a_run_learns_from_by_default(finished, tmp_path, monkeypatch):
    told = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "encode_all", lambda run, *_: told.append(run.config))
    training.main(cache_flags(run=finished, data="drawn", seed=7))
    assert [(c.pictures, c.seed, c.size) for c in told] == [(TrainConfig.pictures, 7, 64)]


def test_a_cache_that_nobody_named_never_takes_the_place_of_another(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for there in ("a", "b"):
        Path(there).mkdir()
        fill(Path(there, "mine"), 4)
        training.main(cache_flags(run=finished, data=Path(there, "mine"), size=32))
    assert "runs/cache-mine-32 is of other pictures" in capsys.readouterr().out
    first, second = Path("runs/cache-mine-32"), Path("runs/cache-mine-32-2")
    before = {p: p.stat().st_mtime_ns for p in first.iterdir()}
    training.main(cache_flags(run=finished, data=Path("b/mine"), size=32))
    assert {p.name for p in Path("runs").iterdir()} == {first.name, second.name}
    assert before == {p: p.stat().st_mtime_ns for p in first.iterdir()} and len(Cache(second)) == 4
    training.main([*cache_flags(run=finished, data=Path("a/mine"), size=32), "--buckets"])
    assert Cache(first).index["source"]["buckets"] is False and Path("runs/cache-mine-32-3").is_dir()


def test_a_quick_try_with_fewer_pictures_leaves_the_cache_of_all_as_it_is(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = cache_flags(run=finished, data=fill(tmp_path / "mine", 6), size=32)
    training.main(command)
    whole, tried = Path("runs/cache-mine-32"), Path("runs/cache-mine-32-2")
    before = {p: p.read_bytes() for p in whole.iterdir()}
    training.main([*command, "--pictures", "2"])
    assert {p: p.read_bytes() for p in whole.iterdir()} == before and len(Cache(tried)) == 2

    def place(**wanted):
        c = TrainConfig(data="mine", size=32, **{"pictures": 10**9} | wanted)
        return training.cache_folder(c, stages.encoder_prints(finished)).name

    (finished / "tokenizers" / ".DS_Store").touch()             # Finder has looked at it
    try:
        assert place() == whole.name and not any(".DS_Store" in str(name)
                                                 for name in stages.tokenizer_files(finished))
    finally:
        (finished / "tokenizers" / ".DS_Store").unlink()
    # of all pictures the seed decides nothing, else it decides which they are
    assert place() == place(seed=7) == whole.name and place(pictures=2) == tried.name
    assert place(pictures=2, seed=7) == place(pictures=3) == "cache-mine-32-3"
    vae, text = stages.encoder_prints(finished)
    for prints in (("another", text), (vae, "another")):        # of other encoders
        c = TrainConfig(data="mine", size=32, pictures=10**9)
        assert training.cache_folder(c, prints).name == "cache-mine-32-3"
    for folder in (whole, tried):                               # as they were before they named their seed
        index = read_json(folder / "index.json")
        (folder / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "seed"}))
    assert place() == whole.name and place(pictures=2) == "cache-mine-32-3"


def test_a_cache_is_verified_by_its_command_and_not_by_each_start_of_a_run(finished, tmp_path, monkeypatch):
    pictures, read = fill(tmp_path / "mine", 4), []
    run = train(*parse(["--from", str(finished), "--out", str(tmp_path / "run"), "--data", str(pictures),
                        *flags_of(flow_steps=1, flow_batch=2)]))
    (run / "mmdit.safetensors").unlink()
    load = prepare.load_tensors
    monkeypatch.setattr(prepare, "load_tensors", lambda path: read.append(path) or load(path))
    train(*parse(["--resume", "--out", str(run)]))
    assert not read
    training.main(cache_flags(run=run, data=pictures, out=run / "cache", pictures=24_000))
    assert sorted(read) == sorted((run / "cache").glob("*.safetensors")) and read


def test_each_batch_is_read_while_the_step_before_it_is_learned(finished, tmp_path, monkeypatch):
    asked, at = [], prepare.Batches.at

    def asking(self, step, device="cpu", rows=slice(None)):
        asked.append((step, rows.start, (step, rows.start, rows.stop) in self.ahead))
        return at(self, step, device, rows)

    monkeypatch.setattr(prepare.Batches, "at", asking)
    train(*parse(["--from", str(finished), "--out", str(tmp_path / "run"), *flags_of(
        flow_steps=3, flow_batch=8, accumulate=2, pictures=24)]))
    assert [x for x in asked if x[0] and x[2]] == [(1, 0, True), (1, 4, True), (2, 0, True), (2, 4, True)]


def test_a_run_knows_from_its_cache_what_it_learns(finished, tmp_path, monkeypatch, capsys):
    """so that it is judged by the prompts and pictures of that data"""
    monkeypatch.chdir(tmp_path)
    fill(Path("mine"), 4), fill(Path("other"), 4)
    training.main(cache_flags(run=finished, data="mine", size=32, out="made"))
    phase = ["--from", str(finished), "--cache", "made"]
    assert parse(phase)[0].data == parse([*phase, "--data", "mine"])[0].data == str(Path("mine").resolve())
    capsys.readouterr()
    assert "--data other contradicts made" in refused([*phase, "--data", "other"], capsys)
    assert "--buckets True contradicts made" in refused([*phase, "--buckets"], capsys)
    Path("mine").rename("moved")
    assert parse([*phase, "--data", "moved"])[0].data == str(Path("moved").resolve())


def test_pictures_are_opened_up_to_the_number_asked_for_and_those_that_cannot_be_are_told(tmp_path):
    pictures = fill(tmp_path / "mine", 8)
    (pictures / "1.txt").write_text("")                         # skipped when listed; the other, when opened
    (pictures / "2.png").write_bytes(b"no picture")
    survey, words, *_ = training.list_data(TrainConfig(data=str(pictures), size=32))
    assert len(survey.entries) == 6 and {name for name, _ in words.skipped} == {"1.png", "2.png"}
    survey, *_ = training.list_data(TrainConfig(data=str(pictures), size=32, pictures=4))
    assert len(survey.entries) + len(survey.skipped) == 4
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="unusable"):
        training.list_data(TrainConfig(data=str(pictures), size=32, pictures=1))


def test_prompts_of_sample_grids_come_from_all_over_a_cache(finished):
    c = TrainConfig(cache=str(finished / "cache"), origin=str(finished))
    cache, words = Cache(c.cache), training.list_data(c)[1]
    assert len(cache) == 48 and words.captions == [tuple(cache.texts(i)) for i in range(0, 48, 6)]


def test_two_processes_cannot_write_one_cache(finished, tmp_path, capsys):
    out, pictures = tmp_path / "cache", fill(tmp_path / "mine", 4)
    with sole_writer(out):
        said = refused(cache_flags(run=finished, data=pictures, out=out), capsys)
    assert "is being written by process" in said and not list(out.glob("*.safetensors"))


def test_ranks_share_the_work_and_a_second_command_finds_nothing_to_do(finished, tmp_path, monkeypatch):
    pictures, out = fill(tmp_path / "mine", 12), tmp_path / "cache"
    monkeypatch.setattr("prepare.SHARD", 4)
    command = cache_flags(run=finished, data=pictures, out=out)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        if rank:
            with pytest.raises(ValueError, match="not finished"):
                Cache(out)
        training.main(command)
    assert len(Cache(out)) == 12
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    training.main(command)
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} and len(before) > 3


# --- Shapes and captions ---

def test_with_buckets_every_batch_is_of_one_shape_and_a_bucket_smaller_than_a_batch_works(
        finished, tmp_path, monkeypatch):
    shapes = [(128, 64), (64, 128), (90, 90)]
    pictures = fill(tmp_path / "mine", 15, lambda i: shapes[i % 3])
    seen, original = [], stages.flow.loss
    monkeypatch.setattr(stages.flow, "loss", lambda model, x, **kw: seen.append(tuple(x.shape)) or
                        original(model, x, **kw))
    run = train(*parse(["--from", str(finished), "--out", str(tmp_path / "run"), "--data", str(pictures),
                        "--buckets", *flags_of(flow_steps=12)]))
    learned = [s for s in seen if s[0] == 8][-12:]              # others only look at attention logits
    assert {s[2:] for s in learned} == {(6, 12), (12, 6), (8, 8)} and len(seen) >= 13
    assert (run / "mmdit.safetensors").is_file()


@pytest.mark.parametrize("share, expected", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_one_flag_sets_how_often_synthetic_captions_are_taken_in_clip_and_flow(
        finished, monkeypatch, share, expected):
    c = TrainConfig(**MICRO, synthetic=share)
    run = training.Run(c, finished)
    told = []
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8)
    pictures = Pictures(images, [("found", "made", "made")] * 40, [])

    def tokenizer(captions):
        told.extend(captions)
        return torch.zeros(len(captions), 4, dtype=torch.long)

    class Tower(torch.nn.Module):
        class config:
            image_size = 64

        def forward(self, x):
            pooled = torch.ones(len(x), 8)
            if x.dtype == torch.long:
                return pooled, pooled
            assert 0 <= x.min() < 0.01 and 0.99 < x.max() <= 1          # as metrics.py shows it pictures
            return pooled

    parts = {name: Tower() for name in stages.PARTS_OF["clip"]}
    stage = stages.clip_stage(run, parts, pictures, {"clip_l": tokenizer, "clip_g": tokenizer})
    for step in range(30):
        stage.loss(step, run.generator("clip", step))
    assert abs(told.count("made") / len(told) - expected) < 0.1


def test_both_clip_pairs_learn_their_temperatures_from_0_07_on(finished):
    run = training.Run(TrainConfig(**MICRO), finished)
    parts = {name: load_part(finished, name) for name in stages.PARTS_OF["clip"]}
    stage = stages.clip_stage(run, parts, Pictures(torch.empty(0), [], []), {})
    learned = dict(stage.model.named_parameters())
    assert [learned[f"scales.{name}"].exp().item() for name in ("clip_l", "clip_g")] == pytest.approx(
        [1 / 0.07] * 2)


def test_latents_of_a_trained_autoencoder_have_mean_0_and_variance_1(finished):
    mean, std, *_ = Batches(Cache(finished / "cache"), 48, 0).at(0)
    latents = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02


# --- A second phase at another size ---

@pytest.fixture(scope="module")
def first_phase(watched, tmp_path_factory):
    """A transformer that knows four drawings: enough to tell it from an untrained one."""
    out = tmp_path_factory.mktemp("runs") / "small"
    return train(*parse(["--from", str(watched[0]), *flags_of(
        pictures=4, flow_steps=36, flow_batch=4, ema=0.9, save_every=1000, out=out)]))


def losses(folder):
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return [float(row[2]) for row in rows if row[0] == "flow"]


def test_a_second_phase_takes_over_all_parts_moves_positions_and_times_and_starts_from_what_was_learned(
        first_phase, tmp_path):
    out = tmp_path / "large"
    config, resume = parse(["--from", str(first_phase), "--out", str(out), *flags_of(size=128, flow_steps=3)])
    assert not resume and config.shift == pytest.approx(TrainConfig.shift * 2)        # sqrt(128^2 / 64^2)
    train(config)
    for name in ("vae", "clip_l", "clip_g", "clip_l_image", "clip_g_image", "t5"):
        a, b = ((folder / f"{name}.safetensors").read_bytes() for folder in (out, first_phase))
        assert a == b
    small, large = load_part(first_phase, "mmdit"), load_part(out, "mmdit")
    assert (small.config.pos_sample, large.config.pos_sample, large.config.pos_base) == (4, 8, 4)
    table = [m.pos_embed.view(m.config.pos_max, m.config.pos_max, -1) for m in (small, large)]
    first, second = (m.config.pos_max // 2 - m.config.pos_sample // 2 for m in (small, large))
    for k in range(4):                                          # every second place is one of the first phase
        assert torch.allclose(table[0][first + k, first], table[1][second + 2 * k, second], atol=1e-6)
    assert Cache(out / "cache").shapes == ["128x128"]
    assert json.loads((out / "config.json").read_text())["shift"] == 2 * TrainConfig.shift

    c = dataclasses.replace(config, cache=str(out / "cache"))           # the same first batch, untrained
    run = training.Run(c, out)
    parts = {name: load_part(out, name) for names in stages.PARTS_OF.values() for name in names}
    parts["mmdit"] = stages.resized(MMDiT(large.config), 8)
    tokenizers = load_tokenizers(out, c.clip_length)
    stage = stages.flow_stage(run, parts, tokenizers, None, Pictures(torch.empty(0), [("a star",)] * 8, []))
    untrained = stage.loss(0, run.generator("flow", 0))[0].item()
    assert losses(out)[0] < 0.75 * untrained, (losses(out)[0], untrained)


def test_a_second_phase_that_was_interrupted_equals_one_that_was_not(finished, tmp_path, monkeypatch):
    folder = fill(tmp_path / "data", 8, lambda i: ((90, 90), (120, 60), (60, 120))[i % 3])
    flags = ["--from", str(finished), "--buckets", *flags_of(data=folder, size=96, flow_steps=4, flow_batch=4,
                                                             accumulate=2)]
    straight = train(*parse([*flags, "--out", str(tmp_path / "straight")]))
    copy = stages.write_atomically

    def cut_short(path, write):
        if path.name == "t5.safetensors":
            raise KeyboardInterrupt
        copy(path, write)

    monkeypatch.setattr(stages, "write_atomically", cut_short)          # while the parts are copied
    with pytest.raises(KeyboardInterrupt):
        train(*parse([*flags, "--out", str(tmp_path / "cut")]))
    monkeypatch.undo()
    monkeypatch.setattr(training.Run, "generator", power_cut(training.Run.generator, 3))
    with pytest.raises(KeyboardInterrupt):
        train(*parse(["--resume", "--out", str(tmp_path / "cut")]))
    monkeypatch.undo()
    again = train(*parse(["--resume", "--out", str(tmp_path / "cut")]))
    a, b = (load_tensors(folder / "mmdit.safetensors")[0] for folder in (straight, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_second_phase_needs_neither_its_start_nor_the_first(finished, tmp_path):
    first = shutil.copytree(finished, tmp_path / "first")
    run = train(*parse(["--from", str(first), *flags_of(size=96, pictures=8, flow_steps=2, preview_every=0,
                                                        out=tmp_path / "second")]))
    shutil.rmtree(run / "start")
    shutil.rmtree(first)
    before = (run / "mmdit.safetensors").read_bytes()
    assert train(*parse(["--resume", "--out", str(run)])) == run
    assert (run / "mmdit.safetensors").read_bytes() == before and not (run / "start").exists()


@pytest.mark.parametrize("size, shift", [(32, 1), (256, 1), (512, 1.5), (1024, 3), (2048, 6)])
def test_published_models_learn_at_times_shifted_by_3_at_1024_pixels(size, shift, monkeypatch):
    cache = SimpleNamespace(index={"encoders": "weights"})
    monkeypatch.setattr(settings, "checked_cache", lambda given: (cache, {"size": size}))
    assert settings.by_encoders({"cache": "c"})["shift"] == shift
    assert settings.by_encoders({"cache": "c", "shift": 2.0})["shift"] == 2.0           # a flag wins


def test_the_noise_of_the_flow_is_not_that_of_the_posterior(finished, monkeypatch):
    run = training.Run(TrainConfig(**read_json(finished / "config.json")), finished)
    parts = {name: load_part(finished, name) for names in stages.PARTS_OF.values() for name in names}
    words = Pictures(torch.empty(0), [("a star",)] * 8, [])
    run.config.cache = str(finished / "cache")
    stage, seen = stages.flow_stage(run, parts, load_tokenizers(finished, 10), None, words), {}
    monkeypatch.setattr(stages.flow, "loss", lambda model, latents, **how: seen.update(
        how, latents=latents) or torch.zeros(len(latents)))
    stage.loss(0, run.generator("flow", 0))
    mean, std, *_ = Batches(Cache(finished / "cache"), run.config.flow_batch, run.config.seed).at(0)
    spread, noise = (seen["latents"] - mean) / std, seen["noise"]
    for x in (spread, noise):
        assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert abs((spread * noise).mean()) < 0.05


def test_the_flow_learns_at_the_times_and_with_the_text_that_its_settings_say(finished, monkeypatch):
    how = dict(density="uniform", shift=3.0, text_drop=0.8, flow_batch=40, synthetic=0.2, seed=7)
    run = training.Run(TrainConfig(**read_json(finished / "config.json") | how), finished)
    run.config.cache = str(finished / "cache")
    parts = {name: load_part(finished, name) for names in stages.PARTS_OF.values() for name in names}
    left, c, seen = parts["clip_l"].config.width, run.config, []
    both = left + parts["clip_g"].config.width
    words = Pictures(torch.empty(0), [("a star",)] * 8, [])
    stage = stages.flow_stage(run, parts, load_tokenizers(finished, c.clip_length), None, words)
    monkeypatch.setattr(stages.flow, "loss", lambda model, latents, **given: seen.append(
        given) or torch.zeros(len(latents)))
    read = stage.ahead.__self__                                             # the Batches
    assert (read.synthetic, read.seed) == (0.2, 7)
    for step in range(30):
        stage.loss(step, run.generator("flow", step))
    t, context, pooled = (torch.cat([x[k] for x in seen]) for k in ("t", "context", "pooled"))
    unshifted = t / (3 - 2 * t)
    assert abs(unshifted.mean() - 0.5) < 0.04 and abs(unshifted.std() - 12 ** -0.5) < 0.02
    clip, t5 = context.split([c.clip_length, c.t5_length], dim=1)
    for features in (clip[..., :left], clip[..., left:both], t5, pooled[:, :left], pooled[:, left:]):
        assert abs((~features.flatten(1).any(1)).float().mean() - 0.8) < 0.05


@pytest.mark.parametrize("again", [False, True])
def test_the_layer_that_reads_text_computes_the_same_before_it_learns_on_and_after(finished, again):
    c = TrainConfig(**read_json(finished / "config.json"))
    c.cache, c.origin = str(finished / "cache"), str(finished) if again else ""
    run = training.Run(c, finished)
    parts = {name: load_part(finished, name) for names in stages.PARTS_OF.values() for name in names}
    features, plain = Batches(Cache(c.cache), 4, 0).at(0)[2], parts["mmdit"].context_embedder
    model = parts["mmdit"] = stages.resized(parts["mmdit"], 4)
    words = Pictures(torch.empty(0), [("a star",)] * 8, [])
    stage = stages.flow_stage(run, parts, load_tokenizers(finished, c.clip_length), None, words)
    with torch.no_grad():
        learned = model.context_embedder(features)
        assert torch.allclose(learned, plain(features), atol=1e-3) == again         # else it is untrained
        stage.finish()
        assert type(model.context_embedder) is torch.nn.Linear and stage.ema
        assert torch.allclose(model.context_embedder(features), learned, atol=1e-3)


def test_adapters_of_a_run_that_was_sharded_are_not(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"fsdp": True}))
    assert parse(["--from", str(run)])[0].fsdp
    assert not parse(["--from", str(run), "--lora", "2"])[0].fsdp
    with pytest.raises(ValueError, match="leave out --fsdp"):
        parse(["--from", str(run), "--lora", "2", "--fsdp"])


def test_a_second_phase_learns_from_a_cache_without_the_pictures(finished, tmp_path):
    pictures = fill(tmp_path / "mine", 20, lambda i: (160, 96) if i % 2 else (100, 100))
    out = tmp_path / "cache"
    training.main(["cache", *flags_of(run=finished, data=pictures, out=out, size=96, dtype="float32",
                                      device="cpu"), "--buckets"])
    pictures.rename(tmp_path / "elsewhere")
    config, _ = parse(["--from", str(finished), *flags_of(cache=out, flow_steps=4, preview_every=4,
                                                         out=tmp_path / "run")])
    assert config.size == 96 and config.shift == TrainConfig.shift * 96 / 64
    run = train(config)
    assert (run / "samples" / "000004.png").is_file() and not (run / "cache").exists()


# --- Bad input ---

def test_bad_input_of_a_cache_or_a_second_phase_is_one_line_that_names_the_remedy(
        finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.doc").write_text("nothing to see")
    cache = ["cache", "--run", finished, "--dtype", "float32"]
    assert "no-run" in refused(["cache", "--run", "no-run", "--data", "drawn"], capsys)
    assert "name.txt beside" in refused([*cache, "--data", "empty"], capsys)
    assert "no such folder" in refused([*cache, "--data", "gone"], capsys)
    assert "try 96" in refused([*cache, "--data", "drawn", "--size", "100"], capsys)
    assert "cache --help" in refused(["cache", "--data", "drawn"], capsys)
    assert "try 112" in refused(["--from", finished, "--size", "113"], capsys)
    assert "no finished run" in refused(["--from", tmp_path], capsys)
    assert "does not exist" in refused(["--from", "sd3.5_large.safetensors", "--cache", "c"], capsys)
    assert "contradicts" in refused(["--from", finished, "--model", "d15"], capsys)
    assert "contradicts" in refused(["--from", finished, "--vae-channels", "8"], capsys)
    assert "no such folder" in refused(["--from", finished, "--data", "gone"], capsys)
    assert "index.json" in refused(["--cache", "somewhere"], capsys)
    assert "index.json" in refused(["--from", finished, "--cache", "somewhere"], capsys)
    assert not list(tmp_path.glob("runs/*"))


def test_a_cache_of_other_encoders_is_refused_by_both_names(finished, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "cache"
    shutil.copytree(finished, other)
    vae = load_part(other, "vae")
    vae.decoder.conv_in.bias += 0.5
    save_part(other, "vae", vae)
    training.main(["cache", *flags_of(run=other, data="drawn", pictures=8, out=out, dtype="float32",
                                      device="cpu")])
    capsys.readouterr()
    said = refused(["--from", finished, *flags_of(cache=out, flow_steps=2, out=tmp_path / "run")], capsys)
    marks = stages.encoder_prints(other)[0][:8], stages.encoder_prints(finished)[0][:8]
    assert all(mark in said for mark in marks) and "train.py cache" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, words", [
    (dict(clip_length=-3), "clip_length is -3"), (dict(clip_length=1), "clip_length is 1"),
    (dict(t5_length=513), "t5_length is 513"), (dict(size=4112), "size is 4112"),
    (dict(text_drop=1.0), "must lie in"), (dict(ema=1.0), "must lie in"), (dict(decay=1.1), "must lie in"),
    (dict(synthetic=1.1), "must lie in"), (dict(shift=0.0), "shift"), (dict(seed=2**31), "seed is"),
    (dict(minutes=math.nan), "must be finite"), (dict(minutes=-5), "minutes is -5"),
    (dict(muon_rate=-1), "muon_rate is -1"), (dict(vae_critic=-0.1), "vae_critic is -0.1"),
    (dict(shift=math.inf), "must be finite"), (dict(flow_rate=math.inf), "must be finite"),
    (dict(flow_steps="3"), "flow_steps is '3'"), (dict(fsdp=1), "fsdp is 1"), (dict(size=True), "is True"),
    (dict(flow_steps=2.5), "flow_steps is 2.5"), (dict(preview_every=-1), "preview_every is -1"),
    (dict(lora=-1, origin="run"), "lora is -1"), (dict(dtype="float16"), "no dtype 'float16'"),
    (dict(model="sd9"), "choose from"), (dict(density="bell"), "logit_normal"),
    (dict(encoders="weights", origin="run"), "published encoders only make caches")])
def test_settings_of_the_wrong_kind_or_size_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_nothing_is_learned_in_no_steps_from_no_pictures_or_at_no_rate():
    for name in ("pictures", "vae_channels", "accumulate", "warmup", "clip_norm", "save_every",
                 *(f"{stage}_{what}" for stage in stages.STAGES for what in ("steps", "batch", "rate"))):
        with pytest.raises(ValueError, match=f"{name} is 0: it must be above 0"):
            TrainConfig(**{name: 0})


def test_settings_may_be_as_large_and_small_as_the_messages_say():
    for bound in (dict(clip_length=2, t5_length=512, size=4096, seed=2**31 - 1),
                  dict(text_drop=0, ema=0, decay=1, synthetic=1), dict(decay=0, synthetic=0)):
        assert dataclasses.asdict(TrainConfig(**bound)).items() >= bound.items()


def test_settings_from_python_may_be_paths_and_whole_numbers(tmp_path):
    assert TrainConfig(out=tmp_path, minutes=5).out == str(tmp_path)


def test_a_folder_of_nothing_but_unreadable_pictures_is_one_line(tmp_path, capsys):
    (tmp_path / "a.png").write_text("x")
    (tmp_path / "a.txt").write_text("a caption")
    assert "unusable" in refused(["--data", tmp_path, "--out", tmp_path / "run"], capsys)


def test_going_on_from_python_is_as_strict_as_the_command(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    same = TrainConfig(**read_json(run / "config.json") | {"out": run})
    for change, words in ((dict(shift=1.0), "--shift 1.0 contradicts"), (dict(seed=9), "--seed 9 cont"),
                          (dict(data="emoji"), "--data emoji contradicts"), (dict(out=""), "needs `out`"),
                          (dict(t5_length=2), "--t5-length 2 contradicts"),
                          (dict(cache="other", origin="run"), "--cache other contradicts"),
                          (dict(out=str(tmp_path / "none")), "config.json is missing")):
        with pytest.raises(ValueError, match=words):
            train(dataclasses.replace(same, **change), resume=True)
    assert (run / "config.json").read_bytes() == before and not (tmp_path / "none").exists()
    assert train(dataclasses.replace(same, clip_length=0, t5_length=0, minutes=3.0), resume=True) == run
    assert read_json(run / "config.json")["t5_length"] == same.t5_length            # 0 is as the run has it


@pytest.mark.parametrize("break_it, words", [
    (lambda run: (run / "tokenizers" / "t5" / "tokenizer.json").write_text("{}"), "the tokenizers in"),
    (lambda run: (run / "tokenizers" / "clip" / "merges.txt").write_text("#\nxx yy\n"), "the tokenizers in"),
    (lambda run: edit_config(run, size="big"), "size is 'big', not a number"),
    (lambda run: edit_config(run, shift=None), "shift is None, not a number"),
    (lambda run: (run / "config.json").unlink(), "one part of a run"),
    (lambda run: save_part(run, "mmdit", MMDiT(dataclasses.replace(
        load_part(run, "mmdit").config, in_channels=8))), "takes 8: the folder mixes two runs")])
def test_a_run_whose_files_are_damaged_or_mixed_draws_nothing_and_says_why(
        finished, tmp_path, capsys, break_it, words):
    run = shutil.copytree(finished, tmp_path / "run")
    break_it(run)
    with pytest.raises(SystemExit) as end:
        sample.main(["a star", "--model", str(run), "--device", "cpu", "--steps", "1"])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in said and len(said.splitlines()) == 1


def edit_config(run, **changes):
    (run / "config.json").write_text(json.dumps(read_json(run / "config.json") | changes))


# --- Published encoders ---

ALL_PARTS = ["mmdit", "vae", "clip_l", "clip_g", "t5"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model with all its parts as published: two files, three encoders' files, tokenizers."""
    folder = tmp_path_factory.mktemp("published")
    make_fake_checkpoint.main([str(folder), "--config", "small", "--parts", *ALL_PARTS])
    return folder / "small.safetensors"


@pytest.fixture(scope="module")
def encoded(published, tmp_path_factory):
    """A cache of 12 pictures that published encoders made -> its folder, the pictures', what was printed."""
    folder = tmp_path_factory.mktemp("encoded")
    pictures, out, told = fill(folder / "mine", 12), folder / "cache", io.StringIO()
    with contextlib.redirect_stdout(told):
        training.main(["cache", *flags_of(model=published, data=pictures, out=out, size=32, dtype="float32",
                                          device="cpu")])
    return out, pictures, told.getvalue()


def test_a_cache_holds_what_published_encoders_say(published, encoded):
    out, pictures, said = encoded
    cache = Cache(out)
    assert f"--cache {out} --model d15" in said and len(cache) == 12
    vae = load_vae(published, dtype=torch.float32)
    encoders = load_text_encoders(published, dtype=torch.float32)
    for i in (0, 7):
        mean, std, context, pooled = cache.read(np.array([i]), torch.tensor([1]))
        pixels = torch.from_numpy(data.read_picture(pictures / names_of(cache)[i], 32))
        x = pixels.permute(2, 0, 1) / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(x[None])
        told = encoders([cache.texts(i)[1]], 77)
        for stored, right in ((mean, vae.to_latent(posterior.mean)), (std, posterior.std * vae.config.scale),
                              (context, told.context), (pooled, told.pooled)):
            assert stored.shape == right.shape
            assert (stored.float() - right).norm() < 5e-3 * right.norm()


def test_the_widths_of_sd3_come_out_as_154_x_4096_and_2048_and_fit_the_presets(tmp_path):
    """Its encoders in full width, of one thin layer each."""
    small = make_fake_checkpoint.CONFIGS["small"]
    configs = {"vae": small["vae"], "t5": T5Config(512, 4096, 1, 1, 64, 96),
               "clip_l": CLIPTextConfig(2048, 768, 1, 12, 64, "quick_gelu", projection_dim=768),
               "clip_g": CLIPTextConfig(2048, 1280, 1, 20, 64, "gelu", projection_dim=1280)}
    make_fake_checkpoint.write_model(tmp_path, list(configs), "single_file", "bfloat16", configs, "thin")
    make_fake_checkpoint.write_tokenizers(tmp_path, configs)
    pictures, out, thin = fill(tmp_path / "mine", 2), tmp_path / "cache", tmp_path / "thin.safetensors"
    training.main(["cache", *flags_of(model=thin, data=pictures, out=out, size=64, dtype="float32",
                                      device="cpu")])
    mean, _, context, pooled = Cache(out).read(np.array([0, 1]), torch.tensor([0, 1]))
    assert mean.shape == (2, 16, 8, 8) and context.shape == (2, 154, 4096) and pooled.shape == (2, 2048)
    size = (out / "text-00000.safetensors").stat().st_size / 4                              # captions
    assert 950_272 < size < 951_300                             # the paper: 954 kB; the rest is the header
    config, _ = parse(["--cache", str(out), "--model", "d15"])
    bare = [part.config for part in map(bare_encoders(config.encoders).get, ("vae", *ENCODERS))]
    assert (config.shift, config.flow_rate, config.muon_rate, config.warmup) == (1.0, 1e-4, 0.0, 1000)
    assert parse(["--cache", str(out), "--model", "d15", "--flow-rate", "1"])[0].flow_rate == 1
    assert parse(["--cache", str(out)])[0].muon_rate == TrainConfig.muon_rate           # of the miniature
    with torch.device("meta"):                                  # ValueError unless all shapes fit
        model = stages.build_mmdit(config, *bare, contextlib.nullcontext())
        model.check_inputs(mean, torch.ones(2), context, pooled)


@pytest.fixture(scope="module")
def learned(encoded, tmp_path_factory):
    """A new transformer that learned from that cache, interrupted and resumed -> the run, and what kinds of
    module were in memory meanwhile."""
    alive, fit, others = set(), training.fit, set(modules())
    out = tmp_path_factory.mktemp("runs") / "published"

    def watching(*args):
        alive.update(type(x).__name__ for x in modules() if x not in others)
        return fit(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", watching)
        patch.setattr(training.Run, "generator", power_cut(training.Run.generator, 3))
        with pytest.raises(KeyboardInterrupt):
            train(*parse(["--cache", str(encoded[0]), *flags_of(
                flow_steps=4, flow_batch=4, preview_every=4, save_every=2, out=out, device="cpu",
                dtype="float32")]))
    return train(*parse(["--resume", "--out", str(out)])), alive


def test_a_new_transformer_learns_from_published_encoders_that_never_are_in_memory(learned, published):
    run, alive = learned
    assert "MMDiT" in alive and not {"AutoencoderKL", "T5Encoder", "CLIPTextEncoder"} & alive
    assert (run / "samples" / "000004.png").is_file() and len(losses(run)) == 4
    assert [p.name for p in run.glob("*.safetensors")] == ["mmdit.safetensors"]
    config = json.loads((run / "config.json").read_text())
    assert (config["size"], config["t5_length"], config["encoders"]) == (32, 77, str(published))


def test_it_draws_with_them(learned, capsys):
    pipe = Pipeline.from_pretrained(learned[0], device="cpu")
    assert pipe.encoders.clip_length == 77 == pipe.t5_length and pipe.shift == 1.0
    one, other = (pipe(["a plain picture number 3", "an even colour"], steps=2, output="latent", drop=drop)
                  for drop in ((), ("clip_g",)))
    assert one.shape == (2, 16, 4, 4) and one.isfinite().all() and not torch.equal(one, other)
    again = Pipeline.from_pretrained(learned[0], device="cpu", t5=False)("a star", steps=1, output="tensor")
    assert again.shape == (1, 3, 32, 32)
    sample.main(["--dry-run", "--model", str(learned[0])])
    assert "32 x 32 pixels, float32, encoders bfloat16, the autoencoder float32" in capsys.readouterr().out


def test_on_a_card_too_small_for_all_of_it_its_parts_come_in_turn(learned, monkeypatch):
    monkeypatch.setattr(pipeline, "free_memory", lambda device: free)
    card, move = SimpleNamespace(type="cuda"), torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda m, to: m if to is card else move(m, to))
    how = learned[0], card, None, set(), "auto", False, None, (64, None), 1, ()
    peak = offload.need(run_configs(learned[0]), height=64, width=32, dtype=torch.float32,
                        text_dtype=torch.bfloat16)["peak"]
    for free, mode in ((peak["none"], "none"), (peak["none"] - 1, "text"), (peak["text"] - 1, "model")):
        assert pipeline.load_run(*how)["offload"] == mode
    free = min(peak.values()) - 1
    monkeypatch.setattr(pipeline, "load_part", lambda *_: pytest.fail("read before it was refused"))
    with pytest.raises(ValueError, match="needs .* GB on the card for 64 x 32 pixels with --offload"):
        pipeline.load_run(*how)
    free = 1_000_000
    with pytest.raises(ValueError, match="of main memory .* --drop-t5 makes it") as refused:
        Pipeline.from_pretrained(learned[0], device="cpu")
    assert "--dtype" not in str(refused.value)              # that of autocast saves none


def test_a_second_phase_keeps_published_encoders(learned, encoded, published, tmp_path):
    run, large = learned[0], tmp_path / "large"
    training.main(["cache", *flags_of(run=run, data=encoded[1], out=large, size=64, dtype="float32",
                                      device="cpu")])
    assert Cache(large).index["encoders"] == str(published)
    config, _ = parse(["--from", str(run), *flags_of(cache=large, flow_steps=1, preview_every=0,
                                                     out=tmp_path / "second")])
    second = load_part(train(config), "mmdit").config
    assert (second.pos_sample, second.pos_base) == (4, 2) and config.shift == 2.0


@pytest.fixture(scope="module")
def odd(published, tmp_path_factory):
    """The same weights with positions by another formula, in a folder that is called by name."""
    folder = shutil.copytree(published.parent, tmp_path_factory.mktemp("odd") / "weights")
    tensors = load_file(folder / published.name)
    (table,) = (name for name in tensors if name.endswith("pos_embed"))
    save_file(tensors | {table: tensors[table] / 2}, folder / published.name)
    return folder


def test_encoders_that_cannot_be_used_are_refused_before_they_are_written_down(
        learned, finished, published, tmp_path, capsys):
    run = shutil.copytree(learned[0], tmp_path / "run")
    before = (run / "config.json").read_bytes()
    assert "does not exist" in refused(["--resume", "--out", run, "--encoders", "gone"], capsys)
    assert (run / "config.json").read_bytes() == before
    assert "published encoders only make caches" in refused(
        ["--resume", "--out", shutil.copytree(finished, tmp_path / "own"), "--encoders", published], capsys)


def test_published_weights_learn_on_from_where_they_are(encoded, odd, finished, tmp_path, monkeypatch):
    """With no rate they stay as they are, bit by bit, also in a second phase, and first losses are theirs;
    interrupted and resumed is as good as straight through."""
    published = odd / "small.safetensors"
    flags = ["--from", str(odd), "--cache", str(encoded[0]), "--encoders", str(odd), *flags_of(
        flow_steps=4, flow_batch=4, save_every=2, preview_every=0, device="cpu", dtype="float32")]
    config, _ = parse([*flags, "--out", str(tmp_path / "still"), "--flow-rate", "1e-30"])
    assert (config.shift, config.muon_rate, config.minutes, config.encoders) == (1, 0, 0, str(odd))
    start, still = load_mmdit(published, dtype=torch.float32), load_part(train(config), "mmdit")
    assert still.config == start.config
    assert all(torch.equal(p, still.state_dict()[k]) for k, p in start.state_dict().items())
    second, _ = parse(["--from", config.out, *flags[2:], *flags_of(flow_rate=1e-30, out=tmp_path / "second")])
    assert torch.equal(load_part(train(second), "mmdit").pos_embed, start.pos_embed)
    straight = train(*parse([*flags, "--out", str(tmp_path / "straight"), "--flow-rate", "1e-3"]))
    first, other = losses(tmp_path / "still"), losses(straight)
    assert first[0] == other[0] and first[3] != other[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "generator", power_cut(training.Run.generator, 3))
        with pytest.raises(KeyboardInterrupt):
            train(*parse([*flags, "--out", str(tmp_path / "cut"), "--flow-rate", "1e-3"]))
    moved = str(shutil.copytree(odd, tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    there = ["--from", "moved", "--encoders", "moved"]
    resumed = train(*parse(["--resume", "--out", str(tmp_path / "cut"), *there]))
    assert (resumed / "mmdit.safetensors").read_bytes() == (straight / "mmdit.safetensors").read_bytes()
    told = read_json(resumed / "config.json")
    assert told["origin"] == told["encoders"] == moved
    for wrong, why in (("gone", "does not exist"), (odd / "text_encoders" / "clip_l.safetensors", "clip_l")):
        with pytest.raises(ValueError, match=why):
            parse(["--resume", "--out", config.out, "--from", str(wrong)])
    with pytest.raises(ValueError, match="--from .* contradicts"):
        parse(["--resume", "--out", str(finished), "--from", moved])
    assert not (resumed / "start").exists() and sorted(p.name for p in resumed.glob("*.safetensors")) == [
        "mmdit.safetensors"]


@pytest.mark.parametrize("layout", ["single_file", "folder"])
def test_the_fingerprint_of_published_encoders_knows_each_of_them_and_not_the_transformer(layout, tmp_path):
    make_fake_checkpoint.main([str(tmp_path), "--config", "small", "--layout", layout, "--parts", *ALL_PARTS])
    path = tmp_path if layout == "folder" else tmp_path / "small.safetensors"
    before = stages.encoder_prints(path)
    for part, differs in (("mmdit", (0, 0)), ("vae", (1, 0)), ("clip_g", (0, 1)), ("t5", (0, 1))):
        source, _ = locate(path, part)
        tensors, name = load_file(source.path), source.prefix + max(source.index)
        save_file(tensors | {name: tensors[name] + 0.5}, source.path)
        now = stages.encoder_prints(path)
        assert tuple(a != b for a, b in zip(before, now)) == differs, part
        before = now
    merges = tmp_path / "tokenizer" / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-1]))
    now = stages.encoder_prints(path)
    assert now[0] == before[0] and now[1] != before[1]


def test_bad_input_about_published_encoders_is_one_line_that_names_the_remedy(
        finished, published, encoded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, pictures, _ = encoded
    cache = ["cache", "--data", pictures, "--dtype", "float32"]
    assert "--size" in refused([*cache, "--model", published], capsys)
    assert "not allowed with" in refused([*cache, "--model", published, "--run", finished], capsys)
    assert "--run --model" in refused(cache, capsys)
    assert "does not exist" in refused([*cache, "--model", "gone.safetensors", "--size", 32], capsys)
    assert "train.py cache --model" in refused(["--encoders", published], capsys)
    assert "add --from" in refused(["--cache", finished / "cache"], capsys)
    assert "contradicts" in refused(["--cache", out, "--t5-length", 20], capsys)
    assert "contradicts" in refused(["--cache", out, "--size", 64], capsys)
    assert "does not exist" in refused(["--cache", out, "--encoders", "gone"], capsys)
    assert "train.py cache --model" in refused(["--from", published], capsys)
    assert "of which published weights know nothing" in refused(
        ["--from", published, "--cache", finished / "cache"], capsys)
    wrong = published.parent / "text_encoders" / "clip_l.safetensors"
    assert "clip_l.safetensors" in refused(["--from", wrong, "--cache", out], capsys)
    assert "leave out --model" in refused(["--from", published, "--cache", out, "--model", "d15"], capsys)
    assert "does not exist" in refused(["--from", "gone.safetensors", "--cache", out], capsys)
    other = tmp_path / "other"
    shutil.copytree(published.parent, other)
    file = other / "text_encoders" / "clip_l.safetensors"
    save_file({k: v + 0.5 for k, v in load_file(file).items()}, file)
    assert "made by other text encoders" in refused(
        ["--cache", out,
         *flags_of(encoders=other / published.name, out="run", flow_batch=2, dtype="float32")],
        capsys)


# --- Nothing lost, nothing mixed ---

def interrupted(finished, folder, **flags):
    """A run that was cut off at step 3 of flow, after a save at 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "generator", power_cut(training.Run.generator, 3))
        with pytest.raises(KeyboardInterrupt):
            train(*parse(["--from", str(finished), *flags_of(
                pictures=8, flow_steps=5, flow_batch=4, save_every=2, out=folder, **flags)]))
    return folder


def test_a_part_that_is_lost_while_the_transformer_learns_from_it_costs_no_checkpoint(
        finished, tmp_path, capsys):
    run = interrupted(finished, tmp_path / "run")
    kept = (run / "t5.safetensors").read_bytes()
    (run / "t5.safetensors").unlink()
    said = refused(["--resume", "--out", run], capsys)
    assert "checkpoints/flow-000002 learned from another t5.safetensors" in said and "put it back" in said
    (run / "t5.safetensors").write_bytes(kept)
    training.main(["--resume", "--out", str(run)])
    assert "going on at step 2 of 5" in capsys.readouterr().out


def test_without_a_bound_a_run_that_had_one_learns_all_its_steps(finished, tmp_path, capsys):
    run = interrupted(finished, tmp_path / "run", minutes=5)
    file = run / "checkpoints" / "flow-000002" / "manifest.json"
    file.write_text(json.dumps(read_json(file) | {"total": 4}))         # as it was planned
    training.main(["--resume", "--out", str(run), "--minutes", "0"])
    assert "going on at step 2 of 5" in capsys.readouterr().out and len(losses(run)) == 5


def test_data_that_have_moved_are_found_where_a_flag_says(finished, tmp_path, capsys):
    pictures = fill(tmp_path / "pictures", 6)
    run = interrupted(finished, tmp_path / "run", data=pictures)
    moved = pictures.rename(tmp_path / "moved")
    training.main(["--resume", "--out", str(run), "--data", str(moved)])
    said = capsys.readouterr().out
    assert "going on at step 2 of 5" in said and "not what it was" not in said
    again = interrupted(finished, tmp_path / "again", data=moved)
    assert "contradicts" in refused(["--resume", "--out", again, "--data", finished], capsys)


def test_parts_of_a_run_that_has_lost_its_settings_are_no_start_of_another(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.json").unlink()
    assert "vae.safetensors of a run whose config.json is missing" in refused(["--out", run], capsys)
    rest = tmp_path / "rest"                                            # of a start that was cut off
    shutil.copytree(finished / "tokenizers", rest / "tokenizers")
    (rest / "tokenizers" / "t5" / "tokenizer.json").write_text("{}")
    train(TrainConfig(**MICRO | dict(flow_steps=1), out=str(rest)))
    assert load_tokenizers(rest, 20)["t5"].vocab_size == load_tokenizers(finished, 20)["t5"].vocab_size


def test_a_cache_whose_captions_do_not_add_up_is_refused(finished, tmp_path):
    cache = shutil.copytree(finished / "cache", tmp_path / "cache")
    file = next(cache.glob("latents-*"))
    tensors, about = load_tensors(file)
    tensors["counts"][1] += 1
    save_tensors(file, tensors, about)
    with pytest.raises(ValueError, match="its pictures have .* captions and there are"):
        Cache(cache)


@pytest.mark.parametrize("flags, words", [
    (["--seed", "99999999999999999999"], "seed is"), (["--seed", "-1"], "seed is"),
    (["--from", "RUN", "--lora", "2", "--muon-rate", "0.02"], "--muon-rate is for whole matrices")])
def test_settings_that_cannot_be_are_refused_before_a_folder_is_made(flags, words, finished, tmp_path, capsys,
                                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused([str(finished) if flag == "RUN" else flag for flag in flags], capsys)
    assert not list(tmp_path.iterdir())


def test_defaults_are_the_papers_where_it_tells_them():
    c = TrainConfig()
    assert c.density == "logit_normal" and c.synthetic == 0.5
    assert c.text_drop ** 3 == pytest.approx(0.1, abs=1e-3)             # all three texts gone in a tenth


def test_a_new_transformer_of_the_papers_sizes_learns_at_the_papers_rate_and_as_long(encoded):
    for flags, expected in (({}, (1e-4, 0.0, 1000, 500_000)),
                            (dict(warmup=7, flow_rate=2e-4, flow_steps=9), (2e-4, 0.0, 7, 9))):
        config, _ = parse(flags_of(model="d15", cache=encoded[0], **flags))
        assert (config.flow_rate, config.muon_rate, config.warmup, config.flow_steps) == expected


def test_a_resumed_run_refuses_encoders_that_did_not_make_its_cache(learned, published, tmp_path, capsys):
    run, other = (shutil.copytree(p, tmp_path / p.name) for p in (learned[0], published.parent))
    before = (run / "config.json").read_bytes()
    file = next(other.rglob("clip_l*.safetensors"))
    save_file({k: x * 2 if x.is_floating_point() else x for k, x in load_file(file).items()}, file)
    assert "encoders" in refused(["--resume", "--out", run, "--encoders", other / published.name], capsys)
    assert (run / "config.json").read_bytes() == before


# --- Adapters ---

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) and t.dtype == b[name].dtype
                                        for name, t in a.items())


def test_only_adapters_learn_and_their_file_with_what_they_began_with_is_the_run(finished, tmp_path, capsys):
    flags = ["--from", str(finished), "--lora", "2", *flags_of(pictures=8, flow_steps=4, flow_batch=4,
                                                              save_every=2)]
    config, _ = parse(flags)
    assert (config.flow_rate, config.muon_rate) == (5e-3, 0)
    straight = train(*parse([*flags, "--out", str(tmp_path / "straight")]))
    before, after = load_part(finished, "mmdit"), load_part(straight, "mmdit")
    moved = {name for name, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[name])}
    assert moved == {f"{name}.weight" for name in finetune.adapters(finetune.add_lora(
        load_part(finished, "mmdit"), 1))}
    assert same(finetune.change_all(before, [finetune.Lora(straight / "lora.safetensors")]).state_dict(),
                after.state_dict())
    sizes = [t.numel() for name, t in load_file(straight / "lora.safetensors").items() if "alpha" not in name]
    assert f"adapters of rank 2 learn, {sum(sizes):,} numbers" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "generator", power_cut(training.Run.generator, 3))
        with pytest.raises(KeyboardInterrupt):
            train(*parse([*flags, "--out", str(tmp_path / "cut")]))
    checkpoint, = (tmp_path / "cut" / "checkpoints").iterdir()
    assert checkpoint.name == "flow-000002"
    assert not any(name.endswith("qkv.weight") for name in load_tensors(checkpoint / "state.safetensors")[0])
    resumed = train(*parse(["--resume", "--out", str(tmp_path / "cut")]))
    for name in ("mmdit", "lora"):
        assert same(*(load_file(folder / f"{name}.safetensors") for folder in (resumed, straight)))
    all_of_it, _ = parse(["--from", str(straight)])                     # what follows learns as a whole again
    assert (all_of_it.lora, all_of_it.flow_rate, all_of_it.muon_rate) == (0, 2e-3, 0.02)


def test_what_follows_published_weights_or_their_adapters_learns_at_the_rate_of_what_it_trains(
        finished, tmp_path, monkeypatch):
    """And has no limit of minutes, although a run of published weights calls its model "tiny"."""
    run, saved = shutil.copytree(finished, tmp_path / "run"), read_json(finished / "config.json")
    monkeypatch.setattr(settings, "config_of_part", lambda *_: MMDiTConfig(38))
    for lora, rate in ((0, 1e-5), (3, 1e-4)):
        (run / "config.json").write_text(json.dumps(
            saved | {"encoders": str(tmp_path), "lora": lora, "flow_rate": rate, "muon_rate": 0.0}))
        for given, expected in (({}, 1e-5), ({"lora": 2}, 1e-4), ({"lora": 2, "flow_rate": 3e-5}, 3e-5)):
            got = settings.second_phase({"origin": str(run), **given})
            assert (got["flow_rate"], got["muon_rate"], got["minutes"]) == (expected, 0.0, 0.0)


def test_adapters_of_published_weights_learn_beside_them_in_half_precision(encoded, odd, tmp_path):
    flags = ["--from", str(odd), "--cache", str(encoded[0]), "--encoders", str(odd), "--lora", "3", *flags_of(
        flow_steps=3, flow_batch=4, preview_every=3, device="cpu", dtype="bfloat16")]
    config, _ = parse([*flags, "--out", str(tmp_path / "run")])
    assert config.flow_rate == 1e-4
    run, base = train(config), odd / "small.safetensors"
    adapter = finetune.Lora(run / "lora.safetensors")
    assert {t.dtype for pair in adapter.factors.values() for t in pair[:2]} == {torch.float32}
    assert any(B.any() for _, B, _ in adapter.factors.values())
    stored = load_file(run / "mmdit.safetensors")
    assert same(stored, load_mmdit(base, dtype=torch.bfloat16, loras=[adapter]).state_dict())
    pipes = (Pipeline.from_pretrained(run, device="cpu"),
             Pipeline.from_pretrained(odd, device="cpu", loras=[adapter]))
    pipes[1].kind, pipes[1].shift = "clean", pipes[0].shift
    a, b = (pipe("a star", steps=2, guidance=1.0, output="latent", t5_length=77, height=32, width=32)
            for pipe in pipes)
    assert (a - b).norm() < 0.02 * b.norm()                     # the one's transformer was rounded, merged


@pytest.mark.parametrize("flags, words", [
    (["--lora", "2"], "what --from names"), (["--from", "RUN", "--lora", "-1"], "rank"),
    (["--from", "RUN", "--lora", "33"], "1 to 32"), (["--from", "RUN", "--lora", "2", "--fsdp"], "--fsdp")])
def test_adapters_that_cannot_be_are_refused_before_anything_is_read(flags, words, finished, capsys):
    assert words in refused([str(finished) if flag == "RUN" else flag for flag in flags], capsys)


# --- Which setting wins ---

def test_only_paths_of_what_has_moved_may_change_in_a_resumed_run(tmp_path):
    there, gone = str(tmp_path), str(tmp_path / "gone")
    second = tmp_path / "second"
    (second / "start").mkdir(parents=True)
    for name, saved, folder in (
            ("data", {"data": "drawn"}, tmp_path), ("data", {"data": "emoji"}, tmp_path),
            ("data", {"data": there}, tmp_path), ("cache", {"cache": there}, tmp_path),
            ("cache", {"cache": ""}, tmp_path), ("origin", {"origin": gone, "encoders": ""}, tmp_path),
            ("origin", {"origin": gone, "encoders": gone}, second)):    # a second phase has no other start
        with pytest.raises(ValueError, match="other contradicts"):
            settings.check_kept({name: "other"}, saved, folder)
    for name, saved in (("data", {"data": gone}), ("cache", {"cache": gone}), ("lora", {}),
                        ("origin", {"origin": gone, "encoders": gone})):
        settings.check_kept({name: "other"}, saved, tmp_path)


def test_a_run_that_was_moved_goes_on_where_it_is_and_one_of_another_version_is_refused(finished, tmp_path):
    saved = read_json(finished / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert parse(["--resume", "--out", str(tmp_path)])[0].out == str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(saved | {"unheard_of": 1}))
    with pytest.raises(ValueError, match="from another version"):
        parse(["--resume", "--out", str(tmp_path)])


def test_encoders_may_be_named_again_when_the_cache_is_gone(learned, published, tmp_path):
    saved = read_json(learned[0] / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(saved | {"cache": str(tmp_path / "gone")}))
    assert parse(["--resume", "--out", str(tmp_path), "--encoders", str(published)])[1]


def test_a_second_phase_inherits_neither_limits_nor_a_cache_nor_adapters(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    saved = read_json(run / "config.json") | dict(minutes=3, cache="a", lora=2, out="b", origin="c", ema=0.5)
    (run / "config.json").write_text(json.dumps(saved))
    got = settings.second_phase({"origin": str(run)})
    assert got["origin"] == str(run) and got["ema"] == 0.5
    assert not {"minutes", "cache", "lora", "out"} & got.keys()
    for name in ("clip_length", "t5_length"):
        with pytest.raises(ValueError, match=f"{settings.flag_of(name)} 99 contradicts"):
            settings.second_phase({"origin": str(run), name: 99})
    (run / "mmdit.safetensors").unlink()
    with pytest.raises(ValueError, match="no finished run there"):
        settings.second_phase({"origin": str(run)})


@pytest.mark.parametrize("depth, encoders", [(2, "weights"), (38, "")])
def test_small_steps_are_for_large_transformers_that_learned_from_published_encoders_alone(
        depth, encoders, finished, tmp_path, monkeypatch):
    run, saved = shutil.copytree(finished, tmp_path / "run"), read_json(finished / "config.json")
    monkeypatch.setattr(settings, "config_of_part", lambda *_: MMDiTConfig(depth, heads=depth, head_dim=16))
    saved |= {"encoders": encoders, "lora": 3, "flow_rate": 9.0}
    (run / "config.json").write_text(json.dumps(saved))
    for given, expected in (({}, (2e-3, 0.02)), ({"lora": 2}, (5e-3, 0.0))):
        got = settings.second_phase({"origin": str(run), **given})
        assert (got["flow_rate"], got["muon_rate"]) == expected


def test_a_rank_may_be_as_small_and_as_large_as_the_messages_say():
    c = MMDiTConfig(2, heads=2, head_dim=16)
    assert all(settings.of_adapters({"lora": rank}, c, 0.1)["flow_rate"] == 0.1 for rank in (1, 32))


def test_what_was_named_from_here_is_found_from_anywhere(published, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(published.parent)
    config, _ = parse(["--from", published.name, "--cache", str(encoded[0]), "--encoders", published.name])
    assert config.origin == config.encoders == str(published)


def test_a_cache_keeps_the_length_of_its_texts(encoded):
    for name in ("clip_length", "t5_length"):
        with pytest.raises(ValueError, match="contradicts"):
            settings.checked_cache({"cache": str(encoded[0]), name: 9})


# --- A folder in which much is bad ---

def spoil(folder, n, rng):
    """n pictures with captions, of which 5 % are bad in each of nine ways -> how many are good."""
    good = 0
    for i in range(n):
        name, way = folder / f"{i:04}.png", i % 20
        buffer = io.BytesIO()
        size = (20 + rng.randrange(120), 20 + rng.randrange(120))
        Image.effect_noise(size, 60).convert("RGB").save(buffer, "PNG")
        content = buffer.getvalue()
        caption = f"noise {i}\na grey field of noise, number {i}".encode()
        if way == 0:
            content = b""
        elif way == 1:
            content = b"<html><body>404</body></html>"
        elif way == 2:
            content = content[:len(content) // 2]
        elif way == 3:
            content = content[:60] + bytes(20) + content[80:]
        elif way == 4:
            caption = b"\xff\xfe\x00broken"
        elif way == 5:
            caption = b"\n \n"
        elif way == 6:
            caption = b"x" * 5000
        elif way == 7:
            name = name.with_suffix(".jpg")
            content = content[:30]
        elif way == 8:
            caption = None
        else:
            good += 1
        name.write_bytes(content)
        if caption is not None:
            name.with_suffix(".txt").write_bytes(caption)
    return good


def test_a_folder_with_every_kind_of_bad_file_trains_to_the_end_with_a_report(tmp_path, capsys, request):
    thorough = request.config.getoption("--hypothesis-profile", default=None) == "thorough"
    n, folder = (1000 if thorough else 40), tmp_path / "mine"
    folder.mkdir()
    good = spoil(folder, n, random.Random(0))
    run = train(TrainConfig(**MICRO | dict(pictures=n, flow_steps=2), data=str(folder),
                            out=str(tmp_path / "run")))
    said = capsys.readouterr().out
    cache = Cache(run / "cache")
    assert len(cache) == good == n - 9 * n // 20
    assert "skipped" in said and f"{n - good} skipped" in said
    assert (run / "mmdit.safetensors").is_file() and all(map(math.isfinite, losses(run)))
