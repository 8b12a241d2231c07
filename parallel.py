"""How does one loop run on many processes, and learn what one process would have learned?

A file of its own, since no other file is about processes: training asks it for a rank's rows
of a batch, for sums over all ranks and for agreement among them. The work is PyTorch's (DDP, FSDP2, NCCL).

    torchrun --nproc-per-node N train.py ...         starts N processes; each runs train.py from top to end

    of a step     rank 0                rank 1
    draws         of the whole batch    of the whole batch     from (seed, stage, step): the same everywhere,
                                                               but noise of latents for a rank's rows alone
    rows          the first half        the second half        Ranks.rows
    loss          its part              its part               parts add up to the batch's loss: Ranks.add
    gradients     ------- added up over ranks in the backward pass -------                     by DDP or FSDP2
    verdict       the same on all: from the same loss and norm watch.judge
    wishes        stop? hopeless?  one rank's are all ranks'   Ranks.most

    DDP     each rank holds all weights, moments and averages     while they fit on one card
    FSDP2   each rank holds 1/N of every tensor; a block's        --fsdp, for the transformer, whose other
            weights are together only while it computes           parts are small

Nor is the whole transformer ever in one rank's main memory at its start: it is built without its tensors
(Later), cut up, and then each tensor is made in turn, of which a rank keeps its rows (shard).

What to know
- One process without torchrun needs none of this: Ranks() answers for itself, and nothing communicates.
- DDP and FSDP2 average gradients over ranks, and here they must be added: so each loss is multiplied by N.
- What a row draws must not depend on N. So most draws are made for the whole batch on every rank; the noise
  of latents, which would cost seconds in a batch of thousands, has a generator a row (stages.flow_stage).
- With --accumulate K a rank's rows go through the model in K pieces. Under DDP only the last communicates.
  Under FSDP2 each does: kept back, a rank's gradients would be as large as the whole model again.
- Only rank 0 prints and writes, but each rank writes shards of checkpoints (checkpoints.py) and files of
  caches (prepare.py): all ranks need the same folders, on one machine or a file system that they share.
- A rank that ends takes the others with it: gloo's and NCCL's calls fail, or torchrun ends them. --resume
  goes on, with any number of ranks; torchrun --max-restarts K does so by itself if its line has --resume.

Run `python parallel.py`: two processes and one compute the same gradient.
"""
import atexit
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def local(x: torch.Tensor) -> torch.Tensor:
    """What this rank holds of x: its shard, where FSDP2 has cut it up."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of x. Where it is cut up every rank must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# A rank may encode for hours while the others wait, or a disk may stall: one that has died is noticed by
# torchrun, not by a timeout, and a group that has once timed out is of no more use.
PATIENCE = timedelta(hours=12)


class Elsewhere(OSError):
    """An error on another rank, which reports it."""


class Ranks:
    """This process among all of them; rank 0 of 1 if there is no other."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.saving = None                                      # for the thread that saves
        if world > 1:
            self.saving = dist.new_group(backend="gloo", timeout=PATIENCE)

    def rows(self, batch: int, piece: int = 0, pieces: int = 1) -> slice:
        """The rows of a batch that this rank computes, or one piece of them. ValueError for a remainder."""
        if batch % (self.world * pieces):
            near = max(1, round(batch / (self.world * pieces))) * self.world * pieces
            parts = f"among {self.world} ranks" if self.world > 1 else ""
            parts += " and " * bool(parts and pieces > 1) + f"into {pieces} pieces" * (pieces > 1)
            raise ValueError(f"a batch of {batch} does not divide {parts}: try {near}")
        size, k = batch // (self.world * pieces), self.rank * pieces + piece
        return slice(k * size, (k + 1) * size)

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def most(self, *numbers: int) -> list[int]:
        """The largest first number of all ranks, the largest second, and so on. It waits for no GPU."""
        found = torch.tensor(numbers)
        if self.world > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def same(self, value):
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_word(self, text: str) -> str:
        """The text of the first rank that has one."""
        return next(filter(None, self.told(text)), "")

    def told(self, value, group=None) -> list:
        """All ranks' values. group: `saving`, in the thread that saves."""
        values = [value]
        if self.world > 1:
            dist.all_gather_object(values := [None] * self.world, value, group=group)
        return values

    def together(self, action):
        """action() on every rank. If it fails on one it fails on all (OSError, or what rank 0 raised), and
        rank 0 alone says why."""
        result = error = None
        try:
            result = action()
        except (ValueError, OSError) as e:
            error = e
        reason = self.first_word("" if error is None else str(error) or repr(error))
        if reason and self.world > 1:
            if self.rank:
                raise Elsewhere(reason)
            raise error or OSError(reason)
        if error:
            raise error
        return result

    def alone(self, action):
        """action() on rank 0, for which the others wait; they get None. If it fails, see together."""
        return self.together(action if self.rank == 0 else lambda: None)

    def once(self, action):
        """action() on rank 0, then on the others, which find what rank 0 has written."""
        result = self.alone(action)
        return result if self.rank == 0 else action()

    def collect(self, tensors: dict) -> dict:
        """The whole of each tensor, in rank 0's main memory; the others send it their shards and get {}."""
        found = {}
        for name, x in tensors.items():             # one at a time: all together may not fit on a GPU
            x = whole(x.detach())
            if self.rank == 0:
                found[name] = x.cpu()
        return found

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(b, ...) of each rank -> (N b, ...) of all; gradients find their way back through it."""
        return Gather.apply(x, self) if self.world > 1 else x


class Gather(torch.autograd.Function):
    """Forward: all ranks' rows. Backward: the sum of all ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks, ctx.size = ranks, len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks.add(grad.contiguous().clone()).split(ctx.size)[ctx.ranks.rank], None


# ------------------------------------------------------------------------------------------- start and end

def launched() -> tuple[int, int, int]:
    """(rank, world, rank on this machine), as torchrun says, or else (0, 1, 0)."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def launcher() -> str:
    """The command that started this process, for advice in messages."""
    many = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 'N')}"
    return many if launched()[1] > 1 else "python"


def own_device(device: str) -> str:
    """`device`, or this rank's own card where any card would do."""
    _, world, place = launched()
    own = world > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{place}" if own else device


@contextmanager
def processes(device: str):
    """This process's Ranks, connected while inside. Ranks above 0 print nothing but their own errors."""
    rank, world, _ = launched()
    if world == 1:
        yield Ranks()
        return
    device = own_device(device)
    if cuda := device.startswith("cuda"):
        torch.cuda.set_device(device)
    # gloo beside NCCL, for numbers on the CPU
    from torch.distributed.rendezvous import rendezvous         # not in every PyTorch
    store, *_ = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == f"{world}":        # one machine: torchrun starts all again
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # with a store full of old addresses
        store = dist.PrefixStore(attempt, store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                            rank=rank, world_size=world, timeout=PATIENCE)
    together = False
    try:
        with (open(os.devnull, "w", encoding="utf-8") as nowhere,
              redirect_stdout(nowhere) if rank else nullcontext()):
            yield Ranks(rank, world)
        together = True
    except (ValueError, OSError, FloatingPointError) as e:
        if rank == 0:
            raise
        if not isinstance(e, (Elsewhere, FloatingPointError)):      # rank 0 has the same numbers, and says so
            print(f"train.py: rank {rank}: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e).lower()):
            raise
        raise OSError(f"rank {rank} has lost another rank, whose own last message says why; what was saved "
                      "is still there: repeat the torchrun command with --resume") from None
    finally:
        if together or not cuda:
            if torch.__version__ < (2, 8):      # waits for threads that wait for the GIL (PyTorch #154976)
                time.sleep(1)
            dist.destroy_process_group()
        else:                                   # NCCL's waits for all ranks (PyTorch #141510), and others do
            atexit.register(end_at_once)        # not come before they learn of a failure, by this one's end


def end_at_once() -> None:
    """End this process without what C++ does at the end of one: NCCL may wait there for other ranks."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(2)


# ---------------------------------------------------------------------------------------------- the model

class Whole(nn.Module):
    """A stage's loss as the forward pass of a module that owns what is trained: that is what DDP asks for."""

    def __init__(self, model: nn.Module, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args):
        return self.loss(*args)


def add_gradients(model: nn.Module, loss, ranks: Ranks):
    """`loss` in a form whose backward pass gives model's parameters the mean of all ranks' gradients; and
    pause(), inside which gradients stay each rank's own."""
    if ranks.world == 1 or sharded(model):
        return loss, nullcontext
    # DDP would wait in vain for a parameter that never gets a gradient, and looking for such parameters after
    # each step costs time: what is never used has requires_grad off (stages.flow_stage).
    with warnings.catch_warnings():             # broadcast_buffers has another name since torch 2.13
        warnings.simplefilter("ignore", FutureWarning)
        joined = nn.parallel.DistributedDataParallel(Whole(model, loss), broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)
    return joined, joined.no_sync


def sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "to_local") for p in model.parameters())


class Later(TorchDispatchMode):
    """Inside, what torch.empty makes takes no memory, and what fills it is noted: maker(x)() makes all of x.

    Random numbers are drawn right away all the same, so that whatever is built next is what it would have
    been; later they are drawn again. For modules' initial values: other changes to such tensors are refused.
    """

    def __init__(self):
        super().__init__()
        self.notes = {}                             # storage -> (tensor, how its contents are made)
        self.space = torch.empty(0)                 # for one tensor; a new one each time fragments memory

    def note(self, x: torch.Tensor, how) -> None:
        """how() makes all of x, in main memory; the next tensor made may overwrite it."""
        self.notes[x.untyped_storage()._cdata] = x, how         # x: so that its address is not reused

    def maker(self, x: torch.Tensor):
        return self.notes[x.untyped_storage()._cdata][1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, x = kwargs or {}, args[0] if args else None
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **kwargs | {"device": torch.device("meta")})
        if not (isinstance(x, torch.Tensor) and x.is_meta and func._schema.is_mutable):
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default and x.shape == args[1].shape:
            source = args[1]                                    # one in a file is read when it is touched
            self.note(x, self.maker(source) if source.is_meta else lambda: source)
        elif (func.overloadpacket.__name__ in ("uniform_", "normal_", "fill_", "zero_")
              and x.nbytes == x.untyped_storage().nbytes()):
            self.note(x, partial(self.again, func, x, args[1:], kwargs, torch.get_rng_state()))
            func(self.room(x), *args[1:], **kwargs)
        else:
            raise NotImplementedError(f"{func} cannot be done later")
        return x

    def room(self, x: torch.Tensor) -> torch.Tensor:
        if self.space.numel() < x.numel() or self.space.dtype != x.dtype:
            self.space = torch.empty(x.numel(), dtype=x.dtype)
        return self.space[:x.numel()].view(x.shape)

    def again(self, func, x, args, kwargs, random_numbers) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_numbers)
            return func(self.room(x), *args, **kwargs)


def rows_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of a whole x that this rank holds of `like`, which is cut up."""
    mesh = like.device_mesh
    rank, parts = mesh.get_local_rank(), x.chunk(mesh.size())   # as FSDP2 does; some may get no rows
    return parts[rank] if rank < len(parts) else x[:0]


def shard(model, dtype: torch.dtype, device: torch.device, later: Later) -> None:
    """Cut up an MMDiT's tensors among all ranks, in place, and make those that were put off, on `device`. A
    block is a unit: its weights are gathered before it computes and released afterwards.

    Weights travel in `dtype`, that of matrix products; gradients are added in float32. Inputs stay as they
    are: rounded to bfloat16, a time near 1 would be off by 1/500."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    how = {name: later.maker(p) for name, p in model.named_parameters() if p.is_meta}
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.joint_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)      # now with memory
    for name, p in model.named_parameters():
        if name in how:
            local(p.data).copy_(rows_of(how[name]().view(p.shape), p))
    later.notes, later.space = {}, torch.empty(0)               # so that what it held is freed


def let_go(model: nn.Module) -> None:
    """Release the gathered weights, before the shards get new values: without a backward pass the outermost
    unit keeps them, and would use them once more."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# --------------------------------------------------------------------------------------------------- demo

def half(rank: int, world: int, port: int, queue) -> None:
    """One process of the demo: the gradient of its rows' part of a loss over eight rows."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank}",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    with processes("cpu") as ranks:
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(8, 3)
        rows = ranks.rows(len(x))

        def loss(x):                                    # every row against all, as in CLIP
            y = model(x)                                                    # (b, 2)
            return (y @ ranks.gather(y).T).square().sum() / 64

        forward, _ = add_gradients(model, loss, ranks)
        part = forward(x[rows])
        (part * world).backward()
        queue.put((rank, rows.stop - rows.start, ranks.add(part.detach()).item(), model.weight.grad.tolist()))
        ranks.most(0)                                   # no rank leaves before all have reported


def demo() -> None:
    import socket

    import torch.multiprocessing as mp

    found, context = {}, mp.get_context("spawn")
    for world in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        queue = context.Queue()
        ranks = [context.Process(target=half, args=(rank, world, port, queue)) for rank in range(world)]
        for process in ranks:
            process.start()
        for _ in ranks:
            rank, rows, loss, grad = queue.get(timeout=120)
            found[world, rank] = torch.tensor([loss, *sum(grad, [])])
            print(f"rank {rank} of {world}: {rows} rows, loss of all {loss:.6f}, "
                  f"first gradient {grad[0][0]:+.6f}")
        for process in ranks:
            process.join()
    assert all(torch.allclose(x, found[1, 0], rtol=1e-5) for x in found.values())
    assert torch.equal(found[2, 0], found[2, 1])


# Exercises. (1) Leave out `* world` in the demo: which factor is the gradient off by, and would AdamW notice?
# (2) Let Gather.backward return this rank's own gradient without the sum: which rows stop learning?

if __name__ == "__main__":
    demo()
