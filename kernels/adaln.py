"""adaLN in one pass: how do the timestep and the prompt reach a token, and what does it cost to move it?

    modulate                 out = n(x) * (1 + scale) + shift             n(x) = (x - mean) / sqrt(var + eps)
    gate_residual_modulate   h = x + gate * y;  out = n(h) * (1 + scale) + shift

Mean and variance run over the D channels of one token; shift, scale and gate (B, D) are one row per picture.
Nothing here computes much: the time goes into memory traffic, counted in passes over an activation (B, L, D).

                                          chain of calls    here
    modulate                              6                 2     read x; write out
    gate_residual_modulate                11                4     read x, y; write h, out
    modulate, backward                                      3     read dout, x; write dx
    gate_residual_modulate, backward                        6     read dout, dh, h, y; write dx, dy

One pass in bfloat16 at 4096 tokens of width 1536 is 12.6 MB, 4 microseconds at 3 TB/s.

Read on: the formulas in PyTorch (`modulate_reference`), the simple kernel with one program per token
(`modulate_row`), the one that is used (`modulate_tile`), its backward (`modulate_tile_backward`), and how
they are registered with PyTorch.

With u = dout * (1 + scale) and < > the average over channels, the backward of a token is

    dx = dh + (u - <u> - n <u n>) / sqrt(var + eps)           dy = gate * dx
    dshift = sum dout        dscale = sum dout * n       dgate = sum y * dx          (sums over tokens)

Pitfalls
- The variance takes two passes over the registers, mean first: the mean of the squares minus the square of
  the mean loses all digits where the mean is large.
- h is rounded to its stored dtype before its statistics are taken, as in the chain of calls. The backward
  takes them again from h: the row is read anyway, so nothing needs to be saved.
- The sums over tokens are written as one partial sum per chunk and added in a fixed order. Atomic additions
  would be shorter, but give different bits on every run. In float32, written and read again, the partial
  sums add an eighth to the 6 passes at 16 tokens a chunk, and half at 4.
- Triton loads ahead only in loops with a matrix product, unless told to (`tl.range`). Told so, it has the
  backward's next row on its way while this one is summed; and with 8 channels a thread, at least 16 warps
  share a multiprocessor at the models' widths. Both were read off the machine code, not timed.
- shift, scale and gate are slices of one Linear's output: they are read in place, by their row stride.
- A kernel is an ordinary function until `load_triton`: this file must import where Triton is absent.

Dims: B batch, L tokens, D width. Run `python kernels/adaln.py`: checks itself and prints its table.
"""
from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F

triton = tl = None                          # set by load_triton
KERNELS = []                                # functions that wait for it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = dict(enable_fp_fusion=True)         # fused multiply-adds; in Triton 3.10 not the default


# ------------------------------------------------------------------------------------ the formulas in PyTorch

def modulate_reference(x, shift, scale, eps=1e-6):
    """x (B, L, D); shift, scale (B, D) -> (B, L, D), computed in float32."""
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (y * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)).to(x.dtype)


def gate_residual_modulate_reference(x, y, gate, shift, scale, eps=1e-6):
    """x, y (B, L, D); gate, shift, scale (B, D) -> h, modulated, both (B, L, D)."""
    h = x + gate.unsqueeze(1) * y
    return h, modulate_reference(h, shift, scale, eps)


# ----------------------------------------------------------------------------------------------- Triton, late

def kernel(function):
    """Marks a function that Triton will compile. Its body may only use what Triton knows."""
    KERNELS.append(function)
    return function


def load_triton() -> None:
    """Import Triton and turn every function marked `kernel` into a GPU kernel, in every file that uses it."""
    if not KERNELS:
        return
    import triton
    import triton.language
    files = [function.__globals__ for function in KERNELS]
    while KERNELS:
        function = KERNELS.pop()
        compiled = triton.jit(function)
        for names in files:
            names.update(triton=triton, tl=triton.language)
            if names.get(function.__name__) is function:
                names[function.__name__] = compiled


def device_of(x):
    """Makes x's GPU the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------ the simple kernel

@kernel
def modulate_row(X, SHIFT, SCALE, OUT, L, D, x_batch, x_row, shift_batch, scale_batch, eps,
                 BLOCK: tl.constexpr):
    """One program, one token: read the row, normalise it, modulate it, write it. BLOCK: D rounded up to a
    power of two, which is all that `tl.arange` can count to; what lies beyond D is masked."""
    token = tl.program_id(0).to(tl.int64)
    b = token // L
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(X + b * x_batch + token % L * x_row + d, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    centred = tl.where(inside, x - mean, 0.0)
    n = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    shift = tl.load(SHIFT + b * shift_batch + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + b * scale_batch + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + token * D + d, (n * (1 + scale) + shift).to(OUT.dtype.element_ty), mask=inside)


def modulate_simple(x, shift, scale, eps=1e-6):
    load_triton()
    B, L, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    modulate_row[(B * L,)](x, shift, scale, out, L, D, x.stride(0), x.stride(1), shift.stride(0),
                           scale.stride(0), eps, BLOCK=triton.next_power_of_2(D), **FUSED)
    return out


# ------------------------------------------------------------------------------------ the kernel that is used
# What changed: (1) a program takes ROWS tokens of one picture and reads shift, scale and gate once for them;
# more loads are in flight at a time. (2) The gated residual is added in the same pass. (3) D is known at
# compile time, so that masks cost nothing where D needs none, and loads are 16 bytes wide where D allows it.

@kernel
def modulate_tile(X, Y, GATE, SHIFT, SCALE, H, OUT, L, x_batch, x_row, y_batch, y_row, gate_batch,
                  shift_batch, scale_batch, eps, GATED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """ROWS tokens of picture program_id(1). GATED: h = x + gate * y is formed, stored and modulated."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    channel = d < D
    inside = (row < L) & channel
    x = tl.load(X + b * x_batch + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(Y + b * y_batch + row * y_row + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(GATE + b * gate_batch + d, mask=channel, other=0.0).to(tl.float32)
        h = (x + gate * y).to(H.dtype.element_ty)
        tl.store(H + (b * L + row) * D + d, h, mask=inside)
        x = h.to(tl.float32)
    n = tl.where(channel, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    n *= tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
    shift = tl.load(SHIFT + b * shift_batch + d, mask=channel, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + b * scale_batch + d, mask=channel, other=0.0).to(tl.float32)
    tl.store(OUT + (b * L + row) * D + d, (n * (1 + scale) + shift).to(OUT.dtype.element_ty), mask=inside)


@kernel
def modulate_tile_backward(DOUT, DH, H, Y, GATE, SCALE, DX, DY, PARTIAL, L, h_batch, h_row, y_batch, y_row,
                           gate_batch, scale_batch, eps, tokens, GATED: tl.constexpr, D: tl.constexpr,
                           BLOCK: tl.constexpr):
    """A chunk of `tokens` tokens of picture program_id(1), one after the other: dx and dy of each, and the
    chunk's part of dshift, dscale and dgate into PARTIAL (3, B, chunks, D)."""
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    scale = 1 + tl.load(SCALE + b * scale_batch + d, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    if GATED:
        gate = tl.load(GATE + b * gate_batch + d, mask=inside, other=0.0).to(tl.float32)
    first = (chunk * tokens).to(tl.int64)
    for i in tl.range(0, tl.minimum(tokens, L - chunk * tokens), num_stages=2):     # 2: one row ahead
        row = first + i
        at = (b * L + row) * D + d
        dout = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(H + b * h_batch + row * h_row + d, mask=inside, other=0.0).to(tl.float32)
        if GATED:                                       # all loads before the sums, which wait for them
            dh = tl.load(DH + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(Y + b * y_batch + row * y_row + d, mask=inside, other=0.0).to(tl.float32)
        n = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(n * n, 0) / D + eps)
        n *= rstd
        dshift += dout
        dscale += dout * n
        u = dout * scale
        dx = rstd * (u - tl.sum(u, 0) / D - n * (tl.sum(u * n, 0) / D))
        if GATED:
            dx += dh
            dgate += dx * y
            tl.store(DY + at, (dx * gate).to(DY.dtype.element_ty), mask=inside)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    chunks = tl.num_programs(0)
    part = PARTIAL + (b * chunks + chunk) * D + d
    step = tl.num_programs(1).to(tl.int64) * chunks * D
    tl.store(part, dshift, mask=inside)
    tl.store(part + step, dscale, mask=inside)
    if GATED:
        tl.store(part + 2 * step, dgate, mask=inside)


def in_rows(x):
    """x with the channels of a token side by side: a copy where they are not, as after a convolution."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def tile(D: int) -> dict:
    """How the forward is cut: enough rows a program to give a thread 16 channels; one row at width 2432."""
    return dict(ROWS=max(1, min(16, 4096 // triton.next_power_of_2(D))), num_warps=8)


def chunk_of(B: int, L: int) -> int:
    """Tokens per partial sum in the backward: up to 16, but few enough for 256 programs where L allows, so
    that a short text keeps a GPU of 132 multiprocessors busy too. It follows from the shape alone: every GPU
    adds in the same order."""
    tokens = 16
    while tokens > 1 and B * triton.cdiv(L, tokens) < 256:
        tokens //= 2
    return tokens


def launch_forward(x, shift, scale, eps, y=None, gate=None):
    """-> h (None without y), modulated."""
    load_triton()
    B, L, D = x.shape
    x, shift, scale, y, gate = (in_rows(t) for t in (x, shift, scale, y, gate))
    out = torch.empty((B, L, D), dtype=stored_dtype(x, y, gate), device=x.device)
    h = None if y is None else torch.empty_like(out)
    if out.numel():
        t = tile(D)
        a, b, c = (x, scale, out) if y is None else (y, gate, h)        # stand-ins, which are never read
        modulate_tile[(triton.cdiv(L, t["ROWS"]), B)](
            x, a, b, shift, scale, c, out, L, x.stride(0), x.stride(1), a.stride(0), a.stride(1),
            b.stride(0), shift.stride(0), scale.stride(0), eps,
            GATED=y is not None, D=D, BLOCK=triton.next_power_of_2(D), **t, **FUSED)
    return h, out


def launch_backward(dout, dh, h, y, gate, scale, eps):
    """-> dx, dy, and [dshift, dscale, dgate] in float32. Without the gated residual, y, gate, dh are None."""
    load_triton()
    B, L, D = h.shape
    gated, tokens = y is not None, chunk_of(B, L)
    chunks = triton.cdiv(L, tokens)
    dout, dh = dout.contiguous(), dh.contiguous() if gated else dout
    h, y, gate, scale = (in_rows(t) for t in (h, y, gate, scale))
    y, gate = (y, gate) if gated else (h, scale)                        # stand-ins, which are never read
    dx = torch.empty((B, L, D), dtype=h.dtype, device=h.device)
    dy = torch.empty((B, L, D), dtype=y.dtype, device=h.device) if gated else dx
    partial = torch.empty((3 if gated else 2, B, chunks, D), dtype=torch.float32, device=h.device)
    if dx.numel():
        block = triton.next_power_of_2(D)
        modulate_tile_backward[(chunks, B)](
            dout, dh, h, y, gate, scale, dx, dy, partial, L, h.stride(0), h.stride(1), y.stride(0),
            y.stride(1), gate.stride(0), scale.stride(0), eps, tokens, GATED=gated, D=D, BLOCK=block,
            num_warps=max(4, min(16, block // 256)), **FUSED)
    return dx, dy, [p.sum(1) for p in partial]


# ------------------------------------------------------------------------------------------- known to PyTorch
# Four operators, opaque to torch.compile and traced by shape alone. Autocast leaves them alone: a float32
# residual stream stays float32 there, and the kernels take every argument in its own dtype.

def stored_dtype(x, y, gate):
    """The dtype of h, and so of its modulation: PyTorch's own promotion of x + gate * y."""
    return x.dtype if y is None else torch.promote_types(x.dtype, torch.promote_types(y.dtype, gate.dtype))


@torch.library.custom_op("sd3::modulate", mutates_args=())
def modulate_op(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    with device_of(x):
        return launch_forward(x, shift, scale, eps)[1]


@modulate_op.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("sd3::modulate_backward", mutates_args=())
def modulate_backward_op(dout: torch.Tensor, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor,
                         eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with device_of(x):
        dx, _, (dshift, dscale) = launch_backward(dout, None, x, None, None, scale, eps)
    return dx, dshift.to(shift.dtype), dscale.to(scale.dtype)


@modulate_backward_op.register_fake
def _(dout, x, shift, scale, eps):
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("sd3::gate_residual_modulate", mutates_args=())
def gate_residual_modulate_op(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor,
                              scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    with device_of(x):
        return launch_forward(x, shift, scale, eps, y, gate)


@gate_residual_modulate_op.register_fake
def _(x, y, gate, shift, scale, eps):
    return tuple(x.new_empty(x.shape, dtype=stored_dtype(x, y, gate)) for _ in range(2))


@torch.library.custom_op("sd3::gate_residual_modulate_backward", mutates_args=())
def gate_residual_modulate_backward_op(
        dh: torch.Tensor, dout: torch.Tensor, h: torch.Tensor, y: torch.Tensor, gate: torch.Tensor,
        shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with device_of(h):
        dx, dy, (dshift, dscale, dgate) = launch_backward(dout, dh, h, y, gate, scale, eps)
    return dx, dy, dgate.to(gate.dtype), dshift.to(shift.dtype), dscale.to(scale.dtype)


@gate_residual_modulate_backward_op.register_fake
def _(dh, dout, h, y, gate, shift, scale, eps):
    return tuple(a.new_empty(a.shape) for a in (h, y, gate, shift, scale))


def _save_modulate(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale)


def _modulate_grad(ctx, dout):
    return *modulate_backward_op(dout, *ctx.saved_tensors, ctx.eps), None


def _save_gate_residual_modulate(ctx, inputs, output):
    x, y, gate, shift, scale, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output[0], y, gate, shift, scale)


def _gate_residual_modulate_grad(ctx, dh, dout):
    dx, *others = gate_residual_modulate_backward_op(dh, dout, *ctx.saved_tensors, ctx.eps)
    return dx.to(ctx.dtype), *others, None


modulate_op.register_autograd(_modulate_grad, setup_context=_save_modulate)
gate_residual_modulate_op.register_autograd(_gate_residual_modulate_grad,
                                            setup_context=_save_gate_residual_modulate)


# ------------------------------------------------------------------------------------------- what is accepted

def check_modulate(x, shift, scale, eps, y=None, gate=None) -> None:
    """Raises a ValueError that names the argument at fault, before anything runs."""
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, D), got {tuple(x.shape)}")
    B, L, D = x.shape
    expected = [("shift", shift, (B, D)), ("scale", scale, (B, D))]
    if y is not None:
        expected += [("y", y, (B, L, D)), ("gate", gate, (B, D))]
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} beside x {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, at least 0, got {eps}")


def triton_refuses(tensors: dict) -> str | None:
    """Why the kernels cannot take these tensors (by argument name); None if they can."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, the kernels take float32, float16 and bfloat16"
        if tensor.dim() in (1, 4) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return (f"{name} {tuple(tensor.shape)} has stride {tensor.stride(-1)} in its last dim, "
                    f"which must be contiguous")
        heads = tensor.shape[2] if tensor.dim() == 4 else 1
        if tensor.dim() > 2:
            spans = tensor.shape[1] * tensor.stride(1), tensor.shape[1] * heads * tensor.shape[-1]
            if max(*spans, heads * tensor.stride(2)) >= 2 ** 31:
                return f"{name} spans more than 2^31 numbers in one picture, too many for 32-bit addresses"
            if tensor.shape[0] * heads > 65535:
                return f"{name} has {tensor.shape[0] * heads} pictures times heads, a GPU takes up to 65535"
        if tensor.dim() == 4 and tensor.shape[-1] > 256:
            return f"{name} has head dim {tensor.shape[-1]}, the kernels go up to 256"
    return None


# ------------------------------------------------------------------------------------------------------- demo

def for_demo() -> tuple[bool, bool]:
    """Is there a GPU, and a recent Triton? Without a GPU, kernels run in Triton's interpreter, in numpy."""
    import os
    from importlib.util import find_spec
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    return cuda, find_spec("triton") is not None and torch.__version__ >= (2, 7)    # which brings Triton 3.3


def demo() -> None:
    """Error of the kernels and of PyTorch against float64, in each dtype; on a GPU also the bandwidth."""
    cuda, kernels = for_demo()
    print("modulate: largest error against float64, relative to the largest value")
    for dtype in DTYPES:
        torch.manual_seed(0)
        x = torch.randn(2, 30, 1536).to("cuda" if cuda else "cpu", dtype)
        shift, scale = torch.randn(2, 3072, device=x.device).to(dtype).chunk(2, dim=-1)
        a, b, c = x.double(), shift.double(), scale.double()
        n = (a - a.mean(-1, keepdim=True)) / (a.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        exact = n * (1 + c.unsqueeze(1)) + b.unsqueeze(1)
        error = lambda out: ((out - exact).abs().max() / exact.abs().max()).item()
        errors = {"PyTorch": error(modulate_reference(x, shift, scale))}
        if kernels:
            errors["simple kernel"] = error(modulate_simple(x, shift, scale))
            errors["kernel"] = error(modulate_op(x, shift, scale, 1e-6))
        print(f"  {str(dtype)[6:]:9s}", "  ".join(f"{name} {e:.1e}" for name, e in errors.items()))
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert all(e < tolerance for e in errors.values())
    if not kernels:
        print("Triton 3.3 or newer is not installed: only the formulas were checked")
    if cuda and kernels:
        from triton.testing import do_bench
        x, mod = (torch.randn(shape, device="cuda").bfloat16() for shape in ((1, 4096, 1536), (1, 3072)))
        shift, scale = mod.chunk(2, dim=-1)
        for name, run in (("PyTorch", modulate_reference), ("simple kernel", modulate_simple),
                          ("kernel", lambda *a: modulate_op(*a, 1e-6)), ("a copy", lambda x, *_: x.clone())):
            ms = do_bench(lambda: run(x, shift, scale), return_mode="median")
            print(f"  {name:14s}{1e3 * ms:7.1f} us  {4 * x.numel() / ms / 1e6:6.0f} GB/s")


# Exercises. (1) In `modulate_row`, take the variance as the mean of the squares minus the square of the mean,
# and add 1000 to x: how many digits are left? (2) Let `chunk_of` return 1, and 256: what do the partial sums
# cost, and how many programs are there to keep a GPU of 132 multiprocessors busy?

if __name__ == "__main__":
    demo()
