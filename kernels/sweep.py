"""Which tiles are fastest on this GPU? Times attention's three steps and the modulations, cut in many ways.

    python kernels/sweep.py --minutes 9                         sd3.5-large at 1024 pixels, head dim 64
    python kernels/sweep.py --head-dim 128 --dtype float16
    TRITON_INTERPRET=1 python kernels/sweep.py --smoke          two ways each, on a CPU: does it run?

kernels/joint_attention.py reads how to cut from its tables TILES and TILES_HOPPER: sizes of the tile of
queries (BLOCK_M) and of keys (BLOCK_N), warps and pipeline stages. They were chosen by what can be counted
without a GPU. This program times what cannot: it prints the fastest ways of each step beside the table's own,
and the line to put there.

    forward   the whole forward pass
    keys      a backward pass, in which only the kernel for dK and dV is cut otherwise
    queries   a backward pass, in which only the kernel for dQ is
    modulate  both modulations forward: rows a program and warps, beside a copy of the same bytes. What wins
              goes into `tile` in kernels/adaln.py

Pitfalls
- A way that the GPU has no room for, or that computes something else than the table's own, is left out and
  counted. More stages need more shared memory; two large sides need more registers than there are.
- Each way is compiled first, a second or more. --minutes is shared by the steps; ways like the table's own
  come first, so that little time still finds something.
- A few per cent are noise: the four fastest are timed twice more, in turns, before one of them is named.
"""
import argparse
import importlib
import itertools
import math
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as a file: `kernels` is beside this

from kernels import adaln  # noqa: E402
from kernels.bench import in_short, milliseconds, usable  # noqa: E402
from kernels.joint_attention import launch_forward, tiles  # noqa: E402
from kernels.joint_attention_backward import launch_backward  # noqa: E402

STEPS = ("forward", "keys", "queries")
NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


def candidates(step: str, own: tuple) -> list[tuple]:
    """Ways to cut, as NAMES: those nearest to the table's own first, by the factors between sides, between
    stages, and between warps or, if that is nearer, between the scores a warp has."""
    sides = (32, 64, 128, 256) if step == "forward" else (32, 64, 128)
    ways = {way for way in itertools.product(sides, (32, 64, 128), (4, 8), (1, 2, 3, 4))
            if way[0] * way[1] <= 128 * 128 and way[2] * 32 * 16 <= way[0] * way[1]}

    def far(way):
        m, n, warps, stages = (abs(math.log2(a / b)) for a, b in zip(way, own))
        of_a_warp = abs(math.log2(way[0] * way[1] / way[2] / (own[0] * own[1] / own[2])))
        return m + n + min(warps, of_a_warp) + stages, way
    return sorted(ways | {own}, key=far)


@contextmanager
def cut(step: str, way: tuple):
    """Inside, this step is cut this way; the others as usual."""
    # "from kernels import joint_attention" would give the function of that name
    modules = [importlib.import_module(f"kernels.joint_attention{part}") for part in ("", "_backward")]
    usual = tiles
    for module in modules:
        module.tiles = lambda s, x: usual(s, x) | (dict(zip(NAMES, way)) if s == step else {})
    try:
        yield
    finally:
        for module in modules:
            module.tiles = usual


def problem(M, N, nh, hd, dtype, device):
    """-> {step: call} on random activations of M text and N image tokens, with norms."""
    g = torch.Generator(device).manual_seed(0)
    six = [x for L in (M, N)                                        # views of a packed qkv, as models give
           for x in torch.randn(1, L, 3, nh, hd, generator=g, device=device).to(dtype).unbind(2)]
    weights = [torch.rand(hd, generator=g, device=device).to(dtype) + 0.5 for _ in range(4)]
    *outs, lse = launch_forward(*six, weights, None, 1e-6)
    pulls = [torch.randn(x.shape, generator=g, device=device).to(dtype) for x in outs]

    def backward():
        grads, of_weights = launch_backward(*pulls, *outs, lse, *six, weights, None, 1e-6)
        return [*grads, *of_weights]
    return {"forward": lambda: launch_forward(*six, weights, None, 1e-6), "keys": backward,
            "queries": backward}


def sweep(step: str, call, own: tuple, ways: list[tuple], device: str, seconds: float):
    """-> [(ms, way), ...]: the four fastest and the table's own, timed three times, then the others; and what
    was left out, with the reason."""
    def checked():
        if not all((a - b).abs().max() <= 0.02 * b.abs().max() for a, b in zip(call(), expected)):  # nor NaN
            raise ValueError("computes something else")

    end, expected, times, left_out = time.monotonic() + seconds, call(), {}, []
    for way in ways:                                                # the first is own
        if times and time.monotonic() > end:
            break
        try:
            with cut(step, way):
                checked()
                times[way] = milliseconds(call, device)[1]
        except Exception as e:                                      # compilers fail in many ways
            if way == own or not usable(device):
                raise
            left_out.append(f"{way}: {in_short(e)}")
    best = sorted({own, *sorted(times, key=times.get)[:4]}, key=times.get)
    for way in [*best, *best[::-1]]:
        with cut(step, way):
            times[way] = (times[way] + milliseconds(call, device)[1]) / 2
    best.sort(key=times.get)
    others = sorted((way for way in times if way not in best), key=times.get)
    return [(times[way], way) for way in best + others], left_out


def modulations(D: int, L: int, dtype, device: str) -> None:
    """Prints the time of every way to cut the two modulations of one picture, and of a copy."""
    g = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(1, L, D, generator=g, device=device).to(dtype) for _ in range(2))
    vectors = [torch.randn(1, D, generator=g, device=device).to(dtype) for _ in range(3)]
    usual = adaln.tile
    for name, more, copied in (("modulate", (), (x,)), ("gate_residual_modulate", (y, vectors[2]), (x, y))):
        times = {}
        for rows, warps in itertools.product((1, 2, 4), (4, 8, 16)):
            adaln.tile = lambda D: dict(ROWS=rows, num_warps=warps)
            try:
                call = partial(adaln.launch_forward, x, *vectors[:2], 1e-6, *more)
                times[rows, warps] = milliseconds(call, device)[1]
            finally:
                adaln.tile = usual
        copy = milliseconds(lambda: [t.clone() for t in copied], device)[1]
        print(f"{name}: a copy of the same bytes takes {copy:.4f} ms; ROWS, num_warps")
        for way in sorted(times, key=times.get):
            own = usual(D) == dict(ROWS=way[0], num_warps=way[1])
            print(f"  {times[way]:9.4f}  {copy / times[way]:5.0%} of the copy's speed  {way}"
                  + "  the table's own" * own, flush=True)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="time joint attention with other tiles", allow_abbrev=False)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--tokens", type=int, default=4096, help="tokens of the picture (default: 4096)")
    p.add_argument("--minutes", type=float, default=9, help="time for all three steps (default: 9)")
    p.add_argument("--smoke", action="store_true", help="tiny, on a CPU in Triton's interpreter")
    args = p.parse_args(argv)
    device = "cpu" if args.smoke else "cuda"
    if args.smoke and os.environ.get("TRITON_INTERPRET") != "1":
        p.error("--smoke runs in Triton's interpreter: set TRITON_INTERPRET=1")
    if not args.smoke and not torch.cuda.is_available():
        p.error("there is no CUDA GPU; --smoke runs on a CPU")
    M, N, nh = (3, 9, 1) if args.smoke else (154, args.tokens, 2432 // args.head_dim)
    dtype = torch.float32 if args.smoke else getattr(torch, args.dtype)
    calls = problem(M, N, nh, args.head_dim, dtype, device)
    x = torch.empty(1, N, nh, args.head_dim, dtype=dtype, device=device)
    print(f"{'CPU' if args.smoke else torch.cuda.get_device_name()}, torch {torch.__version__}: {M} + {N} "
          f"tokens, {nh} heads of {args.head_dim}, {str(dtype).removeprefix('torch.')}; "
          f"milliseconds of a pass, {', '.join(NAMES)}")
    for step in STEPS:
        own = tuple(tiles(step, x).get(name, 1) for name in NAMES)
        ways = [own, (16, 32, 1, 1)] if args.smoke else candidates(step, own)
        found, left_out = sweep(step, calls[step], own, ways, device, 20 * args.minutes)
        print(f"{step}: {len(found)} ways of {len(ways)}, {len(left_out)} left out")
        mine = next(ms for ms, way in found if way == own)
        for ms, way in found[:5]:
            print(f"  {ms:9.3f}  {mine / ms:5.2f}x  {way}" + "  the table's own" * (way == own))
        for why in left_out[:3]:
            print(f"  left out {why}")
        print(f'  "{step}": {found[0][1]}', flush=True)
    modulations(*(48, 9) if args.smoke else (2432, args.tokens), dtype, device)


if __name__ == "__main__":
    main()
