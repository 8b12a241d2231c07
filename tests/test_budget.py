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


@pytest.mark.parametrize("qk_norm, half, whole", [(True, 20, 6), (False, 17, 4)])
def test_under_autocast_a_block_keeps_the_tables_bfloat16_and_float32(qk_norm, half, whole):
    def kept(depth, checkpointing=False):
        c = MMDiTConfig(depth, heads=4, context_dim=64, qk_norm=qk_norm)
        return budget.kept(c, N, M, True, checkpointing)

    N, M, D = 80, 60, 256
    assert kept(3) - kept(2) == (N + M) * D * (2 * half + 4 * whole)
    text = 2 * (5 if qk_norm else 3) + 4 * (3 if qk_norm else 2)        # of the last block: keys and values
    ends = N * D * (4 * 2 + 2) + M * 64 * 2             # stream, LayerNorm; final Linear's input; the text
    assert kept(1) == N * D * (2 * half + 4 * whole) + M * D * text + ends
    assert kept(3, True) - kept(2, True) == (N + M) * D * 4             # a block's input is the stream


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


def test_a_card_gets_as_many_pictures_as_fit_and_recomputes_only_for_fewer_than_eight():
    c, M, peak = MMDiTConfig.preset("d38"), 154, 989.4e12 * 0.45
    for N, recompute in ((256, False), (4096, True)):
        p = budget.plan(c, 64, 4096, N, M)
        once, again = budget.training_flops(c, N, M), budget.forward_flops(c, N, M)["blocks"]
        assert p["checkpointing"] == recompute and p["each"] * p["accumulate"] == 64
        assert p["seconds"] == pytest.approx((once + again * recompute) * 64 / peak)
        used, twice = (sum(budget.memory(c, 64, n * p["each"], N, M, recompute).values()) for n in (1, 2))
        assert p["bytes"] == pytest.approx(used) and used <= 0.95 * 80e9 < twice
    few = budget.plan(c, 1024, 4096, 256, M)
    assert (few["each"], few["checkpointing"]) == (4, False)                    # all of its share fits
    uneven = budget.plan(c, 48, 4096, 256, M)
    assert uneven["each"] * uneven["accumulate"] == 86 == -(-4096 // 48)        # no picture is left out
    assert not budget.plan(c, 64, 4096, 4096, M, checkpointing=False)["checkpointing"]


def test_what_is_printed_are_the_plans_own_numbers():
    c, N, M = MMDiTConfig.preset("d38"), (256 // 16) ** 2, 154
    p, flops = budget.plan(c, 64, 4096, N, M), budget.training_flops(c, N, M)
    shares = budget.memory(c, 64, p["each"], N, M, p["checkpointing"])
    text = "\n".join(budget.describe("d38", 256, 4096, 500_000, 64, "h100", 0.45, None))
    keeps = [budget.kept(c, N, M, checkpointing=again) / 1e9 for again in (False, True)]
    days = p["seconds"] * 500_000 / 86400
    for told in (f"{flops:.3e} a picture", f"{4096 * flops:.3e} a step of 4,096",
                 f"{4096 * 500_000 * flops:.3e} in 500,000 steps", "are 256 tokens, with 154 of text",
                 f"under FSDP, {p['each']} pictures at once (predicted)",
                 *(f"{what:14} {b / 1e9:7.1f} GB" for what, b in shares.items()),
                 f"{p['bytes'] / 1e9:.1f} of 80 GB; a picture keeps {keeps[0]:.2f} GB, with checkpointing "
                 f"{keeps[1]:.2f}", "at 45 % MFU of 989 TFLOP/s",
                 f"{p['seconds']:.2f} s a step of {p['accumulate']} x {p['each']} on each card",
                 f"{days:.1f} days, {days * 24 * 64:,.0f} card-hours"):
        assert told in text, told
    row = budget.table("h100", 0.45, counts=(64,))[-2].split()
    assert row == ["d38", "8,056,627,520", f"{4096 * 500_000 * flops:.1e}", f"{p['bytes'] / 1e9:.0f}",
                   f"{p['each']}", f"{p['seconds']:.3f}", f"{days:.1f}"]
    again = budget.describe("d38", 1024, 4096, 500_000, 64, "h100", 0.45, None)
    q = budget.plan(c, 64, 4096, 4096, M)
    total = sum(budget.memory(c, 64, q["each"], 4096, M, True).values()) / 1e9
    assert f"{q['each']} pictures at once, checkpointing (predicted)" in again[2]
    assert f"{total:.1f} of 80 GB" in "\n".join(again)
    assert "with 28 of text" in budget.describe("tiny", 64, 64, 100, 1, "h100", 0.45, None)[0]
    alone = sum(budget.memory(c, 1, 1, N, M, True).values()) / 1e9
    assert f"takes {alone:.0f} GB on each" in budget.describe("d38", 256, 4096, 9, 1, "h100", 0.45, None)[-1]


def test_the_flags_of_a_dry_run_reach_its_numbers_and_the_papers_are_the_defaults(capsys):
    def said(*flags):
        budget.main(flags)
        return capsys.readouterr().out

    assert said("--model", "d15") == "\n".join(
        budget.describe("d15", 256, 4096, 500_000, 8, "h100", 0.45, None) + [""] + budget.table()) + "\n"
    assert "256 x 256, batch 4,096, 500,000 steps, on h100" in said() and "1,024 cards" in said()
    flags = "--model d15 --size 512 --flow-batch 64 --flow-steps 7 --gpus 2 --card a100 --mfu 0.3"
    told = budget.describe("d15", 512, 64, 7, 2, "a100", 0.3, True) + [""] + budget.table("a100", 0.3)
    assert ", checkpointing (predicted)" in told[2]
    assert said(*flags.split(), "--checkpointing") == "\n".join(told) + "\n"


@pytest.mark.parametrize("flags, cause", [
    (["--model", "d99"], "choose from"), (["--gpus", "0"], "above 0"), (["--card", "tpu"], "h100"),
    (["--size", "100"], "try 96"), (["--mfu", "2"], "peak"), (["--flow-bach", "3"], "--help")])
def test_bad_input_of_a_dry_run_is_one_line(flags, cause, capsys):
    with pytest.raises(SystemExit) as end:
        training.main(["--dry-run", *flags])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and cause in said and len(said.splitlines()) == 1


def test_copies_the_allowance_and_the_cards_are_those_of_the_table():
    c = MMDiTConfig.preset("d38")
    total, block = (budget.parameters(c)[k] for k in ("total", "block"))
    one, many = (budget.memory(c, n, 0, 256, 154) for n in (1, 2))
    assert (one["copies"], one["spare"]) == (2 * total, 2e9)        # all weights in bfloat16
    assert many["copies"] == (2 * 2 + 2 + 4) * block                # two blocks gathered, a gradient in both
    assert budget.CARDS == {"a100": (312e12, 80e9), "h100": (989.4e12, 80e9), "h200": (989.4e12, 141e9)}
