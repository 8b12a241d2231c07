"""Are the kernels worth it on this GPU? Times every operation at the shapes of the three published models.

    python kernels/bench.py                        every case; about half an hour, most of it compiling
    python kernels/bench.py --pixels 1024 --batch 1 --operation joint_attention
    python kernels/bench.py --smoke --out /tmp/x   tiny shapes on any device: does all of it run?

Rivals, all doing the whole operation, norms and concatenation counted:

    torch               the formulas, called one after the other: what backend="torch" does
    torch compiled      the same through torch.compile
    flash, cudnn, efficient    torch compiled, with scaled_dot_product_attention held to one of its kernels
    flex                FlexAttention, compiled, after the same norms and concatenation
    simple              the simple kernel of kernels/adaln.py
    triton              the kernels that are used

One line a case says which of torch and triton backend="auto" will take from now on: the CSV goes to
kernels/results/, where `kernels` looks. Beside it a roofline as PNG. Each CSV row has the time (median of
many, L2 cache flushed before each, with the 20th and 80th percentile), TFLOP/s (4 B nh Lq Lk hd forward, 2.5
times that backward), GB/s (bytes that must be moved, once each), the share of what this GPU reached in a
large bfloat16 matrix product or copy minutes before, and the largest error of the output against float64, in
units of the largest value.

Pitfalls
- Random numbers, not zeros: a GPU draws less power on zeros and runs faster.
- GPUs slow down when warm: the rivals of a case run one after the other, then again in the opposite order.
- A rival that cannot run a case (flash needs half precision, say) is left out with its reason, once.
"""
import argparse
import csv
import datetime
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as a file: `kernels` is beside this

import kernels  # noqa: E402
from kernels import adaln  # noqa: E402
from kernels.joint_attention import joint_attention_reference, rms_norm  # noqa: E402

MODELS = {                                              # heads, norms, has image-only attention too
    "sd3-medium": (24, False, False), "sd3.5-medium": (24, True, True), "sd3.5-large": (38, True, False)}
TEXT, HD = 154, 64
SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
PASSES = ("forward", "forward+backward")


def cases(pixels=(512, 1024), batches=(1, 2, 4, 8), smoke=False) -> list[dict]:
    """What is measured: dicts of operation, model, pixels, B, M, N, nh, hd, norm, dtype."""
    found = []
    for model, (nh, norm, dual) in MODELS.items():
        for p in pixels:
            for B in batches:
                shape = dict(model=model, pixels=p, B=B, N=(p // 16) ** 2, nh=nh, hd=HD, dtype="bfloat16")
                name = "joint_attention with norms" if norm else "joint_attention"
                found.append(dict(shape, operation=name, norm=norm, M=TEXT))
                if dual:
                    found.append(dict(shape, operation=name, norm=norm, M=0))
                if model != "sd3-medium":                           # of the same width as sd3.5-medium
                    for operation in ("modulate", "gate_residual_modulate"):
                        found.append(dict(shape, operation=operation, norm=False, M=0))
    if smoke:
        tiny = dict(model="tiny", pixels=96, B=1, N=36, nh=2, hd=16, dtype="float32", norm=False, M=5)
        found = [dict(tiny, operation="joint_attention with norms", norm=True),
                 dict(tiny, operation="modulate"), dict(tiny, operation="gate_residual_modulate")]
    return found


# ----- the rivals

def held_to(backend, function):
    """function, with PyTorch's attention restricted to one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*a):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function(*a)
    return run


def flex(q_txt, k_txt, v_txt, q_img, k_img, v_img, *w):
    from torch.nn.attention.flex_attention import flex_attention
    if w:
        q_txt, k_txt, q_img, k_img = (rms_norm(x, s) for x, s in zip((q_txt, k_txt, q_img, k_img), w))
    pairs = (q_txt, q_img), (k_txt, k_img), (v_txt, v_img)
    q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
    out = flex_attention(q, k, v).transpose(1, 2)
    return out[:, :q_txt.shape[1]], out[:, q_txt.shape[1]:]


def rivals(case, device) -> dict:
    """name -> function of the case's inputs."""
    if "attention" in case["operation"]:
        def plain(*a):
            return joint_attention_reference(*a[:6], a[6:] or None)

        found = {"torch": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        if device == "cuda":
            found |= {n: held_to(b, torch.compile(plain, dynamic=False)) for n, b in SDPA.items()}
            found["flex"] = torch.compile(flex, dynamic=False)
        found["triton"] = lambda *a: kernels.joint_attention(*a[:6], norm_weights=a[6:] or None,
                                                             backend="triton")
    else:
        plain = getattr(adaln, case["operation"] + "_reference")
        found = {"torch": plain, "torch compiled": torch.compile(plain, dynamic=False)}
        if case["operation"] == "modulate":
            found["simple"] = adaln.modulate_simple
        found["triton"] = lambda *a: getattr(kernels, case["operation"])(*a, backend="triton")
    return found


def inputs(case, device) -> list[torch.Tensor]:
    """Random, laid out as the Linears of a block leave them: qkv packed, modulation vectors side by side."""
    dtype, B, N, nh, hd = getattr(torch, case["dtype"]), *(case[k] for k in ("B", "N", "nh", "hd"))
    torch.manual_seed(0)
    if "attention" in case["operation"]:
        qkv = [torch.randn(B, L, 3, nh, hd, device=device, dtype=dtype) for L in (case["M"], N)]
        x = [y for both in qkv for y in both.unbind(2)]
        return x + [0.5 + torch.rand(hd, device=device) for _ in range(4 * case["norm"])]
    x, y = torch.randn(2, B, N, nh * hd, device=device, dtype=dtype)
    shift, scale, gate, *_ = torch.randn(B, 6 * nh * hd, device=device, dtype=dtype).chunk(6, dim=-1)
    return [x, shift, scale] if case["operation"] == "modulate" else [x, y, gate, shift, scale]


def runner(function, args, backward):
    """A call to be timed. Backward: from fixed gradients, to fresh gradients of every input."""
    if not backward:
        return torch.no_grad()(lambda: function(*args))
    leaves = [a.detach().requires_grad_() for a in args]

    def outputs():
        out = function(*leaves)
        return [out] if torch.is_tensor(out) else list(out)

    pulls = [torch.randn_like(o) for o in outputs()]
    return lambda: torch.autograd.grad(outputs(), leaves, pulls, allow_unused=True)


# ----- measuring

def milliseconds(run, device) -> list[float]:
    """20th percentile, median, 80th."""
    if device == "cuda":
        from triton.testing import do_bench
        return do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return [min(times), statistics.median(times), max(times)]


def error(function, args, case) -> float:
    """Of the image output of the first picture and head (or of the whole modulation), against float64."""
    with torch.no_grad():
        out = function(*args)
        out = out if torch.is_tensor(out) else out[-1]
        if "attention" in case["operation"]:
            out = out[:1, :, :1]
            a = [x[:1, :, :1].double() for x in args[:6]]
            for i, w in zip((0, 1, 3, 4), args[6:]):
                a[i] = a[i] / (a[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
            exact = kernels.attention(*(torch.cat(p, 1).transpose(1, 2) for p in zip(a[:3], a[3:])))
            exact = exact.transpose(1, 2)[:, case["M"]:]
        else:
            x, shift, scale = args[0].double(), args[-2].double().unsqueeze(1), args[-1].double().unsqueeze(1)
            if len(args) == 5:                                      # the sum is stored in the inputs' dtype
                x = (x + args[2].double().unsqueeze(1) * args[1].double()).to(args[0].dtype).double()
            n = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            exact = n * (1 + scale) + shift
        return ((out.double() - exact).abs().max() / exact.abs().max()).item()


def work(case, backward) -> tuple[float, float]:
    """Floating-point operations, and bytes that must be read or written once."""
    B, M, N, nh, hd = (case[k] for k in ("B", "M", "N", "nh", "hd"))
    size = 4 if case["dtype"] == "float32" else 2
    one = B * (M + N) * nh * hd * size                              # one pass over an activation
    if "attention" in case["operation"]:
        return 4 * B * nh * (M + N) ** 2 * hd * (3.5 if backward else 1), one * (4 + 8 * backward)
    passes = (2 + 3 * backward) if case["operation"] == "modulate" else (4 + 6 * backward)
    return 0.0, one * passes


def peaks(device) -> tuple[float, float]:
    """TFLOP/s of a large bfloat16 product, GB/s of a large copy (bytes read and written)."""
    n = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    product = 2 * n ** 3 / milliseconds(lambda: a @ b, device)[1] / 1e9
    big = torch.randn(2 ** 29 if device == "cuda" else 2 ** 16, device=device, dtype=torch.bfloat16)
    return product, 4 * big.numel() / milliseconds(lambda: big.clone(), device)[1] / 1e6


def measure(case, backward, device, peak, skipped) -> list[dict]:
    """One row a rival that can run the case."""
    args, rows, runs = inputs(case, device), [], {}
    torch.compiler.reset()
    functions = rivals(case, device)
    for name, function in functions.items():
        if name == "simple" and backward:
            continue
        try:
            runs[name] = runner(function, args, backward)
            runs[name]()
        except Exception as e:                                      # each rival has limits of its own kind
            runs.pop(name, None)
            if name == "triton":
                raise
            if (name, reason := str(e).strip().splitlines()[0][:90]) not in skipped:
                skipped.add((name, reason))
                print(f"  {name} left out: {reason}")
    times = {name: [] for name in runs}
    for order in (list(runs), list(runs)[::-1]):
        for name in order:
            times[name].append(milliseconds(runs[name], device))
    flops, moved = work(case, backward)
    for name, measured in times.items():
        low, ms, high = (statistics.mean(t) for t in zip(*measured))
        tflops, gbps = flops / ms / 1e9, moved / ms / 1e6
        rows.append({"provider": name, "ms": ms, "ms_20": low, "ms_80": high, "tflops": tflops, "gbps": gbps,
                     "share": tflops / peak[0] if flops else gbps / peak[1],
                     "error": error(functions[name], args, case), "intensity": flops / moved})
    return rows


# ------ reporting

def table(case, name, rows) -> None:
    ms = {r["provider"]: r["ms"] for r in rows}
    print(f"{case['operation']}, {case['model']}, {case['pixels']} pixels, batch {case['B']}, "
          f"{case['M']} + {case['N']} tokens, {case['dtype']}, {name}")
    for r in rows:
        print(f"  {r['provider']:15s}{r['ms']:9.4f} ms  {r['tflops']:7.1f} TFLOP/s {r['gbps']:7.0f} GB/s  "
              f"{100 * r['share']:4.0f} % of peak  error {r['error']:.1e}  "
              f"triton {r['ms'] / ms['triton']:5.2f}x")
    for rival, where in (("torch", "eager code"), ("torch compiled", "torch.compile")):
        if rival in ms:
            print(f"  auto takes {'triton' if ms['triton'] < ms[rival] else 'torch'} in {where}")


def roofline(rows, peak, gpu, path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    x = [0.3, peak[0] / peak[1] * 1e3, 1e4]
    ax.plot(x, [x[0] * peak[1] / 1e3, peak[0], peak[0]], color="black", label="measured copy and product")
    for name in sorted({r["provider"] for r in rows}):
        mine = [r for r in rows if r["provider"] == name and r["intensity"]]
        ax.scatter([r["intensity"] for r in mine], [r["tflops"] for r in mine], s=12, label=name)
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=gpu)
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=130, bbox_inches="tight")


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="Times the kernels against what PyTorch has, on this GPU.")
    p.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--operation", default="", help="only operations whose name contains this")
    p.add_argument("--out", type=Path, default=kernels.RESULTS)
    p.add_argument("--smoke", action="store_true", help="tiny shapes on any device; needs --out elsewhere")
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not a.smoke:
        p.error("times of a CPU say nothing about a GPU, and this machine has no CUDA GPU: run it on one, or "
                "check with --smoke that everything runs")
    if a.smoke and a.out == kernels.RESULTS:
        p.error(f"--smoke measures nothing: give it an --out other than {kernels.RESULTS}")
    if refusal := kernels.device_refuses(torch.device(device)):
        p.error(f"Triton cannot run here: {refusal}")
    import triton
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak, skipped, everything, today = peaks(device), set(), [], datetime.date.today().isoformat()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}: "
          f"bfloat16 product {peak[0]:.0f} TFLOP/s, copy {peak[1]:.0f} GB/s")
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / f"{gpu.replace(' ', '_')}_{today}.csv"
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = None
        for case in cases(a.pixels, a.batch, a.smoke):
            if a.operation not in case["operation"]:
                continue
            for backward, name in enumerate(PASSES):
                rows = measure(case, backward, device, peak, skipped)
                table(case, name, rows)
                attention = "attention" in case["operation"]
                common = {"gpu": gpu, "date": today, "torch": torch.__version__, "triton": triton.__version__,
                          **case, "pass": name, "head_dim": case["hd"] if attention else 0,
                          "elements": case["B"] * case["N"] * case["nh"] * case["hd"],
                          "peak_tflops": peak[0], "peak_gbps": peak[1]}
                everything += (rows := [common | r for r in rows])
                writer = writer or csv.DictWriter(f, rows[0])
                if f.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)
                f.flush()
    roofline(everything, peak, gpu, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
