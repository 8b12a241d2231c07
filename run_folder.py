"""What is in the folder of a run, and how does it come back exactly? Apart from checkpoints.py, since
drawing, scoring and learning on read finished parts alone.

`train.py` fills the folder and `sample.py` reads it:

    config.json                    how it was trained: every field of TrainConfig. Where `encoders` names
                                     published weights, those take the place of all parts but mmdit
    tokenizers/clip, tokenizers/t5 vocab.json + merges.txt, tokenizer.json
    vae.safetensors                the four kinds of part, each finished by its own stage; the config that
    clip_l, clip_g, clip_l_image,    shapes a part is in its file's metadata, so a part can be loaded
    clip_g_image, t5 .safetensors    without guessing
    mmdit.safetensors              the averaged (EMA) weights: what is sampled from
    checkpoints/                   of the stage that is not finished yet (checkpoints.py)
    cache/                         latents and text features, which the transformer learns from (prepare.py)
    start/mmdit.safetensors        of a second phase: the transformer that it began with
    metrics.csv, loss.png, samples/, film.gif; with --lora also lora.safetensors
    lock                           held by the one process that writes here, and gone when it ends

Three rules. Nothing is ever unpickled: tensors are safetensors, the rest is JSON. A file is written under a
temporary name, flushed to disk and renamed, so a crash leaves the old one. Loading is strict: every parameter
is filled exactly once, with the right shape, finite numbers and the checksum that it was saved with, as no
library notices a flipped byte; or a CheckpointError says in one line what is wrong and what to do.

Published models, which have other names and layouts, are read by weights.py.

Run `python run_folder.py`: saves a part, loads it back bit by bit, and shows what a damaged file says.
"""
import json
import os
import socket
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmdit import MMDiT, MMDiTConfig
from tensor_files import CheckpointError, opened, write_atomically
from text_encoders import (ENCODERS, CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder,
                           T5Config, T5Encoder, TextEncoders)
from tokens import EOS, load_clip_tokenizer, load_t5_tokenizer
from vae import AutoencoderKL, VAEConfig
from weights import config_of, load_clip, load_t5, load_text_encoders, load_vae

try:
    import fcntl
except ImportError:                             # Windows
    fcntl = None
    import msvcrt

PARTS = {                                       # file name: (module, its config)
    "mmdit": (MMDiT, MMDiTConfig), "vae": (AutoencoderKL, VAEConfig), "t5": (T5Encoder, T5Config),
    "clip_l": (CLIPTextEncoder, CLIPTextConfig), "clip_g": (CLIPTextEncoder, CLIPTextConfig),
    "clip_l_image": (CLIPImageEncoder, CLIPImageConfig), "clip_g_image": (CLIPImageEncoder, CLIPImageConfig),
}


def read_json(path) -> dict:
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(told, dict):
            raise ValueError("no object in braces")
        return told
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: is this the folder of a finished or interrupted run?") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({e}): restore it, or train the run again") from None


def save_tensors(path, tensors: dict, about: dict) -> None:
    """Tensors by name, with their checksums, and a JSON-able dict into one safetensors file."""
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    told = json.dumps(about | {"crc32": {k: crc32(t) for k, t in tensors.items()}})
    try:                                        # one entry, as safetensors writes several in any order
        write_atomically(path, lambda p: save_file(tensors, p, metadata={"about": told}))
    except SafetensorError as e:                # what it raises when the disk is full
        raise OSError(f"{path} could not be written ({e}): make room, then "
                      "go on with  python train.py --resume") from None


def load_tensors(path, names=None) -> tuple[dict, dict]:
    """What `save_tensors` wrote: (tensors on the CPU, about). names: read only these; None: all."""
    try:
        with opened(path) as f:
            tensors = {k: f.get_tensor(k) for k in (f.keys() if names is None else names)}
            about = json.loads((f.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the run did not get that far, "
                              "continue it with train.py --resume") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}): delete it and go on with "
                              "an older copy, or train the run again") from None
    sums = about.pop("crc32", {})
    for k, t in tensors.items():
        if k in sums and crc32(t) != sums[k]:
            raise CheckpointError(f"{path}: {k} is not what was written, its checksum differs: delete the "
                                  "file and go on with an older copy, or train the run again")
    return tensors, about


def about_of(path) -> dict | None:
    """What a file of `save_tensors` says about itself; None if it is missing or not a whole file."""
    try:
        with opened(path) as f:
            return json.loads((f.metadata() or {}).get("about", "{}"))
    except (FileNotFoundError, SafetensorError, ValueError):
        return None


def crc32(t: torch.Tensor) -> int:
    return zlib.crc32(t.contiguous().reshape(-1).view(torch.uint8).numpy())


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
    for name, x in own.items():
        x.copy_(tensors[name])
    return module


def save_part(run, name: str, module: torch.nn.Module, tensors: dict | None = None) -> None:
    """tensors: the module's, if the module itself does not hold all of them."""
    save_tensors(Path(run, f"{name}.safetensors"), tensors or module.state_dict(),
                 {"part": name, "config": asdict(module.config)})


def load_part(run, name: str, later=nullcontext()) -> torch.nn.Module:
    """One of PARTS from a run's folder, with the config in its file, on the CPU, without gradients.

    later: a parallel.Later, with which its tensors stay in the file until they are needed."""
    path = Path(run, f"{name}.safetensors")
    tensors, about = load_tensors(path)
    config = part_config(path, name, about)
    with later:
        try:
            built = PARTS[name][0](config)
        except (TypeError, ValueError) as e:
            raise unknown(path, e) from None
        return load_strict(built, tensors, path).eval().requires_grad_(False)


def part_config(path, name: str, about: dict):
    """The config of one of PARTS, from what its file `path` says about itself."""
    if about.get("part") != name:
        raise CheckpointError(
            f"{path} was not written as {name!r} by train.py: it cannot be loaded as a part of a run")
    try:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        return PARTS[name][1](**settings)
    except (KeyError, TypeError, ValueError) as e:
        raise unknown(path, e) from None


def unknown(path, e) -> CheckpointError:
    return CheckpointError(f"{path} describes an architecture that this code does not know ({e})")


def load_tokenizers(folder, clip_length: int) -> dict:
    """A run's three, in the order of the encoders: CLIP's two share a vocabulary but pad differently."""
    words = Path(folder) / "tokenizers"
    try:
        return {"clip_l": load_clip_tokenizer(words / "clip", EOS, clip_length),
                "clip_g": load_clip_tokenizer(words / "clip", "!", clip_length),
                "t5": load_t5_tokenizer(words / "t5")}
    except Exception as e:                      # the tokenizers library has no other class of errors
        raise CheckpointError(f"the tokenizers in {words} cannot be used ({e}): restore them, or train the "
                              "run again") from None


def read_run(run) -> dict:
    """A run's config.json. CheckpointError unless it tells what drawing and learning on ask of it."""
    saved = read_json(Path(run, "config.json"))
    for name in ("size", "clip_length", "t5_length", "shift", "seed", "pictures"):
        value = saved.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{run}/config.json: {name} is {value!r}, not a number: restore the file, "
                                  "or train the run again")
    return saved


def is_run(path) -> bool:
    """Whether `path` is a folder that train.py wrote, not published weights."""
    return Path(path, "config.json").is_file() and "t5_length" in read_json(Path(path, "config.json"))


def refuse_part(path) -> None:
    """CheckpointError if the file, or a transformer in the folder, is a part of a run that lost the rest."""
    file = Path(path) if Path(path).is_file() else Path(path, "mmdit.safetensors")
    try:
        about = about_of(file) or {}
    except OSError:                                             # the loader will say what is wrong
        return
    if about.get("part"):
        raise CheckpointError(f"{file} is one part of a run of train.py: give the run's folder, with the "
                              "other parts and its config.json")


def is_published(path) -> bool:
    """Whether `path` is a file of weights, or a folder of them that is not a run's."""
    return bool(path) and not is_run(path) and (
        Path(path).is_file() or Path(path, "transformer").is_dir() or any(Path(path).glob("*.safetensors")))


def home_of_encoders(path) -> Path:
    """Where to find the autoencoder and the text encoders that a run's transformer learned from: in its own
    folder, or in the published weights that its config.json names. For published weights: there."""
    return Path(is_run(path) and read_json(Path(path, "config.json")).get("encoders") or path)


def load_encoders(path, *, drop=(), dtype=None, t5_width=4096) -> tuple[AutoencoderKL, TextEncoders]:
    """The autoencoder and the text encoders of a run, or of published weights, on the CPU.

    dtype: of published text encoders; None: as they are stored. drop: names of those that zeros replace; a
    T5 among them is not even loaded, and its zeros are t5_width wide."""
    home = home_of_encoders(path)
    if is_run(home):
        vae, *towers = (load_part(home, name) for name in ("vae", "clip_l", "clip_g"))
        configs = [clip.config for clip in towers]
        towers.append(None if "t5" in drop else load_part(home, "t5"))
        towers = [None if name in drop else tower for name, tower in zip(ENCODERS, towers)]
        words = list(load_tokenizers(home, configs[0].context_length).values())
        encoders = TextEncoders(*towers, words, (*(c.width for c in configs), t5_width))
    else:
        vae = load_vae(home, dtype=torch.float32)
        configs = [config_of(home, name) for name in ENCODERS[:2]]
        encoders = load_text_encoders(home, dtype=dtype, drop=drop,
                                      widths=(*(c.width for c in configs), t5_width))
    encoders.clip_length = configs[0].context_length                        # even if both are dropped
    return vae, encoders


def config_of_part(run, name: str):
    """The config of one of PARTS in a run's folder; no tensor is read."""
    file = Path(run, f"{name}.safetensors")
    return part_config(file, name, load_tensors(file, ())[1])


def run_configs(path, drop=()) -> dict:
    """The configs of a run's transformer, autoencoder and text encoders (without T5 if it is in `drop`), from
    their files, without reading a tensor. CheckpointError unless they fit each other."""
    home, configs = home_of_encoders(path), {}
    for name in ("mmdit", "vae", *(e for e in ENCODERS if e != "t5" or e not in drop)):
        folder = path if name == "mmdit" else home
        configs[name] = (config_of_part if is_run(folder) else config_of)(folder, name)
    check_fit(path, configs, "the folder mixes two runs")
    return configs


def check_fit(path, configs: dict, cause: str) -> None:
    """CheckpointError, which names the cause, unless the transformer takes what the other parts give."""
    c, t5, channels = configs["mmdit"], configs.get("t5"), configs["vae"].z_channels
    if sum(text_widths(configs)[:2]) != c.pooled_dim or (t5 and t5.width != c.context_dim):
        raise CheckpointError(f"{path}: the text encoders do not fit the transformer, which needs "
                              f"{c.pooled_dim} pooled numbers and tokens {c.context_dim} wide: {cause}")
    if channels != c.in_channels:
        raise CheckpointError(f"{path}: the autoencoder has {channels} latent channels, the transformer "
                              f"takes {c.in_channels}: {cause}")


def text_widths(configs) -> tuple[int, int, int]:
    """The widths of CLIP-L's, bigG's and T5's features; a dropped one's is what the others leave of the
    transformer's."""
    c, (l, g) = configs["mmdit"], (configs.get(name) for name in ("clip_l", "clip_g"))
    l, g = (clip and (clip.projection_dim or clip.width) for clip in (l, g))
    l = max(0, c.pooled_dim - (g or 0)) if l is None else l
    return l, max(0, c.pooled_dim - l) if g is None else g, c.context_dim


def bare_encoders(path) -> dict:
    """The autoencoder and text encoders of published weights, by name, without numbers: for their sizes."""
    return {"vae": load_vae(path, device="meta"), "t5": load_t5(path, device="meta"),
            **{name: load_clip(path, name, device="meta") for name in ("clip_l", "clip_g")}}


# ------------------------------------------------------------------------------------------------ one writer

@contextmanager
def sole_writer(run):
    """Inside, no other process can write to the same run or cache. CheckpointError if one already does.

    The operating system ties the lock to the open file, so it ends with the process, however that ends: a
    lock file that a killed process left behind stops nobody. Its text is only for the message. The process
    that finishes removes the file; one that had opened it by then locks a removed file, which keeps nobody
    out, and so begins again with a new one."""
    path = Path(run, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:                               # a byte far beyond the text, which stays readable for others
                f.seek(1 << 20)
                msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            f.seek(0)
            who = f.read() or "another process"
            raise CheckpointError(f"{run} is being written by {who}: wait for its end, "
                                  "or choose another --out") from None
        except OSError as e:                    # network file systems without locks
            print(f"{path} cannot be locked ({e}): make sure that no other process writes to {run}")
        if fcntl and not is_at(f, path):
            with sole_writer(run):
                yield
            return
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        try:
            yield
        finally:
            f.truncate(0)
            if fcntl:                           # Windows cannot remove an open file
                path.unlink(missing_ok=True)


def is_at(f, path) -> bool:
    """Whether the open file f is the one that path names."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def has_run(folder) -> bool:
    return Path(folder, "config.json").is_file()


def last_run(root="runs", finished=False) -> Path:
    """The run under `root` with the newest config.json; finished: with the newest trained transformer."""
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


# Exercises. (1) Leave out the rename in `write_atomically` and kill the process while it saves: what does the
# next start find? (2) Flip one byte in the middle of a file: what does `load_part` say, and what does
# `safetensors.torch.load_file`?

if __name__ == "__main__":
    demo()
