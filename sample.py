"""Sampling: a prompt in, a picture out, from the command line.

    python sample.py "a red star left of a blue ring"
    python sample.py "a red star" -n 4 --seed 7 --steps 50 --guidance 4 --method heun
    python sample.py "a red star" "a blue ring" "three hearts"      several: weights are read once
    python sample.py "a lighthouse at dusk, oil on canvas" --model sd3.5_large.safetensors --int8
    python sample.py "the same in winter" --model sd3.5_large.safetensors --image dusk.png --strength 0.7
    python sample.py "the same in winter" --model sd3.5_large.safetensors --lora style.safetensors=0.8
    python sample.py --like samples/a-red-star-7.png --steps 100       the same again, except for given flags
    python sample.py --dry-run --model sd3.5-large              what it would take; needs no weights

pipeline.py does the work. Here are the flags, the files and what may go wrong:
- What can be checked without weights is checked before 20 GB of them are read.
- Nothing is overwritten, and a picture appears whole or not at all.
- A failure ends with one line that names the remedy, and with exit code 2.
- Standard output gets the pictures' paths and nothing else; notices and progress go to standard error.
- The settings of a picture are JSON in its PNG's text chunk "parameters"; --like reads them.

--model is a folder that train.py wrote, or published weights, of which a dropped encoder is not even loaded.
Zeros take its place, as in training, or with --left-out what ComfyUI does (see pipeline.py).
"""
import argparse
import difflib
import itertools
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import flow
import offload
from finetune import Lora
from pipeline import (DEFAULTS, Pipeline, at_once, check_request, longest_side, pick_device,
                      published_configs, recognise, save_picture, seeds_of, settings_of, side_of,
                      text_dtype_of)
from run_folder import is_run, last_run, read_run, run_configs
from tensor_files import check_writable
from text_encoders import ENCODERS
from weights import free_memory

REPEATED = ("negative", "seed", "steps", "guidance", "height", "width", "method", "schedule", "shift",
            "model", "tokenizers", "lora", "image", "strength", "t5_length", "drop", "left_out", "int8",
            "dtype")


# ---------------------------------------------------------------------------------------------------- request

def parse(argv=None):
    p = argparse.ArgumentParser(description="draw what a prompt says", allow_abbrev=False)
    p.add_argument("prompt", nargs="*", help='such as "a red star left of a blue ring"; several: in turn')
    p.add_argument("--model", "--run", help="folder of a run, or published weights: a .safetensors file or a "
                   "diffusers folder; default: the last run under runs/")
    p.add_argument("-n", type=int, default=1,
                   help="pictures of each prompt, from seed, seed + 1, ... (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    p.add_argument("--steps", type=int,
                   help="steps from noise to picture (default: the model's; 20 for a run)")
    p.add_argument("--guidance", type=number, help="1: none; more: closer to the prompt, less varied "
                   "(default: the model's; 3 for a run). Skip-layer guidance is apart")
    p.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as trained)")
    p.add_argument("--negative", default="", help="what guidance leads away from (default: nothing)")
    p.add_argument("--method", default="euler", choices=flow.METHODS, help="sampler (default: euler)")
    p.add_argument("--schedule", choices=("reference", "clean"),
                   help="see flow.schedule (default: reference for published weights, clean for a run)")
    p.add_argument("--shift", type=number, help="of the schedule, towards noise (default: the model's)")
    p.add_argument("--image", help="a picture to begin with")
    p.add_argument("--strength", type=number,
                   help="how much of --image may change, above 0 and at most 1 (default: 0.6)")
    p.add_argument("--skip-layer-guidance", type=number, metavar="SCALE",
                   help="0: none (default: 2.5 for SD3.5-medium, the only model made for it)")
    p.add_argument("--lora", nargs="+", action="extend", metavar="FILE",
                   help="adapters that change the model, each FILE or FILE=STRENGTH (default: 1)")
    p.add_argument("--out", help="file to write, or a folder (default: a new name under samples/)")
    p.add_argument("--like", metavar="PNG", help="a picture drawn by sample.py: its settings apply where "
                   "no flag says otherwise")
    text = p.add_argument_group("text")
    text.add_argument("--t5-length", type=int, help="tokens of T5 (default: a run's own; for published "
                      "weights 77, and up to 256 where the prompt needs them)")
    text.add_argument("--drop", nargs="+", action="extend", type=encoder, metavar="ENCODER",
                      help=f"encoders to do without, of {', '.join(ENCODERS)}: zeros take their place")
    text.add_argument("--drop-t5", action="store_true", help="short for --drop t5")
    text.add_argument("--left-out", action=argparse.BooleanOptionalAction, default=False,
                      help="a dropped T5, or both CLIPs dropped, give no tokens instead of zeros (ComfyUI's "
                      "convention)")
    text.add_argument("--tokenizers", help="folder with tokenizer/ and tokenizer_3/ for published weights "
                      "that have none beside them")
    memory = p.add_argument_group("memory and speed")
    memory.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    memory.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of published weights "
                        "(default: bfloat16 on a card, float16 for the transformer on one too old for that, "
                        "else float32); of autocast for a run (default: none)")
    memory.add_argument("--offload", default="auto", choices=("auto", *offload.MODES), help="where weights "
                        "wait for their turn, see offload.py (default: auto, the fastest that fits the card)")
    memory.add_argument("--int8", action=argparse.BooleanOptionalAction, default=False,
                        help="transformer and T5 in 8 bits: half the memory")
    memory.add_argument("--dry-run", action="store_true", help="only say what it would take; --model can be "
                        f"one of {', '.join(offload.PRESETS)}, too")
    p.error = partial(refuse, flags=p._option_string_actions)
    args = p.parse_args(argv)
    if args.like:
        flags, prompt = flags_of(args.like, args)
        argv = sys.argv[1:] if argv is None else argv
        args = p.parse_args([*flags, *argv, *([] if args.prompt else ["--", prompt])])
        args.strength = args.strength if args.image else None           # --image "" removes it
    args.lora, args.drop = args.lora or [], args.drop or []
    args.dtype = args.dtype and getattr(torch, args.dtype)
    args.drop = tuple(dict.fromkeys(args.drop + ["t5"] * args.drop_t5))
    if args.left_out and "t5" not in args.drop and len(args.drop) < 2:
        p.error("--left-out is for dropped encoders: add --drop-t5, or --drop clip_l clip_g")
    return args


def refuse(message: str, flags=()):
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else ()
    raise ValueError(f"{message}: " + (f"did you mean {near[0]}?" if near else "see python sample.py --help"))


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def file_and_strength(lora: str) -> tuple[str, float]:
    """Splits a value of --lora; a file's own name may contain "="."""
    name, _, strength = lora.rpartition("=")
    if not name or Path(lora).exists():
        return lora, 1.0
    try:
        return name, number(strength)
    except ValueError:
        raise ValueError(f"--lora {lora}: the strength {strength!r} is not a number, such as 0.8") from None


def encoder(name: str) -> str:
    if name not in ENCODERS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ENCODERS)}; the prompt comes first")
    return name


def check(args) -> None:
    """ValueError for what is wrong whatever the weights: better now than after reading them."""
    if not args.prompt and args.lora and not Path(file_and_strength(args.lora[-1])[0]).is_file():
        raise ValueError(f"--lora {args.lora[-1]}: there is no such file; if it is the prompt, write it "
                         "before the flags")
    if not args.prompt and not args.dry_run:
        raise ValueError('no prompt: say what to draw, such as python sample.py "a red star"')
    if not 1 <= args.n <= 10_000:
        raise ValueError(f"-n is {args.n}: ask for 1 picture or more, at most 10,000")
    if args.strength is not None and not args.image:
        raise ValueError("--strength is for a picture to begin with: add --image")
    asked = dict(height=64, width=64, steps=1, guidance=1)
    asked |= {name: v for name in asked if (v := getattr(args, name)) is not None}
    check_request([""], [""], output="pil", **asked)
    seeds_of(args.seed, args.n)
    for lora in args.lora:
        if not Path(file := file_and_strength(lora)[0]).is_file():
            raise ValueError(f"--lora {file}: there is no such file; its strength is given as FILE=0.8")
    # with the steps asked for if all else is known: a run's schedule is not that of published weights
    steps = args.steps if args.steps and args.schedule else 2
    flow.part_way(flow.schedule(steps, 1 if args.shift is None else args.shift, args.schedule or "clean"),
                  strength_of(args))
    if args.t5_length is not None and args.t5_length != 0 and not 2 <= args.t5_length <= 10_000:
        raise ValueError(f"--t5-length is {args.t5_length}: 2 to 10,000, or 0 for none")
    if args.dry_run:
        return
    if len(args.prompt) > 1 and is_file_name(args.out):
        raise ValueError(f"--out {args.out} is one file for several prompts: give a folder, ending in /")
    for i in range(args.n if args.out else 1):
        free_path(args.out, args.prompt[0], args.seed + i, args.n)


def strength_of(args) -> float:
    return 0.6 if args.strength is None else args.strength


# -------------------------------------------------------------------------------------------------- the files

def is_file_name(out) -> bool:
    """Does --out name a file, not a folder?"""
    return bool(out) and not Path(out).is_dir() and not out.endswith(("/", os.sep))


def free_path(out, prompt: str, seed: int, n: int) -> Path:
    """Where a picture goes: to the file `out` (with the seed in its name if n are drawn), into the folder
    `out`, or into samples/. In a folder the name is new: the prompt's words, the seed, a number."""
    folder = Path(out or "samples")
    if is_file_name(out):
        if folder.suffix.lower() not in ("", ".png"):
            raise ValueError(f"--out {out}: pictures are PNG, which keeps their settings; end it in .png")
        path = folder.with_name(f"{folder.stem}-{seed}.png" if n > 1 else f"{folder.stem}.png")
        if os.path.lexists(path):
            raise ValueError(f"{path} exists already: choose another --out, or leave it out for a new name")
    else:
        words = re.sub(r"[^\w]+", "-", prompt).strip("-").lower()[:60] or "empty"
        words = words.encode("utf-8", "replace")[:120].decode("utf-8", "ignore")    # names: up to 255 bytes
        path, i = folder / f"{words}-{seed}.png", 1
        while os.path.lexists(path):                    # a link that leads nowhere is there, too
            path, i = folder / f"{words}-{seed}-{i}.png", i + 1
    check_writable(path.parent)
    return path


@contextmanager
def claimed(*wanted):
    """The path that free_path finds for a picture, held by an empty file until the picture takes its place:
    another command that draws at the same time then finds another. Only a kill or a power cut leaves it."""
    while True:
        path = free_path(*wanted)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            break
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def flags_of(path, args) -> tuple[list[str], str]:
    """The settings of a picture drawn here, as flags, and its prompt. Left out are where to write, on which
    device, and lists of which `args` has its own."""
    flags = []
    try:
        saved = settings_of(path)
        saved["skip_layer_guidance"] = saved["skip_layers"][0] if saved["skip_layers"] else 0
        for name in (*REPEATED, "skip_layer_guidance"):
            flag, value = f"--{name.replace('_', '-')}", saved.get(name)
            if isinstance(value, bool):
                flags.append(flag if value else flag.replace("--", "--no-"))
            elif isinstance(value, list):
                flags += [flag, *value] if value and not getattr(args, name) else []
            elif value is not None:
                flags.append(f"{flag}={value}")
        if not all(isinstance(word, str) for word in (saved["prompt"], *flags)):
            raise ValueError("its settings are not sample.py's")
        return flags, saved["prompt"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"--like {path} cannot be used: sample.py did not draw it ({e})") from None


def open_picture(path):
    """RGB, upright, transparent parts white."""
    try:
        return data.whole_picture(path)
    except ValueError as e:
        raise ValueError(f"--image {path} cannot be used: {e}") from None


def sides_of(folder, drop) -> tuple[int, int]:
    """Pixels a side that a model draws unless asked, and the most that its positions reach."""
    run = is_run(folder)
    configs = run_configs(folder, drop) if run else published_configs(folder, drop)
    side = read_run(folder)["size"] if run else side_of(configs)
    return side, longest_side(configs["mmdit"], configs["vae"].factor)


def fitted(image, side: int, most: int) -> tuple[int, int]:
    """(height, width) for a given picture: its own, in multiples of 16, but no more than side x side pixels
    in all and `most` a side."""
    scale = min(1.0, side / math.sqrt(image.height * image.width), most / max(image.height, image.width))
    return tuple(max(16, int(side * scale / 16 + 1e-6) * 16) for side in (image.height, image.width))


# ---------------------------------------------------------------------------------------------------- drawing

def draw(args) -> None:
    """What the command line asked for, picture by picture."""
    image = open_picture(args.image) if args.image else None
    folder = args.model or last_run(finished=True)
    if str(folder) in offload.PRESETS and not Path(folder).exists():
        raise ValueError(f"{folder} is a name, not weights: give their file or folder, or add --dry-run")
    loras = [Lora(*file_and_strength(lora)) for lora in args.lora]
    given = fitted(image, *sides_of(folder, args.drop)) if image else (None, None)
    size = tuple(asked or own for asked, own in zip((args.height, args.width), given))
    pipe = Pipeline.from_pretrained(
        folder, device=args.device, dtype=args.dtype, drop=args.drop, offload=args.offload, int8=args.int8,
        tokenizers=args.tokenizers, size=size, pictures=args.n, loras=loras)
    pipe.kind, pipe.shift = args.schedule or pipe.kind, pipe.shift if args.shift is None else args.shift
    if args.skip_layer_guidance is not None:
        _, *where = pipe.skip_layers or DEFAULTS["sd3.5-medium"]["skip_layers"]
        pipe.skip_layers = (args.skip_layer_guidance, *where) if args.skip_layer_guidance else None
    if pipe.skip_layers and max(pipe.skip_layers[1]) >= pipe.mmdit.config.depth:
        print("notice: --skip-layer-guidance has no effect: this model lacks the layers", file=sys.stderr)
        pipe.skip_layers = None
    height, width = (asked or own for asked, own in zip(size, pipe.size))
    asked = {"steps": pipe.steps, "guidance": pipe.guidance, "height": height, "width": width,
             "t5_length": None}
    asked |= {k: v for k in asked if (v := getattr(args, k)) is not None}
    settings = asked | {"negative": args.negative, "method": args.method, "shift": pipe.shift,
                        "schedule": pipe.kind, "skip_layers": pipe.skip_layers, "model": str(folder),
                        "tokenizers": args.tokenizers, "lora": args.lora, "drop": args.drop,
                        "left_out": args.left_out, "int8": args.int8,
                        "dtype": args.dtype and offload.short(args.dtype), "image": args.image,
                        "strength": strength_of(args) if image else None}
    tell(pipe, args, asked, loras)
    some = at_once(asked["height"], asked["width"], pipe.vae.config.factor)
    steps = len(flow.part_way(range(asked["steps"] + 1), strength_of(args) if image else 1)) - 1
    # each prompt by itself: the longest would lengthen T5's text for all, which changes pictures
    for prompt, first in itertools.product(args.prompt, range(0, args.n, some)):
        seeds = [args.seed + i for i in range(first, min(args.n, first + some))]
        with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:      # on a terminal only
            images = pipe([prompt] * len(seeds), negative=args.negative, seed=seeds, method=args.method,
                          drop=args.drop, left_out=args.left_out, image=image, strength=strength_of(args),
                          callback=lambda *_: bar.update(), **asked)
        for picture, seed in zip(images, seeds):
            with claimed(args.out, prompt, seed, args.n) as path:
                save_picture(picture, path, settings | {"prompt": prompt, "seed": seed})
            print(path, flush=True)
    if pipe.places.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(pipe.places.device) / offload.GB
        print(f"--offload {pipe.places.mode}: at most {most:.2f} GB of the card, besides what CUDA takes",
              file=sys.stderr)


def tell(pipe, args, asked, loras) -> None:
    """Prints notices about what will have no effect, or a surprising one."""
    for lora in loras:
        if lora.left_out:
            print(f"notice: {lora.path} has {lora.left_out} tensors for text encoders, which are left out",
                  file=sys.stderr)
    texts = dict.fromkeys([args.negative], "negative prompt") | dict.fromkeys(args.prompt, "prompt")
    for text, what in texts.items():
        if line := pipe.notice(text, asked["t5_length"], what):
            print(line, file=sys.stderr)
    if asked["guidance"] < 1:
        does = "leads away from the prompt" if asked["guidance"] < 0 else "weakens the prompt"
        print(f"notice: --guidance {asked['guidance']:g} {does}: 1 is no guidance, 0 draws without the "
              "prompt", file=sys.stderr)
    if args.image and len(flow.part_way(range(asked["steps"] + 1), strength_of(args))) > asked["steps"]:
        print(f"notice: --image has no effect: --strength {strength_of(args):g} of {asked['steps']} steps "
              "are all of them", file=sys.stderr)
    if args.negative and asked["guidance"] == 1:
        print("notice: --negative has no effect at guidance 1; turbo models are made for it, for others "
              "add --guidance 4", file=sys.stderr)


def dry_run(args) -> None:
    """Prints what drawing would take, from shapes alone."""
    model = args.model or str(last_run(finished=True))
    run = is_run(model)
    if model in offload.PRESETS and not Path(model).exists():
        configs, name, how = offload.preset_configs(model), model, DEFAULTS[model]
    elif run:
        configs, name, how = run_configs(model, args.drop), model, {"guidance": 3.0}
    elif not Path(model).exists():
        raise ValueError(f"{model} does not exist: give weights, or one of {', '.join(offload.PRESETS)}; a "
                         "turbo model takes what the model it was made from takes with --guidance 1")
    else:
        configs = published_configs(model, args.drop)
        name, how = recognise(configs["mmdit"], model)
    configs = {part: c for part, c in configs.items() if part not in args.drop}
    saved = read_run(model) if run else {"size": side_of(configs), "t5_length": 77}
    guidance = how["guidance"] if args.guidance is None else args.guidance
    height, width = args.height or saved["size"], args.width or saved["size"]
    check_request([""], [""], height, width, 1, guidance, "pil")
    device = pick_device(args.device)
    free = free_memory(device) if device.type == "cuda" else None
    dtype = torch.float32 if run else args.dtype or torch.bfloat16
    print(offload.report(name, configs, free, height=height, width=width, guidance=guidance != 1, dtype=dtype,
                         text_dtype=text_dtype_of(model, torch.device("cuda")) if run else None,
                         t5_length=saved["t5_length"] if args.t5_length is None else args.t5_length,
                         pictures=min(args.n, at_once(height, width, configs["vae"].factor))))


def out_of_memory(e, args) -> str:
    ram = re.search("CPUAllocator|not enough memory", str(e))               # not a card's
    kind = pick_device(args.device).type
    wide = args.model and (args.dtype == torch.float32 or args.dtype is None and kind != "cuda")
    streams = not ram and args.offload != "block" and kind != "mps"         # whose memory is the CPU's, too
    lean = [flag for flag, helps in (("--int8", not args.int8), ("--drop-t5", "t5" not in args.drop),
                                     ("--dtype bfloat16", ram and wide),
                                     ("--offload block", streams)) if helps]
    whose = "main" if ram else "the card's"
    return (f"{whose} memory was not enough ({str(e).splitlines()[0]}): try "
            f"{', '.join(lean + ['a smaller --height and --width'])}; --dry-run says how much each takes")


def main(argv=None) -> None:
    try:
        data.print_any_sign()
        args = parse(argv)
        check(args)
        (dry_run if args.dry_run else draw)(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as e:
        if not offload.is_out_of_memory(e):
            raise
        print(f"sample.py: {out_of_memory(e, args)}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
