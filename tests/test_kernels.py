"""Claims about the three operations in kernels/, each held against the formula in float64,
sample by sample."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import flop_counter

import kernels
from kernels import (adaln, attention, bench, gate_residual_modulate, joint_attention, modulate, norm_layout,
                     rms_norm)

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
    for how in (dict(norm_weights=w, eps=3.0), dict(norm_weights=w, eps=0.0)):
        for got, expected in zip(joint_attention(*x, **how), exact(*x, **how)):
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
    x, w = torch.randn(2, 4, 64, generator=seeded()).half()
    assert torch.equal(rms_norm(x, w), rms_norm(x.float(), w).half())           # rounded only on the way out


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
    zero = torch.zeros(1, 2)
    assert_close(modulate(x, zero, zero, eps=3.0), x / 2)
    assert_close(gate_residual_modulate(x, x, zero, zero, zero, eps=3.0)[1], x / 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_rounded_only_on_the_way_out(dtype, tolerance):
    x, y, gate, shift, scale = activations(2, 5, 64, dtype)
    out = modulate(x, shift, scale)
    assert out.dtype == dtype
    assert_close(out, exact_modulate(x, shift, scale), tolerance)
    assert torch.equal(out, modulate(x.float(), shift.float(), scale.float()).to(dtype))
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

def test_an_unknown_back_end_is_refused_with_the_choices(monkeypatch):
    x, y, gate, shift, scale = activations(1, 2, 4)
    calls = [lambda b: joint_attention(*streams(), backend=b), lambda b: modulate(x, shift, scale, backend=b),
             lambda b: gate_residual_modulate(x, y, gate, shift, scale, backend=b)]
    for call in calls:
        with pytest.raises(ValueError, match="no back end 'cudnn'.*choose auto.*torch.*triton"):
            call("cudnn")
        call("torch")
    monkeypatch.setattr(kernels, "DEFAULT", "fast")
    with pytest.raises(ValueError, match="SD3_KERNELS is 'fast': choose auto, torch or triton"):
        calls[0]("auto")


def attend(x, **changes):
    return joint_attention(**dict(zip(NAMES, x)) | changes)


@pytest.mark.parametrize("changes, message", [
    (dict(k_img=torch.zeros(2, 6, 3, HD)), r"k_img must be \(2, 6, 2, 8\) .* got \(2, 6, 3, 8\)"),
    (dict(q_txt=torch.zeros(2, 4, 2, HD)), r"q_txt must be \(2, 5, 2, 8\)"),
    (dict(q_img=torch.zeros(2, 6, 2 * HD)), r"q_img must be \(B, N, nh, hd\)"),
    (dict(q_img=torch.zeros(2, 6, 0, HD)), r"q_img must be \(B, N, nh, hd\), got \(2, 6, 0, 8\)"),
    (dict(v_txt=None), "k_txt and v_txt go together"),
    (dict(k_txt=None, v_txt=None), "q_txt needs them"),
    (dict(v_img=None), "v_img must be a tensor, got NoneType"),
    (dict(v_img=torch.zeros(2, 6, 2, HD).bfloat16()), "v_img is torch.bfloat16, q_img torch.float32"),
    (dict(k_img=torch.zeros(2, 6, 2, HD, device="meta")), "k_img is on meta, q_img on cpu"),
    (dict(norm_weights=[torch.ones(HD)] * 3), "norm_weights must be of .* got 3"),
    (dict(norm_weights=[torch.ones(4)] * 4), r"norm weight of q_txt must be \(8,\)"),
    (dict(norm_weights=[None] * 4), "norm weight of q_txt is None"),
    (dict(norm_weights=[torch.ones(HD)] * 3 + [torch.ones(HD).half()]), "float16: all of them must share"),
    (dict(text_lengths=torch.ones(3, dtype=torch.int64)), r"text_lengths must be \(2,\)"),
    (dict(text_lengths=torch.ones(2)), "text_lengths must be int32 or int64"),
    (dict(eps=float("nan")), "eps must be a finite number"),
    (dict(eps=-1e-6), "eps must be a finite number, at least 0"),
])
def test_attention_names_the_argument_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(streams(), **changes)


@pytest.mark.parametrize("changes, message", [
    (dict(x=torch.zeros(5, 16)), r"x must be \(B, L, D\)"),
    (dict(y=torch.zeros(2, 4, 16)), r"y must be \(2, 5, 16\) .* got \(2, 4, 16\)"),
    (dict(scale=torch.zeros(2, 1, 16)), r"scale must be \(2, 16\)"),
    (dict(gate=torch.zeros(2, 16, device="meta")), "gate is on meta, x on cpu"),
    (dict(eps=float("inf")), "eps must be a finite number"),
    (dict(eps=-1e-6), "eps must be a finite number, at least 0"),
])
def test_modulations_name_the_argument_that_does_not_fit(changes, message):
    given = dict(zip(("x", "y", "gate", "shift", "scale"), activations(2, 5, 16))) | changes
    with pytest.raises(ValueError, match=message):
        gate_residual_modulate(**given)


# --------------------------------------------------------------------------------------------- who gets which

def test_without_a_gpu_the_formulas_run_and_triton_stays_unimported():
    program = ("import sys, torch\n"
               "from kernels import modulate\n"
               "x, s = torch.ones(1, 2, 4), torch.ones(1, 4)\n"
               "modulate(x, s, s)\n"
               "assert 'triton' not in sys.modules\n"
               "try: modulate(x, s, s, backend='triton')\n"
               "except ValueError as e: print(e)\n"
               "import importlib, os, kernels\n"
               "os.environ['SD3_KERNELS'] = 'triton'\n"
               "print(importlib.reload(kernels).default())\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SD3_KERNELS": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(kernels.__file__).parent.parent,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    why = "it needs a CUDA|Triton is not installed|PyTorch 2.6 "
    assert re.match(f"modulate cannot run in Triton: ({why})", done.stdout)
    assert done.stdout.endswith("\ntriton\n")


def test_an_environment_that_asks_for_what_the_device_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for asked in ("auto", "torch", "triton"):
        monkeypatch.setattr(kernels, "DEFAULT", asked)
        if asked != "triton":
            kernels.check_environment(torch.device("cpu"))
    with pytest.raises(ValueError, match="^SD3_KERNELS is triton: "):
        kernels.check_environment(torch.device("cpu"))


def test_each_operation_asks_by_the_name_head_dim_and_activation_that_the_bench_measured(monkeypatch):
    asked, x, (a, b, gate, shift, scale) = set(), streams(nh=3), activations(2, 6, 16)

    def choose(backend, operation, head_dim=0, **tensors):
        asked.add((operation, head_dim, next(iter(tensors))))
        return "torch"

    monkeypatch.setattr(kernels, "choose", choose)
    for weights in (None, norm_scales()):
        joint_attention(*x, norm_weights=weights)
    joint_attention(None, None, None, *x[3:], norm_weights=norm_scales())
    modulate(a, shift, scale)
    gate_residual_modulate(a, b, gate, shift, scale)
    assert asked == {(name, HD, "q_img") if "attention" in name else (name, 0, "x")
                     for name in {c["operation"] for c in bench.cases()} - {"model"}}


HEADER = "gpu,operation,dtype,head_dim,pass,size,provider,ms,error"
MEASURED = """H100,modulate,bfloat16,0,forward,4000,torch,1.0,0.004
H100,modulate,bfloat16,0,forward,4000,triton,1.5,0.004
H100,modulate,bfloat16,0,forward,1000,torch,1.0,0.004
H100,modulate,bfloat16,0,forward,1000,torch compiled,0.4,0.004
H100,modulate,bfloat16,0,forward,1000,triton,0.5,0.004
H100,modulate,bfloat16,0,forward,8000,torch,1.0,0.004
H100,modulate,bfloat16,0,forward,9000,triton,1.5,0.004
H100,joint_attention,bfloat16,64,forward,1000,torch,3.0,0.004
H100,joint_attention,bfloat16,64,forward,1000,triton,2.0,0.004
H100,joint_attention,bfloat16,64,forward,1000,triton+sdpa,1.0,0.004
H100,joint_attention,bfloat16,64,forward,1000,flash,0.5,0.004
H100,joint_attention,bfloat16,64,forward,1000,torch compiled,0.9,0.004"""


def test_auto_follows_what_was_measured_on_this_gpu_at_the_nearest_size(tmp_path, monkeypatch):
    (tmp_path / "H100.csv").write_text(f"{HEADER}\n{MEASURED}\nH100,modulate,bfl", encoding="utf-8")
    table = kernels.read_results(tmp_path)
    key = ("H100", "modulate", "bfloat16", 0, "forward")
    three = ("H100", "joint_attention", "bfloat16", 64, "forward")
    assert table == {(*key, False): [(2000.0, ("triton", "torch")), (float("inf"), ("torch", "triton"))],
                     (*key, True): [(float("inf"), ("torch", "triton"))],
                     (*three, False): [(float("inf"), ("triton+sdpa", "triton", "torch"))],
                     (*three, True): [(float("inf"), ("torch", "triton+sdpa", "triton"))]}
    monkeypatch.setattr(kernels, "MEASURED", table)

    def ranking(size, dtype=torch.bfloat16, gpu="H100", grad=False):
        x = torch.zeros(1, size, 1, dtype=dtype, requires_grad=grad)
        return kernels.ranking("modulate", 0, {"x": x, "gate": None}, gpu)

    assert ranking(1999)[0] == ranking(10)[0] == ("triton", "torch")
    order, reason = ranking(2001)
    assert order == ("torch", "triton") and "measured to be faster on H100" in reason
    for other in (dict(dtype=torch.float16), dict(gpu="A100"), dict(grad=True)):
        order, reason = ranking(10, **other)
        assert order == () and "not measured on" in reason and "bench.py" in reason


class OnGpu:
    """As much of a tensor on a GPU as the dispatch looks at."""
    device, dtype, shape, requires_grad = torch.device("cuda", 0), torch.bfloat16, (1, 10, 4), False
    dim, numel, stride = (lambda self: 3), (lambda self: 40), (lambda self, i: 4 if i == 1 else 1)


@pytest.fixture
def h100(monkeypatch):
    """A GPU to the dispatch, on which two things were measured."""
    gpu, ever = SimpleNamespace(name="H100", major=9), float("inf")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(kernels, "installed", lambda: True)
    monkeypatch.setattr(kernels, "TORCH", (2, 7))
    monkeypatch.setattr(kernels, "DEFAULT", "auto")
    monkeypatch.setattr(kernels, "MEASURED", {
        ("H100", "modulate", "bfloat16", 0, "forward", False): [(ever, ("triton", "torch"))],
        ("H100", "joint_attention", "bfloat16", 4, "forward", False): [
            (400, ("torch", "triton+sdpa", "triton")), (ever, ("triton", "triton+sdpa", "torch"))]})
    monkeypatch.setattr(kernels, "_told", set())
    return gpu


def test_on_a_gpu_auto_takes_the_winner_and_says_once_why_it_does_not(h100, capsys, monkeypatch):
    assert kernels.choose("auto", "modulate", x=OnGpu()) == "triton"
    assert capsys.readouterr().err == ""
    for _ in range(3):
        assert kernels.choose("auto", "gate_residual_modulate", x=OnGpu()) == "torch"
        assert kernels.choose("triton", "gate_residual_modulate", x=OnGpu()) == "triton"
        assert kernels.choose("torch", "modulate", x=OnGpu()) == "torch"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "not measured on H100 in bfloat16" in told
    h100.major = 8
    assert kernels.choose("auto", "modulate", x=OnGpu()) == "triton"
    h100.major = 7
    assert kernels.choose("auto", "modulate", x=OnGpu()) == "torch"
    assert "older than compute capability 8.0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="older than compute capability 8.0"):
        kernels.choose("triton", "modulate", x=OnGpu())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="cut for NVIDIA's GPUs"):
        kernels.choose("triton", "modulate", x=OnGpu())
    monkeypatch.setattr(kernels, "TORCH", (2, 6))
    with pytest.raises(ValueError, match="the kernels need 3.3: pip install --upgrade torch"):
        kernels.choose("triton", "modulate", x=OnGpu())


def test_of_the_two_kernels_for_attention_the_one_measured_to_be_faster_runs(h100, capsys):
    large = OnGpu()
    large.numel = lambda: 4000
    assert kernels.choose("auto", "joint_attention", 4, q_img=OnGpu()) == "torch"
    assert "measured to be faster on H100" in capsys.readouterr().err
    assert kernels.choose("triton", "joint_attention", 4, q_img=OnGpu()) == "triton+sdpa"
    for backend in ("auto", "triton"):
        assert kernels.choose(backend, "joint_attention", 4, q_img=large) == "triton"
    assert kernels.choose("triton", "joint_attention, no text", 4, q_img=large) == "triton"     # not measured


def test_cases_that_the_dispatch_cannot_tell_apart_are_of_one_shape():
    """Else the time of one would stand for the other's: attention's grows with the square of its tokens."""
    shapes = {}
    for c in bench.cases():
        B, N, width, of_attention = c["B"], c["N"], c["nh"] * c["hd"], "attention" in c["operation"]
        if c["operation"] != "model":
            key = (c["operation"], c["dtype"], c["hd"] * of_attention,
                   kernels.size_of(c["operation"], B * N * width, N))
            shapes.setdefault(key, set()).add((B, c["M"], N, width) if of_attention else (B * N, width))
    assert max(map(len, shapes.values())) == 1
    large, small = (kernels.size_of("joint_attention", 4096 * 2432, N) for N in (4096, 1024))
    assert large == 4 * small                                       # one picture of 1024 pixels, four of 512


def test_auto_counts_the_tokens_of_attention_and_the_elements_of_a_modulation(h100, monkeypatch):
    sizes = []
    usual = kernels.size_of
    monkeypatch.setattr(kernels, "size_of", lambda *a: sizes.append(usual(*a)) or sizes[-1])
    for operation, head_dim in (("modulate", 0), ("joint_attention", 4)):
        kernels.choose("auto", operation, head_dim, x=OnGpu())
    assert sizes == [40, 400]                                       # 10 tokens of 4 channels


def test_a_row_cut_off_anywhere_is_no_row_nor_is_what_was_written_into_its_line(tmp_path):
    """As where the disk was full, or the machine went down."""
    torch_row, triton_row, broken = (f"A,modulate,float16,0,forward,8,{end},0,\n"
                                     for end in ("torch,3", "triton,1.25", "triton,9.75"))
    rows = torch_row + triton_row
    expected = {("A", "modulate", "float16", 0, "forward", False): [(float("inf"), ("triton", "torch"))]}
    for cut in range(len(broken) - 1):
        for end in ("", "\n" + rows, rows.replace("A,", "B,")):
            (tmp_path / "A.csv").write_text(f"{HEADER},reason\n{rows}{broken[:cut]}{end}", encoding="utf-8")
            found = kernels.read_results(tmp_path)
            assert {k: v for k, v in found.items() if k[0] == "A"} == expected, (cut, end)


def test_the_bench_goes_on_in_a_line_of_its_own_behind_a_row_that_was_cut_off(tmp_path):
    path, row = tmp_path / "A.csv", dict(gpu="A", torch="2", triton="3", ms=1.25, reason="a, b")
    for rows in ([row], [row, row]):
        bench.append(path, rows)
    assert bench.measured_before([tmp_path], "A", ("2", "3")) == 3 * [{k: str(v) for k, v in row.items()}]
    with path.open("a", encoding="utf-8") as f:
        f.write("A,2,3,1.")
    bench.append(path, [row])
    assert len(bench.measured_before([tmp_path], "A", ("2", "3"))) == 4
    assert len(path.read_text(encoding="utf-8").splitlines()) == 6


def test_a_later_measurement_replaces_an_earlier_one(tmp_path):
    folders = [tmp_path / "their own", tmp_path / "ours"]
    for day, ms, folder in zip((1, 2), (0.5, 2.0), folders):
        folder.mkdir()
        rows = f"A,modulate,float16,0,forward,8,torch,1,0\nA,modulate,float16,0,forward,8,triton,{ms},0\n"
        (folder / f"A_{day}.csv").write_text(f"{HEADER}\n{rows}", encoding="utf-8")
    assert kernels.read_results(*folders) == {
        ("A", "modulate", "float16", 0, "forward", False): [(float("inf"), ("torch", "triton"))]}


@pytest.mark.parametrize("major, first", [(8, False), (9, True), (10, True), (12, False)])
def test_cudnn_is_asked_first_where_others_measured_it_to_be_faster(major, first, h100):
    h100.major = major
    assert norm_layout.cudnn_first(torch.device("cuda")) == first
    assert not norm_layout.cudnn_first(torch.device("cpu"))


def test_what_was_wrong_or_failed_where_it_was_measured_is_not_taken(tmp_path):
    rows = [f"A,attention,float16,64,forward,8,{r}"
            for r in ("torch,3,0.004", "triton,1,0.06", "triton+sdpa,2,0.004", "failed,nan,nan")]
    rows += [f"A,modulate,float16,0,forward,8,{r}" for r in ("torch,3,0.004", "triton,1,nan")]
    (tmp_path / "A.csv").write_text("\n".join([HEADER, *rows]), encoding="utf-8")
    found = kernels.read_results(tmp_path)
    orders = {key[1]: order for key, [(_, order)] in found.items()}
    assert orders == {"attention": ("triton+sdpa", "torch", "triton"), "modulate": ("torch", "triton")}


@pytest.mark.parametrize("bad, reason", [
    (torch.zeros(2, 3, 4, dtype=torch.float64), "float64, the kernels take"),
    (torch.zeros(2, 3, 5, 4).transpose(2, 3), r"x \(2, 3, 4, 5\) has stride 4 in its last dim"),
    (torch.zeros(8)[::2], "has stride 2 in its last dim"),
    (torch.zeros(1, 1, 1, 257), "head dim 257"),
    (torch.empty(1, 2 ** 20, 2 ** 11, device="meta"), "too many for 32-bit"),
    (torch.empty(1, 1, 1, 2 ** 11, device="meta").expand(1, 2 ** 14, 2 ** 6, 2 ** 11), "too many for 32-bit"),
    (torch.empty(1, 2 ** 5, 2 ** 20, 2 ** 6, device="meta").transpose(1, 2)[:, :9], "too many for 32-bit"),
    (torch.empty(2 ** 16, 1, 8, device="meta"), "x has 65536 pictures times heads, a GPU takes up to 65535"),
    (torch.empty(2 ** 14, 1, 4, 8, device="meta"), "65536 pictures times heads"),
])
def test_tensors_that_no_kernel_takes_are_refused_with_the_reason(bad, reason):
    assert re.search(reason, adaln.triton_refuses({"nothing": None, "x": bad}))


def test_the_largest_that_a_kernel_takes_is_not_refused():
    for largest in (torch.empty(1, 1, 1, 256), torch.empty(2 ** 16 - 1, 1, 8, device="meta")):
        assert adaln.triton_refuses({"x": largest}) is None


def test_a_smoke_run_of_the_bench_is_kept_out_of_the_results(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--smoke"])
    assert stop.value.code == 2 and "--smoke measures nothing" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stop:
            bench.main([])
        assert stop.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(kernels.TORCH < (2, 7), reason="PyTorch 2.6 compiles them one by one")
def test_the_bench_compiles_alike_blocks_once_and_keeps_the_models_parameters():
    from torch._dynamo.testing import CompileCounter
    model = bench.MMDiT(bench.MMDiTConfig(4, heads=1, head_dim=16, in_channels=4, context_dim=24,
                                          pooled_dim=12, pos_max=8, pos_sample=4, pos_base=4,
                                          dual_blocks=2))
    compiler = CompileCounter()
    compiled = bench.compiled_blocks(model, "joint_blocks", dict(dynamic=False, backend=compiler))
    assert all(a is b for a, b in zip(model.parameters(), compiled.parameters(), strict=True))
    x = torch.randn(1, 4, 4, 4), torch.rand(1), torch.randn(1, 3, 24), torch.randn(1, 12)
    with torch.no_grad():
        assert torch.equal(compiled(*x), model(*x))
    assert compiler.frame_count == 3                    # with second attention (two), without, and the last


def test_a_rival_is_built_in_the_dtype_of_ours_and_left_out_if_memory_does_not_last(monkeypatch, capsys):
    def theirs(**shape):
        dtypes.append(torch.get_default_dtype())
        if len(dtypes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 92 MiB.\nOf 80 GB ...")
        return torch.nn.Sequential()

    dtypes = []
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(SD3Transformer2DModel=theirs))
    monkeypatch.setattr(bench, "compiled_blocks", lambda model, name, how: model)
    case = bench.cases(smoke=True)[-1] | {"dtype": "bfloat16"}
    ours = ["torch", "torch compiled", "triton", "triton compiled"]
    assert case["operation"] == "model" and list(bench.rivals(case, "cpu")) == ours
    assert "diffusers left out: CUDA out of memory. Tried to allocate 92 MiB.\n" in capsys.readouterr().out
    assert list(bench.rivals(case, "cpu")) == ours + ["diffusers", "diffusers compiled"]
    assert dtypes == [torch.bfloat16] * 2 and torch.get_default_dtype() == torch.float32


def test_the_bench_covers_the_three_models_at_both_sizes_and_a_text():
    found = bench.cases()
    assert {(c["operation"], c["dtype"], c["B"]) for c in found if c["N"] == bench.TEXT} == {
        (operation, dtype, B) for operation in ("modulate", "gate_residual_modulate")
        for dtype in ("bfloat16", "float32") for B in (1, 2, 4, 8)}
    assert {(c["model"], c["pixels"], c["B"]) for c in found if c["pixels"]} == {
        (model, pixels, B) for model in ("sd3-medium", "sd3.5-medium", "sd3.5-large")
        for pixels in (512, 1024) for B in (1, 2, 4, 8)}
    assert {c["operation"] for c in found} == {
        "joint_attention", "joint_attention with norms", "joint_attention with norms, no text", "modulate",
        "gate_residual_modulate", "model"}
    assert len({bench.label(c | {"pass": "forward"}) for c in found}) == len(found)     # so none is skipped


@pytest.mark.parametrize(
    "case", [c for c in bench.cases(batches=(2,))
             if "modul" not in c["operation"] and (c["operation"], c["pixels"]) != ("model", 1024)],
    ids=lambda c: f"{c['operation']}, {c['model']}, {c['pixels']}")
def test_the_bench_counts_the_operations_that_pytorch_counts(case):
    B, L, nh, hd = case["B"], case["M"] + case["N"], case["nh"], case["hd"]
    if case["operation"] == "model":
        with torch.device("meta"), flop_counter.FlopCounterMode(display=False) as counter:
            bench.MMDiT(bench.model_config(case))(*bench.inputs(case | {"dtype": "float32"}, "meta"))
        assert bench.work(case, 0)[0] == counter.get_total_flops()
    else:
        q = (B, nh, L, hd)
        forward = flop_counter.sdpa_flop_count(q, q, q)
        assert bench.work(case, 0)[0] == forward
        assert bench.work(case, 1)[0] == forward + flop_counter.sdpa_backward_flop_count(q, q, q, q)


@pytest.mark.parametrize("name, dtype", [("modulate", "bfloat16"), ("gate_residual_modulate", "bfloat16"),
                                         ("joint_attention with norms", "bfloat16"),
                                         ("modulate", "float32"), ("gate_residual_modulate", "float32")])
def test_the_bench_counts_each_activation_that_goes_in_or_out_once(name, dtype):
    case = next(c for c in bench.cases((512,), (2,)) if (c["operation"], c["dtype"]) == (name, dtype))
    args = bench.inputs(case, "meta")
    out = bench.tensors(bench.rivals(case, "cpu")["torch"](*args))
    activations = [a for a in args if a.dim() > 2]
    assert {a.dtype for a in args[1:]} == {torch.bfloat16} and args[0].dtype == getattr(torch, dtype)

    def moved(tensors):
        return sum(a.numel() * a.element_size() for a in tensors)

    size = moved(activations + out)
    assert bench.work(case, 0)[1] == size
    # backward: inputs, outputs' gradients and (attention, gated sum) outputs again, and inputs' gradients
    gated = name == "gate_residual_modulate"                        # reads h again, not x
    again = out if "attention" in name else out[:gated]
    size += moved(activations[gated:] + again + out + activations)
    assert bench.work(case, 1)[1] == size


def test_without_gradients_the_measurement_of_the_forward_alone_counts(monkeypatch):
    key, ever = ("H100", "modulate", "bfloat16", 0), float("inf")
    orders = dict(zip(bench.PASSES, (("triton", "torch"), ("torch", "triton")), strict=True))
    monkeypatch.setattr(kernels, "MEASURED", {(*key, p, False): [(ever, o)] for p, o in orders.items()})
    x = torch.zeros(1, 10, 1, dtype=torch.bfloat16, requires_grad=True)
    assert kernels.ranking("modulate", 0, {"x": x}, "H100")[0] == ("torch", "triton")
    with torch.no_grad():
        assert kernels.ranking("modulate", 0, {"x": x}, "H100")[0] == ("triton", "torch")
