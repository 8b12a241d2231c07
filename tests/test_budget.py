"""Claims about budget.py -> evidence.

Parameters and FLOPs are exact: PyTorch counts the same, for every kind of block. What a forward pass keeps is
what PyTorch keeps, up to a few small vectors. More cards need less memory and time; bad input is one line.
"""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import budget
import train as training
from mmdit import MMDiT, MMDiTConfig

PUBLISHED = {"tiny": 5_141_696, "sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520,
             "sd3.5-large": 8_056_627_520, "d38": 8_056_627_520}


@st.composite
def models(draw):
    heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return MMDiTConfig(depth, heads=heads, in_channels=draw(st.sampled_from([4, 16])), context_dim=24,
                       pooled_dim=draw(st.sampled_from([8, 40])), pos_max=8, pos_sample=4, pos_base=4,
                       qk_norm=draw(st.booleans()), dual_blocks=draw(st.integers(0, depth)))


def inputs(c, B, h, w, M):
    return (torch.randn(B, c.in_channels, 2 * h, 2 * w), torch.rand(B), torch.randn(B, M, c.context_dim),
            torch.randn(B, c.pooled_dim))


@pytest.mark.parametrize("name, count", PUBLISHED.items())
def test_parameters_and_their_bytes_are_those_of_the_published_models(name, count):
    c = MMDiTConfig.preset(name)
    found = budget.parameters(c)
    assert found["total"] == count
    alone = budget.memory(c, 1, 0, 16, 8)
    assert [alone[k] for k in budget.STATES] == [4 * count, 4 * count, 8 * count, 4 * count]
    assert budget.memory(c, 8, 0, 16, 8)["AdamW"] == count


@given(models(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
def test_flops_are_exactly_those_that_pytorch_counts(c, B, h, w, M):
    model = MMDiT(c)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(*inputs(c, B, h, w, M)).square().mean()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    assert forward.get_total_flops() == B * sum(budget.forward_flops(c, h * w, M).values())
    assert forward.get_total_flops() + backward.get_total_flops() == B * budget.training_flops(c, h * w, M)


def saved(c, B, h, w, M, checkpointing=False):
    """Bytes that PyTorch keeps for the backward pass, weights not counted."""
    model = MMDiT(c)
    model.gradient_checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    held = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x                # kept alive: an address names one storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*inputs(c, B, h, w, M))
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"dual_blocks": 2}, {"depth": 1}])
def test_what_is_kept_for_the_backward_pass_is_what_pytorch_keeps(changes):
    c = MMDiTConfig(**{"depth": 3, "heads": 4, "context_dim": 64, "pooled_dim": 16, "pos_max": 16} | changes)
    B, h, w, M = 4, 8, 10, 60
    predicted = B * budget.kept(c, h * w, M, half=False)
    assert predicted == pytest.approx(saved(c, B, h, w, M), rel=0.03)


def test_checkpointing_keeps_inputs_and_one_block():
    c = MMDiTConfig(6, heads=4, context_dim=64, pooled_dim=16, pos_max=16)
    N, M = 80, 60
    full, less = (budget.kept(c, N, M, False, recompute) for recompute in (False, True))
    one = budget.kept(MMDiTConfig(2, heads=4, context_dim=64), N, M, False) - budget.kept(
        MMDiTConfig(1, heads=4, context_dim=64), N, M, False)
    inputs_alone = saved(c, 4, 8, 10, M, True) / 4
    assert less == pytest.approx(inputs_alone + one, rel=0.05) and less < full / 3


def test_more_cards_need_less_of_everything_and_the_whole_batch_is_always_done():
    c = MMDiTConfig.preset("d38")
    plans = [budget.plan(c, n, 4096, 256, 154) for n in (8, 64, 1024)]
    assert all(p["each"] * p["accumulate"] * n == 4096 for p, n in zip(plans, (8, 64, 1024)))
    assert all(p["bytes"] < budget.CARDS["h100"][1] for p in plans)
    assert plans[0]["seconds"] > 7.9 * plans[1]["seconds"] > 7 * 15 * plans[2]["seconds"]
    assert budget.plan(c, 1, 4096, 256, 154) is None            # 161 GB of states alone
    again = budget.plan(c, 64, 4096, 256, 154, checkpointing=True)
    assert again["seconds"] > 1.25 * plans[1]["seconds"] and again["each"] > plans[1]["each"]


def test_the_dry_run_tells_the_model_and_the_papers_study_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training.main(["--dry-run", "--model", "d38", "--flow-batch", "4096", "--gpus", "64"])
    said = capsys.readouterr().out
    assert "8,056,627,520 parameters" in said and "predicted" in said and "45 % MFU" in said
    assert all(f"\n{name} " in said for name in budget.STUDY) and not list(tmp_path.iterdir())
    training.main(["--dry-run", "--tiny", "--model", "d38", "--gpus", "1"])
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("flags, cause", [
    (["--model", "d99"], "choose from"), (["--gpus", "0"], "above 0"), (["--card", "tpu"], "h100"),
    (["--size", "100"], "try 96"), (["--mfu", "2"], "peak"), (["--flow-bach", "3"], "--help")])
def test_bad_input_of_a_dry_run_is_one_line(flags, cause, capsys):
    with pytest.raises(SystemExit) as end:
        training.main(["--dry-run", *flags])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and cause in said and len(said.splitlines()) == 1


def test_the_demo_passes(capsys):
    budget.demo()
    assert "counted" in capsys.readouterr().out


def test_copies_the_allowance_and_the_cards_are_those_of_the_table():
    c = MMDiTConfig.preset("d38")
    total, block = (budget.parameters(c)[k] for k in ("total", "block"))
    one, many = (budget.memory(c, n, 0, 256, 154) for n in (1, 8))
    assert (one["copies"], one["spare"]) == (2 * total, 2e9)        # all weights in bfloat16
    assert many["copies"] == (2 * 2 + 2 + 4) * block                # two blocks gathered, a gradient in both
    assert budget.CARDS == {"a100": (312e12, 80e9), "h100": (989.4e12, 80e9), "h200": (989.4e12, 141e9)}
