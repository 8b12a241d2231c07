"""Claims about training: four stages through one loop, resumed bit by bit, bounded in time,
and clear about bad input."""
import csv
import dataclasses
import json
import math
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from PIL import Image

import data
import flow
import sample
import settings
import stages
import train as training
import watch
from conftest import MICRO
from data import load_pictures
from mmdit import MMDiT, MMDiTConfig
from pipeline import Pipeline
from run_folder import load_tensors, load_tokenizers
from settings import flag_of
from train import TrainConfig, parse, rate_at, time_stages, train
from vae import AutoencoderKL, VAEConfig, discriminator_loss, vae_loss

pytestmark = pytest.mark.usefixtures("miniature")


def tensors_of(folder):
    return {p.name: load_tensors(p)[0] for p in sorted(Path(folder).glob("*.safetensors"))}


def told(folder):
    """metrics.csv without the column that depends on the clock."""
    rows = csv.DictReader(open(Path(folder, "metrics.csv"), encoding="utf-8"))
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in rows]


def assert_same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for file in a:
        assert all(torch.equal(a[file][k], b[file][k]) for k in a[file]), file


def test_a_run_leaves_every_part_the_losses_and_no_unfinished_state(finished):
    names = {p.name for p in finished.iterdir()}
    assert {f"{part}.safetensors" for parts in training.PARTS_OF.values() for part in parts} <= names
    assert {"config.json", "metrics.csv", "loss.png", "tokenizers"} <= names
    assert not {"checkpoints", "lock"} & names
    rows = list(csv.DictReader(open(finished / "metrics.csv", encoding="utf-8")))
    assert [r["stage"] for r in rows] == ["vae"] * 3 + ["clip"] * 2 + ["t5"] * 2 + ["flow"] * 6
    assert all(math.isfinite(float(r["loss"])) for r in rows)


def test_the_same_seed_repeats_a_run_bit_by_bit(finished, tmp_path):    # another: test_studies.py
    assert_same(finished, train(TrainConfig(**MICRO, out=str(tmp_path / "again"))))


@pytest.mark.parametrize("stage, at", [("vae", 2), ("flow", 3)])
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(
        finished, tmp_path, monkeypatch, stage, at):
    original = training.Run.generator

    def power_cut(self, name, step):                    # every step asks for its generator
        if (name, step) == (stage, at) and not estimating(self):
            raise KeyboardInterrupt
        return original(self, name, step)

    def estimating(run):                    # the start times a few steps of each stage, before any is trained
        return not (run.folder / "metrics.csv").exists()

    monkeypatch.setattr(training.Run, "generator", power_cut)
    out = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**MICRO, out=out))
    monkeypatch.undo()
    assert Path(out, "checkpoints").exists() and not Path(out, "mmdit.safetensors").exists()
    train(*parse(["--resume", "--out", out]))
    assert_same(finished, out)
    assert told(finished) == told(out)                  # and no step is told twice


def test_a_resumed_run_says_so_where_products_have_another_dtype_now(finished, tmp_path, monkeypatch, capsys):
    """With --dtype auto a CPU's two dtypes are timed at each start."""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "mmdit.safetensors").unlink()
    judge = training.judge

    def power_cut(state, *numbers):
        if state.step == 3:
            raise KeyboardInterrupt
        return judge(state, *numbers)

    monkeypatch.setattr(training, "judge", power_cut)
    monkeypatch.setattr(training, "pick_dtype", lambda *_: (torch.float32, ""))
    with pytest.raises(KeyboardInterrupt):
        train(*parse(["--resume", "--out", str(folder)]))
    monkeypatch.setattr(training, "judge", judge)
    monkeypatch.setattr(training, "pick_dtype", lambda *_: (torch.bfloat16, ""))
    capsys.readouterr()
    train(*parse(["--resume", "--out", str(folder)]))
    assert "saved with dtype float32, now bfloat16: what follows" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")}
    train(*parse(["--resume", "--out", str(finished)]))
    assert before == {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")}


def test_earlier_parts_are_frozen_while_later_ones_learn(finished, tmp_path):
    """The flow is trained alone: nothing else moves."""
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {k: v for k, v in tensors_of(folder).items() if k != "mmdit.safetensors"}
    (folder / "mmdit.safetensors").unlink()
    train(*parse(["--resume", "--out", str(folder)]))
    after = tensors_of(folder)
    assert all(torch.equal(before[f][k], after[f][k]) for f in before for k in before[f])


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig.preset("tiny", depth=2, in_channels=4, context_dim=16, pooled_dim=8))
    x0, noise, t = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0.2, 0.4, 0.6, 0.8])
    text = {"context": torch.randn(4, 3, 16), "pooled": torch.randn(4, 8)}
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(150):
        loss = flow.loss(model, x0, t=t, noise=noise, **text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.01, (losses[0], losses[-1])


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(1, 300))
def test_the_learning_rate_warms_up_holds_and_falls_to_nearly_zero(total, decay, warmup):
    c = TrainConfig(decay=decay, warmup=warmup)
    rates = [rate_at(step, total, c) for step in range(total)]
    assert all(0 < r <= 1 for r in rates)
    peak = rates.index(max(rates))
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and peak <= total // 5
    tail = rates[-max(1, round(decay * total) // 2):]
    assert tail == sorted(tail, reverse=True)


def test_minutes_shortens_stages_that_would_not_fit(tmp_path, capsys):
    folder = train(TrainConfig(**MICRO | dict(flow_steps=100_000, minutes=0.08, save_every=1000),
                               out=str(tmp_path / "short")))
    rows = [r for r in csv.DictReader(open(folder / "metrics.csv", encoding="utf-8")) if r["stage"] == "flow"]
    assert 60 <= len(rows) < 2000
    assert float(rows[-1]["rate"]) < 0.1 * max(float(r["rate"]) for r in rows)  # still comes down to the end


def test_the_start_tells_device_dtype_sizes_and_time_and_the_end_tells_the_next_command(finished):
    said = (finished.parent / "said.txt").read_text(encoding="utf-8")
    for word in ("device: cpu", "float32 (as asked)", "mmdit ", "vae ", "expected:"):
        assert word in said, word
    words = ["python", "sample.py", "--run", str(finished), "a red star left of a blue ring"]
    assert shlex.split(said.strip().splitlines()[-1]) == words


def test_the_expected_time_is_that_of_whole_steps_and_timing_them_changes_no_weight(tmp_path, monkeypatch):
    c = TrainConfig(**MICRO | dict(clip_length=4, t5_length=4, accumulate=2, flow_batch=4))
    parts = {"mmdit": MMDiT(MMDiTConfig.preset("tiny")), "vae": AutoencoderKL(VAEConfig.preset("tiny"))}
    before = {k: p.clone() for k, p in parts["mmdit"].named_parameters()}
    clock = [0.0]

    def slow(f, seconds):
        def slower(*args, **how):
            clock[0] += seconds
            return f(*args, **how)
        return slower

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(flow, "loss", slow(flow.loss, 1))
    monkeypatch.setattr(training.Muon, "step", slow(training.Muon.step, 10))
    run = training.Run(c, tmp_path)
    assert time_stages(run, parts, ["flow"], {}) == {"flow": 12 * c.flow_steps}
    assert all(torch.equal(p, before[k]) and p.grad is None for k, p in parts["mmdit"].named_parameters())
    run.config = dataclasses.replace(c, muon_rate=0.0)
    assert time_stages(run, parts, ["flow"], {}) == {"flow": 2 * c.flow_steps}


def test_a_new_run_takes_no_folder_that_is_there_and_the_next_command_names_all_but_the_last_finished_run(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, file in enumerate(("/mmdit.safetensors", "-2/mmdit.safetensors", "-3/config.json")):
        path = Path(f"runs/drawn{file}")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (age, age))
    assert training.new_folder(TrainConfig()) == Path("runs/drawn-4")
    assert training.new_folder(TrainConfig(origin="run", size=128)) == Path("runs/drawn-128")
    named = [training.drawing(Path("runs", name), "a star")[1:-1] for name in ("drawn", "drawn-2")]
    assert named == [["--run", Path("runs/drawn")], []]


@pytest.mark.skipif(os.name == "nt", reason="rules of a POSIX shell")
@given(st.text(st.characters(exclude_characters="\0\n")).filter(str.strip))
@example('a poster that says "$(date)"').via("a caption")
@example("--").via("a caption")
def test_whatever_a_folder_or_a_caption_holds_the_command_draws_that_with_that_run(text):
    _, *words = shlex.split(training.typed(*training.drawing(Path("my run"), text)))
    args = sample.parse(words)
    assert (args.prompt, args.model) == ([text], "my run")


def test_on_windows_what_shells_give_a_meaning_is_quoted():
    for word, typed in (("R&B", '"R&B"'), ("a>b", '"a>b"'), ("--out", "--out"), ("", '""'),
                        ("my run", '"my run"'),
                        ("D:\\R&D\\run", '"D:\\R&D\\run"'), ("C:\\runs\\a", "C:\\runs\\a")):
        assert training.quoted(word) == typed


def test_no_two_runs_stages_or_steps_share_their_random_numbers(tmp_path):
    runs = [training.Run(TrainConfig(**MICRO, seed=seed), tmp_path) for seed in (0, 1)]
    seeds = {run.generator(stage, step).initial_seed()
             for run in runs for stage in stages.STAGES for step in (0, 1, 8000)}
    assert len(seeds) == 24


@pytest.mark.parametrize("single, half, expected, products", [
    (0.003, 0.002, torch.bfloat16, 24), (0.0012, 0.001, torch.float32, 24), (0.01, 1, torch.float32, 13)])
def test_products_are_in_bfloat16_on_a_cpu_where_that_is_faster_and_never_on_mps_unasked(
        single, half, expected, products, monkeypatch):
    """To find out takes a second where one product does."""
    cost, spent = {torch.float32: single, torch.bfloat16: half}, []
    monkeypatch.setattr(training.time, "perf_counter", lambda: sum(spent))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: spent.append(cost[a.dtype]))
    assert training.pick_dtype("auto", torch.device("cpu"))[0] == expected and len(spent) == products
    assert training.pick_dtype("auto", torch.device("mps"))[0] == torch.float32
    assert training.pick_dtype("bfloat16", torch.device("mps"))[0] == torch.bfloat16


def test_the_critic_learns_from_its_own_loss_alone_and_the_autoencoder_from_its_verdict(tmp_path):
    run = training.Run(TrainConfig(**MICRO | dict(vae_critic=0.5)), tmp_path)
    pictures, vae = load_pictures("drawn", count=16), AutoencoderKL(VAEConfig.preset("tiny"))
    stage = stages.vae_stage(run, {"vae": vae}, pictures)
    critic, g, batch = stage.model["critic"], run.generator("vae", 0), run.config.vae_batch
    stage.loss(0, run.generator("vae", 0))[0].backward()
    x = stages.to_signed(pictures.images[torch.randint(16, (batch,), generator=g)], "cpu")
    noise = flow.draw_noise((batch, vae.config.z_channels, 8, 8), g)
    total, _, recon = vae_loss(vae, x, noise=noise, critic=critic, critic_weight=0.5)
    judged = discriminator_loss(critic, x, recon)
    for module, loss in ((vae, total), (critic, judged)):
        expected = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        for p, grad in zip(module.parameters(), expected):
            torch.testing.assert_close(p.grad, grad)


def test_sample_grids_appear_as_it_learns_and_the_last_is_what_the_finished_run_draws(tmp_path):
    folder = train(TrainConfig(**MICRO | dict(preview_every=4), out=str(tmp_path / "run")))
    grids = sorted((folder / "samples").glob("*.png"))
    assert [g.name for g in grids] == ["000004.png", "000006.png"]
    assert Image.open(grids[0]).size[0] > 4 * 64
    pipe, prompts = Pipeline.from_pretrained(folder, device="cpu"), stages.preview_prompts(TrainConfig(), [])
    drawn = pipe(prompts, guidance=3.0, steps=20)                           # by the averaged weights
    drawn = [(np.asarray(picture), [prompt]) for picture, prompt in zip(drawn, prompts)]
    again, last = data.contact_sheet({"step 6": drawn[:4], "": drawn[4:]}), Image.open(grids[1])
    assert np.abs(np.asarray(again, dtype=float) - np.asarray(last)).max() <= 1
    (folder / "samples" / "._000006.png").write_bytes(b"of macOS, on another system's drive")
    (folder / "film.gif").unlink()
    watch.film(folder)
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 2 and film.size == Image.open(grids[0]).size


def test_a_folder_of_real_pictures_trains_like_drawings_bad_files_are_counted_and_its_tokenizers_stay(
        tmp_path, capsys):
    pictures = tmp_path / "mine"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (90, 70), (20 * i, 100, 200 - 10 * i)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(
            f"a plain picture number {i}\nan even colour, {i}", encoding="utf-8")
    (pictures / "3.png").write_bytes(b"not a picture")
    folder = train(TrainConfig(**MICRO, data=str(pictures), out=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert "skipped 3.png" in said and "--pictures allows more" not in said
    words = {p: p.read_bytes() for p in (folder / "tokenizers").rglob("*.*")}
    (pictures / "5.txt").write_text("quite other words than those", encoding="utf-8")
    (folder / "mmdit.safetensors").unlink()
    train(*parse(["--resume", "--out", str(folder)]))           # its encoders know no others
    assert words and all(p.read_bytes() == before for p, before in words.items())


def test_emoji_train_without_a_change(tmp_path):
    c = TrainConfig(**MICRO, data="emoji", out=str(tmp_path / "run"),
                    accumulate=8)                               # pieces of the transformer's batch alone
    assert (train(c) / "mmdit.safetensors").exists()


def test_help_has_every_flag_under_a_heading(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    said, names = capsys.readouterr().out, [f.name for f in dataclasses.fields(TrainConfig)]
    assert end.value.code == 0 and "None" not in said and names[0] == "data"
    places = [said.index(f"\n  {flag_of(name)}") for name in names]
    assert places == sorted(places) and said.index("what is learned:") < places[0]


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(TrainConfig):
        if f.type is not bool and f.default != "":
            assert f"{f.metadata['help']} (default: {f.default})" in said, f.name


def test_flags_are_the_fields_of_the_config():
    config, resume = parse(["--tiny", "--flow-steps", "7", "--data", "emoji", "--checkpointing"])
    assert (config.flow_steps, config.data, config.checkpointing, resume) == (7, "emoji", True, False)
    assert dataclasses.replace(
        config, flow_steps=TrainConfig.flow_steps, data="drawn", checkpointing=False) == TrainConfig()


@pytest.mark.parametrize("flags, cause", [
    (["--flow-stepz", "3"], "did you mean --flow-steps"),
    (["--size", "50"], "not a multiple of 16: try 48|multiple of 16"),
    (["--flow-steps", "0"], "must be above 0"),
    (["--flow-rate", "-1"], "must be above 0"),
    (["--warmup", "0"], "must be above 0"),
    (["--save-every", "0"], "must be above 0"),
    (["--density", "bell"], "logit_normal"),
    (["--model", "sd9"], "choose from"),
    (["--dtype", "int8"], "bfloat16"),
    (["--device", "tpu9"], "--device cpu"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--flow-steps", "many"], "--flow-steps"),
    (["--resume"], "train.py --tiny"),
])
def test_bad_input_ends_in_one_line_with_cause_and_remedy_and_exit_code_2(
        flags, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        training.main(flags)
    said = capsys.readouterr().err.strip()
    assert (end.value.code == 2 and any(c in said for c in cause.split("|"))
            and len(said.splitlines()) == 1), said
    assert not list(tmp_path.glob("runs/*/*.safetensors"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_that_names_what_saves_some(
        error, finished, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise error
    monkeypatch.setattr(training, "train", fails)
    monkeypatch.setattr(training, "cache_command", fails)
    spared = "--accumulate", "--checkpointing", "--fsdp"
    for command, words in ((["--resume", "--out", finished], (f"--resume --out {finished}  and", *spared)),
                           (["--out", tmp_path / "new"], ("with  the same command  and", *spared)),
                           (["cache", "--run", finished], ("with  the same command  and", "--device cpu"))):
        with pytest.raises(SystemExit) as end:
            training.main([*map(str, command)])
        said = capsys.readouterr().err.strip()
        assert end.value.code == 2 and len(said.splitlines()) == 1
        assert all(word in said for word in (str(error).splitlines()[0], *words)), said
    error = RuntimeError("a defect of ours")
    with pytest.raises(RuntimeError, match="a defect of ours"):
        training.main(["--vae-batch", "1"])


def test_a_folder_that_holds_a_run_is_never_overwritten(finished, capsys):
    before = {p: p.read_bytes() for p in finished.glob("*.json")}
    with pytest.raises(SystemExit) as end:
        training.main(["--out", str(finished), "--flow-steps", "3"])
    assert end.value.code == 2 and "--resume" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in finished.glob("*.json")}


def test_what_is_not_of_the_result_may_be_set_and_taken_back_when_resuming(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"fsdp": True, "compile": True}))
    resume = ["--resume", "--out", str(tmp_path)]
    assert parse(resume)[0].fsdp and parse(resume)[0].compile
    config, _ = parse([*resume, "--no-fsdp", "--no-compile", "--checkpointing", "--accumulate", "2",
                       "--preview-every", "7", "--save-every", "9"])
    assert (config.fsdp, config.compile, config.checkpointing, config.accumulate) == (False, False, True, 2)
    assert (config.preview_every, config.save_every) == (7, 9)


def test_all_else_is_of_the_result_and_refused_when_resuming(finished):
    free = {"minutes", "accumulate", "checkpointing", "fsdp", "compile", "encoders", "preview_every",
            "save_every"}
    saved = json.loads((finished / "config.json").read_text())
    for name in saved.keys() - free - {"out"}:
        with pytest.raises(ValueError, match=f"{flag_of(name)} other contradicts"):
            settings.check_kept({name: "other"}, saved, finished)


def test_resume_refuses_other_settings_by_name(finished, capsys):
    with pytest.raises(SystemExit) as end:
        training.main(["--resume", "--out", str(finished), "--seed", "9"])
    assert end.value.code == 2 and "--seed" in capsys.readouterr().err


def test_a_transformer_does_not_outlive_what_it_learned_from(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "vae.safetensors").unlink()
    with pytest.raises(SystemExit):
        training.main(["--resume", "--out", str(run)])
    said = capsys.readouterr().err
    assert "vae.safetensors" in said and "delete mmdit.safetensors too" in said
    (run / "mmdit.safetensors").unlink()
    training.main(["--resume", "--out", str(run)])              # from the same seed, so the same again
    assert_same(finished, run)


def test_t5_reads_what_is_hidden_in_one_caption_in_the_other(finished, monkeypatch):
    seen, config = [], TrainConfig(**MICRO)
    monkeypatch.setattr(stages, "masked_span_loss",
                        lambda t5, ids, generator, rows: seen.append(ids) or ids.float().sum())
    pictures, tokenizers = load_pictures("drawn", count=8), load_tokenizers(finished, 12)
    run = training.Run(config, finished)
    stages.t5_stage(run, {"t5": torch.nn.Identity()}, pictures, tokenizers).loss(0, run.generator("t5", 0))
    tok = tokenizers["t5"].tok
    assert ({tok.decode(row.tolist()) for row in seen[0]}
            <= {tok.decode(tok.encode(", ".join(c)).ids) for c in pictures.captions})


def test_a_diverging_loss_stops_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="--vae-rate"):
        train(TrainConfig(**MICRO | dict(vae_rate=1e18, vae_steps=40), out=str(tmp_path / "run")))
