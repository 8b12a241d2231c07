"""The real weights are gated; this writes random ones of the same names, shapes and sizes, to measure with.

    python tests/make_fake_checkpoint.py FOLDER                             # SD3.5-large and its VAE, 16.5 GB
    python tests/make_fake_checkpoint.py FOLDER --layout folder --dtype float16
    python tests/make_fake_checkpoint.py FOLDER --parts mmdit vae clip_l clip_g t5              # 28 GB
    python tests/make_fake_checkpoint.py FOLDER --parts mmdit vae clip_l clip_g t5 --layers 2         # 3.2 GB
    python tests/make_fake_checkpoint.py FOLDER --parts mmdit vae clip_l clip_g t5 --config small     # 11 MB
    python tests/make_fake_checkpoint.py FOLDER --measure [--device cuda]   # load what is there: time, memory
    python tests/make_fake_checkpoint.py FOLDER --draw text [--int8] --limit 24     # draw: time, memory

single_file: OUT/<config>.safetensors with transformer and autoencoder, encoders beside it in text_encoders/.
folder: OUT/transformer, OUT/vae, OUT/text_encoder, ... with their config.json, in shards of 10 GB. With text
encoders there are tokenizers, too, of the real sizes: CLIP's has as many merges as the real one, of short
words that are made up, and T5's as many pieces; special tokens have the real ids.

Tensors are made and written one at a time, so 16 GB need no 16 GB of memory. Numbers are a block of normal
ones over and over, small enough that nothing overflows; pictures made of them show noise.
"""
import argparse
import itertools
import string
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import weights
from layouts import PREFIXES, Recipe, mmdit_folder, same_names, vae_folder
from mmdit import MMDiT, MMDiTConfig, position_table
from offload import MODES, OVERHEAD
from pipeline import Pipeline, pick_device
from tensor_files import write_json, write_safetensors, write_shards
from text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from tokens import BOS, EOS, pre_tokenizers, train_t5_tokenizer
from vae import AutoencoderKL, VAEConfig

ENCODERS = {"clip_l": CLIPTextConfig.preset("clip_l", projection_dim=768),
            "clip_g": CLIPTextConfig.preset("clip_g"), "t5": T5Config.preset("xxl")}
CONFIGS = {name: {"mmdit": MMDiTConfig.preset(name), "vae": VAEConfig.preset("sd3")} | ENCODERS
           for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large")}
CONFIGS["small"] = {
    "mmdit": MMDiTConfig(3, context_dim=192, pooled_dim=192, pos_max=12),
    "vae": VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
    "clip_l": CLIPTextConfig(2048, 64, 2, 1, 96, "quick_gelu", projection_dim=64),
    "clip_g": CLIPTextConfig(2048, 128, 2, 2, 96, "gelu", projection_dim=128),
    "t5": T5Config(512, 192, 2, 3, 64, 96)}
BUILD = {"mmdit": MMDiT, "vae": AutoencoderKL, "clip_l": CLIPTextEncoder, "clip_g": CLIPTextEncoder,
         "t5": T5Encoder}
STANDALONE = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16),
          "float32": ("F32", torch.float32)}


def numbers(name, shape, config, dtype, block):
    """One tensor: the table of positions, ones for norms, the identity for projections, else noise."""
    if name == "pos_embed":
        return position_table(config.width, config.pos_max, config.pos_sample, config.pos_base).to(dtype)
    if name == "text_projection.weight" and shape[0] == shape[1]:
        return torch.eye(shape[0], dtype=dtype)
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype)
    n, fan_in = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    return (block[:n] * fan_in ** -0.5).repeat(-(-n // len(block)))[:n].view(shape).to(dtype)


def entries(part, config, recipe, dtype):
    """(what write_safetensors wants to know of a part, its tensors one at a time)."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in BUILD[part](config).state_dict().items()}
    header = weights.listed({name: (DTYPES[dtype][0], shape) for name, shape in shapes.items()}, recipe)
    header = {key: (kind, shape[:2] if is_matrix(key) else shape) for key, (kind, shape) in header.items()}
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0))

    def tensors():
        for name, shape in shapes.items():
            t = numbers(name, shape, config, DTYPES[dtype][1], block)
            for key, piece in zip(recipe(name).keys, t.chunk(len(recipe(name).keys))):
                yield piece.reshape(header[key][1])
    return header, tensors()


def is_matrix(key):
    """In diffusers' autoencoder, where we have a 1x1 convolution."""
    return ".attentions.0." in key and key.endswith("weight") and "group_norm" not in key


def write_model(out, parts, layout, dtype, configs, name) -> list[Path]:
    if layout == "single_file":
        whole = [p for p in ("mmdit", "vae") if p in parts]
        header, tensors = {}, []
        for part in whole:
            more, made = entries(part, configs[part], lambda n, p=PREFIXES[part][0]: Recipe((p + n,)), dtype)
            header, tensors = header | more, [*tensors, made]
        written = [out / f"{name}.safetensors"] if whole else []
        if whole:
            write_safetensors(written[0], header, (t for made in tensors for t in made))
        for part in (p for p in STANDALONE if p in parts):
            written.append(out / "text_encoders" / f"{STANDALONE[part]}.safetensors")
            write_safetensors(written[-1], *entries(part, configs[part], same_names, dtype))
        return written
    written = []
    for part in parts:
        c = configs[part]
        recipe = {"mmdit": lambda: mmdit_folder(c.depth), "vae": lambda: vae_folder(len(c.ch_mult))}.get(
            part, lambda: same_names)()
        file = "diffusion_pytorch_model" if part in ("mmdit", "vae") else "model"
        folder = out / weights.FOLDERS[part]
        written += write_shards(folder, file, *entries(part, c, recipe, dtype), weights.SHARD)
        write_json(folder / "config.json", folder_config(part, c))
    return written


def folder_config(part, c) -> dict:
    if part == "mmdit":
        return weights.folder_config(c)
    if part == "vae":
        return {"latent_channels": c.z_channels, "norm_num_groups": c.num_groups, "scaling_factor": c.scale,
                "shift_factor": c.shift}
    if part == "t5":
        return {"d_model": c.width, "relative_attention_max_distance": c.max_distance}
    return {"hidden_size": c.width, "num_attention_heads": c.heads, "hidden_act": c.activation}


def write_tokenizers(out, configs) -> None:
    """BOS and EOS have CLIP's last two ids; T5's table has 28 rows without a piece, as the real one has."""
    room, letters = configs["clip_l"].vocab_size - 514, string.ascii_lowercase
    pairs = (("".join(left), right + end)           # "a" "b" -> "ab"; "ab" "c" -> "abc"; </w> ends a word
             for n in (1, 2, 3) for end in ("", "</w>")
             for *left, right in itertools.product(letters, repeat=n + 1))
    merges, signs = list(itertools.islice(pairs, room)), sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges), BOS, EOS]
    write_json(out / "tokenizer" / "vocab.json", {word: i for i, word in enumerate(words)})
    (out / "tokenizer" / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")
    captions = ["a red star left of a blue ring", "a photograph of an astronaut riding a horse"] * 2
    words = itertools.islice(itertools.product(letters, repeat=4), configs["t5"].vocab_size)
    captions += [" ".join(map("".join, words))]                                         # more than enough
    train_t5_tokenizer(captions, out / "tokenizer_3", configs["t5"].vocab_size - 28)


def with_layers(configs, n) -> dict:
    """The same with n layers in each part, as wide as they were: the autoencoder stays as it is."""
    mmdit = configs["mmdit"]
    return configs | {"mmdit": replace(mmdit, depth=n, heads=mmdit.num_heads,
                                       dual_blocks=min(n, mmdit.dual_blocks))} | {
        name: replace(configs[name], layers=n) for name in STANDALONE}


def memory(what) -> int:
    """Bytes of this process, now (VmRSS) or at most so far (VmHWM); 0 where nobody can tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def measure(out, device) -> None:
    """Loads the transformer that was written; run it by itself, or the peak is that of the writing."""
    path = next(iter(sorted(out.glob("*.safetensors"))), out)
    before, began = memory("VmRSS"), time.perf_counter()
    model = weights.load_mmdit(path, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, grown = time.perf_counter() - began, memory("VmHWM") - before
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    line = (f"{path}: {size / 1e9:.2f} GB in {seconds:.1f} s; the process' memory grew by at most "
            f"{grown / 1e9:.2f} GB, {grown / size:.1%} of the model")
    if device == "cuda":
        line += f"; on the card at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    print(line)


def draw(args) -> None:
    """Two pictures with all parts that were written, the first to warm up; on a card if there is one, of
    which no more than --limit is used, nor counted as free."""
    device, path = pick_device("auto"), next(iter(sorted(args.out.glob("*.safetensors"))), args.out)
    if device.type == "cuda":
        whole, asked = args.limit * 1e9, torch.cuda.mem_get_info
        share = (whole - OVERHEAD) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        torch.cuda.mem_get_info = lambda card: (
            min(asked(card)[0], whole - torch.cuda.memory_reserved(card)), whole)
    times = [time.perf_counter()]
    pipe = Pipeline.from_pretrained(path, device=device, offload=args.draw, int8=args.int8,
                                    size=(args.side, args.side))
    for prompt, steps in (("a blue ring", 2), ("a red star", args.steps)):      # what was encoded is kept
        times.append(time.perf_counter())
        pipe(prompt, height=args.side, width=args.side, steps=steps, guidance=4.5)
    times.append(time.perf_counter())
    line = (f"{path}, --offload {args.draw}{' --int8' * args.int8}: read in {times[1] - times[0]:.1f} s; "
            f"{args.side} x {args.side}, {args.steps} steps, guidance 4.5: {times[3] - times[2]:.1f} s")
    if device.type == "cuda":
        used, kept = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
        line += (f"; besides what CUDA takes at most {used:.2f} of {args.limit:g} GB of the card, {kept:.2f} "
                 "with what PyTorch keeps")
    print(f"{line}; {memory('VmHWM') / 1e9:.2f} GB of main memory")


def main(argv=None):
    p = argparse.ArgumentParser(description="random weights in the layouts of the real ones")
    p.add_argument("out", type=Path, help="folder")
    p.add_argument("--config", default="sd3.5-large", choices=CONFIGS)
    p.add_argument("--layout", default="single_file", choices=("single_file", "folder"))
    p.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    p.add_argument("--parts", nargs="+", default=["mmdit", "vae"], choices=BUILD, help="default: mmdit vae")
    p.add_argument("--layers", type=int, help="of all parts but the autoencoder (default: as many as in the "
                   "real ones; with fewer, 2 or more, it takes less room)")
    p.add_argument("--measure", action="store_true", help="write nothing; load OUT's transformer")
    p.add_argument("--device", default="cpu", help="where --measure loads to")
    p.add_argument("--draw", choices=MODES, help="write nothing; draw with all of OUT's parts, offloaded so")
    p.add_argument("--int8", action="store_true", help="with --draw")
    p.add_argument("--limit", type=float, default=24, help="GB of the card that --draw may use (default: 24)")
    p.add_argument("--steps", type=int, default=50, help="of --draw (default: 50)")
    p.add_argument("--side", type=int, default=1024, help="of --draw's picture in pixels (default: 1024)")
    args = p.parse_args(argv)
    if args.draw:
        return draw(args)
    if args.measure:
        return measure(args.out, args.device)
    began, configs = time.perf_counter(), CONFIGS[args.config]
    configs = with_layers(configs, args.layers) if args.layers else configs
    files = write_model(args.out, args.parts, args.layout, args.dtype, configs, args.config)
    if set(args.parts) >= set(STANDALONE):
        write_tokenizers(args.out, configs)
    size = sum(f.stat().st_size for f in files)
    print(f"{args.out}: {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s, "
          f"memory at most {memory('VmHWM') / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
