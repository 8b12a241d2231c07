"""Claims about Muon: the step is orthogonal, packed matrices are steps of their own, and everything else is
AdamW's."""
import pytest
import torch
from hypothesis import given, strategies as st

import muon
from mmdit import MMDiT, MMDiTConfig
from muon import Muon, orthogonalize, split


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
@given(st.integers(1, 3), st.integers(2, 40), st.integers(0, 40), st.floats(1e-6, 1e6))
def test_singular_values_become_about_one_and_the_singular_vectors_stay(dtype, error, n, rows, more, size):
    torch.manual_seed(rows)
    u, _ = torch.linalg.qr(torch.randn(n, rows, rows))
    v, _ = torch.linalg.qr(torch.randn(n, rows + more, rows))
    s = torch.rand(n, rows) * 0.95 + 0.05
    x = u * s[:, None] @ v.mT * size                                        # (n, rows, rows + more)
    found = orthogonalize(x, dtype).float()
    values = u.mT @ found @ v                                               # diagonal if the vectors stayed
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert (values - torch.diag_embed(diagonal)).abs().max() < error        # after five rounds


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_a_step_moves_each_packed_matrix_as_if_it_stood_alone(packed, rows, columns):
    torch.manual_seed(rows + columns)
    whole = torch.nn.Parameter(torch.randn(packed * rows, columns))
    alone = [torch.nn.Parameter(p.clone()) for p in whole.detach().split(rows)]
    optimizers = Muon([{"params": [whole], "packed": packed}], lr=0.1), Muon(alone, lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        for p, grad in zip(alone, whole.grad.split(rows)):
            p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(whole, torch.cat(list(alone)), atol=5e-3)         # batched products round otherwise


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48)])
def test_steps_equal_those_of_torchs_own_muon(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = (Muon([ours], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="original"))
    start = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved, other = ours - start, theirs - start
    assert (moved - other).norm() < 0.02 * other.norm()


def test_a_vector_or_a_matrix_that_is_not_packed_so_is_refused():
    with pytest.raises(ValueError, match=r"not for \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match="3 in each"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "packed": 3}])


def test_of_an_mmdit_muon_gets_the_matrices_of_attentions_and_mlps_and_adamw_all_else():
    model = MMDiT(MMDiTConfig.preset("tiny", dual_blocks=1))
    groups, rest = split(model)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)]: group["packed"] for group in groups for p in group["params"]}
    others = {names[id(p)] for p in rest}
    assert ours.keys() | others == set(names.values()) and not ours.keys() & others
    assert [n for n in ours if ours[n] == 3] == [n for n in names.values() if n.endswith("qkv.weight")]
    assert {name.split(".")[-2] for name in ours} == {"qkv", "proj", "fc1", "fc2"}
    assert not any("adaLN" in name or "final" in name or name.endswith("bias") for name in ours)
    dead = {n for n in names.values() if n.endswith((".proj.weight", ".fc1.weight", ".fc2.weight"))}
    assert dead - ours.keys() == {"x_embedder.proj.weight"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_step_that_was_found_bad_changes_neither_weights_nor_momentum(value):
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([p])
    p.grad = torch.eye(3)
    optimizer.step()
    before, momentum = p.detach().clone(), optimizer.state[p]["momentum"].clone()
    p.grad = torch.full((3, 3), value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["momentum"], momentum)
    optimizer.found_inf, p.grad = torch.zeros(()), torch.eye(3)
    optimizer.step()
    assert not torch.equal(p, before)


def test_parameters_without_a_gradient_are_left_alone():
    p, q = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = Muon([p, q])
    q.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3, 3)) and not optimizer.state[p]
    assert not torch.equal(q, torch.ones(3, 3))                             # those behind them are not


def test_products_are_of_the_shorter_side(monkeypatch):
    """Of an MLP's (4 D, D) the other would cost four times as much."""
    matrices = [torch.nn.Parameter(torch.ones(shape)) for shape in ((12, 3), (3, 12))]
    for p in matrices:
        p.grad = torch.ones_like(p)
    sizes, usual = [], muon.orthogonalize
    monkeypatch.setattr(muon, "orthogonalize", lambda x, *how: sizes.append(tuple(x.shape)) or usual(x, *how))
    Muon(matrices).step()
    assert sizes == [(2, 3, 12)]
