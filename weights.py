"""How is a published model read into these modules? (Our own runs are the business of run_folder.py.)

    Stability's single file                     a diffusers folder             stand-alone files
    sd3.5_large.safetensors                     transformer/*.safetensors      clip_l.safetensors
      model.diffusion_model.joint_blocks...     vae/                           clip_g.safetensors
      first_stage_model.decoder...              text_encoder/, _2/, _3/        t5xxl_fp16.safetensors
      text_encoders.clip_l.transformer...       tokenizer/, _2/, _3/             (beside the single file, or
             |                                         |                          in text_encoders/ there)
             |  names as in our modules                |  a Recipe per parameter          |
             +------------------------------------> module <------------------------------+

`load_mmdit` and its sisters take a file or a folder and find out the rest from shapes: which layout, how
deep, how wide, with or without QK-norm and second attentions. The module is built without memory (on the meta
device), all names and shapes are compared, and only then is each tensor read, once, straight to its device
and dtype. Every parameter is filled exactly once; what else is in a file must be listed in layouts.IGNORED.

What surprises
- SD3 uses CLIP-L's pooled vector before its projection. If a text_encoder/ folder has a projection of
  its own, it applies (the identity, in SD3's); in single and stand-alone files a projection is left unread.
- T5 overflows in float16, as does the autoencoder: unless asked otherwise they become bfloat16 and float32.
- float8 is storage, not arithmetic: it is cast on load, and multiplied by its scale where the file has one.
- int8 (kernels/int8.py) is made of each tensor as it arrives: the model is never there in its full size.
- FLUX's autoencoder has exactly the shapes of SD3's. Only a config.json can tell them apart.
- The table of positions is read like a weight and never computed: diffusers' formula gives another one.

Run `python weights.py`: writes a small model in both layouts, loads both, compares every bit.
"""
import filecmp
import json
import math
import re
from collections import Counter
from glob import escape
from pathlib import Path

import torch

from kernels.int8 import Int8Linear, quantise, quantise_mmdit, quantise_t5
from layouts import (IGNORED, IN_A_FILE, LAYOUTS, NAMES, PREFIXES, Recipe, assemble, describe, is_foreign,
                     mmdit_folder, take_apart, why_unknown)
from mmdit import MMDiT, MMDiTConfig
from tensor_files import (DTYPES, CheckpointError, Source, files_in, files_of_part, read_config, shards,
                          write_json, write_safetensors, write_shards)
from text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder, TextEncoders
from tokens import BOS, EOS, load_clip_tokenizer, load_t5_tokenizer
from vae import AutoencoderKL, VAEConfig

FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
           "t5": "text_encoder_3"}
BESIDE = {"vae": "*vae*.safetensors", "clip_l": "clip_l*.safetensors", "clip_g": "clip_g*.safetensors",
          "t5": "t5xxl*.safetensors"}               # stand-alone files
SHARD = 10 * 10**9                                  # bytes, as diffusers writes them
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".pth")                  # of which only the first are read
CONTAINER = Path("/sys/fs/cgroup")


# ------------------------------------------------------------------------------- which file, in which layout

def pick_part(source, part):
    """(the source, cut down to this part; our names -> Recipes), or None if it has no such part."""
    for prefix in (*PREFIXES[part], ""):
        for sign, layout in LAYOUTS[part].items():
            if prefix + sign in source.index:
                source.select(prefix)
                if prefix and source.path.parent.name != FOLDERS[part]:     # it holds several parts: a
                    source.config = {}                                      # config.json there is another's
                return source, layout(source.count, source.index)
    return None


def candidates(path, part):
    """(folder, the files that may hold the part, each with its shards)."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a .safetensors file or the folder of a model")
    if path.is_file():
        return path.parent, [shards(path) if path.name.endswith(".json") else [path]]
    inside = path / FOLDERS[part]
    if inside.is_dir() and any(p.suffix in WEIGHTS or ".index" in p.name for p in inside.iterdir()):
        return inside, [files_of_part(inside) or files_in(inside)]
    own = files_of_part(path)                       # a folder without weights says nothing of where they are
    return path, [own] if own else [[p] for p in files_in(path)]


def beside(path, folder, part) -> list:
    """[what pick_part gives] of the stand-alone file of a part near a transformer, or [].

    Many may lie there, of other models too. It is the one with the transformer's own name, as sd-scripts
    saves them; else of those that fit SD3 the one whose name says so, else the largest, the most precise."""
    places = folder, folder / "text_encoders"
    found = {}
    for pattern in (f"{escape(path.stem)}_{BESIDE[part]}", BESIDE[part])[path.is_dir():]:
        files = [p for d in places for p in files_in(d, pattern)]
        found = found or {p: x for p in files if (x := pick_part(Source([p], read_config(p.parent)), part))}
    found = {p: x for p, x in found.items() if is_of_sd3(part, *x)} or found
    plain = f"{part}.safetensors", "sd3_vae.safetensors"
    found = {p: x for p, x in found.items() if p.name in plain} or found
    most = max((p.stat().st_size for p in found), default=0)
    largest = [p for p in sorted(found) if p.stat().st_size == most]
    for p in largest[1:]:
        if not filecmp.cmp(largest[0], p, shallow=False):
            raise CheckpointError(f"{largest[0]} and {p} have one size but differ: keep one of them")
    return [found[p] for p in largest[:1]]


def is_of_sd3(part, source, recipe) -> bool:
    """Not a CLIP for longer texts, such as HiDream's, nor an autoencoder of 4 channels, or FLUX's by name."""
    if part == "vae":
        shape = source.shape(recipe("decoder.conv_in.weight")) or ()
        return shape[1:2] != (4,) and "flux" not in source.path.name.lower()
    shape = part != "t5" and source.shape(recipe("text_model.embeddings.position_embedding.weight"))
    return not shape or shape[0] <= 77


def locate(path, part):
    """Find a part in this file, in this folder or beside it. -> what pick_part gives"""
    path = Path(path)
    folder, groups = candidates(path, part)
    sources = [Source(files, read_config(folder)) for files in groups if files]
    what = {source.path.name: describe(source.index) for source in sources}
    foreign = {source.path: kind for source in sources if (kind := is_foreign(source.index))}
    found = [x for source in sources if source.path not in foreign and (x := pick_part(source, part))]
    if len(sources) > 1 and part in BESIDE:             # among many files, only names tell CLIP-L from bigG
        found = [x for x in found if x[0].prefix]
    if not found and part in BESIDE:
        found = beside(path, folder, part)
    if len(found) > 1:
        names = " and ".join(sorted(source.path.name for source, _ in found)[:3])
        raise CheckpointError(f"{path} has {NAMES[part]} {len(found)} times, in {names}: give one of them")
    if not found and len(foreign) == len(sources) > 0:
        raise CheckpointError(f"{next(iter(foreign))} is {next(iter(foreign.values()))}; "
                              f"{NAMES[part]} was expected")
    if not found:
        raise CheckpointError(not_found(path, folder, part, what))
    return found[0]


def not_found(path, folder, part, what) -> str:
    pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in WEIGHTS[1:]]
    if not what and pickled:
        return (f"{folder} has {pickled[0]} but no safetensors file: pickled files can run any code and are "
                "never opened here; get the model as .safetensors")
    holds = "; ".join(f"{name} is {x}" for name, x in list(what.items())[:3]) or "it has no safetensors files"
    near = f", nor is {BESIDE[part]} there or in text_encoders/" if part in BESIDE else ""
    remedy = ("" if part not in BESIDE else ": put that file there" if part == "vae" else
              f": put that file there, or do without it (sample.py --drop {part})")
    return f"{path}: {NAMES[part]} is not in it{near} ({holds}){remedy}"


# ------------------------------------------------------------------------------------ how large: from shapes

def needed(source, recipe, name, dims=2):
    """The shape of one of our tensors, or a CheckpointError."""
    if (shape := source.shape(recipe(name))) is None:
        raise lacks(source, next(k for k in recipe(name).keys if k not in source.index))
    if len(shape) != dims:
        raise CheckpointError(f"{source.path}: {recipe(name).keys[0]} is {shape}, which does not fit: "
                              f"{name} has {dims} dimensions; the file is damaged")
    return shape


def lacks(source, key) -> CheckpointError:
    return CheckpointError(f"{source.path} lacks {source.prefix}{key}: the download is not complete, or the "
                           "file was made for another architecture")


def mmdit_config(source, recipe) -> MMDiTConfig:
    D, C, P, _ = needed(source, recipe, "x_embedder.proj.weight", 4)
    depth = max(source.count("joint_blocks.{}."), source.count("transformer_blocks.{}."))
    norm = source.shape(recipe("joint_blocks.0.context_block.attn.ln_k.weight"))
    head_dim = norm[0] if norm else source.config.get("attention_head_dim", 64)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise CheckpointError(f"{source.path.parent}/config.json: attention_head_dim is {head_dim!r}, not a "
                              "number of channels: get the file again")
    dual = [recipe(f"joint_blocks.{i}.x_block.attn2.qkv.weight") for i in range(depth)]
    return MMDiTConfig(
        depth, None if D == depth * head_dim else D // head_dim, head_dim, C, P,
        needed(source, recipe, "context_embedder.weight")[1],
        needed(source, recipe, "y_embedder.mlp.0.weight")[1],
        math.isqrt(needed(source, recipe, "pos_embed", 3)[1]),
        qk_norm=norm is not None, dual_blocks=sum(source.shape(r) is not None for r in dual))


def vae_config(source, recipe) -> VAEConfig:
    z = needed(source, recipe, "decoder.conv_in.weight", 4)[1]
    if z == 4:
        raise CheckpointError(f"{source.path}: this autoencoder has 4 latent channels, like those of Stable "
                              "Diffusion 1, 2 and SDXL; SD3's has 16")
    c = source.config if source.config.get("latent_channels") == z else {}
    if z == 16 and c.get("scaling_factor") == 0.3611:
        raise CheckpointError(f"{source.path} is FLUX's autoencoder (its scaling factor is 0.3611); "
                              "SD3's has 1.5305")
    shift, scale = c.get("shift_factor", 0.0609), c.get("scaling_factor", 1.5305)
    if not all(isinstance(x, (int, float)) for x in (shift, scale)) or not scale:
        raise CheckpointError(f"{source.path.parent}/config.json: shift_factor {shift!r}, scaling_factor "
                              f"{scale!r}: latents need two numbers, get the file again")
    ch = needed(source, recipe, "encoder.conv_in.weight", 4)[0]
    levels = max(source.count("encoder.down.{}."), source.count("encoder.down_blocks.{}."))
    blocks = max(source.count("encoder.down.0.block.{}."), source.count("encoder.down_blocks.0.resnets.{}."))
    widths = [needed(source, recipe, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    return VAEConfig(ch, tuple(w // ch for w in widths), blocks, z, c.get("norm_num_groups", 32),
                     shift, scale)


def clip_config(source, recipe, which) -> CLIPTextConfig:
    vocab, width = needed(source, recipe, "text_model.embeddings.token_embedding.weight")
    if {"clip_l": 1280, "clip_g": 768}[which] == width:
        raise CheckpointError(f"{source.path} is {width} wide: it is not {NAMES[which]} but the other CLIP's")
    length = needed(source, recipe, "text_model.embeddings.position_embedding.weight")[0]
    if length > 77:
        raise CheckpointError(f"{source.path} is a CLIP for texts of {length} tokens, as HiDream's are; "
                              "SD3's has 77: get SD3's own file")
    c = source.config | (source.config.get("text_config") or {})
    c = c if c.get("hidden_size") == width else {}
    if not c and width % 64:
        raise CheckpointError(f"{source.path} is {width} wide, which does not tell the number of heads: "
                              "put its config.json beside it")
    heads = c.get("num_attention_heads", width // 64)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"{source.path.parent}/config.json: num_attention_heads is {heads!r}, which "
                              f"cannot share {width} channels: get the file again")
    layers = max(source.count(f"{p}.{{}}.") for p in
                 ("text_model.encoder.layers", "encoder.layers", "transformer.resblocks"))
    own = c and not source.count("vision_model.encoder.layers.{}.")     # a folder of the text model alone
    projected = which == "clip_g" or (own and source.shape(recipe("text_projection.weight")))
    eos = c.get("eos_token_id", 2)                          # old configs say 2 where the last id is meant
    return CLIPTextConfig(
        vocab, width, layers, heads,
        needed(source, recipe, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        c.get("hidden_act", "quick_gelu" if which == "clip_l" else "gelu"),
        length,
        needed(source, recipe, "text_projection.weight")[0] if projected else None,
        eos if eos != 2 else 49407 if vocab > 49408 else None)


def t5_config(source, recipe) -> T5Config:
    block = "encoder.block.0.layer."
    if f"{block}1.DenseReluDense.wi.weight" in source.index:
        raise CheckpointError(f"{source.path} is a T5 of version 1.0, without gates; SD3's is T5-v1.1-XXL")
    vocab, width = needed(source, recipe, "shared.weight")
    buckets, heads = needed(source, recipe, f"{block}0.SelfAttention.relative_attention_bias.weight")
    return T5Config(vocab, width, source.count("encoder.block.{}."), heads,
                    needed(source, recipe, f"{block}0.SelfAttention.q.weight")[0] // heads,
                    needed(source, recipe, f"{block}1.DenseReluDense.wi_0.weight")[0], buckets,
                    source.config.get("relative_attention_max_distance", 128))


def config_of(path, part):
    """The config of one of the five parts of published weights, from names and shapes alone."""
    source, recipe = locate(path, part)
    if part in ("clip_l", "clip_g"):
        return clip_config(source, recipe, part)
    return {"mmdit": mmdit_config, "vae": vae_config, "t5": t5_config}[part](source, recipe)


# ------------------------------------------------------------------------------------------- filling a module

def check_names(source, own, part) -> None:
    """own: our names -> (shape, Recipe). CheckpointError unless all are there, in the right shape, and the
    file holds nothing unknown."""
    used = set()
    for name, (shape, recipe) in own.items():
        for key in recipe.keys:
            if key not in source.index:
                raise lacks(source, key)
            _, there, dtype = source.index[key]
            scale = source.scale_key(key)
            if dtype not in DTYPES or (scale and math.prod(source.index[scale][1]) not in (1, there[0])):
                raise CheckpointError(f"{source.path}: {key} is stored as {dtype}, quantised in a way that "
                                      "is not read here: get the float16, bfloat16 or float8 file")
            used |= {key, scale}
        if source.shape(recipe) != tuple(shape):
            raise CheckpointError(f"{source.path}: {source.prefix}{recipe.keys[0]} is {there}, which does "
                                  f"not fit {name} {tuple(shape)} of this model: the file mixes two models")
    ignored = [pattern for pattern, _ in IGNORED[part] + IGNORED["all"]]
    mine = [key for key in source.index if key not in used]
    other_parts = source.others if source.prefix else set(mine)
    unknown = [source.prefix + key for key in mine if not any(re.search(p, key) for p in ignored)]
    unknown += [key for key in sorted(source.others) if not any(re.search(p, key) for p in ignored)]
    for key in unknown:
        if not (key.startswith(IN_A_FILE) and key in other_parts):
            raise CheckpointError(f"{source.path} has an unknown {key}: {why_unknown(key, part)}")


def own_dtype(source, own, part, wanted):
    """The one asked for; else that of most of the file, or one that can be computed with in its place."""
    if wanted is None:
        numbers = Counter()
        for key in (key for _, recipe in own.values() for key in recipe.keys):
            numbers[DTYPES[source.index[key][2]]] += math.prod(source.index[key][1])
        wanted = numbers.most_common(1)[0][0]
        if wanted.itemsize == 1 or (part == "t5" and wanted == torch.float16):
            wanted = torch.bfloat16
        elif wanted == torch.float64 or (part == "vae" and wanted == torch.float16):
            wanted = torch.float32
    if part == "t5" and wanted == torch.float16:
        raise CheckpointError("T5 overflows in float16: ask for bfloat16 or float32")
    return wanted


def free_memory(device):
    """Bytes that are free on a device; None if that is not known."""
    if device.type == "cuda":               # what PyTorch keeps in reserve is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and (info := Path("/proc/meminfo")).is_file():
        whole = int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) * 1024
        return min(whole, room_in_container())
    return None


def room_in_container() -> float:
    """Bytes that the limit of a container leaves (Linux's cgroup, version 2); infinite without a limit. What
    it holds of files can be given up, so it counts as free."""
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text()) for name in ("max", "current"))
        of_files = re.findall(r"^(?:in)?active_file (\d+)$", (CONTAINER / "memory.stat").read_text(), re.M)
        return limit - used + sum(map(int, of_files))
    except (OSError, ValueError):               # none, or its memory.max says "max"
        return math.inf


def not_enough(path, part, need, dtype, device, free, int8) -> CheckpointError:
    saved = need * (1 - 1 / dtype.itemsize) / 1e9
    ways = [f"sample.py --int8 saves about {saved:.1f} GB of it"] * (part in ("mmdit", "t5") and not int8)
    ways += ["--offload block nearly all of it"] * (part == "mmdit" and device.type != "cpu")
    ways += ["--dtype bfloat16 half of it"] * (part != "vae" and dtype == torch.float32)
    ways += ["train.py --fsdp shares it among GPUs"] * (part == "mmdit" and dtype == torch.float32)
    ways += ["--drop-t5 does without it"] * (part == "t5")
    return CheckpointError(
        f"{path}: {NAMES[part]} needs {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} on "
        f"{device}, where {free / 1e9:.1f} GB are free: {', '.join(ways or ['end other programs'])}")


def read_tensor(source, recipe, shape, device, dtype) -> torch.Tensor:
    out = torch.empty(shape, device=device, dtype=dtype)
    row, parts = 0, [source.read(key) for key in recipe.keys]
    for part in parts if recipe.op == "join" else [assemble(recipe.op, parts)]:
        out[row:row + len(part)].copy_(part)
        row += len(part)
    if out.numel() and not torch.stack(out.aminmax()).isfinite().all():
        fits = all(part.float().isfinite().all() for part in parts)
        raise CheckpointError(f"{source.path}: {recipe.keys[0]} " + (
            f"is too large for {dtype}: ask for bfloat16 or float32" if fits else
            "holds NaN or infinity: the file is damaged or its training diverged, get another"))
    return out


def fill(source, recipe, build, config, part, device, dtype, smaller=None, loras=()) -> torch.nn.Module:
    """The module with its tensors from the source, on `device`, ready for use. Everything is compared before
    anything is read; memory never holds more than one tensor beside the model.

    smaller: quantise_mmdit or quantise_t5. loras: finetune.Lora, which change tensors as they are read."""
    device = torch.device(device)
    try:
        with torch.device("meta"):
            module = build(config)
    except (ValueError, RuntimeError, ArithmeticError) as e:
        raise CheckpointError(f"{source.path}: this code does not know such an architecture ({e})") from None
    own = {name: (t.shape, recipe(name)) for name, t in module.state_dict().items()}
    check_names(source, own, part)
    for lora in loras:
        lora.find({name: shape for name, (shape, _) in own.items()}, config.depth)
    dtype = own_dtype(source, own, part, dtype)
    module = (smaller or (lambda module: module))(module.to(dtype)).eval().requires_grad_(False)
    if device.type == "meta":                       # only to compare: nothing is read
        return module
    need, free = sum(t.nbytes for t in module.state_dict().values()), free_memory(device)
    if free is not None and need > free:
        raise not_enough(source.path, part, need, dtype, device, free, smaller)
    in_int8 = {name for name, layer in module.named_modules() if isinstance(layer, Int8Linear)}
    tensors = {}
    try:
        for name, (shape, r) in own.items():
            t, (layer, _, leaf) = read_tensor(source, r, shape, device, dtype), name.rpartition(".")
            for lora in loras:
                lora.change(name, t)
            if layer in in_int8 and leaf == "weight":
                t, tensors[f"{layer}.scale"] = quantise(t)
            tensors[name] = t
    except torch.OutOfMemoryError:
        raise not_enough(source.path, part, need, dtype, device, free_memory(device) or 0, smaller) from None
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def load_mmdit(path, *, device="cpu", dtype=None, int8=False, loras=()) -> MMDiT:
    """The transformer of a file or folder in either layout; CheckpointError if it is something else.

    dtype None: as it is stored (float8 becomes bfloat16). int8: see kernels/int8.py. loras: finetune.Lora,
    each of which adds its change to the weights as these are read. On the device "meta" names and shapes are
    compared but no weights are read, here and in the other four."""
    source, recipe = locate(path, "mmdit")
    return fill(source, recipe, MMDiT, mmdit_config(source, recipe), "mmdit", device, dtype,
                quantise_mmdit if int8 else None, loras)


def load_vae(path, *, device="cpu", dtype=None) -> AutoencoderKL:
    """dtype None: as stored, but float16 becomes float32: in float16 the real one makes black pictures."""
    source, recipe = locate(path, "vae")
    return fill(source, recipe, AutoencoderKL, vae_config(source, recipe), "vae", device, dtype)


def load_clip(path, which, *, device="cpu", dtype=None) -> CLIPTextEncoder:
    """which: "clip_l" or "clip_g". path: file or folder of a model or of this encoder alone."""
    if which not in ("clip_l", "clip_g"):
        raise ValueError(f"no CLIP {which!r}: choose clip_l or clip_g")
    source, recipe = locate(path, which)
    return fill(source, recipe, CLIPTextEncoder, clip_config(source, recipe, which), which, device, dtype)


def load_t5(path, *, device="cpu", dtype=None, int8=False) -> T5Encoder:
    """dtype None: as stored, but float16 and float8 become bfloat16."""
    source, recipe = locate(path, "t5")
    return fill(source, recipe, T5Encoder, t5_config(source, recipe), "t5", device, dtype,
                quantise_t5 if int8 else None)


def load_text_encoders(path, *, device="cpu", dtype=None, drop=(), tokenizers=None, int8=False,
                       widths=(768, 1280, 4096)) -> TextEncoders:
    """The three encoders of a model with their tokenizers.

    dtype: of all three; None: what each one's own function says. drop: names of those not to load; zeros, as
    wide as `widths` says, replace them. tokenizers: a folder, see find_tokenizers. int8: for T5."""
    lengths = (config_of(path, name).context_length for name in ("clip_l", "clip_g") if name not in drop)
    words = find_tokenizers(path, tokenizers, drop, next(lengths, 77))          # before 12 GB are read
    clips = [None if name in drop else load_clip(path, name, device=device, dtype=dtype)
             for name in ("clip_l", "clip_g")]
    t5 = None if "t5" in drop else load_t5(path, device=device, dtype=dtype, int8=int8)
    return TextEncoders(*clips, t5, words, widths)


# ------------------------------------------------------------------------------------------------- tokenizers

def find_tokenizers(path, given=None, drop=(), clip_length=77) -> list:
    """Tokenizers for CLIP-L, bigG and T5, None for those in `drop`.

    From the folder `given`, else the model's: from tokenizer/, tokenizer_2/ and tokenizer_3/ there, or the
    folder itself. CLIP needs vocab.json and merges.txt, or tokenizer.json; both CLIPs have the same
    vocabulary, so one will do. T5 needs tokenizer.json."""
    base = Path(given or path)
    if given and not base.is_dir():
        raise CheckpointError(f"there is no folder {base} with tokenizers")
    base = base if base.is_dir() else base.parent
    clip = next((f for f in (base / "tokenizer", base / "tokenizer_2", base) if knows(f, BOS)), None)
    t5 = next((f for f in (base / "tokenizer_3", base) if knows(f, "</s>")), None)
    found = []
    for name, folder in (("clip_l", clip), ("clip_g", clip), ("t5", t5)):
        if name not in drop and folder is None:
            raise CheckpointError(no_tokenizer(base, name))
        try:
            found.append(None if name in drop else load_t5_tokenizer(folder) if name == "t5" else
                         load_clip_tokenizer(folder, EOS if name == "clip_l" else "!", clip_length))
        except Exception as e:                      # the tokenizers library raises nothing more specific
            raise CheckpointError(f"the tokenizer in {folder} cannot be used ({e}): get it again") from None
    return found


def knows(folder, token) -> bool:
    """Whether this folder has a tokenizer that knows the token."""
    names = ["vocab.json"] * (folder / "merges.txt").is_file() + ["tokenizer.json"]
    files = [folder / name for name in names if (folder / name).is_file()]
    return any(json.dumps(token) in f.read_text(encoding="utf-8", errors="replace") for f in files)


def no_tokenizer(base, name) -> str:
    if name == "t5" and any((folder / "spiece.model").is_file() for folder in (base / "tokenizer_3", base)):
        return (f"{base} has T5's tokenizer as spiece.model only, which is not read here: get its "
                "tokenizer.json, or make it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    what, folder = (("tokenizer.json", "tokenizer_3") if name == "t5" else
                    ("vocab.json and merges.txt, or tokenizer.json,", "tokenizer"))
    return (f"no tokenizer for {NAMES[name]} in {base}; files of weights hold none: put {what} into "
            f"{base / folder}, or name a folder that has it (sample.py --tokenizers)")


# ----------------------------------------------------------------------------------------------------- saving

def folder_config(c: MMDiTConfig) -> dict:
    """transformer/config.json, as diffusers reads it."""
    return {"_class_name": "SD3Transformer2DModel", "sample_size": c.pos_sample * c.patch_size,
            "patch_size": c.patch_size, "in_channels": c.in_channels, "out_channels": c.in_channels,
            "num_layers": c.depth, "attention_head_dim": c.head_dim, "num_attention_heads": c.num_heads,
            "joint_attention_dim": c.context_dim, "caption_projection_dim": c.width,
            "pooled_projection_dim": c.pooled_dim, "pos_embed_max_size": c.pos_max,
            "dual_attention_layers": list(range(c.dual_blocks)), "qk_norm": "rms_norm" if c.qk_norm else None}


def listed(shapes, recipe) -> dict:
    """The shapes for write_safetensors, by the file's keys. shapes: our names -> (dtype's name, shape)."""
    return {key: (dtype, (shape[0] // len(recipe(name).keys), *shape[1:]))
            for name, (dtype, shape) in shapes.items() for key in recipe(name).keys}


def save_mmdit(model: MMDiT, path, layout="single_file", shard=SHARD) -> None:
    """single_file: path is the file. folder: path is a model's folder, in which transformer/ is written, in
    files of at most `shard` bytes of tensors.

    What load_mmdit reads back is equal bit by bit, in either layout."""
    if layout not in ("single_file", "folder"):
        raise ValueError(f"no layout {layout!r}: choose single_file or folder")
    with torch.device("meta"):
        plain = {name: t.shape for name, t in MMDiT(model.config).state_dict().items()}
    own = model.state_dict()
    if {name: t.shape for name, t in own.items()} != plain:
        raise ValueError("this transformer has other tensors than its config says (quantised, wrapped or "
                         "with adapters): save the plain one")
    recipe = mmdit_folder(model.config.depth) if layout == "folder" else (
        lambda name: Recipe((PREFIXES["mmdit"][0] + name,)))
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    shapes = listed({name: (dtypes[t.dtype], t.shape) for name, t in own.items()}, recipe)
    tensors = (part for name, t in own.items() for part in take_apart(recipe(name), t))
    if layout == "single_file":
        return write_safetensors(path, shapes, tensors)
    folder = Path(path, "transformer")
    write_shards(folder, "diffusion_pytorch_model", shapes, tensors, shard)
    write_json(folder / "config.json", folder_config(model.config))


def demo():
    from tempfile import TemporaryDirectory
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(3, heads=2, context_dim=32, pooled_dim=16, pos_max=8, dual_blocks=1)).bfloat16()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    with TemporaryDirectory() as tmp:
        paths = {"single_file": Path(tmp, "model.safetensors"), "folder": Path(tmp, "folder")}
        for layout, path in paths.items():
            save_mmdit(model, path, layout)
            again = load_mmdit(path)
            assert again.config == model.config
            assert all(torch.equal(a, again.state_dict()[k]) for k, a in model.state_dict().items())
            print(f"{layout}: {again.config.depth} blocks found, every bit equal; for example\n"
                  f"  joint_blocks.0.x_block.attn.qkv.weight <- "
                  f"{', '.join(locate(path, 'mmdit')[1]('joint_blocks.0.x_block.attn.qkv.weight').keys)}")
        try:
            load_vae(paths["single_file"])
        except CheckpointError as e:
            print(f"taken for another part, it says: {str(e).replace(tmp, '...')}")
        else:
            raise AssertionError("a transformer was loaded as an autoencoder")


# Exercise: what would go wrong if check_names came after the reading?

if __name__ == "__main__":
    demo()
