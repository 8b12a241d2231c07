"""Where do the weights live while SD3 draws, and will they fit the card? Its own file: it is about bytes,
not about pictures.

SD3 is five models that work one after the other, and only one of them needs the card at a time:

    prompt -> [ CLIP-L ] -> [ bigG ] -> [ T5 ] -> [ MMDiT, many steps ] -> [ VAE decoder ] -> picture
    none      all on the card, all the time
    text      the text encoders come when it is their turn, T5 block by block; the others are there to stay
    model     so do the others: each comes when it is its turn and leaves before the next
    block     likewise; and the transformer's joint blocks come one by one, in each step of sampling, while
              the one before them computes: two of them are on the card instead of all

Weights at rest are in main memory and stay there; what visits the card is a copy, dropped afterwards, so
nothing is ever copied back. "block" keeps them in page-locked memory, which the card reads on its own:

    copies     | block 1 | block 2 | block 3 | ...             on a stream beside the one that computes;
    computes             | block 1 | block 2 | block 3 | ...   an event for each says when it may go on

How much a choice needs is not guessed but counted (`count_work`): the models are built and run on PyTorch's
meta device, where tensors have shapes but no numbers, and every tensor's birth and death is noted.

What surprises
- The same code runs with the CPU as the "card". Only tests need that: pictures must be equal bit by bit.
- Attention is counted as the fused kernel it is on a card; there is no table of L x L scores.
- OVERHEAD, what CUDA and its libraries take for themselves, is an allowance: shapes do not tell it.

Run `python offload.py`: the bytes of sd3.5-large, and a small transformer streamed block by block.
"""
import functools
import re
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.int8 import quantise_mmdit, quantise_t5
from mmdit import MMDiT, MMDiTConfig
from run_folder import PARTS
from text_encoders import ENCODERS, CLIPTextConfig, T5Config, T5Encoder
from vae import VAEConfig

MODES = ("none", "text", "model", "block")      # from fastest to smallest
OVERHEAD = 0.8e9                                # bytes: CUDA's context, cuBLAS and cuDNN, fragments
GB = 1e9


# --------------------------------------------------------------------------------------- moving the weights

def room(shape, dtype, locked: bool) -> torch.Tensor:
    """An empty tensor in main memory. locked: in pages that a GPU can fetch by itself. PyTorch keeps such
    pages for later tensors, but hands none out again before it has been fetched."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=locked)
    except RuntimeError:                    # Windows and WSL lock only part of memory: slower, not wrong
        return torch.empty(shape, dtype=dtype)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def visiting(module: nn.Module, device, but=()):
    """Inside, the module's weights are on `device`; afterwards the original tensors take their place again.
    but: modules in it that stay where they are."""
    staying = {id(t) for m in but for t in tensors_of(m)}
    home = [(t, t.data) for t in tensors_of(module) if id(t) not in staying]
    try:
        for t, at_home in home:
            t.data = at_home.to(device, copy=True)
        yield module
    finally:
        for t, at_home in home:
            t.data = at_home


def visit_when_called(module: nn.Module, device, but=()) -> None:
    """From now on the module is on `device` only while it computes; its inputs follow it there. but: as in
    visiting."""
    visits = []

    def enter(module, args):
        visits.append(visiting(module, device, but))
        visits[-1].__enter__()
        return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)

    def leave(module, args, output):
        visits.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class BlockStream:
    """Blocks that compute in turn, in two places on the device: while a block computes in one, the next is
    copied to the other. A context manager: inside, the blocks can be called; outside, they are in main
    memory.

    Blocks may be left out (skip-layer guidance): the copy of such a block was made in vain.
    """

    def __init__(self, blocks, device):
        self.blocks, self.device = list(blocks), torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.home, self.views = zip(*(self.pack(block) for block in self.blocks))

    def pack(self, block):
        """Move a block into one flat piece of (page-locked) memory, of which its tensors become views.
        -> (that memory, [(tensor, offset, bytes)])"""
        tensors, offset, views = tensors_of(block), 0, []
        for t in tensors:
            views.append((t, offset, t.nbytes))
            offset += (t.nbytes + 255) // 256 * 256
        flat = room(offset, torch.uint8, locked=self.cuda)
        for t, start, n in views:
            view = flat[start:start + n].view(t.dtype).view(t.shape)
            t.data = view.copy_(t.data)
        return flat, views

    def point(self, i, flat) -> None:
        """Block i's tensors become views of this copy of it."""
        for t, start, n in self.views[i]:
            t.data = flat[start:start + n].view(t.dtype).view(t.shape)

    def __enter__(self):
        size = max(len(flat) for flat in self.home)
        self.places = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.copying = torch.cuda.Stream(self.device) if self.cuda else None
        if self.cuda:
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
            self.copied, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        self.coming, self.place, self.used = None, 0, 0         # which block was sent for last, and where to
        self.hooks = []
        for i, block in enumerate(self.blocks):
            self.hooks.append(block.register_forward_pre_hook(lambda *_, i=i: self.arrive(i)))
            self.hooks.append(block.register_forward_hook(lambda *_, i=i: self.leave(i), always_call=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        if self.cuda:                                           # the places may not be reused while they fill
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        self.places = None

    def fetch(self, i) -> None:
        """Begin to copy block i to the other place."""
        self.coming, self.place = i, 1 - self.place
        target, flat = self.places[self.place], self.home[i]
        if not self.cuda:
            target[:len(flat)].copy_(flat)
            return
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(self.free[self.place])      # until the block there has computed
            target[:len(flat)].copy_(flat, non_blocking=True)
            self.copied[self.place].record(self.copying)

    def arrive(self, i) -> None:
        if self.coming != i:                                    # the first, or some were left out before it
            self.fetch(i)
        self.used = self.place
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.copied[self.used])
        self.point(i, self.places[self.used])
        self.fetch((i + 1) % len(self.blocks))                  # after the last comes the next step's first

    def leave(self, i) -> None:
        self.point(i, self.home[i])
        if self.cuda:
            self.free[self.used].record(torch.cuda.current_stream(self.device))


def check_mode(mode: str, choices) -> None:
    if mode not in choices:
        raise ValueError(f"no offload {mode!r}: choose auto, {', '.join(MODES)}")


class Places:
    """Where the parts of a Pipeline are, in one of MODES. The encoders come and go by themselves, and so do
    T5's blocks, since a prompt takes each of them once; the others are called inside
    `with places.at_work(part):`."""

    def __init__(self, mode, device, mmdit, encoders):
        check_mode(mode, MODES)
        self.mode, self.device, self.mmdit = mode, device, mmdit
        if mode != "none":
            for name in ENCODERS:
                if (encoder := getattr(encoders, name)) is not None:
                    blocks = later_blocks(encoder) if name == "t5" else ()
                    visit_when_called(encoder, device, but=blocks)
                    for block in blocks:
                        visit_when_called(block, device)
        self.stream = BlockStream(mmdit.joint_blocks, device) if mode == "block" else None

    @contextmanager
    def at_work(self, part):
        stream = self.stream if part is self.mmdit else None
        with (nullcontext() if self.mode in ("none", "text") else
              visiting(part, self.device, but=stream.blocks if stream else ())), stream or nullcontext():
            yield


def later_blocks(t5: T5Encoder) -> list[nn.Module]:
    """All but the first, which has the table of relative positions that T5 reads before it calls a block."""
    return list(t5.encoder.block[1:])


# ------------------------------------------------------------------------------------------- counting bytes

class Meter(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, not counting those of `known`."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = n = t.untyped_storage().nbytes()
                self.now += n
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.died, key)
        return out

    def died(self, key):
        self.now -= self.alive.pop(key)


class FusedAttention(TorchFunctionMode):
    """Makes attention's output without its inner steps, as a fused kernel does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def count_work(module, call, *shapes) -> int:
    """Bytes that call(*tensors) needs beside the weights of `module`, counted on meta. shapes: (shape, dtype)
    of each tensor."""
    meter = Meter(tensors_of(module))
    with torch.no_grad(), torch.device("meta"):
        with FusedAttention(), meter:
            call(*(torch.empty(shape, dtype=dtype) for shape, dtype in shapes))
    return meter.peak


def need(configs, **how) -> dict:
    """Bytes that drawing takes, from shapes alone.

    configs: of the parts, {"mmdit": MMDiTConfig, "vae": ..., "clip_l": ...}; encoders may be missing.
    how: as in `counted`, which counts each case once.
    -> "parameters", "weights" and "work" by part; "peak" by offload mode: what the card must have; "locked":
    the main memory that "block" takes beyond the weights.
    """
    return counted(tuple(configs.items()), **how)


@functools.cache
def counted(configs, *, height, width, t5_length=77, guidance=True, dtype=torch.bfloat16, text_dtype=None,
            int8=False, pictures=1) -> dict:
    """height, width: of `pictures` at once, in pixels; t5_length: of the prompt, in tokens; text_dtype: the
    encoders', if not the one that follows from dtype."""
    configs = dict(configs)
    dtypes = {"mmdit": dtype, "vae": torch.float32, **dict.fromkeys(ENCODERS, of_encoders(dtype, text_dtype))}
    with torch.device("meta"):
        parts = {name: PARTS[name][0](config).to(dtypes[name]) for name, config in configs.items()}
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    mmdit, c, f = parts["mmdit"], configs["mmdit"], configs["vae"].factor
    if int8:
        quantise_mmdit(mmdit)
        if "t5" in parts:
            quantise_t5(parts["t5"])
    size = {name: sum(t.nbytes for t in tensors_of(part)) for name, part in parts.items()}
    blocks = [sum(t.nbytes for t in tensors_of(block)) for block in mmdit.joint_blocks]
    locked = sum((1 << (n - 1).bit_length()) - n for n in blocks)           # PyTorch locks powers of two

    at_once = dict(size)                                        # of the encoders: T5's blocks come singly
    if "t5" in parts:
        later = [sum(t.nbytes for t in tensors_of(block)) for block in later_blocks(parts["t5"])]
        at_once["t5"] -= sum(later) - max(later, default=0)

    texts, h, w, length = 1 + bool(guidance), height // f, width // f, t5_length
    B = texts * pictures
    tokens = length + next((configs[k].context_length for k in ("clip_l", "clip_g") if k in configs), 77)
    inputs = [((B, c.in_channels, h, w), torch.float32), ((B,), torch.float32),
              ((B, tokens, c.context_dim), dtype), ((B, c.pooled_dim), dtype)]
    mmdit.joint_blocks = nn.ModuleList([mmdit.joint_blocks[0], mmdit.joint_blocks[-1]])     # all are alike
    work = dict.fromkeys(parts, 0)                              # the CLIPs' is below 20 MB
    work["mmdit"] = count_work(mmdit, mmdit, *inputs)
    vae, latent = parts["vae"], ((pictures, c.in_channels, h, w), torch.float32)
    work["vae"] = max(count_work(vae, vae.decode, latent),
                      count_work(vae, vae.encode, ((1, 3, f * h, f * w), torch.float32)))
    if "t5" in parts and length:
        parts["t5"].encoder.block = parts["t5"].encoder.block[:1]
        work["t5"] = count_work(parts["t5"], parts["t5"], ((texts, length), torch.long))
    others = [at_once[k] + work[k] for k in parts if k != "mmdit"]
    come = [at_once[k] * (k in ENCODERS) + work[k] for k in parts]
    peak = {"none": sum(size.values()) + max(work.values()),
            "text": size["mmdit"] + size["vae"] + max(come),
            "model": max(*others, size["mmdit"] + work["mmdit"]),
            "block": max(*others, size["mmdit"] - sum(blocks) + 2 * max(blocks) + work["mmdit"])}
    return {"parameters": count, "weights": size, "work": work,
            "peak": {mode: n + OVERHEAD for mode, n in peak.items()}, "locked": locked}


def of_encoders(dtype, text_dtype=None) -> torch.dtype:
    """text_dtype, or else the transformer's; but in float16 T5 overflows."""
    return text_dtype or (torch.bfloat16 if dtype == torch.float16 else dtype)


def report(name, configs, free=None, **how) -> str:
    """What `sample.py --dry-run` prints. how: as in need, but no int8; free: bytes on this machine's card."""
    plain, small = need(configs, **how), need(configs, **how, int8=True)
    several = f"{how['pictures']} at once, " if how.get("pictures", 1) > 1 else ""
    text = of_encoders(how["dtype"], how.get("text_dtype"))
    others = f"encoders {short(text)}, " * (text != how["dtype"]) + "the autoencoder float32"
    lines = [f"{name}, {how['height']} x {how['width']} pixels, {several}{short(how['dtype'])}, {others}; "
             "GB are 10^9 bytes",
             f"{'':8s}{'parameters':>15s}{'weights':>11s}{'with --int8':>13s}{'beside them':>13s}"]
    for part, n in plain["parameters"].items():
        numbers = (plain["weights"][part], small["weights"][part], plain["work"][part])
        lines.append(f"{part:8s}{n:15,}"
                     + "".join(f"{x / GB:{w}.2f} GB" for x, w in zip(numbers, (8, 10, 10))))
    lines += ["", f"most on the card at once, with {OVERHEAD / GB:.1f} GB for CUDA and its libraries:",
              f"{'':23s}" + "".join(f"{'--offload ' + mode:>17s}" for mode in MODES)]
    for flag, needs in (("", plain), ("--int8", small)):
        lines.append(f"{flag:23s}" + "".join(f"{needs['peak'][mode] / GB:14.2f} GB" for mode in MODES))
    lines += ["", "in main memory:        " + "".join(f"{'--offload ' + mode:>17s}" for mode in MODES[1:])]
    for flag, needs in (("", plain), ("--int8", small)):
        lines.append(f"{flag:23s}" + "".join(f"{waiting(needs, mode) / GB:14.2f} GB" for mode in MODES[1:]))
    if free is not None:
        lines.append(f"free on this card: {free / GB:.2f} GB")
    return "\n".join(lines)


def waiting(needs, mode) -> int:
    """Bytes of main memory that a mode takes, of what `need` found."""
    there = sum(n for part, n in needs["weights"].items() if mode != "text" or part in ENCODERS)
    return there + needs["locked"] * (mode == "block")


def choose(mode, name, configs, free, int8=False, **how) -> str:
    """One of MODES: `mode` itself, or for "auto" the fastest that fits into `free` bytes of the card.
    ValueError if it does not fit; the message says what would."""
    check_mode(mode, ("auto", *MODES))
    peak = need(configs, **how, int8=int8)["peak"]
    fitting = [m for m in MODES if peak[m] <= free and mode in ("auto", m)]
    if fitting:
        return fitting[0]
    tried = "block" if mode == "auto" else mode

    ways = [f"--offload block makes it {peak['block'] / GB:.1f} GB"] * (peak["block"] < peak[tried])
    flags = ["--int8"] * (not int8) + ["--drop-t5"] * ("t5" in configs)
    ways += cheaper(flags, peak[tried], lambda flags: with_flags(flags, configs, int8, how)["peak"][tried])
    raise ValueError(f"{name} needs {peak[tried] / GB:.1f} GB on the card for {how['height']} x "
                     f"{how['width']} pixels with --offload {tried}, and {free / GB:.1f} GB are free: "
                     + ", ".join(ways + ["a smaller --height and --width need less"]))


def check_main_memory(name, configs, free, int8=False, works=False, mode="model", **how) -> None:
    """ValueError if the parts that wait there need more than `free` bytes (None: unknown) of main memory; the
    message says what needs less. works: without a card all of them are there, in any mode, and compute."""
    def most(flags):
        n = with_flags(flags, configs, int8, how)
        return waiting(n, "model" if works else mode) + works * max(n["work"].values())

    if free is None or (taken := most([])) <= free:
        return
    own = how.get("text_dtype")             # given for a run, whose --dtype is that of autocast
    flags = (["--dtype bfloat16"] * (how["dtype"] == torch.float32 and not own) + ["--int8"] * (not int8)
             + ["--drop-t5"] * ("t5" in configs))
    raise ValueError(f"{name} needs {taken / GB:.1f} GB of main memory in {short(how['dtype'])}, and "
                     f"{free / GB:.1f} GB are free: "
                     + ", ".join(cheaper(flags, taken, most) + ["end other programs"]))


def with_flags(flags, configs, int8, how) -> dict:
    """What `need` says with these flags of sample.py added."""
    if "--drop-t5" in flags:
        configs = {part: c for part, c in configs.items() if part != "t5"}
    if "--dtype bfloat16" in flags:
        how = how | {"dtype": torch.bfloat16}
    return need(configs, **how, int8=int8 or "--int8" in flags)


def cheaper(flags, taken, measure) -> list[str]:
    """Which of the flags, alone or all together, need less than `taken` bytes, and how much."""
    options = [[flag] for flag in flags] + [flags] * (len(flags) > 1)
    return [f"{' '.join(option)} makes it {n / GB:.1f} GB"
            for option in options if (n := measure(option)) < taken]


def is_out_of_memory(e: RuntimeError) -> bool:
    """CUDA has an exception for it; Metal, main memory and page locking only say so in the message."""
    return isinstance(e, torch.OutOfMemoryError) or bool(
        re.search("out of memory|not enough memory|allocate memory|Invalid buffer size", str(e)))


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------- demo

PRESETS = ("sd3-medium", "sd3.5-medium", "sd3.5-large")


def preset_configs(name) -> dict:
    """The five parts of a published model."""
    if name not in PRESETS:
        raise ValueError(f"no published model {name!r}: choose from {', '.join(PRESETS)}")
    return {"mmdit": MMDiTConfig.preset(name), "vae": VAEConfig.preset("sd3"),
            "clip_l": CLIPTextConfig.preset("clip_l"), "clip_g": CLIPTextConfig.preset("clip_g"),
            "t5": T5Config.preset("xxl")}


def demo() -> None:
    print(report("sd3.5-large", preset_configs("sd3.5-large"), height=1024, width=1024, dtype=torch.bfloat16))
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig.preset("tiny")).requires_grad_(False)
    nn.init.normal_(model.final_layer.linear.weight)
    x = (torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 12, 192), torch.randn(2, 160))
    here, stream = model(*x), BlockStream(model.joint_blocks, "cpu")
    with stream, visiting(model, "cpu", but=stream.blocks):
        assert torch.equal(model(*x), here) and torch.equal(model(*x), here)
    print("a transformer whose blocks come one by one gives the same result, bit by bit")


# Exercises. (1) In need, leave attention unfused: how much do the L x L scores of a 1024 x 1024 picture take?
# (2) A card reads 25 GB a second from main memory and computes 10^14 products a second: from how many tokens
# on does "block" cost no time?

if __name__ == "__main__":
    demo()
