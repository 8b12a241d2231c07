"""The backward of joint attention: how do scores get gradients, if none of them was kept?

    p = softmax(n(q) n(k)^T / sqrt(hd))         delta = sum over the head of dout * out       `row_products`
    ds = p * (dout v^T - delta) / sqrt(hd)      of the scores before their scale

    dv    = p^T dout    `attend_backward_keys`: a program keeps a tile of keys and walks over the queries
    dn(k) = ds^T n(q)
    dn(q) = ds n(k)     `attend_backward_queries`: a program keeps a tile of queries, as in the forward

p comes back a tile at a time as 2^(score * log2(e) - lse): from the forward only its outputs and lse, one
number per row, are kept. delta is what the softmax's own gradient subtracts, the mean of dout v^T under p: as
out is the mean of v under p, it is dout * out, for which no score is needed.

Through the norm, with z = x / rms(x), u = dn * w and < > the mean over the head: dw = sum of dn * z and
dx = (u - z <u z>) / rms(x), done while the tile is still in registers (`through_norm`).

Two kernels take 7 products a tile where one would take 5, since p and dout v^T are computed twice. But one
kernel would meet each query's gradient in many programs, and have to add atomically; here every number is
written once, and two runs give the same bits.

Pitfalls
- A query row beyond the end must not count in dk and dv: its lse is read as infinite, so that its p is 0.
- A key beyond the end, or masked, is loaded as zeros: its score is 0, not -inf. Its dk and dv are stored as
  zeros; to dq it would add ds * 0, but where all true scores are far below zero that ds is infinite.
- q and k are normalised again, as the forward keeps neither; the raw ones are read for the norm's gradient.

Dims: B batch, M text tokens, N image tokens, L = M + N, nh heads, hd head dim. Tensors are laid out, loaded
and cut as in kernels/joint_attention.py, to be read first.
Run `python kernels/joint_attention_backward.py`: checks itself and prints its table.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import List, Optional

import torch
from torch import Tensor

if __name__ == "__main__":                              # run as a file: the package is the folder around it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.adaln import FUSED, device_of, for_demo, kernel, load_triton
from kernels.joint_attention import (attention, dot_dtype, filled_in, head_block, head_of,
                                     joint_attention_op, joint_attention_reference, joint_attention_triton,
                                     load_rows, load_weight, normalise, over_rms, store_rows, stream, tiles,
                                     valid_text)

triton = tl = None                                      # set by load_triton


# ------------------------------------------------------------------------------------------------ the kernels

@kernel
def row_products(O_TXT, O_IMG, DO_TXT, DO_IMG, DELTA, M_Q, N, nh, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 ROWS: tl.constexpr):
    """delta: sum over the head of out * dout, for ROWS tokens of one head, of either stream."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // nh
    h = bh % nh
    tiles_img = tl.cdiv(N, ROWS)
    delta_at = DELTA + bh * (M_Q + N)
    if tl.program_id(0) < tiles_img:
        first, count = tl.program_id(0) * ROWS, N
        o_at, o_row, do_at, do_row = head_of(O_IMG, b, h), O_IMG[2], head_of(DO_IMG, b, h), DO_IMG[2]
        delta_at += M_Q
    else:
        first, count = (tl.program_id(0) - tiles_img) * ROWS, M_Q
        o_at, o_row, do_at, do_row = head_of(O_TXT, b, h), O_TXT[2], head_of(DO_TXT, b, h), DO_TXT[2]
    rows = first + tl.arange(0, ROWS)
    out = load_rows(o_at, rows, o_row, count, False, D, BLOCK_D).to(tl.float32)
    dout = load_rows(do_at, rows, do_row, count, False, D, BLOCK_D).to(tl.float32)
    tl.store(delta_at + rows, tl.sum(out * dout, 1), mask=rows < count)


@kernel
def through_norm(dn, x_at, rows, x_row, count, w_at, DW, bh, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradient dn of n = z * w, z = x / rms(x), rows (rows, BLOCK_D) -> dx. This tile's part of dw goes to a
    row of DW that no other program writes."""
    z, r = over_rms(load_rows(x_at, rows, x_row, count, False, D, BLOCK_D), eps, D)
    z = tl.where((rows < count)[:, None], z, 0.0)                   # beyond the end 0 / 0 where eps is 0
    part = bh * tl.num_programs(0) + tl.program_id(0)
    tl.store(DW + part * BLOCK_D + tl.arange(0, BLOCK_D), tl.sum(dn * z, 0))
    u = dn * load_weight(w_at, D, BLOCK_D)
    return r * (u - z * (tl.sum(u * z, 1) / D)[:, None])


@kernel
def load_row(at, rows, count, other, ALL: tl.constexpr):
    """One number for each of `rows`; `other` beyond the end. A mask would lengthen the loop by 7 to 12 %."""
    if ALL:
        x = tl.load(at + rows)
    else:
        x = tl.load(at + rows, mask=rows < count, other=other)
    return x


@kernel
def walk_queries(dk, dv, k, v, q_at, q_row, do_at, do_row, lse_at, delta_at, queries, factor,
                 ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                 DOT: tl.constexpr):
    """Walk over the queries of one stream; everything is transposed, (keys, queries), so that p and ds are
    left factors of the next products and may stay in registers."""
    for start in range(0, queries, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_at, m, q_row, queries, ALL, D, BLOCK_D).to(DOT)
        lse = load_row(lse_at, m, queries, float("inf"), ALL)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - lse[None, :])
        dout = load_rows(do_at, m, do_row, queries, ALL, D, BLOCK_D).to(DOT)
        dv = tl.dot(p.to(DOT), dout, dv, input_precision="ieee")
        delta = load_row(delta_at, m, queries, 0.0, ALL)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])   # the scale at the end
        dk = tl.dot(ds.to(DOT), q, dk, input_precision="ieee")
    return dk, dv


@kernel
def attend_backward_keys(Q_TXT, K_TXT, V_TXT, Q_IMG, K_IMG, V_IMG, LENGTHS, DO_TXT, DO_IMG, LSE, DELTA,
                         X_TXT, X_IMG, W_TXT, W_IMG, DK_TXT, DV_TXT, DK_IMG, DV_IMG, DW, M_Q, M, N, nh,
                         factor, scale, eps, NORM: tl.constexpr, ALL_TXT: tl.constexpr, ALL_IMG: tl.constexpr,
                         D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         DOT: tl.constexpr):
    """dk and dv of BLOCK_N keys of one head. Q and K are normalised (NORM), X are the raw keys."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // nh
    h = bh % nh
    tiles_img = tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) < tiles_img:
        first, count, keys = tl.program_id(0) * BLOCK_N, N, N
        x_at, x_row, w_at = head_of(X_IMG, b, h), X_IMG[2], W_IMG
        k_at, k_row, v_at, v_row = head_of(K_IMG, b, h), K_IMG[2], head_of(V_IMG, b, h), V_IMG[2]
        dk_at, dk_row, dv_at, dv_row = head_of(DK_IMG, b, h), DK_IMG[2], head_of(DV_IMG, b, h), DV_IMG[2]
    else:
        first, count, keys = (tl.program_id(0) - tiles_img) * BLOCK_N, M, valid_text(LENGTHS, b, M)
        x_at, x_row, w_at = head_of(X_TXT, b, h), X_TXT[2], W_TXT
        k_at, k_row, v_at, v_row = head_of(K_TXT, b, h), K_TXT[2], head_of(V_TXT, b, h), V_TXT[2]
        dk_at, dk_row, dv_at, dv_row = head_of(DK_TXT, b, h), DK_TXT[2], head_of(DV_TXT, b, h), DV_TXT[2]
    n = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_at, n, k_row, keys, False, D, BLOCK_D).to(DOT)
    v = load_rows(v_at, n, v_row, keys, False, D, BLOCK_D).to(DOT)
    some = tl.where(first < keys, 1, 0)                             # 0: all masked, no query to walk over
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    text = bh * (M_Q + N)
    dk, dv = walk_queries(
        dk, dv, k, v, head_of(Q_IMG, b, h), Q_IMG[2], head_of(DO_IMG, b, h), DO_IMG[2], LSE + text + M_Q,
        DELTA + text + M_Q, N * some, factor, ALL_IMG, D, BLOCK_D, BLOCK_M, DOT)
    dk, dv = walk_queries(
        dk, dv, k, v, head_of(Q_TXT, b, h), Q_TXT[2], head_of(DO_TXT, b, h), DO_TXT[2], LSE + text,
        DELTA + text, M_Q * some, factor, ALL_TXT, D, BLOCK_D, BLOCK_M, DOT)
    real = (n < keys)[:, None]                                      # the other rows are keys of zeros
    dk = tl.where(real, dk * scale, 0.0)
    store_rows(dv_at, n, dv_row, count, tl.where(real, dv, 0.0), D, BLOCK_D)
    if NORM:
        dk = through_norm(dk, x_at, n, x_row, count, w_at, DW, bh, eps, D, BLOCK_D)
    store_rows(dk_at, n, dk_row, count, dk, D, BLOCK_D)


@kernel
def walk_keys(dq, q, dout, lse, delta, k_at, k_row, v_at, v_row, keys, factor, ALL: tl.constexpr,
              D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr):
    """Walk over the keys of one stream."""
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_at, n, k_row, keys, ALL, D, BLOCK_D).to(DOT)
        v = load_rows(v_at, n, v_row, keys, ALL, D, BLOCK_D).to(DOT)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])   # the scale at the end
        if not ALL:
            ds = tl.where((n < keys)[None, :], ds, 0.0)
        dq = tl.dot(ds.to(DOT), k, dq, input_precision="ieee")
    return dq


@kernel
def attend_backward_queries(Q_TXT, K_TXT, V_TXT, Q_IMG, K_IMG, V_IMG, LENGTHS, DO_TXT, DO_IMG, LSE, DELTA,
                            X_TXT, X_IMG, W_TXT, W_IMG, DQ_TXT, DQ_IMG, DW, M_Q, M, N, nh, factor, scale, eps,
                            NORM: tl.constexpr, ALL_TXT: tl.constexpr, ALL_IMG: tl.constexpr,
                            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_N: tl.constexpr, DOT: tl.constexpr):
    """dq of BLOCK_M queries of one head. Q and K are normalised (NORM), X are the raw queries."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // nh
    h = bh % nh
    tiles_img = tl.cdiv(N, BLOCK_M)
    row = bh * (M_Q + N)
    if tl.program_id(0) < tiles_img:
        first, count, w_at = tl.program_id(0) * BLOCK_M, N, W_IMG
        q_at, q_row, do_at, do_row = head_of(Q_IMG, b, h), Q_IMG[2], head_of(DO_IMG, b, h), DO_IMG[2]
        x_at, x_row, dq_at, dq_row = head_of(X_IMG, b, h), X_IMG[2], head_of(DQ_IMG, b, h), DQ_IMG[2]
        row += M_Q
    else:
        first, count, w_at = (tl.program_id(0) - tiles_img) * BLOCK_M, M_Q, W_TXT
        q_at, q_row, do_at, do_row = head_of(Q_TXT, b, h), Q_TXT[2], head_of(DO_TXT, b, h), DO_TXT[2]
        x_at, x_row, dq_at, dq_row = head_of(X_TXT, b, h), X_TXT[2], head_of(DQ_TXT, b, h), DQ_TXT[2]
    m = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_at, m, q_row, count, False, D, BLOCK_D).to(DOT)
    dout = load_rows(do_at, m, do_row, count, False, D, BLOCK_D).to(DOT)
    lse = tl.load(LSE + row + m, mask=m < count, other=float("inf"))
    delta = tl.load(DELTA + row + m, mask=m < count, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = walk_keys(dq, q, dout, lse, delta, head_of(K_IMG, b, h), K_IMG[2], head_of(V_IMG, b, h), V_IMG[2], N,
                   factor, ALL_IMG, D, BLOCK_D, BLOCK_N, DOT)
    dq = walk_keys(dq, q, dout, lse, delta, head_of(K_TXT, b, h), K_TXT[2], head_of(V_TXT, b, h), V_TXT[2],
                   valid_text(LENGTHS, b, M), factor, ALL_TXT, D, BLOCK_D, BLOCK_N, DOT)
    dq *= scale
    if NORM:
        dq = through_norm(dq, x_at, m, x_row, count, w_at, DW, bh, eps, D, BLOCK_D)
    store_rows(dq_at, m, dq_row, count, dq, D, BLOCK_D)


# -------------------------------------------------------------------------------------------------- launching

def launch_backward(dout_txt, dout_img, out_txt, out_img, lse, q_txt, k_txt, v_txt, q_img, k_img, v_img,
                    weights, lengths, eps):
    """-> gradients of the six tensors, and of the four weights in float32: [] without norms."""
    load_triton()
    norm = weights[2] is not None
    q_txt, k_txt, v_txt, q_img, k_img, v_img, w_q_txt, w_k_txt, w_q_img, w_k_img = filled_in(
        q_txt, k_txt, v_txt, q_img, k_img, v_img, weights)
    (B, N, nh, hd), M_Q, M = q_img.shape, q_txt.shape[1], k_txt.shape[1]
    do_txt, do_img = stream(dout_txt.contiguous()), stream(dout_img.contiguous())
    delta = torch.empty_like(lse)
    row_products[triton.cdiv(M_Q, 64) + triton.cdiv(N, 64), B * nh](
        stream(out_txt), stream(out_img), do_txt, do_img, delta, M_Q, N, nh, D=hd, BLOCK_D=head_block(q_img),
        ROWS=64, **FUSED)
    q = normalise(q_txt, q_img, w_q_txt, w_q_img, eps) if norm else (q_txt, q_img)
    k = normalise(k_txt, k_img, w_k_txt, w_k_img, eps) if norm else (k_txt, k_img)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device)
             for x in (q_txt, k_txt, v_txt, q_img, k_img, v_img)]
    dq_txt, dk_txt, dv_txt, dq_img, dk_img, dv_img = (stream(g) for g in grads)
    read = (*(stream(x) for x in (q[0], k[0], v_txt, q[1], k[1], v_img)), lengths, do_txt, do_img, lse, delta)
    numbers = M_Q, M, N, nh, hd ** -0.5 * math.log2(math.e), hd ** -0.5, eps

    def parts_of_dw(programs):
        return torch.empty(B * nh, programs, head_block(q_img), dtype=torch.float32, device=q_img.device)

    t = tiles("keys", q_img)
    blocks_k = [triton.cdiv(count, t["BLOCK_N"]) for count in (N, M)]
    dw_k = parts_of_dw(sum(blocks_k)) if norm else None
    attend_backward_keys[sum(blocks_k), B * nh](
        *read, stream(k_txt), stream(k_img), w_k_txt, w_k_img, dk_txt, dv_txt, dk_img, dv_img, dw_k, *numbers,
        NORM=norm, ALL_TXT=M_Q % t["BLOCK_M"] == 0, ALL_IMG=N % t["BLOCK_M"] == 0,
        D=hd, DOT=dot_dtype(q_img), **t)
    t = tiles("queries", q_img)
    blocks_q = [triton.cdiv(count, t["BLOCK_M"]) for count in (N, M_Q)]
    dw_q = parts_of_dw(sum(blocks_q)) if norm else None
    attend_backward_queries[sum(blocks_q), B * nh](
        *read, stream(q_txt), stream(q_img), w_q_txt, w_q_img, dq_txt, dq_img, dw_q, *numbers, NORM=norm,
        ALL_TXT=lengths is None and M % t["BLOCK_N"] == 0, ALL_IMG=N % t["BLOCK_N"] == 0,
        D=hd, DOT=dot_dtype(q_img), **t)
    if not norm:
        return grads, []
    (dw_q_img, dw_q_txt), (dw_k_img, dw_k_txt) = (
        [part[..., :hd].sum((0, 1)) for part in dw.split(blocks, dim=1)]
        for dw, blocks in ((dw_q, blocks_q), (dw_k, blocks_k)))
    return grads, [dw_q_txt, dw_k_txt, dw_q_img, dw_k_img]


# ------------------------------------------------------------------------------------------- known to PyTorch

@torch.library.custom_op("sd3::joint_attention_backward", mutates_args=())
def joint_attention_backward_op(
        dout_txt: Tensor, dout_img: Tensor, out_txt: Tensor, out_img: Tensor, lse: Tensor,
        q_txt: Optional[Tensor], k_txt: Optional[Tensor], v_txt: Optional[Tensor], q_img: Tensor,
        k_img: Tensor, v_img: Tensor, w_q_txt: Optional[Tensor], w_k_txt: Optional[Tensor],
        w_q_img: Optional[Tensor], w_k_img: Optional[Tensor], text_lengths: Optional[Tensor], eps: float
) -> List[Tensor]:
    """-> gradients of the six tensors and four weights, except those that are None"""
    weights = w_q_txt, w_k_txt, w_q_img, w_k_img
    with device_of(q_img):
        grads, weight_grads = launch_backward(dout_txt, dout_img, out_txt, out_img, lse, q_txt, k_txt, v_txt,
                                              q_img, k_img, v_img, weights, text_lengths, eps)
    given = [g for g, x in zip(grads, (q_txt, k_txt, v_txt, q_img, k_img, v_img)) if x is not None]
    return given + [g.to(w.dtype) for g, w in zip(weight_grads, weights) if w is not None]


@joint_attention_backward_op.register_fake
def _(dout_txt, dout_img, out_txt, out_img, lse, *inputs):
    *tensors, lengths, eps = inputs
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    out_txt, out_img, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out_txt, out_img, lse, *tensors)


def _grad(ctx, dout_txt, dout_img, _):
    inputs = ctx.saved_tensors[3:-1]                                # six tensors, four weights
    found = iter(joint_attention_backward_op(dout_txt, dout_img, *ctx.saved_tensors, ctx.eps))
    grads = [None if x is None else next(found) for x in inputs]
    for i, weight in ((0, 6), (1, 7)):
        if inputs[i] is None:                                       # nothing was normalised with it
            grads[weight] = None
    return *grads, None, None


joint_attention_op.register_autograd(_grad, setup_context=_save)


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """Error of the kernels' and of PyTorch's gradients against float64; on a GPU also the time."""
    cuda, found = for_demo()
    print("gradients of joint attention of 13 + 40 tokens: largest error against float64, relative to the "
          "largest value")

    def exact(*x):
        norm = [t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
                for t, w in zip((x[0], x[1], x[3], x[4]), x[6])]
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in (norm[::2], norm[1::2], x[2:6:3]))
        return attention(q, k, v).transpose(1, 2).split([13, 40], dim=1)

    def gradients(way, x, pulls):
        x = [t.detach().requires_grad_() for t in x]
        outs = way(*x[:6], x[6:])
        return torch.autograd.grad(outs, x, [pull.to(out.dtype) for pull, out in zip(pulls, outs)])

    ways = {"PyTorch": joint_attention_reference}
    if found:
        ways["kernels"] = lambda *x: joint_attention_triton(*x, None, 1e-6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)):
        torch.manual_seed(0)
        device = "cuda" if cuda else "cpu"
        x, pulls = ([t.to(device, dtype) for L in (13, 40) for t in torch.randn(n, 1, L, 2, 64)]
                    for n in (3, 1))
        x += list(0.5 + torch.rand(4, 64, device=device))
        true = gradients(exact, [t.double() for t in x], pulls)
        errors = {name: torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(
            gradients(way, x, pulls), true)]).max().item() for name, way in ways.items()}   # max() hides NaN
        print(f"  {str(dtype)[6:]:9s}", "  ".join(f"{name} {e:.1e}" for name, e in errors.items()))
        assert all(error < tolerance for error in errors.values())
    if not found:
        print("Triton 3.3 or newer is not installed: only the formula was checked")
    elif cuda:
        from triton.testing import do_bench
        x[:6] = [t.bfloat16() for L in (154, 4096) for t in torch.randn(3, 1, L, 24, 64, device="cuda")]
        x = [t.requires_grad_() for t in x]
        print("154 + 4096 tokens, 24 heads, bfloat16, backward:")
        for name, way in ways.items():
            outs = way(*x[:6], x[6:])
            ms = do_bench(lambda: torch.autograd.grad(outs, x, outs, retain_graph=True), return_mode="median")
            flops = 10 * 24 * 4250 ** 2 * 64                # of 5 products, for both, though the kernels do 7
            print(f"  {name:9s}{ms:7.3f} ms  {flops / ms / 1e9:5.0f} TFLOP/s")


# Exercises. (1) In `walk_keys`, leave out the mask: keys beyond the end are zeros, so dq stays right. Then
# make all scores far smaller than 0 (in the demo add 9 to the queries, -9 to the keys, and let the weights be
# four times as large): what happens, and why not in `walk_queries`? (2) Take delta as the mean of dout v^T
# under p: over what would each kernel have to walk before it can begin?

if __name__ == "__main__":
    demo()
