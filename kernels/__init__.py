"""The three hot operations of an MMDiT block, each behind one function: what is fused, and why is it faster?

    joint_attention          text and image attended as one sequence, queries and keys normalised per head
                             on the way        kernels/joint_attention.py, kernels/joint_attention_backward.py
                                                    or in front of PyTorch's own    kernels/norm_layout.py
    modulate                 LayerNorm(x) * (1 + scale) + shift: how the timestep and the prompt reach a block
    gate_residual_modulate   h = x + gate * y, and the next modulation of h               kernels/adaln.py

Around its matrix products a block reads and writes whole activations while computing little, so the cost
there is memory traffic: written as a chain of PyTorch calls, `modulate` moves an activation six times,
where a fused kernel needs two. The files hold the formulas in plain PyTorch, which run on any device and
are what every kernel is tested against, and the Triton kernels. This file only decides who gets which:

    backend="torch"     the formulas (and scaled_dot_product_attention)
    backend="triton"    the kernels; ValueError where they cannot run
    backend="auto"      the kernels where they were measured to be faster, else the formulas

The environment variable SD3_KERNELS replaces "auto". Measured means: kernels/results/*.csv, which
`python kernels/bench.py` writes, has rows for this GPU, operation, dtype and head dim in which the kernel won
at the nearest size. So a GPU without measurements gets the formulas, and a line for each operation and dtype
says so. float16 gets them on every GPU: the bench measures bfloat16 alone (modulations also with a float32
stream).
There are two kernels for attention, one that attends ("triton") and one that normalises and joins in front
of PyTorch's attention ("triton+sdpa"): "auto" chooses among three, and backend="triton" between these two, or
the one that attends if nothing was measured.
CPUs and Macs always run the formulas; Triton need not be installed, and only the first kernel imports it.

Dims: B batch, L tokens, M text tokens, N image tokens, D width, nh heads, hd head dim.
Run `python kernels/__init__.py`: checks that two streams attend as one sequence does.
"""
import csv
import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

if __name__ == "__main__":                              # run as a file: the package is the folder around it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import adaln, joint_attention_backward     # noqa: F401  gives joint_attention its gradient
from kernels.joint_attention import (attention, check_joint_attention, joint_attention_reference,
                                     joint_attention_triton, rms_norm)
from kernels.norm_layout import joint_attention_sdpa

__all__ = ["attention", "gate_residual_modulate", "joint_attention", "modulate", "rms_norm"]
BACKENDS = ("auto", "torch", "triton")
DEFAULT = os.environ.get("SD3_KERNELS") or "auto"       # what "auto" stands for
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
RESULTS = Path(__file__).resolve().parent / "results"
_told = set()                                           # lines already printed


def joint_attention(q_txt, k_txt, v_txt, q_img, k_img, v_img, *, norm_weights=None, eps=1e-6,
                    text_lengths=None, backend="auto"):
    """Attention over the concatenation [text, image], scale 1 / sqrt(hd), without positions (SD3 adds them to
    the input).

    q, k, v: (B, M, nh, hd) text and (B, N, nh, hd) image, any strides with a contiguous last dim.
    norm_weights: (q_txt, k_txt, q_img, k_img), each (hd,): RMSNorm per head before the product;
        None: no norm.
    text_lengths: (B,) numbers of valid text tokens, 0 to M; the rest are ignored as keys. None: all are
        attended to, as in SD3.
    All text None, or of length 0: attention among image tokens.
    q_txt alone None: the text queries are not needed (last block).
    Returns (out_txt, out_img), shaped like the queries; out_txt is None where there are no text queries.
    """
    tensors = q_txt, k_txt, v_txt, q_img, k_img, v_img
    check_joint_attention(*tensors, norm_weights, text_lengths, eps)
    named = {"q_img": q_img, "k_img": k_img, "v_img": v_img, "q_txt": q_txt, "k_txt": k_txt, "v_txt": v_txt}
    operation = "joint_attention"
    if norm_weights is not None:
        operation = "joint_attention with norms"
        named |= zip(("w_q_txt", "w_k_txt", "w_q_img", "w_k_img"), norm_weights)
    if k_txt is None:
        operation += ", no text"
    way = {"torch": joint_attention_reference, "triton": joint_attention_triton,
           "triton+sdpa": joint_attention_sdpa}[choose(backend, operation, q_img.shape[-1], **named)]
    return way(*tensors, norm_weights, text_lengths, eps)


def modulate(x, shift, scale, *, eps=1e-6, backend="auto"):
    """LayerNorm(x) * (1 + scale) + shift, where the LayerNorm has no weights.
    x (B, L, D); shift, scale (B, D) -> (B, L, D)."""
    adaln.check_modulate(x, shift, scale, eps)
    if choose(backend, "modulate", x=x, shift=shift, scale=scale) == "triton":
        return adaln.modulate_op(x, shift, scale, eps)
    return adaln.modulate_reference(x, shift, scale, eps)


def gate_residual_modulate(x, y, gate, shift, scale, *, eps=1e-6, backend="auto"):
    """h = x + gate * y, then modulate(h). x, y (B, L, D); gate, shift, scale (B, D).
    Returns (h, modulated), both (B, L, D)."""
    adaln.check_modulate(x, shift, scale, eps, y, gate)
    tensors = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    if choose(backend, "gate_residual_modulate", **tensors) == "triton":
        return adaln.gate_residual_modulate_op(x, y, gate, shift, scale, eps)
    return adaln.gate_residual_modulate_reference(x, y, gate, shift, scale, eps)


# --------------------------------------------------------------------------------------------- who gets which

def default() -> str:
    if DEFAULT not in BACKENDS:
        raise ValueError(f"SD3_KERNELS is {DEFAULT!r}: choose auto, torch or triton")
    return DEFAULT


def check_environment(device: torch.device) -> None:
    """ValueError if SD3_KERNELS asks for what there is not, or for what `device` cannot run: to be told
    before weights are read, not in the first step."""
    if default() == "triton" and (refusal := device_refuses(device)):
        raise ValueError(f"SD3_KERNELS is triton: {refusal}")


def choose(backend: str, operation: str, head_dim: int = 0, **tensors) -> str:
    """What runs this: "torch", "triton" or "triton+sdpa". tensors: the operation's inputs by argument name,
    an activation first.

    Called every time, also while torch.compile traces: cheap checks first, and nothing that it cannot trace.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no back end {backend!r} here: choose auto, torch or triton")
    backend = default() if backend == "auto" else backend
    device = next(iter(tensors.values())).device
    if backend == "torch" or backend == "auto" and device.type != "cuda":
        return "torch"
    refusal = device_refuses(device) or adaln.triton_refuses(tensors)
    if backend == "triton" and refusal:
        raise ValueError(f"{operation} cannot run in Triton: {refusal}")
    gpu = torch.cuda.get_device_properties(device).name if device.type == "cuda" else ""
    order, reason = ((), refusal) if refusal else ranking(operation, head_dim, tensors, gpu)
    if backend == "triton":
        return [name for name in (*order, "triton") if name != "torch"][0]
    if order and order[0] != "torch":
        return order[0]
    if not torch.compiler.is_compiling() and (operation, reason) not in _told:
        _told.add((operation, reason))
        print(f"kernels: {operation} runs in PyTorch: {reason}", file=sys.stderr)
    return "torch"


@lru_cache
def installed() -> bool:
    """Whether Triton is. To look on the disk takes 0.1 ms, and a model asks 190 times a pass."""
    return find_spec("triton") is not None


def device_refuses(device: torch.device) -> str | None:
    """Why no kernel can run there; None if one can. On the device "meta" only shapes matter."""
    if device.type == "meta":
        return None
    if not torch.compiler.is_compiling() and not installed():
        return "Triton is not installed: pip install triton (triton-windows on Windows)"
    if TORCH < (2, 7):
        return "PyTorch 2.6 brings Triton 3.2, and the kernels need 3.3: pip install --upgrade torch"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it needs a CUDA GPU, and this tensor is on {device} (for a test, set TRITON_INTERPRET=1)"
    if torch.version.hip:
        return "the kernels' tiles were cut for NVIDIA's GPUs, and this GPU is AMD's"
    if torch.cuda.get_device_properties(device).major < 8:
        return "this GPU is older than compute capability 8.0"
    return None


def ranking(operation: str, head_dim: int, tensors: dict, gpu: str) -> tuple[tuple, str]:
    """What was measured to be fastest at the nearest size, then the others; and the reason in words for when
    PyTorch runs."""
    first, training = next(iter(tensors.values())), torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors.values())
    key = (gpu, operation, str(first.dtype).removeprefix("torch."), head_dim,
           "forward+backward" if training else "forward", torch.compiler.is_compiling())
    if key not in MEASURED:
        return (), f"not measured on {gpu} in {key[2]}; run python kernels/bench.py"
    size = size_of(operation, first.numel(), first.shape[1])
    order = [order for upto, order in MEASURED[key] if size <= upto][0]
    return order, f"it was measured to be faster on {gpu}, at this size in {key[2]}"


def size_of(operation: str, elements: int, tokens: int) -> int:
    """What measurements are ordered by, of the first activation: its elements. In attention each takes a step
    for every token: by elements alone 4 pictures of 512 pixels would be one of 1024."""
    return elements * tokens if "attention" in operation else elements


def whole_rows(path: Path) -> list[dict]:
    """The rows of one of the bench's CSVs, except those that were cut off while they were written, whether or
    not another row follows in the same line."""
    with path.open(newline="", encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if None not in row and None not in row.values()]


def read_results(*folders: Path) -> dict:
    """*.csv of all folders -> {(gpu, operation, dtype, head dim, pass, compiled): [(to size, names)]}, names
    from fastest to slowest.

    Sizes are those of `size_of`; the limit between two measured ones is their geometric mean.
    Of two rows for the same case, the one in the later file counts. A kernel whose result was wrong there
    comes last, after PyTorch: "auto" never takes it.
    """
    times = {}                                          # key without compiled -> size -> provider -> ms
    for path in sorted((p for folder in folders for p in folder.glob("*.csv")), key=lambda p: p.name):
        for row in whole_rows(path):
            key = (row["gpu"], row["operation"], row["dtype"], int(row["head_dim"]), row["pass"])
            sizes = times.setdefault(key, {}).setdefault(int(row["size"]), {})
            sizes[row["provider"]] = float(row["ms"]) if is_right(row) else float("inf")
    table = {}
    for key, sizes in times.items():
        for compiled, rival in ((False, "torch"), (True, "torch compiled")):
            orders = []
            for size, ms in sorted(sizes.items()):
                mine = {"torch": ms.get(rival)} | {n: t for n, t in ms.items() if n.startswith("triton")}
                if mine["torch"] is not None and len(mine) > 1:
                    orders.append((size, tuple(sorted(mine, key=mine.get))))
            if orders:
                upto = [(a * b) ** 0.5 for (a, _), (b, _) in zip(orders, orders[1:])] + [float("inf")]
                table[key + (compiled,)] = [(u, order) for u, (_, order) in zip(upto, orders)]
    return table


def is_right(row: dict) -> bool:
    """Whether a row of the bench is about a kernel that works. Rounding in half precision costs 1 % of the
    largest value at most."""
    return float(row["error"]) < 0.05


MEASURED = read_results(RESULTS)


# ------------------------------------------------------------------------------------------------------- demo

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


# Exercises. (1) In demo(), which has no norms, multiply q by 30 (its assertion may then fail, as it should):
# what happens to the softmax, and to its gradient? And with norm_weights=[torch.ones(64)] * 4?
# (2) In `modulate_reference`, count the reads and writes of x for each line; which could share one pass?

if __name__ == "__main__":
    demo()
