"""Claims about the layer that sees white text features while it learns: it is a plain layer all the time."""
import pytest
import torch
from hypothesis import given, strategies as st

from stages import PrecomputedText, WhiteLinear, to_signed


def white_linear(linear, some, learned=False):
    white = WhiteLinear(linear)
    assert torch.equal(white(some), linear(some))                           # so far
    white.measure(some, learned)
    return white


def features(n, width, seed):
    """Inputs as text features are: far from 0, and of a few strong directions."""
    g = torch.Generator().manual_seed(seed)
    return 3 + (torch.randn(n, width, generator=g) * torch.logspace(0.5, -2, width)) @ torch.linalg.qr(
        torch.randn(width, width, generator=g))[0]


@given(st.integers(2, 24), st.integers(1, 12), st.integers(0, 99))
def test_what_is_saved_is_a_plain_layer_that_computes_the_same(width, out, seed):
    x = features(400, width, seed)
    white = white_linear(torch.nn.Linear(width, out), x)
    plain = white.folded()
    assert type(plain) is torch.nn.Linear and plain.state_dict().keys() == white.state_dict().keys()
    assert torch.allclose(plain(x), white(x), atol=1e-4)


@given(st.integers(2, 24), st.integers(1, 12), st.integers(0, 99))
def test_a_learned_layer_goes_on_from_what_it_computes(width, out, seed):
    x, linear = features(400, width, seed), torch.nn.Linear(width, out)
    assert torch.allclose(white_linear(linear, x, learned=True)(x), linear(x), atol=1e-4)


def test_an_untrained_layer_sees_every_strong_direction_alike():
    x = features(4000, 16, 0)
    eye = torch.nn.Linear(16, 16)
    eye.weight.data, eye.bias.data = torch.eye(16), torch.zeros(16)
    seen = white_linear(eye, x)(x)
    strong = torch.linalg.eigvalsh(x.T.cov()) > x.T.cov().trace() / 16              # above the mean
    assert seen.mean(0).abs().max() < 1e-4
    assert (torch.linalg.eigvalsh(seen.T.cov())[strong] > 0.95).all() and strong.any()
    assert torch.linalg.eigvalsh(seen.T.cov()).max() < 1.01


def test_rounding_in_directions_in_which_features_never_differ_is_not_blown_up():
    """As of encoders narrower than the context, whose columns are filled up with zeros."""
    x = features(400, 16, 0)
    x[:, 3:] = 2
    white = white_linear(torch.nn.Linear(16, 16), x)
    strongest = torch.linalg.eigvalsh(x.T.cov()).max()
    assert (torch.linalg.eigvalsh(white.matrix) * strongest ** 0.5).max() < 25      # 23.1 at the floor


def test_pictures_lie_from_minus_one_to_one():
    assert to_signed(torch.tensor([0, 51, 255], dtype=torch.uint8), "cpu").tolist() == pytest.approx(
        [-1, -0.6, 1])


def test_texts_of_a_sample_grid_get_their_own_features_in_any_order():
    text = PrecomputedText(["a", "b", ""], torch.arange(3.0).view(3, 1, 1), torch.arange(3.0).view(3, 1))
    said = text(["b", "", "a", "b"], 1)
    assert said.context.flatten().tolist() == said.pooled.flatten().tolist() == [1, 2, 0, 1]


def test_under_autocast_its_whitening_stays_in_float32():
    x = features(400, 16, 1)
    white = white_linear(torch.nn.Linear(16, 16), x)
    right = white.folded()(x)
    with torch.autocast("cpu", torch.bfloat16):
        error, of_the_plain = ((layer(x).float() - right).norm() for layer in (white, white.folded()))
    assert error < 0.01 * right.norm() < of_the_plain                       # it would lose the differences
