"""Muon: how do the matrices of a transformer learn faster than with AdamW?

A file of its own, since no other question here is about an optimizer; train.py uses it for
the matrices of the transformer's blocks, and AdamW for everything else.

A gradient of a weight matrix is dominated by a few directions, and AdamW, which scales number by number,
moves along those. Muon replaces the (averaged) gradient by the nearest orthogonal matrix, so that all of its
directions are learnt at one pace (Jordan and others 2024, kellerjordan.github.io/posts/muon):

    B <- m B + (1 - m) G                                the average of the gradients G
    U S V^T = (1 - m) G + m B                           Nesterov's look ahead; its singular values S ...
    W <- (1 - rate * decay) W                           ... are all replaced by about 1
         - rate * sqrt(max(1, rows / columns)) U V^T

U V^T comes without an SVD: the polynomial a X + b (X X^T) X + c (X X^T)^2 X keeps the singular vectors of X
and maps each singular value s to a s + b s^3 + c s^5, which a few applications drive towards 1 from anywhere
above about 0.003. They are matrix products only, and exact enough in bfloat16. On a processor without it they
take more than twice as long as in float32: nearly half of a step of the miniature.

What to know
- An attention's packed qkv is three matrices, each of which is made orthogonal by itself.
- Matrices of one shape go through the products as one batch.
- Where matrices are sharded among processes (parallel.py), each makes its share of the matrices orthogonal.
- Only matrices between hidden activations belong here. Embedders, modulations, the final layer, biases and
  norms are AdamW's.
- torch.optim.Muon (torch 2.9 and later) is the same rule for unpacked matrices, one at a time.

DIFFERS: the paper trains with AdamW throughout; --muon-rate 0 does so here.

Run `python muon.py`: both learn a matrix from inputs that are 100 times weaker in some directions.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # steepest at 0 of those that stay within about [0.7, 1.2]


def orthogonalize(x: torch.Tensor, dtype: torch.dtype, rounds: int = 5) -> torch.Tensor:
    """x (n, rows, columns), rows <= columns -> about U V^T of each U S V^T, in dtype: singular values
    above 0.003 of the matrix's norm become 0.68 to 1.20, smaller ones grow at most 485-fold."""
    a, b, c = COEFFICIENTS
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)           # singular values at most 1
    for _ in range(rounds):
        s = x @ x.mT                                                        # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """params: matrices (packed * rows, columns), in groups that may set `packed`, the number of matrices
    stacked in each (3 in a qkv).

    lr: the size of a step in singular values. 0.02 moves the entries of a 192 x 192 matrix by
    0.02 / sqrt(192) = 1.4e-3, about as AdamW does at a rate of 1.4e-3.
    dtype: of the products; bfloat16 or float32, whichever is faster.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, packed=1))
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2 or p.shape[0] % group["packed"]:
                    raise ValueError(f"Muon is for matrices, {group['packed']} in each: not for "
                                     f"{tuple(p.shape)}")

    @torch.no_grad()
    def step(self):
        """As with torch's fused optimizers, a tensor `found_inf` above 0 makes this a step that changes
        nothing, without waiting for its value from a GPU."""
        bad = getattr(self, "found_inf", torch.zeros(())) > 0
        found = []                              # (parameter, its group, this rank's rows of the look ahead)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, m = self.state[p], group["momentum"]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = local(state["momentum"])
                grad = torch.where(bad, average, local(p.grad))             # if bad, the average stays
                average.lerp_(grad, 1 - m)
                found.append((p, group, grad.lerp(average, m)))
        cut_up = any(hasattr(p, "to_local") for p, *_ in found)
        for p, group, piece in (taken_apart if cut_up else at_once)(found, self.dtype):
            rows, columns = p.shape[0] // group["packed"], p.shape[1]
            rate, mine = torch.where(bad, 0.0, group["lr"]), local(p)
            mine.mul_(1 - rate * group["weight_decay"])
            mine.sub_(piece * (rate * max(1, rows / columns) ** 0.5))


def at_once(found, dtype):
    """[(parameter, group, whole matrix)] -> the same with U V^T; matrices of one shape as one batch."""
    shapes = {}                                 # (rows, columns) -> what is orthogonalized together
    for p, group, x in found:
        x = x.view(group["packed"], -1, p.shape[1])
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        shapes.setdefault(x.shape[1:], []).append((p, group, tall, x))
    for entries in shapes.values():
        together = orthogonalize(torch.cat([x for *_, x in entries]), dtype)
        pieces = together.split([len(x) for *_, x in entries])
        for (p, group, tall, _), piece in zip(entries, pieces):
            yield p, group, (piece.mT if tall else piece).reshape(p.shape)


def taken_apart(found, dtype):
    """[(parameter, group, this rank's rows)] -> the same with these rows of U V^T.

    Of N matrices of one shape each of the N ranks receives one whole, and sends every rank its rows back:
    nothing is computed twice, and a rank has one matrix in memory beside its shards."""
    shapes = {}
    for p, group, x in found:
        shapes.setdefault(p.shape, []).append((p, group, x))
    for (total, columns), entries in shapes.items():
        mesh = entries[0][0].device_mesh
        N, ranks = mesh.size(), mesh.get_group()
        rows = -(-total // N)                   # a rank's; the last have fewer, and pad them with zeros
        for lot in (entries[i:i + N] for i in range(0, len(entries), N)):
            out = lot[0][2].new_zeros(N, rows, columns)                     # one for each rank
            for k, (*_, x) in enumerate(lot):
                out[k, :len(x)] = x
            mine = torch.empty_like(out)                                    # each rank's rows of my matrix
            dist.all_to_all_single(mine, out, group=ranks)
            p, group, _ = lot[min(mesh.get_local_rank(), len(lot) - 1)]     # a rank without one has zeros
            [(*_, piece)] = at_once([(p, group, mine.view(-1, columns)[:total])], dtype)
            out = F.pad(piece, (0, 0, 0, N * rows - total)).contiguous().view(torch.half)
            mine = torch.empty_like(out)        # bits only move; gloo knew float16 long before bfloat16
            dist.all_to_all_single(mine, out, group=ranks)
            for (p, group, x), piece in zip(lot, mine.view(piece.dtype).view(N, rows, columns)):
                yield p, group, piece[:len(x)]


def split(model: torch.nn.Module) -> tuple[list[dict], list[torch.nn.Parameter]]:
    """(Muon's groups, what is left for AdamW): Muon gets the matrices of an MMDiT's attentions and MLPs."""
    packed, rest = {1: [], 3: []}, []
    for name, p in model.named_parameters():
        if p.ndim == 2 and any(layer in name for layer in (".attn", ".mlp.fc")):
            packed[3 if ".qkv." in name else 1].append(p)
        else:
            rest.append(p)
    return [{"params": params, "packed": n} for n, params in packed.items() if params], rest


def demo() -> None:
    """A matrix learnt from inputs of which some directions are 100 times weaker: what is left to learn?"""
    torch.manual_seed(0)
    D, steps = 32, 300
    scale, basis = torch.logspace(0, -2, D), torch.linalg.qr(torch.randn(D, D))[0]
    wanted, errors = torch.randn(D, D), {}
    # each at the best of the rates tried, 0.03 to 8 and 0.05 to 0.8
    for name, optimizer, rate in (("AdamW", torch.optim.AdamW, 1.0), ("Muon", Muon, 0.2)):
        weight = torch.nn.Parameter(torch.zeros(D, D))
        optimizer = optimizer([weight], lr=rate, weight_decay=0)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - i / steps)
            x = (torch.randn(256, D) * scale) @ basis.T                     # (256, D)
            loss = (x @ (weight - wanted).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left = ((weight - wanted) @ basis).norm(dim=0) / (wanted @ basis).norm(dim=0)   # (D,) by direction
        errors[name] = left.detach()
        print(f"{name:5s} share left to learn: strongest quarter {left[:8].mean():.3f}, "
              f"middle {left[8:24].mean():.3f}, weakest quarter {left[-8:].mean():.3f}")
    assert errors["Muon"].max() < 0.1 < errors["AdamW"].max()


if __name__ == "__main__":
    demo()
