"""Claims about the Triton kernels: each is as exact as PyTorch in the same dtype, forward and backward, and
PyTorch knows what it is dealing with.

On a GPU they run there; elsewhere in Triton's interpreter, which computes in numpy what a GPU would compute.
That checks the arithmetic and the addresses, not what a compiler makes of them nor any speed.
The rule: largest error against float64 at most twice that of the PyTorch formulas, plus a floor.
"""
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                # read when Triton is imported, which is now
pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be checked")

from kernels import adaln, gate_residual_modulate, modulate  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of the largest value; numpy knows no bfloat16: the interpreter truncates where a GPU rounds to nearest
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3 if CUDA else 1.6e-2}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_as_exact(names, got, pytorch, exact, dtype):
    for name, a, b, c in zip(names, got, pytorch, exact, strict=True):
        assert (a is None) == (c is None), name
        if a is None or not a.numel():
            continue
        assert a.shape == c.shape and a.isfinite().all(), name
        error, theirs, size = ((x.double() - c).abs().max().item() for x in (a, b, torch.zeros_like(c)))
        assert error <= 2 * theirs + FLOOR[dtype] * size + 1e-12, \
            f"{name}: error {error:.1e}, PyTorch's {theirs:.1e}, largest value {size:.1e}"


def gradients(function, inputs, pulls):
    """Values and gradients of function(*inputs), pulled by fixed numbers; None inputs stay None."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = [out] if torch.is_tensor(out) else [o for o in out if o is not None]
    grads = torch.autograd.grad(sum((o * p.to(o)).sum() for o, p in zip(out, pulls)),
                                [x for x in leaves if x is not None], allow_unused=True)
    return out + list(grads)


def doubled(x):
    return None if x is None else x.double()


# ------------------------------------------------------------------------------------------------------ adaLN

def modulation_inputs(B, L, D, dtype, mean=0.0, seed=0):
    """x, y (B, L, D); gate, shift, scale (B, D): slices of one tensor, as a Linear leaves them"""
    g = seeded(seed)
    x, y = (mean + torch.randn(B, L, D, generator=g) for _ in range(2))
    vectors = torch.randn(B, 3 * D, generator=g)
    return [t.to(DEVICE, dtype) for t in (x, y)] + list(vectors.to(DEVICE, dtype).chunk(3, dim=-1))


def by_formula(x, shift, scale, eps=1e-6):
    """In the dtype of its arguments: float64 stays float64, unlike in the reference."""
    n = x - x.mean(-1, keepdim=True)
    n = n / (n.square().mean(-1, keepdim=True) + eps).sqrt()
    return n * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_formula(x, y, gate, shift, scale):
    h = x + gate.unsqueeze(1) * y
    return h, by_formula(h, shift, scale)


modulations = st.fixed_dictionaries({
    "B": st.integers(1, 3), "L": st.sampled_from([0, 1, 5, 17, 40]), "D": st.sampled_from([8, 33, 64, 130]),
    "dtype": st.sampled_from(DTYPES), "mean": st.sampled_from([0.0, 30.0]), "seed": st.integers(0, 99)})


@given(modulations)
def test_modulate_is_as_exact_as_pytorch_forward_and_backward(case):
    x, _, _, shift, scale = modulation_inputs(**case)
    pull = [torch.randn(x.shape, generator=seeded(1)).to(x)]
    run = [gradients(f, i, pull) for f, i in (
        (lambda *a: modulate(*a, backend="triton"), (x, shift, scale)),
        (lambda *a: modulate(*a, backend="torch"), (x, shift, scale)),
        (by_formula, (x.double(), shift.double(), scale.double())))]
    assert run[0][0].dtype == case["dtype"]
    assert_as_exact(("out", "dx", "dshift", "dscale"), *run, case["dtype"])


@given(modulations)
def test_gate_residual_modulate_is_as_exact_as_pytorch_forward_and_backward(case):
    inputs = modulation_inputs(**case)
    pulls = torch.randn(2, *inputs[0].shape, generator=seeded(1)).to(inputs[0])
    run = [gradients(f, i, pulls) for f, i in (
        (lambda *a: gate_residual_modulate(*a, backend="triton"), inputs),
        (lambda *a: gate_residual_modulate(*a, backend="torch"), inputs),
        (gated_formula, [doubled(t) for t in inputs]))]
    assert_as_exact("h out dx dy dgate dshift dscale".split(), *run, case["dtype"])


def test_the_simple_kernel_of_modulate_agrees_with_the_one_that_is_used():
    x, _, _, shift, scale = modulation_inputs(2, 9, 70, torch.float32)
    used = modulate(x, shift, scale, backend="triton")
    torch.testing.assert_close(adaln.modulate_simple(x, shift, scale), used)


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x, _, _, shift, scale = modulation_inputs(1, 4, 256, torch.float32, mean=1000.0)
    exact = by_formula(x.double(), shift.double(), scale.double())
    assert (modulate(x, shift, scale, backend="triton") - exact).abs().max() < 1e-3


def test_constant_tokens_become_the_shift_and_get_finite_gradients():
    x = torch.full((1, 3, 64), 7.0, device=DEVICE)
    one = torch.ones(1, 64, device=DEVICE)
    out, *grads = gradients(lambda *a: modulate(*a, backend="triton"), (x, one, one), [torch.ones_like(x)])
    assert torch.equal(out, torch.ones_like(out)) and all(g.isfinite().all() for g in grads)


def test_slices_of_larger_activations_are_read_in_place():
    x, y, gate, shift, scale = modulation_inputs(2, 6, 32, torch.float32)
    wide = torch.cat([x, y], dim=-1)
    views = (wide[:, 1:, :32], wide[:, 1:, 32:])
    got = gate_residual_modulate(*views, gate, shift, scale, backend="triton")
    for a, b in zip(got, gate_residual_modulate(*views, gate, shift, scale, backend="torch")):
        torch.testing.assert_close(a, b)


def test_under_autocast_the_residual_stream_stays_float32():
    x, y, gate, shift, scale = modulation_inputs(2, 5, 32, torch.float32)
    y, gate, shift, scale = (t.bfloat16() for t in (y, gate, shift, scale))     # what Linear gives there
    with torch.autocast(DEVICE, torch.bfloat16):
        got = gate_residual_modulate(x, y, gate, shift, scale, backend="triton")
        expected = gate_residual_modulate(x, y, gate, shift, scale, backend="torch")
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)      # PyTorch rounds gate * y to bfloat16
    leaves = [t.requires_grad_() for t in (x, y, gate, shift, scale)]
    grads = torch.autograd.grad(sum(gate_residual_modulate(*leaves, backend="triton")).sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def test_two_runs_give_the_same_bits():
    inputs = modulation_inputs(2, 40, 64, torch.float32)
    pulls = torch.randn(2, 2, 40, 64, generator=seeded(1)).to(DEVICE)
    first, second = (gradients(lambda *a: gate_residual_modulate(*a, backend="triton"), inputs, pulls)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ------------------------------------------------------------------------------------------- known to PyTorch

def test_pytorch_accepts_the_registration_of_the_modulations():
    x, y, gate, shift, scale = (t.detach().clone().requires_grad_()
                                for t in modulation_inputs(2, 5, 32, torch.float32))
    for op, inputs in ((adaln.modulate_op, (x, shift, scale, 1e-6)),
                       (adaln.gate_residual_modulate_op, (x, y, gate, shift, scale, 1e-6))):
        torch.library.opcheck(op, inputs)
    h, dh = torch.randn(2, 2, 5, 32, device=DEVICE)
    for op, inputs in ((adaln.modulate_backward_op, (dh, h, shift, scale, 1e-6)),
                       (adaln.gate_residual_modulate_backward_op, (dh, dh, h, y, gate, shift, scale, 1e-6))):
        torch.library.opcheck(op, inputs, test_utils="test_faketensor")
