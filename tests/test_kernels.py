"""Claims about the three operations in kernels/, each held against the formula in float64,
sample by sample."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels import attention, gate_residual_modulate, joint_attention, modulate, rms_norm

HD = 8
NAMES = ("q_txt", "k_txt", "v_txt", "q_img", "k_img", "v_img")
sizes = st.fixed_dictionaries({"B": st.integers(1, 3), "M": st.integers(0, 7), "N": st.integers(1, 9),
                               "nh": st.integers(1, 3), "hd": st.sampled_from([4, 8, 64])})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def streams(B=2, M=5, N=6, nh=2, hd=HD, dtype=torch.float32, seed=0):
    """[q_txt, k_txt, v_txt, q_img, k_img, v_img]"""
    g = seeded(seed)
    return [torch.randn(B, L, nh, hd, generator=g).to(dtype) for L in (M, M, M, N, N, N)]


def norm_scales(hd=HD, seed=1):
    return tuple(0.5 + torch.rand(4, hd, generator=seeded(seed)))


def exact(q_txt, k_txt, v_txt, q_img, k_img, v_img, norm_weights=None, text_lengths=None, eps=1e-6):
    """Joint attention in float64, one sample and one head at a time, with masked text cut away.
    -> (out_txt, out_img)"""
    def norm(x, w):
        return x if w is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()

    w = norm_weights or (None,) * 4
    q_txt, k_txt, q_img, k_img = (norm(x.double(), s) for x, s in zip((q_txt, k_txt, q_img, k_img), w))
    B, M, nh, hd = q_txt.shape
    out = torch.zeros(B, M + q_img.shape[1], nh, hd, dtype=torch.float64)
    for b in range(B):
        n = M if text_lengths is None else int(text_lengths[b])
        for h in range(nh):
            q = torch.cat([q_txt[b, :, h], q_img[b, :, h]])
            k, v = (torch.cat([t[b, :n, h], i[b, :, h]])
                    for t, i in ((k_txt, k_img), (v_txt.double(), v_img.double())))
            out[b, :, h] = (q @ k.T / hd ** 0.5).softmax(-1) @ v
    return out[:, :M], out[:, M:]


def assert_close(got, expected, tolerance=2e-6):
    """Largest error, relative to the largest value."""
    assert got.shape == expected.shape
    if got.numel():
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3)
        assert error < tolerance, f"relative error {error:.1e}"


# -------------------------------------------------------------------------------------------- joint attention

@given(sizes, st.booleans(), st.data())
def test_joint_attention_is_softmax_attention_over_text_and_image_in_one_sequence(size, with_norm, data):
    x = streams(**size)
    norm = norm_scales(size["hd"]) if with_norm else None
    one = st.integers(0, size["M"])
    lengths = data.draw(st.none() | st.lists(one, min_size=size["B"], max_size=size["B"]).map(torch.tensor))
    out = joint_attention(*x, norm_weights=norm, text_lengths=lengths)
    for got, expected in zip(out, exact(*x, norm_weights=norm, text_lengths=lengths)):
        assert_close(got, expected, 5e-6)


@given(sizes, st.booleans())
def test_the_spelled_out_attention_is_pytorchs(size, masked):
    q, k, v = (x.transpose(1, 2) for x in streams(**size)[3:])
    mask = torch.rand(size["B"], 1, 1, size["N"], generator=seeded()) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True                             # a row with nothing to attend to has no softmax
    assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_without_text_or_with_text_of_length_zero_the_image_attends_to_itself():
    x = streams(M=0)
    alone = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x[3:])).transpose(1, 2)
    nothing, none_at_all = joint_attention(None, None, None, *x[3:])
    empty, zero_length = joint_attention(*x)
    assert nothing is None and empty.shape == (2, 0, 2, HD)
    assert_close(none_at_all, alone)
    assert_close(zero_length, alone)
    _, all_masked = joint_attention(*streams(), text_lengths=torch.tensor([0, 0]))
    assert_close(all_masked, joint_attention(None, None, None, *streams()[3:])[1])


def test_image_norms_alone_serve_an_attention_without_text():
    x, w = streams(M=0), norm_scales()
    _, out = joint_attention(None, None, None, *x[3:], norm_weights=(None, None, *w[2:]))
    assert_close(out, exact(*x, norm_weights=w)[1])


@pytest.mark.parametrize("norm", [None, norm_scales()], ids=["no norm", "norm"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])], ids=["all text", "text_lengths"])
def test_dead_text_queries_can_be_left_out_without_changing_the_image(norm, lengths):
    x = streams()
    nothing, image = joint_attention(None, *x[1:], norm_weights=norm, text_lengths=lengths)
    assert nothing is None
    assert_close(image, joint_attention(*x, norm_weights=norm, text_lengths=lengths)[1])


def test_text_beyond_its_length_has_no_influence():
    x, lengths = streams(), torch.tensor([3, 0])
    other = [y.clone() for y in x]
    for b, n in enumerate(lengths):
        for key_or_value in other[1:3]:
            key_or_value[b, n:] = 1e4
    for before, after in zip(joint_attention(*x, text_lengths=lengths),
                             joint_attention(*other, text_lengths=lengths)):
        assert torch.equal(before, after)


def test_norm_weights_normalise_each_head_of_queries_and_keys_before_the_product():
    x, w = streams(), norm_scales()
    by_hand = list(x)
    for i, scale in zip((0, 1, 3, 4), w):
        by_hand[i] = x[i] / (x[i].square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    for got, expected in zip(joint_attention(*x, norm_weights=w), joint_attention(*by_hand)):
        assert_close(got, expected)
    for loud, soft in zip(joint_attention(*(1000 * y for y in x[:2]), x[2], *x[3:], norm_weights=w),
                          joint_attention(*x, norm_weights=w)):
        assert_close(loud, soft, 1e-5)                  # the size of a query no longer matters


def test_views_of_one_packed_qkv_give_what_contiguous_tensors_give():
    text, image = (torch.randn(2, L, 3, 2, HD, generator=seeded()) for L in (5, 6))
    views = [*text.unbind(2), *image.unbind(2)]
    assert not any(v.is_contiguous() for v in views)
    for got, expected in zip(joint_attention(*views), joint_attention(*(v.contiguous() for v in views))):
        assert_close(got, expected)


@pytest.mark.parametrize("N", [20, 1030], ids=["spelled out up to 1024 tokens", "PyTorch's own above"])
def test_bfloat16_on_a_cpu_agrees_with_float64_within_its_eight_bits(N):
    x, w = streams(B=1, M=4, N=N, nh=1, dtype=torch.bfloat16), norm_scales()
    out = joint_attention(*x, norm_weights=w)
    assert all(o.dtype == torch.bfloat16 for o in out)
    for got, expected in zip(out, exact(*x, norm_weights=w)):
        assert_close(got, expected, 2e-2)


def test_bfloat16_on_a_cpu_obeys_text_lengths():
    x, lengths = streams(dtype=torch.bfloat16), torch.tensor([1, 4])
    for got, expected in zip(joint_attention(*x, text_lengths=lengths), exact(*x, text_lengths=lengths)):
        assert_close(got, expected, 2e-2)


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2])], ids=["all text", "text_lengths"])
def test_gradients_of_joint_attention_are_those_of_the_formula(lengths):
    x, w = streams(), norm_scales()
    pull = [torch.randn(2, L, 2, HD, generator=seeded(2)) for L in (5, 6)]
    found = []
    for function in (joint_attention, exact):
        leaves = [y.clone().requires_grad_() for y in (*x, *w)]
        out = function(*leaves[:6], norm_weights=tuple(leaves[6:]), text_lengths=lengths)
        found.append(torch.autograd.grad(sum((o * p).sum() for o, p in zip(out, pull)), leaves))
    for got, expected in zip(*found):
        assert_close(got, expected, 1e-5)


# --------------------------------------------------------------------------------------- norms and modulation

def test_rms_norm_survives_values_whose_square_overflows_float16():
    x = torch.tensor([[300.0, -400.0, 500.0, 0.0]], dtype=torch.float16)
    y = rms_norm(x, torch.ones(4))
    assert y.dtype == torch.float16 and x.square().isinf().any()
    assert_close(y, x.double() / x.double().square().mean().sqrt(), 1e-3)


def exact_modulate(x, shift, scale, eps=1e-6):
    x, shift, scale = x.double(), shift.double().unsqueeze(1), scale.double().unsqueeze(1)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def activations(B, L, D, dtype=torch.float32):
    """x, y (B, L, D); gate, shift, scale (B, D)"""
    g = seeded()
    return [torch.randn(*s, generator=g).to(dtype) for s in [(B, L, D)] * 2 + [(B, D)] * 3]


shapes = st.tuples(st.integers(1, 3), st.integers(0, 9), st.sampled_from([2, 7, 64, 130]))


@given(shapes)
def test_modulate_is_a_plain_layer_norm_then_scale_and_shift(shape):
    x, _, _, shift, scale = activations(*shape)
    if shape[-1] == 2:
        x[..., 0] += 1                              # two almost equal numbers: their norm is ill-conditioned
    assert_close(modulate(x, shift, scale), exact_modulate(x, shift, scale), 1e-4)


@given(shapes)
def test_gate_residual_modulate_adds_the_gated_branch_then_modulates_the_sum(shape):
    x, y, gate, shift, scale = activations(*shape)
    h, modulated = gate_residual_modulate(x, y, gate, shift, scale)
    assert_close(h, x.double() + gate.double().unsqueeze(1) * y.double())
    assert_close(modulated, exact_modulate(h, shift, scale), 1e-4)


def test_each_sample_has_its_own_modulation_and_eps_keeps_constant_tokens_finite():
    x, shift, scale = (torch.full((2, 3, 4), 7.0), torch.tensor([[1.0] * 4, [2.0] * 4]),
                       torch.full((2, 4), 5.0))
    assert torch.equal(modulate(x, shift, scale), shift.unsqueeze(1).expand(2, 3, 4))
    x = torch.tensor([[[1.0, -1.0]]])
    assert_close(modulate(x, torch.zeros(1, 2), torch.zeros(1, 2), eps=3.0), x / 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_rounded_only_on_the_way_out(dtype, tolerance):
    x, y, gate, shift, scale = activations(2, 5, 64, dtype)
    out = modulate(x, shift, scale)
    assert out.dtype == dtype
    assert_close(out, exact_modulate(x, shift, scale), tolerance)
    h, modulated = gate_residual_modulate(x, y, gate, shift, scale)
    assert h.dtype == modulated.dtype == dtype


def test_gradients_of_the_modulations_are_those_of_the_formula():
    inputs = activations(2, 5, 16)
    pull = torch.randn(2, 2, 5, 16, generator=seeded(3))

    def formula(x, y, gate, shift, scale):
        h = x.double() + gate.double().unsqueeze(1) * y.double()
        return h, exact_modulate(h, shift, scale)

    found = []
    for function in (gate_residual_modulate, formula):
        leaves = [t.clone().requires_grad_() for t in inputs]
        found.append(torch.autograd.grad(sum((o * p).sum() for o, p in zip(function(*leaves), pull)), leaves))
    for got, expected in zip(*found):
        assert_close(got, expected, 1e-5)


# -------------------------------------------------------------------------------------------------- bad input

def test_an_unknown_back_end_is_refused_with_the_choices():
    x, y, gate, shift, scale = activations(1, 2, 4)
    calls = [lambda b: joint_attention(*streams(), backend=b), lambda b: modulate(x, shift, scale, backend=b),
             lambda b: gate_residual_modulate(x, y, gate, shift, scale, backend=b)]
    for call in calls:
        with pytest.raises(ValueError, match="no back end 'cudnn'.*choose auto.*torch"):
            call("cudnn")
        call("torch")
