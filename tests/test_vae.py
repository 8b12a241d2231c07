"""Claims about vae.py. Parity: fixtures/parity/vae holds a small random autoencoder in the layout of
Stability's files with what the original SD3.5 code and diffusers 0.42 made of a picture."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

import vae as vae_module
from vae import (AttnBlock, AutoencoderKL, Downsample, PatchDiscriminator, Posterior, ResnetBlock, VAEConfig,
                 discriminator_loss, draw_discs, edge_loss, measure_latents, psnr, tile_windows, vae_loss)

PARITY = Path(__file__).parent / "fixtures" / "parity"
PREFIX = "first_stage_model."
SMALL = VAEConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, num_groups=2, shift=0.0, scale=1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(replace(SMALL, **changes))


def pictures(n=4, size=16, seed=0):
    return draw_discs(n, seeded(seed), size)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------ the published one

def published():
    """The small autoencoder of the fixtures."""
    c = json.loads((PARITY / "vae" / "config.json").read_text())
    ch = c["block_out_channels"][0]
    vae = AutoencoderKL(VAEConfig(
        ch, tuple(w // ch for w in c["block_out_channels"]), c["layers_per_block"], c["latent_channels"],
        c["norm_num_groups"], c["shift_factor"], c["scaling_factor"]))
    weights = load_file(PARITY / "vae" / "single_file.safetensors")
    vae.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items()}, strict=True)
    return vae


@torch.no_grad()
def test_encoder_and_decoder_agree_with_the_public_implementations():
    vae, io = published(), load_file(PARITY / "vae" / "io.safetensors")
    posterior = vae.encode(io["image"])
    assert error(posterior.mean, io["mean"]) < 1e-5
    assert error(posterior.logvar, io["logvar"]) < 1e-5
    assert error(vae.decode(io["mean"]), io["decoded"]) < 1e-5


def test_the_sd3_preset_has_the_parameters_of_the_published_file():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig.preset("sd3"))
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    manifest = json.loads((PARITY / "manifests" / "vae_single_file.json").read_text())
    assert {PREFIX + k: list(v.shape) for k, v in vae.state_dict().items()} == manifest
    assert (vae.config.factor, vae.config.shift, vae.config.scale) == (8, 0.0609, 1.5305)


def test_the_tiny_preset_is_721_331_parameters_with_16_channels_8_times_smaller():
    vae = AutoencoderKL(VAEConfig.preset("tiny"))
    assert sum(p.numel() for p in vae.parameters()) == 721_331
    assert (vae.config.z_channels, vae.config.factor) == (16, 8)


# ----------------------------------------------------------------------------------------------------- shapes

@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(1,), (1, 2), (1, 1, 2)]))
@torch.no_grad()
def test_each_level_but_the_last_halves_the_sides_and_the_decoder_doubles_them_back(B, H, W, mult):
    vae = small(ch_mult=mult)
    f = vae.config.factor
    assert f == 2 ** (len(mult) - 1)
    image = torch.randn(B, 3, f * H, f * W)
    posterior = vae.encode(image)
    assert posterior.mean.shape == posterior.logvar.shape == (B, 2, H, W)
    assert vae.decode(posterior.mean).shape == image.shape


def test_down_sampling_starts_at_the_corner_and_pads_right_and_bottom_only():
    down, x = Downsample(1), torch.zeros(1, 1, 6, 6, requires_grad=True)
    nn.init.ones_(down.conv.weight)

    def reads(i, j):
        """Which pixels the output at (i, j) depends on, as the rows and columns of a full rectangle."""
        seen = torch.autograd.grad(down(x)[0, 0, i, j], x)[0][0, 0].bool()
        rows, columns = seen.any(1), seen.any(0)
        assert torch.equal(seen, rows[:, None] & columns)
        return rows.nonzero().flatten().tolist(), columns.nonzero().flatten().tolist()

    assert reads(0, 0) == ([0, 1, 2], [0, 1, 2])
    assert reads(1, 2) == ([2, 3, 4], [4, 5])
    assert reads(2, 2) == ([4, 5], [4, 5])


# -------------------------------------------------------------------------------------------- before training

def test_untrained_residual_branches_are_silent():
    for module in small().modules():
        if isinstance(module, (ResnetBlock, AttnBlock)):
            norm = module.norm1 if isinstance(module, ResnetBlock) else module.norm
            x = torch.randn(2, norm.num_channels, 4, 4)
            shortcut = module.nin_shortcut if hasattr(module, "nin_shortcut") else nn.Identity()
            assert torch.equal(module(x), shortcut(x))


@torch.no_grad()
def test_untrained_encoder_and_decoder_are_linear_up_to_their_last_norm():
    vae = small()
    for half, shape in ((vae.encoder, (1, 3, 8, 8)), (vae.decoder, (1, 2, 4, 4))):
        caught = []
        half.norm_out.register_forward_pre_hook(lambda module, args, caught=caught: caught.append(args[0]))
        x, y = torch.randn(2, *shape)
        for z in (x, y, 2 * x - 3 * y):
            half(z)
        assert error(2 * caught[0] - 3 * caught[1], caught[2]) < 1e-5


@torch.no_grad()
def test_an_untrained_autoencoder_neither_shrinks_nor_drowns_the_picture():
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig.preset("tiny"))
    posterior = vae.encode(torch.randn(4, 3, 32, 32))
    noise = torch.exp(0.5 * posterior.logvar)
    assert 0.3 < posterior.mean.std() < 3 and noise.median() < 0.1
    assert 0.3 < vae.decode(torch.randn(4, 16, 4, 4)).std() < 3


# -------------------------------------------------------------------------------------------------- posterior

@given(st.integers(0, 100), st.floats(-3, 3), st.floats(-4, 4))
def test_kl_is_that_of_a_gaussian_to_the_standard_one(seed, mean, logvar):
    g = seeded(seed)
    mean, logvar = mean + torch.randn(2, 3, 4, 4, generator=g), logvar + torch.randn(2, 3, 4, 4, generator=g)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).mean()
    assert torch.allclose(Posterior(mean, logvar).kl(), expected, rtol=1e-4, atol=1e-6)


def test_samples_have_the_posteriors_mean_and_spread():
    mean, logvar = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-2.0, 0.0, 1.0])
    many = Posterior(mean.expand(50_000, 3), logvar.expand(50_000, 3)).sample(seeded())
    std = torch.exp(0.5 * logvar)
    assert ((many.mean(0) - mean).abs() < 0.02 * std).all()
    assert ((many.std(0) / std - 1).abs() < 0.02).all()
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.02


def test_a_generator_decides_the_sample_and_spares_the_global_one():
    posterior = Posterior(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    before = torch.get_rng_state()
    a, b, c = (posterior.sample(seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(posterior.sample(), posterior.sample())


@torch.no_grad()
def test_how_a_picture_lies_in_memory_changes_nothing():
    """Noise is drawn in the order of memory."""
    vae, x = small(), pictures()
    codes = [vae.encode(y).sample(seeded()) for y in (x, x.contiguous(memory_format=torch.channels_last))]
    assert torch.equal(*codes) and all(z.is_contiguous() for z in codes)
    assert vae.decode(codes[0]).is_contiguous()


@torch.no_grad()
def test_no_weights_make_the_spread_overflow():
    vae = small()
    for value in (1e4, -1e4):
        vae.encoder.conv_out.bias[2:] = value
        posterior = vae.encode(pictures())
        assert posterior.logvar.unique().item() == (20 if value > 0 else -30)
        assert posterior.sample(seeded()).isfinite().all() and posterior.kl().isfinite()


# -------------------------------------------------------------------------------------------- shift and scale

@given(st.floats(-2, 2), st.floats(0.1, 10))
def test_to_latent_and_from_latent_undo_each_other(shift, scale):
    vae, z = small(shift=shift, scale=scale), torch.randn(2, 2, 4, 4, generator=seeded())
    assert torch.allclose(vae.to_latent(z), (z - shift) * scale)
    assert torch.allclose(vae.from_latent(vae.to_latent(z)), z, atol=1e-5)
    assert torch.allclose(vae.to_latent(vae.from_latent(z)), z, atol=1e-4)


@torch.no_grad()
def test_measured_shift_and_scale_give_latents_of_mean_0_and_variance_1():
    vae, images = small(), pictures(16)
    vae.encoder.conv_out.bias[:2] = torch.tensor([3.0, 5.0])        # far from centred, and channels differ
    shift, scale = measure_latents(vae, images, batch=5)
    vae.config = replace(vae.config, shift=shift, scale=scale)
    x = vae.to_latent(vae.encode(images).sample(seeded(1)))
    assert abs(x.mean()) < 0.02 and abs(x.var() - 1) < 0.03
    assert x[:, 1].mean() - x[:, 0].mean() > 1                      # one number for all: they still differ


# ------------------------------------------------------------------------------------------------------ tiles

class Local(nn.Module):
    """A stand-in for the decoder: enlarges two channels, and adds what it is told for its n-th call. With
    `down`, for the encoder: means of 2 x 2 pixels."""

    def __init__(self, offsets=(), down=False):
        super().__init__()
        self.offsets, self.seen, self.down = list(offsets), [], down

    def forward(self, z):
        self.seen.append(tuple(z.shape[2:]))
        x = F.avg_pool2d(z[:, [0, 1, 2, 0]], 2) if self.down else F.interpolate(
            z[:, :1].expand(-1, 3, -1, -1), scale_factor=2.0, mode="nearest")
        return x + (self.offsets[len(self.seen) - 1] if self.offsets else 0.0)


def with_decoder(decoder):
    vae = small()
    vae.decoder = decoder
    return vae


def with_encoder(encoder):
    vae = small()
    vae.encoder = encoder
    return vae


@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12))
@torch.no_grad()
def test_a_picture_that_fits_one_tile_is_decoded_as_without_tiles(tile, H, W):
    vae, z = small(), torch.randn(1, 2, min(H, tile), min(W, tile), generator=seeded())
    assert torch.equal(vae.decode(z, tile), vae.decode(z))
    image = F.interpolate(z[:, :1].expand(-1, 3, -1, -1), scale_factor=2)
    assert torch.equal(vae.encode(image, tile).mean, vae.encode(image).mean)


@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 8))
def test_windows_cover_the_picture_sum_to_one_and_rise_gently(size, tile, factor):
    overlap = max(1, tile // 4)
    total = torch.zeros(factor * size)
    for start, w in tile_windows(size, tile, factor):
        assert len(w) == factor * min(tile, size) and 0 <= start <= max(0, size - tile)
        assert w.min() >= 0 and (w.diff().abs() <= 1 / (factor * overlap) + 1e-6).all()
        total[factor * start:factor * start + len(w)] += w
    assert torch.allclose(total, torch.ones_like(total))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 12))
@torch.no_grad()
def test_where_the_decoder_looks_at_its_own_place_only_tiles_change_nothing(H, W, tile):
    vae, z = with_decoder(Local()), torch.randn(2, 2, H, W, generator=seeded())
    assert (vae.decode(z, tile) - vae.decode(z, 1000)).abs().max() < 1e-5
    vae, image = with_encoder(Local(down=True)), torch.randn(2, 3, 2 * H, 2 * W, generator=seeded())
    tiled, whole = vae.encode(image, tile), vae.encode(image, 1000)
    assert (tiled.mean - whole.mean).abs().max() < 1e-5 > (tiled.logvar - whole.logvar).abs().max()


@given(st.integers(0, 1000), st.integers(9, 40), st.integers(9, 40), st.integers(4, 8))
@torch.no_grad()
def test_tiles_that_disagree_by_d_leave_slopes_below_d_over_the_overlap_and_no_seam(seed, H, W, tile):
    offsets = (torch.rand(2000, generator=seeded(seed)) - 0.5).tolist()         # d = 1
    vae, z = with_decoder(Local(offsets)), torch.zeros(1, 2, H, W)
    picture = vae.decode(z, tile)
    for dim in (-1, -2):
        assert picture.diff(dim=dim).abs().max() <= 1 / (2 * (tile // 4)) + 1e-5    # 2 pixels a cell
    assert picture.abs().max() <= 0.5 + 1e-5 and picture.std() > 0              # and they did disagree
    vae = with_encoder(Local(offsets, down=True))
    latent = vae.encode(torch.zeros(1, 3, 2 * H, 2 * W), tile).mean
    for dim in (-1, -2):
        assert latent.diff(dim=dim).abs().max() <= 1 / (tile // 4) + 1e-5           # 1 number a cell
    assert latent.std() > 0


@torch.no_grad()
def test_tiles_of_a_real_encoder_differ_from_the_whole_and_no_more_at_the_seams_than_elsewhere():
    """The small model of the fixtures, whose weights are random: rougher than any that was trained. With
    weights like these tiles do differ; what counts is that seams are no worse than the rest."""
    vae = published()
    noise = F.interpolate(torch.randn(1, 3, 12, 16, generator=seeded()), scale_factor=16.0, mode="bilinear")
    image, tile = noise.clamp(-1, 1), 12                                # 24 x 32 cells: 3 x 4 tiles
    whole, tiled = vae.encode(image), vae.encode(image, tile)
    off = (tiled.mean - whole.mean).abs().mean((0, 1)) / whole.mean.std()
    starts = [[s for s, _ in tile_windows(size, tile, 1)] for size in (24, 32)]
    assert [len(s) for s in starts] == [3, 4]
    rows, columns = (torch.tensor(s[1:]) for s in starts)               # where a tile begins, others go on
    at_seams = torch.cat([off[rows].flatten(), off[:, columns].flatten()]).mean()
    assert 0 < off.mean() < 0.5 and at_seams < 1.5 * off.mean()
    jump = (tiled.mean - whole.mean).diff(dim=-1).abs().mean((0, 1, 2))
    assert jump[columns - 1].mean() < 2 * jump.mean()


@torch.no_grad()
def test_from_a_stated_size_on_no_more_than_a_tile_is_decoded_at_once(monkeypatch):
    monkeypatch.setattr(vae_module, "TILE", 8)
    for shape, whole in (((8, 8), True), ((4, 16), True), ((9, 8), False), ((40, 24), False)):
        vae = with_decoder(Local())
        assert vae.decode(torch.randn(1, 2, *shape)).shape == (1, 3, 2 * shape[0], 2 * shape[1])
        seen = vae.decoder.seen
        assert seen == [shape] if whole else len(seen) > 1 and set(seen) == {(8, 8)}
        vae, pixels = with_encoder(Local(down=True)), tuple(2 * side for side in shape)
        assert vae.encode(torch.randn(1, 3, *pixels)).mean.shape == (1, 2, *shape)
        seen = vae.encoder.seen
        assert seen == [pixels] if whole else len(seen) > 1 and set(seen) == {(16, 16)}


@pytest.mark.parametrize("tile", [1, 0, -4])
def test_a_tile_without_room_for_an_overlap_is_refused(tile):
    with pytest.raises(ValueError, match="tiles need 2 latent cells"):
        small().decode(torch.zeros(1, 2, 8, 8), tile)
    with pytest.raises(ValueError, match="tiles need 2 latent cells"):
        small().encode(torch.zeros(1, 3, 16, 16), tile)


# ----------------------------------------------------------------------------------------------------- losses

def test_edge_loss_ignores_an_offset_and_counts_edges_at_each_scale():
    x, y = pictures(), pictures(seed=1)
    assert edge_loss(x, x) == 0
    assert edge_loss(x + 0.3, x) < 1e-6
    assert torch.allclose(edge_loss(x, y), edge_loss(y, x))
    step = torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 1                                   # one of 3 differences along rows, none down columns
    assert torch.allclose(edge_loss(step, 0 * step, scales=1), torch.tensor(1 / 3))
    assert torch.allclose(edge_loss(step, 0 * step, scales=2), torch.tensor((1 / 3 + 1) / 2))


def test_a_blurred_edge_costs_more_than_an_equally_wrong_brightness():
    x = pictures(8, 32)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="bilinear")
    offset = x + F.mse_loss(blurred, x).sqrt()
    assert torch.allclose(F.mse_loss(offset, x), F.mse_loss(blurred, x))
    assert edge_loss(blurred, x) > 0.02 > 1e-5 > edge_loss(offset, x)


def test_the_loss_is_the_sum_of_the_parts_it_reports():
    vae, images, critic = small(), pictures(), PatchDiscriminator(ch=8)
    loss, parts, recon = vae_loss(vae, images, generator=seeded(), kl_weight=0.5, edge_weight=0.25)
    assert parts.keys() == {"mse", "edge", "kl"} and recon.shape == images.shape
    assert torch.allclose(loss, parts["mse"] + 0.25 * parts["edge"] + 0.5 * parts["kl"])
    assert torch.allclose(parts["mse"], F.mse_loss(recon, images))
    assert not any(p.requires_grad for p in parts.values())
    loss, parts, _ = vae_loss(vae, images, generator=seeded(), kl_weight=0, edge_weight=0,
                              critic=critic, critic_weight=2)
    assert torch.allclose(loss, parts["mse"] + 2 * parts["adversarial"])
    loss.backward()
    assert vae.encoder.conv_in.weight.grad.any()        # the critic's opinion reaches the autoencoder


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
@torch.no_grad()
def test_the_discriminator_judges_each_patch_of_8_pixels(B, h, w):
    assert PatchDiscriminator(ch=8)(torch.randn(B, 3, 8 * h, 8 * w)).shape == (B, 1, h, w)


def test_the_hinge_has_nothing_to_gain_beyond_one_and_never_moves_the_autoencoder():
    real, fake = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), -1.5, requires_grad=True)
    assert discriminator_loss(nn.Identity(), real, fake) == 0
    assert discriminator_loss(nn.Identity(), 0 * real, 0 * fake) == 1
    assert discriminator_loss(nn.Identity(), -real, -2 * fake) == 0.5 * (4 + 4)
    critic = PatchDiscriminator(ch=8)
    picture = pictures().requires_grad_()
    discriminator_loss(critic, pictures(seed=1), picture).backward()
    assert picture.grad is None and critic.net[0].weight.grad.any()


def test_the_critic_learns_to_tell_sharp_from_blurred():
    torch.manual_seed(0)
    critic = PatchDiscriminator(ch=8)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    x = pictures(16)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0, mode="bilinear")
    losses = []
    for _ in range(40):
        loss = discriminator_loss(critic, x, blurred)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], (losses[0], losses[-1])


def test_psnr_is_20_db_for_an_error_of_a_tenth_of_the_peak():
    x = torch.zeros(1, 3, 4, 4)
    assert abs(psnr(x + 0.2, x) - 20) < 1e-4


def test_a_few_steps_reduce_the_loss():
    vae, images = small(ch=16, num_groups=4), pictures(8)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        loss, _, recon = vae_loss(vae, images, generator=seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], (losses[0], losses[-1])
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    assert psnr(recon, images) > psnr(flat, images)     # it sees more than the mean colour


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("shape", [
    (1, 3, 8, 9), (1, 3, 7, 8), (1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8), (1, 3, 8, 8, 8)])
def test_pictures_of_a_wrong_size_are_refused_in_one_line(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, height, width\) with sides in multiples of 2") as caught:
        small().encode(torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no VAE preset 'sdxl': choose from sd3, tiny"):
        VAEConfig.preset("sdxl")


def test_the_critics_verdict_lowers_the_loss_where_it_takes_a_picture_for_real_and_parts_have_these_weights():
    vae, images, critic = small(), pictures(), PatchDiscriminator(ch=8)
    loss, parts, recon = vae_loss(vae, images, generator=seeded(), critic=critic)
    assert torch.allclose(parts["adversarial"], -critic(recon).mean())
    assert torch.allclose(loss, parts["mse"] + 0.3 * parts["edge"] + 1e-3 * parts["kl"]
                          + 0.1 * parts["adversarial"])


@torch.no_grad()
def test_shift_and_scale_are_measured_on_samples_not_on_means():
    vae, images = small(), pictures(16)
    vae.encoder.conv_out.bias[2:] = 0.0                             # a spread of about 1
    shift, scale = measure_latents(vae, images, batch=5)
    vae.config = replace(vae.config, shift=shift, scale=scale)
    x = vae.to_latent(vae.encode(images).sample(seeded(1)))
    assert abs(x.mean()) < 0.06 and abs(x.var() - 1) < 0.06         # by means it would be 3.6


@torch.no_grad()
def test_pictures_and_latents_come_in_any_dtype():
    vae, x = small().bfloat16(), pictures()
    assert vae.decode(vae.encode(x.double()).mean).isfinite().all()


def test_1024_pixels_of_sd3_are_decoded_whole_and_more_are_not():
    for shape, whole in (((128, 128), True), ((128, 136), False)):
        net = Local()
        vae_module.in_tiles(net, torch.zeros(1, 3, *shape), None, cell=1, out_cell=2, channels=3)
        assert set(net.seen) == {(128, 128)} and len(net.seen) == 2 - whole


def test_convolutions_begin_preserving_variance():
    torch.manual_seed(0)
    w = AutoencoderKL(VAEConfig.preset("tiny")).decoder.up[0].block[0].conv1.weight
    assert abs(w.std() * w[0].numel() ** 0.5 - 1) < 0.05


def test_every_norm_has_the_epsilon_of_the_published_model():
    norms = [m.eps for m in AutoencoderKL(VAEConfig.preset("tiny")).modules() if isinstance(m, nn.GroupNorm)]
    assert norms and set(norms) == {1e-6}
