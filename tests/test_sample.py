"""Claims about sampling: reproducible pictures of any multiple of 16, prompts of any kind,
nothing overwritten, clear errors."""
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import drawn_world as world
import finetune
import flow
import sample
from run_folder import load_tensors, save_tensors
from sample import Pipeline, free_path


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A run of a few steps, its last layer stirred: after so little training all its velocities would be
    nearly equal."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("work") / "runs" / "drawn")
    tensors, about = load_tensors(folder / "mmdit.safetensors")
    g = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if "adaLN" in name or name.startswith("final_layer"):
            value.copy_(0.05 * torch.randn(value.shape, generator=g))
    save_tensors(folder / "mmdit.safetensors", tensors, about)
    return folder


@pytest.fixture(scope="module")
def pipe(run):
    return Pipeline.from_pretrained(run, device="cpu")


def draw(pipe, prompt, **how):
    return pipe(prompt, **dict(steps=2, output="tensor") | how)


def test_picture_i_does_not_depend_on_the_batch_it_is_drawn_in(pipe):
    together = draw(pipe, ["a star", "a ring", "a red heart"], seed=5)
    for i, prompt in enumerate(["a star", "a ring", "a red heart"]):
        assert torch.allclose(draw(pipe, prompt, seed=5 + i)[0], together[i], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("method", flow.METHODS)
def test_a_seed_repeats_a_picture_with_every_sampler(pipe, method):
    a, b = (draw(pipe, ["a star", "a ring"], seed=3, steps=3, method=method) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.allclose(draw(pipe, "a ring", seed=4, steps=3, method=method)[0], a[1], atol=1e-4)


def test_given_noise_replaces_the_seed(pipe):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(11))
    assert torch.equal(draw(pipe, "a star", noise=noise, seed=1), draw(pipe, "a star", seed=11))


def test_prompt_negative_and_guidance_all_matter_and_guidance_one_ignores_the_negative(pipe):
    plain = draw(pipe, "a red star")
    assert not torch.allclose(plain, draw(pipe, "a blue ring"), atol=1e-3)
    assert not torch.allclose(plain, draw(pipe, "a red star", negative="a ring"), atol=1e-3)
    assert not torch.allclose(plain, draw(pipe, "a red star", guidance=6.0), atol=1e-3)
    assert torch.equal(draw(pipe, "a red star", guidance=1.0),
                       draw(pipe, "a red star", guidance=1.0, negative="a ring"))


def test_the_empty_prompt_of_a_run_is_zeros_as_in_training(pipe):
    said = pipe.encode(["", "  ", "a star"])
    assert not said.context[:2].any() and not said.pooled[:2].any() and said.context[2].any()
    pipe.zero_empty = False                             # what was encoded before does not answer for this
    try:
        assert pipe.encode(["", "  ", "a star"]).context[:2].any()
    finally:
        pipe.zero_empty = True


def test_numbers_and_names_come_as_python_has_them(run, pipe):
    plain = draw(pipe, "a star", seed=3)
    assert torch.equal(plain, draw(pipe, "a star", seed=np.int64(3), negative=None))
    assert torch.equal(draw(pipe, "a star", drop="t5"), draw(pipe, "a star", drop=("t5",)))
    lean = Pipeline.from_pretrained(run, device="cpu", dtype="bfloat16", drop="t5")
    assert lean.encoders.t5 is None and lean.dtype == torch.bfloat16
    for how, words in ((dict(seed=None), "seed is None"), (dict(seed=2.5), "seed is 2.5"),
                       (dict(steps=2.5), "steps is 2.5"), (dict(image="x.png"), "image is a str")):
        with pytest.raises(ValueError, match=words):
            draw(pipe, "a star", **how)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.integers(1, 6))
def test_any_multiple_of_16_is_drawn(pipe, h, w):
    assert draw(pipe, "a star", height=16 * h, width=16 * w, steps=1).shape == (1, 3, 16 * h, 16 * w)


def test_outputs_pil_tensor_and_latent_agree(pipe):
    latent, tensor = (draw(pipe, "a star", output=kind) for kind in ("latent", "tensor"))
    decoded = pipe.vae.decode(pipe.vae.from_latent(latent))
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), tensor, atol=1e-6)
    (image,) = draw(pipe, "a star", output="pil")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert tensor.min() >= 0 and tensor.max() <= 1


def test_without_t5_zeros_stand_in_its_place(run, pipe):
    lean = Pipeline.from_pretrained(run, device="cpu", t5=False)
    with_t5, without = pipe.encode(["a star"]), lean.encode(["a star"])
    n = pipe.encoders.clip_length
    assert with_t5.context.shape == without.context.shape
    assert torch.equal(with_t5.context[:, :n], without.context[:, :n]) and not without.context[:, n:].any()
    assert draw(lean, "a star").isfinite().all()


@pytest.mark.parametrize("dropped", [("clip_l",), ("clip_l", "clip_g"), ("clip_l", "clip_g", "t5")])
def test_a_run_without_some_encoders_draws_what_it_draws_with_zeros_in_their_place(run, pipe, dropped):
    lean = Pipeline.from_pretrained(run, device="cpu", drop=dropped)
    assert torch.equal(draw(lean, "a red star"), draw(pipe, "a red star", drop=dropped))


@pytest.mark.parametrize("mode", ["text", "model", "block"])
def test_a_run_draws_the_same_bits_wherever_its_weights_wait_and_nearly_the_same_in_8_bits(run, pipe, mode):
    away = Pipeline.from_pretrained(run, device="cpu", offload=mode)
    assert torch.equal(draw(away, "a red star"), draw(pipe, "a red star"))
    small = Pipeline.from_pretrained(run, device="cpu", offload=mode, int8=True)
    off = (draw(small, "a red star") - draw(pipe, "a red star")).abs().mean()
    assert 0 < off < 0.02


def test_a_picture_to_begin_with_is_kept_the_more_the_less_strength(pipe):
    (begin,) = draw(pipe, "a ring", seed=4, output="pil")
    near, far = (draw(pipe, "a red star", image=begin, strength=s, steps=10, output="latent")
                 for s in (0.1, 0.9))
    kept = pipe.latent_of(begin, 1, 64, 64)
    assert (near - kept).norm() < (far - kept).norm()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_a_prompt_of_any_unicode_is_encoded(pipe, prompt):
    assert pipe.encode([prompt]).context.isfinite().all()
    pipe.notice(prompt)


def test_ten_thousand_words_are_drawn_with_a_notice(pipe):
    prompt = "a red star " * 3333
    assert draw(pipe, prompt, steps=1).isfinite().all()
    assert "too long" in pipe.notice(prompt) and pipe.notice("a red star") is None


def test_signs_that_t5_does_not_know_are_told_and_no_others(pipe):
    for prompt, known, strange in (
            ("a red \u2606 star", ("red", "star"), "\u2606"), ("\U0001f600", (), "\U0001f600"),
            ("\u05e9", (), "\u05e9"), ("caf\u00e9", ("caf",), "\u00e9")):
        said = pipe.notice(prompt)
        assert "T5 does not know" in said and strange in said and said.isprintable()
        assert not any(word in said.replace(strange, "") for word in known)
    for prompt in ("", "zxqv", "a\tred \n star", "1 + 1 = 2!", "a\x07\x7fred"):
        assert pipe.notice(prompt) is None
    assert pipe.notice("\ud800") is None                        # of no language: it counts as a question mark


def test_every_prompt_of_the_drawn_world_is_seen_whole_by_t5(pipe):
    metas = [m["prompt"] for task in world.TASKS for m in world.prompts(task, 30)]
    assert not any(pipe.encoders.tokenizers[2].truncated(metas, pipe.t5_length))


def test_nan_weights_are_refused_by_name_when_loaded_and_when_they_arise(run, pipe, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    tensors, about = load_tensors(broken / "mmdit.safetensors")
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_tensors(broken / "mmdit.safetensors", tensors, about)
    with pytest.raises(ValueError, match="final_layer.linear.bias"):
        Pipeline.from_pretrained(broken, device="cpu")
    with pytest.raises(FloatingPointError):
        draw(pipe, "a star", noise=torch.full((1, 16, 8, 8), float("inf")))


@pytest.mark.parametrize("how, cause", [
    (dict(height=50), "height 50 is not a multiple of 16"), (dict(height="64"), "height 64 is not"),
    (dict(t5_length=2.5), "t5_length is 2.5: give a whole number"), (dict(width=0), "multiple of 16"),
    (dict(width=-16), "multiple of 16"), (dict(steps=0), "steps is 0"), (dict(steps=-3), "whole number"),
    (dict(steps=10**9), "10,000"), (dict(steps=float("inf")), "steps is inf"),
    (dict(steps=float("nan")), "steps is nan"), (dict(method="ddim"), "euler"), (dict(output="jpeg"), "pil"),
    (dict(guidance=float("nan")), "guidance is nan"), (dict(guidance=float("inf")), "guidance is inf"),
    (dict(seed=-1), "seed is -1"), (dict(seed=2**63), "seed is 9"), (dict(seed=2**64), "seed is 1"),
    (dict(seed=[1, 2]), "a list of 1"), (dict(seed=[]), "a list of 1"),
    (dict(noise=torch.zeros(1, 4, 8, 8)), "noise"), (dict(height=16 * 40), "positions"),
    (dict(negative=["a", "b"]), "negative"), (dict(image=torch.zeros(1, 3, 32, 64)), "image"),
    (dict(image=torch.zeros(2, 3, 64, 64)), "image"), (dict(drop=["t6"]), "t6"),
    (dict(image=torch.zeros(1, 3, 64, 64), strength=0), "strength"),
])
def test_bad_arguments_raise_one_line_that_names_them(pipe, how, cause):
    with pytest.raises(ValueError, match=cause) as e:
        draw(pipe, "a star", **how)
    assert len(str(e.value).splitlines()) == 1


def test_no_prompts_at_all_are_refused(pipe):
    with pytest.raises(ValueError, match="0 prompts"):
        draw(pipe, [])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1000.0, -3.0])
def test_any_guidance_gives_numbers(pipe, guidance):
    assert draw(pipe, "a star", guidance=guidance).isfinite().all()


@pytest.mark.parametrize("output", ["pil", "tensor"])
def test_what_is_no_number_after_decoding_is_an_error_and_no_black_picture(pipe, output, monkeypatch):
    monkeypatch.setattr(pipe.vae, "decode", lambda z: torch.full((1, 3, 64, 64), float("nan")))
    with pytest.raises(FloatingPointError, match="NaN"):
        draw(pipe, "a star", output=output)


# ----------------------------------------------------------------------------------------------- command line

def test_the_last_run_draws_and_the_png_tells_its_settings(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was asked"))
    sample.main(["a réd ☆ star", "--steps", "2", "-n", "2", "--seed", "8", "--width", "96",
                 "--device", "cpu"])
    paths = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert len(paths) == 2
    with Image.open(paths[1]) as image:
        told = json.loads(image.text["parameters"])
        assert image.size == (96, 64)
    assert (told["prompt"], told["seed"], told["steps"], told["width"], told["method"]) == (
        "a réd ☆ star", 9, 2, 96, "euler")
    sample.main(["a réd ☆ star", "--steps", "2", "-n", "2", "--seed", "8", "--width", "96",
                 "--device", "cpu"])
    again = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert not set(again) & set(paths)                          # the names are new, the pictures are not
    for new, old in zip(again, paths):
        with Image.open(new) as a, Image.open(old) as b:
            assert a.tobytes() == b.tobytes()


def test_several_prompts_are_drawn_one_by_one_each_as_if_it_were_alone(run, tmp_path, capsys):
    def drawn(*prompts):
        sample.main([*prompts, "--model", str(run), "--steps", "2", "-n", "2", "--out", f"{tmp_path}/a/",
                     "--device", "cpu"])
        paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
        return paths, [Image.open(path).tobytes() for path in paths]

    paths, pictures = drawn("a star", "three blue hearts and a ring")
    assert [p.name for p in paths] == [f"{name}-{seed}.png" for name in (
        "a-star", "three-blue-hearts-and-a-ring") for seed in (0, 1)]
    again, alone = drawn("three blue hearts, and a ring", "three blue hearts and a ring")       # of one name
    assert pictures[2:] == alone[2:] and pictures[0] != pictures[2] and len({*paths, *again}) == 8
    with pytest.raises(SystemExit):
        sample.main(["a star", "a ring", "--model", str(run), "--out", str(tmp_path / "x.png")])
    assert "several prompts: give a folder" in capsys.readouterr().err


def test_a_picture_tells_how_to_draw_it_again_and_what_it_tells_of_other_things_does_not_count(
        run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)

    def drawn(*flags):
        sample.main([*map(str, flags), "--device", "cpu"])
        path = Path(capsys.readouterr().out.strip())
        with Image.open(path) as image:
            return path, image.tobytes(), json.loads(image.text["parameters"])

    path, first, told = drawn("a star", "--seed", 5, "--steps", 3, "--width", 48, "--guidance", 2, "--method",
                              "heun", "--drop", "clip_l", "--negative", "-", "--dtype", "bfloat16")
    sample.save_picture(Image.open(path), tmp_path / "changed.png", told | {"out": "elsewhere.png", "n": 3})
    again, second, same = drawn("--like", tmp_path / "changed.png")
    assert again.parent == Path("samples") and first == second and same == told
    older = {k: v for k, v in told.items() if k != "dtype"}
    sample.save_picture(Image.open(path), tmp_path / "older.png", older)
    _, other, but = drawn("a ring", "--like", tmp_path / "older.png", "--steps", 2, "--no-int8")
    assert other != first and but == told | {"prompt": "a ring", "steps": 2, "dtype": None}


@pytest.mark.parametrize("wrong", [
    {"steps": [1]}, {"drop": "t5"}, {"prompt": None}, {"seed": 1.5}, {"dtype": "float8"}, {"method": "foo"},
    {"steps": "many"}, {"tokenizers": 3}, {"drop": ["t6"]}, {"skip_layers": 3}, {"lora": [3]}])
def test_a_picture_that_tells_what_no_flag_can_be_is_refused_in_one_line(wrong, tmp_path, capsys):
    whole = {"prompt": "a star", "skip_layers": None, "steps": 2, "drop": [], "seed": 3, "int8": False}
    for told in (whole, whole | wrong):
        sample.save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", told)
        if told is whole:
            assert sample.parse(["--like", str(tmp_path / "a.png")]).steps == 2
    with pytest.raises(SystemExit) as end:
        sample.main(["--like", str(tmp_path / "a.png"), "--device", "cpu"])
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_encoders_can_be_dropped_by_several_flags():
    assert sample.parse("a --drop t5 --drop clip_l".split()).drop == ("t5", "clip_l")


def test_what_will_surprise_is_told(run, tmp_path, capsys):
    sample.main(["a star", "--model", str(run), "--device", "cpu", "--out", f"{tmp_path}/", "--steps", "2",
                 "--guidance", "0", "--image", str(data.ASSETS / "emoji.png")])
    said = capsys.readouterr().err
    assert "--guidance 0 weakens the prompt" in said and "--strength 0.6 of 2 steps are all" in said


def test_an_adapter_changes_the_picture_as_much_as_it_is_told_and_is_noted_in_it(run, tmp_path, capsys):
    net = finetune.add_lora(sample.Pipeline.from_pretrained(run, device="cpu").mmdit, 2)
    for layer in finetune.adapters(net).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "odd=0.5.safetensors"
    finetune.save_lora(net, file)

    def drawn(*flags):
        sample.main(["a star", *"--steps 2 --device cpu".split(), "--model", str(run),
                     "--out", f"{tmp_path}/", *map(str, flags)])
        path = Path(capsys.readouterr().out.strip())
        with Image.open(path) as image:
            return np.asarray(image).astype(int), path, json.loads(image.text["parameters"])["lora"]

    plain, changed, none, twice = (drawn(*flags) for flags in (
        (), ("--lora", file), ("--lora", f"{file}=0"), ("--lora", f"{file}=0.5", f"{file}=0.5")))
    assert (plain[0] == none[0]).all() and twice[2] == [f"{file}=0.5"] * 2 and plain[2] == []
    assert abs(twice[0] - changed[0]).max() <= 1 < abs(twice[0] - plain[0]).max()
    assert (drawn("--like", changed[1])[0] == changed[0]).all()
    assert (drawn("--lora", f"{file}=0.5", "--lora", f"{file}=0.5")[0] == twice[0]).all()
    assert drawn("--like", changed[1], "--lora", f"{file}=0")[2] == [f"{file}=0"]
    more = load_file(file) | {"lora_te1_x.lora_down.weight": torch.ones(1, 1)}
    save_file(more, tmp_path / "more.safetensors")
    sample.main(["a star", "--model", str(run), "--steps", "1", "--device", "cpu", "--out", f"{tmp_path}/",
                 "--lora", str(tmp_path / "more.safetensors")])
    assert "more.safetensors has 1 tensors for text encoders, which are left out" in capsys.readouterr().err


def test_a_dry_run_counts_the_last_runs_own_weights_and_draws_nothing(run, pipe, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    before = sorted(Path(".").rglob("*"))
    sample.main(["--dry-run"])
    said = capsys.readouterr().out
    for part in (pipe.mmdit, pipe.vae, pipe.encoders.t5):
        assert f"{sum(p.numel() for p in part.parameters()):,}" in said
    assert "64 x 64 pixels, float32" in said and sorted(Path(".").rglob("*")) == before


def test_two_commands_at_once_draw_into_two_files_and_a_failure_leaves_none(tmp_path, monkeypatch):
    """The second looks for a name before the first has written."""
    monkeypatch.chdir(tmp_path)
    wanted = None, "a star", 0, 1
    with sample.claimed(*wanted) as first, sample.claimed(*wanted) as second:
        for path, colour in ((first, "red"), (second, "blue")):
            sample.save_picture(Image.new("RGB", (16, 16), colour), path, {})
    assert [Image.open(p).getpixel((0, 0)) for p in (first, second)] == [(255, 0, 0), (0, 0, 255)]
    names = iter([first, tmp_path / "late.png"])
    monkeypatch.setattr(sample, "free_path", lambda *_: next(names))
    with pytest.raises(OSError), sample.claimed(*wanted) as third:          # the first is taken meanwhile
        raise OSError("no room")
    assert third == tmp_path / "late.png" and not third.exists() and first.exists()


def test_an_existing_file_is_never_overwritten(run, tmp_path, capsys):
    out = tmp_path / "kept.png"
    out.write_bytes(b"precious")
    with pytest.raises(SystemExit) as end:
        sample.main(["a star", "--model", str(run), "--out", str(out), "--steps", "1"])
    assert end.value.code == 2 and out.read_bytes() == b"precious" and "--out" in capsys.readouterr().err
    (tmp_path / "link.png").symlink_to(tmp_path / "gone" / "x.png")
    with pytest.raises(ValueError, match="exists already"):
        free_path(str(tmp_path / "link.png"), "a star", 0, 1)


@given(st.text(max_size=400), st.integers(0, 2**62))
def test_a_prompt_can_not_choose_its_folder_or_break_the_file_system(prompt, seed):
    path = free_path(None, prompt, seed, 1)
    assert path.parent == Path("samples") and len(path.name.encode()) < 200 and "\0" not in path.name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_prompt_comes_back_from_the_pngs_text(tmp_path, monkeypatch, prompt):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    sample.save_picture(Image.new("RGB", (16, 16)), tmp_path / "x.png", {"prompt": prompt})
    with Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.text["parameters"]) == {"prompt": prompt}


@pytest.mark.parametrize("argv, cause", [
    (["a star"], "python train.py --tiny"), (["a star", "--model", "no/such/run"], "no/such/run"),
    (["a star", "-n", "0"], "-n is 0"), (["a star", "--device", "tpu9"], "--device cpu"),
    (["--like", "none.png"], "--like none.png"),
    (["--like", str(data.ASSETS / "readme.png")], "'parameters'"),
])
def test_without_a_usable_run_one_line_says_what_to_do(argv, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "--device" in argv:
        (tmp_path / "runs" / "x").mkdir(parents=True)
        (tmp_path / "runs" / "x" / "config.json").write_text("{}")
        (tmp_path / "runs" / "x" / "mmdit.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        sample.main(argv)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and cause in said and len(said.splitlines()) == 1
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--height", "50"], ["--seed", "-1"], ["--width", "100000"],
              ["--tokenizers", "."], ["--image", "no.png"], ["--lora", "no.safetensors"],
              ["--lora", "no.safetensors=much"], ["--lora", "no.safetensors=nan"]])
def test_bad_flags_end_with_exit_code_2_and_no_file(run, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        sample.main(["a star", "--model", str(run), "--device", "cpu", *flags])
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "samples").exists()


def test_parts_of_two_runs_are_not_mixed(run, tmp_path):
    from mmdit import MMDiT, MMDiTConfig
    from run_folder import save_part
    from tensor_files import CheckpointError
    mixed = tmp_path / "run"
    shutil.copytree(run, mixed)
    save_part(mixed, "mmdit", MMDiT(MMDiTConfig.preset("tiny", depth=1, pooled_dim=24)))
    with pytest.raises(CheckpointError, match="mixes two runs"):
        Pipeline.from_pretrained(mixed, device="cpu")


def test_pictures_of_a_prompt_have_seeds_of_their_own_however_few_are_drawn_at_once(
        run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "at_once", lambda *_: 2)
    sample.main(["a star", "--model", str(run), "--steps", "1", "-n", "3", "--seed", "5",
                 "--device", "cpu", "--out", f"{tmp_path}/"])
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [p.name for p in paths] == [f"a-star-{seed}.png" for seed in (5, 6, 7)]
    assert len({Image.open(p).tobytes() for p in paths}) == 3


def test_every_setting_of_a_picture_is_taken_over_by_like(tmp_path):
    told = {"negative": "-", "seed": 5, "steps": 3, "guidance": 2.0, "height": 48, "width": 32,
            "method": "heun", "schedule": "clean", "shift": 2.0, "model": "m", "tokenizers": "t",
            "lora": ["f=0.5"], "image": "i.png", "strength": 0.5, "t5_length": 20, "drop": ["clip_l"],
            "left_out": False, "int8": True, "dtype": "bfloat16"}
    sample.save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png",
                        told | {"prompt": "a star", "skip_layers": [2.5, [7, 8, 9]]})
    args = vars(sample.parse(["--like", str(tmp_path / "a.png")]))
    taken = {name: args[name] for name in told}
    assert taken == told | {"dtype": torch.bfloat16, "drop": ("clip_l",)}
    assert args["prompt"] == ["a star"] and args["skip_layer_guidance"] == 2.5
