"""Joint attention over two streams of tokens: the formula in plain PyTorch, which every fused version is
tested against.

Dims: B batch, M text tokens, N image tokens, nh heads, hd head dim.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim,
    computed in float32 (|x| > 255 squared overflows float16)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(hd)) v over (B, nh, L, hd), spelled out; the softmax in float32.
    mask: True where attended."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                  # (B, nh, Lq, Lk)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def joint_attention_reference(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights=None, text_lengths=None,
                              eps=1e-6):
    """-> (out_txt, out_img), shaped like the queries; out_txt is None where there are no text queries."""
    if norm_weights is not None:
        w_q_txt, w_k_txt, w_q_img, w_k_img = norm_weights
        q_img, k_img = rms_norm(q_img, w_q_img, eps), rms_norm(k_img, w_k_img, eps)
        q_txt = None if q_txt is None else rms_norm(q_txt, w_q_txt, eps)
        k_txt = None if k_txt is None else rms_norm(k_txt, w_k_txt, eps)
    M = 0 if q_txt is None else q_txt.shape[1]
    q = q_img if q_txt is None else torch.cat([q_txt, q_img], dim=1)  # (B, M + N, nh, hd), or image alone
    k = k_img if k_txt is None else torch.cat([k_txt, k_img], dim=1)
    v = v_img if v_txt is None else torch.cat([v_txt, v_img], dim=1)
    mask = None
    if text_lengths is not None and k_txt is not None:
        position = torch.arange(k.shape[1], device=k.device)
        mask = (position < text_lengths[:, None]) | (position >= k_txt.shape[1])    # (B, L), True: attended
        mask = mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                        # (B, nh, L, hd)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 1024:
        # PyTorch's CPU kernel is slow here: forward + backward 5x at 52 tokens, 1.4x at 1024
        out = attention(q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(1, 2)
    return (None if q_txt is None else out[:, :M]), out[:, M:]
