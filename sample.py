"""Sampling: a prompt in, a picture out.

    python sample.py "a red star left of a blue ring"
    python sample.py "a red star" -n 4 --seed 7 --steps 50 --guidance 4 --method heun
    python sample.py "a heart" --height 64 --width 128 --negative "blue" --model runs/drawn --out heart.png

    prompt --TextEncoders--> context, pooled ---------\\
    seed   --normal noise--> x at t = 1 ---> [ v = MMDiT(x, t, context, pooled); x <- x + (t' - t) v ] x steps
           ---> x at t = 0
    x      --from_latent, VAE decoder--> pixels                    (t = 0 data, t = 1 noise, as everywhere)

    guidance   v = v_uncond + w (v_cond - v_uncond), on all channels; costs a second pass a step;
               w = 1 switches it off
    cost       steps x 2 passes of the transformer (4 with heun), then one of the decoder
    shift      belongs to the weights: a run's is read from its config.json, the PNG's settings tell it

Each picture has its own generator on the CPU, seeded with its own number: picture i does not depend on the
batch it is drawn in or on the device (up to the rounding of the device's arithmetic).

DIFFERS: for runs trained here the empty prompt means zeros in the place of all text, since that is what
dropped text was in training; released SD3 weights are given the encoded empty string.

Without a prompt, `python sample.py` checks on an untrained pipeline
that seeds, batches and sizes behave as promised.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import flow
from checkpoints import CheckpointError, last_run, load_part, load_tokenizers, read_json
from text_encoders import ENCODERS, Conditioning, TextEncoders


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

    t5_length: tokens of T5. shift, kind: of the sampling schedule (flow.schedule).
    size: (height, width) by default.
    zero_empty: an empty prompt is zeros in all text features, not an encoded "".
    """

    def __init__(self, mmdit, vae, encoders, *, t5_length=77, shift=3.0, kind="reference", size=(1024, 1024),
                 guidance=4.5, steps=28, zero_empty=False, dtype=None):
        self.mmdit, self.vae, self.encoders = mmdit, vae, encoders
        self.t5_length, self.shift, self.kind, self.size = t5_length, shift, kind, size
        self.guidance, self.steps, self.zero_empty, self.dtype = guidance, steps, zero_empty, dtype

    @classmethod
    def from_pretrained(cls, path, *, device=None, dtype=None, t5=True) -> "Pipeline":
        """A run's folder, as train.py leaves it. device: None picks the best.
        dtype: of autocast, None for none.

        t5=False: T5 is not loaded, zeros stand in its place.
        Raises CheckpointError where the folder is no finished run.
        """
        config, device = read_json(Path(path, "config.json")), pick_device(device or "auto")
        names = ["mmdit", "vae", "clip_l", "clip_g"] + ["t5"] * t5
        parts = {name: load_part(path, name).to(device) for name in names}
        width = parts["mmdit"].config.context_dim
        widths = (parts["clip_l"].config.width, parts["clip_g"].config.width, width)
        tokenizers = load_tokenizers(path, parts["clip_l"].config.context_length)
        encoders = TextEncoders(
            parts["clip_l"], parts["clip_g"], parts.get("t5"), list(tokenizers.values()), widths)
        if encoders.widths[2] != width or sum(encoders.pooled_dims) != parts["mmdit"].config.pooled_dim:
            raise CheckpointError(
                f"{path}: the text encoders do not fit mmdit.safetensors: the folder mixes two runs")
        return cls(parts["mmdit"], parts["vae"], encoders, t5_length=config["t5_length"],
                   shift=config["shift"], kind="clean", size=(config["size"], config["size"]), guidance=3.0,
                   steps=20, zero_empty=True, dtype=dtype)

    @torch.no_grad()
    def __call__(self, prompt, *, negative="", height=None, width=None, steps=None, guidance=None, seed=0,
                 noise=None, t5_length=None, method="euler", output="pil", callback=None):
        """Pictures for a prompt or a list of B prompts.

        negative: a text, or one for each prompt.
        seed: picture i is drawn from seed + i, or give a list of B seeds.
        noise (B, C, H/8, W/8) replaces the seeds' (only the sde method draws more).
        Sides are multiples of 16 pixels.
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
        f, C, device = (self.vae.config.factor, self.mmdit.config.in_channels,
                        next(self.mmdit.parameters()).device)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        shape = (len(prompts), C, height // f, width // f)
        if not all(0 <= s < 2**63 for s in seeds):
            raise ValueError(f"seeds {seeds[:3]} ...: they must lie between 0 and 2^63")
        if len(seeds) != len(prompts) or (noise is not None and noise.shape != shape):
            raise ValueError(f"for {len(prompts)} pictures give as many seeds, or noise {shape}")
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        noise = flow.draw_noise(shape, generators, device) if noise is None else noise.to(device)

        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            cond, uncond = (vars(self.encode(texts, t5_length)) for texts in (prompts, negatives))
            model = flow.guided(self.mmdit, guidance, cond, uncond)
            latent = flow.sample(model, noise, flow.schedule(steps, self.shift, self.kind), method=method,
                                 generator=generators, callback=callback)
            if output == "latent":
                return latent
            images = self.vae.decode(self.vae.from_latent(latent)).float()
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output == "tensor" else to_pil(images)

    def encode(self, prompts: list[str], t5_length=None) -> Conditioning:
        """Prompts -> Conditioning on the transformer's device."""
        said = self.encoders(prompts, self.t5_length if t5_length is None else t5_length)
        if self.zero_empty:
            filled = torch.tensor([bool(p.strip()) for p in prompts], device=said.context.device)
            said = Conditioning(said.context * filled[:, None, None], said.pooled * filled[:, None])
        return said

    def notice(self, prompt: str) -> str | None:
        """One line if some encoder does not see the whole prompt."""
        lengths = (self.encoders.clip_length, self.encoders.clip_length, self.t5_length)
        cut = [f"{name} ({length} tokens)"
               for name, length, tokenizer in zip(ENCODERS, lengths, self.encoders.tokenizers)
               if tokenizer.truncated([prompt], length)[0]]
        return (f"notice: the prompt is too long for {', '.join(cut)}; its end is not seen there"
                if cut else None)


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
    p.add_argument("--model", help="folder of a run; default: the last one under runs/")
    p.add_argument("-n", type=int, default=1, help="pictures, from seed, seed + 1, ... (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    p.add_argument("--steps", type=int, help="steps from noise to picture (default: 20 for a run)")
    p.add_argument("--guidance", type=float,
                   help="1: none; more: closer to the prompt, less varied (default: 3 for a run)")
    p.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--negative", default="", help="what guidance leads away from (default: nothing)")
    p.add_argument("--method", default="euler", choices=flow.METHODS, help="sampler (default: euler)")
    p.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    p.add_argument("--out", help="file to write (default: a new name under samples/)")
    p.error = refuse
    return p.parse_args(argv)


def refuse(message: str):
    raise ValueError(f"{message}: see python sample.py --help")


def main(argv=None) -> None:
    try:
        args = parse(argv)
        if args.prompt is None:
            return demo()
        if args.n < 1:
            raise ValueError(f"-n is {args.n}: ask for 1 picture or more")
        paths = [free_path(args.out, args.prompt, args.seed + i, args.n) for i in range(args.n)]
        folder = args.model or last_run(finished=True)
        pipe = Pipeline.from_pretrained(folder, device=args.device)
        asked = {k: v for k in ("steps", "guidance", "height", "width")
                 if (v := getattr(args, k)) is not None}
        settings = {"prompt": args.prompt, "negative": args.negative, "method": args.method,
                    "steps": pipe.steps, "guidance": pipe.guidance, "height": pipe.size[0],
                    "width": pipe.size[1], "shift": pipe.shift, "schedule": pipe.kind,
                    "model": str(folder)} | asked
        if line := pipe.notice(args.prompt):
            print(line)
        for start in range(0, args.n, 16):                              # sixteen at a time bounds the memory
            seeds = [args.seed + i for i in range(start, min(args.n, start + 16))]
            images = pipe([args.prompt] * len(seeds), negative=args.negative, seed=seeds, method=args.method,
                          **asked)
            for image, seed, path in zip(images, seeds, paths[start:]):
                save_picture(image, path, settings | {"seed": seed})
                print(path)
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)


def demo() -> None:
    """An untrained pipeline cannot draw, but it must keep its promises about seeds, batches and sizes."""
    from tempfile import TemporaryDirectory
    from stages import build
    from train import TrainConfig, make_tokenizers

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
