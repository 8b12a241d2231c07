"""Is training still healthy, and has anyone asked it to stop? What `train.fit` asks after every step.

    question                         answered by      what follows
    was this a bad step?             judge, update    none: weights and moments stay as they are
    are they all bad now?            Log.hopeless,    back to the last healthy checkpoint with half the rate,
                                     roll_back        once; the second time it ends with advice
    how does it go?                  Log, plot_run    metrics.csv, a row a step; loss.png; a progress bar
    how did it go?                   film             film.gif, all sample grids one after the other
    do attention logits grow?        largest_logit    a column of metrics.csv, every hundredth step
    has anyone asked it to stop?     Stop             SIGTERM, Ctrl-C: the step is finished and saved
    is anyone still reading it?      lasting_output   `| head` ends the output, not the training

It stands apart from train.py so that the loop there stays on one page. Nothing here changes what a healthy
step computes.

What to know
- A step is bad if its loss or the norm of its gradient is not finite, or if its loss is more than five times
  the median of the last healthy ones. On drawn shapes the largest ratio seen in 4 whole runs was 1.34.
- Nothing here makes a GPU wait at each step. `judge` is arithmetic on tensors that stay there, the fused
  AdamW and Muon read its verdict there (`found_inf`, meant for gradient scaling), and the log reads 20 steps
  at once. So the news that every step is bad comes up to 20 steps late, which costs time but no weights.
- Going back alone would repeat the same steps, since all randomness comes from (seed, stage, step); therefore
  the rate is halved. Bad data will fail again, and then the advice is what is left.

Run `python watch.py`: three bad steps among good ones, which leave no trace in the weights.
"""
import csv
import errno
import io
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import mmdit
from checkpoints import State, checkpoints_of, remove_checkpoint
from kernels import rms_norm
from parallel import local
from tensor_files import files_in, write_atomically

SPIKE = 5.0                                 # times the median of the last healthy losses
RECENT = 51                                 # how many losses that median is of
BAD_IN_A_ROW = 10                           # this many are no accident
READ_EVERY = 20                             # steps between two readings of what the GPU computed
LOOK_EVERY = 100                            # steps between two measurements of the attention logits
BINS = 8                                    # of t, for the flow's loss
HEALTHY, NOT_FINITE, JUMPED = 0, 1, 2
REASONS = ("", "not finite", "spike")


# ------------------------------------------------------------------------------------------------- bad steps

@torch.no_grad()
def judge(state: State, loss, norm) -> torch.Tensor:
    """HEALTHY, NOT_FINITE or JUMPED, as a tensor on the device; updates state.recent and state.in_a_row.

    While fewer than half of the recent losses are known the others are infinite, so the median is too, and
    nothing counts as a jump."""
    loss = loss.detach().float()
    broken = ~(loss.isfinite() & norm.isfinite())
    jumped = loss > SPIKE * state.recent.sort().values[len(state.recent) // 2]
    bad = broken | jumped
    state.recent.copy_(torch.where(bad, state.recent, torch.cat([state.recent[1:], loss[None]])))
    state.in_a_row.copy_(torch.where(bad, state.in_a_row + 1, 0))
    return torch.where(broken, NOT_FINITE, torch.where(jumped, JUMPED, HEALTHY))


def update(optimizers, bad) -> None:
    """The optimizers' steps, unless this one was bad. Muon and the fused AdamW read that on the device, so
    nothing waits."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused", True):
            optimizer.found_inf = (bad > 0).float()
            optimizer.step()
        elif not bad:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def roll_back(run, state: State, start: dict | None, log: "Log") -> None:
    """Go back to the last healthy checkpoint, or to the stage's start, with half the rate, since the same
    steps would end in the same way. FloatingPointError if that has been tried before."""
    reached, advice = state.step, (f"start again with a lower --{state.stage}-rate, or with --dtype float32; "
                                   f"the column `skipped` of {log.path} shows what began when")
    run.settle(state.stage)                         # what is being saved may be the last healthy state
    if state.rollbacks:
        raise FloatingPointError(f"the loss of stage {state.stage} stays bad near step {reached}, even with "
                                 f"half the learning rate: {advice}")
    if not run.load(state, healthy=True):
        if start is None:
            raise FloatingPointError(f"the loss of stage {state.stage} stays bad near step {reached}, and no "
                                     f"checkpoint is older than that: {advice}")
        for tensors in (state.params, state.average):
            for k, p in tensors.items():
                local(p.data).copy_(start[k])
        for optimizer in state.optimizers:
            optimizer.state.clear()
        state.recent.fill_(math.inf)
        state.in_a_row.zero_()
        state.step = 0
    for folder in checkpoints_of(run.folder, state.stage) if run.ranks.rank == 0 else ():
        if int(folder.name.rpartition("-")[2]) > state.step:
            remove_checkpoint(folder)
    state.rollbacks = 1
    log.rewind(state)
    print(f"{state.stage}: {BAD_IN_A_ROW} bad steps in a row before step {reached}; going back to step "
          f"{state.step}, and on from there with half the learning rate", flush=True)


def loss_by_t(losses, t) -> torch.Tensor:
    """losses, t (B,) -> (2, BINS): the sum of the samples' losses in each of BINS equal parts of [0, 1], and
    how many there are. A loss differs more between early and late t than between early and late training."""
    inside = (t * BINS).long().clamp(max=BINS - 1)[:, None] == torch.arange(BINS, device=t.device)
    return torch.stack([(losses.detach()[:, None] * inside).sum(0), inside.sum(0)])


def add_up(ranks, pieces) -> tuple[torch.Tensor, dict]:
    """[(loss, parts)] of this rank's pieces of a batch, as a stage's loss returns them -> the same, summed
    over all pieces of all ranks; by_t becomes the mean loss in each of BINS parts, NaN in an empty one."""
    names = [k for k in pieces[0][1] if k != "by_t"]
    tables = [torch.cat([torch.stack([loss.detach(), *(parts[k] for k in names)]).float(),
                         parts.get("by_t", loss.new_empty(0)).float().flatten()]) for loss, parts in pieces]
    table = ranks.add(sum(tables[1:], tables[0]))
    scalars, by_t = table[:1 + len(names)], table[1 + len(names):].view(2, -1)
    return scalars[0], dict(zip(names, scalars[1:])) | ({"by_t": by_t[0] / by_t[1]} if by_t.numel() else {})


@torch.no_grad()
def largest_logit(loss, step, generator) -> torch.Tensor:
    """The largest |q k| / sqrt(hd) of all joint attentions in one step's forward pass, over the first four
    samples of its batch: the number that grew without bound in the paper before queries and keys were
    normalised.

    Fused kernels never show the logits, so for one extra forward pass, without compiled code, the model gets
    an attention that looks at them first. The step's generator makes it the batch of that very step. One
    head of one sample at a time: (L, L) numbers are few even where (B, nh, L, L) are not."""
    attend, seen = mmdit.joint_attention, []

    def look(q_txt, k_txt, v_txt, q_img, k_img, v_img, *, norm_weights=None, **options):
        q, k = [q_txt, q_img], [k_txt, k_img]
        for x, weights in ((q, (norm_weights or [None] * 4)[::2]), (k, (norm_weights or [None] * 4)[1::2])):
            x[:] = [y if w is None else rms_norm(y, w) for y, w in zip(x, weights) if y is not None]
        q, k = (torch.cat(x, dim=1)[:4].transpose(1, 2).flatten(0, 1) for x in (q, k))     # (4 nh, L, hd)
        seen.extend((a @ b.T).abs().max().float() / a.shape[-1] ** 0.5 for a, b in zip(q, k))
        return attend(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights=norm_weights, **options)

    mmdit.joint_attention = look
    try:
        with torch.compiler.set_stance("force_eager"):
            loss(step, generator)
    finally:
        mmdit.joint_attention = attend
    return torch.stack(seen).max()


# ---------------------------------------------------------------------------------------------------- the log

METRICS = ("stage", "step", "loss", "grad_norm", "rate", "skipped", "samples_per_s", "max_logit",
           *(f"t{i}" for i in range(BINS)), "parts")


class Log:
    """metrics.csv, and the progress bar (plain lines where the output is not a terminal).

    After `add` has read what the GPU computed, `hopeless` says whether the stage should go back."""

    def __init__(self, folder: Path, state, batch: int, silent: bool = False):
        """silent: for a rank that only needs to know whether training is hopeless."""
        self.silent, self.path, self.batch = silent, Path(folder) / "metrics.csv", batch
        self.warned, self.skipped = False, 0
        self.said = self.last = time.monotonic()
        self.bar = tqdm(total=state.total, initial=state.step, desc=f"{state.stage:4s}",
                        disable=silent or not sys.stderr.isatty(), dynamic_ncols=True)
        self.rewind(state)

    def rewind(self, state) -> None:
        """Forget this stage's rows after state.step: what was done since the checkpoint is done again."""
        self.pending, self.unwritten, self.hopeless, self.smooth = [], [], False, None
        self.first, self.start = state.step, time.monotonic()       # the speed is that of what follows
        self.bar.n = state.step
        if not self.silent:
            rows = read_metrics(self.path)
            rows = [r for r in rows if r["stage"] != state.stage or int(r["step"]) <= state.step]
            write_atomically(self.path, lambda p: write_rows(p, rows))

    def add(self, state, bad, loss, norm, rate, parts) -> None:
        scalars = {k: v for k, v in parts.items() if k != "by_t"}
        numbers = [loss.detach(), norm, bad, state.in_a_row, *scalars.values()]
        numbers = torch.cat([torch.stack([x.float() for x in numbers]), parts.get("by_t", loss.new_empty(0))])
        self.pending.append((state.step, rate, list(scalars), numbers))
        self.bar.total = state.total
        self.bar.update()
        if state.step % READ_EVERY == 0 or state.step == state.total:       # each reading makes a GPU wait
            self.flush(state)

    def flush(self, state) -> None:
        if not self.pending:
            return
        tables = [numbers for _, _, _, numbers in self.pending]
        tables = torch.cat(tables).cpu().split([len(x) for x in tables])    # one transfer for all
        now, limit, new, skipped = time.monotonic(), min(BAD_IN_A_ROW, state.total), [], []
        speed = self.batch * len(self.pending) / max(now - self.last, 1e-9)
        for (step, rate, names, _), table in zip(self.pending, tables):
            loss, norm, bad, in_a_row, *rest = table.tolist()
            parts = dict(zip(names, rest))
            row = {"stage": state.stage, "step": step, "loss": f"{loss:.6g}",
                   "grad_norm": f"{norm:.4g}", "rate": f"{rate:.4g}", "skipped": REASONS[int(bad)],
                   "samples_per_s": f"{speed:.4g}"}
            if "max_logit" in parts:
                row["max_logit"] = f"{parts.pop('max_logit'):.4g}"
            row |= {f"t{i}": f"{x:.4g}" for i, x in enumerate(rest[len(names):]) if not math.isnan(x)}
            new.append(row | {"parts": " ".join(f"{k}={v:.4g}" for k, v in parts.items())})
            self.hopeless = in_a_row >= limit                   # as of the last step: it may have recovered
            if bad:
                skipped.append(step)
        self.pending, self.last = [], now
        self.write(new)
        if skipped:
            self.skipped += len(skipped)
            reasons = {row["skipped"] for row in new} - {""}
            print(f"{state.stage}: no update in {len(skipped)} of the last {len(new)} steps (from step "
                  f"{skipped[0]} on; {' and '.join(sorted(reasons))}), {self.skipped} so far", flush=True)
        self.tell(state, [float(row["loss"]) for row in new if not row["skipped"]], new[-1]["grad_norm"], now)

    def write(self, rows) -> None:
        """A full disk does not stop training: rows wait until there is room."""
        if self.silent:
            return
        self.unwritten += rows
        size = None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                table = csv.DictWriter(f, METRICS)
                if not size:                                                # someone has removed it
                    table.writeheader()
                table.writerows(self.unwritten)
            self.unwritten, self.warned = [], False
        except OSError as e:
            if size is not None:
                with suppress(OSError):                                     # if it can be written at all
                    os.truncate(self.path, size)                            # no half row
            if not self.warned:
                print(f"metrics.csv cannot be written ({e}): training goes on, rows are kept", flush=True)
            self.warned = True

    def tell(self, state, losses, norm, now) -> None:
        for loss in losses and [sum(losses) / len(losses)]:
            self.smooth = loss if self.smooth is None else 0.8 * self.smooth + 0.2 * loss
        smooth = math.nan if self.smooth is None else self.smooth
        self.bar.set_postfix_str(f"loss {smooth:.4f}, grad {norm}")
        step, total = state.step, state.total
        if self.bar.disable and (now - self.said > 15 or step == total) and step > self.first:
            each, self.said = (now - self.start) / (step - self.first), now
            print(f"{state.stage:4s} {step:6d}/{total}  loss {smooth:.4f}  grad {norm}  "
                  f"{1000 * each:.0f} ms a step  {clock(each * (total - step))} left in this stage",
                  flush=True)


def write_rows(path, rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, METRICS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def read_metrics(path, most: int | None = None) -> list[dict]:
    """Rows by column name; also of older runs, which had fewer columns.

    most: of a stage with more rows only about so many, at equal distances, and besides them those that were
    skipped or have attention logits."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        counts, seen, found = Counter(line.partition(",")[0] for line in f if most), Counter(), []
        f.seek(0)
        table = csv.reader(f)
        header = next(table, [])
        telling = [header.index(name) for name in ("skipped", "max_logit") if name in header]
        for row in table:
            if not row or len(row) != len(header):                                  # a torn last line
                continue
            stage = row[0]
            if seen[stage] % (1 + counts[stage] // (most or 1)) == 0 or any(row[i] for i in telling):
                found.append(dict(zip(header, row)))
            seen[stage] += 1
    return found


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# -------------------------------------------------------------------------------------------------- the plots

def curve(panel, rows, column, **style) -> None:
    """A running mean over the steps that have a number in this column."""
    points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
    points = torch.tensor([p for p in points if math.isfinite(p[1])], dtype=torch.float64).view(-1, 2)
    if len(points):
        window = max(1, len(points) // 50)
        mean = points.unfold(0, window, 1).mean(2)
        panel.plot(mean[:, 0], mean[:, 1], lw=1.5, **style)


def plot_run(path) -> None:
    """loss.png beside metrics.csv. Above, each stage's loss: every step in grey, a running mean, and skipped
    steps in red. Below: gradients, the flow's loss by t, attention logits, speed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure                # not pyplot: a notebook keeps its own back end

    rows = read_metrics(path, most=5_000)           # enough for a plot of 400 pixels: all would take a minute
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    fig = Figure(figsize=(17, 7.4))
    above, below = fig.subplots(2, 4)
    fig.subplots_adjust(0.04, 0.07, 0.99, 0.95, wspace=0.2, hspace=0.3)
    for panel, stage in zip(above, stages):
        own = [r for r in rows if r["stage"] == stage]
        fine = [r for r in own if not r.get("skipped")]
        panel.plot([int(r["step"]) for r in fine], [float(r["loss"]) for r in fine], color="#cccccc", lw=0.7)
        curve(panel, fine, "loss", color="#2a6fbb")
        skipped = [int(r["step"]) for r in own if r.get("skipped")]
        for step in skipped:
            panel.axvline(step, color="#c0392b", lw=0.8, alpha=0.5)
        panel.set(title=stage + (f" ({len(skipped)} steps skipped)" if skipped else ""), yscale="log",
                  xlabel="step")
    above[0].set_ylabel("loss")
    for panel in above[len(stages):]:
        panel.set_axis_off()
    for stage in stages:
        own = [r for r in rows if r["stage"] == stage]
        curve(below[0], own, "grad_norm", label=stage)
        curve(below[3], own, "samples_per_s", label=stage)
    flow, colours = [r for r in rows if r["stage"] == "flow"], colormaps["viridis"]
    for i in range(BINS):
        curve(below[1], flow, f"t{i}", color=colours(i / BINS), label=f"{i / BINS:g} to {(i + 1) / BINS:g}")
    curve(below[2], flow, "max_logit", color="#2a6fbb", marker=".")
    titles = ("gradient norm before clipping", "flow: loss by t (1 is noise)",
              "flow: largest attention logit", "samples a second")
    for panel, title in zip(below, titles):
        panel.set(title=title, xlabel="step", yscale="linear" if title.endswith("logit") else "log")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="x-small", ncols=2)
    with io.BytesIO() as png:
        fig.savefig(png, dpi=100, format="png")
        write_atomically(Path(path).with_name("loss.png"), lambda p: p.write_bytes(png.getvalue()))


def film(folder: Path) -> None:
    """film.gif, if there are two sample grids or more: what the same noise became, step after step."""
    frames = []
    for path in files_in(folder / "samples", "*.png"):
        with Image.open(path) as grid:
            frames.append(grid.convert("P", palette=Image.Palette.ADAPTIVE))
    if len(frames) > 1:
        shown = [500] * (len(frames) - 1) + [3000]                  # milliseconds
        write_atomically(folder / "film.gif", lambda path: frames[0].save(
            path, format="GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0))


# ------------------------------------------------------------------------------------------ being interrupted

class Stopped(KeyboardInterrupt):
    """Someone has asked for the end, and everything that had to be saved is saved."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


class Stop:
    """Turns SIGTERM (a cluster's, a service's) and the first Ctrl-C into an end between two steps.

    A handler may run between any two lines, even in the middle of a save, so it only notes the request, and
    `fit` looks at `wanted` when a step is done. Where nothing is at stake it raises Stopped right away. The
    second Ctrl-C finds no handler, and the system ends the process at once."""

    def __init__(self):
        self.wanted, self.waiting, self.before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():           # only it may set handlers
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *problem):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def note(self, signum, frame):
        self.wanted = self.wanted or signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.waiting:
            raise Stopped(self.wanted)

    @contextmanager
    def later(self):
        """Inside, a request to stop waits; it is granted at the end, unless an exception comes first."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
        if self.wanted:
            raise Stopped(self.wanted)


class Lasting:
    """A text stream that outlives its reader: what is written after `| head` has had enough is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action) -> None:
        try:
            action()
        except OSError as e:
            closed = isinstance(e, BrokenPipeError) or os.name == "nt" and e.errno == errno.EINVAL
            if not closed:              # (Windows says EINVAL: CPython #79935)
                raise
            # from here on into the void: Python flushes once more as it exits
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output():
    data.print_any_sign()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def demo():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, recent = torch.optim.AdamW([weight], lr=0.01, fused=True), torch.full((RECENT,), torch.inf)
    state = State("demo", 100, {"w": weight}, {}, [optimizer], recent, torch.zeros(()))
    for step in range(60):
        factor = {40: math.nan, 41: math.inf, 42: 1e3}.get(step, 1.0)
        before = weight.detach().clone()
        loss = (factor * (weight - 3)).square().sum()
        loss.backward()
        bad = judge(state, loss, torch.nn.utils.clip_grad_norm_([weight], 1.0))
        update([optimizer], bad)
        assert torch.equal(before, weight) == (step in (40, 41, 42))
        if bad:
            print(f"step {step}: {REASONS[int(bad)]} ({loss.item():g}); the weight stays {weight.item():g}")
    assert state.in_a_row == 0
    print(f"step 59: loss {loss.item():.3f}, weight {weight.item():.3f} on its way to 3")


# Exercises. (1) Judge by the gradient's norm instead of the loss: which bad batches does that find earlier?
# (2) Keep AdamW's moments but scale a spike's gradient down to the median norm: what does skipping lose?

if __name__ == "__main__":
    demo()
