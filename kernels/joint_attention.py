"""Joint attention: how do text and image attend to each other as one sequence without being made into one?

    out = softmax(n(q) n(k)^T / sqrt(hd)) v       over the M + N tokens [text, image], for each of nh heads
    n(x) = x / sqrt(mean(x^2) + eps) * w          RMSNorm of a head, w (hd,) differs between text and image

PyTorch's attention takes one q, one k and one v, so three concatenations, four norms and a cut surround it.
What is moved, at M = 154, N = 4096, 24 heads of 64 in bfloat16, where one activation is 13 MB:

                              chain of PyTorch calls                     here
    norms of q, k             read 2, write 2 (if each is one pass)      read 1, write 1 (only k)
    concatenate q, k, v       read 3, write 3                            -
    attention                 read 3, write 1                            the same
    cut and copy out          read 1, write 1                            -

        queries   | text |        image        |          a program takes one tile of queries of one stream,
                      |                                     normalises it in registers
                      v
        keys      | image tile | image tile | ... | text tile |      and walks over both streams' keys and
        values    | image tile | image tile | ... | text tile |      values, each read where it lies

The softmax is taken on the way (`attend_keys`): the largest score so far is kept, and sum and output are
scaled down whenever a larger one turns up, so no row of L scores is ever stored. All exponentials are powers
of two, and kernels/joint_attention_backward.py needs one number per row: lse, the log2 of the sum of e^score.

Pitfalls
- Squares are taken in float32: |x| > 255 overflows float16 otherwise.
- Keys are normalised once, by a kernel of their own. Inside the loop every program would do it again
  (`attend_simple`), and if its warps share a tile, each of them would.
- The scale multiplies the scores, not q, which would be rounded once more: too coarse where no norm keeps it
  small.
- Only keys need masks. A query row beyond the end computes nonsense that is never stored.
- float32 is multiplied in full precision ("ieee"), not in TF32 as Triton does by default.

Dims: B batch, M text tokens, N image tokens, nh heads, hd head dim.
Run `python kernels/joint_attention.py`: checks itself and prints its table.
"""
from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":                              # run as a file: the package is the folder around it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.adaln import FUSED, device_of, for_demo, kernel, load_triton

triton = tl = None                                      # set by load_triton


# ------------------------------------------------------------------------------------ the formulas in PyTorch

def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32 (|x| > 255 squared overflows
    float16)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(hd)) v over (B, nh, L, hd), spelled out; the softmax at least in float32.
    mask: True where attended."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                  # (B, nh, Lq, Lk)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v


def join(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights=None, eps=1e-6):
    """-> q, k, v of [text, image] in one tensor each, (B, L, nh, hd); queries and keys normalised."""
    if norm_weights is not None:
        w_q_txt, w_k_txt, w_q_img, w_k_img = norm_weights
        q_img, k_img = rms_norm(q_img, w_q_img, eps), rms_norm(k_img, w_k_img, eps)
        q_txt = None if q_txt is None else rms_norm(q_txt, w_q_txt, eps)
        k_txt = None if k_txt is None else rms_norm(k_txt, w_k_txt, eps)
    pairs = (q_txt, q_img), (k_txt, k_img), (v_txt, v_img)
    return tuple(img if txt is None else torch.cat([txt, img], dim=1) for txt, img in pairs)


def key_mask(k_txt, k, text_lengths):
    """(B, 1, 1, L), True for the keys that are attended; None: all of them."""
    if text_lengths is None or k_txt is None:
        return None
    position = torch.arange(k.shape[1], device=k.device)
    mask = (position < text_lengths[:, None]) | (position >= k_txt.shape[1])
    return mask[:, None, None, :]


def joint_attention_reference(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights=None, text_lengths=None,
                              eps=1e-6):
    """-> (out_txt, out_img), shaped like the queries; out_txt is None where there are no text queries."""
    q, k, v = join(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, eps)
    mask = key_mask(k_txt, k, text_lengths)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # (B, nh, L, hd)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 1024:
        # PyTorch's CPU kernel is slow here: forward + backward take 5x as long at 52 tokens, 1.4x at 1024
        out = attention(q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return cut_in_two(out.transpose(1, 2), q_txt)


def cut_in_two(out, q_txt):
    """-> text's part, None without text queries, and the image's. The backward of `split` concatenates both
    gradients; that of two slices would fill each up with zeros to the whole length, and add them."""
    if q_txt is None:
        return None, out
    M = q_txt.shape[1]
    return out.split([M, out.shape[1] - M], dim=1)


# ------------------------------------------------------------------------------------------ the simple kernel
# A tensor (B, T, nh, hd) comes to a kernel as a tuple: pointer and strides over pictures, tokens, heads.

@kernel
def head_of(X, b, h):
    """Where head h of picture b begins."""
    return X[0] + b * X[1] + h * X[3]


@kernel
def load_rows(at, rows, stride, count, ALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens `rows` of a head that begins at `at` and has `count` tokens -> (rows, BLOCK_D), 0 beyond the
    last. ALL: every row exists. BLOCK_D: D rounded up to a power of two."""
    d = tl.arange(0, BLOCK_D)
    at += rows[:, None] * stride + d[None, :]
    if ALL and D == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)
    return x


@kernel
def store_rows(at, rows, stride, count, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    tl.store(at + rows[:, None] * stride + d[None, :], x.to(at.dtype.element_ty), mask=mask)


@kernel
def over_rms(x, eps, D: tl.constexpr):
    """Rows (rows, BLOCK_D) over their root mean square -> that, and 1 / the root mean square, in float32."""
    x = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return x * r, r


@kernel
def load_weight(W, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    return tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@kernel
def attend_simple(Q_TXT, K_TXT, V_TXT, Q_IMG, K_IMG, V_IMG, W_Q_TXT, W_K_TXT, W_Q_IMG, W_K_IMG, O_TXT, O_IMG,
                  M, N, nh, factor, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
                  DOT: tl.constexpr):
    """BLOCK queries of one head against all keys of both streams. factor: log2(e) / sqrt(hd)."""
    b = tl.program_id(1).to(tl.int64) // nh
    h = tl.program_id(1).to(tl.int64) % nh
    tiles_txt = tl.cdiv(M, BLOCK)
    tiles = tiles_txt + tl.cdiv(N, BLOCK)
    mine = tl.program_id(0)
    if mine < tiles_txt:                                            # a tile of text queries
        rows, count = mine * BLOCK + tl.arange(0, BLOCK), M
        q = load_rows(head_of(Q_TXT, b, h), rows, Q_TXT[2], M, False, D, BLOCK_D)
        w = load_weight(W_Q_TXT, D, BLOCK_D)
    else:
        rows, count = (mine - tiles_txt) * BLOCK + tl.arange(0, BLOCK), N
        q = load_rows(head_of(Q_IMG, b, h), rows, Q_IMG[2], N, False, D, BLOCK_D)
        w = load_weight(W_Q_IMG, D, BLOCK_D)
    q = (over_rms(q, eps, D)[0] * w).to(DOT)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)              # largest score so far
    total = tl.zeros((BLOCK,), tl.float32)                          # sum of 2^(score - top)
    out = tl.zeros((BLOCK, BLOCK_D), tl.float32)                    # sum of 2^(score - top) v
    for tile in range(tiles):
        if tile < tiles_txt:
            n, keys = tile * BLOCK + tl.arange(0, BLOCK), M
            k = load_rows(head_of(K_TXT, b, h), n, K_TXT[2], M, False, D, BLOCK_D)
            v = load_rows(head_of(V_TXT, b, h), n, V_TXT[2], M, False, D, BLOCK_D)
            w = load_weight(W_K_TXT, D, BLOCK_D)
        else:
            n, keys = (tile - tiles_txt) * BLOCK + tl.arange(0, BLOCK), N
            k = load_rows(head_of(K_IMG, b, h), n, K_IMG[2], N, False, D, BLOCK_D)
            v = load_rows(head_of(V_IMG, b, h), n, V_IMG[2], N, False, D, BLOCK_D)
            w = load_weight(W_K_IMG, D, BLOCK_D)
        k = (over_rms(k, eps, D)[0] * w).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        scores = tl.where((n < keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        smaller = tl.exp2(top - new_top)
        total = total * smaller + tl.sum(p, 1)
        out = tl.dot(p.to(DOT), v.to(DOT), out * smaller[:, None], input_precision="ieee")
        top = new_top
    out /= total[:, None]
    if mine < tiles_txt:
        store_rows(head_of(O_TXT, b, h), rows, O_TXT[2], count, out, D, BLOCK_D)
    else:
        store_rows(head_of(O_IMG, b, h), rows, O_IMG[2], count, out, D, BLOCK_D)


# ------------------------------------------------------------------------------------ the kernel that is used
# What changed: (1) keys are normalised once, by `normalise_heads`, instead of by every program in every turn.
# (2) Image and text are walked over in two loops, and masks are left out of a loop whose tiles are all full:
# at 154 + 4096 tokens in 64 of 67 turns. (3) The scale is folded into the exponent, one multiply-add a score.
# (4) Tiles are loaded some turns ahead (stages), so that none waits for the load it has just begun. (5) No
# norm, no text queries (the last block) and text lengths are possible. (6) lse is kept for the backward.

@kernel
def normalise_heads(X_TXT, X_IMG, W_TXT, W_IMG, Y_TXT, Y_IMG, M, N, nh, eps, D: tl.constexpr,
                    BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """y = x / rms(x) * w of ROWS tokens of one head, of either stream."""
    b = tl.program_id(1).to(tl.int64) // nh
    h = tl.program_id(1).to(tl.int64) % nh
    tiles_img = tl.cdiv(N, ROWS)
    if tl.program_id(0) < tiles_img:
        first, count, w_at = tl.program_id(0) * ROWS, N, W_IMG
        x_at, x_row, y_at, y_row = head_of(X_IMG, b, h), X_IMG[2], head_of(Y_IMG, b, h), Y_IMG[2]
    else:
        first, count, w_at = (tl.program_id(0) - tiles_img) * ROWS, M, W_TXT
        x_at, x_row, y_at, y_row = head_of(X_TXT, b, h), X_TXT[2], head_of(Y_TXT, b, h), Y_TXT[2]
    rows = first + tl.arange(0, ROWS)
    x, _ = over_rms(load_rows(x_at, rows, x_row, count, False, D, BLOCK_D), eps, D)
    store_rows(y_at, rows, y_row, count, x * load_weight(w_at, D, BLOCK_D), D, BLOCK_D)


@kernel
def attend_keys(out, total, top, q, k_at, k_row, v_at, v_row, keys, factor, ALL: tl.constexpr,
                D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr):
    """Walk over the keys of one stream. ALL: every tile is full."""
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_at, n, k_row, keys, ALL, D, BLOCK_D).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not ALL:
            scores = tl.where((n < keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)           # as in attend_simple, but scaled here
        p = tl.exp2(scores * factor - new_top[:, None])
        smaller = tl.exp2(top - new_top)
        total = total * smaller + tl.sum(p, 1)
        v = load_rows(v_at, n, v_row, keys, ALL, D, BLOCK_D).to(DOT)
        out = tl.dot(p.to(DOT), v, out * smaller[:, None], input_precision="ieee")
        top = new_top
    return out, total, top


@kernel
def valid_text(LENGTHS, b, M):
    """How many text keys picture b has."""
    if LENGTHS is not None:
        M = tl.minimum(M, tl.maximum(0, tl.load(LENGTHS + b).to(tl.int32)))
    return M


@kernel
def attend_forward(Q_TXT, K_TXT, V_TXT, Q_IMG, K_IMG, V_IMG, W_TXT, W_IMG, LENGTHS, O_TXT, O_IMG, LSE,
                   M_Q, M, N, nh, factor, eps, NORM: tl.constexpr, ALL_TXT: tl.constexpr,
                   ALL_IMG: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, DOT: tl.constexpr):
    """BLOCK_M queries of one head. M_Q: text queries, M or 0. NORM: q is raw, K already normalised."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // nh
    h = bh % nh
    tiles_img = tl.cdiv(N, BLOCK_M)
    lse_at = LSE + bh * (M_Q + N)                                   # text first
    if tl.program_id(0) < tiles_img:
        first, count, w_at = tl.program_id(0) * BLOCK_M, N, W_IMG
        q_at, q_row, o_at, o_row = head_of(Q_IMG, b, h), Q_IMG[2], head_of(O_IMG, b, h), O_IMG[2]
        lse_at += M_Q
    else:
        first, count, w_at = (tl.program_id(0) - tiles_img) * BLOCK_M, M_Q, W_TXT
        q_at, q_row, o_at, o_row = head_of(Q_TXT, b, h), Q_TXT[2], head_of(O_TXT, b, h), O_TXT[2]
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_at, rows, q_row, count, False, D, BLOCK_D)
    if NORM:
        q = over_rms(q, eps, D)[0] * load_weight(w_at, D, BLOCK_D)
    q = q.to(DOT)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    out, total, top = attend_keys(
        out, total, top, q, head_of(K_IMG, b, h), K_IMG[2], head_of(V_IMG, b, h), V_IMG[2], N, factor,
        ALL_IMG, D, BLOCK_D, BLOCK_N, DOT)
    out, total, top = attend_keys(
        out, total, top, q, head_of(K_TXT, b, h), K_TXT[2], head_of(V_TXT, b, h), V_TXT[2],
        valid_text(LENGTHS, b, M), factor, ALL_TXT, D, BLOCK_D, BLOCK_N, DOT)
    tl.store(lse_at + rows, top + tl.log2(total), mask=rows < count)
    store_rows(o_at, rows, o_row, count, out / total[:, None], D, BLOCK_D)


# -------------------------------------------------------------------------------------------------- launching

def capability(device: torch.device) -> Optional[int]:
    """90 for 9.0; None where there is no GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# BLOCK_M, BLOCK_N, warps, stages by step and head dim (up to 64, 128, 256), for half precision. Of those
# tried, these need the fewest instructions per score, spill no register inside a loop, and fit the shared
# memory of every card from 8.0 on; counted in compiled code, not timed. float32 has no tensor cores to feed:
# small tiles. On Hopper three stages: with two, a turn waits for the last load that the one before began. And
# 4 warps in the forward, so that two programs share a multiprocessor: one multiplies while the other takes
# exponentials.
TILES = {"forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
         "keys": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
         "queries": ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1))}
TILES_HOPPER = {"forward": (128, 64, 4, 3), "keys": (64, 128, 8, 3), "queries": (128, 64, 8, 3)}   # up to 64
TILES_FLOAT32 = {"forward": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)),
                 "keys": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1)),
                 "queries": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1))}


def tiles(step: str, x: torch.Tensor) -> dict:
    """How step "forward", "keys" or "queries" is cut for x (B, T, nh, hd)."""
    block_d, gpu = head_block(x), capability(x.device)
    if gpu is None:                                                 # the interpreter: few turns of numpy
        return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=block_d)
    table = TILES_FLOAT32 if x.dtype == torch.float32 else TILES
    m, n, warps, stages = table[step][max(0, block_d.bit_length() - 7)]
    if block_d <= 64 and table is TILES and 90 <= gpu < 120:        # and its successors for data centres
        m, n, warps, stages = TILES_HOPPER[step]
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=block_d, num_warps=warps, num_stages=stages, **FUSED)


def head_block(x):
    """The head dim rounded up to what `tl.arange` and `tl.dot` take."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


def dot_dtype(x: torch.Tensor):
    """The dtype of a product's operands: x's own, but the interpreter cannot multiply bfloat16."""
    if x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]


def stream(x):
    """What kernels take for a tensor (B, T, nh, hd)."""
    return (x, *x.stride()[:3])


def per_head(x):
    """Room for a tensor like x in which the tokens of a head lie together."""
    B, T, nh, hd = x.shape
    return torch.empty(B, nh, T, hd, dtype=x.dtype, device=x.device).transpose(1, 2)


def normalise(x_txt, x_img, w_txt, w_img, eps):
    """-> both streams' x / rms(x) * w, in x's dtype."""
    B, N, nh, hd = x_img.shape
    y_txt, y_img, rows = per_head(x_txt), per_head(x_img), 64
    grid = (triton.cdiv(x_txt.shape[1], rows) + triton.cdiv(N, rows), B * nh)
    normalise_heads[grid](stream(x_txt), stream(x_img), w_txt, w_img, stream(y_txt), stream(y_img),
                          x_txt.shape[1], N, nh, eps, D=hd, BLOCK_D=head_block(x_img), ROWS=rows, **FUSED)
    return y_txt, y_img


def filled_in(q_txt, k_txt, v_txt, q_img, k_img, v_img, weights):
    """The same with empty text in place of None, and some tensor in place of an absent weight: another weight
    if there is one, since a kernel that chooses between two needs them in one dtype."""
    none = q_img[:, :0]
    w = [(q_img if weights[2] is None else weights[2]) if w is None else w for w in weights]
    return *(none if x is None else x for x in (q_txt, k_txt, v_txt)), q_img, k_img, v_img, *w


def attend_simply(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, eps=1e-6):
    """The simple kernel: all six tensors and all four weights -> out_txt, out_img."""
    load_triton()
    (B, N, nh, hd), M, block = q_img.shape, q_txt.shape[1], 32
    out_txt, out_img = torch.empty_like(q_txt), torch.empty_like(q_img)
    attend_simple[triton.cdiv(M, block) + triton.cdiv(N, block), B * nh](
        *(stream(x) for x in (q_txt, k_txt, v_txt, q_img, k_img, v_img)), *norm_weights, stream(out_txt),
        stream(out_img), M, N, nh, hd ** -0.5 * math.log2(math.e), eps, D=hd, BLOCK_D=head_block(q_img),
        BLOCK=block, DOT=dot_dtype(q_img), **FUSED)
    return out_txt, out_img


def launch_forward(q_txt, k_txt, v_txt, q_img, k_img, v_img, weights, lengths, eps):
    """-> out_txt, out_img, lse (B, nh, text queries + N) in float32.
    weights: of q_txt, k_txt, q_img, k_img, or None."""
    load_triton()
    norm = weights[2] is not None
    q_txt, k_txt, v_txt, q_img, k_img, v_img, w_q_txt, w_k_txt, w_q_img, w_k_img = filled_in(
        q_txt, k_txt, v_txt, q_img, k_img, v_img, weights)
    (B, N, nh, hd), M_Q, M = q_img.shape, q_txt.shape[1], k_txt.shape[1]
    if norm:
        k_txt, k_img = normalise(k_txt, k_img, w_k_txt, w_k_img, eps)
    out_txt, out_img = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_txt, q_img))
    lse = torch.empty(B, nh, M_Q + N, dtype=torch.float32, device=q_img.device)
    t = tiles("forward", q_img)
    grid = triton.cdiv(N, t["BLOCK_M"]) + triton.cdiv(M_Q, t["BLOCK_M"]), B * nh
    attend_forward[grid](
        *(stream(x) for x in (q_txt, k_txt, v_txt, q_img, k_img, v_img)), w_q_txt, w_q_img, lengths,
        stream(out_txt), stream(out_img), lse, M_Q, M, N, nh, hd ** -0.5 * math.log2(math.e), eps, NORM=norm,
        ALL_TXT=lengths is None and M % t["BLOCK_N"] == 0, ALL_IMG=N % t["BLOCK_N"] == 0,
        D=hd, DOT=dot_dtype(q_img), **t)
    return out_txt, out_img, lse


# ------------------------------------------------------------------------------------------- known to PyTorch

@torch.library.custom_op("sd3::joint_attention", mutates_args=())
def joint_attention_op(
        q_txt: Optional[Tensor], k_txt: Optional[Tensor], v_txt: Optional[Tensor], q_img: Tensor,
        k_img: Tensor, v_img: Tensor, w_q_txt: Optional[Tensor], w_k_txt: Optional[Tensor],
        w_q_img: Optional[Tensor], w_k_img: Optional[Tensor], text_lengths: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out_txt (of length 0 without text queries), out_img, lse (B, nh, L). Its gradient is registered in
    kernels/joint_attention_backward.py, though not for the copy that exists while this file is run."""
    with device_of(q_img):
        return launch_forward(q_txt, k_txt, v_txt, q_img, k_img, v_img, (w_q_txt, w_k_txt, w_q_img, w_k_img),
                              text_lengths, eps)


@joint_attention_op.register_fake
def _(q_txt, k_txt, v_txt, q_img, k_img, v_img, w_q_txt, w_k_txt, w_q_img, w_k_img, text_lengths, eps):
    B, N, nh, hd = q_img.shape
    M = 0 if q_txt is None else q_txt.shape[1]
    return (q_img.new_empty(B, M, nh, hd), q_img.new_empty(B, N, nh, hd),
            q_img.new_empty(B, nh, M + N, dtype=torch.float32))


def under_autocast(*tensors):
    """The tensors in autocast's dtype where that is on, as for PyTorch's own attention."""
    device = tensors[-1].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def joint_attention_triton(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, text_lengths, eps):
    """What `joint_attention_reference` computes. Autocast makes q, k and v half, as for PyTorch's own."""
    tensors = under_autocast(q_txt, k_txt, v_txt, q_img, k_img, v_img)
    if text_lengths is not None:
        text_lengths = text_lengths.contiguous()
    out_txt, out_img, _ = joint_attention_op(*tensors, *(norm_weights or (None,) * 4), text_lengths, eps)
    return None if q_txt is None else out_txt, out_img


# ------------------------------------------------------------------------------------------- what is accepted

def check_joint_attention(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights, text_lengths, eps) -> None:
    """Raises a ValueError that names the argument at fault, before anything runs."""
    given = {"q_txt": q_txt, "k_txt": k_txt, "v_txt": v_txt, "q_img": q_img, "k_img": k_img, "v_img": v_img,
             "text_lengths": text_lengths}
    for name, x in given.items():
        if not isinstance(x, Tensor) and (x is not None or name.endswith("img")):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if q_img.dim() != 4 or 0 in q_img.shape[2:]:
        raise ValueError(f"q_img must be (B, N, nh, hd), got {tuple(q_img.shape)}")
    B, N, nh, hd = q_img.shape
    if (k_txt is None) != (v_txt is None) or k_txt is None and q_txt is not None:
        raise ValueError("k_txt and v_txt go together, and q_txt needs them; all three None: no text")
    M = 0 if k_txt is None else k_txt.shape[1]
    expected = [("k_img", k_img, (B, N, nh, hd)), ("v_img", v_img, (B, N, nh, hd))]
    text = ("k_txt", k_txt), ("v_txt", v_txt), ("q_txt", q_txt)
    expected += [(name, x, (B, M, nh, hd)) for name, x in text if x is not None]
    for name, x, shape in expected:
        if x.dtype != q_img.dtype:
            raise ValueError(f"{name} is {x.dtype}, q_img {q_img.dtype}: all q, k and v must share a dtype")
    if norm_weights is not None:
        if len(norm_weights) != 4:
            raise ValueError(f"norm_weights must be of (q_txt, k_txt, q_img, k_img), got {len(norm_weights)}")
        named = zip(("q_txt", "k_txt", "q_img", "k_img"), norm_weights, (q_txt, k_txt, q_img, k_img))
        for name, w, x in named:
            if x is not None and w is None:
                raise ValueError(f"the norm weight of {name} is None, though {name} is not")
            if x is not None:
                expected.append((f"the norm weight of {name}", w, (hd,)))
        if len({w.dtype for w in norm_weights if w is not None}) > 1:
            dtypes = ", ".join(str(w.dtype) for w in norm_weights if w is not None)
            raise ValueError(f"norm_weights are {dtypes}: all of them must share a dtype")
    if text_lengths is not None:
        expected.append(("text_lengths", text_lengths, (B,)))
        if text_lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"text_lengths must be int32 or int64, got {text_lengths.dtype}")
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} beside q_img {tuple(q_img.shape)}, "
                             f"got {tuple(x.shape)}")
        if x.device != q_img.device:
            raise ValueError(f"{name} is on {x.device}, q_img on {q_img.device}: move one of them")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, at least 0, got {eps}")


# ------------------------------------------------------------------------------------------------------- demo

def demo() -> None:
    """Error of the kernels and of PyTorch against float64, in each dtype; on a GPU also the time."""
    cuda, found = for_demo()
    print("joint attention of 13 + 40 tokens: largest error against float64, relative to the largest value")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        x = [t.to("cuda" if cuda else "cpu", dtype) for L in (13, 40) for t in torch.randn(3, 1, L, 2, 64)]
        w = list(0.5 + torch.rand(4, 64, device=x[0].device))
        z = [t.double() for t in x]
        for i, v in zip((0, 1, 3, 4), w):
            z[i] = z[i] / (z[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * v.double()
        exact = attention(*(torch.cat(pair, 1).transpose(1, 2) for pair in zip(z[:3], z[3:]))).transpose(1, 2)
        ways = {"PyTorch": lambda: joint_attention_reference(*x, w)}
        if found:
            ways["simple kernel"] = lambda: attend_simply(*x, w)
            ways["kernel"] = lambda: joint_attention_triton(*x, w, None, 1e-6)
        errors = {name: ((torch.cat(way(), 1) - exact).abs().max() / exact.abs().max()).item()
                  for name, way in ways.items()}
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
            print(f"  {name:14s}{ms:7.3f} ms  {4 * 24 * 4250 ** 2 * 64 / ms / 1e9:5.0f} TFLOP/s")


# Exercises. (1) In `attend_keys`, leave out `smaller`: at which lengths is the output wrong, at which not?
# (2) Normalise the keys in `attend_keys` instead of beforehand: what does bench.py say, and what does
# tests/test_kernels_aot.py say about the instructions of the loop?

if __name__ == "__main__":
    demo()
