"""Training: how is each part of Stable Diffusion 3 made? One loop, four stages, one command.

    python train.py --tiny                     everything, from nothing, on drawn shapes: minutes on a laptop
    python train.py --tiny --minutes 5         the same in five minutes; the pictures will be rougher
    python train.py --tiny --data emoji        1,026 Twemoji instead, which ship with the project
    python train.py --tiny --data DIR          your pictures: name.png + name.txt, or captions.jsonl (data.py)
    python train.py --tiny --flow-steps 30000  longer: what a GPU can afford
    python train.py --resume                   continue the last run exactly where it stopped
    python train.py --from RUN --size 128      train a finished run further, on larger pictures
    python train.py cache --run RUN --data DIR encode pictures and captions ahead, for --from RUN --cache
    python train.py cache --model PATH --data DIR --size 256           the same with SD3's own encoders, for
    python train.py --cache CACHE --model d15                          a new transformer that learns from this
    python train.py --cache CACHE --from PATH                          or SD3's own, trained further
    python train.py --dry-run --model d38 --gpus 64      what it would take (budget.py)
    torchrun --nproc-per-node 8 train.py --flow-batch 512      the same on eight GPUs (parallel.py)
    python sample.py "a red star left of a blue ring"    then draw something

    stage   learns                                               from                    loss
    vae     pictures -> latents -> pictures                      pictures                error + edges + KL
    clip    two text towers, which know what a picture shows     pictures and captions   InfoNCE
    t5      one text encoder, which knows what word goes where   captions                hidden words
    flow    MMDiT: the velocity from noise to latents            cached latents and      flow matching
                                                                 text features

Each stage freezes what it has learnt. Before the last, every picture and caption is encoded once, so that the
stage that takes longest never runs the VAE or a text encoder (in the paper this saves 22 GB and 57 % of the
time, table 7).

What to know
- float32: weights, optimizer, EMA, norms, the path and the loss. Matrix products run in bfloat16 under
  autocast where that is faster on this device; the log's first lines say so and why.
- All randomness of a step comes from (seed, stage, step). Nothing else needs saving, and a run that was
  interrupted and resumed equals one that was not, bit for bit on one CPU with one thread.
- Each text encoder is dropped with probability 46.4 %, independently; with all three gone the model learns to
  draw without a prompt, which is what guidance pushes away from.
- The EMA of the weights is what gets sampled and saved. Its decay starts at (1 + step) / (10 + step), which
  forgets fast, and ends at `ema`.

DIFFERS: the published encoders and autoencoder were trained by others for months on other data; here they are
trained on the spot.
DIFFERS: at 64 pixels times are shifted towards noise by 4, where the paper's sqrt(m / n) from 256 pixels
would be 1/4: in pictures of 16 tokens, the layout is decided near t = 0.9.
DIFFERS: dropped text is zeros, and zeros mean "no prompt" in sampling too; released SD3 weights expect an
encoded "".

The whole step is in `fit`, in this order:
rate -> loss -> backward -> clip -> judge -> step -> EMA -> log -> plan -> save -> preview.
What may go wrong there, and what happens then, is in watch.py and checkpoints.py; how several processes share
the work, in parallel.py.
"""
import dataclasses
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

import flow
import parallel
from checkpoints import Saver, State, checkpoints_of, clean_checkpoints, load_state
from data import Pictures, list_pictures, load_pictures, refuse_if_mostly_bad
from mmdit import MMDiT
from muon import Muon, split
from offload import GB, is_out_of_memory, short
from parallel import local, whole
from pipeline import pick_device
from prepare import EVERY, Cache, Survey, place_of, source_of
from run_folder import has_run, is_published, last_run, load_part, read_json, read_run, save_part, sole_writer
from settings import SHAPING, TrainConfig, go_on_as, parse, parse_cache
from stages import (PARTS_OF, STAGES, Stage, build, clip_stage, encode_all, encoder_prints, flow_stage,
                    make_tokenizers, preview_prompts, pretrained_mmdit, t5_stage, take_over, vae_stage)
from tensor_files import CheckpointError, check_writable, write_json
from watch import (LOOK_EVERY, RECENT, Log, Stop, Stopped, add_up, clock, film, judge, largest_logit,
                   lasting_output, plot_run, read_metrics, roll_back, update)

# Of the time left at a stage's start. Where that is short, more for the transformer would be less: on
# encoders that had had a third less, 87.6 % were right after 1,164 steps; on others 98.4 % after 1,217.
SHARE = {"vae": 0.2, "clip": 0.2, "t5": 0.2, "flow": 0.97}


# ------------------------------------------------------------------------------------------- device and dtype

def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of matrix products, the reason in a few words). On a CPU both dtypes are timed, since only some
    CPUs have bfloat16 units."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has it") if fits else (torch.float32, "this GPU has no bfloat16")
    if device.type == "mps":
        return torch.float32, "half precision gives NaNs on MPS"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 512, dtype=dtype), torch.randn(512, 1024, dtype=dtype)
        times = []
        while len(times) < 12 and sum(times) < 0.5:         # in bfloat16 one may take a second
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    return (torch.bfloat16 if gain > 1.3 else torch.float32,
            f"bfloat16 products take 1/{gain:.1f} of float32's time here")


# ----------------------------------------------------------------------------------------------- the one loop

class Run:
    """What all stages share: folder, device, dtype, clock, other processes, and whether a stop has been
    requested."""

    def __init__(self, config: TrainConfig, folder: Path, ranks: parallel.Ranks | None = None):
        self.config, self.folder, self.ranks = config, folder, ranks or parallel.Ranks()
        self.stop, self.facts, self.warned = Stop(), {}, set()
        self.saver = Saver(folder, self.ranks)
        self.device = pick_device(parallel.own_device(config.device))
        self.dtype, self.why = self.ranks.same(pick_dtype(config.dtype, self.device))
        self.start = time.monotonic()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The source of all randomness of one step. On the CPU: the same numbers on every device."""
        return torch.Generator().manual_seed(
            (self.config.seed * len(STAGES) + STAGES.index(stage)) * 10**9 + step)

    def load(self, state: State, healthy: bool = False) -> bool:
        self.settle(state.stage)
        return self.ranks.together(
            lambda: load_state(self.folder, state, self.facts, healthy, self.ranks))

    def settle(self, stage: str) -> None:
        """Wait for the save of a checkpoint that is under way, if one is."""
        if self.saver.pending:
            with self.tolerating(f"a checkpoint of {stage}"):
                self.saver.settle()

    def save_part(self, name: str, module: nn.Module) -> None:
        """The ranks gather their shards and rank 0 writes; once this returns, the others may read."""
        tensors = self.ranks.collect(module.state_dict())
        self.ranks.alone(lambda: save_part(self.folder, name, module, tensors))

    def left(self) -> float:
        """Seconds until --minutes is over."""
        return 60 * self.config.minutes - (time.monotonic() - self.start) if self.config.minutes else math.inf

    @contextmanager
    def tolerating(self, what: str):
        """A full disk in here, or one that does not answer, does not end training. It is reported once, and
        again if it comes back after a success; what could not be written the last time is in `warned`."""
        try:
            yield
        except OSError as e:
            if what not in self.warned:
                print(f"{what} could not be written ({e}): training goes on; check that the disk has room "
                      "and responds", flush=True)
            self.warned.add(what)
        else:
            self.warned.discard(what)


def rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak learning rate: up linearly over the warm-up, level, down linearly to zero over the
    last part."""
    warmup = min(config.warmup, total // 5 + 1)
    return min((step + 1) / warmup, 1.0, (total - step) / max(1, round(config.decay * total)))


def begin(run: Run, stage: Stage) -> State:
    """The State of a stage before its first step."""
    c, params = run.config, dict(stage.model.named_parameters())
    if stage.name == "flow" and c.lora:
        params = {name: p for name, p in params.items() if p.requires_grad}
    matrices, rest = split(stage.model) if stage.name == "flow" and c.muon_rate else ([], params.values())
    # weight decay for matrices, none for biases and norms
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    # eps is the paper's for bfloat16 training with normalised queries and keys (section 5.3.2). With the
    # usual 1e-8, weights whose gradients are below it would hardly move. The moments here are float32;
    # bfloat16 could also hold 1e-15 squared, float16 could not: 0 / 0.
    optimizers = [torch.optim.AdamW(groups, lr=getattr(c, f"{stage.name}_rate"), betas=(0.9, 0.99),
                                    eps=1e-15, fused=run.device.type != "mps")]
    if matrices:
        optimizers.append(Muon(matrices, lr=c.muon_rate, dtype=run.dtype))
    average = {k: p.detach().clone() for k, p in params.items()} if stage.ema else {}
    return State(stage.name, getattr(c, f"{stage.name}_steps"), params, average, optimizers,
                 torch.full((RECENT,), math.inf, device=run.device), torch.zeros((), device=run.device))


def fit(run: Run, stage: Stage, share: float = 1.0) -> None:
    """Train stage.model in place, from its start or from where the run was interrupted.

    share: how much of the time left until --minutes this stage may take; if not all of its steps fit, there
    will be fewer (`Plan`). Stopped, after saving, if a stop was requested. FloatingPointError if nearly all
    steps are bad, even after going back once.
    """
    c, model, state, ranks = run.config, stage.model.train(), begin(run, stage), run.ranks
    params, average, batch = state.params, state.average, getattr(c, f"{stage.name}_batch")
    groups = [(group, group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups]
    start = {k: local(p.detach()).to("cpu", copy=True) for k, p in params.items()}  # until the first save
    asked = state.total
    if run.load(state):
        if not c.minutes:                           # --minutes may have cut it before
            state.total = asked
        print(f"{stage.name}: going on at step {state.step} of {state.total}")
        start = None
    elif any(row["stage"] == stage.name for row in read_metrics(run.folder / "metrics.csv")):
        print(f"{stage.name}: it was interrupted before its first checkpoint, so it starts again")
    log = Log(run.folder, state, batch, silent=ranks.rank > 0)
    forward = parallel.add_gradients(model, stage.loss, ranks)
    plan = Plan(asked, state.step, c.decay, share * run.left())

    while state.step < state.total:
        step = state.step
        share_of_peak = rate_at(step, state.total, c) * 0.5**state.rollbacks
        for group, peak in groups:
            group["lr"] = peak * share_of_peak
        loss, logged = gradients(run, stage, step, *forward)
        norm = whole(nn.utils.clip_grad_norm_(params.values(), c.clip_norm))
        bad = judge(state, loss, norm)
        update(state.optimizers, bad)
        if average:                                 # after a bad step, the weights are as before
            decay = min(c.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_([local(v) for v in average.values()],
                                 [local(p.detach()) for p in params.values()], 1 - decay)
        if step % LOOK_EVERY == 0 and isinstance(model, MMDiT):
            logged["max_logit"] = look(run, stage, step)
        state.step = step = step + 1
        log.add(state, bad, loss, norm, groups[0][0]["lr"], logged)
        total = plan.total(step, state.total)
        run.stop.wanted, hopeless, total = ranks.most(run.stop.wanted, log.hopeless, -total)
        state.total = -total                        # what the slowest rank has time for
        if hopeless:
            roll_back(run, state, start, log)
            plan = Plan(asked, state.step, c.decay, plan.end - time.monotonic())    # timed anew
            continue
        if step < state.total and (run.stop.wanted or step % c.save_every == 0 and not state.in_a_row):
            log.flush(state)                        # the log is never behind the checkpoint
            with run.tolerating(f"a checkpoint of {stage.name}"):
                run.saver.save(state, run.facts)
            start = None if run.saver.saved[0] == stage.name else start
            if run.stop.wanted:
                leave(run, stage.name, step)
        preview(run, stage, state, log)
    run.settle(stage.name)
    for name, value in average.items():
        local(params[name].data).copy_(local(value))
    log.bar.close()
    if ranks.most(not all(local(p).isfinite().all() for p in params.values()))[0]:
        raise FloatingPointError(f"weights of stage {stage.name} are not finite at its end: start again with "
                                 f"a lower --{stage.name}-rate, or with --dtype float32")
    model.eval().requires_grad_(False)


class Plan:
    """How many steps a stage gets in the seconds allotted to it.

    Its speed is measured without this process's first ten steps, which also compile and fill caches: at the
    30th, then at every 100th. Once the rate falls, their number may only shrink (a laptop slows down as it
    heats up), for which the rate falls a little faster."""

    def __init__(self, asked: int, begun: int, decay: float, seconds: float):
        """asked: the most steps. begun: steps done before. decay: the share in which the rate falls."""
        self.asked, self.begun, self.decay = asked, begun, decay
        self.end, self.timed = time.monotonic() + seconds, 0.0

    def total(self, step: int, total: int) -> int:
        """After a step: the number of steps in all, `total` so far. At least 30 follow each timing, unless
        fewer were left."""
        here, now = step - self.begun, time.monotonic()
        if here == 10:
            self.timed = now
        if self.end == math.inf or not (here == 30 or here > 30 and step % 100 == 0):
            return total
        fitting = int((self.end - now) / (now - self.timed) * (here - 10))
        most = self.asked if step < (1 - self.decay) * total else total
        return min(most, step + max(30, fitting))


def gradients(run: Run, stage: Stage, step: int, forward, pause) -> tuple[torch.Tensor, dict]:
    """Fills in the whole batch's gradients, of all ranks and --accumulate pieces -> its loss and log."""
    c, ranks, pieces = run.config, run.ranks, []
    count = c.accumulate if stage.name == "flow" else 1
    for k in range(count):
        rows = ranks.rows(getattr(c, f"{stage.name}_batch"), k, count)
        with pause() if k < count - 1 else nullcontext():
            with run.autocast():
                pieces.append(forward(step, run.generator(stage.name, step), rows))
            if stage.ahead:
                stage.ahead(step + 1, rows)
            (pieces[-1][0] * ranks.world).backward()                # averaged over ranks, not added
            pieces[-1] = pieces[-1][0].detach(), pieces[-1][1]      # frees the piece's graph
    return add_up(ranks, pieces)


def look(run: Run, stage: Stage, step: int) -> torch.Tensor:
    """The largest attention logit over the first samples of this rank; only rank 0's is logged."""
    rows = run.ranks.rows(getattr(run.config, f"{stage.name}_batch"))
    few = slice(rows.start, min(rows.stop, rows.start + 4))
    with run.autocast():
        found = largest_logit(partial(stage.loss, rows=few), step, run.generator(stage.name, step))
    parallel.let_go(stage.model)
    return found


def preview(run: Run, stage: Stage, state: State, log: Log) -> None:
    """A sample grid and the curves, when due. Under FSDP all ranks draw, else only rank 0, while the others
    wait for it in their next step. A failure costs the grid alone, except where one rank that gives up would
    leave others waiting for its shards."""
    c, step = run.config, state.step
    if not (stage.preview and c.preview_every and (step % c.preview_every == 0 or step == state.total)):
        return

    def draw():
        with swapped(state.params, state.average):
            finish = stage.preview(step)
            parallel.let_go(stage.model)
        return finish

    cut_up = parallel.sharded(stage.model.eval())
    finish = draw() if cut_up else None
    if run.ranks.rank == 0:
        with sparing(run, step):
            (finish or draw())()
        with run.tolerating("loss.png"):
            plot_run(log.path)
    stage.model.train()


@contextmanager
def sparing(run: Run, step: int):
    """Inside, training outlives what a sample grid meets: a full card or disk, a decoder that overflows in
    half precision, or one that is gone."""
    try:
        with run.tolerating("a sample grid"):
            yield
    except (CheckpointError, FloatingPointError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not is_out_of_memory(e):
            raise
        print(f"no sample grid at step {step}: {str(e).splitlines()[0][:200]}", flush=True)


def leave(run: Run, stage: str, step: int):
    """Raises Stopped, or OSError if the state could not be saved."""
    run.settle(stage)
    if run.saver.saved != (stage, step):
        raise OSError(f"stopped at step {step} of {stage}, which could not be saved: what was saved before "
                      "is still there; check that the disk has room and responds, then  "
                      + resuming(run.folder))
    print(f"{stage}: saved at step {step}", flush=True)
    raise Stopped(run.stop.wanted)


@contextmanager
def swapped(params: dict, average: dict):
    """Inside, the model has its averaged weights, and `average` those with which it learns. They change
    places one tensor at a time: a second copy of all weights may not fit the card."""
    pairs = [(local(params[k].data), local(v)) for k, v in average.items()]
    spare = torch.empty(max((v.nbytes for _, v in pairs), default=0), dtype=torch.uint8,
                        device=next((v.device for _, v in pairs), None))

    def exchange():
        for p, v in pairs:
            kept = spare[:v.nbytes].view(v.dtype).view(v.shape).copy_(v)
            v.copy_(p)
            p.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


# -------------------------------------------------------------------------------------------------- all of it

def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train every part that the run's folder does not hold yet; returns the folder. What the config leaves
    open (folder, lengths of text) is filled in there: another run needs another config.

    Raises ValueError (also CheckpointError) if the input is at fault, FloatingPointError if training
    diverged.
    """
    with parallel.processes(config.device) as ranks, ExitStack() as inside:
        folder = ranks.together(lambda: plan_folder(config, resume, ranks))
        run = Run(config, folder, ranks)
        data = ranks.together(lambda: list_data(config))    # before the folder is made: it may be bad
        seen = ranks.told(data[2])
        ranks.alone(lambda: check_same(seen))
        ranks.alone(lambda: inside.enter_context(sole_writer(folder)))
        with run.stop:
            return train_stages(run, *data, resume)


def plan_folder(c: TrainConfig, resume: bool, ranks: parallel.Ranks) -> Path:
    """The run's folder. ValueError if it was made with other settings, or if a batch size of a stage still to
    come does not divide among the ranks."""
    if resume:
        go_on_as(c)
    own = ("flow",) if c.encoders or c.origin else STAGES                   # trained in this run
    for stage in unfinished(Path(c.out), own) if resume else own:
        try:
            ranks.rows(getattr(c, f"{stage}_batch"), pieces=c.accumulate if stage == "flow" else 1)
        except ValueError as e:
            raise ValueError(f"--{stage}-batch: {e}") from None
    folder = Path(c.out) if resume else new_folder(c)
    check_writable(folder)
    return folder


def list_data(c: TrainConfig):
    """(Survey, or None with --cache; Pictures without pixels; the data's fingerprint; a listing for
    load_pictures, or None)."""
    if c.cache:                                                     # the pictures may be gone by now
        cache = Cache(c.cache)
        captions = [tuple(cache.texts(k * len(cache) // 8)) for k in range(8)]
        words = Pictures(torch.empty(0), captions, cache.skipped, names=range(len(cache)))
        return None, words, cache.index["data"], None
    listing = list_pictures(c.data, c.size, count=c.pictures, seed=c.seed)
    survey = Survey(listing.entries[:c.pictures], c.size, bucketed=c.buckets)
    captions = [entry.captions for entry in survey.entries]
    skipped = listing.skipped + survey.skipped
    refuse_if_mostly_bad(c.data, len(listing.entries) - len(survey.skipped) if captions else 0, skipped)
    words = Pictures(torch.empty(0), captions, skipped, listing.excluded, unnamed=listing.unnamed)
    return survey, words, survey.fingerprint, listing


def check_same(seen: list[str]) -> None:
    """ValueError if ranks differ in the fingerprint of the data."""
    if others := [rank for rank, mark in enumerate(seen) if mark != seen[0]]:
        raise ValueError(f"rank {others[0]} sees other pictures or captions than rank 0: all machines need "
                         "the same files, in a folder that they share or in equal copies")


def train_stages(run: Run, survey, words: Pictures, mark: str, listing, resume: bool) -> Path:
    config, folder, pictures, captions, ranks = run.config, run.folder, words, words.captions, run.ranks
    if config.origin and not is_published(config.origin):
        ranks.alone(lambda: take_over(config, folder))
    own = ("flow",) if config.encoders else STAGES                  # trained in this run
    todo = ranks.same(ranks.together(lambda: unfinished(folder, own)))
    if "vae" in todo or "clip" in todo:                             # the others need no pixels
        pictures = load_pictures(config.data, config.size, count=config.pictures, listing=listing)
    tokenizers = {} if config.encoders else ranks.once(lambda: make_tokenizers(
        folder, config, [text for texts in captions for text in texts], [texts[0] for texts in captions],
        kept=resume or config.origin or ranks.rank))            # else an interrupted start left them
    if listing and len(listing.entries) > config.pictures:
        print(f"{len(listing.entries):,} pictures were found, of which {config.pictures:,} are used: "
              "--pictures allows more")
    ranks.alone(lambda: settle_folder(config, folder, todo))
    run.facts = {"settings": {name: getattr(config, name) for name in SHAPING}, "fingerprint": mark,
                 "dtype": short(run.dtype)}
    cut_up = config.fsdp and ranks.world > 1 and "flow" in todo
    later = parallel.Later() if cut_up else nullcontext()
    parts = build(config, tokenizers, later)
    done = [name for stage in own if stage not in todo for name in PARTS_OF[stage]]
    parts |= {name: load_part(folder, name) for name in done}
    if config.origin and "flow" in todo:
        parts["mmdit"] = pretrained_mmdit(run, parts["vae"], later)
    parts["mmdit"].gradient_checkpointing = config.checkpointing
    if config.compile:
        compile_blocks(parts["mmdit"], run.device)
    if cut_up:
        parallel.shard(parts["mmdit"], run.dtype, run.device, later)
    elif config.fsdp:
        print("--fsdp needs several processes (torchrun): this one keeps the whole transformer")
    for name, part in parts.items():
        if not (parallel.sharded(part) or next(part.parameters()).is_meta):     # published: shapes alone
            part.to("cpu" if name in done else run.device)
    make = {"vae": lambda: vae_stage(run, parts, pictures),
            "clip": lambda: clip_stage(run, parts, pictures, tokenizers),
            "t5": lambda: t5_stage(run, parts, words, tokenizers),
            "flow": lambda: flow_stage(run, parts, tokenizers, survey, pictures)}
    stages = {stage: make[stage]() for stage in todo if stage != "flow"}  # it needs what they learn
    introduce(run, parts, pictures, todo, stages)
    for name in todo:
        stage = stages.pop(name) if name in stages else make[name]()
        with run.stop.later():                      # a stop waits for the save below
            fit(run, stage, SHARE[name])
            if run.device.type == "cuda":
                most = torch.cuda.max_memory_allocated(run.device) / GB
                print(f"{name}: at most {most:.2f} GB of the card, besides what CUDA takes", flush=True)
                torch.cuda.reset_peak_memory_stats(run.device)
            if stage.finish:
                stage.finish()
            for part in PARTS_OF[name]:
                run.save_part(part, parts[part])
            if ranks.rank == 0:                     # later stages' learned from other parts
                clean_checkpoints(folder, ())
        del stage                                   # frees what it held
    with run.tolerating("loss.png or film.gif"):
        if ranks.rank == 0:
            plot_run(folder / "metrics.csv")
            film(folder)
    if run.warned:
        print(f"could not be written the last time: {', '.join(sorted(run.warned))}")
    print(f"done in {clock(time.monotonic() - run.start)}: {folder}, losses in {folder / 'loss.png'}. Now "
          f"type\n    python {typed(*drawing(folder, preview_prompts(config, captions)[6]))}")
    return folder


def drawing(folder: Path, prompt: str) -> list:
    """The command that draws with a run: without its name if it is the last one, which is the default."""
    where = ["--run", folder]
    with suppress(CheckpointError):                                 # no run is under runs/
        if folder.resolve() == last_run(finished=True).resolve():
            where = []
    return ["sample.py", *where, *["--"] * prompt.startswith("-"), prompt]


def settle_folder(c: TrainConfig, folder: Path, todo: list[str]) -> None:
    """Writes the settings, by which the folder is a run, and removes what an earlier start left behind."""
    write_json(folder / "config.json", dataclasses.asdict(c))
    clean_checkpoints(folder, todo)


def compile_blocks(model: MMDiT, device: torch.device) -> None:
    """Block by block: they are alike, so one compilation serves all. Without a compiler, nothing changes."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except (RuntimeError, ImportError) as e:
        print(f"--compile: no working compiler here ({str(e).strip().splitlines()[0]}): going on without")
        return
    for block in model.joint_blocks:
        block.compile()


def unfinished(folder: Path, stages) -> list[str]:
    """The stages whose parts the run lacks. ValueError if a part is lost that its transformer has learned
    from."""
    lost = {stage: [name for name in PARTS_OF[stage] if not (folder / f"{name}.safetensors").is_file()]
            for stage in stages}
    todo = [stage for stage, names in lost.items() if names]
    earlier = [stage for stage in todo if stage != "flow"]
    learned = ["mmdit.safetensors"] * ("flow" not in todo) or [
        f"checkpoints/{p.name}" for p in checkpoints_of(folder, "flow")]
    if earlier and learned:
        names = ", ".join(f"{name}.safetensors" for stage in earlier for name in lost[stage])
        raise ValueError(f"{folder}/{learned[0]} learned from another {names}, which is missing: put it "
                         f"back, or delete {' and '.join(learned)} too, to train all of it again")
    return todo


def introduce(run: Run, parts, pictures, todo, stages) -> None:
    """The log's first lines: device, dtype and why, data, sizes, and how long it should take."""
    c = run.config
    print(f"run: {run.folder}\ndevice: {run.device}, {torch.get_num_threads()} CPU threads; matrix products "
          f"in {short(run.dtype)} ({run.why}), all else in float32")
    if run.ranks.world > 1:
        print(f"{run.ranks.world} processes share each batch; the transformer is "
              + ("cut up among them" if parallel.sharded(parts["mmdit"]) else "whole on each"))
    for name, reason in pictures.skipped[:5]:
        print(f"skipped {name}: {reason}")
    if len(pictures.skipped) > 5:
        print(f"and {len(pictures.skipped) - 5:,} more")
    count = len(pictures.names or pictures.captions)
    print(f"data: {c.cache or c.data}, {count} pictures of {c.size} x {c.size}, "
          f"{len(pictures.skipped)} skipped, {pictures.excluded} left out by excluded.txt"
          + f", {pictures.unnamed:,} without a usable line in captions.jsonl" * bool(pictures.unnamed)
          + f"; text: {c.clip_length} tokens for CLIP, {c.t5_length} for T5")
    print("parameters: " + ", ".join(
        f"{k} {sum(p.numel() for p in m.parameters()):,}" for k, m in parts.items()))
    if not todo:
        print("all stages are finished")
        return
    if c.lora:
        learning = sum(p.numel() for p in parts["mmdit"].parameters() if p.requires_grad)
        print(f"adapters of rank {c.lora} learn, {learning:,} numbers; all else is frozen")
    seconds = time_stages(run, parts, todo, stages)
    total = sum(seconds.values())
    print("expected: " + ", ".join(f"{k} {clock(v)}" for k, v in seconds.items()) + f"; {clock(total)} in all"
          + (f", bounded by --minutes {c.minutes:g}" if c.minutes else ""), flush=True)


def time_stages(run: Run, parts, todo, stages) -> dict[str, float]:
    """Seconds that each stage would take, from the middle one of three steps. Nothing is learned."""
    c, bad = run.config, torch.ones((), device=run.device)

    def flow_loss(step, g, rows):
        m, side = parts["mmdit"].config, c.size // parts["vae"].config.factor
        text = c.clip_length + c.t5_length
        x = torch.randn(rows.stop - rows.start, m.in_channels, side, side)
        return flow.loss(parts["mmdit"], x.to(run.device),
                         context=torch.randn(len(x), text, m.context_dim, device=run.device),
                         pooled=torch.randn(len(x), m.pooled_dim, device=run.device)).mean(), {}

    seconds = {}
    for stage in todo:
        loss, times = flow_loss if stage == "flow" else stages[stage].loss, []
        pieces = c.accumulate if stage == "flow" else 1
        rows = run.ranks.rows(getattr(c, f"{stage}_batch"), pieces=pieces)
        # AdamW's step takes next to no time; Muon's a quarter, and after a bad step it changes nothing
        optimizers = ([Muon(split(parts["mmdit"])[0], dtype=run.dtype)]
                      if stage == "flow" and c.muon_rate else [])
        for i in range(4):
            start = time.perf_counter()
            for _ in range(pieces):
                with run.autocast():
                    value = loss(i, run.generator(stage, i), rows)[0]
                value.backward()
            update(optimizers, bad)
            value.item()                                                    # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds[stage] = sorted(times[1:])[1] * getattr(c, f"{stage}_steps")
    for module in [*parts.values(), *(stage.model for stage in stages.values())]:
        module.zero_grad(set_to_none=True)
    return seconds


def new_folder(c: TrainConfig) -> Path:
    """Where a new run goes. It never touches the folder of another."""
    if c.out and has_run(c.out):
        raise ValueError(f"{c.out} holds a run already: continue it with  "
                         f"{resuming(c.out)}  or choose another --out")
    parts = [name for names in PARTS_OF.values() for name in names]
    left = [name for name in (*(f"{name}.safetensors" for name in parts), "checkpoints")
            if c.out and Path(c.out, name).exists()]
    if left:
        raise ValueError(f"{c.out} holds {left[0]} of a run whose config.json is missing: put that back, or "
                         "choose another --out")
    if not c.out:
        name = named(c.data) + (f"-{c.size}" if c.origin else "")
        c.out = str(next(folder for folder in numbered(name) if not os.path.lexists(folder)))
    return Path(c.out)


def named(source: str) -> str:
    """What a source is called in the name of a folder."""
    return Path(place_of(source)).name


def numbered(name: str):
    return (Path("runs", name + (f"-{i}" if i > 1 else "")) for i in itertools.count(1))


def cache_folder(c: TrainConfig, prints: tuple[str, str]) -> Path:
    """Where a cache goes if no folder was named: never to that of other pictures or encoders, which may have
    taken days."""
    wanted = source_of(c) | dict(zip(("vae", "text"), prints))
    for folder in numbered(f"cache-{named(c.data)}-{c.size}"):
        try:
            index = read_json(folder / "index.json")
        except CheckpointError:                     # none yet, or unreadable: write it anew
            return folder
        if all(index.get(name) == value for name, value in wanted.items()):
            return folder
        print(f"{folder} is of other pictures or by other encoders: it stays as it is")


# ----------------------------------------------------------------------------------------------- command line

def cache_command(argv) -> None:
    """python train.py cache: encode once what a transformer will learn from."""
    args = parse_cache(argv)
    rank, world, _ = parallel.launched()                # each writes files of its own: no exchange
    saved = {"t5_length": 77} if args.model else read_run(args.run)
    size, whose = saved["size"] if args.size is None else args.size, Path(args.model or args.run)
    every = TrainConfig.pictures if args.data == "drawn" else EVERY
    run = Run(TrainConfig(t5_length=saved["t5_length"], data=args.data, size=size, seed=args.seed,
                          pictures=args.pictures or every, buckets=args.buckets, device=args.device,
                          dtype=args.dtype), whose)
    prints = encoder_prints(whose)
    out = Path(args.out or cache_folder(run.config, prints))
    check_writable(out)
    encode_all(run, out, prints, rank, world)
    ways = [("--from", whose, "--cache", out), ("--cache", out, "--model", "d15")][:1 + bool(args.model)]
    if rank == 0:
        print(f"done{f' with the share of rank 0 of {world}' if world > 1 else ''}: {out}. Now type\n"
              + "\n or ".join(f"    python {typed('train.py', *how)}" for how in ways))


def main(argv=None) -> None:
    arguments, argv = (), sys.argv[1:] if argv is None else argv
    with lasting_output():
        try:
            if argv[:1] == ["cache"]:
                cache_command(argv[1:])
            elif "--dry-run" in argv:
                import budget                       # only a dry run needs it
                budget.main([flag for flag in argv if flag not in ("--dry-run", "--tiny")])
            else:
                arguments = parse(argv)
                train(*arguments)
        except KeyboardInterrupt as e:              # Stopped is one
            if parallel.launched()[0] == 0:
                print(f"stopped; go on with  {again(argv, *arguments)}", file=sys.stderr)
            sys.exit(128 + getattr(e, "signum", signal.SIGINT))
        except (ValueError, FloatingPointError, OSError) as e:
            rank = parallel.launched()[0]
            if rank == 0 or not arguments:          # training itself tells what other ranks meet
                print(f"train.py: {f'rank {rank}: ' * bool(rank)}{e}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            less = ("a smaller --size or --device cpu" if argv[:1] == ["cache"] else "a larger --accumulate, "
                    "--checkpointing or, under torchrun, --fsdp, for the transformer; other stages need a "
                    "smaller batch, so a new run")
            print(f"train.py: out of memory ({str(e).splitlines()[0][:200]}): go on with  "
                  f"{again(argv, *arguments)}  and {less}", file=sys.stderr)
            sys.exit(2)


def again(argv, config: TrainConfig | None = None, resume: bool = False) -> str:
    """The command that goes on where this one ended."""
    if argv[:1] == ["cache"] or config and not has_run(config.out):
        return "the same command"
    return resuming(config.out) if config else f"{parallel.launcher()} train.py --resume"


def resuming(folder) -> str:
    return f"{parallel.launcher()} {typed('train.py', '--resume', '--out', folder)}"


def typed(*words) -> str:
    """A command as it must be typed: a folder may have spaces, a caption whatever was downloaded."""
    return " ".join((shlex.quote if os.name == "posix" else quoted)(str(word)) for word in words)


def quoted(word: str) -> str:
    """For Windows, whose shells give & and ; a meaning outside quotes."""
    line = subprocess.list2cmdline([word])
    return line if line[:1] == '"' or re.fullmatch(r"[\w.:/\\-]+", word) else f'"{line}"'


# Exercises. (1) --text-drop 0: guidance now compares with an input that the model never saw; what do samples
# look like?
# (2) --density uniform: worse at 5 sampling steps and at 50, says the paper's table 1. Is it so here?
# (3) --ema 0: sample from the raw weights. From which step on does the average win?

if __name__ == "__main__":
    main()
