"""Claims about checkpoints.py: training goes on bit by bit, a damaged checkpoint is left for the one before,
what is no damage is refused."""
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from checkpoints import State, checkpoints_of, clean_checkpoints, load_state, save_state, sha256
from conftest import pickled, refuses
from mmdit import MMDiT, MMDiTConfig
from muon import Muon, split
from run_folder import load_tensors, read_json, save_tensors
from tensor_files import write_json

FACTS = {"settings": {"model": "tiny", "size": 64}, "fingerprint": "of the data"}


class Training:
    """A small transformer, its average and its optimizers, as `train.fit` keeps them."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = MMDiT(MMDiTConfig(2, heads=2, head_dim=8, in_channels=4, context_dim=8, pooled_dim=8,
                                       pos_max=4, pos_sample=2, pos_base=2, dual_blocks=1))
        self.params = dict(self.model.named_parameters())
        self.average = {k: p.detach().clone() for k, p in self.params.items()}
        matrices, rest = split(self.model)
        self.optimizers = [torch.optim.AdamW(rest, lr=1e-2), Muon(matrices)]
        self.state = State("flow", 9, self.params, self.average, self.optimizers,
                           torch.full((5,), torch.inf), torch.zeros(()))

    def step(self, seed):
        g = torch.Generator().manual_seed(seed)
        v = self.model(torch.randn(2, 4, 4, 4, generator=g), torch.rand(2, generator=g),
                       torch.randn(2, 3, 8, generator=g), torch.randn(2, 8, generator=g))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (v - 1).square().mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for k, p in self.params.items():
            self.average[k].lerp_(p.detach(), 0.1)

    def load(self, run, facts=FACTS, **how):
        return load_state(run, self.state, facts, **how)

    def save(self, run, step, in_a_row=0):
        self.state.step = step
        self.state.in_a_row.fill_(in_a_row)
        return save_state(run, self.state, FACTS)


def trained(run, steps=(1, 2)):
    """A run's folder with a checkpoint at each of these steps."""
    training = Training()
    for i in range(1, max(steps) + 1):
        training.step(i)
        if i in steps:
            training.save(run, i)
    return run


def at_step(folder, step):
    return folder / "checkpoints" / f"flow-{step:06d}"


def test_what_macos_puts_beside_a_checkpoints_files_is_no_part_of_it(tmp_path):
    folder = at_step(trained(tmp_path), 2).with_suffix(".tmp")
    at_step(tmp_path, 2).rename(folder)
    (folder / "._state.safetensors").write_bytes(b"about a file of this name")
    manifest = read_json(folder / "manifest.json")
    files = manifest.pop("files")
    assert read_json(checkpoints.seal(folder, manifest) / "manifest.json")["files"] == files
    (at_step(tmp_path, 2) / "._state.safetensors").unlink()                 # on another drive it is not there
    assert Training().load(tmp_path)


@pytest.mark.parametrize("fused", [True, False])
def test_only_a_fused_optimizer_counts_its_steps_on_the_card(tmp_path, fused):
    """Another asks there for each parameter's number, in each step, and waits for the answer."""
    trained(tmp_path)
    with torch.device("meta"):              # a place that is not the CPU
        training = Training()
    training.optimizers[0] = training.state.optimizers[0] = torch.optim.AdamW(
        split(training.model)[1], lr=1e-2, fused=fused)
    assert training.load(tmp_path)
    assert {state["step"].device.type for state in training.optimizers[0].state.values()} == {
        "meta" if fused else "cpu"}


def test_training_that_was_saved_and_loaded_goes_on_bit_by_bit(tmp_path):
    straight, again = Training(), Training()
    for i in range(3):
        straight.step(i)
    straight.state.recent[2] = 0.25
    straight.state.rollbacks = 1
    straight.save(tmp_path, 3, in_a_row=2)
    again.state.total = 100
    assert again.load(tmp_path)
    assert (again.state.step, again.state.total) == (3, 9)                  # the plan is the saved one's
    assert torch.equal(again.state.recent, straight.state.recent)
    assert (again.state.in_a_row, again.state.rollbacks) == (2, 1)
    for i in range(3, 5):
        straight.step(i)
        again.step(i)
    for k, p in straight.params.items():
        assert torch.equal(p, again.params[k]) and torch.equal(straight.average[k], again.average[k]), k


def test_another_stage_or_none_starts_from_the_beginning(tmp_path):
    training = Training()
    assert not training.load(tmp_path)
    training.step(0)
    training.save(tmp_path, 1)
    training.step(1)
    moved = {k: p.detach().clone() for k, p in training.params.items()}
    training.state.stage = "vae"
    assert not training.load(tmp_path)
    assert all(torch.equal(p, moved[k]) for k, p in training.params.items())


def test_a_checkpoint_is_tensors_and_json_with_checksums(tmp_path):
    folder = at_step(trained(tmp_path), 2)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.safetensors"]
    manifest = read_json(folder / "manifest.json")
    assert (manifest["format"], manifest["stage"], manifest["step"], manifest["total"]) == (1, "flow", 2, 9)
    assert manifest["settings"] == FACTS["settings"] and manifest["fingerprint"] == "of the data"
    assert {"torch", "device", "threads"} <= manifest.keys()
    path = folder / "state.safetensors"
    assert manifest["files"] == {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def test_the_newest_two_are_kept(tmp_path):
    trained(tmp_path, (1, 2, 3, 4))
    assert [p.name for p in checkpoints_of(tmp_path, "flow")] == ["flow-000003", "flow-000004"]


def test_steps_beyond_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000, 2_000_000):
        Training().save(tmp_path, step)
    assert [p.name for p in checkpoints_of(tmp_path, "flow")] == ["flow-1000000", "flow-2000000"]


def test_a_save_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    trained(tmp_path)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        Training().save(tmp_path, 3)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert Training().load(tmp_path)


def test_a_checkpoint_takes_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(os, "fsync", lambda fd, real=os.fsync: (happened.append("flush"), real(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (
        happened.append(os.path.basename(b)), real(a, b)))
    Training().save(tmp_path, 1)
    assert happened == ["flush", "state.safetensors", "flush", "flush", "manifest.json", "flush",
                        "flow-000001", "flush"]


def flip(path, where=-1):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def edit(folder, change):
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    write_json(folder / "manifest.json", manifest)


def rewrite(folder, change):
    """Other tensors under a manifest that is right about them."""
    path = folder / "state.safetensors"
    tensors, about = load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, about)
    vouch(folder)


def vouch(folder):
    """The manifest tells the size and checksum that the file has now."""
    path = tensors_file(folder)
    edit(folder, lambda m: m["files"].update(
        {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}))


def overlapping(data, by):
    """A file in which the second tensor begins `by` bytes after the first one's end."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    names = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    for name in names[1:]:
        header[name]["data_offsets"] = [x + by for x in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n:] + b"\0" * max(by, 0)


def with_header(change):
    """A whole-looking file with another header, which its manifest vouches for."""
    def damage(folder):
        path = folder / "state.safetensors"
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        change(header[min(k for k in header if k.startswith("model."))])
        text = json.dumps(header).encode()
        replace(len(text).to_bytes(8, "little") + text + data[8 + n:])(folder)
    return damage


def replace(data):
    def damage(folder):
        path = folder / "state.safetensors"
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)
        vouch(folder)
    return damage


def tensors_file(folder):
    return folder / "state.safetensors"


def cut(folder):
    tensors_file(folder).write_bytes(tensors_file(folder).read_bytes()[:-100])


DAMAGES = {
    "truncated": (cut, "bytes, not"),
    "bytes appended": (lambda f: tensors_file(f).write_bytes(tensors_file(f).read_bytes() + b"\0"),
                       "bytes, not"),
    "one bit flipped": (lambda f: flip(tensors_file(f)), "sha256"),
    "emptied": (lambda f: tensors_file(f).write_bytes(b""), "0 bytes, not"),
    "no tensors": (lambda f: tensors_file(f).unlink(), "state.safetensors is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"format": 1, "st'), "cannot be read"),
    "a list for a manifest": (lambda f: write_json(f / "manifest.json", []), "no object in braces"),
    "no list of files": (lambda f: edit(f, lambda m: m.pop("files")), "files"),
    "files of no size": (lambda f: edit(f, lambda m: m["files"].update({"state.safetensors": 7})), "lacks"),
    "another step's manifest": (lambda f: edit(f, lambda m: m.update(step=1)), "flow at step 1"),
    "no step": (lambda f: edit(f, lambda m: m.pop("step")), "manifest.json"),
    "no total": (lambda f: edit(f, lambda m: m.pop("total")), "total"),
    "NaN in a weight": (lambda f: rewrite(
        f, lambda t: t["model.final_layer.linear.weight"].view(-1)[3:4].fill_(float("nan"))),
        "model.final_layer.linear.weight holds NaN"),
    "infinity in a moment": (lambda f: rewrite(
        f, lambda t: t["adamw.exp_avg.x_embedder.proj.bias"].fill_(float("inf"))),
        "adamw.exp_avg.x_embedder.proj.bias holds NaN or infinity"),
    "a pickle": (replace(pickled()), "not a whole safetensors"),
    "a huge header": (replace((2**62).to_bytes(8, "little") + b"{}"), "not a whole safetensors"),
    "overlapping tensors": (replace(lambda d: overlapping(d, -4)), "not a whole safetensors"),
    "a hole": (replace(lambda d: overlapping(d, 4)), "not a whole safetensors"),
    "a shape beyond 64 bits": (with_header(lambda t: t.update(shape=[2**63, 2])), "not a whole safetensors"),
    "a shape of another size": (with_header(lambda t: t.update(shape=[1])), "not a whole safetensors"),
    "an unknown dtype": (with_header(lambda t: t.update(dtype="F1")), "not a whole safetensors"),
}


@pytest.mark.parametrize("damage, reason", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_left_for_the_one_before_and_the_reason_told(
        tmp_path, monkeypatch, capsys, damage, reason):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "run")
    damage(at_step(tmp_path / "run", 2))
    training = Training()
    assert training.load(tmp_path / "run") and training.state.step == 1
    said = capsys.readouterr().out.strip()
    assert "went back to step 1" in said and "flow-000002" in said and reason in said, said
    assert "\n" not in said and not (tmp_path / "unpickled").exists()
    training.step(2)
    training.save(tmp_path / "run", 2)                          # in the place of the damaged one
    assert Training().load(tmp_path / "run") and not capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_is_left_for_the_one_before(tmp_path, monkeypatch, capsys):
    trained(tmp_path)

    def sick(path):
        if "flow-000002" in str(path):
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(checkpoints, "sha256", sick)
    training = Training()
    assert training.load(tmp_path) and training.state.step == 1
    assert "cannot be read ([Errno 5] Input/output error)" in capsys.readouterr().out


def test_a_checkpoint_that_may_be_readable_the_next_time_is_not_given_up(tmp_path, monkeypatch):
    trained(tmp_path)

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "sha256", refused)
    with pytest.raises(PermissionError):
        Training().load(tmp_path)


@pytest.mark.parametrize("damaged", [(4,), (4, 6)])
def test_gone_back_from_damage_the_newest_two_that_are_kept_are_whole(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(checkpoints, "KEEP", 3)                 # as if killed before the oldest was removed
    trained(tmp_path, (2, *damaged))
    monkeypatch.undo()
    for step in damaged:
        cut(at_step(tmp_path, step))
    training = Training()
    assert training.load(tmp_path) and training.state.step == 2
    training.save(tmp_path, 3)
    assert checkpoints_of(tmp_path, "flow") == [at_step(tmp_path, 2), at_step(tmp_path, 3)]
    assert training.load(tmp_path) and training.state.step == 3


def test_a_save_succeeds_though_older_checkpoints_cannot_be_deleted(tmp_path, monkeypatch):
    """As on NFS, where a file that is open elsewhere gets another name instead."""
    trained(tmp_path)

    def stuck(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", stuck)
    training = Training()
    assert training.load(tmp_path)
    for _ in range(2):                                          # the second in the place of the first
        assert training.save(tmp_path, 3) == at_step(tmp_path, 3)
    assert checkpoints_of(tmp_path, "flow") == [at_step(tmp_path, 2), at_step(tmp_path, 3)]
    clean_checkpoints(tmp_path, ())


@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory, data):
    run = trained(tmp_path_factory.mktemp("run"), (1, 2))
    path = tensors_file(at_step(run, 2))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    training = Training()
    assert training.load(run) and training.state.step == 1


def test_when_all_are_damaged_nothing_starts_again_unasked(tmp_path):
    trained(tmp_path)
    for step in (1, 2):
        cut(at_step(tmp_path, step))
    refuses(lambda: Training().load(tmp_path),
            "no checkpoint of flow", "flow-000001", "flow-000002", "delete")


@pytest.mark.parametrize("change, words", [
    (lambda m: m.update(format=2), ("format 2", "knows 1", "newer version")),
    (lambda m: m["settings"].update(model="d15"), ("--model d15", "--model tiny", "config.json")),
    (lambda m: m["settings"].update(size=128), ("--size 128", "--size 64")),
])
def test_what_is_no_damage_is_refused_though_there_is_an_older_one(tmp_path, change, words):
    edit(at_step(trained(tmp_path), 2), change)
    refuses(lambda: Training().load(tmp_path), "flow-000002", *words)


def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path):
    trained(tmp_path)
    larger = Training()
    name, p = list(larger.params.items())[-1]
    larger.params[name] = torch.nn.Parameter(torch.zeros(2, *p.shape))
    before = {k: v.detach().clone() for k, v in larger.params.items()}
    refuses(lambda: larger.load(tmp_path), "flow-000002", name, "another architecture")
    assert all(torch.equal(v, before[k]) for k, v in larger.params.items())


def test_going_back_in_health_passes_over_what_was_saved_amid_bad_steps(tmp_path):
    training = Training()
    training.step(0)
    training.save(tmp_path, 1)
    training.save(tmp_path, 2, in_a_row=3)
    assert training.load(tmp_path) and training.state.step == 2
    assert training.load(tmp_path, healthy=True) and training.state.step == 1


def test_other_data_threads_or_versions_are_told(tmp_path, capsys):
    trained(tmp_path)
    edit(at_step(tmp_path, 2), lambda m: m.update(threads=99, torch="1.0"))
    assert Training().load(tmp_path, facts=FACTS | {"fingerprint": "of more data"})
    said = capsys.readouterr().out
    assert "the data is not what it was" in said and "threads 99" in said and "torch 1.0" in said


def test_leftovers_of_a_killed_process_and_of_finished_stages_are_removed(tmp_path):
    trained(tmp_path)
    for name in ("flow-000003.tmp", "flow-000001.old.tmp", "vae-000700"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "state.safetensors").write_bytes(b"half")
    for name in ("backup", "flow-000002-good"):                                     # somebody's own
        (tmp_path / "checkpoints" / name).mkdir()
    assert Training().load(tmp_path)
    clean_checkpoints(tmp_path, ["flow"])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "backup", "flow-000001", "flow-000002", "flow-000002-good"]
    clean_checkpoints(tmp_path, ())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["backup", "flow-000002-good"]
