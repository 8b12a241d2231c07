"""Claims about training when something goes wrong: a kill, a signal, a full disk, a second process, numbers
that are not finite. Whatever happens, what was saved stays, and going on ends where the undisturbed run ends.

Most of it happens to `fit` with a miniature of the transformer, in processes forked from one that has
imported everything: so twenty kills take seconds. `pytest --hypothesis-profile=thorough` kills 20 times, the
default 6 times. The command line itself gets its signals at the end of the file.
"""
import builtins
import csv
import errno
import io
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import flow
import mmdit
import stages
import train as training
import watch
from checkpoints import checkpoints_of
from conftest import ROOT, blank
from mmdit import MMDiT, MMDiTConfig
from muon import Muon, split
from run_folder import load_tensors, save_tensors, sole_writer
from tensor_files import CheckpointError
from train import TrainConfig, fit

KILLS = 20 if settings.default.max_examples > 100 else 6
THOROUGH = pytest.mark.skipif(KILLS < 20, reason="with --hypothesis-profile=thorough only")
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
QUICK = dict(device="cpu", dtype="float32", flow_batch=4, flow_steps=40, save_every=1, preview_every=0,
             minutes=0)


# ----------------------------------------------------------------------------------- a stage in miniature

def miniature(run, spoil=lambda step, loss: loss):
    """A flow stage of a two-block transformer on noise. spoil: what becomes of a step's loss."""
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(2, heads=2, head_dim=8, in_channels=4, context_dim=8, pooled_dim=8, pos_max=4,
                              pos_sample=2, pos_base=2))

    def loss(step, g, rows=None):
        x0, noise = torch.randn(4, 4, 4, 4, generator=g), torch.randn(4, 4, 4, 4, generator=g)
        t = torch.rand(4, generator=g)
        losses = flow.loss(model, x0, t=t, noise=noise, context=torch.randn(4, 3, 8, generator=g),
                           pooled=torch.randn(4, 8, generator=g))
        return spoil(step, losses.mean()), {"by_t": watch.loss_by_t(losses, t)}

    return stages.Stage("flow", model, loss, ema=True)


def run_miniature(folder, spoil=lambda step, loss: loss, preview=None, share=1.0, **changes):
    """What train.main does around `fit`, in the current process; the weights go to weights.pt's place."""
    torch.set_num_threads(1)
    run = training.Run(TrainConfig(**QUICK | changes, out=str(folder)), Path(folder))
    stage = miniature(run, spoil)
    stage.preview = preview and (lambda step: preview(run, step) or (lambda: None))
    with sole_writer(folder), run.stop, run.stop.later():
        fit(run, stage, share)
        save_tensors(Path(folder, "done.safetensors"), stage.model.state_dict(), {})


def test_a_step_is_that_of_adamw_and_muon_spelled_out_and_what_stays_is_their_average(tmp_path):
    """Warm-up, decay, clipping, moments, weight decay of matrices alone, and how fast the average forgets.
    Gradients as small as those that this clipping leaves must move the weights too: hence AdamW's eps."""
    how = dict(flow_steps=16, warmup=2, decay=0.5, ema=0.6, clip_norm=1e-6, save_every=1000)
    run_miniature(tmp_path, **how)
    stage, c = miniature(None), TrainConfig(**QUICK | how)
    params = dict(stage.model.named_parameters())
    matrices, rest = split(stage.model)
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)
    muon = Muon(matrices, momentum=0.95, weight_decay=0.01, dtype=torch.float32)
    average = {k: p.detach().clone() for k, p in params.items()}
    for step in range(16):
        share = min((step + 1) / 2, 1.0, (16 - step) / 8)
        for optimizer, rate in ((adamw, c.flow_rate), (muon, c.muon_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        stage.loss(step, torch.Generator().manual_seed(3 * 10**9 + step))[0].backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1e-6)
        for optimizer in (adamw, muon):
            optimizer.step()
            optimizer.zero_grad()
        slow = min(0.6, (1 + step) / (10 + step))
        average = {k: slow * v + (1 - slow) * params[k].detach() for k, v in average.items()}
    learned = load_tensors(tmp_path / "done.safetensors")[0]
    for k, v in average.items():
        torch.testing.assert_close(learned[k], v, rtol=1e-4, atol=1e-6, msg=k)


def child(folder, said, changes, limit=None):
    """The same as a process of its own, which ends as the command line would."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if limit:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    training.plot_run = blank                               # after a preview
    training.train = lambda: run_miniature(folder, **changes)
    training.parse = lambda argv: ()
    training.main([])


@pytest.fixture(scope="module", autouse=True)
def ready():
    """The process from which the others are forked; it has imported all that they need."""
    if os.name == "posix":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
            multiprocessing.set_forkserver_preload(["test_faults", "torch._dynamo"])  # AdamW imports it
            multiprocessing.forkserver.ensure_running()


def start(folder, *rest, **changes):
    said = Path(folder).parent / f"{Path(folder).name}.txt"
    process = multiprocessing.get_context("forkserver").Process(
        target=child, args=(str(folder), str(said), changes, *rest))
    process.start()
    return process, said


def wait(process, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode


def until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "it did not get there"
        time.sleep(0.002)


def steps_of(folder):
    return [int(p.name[-6:]) for p in checkpoints_of(folder, "flow")]


def rows_of(folder):
    rows = csv.DictReader(open(Path(folder, "metrics.csv"), encoding="utf-8"))
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in rows]


def assert_equal(a, b):
    """Same weights, bit by bit, and the same curve."""
    one, other = (load_tensors(Path(x, "done.safetensors"))[0] for x in (a, b))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert rows_of(a) == rows_of(b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 40 steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_miniature(folder)
    return folder


def power_cut(at):
    def spoil(step, loss):
        if step == at:
            raise KeyboardInterrupt
        return loss
    return spoil


# ------------------------------------------------------------------------------------------------- processes

@POSIX
def test_kill_9_at_random_moments_loses_no_run_and_changes_no_number(straight, tmp_path):
    """Saving after every step, so that many kills hit a save."""
    draw, folder, newest = random.Random(0), tmp_path / "killed", -1
    done = folder / "done.safetensors"
    for _ in range(KILLS):
        process, said = start(folder)
        until(lambda: max(steps_of(folder), default=-1) > newest or done.exists(), process)
        time.sleep(draw.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        wait(process)
        if done.exists():
            break
        assert max(steps_of(folder)) >= newest                  # never behind what was saved once
        newest = max(steps_of(folder))
    process, said = start(folder)
    assert wait(process) == 0, said.read_text()
    assert newest > 0 and "damaged" not in said.read_text()
    assert_equal(straight, folder)


def signals_itself(signum, step, loss):
    """In the middle of the step after 20."""
    if step == 20:
        os.kill(os.getpid(), signum)
    return loss


@POSIX
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_with_a_checkpoint_and_the_way_on(straight, tmp_path, signum, code):
    folder = tmp_path / "run"
    process, said = start(folder, spoil=partial(signals_itself, signum), save_every=1000)
    assert wait(process) == code, said.read_text()
    text = said.read_text()
    assert "saved at step 21" in text and "train.py --resume" in text and "Traceback" not in text
    assert steps_of(folder) == [21] and len(rows_of(folder)) == 21
    process, said = start(folder, save_every=1000)
    assert wait(process) == 0
    assert_equal(straight, folder)


def test_once_training_ends_signals_do_what_they_did_before_and_in_a_thread_they_always_do():
    def handlers():
        return [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def inside():
        with watch.Stop():
            return handlers()

    before = handlers()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == before != inside()
    with pytest.raises(watch.Stopped), watch.Stop():
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_a_wish_to_stop_waits_as_long_as_something_is_at_stake_and_no_longer():
    reached = []
    with pytest.raises(watch.Stopped), watch.Stop() as stop, stop.later():
        signal.raise_signal(signal.SIGTERM)
        reached.append("its end")
    with pytest.raises(watch.Stopped), watch.Stop() as stop:
        with stop.later():
            reached.append("its end")
        signal.raise_signal(signal.SIGTERM)
        reached.append("too far")
    assert reached == ["its end"] * 2


def test_the_first_signal_says_how_it_ends():
    with pytest.raises(watch.Stopped) as end, watch.Stop() as stop, stop.later():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert end.value.signum == signal.SIGINT


def pauses(run, step):
    """Stands in for a preview: in the middle of a step, and as long as it takes until `go` appears."""
    if not Path(run.folder, "busy").exists():
        Path(run.folder, "busy").touch()
        end = time.monotonic() + 60
        while not Path(run.folder, "go").exists() and time.monotonic() < end:
            time.sleep(0.005)
        Path(run.folder, "over").touch()


@POSIX
def test_a_signal_during_a_preview_waits_for_its_end(straight, tmp_path):
    folder = tmp_path / "run"
    process, said = start(folder, preview=pauses, preview_every=5, save_every=1000)
    until((folder / "busy").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    (folder / "go").touch()
    assert wait(process) == 143 and (folder / "over").exists() and steps_of(folder) == [6], said.read_text()
    process, _ = start(folder, save_every=1000)
    assert wait(process) == 0
    assert_equal(straight, folder)


def signals_itself_while_saving(step, loss):
    """From step 5 on, the rename of a checkpoint is the moment of the signal."""
    if step == 5:
        import checkpoints
        replace = os.replace

        def interrupted(a, b):
            os.kill(os.getpid(), signal.SIGTERM)
            replace(a, b)

        checkpoints.os = type("os", (), {**vars(os), "replace": staticmethod(interrupted)})
    return loss


@POSIX
def test_a_signal_during_a_save_leaves_that_save_whole(straight, tmp_path):
    folder = tmp_path / "run"
    process, said = start(folder, spoil=signals_itself_while_saving, save_every=8)
    assert wait(process) == 143, said.read_text()
    assert steps_of(folder) and not list((folder / "checkpoints").glob("*.tmp"))
    process, _ = start(folder, save_every=8)
    assert wait(process) == 0
    assert_equal(straight, folder)


@POSIX
def test_the_second_ctrl_c_ends_at_once_and_the_last_checkpoint_stays(straight, tmp_path):
    folder = tmp_path / "run"
    process, _ = start(folder, preview=pauses, preview_every=5, save_every=4)
    until((folder / "busy").exists, process)
    while process.is_alive():                                   # one that waits for the other counts as one
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        process.join(0.05)
    assert wait(process) == -signal.SIGINT and not (folder / "over").exists()       # 130 in a shell
    assert steps_of(folder) == [4]
    process, _ = start(folder)
    assert wait(process) == 0
    assert_equal(straight, folder)


@pytest.mark.parametrize("failure, told", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "Tried to allocate 2.00 GiB"),
    (CheckpointError("vae.safetensors is not there"), "vae.safetensors is not there"),
    (FloatingPointError("the decoded pictures contain NaN"), "contain NaN"),
    (OSError(28, "No space left on device"), "No space left on device): training goes on")])
@pytest.mark.parametrize("later", [False, True])
def test_a_sample_grid_that_fails_costs_no_training_and_comes_after_the_save(
        straight, tmp_path, monkeypatch, capsys, failure, told, later):
    """later: when the grid is decoded and saved, not while it is drawn."""
    there = []

    def fails(run, step):
        there.append(steps_of(tmp_path / "run")[-1:])
        if not later:
            raise failure
        return fail

    def fail():
        raise failure

    monkeypatch.setattr(training, "plot_run", blank)
    run_miniature(tmp_path / "run", preview=fails, preview_every=20, save_every=20)
    assert there == [[20], [20]] and told in capsys.readouterr().out        # the 40th step is the last
    assert (tmp_path / "run" / "loss.png").exists()
    assert_equal(straight, tmp_path / "run")


def test_a_disk_that_stays_full_is_reported_at_the_first_of_its_grids_alone(tmp_path, monkeypatch, capsys):
    def full(run, step):
        return fail

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "plot_run", blank)
    run_miniature(tmp_path / "run", preview=full, preview_every=10)
    assert capsys.readouterr().out.count("No space left on device): training goes on") == 1


def test_an_error_of_the_code_while_drawing_a_grid_is_not_hidden(tmp_path, monkeypatch):
    def fails(run, step):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "plot_run", blank)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_miniature(tmp_path / "run", preview=fails, preview_every=20)


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.bfloat16])), max_size=5))
def test_weights_and_averages_change_places_and_back_exactly(sizes):
    params = {str(i): torch.nn.Parameter(torch.randn(2, n, dtype=dtype))
              for i, (n, dtype) in enumerate(sizes)}
    average = {k: torch.randn_like(p) for k, p in params.items()}
    before = [{k: v.detach().clone() for k, v in x.items()} for x in (params, average)]
    with pytest.raises(KeyError), training.swapped(params, average):
        assert all(torch.equal(params[k], before[1][k]) for k in params)
        raise KeyError                                          # whatever happens inside
    assert all(torch.equal(x[k], y[k]) for x, y in zip((params, average), before) for k in params)


@POSIX
def test_two_processes_never_train_in_one_folder(straight, tmp_path):
    folder = tmp_path / "run"
    first, _ = start(folder, preview=pauses, preview_every=36)
    until((folder / "busy").exists, first)
    with pytest.raises(CheckpointError, match=f"is being written by process {first.pid}"):
        run_miniature(folder)
    (folder / "go").touch()
    assert wait(first) == 0
    with sole_writer(folder):                                   # and it left no lock
        pass
    assert_equal(straight, folder)


@POSIX
def test_a_full_disk_costs_no_training_and_keeps_the_older_checkpoint(straight, tmp_path):
    """No file may grow beyond 30 kB: the first checkpoint, of 400 kB, was written before that."""
    folder = tmp_path / "run"
    process, said = start(folder, spoil=partial(signals_itself, signal.SIGTERM), save_every=1000)
    assert wait(process) == 143
    before = {p: p.read_bytes() for p in folder.glob("checkpoints/*/*")}
    said.unlink()
    process, said = start(folder, 30_000)
    assert wait(process) == 2                                   # nothing could be saved, not the end either
    text = said.read_text()
    assert text.count("training goes on") == 1 and "40/40" in text and "Traceback" not in text, text
    assert "File too large" in text
    assert before == {p: p.read_bytes() for p in folder.glob("checkpoints/*/*")}
    process, _ = start(folder)
    assert wait(process) == 0                                   # there is room again
    assert_equal(straight, folder)


def test_a_disk_that_is_full_again_after_a_save_is_reported_again(tmp_path, capsys):
    run = training.Run(TrainConfig(**QUICK), tmp_path)
    for full in (True, True, False, True):
        with run.tolerating("a checkpoint of flow"):
            if full:
                raise OSError(28, "No space left on device")
        run.settle("flow")                                      # nothing was under way: no success either
    assert capsys.readouterr().out.count("No space left on device): training goes on") == 2
    assert run.warned == {"a checkpoint of flow"}


def test_metrics_wait_for_a_disk_that_refuses_everything_and_each_such_time_is_reported(
        tmp_path, monkeypatch, capsys):
    log = watch.Log(tmp_path, SimpleNamespace(stage="flow", step=0, total=9), batch=1)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    def torn(*args, real=open, **how):
        with real(*args, **how) as f:
            f.write("flow,")                                    # there was room for that
        raise OSError(28, "No space left on device")

    for step in range(1, 7):
        with pytest.MonkeyPatch.context() as patch:
            if step % 3:
                patch.setattr(builtins, "open", torn if step == 5 else refused)
                patch.setattr(watch.os, "truncate", os.truncate if step == 5 else refused)
            if step == 2:
                patch.setattr(Path, "stat", refused)
            log.write([{"stage": "flow", "step": step}])
    log.bar.close()
    assert [row["step"] for row in watch.read_metrics(tmp_path / "metrics.csv")] == [*"123456"]
    assert capsys.readouterr().out.count("metrics.csv cannot be written") == 2


def test_curves_of_a_long_run_take_few_of_its_rows_and_every_skipped_one(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [{"stage": stage, "step": i, "loss": i, "skipped": "spike" if i % 70 == 1 else "",
             "max_logit": "2" if i % 100 == 3 else ""} for stage, n in (("vae", 30), ("flow", 1000))
            for i in range(1, n + 1)]
    watch.write_rows(path, rows)
    with open(path, "a", encoding="utf-8") as f:
        f.write("flow,1001")                                    # torn
    assert len(watch.read_metrics(path)) == 1030
    few = watch.read_metrics(path, most=50)
    steps = [int(row["step"]) for row in few if row["stage"] == "flow"]
    assert len(few) - len(steps) == 30 and steps == sorted(set(steps)) and 48 <= len(steps) <= 76
    assert {i for i in range(1, 1001) if i % 70 == 1 or i % 100 == 3} <= {*steps}


@POSIX
def test_a_wish_to_stop_that_cannot_be_saved_is_no_success(tmp_path):
    folder = tmp_path / "run"
    process, said = start(folder, 30_000, preview=pauses, preview_every=5, save_every=1000)
    until((folder / "busy").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    (folder / "go").touch()
    assert wait(process) == 2 and "could not be saved" in said.read_text()


@POSIX
def test_nor_is_one_of_which_only_an_earlier_state_was_saved(tmp_path, monkeypatch):
    def fills(self, state, facts, real=training.Saver.save):
        if state.step > 16:
            raise OSError(28, "No space left on device")
        real(self, state, facts)

    monkeypatch.setattr(training.Saver, "save", fills)
    with pytest.raises((OSError, watch.Stopped), match="stopped at step 21 of flow, which could not"):
        run_miniature(tmp_path, partial(signals_itself, signal.SIGTERM), save_every=8)
    assert steps_of(tmp_path) == [8, 16]


# --------------------------------------------------------------------------------------------------- numbers

def bad_at(steps, value):
    return lambda step, loss: loss * value if step in steps else loss


@pytest.mark.parametrize("value, reason", [(float("nan"), "not finite"), (float("inf"), "not finite"),
                                           (1e4, "spike")])
def test_a_bad_step_is_skipped_counted_and_leaves_no_trace(tmp_path, capsys, value, reason):
    seen = {}

    def spoil(step, loss):
        seen[step] = [p.detach().clone() for p in models[-1].parameters()]
        return bad_at({30}, value)(step, loss)

    models, original = [], MMDiT.__init__
    MMDiT.__init__ = lambda self, c: (original(self, c), models.append(self))[0]
    try:
        run_miniature(tmp_path, spoil, save_every=1000)
    finally:
        MMDiT.__init__ = original
    assert all(torch.equal(a, b) for a, b in zip(seen[30], seen[31]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[31], seen[32]))
    assert [r["step"] for r in rows_of(tmp_path) if r["skipped"] == reason] == ["31"]
    said = capsys.readouterr().out
    assert f"no update in 1 of the last 20 steps (from step 31 on; {reason}), 1 so far" in said
    assert all(p.isfinite().all() for p in load_tensors(tmp_path / "done.safetensors")[0].values())


@pytest.mark.parametrize("fused", [True, False])        # on MPS it is not
def test_moments_and_their_step_count_stay_when_a_step_is_skipped(fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    for bad in (0, 1, 0):
        before = [weight.detach().clone()] + [v.clone() for v in optimizer.state[weight].values()]
        weight.grad = torch.full((3,), torch.nan if bad else 0.5)
        watch.update([optimizer], torch.tensor(bad))
        after = [weight.detach()] + list(optimizer.state[weight].values())
        assert bad == (len(before) == len(after) and all(map(torch.equal, before, after)))
    assert optimizer.state[weight]["step"] == 2


def test_muon_and_the_fused_adamw_read_the_verdict_themselves():
    class Unread:
        def __gt__(self, number):
            return torch.tensor(True)

        def __bool__(self):
            pytest.fail("a GPU would be waited for")

    weight = torch.nn.Parameter(torch.eye(3))
    for optimizer in (Muon([weight], momentum=0.95), torch.optim.AdamW([weight], fused=True)):
        weight.grad = torch.ones(3, 3)
        watch.update([optimizer], Unread())
        assert torch.equal(weight, torch.eye(3)) and weight.grad is None


def test_resumed_amid_bad_steps_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    spoil = bad_at({11, 30, 31, 32}, float("nan"))
    run_miniature(tmp_path / "whole", spoil)
    run = tmp_path / "cut"

    with pytest.raises(KeyboardInterrupt):
        run_miniature(run, lambda step, loss: spoil(step, power_cut(33)(step, loss)), save_every=8)
    run_miniature(run, spoil, save_every=8)
    assert_equal(tmp_path / "whole", run)


def test_ten_bad_steps_in_a_row_go_back_to_the_last_healthy_checkpoint_with_half_the_rate(
        tmp_path, capsys):
    tried = []

    def spoil(step, loss):                      # a fault that is gone the second time
        tried.append(step)
        return loss * float("nan") if step >= 18 and tried.count(18) < 2 else loss

    run_miniature(tmp_path, spoil, save_every=8)
    assert "going back to step 16" in capsys.readouterr().out
    rates = {int(r["step"]): float(r["rate"]) for r in rows_of(tmp_path)}
    assert len(rows_of(tmp_path)) == 40 and not any(r["skipped"] for r in rows_of(tmp_path))
    assert rates[17] == pytest.approx(rates[16] / 2, rel=0.15)  # warm-up is over, decay is not yet


@POSIX
@pytest.mark.parametrize("first, save_every, kept", [(18, 8, [16]), (12, 1000, [])])
def test_what_was_saved_amid_bad_steps_is_nothing_to_go_back_to(tmp_path, first, save_every, kept):
    spoil, tried = bad_at(range(first, 99), float("nan")), []
    with pytest.raises(watch.Stopped):
        run_miniature(tmp_path, lambda *now: signals_itself(signal.SIGTERM, now[0], spoil(*now)),
                      save_every=save_every)
    assert steps_of(tmp_path) == [*kept, 21]

    def cut_once_it_went_back(step, loss):
        tried.append(step)
        return power_cut(17 if kept else None)(step, spoil(step, loss))

    with pytest.raises(KeyboardInterrupt if kept else FloatingPointError) as ended:
        run_miniature(tmp_path, cut_once_it_went_back, save_every=save_every)
    assert tried == [*range(21, 40), *(k for k in (16, 17) if kept)]
    assert steps_of(tmp_path) == kept if kept else "no checkpoint is older" in str(ended.value)


def test_twelve_bad_steps_that_are_over_when_they_are_read_are_only_skipped(tmp_path, capsys):
    run_miniature(tmp_path, bad_at(range(22, 34), float("nan")), save_every=8)
    assert "going back" not in capsys.readouterr().out
    assert [int(r["step"]) for r in rows_of(tmp_path) if r["skipped"]] == list(range(23, 35))


@pytest.mark.parametrize("ema", [True, False])
def test_weights_that_are_not_finite_at_the_end_are_no_result(tmp_path, monkeypatch, ema):
    monkeypatch.setattr(stages, "Stage", lambda *parts, real=stages.Stage, **_: real(*parts, ema=ema))
    with pytest.raises(FloatingPointError, match="not finite at its end.*--flow-rate"):
        run_miniature(tmp_path, flow_rate=1e39, flow_steps=1)
    assert not (tmp_path / "done.safetensors").exists()


def test_bad_steps_before_the_first_checkpoint_go_back_to_the_very_start(tmp_path, monkeypatch):
    """There is none yet, or the disk has been full so far."""
    tried = []

    def full(self, state, facts):
        raise OSError(28, "No space left on device")

    def early(step, loss):                                      # no spike there, not the second time either
        return loss * 20 if step < 2 else loss

    def spoil(step, loss):
        tried.append(step)
        return loss * float("nan") if step >= 29 and tried.count(29) < 2 else early(step, loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.Saver, "save", full)
        run_miniature(tmp_path / "a", spoil, save_every=8)
    half = dict(flow_rate=TrainConfig.flow_rate / 2, muon_rate=TrainConfig.muon_rate / 2)
    run_miniature(tmp_path / "b", early, **half, save_every=1000)
    assert_equal(tmp_path / "a", tmp_path / "b")


def test_steps_that_were_taken_back_do_not_count_as_slow_ones(tmp_path, monkeypatch):
    """Ten seconds, a tenth for each step: 40 are done before it goes back to 16, so it can reach 76."""
    clock, tried = [0.0], []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def spoil(step, loss):
        clock[0] += 0.1
        tried.append(step)
        return loss * float("nan") if step >= 18 and tried.count(18) < 2 else loss

    run_miniature(tmp_path, spoil, minutes=1 / 3, share=0.5, flow_steps=5000, save_every=16)
    assert tried[40:42] == [39, 16] and int(rows_of(tmp_path)[-1]["step"]) == 76


def test_what_stays_bad_ends_with_advice_and_the_healthy_checkpoint(tmp_path, capsys):
    with pytest.raises(FloatingPointError, match="half the learning rate.*--flow-rate"):
        run_miniature(tmp_path, bad_at(range(18, 99), float("nan")), save_every=8)
    assert steps_of(tmp_path) == [8, 16]


def test_a_spike_is_measured_by_the_median_of_healthy_losses():
    state = training.begin(training.Run(TrainConfig(**QUICK), Path(".")), miniature(None))
    losses = [100.0] * 10 + [1.0] * 30 + [4.9, 5.2, 5.2, 1.0, float("nan"), 4.9]
    verdicts = [int(watch.judge(state, torch.tensor(x), torch.tensor(1.0))) for x in losses]
    assert verdicts == [0] * 41 + [2, 2, 0, 1, 0] and int(state.in_a_row) == 0
    assert int(watch.judge(state, torch.tensor(1.0), torch.tensor(float("inf")))) == watch.NOT_FINITE
    state.recent.copy_(torch.tensor([3.0, 1.0] * 25 + [2.0]))
    verdicts = [int(watch.judge(state, torch.tensor(10.1), torch.tensor(1.0))) for _ in range(3)]
    assert verdicts == [2] * 3 and int(state.in_a_row) == 4 and state.recent.max() == 3
    assert int(watch.judge(state, torch.tensor(9.9), torch.tensor(1.0))) == 0


def test_judging_reads_nothing_from_the_device():
    """On the device `meta` there is nothing to read: any .item() or branch on a value would raise."""
    state = training.begin(training.Run(TrainConfig(**QUICK), Path(".")), miniature(None))
    state.recent, state.in_a_row = state.recent.to("meta"), state.in_a_row.to("meta")
    loss = torch.ones((), device="meta")
    assert watch.judge(state, loss, loss).device.type == "meta"
    assert watch.loss_by_t(torch.ones(4, device="meta"), torch.ones(4, device="meta")).shape == (2, 8)


# --------------------------------------------------------------------------------------------------- the log

def test_every_step_tells_its_losses_by_t_and_every_hundredth_its_largest_logit(straight):
    rows = rows_of(straight)
    assert [int(r["step"]) for r in rows] == list(range(1, 41))
    assert [r["step"] for r in rows if r["max_logit"]] == ["1"]
    for row in rows:
        told = [float(row[f"t{i}"]) for i in range(8) if row[f"t{i}"]]
        assert min(told) <= float(row["loss"]) * 1.001 and max(told) >= float(row["loss"]) * 0.999
        assert len(told) <= 4                                   # of four samples
    assert all(float(r["samples_per_s"]) > 0 for r in watch.read_metrics(straight / "metrics.csv"))


def test_the_log_tells_how_fast_it_goes_and_how_long_it_will(tmp_path, monkeypatch, capsys):
    """Resumed at step 100, 20 steps of half a second, then 20 of a second, at which the loss has fallen. The
    tenth of each is bad, which is told and does not count."""
    clock, state = [0.0], SimpleNamespace(stage="flow", step=100, total=200, in_a_row=torch.zeros(()))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log, one = watch.Log(tmp_path, state, batch=8), torch.ones(())
    for state.step in range(101, 141):
        early, bad = state.step <= 120, state.step % 20 == 10
        clock[0] += 0.5 if early else 1.0
        log.add(state, bad * one, one * (math.nan if bad else 1 + early), one, 0.1, {})
    log.bar.close()
    rows = watch.read_metrics(tmp_path / "metrics.csv")
    assert [float(row["samples_per_s"]) for row in rows] == [16] * 20 + [8] * 20
    first, second, last = capsys.readouterr().out.strip().splitlines()
    assert first.endswith("1 so far") and second.endswith("2 so far")
    assert last == "flow    140/200  loss 1.8000  grad 1  750 ms a step  0:45 left in this stage"


def test_after_going_back_the_log_tells_the_speed_of_what_follows(tmp_path, monkeypatch, capsys):
    clock, state = [0.0], SimpleNamespace(stage="flow", step=0, total=60, in_a_row=torch.zeros(()))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log, one = watch.Log(tmp_path, state, batch=8), torch.ones(())
    for steps in (range(1, 41), range(21, 41)):
        for state.step in steps:
            clock[0] += 1.0
            log.add(state, 0 * one, one, state.step * one, 0.1, {})
        state.step = 20
        log.rewind(state)
    said = capsys.readouterr().out.strip().splitlines()
    assert said[1:] == ["flow     40/60  loss 1.0000  grad 40  1000 ms a step  0:20 left in this stage"] * 2


def test_the_log_says_a_line_at_most_every_15_seconds_and_at_the_end(tmp_path, monkeypatch, capsys):
    """20 steps take ten seconds; the end turns out to be nearer than the start knew."""
    clock, state = [0.0], SimpleNamespace(stage="flow", step=0, total=1000, in_a_row=torch.zeros(()))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log, one = watch.Log(tmp_path, state, batch=8), torch.ones(())
    state.total = 90
    for state.step in range(1, 91):
        clock[0] += 0.5
        log.add(state, 0 * one, one, one, 0.1, {})
    said = [line.split()[1] for line in capsys.readouterr().out.strip().splitlines()]
    assert said == ["40/90", "80/90", "90/90"] and log.bar.total == 90


def test_ten_bad_steps_in_a_row_are_hopeless_and_nine_or_those_that_are_over_are_not(tmp_path):
    state = SimpleNamespace(stage="flow", step=0, total=99, in_a_row=torch.zeros(()))
    log, one, told = watch.Log(tmp_path, state, batch=1), torch.ones(()), []
    state.step = watch.READ_EVERY
    for count in (9, 10, 0):
        state.in_a_row = count * one
        log.add(state, one, one, one, 0.1, {})
        told.append(log.hopeless)
    log.bar.close()
    assert told == [False, True, False]


def test_a_silent_log_knows_what_is_hopeless_and_writes_nothing(tmp_path):
    state = SimpleNamespace(stage="flow", step=0, total=99, in_a_row=torch.full((), 10.0))
    log, one = watch.Log(tmp_path, state, batch=1, silent=True), torch.ones(())
    state.step = watch.READ_EVERY
    log.add(state, one, one, one, 0.1, {})
    assert log.hopeless and not list(tmp_path.iterdir())


def test_losses_by_t_are_means_over_eight_equal_parts():
    t = torch.tensor([0.0, 0.1, 0.125, 0.99, 1.0])
    sums, counts = watch.loss_by_t(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), t)
    by_t = sums / counts
    assert by_t[[0, 1, 7]].tolist() == [2.0, 5.0, 8.0] and by_t[2:7].isnan().all()


@pytest.mark.parametrize("qk_norm, dual", [(True, 0), (False, 0), (True, 1)])
def test_the_largest_logit_is_that_of_the_attention_itself(monkeypatch, qk_norm, dual):
    torch.manual_seed(1)
    model = MMDiT(MMDiTConfig(2, heads=2, head_dim=8, in_channels=4, context_dim=8, pooled_dim=8, pos_max=4,
                              pos_sample=2, pos_base=2, qk_norm=qk_norm, dual_blocks=dual))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t, context, pooled = torch.randn(3, 4, 4, 4), torch.rand(3), torch.randn(3, 5, 8), torch.randn(3, 8)

    def loss(step, g):
        return model(x, t, context, pooled).mean(), {}

    attend = mmdit.joint_attention
    measured = watch.largest_logit(loss, 0, None)
    assert mmdit.joint_attention is attend
    logits, softmax = [], torch.Tensor.softmax                  # now spelled out, and spied on
    from kernels import attention as spelled_out
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask=None: spelled_out(q, k, v, attn_mask))
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, **how: (
        logits.append(self.abs().max()), softmax(self, **how))[1])
    loss(0, None)
    assert len(logits) == 2 + dual and measured.item() == pytest.approx(max(logits).item(), rel=1e-5)


def test_looking_at_logits_changes_no_number(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOOK_EVERY", 7)
    run_miniature(tmp_path)
    assert len([r for r in rows_of(tmp_path) if r["max_logit"]]) == 6
    one, other = (load_tensors(f / "done.safetensors")[0] for f in (straight, tmp_path))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_plot_shows_runs_of_any_length_and_older_ones(straight, tmp_path):
    (tmp_path / "metrics.csv").write_text((straight / "metrics.csv").read_text())
    watch.plot_run(tmp_path / "metrics.csv")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    (tmp_path / "metrics.csv").write_text("stage,step,loss,grad_norm,rate,parts\nvae,1,0.5,1,0.1,\nvae,2,0.4")
    watch.plot_run(tmp_path / "metrics.csv")
    assert [r["step"] for r in watch.read_metrics(tmp_path / "metrics.csv")] == ["1"]


def test_a_curve_is_a_running_mean_over_a_fiftieth_of_the_steps_that_have_a_number():
    drawn = []
    panel = SimpleNamespace(plot=lambda x, y, **style: drawn.append((x.tolist(), y.tolist())))
    watch.curve(panel, [{"step": i, "loss": x} for i, x in enumerate(("2", "", "inf", "5"))], "loss")
    watch.curve(panel, [{"step": i, "loss": i % 2 + 1} for i in range(100)], "loss")
    assert drawn == [([0, 3], [2, 5]), ([i + 0.5 for i in range(99)], [1.5] * 99)]


def test_the_plot_has_healthy_losses_in_grey_skipped_steps_in_red_and_what_the_flow_alone_has(
        tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    of_flow = {"max_logit": 2, **{f"t{k}": k + 1 for k in range(8)}}
    rows = [{"stage": stage, "step": i, "loss": 1, "grad_norm": 1, "samples_per_s": 1,
             "skipped": "spike" if i == 3 else "", **(of_flow if stage == "flow" else {})}
            for stage in ("vae", "flow") for i in range(1, 5)]
    watch.write_rows(tmp_path / "metrics.csv", rows)
    plots = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: plots.append(self))
    watch.plot_run(tmp_path / "metrics.csv")
    above, below = plots[0].axes[:4], plots[0].axes[4:]
    assert [panel.get_title() for panel in above] == [
        "vae (1 steps skipped)", "flow (1 steps skipped)", "", ""]
    assert [panel.axison for panel in above] == [True, True, False, False]
    for panel in above[:2]:
        grey, mean, red = panel.lines
        assert list(grey.get_xdata()) == [1, 2, 4] and list(red.get_xdata()) == [3, 3]
    assert [len(panel.lines) for panel in below] == [2, 8, 1, 2]
    assert [line.get_ydata()[0] for line in below[1].lines] == list(range(1, 9))


def test_a_film_shows_each_grid_once_and_the_last_for_longest(tmp_path):
    (tmp_path / "samples").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(tmp_path / "samples" / f"{i}.png")
    watch.film(tmp_path)
    shown = []
    with Image.open(tmp_path / "film.gif") as film:
        for i in range(film.n_frames):
            film.seek(i)
            shown.append((film.convert("RGB").getpixel((0, 0))[0], film.info["duration"]))
    assert shown == [(0, 500), (90, 500), (180, 3000)]


# ------------------------------------------------------------------------------------------- the command line

SMALL = ("--size 32 --pictures 40 --vae-steps 2 --vae-batch 2 --clip-steps 1 --clip-batch 4 --t5-steps 1 "
         "--t5-batch 4 --flow-batch 2 --muon-rate 0 --preview-every 0 --dtype float32 --device cpu "
         "--save-every 3").split()


@POSIX
def test_the_command_line_outlives_its_reader_and_saves_on_ctrl_c(tmp_path):
    """`train.py | head -1`, then Ctrl-C, then --resume to the end."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--flow-steps", "4000", "--out", "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    folder = tmp_path / "run"
    end = time.monotonic() + 240
    while not steps_of(folder):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = process.stderr.read().decode()
    assert "Traceback" not in said and "BrokenPipe" not in said and "train.py --resume" in said, said
    assert all((folder / f"{part}.safetensors").exists() for part in ("vae", "clip_l", "clip_g", "t5"))


def test_what_a_console_or_file_cannot_hold_is_said_in_other_signs(monkeypatch):
    """Into a file or a pipe Windows writes cp1252."""
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, encoding="cp1252"))
    with watch.lasting_output():
        print("skipped \u661f.png")
    assert told.getvalue().strip() == rb"skipped \u661f.png"


def test_what_is_said_to_closed_streams_is_lost_and_ends_nothing(monkeypatch):
    """As in `python train.py >&- 2>&-`, where Python has None for them."""
    for begin in (watch.lasting_output, lambda: nullcontext(watch.data.print_any_sign())):
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        with begin():
            print("step 1")
            watch.tqdm(total=2, disable=None).update()


@pytest.mark.parametrize("system, error, ends", [
    ("posix", BrokenPipeError(errno.EPIPE, "closed"), False), ("nt", OSError(errno.EINVAL, "closed"), False),
    ("posix", OSError(errno.EINVAL, "wrong"), True), ("nt", OSError(errno.ENOSPC, "full"), True)])
def test_output_that_nobody_reads_any_more_ends_nothing_on_any_system(system, error, ends, tmp_path,
                                                                      monkeypatch):
    class Closed(io.StringIO):
        def write(self, *text):
            raise error

        flush = write

    with open(tmp_path / "pipe", "w") as pipe:
        stream = Closed()
        stream.fileno = pipe.fileno
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", system)
            for say in (lambda to: to.write("said"), lambda to: to.flush()):
                try:
                    say(watch.Lasting(stream))
                    assert not ends
                except OSError as e:
                    assert ends and e is error


@pytest.mark.parametrize("out", ["file/run", "file", "link", "link/run"])
def test_a_folder_that_cannot_be_written_is_refused_before_pictures_are_looked_for(
        out, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("link").symlink_to("unplugged")
    monkeypatch.setattr(training, "list_pictures", lambda *_, **how: pytest.fail("looked for pictures"))
    for command in ([], ["cache", "--data", "drawn", "--run", str(finished)]):
        with pytest.raises(SystemExit) as end:
            training.main([*command, "--out", out, "--pictures", "4"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "choose another --out" in said and said.count("\n") == 1


def test_a_checkpoint_at_the_last_step_but_one_leaves_one_step_to_do(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_miniature(tmp_path, power_cut(39))
    assert steps_of(tmp_path)[-1] == 39
    run_miniature(tmp_path)
    assert_equal(straight, tmp_path)


def test_without_a_checkpoint_the_stage_starts_again_and_says_so(straight, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_miniature(tmp_path, power_cut(25), save_every=1000)
    run_miniature(tmp_path)
    assert "before its first checkpoint, so it starts again" in capsys.readouterr().out
    assert_equal(straight, tmp_path)


@pytest.mark.parametrize("minutes, least, most", [
    (0.25, 165, 175), pytest.param(1, 900, 1000, marks=THOROUGH)])
def test_time_is_planned_after_an_interruption_too_and_again_until_the_rate_falls(
        minutes, least, most, tmp_path, monkeypatch):
    """By a clock of its own: a step takes 0.1 seconds, from step 100 on half of that. Planned at step 50 are
    170 and 620; the longer one is planned again at each hundredth step until its rate begins to fall."""
    clock = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def taking_time(step, loss, cut=None):
        clock[0] += 0.1 if step < 100 else 0.05
        return power_cut(cut)(step, loss)

    how = dict(minutes=2 * minutes, share=0.5, flow_steps=5000, save_every=20)
    with pytest.raises(KeyboardInterrupt):                      # before its first plan
        run_miniature(tmp_path, partial(taking_time, cut=21), **how)
    began = clock[0]
    run_miniature(tmp_path, taking_time, **how)
    assert least <= int(rows_of(tmp_path)[-1]["step"]) <= most and clock[0] - began < 60 * minutes


@pytest.mark.parametrize("begun, total, decay, seconds, steps, expected", [
    (0, 5000, 0.4, 125, 30, 1000),                              # 3.75 seconds are gone, 970 more steps fit
    (0, 5000, 0.4, 125, 300, 1521), (0, 1200, 0.4, 125, 300, 1200),         # it has become faster
    (0, 5000, 0.4, 4, 30, 60), (0, 5000, 1, 125, 30, 1000),     # two more would fit; the rate falls at once
    (500, 1000, 0.4, 12.5, 30, 600),
    (700, 1000, 0.4, 12.5, 30, 800), (700, 1000, 0.4, 125, 30, 1000)])      # it has begun to fall before
def test_a_plan_fills_the_time_after_a_resume_too_and_never_grows_once_the_rate_falls(
        begun, total, decay, seconds, steps, expected, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    plan = training.Plan(total, begun, decay, seconds)
    for step in range(begun + 1, begun + steps + 1):
        clock[0] += 1 / 8 if step - begun <= 100 else 1 / 16
        total = plan.total(step, total)
    assert total == expected


def test_where_steps_take_longer_once_the_rate_falls_there_are_fewer(monkeypatch):
    """Of 125 seconds 50 are left for 400 steps that now take 100."""
    clock, step, total = [0.0], 0, 5000
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    plan, totals = training.Plan(total, 0, 0.4, 125), []
    while step < total:
        clock[0] += 1 / 8 if step < 600 else 1 / 4
        step += 1
        total = plan.total(step, total)
        totals.append(total)
    assert 120 < clock[0] < 135 and totals[599] == 1000 and sorted(totals, reverse=True) == totals


def test_ranks_do_as_many_steps_as_the_slowest_of_them_has_time_for(tmp_path, monkeypatch):
    """Another rank, for which this stands in, has time for 5: else one would wait for the other."""
    monkeypatch.setattr(training.parallel.Ranks, "most", lambda self, *own: [
        max(pair) for pair in zip(own, (0, 0, -5))])
    run_miniature(tmp_path, save_every=1000)
    assert len(rows_of(tmp_path)) == 5


def test_a_checkpoint_without_a_usable_neighbour_is_an_error_and_no_new_start(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_miniature(tmp_path, power_cut(2))
    for folder in checkpoints_of(tmp_path, "flow"):
        (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of flow can be used"):
        run_miniature(tmp_path)


def test_a_stage_of_fewer_steps_than_ten_that_are_all_bad_is_no_result(tmp_path):
    with pytest.raises(FloatingPointError, match="stays bad"):
        run_miniature(tmp_path, bad_at(range(99), float("nan")), flow_steps=6)
    assert not (tmp_path / "done.safetensors").exists()


def test_a_log_that_someone_removes_begins_again_with_its_header(tmp_path):
    log = watch.Log(tmp_path, SimpleNamespace(stage="flow", step=0, total=9), batch=1)
    (tmp_path / "metrics.csv").unlink()
    log.write([{"stage": "flow", "step": 1}])
    log.bar.close()
    assert [row["step"] for row in watch.read_metrics(tmp_path / "metrics.csv")] == ["1"]
