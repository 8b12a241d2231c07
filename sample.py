"""Sampling: a prompt in, a picture out.

    python sample.py "a red star left of a blue ring"
    python sample.py "a red star" -n 4 --seed 7 --steps 50 --guidance 4 --method heun
    python sample.py "a lighthouse at dusk, oil on canvas" --model sd3.5_large.safetensors --int8
    python sample.py "the same in winter" --model sd3.5_large.safetensors --image dusk.png --strength 0.7
    python sample.py --dry-run --model sd3.5-large              what it takes, without any weights

    prompt --TextEncoders--> context, pooled ---------\\
    seed   --normal noise--> x at t = 1 ---> [ v = MMDiT(x, t, context, pooled); x <- x + (t' - t) v ] x steps
           ---> x at t = 0
    x      --from_latent, VAE decoder--> pixels                    (t = 0 data, t = 1 noise, as everywhere)

    guidance   v = v_uncond + w (v_cond - v_uncond), on all channels; costs a second pass a step;
               w = 1 switches it off
    cost       steps x 2 passes of the transformer (4 with heun), then one of the decoder
    shift      belongs to the weights: a run's is read from its config.json, the PNG's settings tell it
    a picture  may take the place of the prompt's first steps: it is given noise up to some t < 1, and
               sampling begins there

--model is a folder that train.py wrote, or published weights: SD3-medium, SD3.5-medium, SD3.5-large or its
turbo, as Stability's single file or a diffusers folder (weights.py). Steps and guidance then are those of
Stability's own scripts (DEFAULTS). Weights of the published models are bfloat16 on a card; where they live
while they are not needed is offload.py's business.

Each picture has its own generator on the CPU, seeded with its own number: picture i does not depend on the
batch it is drawn in or on the device (up to the rounding of the device's arithmetic).

A dropped encoder is zeros, as in training. For T5 there is a second convention, no tokens at all (ComfyUI's;
--left-out): it gives another picture.

DIFFERS: for runs trained here the empty prompt means zeros in the place of all text, since that is what
dropped text was in training; released SD3 weights are given the encoded empty string.
DIFFERS: a given picture becomes the mean of its posterior, not a sample: it needs no seed of its own.

Without a prompt, `python sample.py` checks on an untrained pipeline
that seeds, batches and sizes behave as promised.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import flow
import offload
from checkpoints import (CheckpointError, last_run, load_mmdit, load_part, load_text_encoders,
                         load_tokenizers, load_vae, read_json)
from kernels.int8 import quantise_mmdit, quantise_t5
from offload import Places
from text_encoders import ENCODERS, Conditioning, TextEncoders
from vae import TILE
from weights import clip_config, locate, mmdit_config, read_config, t5_config, vae_config

DEFAULTS = {                # of Stability's own scripts. skip_layers: see Pipeline
    "sd3-medium": {"steps": 50, "guidance": 5.0},
    "sd3.5-medium": {"steps": 50, "guidance": 5.0, "skip_layers": (2.5, (7, 8, 9), 0.01, 0.2)},
    "sd3.5-large": {"steps": 40, "guidance": 4.5},
    "sd3.5-large-turbo": {"steps": 4, "guidance": 1.0}}


def pick_device(name: str) -> torch.device:
    """"auto": cuda, else mps, else cpu. ValueError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"device {name!r} cannot be used ({str(e).splitlines()[0]}): try --device cpu") from None
    return torch.device(name)


class Pipeline:
    """The whole of SD3, ready to draw: text encoders, transformer, autoencoder
    and how they were trained to be used.

    t5_length: tokens of T5; longer prompts get more, up to t5_longest (None: no more).
    shift, kind: of the sampling schedule (flow.schedule). size: (height, width) by default.
    zero_empty: an empty prompt is zeros in all text features, not an encoded "".
    dtype: of autocast; None: none, parts compute in the dtype of their weights.
    skip_layers: (scale, layers, start, end): from start to end, shares of the steps, the picture is led away
        from what the transformer says without these layers (flow.guided); None: it is not.
    offload, device: where the parts are while they rest (offload.py), and where they work.
    """

    def __init__(self, mmdit, vae, encoders, *, t5_length=77, t5_longest=None, shift=3.0, kind="reference",
                 size=(1024, 1024), guidance=4.5, steps=28, zero_empty=False, dtype=None, skip_layers=None,
                 offload="none", device=None):
        self.mmdit, self.vae, self.encoders = mmdit, vae, encoders
        self.t5_length, self.t5_longest = t5_length, t5_longest or t5_length
        self.shift, self.kind, self.size = shift, kind, size
        self.guidance, self.steps, self.zero_empty, self.dtype = guidance, steps, zero_empty, dtype
        self.skip_layers, self.encoded = skip_layers, (None, None)
        self.places = Places(offload, device or next(mmdit.parameters()).device, mmdit, encoders)

    @classmethod
    def from_pretrained(cls, path, *, device=None, dtype=None, t5=True, offload="auto", int8=False,
                        tokenizers=None, size=None) -> "Pipeline":
        """A run's folder, as train.py leaves it, or published weights (see the top of this file).

        device: None picks the best. dtype: for a run, of autocast, None for none; else of the weights, None
        for bfloat16 on a card and float32 elsewhere. t5=False: not loaded, zeros stand in its place.
        offload: one of offload.MODES; "auto": the fastest that fits the card, for pictures of `size`.
        int8: transformer and T5 in 8 bits (kernels/int8.py). tokenizers: a folder, if the model's has none.
        Raises CheckpointError where the folder is neither, ValueError where it does not fit the card.
        """
        device = pick_device(device or "auto")
        load = load_run if is_run(path) else load_published
        return cls(**load(Path(path), device, dtype, t5, offload, int8, tokenizers, size), device=device)

    @torch.no_grad()
    def __call__(self, prompt, *, negative="", height=None, width=None, steps=None, guidance=None, seed=0,
                 noise=None, t5_length=None, drop=(), image=None, strength=0.6, method="euler", output="pil",
                 callback=None):
        """Pictures for a prompt or a list of B prompts.

        negative: a text, or one for each prompt.
        seed: picture i is drawn from seed + i, or give a list of B seeds.
        noise (B, C, H/8, W/8) replaces the seeds' (only the sde method draws more).
        Sides are multiples of 16 pixels.
        t5_length: tokens of T5; 0 leaves them out. drop: names of encoders that give zeros.
        image: begin with this picture (PIL, or a tensor (1 or B, 3, H, W) in [0, 1]) under noise; of the
            steps the share `strength` is left.
        output: "pil": list of images; "tensor": (B, 3, H, W) in [0, 1]; "latent": what the VAE's from_latent
            takes.
        callback(i, t, x, x0): see flow.sample.
        Raises ValueError for bad arguments, FloatingPointError for NaNs.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        steps, guidance = (self.steps if steps is None else steps,
                           self.guidance if guidance is None else guidance)
        check_request(prompts, negatives, height, width, steps, output)
        f, device = self.vae.config.factor, self.places.device
        shape = (len(prompts), self.mmdit.config.in_channels, height // f, width // f)
        generators, noise = start(shape, seed, noise)
        ts = flow.schedule(steps, self.shift, self.kind)
        weaker = skipping(ts, *self.skip_layers) if self.skip_layers else None

        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            cond, uncond = self.conditions(prompts, negatives if guidance != 1 else prompts, t5_length, drop)
            noise = noise.to(device)
            if image is not None:
                ts = flow.part_way(ts, strength)
                x0 = self.latent_of(image, len(prompts), height, width)
                noise = flow.interpolate(x0, noise, ts[:1].to(device).expand(len(prompts)))
            with self.places.at_work(self.mmdit):
                model = flow.guided(self.mmdit, guidance, cond, uncond, weaker)
                latent = flow.sample(model, noise, ts, method=method, generator=generators, callback=callback)
            if output == "latent":
                return latent
            images = (self.decode(latent) / 2 + 0.5).clamp(0, 1)
        return images if output == "tensor" else to_pil(images)

    def conditions(self, prompts, negatives, t5_length, drop) -> list[dict]:
        """What the transformer is given for the prompts and for the negatives: encoded together, once."""
        said = vars(self.encode(prompts + negatives, t5_length, drop))
        return [dict(zip(said, half)) for half in zip(*(x.split(len(prompts)) for x in said.values()))]

    def encode(self, prompts: list[str], t5_length=None, drop=()) -> Conditioning:
        """Prompts -> Conditioning on the transformer's device. Equal texts are encoded once, also when they
        come again in the next call."""
        texts, drop = list(dict.fromkeys(prompts)), tuple(drop)
        length = self.t5_tokens(texts, drop) if t5_length is None else t5_length
        if self.encoded[0] != (texts, length, drop):
            said = self.encoders(texts, length, drop)
            if self.zero_empty:
                filled = torch.tensor([bool(p.strip()) for p in texts], device=said.context.device)
                said = Conditioning(said.context * filled[:, None, None], said.pooled * filled[:, None])
            self.encoded = (texts, length, drop), said
        rows, said = [texts.index(p) for p in prompts], self.encoded[1]
        return Conditioning(*(x[rows].to(self.places.device) for x in (said.context, said.pooled)))

    def t5_tokens(self, texts, drop=()) -> int:
        """As many as they need, between t5_length and t5_longest."""
        tokenizer, lengths = self.encoders.tokenizers[2], range(self.t5_length, self.t5_longest)
        if tokenizer is None or "t5" in drop:
            return self.t5_length
        return next((n for n in lengths if not any(tokenizer.truncated(texts, n))), self.t5_longest)

    def latent_of(self, image, B, height, width) -> torch.Tensor:
        """A picture (PIL of any size, or (1 or B, 3, height, width) in [0, 1]) as the flow model sees it."""
        if not isinstance(image, torch.Tensor):
            image = image.convert("RGB").resize((width, height), Image.LANCZOS)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        if image.ndim != 4 or image.shape[1:] != (3, height, width) or len(image) not in (1, B):
            raise ValueError(f"image {tuple(image.shape)}: needed is (1 or {B}, 3, {height}, {width})")
        with self.places.at_work(self.vae):
            x0 = self.vae.to_latent(self.vae.encode(image.to(self.places.device) * 2 - 1).mean)
        return x0.expand(B, -1, -1, -1)

    def decode(self, latent) -> torch.Tensor:
        """(B, C, H/8, W/8) -> (B, 3, H, W), about [-1, 1]; no more at once than memory for TILE^2 cells."""
        z = self.vae.from_latent(latent).split(max(1, TILE ** 2 // (latent.shape[2] * latent.shape[3])))
        with self.places.at_work(self.vae):
            return torch.cat([self.vae.decode(part).float() for part in z])

    def notice(self, prompt: str, t5_length=None) -> str | None:
        """One line if some encoder does not see the whole prompt."""
        lengths = (self.encoders.clip_length, self.encoders.clip_length, t5_length or self.t5_longest)
        cut = [f"{name} ({length} tokens)"
               for name, length, tokenizer in zip(ENCODERS, lengths, self.encoders.tokenizers)
               if tokenizer and tokenizer.truncated([prompt], length)[0]]
        return (f"notice: the prompt is too long for {', '.join(cut)}; its end is not seen there"
                if cut else None)


# -------------------------------------------------------------------------------------------------- loading

def is_run(path) -> bool:
    return Path(path, "config.json").is_file() and "t5_length" in read_json(Path(path, "config.json"))


def load_run(path, device, dtype, t5, mode, int8, tokenizers, size) -> dict:
    """The arguments of Pipeline for a run's folder. Runs are small: "auto" leaves all on the device."""
    if tokenizers:
        raise ValueError(f"{path} has its own tokenizers: leave out --tokenizers {tokenizers}")
    config, mode = read_json(path / "config.json"), "none" if mode == "auto" else mode
    parts = {name: load_part(path, name) for name in ["mmdit", "vae", "clip_l", "clip_g"] + ["t5"] * t5}
    if int8:
        quantise_mmdit(parts["mmdit"])
        if t5:
            quantise_t5(parts["t5"])
    parts = {name: part.to(device if mode == "none" else "cpu") for name, part in parts.items()}
    c, width = parts["clip_l"].config, parts["mmdit"].config.context_dim
    words = load_tokenizers(path, c.context_length)
    encoders = TextEncoders(parts["clip_l"], parts["clip_g"], parts.get("t5"), list(words.values()),
                            (c.width, parts["clip_g"].config.width, width))
    if encoders.widths[2] != width or sum(encoders.pooled_dims) != parts["mmdit"].config.pooled_dim:
        raise CheckpointError(
            f"{path}: the text encoders do not fit mmdit.safetensors: the folder mixes two runs")
    return {"mmdit": parts["mmdit"], "vae": parts["vae"], "encoders": encoders,
            "dtype": None if dtype == torch.float32 else dtype, "offload": mode, "zero_empty": True,
            "t5_length": config["t5_length"], "shift": config["shift"], "kind": "clean", "steps": 20,
            "guidance": 3.0, "size": (config["size"], config["size"])}


def load_published(path, device, dtype, t5, mode, int8, tokenizers, size) -> dict:
    """The arguments of Pipeline for published weights. What may be missing is looked for first, the largest
    files are read last."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    configs = published_configs(path, t5)
    c, (name, how) = configs["mmdit"], recognise(configs["mmdit"], path)
    side = side_of(configs)
    if device.type == "cuda":
        height, width = (given or side for given in size or (None, None))
        mode = offload.choose(mode, name, configs, torch.cuda.mem_get_info(device)[0], int8, dtype=dtype,
                              height=height, width=width, guidance=how["guidance"] != 1)
    mode = "none" if mode == "auto" else mode
    home = device if mode == "none" and not int8 else "cpu"
    encoders = load_text_encoders(
        path, device=home, dtype=torch.bfloat16 if dtype == torch.float16 else dtype, tokenizers=tokenizers,
        drop=() if t5 else ("t5",), widths=(configs["clip_l"].width, configs["clip_g"].width, c.context_dim))
    if int8 and t5:
        quantise_t5(encoders.t5)                    # before the transformer comes, too, in full size
    parts = {"vae": load_vae(path, device=home, dtype=torch.float32),
             "mmdit": load_mmdit(path, device=home, dtype=dtype), "encoders": encoders}
    if int8:
        quantise_mmdit(parts["mmdit"])
    if mode == "none":
        parts = {name: part.to(device) for name, part in parts.items()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    shift = read_json(scheduler).get("shift", 3.0) if scheduler.is_file() else 3.0
    return parts | how | {"shift": shift, "t5_longest": 256, "size": (side, side), "offload": mode}


def published_configs(path, t5=True) -> dict:
    """The five parts' configs, from names and shapes alone; CheckpointError unless they fit each other."""
    configs = {"mmdit": mmdit_config(*locate(path, "mmdit")), "vae": vae_config(*locate(path, "vae"))}
    configs |= {name: clip_config(*locate(path, name), name) for name in ("clip_l", "clip_g")}
    if t5:
        configs["t5"] = t5_config(*locate(path, "t5"))
    c, clips = configs["mmdit"], [configs["clip_l"], configs["clip_g"]]
    pooled = sum(clip.projection_dim or clip.width for clip in clips)
    if pooled != c.pooled_dim or (t5 and configs["t5"].width != c.context_dim):
        raise CheckpointError(f"{path}: the text encoders do not fit the transformer, which wants "
                              f"{c.pooled_dim} pooled numbers and tokens {c.context_dim} wide: they are of "
                              "another model")
    if configs["vae"].z_channels != c.in_channels:
        raise CheckpointError(f"{path}: the autoencoder has {configs['vae'].z_channels} channels, the "
                              f"transformer {c.in_channels}: they are of different models")
    return configs


def side_of(configs) -> int:
    """Pixels: 1024, or as many as a smaller model has positions for."""
    return min(1024, configs["mmdit"].pos_max * configs["mmdit"].patch_size * configs["vae"].factor)


def recognise(c, path) -> tuple[str, dict]:
    """Which published model this is -> its name and its row of DEFAULTS. Turbo has the shapes of the large
    one: only names tell it."""
    if "turbo" in f"{Path(path).name} {read_config(Path(path, 'transformer')).get('_name_or_path')}".lower():
        return "sd3.5-large-turbo", DEFAULTS["sd3.5-large-turbo"]
    if not c.qk_norm:
        return "sd3-medium", DEFAULTS["sd3-medium"]
    medium = c.dual_blocks and c.depth > 9          # small models of its kind lack the layers to skip
    name = "sd3.5-medium" if medium else "sd3.5-large"
    return name, DEFAULTS[name]


# ------------------------------------------------------------------------------------------------ a request

def start(shape, seed, noise):
    """(B generators, noise (B, C, H, W)) for a seed or B seeds."""
    seeds = [seed + i for i in range(shape[0])] if isinstance(seed, int) else list(seed)
    if not all(0 <= s < 2**63 for s in seeds):
        raise ValueError(f"seeds {seeds[:3]} ...: they must lie between 0 and 2^63")
    if len(seeds) != shape[0] or (noise is not None and noise.shape != shape):
        raise ValueError(f"for {shape[0]} pictures give as many seeds, or noise {shape}")
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return generators, flow.draw_noise(shape, generators) if noise is None else noise


def skipping(ts, scale, layers, begin, end):
    """Skip-layer guidance at the steps i with begin < i / steps < end, as flow.guided wants it."""
    steps = len(ts) - 1
    there = [i for i in range(steps) if begin * steps < i < end * steps]
    if not there:
        return None
    high, low = (ts[there[0] - 1] + ts[there[0]]) / 2, (ts[there[-1]] + ts[there[-1] + 1]) / 2
    return scale, (low.item(), high.item()), {"skip_layers": layers}


def check_request(prompts, negatives, height, width, steps, output) -> None:
    if not prompts or len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(negatives)} negative prompts: "
                         "give one or more, and as many of each")
    for name, side in (("height", height), ("width", width)):
        if side < 16 or side % 16:
            raise ValueError(f"{name} {side} is not a multiple of 16 (8 in the VAE, 2 in the patches): "
                             f"try {max(16, round(side / 16) * 16)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: sampling needs at least 1")
    if output not in ("pil", "tensor", "latent"):
        raise ValueError(f"no output {output!r}: choose pil, tensor or latent")


def to_pil(images: torch.Tensor) -> list:
    """(B, 3, H, W) in [0, 1] -> PIL images. FloatingPointError instead of black pictures where numbers are
    not finite."""
    if not images.isfinite().all():
        raise FloatingPointError("the decoder's pictures hold NaN or infinity: "
                                 "decode in float32 or bfloat16, not float16")
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def free_path(out, prompt: str, seed: int, n: int) -> Path:
    """Where a picture goes. Given names are not overwritten; without one: samples/, the prompt's words,
    the seed, a number."""
    if out:
        path = Path(out) if n == 1 else Path(out).with_name(
            f"{Path(out).stem}-{seed}{Path(out).suffix or '.png'}")
        path = path if path.suffix else path.with_suffix(".png")
        if path.exists():
            raise ValueError(f"{path} exists already: choose another --out, or leave it out for a new name")
        return path
    words = re.sub(r"[^\w]+", "-", prompt).strip("-").lower()[:60] or "empty"
    words = words.encode("utf-8", "replace")[:120].decode("utf-8", "ignore")    # file systems allow 255 bytes
    path, i = Path("samples", f"{words}-{seed}.png"), 1
    while path.exists():
        path, i = Path("samples", f"{words}-{seed}-{i}.png"), i + 1
    return path


def save_picture(image, path: Path, settings: dict) -> None:
    """PNG with its settings as JSON in the text chunk "parameters" (Unicode safe)."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(settings, ensure_ascii=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=info)


def parse(argv=None):
    p = argparse.ArgumentParser(description="draw what a prompt says", allow_abbrev=False)
    p.add_argument("prompt", nargs="?", help='such as "a red star left of a blue ring"')
    p.add_argument("--model", help="folder of a run, or published weights: a .safetensors file or a "
                   "diffusers folder; default: the last run under runs/")
    p.add_argument("-n", type=int, default=1, help="pictures, from seed, seed + 1, ... (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    p.add_argument("--steps", type=int,
                   help="steps from noise to picture (default: the model's; 20 for a run)")
    p.add_argument("--guidance", type=float, help="1: none; more: closer to the prompt, less varied "
                   "(default: the model's; 3 for a run)")
    p.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--negative", default="", help="what guidance leads away from (default: nothing)")
    p.add_argument("--method", default="euler", choices=flow.METHODS, help="sampler (default: euler)")
    p.add_argument("--schedule", choices=("reference", "clean"),
                   help="see flow.schedule (default: reference for published weights, clean for a run)")
    p.add_argument("--shift", type=float, help="of the schedule, towards noise (default: the model's)")
    p.add_argument("--image", help="a picture to begin with")
    p.add_argument("--strength", type=float, default=0.6,
                   help="how much of --image may change, above 0 and at most 1 (default: 0.6)")
    p.add_argument("--skip-layer-guidance", type=float, metavar="SCALE",
                   help="0: none (default: 2.5 for SD3.5-medium, the only model made for it)")
    text = p.add_argument_group("text")
    text.add_argument("--t5-length", type=int, help="tokens of T5 (default: a run's own; for published "
                      "weights 77, and up to 256 where the prompt needs them)")
    text.add_argument("--drop", nargs="+", default=[], choices=ENCODERS, help="encoders that give zeros")
    text.add_argument("--drop-t5", action="store_true", help="like --drop t5, and it is not even loaded")
    text.add_argument("--left-out", action="store_true",
                      help="a dropped T5 gives no tokens instead of zeros (ComfyUI's convention)")
    text.add_argument("--tokenizers", help="folder with tokenizer/ and tokenizer_3/ for published weights "
                      "that have none beside them")
    memory = p.add_argument_group("memory and speed")
    memory.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    memory.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of published weights "
                        "(default: bfloat16 on a card, else float32); of autocast for a run (default: none)")
    memory.add_argument("--offload", default="auto", choices=("auto", *offload.MODES), help="where weights "
                        "wait for their turn, see offload.py (default: auto, the fastest that fits the card)")
    memory.add_argument("--int8", action="store_true", help="transformer and T5 in 8 bits: half the memory")
    memory.add_argument("--dry-run", action="store_true", help="only say what it takes; --model may also be "
                        f"one of {', '.join(offload.PRESETS)}")
    p.add_argument("--out", help="file to write (default: a new name under samples/)")
    p.error = refuse
    args = p.parse_args(argv)
    args.dtype = args.dtype and getattr(torch, args.dtype)
    args.drop = tuple(dict.fromkeys(args.drop + ["t5"] * args.drop_t5))
    if args.left_out and "t5" not in args.drop:
        p.error("--left-out is about a dropped T5: add --drop-t5")
    args.t5_length = 0 if args.left_out else args.t5_length
    return args


def refuse(message: str):
    raise ValueError(f"{message}: see python sample.py --help")


def main(argv=None) -> None:
    try:
        args = parse(argv)
        if args.dry_run:
            return dry_run(args)
        if args.prompt is None:
            return demo()
        if args.n < 1:
            raise ValueError(f"-n is {args.n}: ask for 1 picture or more")
        paths = [free_path(args.out, args.prompt, args.seed + i, args.n) for i in range(args.n)]
        draw(args, paths)
    except torch.OutOfMemoryError as e:
        print(f"sample.py: {out_of_memory(e, args)}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)


def draw(args, paths) -> None:
    """What the command line asked for, picture by picture into these files."""
    image = open_picture(args.image) if args.image else None
    folder = args.model or last_run(finished=True)
    if str(folder) in offload.PRESETS and not Path(folder).exists():
        raise ValueError(f"{folder} is a name, not weights: give their file or folder, or add --dry-run")
    pipe = Pipeline.from_pretrained(
        folder, device=args.device, dtype=args.dtype, t5=not args.drop_t5, offload=args.offload,
        int8=args.int8, tokenizers=args.tokenizers, size=(args.height, args.width))
    pipe.kind, pipe.shift = args.schedule or pipe.kind, pipe.shift if args.shift is None else args.shift
    if args.skip_layer_guidance is not None:
        _, *where = pipe.skip_layers or DEFAULTS["sd3.5-medium"]["skip_layers"]
        pipe.skip_layers = (args.skip_layer_guidance, *where) if args.skip_layer_guidance else None
    height, width = fitted(image, pipe.size) if image else pipe.size
    asked = {"steps": pipe.steps, "guidance": pipe.guidance, "height": height, "width": width,
             "t5_length": None}
    asked |= {k: v for k in asked if (v := getattr(args, k)) is not None}
    settings = asked | {"prompt": args.prompt, "negative": args.negative, "method": args.method,
                        "shift": pipe.shift, "schedule": pipe.kind, "model": str(folder), "drop": args.drop,
                        "int8": args.int8, "image": args.image, "strength": args.strength if image else None}
    if line := pipe.notice(args.prompt, asked["t5_length"]):
        print(line)
    cells = max(1, asked["height"] * asked["width"] // pipe.vae.config.factor ** 2)
    at_once = max(1, min(16, TILE ** 2 // cells))                       # bounds the memory
    for first in range(0, args.n, at_once):
        seeds = [args.seed + i for i in range(first, min(args.n, first + at_once))]
        images = pipe([args.prompt] * len(seeds), negative=args.negative, seed=seeds, method=args.method,
                      drop=args.drop, image=image, strength=args.strength, **asked)
        for picture, seed, path in zip(images, seeds, paths[first:]):
            save_picture(picture, path, settings | {"seed": seed})
            print(path)
    if pipe.places.device.type == "cuda":
        most = torch.cuda.max_memory_reserved() / offload.GB
        print(f"--offload {pipe.places.mode}: at most {most:.2f} GB of the card, beside CUDA itself",
              file=sys.stderr)


def dry_run(args) -> None:
    """Prints what drawing takes, from shapes alone."""
    model = args.model or str(last_run(finished=True))
    run = is_run(model)
    if model in offload.PRESETS and not Path(model).exists():
        configs, name, how = offload.preset_configs(model, not args.drop_t5), model, DEFAULTS[model]
    elif run:
        names = ["mmdit", "vae", "clip_l", "clip_g"] + ["t5"] * (not args.drop_t5)
        configs, name, how = {n: load_part(model, n).config for n in names}, model, {"guidance": 3.0}
    else:
        configs = published_configs(model, not args.drop_t5)
        name, how = recognise(configs["mmdit"], model)
    side = read_json(Path(model, "config.json"))["size"] if run else side_of(configs)
    guidance = how["guidance"] if args.guidance is None else args.guidance
    height, width = args.height or side, args.width or side
    check_request([""], [""], height, width, 1, "pil")
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    dtype = torch.float32 if run else args.dtype or torch.bfloat16
    print(offload.report(name, configs, free, height=height, width=width, dtype=dtype, guidance=guidance != 1,
                         t5_length=77 if args.t5_length is None else args.t5_length))


def out_of_memory(e, args) -> str:
    lean = [flag for flag, used in (("--int8", args.int8), ("--drop-t5", args.drop_t5),
                                    ("--offload block", args.offload == "block")) if not used]
    return (f"the card's memory was not enough ({str(e).splitlines()[0]}): try "
            f"{', '.join(lean + ['a smaller --height and --width'])}; --dry-run says how much each takes")


def open_picture(path):
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Image.DecompressionBombError as e:
        raise ValueError(f"{path} is too large a picture: {e}") from None


def fitted(image, size) -> tuple[int, int]:
    """(height, width) for a given picture: its own, in multiples of 16, with no more pixels than size has."""
    scale = min(1.0, math.sqrt(size[0] * size[1] / (image.height * image.width)))
    return tuple(max(16, int(side * scale / 16) * 16) for side in (image.height, image.width))


def demo() -> None:
    """An untrained pipeline cannot draw, but it must keep its promises about seeds, batches and sizes."""
    from tempfile import TemporaryDirectory
    from stages import build
    from settings import TrainConfig
    from stages import make_tokenizers

    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        config = TrainConfig()
        tokenizers = make_tokenizers(Path(folder), config, ["a red star left of a blue ring"], ["a red star"])
    parts = build(config, tokenizers)
    torch.nn.init.normal_(parts["mmdit"].final_layer.linear.weight, std=0.02)   # or all velocities are 0
    encoders = TextEncoders(parts["clip_l"], parts["clip_g"], parts["t5"], list(tokenizers.values()))
    pipe = Pipeline(parts["mmdit"], parts["vae"], encoders, t5_length=12, size=(64, 64), steps=4,
                    zero_empty=True)
    three = pipe(["a red star", "", "a blue ring"], seed=5, output="tensor")
    alone = pipe("a blue ring", seed=7, output="tensor")
    wide = pipe("a red star", height=32, width=96, output="tensor")
    assert torch.allclose(three[2], alone[0], atol=1e-4) and not torch.allclose(three[0], three[2], atol=1e-2)
    assert wide.shape == (1, 3, 32, 96)
    print(f"picture 2 of a batch of three and the same seed alone differ by "
          f"{(three[2] - alone[0]).abs().max():.1e}; "
          f"sizes {tuple(three.shape[2:])} and {tuple(wide.shape[2:])} drawn")


# Exercises. (1) --guidance 0, 1, 3, 8 with one seed: from anything, over the prompt,
# to over-saturated colours.
# (2) --steps 1: the picture is the mean of all that fit the prompt. How many steps until it is sharp?
# (3) Use the encoded "" in place of zeros (zero_empty=False) on a run: how much does guidance lose?

if __name__ == "__main__":
    main()
