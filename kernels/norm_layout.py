"""Norm and layout in one pass: what is left to save around an attention that is fast already?

PyTorch's attention on Hopper is cuDNN's, written for that card by its maker, and a kernel in Triton may not
beat it. But it takes one q, one k and one v, so the chain of calls around it moves more data than it does.
Here everything in front of it is one kernel, and behind it the output is only cut in two, where it lies:

    q_txt k_txt v_txt                           q = [n(q_txt), n(q_img)]                  out_txt = out[:, :M]
    q_img k_img v_img  - `norm_layout_tile` ->  k = [n(k_txt), n(k_img)]  - attention ->  out_img = out[:, M:]
    where a Linear                              v = [v_txt,    v_img]
    left them                                   (B, L, nh, hd)

    n(x) = x / sqrt(mean(x^2) + eps) * w         RMSNorm of a head, w (hd,) differs between text and image

Passes over an activation (B, L, nh, hd), 13 MB in bfloat16 at 154 + 4096 tokens of 24 heads of 64:

                         chain of calls    here    inside kernels/joint_attention*.py
    norms and layout     10, or more       6       2, its keys' norm
    their backward       6, or more        6       6, norms computed again, then their gradient
    the cut's backward   2                 2       0

The chain is counted with one pass for each norm, as torch.compile makes it; called one by one, they are more.
Compared with the fused attention this costs four passes more, two more in the backward, and memory: PyTorch's
attention keeps q, k and v for its backward, besides the raw ones kept here. So neither is always better, both
stay, and kernels/__init__.py takes the one that was measured to be faster.

Backward, with z = x / rms(x), u = dn * w and < > the mean over the head (`norm_layout_tile_backward`):

    dx = (u - z <u z>) / rms(x)          dw = sum of dn * z, over pictures, tokens and heads

Gradients of v, and all of them if there is no norm, are slices of the attention's gradients: no kernel runs.

Pitfalls
- (B, L, nh, hd), not (B, nh, L, hd): PyTorch's attentions take either in place, but only this way do text
  and image lie apart in the output, where the projection reads them without a copy.
- Rows are counted over tokens and heads together: what a program reads is then contiguous, and it reads the
  weight once.
- Parts of dw are added in a fixed order, not atomically: this kernel gives the same bits twice. (cuDNN's
  backward need not; torch.use_deterministic_algorithms makes PyTorch choose another.)

Dims: B batch, M text tokens, N image tokens, L = M + N, nh heads, hd head dim.
Run `python kernels/norm_layout.py`: checks itself and prints its table.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == "__main__":                              # run as a file: the package is the folder around it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.adaln import FUSED, device_of, for_demo, kernel, load_triton
from kernels.joint_attention import (cut_in_two, filled_in, head_block, join, joint_attention_reference,
                                     key_mask, load_weight, over_rms, stream, under_autocast)

triton = tl = None                                      # set by load_triton

# The formula in PyTorch is `join` in kernels/joint_attention.py.


# ------------------------------------------------------------------------------------------ the simple kernel
# A tensor (B, T, nh, hd) comes to a kernel as a tuple: pointer, and its strides over pictures, tokens, heads.

@kernel
def norm_layout_row(X, W, Y, first, eps, NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program, one head of one token, to its place in Y, where this stream begins at token `first`."""
    b, token, h = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(X[0] + b * X[1] + token * X[2] + h * X[3] + d, mask=d < D, other=0.0)
    if NORM:
        x = over_rms(x, eps, D)[0] * load_weight(W, D, BLOCK_D)
    y_at = Y[0] + b * Y[1] + (first + token) * Y[2] + h * Y[3]
    tl.store(y_at + d, x.to(Y[0].dtype.element_ty), mask=d < D)


def norm_layout_simply(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, eps=1e-6):
    """Six launches: all six tensors and all four weights -> q, k, v."""
    load_triton()
    (B, N, nh, hd), M = q_img.shape, q_txt.shape[1]
    w_q_txt, w_k_txt, w_q_img, w_k_img = norm_weights
    joined = []
    for txt, img, w_txt, w_img in ((q_txt, q_img, w_q_txt, w_q_img), (k_txt, k_img, w_k_txt, w_k_img),
                                   (v_txt, v_img, None, None)):
        joined.append(torch.empty(B, M + N, nh, hd, dtype=img.dtype, device=img.device))
        for x, w, first in ((txt, w_txt, 0), (img, w_img, M)):
            if x.shape[1]:
                norm_layout_row[x.shape[1], nh, B](
                    stream(x), w, stream(joined[-1]), first, eps, NORM=w is not None, D=hd,
                    BLOCK_D=head_block(x), **FUSED)
    return tuple(joined)


# ------------------------------------------------------------------------------------ the kernel that is used
# What changed: (1) one launch instead of six: at 512 pixels a launch takes as long as the work. (2) A program
# takes ROWS heads, all of one token, then all of the next: 8 kB in one piece. With one row of 128 bytes, most
# threads of a program would have nothing to do.

@kernel
def place_of(rows, X, b, nh):
    """Where each of `rows`, counted over tokens and heads, begins in picture b: (rows, 1)."""
    return (X[0] + b * X[1] + (rows // nh) * X[2] + (rows % nh) * X[3])[:, None]


@kernel
def join_rows(X_TXT, X_IMG, W_TXT, W_IMG, Y, M, N, nh, eps, NORM: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Tile program_id(0) of picture program_id(1): of the image first, then of the text."""
    b = tl.program_id(1).to(tl.int64)
    tiles_img = tl.cdiv(N * nh, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    if tl.program_id(0) < tiles_img:
        rows, count, w_at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), N * nh, W_IMG
        x_at, first = place_of(rows, X_IMG, b, nh), M * nh
    else:
        rows, count, w_at = (tl.program_id(0) - tiles_img) * ROWS + tl.arange(0, ROWS), M * nh, W_TXT
        x_at, first = place_of(rows, X_TXT, b, nh), 0 * nh
    inside = (rows < count)[:, None] & (d < D)
    x = tl.load(x_at + d, mask=inside, other=0.0)
    if NORM:
        x = over_rms(x, eps, D)[0] * load_weight(w_at, D, BLOCK_D)
    y_at = Y + (b * (M + N) * nh + first + rows)[:, None] * D
    tl.store(y_at + d, x.to(Y.dtype.element_ty), mask=inside)


@kernel
def norm_layout_tile(Q_TXT, K_TXT, V_TXT, Q_IMG, K_IMG, V_IMG, W_Q_TXT, W_K_TXT, W_Q_IMG, W_K_IMG, Q, K, V,
                     M_Q, M, N, nh, eps, NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                     ROWS: tl.constexpr):
    """program_id(2): q, k or v. M_Q: text queries, M or none."""
    if tl.program_id(2) == 0:
        join_rows(Q_TXT, Q_IMG, W_Q_TXT, W_Q_IMG, Q, M_Q, N, nh, eps, NORM, D, BLOCK_D, ROWS)
    elif tl.program_id(2) == 1:
        join_rows(K_TXT, K_IMG, W_K_TXT, W_K_IMG, K, M, N, nh, eps, NORM, D, BLOCK_D, ROWS)
    else:
        join_rows(V_TXT, V_IMG, W_K_TXT, W_K_IMG, V, M, N, nh, eps, False, D, BLOCK_D, ROWS)


# ----------------------------------------------------------------------------------------------- its backward

@kernel
def norm_rows_backward(DY, X_TXT, X_IMG, W_TXT, W_IMG, DX_TXT, DX_IMG, DW, M, N, nh, eps, D: tl.constexpr,
                       BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """dx of a tile from dy, both cut as in `join_rows`. This tile's part of dw goes to its own row of
    DW."""
    b = tl.program_id(1).to(tl.int64)
    tiles_img = tl.cdiv(N * nh, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    if tl.program_id(0) < tiles_img:
        rows, count, w_at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), N * nh, W_IMG
        x_at, dx_at, first = place_of(rows, X_IMG, b, nh), place_of(rows, DX_IMG, b, nh), M * nh
    else:
        rows, count, w_at = (tl.program_id(0) - tiles_img) * ROWS + tl.arange(0, ROWS), M * nh, W_TXT
        x_at, dx_at, first = place_of(rows, X_TXT, b, nh), place_of(rows, DX_TXT, b, nh), 0 * nh
    inside = (rows < count)[:, None] & (d < D)
    dn = tl.load(place_of(first + rows, DY, b, nh) + d, mask=inside, other=0.0).to(tl.float32)
    z, r = over_rms(tl.load(x_at + d, mask=inside, other=0.0), eps, D)
    z = tl.where(inside, z, 0.0)                        # beyond the end 0 / 0 where eps is 0
    part = (b * tl.num_programs(0) + tl.program_id(0)) * BLOCK_D
    tl.store(DW + part + tl.arange(0, BLOCK_D), tl.sum(dn * z, 0))
    u = dn * load_weight(w_at, D, BLOCK_D)
    dx = r * (u - z * (tl.sum(u * z, 1) / D)[:, None])
    tl.store(dx_at + d, dx.to(dx_at.dtype.element_ty), mask=inside)


@kernel
def norm_layout_tile_backward(DQ, DK, Q_TXT, K_TXT, Q_IMG, K_IMG, W_Q_TXT, W_K_TXT, W_Q_IMG, W_K_IMG, DQ_TXT,
                              DK_TXT, DQ_IMG, DK_IMG, DW_Q, DW_K, M_Q, M, N, nh, eps, D: tl.constexpr,
                              BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """program_id(2): q or k."""
    if tl.program_id(2) == 0:
        norm_rows_backward(DQ, Q_TXT, Q_IMG, W_Q_TXT, W_Q_IMG, DQ_TXT, DQ_IMG, DW_Q, M_Q, N, nh, eps, D,
                           BLOCK_D, ROWS)
    else:
        norm_rows_backward(DK, K_TXT, K_IMG, W_K_TXT, W_K_IMG, DK_TXT, DK_IMG, DW_K, M, N, nh, eps, D,
                           BLOCK_D, ROWS)


# -------------------------------------------------------------------------------------------------- launching

def cut(x, tokens):
    """How many tiles each of `tokens` takes, and the arguments that set their shape; x (B, T, nh, hd)."""
    block_d = head_block(x)
    rows = max(4, 4096 // block_d)                                  # 32 numbers a thread
    return [triton.cdiv(t * x.shape[2], rows) for t in tokens], dict(
        D=x.shape[3], BLOCK_D=block_d, ROWS=rows, num_warps=4, **FUSED)


def launch_forward(q_txt, k_txt, v_txt, q_img, k_img, v_img, weights, eps):
    """-> q, k, v; v is empty without text: v_img is all there is, and need not move."""
    load_triton()
    norm, (B, N, nh, hd) = weights[2] is not None, q_img.shape
    *x, w_q_txt, w_k_txt, w_q_img, w_k_img = filled_in(q_txt, k_txt, v_txt, q_img, k_img, v_img, weights)
    M_Q, M = x[0].shape[1], x[1].shape[1]
    q, k, v = (q_img.new_empty(B, L, nh, hd) for L in (M_Q + N, M + N, 0 if k_txt is None else M + N))
    (img, txt), meta = cut(q_img, (N, M))
    norm_layout_tile[img + txt, B, 2 if k_txt is None else 3](
        *(stream(t) for t in x), w_q_txt, w_k_txt, w_q_img, w_k_img, q, k, v, M_Q, M, N, nh, eps,
        NORM=norm, **meta)
    return q, k, v


def launch_backward(dq, dk, q_txt, k_txt, q_img, k_img, weights, eps):
    """-> gradients of q_txt, k_txt, q_img and k_img, and of the four weights in float32."""
    load_triton()
    q_txt, k_txt, _, q_img, k_img, _, *w = filled_in(q_txt, k_txt, None, q_img, k_img, None, weights)
    (B, N, nh, hd), M_Q, M = q_img.shape, q_txt.shape[1], k_txt.shape[1]
    dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_txt, k_txt, q_img, k_img)]
    (img, txt), meta = cut(q_img, (N, M))
    dw_q, dw_k = torch.empty(2, B, img + txt, meta["BLOCK_D"], dtype=torch.float32, device=q_img.device)
    norm_layout_tile_backward[img + txt, B, 2](
        stream(dq), stream(dk), *(stream(x) for x in (q_txt, k_txt, q_img, k_img)), *w,
        *(stream(x) for x in grads), dw_q, dw_k, M_Q, M, N, nh, eps, **meta)
    (dw_q_img, dw_q_txt), (dw_k_img, dw_k_txt) = (
        [part[..., :hd].sum((0, 1)) for part in dw.split([img, txt], dim=1)] for dw in (dw_q, dw_k))
    return grads, [dw_q_txt, dw_k_txt, dw_q_img, dw_k_img]


# ------------------------------------------------------------------------------------------- known to PyTorch

@torch.library.custom_op("sd3::norm_layout", mutates_args=())
def norm_layout_op(
        q_txt: Optional[Tensor], k_txt: Optional[Tensor], v_txt: Optional[Tensor], q_img: Tensor,
        k_img: Tensor, v_img: Tensor, w_q_txt: Optional[Tensor], w_k_txt: Optional[Tensor],
        w_q_img: Optional[Tensor], w_k_img: Optional[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> q, k, v (B, L, nh, hd); v is empty without text"""
    with device_of(q_img):
        return launch_forward(q_txt, k_txt, v_txt, q_img, k_img, v_img, (w_q_txt, w_k_txt, w_q_img, w_k_img),
                              eps)


@norm_layout_op.register_fake
def _(q_txt, k_txt, v_txt, q_img, k_img, v_img, w_q_txt, w_k_txt, w_q_img, w_k_img, eps):
    B, N, nh, hd = q_img.shape
    lengths = (N + (0 if x is None else x.shape[1]) for x in (q_txt, k_txt))
    q, k = (q_img.new_empty(B, L, nh, hd) for L in lengths)
    return q, k, q_img.new_empty(B, 0 if k_txt is None else k.shape[1], nh, hd)


@torch.library.custom_op("sd3::norm_layout_backward", mutates_args=())
def norm_layout_backward_op(
        dq: Tensor, dk: Tensor, q_txt: Optional[Tensor], k_txt: Optional[Tensor], q_img: Tensor,
        k_img: Tensor, w_q_txt: Optional[Tensor], w_k_txt: Optional[Tensor], w_q_img: Tensor,
        w_k_img: Tensor, eps: float
) -> List[Tensor]:
    """-> gradients of the four tensors and four weights, except those that are None"""
    tensors, weights = (q_txt, k_txt, q_img, k_img), (w_q_txt, w_k_txt, w_q_img, w_k_img)
    with device_of(q_img):
        grads, weight_grads = launch_backward(dq, dk, *tensors, weights, eps)
    given = [g for g, x in zip(grads, tensors) if x is not None]
    return given + [g.to(w.dtype) for g, w in zip(weight_grads, weights) if w is not None]


@norm_layout_backward_op.register_fake
def _(dq, dk, *inputs):
    return [x.new_empty(x.shape) for x in inputs[:-1] if x is not None]


def _save(ctx, inputs, output):
    q_txt, k_txt, v_txt, q_img, k_img, v_img, *weights, ctx.eps = inputs
    ctx.text = [0 if x is None else x.shape[1] for x in (q_txt, k_txt)]
    ctx.none = [x is None for x in (q_txt, k_txt)]
    ctx.norm = weights[2] is not None
    if ctx.norm:                                                    # else the backward only slices
        ctx.save_for_backward(q_txt, k_txt, q_img, k_img, *weights)


def _grad(ctx, dq, dk, dv):
    M_Q, M = ctx.text
    no_q_txt, no_text = ctx.none
    dv_txt, dv_img = (None, None) if no_text else (dv[:, :M], dv[:, M:])
    if not ctx.norm:
        dq_txt, dk_txt = (None if no_q_txt else dq[:, :M_Q]), (None if no_text else dk[:, :M])
        return dq_txt, dk_txt, dv_txt, dq[:, M_Q:], dk[:, M:], dv_img, None, None, None, None, None
    inputs = ctx.saved_tensors
    found = iter(norm_layout_backward_op(dq, dk, *inputs, ctx.eps))
    dq_txt, dk_txt, dq_img, dk_img, *dw = (None if x is None else next(found) for x in inputs)
    dw[:2] = [None if none else g for none, g in zip(ctx.none, dw)]     # nothing was normalised with it
    return dq_txt, dk_txt, dv_txt, dq_img, dk_img, dv_img, *dw, None


norm_layout_op.register_autograd(_grad, setup_context=_save)

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
               SDPBackend.MATH]


def cudnn_first(device) -> bool:
    """On Hopper and on data centres' Blackwell (compute capability 9 and 10), where others measured it to be
    faster than FlashAttention 2, which PyTorch takes unless it and cuDNN are recent. On the desktop's (12.0)
    they found it slower."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major in (9, 10)


def attend_joined(q, k, v, mask):
    """PyTorch's attention over (B, L, nh, hd) -> the same. Back ends that it knows cannot run a case are
    skipped; one that finds out when it runs raises RuntimeError."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if cudnn_first(q.device):
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):           # torch.compile of 2.6 ignores the order
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


def joint_attention_sdpa(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, text_lengths, eps):
    """What `joint_attention_reference` computes, with this file's kernel in front of PyTorch's attention."""
    q_txt, k_txt, v_txt, q_img, k_img, v_img = under_autocast(q_txt, k_txt, v_txt, q_img, k_img, v_img)
    if k_txt is None and norm_weights is None:                      # nothing to normalise, nothing to join
        q, k, v = q_img, k_img, v_img
    else:
        weights = norm_weights or (None,) * 4
        q, k, v = norm_layout_op(q_txt, k_txt, v_txt, q_img, k_img, v_img, *weights, eps)
        v = v_img if k_txt is None else v
    return cut_in_two(attend_joined(q, k, v, key_mask(k_txt, k, text_lengths)), q_txt)


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """Error of the kernels and of PyTorch against float64, in each dtype; on a GPU also the bandwidth."""
    cuda, found = for_demo()
    print("norm and layout of 5 + 20 tokens: largest error against float64, relative to the largest value")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        torch.manual_seed(0)
        device = "cuda" if cuda else "cpu"
        x = [t for L in (5, 20) for t in torch.randn(2, L, 3, 2, 64).to(device, dtype).unbind(2)]
        w = list(0.5 + torch.rand(4, 64, device=x[0].device))
        z = [t.double() for t in x]
        for i, s in zip((0, 1, 3, 4), w):
            z[i] = z[i] / (z[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * s.double()
        exact = [torch.cat(pair, 1) for pair in zip(z[:3], z[3:])]
        ways = {"PyTorch": lambda: join(*x, w)}
        if found:
            ways["simple kernel"] = lambda: norm_layout_simply(*x, w)
            ways["kernel"] = lambda: norm_layout_op(*x, *w, 1e-6)
        errors = {name: torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(way(), exact)])
                  .max().item() for name, way in ways.items()}                              # max() hides NaN
        print(f"  {str(dtype)[6:]:9s}", "  ".join(f"{name} {e:.1e}" for name, e in errors.items()))
        assert all(error < tolerance for error in errors.values())
    if not found:
        print("Triton 3.3 or newer is not installed: only the formula was checked")
    elif cuda:
        from triton.testing import do_bench
        x = [t for L in (154, 4096) for t in torch.randn(1, L, 3, 24, 64, device="cuda").bfloat16().unbind(2)]
        print("154 + 4096 tokens, 24 heads, bfloat16, forward:")
        for name, way in ways.items():
            ms = do_bench(way, return_mode="median")
            print(f"  {name:14s}{1e3 * ms:7.1f} us  {2 * 2 * sum(t.numel() for t in x) / ms / 1e6:6.0f} GB/s")
        for name, way in (("chain of calls", joint_attention_reference), ("here", joint_attention_sdpa)):
            ms = do_bench(lambda: way(*x, w, None, 1e-6), return_mode="median")
            print(f"  {name:14s}{ms:7.3f} ms, attention included")


# Exercises. (1) Let ROWS be 1 in `cut`: what does bench.py say? (2) Write (B, nh, L, hd) instead: which lines
# of `attend_joined` go, and where does a copy appear?

if __name__ == "__main__":
    demo()
