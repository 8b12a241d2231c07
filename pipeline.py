r"""What happens between a prompt and a picture? Kept apart from sample.py, which is about flags and files.

    prompt --TextEncoders--> context, pooled ---------\
    seed   --normal noise--> x at t = 1 ---> [ v = MMDiT(x, t, context, pooled); x <- x + (t' - t) v ] x steps
           ---> x at t = 0
    x      --from_latent, VAE decoder--> pixels                    (t = 0 data, t = 1 noise, as everywhere)

    guidance   v = v_uncond + w (v_cond - v_uncond), on all channels; costs a second pass a step;
               w = 1 switches it off (but not skip-layer guidance, as diffusers does)
    cost       steps x 2 passes of the transformer (4 with heun), then one of the decoder
    shift      belongs to the weights: a run's is read from its config.json; the PNG's settings include it
    a picture  may replace the first steps: noise is added to it up to some t < 1, and sampling begins there

Weights are a folder that train.py wrote, or published ones: SD3-medium, SD3.5-medium, SD3.5-large or its
turbo, as Stability's single file or a diffusers folder (weights.py). Published models take steps and
guidance from Stability's own scripts (DEFAULTS); on a card their transformer and text encoders have 16 bits,
the autoencoder 32. Where weights wait while they are not needed is offload.py's concern.

Each picture has its own generator on the CPU, seeded with its own number: picture i does not depend on the
batch it is drawn in or on the device (up to the rounding of the device's arithmetic). One exception: prompts
longer than t5_length lengthen T5's text for all of a call, so sample.py draws each prompt by itself.

A dropped encoder gives zeros, as in training. A second convention, ComfyUI's (left_out), leads to another
picture: a dropped T5 gives no tokens, nor do the CLIPs if both are dropped; one alone gives zeros.

DIFFERS: for runs trained here the empty prompt means zeros in place of all text, since that is what
dropped text was in training; released SD3 weights are given the encoded empty string.
DIFFERS: a given picture becomes the mean of its posterior, not a sample: it needs no seed of its own.
DIFFERS: all models are sampled with Euler steps, as in the paper and in diffusers; Stability's own script
uses dpmpp_2m for SD3.5 (method="dpmpp_2m").

Run `python pipeline.py`: checks on an untrained pipeline that seeds, batches and sizes behave as promised.
"""
import json
import math
import operator
import unicodedata
from contextlib import nullcontext
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import data
import flow
import kernels
import offload
from finetune import change_all
from kernels.int8 import quantise_mmdit, quantise_t5
from offload import Places
from run_folder import (check_fit, home_of_encoders, is_run, load_encoders, load_part, read_run, refuse_part,
                        run_configs, text_widths)
from tensor_files import CheckpointError, read_config, write_atomically
from text_encoders import ENCODERS, Conditioning, TextEncoders
from vae import TILE
from weights import config_of, free_memory, load_mmdit, load_text_encoders, load_vae

DEFAULTS = {                # of Stability's own scripts. skip_layers: see Pipeline
    "sd3-medium": {"steps": 50, "guidance": 5.0},
    "sd3.5-medium": {"steps": 50, "guidance": 5.0, "skip_layers": (2.5, (7, 8, 9), 0.01, 0.2)},
    "sd3.5-large": {"steps": 40, "guidance": 4.5},
    "sd3.5-large-turbo": {"steps": 4, "guidance": 1.0}}
T5_LONGEST = 256            # tokens that a long prompt gets, as in SD3.5's training


def pick_device(name: str) -> torch.device:
    """"auto": cuda, else mps, else cpu. ValueError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()                      # "meta" has no numbers
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"device {name!r} cannot be used ({str(e).splitlines()[0]}): try --device cpu") from None
    return torch.device(name)


class Pipeline:
    """The whole of SD3, ready to draw: text encoders, transformer, autoencoder, and the settings that they
    were trained for.

    t5_length: tokens of T5; longer prompts get more, up to t5_longest (None: no more).
    shift, kind: of the sampling schedule (flow.schedule). size: (height, width) by default.
    zero_empty: an empty prompt is zeros in all text features, not an encoded "".
    dtype: of autocast; None: none, parts compute in the dtype of their weights.
    skip_layers: (scale, layers, start, end): from start to end, shares of the steps, guidance also leads away
        from the transformer without these layers (flow.guided); None: it does not.
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
                        tokenizers=None, size=None, drop=(), pictures=1, loras=()) -> "Pipeline":
        """A run's folder, as train.py leaves it, or published weights (see the top of this file).

        device: None picks the best. dtype: for a run, of autocast (None: no autocast); for published weights,
        theirs (None: see half_of on a card, float32 elsewhere). drop: encoders to replace with zeros;
        published ones are not even loaded; t5=False drops "t5". offload: one of offload.MODES; "auto": the
        fastest that fits the card, for this many `pictures` of `size`, (height, width) (see at_once). int8:
        transformer and T5 in 8 bits (see kernels/int8.py). tokenizers: a folder, if the model's has none.
        loras: adapters that change the transformer (finetune.Lora).
        Raises CheckpointError if the folder is neither, ValueError if something does not fit.
        """
        drop = {*([drop] if isinstance(drop, str) else drop), *(() if t5 else ("t5",))}
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {dtype}: choose float32, bfloat16 or float16")
        device = pick_device(device or "auto")
        kernels.check_environment(device)
        if wrong := drop - set(ENCODERS):
            raise ValueError(f"cannot drop {sorted(wrong)}: choose from {', '.join(ENCODERS)}")
        load = load_run if is_run(path) else load_published
        return cls(**load(Path(path), device, dtype, drop, offload, int8, tokenizers, size, pictures, loras),
                   device=device)

    @torch.no_grad()
    def __call__(self, prompt, *, negative="", height=None, width=None, steps=None, guidance=None, seed=0,
                 noise=None, t5_length=None, drop=(), left_out=False, image=None, strength=0.6,
                 method="euler", output="pil", callback=None):
        """Pictures for a prompt or a list of B prompts.

        negative: a text, or one for each prompt.
        seed: picture i is drawn from seed + i, or give a list of B seeds.
        noise (B, C, H/8, W/8) replaces the seeds' (only the sde method draws more).
        Sides are multiples of 16 pixels.
        t5_length: tokens of T5. drop: names of encoders that give zeros, or no tokens if left_out.
        image: begin with this picture (PIL, or a tensor (1 or B, 3, H, W) in [0, 1]) under noise, and do
            only the share `strength` of the steps.
        output: "pil": list of images; "tensor": (B, 3, H, W) in [0, 1]; "latent": what the VAE's from_latent
            takes.
        callback(i, t, x, x0): see flow.sample.
        Raises ValueError for bad arguments, FloatingPointError for NaNs.
        """
        prompts, negative = [prompt] if isinstance(prompt, str) else list(prompt), negative or ""
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        steps, guidance = (self.steps if steps is None else steps,
                           self.guidance if guidance is None else guidance)
        check_request(prompts, negatives, height, width, steps, guidance, output)
        f, device, c = self.vae.config.factor, self.places.device, self.mmdit.config
        check_positions(height, width, c, f)
        shape = (len(prompts), c.in_channels, height // f, width // f)
        generators, noise = initial_noise(shape, seed, noise)
        ts = flow.schedule(steps, self.shift, self.kind)
        weaker = skipping(ts, *self.skip_layers) if self.skip_layers else None

        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            cond, uncond = self.conditions(prompts, negatives if guidance != 1 else prompts, t5_length, drop,
                                           left_out)
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

    def conditions(self, prompts, negatives, *how) -> list[dict]:
        """The transformer's text inputs for the prompts and for the negatives, encoded together, once."""
        text = vars(self.encode(prompts + negatives, *how))
        return [dict(zip(text, half)) for half in zip(*(x.split(len(prompts)) for x in text.values()))]

    def encode(self, prompts: list[str], t5_length=None, drop=(), left_out=False) -> Conditioning:
        """Prompts -> Conditioning on the transformer's device. Equal texts are encoded once, and the
        result is kept for a next call with the same texts."""
        texts, drop = list(dict.fromkeys(prompts)), (drop,) if isinstance(drop, str) else tuple(drop)
        absent = {name for name in ENCODERS if name in drop or getattr(self.encoders, name) is None}
        length = self.t5_tokens(texts, drop) if t5_length is None else t5_length
        if not isinstance(length, Integral) or length < 0:
            raise ValueError(f"t5_length is {length!r}: give a whole number, 0 for no T5 tokens")
        length = 0 if left_out and "t5" in absent else length
        before, text = self.encoded                             # once: another thread may be drawing as well
        if before != (asked := (texts, length, drop, left_out, self.zero_empty, absent, self.dtype)):
            overflows = self.dtype == torch.float16                             # as T5 does
            with torch.autocast(self.places.device.type, enabled=False) if overflows else nullcontext():
                text = self.encoders(texts, length, drop)
            if left_out and length and absent == {"clip_l", "clip_g"}:
                text = Conditioning(text.context[:, self.encoders.clip_length:], text.pooled)
            if self.zero_empty:
                filled = torch.tensor([bool(p.strip()) for p in texts], device=text.context.device)
                text = Conditioning(text.context * filled[:, None, None], text.pooled * filled[:, None])
            self.encoded = asked, text
        rows = [texts.index(p) for p in prompts]
        return Conditioning(*(x[rows].to(self.places.device) for x in (text.context, text.pooled)))

    def t5_tokens(self, texts, drop=()) -> int:
        """How many T5 tokens the texts get: as many as they need, between t5_length and t5_longest."""
        tokenizer = self.encoders.tokenizers[2]
        if tokenizer is None or "t5" in drop:
            return self.t5_length
        return min(max(self.t5_length, *tokenizer.lengths(texts)), self.t5_longest)

    def latent_of(self, image, B, height, width) -> torch.Tensor:
        """A picture as the flow model sees it. image: PIL of any size, whose middle is cut to shape, or
        (1 or B, 3, height, width) in [0, 1]."""
        if not isinstance(image, (torch.Tensor, Image.Image)):
            raise ValueError(f"image is a {type(image).__name__}: give a PIL image or a tensor")
        if isinstance(image, Image.Image):
            image = ImageOps.fit(image.convert("RGB"), (width, height), Image.LANCZOS)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        right = image.ndim == 4 and image.shape[1:] == (3, height, width) and len(image) in (1, B)
        if not right or not image.is_floating_point():
            raise ValueError(f"image {tuple(image.shape)}, {image.dtype}: it must be (1 or {B}, 3, {height}, "
                             f"{width}) in [0, 1]")
        with self.places.at_work(self.vae):
            image = image.to(self.places.device, torch.float32) * 2 - 1
            pieces = self.few_at_once(image, self.vae.config.factor)
            x0 = torch.cat([self.vae.to_latent(self.vae.encode(piece).mean) for piece in pieces])
        return x0.expand(B, -1, -1, -1)

    def decode(self, latent) -> torch.Tensor:
        """(B, C, H/8, W/8) -> (B, 3, H, W), about [-1, 1]. FloatingPointError if it is not finite: as
        pixels, NaN would be black."""
        with self.places.at_work(self.vae):
            pieces = self.few_at_once(self.vae.from_latent(latent), 1)
            images = torch.cat([self.vae.decode(z) for z in pieces])
        if not images.isfinite().all():
            raise FloatingPointError("the decoded pictures contain NaN or infinity: "
                                     "decode in float32 or bfloat16, not float16")
        return images

    def few_at_once(self, x, cell):
        """Pieces of a batch with at most TILE^2 latent cells each, of `cell` numbers a side in x."""
        return x.split(max(1, TILE ** 2 // (x.shape[2] // cell * (x.shape[3] // cell))))

    def notice(self, prompt: str, t5_length=None, what="prompt") -> str | None:
        """One line if some encoder does not see the whole prompt or know all its characters."""
        lengths = (self.encoders.clip_length, self.encoders.clip_length, t5_length or self.t5_longest)
        there = [(name, length, tokenizer)
                 for name, length, tokenizer in zip(ENCODERS, lengths, self.encoders.tokenizers)
                 if tokenizer and getattr(self.encoders, name)]
        cut = [f"{name} ({length} tokens)" for name, length, tokenizer in there
               if tokenizer.truncated([prompt], length)[0]]
        signs = [sign for name, _, tokenizer in there if name == "t5" for sign in unknown(tokenizer, prompt)]
        notes = [f"the end of the {what} is not seen by {', '.join(cut)}: it is too long"] * bool(cut)
        notes += [f"T5 does not know {' '.join(map(repr, signs[:8]))}"] * bool(signs)
        return f"notice: {'; '.join(notes)}" if notes else None


def unknown(tokenizer, text: str) -> list[str]:
    """The parts of a text that T5's vocabulary has no token for. (CLIP's has all: it falls back on bytes.)"""
    text = unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode())      # as T5's own cleaning
    unk = tokenizer.tok.token_to_id("<unk>")
    found = tokenizer.tok.encode(text, add_special_tokens=False)
    return list(dict.fromkeys(text[a:b] for i, (a, b) in zip(found.ids, found.offsets) if i == unk))


# -------------------------------------------------------------------------------------------------- loading

def load_run(path, device, dtype, drop, mode, int8, tokenizers, size, pictures, loras) -> dict:
    """The arguments of Pipeline for a run's folder."""
    if tokenizers:
        raise ValueError(f"{path} has its own tokenizers: leave out --tokenizers {tokenizers}")
    config, configs = read_run(path), run_configs(path, drop)
    text_dtype = text_dtype_of(path, device)
    height, width = (given or config["size"] for given in size or (None, None))
    check_positions(height, width, configs["mmdit"], configs["vae"].factor)
    about = dict(height=height, width=width, t5_length=config["t5_length"], dtype=torch.float32,
                 text_dtype=text_dtype, pictures=min(pictures, at_once(height, width, configs["vae"].factor)))
    if device.type == "cuda" or not is_run(home_of_encoders(path)):         # what train.py makes is small
        mode = place(mode, path, {k: c for k, c in configs.items() if k not in drop}, device, int8, about)
    elif mode == "auto":
        mode = "none"
    mmdit = change_all(load_part(path, "mmdit"), loras)
    vae, encoders = load_encoders(path, drop=drop, dtype=text_dtype, t5_width=mmdit.config.context_dim)
    if int8:
        quantise_mmdit(mmdit)
        if encoders.t5:
            quantise_t5(encoders.t5)
    parts = {name: part.to(home_of(name, mode, device))
             for name, part in (("mmdit", mmdit), ("vae", vae), ("encoders", encoders))}
    return parts | {"dtype": None if dtype == torch.float32 else dtype, "offload": mode, "zero_empty": True,
                    "t5_length": config["t5_length"], "shift": config["shift"], "kind": "clean", "steps": 20,
                    "guidance": 3.0, "size": (config["size"], config["size"])}


def text_dtype_of(run, device) -> torch.dtype:
    """The dtype of a run's text encoders: its own stay float32, published ones are bfloat16 on a card."""
    published = not is_run(home_of_encoders(run))
    return torch.bfloat16 if published and device.type == "cuda" else torch.float32


def half_of(device) -> torch.dtype:
    """The transformer's dtype on a card. Those before Ampere only emulate bfloat16: slowly, and attention
    then builds its L x L scores. (In float16 the real weights were not tried.)"""
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_published(path, device, dtype, drop, mode, int8, tokenizers, size, pictures, loras) -> dict:
    """The arguments of Pipeline for published weights. Looks first for what may be missing; reads the largest
    files last."""
    dtype = dtype or (half_of(device) if device.type == "cuda" else torch.float32)
    configs = published_configs(path, drop)
    if loras:
        load_mmdit(path, device="meta", loras=loras)                # do they fit?
    (name, how), side = recognise(configs["mmdit"], path), side_of(configs)
    height, width = (given or side for given in size or (None, None))
    check_positions(height, width, configs["mmdit"], configs["vae"].factor)
    # room for guidance and long prompts: whether they will be used is not known yet
    about = dict(height=height, width=width, t5_length=T5_LONGEST, dtype=dtype,
                 pictures=min(pictures, at_once(height, width, configs["vae"].factor)))
    mode = place(mode, name, configs, device, int8, about)
    scheduler = path / "scheduler" / "scheduler_config.json"
    shift = read_config(scheduler.parent, scheduler.name).get("shift", 3.0)
    if not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        raise CheckpointError(f"{scheduler}: shift is {shift!r}, not a number above 0: get the file again")
    encoders = load_text_encoders(
        path, device=home_of("encoders", mode, device), dtype=offload.of_encoders(dtype),
        tokenizers=tokenizers, drop=drop, int8=int8, widths=text_widths(configs))
    home = home_of("mmdit", mode, device)
    parts = {"vae": load_vae(path, device=home, dtype=torch.float32),
             "mmdit": load_mmdit(path, device=home, dtype=dtype, int8=int8, loras=loras),
             "encoders": encoders}
    return parts | how | {"shift": shift, "t5_longest": T5_LONGEST, "size": (side, side), "offload": mode}


def place(mode, name, configs, device, int8, about) -> str:
    """One of offload.MODES; decides "auto", before anything large is read. about: more for offload.need.
    ValueError if the card's memory or main memory is too small."""
    if device.type == "cuda":
        mode = offload.choose(mode, name, configs, free_memory(device), int8, **about)
    mode = "none" if mode == "auto" else mode
    home = home_of("encoders", mode, device)
    if home.type != "cuda":
        offload.check_main_memory(name, configs, free_memory(home), int8, works=device.type == home.type,
                                  mode=mode, **about)
    return mode


def home_of(part, mode, device) -> torch.device:
    """Where a part rests, "mmdit", "vae" or "encoders"."""
    stays = mode == "none" or mode == "text" and part != "encoders"
    return device if stays else torch.device("cpu")


def published_configs(path, drop) -> dict:
    """The configs of all five parts but those in `drop`, from names and shapes alone; CheckpointError unless
    they fit each other."""
    refuse_part(path)
    configs = {part: config_of(path, part) for part in ("mmdit", "vae", *ENCODERS) if part not in drop}
    check_fit(path, configs, "they are from different models")
    return configs


def side_of(configs) -> int:
    """Pixels a side: 1024, or as many as a smaller model has positions for."""
    return min(1024, longest_side(configs["mmdit"], configs["vae"].factor))


def recognise(c, path) -> tuple[str, dict]:
    """Which published model this is -> its name and its row of DEFAULTS. Turbo has the shapes of the large
    one and is told from it by name alone: the path's, its link target's, a Hugging Face folder's, its
    config's."""
    real = Path(path).resolve()
    names = [Path(path).name, real.name, *(p for p in real.parts if p.startswith("models--")),
             str(read_config(Path(path, "transformer")).get("_name_or_path"))]
    if c.qk_norm and not c.dual_blocks and "turbo" in " ".join(names).lower():
        return "sd3.5-large-turbo", DEFAULTS["sd3.5-large-turbo"]
    if not c.qk_norm:
        return "sd3-medium", DEFAULTS["sd3-medium"]
    medium = c.dual_blocks and c.depth > 9          # small models of its kind lack the layers to skip
    name = "sd3.5-medium" if medium else "sd3.5-large"
    return name, DEFAULTS[name]


# ------------------------------------------------------------------------------------------------ a request

def initial_noise(shape, seed, noise):
    """(B generators, noise (B, C, H, W)) for a seed or B seeds."""
    generators = [torch.Generator().manual_seed(s) for s in seeds_of(seed, shape[0])]
    if noise is not None and noise.shape != shape:
        raise ValueError(f"noise is {tuple(noise.shape)}: these pictures need {shape}")
    return generators, flow.draw_noise(shape, generators) if noise is None else noise


def seeds_of(seed, n) -> list[int]:
    """One for each of n pictures: counted up from `seed`, or those of the list `seed`."""
    try:
        seeds = [operator.index(s) for s in seed] if hasattr(seed, "__iter__") else [
            operator.index(seed) + i for i in range(n)]
    except TypeError:                                               # not a whole number
        seeds = []
    if len(seeds) != n or not all(0 <= s < 2**63 for s in seeds):
        raise ValueError(f"seed is {seed}: give a number from 0 to 2^63 - {n}, or a list of {n}")
    return seeds


def at_once(height, width, factor) -> int:
    """How many pictures to draw in one batch: at most 16, and no more cells than one picture of TILE^2."""
    return max(1, min(16, TILE ** 2 * factor ** 2 // max(1, height * width)))


def skipping(ts, scale, layers, begin, end):
    """Skip-layer guidance at the steps i with begin < i / steps < end, as flow.guided takes it."""
    steps = len(ts) - 1
    there = [i for i in range(steps) if begin * steps < i < end * steps]
    if not there:
        return None
    high, low = (ts[there[0] - 1] + ts[there[0]]) / 2, (ts[there[-1]] + ts[there[-1] + 1]) / 2
    return scale, (low.item(), high.item()), {"skip_layers": layers}


def check_side(name: str, side: int) -> None:
    if not isinstance(side, Integral) or side < 16 or side % 16:
        number = isinstance(side, Real) and math.isfinite(side)
        near = f": try {max(16, round(side / 16) * 16)}" if number else ""
        raise ValueError(f"{name} {side} is not a multiple of 16 (8 in the VAE, 2 in the patches){near}")


def longest_side(c, factor: int) -> int:
    """Pixels that the positions of a transformer with config c reach."""
    return c.pos_max * c.patch_size * factor


def check_positions(height: int, width: int, c, factor: int) -> None:
    if max(height, width) > (most := longest_side(c, factor)):
        raise ValueError(f"{height} x {width} pixels exceed this model's positions, which reach {most} a "
                         "side: ask for a smaller picture")


def check_request(prompts, negatives, height, width, steps, guidance, output) -> None:
    if not prompts or len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(negatives)} negative prompts: "
                         "give one or more, and as many of each")
    check_side("height", height)
    check_side("width", width)
    if not isinstance(steps, Integral) or not 1 <= steps <= 10_000:
        raise ValueError(f"steps is {steps}: give a whole number from 1 to 10,000")
    if not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}: give a number, 1 for none")
    if output not in ("pil", "tensor", "latent"):
        raise ValueError(f"no output {output!r}: choose pil, tensor or latent")


def to_pil(images: torch.Tensor) -> list:
    """(B, 3, H, W) in [0, 1] -> PIL images."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def save_picture(image, path, settings: dict) -> None:
    """A PNG, whole or not at all, with its settings as JSON in the text chunk "parameters" (Unicode safe)."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(settings, ensure_ascii=True))
    write_atomically(path, lambda p: image.save(p, format="PNG", pnginfo=info))


def settings_of(path) -> dict:
    """What save_picture wrote there. ValueError if it is missing, incomplete, or by another program."""
    try:
        with data.opened(Path(path), whole=True) as image:
            image.load()
            return json.loads(image.info["parameters"])
    except Exception as e:              # decoders fail in many ways
        raise ValueError(f"{path} is not a picture with settings written here ({e!r})") from None


def demo() -> None:
    """An untrained pipeline cannot draw, but it must keep its promises about seeds, batches and sizes."""
    from tempfile import TemporaryDirectory
    from settings import TrainConfig
    from stages import build, make_tokenizers

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


# Exercises. (1) guidance 0, 1, 3, 8 with one seed: from anything to the prompt to over-saturated colours.
# (2) steps=1, guidance=1, several seeds: the exact velocity would draw one picture for all, the mean of those
# that fit the prompt (see flow.py). Is a run's velocity as good? How many steps until pictures are sharp?
# (3) Use the encoded "" in place of zeros (zero_empty=False) on a run: how much does guidance lose?

if __name__ == "__main__":
    demo()
