"""Claims about mmdit.py. Parity: fixtures/parity/mmdit_* hold small random models in the layout of
Stability's files with the velocities of the original SD3.5 code and of diffusers 0.42; manifests/ the keys
and shapes of the real files."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from mmdit import MMDiT, MMDiTConfig, crop_positions, position_table, timestep_embedding

PARITY = Path(__file__).parent / "fixtures" / "parity"
PREFIX = "model.diffusion_model."
SMALL = MMDiTConfig(3, heads=2, head_dim=8, in_channels=4, context_dim=12, pooled_dim=6, pos_max=16,
                    pos_sample=4, pos_base=4)
KINDS = {"no norm": {"qk_norm": False}, "QK-norm": {}, "dual attention": {"dual_blocks": 2}}    # as published
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def fresh(**changes):
    torch.manual_seed(0)
    return MMDiT(MMDiTConfig(**vars(SMALL) | changes))


def random_model(**changes):
    """As if trained: no weight is zero, so that every part has its say."""
    model = fresh(**changes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def inputs(B=2, H=8, W=6, M=5, seed=0):
    """x, t, context, pooled for SMALL"""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, 4, H, W, generator=g), torch.rand(B, generator=g),
            torch.randn(B, M, 12, generator=g), torch.randn(B, 6, generator=g))


def tokens(model, B=2, M=5, N=12):
    """context, x, c inside the stack"""
    D, g = model.config.width, torch.Generator().manual_seed(1)
    return (torch.randn(B, M, D, generator=g), torch.randn(B, N, D, generator=g),
            torch.randn(B, D, generator=g))


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------- published models

@pytest.mark.parametrize("name", ["sd3_medium", "sd3_5_large", "sd3_5_medium"])
@torch.no_grad()
def test_velocities_agree_with_the_public_implementations(name):
    folder = PARITY / f"mmdit_{name}"
    c = json.loads((folder / "config.json").read_text())
    model = MMDiT(MMDiTConfig(
        c["num_layers"], c["num_attention_heads"], c["attention_head_dim"], c["in_channels"], c["patch_size"],
        c["joint_attention_dim"], c["pooled_projection_dim"], c["pos_embed_max_size"],
        qk_norm=c["qk_norm"] is not None, dual_blocks=len(c["dual_attention_layers"])))
    weights = load_file(folder / "single_file.safetensors")
    model.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items()}, strict=True)
    io = load_file(folder / "io.safetensors")
    v = model(io["latents"], io["timesteps"] / 1000, io["context"], io["pooled"])
    assert error(v, io["velocity"]) < 1e-6          # exact GELU is 7e-6 off, an eps of 1e-5 in LayerNorm 4e-6


@pytest.mark.parametrize("preset, count", [
    ("sd3-medium", 2_028_328_000), ("sd3.5-medium", 2_243_171_520), ("sd3.5-large", 8_056_627_520)])
def test_presets_have_the_parameters_of_the_published_files(preset, count):
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig.preset(preset))
    assert sum(p.numel() for p in model.parameters()) == count
    name = preset.replace("-", "_").replace(".", "_")
    manifest = json.loads((PARITY / "manifests" / f"transformer_{name}_single_file.json").read_text())
    assert {PREFIX + k: list(v.shape) for k, v in model.state_dict().items()} == manifest


def test_depth_alone_sets_the_size():
    for d, count in ((15, 496_070_464), (18, 856_164_160), (21, 1_358_956_096), (30, 3_962_400_064),
                     (38, 8_056_627_520)):
        c = MMDiTConfig.preset(f"d{d}")
        assert (c.depth, c.num_heads, c.width) == (d, d, 64 * d)
        with torch.device("meta"):
            assert sum(p.numel() for p in MMDiT(c).parameters()) == count
    assert MMDiTConfig(2).width == 128


# -------------------------------------------------------------------------------------------- before training

@each_kind
@torch.no_grad()
def test_an_untrained_model_predicts_exactly_zero(changes):
    assert not fresh(**changes)(*inputs()).any()


@each_kind
@torch.no_grad()
def test_untrained_blocks_are_the_identity(changes):
    model = fresh(**changes)
    context, x, c = tokens(model)
    for i, block in enumerate(model.joint_blocks):
        after, image = block(context, x, c)
        assert torch.equal(image, x)
        assert after is None if i == 2 else torch.equal(after, context)


def test_the_first_step_moves_the_output_layer_and_nothing_else():
    """The other gradients pass through zeros; they follow one step later."""
    model = fresh()
    (model(*inputs()) - 1).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
        "final_layer.linear.weight", "final_layer.linear.bias"}


# ---------------------------------------------------------------------------------------------- who sees what

@each_kind
@torch.no_grad()
def test_image_tokens_are_a_set_once_their_positions_are_added(changes):
    model = random_model(**changes)
    context, x, c = tokens(model)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))

    def stack(context, x):
        for block in model.joint_blocks:
            context, x = block(context, x, c)
        return x

    assert error(stack(context, x[:, order]), stack(context, x)[:, order]) < 1e-5


@torch.no_grad()
def test_positions_tell_the_model_where_a_patch_is():
    model, (x, *rest) = random_model(), inputs()
    moved = model(x.roll(2, dims=3), *rest)             # one token to the right
    assert error(moved, model(x, *rest).roll(2, dims=3)) > 1e-2
    model.pos_embed.zero_()
    assert error(model(x.roll(2, dims=3), *rest), model(x, *rest).roll(2, dims=3)) < 1e-5


@given(st.permutations(range(5)))
@torch.no_grad()
def test_text_tokens_are_a_set_their_order_does_not_change_the_velocity(order):
    model, (x, t, context, pooled) = random_model(), inputs()
    assert error(model(x, t, context[:, order], pooled), model(x, t, context, pooled)) < 1e-5


@torch.no_grad()
def test_every_input_counts():
    model, given_ = random_model(), inputs()
    v = model(*given_)
    for i, other in enumerate(inputs(seed=1)):
        assert error(model(*given_[:i], other, *given_[i + 1:]), v) > 1e-3, f"input {i}"


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    model, batch = random_model(), inputs(B=3)
    together = model(*batch)
    for b in range(3):
        assert error(model(*(y[b:b + 1] for y in batch)), together[b:b + 1]) < 1e-5


@torch.no_grad()
def test_nothing_is_remembered_between_calls():
    model = random_model(dual_blocks=1)
    first = model(*inputs())
    model(*inputs(B=1, H=16, W=4, M=9, seed=1))
    assert torch.equal(model(*inputs()), first)


@given(st.integers(1, 3), st.integers(1, 16), st.integers(1, 16), st.integers(0, 7))
@torch.no_grad()
def test_velocities_have_the_shape_of_the_latents_for_any_picture_and_text(B, h, w, M):
    x, *rest = inputs(B, 2 * h, 2 * w, M)
    v = random_model(depth=1)(x, *rest)
    assert v.shape == x.shape and v.isfinite().all()


# -------------------------------------------------------------------------------------------- positions, time

def sincos(p, width):
    """(len(p), width), in float64: sines, then cosines."""
    angle = torch.as_tensor(p, dtype=torch.float64)[:, None] * torch.tensor(
        [10000 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()], 1)


@pytest.mark.parametrize("pos_max", [192, 384])
def test_positions_of_sd3_are_those_of_256_pixel_training_stretched_and_extended(pos_max):
    table = position_table(16, pos_max, 64, 16)
    assert table.shape == (1, pos_max ** 2, 16) and table.dtype == torch.float32
    table = table.view(pos_max, pos_max, 16)
    p = [(i - (pos_max - 64) / 2) / 4 for i in range(pos_max)]
    axis = sincos(p, 8).float()
    assert torch.allclose(table[5, :, :8], axis, atol=1e-6)     # the first half tells the column ...
    assert torch.allclose(table[:, 7, 8:], axis, atol=1e-6)     # ... the second the row
    assert p[0] < 0                                             # further out than 0: extended, not wrapped


def test_a_1024_pixel_picture_covers_coordinates_0_to_15_75():
    centre = crop_positions(position_table(16, 192, 64, 16), 64, 64).view(64, 64, 16)
    axis = sincos(torch.linspace(0, 15.75, 64, dtype=torch.float64), 8).float()
    assert torch.allclose(centre[..., :8], axis.expand(64, 64, 8), atol=1e-6)
    assert torch.allclose(centre[..., 8:], axis[:, None].expand(64, 64, 8), atol=1e-6)


@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from([13, 14]))
def test_a_picture_of_any_aspect_ratio_takes_the_centre_of_the_table_row_by_row(h, w, side):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    table = torch.stack([rows, columns], -1).view(1, side * side, 2)    # every cell holds its own coordinates
    top, left = (side - h) // 2, (side - w) // 2
    expected = [[top + i, left + j] for i in range(h) for j in range(w)]
    assert crop_positions(table, h, w)[0].tolist() == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_time_becomes_cosines_then_sines_of_1000_t(ts, dtype):
    embedded = timestep_embedding(torch.tensor(ts, dtype=dtype))
    assert embedded.shape == (len(ts), 256) and embedded.dtype == torch.float32
    for t, row in zip(ts, embedded):
        for i in (0, 1, 64, 127):
            angle = 1000 * t * math.exp(-math.log(10000) * i / 128)
            assert abs(row[i] - math.cos(angle)) < 2e-4 and abs(row[128 + i] - math.sin(angle)) < 2e-4


# --------------------------------------------------------------------------- what may be left out, recomputed

def test_queries_of_the_last_texts_have_no_influence_and_no_gradient():
    model, D = random_model(), SMALL.width
    last = model.joint_blocks[-1].context_block
    v = model(*inputs())
    v.square().sum().backward()
    assert not last.attn.qkv.weight.grad[:D].any() and not last.attn.qkv.bias.grad[:D].any()
    assert last.attn.qkv.weight.grad[D:2 * D].any() and last.attn.qkv.weight.grad[2 * D:].any()
    with torch.no_grad():
        last.attn.qkv.weight[:D].normal_()
        last.attn.ln_q.weight.normal_()
        assert torch.equal(model(*inputs()), v)


@torch.no_grad()
def test_leaving_out_the_queries_gives_the_keys_and_values_that_computing_them_gives():
    attn = random_model().joint_blocks[-1].context_block.attn
    x = torch.randn(2, 5, SMALL.width)
    for alone, together in zip(attn.project_kv(x), attn.project(x)[1:]):
        assert torch.allclose(alone, together, atol=1e-6)


@pytest.mark.parametrize("skip", [[0], [1], [2], (0, 2), [0, 1, 2]])
@torch.no_grad()
def test_skipping_layers_equals_a_model_without_them(skip):
    model, shorter = random_model(), random_model()
    shorter.joint_blocks = nn.ModuleList(b for i, b in enumerate(shorter.joint_blocks) if i not in skip)
    v = model(*inputs(), skip_layers=skip)
    assert torch.equal(v, shorter(*inputs()))
    assert error(v, model(*inputs())) > 1e-3


def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_gradient():
    found, calls = [], []
    for on in (False, True):
        model = random_model(dual_blocks=1)
        model.gradient_checkpointing = on
        counts = []
        for block in model.joint_blocks:
            block.x_block.attn.qkv.register_forward_hook(lambda *_, counts=counts: counts.append(1))
        model(*inputs()).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        calls.append(len(counts))
    assert calls == [3, 6]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


@torch.no_grad()
def test_a_bfloat16_model_agrees_with_float32_to_a_few_percent():
    model, batch = random_model(), inputs()
    exact = model(*batch)
    rounded = model.bfloat16()(*batch)    # inputs may stay in float32; so does t, until its sinusoid is made
    assert rounded.dtype == torch.bfloat16
    assert error(rounded.float(), exact) < 0.05


def test_one_batch_can_be_learned_by_heart():
    model, batch = fresh(), inputs()
    target = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = F.mse_loss(model(*batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("i, shape, says", [
    (0, (2, 5, 8, 6), "latents must be"), (0, (2, 4, 7, 6), "multiples of 2"),
    (0, (2, 4, 8, 5), "multiples of 2"), (0, (4, 8, 6), "latents must be"),
    (0, (2, 4, 34, 6), "17 x 3 tokens exceed.*16 x 16.*smaller"),
    (1, (1,), r"expected t \(2,\)"), (1, (2, 1), r"expected t \(2,\)"),
    (2, (2, 5, 11), r"context \(2, M, 12\)"), (2, (1, 5, 12), r"context \(2, M, 12\)"),
    (2, (2, 12), r"context \(2, M, 12\)"), (3, (2, 7), r"pooled \(2, 6\)")])
def test_wrong_shapes_are_refused_in_one_line_that_says_what_was_expected(i, shape, says):
    batch = list(inputs())
    batch[i] = torch.zeros(shape)
    with pytest.raises(ValueError, match=says) as caught:
        fresh()(*batch)
    assert "\n" not in str(caught.value)


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="choose from tiny, sd3-medium"):
        MMDiTConfig.preset("sd4")
    with pytest.raises(ValueError, match="dual_blocks is 4, but there are only 3 blocks"):
        fresh(dual_blocks=4)


def test_embedders_patches_and_matrices_begin_as_in_dit():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig.preset("tiny"))
    for embedder in (model.t_embedder, model.y_embedder):
        assert all(abs(embedder.mlp[i].weight.std() / 0.02 - 1) < 0.05 for i in (0, 2))
    w = model.x_embedder.proj.weight
    assert abs(w.std() / (2 / (w.shape[0] + w[0].numel())) ** 0.5 - 1) < 0.05
    w = model.joint_blocks[0].x_block.mlp.fc1.weight
    assert abs(w.std() / (2 / sum(w.shape)) ** 0.5 - 1) < 0.05
