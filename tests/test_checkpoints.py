"""Claims about checkpoints.py: parts come back bit by bit, a crash leaves the old file,
a bad file is refused in one line."""
import dataclasses
import json
import os
import pickle
import shutil
import stat
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoints
from conftest import refuses
from checkpoints import (PARTS, CheckpointError, State, checkpoints_of, clean_checkpoints, has_run, last_run,
                         load_part, load_state, load_strict, load_tensors, load_tokenizers, read_json,
                         run_configs, save_part, save_state, save_tensors, sha256, sole_writer,
                         write_atomically, write_json)
from mmdit import MMDiT, MMDiTConfig
from muon import Muon, split
from text_encoders import CLIPImageConfig, CLIPTextConfig, T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig

text, image = (CLIPTextConfig(60, 16, 1, 2, 32, "gelu", 8, 16),
               CLIPImageConfig(16, 8, 16, 1, 2, 32, "gelu", 16))
CONFIGS = {
    "mmdit": MMDiTConfig(2, heads=2, head_dim=8, in_channels=4, context_dim=8, pooled_dim=8, pos_max=4,
                         pos_sample=2, pos_base=2, dual_blocks=1),
    "vae": VAEConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, num_groups=2, shift=-0.1,
                     scale=1.7),
    "t5": T5Config(60, 16, 1, 2, 8, 32), "clip_l": text, "clip_g": text, "clip_l_image": image,
    "clip_g_image": image,
}


def build(name):
    torch.manual_seed(0)
    return PARTS[name][0](CONFIGS[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one good vae.safetensors."""
    run = tmp_path_factory.mktemp("run")
    save_part(run, "vae", build("vae"))
    return run


# --------------------------------------------------------------------------------------------- there and back

def test_every_kind_of_part_is_known_here():
    assert CONFIGS.keys() == PARTS.keys()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_comes_back_with_its_config_and_every_bit(name, tmp_path):
    module = build(name)
    save_part(tmp_path, name, module)
    again = load_part(tmp_path, name)
    assert again.config == module.config
    before, after = module.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_tuples_of_a_config_survive_the_way_through_json(saved):
    assert load_tensors(saved / "vae.safetensors")[1]["config"]["ch_mult"] == [1, 2]
    assert load_part(saved, "vae").config.ch_mult == (1, 2)


@given(st.dictionaries(st.text(min_size=1).filter(lambda k: k != "__metadata__"), st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]), max_size=4), st.integers(0, 3))
def test_tensors_of_any_name_dtype_and_layout_come_back(tmp_path_factory, dtypes, n):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    tensors = {k: torch.arange(2 * n).view(2, n).t().to(dtype) for k, dtype in dtypes.items()}  # transposed
    save_tensors(path, tensors, {"names": sorted(dtypes)})
    again, about = load_tensors(path)
    assert about == {"names": sorted(dtypes)} and again.keys() == tensors.keys()
    assert all(again[k].dtype == v.dtype and torch.equal(again[k], v) for k, v in tensors.items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=8)


def test_one_wrong_bit_in_any_tensor_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"w": torch.randn(4, 6), "half": torch.randn(5).bfloat16(), "n": torch.tensor(7),
               "none": torch.empty(0, 3), "turned": torch.randn(3, 2).T}
    save_tensors(path, tensors, {"part": "x"})
    whole = path.read_bytes()
    found, about = load_tensors(path)
    assert about == {"part": "x"} and all(torch.equal(t, tensors[name]) for name, t in found.items())
    for i in range(1, sum(t.nbytes for t in tensors.values()), 7):
        path.write_bytes(whole[:-i] + bytes([whole[-i] ^ 4]) + whole[len(whole) - i + 1:])
        refuses(lambda: load_tensors(path), "a.safetensors", "its checksum differs")
    assert load_tensors(path, ())[1] == about


@given(st.dictionaries(st.text(), json_values, max_size=3))
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("x") / "config.json"
    write_json(path, value)
    assert read_json(path) == value


# ---------------------------------------------------------------------------------------------------- crashes

@pytest.mark.parametrize("problem", [OSError("disk full"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_crash_while_writing_leaves_the_old_file_and_no_other(tmp_path, problem):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half of the n")
        raise problem

    with pytest.raises(type(problem)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_a_killed_process_left_behind_is_neither_read_nor_kept(saved, tmp_path):
    left = tmp_path / "vae.safetensors.tmp"
    left.write_bytes((saved / "vae.safetensors").read_bytes()[:1000])
    refuses(lambda: load_part(tmp_path, "vae"), "missing")
    save_part(tmp_path, "vae", build("vae"))
    load_part(tmp_path, "vae")
    assert not left.exists()


def test_files_are_flushed_before_they_take_the_place_of_the_old(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr(os, "fsync",
                        lambda fd, real=os.fsync: (happened.append("flush"), real(fd)))
    monkeypatch.setattr(os, "replace",
                        lambda *a, real=os.replace: (happened.append("rename"), real(*a)))
    write_json(tmp_path / "new" / "folder" / "x.json", 1)
    assert happened == ["flush", "rename", "flush"]                     # the last: of the folder


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_files_can_be_read_by_others(saved):
    assert stat.S_IMODE((saved / "vae.safetensors").stat().st_mode) == 0o644


# -------------------------------------------------------------------------------------------------- bad files

def with_bytes(folder, data):
    (folder / "vae.safetensors").write_bytes(data)
    return lambda: load_part(folder, "vae")


@given(st.data())
def test_a_file_cut_short_anywhere_is_refused(saved, tmp_path_factory, data):
    whole = (saved / "vae.safetensors").read_bytes()
    n = data.draw(st.integers(0, len(whole) - 1))
    refuses(with_bytes(tmp_path_factory.mktemp("cut"), whole[:n]),
            "vae.safetensors is not a whole", "delete it")


def pickled():
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("unpickled",)
    return pickle.dumps(Payload())


@pytest.mark.parametrize("name, data", {
    "empty": b"", "a web page": b"<!DOCTYPE html><html>please log in</html>", "a pickle": pickled(),
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "text": b"version https://git-lfs.github.com/spec/v1\n"
            b"oid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n",
}.items())
def test_files_of_another_kind_are_refused_and_never_unpickled(tmp_path, monkeypatch, name, data):
    monkeypatch.chdir(tmp_path)
    refuses(with_bytes(tmp_path, data), "vae.safetensors is not a whole", "delete it")
    assert not (tmp_path / "unpickled").exists()


def test_bytes_beyond_the_end_are_refused(saved, tmp_path):
    refuses(with_bytes(tmp_path, (saved / "vae.safetensors").read_bytes() + b"\0"),
            "not a whole", "delete it")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "vae.safetensors").mkdir()
    refuses(lambda: load_part(tmp_path, "vae"), "vae.safetensors")


def test_a_missing_file_says_how_to_make_it(tmp_path):
    refuses(lambda: load_part(tmp_path, "vae"), "vae.safetensors is missing", "train.py --resume")


def test_a_part_under_another_name_is_refused(saved, tmp_path):
    (tmp_path / "mmdit.safetensors").write_bytes((saved / "vae.safetensors").read_bytes())
    refuses(lambda: load_part(tmp_path, "mmdit"), "mmdit.safetensors was not written as 'mmdit'")


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file(build("vae").state_dict(), tmp_path / "vae.safetensors")
    refuses(lambda: load_part(tmp_path, "vae"), "was not written as 'vae'")


@pytest.mark.parametrize("change", [
    lambda about: about.pop("config"), lambda about: about["config"].update(colours=7),
    lambda about: about["config"].pop("ch"), lambda about: about["config"].update(num_groups=3)])
def test_a_config_of_another_version_is_refused_or_does_not_fit(saved, tmp_path, change):
    tensors, about = load_tensors(saved / "vae.safetensors")
    change(about)
    save_tensors(tmp_path / "vae.safetensors", tensors, about)
    refuses(lambda: load_part(tmp_path, "vae"), "vae.safetensors", "architecture")


NAME = "decoder.conv_in.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NAME), ("lacks " + NAME, "another architecture or version")),
    (lambda t: t.update(surplus=torch.zeros(1)), ("unknown surplus", "another architecture or version")),
    (lambda t: t.update({NAME: t[NAME][:, :1]}),
     (NAME, "(8, 1, 3, 3)", "(8, 2, 3, 3)", "another architecture")),
    (lambda t: t[NAME].view(-1)[5:6].fill_(float("nan")),
     (NAME, "NaN", "older checkpoint", "smaller learning rate")),
    (lambda t: t[NAME].view(-1)[:1].fill_(float("-inf")), (NAME, "infinity", "older checkpoint")),
], ids=["missing", "surplus", "shape", "NaN", "infinity"])
def test_every_parameter_is_filled_once_with_its_shape_and_finite_numbers(saved, tmp_path, change, words):
    tensors, about = load_tensors(saved / "vae.safetensors")
    change(tensors)
    save_tensors(tmp_path / "vae.safetensors", tensors, about)
    refuses(lambda: load_part(tmp_path, "vae"), "vae.safetensors", *words)


def test_a_refused_file_leaves_the_module_as_it_was():
    module, tensors = build("vae"), build("vae").state_dict()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bad = {k: v + 1 for k, v in tensors.items()} | {NAME: torch.zeros(1)}
    refuses(lambda: load_strict(module, bad, "x"), NAME)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"<html>"])
def test_damaged_json_is_refused(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    refuses(lambda: read_json(tmp_path / "config.json"), "config.json cannot be read", "restore it")


def test_missing_json_asks_whether_this_is_a_run(tmp_path):
    refuses(lambda: read_json(tmp_path / "config.json"),
            "config.json is missing", "folder of a finished or interrupted run")


# --------------------------------------------------------------------------------- runs and unfinished stages

def test_the_last_run_is_the_one_written_to_last(tmp_path):
    for age, (name, file) in enumerate([("b", "config.json"), ("a", "config.json"),
                                        ("b", "mmdit.safetensors"), ("c", "config.json")]):
        write_json(tmp_path / name / file, {})
        os.utime(tmp_path / name / file, (1000 + age, 1000 + age))
    assert last_run(tmp_path) == tmp_path / "c" and has_run(tmp_path / "c")
    assert last_run(tmp_path, finished=True) == tmp_path / "b"
    os.utime(tmp_path / "a" / "config.json", (2000, 2000))
    assert last_run(tmp_path) == tmp_path / "a"


def test_without_a_run_the_command_that_makes_one_is_told(tmp_path):
    assert not has_run(tmp_path)
    refuses(lambda: last_run(tmp_path / "runs"), "no run under", "python train.py --tiny")
    write_json(tmp_path / "x" / "config.json", {})
    refuses(lambda: last_run(tmp_path, finished=True), "no finished run", "python train.py --tiny")


FACTS = {"settings": {"model": "tiny", "size": 64}, "fingerprint": "of the data"}


class Training:
    """A small transformer, its average and its optimizers, as `train.fit` keeps them."""

    def __init__(self):
        self.model = build("mmdit")
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


def test_a_run_has_one_writer_and_a_dead_ones_lock_file_stops_nobody(tmp_path):
    (tmp_path / "lock").write_text("process 1 on a machine that burnt down")
    with sole_writer(tmp_path):
        refuses(lambda: sole_writer(tmp_path).__enter__(), f"process {os.getpid()}", "choose another --out")
    with sole_writer(tmp_path):
        pass
    assert os.name != "posix" or not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the lock file stays")
def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock = checkpoints.fcntl.flock

    def late(file, how):
        monkeypatch.undo()
        (tmp_path / "lock").unlink()
        return flock(file, how)

    monkeypatch.setattr(checkpoints.fcntl, "flock", late)
    with sole_writer(tmp_path):
        refuses(lambda: sole_writer(tmp_path).__enter__(), f"process {os.getpid()}")


def test_the_description_in_a_file_is_the_config_and_nothing_that_needs_unpickling(saved):
    about = load_tensors(saved / "vae.safetensors")[1]
    assert about == {"part": "vae", "config": json.loads(json.dumps(asdict(CONFIGS["vae"])))}


def test_classes_are_those_that_the_names_say():
    assert PARTS["mmdit"] == (MMDiT, MMDiTConfig) and PARTS["vae"] == (AutoencoderKL, VAEConfig)
    assert issubclass(CheckpointError, ValueError)


def test_clip_l_pads_a_runs_prompts_with_eos_and_bigg_with_id_0(finished):
    words = load_tokenizers(finished, 77)
    l, g = (words[name](["a star"])[0] for name in ("clip_l", "clip_g"))
    assert l[-1] == words["clip_l"].eos and g[-1] == 0 != words["clip_g"].eos and (l[:4] == g[:4]).all()


def test_a_t5_of_another_run_is_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = load_part(run, "t5").config
    save_part(run, "t5", T5Encoder(dataclasses.replace(config, width=2 * config.width)))
    with pytest.raises(CheckpointError, match="the folder mixes two runs"):
        run_configs(run)
