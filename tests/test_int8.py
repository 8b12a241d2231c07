"""Claims about weights in eight bits: a bounded rounding error a weight, small ones for whole models, a half
of the memory. Parity: the fixtures' transformers and T5, whose exact outputs public implementations gave."""
import copy
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch import nn

from kernels import int8
from mmdit import MMDiT, MMDiTConfig
from text_encoders import T5Config, T5Encoder

PARITY = Path(__file__).parent / "fixtures" / "parity"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def mmdit(kind):
    """A small model in the real layout: its weights, an input and the velocity that public code gave."""
    weights = load_file(PARITY / kind / "single_file.safetensors")
    weights = {k.removeprefix("model.diffusion_model."): v.float() for k, v in weights.items()}
    D, C, P, _ = weights["x_embedder.proj.weight"].shape
    model = MMDiT(MMDiTConfig(
        depth=D // 64, in_channels=C, patch_size=P, pos_max=int(weights["pos_embed"].shape[1] ** 0.5),
        context_dim=weights["context_embedder.weight"].shape[1],
        pooled_dim=weights["y_embedder.mlp.0.weight"].shape[1],
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in weights,
        dual_blocks=len([k for k in weights if re.search(r"attn2\.qkv\.weight", k)])))
    model.load_state_dict(weights)
    return model.requires_grad_(False), load_file(PARITY / kind / "io.safetensors")


@given(st.integers(1, 9), st.integers(1, 40), st.floats(-20, 20), st.integers(0, 1000))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_channel(out, cin, log_size, seed):
    w = torch.randn(out, cin, generator=seeded(seed)) * 2.0 ** log_size
    w[0] = 0
    q, s = int8.quantise(w)
    assert q.dtype == torch.int8 and s.dtype == torch.bfloat16 and q.abs().max() <= 127
    largest = w.abs().amax(1)
    assert ((q * s.float()[:, None] - w).abs() <= 0.5001 * s.float()[:, None]).all() and not q[0].any()
    assert (s.float() >= largest / 127 * (1 - 1e-6)).all()
    assert (s.float()[1:] <= largest[1:] / 127 * (1 + 2 ** -7)).all()           # one bfloat16 further at most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_gaussian_weights_is_off_by_one_per_cent_in_every_dtype(dtype, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(1024, 96, bias=bias).requires_grad_(False), torch.randn(3, 20, 1024)
    nn.init.normal_(linear.weight, std=0.03)
    small = int8.Int8Linear(linear)
    y = small(x.to(dtype))
    assert y.shape == (3, 20, 96) and y.dtype == dtype and error(y, linear(x)) < 0.01
    q, s = small.weight, small.scale
    exact = x @ (q * s.float()[:, None]).T + (linear.bias if bias else 0)
    assert error(y, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def test_large_outputs_are_finite_in_float16():
    torch.manual_seed(0)
    linear, x = nn.Linear(9728, 64).requires_grad_(False), 8 * torch.randn(64, 9728)
    nn.init.normal_(linear.weight, std=0.02)
    y = int8.Int8Linear(linear)(x.half())
    assert linear(x).abs().max() > 50 and error(y, linear(x)) < 0.01


@pytest.mark.parametrize("kind", ["mmdit_sd3_medium", "mmdit_sd3_5_medium", "mmdit_sd3_5_large"])
@torch.no_grad()
def test_a_quantised_transformer_stays_within_a_thousandth_of_the_public_velocity(kind):
    model, io = mmdit(kind)
    inputs = io["latents"], io["timesteps"] / 1000, io["context"], io["pooled"]
    assert error(model(*inputs), io["velocity"]) < 1e-5
    before = {k: v.nbytes for k, v in model.joint_blocks.state_dict().items()}
    int8.quantise_mmdit(model)
    off = error(model(*inputs), io["velocity"])
    print(f"{kind}: velocity off by {100 * off:.3f} %")
    assert 1e-5 < off < 1e-3
    after = sum(v.nbytes for v in model.joint_blocks.state_dict().values())
    assert after < 0.32 * sum(before.values())          # a quarter, and the text projection that stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_quantised_transformer_computes_under_autocast(dtype):
    model, io = mmdit("mmdit_sd3_5_large")
    int8.quantise_mmdit(model)
    with torch.autocast("cpu", dtype):
        v = model(io["latents"], io["timesteps"] / 1000, io["context"], io["pooled"])
    assert error(v, io["velocity"]) < 0.02


@torch.no_grad()
def test_a_quantised_t5_is_off_by_little_and_on_wild_weights_by_twice_what_bfloat16_costs():
    torch.manual_seed(0)
    t5, ids = T5Encoder(T5Config.preset("tiny")), torch.randint(3, 1000, (4, 40), generator=seeded())
    exact = t5(ids)
    off = error(int8.quantise_t5(t5)(ids), exact)
    print(f"t5 as initialised: features off by {100 * off:.2f} %")
    assert 1e-4 < off < 0.02

    # the fixture's queries and keys are so large that a softmax picks one token, or another after rounding
    c = json.loads((PARITY / "t5" / "config.json").read_text())
    t5 = T5Encoder(T5Config(
        c["vocab_size"], c["d_model"], c["num_layers"], c["num_heads"], c["d_kv"], c["d_ff"]))
    t5.load_state_dict({k: v.float() for k, v in load_file(PARITY / "t5" / "model.safetensors").items()
                        if k != "encoder.embed_tokens.weight"})
    io = load_file(PARITY / "t5" / "io.safetensors")
    assert error(t5(io["input_ids"]), io["last"]) < 1e-5
    rounded = error(copy.deepcopy(t5).bfloat16()(io["input_ids"]), io["last"])
    off = error(int8.quantise_t5(t5)(io["input_ids"]), io["last"])
    print(f"t5 of the fixture: features off by {100 * off:.1f} %, in bfloat16 by {100 * rounded:.1f} %")
    assert off < 2.5 * rounded


def test_every_linear_of_the_blocks_but_the_kept_one_is_replaced():
    with torch.device("meta"):
        model = int8.quantise_mmdit(MMDiT(MMDiTConfig.preset("sd3.5-medium", depth=3, dual_blocks=2)))
        t5 = int8.quantise_t5(T5Encoder(T5Config.preset("tiny")))
    left = [n for n, m in model.joint_blocks.named_modules() if isinstance(m, nn.Linear)]
    assert left == ["2.context_block.attn.qkv"]
    assert not [n for n, m in t5.named_modules() if isinstance(m, nn.Linear)]
    assert isinstance(model.context_embedder, nn.Linear) and isinstance(model.t_embedder.mlp[0], nn.Linear)


def test_a_layers_own_weights_are_gone_before_the_next_one_is_quantised(monkeypatch):
    layers, usual, there = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), int8.quantise, []
    own = [weakref.ref(layer.weight) for layer in layers]
    monkeypatch.setattr(
        int8, "quantise", lambda w: there.append(sum(r() is not None for r in own)) or usual(w))
    int8.quantise_linears(layers)
    assert there == [3, 2, 1]
