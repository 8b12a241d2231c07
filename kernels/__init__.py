"""The three hot operations of an MMDiT block, each behind one function: what is fused,
and why is that faster?

    joint_attention          text and image attended as one sequence, queries and keys normalised per head
                             on the way
    modulate                 LayerNorm(x) * (1 + scale) + shift: how the timestep and the prompt reach a block
    gate_residual_modulate   h = x + gate * y, and the next modulation of h

What stands here is the mathematics in plain PyTorch: it runs on any device and is what every fused version is
tested against. All three read and write whole activations while computing little, so their cost is memory
traffic: written as a chain of PyTorch calls, `modulate` moves an activation about five times, of which a
fused kernel needs two.

Dims: B batch, L tokens, M text tokens, N image tokens, D width, nh heads, hd head dim.
"""
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


def joint_attention(q_txt, k_txt, v_txt, q_img, k_img, v_img, *, norm_weights=None, eps=1e-6,
                    text_lengths=None, backend="auto"):
    """Attention over the concatenation [text, image], scale 1 / sqrt(hd),
    without positions (SD3 adds them to the input).

    q, k, v: (B, M, nh, hd) text and (B, N, nh, hd) image, any strides with a contiguous last dim.
    norm_weights: (q_txt, k_txt, q_img, k_img), each (hd,): RMSNorm per head before the product;
        None: no norm.
    text_lengths: (B,) numbers of valid text tokens, the rest is ignored as keys;
        None: all attended (what SD3 does).
    All text None, or of length 0: attention among image tokens.
    q_txt alone None: the text queries are dead (last block).
    Returns (out_txt, out_img), shaped like the queries; out_txt is None where there are no text queries.
    """
    check_backend(backend)
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


def modulate(x, shift, scale, *, eps=1e-6, backend="auto"):
    """LayerNorm(x) * (1 + scale) + shift, where the LayerNorm learns nothing.
    x (B, L, D); shift, scale (B, D) -> (B, L, D)."""
    check_backend(backend)
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (y * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)).to(x.dtype)


def gate_residual_modulate(x, y, gate, shift, scale, *, eps=1e-6, backend="auto"):
    """h = x + gate * y, then modulate(h). x, y (B, L, D); gate, shift, scale (B, D).
    Returns (h, modulated), both (B, L, D)."""
    h = x + gate.unsqueeze(1) * y
    return h, modulate(h, shift, scale, eps=eps, backend=backend)


def check_backend(backend: str) -> None:
    if backend not in ("auto", "torch"):
        raise ValueError(f"no back end {backend!r} here: choose auto or torch")


def demo() -> None:
    """One attention over two streams is attention over their concatenation, and leaving out the text's
    queries changes nothing for the image."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7 + 16, 3, 64) for _ in range(3))             # 7 text and 16 image tokens
    split = [x for pair in zip(*(x.split([7, 16], dim=1) for x in (q, k, v))) for x in pair]
    txt, img = joint_attention(*split)
    whole = attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    error = (torch.cat([txt, img], dim=1) - whole).abs().max().item()
    _, alone = joint_attention(None, *split[1:])
    assert error < 1e-5 and torch.allclose(alone, img, atol=1e-6)
    print(f"joint attention differs from attention over the concatenation, in float64, by {error:.1e}")


# Exercises. (1) Leave out the norms and multiply q by 30: what happens to the softmax, and to its gradient?
# (2) In `modulate`, count the reads and writes of x for each line; which could share one pass?

if __name__ == "__main__":
    demo()
