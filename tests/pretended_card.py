"""A CUDA card that is none: tensors stay in main memory, a ledger says which of them count as on the card.

Without a GPU nobody notices a tensor that was left behind on the CPU: there everything meets everything.
After `install()` the same code, asked for the device "cuda", fails where it would fail on a card: where
tensors of both devices meet in an operation, where NumPy is given one of the card's, where a generator of the
CPU is to draw there; and where float64 is asked of it, as on Apple's. What a card computes, how fast and in
how much memory, this does not tell; streams and events do nothing.

    a request     torch.zeros(3, device="cuda"), x.to("cuda")     Requests: made on the CPU, entered
    an operation  x + y                                           Ledger: all in one place? So is the result

Scalars of the CPU may meet the card's tensors, as with CUDA, and indices may be on either. The patches are
many and last as long as the process: give it one of its own.
"""
import contextlib
import types
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
device_of, Tensor = torch._C.TensorBase.device, torch.Tensor
Generator, autocast = torch.Generator, torch.autocast
entered, generators = set(), []             # storages by address; generators of the card
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def real(t) -> torch.device:
    with torch._C.DisableTorchFunction():
        return device_of.__get__(t)


def address(t) -> int:
    with torch._C.DisableTorchFunction():
        return t.untyped_storage()._cdata


def on_card(t) -> bool:
    return real(t) == CPU and address(t) in entered


def enter(t):
    """Count a tensor's memory as the card's, as long as it lives."""
    if isinstance(t, Tensor) and real(t) == CPU and address(t) not in entered:
        if t.dtype == torch.float64:
            raise TypeError("float64 is on the card, and Apple's have none")
        entered.add(address(t))
        weakref.finalize(t.untyped_storage(), entered.discard, address(t))
    return t


def tensors(given) -> list:
    """Those among arguments or results, and in lists of them."""
    return [t for x in given for t in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(t, Tensor)]


class Back(torch.autograd.Function):
    """A copy on the CPU; its gradient comes to the card."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty(x.shape, dtype=x.dtype).copy_(x)

    @staticmethod
    def backward(ctx, grad):
        return enter(grad.clone())


class Ledger(TorchDispatchMode):
    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors([*args, *kwargs.values()])
        name, card = operation._schema.name, [t for t in given if on_card(t)]
        if card and name not in CROSSING:
            met = given[:1] if name in INDEXED else given
            if wrong := [t for t in met if t.ndim and t.numel() and real(t) == CPU and not on_card(t)]:
                raise RuntimeError(f"{operation}: {len(card)} tensors are on the card, and on the CPU "
                                   f"{[tuple(t.shape) for t in wrong]}")
        out = operation(*args, **kwargs)
        if card and name not in ("aten::copy_", "aten::_foreach_copy_"):
            for t in tensors([out]):
                if not any(t is x for x in given):
                    enter(t)
        return out


class Requests(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.to:
            return self.moved(*args, **kwargs)
        if function is Tensor.cpu:
            return Back.apply(args[0]) if on_card(args[0]) else args[0]
        if function is Tensor.numpy and on_card(args[0]):
            raise TypeError("a tensor of the card has no NumPy array: .cpu() first")
        kwargs.pop("pin_memory", None)
        target = kwargs.get("device")
        if function is Tensor.new_tensor and target is None:
            target = args[0].device
        card = target is not None and torch.device(target).type == "cuda"
        if card:
            kwargs["device"] = CPU
            if not any(kwargs.get("generator") is g for g in (None, *generators)):
                raise RuntimeError("a generator of the CPU cannot draw on the card")
        out = function(*args, **kwargs)
        if card:
            for t in tensors([out]):
                enter(t)
        return out

    def moved(self, x, *where, **how):
        how |= zip(("dtype", "non_blocking", "copy") if len(where) > 1 else (), where[1:])
        if where:
            how["dtype" if isinstance(where[0], torch.dtype) else "device"] = where[0]
        target = how.pop("device", None)
        target = x.device if target is None else torch.device(getattr(target, "device", target))
        how = {k: v for k, v in how.items() if v is not None}
        if "meta" in (target.type, real(x).type):
            return Tensor.to(x, device=target, **how)
        y = Tensor.to(x, **how) if how else x
        if on_card(y) == (target.type == "cuda"):
            return y
        return enter(y.clone()) if target.type == "cuda" else Back.apply(y)


class Nothing:
    """Streams and events."""

    def __init__(self, *args, **how):
        pass

    def __getattr__(self, name):
        return lambda *args, **how: None


class CardsGenerator(type):
    def __call__(cls, device="cpu"):
        g = Generator("cpu")
        generators.extend([g] * (torch.device(device).type == "cuda"))
        return g

    def __instancecheck__(cls, other):
        return isinstance(other, Generator)


class Autocast(autocast):
    def __init__(self, device_type, *args, **how):
        super().__init__("cpu", *args, **how)


def limit(fraction, device=0):
    """In place of set_per_process_memory_fraction, which takes no "cuda" without a number."""
    if not 0 < fraction <= 1 or str(device) == "cuda":
        raise ValueError(f"{fraction} of {device} is no limit")


def install(free=80 * 10**9):
    """From here on the process has a card with so many free bytes."""
    for kind in (Tensor, torch.nn.Parameter):
        kind.device = property(lambda t: CARD if on_card(t) else real(t))
        kind.is_cuda = property(on_card)
    torch.Generator = CardsGenerator("Generator", (), {})
    torch.autocast = torch.amp.autocast_mode.autocast = Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, lambda device="cpu", ask=getattr(torch, name): ask("cpu"))
    about = types.SimpleNamespace(name="a pretended card", major=9, minor=0, total_memory=free)
    nothing = contextlib.nullcontext()
    answers = dict(
        is_available=True, device_count=1, current_device=0, set_device=None, is_bf16_supported=True,
        synchronize=None, mem_get_info=(free, free), memory_reserved=0, memory_allocated=0,
        max_memory_allocated=0, max_memory_reserved=0, reset_peak_memory_stats=None,
        get_device_name=about.name, get_device_capability=(9, 0), get_device_properties=about,
        current_stream=Nothing(), stream=nothing, device=nothing, is_current_stream_capturing=False)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **how: answer)
    torch.cuda.set_per_process_memory_fraction = limit
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.accelerator.current_stream = torch.cuda.current_stream      # torch 2.15's optimizers ask there
    Requests().__enter__()
    Ledger().__enter__()
