"""How is a trained model saved to disk, and how does it come back exactly?

A run is a folder that `train.py` fills and `sample.py` reads:

    config.json                    how it was trained: every field of TrainConfig. Where `encoders` names
                                     published weights, those take the place of all parts but mmdit
    tokenizers/clip, tokenizers/t5 vocab.json + merges.txt, tokenizer.json
    vae.safetensors                the four kinds of part, each finished by its own stage; the config that
    clip_l, clip_g, clip_l_image,    shapes a part is in its file's metadata, so a part can be loaded
    clip_g_image, t5 .safetensors    without guessing
    mmdit.safetensors              the averaged (EMA) weights: what is sampled from
    checkpoints/flow-000500/       everything that the unfinished stage needs to go on from its step 500:
        state.safetensors          weights, their average, optimizers' moments, the last healthy losses;
                                     from many processes shard-00001-... .safetensors, one of each
        manifest.json              stage, step, each file's size and sha256, settings, versions; written last
    cache/                         latents and text features, which the transformer learns from (prepare.py)
    start/mmdit.safetensors        of a second phase: the transformer that it began with
    metrics.csv, loss.png, samples/, film.gif; with --lora also lora.safetensors
    lock                           held by the one process that writes here, and gone when it ends

Four rules. Nothing is ever unpickled: tensors are safetensors, the rest is JSON. A file or a checkpoint's
folder is written under a temporary name, flushed to disk and renamed, so a crash leaves the old one. Loading
is strict: every parameter is filled exactly once, with the right shape and finite numbers, or a
CheckpointError says in one line what is wrong and what to do. The newest two checkpoints are kept, since the
newest may turn out damaged: no library notices a flipped byte, the checksum here does; training then goes on
from the older, and says so. What is not damage (another architecture, a newer format) is refused.

Many processes save through torch.distributed.checkpoint: each writes its share while training goes on, and
the folder can be read by another number of processes, also by one. Its own format, .distcp, keeps an index
that must be unpickled; torch 2.8 brought a writer that puts shards and their offsets into safetensors, which
is used here.

Published models, which have other names and layouts, are read by weights.py; its functions can be called from
here too.

Run `python checkpoints.py`: saves a part, loads it back bit by bit, and shows what a damaged file says.
"""
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmdit import MMDiT, MMDiTConfig
from parallel import Ranks, local, rows_of
from tensor_files import CheckpointError, files_in, opened, sync_folder, write_atomically, write_json
from text_encoders import (ENCODERS, CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder,
                           T5Config, T5Encoder, TextEncoders)
from tokens import EOS, load_clip_tokenizer, load_t5_tokenizer
from vae import AutoencoderKL, VAEConfig
from weights import config_of, load_clip, load_mmdit, load_t5, load_text_encoders, load_vae     # noqa: F401
from weights import save_mmdit                  # noqa: F401  (can be called from here, as the others can)

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

MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}
FORMAT = 1                                      # version of manifest.json and of state.safetensors' names
KEEP = 2                                        # checkpoints


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


# ------------------------------------------------------------------------------ checkpoints of a stage

@dataclass
class State:
    """Everything that, together with the seed, decides the rest of a stage: what a checkpoint holds."""
    stage: str
    total: int                              # steps
    params: dict                            # name -> parameter
    average: dict                           # name -> its average; empty where a stage keeps none
    optimizers: list                        # AdamW; for the transformer Muon too, each with its parameters
    recent: torch.Tensor                    # losses of the last healthy steps, to tell a spike by
    in_a_row: torch.Tensor                  # bad steps since the last healthy one
    step: int = 0                           # steps done
    rollbacks: int = 0                      # how often bad steps sent it back; each has halved the rate


class Damaged(CheckpointError):
    """A checkpoint that cannot be used; an older one may do."""


def checkpoints_of(run, stage) -> list[Path]:
    """Folders of complete checkpoints, oldest first; damage inside them shows only when they are read."""
    found = [(re.fullmatch(rf"{stage}-(\d{{6,}})", p.name), p) for p in Path(run, "checkpoints").glob("*")]
    return [p for _, p in sorted((int(m[1]), p) for m, p in found if m and p.is_dir())]


def remove_checkpoint(folder: Path) -> None:
    """Renames it before deleting, so that half a checkpoint never has a valid name."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)       # what cannot be deleted yet has no valid name at least


def clean_checkpoints(run, stages) -> None:
    """Remove what a killed process left half-written, and checkpoints of stages that are not in `stages`;
    anything else in the folder stays."""
    there = Path(run, "checkpoints")
    for folder in there.glob("*"):
        ours = re.fullmatch(r"([a-z0-9]+)-\d{6,}(\.old)?(\.tmp)?", folder.name)
        if ours and (ours[3] or ours[1] not in stages):
            shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink()
    if there.is_dir() and not any(there.iterdir()):
        there.rmdir()


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def surroundings(state: State, facts: dict, ranks: Ranks) -> dict:
    """What decides how sums are rounded: equal bits are promised only if all of this is equal."""
    device = next(iter(state.params.values())).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads(),
            "ranks": ranks.world, "dtype": facts.get("dtype")}


def owned(state: State):
    """(name of the optimizer's class, optimizer, name, parameter) for each parameter of each optimizer."""
    names = {p: k for k, p in state.params.items()}
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            yield from ((type(optimizer).__name__, optimizer, names[p], p) for p in group["params"])


def tensors_of(state: State) -> dict:
    """Every tensor of a checkpoint, by its name in the file."""
    tensors = {f"model.{k}": p.detach() for k, p in state.params.items()}
    tensors |= {f"average.{k}": v for k, v in state.average.items()} | {"recent": state.recent}
    for kind, optimizer, k, p in owned(state):
        tensors |= {f"{kind.lower()}.{moment}.{k}": v for moment, v in optimizer.state[p].items()}
    return tensors


def manifest_of(state: State, facts: dict, ranks: Ranks) -> dict:
    """A manifest, except for its list of files."""
    return {"format": FORMAT, "stage": state.stage, "step": state.step, "total": state.total,
            "bad_in_a_row": int(state.in_a_row), "rollbacks": state.rollbacks, **facts,
            **surroundings(state, facts, ranks)}


def save_state(run, state: State, facts: dict) -> Path:
    """Write a new checkpoint; of it and the older ones the newest KEEP stay.

    facts: {"settings": flags that shape the model, "fingerprint": of the data, "dtype": of products}. The
    folder gets its name when all of it has reached the disk, so any folder without .tmp is complete. OSError:
    it could not be written, and nothing has changed."""
    return write_state(run, tensors_of(state), manifest_of(state, facts, Ranks()))


def write_state(run, tensors: dict, manifest: dict) -> Path:
    temporary = folder_of(run, manifest).with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_tensors(temporary / "state.safetensors", tensors, {})
        return seal(temporary, manifest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def folder_of(run, manifest: dict) -> Path:
    return Path(run, "checkpoints", f"{manifest['stage']}-{manifest['step']:06d}")


def seal(temporary: Path, manifest: dict, sums: dict | None = None) -> Path:
    """When all files are there: write the manifest, give the folder its name, remove old checkpoints.

    sums: sha256 of files, as far as known."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": (sums or {}).get(p.name) or sha256(p)}
             for p in files_in(temporary)}
    write_json(temporary / "manifest.json", manifest | {"files": files})
    folder = temporary.with_suffix("")
    if folder.exists():                         # damaged, or of steps that were rolled back
        remove_checkpoint(folder)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    there = checkpoints_of(folder.parent.parent, manifest["stage"])
    after = there.index(folder) + 1
    for other in there[after:] + there[:after][:-KEEP]:         # later ones are damaged or were given up
        with suppress(OSError):
            remove_checkpoint(other)
    return folder


def share_of(tensors: dict, ranks: Ranks) -> dict:
    """What this rank saves: its shards of those that are cut up; of those that all hold, one part in N."""
    by_size = sorted((k for k, x in tensors.items() if not hasattr(x, "to_local")),
                     key=lambda k: tensors[k].nbytes)
    own = {*by_size[ranks.rank::ranks.world]}
    return {k: x for k, x in tensors.items() if k in own or hasattr(x, "to_local")}


class Saver:
    """Saves a run's states, one save at a time; `saved` is (stage, step) of the last complete one.

    One process writes one file before `save` returns. With many, `save` copies what this rank is to write
    (share_of) to main memory and returns; a thread writes it while training goes on and computes its
    checksum, since rank 0 would need minutes for those of a large model; rank 0 seals the folder when all
    ranks have written. torch 2.6 and 2.7 cannot write shards without pickling their index: with these, rank 0
    collects everything and writes one file."""

    def __init__(self, run, ranks: Ranks):
        self.run, self.ranks, self.saved, self.pending = run, ranks, ("", 0), None
        self.thread = ThreadPoolExecutor(1) if ranks.world > 1 else None

    def save(self, state: State, facts: dict) -> None:
        """OSError: this state could not be written; or the one before it, but then this one still is."""
        if self.ranks.world == 1:
            save_state(self.run, state, facts)
            self.saved = state.stage, state.step
            return
        try:
            self.settle()
        finally:                                # even if that failed: there may be room again
            self.begin(state, facts)

    def begin(self, state: State, facts: dict) -> None:
        tensors, manifest = tensors_of(state), manifest_of(state, facts, self.ranks)
        try:
            from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
        except ImportError:
            tensors = self.ranks.collect(tensors)
            self.ranks.alone(lambda: write_state(self.run, tensors, manifest))
            self.saved = state.stage, state.step
            return
        temporary = folder_of(self.run, manifest).with_suffix(".tmp")
        self.ranks.alone(lambda: shutil.rmtree(temporary, ignore_errors=True))
        writer = HuggingFaceStorageWriter(temporary, save_distributed=True)
        writer.per_thread_copy_ahead = 0        # all is in main memory: else it asks GPU 0, the thread's own
        written = async_save(share_of(tensors, self.ranks), process_group=self.ranks.saving,
                             storage_writer=writer)
        self.pending = self.thread.submit(self.finish, written, temporary, manifest)

    def finish(self, written, temporary: Path, manifest: dict) -> tuple[str, int]:
        try:
            written.result()                    # raises on every rank if one has failed
            told = self.ranks.told(self.sums(temporary), self.ranks.saving)
            if self.ranks.rank == 0:
                seal(temporary, manifest, {name: x for sums in told for name, x in sums.items()})
        except BaseException as e:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            for rank, (cause, _) in getattr(e, "failures", {}).items():     # what other ranks reported
                e = f"rank {rank}: {cause}"
            raise OSError(f"{temporary} could not be written ({e})".replace("\n", " ")) from None
        return manifest["stage"], manifest["step"]

    def sums(self, temporary: Path) -> dict:
        """sha256 of what this rank has written; {} if it cannot be read: then rank 0 tries, and complains."""
        try:
            return {p.name: sha256(p) for p in temporary.glob(f"shard-{self.ranks.rank + 1:05d}-*")}
        except OSError:
            return {}

    def settle(self) -> None:
        """Wait for the save that is under way. OSError, on all ranks, if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.saved = self.ranks.together(pending.result)


def read_manifest(folder: Path, facts: dict) -> dict:
    """Damaged if it is not this checkpoint's; CheckpointError if other code or settings are needed."""
    try:
        manifest = read_json(folder / "manifest.json")
    except CheckpointError as e:
        missing = not (folder / "manifest.json").exists()
        raise Damaged("it has no manifest.json" if missing else str(e)) from None
    if not isinstance(manifest.get("format"), int):
        raise Damaged("its manifest.json has no format number")
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']}, this code knows {FORMAT}: go on "
                              "with the newer version that wrote it")
    if folder.name != f"{manifest.get('stage')}-{manifest.get('step'):06d}":
        raise Damaged(f"its manifest.json is of {manifest.get('stage')} at step {manifest.get('step')}")
    for name, value in facts.get("settings", {}).items():
        if (saved := manifest.get("settings", {}).get(name, value)) != value:
            flag = "--" + name.replace("_", "-")
            raise CheckpointError(f"{folder} was made with {flag} {saved}, this run has {flag} {value}: "
                                  "correct config.json, or delete the checkpoint to start the stage again")
    return manifest


def verify(folder: Path, facts: dict, rank: int = 0, world: int = 1) -> dict:
    """The manifest of a checkpoint; raises Damaged unless every byte is as it was written. Each of `world`
    ranks checks its share of the files."""
    try:
        manifest = read_manifest(folder, facts)
        for name, about in sorted(manifest["files"].items())[rank::world]:
            path = folder / Path(name).name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if path.stat().st_size != about["bytes"]:
                raise Damaged(f"{name} has {path.stat().st_size:,} bytes, not {about['bytes']:,}")
            if sha256(path) != about["sha256"]:
                raise Damaged(f"{name} is not what was written: its sha256 differs")
        for name in ("step", "total", "bad_in_a_row", "rollbacks"):
            int(manifest[name])
    except OSError as e:
        if e.errno != errno.EIO:                # it may be readable the next time: nothing is given up
            raise
        raise Damaged(f"it cannot be read ({e})") from None         # a bad sector
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise Damaged(f"its manifest.json lacks required entries ({e})") from None
    return manifest


def read_checkpoint(folder: Path, facts: dict, state: State, ranks: Ranks) -> tuple[dict, dict]:
    """(manifest, tensors) of a checkpoint, whoever saved it; from shards, only what this rank holds.

    Raises Damaged on all ranks if one finds damage."""
    manifest, reason = {}, ""
    try:
        manifest = verify(folder, facts, ranks.rank, ranks.world)
    except Damaged as e:
        reason = str(e)
    if reason := ranks.first_word(reason):
        raise Damaged(reason)
    try:
        if any(name.startswith("shard-") for name in manifest["files"]):
            tensors = read_shards(folder, state)
        else:
            tensors = load_whole(folder)
        # `recent` is infinite until there are losses
        bad = [k for k, t in tensors.items() if k != "recent" and not local(t).isfinite().all()]
        reason = f"{bad[0]} holds NaN or infinity" if bad else ""
    except Damaged as e:
        reason = str(e)
    if reason := ranks.first_word(reason):
        raise Damaged(reason)
    return manifest, tensors


def load_whole(folder: Path) -> dict:
    try:
        return load_tensors(folder / "state.safetensors")[0]
    except CheckpointError as e:
        raise Damaged(str(e)) from None


def read_shards(folder: Path, state: State) -> dict:
    """What a Saver of many ranks wrote: whole tensors, but this rank's shards where `state` is cut up."""
    from torch.distributed import checkpoint
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageReader
    except ImportError:
        raise CheckpointError(f"{folder} was written by several processes: to read it, use torch 2.8 or "
                              "newer") from None
    likes = {f"model.{k}": p for k, p in state.params.items()}
    likes |= {f"average.{k}": v for k, v in state.average.items()} | {"recent": state.recent}
    for kind, _, k, p in owned(state):
        likes |= {f"{kind.lower()}.{m}.{k}": torch.zeros(()) if m == "step" else p for m in MOMENTS[kind]}
    try:
        saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {k: torch.empty_like(like.detach()) for k, like in likes.items() if k in saved}
        for k, t in tensors.items():
            if saved[k].size != t.shape:
                raise CheckpointError(f"{folder} does not fit this model at {k}: it belongs to another "
                                      "architecture")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # one process may read alone, on purpose
            checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (SafetensorError, OSError, checkpoint.CheckpointException) as e:
        raise Damaged(f"its shards cannot be read ({e})".replace("\n", " ")) from None
    return tensors


def load_state(run, state: State, facts: dict, healthy=False, ranks: Ranks | None = None) -> bool:
    """Fill `state` from the newest usable checkpoint of its stage; False if there is none.

    healthy: only one that was not saved amid bad steps. CheckpointError if there are checkpoints and all are
    damaged: to start the stage again without saying so would look as if the run had been lost."""
    ranks, damaged = ranks or Ranks(), []
    # another machine may not see yet, or still see, what rank 0 sees: network file systems remember listings
    for name in ranks.same([folder.name for folder in reversed(checkpoints_of(run, state.stage))]):
        folder = Path(run, "checkpoints", name)
        try:
            manifest, tensors = read_checkpoint(folder, facts, state, ranks)
        except Damaged as e:
            damaged.append(f"{folder}: {e}")
            continue
        if not (healthy and manifest["bad_in_a_row"]):
            break
    else:
        if damaged:
            raise CheckpointError(f"no checkpoint of {state.stage} can be used ({'; '.join(damaged)}): "
                                  "restore one, or delete them, and the stage starts again")
        return False
    fill_state(state, manifest, tensors, folder)
    for reason in damaged:
        print(f"went back to step {state.step}, since a newer checkpoint is damaged: {reason}")
    if manifest.get("fingerprint") != facts.get("fingerprint"):
        print(f"the data is not what it was when {folder} was saved: the rest is learned from the new data")
    before = {"ranks": 1, "dtype": facts.get("dtype")} | manifest
    if changed := [f"{k} {before.get(k)}, now {v}" for k, v in surroundings(state, facts, ranks).items()
                   if before.get(k) != v]:
        print(f"saved with {'; '.join(changed)}: what follows is as good, but not equal bit for bit")
    return True


def fill_state(state: State, manifest: dict, tensors: dict, folder: Path) -> None:
    targets = ("model.", state.params), ("average.", state.average), ("", {"recent": state.recent})
    for prefix, target in targets:
        for k, p in target.items():
            if prefix + k not in tensors or tensors[prefix + k].shape != p.shape:
                raise CheckpointError(
                    f"{folder} does not fit this model at {k}: it belongs to another architecture")
    moments = {}                            # {} for the last block's ln_q, which never gets a gradient
    for kind, optimizer, k, p in owned(state):
        found = {m: tensors[f"{kind.lower()}.{m}.{k}"] for m in MOMENTS[kind]
                 if f"{kind.lower()}.{m}.{k}" in tensors}
        if 0 < len(found) < len(MOMENTS[kind]):
            raise CheckpointError(f"{folder} lacks a part of {kind}'s state of {k}: "
                                  "delete it and start the stage again")
        moments[p] = optimizer, found
    for prefix, target in targets:
        for k, p in target.items():
            local(p.data).copy_(local(cut_as(tensors[prefix + k], p)))
    for optimizer in state.optimizers:
        optimizer.state.clear()
    for p, (optimizer, found) in moments.items():
        if found:
            where = p.device if optimizer.defaults.get("fused") else "cpu"  # else each step waits for a card
            optimizer.state[p] = {m: v.to(where) if m == "step" else cut_as(v, p) for m, v in found.items()}
    state.in_a_row.fill_(manifest["bad_in_a_row"])
    state.step, state.total, state.rollbacks = (manifest[k] for k in ("step", "total", "rollbacks"))


def cut_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x on like's device; where `like` is cut up among ranks, this rank's part of x."""
    if not hasattr(like, "to_local") or hasattr(x, "to_local"):
        return x.to(like.device)
    part = torch.empty_like(like.detach())
    local(part).copy_(rows_of(x, like))
    return part


# ------------------------------------------------------------------------------------------------------ runs

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


# Exercises. (1) Leave out the rename and kill the process while it saves: what does the next start find?
# (2) Flip one byte in the middle of a file: it loads without a word.
# What would you store beside it to notice?

if __name__ == "__main__":
    demo()
