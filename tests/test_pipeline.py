"""Claims about drawing with published weights: the pictures of public implementations, from both layouts;
the same bits wherever weights wait; bytes as predicted; one line where something does not fit.

Parity: fixtures/parity/pipeline holds tokenizers, encoders and what diffusers 0.42 and transformers 5.23 made
of prompts; single_io what that pipeline drew with the transformer of mmdit_sd3_5_medium and the autoencoder
of vae: a plain case, one with skip-layer guidance (scale 2.5, layer 1, 0.01 to 0.7), one that begins with a
picture.
"""
import contextlib
import copy
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import flow
import offload
import pipeline
import sample
from checkpoints import load_mmdit, load_text_encoders, load_vae, save_mmdit
from kernels import int8
from mmdit import MMDiT, MMDiTConfig
from pipeline import DEFAULTS, Pipeline, recognise, skipping
from pretended_card import Nothing
from tensor_files import CheckpointError
from text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig

PARITY = Path(__file__).parent / "fixtures" / "parity"
CASES = json.loads((PARITY / "pipeline" / "cases.json").read_text(encoding="utf-8"))
IO, REF = (load_file(PARITY / "pipeline" / f"{name}.safetensors") for name in ("io", "single_io"))
FAST = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def case(i, **changes):
    """The arguments of a Pipeline for a case of the fixtures, beside its prompt."""
    c = CASES[i]
    return dict(negative=c["negative_prompt"], height=c["height"], width=c["width"], steps=c["steps"],
                guidance=c["guidance"], t5_length=c["t5_length"], noise=IO[f"case{i}_noise"]) | changes


def by_hand(t5=True):
    """From single files."""
    mmdit = load_mmdit(PARITY / "mmdit_sd3_5_medium" / "single_file.safetensors", dtype=torch.float32)
    encoders = load_text_encoders(PARITY / "pipeline", dtype=torch.float32, drop=() if t5 else ("t5",),
                                  widths=(32, 48, 80))
    return Pipeline(mmdit, load_vae(PARITY / "vae" / "single_file.safetensors"), encoders, steps=3,
                    size=(64, 96), t5_longest=256)


def shrink(pipe):
    int8.quantise_mmdit(pipe.mmdit)
    int8.quantise_t5(pipe.encoders.t5)


@pytest.fixture(scope="module")
def pipe():
    return by_hand()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The same model as a diffusers folder."""
    folder = tmp_path_factory.mktemp("model") / "sd3"
    shutil.copytree(PARITY / "pipeline", folder)
    save_mmdit(pipe.mmdit, folder, layout="folder")
    (folder / "vae").mkdir()
    shutil.copy(PARITY / "vae" / "single_file.safetensors", folder / "vae" / "model.safetensors")
    shutil.copy(PARITY / "vae" / "config.json", folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.5}')
    return folder


# ---------------------------------------------------------------------------------------- the public pictures

@pytest.mark.parametrize("i", [0, 1, 2])
def test_prompts_become_the_public_implementations_numbers(pipe, i):
    for text, kind in (("prompt", ""), ("negative_prompt", "neg_")):
        said = pipe.encode([CASES[i][text]], CASES[i]["t5_length"])
        assert error(said.context, IO[f"case{i}_{kind}context"]) < 1e-5
        assert error(said.pooled, IO[f"case{i}_{kind}pooled"]) < 1e-5


def test_single_files_draw_the_picture_of_diffusers(pipe):
    assert error(pipe(CASES[0]["prompt"], **case(0), output="latent"), REF["case0_latents"]) < 1e-5
    (image,) = pipe(CASES[0]["prompt"], **case(0), output="tensor")
    assert error(image.permute(1, 2, 0), REF["case0_image"]) < 1e-5


def test_a_folder_draws_the_same_bits_as_single_files(pipe, folder):
    found = Pipeline.from_pretrained(folder, device="cpu")
    found.shift = 3.0
    for i in (0, 1):
        a, b = (p(CASES[i]["prompt"], **case(i), output="tensor") for p in (found, pipe))
        assert torch.equal(a, b)


def test_skip_layer_guidance_is_that_of_diffusers(pipe):
    pipe = copy.copy(pipe)
    plain = pipe(CASES[1]["prompt"], **case(1), output="latent")
    pipe.skip_layers = (2.5, (1,), 0.01, 0.7)
    led = pipe(CASES[1]["prompt"], **case(1), output="latent")
    assert error(led, REF["slg_latents"]) < 1e-5 and error(plain, REF["slg_latents"]) > 1e-2


def test_beginning_with_a_picture_is_that_of_diffusers(pipe):
    how = case(0, seed=7, noise=None, image=REF["img2img_image"].float() / 255, strength=0.6)
    assert error(pipe(CASES[0]["prompt"], **how, output="latent"), REF["img2img_latents"]) < 1e-5


def test_without_t5_zeros_stand_in_its_place_and_left_out_it_has_no_place(pipe):
    zeros, none = pipe.encode(["a star"], 77, ("t5",)), pipe.encode(["a star"], 0)
    assert zeros.context.shape == (1, 154, 80) and none.context.shape == (1, 77, 80)
    assert not zeros.context[:, 77:].any() and torch.equal(zeros.context[:, :77], none.context)
    lean = by_hand(t5=False)
    assert torch.equal(lean.encode(["a star"]).context, zeros.context)
    a, b, c = (pipe("a star", steps=2, output="latent", **how)
               for how in (dict(drop=("t5",)), dict(t5_length=0), {}))
    assert torch.equal(a, lean("a star", steps=2, output="latent"))
    assert error(b, a) > 1e-4 and error(c, a) > 1e-4
    for i, name in enumerate(("clip_l", "clip_g")):
        said = pipe.encode(["a star"], None, (name,))
        assert not said.pooled[:, (0, 16)[i]:(16, 48)[i]].any() and said.pooled.any()


@pytest.mark.parametrize("dropped, tokens", [
    ((), 77 + 80), (("t5",), 77), (("clip_l",), 77 + 80), (("clip_l", "clip_g"), 80), (("clip_g", "t5"), 77),
    (("clip_l", "clip_g", "t5"), 77)])
def test_what_is_left_out_has_no_tokens_as_in_comfyui(pipe, dropped, tokens):
    zeros, left = (pipe.encode(["a star"], 80, dropped, out) for out in (False, True))
    assert zeros.context.shape[1] == 157 and left.context.shape[1] == tokens
    kept = zeros.context[:, 77:] if tokens == 80 else zeros.context[:, :tokens]
    assert torch.equal(left.context, kept) and torch.equal(left.pooled, zeros.pooled)
    pictures = [pipe("a star", steps=1, drop=dropped, left_out=out, t5_length=80, output="latent")
                for out in (False, True)]
    assert torch.equal(*pictures) == (tokens == 157)


def test_a_long_prompt_gets_the_tokens_of_t5_that_it_needs_and_no_more_than_t5_longest(pipe):
    for words in (1, 30, 60, 200):
        prompt = "red " * words
        context = pipe.encode([prompt]).context
        ids = pipe.encoders.tokenizers[2]([prompt], 1000)
        needed = int((ids != 0).sum())
        assert context.shape[1] - 77 == min(256, max(77, needed))
    assert pipe.encode(["red " * 200], 77).context.shape[1] == 154


def test_threads_that_share_a_pipeline_get_each_its_own_text_and_lost_encoders_are_noticed():
    pipe, prompts, interval = by_hand(), ["a red star", "three hearts", "a ring"], sys.getswitchinterval()
    right = {prompt: pipe.encode([prompt], 77).context for prompt in prompts}
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(lambda text: (text, pipe.encode([text], 77).context), prompts * 20))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.allclose(context, right[text], atol=1e-5) for text, context in found)
    pipe.encode(["a ring"], 77)
    pipe.encoders.t5 = None
    assert not pipe.encode(["a ring"], 77).context[:, 77:].any()


def test_equal_texts_are_encoded_once(pipe):
    pipe, seen = by_hand(), []
    pipe.encoders.t5.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    a = pipe(["a star", "a star", "a ring"], steps=1, output="latent", seed=[1, 1, 1])
    assert seen == [3]                                          # with the negative, ""
    assert torch.allclose(a[0], a[1], atol=1e-5) and not torch.allclose(a[0], a[2], atol=1e-5)
    pipe(["a star", "a ring"], steps=1, output="latent")
    assert seen == [3]
    pipe(["a star", "a ring"], steps=1, output="latent", negative="blue", t5_length=80)
    assert seen == [3, 3]


@pytest.fixture(scope="module")
def stability():
    """{prefix in a single file of Stability's: part} of a small model."""
    torch.manual_seed(0)
    parts = {"model.diffusion_model.": MMDiT(MMDiTConfig(2, context_dim=192, pooled_dim=192, pos_max=12)),
             "first_stage_model.": AutoencoderKL(VAEConfig(32, (1, 1, 1, 1), 1)),
             "text_encoders.clip_l.transformer.":
                 CLIPTextEncoder(CLIPTextConfig(2014, 64, 2, 1, 128, "quick_gelu")),
             "text_encoders.clip_g.transformer.":
                 CLIPTextEncoder(CLIPTextConfig(2014, 128, 2, 2, 128, "gelu", 77, 128)),
             "text_encoders.t5xxl.transformer.": T5Encoder(T5Config(56, 192, 2, 4, 48, 64))}
    nn.init.normal_(parts["model.diffusion_model."].final_layer.linear.weight)
    return parts


def in_one_file(parts, path, without=()):
    """All parts under their prefixes in one file, tokenizers in folders beside it."""
    save_file({prefix + k: v for prefix, part in parts.items() for k, v in part.state_dict().items()
               if not any(name in prefix for name in without)}, path)
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(PARITY / "pipeline" / name, path.parent / name)
    return path


def test_in_single_stability_files_everything_is_found(stability, tmp_path):
    path = in_one_file(stability, tmp_path / "sd3.5_large_turbo.safetensors")
    found = Pipeline.from_pretrained(path, device="cpu")
    assert (found.steps, found.guidance, found.shift, found.size) == (4, 1.0, 3.0, (192, 192))
    mmdit, vae, clip_l, clip_g, t5 = stability.values()
    words = load_text_encoders(PARITY / "pipeline").tokenizers
    expected = Pipeline(mmdit, vae, pipeline.TextEncoders(clip_l, clip_g, t5, words), steps=4, guidance=1.0)
    how = dict(height=64, width=48, output="tensor", seed=2)
    assert torch.equal(found("a red star", **how), expected("a red star", **how))


@pytest.mark.parametrize("dropped", [("clip_l",), ("clip_g",), ("clip_l", "clip_g"), ("clip_l", "t5"),
                                     ("clip_l", "clip_g", "t5")])
def test_dropped_encoders_need_not_be_there_and_give_the_picture_of_zeros(stability, tmp_path, dropped):
    path = in_one_file(stability, tmp_path / "x.safetensors", without=dropped)
    lean = Pipeline.from_pretrained(path, device="cpu", drop=dropped)
    assert [name for name in offload.ENCODERS if getattr(lean.encoders, name) is None] == list(dropped)
    mmdit, vae, *encoders = stability.values()
    whole = Pipeline(mmdit, vae, pipeline.TextEncoders(*encoders, load_text_encoders(
        PARITY / "pipeline").tokenizers))
    how = dict(height=64, width=48, steps=2, output="latent")
    assert torch.equal(lean("a star", **how), whole("a star", **how, drop=dropped))
    with pytest.raises(CheckpointError, match="is not in it"):
        Pipeline.from_pretrained(path, device="cpu")
    with pytest.raises(ValueError, match="cannot drop"):
        Pipeline.from_pretrained(path, device="cpu", drop=("T5",))


def test_8_bits_move_the_picture_by_less_than_bfloat16_does(pipe):
    off = {}
    for name in ("int8", "bfloat16"):
        changed = by_hand()
        if name == "int8":
            shrink(changed)
        else:
            changed.mmdit, changed.encoders = changed.mmdit.bfloat16(), changed.encoders.bfloat16()
        (image,) = changed(CASES[0]["prompt"], **case(0), output="tensor")
        off[name] = error(image.permute(1, 2, 0), REF["case0_image"])
    print("; ".join(f"{name}: picture off by {100 * x:.2f} %" for name, x in off.items()))
    assert 1e-5 < off["int8"] < off["bfloat16"] < 0.02


# -------------------------------------------------------------------------------------- defaults by the model

@pytest.mark.parametrize("config, path, name", [
    (MMDiTConfig.preset("sd3-medium"), "x.safetensors", "sd3-medium"),
    (MMDiTConfig.preset("sd3.5-medium"), "x.safetensors", "sd3.5-medium"),
    (MMDiTConfig.preset("sd3.5-large"), "x.safetensors", "sd3.5-large"),
    (MMDiTConfig.preset("sd3.5-large"), "a/SD3.5_large_Turbo.safetensors", "sd3.5-large-turbo"),
    (MMDiTConfig.preset("sd3.5-large"), "turbo/x.safetensors", "sd3.5-large"),
    (MMDiTConfig.preset("sd3.5-medium"), "sd3.5m_turbo.safetensors", "sd3.5-medium"),
    (MMDiTConfig.preset("sd3-medium"), "turbo.safetensors", "sd3-medium"),
])
def test_each_published_model_is_recognised_and_has_its_own_defaults(config, path, name):
    assert recognise(config, path) == (name, DEFAULTS[name])
    assert ("skip_layers" in DEFAULTS[name]) == (name == "sd3.5-medium")


def test_defaults_are_those_of_stabilitys_scripts():
    assert DEFAULTS == {
        "sd3-medium": {"steps": 50, "guidance": 5.0},
        "sd3.5-medium": {"steps": 50, "guidance": 5.0, "skip_layers": (2.5, (7, 8, 9), 0.01, 0.2)},
        "sd3.5-large": {"steps": 40, "guidance": 4.5},
        "sd3.5-large-turbo": {"steps": 4, "guidance": 1.0}} and pipeline.T5_LONGEST == 256


def test_pixels_are_rounded_not_cut():
    assert pipeline.to_pil(torch.full((1, 3, 1, 1), 254.6 / 255))[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_folder_of_the_turbo_model_is_told_by_its_config(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_name_or_path": "x/SD-3.5-large-turbo"}')
    assert recognise(MMDiTConfig.preset("sd3.5-large"), tmp_path)[0] == "sd3.5-large-turbo"


@pytest.mark.parametrize("where", [".", "link", "models--stabilityai--stable-diffusion-3.5-large-turbo"])
def test_the_turbo_model_is_told_by_where_it_really_is(where, tmp_path, monkeypatch):
    turbo = tmp_path / "stable-diffusion-3.5-large-turbo"
    hub = tmp_path / "models--stabilityai--stable-diffusion-3.5-large-turbo" / "snapshots" / "ec07796"
    for folder in (turbo, hub):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(turbo)
    monkeypatch.chdir(turbo)
    path = {".": ".", "link": tmp_path / "link"}.get(where, hub)
    assert recognise(MMDiTConfig.preset("sd3.5-large"), path)[0] == "sd3.5-large-turbo"


@pytest.mark.parametrize("file, name, value", [
    ("scheduler/scheduler_config.json", "shift", None), ("scheduler/scheduler_config.json", "shift", "3"),
    ("vae/config.json", "scaling_factor", None), ("vae/config.json", "shift_factor", "x")])
def test_a_damaged_config_is_named_before_large_files_are_read(
        file, name, value, folder, tmp_path, monkeypatch):
    whole = shutil.copytree(folder, tmp_path / "model")
    told = json.loads((whole / file).read_text())
    (whole / file).write_text(json.dumps(told | {name: value}))
    monkeypatch.setattr(pipeline, "load_text_encoders", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match=name):
        Pipeline.from_pretrained(whole, device="cpu")
    (whole / file).write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON .*: download it again"):
        Pipeline.from_pretrained(whole, device="cpu")


def test_the_schedulers_shift_and_the_position_tables_size_are_the_folders(folder):
    pipe = Pipeline.from_pretrained(folder, device="cpu", t5=False)
    assert (pipe.shift, pipe.kind, pipe.size, pipe.encoders.t5) == (2.5, "reference", (256, 256), None)
    assert (pipe.steps, pipe.guidance, pipe.skip_layers, pipe.t5_length) == (40, 4.5, None, 77)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["reference", "clean"]))
def test_layers_are_skipped_strictly_between_the_shares_of_the_steps(steps, begin, end, kind):
    ts = flow.schedule(steps, 3.0, kind)
    found, expected = skipping(ts, 2.5, (7, 8, 9), begin, end), [
        i for i in range(steps) if i > begin * steps and i < end * steps]
    low, high = found[1] if found else (2, -1)
    assert [i for i in range(steps) if low < ts[i] < high] == expected
    assert found is None or (found[0], found[2]) == (2.5, {"skip_layers": (7, 8, 9)})


@given(st.floats(-2, 8), st.floats(-3, 3), st.floats(0, 1))
def test_guidance_leads_away_from_the_handicapped_model_inside_its_window_only(scale, extra, t):
    def model(x, t, y, handicap=1.0):
        return torch.sin(x + y[:, None]) * handicap

    x, yes, no = torch.linspace(-1, 1, 6).view(2, 3), torch.tensor([0.3, 0.7]), torch.tensor([1.0, 2.0])
    led = flow.guided(model, scale, {"y": yes}, {"y": no}, (extra, (0.25, 0.75), {"handicap": 0.5}))
    expected = model(x, t, no) + scale * (model(x, t, yes) - model(x, t, no))
    if 0.25 < torch.tensor(t) < 0.75:
        expected = expected + extra * (model(x, t, yes) - model(x, t, yes, 0.5))
    torch.testing.assert_close(led(x, torch.full((2,), t)), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 60), st.floats(0.001, 1))
@example(10, 0.9)
@example(100, 0.07)
def test_strength_is_the_share_of_the_steps_that_is_left(steps, strength):
    ts = flow.schedule(steps)
    left = flow.part_way(ts, strength)
    assert torch.equal(left, ts[len(ts) - len(left):]) and len(left) >= 2
    assert len(left) - 1 == max(1, math.ceil(round(strength * steps, 9)))       # 10 * 0.9 steps are 9
    assert strength < 1 or left[0] == 1


def test_at_full_strength_a_picture_changes_nothing_and_at_little_it_comes_back(pipe):
    picture = Image.fromarray(REF["img2img_image"][0].permute(1, 2, 0).numpy())
    how = dict(steps=10, height=64, width=96, output="latent")
    plain = pipe("a star", **how)
    assert torch.equal(pipe("a star", **how, image=picture, strength=1.0), plain)
    kept = pipe.latent_of(picture, 1, 64, 96)
    far, near = (error(pipe("a star", **how, image=picture, strength=s), kept) for s in (0.9, 0.1))
    assert near < 0.1 < far


# ------------------------------------------------------------------------------------- where the weights wait

HOW = dict(steps=4, height=64, width=96, output="tensor", seed=3)


def moved(pipe, mode):
    """A copy of the pipeline whose weights wait elsewhere."""
    mmdit, vae, encoders = (copy.deepcopy(part) for part in (pipe.mmdit, pipe.vae, pipe.encoders))
    return Pipeline(mmdit, vae, encoders, t5_longest=256, offload=mode, skip_layers=pipe.skip_layers)


@pytest.mark.parametrize("mode", offload.MODES[1:])
@pytest.mark.parametrize("changes", [{}, {"guidance": 1.0}, {"method": "heun"}, {"drop": ("t5", "clip_l")}])
def test_the_picture_is_the_same_bit_by_bit_wherever_weights_wait(pipe, mode, changes):
    how = HOW | changes
    assert torch.equal(moved(pipe, mode)("a red star", **how), pipe("a red star", **how))


@pytest.mark.parametrize("mode", offload.MODES[1:])
def test_so_it_is_with_skipped_layers_in_8_bits_and_with_a_picture_to_begin_with(pipe, mode):
    pipe = moved(pipe, "none")
    pipe.skip_layers = (2.0, (0,), 0.0, 1.0)
    shrink(pipe)
    how = HOW | dict(image=REF["img2img_image"].float() / 255)
    assert torch.equal(moved(pipe, mode)("a red star", **how), pipe("a red star", **how))


@pytest.mark.parametrize("mode", offload.MODES[1:])
def test_between_and_after_their_turns_the_weights_are_at_home_also_after_an_error(pipe, mode):
    away, present = moved(pipe, mode), []
    parts = {"mmdit": away.mmdit, "vae": away.vae} | {n: getattr(away.encoders, n) for n in offload.ENCODERS}
    home = {name: [t.data_ptr() for t in offload.tensors_of(part)] for name, part in parts.items()}

    def visitors(*_):
        present.append({name for name, part in parts.items()
                        if any(t.data_ptr() != p for t, p in zip(offload.tensors_of(part), home[name]))})

    for part in (away.encoders.clip_l.text_model.final_layer_norm, away.encoders.t5.encoder.final_layer_norm,
                 away.mmdit.final_layer.linear, away.vae.decoder.conv_out):
        part.register_forward_hook(visitors)
    away("a red star", **HOW | dict(steps=1))
    assert present == [{"clip_l"}, {"t5"}, *([set(), set()] if mode == "text" else [{"mmdit"}, {"vae"}])]
    with pytest.raises(FloatingPointError):
        away("a red star", **HOW, noise=torch.full((1, 16, 8, 12), float("nan")))
    with pytest.raises(ValueError, match="positions"):
        away("a red star", **HOW | dict(height=16 * 40))
    assert home == {name: [t.data_ptr() for t in offload.tensors_of(part)] for name, part in parts.items()}


PASSES = st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5).map(sorted), min_size=1, max_size=3)


@given(PASSES)
def test_streamed_blocks_may_be_left_out_in_any_pattern_and_only_two_are_on_the_device(passes):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(3 + 99 * (i == 2), 3 + (i == 1)) for i in range(5)).requires_grad_(False)
    plain, stream = copy.deepcopy(blocks), offload.BlockStream(blocks, "cpu")
    home = [b.weight.data_ptr() for b in blocks]
    assert all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(blocks, plain))
    with stream:
        for chosen in passes:
            for i in chosen:
                x = torch.randn(2, blocks[i].in_features)
                assert torch.equal(blocks[i](x), plain[i](x))
        assert len(stream.places) == 2 and all(len(p) == max(map(len, stream.home)) for p in stream.places)
    assert stream.places is None and home == [b.weight.data_ptr() for b in blocks]
    assert torch.equal(blocks[0](x := torch.randn(2, 3)), plain[0](x))


class Timeline:
    """A stand-in for a CUDA stream that only notes what has to happen before what."""

    def __init__(self, before, log):
        self.before, self.log, self.last = before, log, None

    def add(self, what, after=()):
        self.log.append(what)
        node = len(self.log) - 1
        self.before[node] = {n for n in (self.last, *after) if n is not None}
        self.last = node
        return node

    def wait_event(self, event):
        self.add("wait", [event.node])

    def wait_stream(self, other):
        self.add("wait", [other.last])


@FAST
@given(patterns=PASSES)
def test_on_two_streams_no_block_computes_before_its_copy_is_there_or_while_it_is_overwritten(
        patterns, monkeypatch):
    before, log = {}, []
    main, side = Timeline(before, log), Timeline(before, log)
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(5)).requires_grad_(False)
    stream = offload.BlockStream(blocks, "cpu")

    class Event:
        node = None

        def record(self, timeline):
            copied = ("copy", stream.coming, stream.place)
            self.node = timeline.add(copied if timeline is side else "computed")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stream.cuda = True
    with stream:
        for pattern in patterns:
            for i in pattern:
                place = blocks[i].register_forward_hook(
                    lambda *_, i=i: main.add(("compute", i, stream.used)) and None, prepend=True)
                blocks[i](torch.zeros(1, 3))
                place.remove()

    def earlier(a, b):                                          # must a have happened when b does?
        known, new = set(), {b}
        while new:
            known, new = known | new, set().union(*(before[n] for n in new)) - known
        return a in known

    nodes = {kind: [(n, what[1:]) for n, what in enumerate(log) if what[0] == kind]
             for kind in ("copy", "compute")}
    assert [what[0] for _, what in nodes["compute"]] == [i for pattern in patterns for i in pattern]
    for n, (block, place) in nodes["compute"]:
        copies = [(m, b) for m, (b, p) in nodes["copy"] if p == place and m < n]
        assert copies and copies[-1][1] == block and earlier(copies[-1][0], n)
        overwriting = [m for m, (b, p) in nodes["copy"] if p == place and m > n]
        assert all(earlier(n, m) for m in overwriting[:1])
    if len(patterns[0]) == 5:                                   # nor does the next copy wait for this block
        assert not earlier(nodes["compute"][0][0], nodes["copy"][1][0])


# ------------------------------------------------------------------------------------------ how much it takes

def test_the_meter_counts_what_is_alive_at_once():
    def work(x):
        y = x + 1                           # 4000 beside the input
        z = (y * 2).view(10, 100)           # 8000
        del y                               # 4000
        return z[2:] + z[2:]                # a view is free; 4000 + 3200

    assert offload.count_work(nn.Identity(), lambda x: work(x), ((1000,), torch.float32)) == 4000 + 8000


@given(st.sampled_from([(64, 64), (32, 96)]), st.integers(0, 100), st.booleans())
@FAST
def test_shapes_alone_say_what_the_real_tensors_take(pipe, size, t5_length, guidance):
    configs = {"mmdit": pipe.mmdit.config, "vae": pipe.vae.config} | {
        n: getattr(pipe.encoders, n).config for n in offload.ENCODERS}
    needs = offload.need(configs, height=size[0], width=size[1], t5_length=t5_length, guidance=guidance,
                         dtype=torch.float32)
    for name, part in (("mmdit", pipe.mmdit), ("vae", pipe.vae), ("t5", pipe.encoders.t5)):
        assert needs["weights"][name] == sum(t.nbytes for t in offload.tensors_of(part))
    B, h, w = 1 + guidance, size[0] // 8, size[1] // 8
    inputs = torch.randn(B, 16, h, w), torch.rand(B), torch.randn(B, 77 + t5_length, 80), torch.randn(B, 48)
    meter = offload.Meter([*offload.tensors_of(pipe.mmdit), *inputs])
    with torch.no_grad(), offload.FusedAttention(), meter:      # on the CPU, with numbers
        pipe.mmdit(*inputs)
    given_ = sum(t.nbytes for t in inputs)
    assert abs(needs["work"]["mmdit"] - given_ - meter.peak) <= 0.02 * meter.peak


@pytest.mark.parametrize("name, most", [
    ("sd3-medium", {"": (20, 12, 8, 6)}), ("sd3.5-medium", {"": (22, 12, 8, 6)}),
    ("sd3.5-large", {"": (33, 23, 20, 6), "int8": (24, 15, 12, 6)})])
def test_published_models_are_predicted_to_fit_24_16_and_12_gigabytes(name, most):
    for flag, limits in most.items():
        needs = offload.need(offload.preset_configs(name), height=1024, width=1024, int8=flag == "int8")
        peaks = [needs["peak"][mode] / 1e9 for mode in offload.MODES]
        assert needs["weights"]["t5"] < (5.1e9 if flag == "int8" else 9.6e9)
        assert all(p < limit for p, limit in zip(peaks, limits)) and peaks == sorted(peaks, reverse=True)
    mmdit = {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520}
    assert needs["parameters"] == {
        "mmdit": mmdit[name], "vae": 83_819_683, "clip_l": 123_060_480, "clip_g": 694_659_840,
        "t5": 4_762_310_656}


SMALL = {"mmdit": MMDiTConfig(2, pooled_dim=24, context_dim=64, pos_max=32), "vae": VAEConfig(32, (1, 1), 1),
         "clip_l": CLIPTextConfig(600, 8, 1, 1, 8, "gelu"),
         "clip_g": CLIPTextConfig(600, 16, 1, 1, 8, "gelu"),
         "t5": T5Config(60_000, 64, 1, 2, 32, 64)}


@FAST
@given(st.floats(0.5, 3.0), st.sampled_from(["auto", *offload.MODES]), st.booleans())
def test_auto_takes_the_fastest_that_fits_and_what_does_not_fit_says_what_would(room, mode, eight):
    how = dict(height=64, width=64, int8=eight)
    peak, free = offload.need(SMALL, **how)["peak"], room * offload.OVERHEAD
    fitting = [m for m in offload.MODES if peak[m] <= free]
    if (mode == "auto" and fitting) or mode in fitting:
        assert offload.choose(mode, "it", SMALL, free, eight, height=64, width=64) == (
            fitting[0] if mode == "auto" else mode)
    else:
        with pytest.raises(ValueError) as e:
            offload.choose(mode, "it", SMALL, free, eight, height=64, width=64)
        said = str(e.value)
        assert f"{free / 1e9:.1f} GB are free" in said and len(said.splitlines()) == 1
        assert "--drop-t5" in said and ("--int8" in said) == (not eight)


@FAST
@given(st.floats(0, 1.2), st.booleans(), st.booleans(), st.booleans())
def test_what_main_memory_has_no_room_for_is_told_with_what_each_flag_makes_of_it(room, eight, full, works):
    how = dict(height=64, width=64, dtype=torch.float32 if full else torch.bfloat16)
    needs = offload.need(SMALL, **how, int8=eight)
    taken = sum(needs["weights"].values()) + max(needs["work"].values()) * works
    if room >= 1:
        return offload.check_main_memory("it", SMALL, int(room * taken), eight, works, **how)
    with pytest.raises(ValueError) as e:
        offload.check_main_memory("it", SMALL, int(room * taken), eight, works, **how)
    said = str(e.value)
    assert "main memory" in said and "--drop-t5 makes it 0.0 GB" in said and len(said.splitlines()) == 1
    assert ("--dtype bfloat16" in said) == full and "end other programs" in said
    offload.check_main_memory("it", SMALL, None, eight, works, **how)           # where nobody can tell


def test_t5_visits_block_by_block_so_that_no_mode_but_none_has_all_of_it_on_the_card():
    t5 = T5Config(1000, 64, 8, 2, 32, 256)
    wide = dict(width=256, heads=8, ffn=2048)                   # more than the transformer with its work
    whole, one, none = (
        offload.need(SMALL | {"t5": dataclasses.replace(t5, layers=n, **wide)}, height=64, width=64)
        for n in (8, 2, 1))                                     # the first block comes with the embeddings
    assert one["weights"]["t5"] < 0.4 * whole["weights"]["t5"] and offload.waiting(whole, "text") == sum(
        whole["weights"][name] for name in offload.ENCODERS)
    block = one["weights"]["t5"] - none["weights"]["t5"]
    assert all(whole["peak"][mode] == one["peak"][mode] == none["peak"][mode] + block
               for mode in ("text", "model", "block"))
    encoder, there = T5Encoder(t5).requires_grad_(False), []
    expected = encoder(torch.arange(6)[None])
    blocks = encoder.encoder.block
    home = [{t.data_ptr() for t in offload.tensors_of(block)} for block in blocks]
    offload.Places("text", "cpu", None, SimpleNamespace(clip_l=None, clip_g=None, t5=encoder))
    for block in blocks:
        block.layer[0].layer_norm.register_forward_hook(lambda *_: there.append(
            [not {t.data_ptr() for t in offload.tensors_of(b)} & at for b, at in zip(blocks, home)]))
    assert torch.equal(encoder(torch.arange(6)[None]), expected)
    assert there == [[i in (0, k) for i in range(8)] for k in range(8)]


@pytest.mark.parametrize("parts, n", [(("mmdit",), 4), (("vae",), 3)])
def test_several_pictures_at_once_and_one_to_begin_with_are_in_the_prediction(parts, n):
    one, many = (offload.need(SMALL, height=64, width=64, pictures=k)["work"] for k in (1, n))
    for part in parts:
        assert 0.9 * n < many[part] / one[part] <= n + 0.01 and many["t5"] == one["t5"]
    config = VAEConfig(32, (1, 1, 1), 8)                        # its encoder is the larger half
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    encode = offload.count_work(vae, vae.encode, ((1, 3, 64, 64), torch.float32))
    assert offload.need(SMALL | {"vae": config}, height=64, width=64)["work"]["vae"] >= encode > 0


@pytest.mark.parametrize("size, n, expected", [((64, 96), 40, 16), ((64, 96), 3, 3), ((None, 240), 40, 16),
                                               ((1024, 1024), 5, 1), ((512, 512), 9, 4)])
def test_the_prediction_is_for_as_many_pictures_as_are_drawn_at_once(folder, monkeypatch, size, n, expected):
    asked = []
    monkeypatch.setattr(offload, "check_main_memory",
                        lambda *_, **how: asked.append(how["pictures"]) or 1 / 0)
    monkeypatch.setattr(pipeline, "check_positions", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        Pipeline.from_pretrained(folder, device="cpu", size=size, pictures=n)
    assert asked == [expected] == [min(n, pipeline.at_once(size[0] or 256, size[1], 8))]


def test_too_little_main_memory_is_told_before_anything_is_read(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(pipeline, "load_text_encoders", lambda *a, **k: pytest.fail("read"))
    _, err = run_main(["a star", "--model", folder, "--device", "cpu"], capsys)
    for words in ("GB of main memory in float32", "--dtype bfloat16 makes it", "0.0 GB are free"):
        assert words in err, err


def test_in_float16_the_encoders_are_bfloat16_in_the_prediction_as_in_the_pipeline(folder, tmp_path):
    needs = [offload.need(SMALL, height=64, width=64, dtype=d) for d in (torch.float16, torch.bfloat16)]
    assert needs[0] == needs[1]
    pipe = Pipeline.from_pretrained(folder, device="cpu", dtype=torch.float16)
    kinds = [next(part.parameters()).dtype for part in (pipe.mmdit, pipe.encoders.t5, pipe.vae)]
    assert kinds == [torch.float16, torch.bfloat16, torch.float32]


def test_large_pictures_are_decoded_one_by_one(pipe, monkeypatch):
    seen, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: seen.append(len(z)) or decode(self, z))
    monkeypatch.setattr(pipeline, "TILE", 16)
    latent = torch.randn(5, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    whole = pipe.decode(latent)
    assert seen == [2, 2, 1]
    monkeypatch.setattr(pipeline, "TILE", 4)
    assert torch.allclose(pipe.decode(latent), whole, atol=1e-5) and seen[3:] == [1] * 5


# ------------------------------------------------------------------------------------------- the command line

def run_main(argv, capsys):
    """(what it printed, what it complained about in one line with exit code 2)."""
    try:
        sample.main([str(a) for a in argv])
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) <= 1
    return said.out, said.err


def test_the_command_line_draws_with_a_folder_and_the_png_tells_how(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(REF["img2img_image"][0].permute(1, 2, 0).numpy()).save("begin.png")
    out, err = run_main(["a star", "--model", folder, "--device", "cpu", "--steps", 4, "--image", "begin.png",
                         "--strength", 0.5, "--drop-t5", "--left-out", "--int8", "--offload", "block",
                         "-n", 2, "--schedule", "clean", "--shift", 2, "--skip-layer-guidance", 1.5], capsys)
    paths = out.split()
    assert err.count("\n") == 1 and "this model lacks the layers" in err and len(paths) == 2
    with Image.open(paths[1]) as image:
        told = json.loads(image.text["parameters"])
        assert image.size == (96, 64)
    assert (told["height"], told["width"], told["left_out"], told["drop"], told["seed"], told["strength"],
            told["schedule"], told["shift"], told["int8"]) == (64, 96, True, ["t5"], 1, 0.5, "clean", 2, True)


def test_a_dry_run_needs_no_weights_and_knows_folders_too(folder, capsys):
    out, _ = run_main(["--dry-run", "--model", "sd3.5-large"], capsys)
    for words in ("8,056,627,520", "4,762,310,656", "--int8", "--offload block", "16.29 GB"):
        assert words in out
    out, _ = run_main(["--dry-run", "--model", folder, "--height", 128, "--width", 128, "--drop-t5"], capsys)
    assert "t5" not in out and "128 x 128" in out


@pytest.mark.parametrize("flags, cause", [
    (["--strength", "0", "--image", "begin.png"], "strength is 0"),
    (["--strength", "1.5", "--image", "begin.png"], "strength is 1.5"),
    (["--image", "nothing.png"], "nothing.png"), (["--image", "words.txt"], "words.txt"),
    (["--left-out"], "--drop-t5"), (["--left-out", "--drop", "clip_g"], "--drop clip_l clip_g"),
    (["--drop", "clip"], "clip_l"), (["--offload", "disk"], "block"),
    (["--model", "sd3.5-large"], "--dry-run"), (["--shift", "-1"], "shift"),
    (["--dtype", "int8"], "bfloat16"),
    (["--tokenizers", "nowhere"], "nowhere"), (["--t5-length", "1000"], None), (["--out", "new/"], None),
    (["--dry-run", "--height", "30"], "multiple of 16"), (["--dry-run", "--model", "nothing"], "nothing"),
    (["--dry-run", "--model", "sd3.5-large-turbo"], "sd3.5-large; a turbo"),
])
def test_bad_requests_end_with_one_line_and_exit_code_2(flags, cause, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("begin.png")
    Path("words.txt").write_text("no picture")
    model = [] if "--model" in flags else ["--model", folder]
    out, err = run_main(["a star", *model, "--device", "cpu", "--steps", "1", *flags], capsys)
    if cause is None:                                           # unusual, but it can be drawn
        assert out.strip().endswith(".png") and not err
    else:
        assert cause in err and not Path("samples").exists()


@pytest.mark.parametrize("flags, cause", [
    (["--guidance", "nan"], "nan"), (["--shift", "inf"], "inf"), (["--shift", "0"], "shift"),
    (["--steps", "1000000000"], "10,000"), (["--strength", "0.5"], "--image"),
    (["--strength", "2", "--image", "begin.png"], "strength is 2"), (["--height", "50"], "multiple of 16"),
    (["--t5-length", "1"], "--t5-length is 1"), (["--seed", str(2**64)], "seed is"),
    (["--seed", str(2**63 - 2), "-n", "3"], "seed is"), (["-n", "0"], "-n is 0"),
    (["--out", "x.jpg"], ".png"),
    (["--out", "words.txt/x.png"], "words.txt is no folder"), (["--out", "begin.png"], "exists already"),
    (["--drop", "clip_l", "a ring"], "the prompt comes first"), (["--image", "cut.png"], "cut.png"),
    (["--steps", "3000", "--shift", "3000", "--schedule", "reference"], "shift"),
    (["--image", "."], "a folder"), (["--stpes", "3"], "did you mean --steps?"), ([], "no prompt"),
])
def test_what_is_wrong_whatever_the_weights_is_told_before_they_are_read(
        flags, cause, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    Image.new("RGB", (64, 64)).save("begin.png")
    Path("cut.png").write_bytes(Path("begin.png").read_bytes()[:60])
    Path("words.txt").write_text("no picture")
    before = sorted(Path(".").iterdir())
    out, err = run_main([*["a star"] * bool(flags), "--model", "any", *flags], capsys)
    assert cause in err and not out and sorted(Path(".").iterdir()) == before


def test_a_console_that_cannot_write_a_file_name_costs_no_picture(folder, tmp_path, monkeypatch):
    """As a redirected one on Windows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    sample.main(["\u661f", "-n", "2", "--model", str(folder), "--device", "cpu", "--steps", "1",
                 "--width", "64", "--height", "64"])
    assert len(list(tmp_path.rglob("*.png"))) == 2


@given(st.integers(1024, 9000))
@example(1040)
def test_a_given_square_becomes_the_models_own(side):
    assert sample.fitted(SimpleNamespace(height=side, width=side), 1024, 3072) == (1024, 1024)


@given(st.integers(1, 20_000), st.integers(1, 20_000))
@example(500, 6000)
def test_any_given_picture_becomes_a_size_that_the_model_draws(height, width):
    h, w = sample.fitted(SimpleNamespace(height=height, width=width), 1024, 3072)
    assert h % 16 == w % 16 == 0 and 16 <= min(h, w) and max(h, w) <= 3072 and h * w <= 1024 ** 2
    assert abs(h / w - height / width) < 0.25 * h / w or min(h, w) < 64


def test_a_panorama_is_drawn_on_and_a_side_beyond_the_positions_is_refused_before_weights_are_read(
        folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (6000, 500), "red").save("wide.png")
    how = ["a star", "--model", folder, "--device", "cpu", "--steps", 4]
    out, err = run_main([*how, "--image", "wide.png"], capsys)
    with Image.open(out.strip()) as image:
        assert image.size == (256, 16) and not err
    monkeypatch.setattr(pipeline, "load_text_encoders", lambda *_, **__: pytest.fail("read"))
    for flags in (["--width", 512], ["--image", "wide.png", "--height", 512]):
        assert "exceed this model's positions, which reach 256 a side" in run_main([*how, *flags], capsys)[1]


def test_kernels_that_cannot_run_are_refused_before_weights_are_read(folder, monkeypatch, capsys):
    monkeypatch.setattr("kernels.DEFAULT", "triton")
    monkeypatch.setattr("kernels.device_refuses", lambda device: "there is no GPU")
    monkeypatch.setattr(pipeline, "load_published", lambda *_: pytest.fail("read"))
    assert "there is no GPU" in run_main(["a star", "--model", folder, "--device", "cpu"], capsys)[1]


def test_a_prompt_that_was_taken_for_an_adapter_is_told_from_one_that_is_missing(capsys):
    said = run_main(["--lora", "style.safetensors", "a lighthouse"], capsys)[1]
    assert "a lighthouse: there is no such file; if it is the prompt, write it before the flags" in said


def test_only_paths_are_on_standard_output_and_what_has_no_effect_is_told_beside(
        folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    how = ["--model", folder, "--device", "cpu", "--steps", 1, "--width", 64, "--height", 64]
    sample.main([str(a) for a in ["\u2606 " + "word " * 300, *how, "--guidance", 1, "--negative", "blue"]])
    said = capsys.readouterr()
    assert Path(said.out.strip()).is_file() and len(said.out.splitlines()) == 1
    assert ["too long" in line and "\u2606" in line for line in said.err.splitlines()][0]
    assert "--negative has no effect" in said.err.splitlines()[-1]


def test_pictures_go_into_a_given_folder_under_new_names_each_time(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run_main(["a star", "--model", folder, "--device", "cpu", "--steps", 1, "--width", 64, "--height", 64,
                  "--out", "pictures/", "-n", 2], capsys)
    assert sorted(p.name for p in Path("pictures").iterdir()) == [
        "a-star-0-1.png", "a-star-0.png", "a-star-1-1.png", "a-star-1.png"]


def test_ctrl_c_ends_without_a_traceback_or_half_a_picture(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(SystemExit) as end:
        sample.main(["a star", "--model", str(folder), "--device", "cpu", "--steps", "1", "--width", "64",
                     "--height", "64"])
    assert end.value.code == 130 and not list(Path("samples").iterdir()) and not capsys.readouterr().err


def test_a_picture_to_begin_with_is_cut_not_stretched_upright_and_white_where_transparent(pipe, tmp_path):
    Image.new("RGBA", (64, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert sample.open_picture(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    turned = Image.new("RGB", (64, 32), "red")
    exif = turned.getexif()
    exif[0x0112] = 6                                            # to be turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert sample.open_picture(tmp_path / "turned.jpg").size == (32, 64)
    begin = Image.new("RGB", (192, 64), "red")                  # the outer thirds are not seen
    begin.paste((0, 0, 255), (64, 0, 128, 64))
    blue = Image.new("RGB", (64, 64), (0, 0, 255))
    assert torch.equal(pipe.latent_of(begin, 1, 64, 64), pipe.latent_of(blue, 1, 64, 64))


def test_encoders_of_another_model_are_refused_before_they_are_read(folder, tmp_path, monkeypatch):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    save_mmdit(MMDiT(MMDiTConfig(2, context_dim=80, pooled_dim=40, pos_max=4)), mixed, layout="folder")
    monkeypatch.setattr(pipeline, "load_text_encoders", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="40 pooled numbers"):
        Pipeline.from_pretrained(mixed, device="cpu")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB). Tried to allocate 20.00 GiB on ..."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 20.00 GiB")])
def test_running_out_of_memory_names_the_flags_that_save_some(error, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(flow, "sample", full)
    _, err = run_main(["a star", "--model", folder, "--device", "cpu", "--int8"], capsys)
    assert "20.00 GiB" in err and "--drop-t5" in err and "try --int8" not in err
    ram = "CPUAllocator" in str(error)                          # streaming saves nothing there
    assert ("--offload block" in err, "main memory" in err, "--dtype bfloat16" in err) == (not ram, ram, ram)
    _, err = run_main(["a star", "--model", folder, "--device", "cpu", "--dtype", "bfloat16"], capsys)
    assert "--dtype bfloat16" not in err and "--int8" in err
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device("mps"))        # it shares the CPU's
    advice = sample.out_of_memory(error, sample.parse(["a star", "--model", str(folder)]))
    assert "--offload block" not in advice and "--int8" in advice


def test_a_card_that_only_emulates_bfloat16_gets_float16_for_the_transformer(monkeypatch):
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {old: (7, 5), new: (8, 6)}.get)
    assert (pipeline.half_of(old), pipeline.half_of(new)) == (torch.float16, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", offload.MODES)
def test_on_a_card_pictures_agree_and_the_peak_is_below_the_prediction(pipe, mode):
    card = torch.device("cuda")
    mmdit = MMDiT(dataclasses.replace(pipe.mmdit.config, depth=12, heads=12)).requires_grad_(False)
    for p in mmdit.parameters():                                # 1 GB: twice on the card would be seen
        nn.init.normal_(p, std=0.02)
    expected = Pipeline(mmdit, pipe.vae, pipe.encoders, t5_longest=256)("a red star", **HOW)
    parts = {"mmdit": mmdit, "vae": pipe.vae, "encoders": pipe.encoders}
    parts = {name: copy.deepcopy(part).to(pipeline.home_of(name, mode, card)) for name, part in parts.items()}
    away = Pipeline(**parts, t5_longest=256, offload=mode, device=card)
    configs = {"mmdit": mmdit.config, "vae": pipe.vae.config} | {
        n: getattr(pipe.encoders, n).config for n in offload.ENCODERS}
    predicted = offload.need(configs, height=64, width=96, dtype=torch.float32)["peak"][mode]
    torch.cuda.reset_peak_memory_stats()
    image = away("a red star", **HOW)
    assert torch.cuda.max_memory_allocated() < predicted - offload.OVERHEAD + 64e6      # cuBLAS's own
    assert error(image.cpu(), expected) < 1e-2


# ------------------------------------------------------------------------------- where weights wait, exactly

def test_the_two_places_are_filled_after_earlier_work_and_freed_after_the_last_copy(monkeypatch):
    before, log = {}, []
    main, side = Timeline(before, log), Timeline(before, log)
    stream, waited = offload.BlockStream([nn.Linear(3, 3) for _ in range(3)], "cpu"), []
    for name, value in (("Stream", lambda d: side), ("current_stream", lambda d: main),
                        ("Event", lambda: SimpleNamespace(node=None, record=lambda timeline: None)),
                        ("stream", lambda s: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)
    stream.cuda = True
    monkeypatch.setattr(Timeline, "wait_stream", lambda self, other: waited.append((self, other)))
    monkeypatch.setattr(Timeline, "wait_event", lambda self, event: None)
    with stream:
        assert waited == [(side, main)]         # the allocator may hand out what earlier work still uses
        stream.blocks[0](torch.zeros(1, 3))
    assert waited[1:] == [(main, side)]         # and give away what the last copy still fills


def test_each_block_is_copied_once_a_step_and_after_the_last_comes_the_first_of_the_next():
    stream, sent = offload.BlockStream([nn.Linear(3, 3) for _ in range(3)], "cpu"), []
    stream.fetch = lambda i, fetch=stream.fetch: sent.append(i) or fetch(i)
    with stream:
        for block in stream.blocks * 2:
            block(torch.zeros(1, 3))
    assert sent == [0, 1, 2, 0, 1, 2, 0]


def test_a_copy_to_a_card_is_from_locked_memory_on_its_own_stream_and_nobody_waits_for_it(monkeypatch):
    asked, on, seen, side = [], [], [], Nothing()
    monkeypatch.setattr(offload, "room", lambda n, dtype, locked: asked.append(locked)
                        or torch.empty(n, dtype=dtype))
    stream = [offload.BlockStream([nn.Linear(3, 3)], device) for device in ("cpu", "cuda")][0]
    assert asked == [False, True]

    @contextlib.contextmanager
    def within(other):
        on.append(other)
        yield
        on.pop()

    for name, value in (("Stream", lambda d: side), ("current_stream", Nothing), ("Event", Nothing),
                        ("stream", within)):
        monkeypatch.setattr(torch.cuda, name, value)
    stream.cuda = True
    with stream, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda *_, non_blocking=False: seen.append((*on, non_blocking)))
        stream.fetch(0)
    assert seen == [(side, True)]


@pytest.mark.parametrize("mode, there", [("model", True), ("block", False)])
def test_the_blocks_come_with_the_transformer_or_else_one_by_one(pipe, mode, there):
    away = moved(pipe, mode)
    tensors = offload.tensors_of(away.mmdit.joint_blocks)
    home = [t.data_ptr() for t in tensors]
    with away.places.at_work(away.mmdit):
        assert [t.data_ptr() != p for t, p in zip(tensors, home)] == [there] * len(home)


def test_encoders_are_of_the_told_dtype_in_the_prediction():
    needs = offload.need(SMALL, height=64, width=64, dtype=torch.bfloat16, text_dtype=torch.float32)
    assert all(needs["weights"][name] == 4 * needs["parameters"][name] for name in offload.ENCODERS)
    assert needs["weights"]["mmdit"] < 3 * needs["parameters"]["mmdit"]


def round_numbers(configs, int8=False, dtype=torch.bfloat16, **_):
    """In place of `need`: gigabytes that one can add up."""
    t5, wide = "t5" in configs, 1 + (dtype == torch.float32)
    peak = zip(offload.MODES, (20, 16, 12, 8))
    return {"peak": {mode: (n - int8 - 2 * (not t5)) * 1e9 for mode, n in peak}, "locked": 3e9,
            "weights": {"mmdit": (4 * wide - int8) * 1e9, "clip_l": 1e9, **({"t5": 2e9} if t5 else {})},
            "work": {"mmdit": 1e9, "clip_l": 0.5e9}}


def test_what_does_not_fit_a_card_is_told_with_what_each_flag_makes_of_it(monkeypatch):
    monkeypatch.setattr(offload, "need", round_numbers)
    how = dict(height=64, width=96)
    assert [offload.choose(mode, "it", SMALL, free * 1e9, eight, **how) for mode, free, eight in (
        ("none", 20, False), ("auto", 19.9, False), ("auto", 11, True))] == ["none", "text", "model"]
    both = "--int8 makes it {} GB, --drop-t5 makes it {} GB, --int8 --drop-t5 makes it {} GB"
    for mode, eight, configs, needs, ways in (
            ("auto", False, SMALL, ("block", "8.0"), both.format("7.0", "6.0", "5.0")),
            ("model", False, SMALL, ("model", "12.0"), "--offload block makes it 8.0 GB, "
             + both.format("11.0", "10.0", "9.0")),
            ("model", False, {}, ("model", "10.0"),
             "--offload block makes it 6.0 GB, --int8 makes it 9.0 GB"),
            ("model", True, SMALL, ("model", "11.0"),
             "--offload block makes it 7.0 GB, --drop-t5 makes it 9.0 GB")):
        with pytest.raises(ValueError) as e:
            offload.choose(mode, "it", configs, 4.5e9, eight, **how)
        assert str(e.value) == (
            "it needs {1} GB on the card for 64 x 96 pixels with --offload {0}, and 4.5 GB are free: ".format(
                *needs) + ways + ", a smaller --height and --width need less")


def test_without_a_card_all_parts_count_in_main_memory_and_each_flag_is_told_with_what_it_saves(monkeypatch):
    monkeypatch.setattr(offload, "need", round_numbers)
    for works, mode, taken, ways in (
            (False, "model", 11, (7, 10, 9, 4)), (True, "text", 12, (8, 11, 10, 5)),
            (False, "block", 14, (10, 13, 12, 7))):
        with pytest.raises(ValueError) as e:
            offload.check_main_memory("it", SMALL, 2e9, works=works, mode=mode, dtype=torch.float32)
        flags = "--dtype bfloat16", "--int8", "--drop-t5", "--dtype bfloat16 --int8 --drop-t5"
        assert str(e.value) == (
            f"it needs {taken}.0 GB of main memory in float32, and 2.0 GB are free: "
            + "".join(f"{flag} makes it {n}.0 GB, " for flag, n in zip(flags, ways)) + "end other programs")
    with pytest.raises(ValueError, match="free: --dtype bfloat16 makes it 4.0 GB, end other programs"):
        offload.check_main_memory("it", {}, 2e9, True, mode="model", dtype=torch.float32)


def test_t5_reads_the_prompt_and_what_to_avoid_at_once_in_the_prediction():
    one, two = (offload.need(SMALL, height=64, width=64, guidance=g)["work"]["t5"] for g in (False, True))
    assert one < two


def test_what_a_dry_run_prints_are_the_predictions(monkeypatch):
    how = dict(height=64, width=64, dtype=torch.float16, pictures=2)
    plain, small = offload.need(SMALL, **how), offload.need(SMALL, **how, int8=True)
    monkeypatch.setattr(offload, "GB", 1000)                    # this model is that much smaller
    said = offload.report("it", SMALL, 1500, **how)
    rows = [re.findall(r"(\d+\.\d\d) GB", line) for line in said.splitlines()]
    assert [row for row in rows if row] == [[f"{n / 1000:.2f}" for n in row] for row in (
        *([plain["weights"][part], small["weights"][part], plain["work"][part]] for part in SMALL),
        *([needs["peak"][mode] for mode in offload.MODES] for needs in (plain, small)),
        *([offload.waiting(needs, mode) for mode in offload.MODES[1:]] for needs in (plain, small)), [1500])]
    assert all(f"{n:,}" in said for n in plain["parameters"].values())
    assert "64 pixels, 2 at once, float16, encoders bfloat16, the autoencoder float32;" in said


def test_without_encoders_the_transformer_takes_the_same():
    parts = {name: SMALL[name] for name in ("mmdit", "vae")}
    alone, whole = (offload.need(configs, height=64, width=64) for configs in (parts, SMALL))
    assert alone["work"]["mmdit"] == whole["work"]["mmdit"] and "clip_l" not in alone["weights"]
    weights, work, peak = alone["weights"], alone["work"], alone["peak"]
    assert peak["none"] == peak["text"] == sum(weights.values()) + max(work.values()) + offload.OVERHEAD
    assert peak["model"] == max(weights[part] + work[part] for part in parts) + offload.OVERHEAD
    blocks = [sum(t.nbytes for t in offload.tensors_of(block.bfloat16()))
              for block in MMDiT(SMALL["mmdit"]).joint_blocks]
    two = weights["mmdit"] - sum(blocks) + 2 * max(blocks)
    assert peak["block"] == two + work["mmdit"] + offload.OVERHEAD


def test_in_main_memory_is_what_waits_there_and_locked_blocks_as_powers_of_two():
    needs = offload.need(SMALL, height=64, width=64)
    blocks = [sum(t.nbytes for t in offload.tensors_of(block.bfloat16()))
              for block in MMDiT(SMALL["mmdit"]).joint_blocks]
    weights, locked = needs["weights"], sum(2 ** math.ceil(math.log2(n)) - n for n in blocks)
    assert needs["locked"] == locked > 0
    encoders = sum(weights[name] for name in offload.ENCODERS)
    assert [offload.waiting(needs, mode) for mode in ("text", "model", "block")] == [
        encoders, sum(weights.values()), sum(weights.values()) + locked]


def test_a_byte_too_few_for_weights_and_for_what_computes_is_too_few():
    how = dict(height=64, width=64, dtype=torch.bfloat16)
    needs = offload.need(SMALL, **how)
    taken = sum(needs["weights"].values()) + max(needs["work"].values())
    offload.check_main_memory("it", SMALL, taken, works=True, **how)
    with pytest.raises(ValueError, match="main memory"):
        offload.check_main_memory("it", SMALL, taken - 1, works=True, **how)


def test_where_memory_cannot_be_locked_weights_wait_in_ordinary_memory(monkeypatch):
    empty = torch.empty

    def refuses(*shape, pin_memory=False, **how):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", refuses)
    assert offload.room(3, torch.uint8, locked=True).shape == (3,)


def test_a_block_that_fails_goes_home():
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)).requires_grad_(False)
    stream = offload.BlockStream(blocks, "cpu")
    home = [t.data_ptr() for t in blocks.parameters()]
    with pytest.raises(RuntimeError), stream:
        blocks[1](torch.zeros(1, 4))
    assert home == [t.data_ptr() for t in blocks.parameters()]
    offload.visit_when_called(blocks, "cpu")
    blocks.forward = lambda x: blocks[0](x)
    assert blocks(torch.zeros(1, 3)).shape == (1, 3)
    with pytest.raises(RuntimeError):
        blocks(torch.zeros(1, 4))
    assert home == [t.data_ptr() for t in blocks.parameters()]


def test_blocks_of_an_odd_number_of_bytes_are_streamed_too():
    block, x = int8.Int8Linear(nn.Linear(3, 3).requires_grad_(False)), torch.randn(2, 3)
    expected = block(x)
    with offload.BlockStream([block], "cpu"):
        assert torch.equal(block(x), expected)


def test_full_main_memory_is_known_by_the_words_of_each_system():
    for words in ("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.",        # Windows
                  "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.",
                  "MPS backend out of memory (MPS allocated: 9.00 GB)", "Invalid buffer size: 19.38 GiB"):
        assert offload.is_out_of_memory(RuntimeError(words))
    assert not offload.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_dry_run_counts_what_the_flags_ask_for(monkeypatch):
    asked, flags = [], ["--dry-run", "--model", "sd3-medium", "--height", "512", "--width", "512",
                        "--device", "cpu"]
    monkeypatch.setattr(offload, "report", lambda *_, **how: asked.append(how) or "")
    for more in ((), ("--guidance", "1"), ("-n", "3"), ("--dtype", "float32")):
        sample.main([*flags, *more])
    assert [how["guidance"] for how in asked] == [True, False, True, True]
    assert [how["pictures"] for how in asked] == [1, 1, 3, 1] and pipeline.at_once(512, 512, 8) >= 3
    assert [how["dtype"] for how in asked] == [*[torch.bfloat16] * 3, torch.float32]
