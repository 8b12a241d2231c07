"""What will a training run cost, before it begins? A file of its own, because nothing here trains.

    parameters   counted on PyTorch's meta device, where tensors have shapes but no numbers
    FLOPs        of a picture, by formula: a product of (n, k) by (k, m) is 2 n k m; the backward pass has two
                 for each, one for the weights and one for the input, where anything before it learns
    memory       weights, gradients, AdamW's two moments, average: 4 bytes each, 20 a parameter (float32);
                 what the forward pass keeps for the backward one; a copy of the weights in bfloat16
    time         FLOPs / (peak x MFU): MFU, the share of the card's peak that is reached, is assumed

    a block keeps, in numbers a token and unit of width D                    with autocast
      inputs of qkv, proj, fc1                                3               bfloat16
      the MLP's hidden layer, before and behind GELU          8               bfloat16
      what the gates multiply                                 2               bfloat16
      q, k, v as they leave the Linear, if normed             3               bfloat16
      q, k, v and the output, as attention sees them          4               bfloat16
      the stream and its LayerNorm, twice                     4               float32
      q and k over their RMS                                  2               float32

With checkpointing a block keeps only its input, and one block at a time keeps the rest; its forward pass runs
twice. Under FSDP (`fully_shard`) each of G cards holds 1/G of all that belongs to a parameter, and two blocks
in bfloat16, the one at work and the next, and the gradient of one, in bfloat16 and in float32.

What to know
- FLOPs and parameters are exact, and tested so against PyTorch's own counter. What a block keeps was compared
  with what PyTorch keeps on a CPU in float32. Times are predictions from a stated MFU, nothing else.
- "FLOPs" are the model's own; recomputing counts in the time, not in the MFU.
- Not included: the encoders (train.py cache runs them beforehand), the network between cards, reading.

Run: python budget.py, or python train.py --dry-run --model d38 --flow-batch 4096 --gpus 64
"""
import argparse
import math
from functools import lru_cache

import torch

from mmdit import MMDiT, MMDiTConfig
from pipeline import check_side

CARDS = {                   # peak of dense bfloat16 products, bytes: NVIDIA's data sheets of the SXM cards
    "a100": (312e12, 80e9), "h100": (989.4e12, 80e9), "h200": (989.4e12, 141e9)}
MFU = 0.45
STATES = {"weights": 4, "gradients": 4, "AdamW": 8, "EMA": 4}               # bytes a parameter
SPARE = 2e9                 # bytes: CUDA, NCCL, cuBLAS, fragments. An allowance: shapes do not tell it
PAPER = dict(size=256, batch=4096, steps=500_000)                           # its scaling study, section 5.3
STUDY = ("d15", "d18", "d21", "d30", "d38")
GB = 1e9


def tokens_of(c: MMDiTConfig, size: int) -> int:
    return (size // 8 // c.patch_size) ** 2                                 # 8: pixels along a latent cell


@lru_cache
def parameters(c: MMDiTConfig) -> dict[str, int]:
    """{part: trainable numbers}, with the largest joint block as "block"."""
    with torch.device("meta"):
        model = MMDiT(c)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.joint_blocks]
    return count | {"total": sum(count.values()), "block": max(sizes)}


# ------------------------------------------------------------------------------------------------------ FLOPs

def forward_flops(c: MMDiTConfig, N: int, M: int) -> dict[str, int]:
    """FLOPs of one picture of N tokens with M of text. "inputs": products before whose input nothing learns,
    "blocks": all joint blocks, "rest": everything else."""
    D, patch = c.width, c.patch_size ** 2 * c.in_channels
    inputs = 2 * N * D * patch + 2 * M * D * c.context_dim + 2 * D * (256 + c.pooled_dim)
    rest = 2 * 2 * D * D + 2 * D * 2 * D + 2 * N * D * patch        # second layers of two MLPs; final layer
    stream = 24                                     # a token: qkv 6, proj 2, MLP 16, times D * D
    full = stream * (N + M) * D * D + 4 * (N + M) ** 2 * D + 2 * D * 12 * D
    last = (stream * N + 4 * M) * D * D + 4 * N * (N + M) * D + 2 * D * 8 * D   # the text: keys and values
    dual = 8 * N * D * D + 4 * N ** 2 * D + 2 * D * 3 * D
    return {"inputs": inputs, "rest": rest,
            "blocks": (c.depth - 1) * full + last + c.dual_blocks * dual}


def training_flops(c: MMDiTConfig, N: int, M: int) -> int:
    """Forward and backward of one picture, nothing recomputed."""
    f = forward_flops(c, N, M)
    return 2 * f["inputs"] + 3 * (f["rest"] + f["blocks"])


# ----------------------------------------------------------------------------------------------------- memory

def kept(c: MMDiTConfig, N: int, M: int, half: bool = True, checkpointing: bool = False) -> int:
    """Bytes that the forward pass of one picture leaves for the backward pass. half: under autocast."""
    D, small = c.width, 2 if half else 4
    norms = 3 * small + 2 * 4 if c.qk_norm else 0                       # q, k, v; q and k over their RMS
    token = (3 + 8 + 2 + 4) * small + 4 * 4 + norms                     # times D, see the table above
    last = (1 + 2) * small + 2 * 4 + (2 * small + 4 if c.qk_norm else 0)    # text: only keys and values
    dual = (1 + 1 + 1 + 4) * small + norms                              # its inputs, gated, attention
    blocks = [(N + M) * token * D] * (c.depth - 1) + [(N * token + M * last) * D]
    blocks = [b + N * dual * D * (i < c.dual_blocks) for i, b in enumerate(blocks)]
    ends = N * D * (2 * 4 + small) + M * c.context_dim * small          # final LayerNorm and Linear; the text
    if checkpointing:
        return max(blocks) + c.depth * (N + M) * D * 4 + ends
    return sum(blocks) + ends


def memory(c: MMDiTConfig, gpus: int, each: int, N: int, M: int, checkpointing=False) -> dict[str, float]:
    """{what: bytes on one card}, for `each` pictures at a time. gpus 1: nothing is sharded."""
    count = parameters(c)
    found = {name: size * count["total"] / gpus for name, size in STATES.items()}
    found["copies"] = 2 * count["total"] if gpus == 1 else (2 * 2 + 2 + 4) * count["block"]
    found["activations"] = each * kept(c, N, M, True, checkpointing)
    return found | {"spare": SPARE}


def plan(c: MMDiTConfig, gpus: int, batch: int, N: int, M: int, card="h100", mfu=MFU, checkpointing=None):
    """The largest share of the batch that fits a card at once: {each, accumulate, checkpointing, bytes,
    seconds}; None if not even one picture fits. The share is cut into equal pieces. checkpointing None: only
    where these would be of fewer than 8 without it."""
    peak, room = CARDS[card]
    share = math.ceil(batch / gpus)
    best = None
    for recompute in [False, True] if checkpointing is None else [checkpointing]:
        fixed = sum(memory(c, gpus, 0, N, M, recompute).values())
        fits = int((0.95 * room - fixed) // kept(c, N, M, True, recompute))
        each = next((n for n in range(min(share, fits), 0, -1) if share % n == 0), 0)
        if each:
            flops = training_flops(c, N, M) + (forward_flops(c, N, M)["blocks"] if recompute else 0)
            best = {"each": each, "accumulate": share // each, "checkpointing": recompute,
                    "bytes": fixed + each * kept(c, N, M, True, recompute),
                    "seconds": flops * share / (peak * mfu)}
        if each >= min(8, share):
            break
    return best


# --------------------------------------------------------------------------------------------- what it prints

def table(card="h100", mfu=MFU, counts=(8, 64, 1024)) -> list[str]:
    """The paper's scaling study, on each of these numbers of cards."""
    heads = "".join(f"{f'{n:,} cards':>28}" for n in counts)
    lines = [f"the paper's study: {PAPER['size']} x {PAPER['size']}, batch {PAPER['batch']:,}, "
             f"{PAPER['steps']:,} steps, on {card}. Predictions: {100 * mfu:.0f} % MFU is assumed",
             f"{'':6}{'parameters':>14}{'FLOPs in all':>14}" + heads,
             f"{'':34}" + f"{'GB at once  s/step   days':>28}" * len(counts)]
    for name in STUDY:
        c = MMDiTConfig.preset(name)
        N, M = tokens_of(c, PAPER["size"]), 154
        total = training_flops(c, N, M) * PAPER["batch"] * PAPER["steps"]
        line = f"{name:6}{parameters(c)['total']:>14,}{total:>14.1e}"
        for n in counts:
            p = plan(c, n, PAPER["batch"], N, M, card, mfu)
            line += (f"{p['bytes'] / GB:>6.0f}{p['each']:>7}{'*' if p['checkpointing'] else ' '}"
                     f"{p['seconds']:>7.3f}{p['seconds'] * PAPER['steps'] / 86400:>7.1f}"
                     if p else f"{'does not fit':>28}")
        lines.append(line.rstrip())
    return lines + ["GB: of memory on each card, FSDP. at once: pictures on a card; * with checkpointing"]


def describe(name, size, batch, steps, gpus, card, mfu, checkpointing) -> list[str]:
    """One training run in a dozen lines."""
    c = MMDiTConfig.preset(name)
    N, M = tokens_of(c, size), 28 if name == "tiny" else 154
    count, flops = parameters(c), training_flops(c, N, M)
    lines = [f"{name}: {count['total']:,} parameters, {count['block']:,} in a block; {size} x {size} "
             f"pictures are {N} tokens, with {M} of text",
             f"FLOPs: {flops:.3e} a picture, forward and backward; {flops * batch:.3e} a step of {batch:,}; "
             f"{flops * batch * steps:.3e} in {steps:,} steps"]
    p = plan(c, gpus, batch, N, M, card, mfu, checkpointing)
    if p is None:
        need = sum(memory(c, gpus, 1, N, M, True).values())
        return lines + [f"does not fit {gpus} x {card}: one picture at a time, with checkpointing, takes "
                        f"{need / GB:.0f} GB on each; try more --gpus"]
    shares = memory(c, gpus, p["each"], N, M, p["checkpointing"])
    lines += [f"memory on each of {gpus} {card}{' under FSDP' * (gpus > 1)}, {p['each']} pictures at once"
              f"{', checkpointing' * p['checkpointing']} (predicted):"]
    lines += [f"  {what:14} {b / GB:7.1f} GB" for what, b in shares.items()]
    less = kept(c, N, M, True, True) / GB
    lines += [f"  {'in all':14} {sum(shares.values()) / GB:7.1f} of {CARDS[card][1] / GB:.0f} GB; a picture "
              f"keeps {kept(c, N, M) / GB:.2f} GB, with checkpointing {less:.2f}",
              f"time (predicted at {100 * mfu:.0f} % MFU of {CARDS[card][0] / 1e12:.0f} TFLOP/s): "
              f"{p['seconds']:.2f} s a step of {p['accumulate']} x {p['each']} on each card; "
              f"{p['seconds'] * steps / 86400:.1f} days, "
              f"{p['seconds'] * steps / 3600 * gpus:,.0f} card-hours"]
    return lines


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="train.py --dry-run", allow_abbrev=False,
                                     description="what a training run would take; nothing is trained")
    def refuse(message):
        raise ValueError(f"{message}: see python train.py --dry-run --help")
    parser.error = refuse
    parser.add_argument("--model", help="an MMDiT preset; without one, only the paper's study is shown")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures (default: 256)")
    parser.add_argument("--flow-batch", type=int, default=4096, help="pictures a step, on all cards (4096)")
    parser.add_argument("--flow-steps", type=int, default=500_000, help="steps (default: 500000)")
    parser.add_argument("--gpus", type=int, default=8, help="how many cards (default: 8)")
    parser.add_argument("--card", default="h100", help=f"{' | '.join(CARDS)} (default: h100)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"assumed share of the peak (default: {MFU})")
    parser.add_argument("--checkpointing", action="store_true", default=None,
                        help="recompute blocks; by default only where a card could take fewer than 8 "
                        "pictures at once, in equal pieces of its share")
    a = parser.parse_args(argv)
    for flag in ("size", "flow_batch", "flow_steps", "gpus", "mfu"):
        if not getattr(a, flag) > 0:
            refuse(f"--{flag.replace('_', '-')} {getattr(a, flag)} must be above 0")
    if a.card not in CARDS:
        refuse(f"--card {a.card}: choose from {', '.join(CARDS)}")
    check_side("size", a.size)
    if a.mfu > 1:
        refuse(f"--mfu {a.mfu} is above 1, the card's peak")
    lines = describe(a.model, a.size, a.flow_batch, a.flow_steps, a.gpus, a.card, a.mfu,
                     a.checkpointing) + [""] if a.model else []
    print("\n".join(lines + table(a.card, a.mfu)))


def demo() -> None:
    """The formula against PyTorch's counter on a small model, then the paper's study."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    c = MMDiTConfig(3, heads=2, in_channels=4, context_dim=32, pooled_dim=16, pos_max=8)
    model, B, M, side = MMDiT(c), 2, 5, 8
    inputs = torch.randn(B, 4, side, side), torch.rand(B), torch.randn(B, M, 32), torch.randn(B, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs).square().mean().backward()
    mine = B * training_flops(c, (side // 2) ** 2, M)
    print(f"a small model: {mine:,} FLOPs by formula, {counter.get_total_flops():,} counted by PyTorch")
    assert mine == counter.get_total_flops()
    print("\n".join(describe("d38", 256, 4096, 500_000, 64, "h100", MFU, None) + [""] + table()))


# Exercises. (1) At which size do the L x L products of attention cost as much as the rest of a block?
# (2) What does d38 need at 1024 x 1024 on 64 cards, and which term grew most? (3) Halve AdamW's moments to
# bfloat16 in STATES: from how many cards on does it hardly matter?

if __name__ == "__main__":
    demo()
