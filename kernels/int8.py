"""Weights in eight bits: what does half of the memory cost?

    w (out, in)  ~  q (out, in) int8, from -127 to 127, times s (out,): one scale for each output channel
    x w^T        ~  x (q / 128)^T * (128 s)

Only weights are rounded; activations and sums stay as they were. The int8 numbers are turned into x's dtype
one layer at a time, right before the product: 16 bits hold them exactly, so the only error is the rounding to
1/127 of a channel's largest weight. Scales are rounded up to bfloat16 before the weights are divided by them:
as far as bfloat16 goes, multiplying by them later adds no error of its own.

For Gaussian weights, 2432 a channel, the layer's output is off by 0.84 % (root mean square), in bfloat16 by
0.89 %.

torch._weight_int8pack_mm reads the int8 numbers inside the product. Measured on one core of an AMD EPYC
(2026-11-21, torch 2.13.0, bfloat16, 2432 x 4864), in ms:
    rows of x            1     77    512
    16-bit weights     2.3   10.0   57.8
    this file          4.2   12.2   60.8
    int8pack_mm        0.9   26.4  179.3
It wins for single rows, which language models generate from; pictures have thousands, so it is not used.

Run `python kernels/int8.py`: quantises a layer, prints and asserts its error and its size.
"""
import torch
import torch.nn.functional as F
from torch import nn


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (out, in), finite -> q (out, in) int8, s (out,) bfloat16 with w ~ q * s. Zero channels stay zero."""
    w = w.float()
    s = w.abs().amax(1).clamp_min(1e-30) / 127
    s = ((s.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)     # up to the next bfloat16
    return (w / s[:, None]).round().to(torch.int8), s.bfloat16()


class Int8Linear(nn.Module):
    """Takes the place of an nn.Linear for drawing. No gradients reach the weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        # Sums of x times up to 127 would leave float16's range. Weights over 128 are exact; small x over 128
        # would not be. The scalar is a tensor for its dtype: one pass turns int8 into that.
        w = self.weight * torch.tensor(2**-7, dtype=x.dtype)                    # (out, in) in x's dtype
        y = F.linear(x, w)                                                      # under autocast in its dtype
        y = y * (self.scale.to(y.dtype) * 2**7)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantise_linears(module: nn.Module, keep=()) -> None:
    """Replace every nn.Linear in `module`, one at a time, so that the whole is never in memory twice.

    keep: names of layers to leave as they are.
    """
    # names alone: a list of the layers, or the walk itself, would keep all of them until the end
    for name in [n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and n not in keep]:
        module.set_submodule(name, Int8Linear(module.get_submodule(name)))


def quantise_mmdit(mmdit: nn.Module) -> nn.Module:
    """The joint blocks of an MMDiT, which are 99 % of it.

    The last block's text projection stays as it is: its queries are dead, and SelfAttention.project_kv cuts
    them off the weight itself. The embedders, which are small, stay too.
    """
    quantise_linears(mmdit.joint_blocks, keep={f"{len(mmdit.joint_blocks) - 1}.context_block.attn.qkv"})
    return mmdit


def quantise_t5(t5: nn.Module) -> nn.Module:
    """The blocks of a T5Encoder. The table of embeddings, from which single rows are read, stays."""
    quantise_linears(t5.encoder.block)
    return t5


def demo() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(2432, 4864), torch.randn(77, 2432)
    nn.init.normal_(linear.weight, std=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        exact, small = F.linear(x, linear.weight, linear.bias), Int8Linear(linear)(x.to(dtype)).float()
        off = ((small - exact).norm() / exact.norm()).item()
        print(f"{str(dtype):15s}  error {100 * off:.2f} %")
        assert off < 0.01
    sizes = [sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in (linear, Int8Linear(linear))]
    print(f"{sizes[0]:,} bytes in float32, {sizes[1]:,} in int8")
    assert sizes[1] < 0.26 * sizes[0]


# Exercises. (1) One scale for the whole matrix instead of one a channel, and one weight of 100 somewhere:
# what becomes of the error? (2) Round the activations too, a scale for each row: which error is larger?

if __name__ == "__main__":
    demo()
