"""Claims about many processes: they learn what one would, save what any number can go on from, and end as
one.

On a CPU, with gloo, in processes forked from one that has imported everything, since importing takes longer
than a training this small. Losses are equal to rounding, not bit by bit: sums over ranks have another order.
"""
import copy
import csv
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from hypothesis import settings

import checkpoints
import make_fake_checkpoint
import parallel
import train as training
from checkpoints import State, checkpoints_of
from conftest import ROOT, blank, shrink
from mmdit import MMDiT, MMDiTConfig
from muon import Muon
from run_folder import load_tensors
from train import TrainConfig, train

pytestmark = pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_available(),
                                reason="needs POSIX signals and torch.distributed")
MICRO = dict(size=32, pictures=24, vae_steps=3, vae_batch=4, clip_steps=3, clip_batch=8, t5_steps=3,
             t5_batch=8, flow_steps=8, flow_batch=8, preview_every=0, save_every=1000, dtype="float32",
             device="cpu", vae_critic=0.1, minutes=0)
LOOK_EVERY = 7                  # attention logits are measured at the first and at the last of eight steps
VERSION = tuple(int(x) for x in torch.__version__.split(".")[:2])
fsdp = pytest.mark.skipif(VERSION < (2, 8), reason="FSDP2 cannot average gradients over gloo in this torch")
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
thorough = pytest.mark.skipif(settings.default.max_examples < 100,
                              reason="with --hypothesis-profile=thorough only")


def child(rank, world, port, said, action, *rest):
    """One rank, which says what it has to say into a file."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank}",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    torch.set_num_threads(1)
    shrink(pytest.MonkeyPatch())
    training.plot_run, training.LOOK_EVERY = blank, LOOK_EVERY
    action(*rest)


def trained(argv, config, wounds):
    """A rank's train.py. wounds: what happens at the beginning of a step of flow, {(rank, step): a signal
    that the rank sends itself, or "full", or "room"}. "old": it cannot write shards. "stale": but for rank 0
    none sees a checkpoint, as on a network file system that remembers a listing."""
    generator = training.Run.generator
    if "stale" in wounds and os.environ["RANK"] != "0":
        checkpoints.checkpoints_of = lambda *_: []
    if "old" in wounds:                         # as in torch 2.6 and 2.7
        del torch.distributed.checkpoint.HuggingFaceStorageWriter

    def wounded(self, stage, step):
        wound = wounds.get((self.ranks.rank, step)) if stage == "flow" else None
        if isinstance(wound, int):
            os.kill(os.getpid(), wound)
        elif wound:
            import resource
            limit = 20_000 if wound == "full" else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return generator(self, stage, step)

    training.Run.generator = wounded
    if config:
        training.parse = lambda argv: (config, argv == ["--resume"])
    training.main(argv)


def alone_in_a_group(*rest):
    """A rank's train.py. It is the only one, but does all that several do: NCCL has no two on one card."""
    class Several(int):
        __hash__ = int.__hash__

        def __gt__(self, other):
            return True

        def __eq__(self, other):
            return False

    parallel.launched = lambda: (0, Several(1), 0)
    trained(*rest)


def spread(folder, world, action, *rest, seconds=600, start="forkserver"):
    """action(*rest) on each of `world` ranks -> (exit codes of all ranks, what they said)"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    said = Path(folder).parent / f"{Path(folder).name}.txt"
    said.unlink(missing_ok=True)
    context = multiprocessing.get_context(start)
    ranks = [context.Process(target=child, args=(r, world, port, str(said), action, *rest))
             for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
        if process.exitcode is None:
            for other in ranks:
                other.kill()
            raise AssertionError(f"a rank did not end: {said.read_text()}")
    return [process.exitcode for process in ranks], said.read_text()


def launch(folder, world, argv=("--resume",), config=None, wounds=(), action=trained, start="forkserver"):
    return spread(folder, world, action, list(argv), config, dict(wounds), start=start)


@pytest.fixture(scope="module", autouse=True)
def ready(miniature):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        patch.setattr(training, "LOOK_EVERY", LOOK_EVERY)
        multiprocessing.set_forkserver_preload(["test_parallel", "torch._dynamo"])
        multiprocessing.forkserver.ensure_running()
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one process, from drawings to transformer."""
    return train(TrainConfig(**MICRO, out=str(tmp_path_factory.mktemp("runs") / "one")))


def untrained(finished, folder, **changes):
    """A copy of that run which lacks its transformer; its config."""
    shutil.copytree(finished, folder)
    (folder / "mmdit.safetensors").unlink()
    saved = json.loads((finished / "config.json").read_text())
    config = TrainConfig(**saved | changes | {"out": str(folder)})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder, config


def rows_of(folder, stage):
    with open(Path(folder, "metrics.csv"), encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if row["stage"] == stage]


def assert_equal(one, many, stages=("flow",), few=False):
    """The same losses, norms, losses by t, attention logits at every step, to rounding; and weights.
    few: rank 0 had fewer than the four samples whose logits are measured."""
    for stage in stages:
        a, b = rows_of(one, stage), rows_of(many, stage)
        assert len(a) == len(b) > 0
        for x, y in zip(a, b):
            for name in x:
                if name in ("stage", "step", "samples_per_s", "skipped") or few and name == "max_logit":
                    continue
                numbers = [[float(v.partition("=")[2] or v) for v in row[name].split()] for row in (x, y)]
                assert numbers[0] == pytest.approx(numbers[1], rel=2e-3), (stage, x["step"], name, x, y)
    for name in {"mmdit"} if stages == ("flow",) else {"vae", "clip_l", "t5", "mmdit"}:
        a, b = (load_tensors(Path(x, f"{name}.safetensors"))[0] for x in (one, many))
        off = sum((a[k] - b[k]).square().sum().item() for k in a)
        embedder = [k for k in a if k == "context_embedder.weight"]         # read differently at the end
        assert all((a[k] - b[k]).norm() < 2e-3 * a[k].norm() for k in embedder)
        # not nearer: where a gradient is zero but for rounding (biases of keys) AdamW takes full steps too
        assert math.sqrt(off / sum(v.square().sum().item() for v in a.values())) < 5e-3, name


def test_two_processes_learn_in_every_stage_what_one_does(finished, tmp_path):
    folder = tmp_path / "two"
    codes, said = launch(folder, 2, [], TrainConfig(**MICRO, out=str(folder)))
    assert codes == [0, 0], said
    assert_equal(finished, folder, ("vae", "clip", "t5", "flow"))
    assert said.count("done in") == 1 and said.count("parameters:") == 1 and "2 processes share" in said
    assert {p.name for p in finished.iterdir()} == {p.name for p in folder.iterdir()}


# ------------------------------------------------------------------ the transformer, in every way to share it

def test_two_processes_in_two_pieces_each_learn_what_one_does_at_once(finished, tmp_path):
    folder, config = untrained(finished, tmp_path / "pieces", accumulate=2, checkpointing=True)
    codes, said = launch(folder, 2, config=config)
    assert codes == [0, 0], said
    assert_equal(finished, folder)


def test_one_process_in_four_pieces_learns_what_it_does_at_once(finished, tmp_path):
    folder, config = untrained(finished, tmp_path / "pieces", accumulate=4)
    codes, said = launch(folder, 1, config=config)
    assert codes == [0], said
    assert_equal(finished, folder)


@fsdp
def test_cut_up_among_two_it_learns_the_same_is_saved_on_two_and_goes_on_on_one_and_on_four(
        finished, tmp_path):
    """Muon's matrices too. SIGTERM to one rank ends both, after a save."""
    folder, config = untrained(finished, tmp_path / "two", fsdp=True, accumulate=2, checkpointing=True,
                               preview_every=4)
    codes, said = launch(folder, 2, config=config, wounds={(1, 5): signal.SIGTERM})
    assert codes == [143, 143] and "saved at step 6" in said and "cut up among them" in said, said
    assert said.count("train.py --resume") == 1 and (folder / "samples" / "000004.png").exists()
    shards = sorted(p.name for p in checkpoints_of(folder, "flow")[0].iterdir())
    assert shards == ["manifest.json", *(f"shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2))]
    for world in (1, 4):
        copy = tmp_path / f"on{world}"
        shutil.copytree(folder, copy)
        codes, said = launch(copy, world, config=dataclasses.replace(config, out=str(copy), accumulate=1,
                                                                     preview_every=0))
        assert codes == [0] * world and "going on at step 6" in said, said
        assert f"ranks 2, now {world}" in said
        assert_equal(finished, copy, few=world == 4)


@pytest.mark.parametrize("device, cut_up", [
    pytest.param("cpu", False, marks=thorough), pytest.param("cpu", True, marks=fsdp),
    pytest.param("cuda", False, marks=card), pytest.param("cuda", True, marks=card)])
def test_a_group_of_one_learns_is_saved_and_goes_on_as_one_process_does(device, cut_up, finished, tmp_path):
    """On a card this is NCCL, as far as one card can tell."""
    folder, config = untrained(finished, tmp_path / "group", fsdp=cut_up, device=device)
    start = "spawn" if device == "cuda" else "forkserver"       # who has asked for cards cannot fork for them
    for wounds, expected in ({(0, 5): signal.SIGTERM}, 143), ({}, 0):
        codes, said = launch(folder, 1, config=config, wounds=wounds, action=alone_in_a_group, start=start)
        assert codes == [expected] and ("cut up among" in said) == cut_up, said
        assert "1 processes share" in said
    assert "going on at step 6" in said
    plain = finished
    if device == "cuda":
        plain, config = untrained(finished, tmp_path / "plain", device=device)
        codes, said = launch(plain, 1, config=config, start=start)
        assert codes == [0], said
    assert_equal(plain, folder)


@thorough
@fsdp
def test_in_bfloat16_cut_up_among_two_it_learns_what_one_process_does_under_autocast(finished, tmp_path):
    """Each casts the weights at another place: FSDP2 before it gathers them, autocast before each product."""
    losses = [[float(row["loss"]) for row in rows_of(finished, "flow")]]       # in float32
    for world, cut_up in ((1, False), (2, True)):
        folder, config = untrained(finished, tmp_path / str(world), dtype="bfloat16", fsdp=cut_up)
        codes, said = launch(folder, world, config=config)
        assert codes == [0] * world and ("cut up among" in said) == cut_up, said
        losses.append([float(row["loss"]) for row in rows_of(folder, "flow")])
    apart = [max(abs(x / y - 1) for x, y in zip(a, losses[1])) for a in losses]
    assert apart[0] > 1e-5 and apart[2] < 2e-4, apart


@pytest.mark.parametrize("cut_up", [pytest.param(False, marks=thorough), pytest.param(True, marks=fsdp)])
def test_what_one_process_saved_two_go_on_from(finished, tmp_path, cut_up):
    folder, config = untrained(finished, tmp_path / "run")
    codes, said = launch(folder, 1, config=config, wounds={(0, 5): signal.SIGTERM})
    assert codes == [143] and "saved at step 6" in said, said
    codes, said = launch(folder, 2, config=dataclasses.replace(config, fsdp=cut_up))
    assert codes == [0, 0] and "going on at step 6" in said and ("cut up among" in said) == cut_up, said
    assert_equal(finished, folder)


def test_what_a_rank_finds_wrong_before_ranks_meet_it_says_itself(tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "8"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        training.main(["--resume", "--out", str(tmp_path / "not-mounted")])
    assert "train.py: rank 8: " in capsys.readouterr().err


def test_ranks_that_see_different_data_are_told_apart():
    training.check_same(["a", "a", "a"])
    with pytest.raises(ValueError, match="rank 2 sees other pictures or captions than rank 0"):
        training.check_same(["a", "a", "b", "c"])


def test_only_a_small_model_of_one_process_is_bounded_to_20_minutes(monkeypatch):
    assert training.parse([])[0].minutes == 20
    assert training.parse(["--model", "d15"])[0].minutes == 0
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert training.parse([])[0].minutes == 0 and training.parse(["--minutes", "5"])[0].minutes == 5


@fsdp
@thorough
def test_where_shards_cannot_be_written_rank_0_writes_all_of_them_together(finished, tmp_path):
    folder, config = untrained(finished, tmp_path / "run", fsdp=True)
    codes, said = launch(folder, 2, config=config, wounds={"old": True, (1, 5): signal.SIGTERM})
    assert codes == [143, 143] and "saved at step 6" in said, said
    saved = sorted(p.name for p in checkpoints_of(folder, "flow")[0].iterdir())
    assert saved == ["manifest.json", "state.safetensors"]
    codes, said = launch(folder, 2, config=config)
    assert codes == [0, 0] and "going on at step 6" in said, said
    assert_equal(finished, folder)


@fsdp
def test_a_second_phase_cut_up_among_two_learns_what_one_process_does(finished, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for world, folder in enumerate(folders, 1):
        flags = ["--from", str(finished), "--size", "48", "--out", str(folder), "--fsdp", "--muon-rate", "0"]
        codes, said = launch(folder, world, flags)
        assert codes == [0] * world and ("cut up among" in said) == (world > 1), said
    assert_equal(*folders)


def test_adapters_on_two_processes_learn_what_they_do_on_one(finished, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for world, folder in enumerate(folders, 1):
        flags = ["--from", str(finished), "--lora", "2", "--flow-steps", "3", "--out", str(folder)]
        codes, said = launch(folder, world, flags)
        assert codes == [0] * world and "adapters of rank 2 learn" in said, said
    assert_equal(*folders)
    one, two = (load_tensors(folder / "lora.safetensors")[0] for folder in folders)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one | two)


@fsdp
def test_published_weights_cut_up_among_two_learn_what_one_process_does(tmp_path):
    make_fake_checkpoint.main([str(tmp_path), "--config", "small", "--parts", *make_fake_checkpoint.BUILD])
    weights, cache = tmp_path / "small.safetensors", tmp_path / "cache"
    how = ["--device", "cpu", "--dtype", "float32"]
    training.main(["cache", "--model", str(weights), "--data", "drawn", "--pictures", "24", "--size", "32",
                   "--out", str(cache), *how])
    folders = [tmp_path / "one", tmp_path / "two"]
    for world, folder in enumerate(folders, 1):
        flags = ["--from", str(weights), "--cache", str(cache), "--out", str(folder), "--flow-steps", "4",
                 "--flow-batch", "8", "--flow-rate", "1e-3", "--preview-every", "0", "--fsdp", *how]
        codes, said = launch(folder, world, flags)
        assert codes == [0] * world and ("cut up among" in said) == (world > 1), said
    assert_equal(*folders)


@pytest.mark.parametrize("cut_up", [pytest.param(False, marks=thorough), pytest.param(True, marks=fsdp)])
def test_a_killed_rank_ends_the_job_and_resumed_it_ends_where_an_undisturbed_one_does(
        finished, tmp_path, cut_up):
    folder, config = untrained(finished, tmp_path / "killed", save_every=2, fsdp=cut_up)
    codes, said = launch(folder, 2, config=config, wounds={(1, 6): signal.SIGKILL})
    assert codes == [2, -signal.SIGKILL], said
    assert "rank 0 has lost another rank" in said and "Traceback" not in said, said
    kept = [int(p.name[-6:]) for p in checkpoints_of(folder, "flow")]
    assert kept and set(kept) <= {2, 4, 6}                      # the save of step 6 may have been under way
    codes, said = launch(folder, 2, config=config, wounds={"stale": True})
    assert codes == [0, 0] and f"going on at step {kept[-1]}" in said, said
    assert_equal(finished, folder)


@fsdp
def test_where_one_rank_has_no_room_for_its_shard_all_train_on_and_save_later(finished, tmp_path):
    """That a save has failed is known when the next is due, which is tried all the same."""
    folder, config = untrained(finished, tmp_path / "full", save_every=2, fsdp=True)
    codes, said = launch(folder, 2, config=config,
                         wounds={(1, 1): "full", (1, 4): "room", (0, 6): signal.SIGTERM})
    assert codes == [143, 143] and "saved at step 7" in said, said
    assert said.count("a checkpoint of flow could not be written") == 1, said
    assert "(rank 1: [Errno 27] File too large)): training goes on" in said, said
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["flow-000006", "flow-000007"]


@fsdp
def test_stopped_without_room_for_a_shard_all_end_with_code_2_and_keep_what_was_saved(finished, tmp_path):
    folder, config = untrained(finished, tmp_path / "full", save_every=2, fsdp=True)
    codes, said = launch(folder, 2, config=config, wounds={(1, 4): "full", (0, 4): signal.SIGTERM})
    assert codes == [2, 2] and "stopped at step 5 of flow, which could not be saved" in said, said
    assert "Traceback" not in said
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert "flow-000002" in kept <= {"flow-000002", "flow-000004"}      # which may have been under way


@thorough
@pytest.mark.parametrize("world, cut_up", [(1, False), (2, False), pytest.param(2, True, marks=fsdp)])
def test_compiled_blocks_learn_what_plain_ones_do_and_go_on_as_such(finished, tmp_path, world, cut_up):
    """More than a minute each: a compiler takes longer than the training."""
    folder, config = untrained(finished, tmp_path / "run", compile=True, fsdp=cut_up, preview_every=4)
    codes, said = launch(folder, world, config=config, wounds={(0, 5): signal.SIGTERM})
    if "no working compiler" in said:
        pytest.skip("no working compiler here")
    assert codes == [143] * world and "saved at step 6" in said, said
    codes, said = launch(folder, world, config=dataclasses.replace(config, compile=False))
    assert codes == [0] * world and "going on at step 6" in said, said
    assert_equal(finished, folder)


def test_training_whose_last_checkpoint_could_not_be_written_says_so_at_its_end(
        finished, tmp_path, monkeypatch, capsys):
    folder, config = untrained(finished, tmp_path / "run", flow_steps=3, save_every=1)

    def save(self, state, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.Saver, "save", save)
    train(config, resume=True)
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1
    assert "could not be written the last time: a checkpoint of flow\n" in said
    assert (folder / "mmdit.safetensors").exists()


@pytest.fixture
def asked(monkeypatch):
    """Rank 1 of 8, the fourth on its machine, which meets nobody -> what it asks of PyTorch and Python, in
    order, as (name, arguments, keywords)."""
    calls = []

    def note(name):
        return lambda *args, **how: calls.append((name, args, how))

    monkeypatch.setattr(parallel, "launched", lambda: (1, 8, 3))
    monkeypatch.setattr(parallel, "Ranks", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous",
                        lambda url, timeout: iter([[timeout]]))
    for module, name in ((torch.cuda, "set_device"), (parallel.dist, "init_process_group"),
                         (parallel.dist, "destroy_process_group"), (parallel.atexit, "register")):
        monkeypatch.setattr(module, name, note(name))
    return calls


@pytest.mark.parametrize("device, end", [
    ("cpu", ("destroy_process_group", (), {})), ("cuda:0", ("register", (parallel.end_at_once,), {}))])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_under_nccl(device, end, asked):
    """Its library would, for hours, while they wait for it; they learn of it as this process ends."""
    with parallel.processes(device):
        pass
    assert [name for name, *_ in asked][-2:] == ["init_process_group", "destroy_process_group"]
    assert "register" not in [name for name, *_ in asked]                   # all have come to the end
    asked.clear()
    with pytest.raises(MemoryError), parallel.processes(device):
        raise MemoryError
    assert asked[-2][0] == "init_process_group" and asked[-1] == end


@pytest.mark.parametrize("device, backend, card", [
    ("cpu", "gloo", []), ("auto", "cpu:gloo,cuda:nccl", ["cuda:3"])])
def test_a_rank_takes_its_own_card_and_numbers_travel_between_main_memories_too(device, backend, card, asked):
    with parallel.processes(device):
        pass
    *cards, begun, _ = asked
    assert cards == [("set_device", (name,), {}) for name in card]
    assert begun == ("init_process_group", (backend,), {
        "store": parallel.PATIENCE, "rank": 1, "world_size": 8, "timeout": parallel.PATIENCE})


def test_what_was_said_is_not_lost_where_a_process_ends_at_once():
    program = ("import atexit, parallel\natexit.register(print, 'never')\n"
               "atexit.register(parallel.end_at_once)\nprint('said')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "said\n"), done.stderr


# -------------------------------------------------------------------------------------- what is cut up, alone

def shards_in_little_memory(config):
    """Of an untrained transformer: its shard's bits, and how much memory it took to make them."""
    import resource

    with parallel.processes("cpu") as ranks:
        parallel.shard(MMDiT(MMDiTConfig(1, heads=2, head_dim=8)), torch.float32, torch.device("cpu"),
                       parallel.Later())                        # imports what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        torch.manual_seed(0)
        with (later := parallel.Later()):
            model = MMDiT(config)
        after = torch.rand(3)
        parallel.shard(model, torch.float32, torch.device("cpu"), later)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        torch.manual_seed(0)
        plain = MMDiT(config)
        assert torch.equal(torch.rand(3), after)
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            assert torch.equal(parallel.rows_of(p, q), parallel.local(q)), name
        of_block = 4 * sum(p.numel() for p in plain.joint_blocks[0].parameters())
        own = 4 * sum(parallel.local(p).numel() for p in model.parameters())
        print(f"{grown} {own} {of_block} {own * ranks.world}")


def test_shards_are_those_of_one_process_and_take_little_more_memory_than_they_fill(tmp_path):
    config = MMDiTConfig(8, heads=5, pos_max=8, pos_sample=4)
    codes, said = spread(tmp_path / "x", 2, shards_in_little_memory, config)
    assert codes == [0, 0], said
    for line in said.splitlines():
        grown, own, of_block, total = map(int, line.split())
        assert own < grown < own + of_block < 0.8 * total, line


def test_what_is_put_off_is_made_as_it_would_have_been_and_nothing_else_is_put_off():
    torch.manual_seed(0)
    with (later := parallel.Later()):
        x = torch.empty(4, 4)
        x.normal_()
        for other in (lambda: x[:2].zero_(), lambda: x.copy_(torch.ones(4)), lambda: x.mul_(2)):
            with pytest.raises(NotImplementedError, match="later"):
                other()
    torch.rand(3)
    now = torch.get_rng_state()
    made = later.maker(x)()
    assert torch.equal(torch.get_rng_state(), now)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(4, 4), made)


def cut_up_in_bfloat16():
    """A trained model's outputs and gradients, cut up and under autocast; and what has which dtype when."""
    with parallel.processes("cpu") as ranks:
        torch.manual_seed(0)
        plain = MMDiT(MMDiTConfig(2, heads=2, head_dim=16, in_channels=4, context_dim=24, pooled_dim=12,
                                  pos_max=8, pos_sample=4))
        for p in plain.parameters():
            torch.nn.init.normal_(p, std=0.1)
        cut, seen = copy.deepcopy(plain), []
        parallel.shard(cut, torch.bfloat16, torch.device("cpu"), parallel.Later())
        first, second = cut.joint_blocks
        second.x_block.attn.qkv.register_forward_pre_hook(
            lambda layer, _: seen.append((layer.weight.dtype, parallel.sharded(first))))
        given = dict(x=torch.randn(4, 4, 8, 8), t=torch.tensor([0.999, 0.9995, 0.997, 1]),
                     context=torch.randn(4, 5, 24), pooled=torch.randn(4, 12))
        with torch.autocast("cpu", torch.bfloat16):
            whole = plain(**given)
            rows = ranks.rows(4)
            part = cut(**{k: x[rows] for k, x in given.items()})
        assert seen == [(torch.bfloat16, True)]
        assert (part - whole[rows]).norm() < 2e-3 * whole[rows].norm()
        (whole.square().sum() / ranks.world).backward()
        part.square().sum().backward()
        grad = parallel.whole(cut.joint_blocks[0].x_block.mlp.fc1.weight.grad)
        expected = plain.joint_blocks[0].x_block.mlp.fc1.weight.grad
        assert (grad - expected).norm() < 0.02 * expected.norm()
        assert not torch.equal(grad, grad.bfloat16().float())                           # added in float32


@fsdp
def test_cut_up_weights_travel_in_bfloat16_a_block_at_a_time_while_times_and_sums_stay_float32(tmp_path):
    codes, said = spread(tmp_path / "x", 2, cut_up_in_bfloat16)
    assert codes == [0, 0], said


def state_of_two_kinds(cut_up):
    """A state with one tensor for cut_up to cut up, and others that every rank holds."""
    torch.manual_seed(0)
    params = {"cut": torch.nn.Parameter(cut_up(torch.randn(64, 32)))}
    params |= {f"{i}.{k}": torch.nn.Parameter(torch.randn(shape))
               for i in range(8) for k, shape in (("weight", (32, 32)), ("bias", (32,)))}
    optimizer = torch.optim.AdamW(params.values())
    sum(p.square().sum() for p in params.values() if p.shape != (64, 32)).backward()
    params["cut"].grad = params["cut"].detach().clone()
    optimizer.step()
    return State("flow", 9, params, {}, [optimizer], torch.zeros(51), torch.zeros(()), step=5)


def saved_by_parts(folder):
    """What each rank copies for a save, and which files it reads for their checksums."""
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    save, read = checkpoint.async_save, checkpoints.sha256

    def counted(tensors, **how):
        copied.append(sum(parallel.local(x).nbytes for x in tensors.values()))
        return save(tensors, **how)

    copied, files = [], []
    checkpoint.async_save = counted
    checkpoints.sha256 = lambda path: (files.append(Path(path).name[:11]), read(path))[1]
    with parallel.processes("cpu") as ranks:
        mesh = init_device_mesh("cpu", (ranks.world,))
        state = state_of_two_kinds(lambda x: distribute_tensor(x, mesh, [Shard(0)]))
        saver = checkpoints.Saver(folder, ranks)
        saver.save(state, {})
        saver.settle()
        print(" ".join(map(str, copied + files)) + "\n", end="", file=sys.stderr)      # in one piece
        before = {k: parallel.local(x).clone() for k, x in checkpoints.tensors_of(state).items()}
        for x in checkpoints.tensors_of(state).values():
            parallel.local(x).fill_(7)
        assert checkpoints.load_state(folder, state, {}, ranks=ranks)
        assert all(torch.equal(parallel.local(x), before[k])
                   for k, x in checkpoints.tensors_of(state).items())


@fsdp
def test_each_rank_copies_its_share_of_a_checkpoint_and_computes_its_own_checksum(tmp_path):
    """What all ranks hold is divided among them too, so that no copy in main memory is in vain."""
    codes, said = spread(tmp_path / "x", 2, saved_by_parts, str(tmp_path / "run"))
    assert codes == [0, 0], said
    state = state_of_two_kinds(lambda x: x)
    expected = checkpoints.tensors_of(state)
    total = sum(x.nbytes for x in expected.values())
    told = sorted((line.split() for line in said.splitlines()), key=lambda words: words[1:])
    assert [words[1:] for words in told] == [["shard-00001"], ["shard-00002"]]
    assert sum(int(words[0]) for words in told) == total
    assert all(0.4 * total < int(words[0]) < 0.6 * total for words in told), (told, total)
    found = checkpoints.read_shards(checkpoints_of(tmp_path / "run", "flow")[0], state)     # by one process
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], x) for k, x in expected.items())


def test_ranks_wait_as_long_for_each_others_saves_as_for_anything_else(monkeypatch):
    """gloo's own patience is half an hour, and a group that has lost it once never saves again."""
    asked = {}
    monkeypatch.setattr(torch.distributed, "new_group", lambda **how: asked.update(how))
    parallel.Ranks(0, 2)
    assert asked == {"backend": "gloo", "timeout": parallel.PATIENCE}


def muon_on_shards(shapes, dtype, error):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with parallel.processes("cpu") as ranks:
        torch.manual_seed(0)
        mesh, pairs = init_device_mesh("cpu", (ranks.world,)), []
        for packed, *shape in shapes:
            value = torch.randn(shape)
            whole = torch.nn.Parameter(value.clone())
            pairs.append((packed, whole, torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))))
        optimizers = [Muon([{"params": [pair[k]], "packed": pair[0]} for pair in pairs], lr=0.1, dtype=dtype)
                      for k in (1, 2)]
        for step in range(3):
            for _, whole, cut in pairs:
                whole.grad = torch.randn_like(whole)
                cut.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.found_inf = torch.tensor(float(step == 1))
                optimizer.step()
        for _, whole, cut in pairs:
            # products in batches of another size round otherwise
            assert torch.allclose(parallel.whole(cut), whole, atol=error), tuple(whole.shape)
            momenta = [o.state[p]["momentum"] for o, p in zip(optimizers, (whole, cut))]
            assert torch.equal(parallel.whole(momenta[1]), momenta[0]), tuple(whole.shape)


def test_muon_moves_matrices_that_are_cut_up_as_if_they_were_whole(tmp_path):
    """Also where rows do not divide among ranks, are fewer than ranks, or matrices are."""
    shapes = [(1, 8, 4), (3, 24, 8), (1, 24, 8), (1, 10, 16), (1, 2, 5), (3, 9, 7), *[(1, 6, 6)] * 5]
    for dtype, error in ((torch.bfloat16, 5e-3), (torch.float32, 1e-5)):
        codes, said = spread(tmp_path / str(dtype), 4, muon_on_shards, shapes, dtype, error)
        assert codes == [0] * 4, said


# ------------------------------------------------------------------------------------------------- torchrun

@contextmanager
def torchrun(folder, *options):
    """The run, gone on with by two processes that torchrun starts -> (torchrun, the file they speak into)."""
    said = Path(folder).parent / "said.txt"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    with open(said, "w") as out:
        process = subprocess.Popen([sys.executable, *command, "train.py", "--resume", "--out", str(folder)],
                                   cwd=ROOT, stdout=out, stderr=out,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 300
        while not checkpoints_of(folder, "flow"):
            assert process.poll() is None and time.monotonic() < end, said.read_text()
            time.sleep(0.01)
        yield process, said
    finally:
        process.terminate()                     # it ends the others
        process.wait(60)


@pytest.mark.parametrize("cut_up", [False, pytest.param(True, marks=(fsdp, thorough))])
def test_torchrun_starts_all_again_where_one_is_killed_and_they_go_on(finished, tmp_path, cut_up):
    """Rank 0 is: its lock must stop nobody."""
    folder, config = untrained(finished, tmp_path / "run", flow_steps=6, save_every=2, fsdp=cut_up,
                               muon_rate=0.0)
    with torchrun(folder, "--max-restarts", "1") as (process, said):
        os.kill(int(re.match(r"process (\d+) on", (folder / "lock").read_text())[1]), signal.SIGKILL)
        assert process.wait(300) == 0, said.read_text()
    said = said.read_text()
    assert "it was interrupted" in said and re.search("going on at step [24] of 6", said), said
    assert said.count("2 processes share") == 2 and said.count("done in") == 1, said
    assert [int(row["step"]) for row in rows_of(folder, "flow")] == list(range(1, 7))
    assert (folder / "mmdit.safetensors").exists() and not (folder / "checkpoints").exists()


@thorough
def test_sigterm_to_torchrun_saves_on_all_ranks(finished, tmp_path):
    folder, config = untrained(finished, tmp_path / "run", flow_steps=2000, save_every=1, muon_rate=0.0)
    with torchrun(folder) as (process, said):
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) != 0 and "flow: saved at step" in said.read_text(), said.read_text()


# ----------------------------------------------------------------------------------- input, cache, arithmetic

@pytest.mark.parametrize("flags, cause", [
    (["--flow-batch", "6", "--accumulate", "2"], "6 does not divide among 2 ranks and into 2 pieces"),
    (["--vae-batch", "3"], "--vae-batch: a batch of 3 does not divide among 2 ranks: try 4"),
    (["--data", "no/such/folder"], "no/such/folder"),
])
def test_bad_input_ends_all_ranks_with_code_2_and_one_line(tmp_path, flags, cause):
    small = [x for k, v in MICRO.items() for x in (f"--{k.replace('_', '-')}", f"{v}")]
    codes, said = launch(tmp_path / "run", 2, [*small, "--out", str(tmp_path / "run"), *flags])
    assert codes == [2, 2] and cause in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


def test_two_ranks_make_the_cache_that_one_makes(finished, tmp_path):
    flags = ["cache", "--run", str(finished), "--data", "drawn", "--pictures", "1100", "--size", "16",
             "--device", "cpu", "--dtype", "float32", "--out"]
    for world in (1, 2):
        codes, said = launch(tmp_path / f"by{world}", world, [*flags, str(tmp_path / f"by{world}")])
        assert codes == [0] * world and said.count("done") == 1, said
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"by{n}").iterdir()} for n in (1, 2))
    assert len(one) > 2 and one == two


def meeting():
    """All that ranks exchange, and what becomes of one's error."""
    with parallel.processes("cpu") as ranks:
        r, world = ranks.rank, ranks.world
        assert ranks.add(torch.tensor([1, r])).tolist() == [world, sum(range(world))]
        assert ranks.most(r, -r, 5) == [world - 1, 0, 5]
        assert ranks.same(r) == 0 and ranks.told(r) == list(range(world))
        assert ranks.first_word(("", "second", "third")[r]) == "second"
        assert ranks.alone(lambda: r) == (None if r else 0) and ranks.once(lambda: r) == r
        assert {k: x.tolist() for k, x in ranks.collect({"r": torch.tensor(r)}).items()} == (
            {} if r else {"r": 0})

        def fail():
            if r == where:
                raise error
        for where, error in ((1, OSError("no room")), (2, ValueError()), (0, ValueError("bad flag"))):
            with pytest.raises((OSError, ValueError), match=str(error) or "ValueError") as caught:
                ranks.together(fail)
            assert type(caught.value) is (parallel.Elsewhere if r else OSError if where else ValueError)

        x, y = torch.full((1, 2), float(r), requires_grad=True), torch.zeros(world, 2, requires_grad=True)
        weights = (r + 1) * torch.arange(2.0 * world).view(world, 2)                    # in this rank's loss
        beside = y * 1
        every = ranks.gather(x)
        ((every + beside) * weights).sum().backward()
        assert every.tolist() == [[k, k] for k in range(world)]
        assert torch.equal(x.grad[0], (weights / (r + 1) * sum(range(world + 1)))[r])   # of all ranks' losses
        assert torch.equal(y.grad, weights)                                             # of its own alone
        model = torch.nn.Linear(2, 1, bias=False)
        loss, pause = parallel.add_gradients(model, lambda x: model(x).sum(), ranks)
        with pause():
            loss(torch.full((1, 2), float(r))).backward()
        assert model.weight.grad.tolist() == [[r, r]]
        loss(torch.full((1, 2), float(r))).backward()
        assert model.weight.grad.tolist() == [[world - 1.0] * 2]                        # the mean of all 2 r


def test_what_one_rank_has_or_lacks_all_learn(tmp_path):
    codes, said = spread(tmp_path / "x", 3, meeting)
    assert codes == [0] * 3 and not said, said


@pytest.mark.parametrize("world, pieces", [(1, 1), (2, 3), (4, 2)])
def test_the_rows_of_all_pieces_of_all_ranks_are_the_batch(world, pieces):
    rows, ranks = [], parallel.Ranks()
    ranks.world = world
    for ranks.rank in range(world):
        rows += [ranks.rows(24, k, pieces) for k in range(pieces)]
    assert [i for piece in rows for i in range(24)[piece]] == list(range(24))


def test_each_rank_takes_the_card_of_its_place_on_its_own_machine_unless_one_is_named(monkeypatch):
    for name, value in (("RANK", "10"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.own_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [parallel.own_device(d) for d in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:2", "cuda:2", "cuda:1", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.own_device("auto") == "auto"
