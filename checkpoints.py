"""How does a trained model come to rest on disk, and come back exactly?

A run is a folder that `train.py` fills and `sample.py` reads:

    config.json                    how it was trained: every field of TrainConfig
    tokenizers/clip, tokenizers/t5 vocab.json + merges.txt, tokenizer.json
    vae.safetensors                the four kinds of part, each finished by its own stage; the config that
    clip_l, clip_g, clip_l_image,    shapes a part stands in its file's metadata, so a part can be loaded
    clip_g_image, t5 .safetensors    without guessing
    mmdit.safetensors              the averaged (EMA) weights: what is sampled from
    state.safetensors              everything that the unfinished stage needs to go on; gone when training is
                                   done
    metrics.csv, loss.png, samples/

Three rules. Nothing is ever unpickled: tensors are safetensors, the rest is JSON. A file is written under a
temporary name, flushed to disk and renamed, so a crash leaves the old one. Loading is strict: every parameter
is filled exactly once, with the right shape and finite numbers, or a CheckpointError says in one line what is
wrong and what to do. Published models, which have other names and layouts, are read by weights.py; its
functions can be called from here too.

Run `python checkpoints.py`: saves a part, loads it back bit by bit, and shows what a damaged file says.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmdit import MMDiT, MMDiTConfig
from text_encoders import (EOS, CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder, T5Config,
                           T5Encoder, load_clip_tokenizer, load_t5_tokenizer)
from vae import AutoencoderKL, VAEConfig
from weights import load_clip, load_mmdit, load_t5, load_text_encoders, load_vae, save_mmdit     # noqa: F401
from weights import CheckpointError, write_atomically, write_json                                # noqa: F401

PARTS = {                                       # file name: (module, its config)
    "mmdit": (MMDiT, MMDiTConfig), "vae": (AutoencoderKL, VAEConfig), "t5": (T5Encoder, T5Config),
    "clip_l": (CLIPTextEncoder, CLIPTextConfig), "clip_g": (CLIPTextEncoder, CLIPTextConfig),
    "clip_l_image": (CLIPImageEncoder, CLIPImageConfig), "clip_g_image": (CLIPImageEncoder, CLIPImageConfig),
}

ADAMW = ("step", "exp_avg", "exp_avg_sq")


def read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: is this the folder of a finished or interrupted run?") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({e}): restore it, or train the run again") from None


def save_tensors(path, tensors: dict, about: dict) -> None:
    """Tensors by name and a JSON-able dict into one safetensors file."""
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p, metadata={"about": json.dumps(about)}))


def load_tensors(path) -> tuple[dict, dict]:
    """What `save_tensors` wrote: (tensors on the CPU, about)."""
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the run did not get so far, "
                              "continue it with train.py --resume") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}): delete it and go on with "
                              "an older copy, or train the run again") from None


def load_strict(module: torch.nn.Module, tensors: dict, path) -> torch.nn.Module:
    """Fill every parameter and buffer of `module` exactly once from `tensors`;
    anything else is a CheckpointError."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors or name not in own:
            kind = "lacks" if name in own else "has an unknown"
            raise CheckpointError(
                f"{path} {kind} {name}: it belongs to another architecture or version of this code")
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensors[name].shape)}, this model needs "
                                  f"{tuple(own[name].shape)}: it belongs to another architecture")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity: training diverged or the file is "
                                  "damaged, use an older checkpoint or a smaller learning rate")
    module.load_state_dict(tensors)
    return module


def save_part(run, name: str, module: torch.nn.Module) -> None:
    save_tensors(Path(run, f"{name}.safetensors"), module.state_dict(),
                 {"part": name, "config": asdict(module.config)})


def load_part(run, name: str) -> torch.nn.Module:
    """One of PARTS from a run's folder, built as its own file says, on the CPU, without gradients."""
    path = Path(run, f"{name}.safetensors")
    tensors, about = load_tensors(path)
    module, config = PARTS[name]
    if about.get("part") != name:
        raise CheckpointError(
            f"{path} was not written as {name!r} by train.py: it cannot be loaded as a part of a run")
    try:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        built = module(config(**settings))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{path} describes an architecture that this code does not know ({e})") from None
    return load_strict(built, tensors, path).eval().requires_grad_(False)


def load_tokenizers(folder, clip_length: int) -> dict:
    """A run's three, in the order of the encoders: CLIP's two share a vocabulary and pad differently."""
    words = Path(folder) / "tokenizers"
    return {"clip_l": load_clip_tokenizer(words / "clip", EOS, clip_length),
            "clip_g": load_clip_tokenizer(words / "clip", "!", clip_length),
            "t5": load_t5_tokenizer(words / "t5")}


def save_state(run, stage: str, step: int, total: int, params: dict, average: dict, optimizer) -> None:
    """Everything that the rest of the stage depends on, in one file: weights, their average, AdamW's moments,
    the step."""
    tensors = {f"model.{k}": p for k, p in params.items()} | {f"average.{k}": v for k, v in average.items()}
    for k, p in params.items():
        tensors |= {f"adamw.{moment}.{k}": v for moment, v in optimizer.state[p].items()}
    save_tensors(Path(run, "state.safetensors"), tensors, {"stage": stage, "step": step, "total": total})


def load_state(run, stage: str, params: dict, average: dict, optimizer, total: int) -> tuple[int, int]:
    """(first step, number of steps): where `save_state` left off if it was in this stage, else (0, total)."""
    path = Path(run, "state.safetensors")
    if not path.is_file():
        return 0, total
    tensors, about = load_tensors(path)
    if about.get("stage") != stage:
        return 0, total
    for prefix, target in (("model.", params), ("average.", average)):
        for k, p in target.items():
            if prefix + k not in tensors or tensors[prefix + k].shape != p.shape:
                raise CheckpointError(
                    f"{path} does not fit this model at {k}: it belongs to another architecture")
            p.data.copy_(tensors[prefix + k])
    for k, p in params.items():
        moments = [m for m in ADAMW if f"adamw.{m}.{k}" in tensors]
        if moments and len(moments) < len(ADAMW):
            raise CheckpointError(f"{path} lacks a part of AdamW's state of {k}: "
                                  "delete it and start the stage again")
        if moments:                         # none: the last block's ln_q, which never gets a gradient
            optimizer.state[p] = {m: tensors[f"adamw.{m}.{k}"].to(p.device) for m in ADAMW}
    print(f"{stage}: going on at step {about['step']} of {about['total']}")
    return about["step"], about["total"]


def has_run(folder) -> bool:
    return Path(folder, "config.json").is_file()


def last_run(root="runs", finished=False) -> Path:
    """The run under `root` that was written to last; finished: only such that have a trained transformer."""
    marker = "mmdit.safetensors" if finished else "config.json"
    found = sorted(Path(root).glob(f"*/{marker}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise CheckpointError(f"there is no {'finished ' if finished else ''}run under {root}/: "
                              "make one with  python train.py --tiny")
    return found[-1].parent


def demo():
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as run:
        vae = AutoencoderKL(VAEConfig.preset("tiny"))
        save_part(run, "vae", vae)
        again = load_part(run, "vae")
        assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), again.state_dict().values()))
        path = Path(run, "vae.safetensors")
        print(f"saved and loaded {path.stat().st_size:,} bytes, every bit equal")
        path.write_bytes(path.read_bytes()[:100_000])
        try:
            load_part(run, "vae")
        except CheckpointError as e:
            print(f"cut short, it says: {str(e).replace(run, 'runs/x')}")
        else:
            raise AssertionError("a truncated file was loaded")


# Exercises. (1) Leave out the rename and kill the process while it saves: what does the next start find?
# (2) Flip one byte in the middle of a file: it loads without a word.
# What would you store beside it to notice?

if __name__ == "__main__":
    demo()
