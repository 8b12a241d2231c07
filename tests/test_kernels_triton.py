"""Claims about the Triton kernels: each is as exact as PyTorch in the same dtype, forward and backward, and
PyTorch knows what it is dealing with.

On a GPU they run there; elsewhere in Triton's interpreter, which computes in numpy what a GPU would compute.
That checks the arithmetic and the addresses, not what a compiler makes of them nor any speed.
The rule: largest error against float64 at most twice that of the PyTorch formulas, plus a floor.
"""
import contextlib
import csv
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
# with numpy 2.4 the interpreters before 3.7 cannot loop up to a number that a kernel computed
pytest.importorskip("triton", minversion="3.3" if CUDA else "3.7",
                    reason="Triton is not installed, or too old: its kernels cannot be checked")

import kernels  # noqa: E402
from kernels import adaln, bench, gate_residual_modulate, joint_attention, modulate  # noqa: E402
from kernels import joint_attention_backward, norm_layout, sweep  # noqa: E402
from kernels.joint_attention import (attend_simply, join, joint_attention_op,  # noqa: E402
                                     joint_attention_reference, joint_attention_triton)
from kernels.joint_attention_backward import joint_attention_backward_op  # noqa: E402
from kernels.norm_layout import (attend_joined, joint_attention_sdpa, norm_layout_backward_op,  # noqa: E402
                                 norm_layout_op, norm_layout_simply)
from mmdit import MMDiT, MMDiTConfig  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of the largest value; numpy knows no bfloat16: the interpreter truncates where a GPU rounds to nearest
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3 if CUDA else 1.6e-2}


@pytest.fixture(autouse=True, scope="module")
def patched_once_a_launch():
    """The interpreter exchanges the functions of triton.language at every launch, and again at every call of
    one function by another: a third of its time. Only Triton's own functions need it, each file of them once,
    since it is not taken back."""
    if CUDA:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    slow, done = InterpretedFunction.__call__, set()

    def call(self, *a, **kw):
        name = self.fn.__module__
        if name.startswith("triton") and name not in done:
            done.add(name)
            return slow(self, *a, **kw)
        return self.rewrite()(*a, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


def thorough():
    return settings.get_current_profile_name() == "thorough"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_as_exact(names, got, pytorch, exact, dtype, floor=None):
    """The largest value is that of all queries' and keys' gradients together: where few keys share a softmax,
    one of them can be a difference of two nearly equal numbers."""
    sizes = {n: 0 if c is None or not c.numel() else c.abs().max().item() for n, c in zip(names, exact)}
    products = max([size for n, size in sizes.items() if n[:3] in ("dq_", "dk_")], default=0)
    for name, a, b, c in zip(names, got, pytorch, exact, strict=True):
        assert (a is None) == (c is None), name
        if a is None or not a.numel():
            continue
        assert a.shape == c.shape and a.isfinite().all(), name
        error, theirs = ((x.double() - c).abs().max().item() for x in (a, b))
        size = products if name[:3] in ("dq_", "dk_") else sizes[name]
        assert error <= 2 * theirs + (floor or FLOOR[dtype]) * size + 1e-12, \
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
    "B": st.integers(1, 2), "L": st.sampled_from([0, 1, 5, 17]), "D": st.sampled_from([8, 33, 64, 130]),
    "dtype": st.sampled_from(DTYPES), "mean": st.sampled_from([0.0, 30.0]), "seed": st.integers(0, 99)})


@contextlib.contextmanager
def chunks_of(tokens):
    """Inside, the backward adds up this many tokens at a time: shapes that take more than one are large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaln, "chunk_of", lambda B, L: tokens)
        yield


@given(modulations, st.sampled_from([1, 4, 16]))
def test_modulate_is_as_exact_as_pytorch_forward_and_backward(case, tokens):
    x, _, _, shift, scale = modulation_inputs(**case)
    pull = [torch.randn(x.shape, generator=seeded(1)).to(x)]
    with chunks_of(tokens):
        run = [gradients(f, i, pull) for f, i in (
            (lambda *a: modulate(*a, backend="triton"), (x, shift, scale)),
            (lambda *a: modulate(*a, backend="torch"), (x, shift, scale)),
            (by_formula, (x.double(), shift.double(), scale.double())))]
    assert run[0][0].dtype == case["dtype"]
    assert_as_exact(("out", "dx", "dshift", "dscale"), *run, case["dtype"])


@given(modulations, st.sampled_from([1, 4, 16]))
def test_gate_residual_modulate_is_as_exact_as_pytorch_forward_and_backward(case, tokens):
    inputs = modulation_inputs(**case)
    pulls = torch.randn(2, *inputs[0].shape, generator=seeded(1)).to(inputs[0])
    with chunks_of(tokens):
        run = [gradients(f, i, pulls) for f, i in (
            (lambda *a: gate_residual_modulate(*a, backend="triton"), inputs),
            (lambda *a: gate_residual_modulate(*a, backend="torch"), inputs),
            (gated_formula, [doubled(t) for t in inputs]))]
    assert_as_exact("h out dx dy dgate dshift dscale".split(), *run, case["dtype"])


def test_short_texts_are_cut_into_enough_chunks_to_keep_a_gpu_busy_and_long_sequences_into_few():
    adaln.load_triton()
    shapes = {(1, 1): 1, (1, 154): 1, (2, 154): 1, (8, 154): 4, (1, 1024): 4, (4, 1024): 16, (1, 4096): 16,
              (8, 4096): 16, (0, 5): 1, (1, 0): 1}
    assert {shape: adaln.chunk_of(*shape) for shape in shapes} == shapes


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


def test_tokens_whose_channels_lie_apart_are_copied_and_give_the_same():
    x, y, gate, shift, scale = modulation_inputs(2, 6, 32, torch.float32)
    pulls = torch.randn(2, 2, 6, 32, generator=seeded(1)).to(DEVICE)
    for run, inputs in ((gate_residual_modulate, (x, y, gate, shift, scale)), (modulate, (x, shift, scale))):
        apart = [t.mT.contiguous().mT for t in inputs]              # as a convolution leaves its patches
        found = [gradients(lambda *a: run(*a, backend="triton"), t, pulls) for t in (inputs, apart)]
        for a, b in zip(*found):
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


def test_a_sum_of_two_dtypes_has_the_one_that_pytorch_gives_it():
    x, y, *vectors = modulation_inputs(1, 3, 32, torch.float32)
    got, expected = (gate_residual_modulate(x.bfloat16(), y, *vectors, backend=way)
                     for way in ("triton", "torch"))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)                        # of the dtype, too


def test_two_runs_give_the_same_bits():
    inputs = modulation_inputs(2, 40, 64, torch.float32)
    pulls = torch.randn(2, 2, 40, 64, generator=seeded(1)).to(DEVICE)
    with chunks_of(16):
        first, second = (gradients(lambda *a: gate_residual_modulate(*a, backend="triton"), inputs, pulls)
                         for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# -------------------------------------------------------------------------------------------- joint attention

def streams(B=2, M=5, N=6, nh=1, hd=32, dtype=torch.float32, text="all", packed=True, size=1.0, seed=0):
    """[q_txt, k_txt, v_txt, q_img, k_img, v_img]; packed: views of each stream's qkv, as a Linear leaves
    them. text: "all", "dead" (no q_txt) or "none"."""
    g = seeded(seed)
    both = [(size * torch.randn(B, L, 3, nh, hd, generator=g)).to(DEVICE, dtype).unbind(2) for L in (M, N)]
    x = [y if packed else y.contiguous() for three in both for y in three]
    dead = {"all": 0, "dead": 1, "none": 3}[text]
    return [None] * dead + x[dead:]


def norm_weights(hd, text="all", seed=1):
    w = (0.5 + torch.rand(4, hd, generator=seeded(seed))).to(DEVICE).unbind()
    return [None, None, *w[2:]] if text == "none" else list(w)


def exact_attention(q_txt, k_txt, v_txt, q_img, k_img, v_img, *weights, lengths=None, eps=1e-6):
    """In the dtype of its arguments. Masked text is cut away, picture by picture."""
    def norm(x, w):
        return x if x is None or w is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w

    w = weights or (None,) * 4
    q_txt, k_txt, q_img, k_img = (norm(x, s) for x, s in zip((q_txt, k_txt, q_img, k_img), w))
    outs = []
    for b in range(len(q_img)):
        n = None if lengths is None else int(lengths[b])
        q, k, v = (torch.cat([t[b, :cut], i[b]]) if t is not None else i[b] for t, i, cut in (
            (q_txt, q_img, None), (k_txt, k_img, n), (v_txt, v_img, n)))
        p = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", p, v))
    out, M = torch.stack(outs), 0 if q_txt is None else q_txt.shape[1]
    return (None if q_txt is None else out[:, :M]), out[:, M:]


def compare(x, w, lengths=None, eps=1e-6, kernel=joint_attention_triton, floor=None):
    """A kernel, PyTorch and the formula in float64: joint attention's values and gradients, by the rule."""
    dtype, w = x[3].dtype, w or []
    pulls = [torch.randn(o.shape, generator=seeded(2)).to(o) for o in (x[0], x[3]) if o is not None]

    def by(way):
        return lambda *a: way(*a[:6], a[6:] or None, lengths, eps)

    run = [gradients(by(kernel), x + w, pulls), gradients(by(joint_attention_reference), x + w, pulls),
           gradients(lambda *a: exact_attention(*a, lengths=lengths, eps=eps),
                     [doubled(t) for t in x + w], pulls)]
    names = ["out_txt", "out_img"][2 - len(pulls):]
    gradient_names = "dq_txt dk_txt dv_txt dq_img dk_img dv_img dw_q_txt dw_k_txt dw_q_img dw_k_img".split()
    names += [n for n, t in zip(gradient_names, x + w) if t is not None]
    assert run[0][0].dtype == dtype
    assert_as_exact(names, *run, dtype, floor)


cases = st.fixed_dictionaries({
    "B": st.integers(1, 2), "M": st.sampled_from([0, 1, 13, 32]), "N": st.sampled_from([31, 32, 45]),
    "nh": st.just(1), "hd": st.sampled_from([16, 32, 40, 64, 80]), "dtype": st.sampled_from(DTYPES),
    "text": st.sampled_from(["all", "all", "dead", "none"]), "packed": st.booleans(),
    "size": st.sampled_from([0.01, 1.0, 3.0]), "seed": st.integers(0, 99)})


fewer = settings(max_examples=2 * settings.default.max_examples // 3)


@fewer
@given(cases, st.booleans(), st.data())
def test_joint_attention_is_as_exact_as_pytorch_forward_and_backward(case, with_norm, data):
    one = st.integers(0, case["M"])
    lengths = data.draw(st.none() | st.lists(one, min_size=case["B"], max_size=case["B"]))
    compare(streams(**case), norm_weights(case["hd"], case["text"]) if with_norm else None,
            None if lengths is None else torch.tensor(lengths, device=DEVICE))


@pytest.mark.parametrize("hd", [32, 80, 96, 128, 256])
def test_every_head_dim_up_to_256_is_as_exact_as_pytorch(hd):
    compare(streams(1, 3, 35, 1, hd), norm_weights(hd))


@pytest.mark.parametrize("size", [1e-2, 300.0], ids=["small", "squares overflow float16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_norms_the_size_of_queries_and_keys_does_not_matter(dtype, size):
    x = [y * size if i not in (2, 5) else y for i, y in enumerate(streams(1, 9, 33, dtype=dtype))]
    assert size < 1 or dtype != torch.float16 or x[0].square().isinf().any()
    compare(x, norm_weights(32))


def test_one_token_attends_to_itself():
    x, w = streams(1, 0, 1), norm_weights(32)
    pull = torch.randn(1, 1, 1, 32, generator=seeded(2)).to(DEVICE)
    _, out, *grads = gradients(lambda *a: joint_attention_triton(*a[:6], a[6:], None, 1e-6), x + w,
                               [pull[:, :0], pull])
    torch.testing.assert_close(out, x[5])
    torch.testing.assert_close(grads[5], pull)              # dv: what a softmax of one weighs is 1 ...
    for i in (*range(5), *range(6, 10)):                    # ... whatever the query, the key and their norms
        torch.testing.assert_close(grads[i], torch.zeros_like((x + w)[i]), rtol=0, atol=FLOOR[torch.float32])
    compare(streams(1, 1, 1), norm_weights(32))


def test_rows_of_zeros_and_constant_rows_are_as_exact_as_pytorch():
    x = streams(1, 4, 33)
    for y in x:
        y[:, 0], y[:, 1] = 0.0, 2.0
    compare(x, norm_weights(32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")      # numpy's, of the rows beyond the end
def test_without_eps_the_rows_beyond_the_end_leave_no_trace():
    compare(streams(1, 5, 33), norm_weights(32), eps=0.0)


def test_a_softmax_that_chooses_one_key_is_as_exact_as_pytorch():
    # Scores of hundreds lose digits before the softmax sees them; how many depends on the product, which
    # PyTorch makes on a GPU of three in TF32.
    compare(streams(1, 5, 40, size=10.0), None, floor=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")      # numpy's, of the rows beyond the end
def test_where_all_scores_are_far_below_zero_the_keys_beyond_the_end_leave_no_trace():
    x = [y + 5 * sign for y, sign in zip(streams(1, 3, 33), (1, -1, 0) * 2)]        # theirs would be 0
    compare(x, None, floor=1e-4)


KERNELS = pytest.mark.parametrize("kernel", [joint_attention_triton, joint_attention_sdpa])


@KERNELS
def test_pictures_whose_text_is_wholly_masked_attend_to_the_image_alone(kernel):
    x, lengths = streams(2, 34, 33, 1), torch.tensor([0, 33], device=DEVICE)
    compare(x, norm_weights(32), lengths, kernel=kernel)
    out = kernel(*x, None, lengths, 1e-6)[1][:1]
    alone = kernel(None, None, None, *(y[:1] for y in x[3:]), None, None, 1e-6)[1]
    torch.testing.assert_close(out, alone)


@KERNELS
def test_lengths_may_lie_apart_and_one_beyond_the_text_is_all_of_it(kernel):
    x, lengths = streams(2, 5, 6), torch.tensor([[7, 0], [3, 0]], device=DEVICE)[:, 0]
    a, b = (way(*x, None, lengths, 1e-6) for way in (kernel, joint_attention_reference))
    torch.testing.assert_close(a, b)


def test_without_text_queries_each_pictures_gradients_are_its_own():
    compare(streams(2, 5, 33, text="dead"), norm_weights(32))


def test_exchanging_the_streams_exchanges_the_outputs():
    x, w = streams(2, 5, 33, nh=2), norm_weights(32)
    a, b = joint_attention(*x, norm_weights=w, backend="triton")
    c, d = joint_attention(*x[3:], *x[:3], norm_weights=w[2:] + w[:2], backend="triton")
    torch.testing.assert_close((a, b), (d, c))


def test_the_simple_attention_kernel_agrees_with_the_one_that_is_used():
    x, w = streams(1, 13, 35, nh=2), norm_weights(32)
    used = joint_attention(*x, norm_weights=w, backend="triton")
    torch.testing.assert_close(attend_simply(*x, w), used)


@KERNELS
def test_autocast_gives_attention_in_half_precision_and_float32_gradients(kernel):
    x, w = [t.requires_grad_() for t in streams(1, 5, 33)], [t.requires_grad_() for t in norm_weights(32)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = kernel(*x, w, None, 1e-6)
        expected = joint_attention(*x, norm_weights=w, backend="torch")
        _, alone = kernel(None, *x[1:], w, None, 1e-6)              # as in the last block
    # on a card PyTorch's attention may cut other lengths otherwise
    assert torch.equal(alone, out[1]) or CUDA and (alone - out[1]).abs().max() <= 2 ** -7 * out[1].abs().max()
    for a, b in zip(out, expected):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), atol=5e-2, rtol=5e-2)
    grads = torch.autograd.grad(sum(o.float().sum() for o in out), x + w)
    assert all(g.dtype == torch.float32 for g in grads)


def test_two_runs_of_attention_give_the_same_bits():
    x, w = streams(1, 13, 35), norm_weights(32)
    pulls = [torch.ones_like(x[0]), torch.ones_like(x[3])]
    def run(*a):
        return joint_attention(*a[:6], norm_weights=a[6:], backend="triton")

    first, second = (gradients(run, x + w, pulls) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))

    def joined(*a):
        return norm_layout_op(*a, 1e-6)

    first, second = (gradients(joined, x + w, torch.arange(1.0, 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# -------------------------------------------------------------------------------------------- norm and layout

@fewer
@given(cases | cases.map(lambda c: c | {"hd": 96, "nh": 3}), st.booleans(), st.data())
def test_attention_behind_norm_and_layout_is_as_exact_as_pytorch_forward_and_backward(case, with_norm, data):
    one = st.integers(0, case["M"])
    lengths = data.draw(st.none() | st.lists(one, min_size=case["B"], max_size=case["B"]))
    compare(streams(**case), norm_weights(case["hd"], case["text"]) if with_norm else None,
            None if lengths is None else torch.tensor(lengths, device=DEVICE), kernel=joint_attention_sdpa)


@given(st.integers(0, 9), st.integers(1, 50), st.integers(1, 3), st.sampled_from([16, 20, 64, 80, 96]),
       st.sampled_from(DTYPES), st.sampled_from(["all", "dead", "none"]), st.booleans())
def test_norm_and_layout_rounds_like_the_norms_and_concatenates_the_rest_bit_by_bit(M, N, nh, hd, dtype, text,
                                                                                   packed):
    x, w = streams(2, M, N, nh, hd, dtype, text, packed), norm_weights(hd, text)
    got, expected = norm_layout_op(*x, *w, 1e-6), join(*x, w)
    one_step = 2 ** -7 if dtype == torch.bfloat16 else 0            # of rounding, in sums of another order
    for a, b in zip(got[:2], expected):
        torch.testing.assert_close(a.float(), b.float(), atol=FLOOR[dtype], rtol=max(FLOOR[dtype], one_step))
    assert torch.equal(got[2], expected[2] if x[1] is not None else x[5][:, :0])
    for a, b in zip(norm_layout_op(*x, *[None] * 4, 1e-6), join(*x)[:2]):
        assert torch.equal(a, b)


def test_the_simple_kernel_of_norm_and_layout_agrees_with_the_one_that_is_used():
    x, w = streams(1, 3, 7, nh=3, hd=80, dtype=torch.float16), norm_weights(80)
    for a, b in zip(norm_layout_simply(*x, w), norm_layout_op(*x, *w, 1e-6)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)      # their sums are taken in other orders


@pytest.mark.filterwarnings("ignore::RuntimeWarning")      # numpy's, of the rows beyond the end
@pytest.mark.parametrize("eps, size", [(0.0, 1.0), (1e-6, 300.0)], ids=["no eps", "squares overflow float16"])
def test_norm_and_layout_survives_what_would_overflow_and_leaves_no_trace_beyond_the_end(eps, size):
    x = [y * size if i not in (2, 5) else y for i, y in enumerate(streams(1, 5, 33, dtype=torch.float16))]
    compare(x, norm_weights(32), eps=eps, kernel=joint_attention_sdpa)


def test_the_joined_output_is_cut_into_text_and_image_without_a_copy():
    txt, img = joint_attention_sdpa(*streams(2, 5, 6, nh=2), norm_weights(32), None, 1e-6)
    assert txt.untyped_storage().data_ptr() == img.untyped_storage().data_ptr()
    assert txt.flatten(2).data_ptr() == txt.data_ptr() and img.flatten(2).data_ptr() == img.data_ptr()


class Dispatched(TorchDispatchMode):
    """Names of what PyTorch runs inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("text, cats", [("all", 1), ("dead", 0), ("none", 0)])
@pytest.mark.parametrize("way", [joint_attention_reference, joint_attention_sdpa])
def test_both_streams_gradients_enter_attention_by_one_concatenation(way, text, cats):
    x = [t.requires_grad_() for t in streams(1, 5, 6, text=text, packed=False) if t is not None]
    outs = [o for o in way(*[None] * (6 - len(x)), *x, None, None, 1e-6) if o is not None]
    with Dispatched() as seen:
        torch.autograd.grad(outs, x, [torch.randn_like(o) for o in outs])
    assert seen.names.count("cat") == cats and not {"slice_backward", "add", "add_"} & set(seen.names)


def test_without_norms_the_backward_of_attention_sums_nothing_for_their_weights():
    x, w = streams(1, 3, 5, 1, 16), [None] * 4
    *outs, lse = joint_attention_op(*x, *w, None, 1e-6)
    with Dispatched() as seen:
        grads, of_weights = joint_attention_backward.launch_backward(*outs, *outs, lse, *x, w, None, 1e-6)
    assert of_weights == [] and [g.shape for g in grads] == [t.shape for t in x]
    assert "sum" not in seen.names and "empty" in seen.names


def test_values_without_text_are_not_moved():
    x, w = streams(2, 0, 6, nh=2, text="none"), norm_weights(32, "none")
    assert norm_layout_op(*x, *w, 1e-6)[2].numel() == 0
    compare(x, w, kernel=joint_attention_sdpa)


@pytest.mark.parametrize("fastest", ["torch", "triton", "triton+sdpa"])
def test_joint_attention_runs_the_one_that_was_measured_to_be_fastest(fastest, monkeypatch):
    order = (fastest, *({"torch", "triton", "triton+sdpa"} - {fastest}))
    ran = []
    for way in (joint_attention_reference, joint_attention_triton, joint_attention_sdpa):
        monkeypatch.setattr(kernels, way.__name__, lambda *a, way=way: ran.append(way.__name__) or way(*a))
    monkeypatch.setattr(kernels, "ranking", lambda *a: (order, "measured"))
    x, w = streams(1, 5, 6, nh=2), norm_weights(32)
    got = joint_attention(*x, norm_weights=w, backend="triton")
    torch.testing.assert_close(got, joint_attention_reference(*x, w))
    first = [name for name in order if name != "torch"][0]
    assert ran == [{"triton": "joint_attention_triton", "triton+sdpa": "joint_attention_sdpa"}[first]]


def test_the_kernels_take_the_eps_that_is_asked_for_in_both_passes():
    x, w, pulls = streams(1, 3, 5), norm_weights(32), torch.randn(2, 1, 1, 1, 32, generator=seeded(1))
    a, b, *vectors = modulation_inputs(1, 3, 32, torch.float32)
    calls = [(x, lambda way, *y: joint_attention(*y, norm_weights=w, eps=1.0, backend=way)),
             ([a, *vectors[1:]], lambda way, *y: modulate(*y, eps=1.0, backend=way)),
             ([a, b, *vectors], lambda way, *y: gate_residual_modulate(*y, eps=1.0, backend=way))]
    for inputs, call in calls:
        pull = pulls if inputs is x else pulls[:, 0]
        triton, exact = (gradients(partial(call, way), inputs, pull) for way in ("triton", "torch"))
        torch.testing.assert_close(triton, exact, atol=1e-4, rtol=1e-4)
    compare(x, w, eps=1.0, kernel=joint_attention_sdpa)


def test_norm_weights_that_no_kernel_reads_are_refused():
    with pytest.raises(ValueError, match="w_q_txt is torch.float64"):
        joint_attention(*streams(1, 3, 5), norm_weights=[t.double() for t in norm_weights(32)],
                        backend="triton")


# ------------------------------------------------------------------ every backward, by differences in float64

@pytest.fixture
def float64(monkeypatch):
    """The interpreter asks at run time what tl.float32 is, and the launchers what torch.float32 is: told that
    both are float64, the very code of the kernels computes in float64."""
    if CUDA:
        pytest.skip("a compiled kernel computes in float32")
    import triton.language
    monkeypatch.setattr(triton.language, "float32", triton.language.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)


def check_gradients(function, inputs):
    """Along random directions: each difference quotient takes a run of the interpreter."""
    leaves = [None if x is None else x.double().clone().requires_grad_() for x in inputs]
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("text, with_norm, lengths", [
    ("all", True, None), ("all", False, [2]), ("dead", True, [0]), ("none", True, None)])
def test_the_backward_of_attention_is_the_derivative_of_its_forward(text, with_norm, lengths, float64):
    x, w = streams(1, 3, 5, 1, 16, text=text), norm_weights(16, text) if with_norm else [None] * 4
    w[0] = None if text == "dead" else w[0]
    lengths = None if lengths is None else torch.tensor(lengths)
    check_gradients(lambda *a: [o for o in joint_attention_op(*a, lengths, 1e-6)[:2] if o.numel()], x + w)


@pytest.mark.parametrize("text", ["all", "dead", "none"])
def test_the_backward_of_norm_and_layout_is_the_derivative_of_its_forward(text, float64):
    x, w = streams(1, 3, 5, 2, 16, text=text), norm_weights(16, text)
    w[0] = None if text == "dead" else w[0]
    check_gradients(lambda *a: [o for o in norm_layout_op(*a, 1e-6) if o.numel()], x + w)
    if text == "all":
        check_gradients(lambda *a: [o for o in norm_layout_op(*a, *[None] * 4, 1e-6) if o.numel()], x)


def test_the_backwards_of_the_modulations_are_the_derivatives_of_their_forwards(float64):
    x, y, gate, shift, scale = modulation_inputs(2, 3, 7, torch.float64)
    with chunks_of(2):
        check_gradients(lambda *a: adaln.modulate_op(*a, 1e-6), (x, shift, scale))
        check_gradients(lambda *a: adaln.gate_residual_modulate_op(*a, 1e-6), (x, y, gate, shift, scale))


def test_the_parts_of_a_modulations_gradient_are_added_in_float32_whatever_the_activations_are():
    x, dout = torch.randn(2, 1, 64, 24, generator=seeded(0)).to(DEVICE, torch.bfloat16)
    shift, scale = (torch.zeros(1, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    adaln.modulate_op(x, shift, scale, 1e-6).backward(dout)
    torch.testing.assert_close(shift.grad, dout.double().sum(1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [joint_attention_reference, joint_attention_triton, joint_attention_sdpa])
def test_the_norm_weight_of_text_queries_that_are_not_there_gets_no_gradient(way):
    """Zeros would let an optimizer decay it, and keep moments of it."""
    w = [x.requires_grad_() for x in norm_weights(16)]
    way(*streams(1, 3, 5, 1, 16, text="dead"), w, None, 1e-6)[1].square().sum().backward()
    assert [x.grad is None for x in w] == [True, False, False, False]


# ------------------------------------------------------------------------------------------- known to PyTorch

@pytest.mark.parametrize("text, with_norm, lengths", [("all", True, [3, 0]), ("dead", False, None)])
def test_pytorch_accepts_the_registration_of_joint_attention(text, with_norm, lengths):
    x = [None if t is None else t.clone().requires_grad_() for t in streams(2, 3, 5, 1, 16, text=text)]
    w = [t.requires_grad_() for t in norm_weights(16)] if with_norm else [None] * 4
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    torch.library.opcheck(joint_attention_op, (*x, *w, lengths, 1e-6))
    with torch.no_grad():
        out = joint_attention_op(*x, *w, lengths, 1e-6)
        torch.library.opcheck(joint_attention_backward_op, (*out[:2], *out, *x, *w, lengths, 1e-6))


@pytest.mark.parametrize("text, with_norm", [("all", True), ("dead", True), ("none", True), ("dead", False)])
def test_pytorch_accepts_the_registration_of_norm_and_layout(text, with_norm):
    x = [None if t is None else t.clone().requires_grad_() for t in streams(1, 3, 5, 1, 16, text=text)]
    w = norm_weights(16, text) if with_norm else [None] * 4
    w = [None if t is None else t.clone().requires_grad_() for t in w]
    torch.library.opcheck(norm_layout_op, (*x, *w, 1e-6))
    if with_norm:
        with torch.no_grad():
            dq, dk, _ = norm_layout_op(*x, *w, 1e-6)
            torch.library.opcheck(norm_layout_backward_op, (dq, dk, x[0], x[1], x[3], x[4], *w, 1e-6))


def test_pytorch_accepts_the_registration_of_the_modulations():
    x, y, gate, shift, scale = (t.detach().clone().requires_grad_()
                                for t in modulation_inputs(2, 5, 32, torch.float32))
    for op, inputs in ((adaln.modulate_op, (x, shift, scale, 1e-6)),
                       (adaln.gate_residual_modulate_op, (x, y, gate, shift, scale, 1e-6))):
        torch.library.opcheck(op, inputs)
    h, dh = torch.randn(2, 2, 5, 32, device=DEVICE)
    for op, inputs in ((adaln.modulate_backward_op, (dh, h, shift, scale, 1e-6)),
                       (adaln.gate_residual_modulate_backward_op, (dh, dh, h, y, gate, shift, scale, 1e-6))):
        torch.library.opcheck(op, [x.detach() if torch.is_tensor(x) else x for x in inputs])


def test_torch_compile_traces_the_dispatch_and_the_kernels_in_one_graph():
    x, y, gate, shift, scale = modulation_inputs(1, 4, 32, torch.float32)

    def block(x, y, gate, shift, scale):
        h, m = gate_residual_modulate(2 * x, y, gate, shift, scale, backend="triton")
        m = m.view(1, 4, 2, 16)
        return h.sin(), joint_attention(m, m, m, m, m, m, backend="triton")[1]

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    pulls = [torch.ones(1, 4, 32, device=DEVICE), torch.ones(1, 4, 2, 16, device=DEVICE)]
    for a, b in zip(gradients(compiled, (x, y, gate, shift, scale), pulls),
                    gradients(block, (x, y, gate, shift, scale), pulls), strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile_traces_norm_and_layout_with_the_attention_behind_it_in_one_graph():
    x, w = streams(1, 3, 5, nh=2, hd=16), norm_weights(16)
    pulls = [torch.ones_like(x[0]), torch.ones_like(x[3])]

    def block(*a):
        return joint_attention_sdpa(*a[:6], a[6:], None, 1e-6)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, x + w, pulls), gradients(block, x + w, pulls), strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile_traces_the_order_in_which_attentions_are_asked(monkeypatch):
    q, k, v = torch.randn(3, 1, 5, 2, 16, generator=seeded(0)).to(DEVICE)
    expected = attend_joined(q, k, v, None)
    monkeypatch.setattr(norm_layout, "cudnn_first", lambda device: True)
    for run in (attend_joined, torch.compile(attend_joined, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(run(q, k, v, None), expected, atol=1e-3 if CUDA else 1e-6, rtol=1e-3)


def test_shapes_can_be_had_without_computing_anything():
    x = [t.to("meta") for t in streams(2, 5, 6, nh=2, dtype=torch.bfloat16)]
    for out in (joint_attention(*x, backend="triton"), joint_attention_sdpa(*x, None, None, 1e-6)):
        assert [o.shape for o in out] == [x[0].shape, x[3].shape] and out[0].dtype == torch.bfloat16
    flat = x[0].flatten(2)
    assert modulate(flat, flat[:, 0], flat[:, 1], backend="triton").shape == flat.shape


# ----------------------------------------------------------------------- what shows on a GPU, or in long runs

def every_operation(B=2, M=3, N=5, hd=16):
    """name -> (operator, its arguments), with leaves for gradients."""
    x, w = streams(B, M, N, nh=2, hd=hd), norm_weights(hd)
    y = modulation_inputs(B, N, 32, torch.float32)
    found = {"attention": (lambda *a: joint_attention_op(*a, None, 1e-6)[:2], x + w),
             "norm and layout": (lambda *a: norm_layout_op(*a, 1e-6), x + w),
             "modulate": (lambda *a: adaln.modulate_op(*a, 1e-6), [y[0], *y[3:]]),
             "gated": (lambda *a: adaln.gate_residual_modulate_op(*a, 1e-6), y)}
    return {n: (op, [t.detach().clone().requires_grad_() for t in a]) for n, (op, a) in found.items()}


OPERATIONS = sorted(every_operation(0))


def gradients_of_sums(op, inputs):
    out = op(*inputs)
    out = [out] if torch.is_tensor(out) else list(out)
    return [o.detach() for o in out], torch.autograd.grad(sum((o * o).sum() for o in out), inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_pictures_give_no_outputs_and_gradients_of_zero(name):
    op, inputs = every_operation(0)[name]
    out, grads = gradients_of_sums(op, inputs)
    assert all(o.shape[0] == 0 for o in out)
    assert [g.shape for g in grads] == [x.shape for x in inputs] and not any(g.any() for g in grads)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_number_of_an_output_is_written(name):
    """In PyTorch's deterministic mode new memory is full of NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    op, inputs = every_operation()[name]
    expected = gradients_of_sums(op, inputs)
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3, device=DEVICE).isnan().all()
        found = gradients_of_sums(op, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, expected):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_outputs_are_read_however_they_lie(name):
    op, inputs = every_operation(1)[name]
    out = op(*inputs)
    out = [out] if torch.is_tensor(out) else list(out)
    pulls = [torch.randn(o.shape, generator=seeded(0)).to(o) for o in out]
    apart = [p.mT.contiguous().mT for p in pulls]
    for a, b in zip(*(torch.autograd.grad(out, inputs, p, retain_graph=True) for p in (apart, pulls))):
        assert torch.equal(a, b)


def far_apart(B, *shape):
    """Pictures of which the third begins 2^31 numbers behind the first: memory that is never touched in
    between costs nothing."""
    try:
        memory = torch.empty(2 ** 31 + math.prod(shape), dtype=torch.float16, device=DEVICE)
    except RuntimeError as e:
        pytest.skip(f"4 GB of addresses are not to be had: {e}")
    x = memory[:math.prod(shape)].view(1, *shape).expand(B, *shape)
    x = x.as_strided(x.shape, (2 ** 30, *x.stride()[1:]))
    return x.copy_(torch.randn(x.shape, generator=seeded(0)))


def test_pictures_beyond_the_reach_of_32_bits_are_read_where_they_lie():
    x = far_apart(3, 2 + 3, 3, 2, 16)
    split = [t for part in (x[:, :2], x[:, 2:]) for t in part.unbind(2)]
    z, w = far_apart(3, 4, 16), norm_weights(16)
    assert adaln.triton_refuses(dict(enumerate([*split, z]))) is None
    for op, inputs in ((lambda *a: joint_attention_op(*a, None, 1e-6)[:2], split + w),
                       (lambda *a: norm_layout_op(*a, 1e-6), split + w),
                       (lambda *a: adaln.gate_residual_modulate_op(*a, 1e-6), [z, z, *z[:, :3].unbind(1)])):
        far, near = [t.detach() for t in inputs], [t.detach().contiguous() for t in inputs]
        assert far[0].stride(0) == 2 ** 30 > near[0].stride(0)
        for a, b in zip(*(gradients_of_sums(op, [t.requires_grad_() for t in ts]) for ts in (far, near))):
            assert all(torch.equal(c, d) for c, d in zip(a, b))


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_run_with_the_gpu_of_their_tensors_as_the_current_one(name, monkeypatch):
    """Triton launches on the current GPU, wherever the tensors are: a fault on the second of two."""
    now, launches = [], []

    @contextlib.contextmanager
    def device_of(x):
        now.append(x.device)
        yield
        now.pop()

    for module in (adaln, norm_layout, sys.modules["kernels.joint_attention"], joint_attention_backward):
        monkeypatch.setattr(module, "device_of", device_of)
        for launch in {"launch_forward", "launch_backward"} & set(vars(module)):
            monkeypatch.setattr(module, launch, lambda *a, run=getattr(module, launch), **kw: (
                launches.append(list(now)), run(*a, **kw))[1])
    gradients_of_sums(*every_operation()[name])
    assert len(launches) == 2 and all(len(devices) == 1 for devices in launches)


def test_the_current_gpu_is_exchanged_for_that_of_the_tensor():
    assert adaln.device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))).idx == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_derivative_is_refused_in_words(name):
    op, inputs = every_operation()[name]
    out = op(*inputs)
    out = out if torch.is_tensor(out) else out[0]
    first = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="backward.*no autograd formula was registered"):
        first.sum().backward()


def test_inference_mode_gives_what_no_grad_gives():
    for op, inputs in every_operation().values():
        with torch.no_grad():
            expected = op(*inputs)
        with torch.inference_mode():
            torch.testing.assert_close(op(*inputs), expected, atol=0, rtol=0)


def test_torch_compile_traces_autocast_and_the_choice_among_measured_kernels_in_one_graph(monkeypatch):
    """Other paths through the dispatch than where nothing was measured."""
    def row(operation, dtype, hd, order):
        return {(gpu, operation, dtype, hd, "forward+backward", True): [(40.0, ("torch",)), (1e9, order)]}

    gpu = torch.cuda.get_device_name() if CUDA else ""

    monkeypatch.setattr(kernels, "MEASURED", row("joint_attention with norms", "bfloat16", 16, (
        "torch", "triton+sdpa", "triton")) | row("modulate", "float32", 0, ("triton", "torch")))
    monkeypatch.setattr(kernels, "DEFAULT", "triton")
    torch.manual_seed(0)
    linear, w = torch.nn.Linear(32, 96).to(DEVICE), norm_weights(16)
    x, _, _, shift, scale = modulation_inputs(1, 4, 32, torch.float32)
    ran = []
    monkeypatch.setattr(kernels, "joint_attention_sdpa", lambda *a: ran.append(0) or joint_attention_sdpa(*a))

    def block(x, shift, scale):
        with torch.autocast(DEVICE, torch.bfloat16):
            q, k, v = linear(modulate(x, shift, scale)).view(1, 4, 3, 2, 16).unbind(2)
            return joint_attention(q, k, v, q, k, v, norm_weights=w)[1]

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got, expected = (gradients(f, (x, shift, scale), [torch.ones(1, 4, 2, 16, device=DEVICE)])
                     for f in (compiled, block))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)      # two kernels, in half precision
    assert got[0].dtype == torch.bfloat16 and ran                   # where it is compiled, the faster of two


# ------------------------------------------------------------------------------------- the sweep, the bench

@pytest.mark.skipif(CUDA, reason="--smoke runs in the interpreter")
def test_the_sweep_cuts_each_step_of_both_passes_in_other_ways(capsys, monkeypatch):
    forward, backward = sys.modules["kernels.joint_attention"], joint_attention_backward
    cuts, strides = set(), set()

    def launched(launch, module, steps):
        def run(*args):
            done = launch(*args)
            strides.update(x.stride()[:2] for x in args[-9:-3])
            cuts.add(tuple((step, module.tiles(step, args[-5])["BLOCK_M"]) for step in steps))
            return done
        return run

    usual = forward.tiles
    monkeypatch.setattr(sweep, "launch_forward", launched(sweep.launch_forward, forward, ["forward"]))
    monkeypatch.setattr(sweep, "launch_backward",
                        launched(sweep.launch_backward, backward, ["keys", "queries"]))
    sweep.main(["--smoke", "--head-dim", "16"])
    said = capsys.readouterr().out
    assert said.count("2 ways of 2, 0 left out") == 3 and said.count("the table's own") == 3
    assert cuts == {(("forward", 32),), (("forward", 16),), (("keys", 32), ("queries", 32)),
                    (("keys", 16), ("queries", 32)), (("keys", 32), ("queries", 16))}
    assert forward.tiles is backward.tiles is usual
    assert strides == {(L * 48, 48) for L in (3, 9)}                # of packed qkv, as in models
    for name in ("modulate", "gate_residual_modulate"):
        assert f"\n{name}: a copy of the same bytes takes" in said
    assert said.count("of the copy's speed") == 2 * 9 and adaln.tile(2432) == dict(ROWS=1, num_warps=8)


def test_the_sweep_names_the_fastest_way_that_computes_the_same_and_what_it_left_out(monkeypatch):
    own, fast, slow = (64, 64, 4, 2), (128, 64, 4, 2), (32, 64, 4, 2)
    wrong, large = (64, 32, 4, 2), (128, 128, 8, 4)
    module, x = joint_attention_backward, torch.empty(1, 1, 1, 64)

    def call():
        way = tuple(module.tiles("keys", x).get(name) for name in sweep.NAMES)
        if way == large:
            raise RuntimeError("out of resource: shared memory")
        return [torch.ones(2), torch.full((2,), math.nan if way == wrong else 1.0)]

    monkeypatch.setattr(sweep, "tiles", lambda step, x: dict(zip(sweep.NAMES, own)))
    for file in (sys.modules["kernels.joint_attention"], joint_attention_backward):
        monkeypatch.setattr(file, "tiles", sweep.tiles)
    monkeypatch.setattr(sweep, "milliseconds", lambda call, device: [0, {fast: 1, own: 2, slow: 3}[
        tuple(module.tiles("keys", x)[name] for name in sweep.NAMES)], 9])
    found, left_out = sweep.sweep("keys", call, own, [own, wrong, fast, large, slow], "cpu", 60)
    assert found == [(1, fast), (2, own), (3, slow)]
    assert [why.split(":")[0] for why in left_out] == [str(wrong), str(large)]
    assert "something else" in left_out[0] and "out of resource" in left_out[1]
    assert sweep.sweep("keys", call, own, [own, fast, slow], "cpu", 0) == ([(2, own)], [])      # no time
    ways = sweep.candidates("keys", own)
    assert ways[0] == own and len(set(ways)) == len(ways) > 30


def test_the_bench_writes_what_the_dispatch_reads_and_repeats_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED", {})
    monkeypatch.setattr(bench, "find_spec", lambda name: None)      # diffusers, if installed, takes longest
    if not thorough():                                              # compiling takes as long as all else
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    run = ["--smoke", "--out", str(tmp_path)]
    bench.main([*run, "--operation", "gate_residual", "--minutes", "0"])        # one at least
    first = capsys.readouterr().out
    assert "0 of 2 measured before; the others will take about" in first and "auto takes" in first
    assert "stopped after 0 minutes; the same command does the 1 left" in first
    bench.main(run)
    assert "1 of 9 measured before" in capsys.readouterr().out
    bench.main(run)
    assert "9 of 9 measured before" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert path.with_suffix(".png").stat().st_size > 10_000
    columns = ("gpu date torch triton operation model pixels B M N nh hd dtype pass provider ms ms_20 ms_80 "
               "tflops gbps share error intensity reason peak_tflops peak_gbps size head_dim").split()
    assert {*columns} <= {*rows[0]}
    assert {r["provider"] for r in rows} >= {"torch", "torch compiled", "triton", "triton+sdpa", "simple",
                                             "triton compiled"}
    # a GPU's rivals include PyTorch's attentions, which multiply float32 in parts of TF32
    assert all(float(r["ms"]) > 0 and float(r["error"]) < (1e-4 if CUDA else 1e-5) for r in rows)
    assert {r["size"] for r in rows if "attention" in r["operation"]} == {str(8 * 16 * 8)}
    assert {r["size"] for r in rows if "modulate" in r["operation"]} == {str(8 * 16)}
    order, gpu = {"torch", "triton", "triton+sdpa"}, rows[0]["gpu"]
    key = gpu, "joint_attention with norms, no text", "float32", 16, "forward+backward", True
    assert set(kernels.MEASURED[key][0][1]) == order                # the models' cases came after it
    monkeypatch.setattr(kernels, "MEASURED", kernels.read_results(tmp_path))
    x = torch.zeros(1, 8, 1, 16)
    assert set(kernels.ranking("joint_attention with norms", 16, {"q_img": x}, gpu)[0]) == order


def test_a_case_that_fails_is_written_down_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def broken(*a, **kw):
        raise RuntimeError("out of resource: shared memory")

    run = ["--smoke", "--operation", "modulate", "--out", str(tmp_path)]
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(bench, "roofline", lambda *a: None)
    monkeypatch.setattr(adaln, "modulate_op", broken)
    with pytest.raises(SystemExit) as stop:
        bench.main(run)
    assert str(stop.value).count("\nmodulate, tiny") == 2           # forward, and forward + backward
    out = capsys.readouterr().out
    assert "FAILED: modulate, tiny" in out and "4 of 4 after" in out
    monkeypatch.undo()
    with pytest.raises(SystemExit):                                 # says so again, and tries nothing
        bench.main(run)
    assert "4 of 4 measured before" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["reason"] for r in rows if r["provider"] == "failed"] == ["out of resource: shared memory"] * 2
    assert {k[1] for k in kernels.read_results(tmp_path)} == {"gate_residual_modulate"}


def test_where_a_failure_leaves_the_gpu_unusable_the_bench_goes_on_in_a_new_process(tmp_path, monkeypatch):
    def another(program, words):
        started.append(words)
        raise KeyboardInterrupt                                     # this process is gone

    started = []
    monkeypatch.setattr(bench, "measure", lambda *a: [][0])
    monkeypatch.setattr(bench, "usable", lambda device: False)
    monkeypatch.setattr(bench.os, "execv", another)
    monkeypatch.setattr(sys, "argv", ["kernels/bench.py", "--minutes", "9"])
    run = ["--smoke", "--out", str(tmp_path), "--minutes"]
    with pytest.raises(KeyboardInterrupt):
        bench.main([*run, "9"])
    assert started[0][:4] == [sys.executable, "kernels/bench.py", "--minutes", "9"]
    assert started[0][4] == "--minutes" and 8 < float(started[0][5]) < 9        # of two the later counts
    with pytest.raises(SystemExit, match="the same command goes on"):           # no time is left
        bench.main([*run, "0.5"])
    assert len(next(tmp_path.glob("*.csv")).read_text().splitlines()) == 3      # two failed, each tried once


@pytest.mark.skipif(CUDA, reason="plays a GPU")
def test_times_are_taken_while_the_gpu_sleeps_and_are_percentiles(monkeypatch):
    class Event:
        made = 0

        def __init__(self, enable_timing):
            Event.made += 1
            self.number = Event.made // 2

        def record(self):
            order.append("record")

        def elapsed_time(self, end):
            return float(self.number)

    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: torch.zeros(1))
    times = bench.milliseconds(lambda: order.append("run"), "cuda")
    assert times == pytest.approx([40, 100, 160], abs=2)            # of 0, 1, 2 ... 199
    assert order == ["run"] * 3 + ["sleep", "record", "run", "record"] * 200
    order.clear()
    bench.milliseconds(lambda: order.append("run"), "cuda", asleep=False)
    assert "sleep" not in order


def test_a_gradient_that_is_no_number_is_an_error_in_the_bench():
    def poisoned(x, shift, scale):
        nothing = (shift - shift.detach()).abs().sqrt().sum()       # 0, whose root has no slope
        return adaln.modulate_reference(x, shift, scale) + nothing

    case = bench.cases(smoke=True)[2]
    args = bench.inputs(case, DEVICE)
    assert case["operation"] == "modulate" and bench.error(poisoned, args, case, False) < 1e-5
    assert math.isnan(bench.error(poisoned, args, case, True))


def test_a_kernel_that_computes_something_else_is_reported_by_the_bench_and_not_taken(tmp_path, capsys,
                                                                                       monkeypatch):
    right = kernels.modulate
    monkeypatch.setattr(kernels, "modulate", lambda *a, **kw: 1.1 * right(*a, **kw))
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(bench, "roofline", lambda *a: None)
    bench.main(["--smoke", "--operation", "modulate", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("triton IS WRONG: auto will not take it") == 2 and out.count("auto takes torch in") >= 4
    assert {v[0][1][0] for k, v in kernels.read_results(tmp_path).items() if k[1] == "modulate"} == {"torch"}


@pytest.mark.skipif(CUDA, reason="looks at a CPU's attentions")
def test_each_rival_is_compiled_with_the_attention_that_it_is_named_after(monkeypatch):
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    monkeypatch.setattr(bench, "SDPA", {"slow": "MATH", "fast": "FLASH_ATTENTION"})
    x, recorder = streams(1, 3, 5, nh=1, hd=16), AotEagerAndRecordGraphs()
    found = bench.sdpa_rivals(joint_attention_reference, dict(backend=recorder, fullgraph=True))
    slow, fast = (found[name](*x) for name in ("slow", "fast"))
    torch.testing.assert_close(slow, fast)
    assert ["flash" in graph.code for graph in recorder.fw_graphs] == [False, True]


# -------------------------------------------------------------------------------------------- the whole model

def test_steps_of_training_follow_the_same_loss_curve_with_both_back_ends(monkeypatch):
    # the interpreter needs a sixth of a second for one step of a block of one head
    B, side, size = (2, 8, dict(depth=2, dual_blocks=1)) if CUDA else (1, 4, dict(depth=1))
    steps = 50 if CUDA or thorough() else 20
    config = MMDiTConfig(head_dim=16, in_channels=4, context_dim=24, pooled_dim=12, pos_max=8, pos_sample=4,
                         pos_base=4, **size)
    curves = {}
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "DEFAULT", backend)
        torch.manual_seed(0)
        model = MMDiT(config).to(DEVICE)
        for p in model.parameters():                    # with zero gates the blocks would do nothing
            torch.nn.init.normal_(p, std=0.1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, context, pooled = (torch.randn(s, device=DEVICE)
                              for s in ((B, 4, side, side), (B, 5, 24), (B, 12)))
        t, curves[backend] = torch.tensor([0.3, 0.8], device=DEVICE)[:B], []
        for _ in range(steps):
            loss = (model(x, t, context, pooled) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[backend].append(loss.item())
    assert curves["torch"][-1] < (0.1 if steps == 50 else 0.6) * curves["torch"][0]
    assert curves["triton"] == pytest.approx(curves["torch"], rel=1e-3)     # 4e-6 in the interpreter
