"""What can be set, and which wins: a flag, another run's settings, or the defaults?

A file of its own, since none of this is training: train.py reads as the loop, and what can be set is here,
each setting once. The flags are the fields of TrainConfig, with their help.

    python train.py ...             flags, then defaults                       parse
    python train.py --resume        the run's config.json; flags only in FREE  parse
    python train.py --from RUN ...  flags, then that run's, then defaults      second_phase
    python train.py --cache DIR ... flags, then the cache's own settings       by_published
    ... --from WEIGHTS --cache DIR  flags, then those and small steps          fine_tuning
    python train.py cache ...       flags of their own                         parse_cache

What to know
- What cannot be right is refused before anything is read, with the flag and a value that would do.
- A flag that contradicts what a run was made with is refused, never obeyed halfway.

Run `python settings.py`: it lists every flag with its default, and checks that each can be read back.
"""
import argparse
import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

import flow
from mmdit import MMDiTConfig
from parallel import launched
from pipeline import check_side
from prepare import Cache, place_of
from run_folder import config_of_part, has_run, is_published, last_run, read_json, read_run
from stages import STAGES, encoder_prints
from weights import config_of

# settings that say what is trained, and by what
SHAPING = ("model", "size", "clip_length", "t5_length", "vae_channels", "vae_critic", "muon_rate", "lora")
# what a resumed run may change
FREE = ("minutes", "accumulate", "checkpointing", "fsdp", "compile", "encoders", "preview_every",
        "save_every")
SMALL_STEPS = {"flow_rate": 1e-5, "muon_rate": 0.0}     # for published weights

LONGEST = 512               # tokens of an encoder; SD3's had 77 and 77 to 256
LARGEST = 4096              # pixels a side


def flag(default, help, group=""):
    """group: the heading in --help of this flag and those that follow it"""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class TrainConfig:
    data: str = flag("drawn", "drawn | emoji | a folder of captioned pictures", "what is learned")
    size: int = flag(64, "side of the training pictures in pixels, a multiple of 16")
    pictures: int = flag(24000, "how many drawings, or the most pictures to read from a folder")
    synthetic: float = flag(0.5, "share of synthetic captions, where a picture has some beside the original")
    buckets: bool = flag(False, "the transformer learns pictures in their own shapes, not as squares")
    cache: str = flag("", "a folder that  train.py cache  made, for the transformer to learn from")
    encoders: str = flag("", "published weights whose encoders made the cache; default: those it names")
    model: str = flag("tiny", "MMDiT preset that gives depth and width (mmdit.py)")
    origin: str = flag(
        "", "a finished run to go on from: its parts are kept, its transformer is trained further; or "
        "published weights, with a --cache that their encoders made", "start, output and machine")
    lora: int = flag(0, "with --from: train only adapters of this rank (finetune.py); 0: train all weights")
    out: str = flag("", "folder of the run; default: a new one under runs/")
    device: str = flag("auto", "auto | cuda | mps | cpu")
    dtype: str = flag("auto", "dtype of matrix products: auto | bfloat16 | float32")
    seed: int = flag(0, "the same seed repeats a run on the same machine")
    minutes: float = flag(
        20.0, "limit for the whole run, which takes 3 or so at least: stages get fewer steps; --resume "
        "counts anew; 0: none, as by default for larger models and under torchrun")
    vae_steps: int = flag(700, "steps of the autoencoder", "how long and how fast, by stage")
    vae_batch: int = flag(16, "pictures a step")
    vae_rate: float = flag(2e-3, "peak learning rate")
    vae_channels: int = flag(16, "channels of a latent; SD3 has 16")
    vae_critic: float = flag(0.0, "weight of the patch discriminator; 0: none")
    clip_steps: int = flag(700, "steps of the two CLIP pairs")
    clip_batch: int = flag(64, "pictures and captions a step")
    clip_rate: float = flag(2e-3, "peak learning rate")
    t5_steps: int = flag(1000, "steps of T5")
    t5_batch: int = flag(64, "texts a step, each of all captions of a picture")
    t5_rate: float = flag(2e-3, "peak learning rate")
    flow_steps: int = flag(2000, "steps of the transformer: enough for drawings, other pictures need more")
    flow_batch: int = flag(64, "latents a step")
    flow_rate: float = flag(2e-3, "peak learning rate")
    muon_rate: float = flag(0.02, "learning rate of Muon for the transformer's matrices; 0: AdamW, no Muon")
    clip_length: int = flag(0, "tokens of the CLIP towers; 0: as many as the short captions need, up to 77",
                            "the text and the flow model")
    t5_length: int = flag(0, "tokens of T5; 0: as many as all captions need, up to 77")
    density: str = flag("logit_normal", "density of training times: uniform | logit_normal | mode | cosmap")
    shift: float = flag(4.0, "shift of training and sampling times towards noise; 1: none")
    text_drop: float = flag(0.464, "probability that an encoder's features are zeroed")
    ema: float = flag(0.999, "decay of the averaged weights")
    warmup: int = flag(50, "steps of linear warm-up in each stage")
    decay: float = flag(0.4, "last fraction of each stage, in which the rate falls to zero")
    clip_norm: float = flag(1.0, "largest norm of the gradient")
    checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, a third slower")
    accumulate: int = flag(1, "compute the transformer's batch in this many pieces, to save memory")
    fsdp: bool = flag(False, "under torchrun: shard a transformer that does not fit one GPU over all of them")
    compile: bool = flag(False, "compile the transformer's blocks (torch.compile)")
    preview_every: int = flag(250, "steps between sample grids; 0: none")
    save_every: int = flag(500, "steps between saves of the unfinished stage")

    def __post_init__(self):
        for f in fields(self):
            value, kinds = getattr(self, f.name), (int, float) if f.type is float else f.type
            if f.type is str and isinstance(value, Path):
                setattr(self, f.name, value := str(value))
            if not isinstance(value, kinds) or isinstance(value, bool) != (f.type is bool):
                raise ValueError(f"{f.name} is {value!r}: it must be of type {f.type.__name__}")
            if f.type is float and not math.isfinite(value):
                raise ValueError(f"{f.name} is {value}: it must be finite")
        positive = ["pictures", "vae_channels", "accumulate", "warmup", "clip_norm", "save_every"]
        positive += [f"{s}_{k}" for s in STAGES for k in ("steps", "batch", "rate")]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("minutes", "muon_rate", "vae_critic", "preview_every", "lora"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        for name in ("clip_length", "t5_length"):
            if (length := getattr(self, name)) and not 2 <= length <= LONGEST:
                raise ValueError(f"{name} is {length}: it must be from 2 to {LONGEST}, or 0, by the captions")
        check_side("size", self.size)
        if self.size > LARGEST:
            raise ValueError(f"size is {self.size}: it can be {LARGEST} at most")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"no dtype {self.dtype!r}: choose auto, bfloat16 or float32")
        if not (0 <= self.text_drop < 1 and 0 <= self.ema < 1 and 0 <= self.decay <= 1
                and 0 <= self.synthetic <= 1):
            raise ValueError("text_drop and ema must lie in [0, 1), decay and synthetic in [0, 1]")
        if self.cache and not (self.origin or self.encoders):
            raise ValueError(f"{self.cache} was made by a run's encoders: add --from with that run's folder")
        if self.encoders and not self.cache:
            raise ValueError("published encoders only make caches: add --cache DIR, made by  python train.py "
                             f"cache --model {self.encoders} --data DIR --size SIDE")
        if self.lora and not self.origin:
            raise ValueError(f"--lora {self.lora}: adapters change what --from names: add --from")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}: it must be from 0 to {2**31 - 1:,}")
        if self.lora and self.muon_rate:
            raise ValueError("--muon-rate is for whole matrices: leave it out with --lora")
        if self.lora and self.fsdp:
            raise ValueError("--lora and --fsdp: nothing is sharded where adapters learn, leave out --fsdp")
        MMDiTConfig.preset(self.model)
        flow.t_density(self.density, torch.tensor(0.5))
        flow.shift_t(0.5, self.shift)


# ----------------------------------------------------------------------------------------------- command line

def refuse(message: str, command: str = ""):
    raise ValueError(f"{message}: see python train.py {command}--help")


def flag_of(field: str) -> str:
    return "--from" if field == "origin" else "--" + field.replace("_", "-")        # `from` is a keyword


def parse(argv=None) -> tuple[TrainConfig, bool]:
    """Flags are the fields of TrainConfig. With --resume the run's own settings count: only those in FREE may
    change, and the paths of what has moved. With --from the other run's count, where no flag says otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, description="train every part of Stable Diffusion 3",
        usage="train.py [--tiny] [--data DATA] [--minutes X] [--out RUN] [other flags]\n"
        "       train.py --resume [--out RUN]\n"
        "       train.py cache --help\n       train.py --dry-run --help",
        epilog="example: python train.py --tiny --data emoji --minutes 60")
    parser.error = refuse
    parser.add_argument("--tiny", action="store_true",
                        help="the sizes that train on a laptop; also the default")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --out, or else the last one")
    for f in fields(TrainConfig):
        told = "" if f.type is bool or f.default == "" else f" (default: {f.default})"
        how = {"help": f.metadata["help"] + told, "default": None, "dest": f.name}
        how |= {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "metavar": {int: "N", float: "X"}.get(f.type)}
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        group.add_argument(flag_of(f.name), **how)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0], [s for a in parser._actions for s in a.option_strings], 1)
        raise ValueError(f"unknown flag {unknown[0]}"
                         + (f": did you mean {near[0]}?" if near else ": see python train.py --help"))
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig)
             if getattr(args, f.name) is not None}
    if not args.resume:
        begin = (fine_tuning if is_published(given.get("origin")) else second_phase if given.get("origin")
                 else by_published if given.get("cache") else dict)
        given = begin(given)
        if given.get("model", "tiny") != "tiny" or is_published(given.get("origin")) or launched()[1] > 1:
            given = {"minutes": 0.0, **given}           # its rate would be zero after 20 minutes, for good
        return TrainConfig(**given), False
    folder = Path(given.pop("out", "") or last_run())
    saved = read_json(folder / "config.json")
    check_kept(given, saved, folder)
    if "origin" in given and given["origin"] != saved.get("origin"):
        config_of(given["origin"], "mmdit")         # CheckpointError unless it is there and one of SD3
        given["origin"] = str(Path(given["origin"]).resolve())
    if given.get("encoders"):                       # before they take the place of those in config.json
        given["encoders"] = str(Path(given["encoders"]).resolve())
        prints = encoder_prints(given["encoders"])
        if saved.get("cache") and Path(saved["cache"]).is_dir():
            Cache(saved["cache"]).compare(*prints)
    try:
        return TrainConfig(**{**saved, **given, "out": str(folder)}), True
    except TypeError as e:
        raise ValueError(f"{folder}/config.json is from another version of train.py ({e}): "
                         "start a new run") from None


def check_kept(given: dict, saved: dict, folder: Path) -> None:
    """ValueError where a setting contradicts those that a run was made with and may not change: it may in
    FREE, and where the paths of its pictures, its cache or the published weights that it began with do."""
    learns_on = saved.get("origin") and saved.get("encoders") and not (folder / "start").is_dir()
    moved = [name for name in ("data", "cache") if saved.get(name) not in (None, "", "drawn", "emoji")
             and not Path(saved[name]).exists()]                        # fingerprints say whether it is they
    free = (*FREE, *moved, *["origin"] * bool(learns_on))
    for name, value in given.items():
        if name not in free and name in saved and saved[name] != value:
            raise ValueError(f"{flag_of(name)} {value} contradicts {folder}/config.json "
                             f"({saved[name]}): a run keeps its settings; leave the flag out or start a new "
                             "run")


def go_on_as(c: TrainConfig) -> None:
    """Compare settings with those of the run in c.out, with which it goes on, and take over the lengths of
    text that it has settled. ValueError where they differ, CheckpointError where there is no run."""
    if not c.out:
        raise ValueError("a run that goes on needs `out`, its folder")
    saved = read_json(Path(c.out, "config.json"))
    c.clip_length, c.t5_length = (getattr(c, k) or saved.get(k, 0) for k in ("clip_length", "t5_length"))
    check_kept({k: v for k, v in asdict(c).items() if k != "out"}, saved, Path(c.out))


def second_phase(given: dict) -> dict:
    """Settings of a run that goes on from another: the other's, where no flag says otherwise; but after
    adapters the rates of whole weights.

    With m pixels in place of n the training times move towards noise by sqrt(m / n), paper section 5.3.2."""
    run = Path(given["origin"])
    if not run.exists():
        raise ValueError(f"--from {run} does not exist: give the folder of a finished run, or published "
                         "weights with the --cache that their encoders made")
    if not (has_run(run) and (run / "mmdit.safetensors").is_file()):
        raise ValueError(f"--from {run}: no finished run there, it would have config.json and "
                         "mmdit.safetensors: finish it with  python train.py --resume --out, or name another")
    saved = read_run(run)
    for name in ("model", "clip_length", "t5_length", "vae_channels"):
        if name in given and given[name] != saved.get(name):
            raise ValueError(f"{flag_of(name)} {given[name]} contradicts {run}/config.json "
                             f"({saved.get(name)}): what is taken over keeps its shape; leave the flag out")
    if given.get("cache"):
        cache, told = checked_cache(given)
        cache.compare(*encoder_prints(given.get("encoders", run)))
        given = given | told
    size = given.get("size", saved["size"])
    known = {f.name for f in fields(TrainConfig)} - {"out", "origin", "cache", "minutes", "lora"}
    known -= {"fsdp"} if given.get("lora") else set()                   # adapters are not sharded
    c = config_of_part(run, "mmdit")
    large = c.width > MMDiTConfig.preset("tiny").width  # `model` is "tiny" where published weights were named
    published = large and saved.get("encoders")         # a miniature may learn from their cache, too
    kept = {k: v for k, v in saved.items() if k in known}
    if saved.get("lora"):                           # adapters' steps would spoil the weights themselves
        kept |= SMALL_STEPS if published else {k: getattr(TrainConfig, k) for k in SMALL_STEPS}
    if large:
        kept["minutes"] = 0.0
    kept |= of_adapters(given, c, 1e-4 if published else 5e-3)
    return {**kept, "shift": saved["shift"] * size / saved["size"], **given, "size": size}


def by_published(given: dict) -> dict:
    """Settings of a new transformer that learns from a cache which published encoders made. One of the
    paper's sizes learns as there (sections 5.1, 5.3: AdamW, 1e-4, 1,000 steps of warm-up, 500,000 in all)."""
    given = by_encoders(given)
    as_there = {"flow_rate": 1e-4, "muon_rate": 0.0, "warmup": 1000, "flow_steps": 500_000}
    return {**(as_there if given.get("model", "tiny") != "tiny" else {}), **given}


def by_encoders(given: dict) -> dict:
    """Settings that follow from a cache: whose encoders made it, and times shifted as for 1024 pixels, less
    for fewer."""
    cache, told = checked_cache(given)
    where = given.get("encoders") or cache.index.get("encoders")
    return {"shift": max(1.0, 3.0 * told["size"] / 1024), **given,
            "encoders": str(Path(where).resolve()) if where else "", **told}


def fine_tuning(given: dict) -> dict:
    """Settings of a published transformer that is trained further, from a cache made by its encoders: small
    steps of AdamW."""
    if given.get("model"):
        raise ValueError(f"--model {given['model']} and --from {given['origin']}: the weights say what they "
                         "are, leave out --model")
    if not given.get("cache"):
        raise ValueError(f"--from {given['origin']}: published weights learn from a cache: add --cache DIR, "
                         f"made by  python train.py cache --model {given['origin']} --data DIR --size SIDE")
    given = by_encoders(given)
    if not given["encoders"]:
        raise ValueError(f"{given['cache']} was made by a run's encoders, of which published weights know "
                         f"nothing: make one with  python train.py cache --model {given['origin']} --data "
                         "DIR --size SIDE")
    c = config_of(given["origin"], "mmdit")                     # CheckpointError unless it is one of SD3
    return {**SMALL_STEPS, **of_adapters(given, c, 1e-4), **given,
            "origin": str(Path(given["origin"]).resolve())}


def of_adapters(given: dict, c: MMDiTConfig, rate: float) -> dict:
    """Settings for adapters of a transformer of this config, if --lora is given: larger steps than for the
    weights themselves. ValueError for an impossible rank."""
    if not 0 <= given.get("lora", 0) <= c.width:
        raise ValueError(f"--lora {given['lora']}: the rank can be 1 to {c.width}, the transformer's width")
    return {"flow_rate": rate, "muon_rate": 0.0} if given.get("lora") else {}


def checked_cache(given: dict) -> tuple[Cache, dict]:
    """The given cache, and the settings that follow from it. ValueError if a flag contradicts them."""
    cache = Cache(given["cache"])
    told = cache.index.get("source", {}) | {k: cache.index[k] for k in ("size", "clip_length", "t5_length")}
    where = told.get("data", "drawn")
    if "data" in given and where not in ("drawn", "emoji") and not Path(where).exists():    # it has moved
        told["data"] = place_of(given["data"])
    for name, made in told.items():
        asked = given.get(name, made)
        if (place_of(asked) if name == "data" else asked) != made:
            raise ValueError(f"{flag_of(name)} {asked} contradicts {cache.folder} ({made}): leave the flag "
                             "out or make another cache")
    return cache, told


def parse_cache(argv) -> argparse.Namespace:
    """Flags of  python train.py cache."""
    parser = argparse.ArgumentParser(
        prog="train.py cache", allow_abbrev=False, description="encode pictures and captions with a run's "
        "encoders or with published ones; under torchrun each rank does its share")
    parser.error = partial(refuse, command="cache ")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run", help="folder of the run whose encoders to use")
    whose.add_argument("--model", help="published weights whose encoders to use: a .safetensors file or a "
                       "diffusers folder")
    parser.add_argument("--data", required=True, help="drawn | emoji | a folder of captioned pictures")
    parser.add_argument("--out", help="folder of the cache (default: runs/cache-DATA-SIZE)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: the run's)")
    parser.add_argument("--pictures", type=int, help="the most pictures to take, or how many drawings "
                        "(default: all; 24000 drawings)")
    parser.add_argument("--seed", type=int, default=0, help="decides the drawings, or which pictures are "
                        "taken (default: 0)")
    parser.add_argument("--buckets", action="store_true", help="pictures in their own shapes, not as squares")
    parser.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    parser.add_argument("--dtype", default="auto", help="of matrix products: auto | bfloat16 | float32")
    args = parser.parse_args(argv)
    if args.model and args.size is None:
        parser.error("--model needs --size, such as 256")
    return args


def demo() -> None:
    """Every setting, its default and its meaning; each default, given as a flag, is read back."""
    for f in fields(TrainConfig):
        print(f"{flag_of(f.name):17s} {f.default!s:13s} {f.metadata['help']}")
        if f.type is not bool and f.name not in ("origin", "cache"):
            assert parse([flag_of(f.name), str(f.default)]) == (TrainConfig(), False)
    for wrong in (["--size", "50"], ["--flow-step", "3"], ["--text-drop", "1"]):
        try:
            parse(wrong)
        except ValueError as e:
            print(f"{' '.join(wrong)}: {e}")
        else:
            raise AssertionError(f"{wrong} was taken")


# Exercises. (1) Which three flags would you change first for photographs of 256 pixels, and why is `shift`
# one? (2) Why may --resume change `accumulate` and not `flow_batch`?

if __name__ == "__main__":
    demo()
