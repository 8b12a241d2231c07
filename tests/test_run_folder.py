"""Claims about run_folder.py: parts come back bit by bit, a crash leaves the old file, a bad file is refused
in one line, a run has one writer."""
import dataclasses
import json
import os
import shutil
import stat
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import run_folder
from conftest import pickled, refuses
from mmdit import MMDiT, MMDiTConfig
from run_folder import (PARTS, has_run, last_run, load_part, load_strict, load_tensors, load_tokenizers,
                        read_json, run_configs, save_part, save_tensors, sole_writer)
from tensor_files import CheckpointError, write_atomically, write_json
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


# ------------------------------------------------------------------------------------------------------ runs

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


def test_a_run_has_one_writer_and_a_dead_ones_lock_file_stops_nobody(tmp_path):
    (tmp_path / "lock").write_text("process 1 on a machine that burnt down")
    with sole_writer(tmp_path):
        refuses(lambda: sole_writer(tmp_path).__enter__(), f"process {os.getpid()}", "choose another --out")
    with sole_writer(tmp_path):
        pass
    assert os.name != "posix" or not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the lock file stays")
def test_a_lock_that_its_owner_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock = run_folder.fcntl.flock

    def late(file, how):
        monkeypatch.undo()
        (tmp_path / "lock").unlink()
        return flock(file, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
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
