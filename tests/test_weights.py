"""Claims about weights.py, tensor_files.py and layouts.py: published models are found in every layout, read
strictly and written back bit by bit; what is something else is named.

fixtures/parity has small random models in Stability's layout. What diffusers wrote of the same weights stands
in folder_digests.json as a hash of each tensor, so a folder that is made here can be compared bit by bit with
diffusers' own; manifests/ has keys and shapes of the real files, those of the folders in folders.json (a
range in brackets stands for that many blocks)."""
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import make_fake_checkpoint
import sample
import tensor_files
import weights
from conftest import pickled, refuses
from kernels.int8 import quantise_mmdit, quantise_t5
from layouts import (IGNORED, NAMES, clip_openclip, is_foreign, mmdit_folder, take_apart, vae_folder,
                     why_unknown)
from mmdit import MMDiT, MMDiTConfig
from tensor_files import CheckpointError, Source, files_of_part, write_safetensors, write_shards
from text_encoders import ENCODERS, CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from vae import AutoencoderKL, VAEConfig
from weights import (find_tokenizers, listed, load_clip, load_mmdit, load_t5, load_text_encoders, load_vae,
                     save_mmdit)

PARITY = Path(__file__).parent / "fixtures" / "parity"
MMDITS = ["sd3_medium", "sd3_5_large", "sd3_5_medium"]
DIGESTS = json.loads((PARITY / "folder_digests.json").read_text())
F32 = {"dtype": torch.float32}


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """test_run_folder.py checks that files are flushed; here only their contents matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def equal(module, again):
    a, b = module.state_dict(), again.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def manifest(name):
    """{key: shape} of a real file."""
    if not name.endswith("folder"):
        return json.loads((PARITY / "manifests" / f"{name}.json").read_text())
    shapes = {}
    for key, shape in json.loads((PARITY / "manifests" / "folders.json").read_text())[name].items():
        parts = re.fullmatch(r"(.*)\[(\d+)-(\d+)\](.*)", key)
        numbers = range(int(parts[2]), int(parts[3]) + 1) if parts else ()
        shapes |= {f"{parts[1]}{i}{parts[4]}": shape for i in numbers} if parts else {key: shape}
    return shapes


def small(kind="mmdit", dtype=torch.float16):
    """A random model, small but with the proportions that real files have: heads of 64, groups of 32."""
    torch.manual_seed(0)
    module = {
        "mmdit": lambda: MMDiT(MMDiTConfig(2, context_dim=192, pooled_dim=192, pos_max=6, dual_blocks=1)),
        "vae": lambda: AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)),
        "clip_l": lambda: CLIPTextEncoder(CLIPTextConfig(2014, 64, 2, 1, 96, "quick_gelu")),
        "clip_g": lambda: CLIPTextEncoder(CLIPTextConfig(2014, 128, 2, 2, 96, "gelu", 77, 128)),
        "t5": lambda: T5Encoder(T5Config(56, 192, 2, 3, 64, 96))}[kind]()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return module.to(dtype).eval()


def with_prefix(kind, prefix, dtype=torch.float16):
    return {prefix + k: v.clone() for k, v in small(kind, dtype).state_dict().items()}


def single_file(path, parts=("mmdit", "vae", "clip_l", "clip_g", "t5"), **changes):
    """All parts in one file, as in sd3_medium_incl_clips_t5xxlfp8.safetensors."""
    tensors = {}
    for kind in parts:
        tensors |= with_prefix(kind, weights.PREFIXES[kind][0])
    save_file(tensors | changes, path)
    return path


def loaders(path):
    return {"mmdit": partial(load_mmdit, path), "vae": partial(load_vae, path), "t5": partial(load_t5, path),
            "clip_l": partial(load_clip, path, "clip_l"), "clip_g": partial(load_clip, path, "clip_g")}


# --------------------------------------------------------------------------------------- parity, both layouts

def as_folder(name, folder):
    """A parity model as diffusers would have written it."""
    source = PARITY / name / "single_file.safetensors"
    if name.startswith("mmdit"):
        save_mmdit(load_mmdit(source), folder, layout="folder")
        return folder / "transformer"
    tensors = {}
    for k, t in load_file(source).items():
        recipe = vae_folder(4)(k.removeprefix("first_stage_model."))
        tensors[recipe.keys[0]] = t.flatten(1) if recipe.op == "conv" else t
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.copy(PARITY / name / "config.json", folder / "vae")
    return folder / "vae"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{parity model: its folder in diffusers' layout}"""
    made = {name: as_folder(name, tmp_path_factory.mktemp(name)) for name in DIGESTS}
    for name, folder in made.items():
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert {k: [list(t.shape), digest(t)] for k, t in tensors.items()} == DIGESTS[name]
    return made


def digest(t):
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", DIGESTS)
def test_what_we_write_in_the_folder_layout_is_bit_by_bit_what_diffusers_wrote(folders, name):
    tensors = load_file(folders[name] / "diffusion_pytorch_model.safetensors")
    assert tensors.keys() == DIGESTS[name].keys() and all(digest(t) == DIGESTS[name][k][1]
                                                          for k, t in tensors.items())


@pytest.mark.parametrize("layout", ["single file", "folder"])
@pytest.mark.parametrize("name", MMDITS)
@torch.no_grad()
def test_velocities_agree_with_the_public_implementations_in_both_layouts(folders, name, layout):
    folder = PARITY / f"mmdit_{name}"
    path = folder / "single_file.safetensors" if layout == "single file" else folders[folder.name]
    model, io = load_mmdit(path, **F32), load_file(folder / "io.safetensors")
    v = model(io["latents"], io["timesteps"] / 1000, io["context"], io["pooled"])
    assert error(v, io["velocity"]) < 1e-6


@pytest.mark.parametrize("layout", ["single file", "folder"])
@torch.no_grad()
def test_the_autoencoder_agrees_with_diffusers_in_both_layouts(folders, layout):
    single, io = PARITY / "vae" / "single_file.safetensors", load_file(PARITY / "vae" / "io.safetensors")
    vae = load_vae(single if layout == "single file" else folders["vae"].parent)
    posterior = vae.encode(io["image"])
    assert error(posterior.mean, io["mean"]) < 1e-5 and error(posterior.logvar, io["logvar"]) < 1e-5
    assert error(vae.decode(io["mean"]), io["decoded"]) < 1e-5
    assert (vae.config.shift, vae.config.scale) == (0.0609, 1.5305)


def clip_in(style, name, folder):
    """A parity CLIP in other published styles of keys -> where it is."""
    tensors = load_file(PARITY / name / "model.safetensors")
    shutil.copy(PARITY / name / "config.json", folder)
    if style == "without text_model":
        tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    if style == "with leftovers":
        tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None],
                    "logit_scale": torch.tensor(4.6)}
    if style == "OpenCLIP":
        made = {}
        for k, v in tensors.items():
            recipe = clip_openclip(k)
            made.setdefault((recipe.keys[0], recipe.op == "transpose"), []).append((recipe.op, v))
        tensors = {}
        for (key, transposed), parts in made.items():
            parts = [v for _, v in sorted(parts, key=lambda part: "qkv".find(part[0]))]
            tensors[key] = parts[0].T.contiguous() if transposed else torch.cat(parts)
        tensors["logit_scale"] = torch.tensor(4.6)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("style", ["as it is", "without text_model", "with leftovers", "OpenCLIP"])
@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
@torch.no_grad()
def test_clip_agrees_with_transformers_in_every_style_of_keys(tmp_path, name, style):
    model = load_clip(clip_in(style, name, tmp_path), name, **F32)
    io = load_file(PARITY / name / "io.safetensors")
    penultimate, pooled = model(io["input_ids"])
    assert error(penultimate, io["penultimate"]) < 1e-5 and error(pooled, io["pooled"]) < 1e-5


def test_the_fused_matrix_of_openclip_holds_q_above_k_above_v(tmp_path):
    module = small("clip_g")
    layer = module.text_model.encoder.layers[0].self_attn
    native = load_file(clip_in("OpenCLIP", "clip_g", tmp_path) / "model.safetensors")
    theirs = load_file(PARITY / "clip_g" / "model.safetensors")
    stacked = [theirs[f"text_model.encoder.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(native["transformer.resblocks.0.attn.in_proj_weight"], torch.cat(stacked))
    assert layer.q_proj.weight.shape == (128, 128)


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",),
                                   ("shared.weight", "encoder.embed_tokens.weight")])
@torch.no_grad()
def test_t5_agrees_with_transformers_under_both_names_of_its_table(tmp_path, names):
    tensors = load_file(PARITY / "t5" / "model.safetensors")
    table = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors | {name: table.clone() for name in names}, tmp_path / "model.safetensors")
    shutil.copy(PARITY / "t5" / "config.json", tmp_path)
    model, io = load_t5(tmp_path, **F32), load_file(PARITY / "t5" / "io.safetensors")
    assert error(model(io["input_ids"]), io["last"]) < 1e-5


def test_the_text_encoders_of_a_whole_folder_agree_with_diffusers():
    encoders = load_text_encoders(PARITY / "pipeline", **F32)
    io = load_file(PARITY / "pipeline" / "io.safetensors")
    for i, case in enumerate(json.loads((PARITY / "pipeline" / "cases.json").read_text())[:3]):
        said = encoders([case["prompt"]], case["t5_length"])
        assert error(said.context, io[f"case{i}_context"]) < 1e-5
        assert error(said.pooled, io[f"case{i}_pooled"]) < 1e-5


# ----------------------------------------------------------------------------------- the real keys and shapes

def hollow_file(path, shapes):
    """A file with a real header and a hole in the place of its tensors: takes no room on disk."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return path


hollow = pytest.mark.skipif(os.name == "nt", reason="a file with a hole would take its whole size on Windows")
REAL = {"sd3-medium": "sd3_medium", "sd3.5-medium": "sd3_5_medium", "sd3.5-large": "sd3_5_large"}


@hollow
@pytest.mark.parametrize("layout", ["single_file", "folder"])
@pytest.mark.parametrize("preset", REAL)
def test_real_transformers_are_recognised_and_have_a_place_for_every_key(tmp_path, preset, layout):
    shapes = manifest(f"transformer_{REAL[preset]}_{layout}")
    name = "x.safetensors" if layout == "single_file" else "transformer/diffusion_pytorch_model.safetensors"
    path = hollow_file(tmp_path / name, shapes)
    model = load_mmdit(path if layout == "single_file" else tmp_path, device="meta")
    assert model.config == MMDiTConfig.preset(preset)
    recipe = mmdit_folder(model.config.depth) if layout == "folder" else (
        lambda name: weights.Recipe(("model.diffusion_model." + name,)))
    ours = {k: ("BF16", t.shape) for k, t in model.state_dict().items()}
    assert {k: list(s) for k, (_, s) in listed(ours, recipe).items()} == shapes         # and the way back


@hollow
@pytest.mark.parametrize("layout", ["single_file", "folder"])
def test_the_real_autoencoder_is_recognised_in_both_layouts(tmp_path, layout):
    shapes = manifest(f"vae_{layout}")
    vae = load_vae(hollow_file(tmp_path / "x.safetensors", shapes), device="meta")
    assert vae.config == VAEConfig.preset("sd3") and sum(p.numel() for p in vae.parameters()) == 83_819_683
    recipe = vae_folder(4) if layout == "folder" else (
        lambda name: weights.Recipe(("first_stage_model." + name,)))
    theirs = {}
    for name, t in vae.state_dict().items():
        (key,), op = recipe(name)
        theirs[key] = list(t.shape[:2] if op == "conv" else t.shape)
    assert theirs == shapes


@hollow
def test_real_text_encoders_are_recognised(tmp_path):
    for name in ("clip_l", "clip_g", "t5_xxl"):
        file = "t5xxl_fp16" if name == "t5_xxl" else name
        hollow_file(tmp_path / f"{file}.safetensors", manifest(f"text_{name}"))
    hollow_file(tmp_path / "sd3.5_large.safetensors", manifest("transformer_sd3_5_large_single_file"))
    find = loaders(tmp_path / "sd3.5_large.safetensors")                            # they lie beside it
    assert find["clip_l"](device="meta").config == CLIPTextConfig.preset("clip_l")
    assert find["clip_g"](device="meta").config == CLIPTextConfig.preset("clip_g")
    assert find["t5"](device="meta").config == T5Config.preset("xxl")
    assert "projection" in dict(IGNORED["clip_l"])[r"^text_projection"]             # CLIP-L's is left unread


@hollow
def test_the_wrong_clip_is_refused_by_its_width(tmp_path):
    path = hollow_file(tmp_path / "x.safetensors", manifest("text_clip_g"))
    refuses(lambda: load_clip(path, "clip_l", device="meta"), "1280 wide", "not CLIP-L's text encoder")
    with pytest.raises(ValueError, match="choose clip_l or clip_g"):
        load_clip(path, "clip_h")


# ------------------------------------------------------------------------------------------------ round trips

def tensors_of(path):
    return {k: (v.dtype, v.tolist()) for k, v in load_file(path).items()}


configs = st.builds(
    lambda depth, heads, head_dim, qk_norm, dual, patch: MMDiTConfig(
        depth, heads=heads, head_dim=head_dim if qk_norm else 64, in_channels=2, patch_size=patch,
        context_dim=3, pooled_dim=2, pos_max=3, qk_norm=qk_norm, dual_blocks=min(dual, depth)),
    st.integers(1, 12), st.integers(1, 2), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 12),
    st.integers(1, 2))


@given(configs, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       st.sampled_from([20_000, weights.SHARD]))
def test_any_transformer_comes_back_bit_by_bit_from_and_through_both_layouts(
        tmp_path_factory, config, dtype, shard):
    tmp = tmp_path_factory.mktemp("trip")
    torch.manual_seed(0)
    model = MMDiT(config).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    save_mmdit(model, tmp / "a.safetensors")
    one = load_mmdit(tmp / "a.safetensors")
    save_mmdit(one, tmp / "folder", layout="folder", shard=shard)
    two = load_mmdit(tmp / "folder")
    save_mmdit(two, tmp / "b.safetensors")
    assert equal(model, one) and equal(model, two)
    assert (tmp / "a.safetensors").read_bytes() == (tmp / "b.safetensors").read_bytes()
    found = {**vars(two.config), "heads": two.config.num_heads}
    assert found == {**vars(config), "heads": config.num_heads}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_shards_are_filled_in_order_up_to_the_limit_and_the_index_names_each_tensor_once(
        tmp_path_factory, sizes, most):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.full((n,), i, dtype=torch.float8_e5m2) for i, n in enumerate(sizes)}
    shapes = {key: ("F8_E5M2", t.shape) for key, t in tensors.items()}
    files = write_shards(folder, "model", shapes, iter(tensors.values()), most)
    held = [load_file(f) for f in files]
    assert [key for shard in held for key in sorted(shard, key=lambda k: int(k[1:]))] == list(tensors)
    for shard, after in zip(held, [*held[1:], None]):
        filled = sum(len(t) for t in shard.values())
        assert filled <= most or len(shard) == 1
        assert after is None or filled + len(after[min(after, key=lambda k: int(k[1:]))]) > most
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(f.name for f in files)
    assert files_of_part(folder) == files and list(Source(files).index) != []
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"] == {k: f.name for f, shard in zip(files, held) for k in shard}
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


def test_a_folder_that_holds_other_weights_is_left_alone(tmp_path):
    """Else shards of two models, or an old whole file beside new shards, would be taken for one model."""
    model, path = small(), tmp_path / "transformer"
    save_mmdit(model, tmp_path, layout="folder", shard=200_000)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert len(before) > 4
    for shard in (200_000, 300_000, weights.SHARD):
        refuses(lambda: save_mmdit(model, tmp_path, layout="folder", shard=shard), "holds", "another folder")
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}
    for _ in range(2):                                          # one file takes the place of one file
        save_mmdit(model, tmp_path / "b", layout="folder")
    refuses(lambda: save_mmdit(model, tmp_path / "b", layout="folder", shard=200_000), "holds")
    assert equal(load_mmdit(tmp_path / "b"), model) and equal(load_mmdit(tmp_path), model)


def test_exactly_two_modulations_have_their_halves_exchanged():
    names = [n for n in small().state_dict() if mmdit_folder(2)(n).op == "swap"]
    assert [n.rpartition(".")[0] for n in names[::2]] == [
        "joint_blocks.1.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1"]
    t = torch.arange(4.0)
    assert take_apart(mmdit_folder(2)(names[0]), t)[0].tolist() == [2, 3, 0, 1]


def test_a_compiled_or_changed_transformer_is_not_written(tmp_path):
    model = small()
    model.joint_blocks[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other tensors than its config"):
        save_mmdit(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="choose single_file or folder"):
        save_mmdit(small(), tmp_path / "x.safetensors", layout="diffusers")
    assert not list(tmp_path.iterdir())


def test_a_crash_while_a_model_is_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    shapes = {"a": ("F32", (2,)), "b": ("F32", (2,))}

    def tensors():
        yield torch.zeros(2)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_safetensors(path, shapes, tensors())
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(path, shapes, [torch.zeros(2), torch.zeros(3)])
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_functions_can_be_called_from_checkpoints():
    for name in ("load_mmdit", "load_vae", "load_clip", "load_t5", "load_text_encoders", "save_mmdit"):
        assert getattr(checkpoints, name) is getattr(weights, name)
    assert checkpoints.CheckpointError is CheckpointError


# ------------------------------------------------------------------------------------------- where things are

@pytest.mark.parametrize("kind", NAMES)
def test_every_part_is_found_in_a_single_file_that_has_them_all(tmp_path, kind):
    path = single_file(tmp_path / "sd3_incl_clips_t5.safetensors")
    module = loaders(path)[kind](dtype=torch.float16 if kind != "t5" else torch.float32)
    expected = small(kind, torch.float32).half() if kind != "t5" else small(kind).float()
    assert equal(module, expected) and module.config == expected.config
    again = loaders(tmp_path)[kind](dtype=next(module.parameters()).dtype)             # by the folder's name
    assert equal(again, expected)


@pytest.mark.parametrize("kind", ["mmdit", "vae"])
def test_files_without_prefix_are_found_too(tmp_path, kind):
    save_file(with_prefix(kind, ""), tmp_path / "x.safetensors")
    assert equal(loaders(tmp_path / "x.safetensors")[kind](**F32), small(kind).float())


@pytest.mark.parametrize("where", ["", "text_encoders"])
def test_text_encoders_are_found_beside_a_single_file_the_most_exact_first(tmp_path, where):
    single_file(tmp_path / "sd3.safetensors", ("mmdit", "vae"))
    (tmp_path / where).mkdir(exist_ok=True)
    for kind, name in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5", "t5xxl_fp16")):
        save_file(with_prefix(kind, ""), tmp_path / where / f"{name}.safetensors")
    coarse = {k: v.to(torch.float8_e4m3fn) for k, v in with_prefix("t5", "").items()}
    save_file(coarse, tmp_path / where / "t5xxl_fp8_e4m3fn.safetensors")
    for path in (tmp_path / "sd3.safetensors", tmp_path):
        for kind in ("clip_l", "clip_g", "t5"):
            assert equal(loaders(path)[kind](**F32), small(kind).float())
    alone = loaders(tmp_path / where / "t5xxl_fp8_e4m3fn.safetensors")["t5"]()
    assert not equal(alone, small("t5", torch.bfloat16)) and alone.shared.weight.dtype == torch.bfloat16


def test_a_projection_of_clip_l_counts_in_a_folder_that_has_one_and_not_in_single_files(tmp_path):
    folder = PARITY / "clip_l"
    assert load_clip(folder, "clip_l").config.projection_dim == 16
    extra = {f"text_encoders.clip_l.transformer.{k}": v for k, v in {
        "text_projection.weight": torch.randn(64, 64), "logit_scale": torch.tensor(1.0)}.items()}
    path = single_file(tmp_path / "x.safetensors", ("clip_l", "clip_g"), **extra)
    assert load_clip(path, "clip_l").config.projection_dim is None
    assert load_clip(path, "clip_g").config.projection_dim == 128


def test_a_config_beside_a_single_file_is_not_its_own(tmp_path):
    path = single_file(tmp_path / "sd3.safetensors", ("mmdit", "vae", "clip_l"))
    expected = [weights.config_of(path, part) for part in ("mmdit", "vae", "clip_l")]
    for other in ({"attention_head_dim": 128}, {"attention_head_dim": [5, 10]},
                  {"latent_channels": 16, "shift_factor": 0.1159, "scaling_factor": 0.3611},
                  {"hidden_size": 64, "num_attention_heads": 4}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert [weights.config_of(path, part) for part in ("mmdit", "vae", "clip_l")] == expected


def test_comfyuis_copy_of_t5_with_clips_logit_scale_is_read(tmp_path):
    path = tmp_path / "t5xxl_saved.safetensors"
    save_file(with_prefix("t5", "") | {"logit_scale": torch.tensor(4.6)}, path)
    assert equal(load_t5(path, **F32), small("t5").float())


def test_the_full_clip_of_openai_gives_its_unprojected_text_tower(tmp_path):
    tensors = with_prefix("clip_l", "") | {"vision_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(1),
                                           "visual_projection.weight": torch.zeros(1, 1),
                                           "text_projection.weight": torch.randn(64, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {
        "hidden_size": 64, "num_attention_heads": 4, "hidden_act": "quick_gelu"}}))
    config = load_clip(tmp_path, "clip_l").config
    assert config.projection_dim is None and config.heads == 4


def test_shards_and_variants_of_a_folder_are_found(folders, tmp_path):
    whole = folders["mmdit_sd3_medium"] / "diffusion_pytorch_model.safetensors"
    expected, tensors = load_mmdit(whole), load_file(whole)
    names = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    shard = {k: names[i % 3] for i, k in enumerate(sorted(tensors))}
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name in names:
        save_file({k: v for k, v in tensors.items() if shard[k] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    for path in (tmp_path, folder, index):
        assert equal(load_mmdit(path), expected)
    (folder / names[1]).rename(tmp_path / "lost")
    refuses(lambda: load_mmdit(tmp_path), names[1], "not there", "download")
    index.write_text(json.dumps({"weight_map": shard | {"x": "../lost"}}))
    refuses(lambda: load_mmdit(tmp_path), "not there")
    index.write_text("{}")
    refuses(lambda: load_mmdit(tmp_path), "not a list of shards")
    index.write_text(json.dumps({"weight_map": shard}))     # of shards that did not come
    for name in (names[0], names[2]):
        (folder / name).rename(folder / name.replace("model", "model.fp16"))
    (tmp_path / "lost").rename(folder / names[1].replace("model", "model.fp16"))
    other = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    other.write_text(json.dumps(
        {"weight_map": {k: name.replace("model", "model.fp16") for k, name in shard.items()}}))
    assert equal(load_mmdit(tmp_path), expected)
    index.write_text("version https://git-lfs.github.com/spec/v1")
    assert equal(load_mmdit(tmp_path), expected)
    index.write_text(json.dumps({"weight_map": shard}))
    other.unlink()
    refuses(lambda: load_mmdit(tmp_path), "not there", "download")
    shutil.copy(whole, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert equal(load_mmdit(tmp_path), expected)            # nor does it count beside a whole file
    index.unlink()
    assert equal(load_mmdit(tmp_path), expected)


def test_old_names_of_the_autoencoders_attention_are_known(folders, tmp_path):
    tensors = load_file(folders["vae"] / "diffusion_pytorch_model.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    assert any(".proj_attn." in k for k in tensors)
    assert equal(load_vae(tmp_path / "vae.safetensors"), load_vae(folders["vae"]))


def test_other_models_in_the_folder_do_not_disturb(tmp_path):
    for name in FILES:
        save_file({k: torch.zeros(1) for k in FILES[name]}, tmp_path / f"{name}.safetensors")
    single_file(tmp_path / "sd3.safetensors", ("mmdit", "vae"))
    assert equal(load_mmdit(tmp_path), small()) and equal(load_vae(tmp_path), small("vae").float())


def test_two_models_in_a_folder_must_be_told_apart_by_the_caller(tmp_path):
    for name in "ab":
        single_file(tmp_path / f"{name}.safetensors", ("mmdit",))
    refuses(lambda: load_mmdit(tmp_path), "2 times", "a.safetensors and b.safetensors", "give one")


# ------------------------------------------------------------------------------------------ dtypes and float8

@pytest.mark.parametrize("stored, kind, becomes", [
    (torch.float16, "mmdit", torch.float16), (torch.bfloat16, "mmdit", torch.bfloat16),
    (torch.float32, "mmdit", torch.float32), (torch.float16, "vae", torch.float32),
    (torch.bfloat16, "vae", torch.bfloat16), (torch.float16, "t5", torch.bfloat16),
    (torch.float16, "clip_g", torch.float16), (torch.float64, "clip_l", torch.float32)])
def test_without_a_wish_parts_come_in_the_dtype_that_is_safe_for_them(tmp_path, stored, kind, becomes):
    save_file(with_prefix(kind, "", stored), tmp_path / "x.safetensors")
    module = loaders(tmp_path / "x.safetensors")[kind]()
    assert {t.dtype for t in module.state_dict().values()} == {becomes}
    assert not module.training and not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("kind, smaller", [("mmdit", quantise_mmdit), ("t5", quantise_t5)])
def test_int8_is_made_of_each_tensor_as_it_arrives_with_the_same_bits_as_of_the_whole(good, kind, smaller):
    load = loaders(good[kind][1])[kind]
    small_, whole = load(dtype=torch.bfloat16, int8=True), smaller(load(dtype=torch.bfloat16))
    assert equal(small_, whole) and not any(p.requires_grad for p in small_.parameters())
    assert sum(t.dtype == torch.int8 for t in small_.state_dict().values()) > 6
    assert not any(t.is_meta for t in small_.state_dict().values())
    meta = load(dtype=torch.bfloat16, int8=True, device="meta")
    assert {k: (t.shape, t.dtype) for k, t in meta.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in whole.state_dict().items()}


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_cast(tmp_path, float8):
    save_file({k: v.to(float8) for k, v in with_prefix("t5", "").items()}, tmp_path / "t5xxl_fp8.safetensors")
    module = load_t5(tmp_path / "t5xxl_fp8.safetensors")
    assert all(torch.equal(v, small("t5").state_dict()[k].to(float8).bfloat16())
               for k, v in module.state_dict().items())


@pytest.mark.parametrize("spelling", tensor_files.SCALES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", ["mmdit", "t5"])
def test_scaled_float8_is_multiplied_by_its_scales(tmp_path, kind, rows, spelling):
    exact, tensors = small(kind, torch.float32).state_dict(), {}
    for key, t in exact.items():
        if t.ndim == 2 and key.endswith(".weight"):
            scale = (t.abs().amax(1) if rows else t.abs().max()) / 448
            tensors[key] = (t / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
            tensors[key.removesuffix(".weight") + spelling] = scale
            tensors[key.removesuffix(".weight") + ".scale_input"] = torch.tensor(1.0)
        else:
            tensors[key] = t
    prefix = weights.PREFIXES[kind][0]
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file({prefix + k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    module = loaders(tmp_path / "x.safetensors")[kind](**F32)
    plain = {k: tensors[k].float() for k in exact}
    got = module.state_dict()
    assert all(error(got[k], t) < 0.04 for k, t in exact.items())                   # 3 bits of mantissa
    assert any(error(plain[k], t) > 1 for k, t in exact.items())                    # the scales do matter


def test_scales_of_float8_may_lie_in_another_shard_than_the_weights(tmp_path):
    weight, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.tensor(3.0)
    for i, tensors in enumerate(({"a.weight": weight}, {"a.scale_weight": scale})):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    source = Source([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert (source.read("a.weight") == 3).all() and source.read("a.weight").shape == (4, 4)


@pytest.mark.parametrize("names, kind", [(("a_vae", "b_vae"), "vae"), (("clip_l_a", "clip_l_b"), "clip_l")])
def test_of_two_files_that_may_be_meant_none_is_guessed(tmp_path, names, kind):
    single_file(tmp_path / "sd3.safetensors", ("mmdit",))
    own = with_prefix(kind, "")
    first, other = (tmp_path / f"{name}.safetensors" for name in names)
    save_file(own, first)
    shutil.copy(first, other)                                                       # twice the same
    assert equal(loaders(tmp_path / "sd3.safetensors")[kind](**F32), small(kind).float())
    save_file({k: v + 1 for k, v in own.items()}, other)
    refuses(lambda: loaders(tmp_path / "sd3.safetensors")[kind](), first.name, other.name, "keep one")
    save_file({"x": torch.zeros(10**6)}, other)                                     # larger, and of no use
    assert equal(loaders(tmp_path / "sd3.safetensors")[kind](**F32), small(kind).float())


def test_a_containers_limit_counts_where_it_is_below_the_machines_memory(tmp_path, monkeypatch):
    if not Path("/proc/meminfo").exists():
        pytest.skip("needs Linux")
    cpu = torch.device("cpu")
    monkeypatch.setattr(weights, "CONTAINER", tmp_path)
    whole = weights.free_memory(cpu)                            # no limit is known here
    for name, text in (("max", "3000000\n"), ("current", "2900000\n"),
                       ("stat", "anon 2000000\nactive_file 300000\ninactive_file 500000\nfile 800000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert weights.free_memory(cpu) == 900_000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert weights.free_memory(cpu) > 10 * 900_000


def lengthened(tensors, n=248):
    """A CLIP's tensors, for texts of n tokens."""
    return {k: torch.zeros(n, v.shape[1]) if "position_embedding" in k else v for k, v in tensors.items()}


@pytest.mark.parametrize("kind, own, others", [
    ("clip_l", "clip_l", ["clip_l_hidream", "clip_l_x"]), ("clip_l", "clip_l_fp16", ["clip_l_hidream"]),
    ("vae", "sd3_vae", ["flux_vae", "a_vae"]), ("vae", "a_vae", ["flux_vae"]),
    ("clip_l", "mine [2]_clip_l", ["clip_l", "clip_l_hidream"]),
    ("vae", "mine [2]_vae", ["sd3_vae", "z_vae"])])
def test_among_other_models_files_its_own_is_taken_though_they_are_larger(tmp_path, kind, own, others):
    """mine: as sd-scripts saves what it has fine-tuned, beside the transformer."""
    single_file(tmp_path / "mine [2].safetensors", ("mmdit",))
    (tmp_path / "text_encoders").mkdir()
    right = with_prefix(kind, "")
    there = tmp_path if own.startswith("mine") or kind == "vae" else tmp_path / "text_encoders"
    save_file({k: v.to(torch.float16) for k, v in right.items()}, there / f"{own}.safetensors")
    for name in others:
        other = lengthened(right) if "hidream" in name else {k: v + 1 for k, v in right.items()}
        save_file(other, tmp_path / "text_encoders" / f"{name}.safetensors")
    (tmp_path / f"._{own}.safetensors").write_bytes(b"what macOS puts there")
    save_file({"x": torch.zeros(10 ** 5)}, tmp_path / f"mine [2]_{kind}_lora.safetensors")
    found = loaders(tmp_path / "mine [2].safetensors")[kind](**F32)
    assert equal(found, small(kind).to(torch.float16).float())


def test_a_clip_for_longer_texts_alone_is_named_before_anything_is_read(tmp_path):
    single_file(tmp_path / "sd3.safetensors", ("mmdit",))
    save_file(lengthened(with_prefix("clip_l", "")), tmp_path / "clip_l_hidream.safetensors")
    refuses(loaders(tmp_path / "sd3.safetensors")["clip_l"], "248 tokens", "SD3's has 77")


@pytest.mark.parametrize("part, folder", [("mmdit", "transformer"), ("clip_l", "text_encoder")])
def test_a_folder_of_a_part_with_nothing_but_its_config_hides_no_weights(tmp_path, part, folder):
    single_file(tmp_path / "sd3.safetensors", ("mmdit",))
    save_file(with_prefix("clip_l", ""), tmp_path / "clip_l.safetensors")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / folder / ".DS_Store").touch()
    assert equal(loaders(tmp_path)[part](**F32), small(part).float())


def test_a_number_of_blocks_that_cannot_be_is_refused_at_once(tmp_path):
    tensors = with_prefix("mmdit", "") | {"joint_blocks.99999999.x_block.attn.qkv.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "x.safetensors"), "joint_blocks.99999999", "damaged")


def test_quantised_formats_that_cannot_be_read_are_refused(tmp_path):
    tensors = with_prefix("mmdit", "")
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    save_file(tensors | {key: torch.ones_like(tensors[key], dtype=torch.int8)}, tmp_path / "int8.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "int8.safetensors"), key, "I8", "quantised", "float16")
    blocks = {key: tensors[key].to(torch.float8_e4m3fn), key + "_scale": torch.ones(7, 3)}
    save_file(tensors | blocks, tmp_path / "mx.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "mx.safetensors"), key, "quantised")
    save_file(tensors | {key + ".absmax": torch.ones(4)}, tmp_path / "bnb.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "bnb.safetensors"), key + ".absmax", "quantised")


def test_t5_is_not_given_in_float16(tmp_path):
    save_file(with_prefix("t5", ""), tmp_path / "t5xxl.safetensors")
    refuses(lambda: load_t5(tmp_path / "t5xxl.safetensors", dtype=torch.float16), "overflows", "bfloat16")


def test_numbers_that_do_not_fit_the_dtype_are_named(tmp_path):
    tensors = with_prefix("mmdit", "", torch.float32)
    tensors["final_layer.linear.bias"][3] = 1e6
    save_file(tensors, tmp_path / "x.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "x.safetensors", dtype=torch.float16), "final_layer.linear.bias",
            "too large for torch.float16", "bfloat16")
    assert load_mmdit(tmp_path / "x.safetensors").final_layer.linear.bias[3] == 1e6


# ------------------------------------------------------------------------------------------------- strictness

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{part: (its tensors under a single file's names, the path of such a file)}"""
    made = {}
    for kind in NAMES:
        path = tmp_path_factory.mktemp(kind) / "x.safetensors"
        tensors = with_prefix(kind, weights.PREFIXES[kind][0])
        save_file(tensors, path)
        made[kind] = (tensors, path)
    return made


@pytest.mark.parametrize("kind", NAMES)
def test_every_tensor_is_read_exactly_once(good, kind, monkeypatch):
    tensors, path = good[kind]
    read, get = [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, key: (read.append(self.prefix + key), get(self, key))[1])
    module = loaders(path)[kind]()
    assert sorted(read) == sorted(tensors)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()])


@given(st.sampled_from(sorted(NAMES)), st.data())
def test_a_missing_tensor_is_named(good, tmp_path_factory, kind, data):
    tensors, _ = good[kind]
    key = data.draw(st.sampled_from(sorted(tensors)))
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    stem = key.removeprefix(weights.PREFIXES[kind][0])
    if stem in weights.LAYOUTS[kind]:                       # the one key by which the part is recognised
        refuses(loaders(path)[kind], NAMES[kind], "is not in it")
    elif stem.startswith("final_layer.") or "block.0" in stem or "down.0" in stem:
        refuses(loaders(path)[kind], "lacks " + key, "download is not complete")
    else:                                               # or the depth is found smaller, and its place unknown
        with pytest.raises(CheckpointError, match="lacks|unknown|does not fit"):
            loaders(path)[kind]()


@given(st.sampled_from(sorted(NAMES)), st.booleans())
def test_an_unknown_tensor_is_named(good, tmp_path_factory, kind, inside):
    tensors, _ = good[kind]
    key = weights.PREFIXES[kind][0] * inside + "surplus.weight"
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    save_file(tensors | {key: torch.zeros(1)}, path)
    refuses(loaders(path)[kind], "unknown " + key, "x.safetensors")


@given(st.sampled_from(sorted(NAMES)), st.data())
def test_a_tensor_of_another_shape_is_named(good, tmp_path_factory, kind, data):
    tensors, _ = good[kind]
    key = data.draw(st.sampled_from(sorted(tensors)))
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    t = tensors[key]
    save_file(tensors | {key: t.flatten() if t.ndim > 1 else torch.cat([t, t])}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        loaders(path)[kind]()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(good, tmp_path, bad):
    tensors, _ = good["vae"]
    key = "first_stage_model.decoder.conv_out.bias"
    save_file(tensors | {key: torch.tensor([0, bad, 0]).half()}, tmp_path / "x.safetensors")
    refuses(lambda: load_vae(tmp_path / "x.safetensors"), "decoder.conv_out.bias", "NaN or inf", "damaged")


@pytest.mark.parametrize("kind, key, reason", [
    ("vae", "quant_conv.weight", "SDXL"),
    ("mmdit", "joint_blocks.1.x_block.attn2.ln_q.weight", "without a gap"),
    ("t5", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "UMT5"),
    ("mmdit", "joint_blocks.0._orig_mod.weight", "compiled")])
def test_an_unknown_tensor_comes_with_a_guess(good, tmp_path, kind, key, reason):
    tensors, _ = good[kind]
    save_file(tensors | {weights.PREFIXES[kind][0] + key: torch.zeros(1)}, tmp_path / "x.safetensors")
    refuses(loaders(tmp_path / "x.safetensors")[kind], key, reason)


@pytest.mark.parametrize("key, reason", [
    ("module.joint_blocks.0.x", "distributed"), ("x_embedder.proj.weight.absmax", "quantised"),
    ("x_embedder.proj.weight_scale", "quantised"), ("joint_blocks.0.x_block.attn.ln_k.weight", "QK-norm"),
    ("transformer_blocks.0.attn.norm_added_q.weight", "QK-norm"), ("a.b", "not an SD3 transformer as")])
def test_a_guess_is_about_the_key(key, reason):
    assert reason in why_unknown(key, "mmdit")


@pytest.mark.parametrize("kind", NAMES)
def test_each_ignored_key_has_a_reason_and_is_passed_over(good, tmp_path, kind):
    tensors, _ = good[kind]
    leftovers = {"clip_l": ["text_projection.weight", "logit_scale", "text_model.embeddings.position_ids"],
                 "clip_g": ["logit_scale", "vision_model.pre_layrnorm.bias", "visual.proj", "attn_mask",
                            "visual_projection.weight"],
                 "t5": ["encoder.embed_tokens.weight", "decoder.final_layer_norm.weight", "lm_head.weight"],
                 "mmdit": ["loss.decay", "scaled_fp8", "model_ema.decay", "x_embedder.proj.comfy_quant"],
                 "vae": ["loss.logvar", "decoder.conv_in.input_scale"]}
    extra = {weights.PREFIXES[kind][0] + k: torch.zeros(3) for k in leftovers[kind]}
    save_file(tensors | extra, tmp_path / "x.safetensors")
    assert equal(loaders(tmp_path / "x.safetensors")[kind](**F32), small(kind).float())
    assert all(len(reason) > 8 for _, reason in IGNORED[kind] + IGNORED["all"])


# -------------------------------------------------------------------------------------------------- bad input

@given(st.data())
def test_a_file_cut_short_anywhere_is_refused(good, tmp_path_factory, data):
    whole = good["mmdit"][1].read_bytes()
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 9))])
    refuses(lambda: load_mmdit(path), "x.safetensors", "")


def header(**tensors):
    tensors = {k: {"dtype": "F32", "shape": [2], "data_offsets": v} for k, v in tensors.items()}
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


BAD = {
    "overlapping": (header(a=[0, 8], b=[4, 12]), ("damaged", "download it again")),
    "with a hole": (header(a=[0, 8], b=[12, 20]), ("download it again",)),
    "oversized header": ((2**40).to_bytes(8, "little") + b'{"a":1}', ("not a safetensors file",)),
    "header beyond the end": ((10_000).to_bytes(8, "little") + b'{"a":1}', ("cut short",)),
    "empty": (b"", ("not a safetensors file",)),
    "pickle": (pickled(), ("pickled", "never opened", ".safetensors")),
    "zip": (b"PK\x03\x04" + bytes(99), ("pickled", "never opened")), "gguf": (b"GGUF" + bytes(99), ("GGUF",)),
    "web page": (b"<!DOCTYPE html>", ("web page", "login")),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    "text": (b"Access to it is restricted.\nPlease log in.", ('says "Access to it is restricted. Please log',
                                                              "with a login")),
    "bytes": (b"\xff" * 100, ("not a safetensors file",))}


@pytest.mark.parametrize("data, words", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_files_of_another_kind_are_refused_and_never_unpickled(tmp_path, monkeypatch, name, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    for load in loaders(tmp_path / name).values():
        refuses(load, name, *words)
    assert not (tmp_path / "unpickled").exists()


def test_a_saved_pytorch_model_is_refused(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "model.pt")
    refuses(lambda: load_mmdit(tmp_path / "model.pt"), "pickled")
    (tmp_path / "transformer").mkdir()
    torch.save({}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    refuses(lambda: load_mmdit(tmp_path), "diffusion_pytorch_model.bin", "never opened", "safetensors")


FILES = {
    "FLUX": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "FLUX of diffusers": ["transformer_blocks.0.attn.add_k_proj.weight",
                          "single_transformer_blocks.0.norm.linear.weight"],
    "SDXL": ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight",
             "model.diffusion_model.label_emb.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
    "SDXL of diffusers": ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
                          "add_embedding.linear_1.weight"],
    "SD 1": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "LoRA": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "kohya LoRA": ["lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight"],
    "ControlNet": ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.add_k_proj.weight"]}


@pytest.mark.parametrize("name, words", [
    ("FLUX", "a FLUX model"), ("FLUX of diffusers", "a FLUX model"), ("SDXL", "an SDXL model"),
    ("SDXL of diffusers", "an SDXL model"), ("SD 1", "Stable Diffusion 1 or 2"), ("LoRA", "a LoRA"),
    ("kohya LoRA", "a LoRA"), ("ControlNet", "a ControlNet")])
def test_other_models_are_called_by_their_name(tmp_path, name, words):
    path = tmp_path / "x.safetensors"
    save_file({k: torch.zeros(1) for k in FILES[name]}, path)
    refuses(lambda: load_mmdit(path), words, "an SD3 transformer was expected")
    refuses(lambda: load_mmdit(tmp_path), words)
    refuses(lambda: load_vae(path), words)


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("given_", NAMES)
def test_one_part_in_the_place_of_another_is_called_by_its_name(good, given_, wanted):
    if given_ == wanted:
        return
    is_clip = given_.startswith("clip")
    refuses(loaders(good[given_][1])[wanted], NAMES[wanted], "is not in it",
            "a CLIP text encoder" if is_clip else NAMES[given_])


def test_autoencoders_of_other_models_are_named(tmp_path):
    vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4))
    save_file(vae.state_dict(), tmp_path / "sd.safetensors")
    refuses(lambda: load_vae(tmp_path / "sd.safetensors"), "4 latent channels", "SDXL")
    save_file(small("vae").state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"latent_channels": 16, "scaling_factor": 0.3611}))
    refuses(lambda: load_vae(tmp_path / "diffusion_pytorch_model.safetensors"), "FLUX's autoencoder")


def test_other_kinds_of_t5_are_named(tmp_path):
    tensors = with_prefix("t5", "")
    tensors["encoder.block.0.layer.1.DenseReluDense.wi.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "x.safetensors")
    refuses(lambda: load_t5(tmp_path / "x.safetensors"), "version 1.0")


def test_clip_of_an_unusual_width_needs_its_config(good, tmp_path):
    save_file(load_file(PARITY / "clip_l" / "model.safetensors"), tmp_path / "clip_l.safetensors")
    refuses(lambda: load_clip(tmp_path / "clip_l.safetensors", "clip_l"), "32 wide", "config.json")
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "relu"}')
    refuses(lambda: load_clip(tmp_path / "clip_l.safetensors", "clip_l"), "relu")
    for heads in ('"2"', "null", "0", "-2", "5", "1.0"):
        (tmp_path / "config.json").write_text(f'{{"hidden_size": 32, "num_attention_heads": {heads}}}')
        refuses(lambda: load_clip(tmp_path / "clip_l.safetensors", "clip_l"), "num_attention_heads", "again")
    (tmp_path / "config.json").write_text('{"text_config": null}')
    refuses(lambda: load_clip(tmp_path / "clip_l.safetensors", "clip_l"), "32 wide", "config.json")
    (tmp_path / "config.json").write_text("{")
    refuses(lambda: load_clip(tmp_path / "clip_l.safetensors", "clip_l"), "config.json cannot be read")


def test_missing_paths_and_empty_folders_say_what_to_give(tmp_path):
    refuses(lambda: load_mmdit(tmp_path / "nothing"), "does not exist", "folder of a model")
    refuses(lambda: load_mmdit(tmp_path), "no safetensors files")
    refuses(lambda: load_t5(tmp_path), "t5xxl*.safetensors", "text_encoders/", "put that file", "--drop t5")


def test_too_little_memory_is_told_before_anything_is_read(good, monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 1000)
    monkeypatch.setattr(Source, "read", None)
    refuses(lambda: load_mmdit(good["mmdit"][1]), "0.0 GB in float16 on cpu", "--int8 saves")
    refuses(lambda: load_mmdit(good["mmdit"][1], **F32), "--dtype bfloat16 half")
    refuses(lambda: load_t5(good["t5"][1]), "--drop-t5", "--int8 saves")
    refuses(lambda: load_vae(good["vae"][1]), "0.0 GB are free", "end other programs")
    card = weights.not_enough("x", "mmdit", 4e9, torch.bfloat16, torch.device("cuda"), 1e9, None)
    assert "--int8 saves about 2.0 GB of it, --offload block nearly all of it" in str(card)
    card = weights.not_enough("x", "mmdit", 4e9, torch.bfloat16, torch.device("cuda"), 1e9, quantise_mmdit)
    assert "--int8" not in str(card) and "--offload block" in str(card)


def test_free_memory_is_known_on_linux():
    free = weights.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50 if sys.platform == "linux" else True


# ------------------------------------------------------------------------------------------------- tokenizers

def test_tokenizers_are_found_in_a_models_folder_or_where_it_is_said(tmp_path):
    texts = json.loads((PARITY / "pipeline" / "tokens.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(PARITY / "pipeline" / "tokenizer" / name, tmp_path / "elsewhere")
    shutil.copy(PARITY / "pipeline" / "tokenizer_3" / "tokenizer.json", tmp_path / "elsewhere")
    single = tmp_path / "x.safetensors"
    single.touch()
    for path, given_ in ((PARITY / "pipeline", None), (single, tmp_path / "elsewhere"),
                         (single, PARITY / "pipeline")):
        toks = find_tokenizers(path, given_)
        for text, expected in texts.items():
            assert [tok(text)[0].tolist() for tok in toks] == [expected[n] for n in ENCODERS]
    assert find_tokenizers(tmp_path / "elsewhere", drop=("clip_l", "t5"))[::2] == [None, None]


def test_a_folder_without_tokenizers_says_what_to_put_there(tmp_path):
    refuses(lambda: find_tokenizers(tmp_path), "CLIP-L", "vocab.json and merges.txt", "--tokenizers")
    shutil.copytree(PARITY / "pipeline" / "tokenizer", tmp_path / "tokenizer")
    refuses(lambda: find_tokenizers(tmp_path / "x.safetensors"), "T5", str(tmp_path / "tokenizer_3"))
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "spiece.model").write_bytes(b"\n\x0e")
    refuses(lambda: find_tokenizers(tmp_path), "spiece.model only", "tokenizer.json", "save_pretrained")
    assert find_tokenizers(tmp_path, drop=("t5",))[2] is None
    (tmp_path / "tokenizer_3" / "tokenizer.json").write_text('{"</s>": 1}')
    refuses(lambda: find_tokenizers(tmp_path), "tokenizer_3", "cannot be used")
    refuses(lambda: find_tokenizers(tmp_path, tmp_path / "nowhere"), "there is no folder")


def test_dropped_encoders_are_neither_looked_for_nor_loaded(tmp_path, monkeypatch):
    single_file(tmp_path / "x.safetensors", ("clip_l", "clip_g"))
    shutil.copytree(PARITY / "pipeline" / "tokenizer", tmp_path / "tokenizer")
    encoders = load_text_encoders(tmp_path, drop=("t5",), widths=(64, 128, 192), **F32)
    said = encoders(["a cat"], t5_length=5)
    assert encoders.t5 is None and said.context.shape == (1, 82, 192) and not said.context[:, 77:].any()
    refuses(lambda: load_text_encoders(tmp_path), "T5")
    single_file(tmp_path / "x.safetensors")
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("read before the tokenizers were looked for"))
    refuses(lambda: load_text_encoders(tmp_path), "no tokenizer for a T5 encoder")


# ------------------------------------------------------------------------------------- the size of real files

@pytest.mark.parametrize("layout", ["single_file", "folder"])
def test_random_models_of_real_layouts_can_be_made_and_drawn_with(tmp_path, layout, monkeypatch, capsys):
    make_fake_checkpoint.main([str(tmp_path), "--config", "small", "--layout", layout, "--dtype", "float16",
                               "--parts", *NAMES])
    for kind, load in loaders(tmp_path).items():
        config = make_fake_checkpoint.CONFIGS["small"][kind]
        if kind == "clip_l" and layout == "single_file":
            config = replace(config, projection_dim=None)       # left unread there, the identity in folders
        assert load().config == config
    path = tmp_path / "small.safetensors" if layout == "single_file" else tmp_path
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    sample.main(["a red star", "--model", str(path), "--device", "cpu", "--offload", "block", "--steps", "2",
                 "--width", "48", "--height", "32"])
    assert Path(capsys.readouterr().out.strip()).is_file()
    make_fake_checkpoint.main([str(tmp_path), "--draw", "block", "--int8", "--steps", "2", "--side", "32"])
    said = capsys.readouterr().out
    assert "--offload block --int8: read in" in said and "32 x 32, 2 steps" in said


def test_made_up_tokenizers_have_the_sizes_and_special_ids_of_the_real_ones(tmp_path):
    make_fake_checkpoint.write_tokenizers(tmp_path, make_fake_checkpoint.CONFIGS["sd3.5-large"])
    clip_l, clip_g, t5 = find_tokenizers(tmp_path)
    assert (clip_l.vocab_size, clip_g.vocab_size, t5.vocab_size) == (49408, 49408, 32100)
    assert (clip_l.bos, clip_l.eos, clip_l.pad, clip_g.pad, t5.eos, t5.pad) == (49406, 49407, 49407, 0, 1, 0)
    assert len((tmp_path / "tokenizer" / "merges.txt").read_text().splitlines()) == 1 + 48_894
    assert t5.tok.token_to_id("<extra_id_0>") == 32099
    words = "a red cat on the zzz"                              # merges do what they say: a word, a token
    assert (clip_l(words)[0] == 49407).nonzero()[0] == 1 + 6 and 2 not in t5(words)


LOAD = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from make_fake_checkpoint import memory
from weights import load_mmdit
load_mmdit(sys.argv[1], device="meta")              # what must be imported is
before = memory("VmRSS")
model = load_mmdit(sys.argv[1])
print(memory("VmHWM") - before)
"""


def test_a_file_is_let_go_before_it_is_mapped_anew(tmp_path, monkeypatch):
    """Two maps of one file count twice on Windows."""
    tensors, opened = {name: torch.ones(3) for name in "abc"}, []
    save_file(tensors, tmp_path / "x.safetensors")
    source, open_file = Source([tmp_path / "x.safetensors"]), tensor_files.open_safetensors
    monkeypatch.setattr(tensor_files, "REOPEN", 0)
    monkeypatch.setattr(tensor_files, "open_safetensors",
                        lambda file: opened.append(source.handle) or open_file(file))
    assert all(torch.equal(source.read(name), tensors[name]) for name in "abc") and opened == [None] * 3


@hollow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the largest memory")
def test_while_a_model_is_read_there_is_never_a_second_copy_of_it(tmp_path):
    config = MMDiTConfig(12, context_dim=64, pooled_dim=64, pos_max=64)
    with torch.device("meta"):
        shapes = {k: list(t.shape) for k, t in MMDiT(config).state_dict().items()}
    path = hollow_file(tmp_path / "x.safetensors", shapes)
    size = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", LOAD, str(path), str(Path(weights.__file__).parent),
                           str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 1.5 * tensor_files.REOPEN and int(done.stdout) < 1.05 * size + tensor_files.REOPEN + 60e6


def test_a_written_config_is_the_published_one_of_sd3_medium():
    told = weights.folder_config(MMDiTConfig.preset("sd3-medium"))
    expected = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
    assert {k: told[k] for k in expected} == expected


@pytest.mark.parametrize("key", ["transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
                                 "lycoris_joint_blocks_0.hada_w1_a", "lycoris_joint_blocks_0.lokr_w2"])
def test_adapters_of_every_make_are_called_loras(key):
    assert "a LoRA" in is_foreign([key])


@pytest.mark.parametrize("key, what", [
    ("control_model.time_embed.0.weight", "a ControlNet"), ("input_hint_block.0.weight", "a ControlNet"),
    ("model.diffusion_model.double_blocks.0.x", "a FLUX"), ("single_blocks.0.linear1.weight", "a FLUX"),
    ("single_transformer_blocks.0.norm.linear.weight", "a FLUX"), ("label_emb.0.0.weight", "an SDXL"),
    ("conditioner.embedders.1.model.ln_final.weight", "an SDXL"), ("add_embedding.linear_1.bias", "an SDXL"),
    ("cond_stage_model.x", "Diffusion 1"), ("model.diffusion_model.input_blocks.0.0.weight", "Diffusion 1"),
    ("down_blocks.1.attentions.0.transformer_blocks.0.x", "Diffusion 1")])
def test_one_key_gives_another_model_away(key, what):
    assert what in is_foreign(["decoder.conv_in.weight", key]) and is_foreign(["down_blocks.1.x"]) is None


def test_a_written_file_says_that_its_tensors_are_pytorchs(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": ("F32", (2,))}, [torch.ones(2)])
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
