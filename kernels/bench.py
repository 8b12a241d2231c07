"""Are the kernels worth it on this GPU? Times every operation and model at the published models' shapes.

    TRITON_INTERPRET=1 python kernels/bench.py --smoke --out /tmp/x     tiny shapes, on a CPU: does it run?
    python kernels/bench.py                        everything that kernels/results/ does not hold yet
    python kernels/bench.py --pixels 1024 --batch 1 --operation attention --model sd3.5-large

With half an hour on a GPU, first find its tiles (kernels/sweep.py, 4 minutes), then type this line again and
again, with --out in a folder that is kept; the operations come first, then the models, whose "triton" is by
then the faster of the two attentions:

    python kernels/bench.py --pixels 1024 --batch 1 --minutes 9

It runs at least one case, starts none that would take longer than the time left, and goes on from the
rows in --out and in kernels/results/. A case that fails becomes a row "failed" with its reason, and is not
tried again until that row is deleted; if a failure leaves the GPU unusable, the program starts itself again
and goes on after it.

Rivals, all doing the whole operation, norms and concatenation counted:

    torch               the formulas, called one after the other: what backend="torch" does
    torch compiled      the same through torch.compile
    flash, cudnn, efficient    torch compiled, with scaled_dot_product_attention held to one of its kernels
    flex                FlexAttention, compiled, after the same norms and concatenation
    copy                the activations, copied: the bytes that a modulation must read and write, and no more
    simple              the simple kernel of kernels/adaln.py
    triton              the kernel that is used
    triton+sdpa         kernels/norm_layout.py in front of PyTorch's attention

and for a whole model (one forward pass): torch and triton, each also compiled, and diffusers if installed.
Compiled are its blocks, one by one, as by train.py --compile: they are alike, so it takes seconds, not
minutes.

The CSV goes to kernels/results/, where `kernels` looks: one line a case says what backend="auto" takes from
now on. Beside it a roofline as PNG. Each row has the time (median of many, L2 cache flushed before each, with
the 20th and 80th percentile) and, from the formulas of `work`, with M + N = L tokens:

    operations    attention 4 B nh L^2 hd, backward 2.5 times that (5 products for 2); `model_operations`
    bytes         each activation that goes in or out, once; model: its weights
    share         of what this GPU reached in a large bfloat16 product (copy) minutes before
    error         largest of outputs and gradients, of the first picture and head, against float64, in units
                  of the largest value; the row "torch" has PyTorch's own. Model: distance from `torch`

Pitfalls
- Random numbers, not zeros: a GPU draws less power on zeros and runs faster.
- GPUs slow down when warm: the rivals of a case run one after the other, then again in the opposite order.
- Launching a short kernel takes the host longer than the kernel runs. An operation is launched while the GPU
  sleeps, so its time is the GPU's alone, as where many launches are waiting; a model's includes the host.
  So "auto" compares the GPU's time alone. In eager code the host spends about 50 us on a modulation by a
  kernel, 25 of them on the launch, and about 25 on its formula (counted without a GPU). Where the host is
  what a model waits for, as at 512 pixels, compare the model's rows, and compile.
- PyTorch caches what it compiled under the function's code and what it noticed while tracing it: which of its
  attentions is allowed must be said inside, or every rival is the one that was compiled first.
- Under autocast the stream of activations stays float32 beside branches of half precision: the modulations
  are measured in that mixture too, with dtype float32, forward + backward.
- A rival that cannot run a case (flash needs half precision, say) is left out with its reason, once. So is
  one for which memory does not last.
"""
import argparse
import copy
import csv
import datetime
import gc
import math
import os
import statistics
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as a file: `kernels` is beside this

import kernels  # noqa: E402
from kernels import adaln  # noqa: E402
from kernels.joint_attention import (cut_in_two, join, joint_attention_reference,  # noqa: E402
                                     joint_attention_triton)
from kernels.norm_layout import joint_attention_sdpa  # noqa: E402
from mmdit import MMDiT, MMDiTConfig  # noqa: E402

MODELS = "sd3.5-large", "sd3.5-medium", "sd3-medium"           # the one with targets first: time may run out
TEXT = 154
SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
PASSES = ("forward", "forward+backward")
SECONDS = {"attention": 45, "modul": 12, "model": 120}  # one pass of a case: a guess, raised if it took more


def cases(pixels=(512, 1024), batches=(1, 2, 4, 8), smoke=False) -> list[dict]:
    """What is measured: dicts of operation, model, pixels, B, M, N, nh, hd, norm, dtype, passes."""
    if smoke:
        tiny = dict(model="tiny", pixels=32, B=1, N=8, nh=1, hd=16, dtype="float32", norm=False, M=3)
        return [dict(tiny, operation="joint_attention with norms", norm=True),
                dict(tiny, operation="joint_attention with norms, no text", norm=True, M=0),
                dict(tiny, operation="modulate"), dict(tiny, operation="gate_residual_modulate"),
                dict(tiny, operation="model", hd=64, norm=True, N=4)]
    found = []
    for B in batches:
        for p in pixels:
            for model in MODELS:
                c = MMDiTConfig.preset(model)
                shape = dict(model=model, pixels=p, B=B, M=TEXT, N=(p // 16) ** 2, nh=c.num_heads,
                             hd=c.head_dim, norm=c.qk_norm, dtype="bfloat16")
                name = "joint_attention" + " with norms" * c.qk_norm
                found.append(dict(shape, operation=name))
                if c.dual_blocks:
                    found.append(dict(shape, operation=name + ", no text", M=0))
                if model != "sd3-medium":                           # of the same width as sd3.5-medium
                    for operation in ("modulate", "gate_residual_modulate"):
                        for dtype in ("bfloat16", "float32"):
                            found.append(dict(shape, operation=operation, norm=False, M=0, dtype=dtype))
                            if (model, p) == (MODELS[0], pixels[0]):            # the text's own, of no pixels
                                found.append(dict(found[-1], pixels=0, N=TEXT))
                if B <= 2:                                          # 2: one picture with guidance
                    found.append(dict(shape, operation="model"))
    return sorted(found, key=lambda c: c["operation"] == "model")


def passes(case) -> tuple:
    if case["operation"] == "model":
        return PASSES[:1]
    return PASSES[1:] if mixed(case) else PASSES


def mixed(case) -> bool:
    """x in float32 and all else in bfloat16, as in training under autocast."""
    return "modul" in case["operation"] and case["dtype"] == "float32" and case["model"] != "tiny"


# ----- the rivals

def held_to(backend, function):
    """function, with PyTorch's attention restricted to one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*a):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function(*a)
    return run


def sdpa_rivals(function, how) -> dict:
    return {name: torch.compile(held_to(backend, function), **how) for name, backend in SDPA.items()}


def flex(*a):
    from torch.nn.attention.flex_attention import flex_attention
    q, k, v = (x.transpose(1, 2) for x in join(*a[:6], a[6:] or None))
    return cut_in_two(flex_attention(q, k, v).transpose(1, 2), a[0])


def rivals(case, device) -> dict:
    """name -> function of the case's inputs."""
    how = dict(dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
    if case["operation"] == "model":
        return model_rivals(case, device, how)
    if "attention" in case["operation"]:
        def by(way):
            return lambda *a: way(*a[:6], a[6:] or None, None, 1e-6)

        plain = by(joint_attention_reference)
        found = {"torch": plain, "torch compiled": torch.compile(plain, **how)}
        if device == "cuda":
            found |= sdpa_rivals(plain, how)
            found["flex"] = torch.compile(flex, **how)
        return found | {"triton+sdpa": by(joint_attention_sdpa), "triton": by(joint_attention_triton)}
    plain = getattr(adaln, case["operation"] + "_reference")
    found = {"torch": plain, "torch compiled": torch.compile(plain, **how)}
    found["copy"] = lambda *a: [x.clone() for x in a if x.dim() == 3]
    if case["operation"] == "modulate":
        found["simple"] = adaln.modulate_simple
    found["triton"] = lambda *a: getattr(kernels, case["operation"])(*a, backend="triton")
    return found


def with_kernels(backend, function):
    """function, with "auto" standing for backend."""
    def run(*a):
        before, kernels.DEFAULT = kernels.DEFAULT, backend
        try:
            return function(*a)
        finally:
            kernels.DEFAULT = before
    return run


def model_config(case) -> MMDiTConfig:
    return MMDiTConfig.preset(case["model"], **(dict(depth=1, heads=1) if case["model"] == "tiny" else {}))


def model_rivals(case, device, how) -> dict:
    """The model with random weights, by both back ends, and diffusers' of the same shape."""
    dtype, c = getattr(torch, case["dtype"]), model_config(case)
    model = built(lambda: MMDiT(c), dtype, device)
    for p in model.parameters():
        if not p.any():                                             # gates of zero would hide the blocks
            torch.nn.init.normal_(p, std=0.02)
    compiled = compiled_blocks(model, "joint_blocks", how)
    found = {}
    for backend in ("torch", "triton"):
        found[backend] = with_kernels(backend, model)
        found[backend + " compiled"] = with_kernels(backend, compiled)
    if not find_spec("diffusers"):
        print("  diffusers left out: it is not installed")
        return found
    try:
        theirs = built(lambda: diffusers_model(c), dtype, device)
    except torch.OutOfMemoryError as e:                             # two of 8B: ours is measured alone then
        print(f"  diffusers left out: {in_short(e)}")
        return found

    def peer(module):
        return lambda x, t, context, pooled: module(x, context, pooled, 1000 * t, return_dict=False)[0]

    found["diffusers"] = peer(theirs)
    found["diffusers compiled"] = peer(compiled_blocks(theirs, "transformer_blocks", how))
    return found


def built(make, dtype, device):
    """make(), its weights drawn in dtype: by way of float32 they would need twice the memory."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            return make().to(dtype).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def diffusers_model(c: MMDiTConfig):
    from diffusers import SD3Transformer2DModel
    return SD3Transformer2DModel(
        sample_size=128, in_channels=c.in_channels, out_channels=c.in_channels, num_layers=c.depth,
        attention_head_dim=c.head_dim, num_attention_heads=c.num_heads, caption_projection_dim=c.width,
        joint_attention_dim=c.context_dim, pooled_projection_dim=c.pooled_dim, pos_embed_max_size=c.pos_max,
        dual_attention_layers=tuple(range(c.dual_blocks)), qk_norm="rms_norm" if c.qk_norm else None)


def compiled_blocks(model, name, how):
    """The same model, with the same parameters, whose blocks are compiled."""
    kept = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, kept)                               # what is in `kept` counts as copied
    for block in getattr(twin, name):
        block.compile(**how)
    return twin


def inputs(case, device) -> list:
    """Random, laid out as the Linears of a block leave them: qkv packed, modulation vectors side by side."""
    B, M, N, nh, hd = (case[k] for k in ("B", "M", "N", "nh", "hd"))
    dtype = torch.bfloat16 if mixed(case) else getattr(torch, case["dtype"])
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    if case["operation"] == "model":
        c, side = model_config(case), case["pixels"] // 8
        return [random(B, c.in_channels, side, side), torch.rand(B, device=device),
                random(B, M, c.context_dim), random(B, c.pooled_dim)]
    if "attention" in case["operation"]:
        txt, img = random(B, M, 3, nh, hd).unbind(2), random(B, N, 3, nh, hd).unbind(2)
        weights = [0.5 + torch.rand(hd, device=device).to(dtype) for _ in range(4 * case["norm"])]
        if not M:
            txt, weights[:2] = [None] * 3, [None] * min(2, len(weights))
        return [*txt, *img, *weights]
    x, y = random(2, B, N, nh * hd)
    x = x.to(getattr(torch, case["dtype"]))
    shift, scale, gate, *_ = random(B, 6 * nh * hd).chunk(6, dim=-1)
    return [x, shift, scale] if case["operation"] == "modulate" else [x, y, gate, shift, scale]


def tensors(out) -> list:
    return [out] if torch.is_tensor(out) else [o for o in out if o is not None and o.numel()]


def gradients(function, args, pulls=None):
    """Outputs, gradients of every input, and what the outputs were pulled with: random if not given."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in args]
    out = tensors(function(*leaves))
    pulls = pulls or [torch.randn_like(o) for o in out]
    leaves = [x for x in leaves if x is not None]
    return out, torch.autograd.grad(out, leaves, pulls, allow_unused=True), pulls


def runner(function, args, backward):
    """A call to be timed. Backward: from fixed gradients, to fresh gradients of every input."""
    if not backward:
        return torch.no_grad()(lambda: function(*args))
    pulls = gradients(function, args)[2]
    return lambda: gradients(function, args, pulls)


# ----- measuring

def milliseconds(run, device, asleep=True) -> list[float]:
    """20th percentile, median, 80th, of about 0.2 seconds. asleep: the GPU sleeps while the host launches."""
    if device != "cuda":                                            # only a smoke run comes here
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)] * 3
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        done = time.perf_counter() - start
    flush = torch.empty(2 ** 28, dtype=torch.int8, device=device)   # more than any L2 cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)]
              for _ in range(max(5, min(200, int(0.2 / done))))]
    for begin, end in events:
        flush.zero_()
        if asleep:
            torch.cuda._sleep(int(1.5 * min(launched, 0.01) * 2e9)) # cycles, at 2 GHz
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    fifths = statistics.quantiles((begin.elapsed_time(end) for begin, end in events), n=10)
    return [fifths[1], fifths[4], fifths[7]]


def first(x):
    """The first head of the first picture of an activation in heads; of any other the first picture."""
    return x[:1, :, :1] if x.dim() == 4 else x[:1] if x.dim() > 1 else x


def exact(case):
    """The operation in the dtype of its arguments, spelled out."""
    def attention(*a):
        a = list(a)
        for i, w in zip((0, 1, 3, 4), a[6:]):
            if a[i] is not None:
                a[i] = a[i] / (a[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
        q, k, v = (x.transpose(1, 2) for x in join(*a[:6]))
        out = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
        return out[:, :case["M"]], out[:, case["M"]:]

    def modulated(x, *a):
        *gated, shift, scale = (t.unsqueeze(1) if t.dim() == 2 else t for t in a)
        h = None
        if gated:
            h = x + gated[1] * gated[0]
            x = h + (h.to(getattr(torch, case["dtype"])).to(h.dtype) - h).detach()     # h is stored between
        n = x - x.mean(-1, keepdim=True)
        return h, n / (n.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    return attention if "attention" in case["operation"] else modulated


def error(function, args, case, backward) -> float:
    """The largest of outputs and gradients, in units of the largest value. Weights are shared by all heads:
    their gradients are left out."""
    small = [None if a is None else first(a).double() for a in args]
    if backward:
        out, grads, pulls = gradients(function, args)
        exact_out, exact_grads, _ = gradients(exact(case), small, [first(p).double() for p in pulls])
        heads = [a.dim() > 1 for a in args if a is not None]
        pairs = [*zip(out, exact_out), *((g, e) for g, e, of in zip(grads, exact_grads, heads) if of)]
    else:
        with torch.no_grad():
            pairs = list(zip(tensors(function(*args)), tensors(exact(case)(*small))))
    return torch.stack([(first(a).double() - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def model_operations(c: MMDiTConfig, B, M, N) -> int:
    """Operations of one forward pass: 2 for each weight and token, and the attentions."""
    D, out = c.width, c.patch_size ** 2 * c.in_channels
    tokens = D * (2 * N * out + M * c.context_dim) + D * (256 + c.pooled_dim) + 2 * D * D
    for i in range(c.depth):
        dual, last = i < c.dual_blocks, i == c.depth - 1
        tokens += D * D * (12 * N + (2 if last else 12) * M + (9 if dual else 6) + (2 if last else 6))
        tokens += 2 * D * (M + N) * (N if last else M + N)
        if dual:
            tokens += 4 * D * D * N + 2 * D * N * N
    return 2 * B * (tokens + 2 * D * D)                             # the last layer's modulation


def work(case, backward) -> tuple[float, float]:
    """Floating-point operations, and bytes that must be read or written once."""
    B, M, N, nh, hd = (case[k] for k in ("B", "M", "N", "nh", "hd"))
    size = getattr(torch, case["dtype"]).itemsize
    if case["operation"] == "model":
        c = model_config(case)
        with torch.device("meta"):
            weights = sum(p.numel() for p in MMDiT(c).parameters())
        return model_operations(c, B, M, N), weights * size
    one = B * (M + N) * nh * hd * size                              # one pass over an activation
    if "attention" in case["operation"]:
        return 4 * B * nh * (M + N) ** 2 * hd * (3.5 if backward else 1), one * (4 + 8 * backward)
    ours, branch = (2 + 3 * backward), 0                            # passes over x's kind, and over y's
    if case["operation"] != "modulate":
        ours, branch = (3 + 4 * backward), (1 + 2 * backward)
    return 0.0, B * N * nh * hd * (ours * size + branch * (2 if mixed(case) else size))


def peaks(device) -> tuple[float, float]:
    """TFLOP/s of a large bfloat16 product, GB/s of a large copy (bytes read and written)."""
    n = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    product = 2 * n ** 3 / milliseconds(lambda: a @ b, device)[1] / 1e9
    big = torch.randn(2 ** 29 if device == "cuda" else 2 ** 16, device=device, dtype=torch.bfloat16)
    return product, 4 * big.numel() / milliseconds(lambda: big.clone(), device)[1] / 1e6


def measure(case, backward, device, peak, skipped) -> list[dict]:
    """One row for each rival that can run the case."""
    args, rows, runs = inputs(case, device), [], {}
    torch.compiler.reset()
    functions = rivals(case, device)
    for name, function in functions.items():
        if name in ("simple", "copy") and backward:
            continue
        try:
            runs[name] = runner(function, args, backward)
            runs[name]()
        except Exception as e:                                      # each rival has limits of its own kind
            runs.pop(name, None)
            if name in ("torch", "triton") or not usable(device):
                raise
            if (name, reason := in_short(e)) not in skipped:
                skipped.add((name, reason))
                print(f"  {name} left out: {reason}")
    model = case["operation"] == "model"
    times = {name: [] for name in runs}
    for order in (list(runs), list(runs)[::-1]):
        for name in order:
            times[name].append(milliseconds(runs[name], device, asleep=not model))
    flops, moved = work(case, backward)
    reference = runs["torch"]() if model else None
    for name, measured in times.items():
        low, ms, high = (statistics.mean(t) for t in zip(*measured))
        tflops, gbps = flops / ms / 1e9, moved / ms / 1e6
        if model and "diffusers" in name:                           # other weights
            wrong = math.nan
        elif name == "copy":                                        # computes nothing
            wrong = 0.0
        elif model:
            wrong = ((runs[name]() - reference).norm() / reference.norm()).item()
        else:
            wrong = error(functions[name], args, case, backward)
        rows.append({"provider": name, "ms": ms, "ms_20": low, "ms_80": high, "tflops": tflops, "gbps": gbps,
                     "share": tflops / peak[0] if flops else gbps / peak[1], "error": wrong,
                     "intensity": flops / moved})
    return rows


def in_short(e) -> str:
    return (str(e).strip() or repr(e)).splitlines()[0][:90]


def usable(device) -> bool:
    """Whether the GPU still works: after a write to a wrong address a process gets nothing more out of it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


# ------ reporting

def table(case, name, rows) -> None:
    ms = {r["provider"]: r["ms"] for r in rows}
    print(f"{case['operation']}, {case['model']}, {case['pixels']} pixels, batch {case['B']}, "
          f"{case['M']} + {case['N']} tokens, {case['dtype']}, {name}")
    for r in rows:
        print(f"  {r['provider']:19s}{r['ms']:9.4f} ms  {r['tflops']:7.1f} TFLOP/s {r['gbps']:7.0f} GB/s  "
              f"{100 * r['share']:4.0f} % of peak  error {r['error']:.1e}  "
              f"triton {r['ms'] / ms['triton']:5.2f}x")
    if case["operation"] == "model":
        return
    right = {r["provider"] for r in rows if kernels.is_right(r)}
    for rival, where in (("torch", "eager code"), ("torch compiled", "torch.compile")):
        if rival in ms:
            mine = {"torch": ms[rival]} | {n: ms[n] for n in right if n.startswith("triton")}
            print(f"  auto takes {min(mine, key=mine.get)} in {where}")
    for wrong in sorted({n for n in ms if n.startswith("triton")} - right):
        print(f"  {wrong} IS WRONG: auto will not take it")


def roofline(rows, peak, gpu, path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    x = [0.3, peak[0] / peak[1] * 1e3, 1e4]
    ax.plot(x, [x[0] * peak[1] / 1e3, peak[0], peak[0]], color="black", label="measured copy and product")
    for name in sorted({r["provider"] for r in rows} - {"failed"}):
        mine = [(float(r["intensity"]), float(r["tflops"])) for r in rows if r["provider"] == name]
        mine = [point for point in mine if point[0]]
        ax.scatter([i for i, _ in mine], [t for _, t in mine], s=12, label=name)
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=gpu)
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)


CASE = "operation", "model", "pixels", "B", "M", "N", "nh", "hd", "dtype", "pass"      # what tells rows apart
FIGURES = "ms", "ms_20", "ms_80", "tflops", "gbps", "share", "error", "intensity"


def label(row) -> tuple:
    return tuple(str(row[k]) for k in CASE)


def measured_before(folders, gpu, versions) -> list[dict]:
    """Rows of this GPU and these versions of torch and triton, from every CSV there."""
    rows = []
    for path in sorted(path for folder in folders for path in folder.glob("*.csv")):
        rows += [r for r in kernels.whole_rows(path)
                 if (r["gpu"], r["torch"], r["triton"]) == (gpu, *versions)]
    return rows


def append(path, rows) -> list[dict]:
    """Append rows to the CSV at `path`, in lines of their own if the last one was cut off. -> rows"""
    before = path.read_bytes() if path.exists() else b""
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        if not before:
            writer.writeheader()
        elif not before.endswith(b"\n"):
            f.write("\n")
        writer.writerows(rows)
    return rows


def seconds(case, took) -> float:
    """What a pass of the case may take: a guess, or the longest of its kind so far."""
    kind = next(name for name in SECONDS if name in case["operation"])
    return max(SECONDS[kind], *(s for operation, s in took if kind in operation), 0)


def arguments(argv):
    p = argparse.ArgumentParser(description="Times the kernels against what PyTorch has, on this GPU.")
    p.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--operation", default="",
                   help="only operations whose name contains this; model: only whole models")
    p.add_argument("--model", default="", choices=("", *MODELS), help="only this model's shapes")
    p.add_argument("--minutes", type=float, default=math.inf, help="start nothing that would end later")
    p.add_argument("--out", type=Path, default=kernels.RESULTS)
    p.add_argument("--smoke", action="store_true", help="tiny shapes on any device; needs another --out")
    a = p.parse_args(argv)
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.device == "cpu" and not a.smoke:
        p.error("times of a CPU say nothing about a GPU, and this machine has no CUDA GPU: run it on one, or "
                "check with --smoke that everything runs")
    if a.smoke and a.out == kernels.RESULTS:
        p.error(f"--smoke measures nothing: give it an --out other than {kernels.RESULTS}")
    if refusal := kernels.device_refuses(torch.device(a.device)):
        p.error(f"Triton cannot run here: {refusal}")
    a.cases = [(c, name) for c in cases(a.pixels, a.batch, a.smoke) for name in passes(c)
               if a.operation in c["operation"] and a.model in c["model"]]
    if not a.cases:
        p.error(f"nothing of {a.model or 'any model'} is called {a.operation!r}: "
                "try attention, modulate or model")
    return a


def attempt(case, name, a, peak, skipped) -> list[dict]:
    """The rows of a case; if it fails, a single row that says why."""
    try:
        rows = measure(case, name == PASSES[1], a.device, peak, skipped)
        table(case, name, rows)
        return [r | {"reason": ""} for r in rows]
    except Exception as e:                                          # the other cases need not suffer for it
        traceback.print_exc()
        print(f"FAILED: {', '.join(label(case | {'pass': name}))}: {in_short(e)}")
        nothing = dict.fromkeys(FIGURES, math.nan)
        return [{"provider": "failed", **nothing, "reason": in_short(e)}]
    finally:
        gc.collect()                                                # compiled functions hold on to a model
        if a.device == "cuda" and usable(a.device):
            torch.cuda.empty_cache()


def main(argv=None) -> None:
    a = arguments(argv)
    import triton
    start, today = time.monotonic(), datetime.date.today().isoformat()
    gpu, versions = (torch.cuda.get_device_name() if a.device == "cuda" else "CPU"), (
        torch.__version__, triton.__version__)
    a.out.mkdir(parents=True, exist_ok=True)
    folders = list(dict.fromkeys((kernels.RESULTS.resolve(), a.out.resolve())))
    everything = measured_before(folders, gpu, versions)
    done, took, peak, skipped = {label(r) for r in everything}, [], None, set()
    left = [(c, name) for c, name in a.cases if label(c | {"pass": name}) not in done]
    print(f"{len(a.cases) - len(left)} of {len(a.cases)} measured before; the others will take about "
          f"{sum(seconds(c, took) for c, _ in left) / 60:.0f} minutes, most of it compiling", flush=True)
    path = a.out / f"{gpu.replace(' ', '_')}_{today}.csv"
    for case, name in left:
        spent = time.monotonic() - start
        if took and spent + seconds(case, took) > 60 * a.minutes:
            continue                                                # a shorter one may still fit
        if peak is None:
            peak = peaks(a.device)
            print(f"{gpu}, torch {versions[0]}, triton {versions[1]}: "
                  f"bfloat16 product {peak[0]:.0f} TFLOP/s, copy {peak[1]:.0f} GB/s")
        if case["operation"] == "model":                            # "triton" is the faster of two
            kernels.MEASURED = kernels.read_results(*folders)
        rows = attempt(case, name, a, peak, skipped)
        took.append((case["operation"], time.monotonic() - start - spent))
        common = {"gpu": gpu, "date": today, "torch": versions[0], "triton": versions[1], **case,
                  "pass": name, "head_dim": case["hd"] if "attention" in case["operation"] else 0,
                  "size": kernels.size_of(case["operation"], case["B"] * case["N"] * case["nh"] * case["hd"],
                                          case["N"]),
                  "peak_tflops": peak[0], "peak_gbps": peak[1]}
        everything += append(path, [common | r for r in rows])
        print(f"{len(took)} of {len(left)} after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        if not usable(a.device):                                    # a new process gets the GPU back
            rest = a.minutes - (time.monotonic() - start) / 60
            if rest < 1:
                sys.exit("the GPU takes nothing more from this process; the same command goes on")
            os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(rest)])
    if peak:
        roofline(everything, peak, gpu, path.with_suffix(".png"))
        print(path)
    if len(took) < len(left):
        print(f"stopped after {a.minutes:g} minutes; the same command does the {len(left) - len(took)} left")
    failed = {label(r) for r in everything if r["provider"] == "failed"}
    if failed := sorted(", ".join(x) for x in failed & {label(c | {"pass": name}) for c, name in a.cases}):
        sys.exit("\n".join(["failed; to try again, delete these rows from the CSV:", *failed]))


if __name__ == "__main__":
    main()
