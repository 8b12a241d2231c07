"""Claims about rectified flow, held against closed forms: data whose best velocity is known exactly.

For Gaussian data N(mu, std^2) the best velocity is flow.mixture_velocity with a single blob, and following it
takes noise n to mu + std n, picture by picture. Two blobs give a field that bends. The golden schedules in
fixtures/parity were written by the public implementation.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flow

ODE_METHODS = ("euler", "heun", "dpmpp_2m")
GOLDEN = json.loads((Path(__file__).parent / "fixtures/parity/schedule.json").read_text())
quick = settings(deadline=None, max_examples=15, derandomize=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def blobs(means, std):
    return partial(flow.mixture_velocity, means=torch.tensor(means), std=std)


def constant(value):
    return lambda x, t: torch.full_like(x, value)


# ---- time ------------------------------------------------------------------------------------------------

densities = st.one_of(
    st.builds(dict, density=st.sampled_from(["uniform", "cosmap"])),
    st.builds(dict, density=st.just("logit_normal"), m=st.floats(-1, 1), s=st.floats(0.4, 1.5)),
    st.builds(dict, density=st.just("mode"), mode_scale=st.floats(-1, 1.6)),
)


@quick
@given(densities)
def test_every_density_integrates_to_one(parameters):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    pi = flow.t_density(parameters.pop("density"), t, **parameters)
    assert pi.min() >= 0
    assert abs(pi.mean().item() - 1) < 1e-3


@quick
@given(densities, st.integers(0, 2**31))
def test_histograms_of_sampled_times_match_the_density(parameters, seed):
    density, n, bins = parameters.pop("density"), 100_000, 20
    t = flow.sample_t(density, n, generator=seeded(seed), **parameters)
    assert t.shape == (n,) and t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    middles = (torch.arange(bins * 2000, dtype=torch.float64) + 0.5) / (bins * 2000)
    expected = flow.t_density(density, middles, **parameters).view(bins, 2000).mean(1) / bins
    found = torch.histc(t, bins, 0, 1).double() / n
    assert (found - expected).abs().max() < 6 * 0.5 / math.sqrt(n)  # six standard deviations of a bin's share


def test_the_densities_have_the_papers_values_at_the_middle():
    half = torch.tensor([0.5], dtype=torch.float64)
    assert flow.t_density("logit_normal", half).item() == pytest.approx(4 / math.sqrt(2 * math.pi))
    assert flow.t_density("cosmap", half).item() == pytest.approx(4 / math.pi)
    assert flow.t_density("mode", half).item() == pytest.approx(1 / (1 + 1.29 * (1 - math.pi / 2)))
    assert flow.t_density("mode", half, mode_scale=0.0).item() == pytest.approx(1)  # scale 0 is uniform


def test_cosmap_gives_the_cosine_schedules_noise_levels():
    # cosine schedule: noise / signal = tan(pi / 2 u); here it is t / (1 - t), from the same u
    t = flow.sample_t("cosmap", 1000, generator=seeded(0)).double()
    u = torch.rand(1000, generator=seeded(0)).double()
    torch.testing.assert_close(t / (1 - t), torch.tan(math.pi / 2 * u), rtol=1e-3, atol=1e-6)


def test_a_positive_m_and_a_shift_above_one_mean_more_noise():
    assert flow.sample_t("logit_normal", 10_000, m=0.5, generator=seeded(0)).mean() > 0.58
    assert flow.shift_t(0.5, 3.0) == 0.75


def test_times_stay_inside_the_open_interval_at_extreme_widths():
    t = flow.sample_t("logit_normal", 10_000, s=50.0, generator=seeded(0))
    assert t.min() > 0 and t.max() < 1


def test_a_generator_fixes_the_times():
    for density in flow.DENSITIES:
        one, same, other = (flow.sample_t(density, 9, generator=seeded(seed)) for seed in (3, 3, 4))
        assert torch.equal(one, same) and not torch.equal(one, other)


alphas = st.floats(0.2, 6.0)


@quick
@given(alphas, alphas)
def test_shifts_multiply_invert_and_keep_the_ends(a, b):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(flow.shift_t(flow.shift_t(t, a), b), flow.shift_t(t, a * b))
    torch.testing.assert_close(flow.shift_t(flow.shift_t(t, a), 1 / a), t)
    torch.testing.assert_close(flow.shift_t(t, a)[[0, -1]], t[[0, -1]])


@quick
@given(st.floats(0.01, 0.99), st.integers(16, 2048), st.integers(16, 2048))
def test_the_shift_keeps_the_uncertainty_about_a_constant_picture(t, side_n, side_m):
    # m pixels, all (1 - t) c + t noise: the mean pixel gives c with standard error t / (1 - t) / sqrt(m)
    def uncertainty(t, pixels):
        return t / (1 - t) / math.sqrt(pixels)

    shifted = flow.shift_t(t, math.sqrt(side_m**2 / side_n**2))
    assert uncertainty(shifted, side_m**2) == pytest.approx(uncertainty(t, side_n**2))


@quick
@given(alphas)
def test_a_shifted_logit_normal_is_logit_normal_with_m_larger_by_log_alpha(alpha):
    shifted = flow.shift_t(flow.sample_t("logit_normal", 1000, generator=seeded(0)), alpha)
    moved = flow.sample_t("logit_normal", 1000, m=math.log(alpha), generator=seeded(0))
    torch.testing.assert_close(shifted, moved)


# ---- training --------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_path_and_velocity_recover_both_ends(shape, seed):
    x0, eps = torch.randn(2, *shape, generator=seeded(seed))
    t = torch.rand(shape[0], generator=seeded(seed))
    z, v = flow.interpolate(x0, eps, t), flow.velocity(x0, eps)
    wide = t.view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(z - wide * v, x0)
    torch.testing.assert_close(z + (1 - wide) * v, eps)
    assert torch.equal(flow.interpolate(x0, eps, torch.zeros(shape[0])), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.ones(shape[0])), eps)


def test_the_loss_is_zero_for_the_velocity_and_counts_its_mean_square_error():
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=seeded(0))
    assert flow.loss(lambda x, t: eps - x0, x0, noise=eps).eq(0).all()
    torch.testing.assert_close(flow.loss(lambda x, t: eps - x0 + 2, x0, noise=eps), torch.full((5,), 4.0))


@quick
@given(st.floats(0.05, 0.95), st.floats(0.2, 2.0), st.floats(-2, 2))
def test_the_loss_of_the_exact_velocity_is_the_spread_of_the_lines_and_no_lower(t, std, mu):
    # Var(eps - x0 | z_t) for x0 ~ N(mu, std^2) is std^2 / ((1 - t)^2 std^2 + t^2)
    n, model = 50_000, blobs([[mu]], std)
    x0, eps = mu + std * torch.randn(n, 1, generator=seeded(0)), torch.randn(n, 1, generator=seeded(1))
    t = torch.full((n,), t)
    found = flow.loss(model, x0, t=t, noise=eps).mean().item()
    floor = std**2 / ((1 - t[0].item()) ** 2 * std**2 + t[0].item() ** 2)
    assert found == pytest.approx(floor, rel=0.04)
    for wrong in (lambda x, t: model(x, t) + 0.3, lambda x, t: 1.2 * model(x, t) - 0.3):
        assert flow.loss(wrong, x0, t=t, noise=eps).mean().item() > found


def test_a_samples_loss_does_not_depend_on_its_batch_mates():
    x0, eps = torch.randn(2, 6, 4, 2, 2, generator=seeded(0))
    t, model = torch.rand(6, generator=seeded(0)), lambda x, t: x * t[:, None, None, None]
    together = flow.loss(model, x0, t=t, noise=eps)
    assert together.shape == (6,)
    for i in range(6):
        alone = flow.loss(model, x0[i : i + 1], t=t[i : i + 1], noise=eps[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])


def test_by_default_the_loss_draws_a_logit_normal_time_and_fresh_noise_for_each_sample():
    seen = {}

    def spy(x, t):
        seen.update(x=x, t=t)
        return x

    torch.manual_seed(0)
    flow.loss(spy, torch.zeros(20_000, 1))
    logit = torch.logit(seen["t"])
    assert abs(logit.mean().item()) < 0.05 and abs(logit.std().item() - 1) < 0.05
    noise = seen["x"][:, 0] / seen["t"]  # x0 = 0, so z = t eps
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_path_loss_and_samples_are_float32_whatever_the_model_computes_in(dtype):
    def model(x, t):
        assert x.dtype == t.dtype == torch.float32
        return x.to(dtype)

    x0 = torch.randn(3, 4, generator=seeded(0)).to(dtype)
    assert flow.loss(model, x0, t=torch.tensor([0.1, 0.5, 0.9], dtype=dtype)).dtype == torch.float32
    for method in flow.METHODS:
        assert flow.sample(model, x0, flow.schedule(4), method=method).dtype == torch.float32


# ---- schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_reference_schedule_equals_the_public_implementations_to_the_last_bit(name):
    shift, steps = name.removeprefix("shift").split("_steps")
    ts = flow.schedule(int(steps), float(shift))
    assert torch.equal(ts, torch.tensor(GOLDEN[name]["sigmas"]))
    torch.testing.assert_close(1000 * ts[:-1], torch.tensor(GOLDEN[name]["timesteps"]), rtol=1e-6, atol=0)


def test_the_default_shift_is_three_and_the_reference_tail_is_shifted_twice():
    assert torch.equal(flow.schedule(28), flow.schedule(28, 3.0, "reference"))
    twice = flow.shift_t(flow.shift_t(0.001, 3.0), 3.0)
    assert flow.schedule(28)[-2].item() == pytest.approx(twice) == pytest.approx(0.0089, abs=1e-4)


@quick
@given(st.integers(1, 100), st.floats(0.3, 6.0), st.sampled_from(["reference", "clean"]))
def test_every_schedule_falls_from_one_to_zero(steps, shift, kind):
    ts = flow.schedule(steps, shift, kind)
    assert ts.shape == (steps + 1,) and ts.dtype == torch.float32
    assert ts[0] == 1 and ts[-1] == 0 and (ts[1:] < ts[:-1]).all()


@quick
@given(st.integers(1, 100), st.floats(0.3, 6.0))
def test_the_clean_schedule_is_equal_steps_shifted_once(steps, shift):
    unshifted = flow.shift_t(flow.schedule(steps, shift, "clean"), 1 / shift)
    torch.testing.assert_close(unshifted, torch.linspace(1, 0, steps + 1), rtol=0, atol=1e-5)


# ---- samplers --------------------------------------------------------------------------------------------


@quick
@given(st.floats(-3, 3), st.floats(0.3, 2.0), st.sampled_from(ODE_METHODS), st.sampled_from([1.0, 3.0]))
def test_the_exact_velocity_of_a_gaussian_takes_noise_n_to_mu_plus_std_n(mu, std, method, shift):
    noise = torch.randn(200, 1, generator=seeded(0))
    steps, bound = (2000, 0.02) if method == "euler" else (500, 0.01)
    x = flow.sample(blobs([[mu]], std), noise, flow.schedule(steps, shift, "clean"), method=method)
    assert (x - (mu + std * noise)).abs().max() < bound


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_halving_the_steps_shrinks_the_error_by_the_methods_order(method, order, shift):
    model, noise = blobs([[-1.0], [1.5]], 0.5), torch.randn(500, 1, generator=seeded(0))
    truth = flow.sample(model, noise, flow.schedule(2000, 1.0, "clean"), method="heun")
    errors = []
    for steps in (32, 64, 128):
        x = flow.sample(model, noise, flow.schedule(steps, shift, "clean"), method=method)
        errors.append((x - truth).abs().mean().item())
    measured = math.log2(errors[0] / errors[2]) / 2
    lowest = 1.6 if method == "dpmpp_2m" else order - 0.2  # long steps in log(t) near 0 cost it a log n
    assert lowest < measured < order + 0.5, (measured, errors)


@quick
@given(st.integers(1, 30), st.floats(-3, 3), st.sampled_from(ODE_METHODS))
def test_a_constant_velocity_is_followed_exactly_in_any_number_of_steps(steps, value, method):
    noise = torch.randn(5, 2, 3, generator=seeded(0))
    x = flow.sample(constant(value), noise, flow.schedule(steps), method=method)
    torch.testing.assert_close(x, noise - value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", flow.METHODS)
def test_a_single_step_lands_on_the_mean_of_the_data(method):
    noise = torch.randn(50, 1, generator=seeded(0))
    x = flow.sample(blobs([[-1.0], [2.0]], 0.3), noise, [1, 0], method=method)
    torch.testing.assert_close(x, torch.full((50, 1), 0.5))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m_takes_k_diffusions_steps(shift):
    model, x = blobs([[-1.0], [1.5]], 0.5), torch.randn(20, 1, generator=seeded(0))
    ts = flow.schedule(12, shift)
    found = flow.sample(model, x, ts, method="dpmpp_2m")
    sigmas, x, old = ts.double(), x.double(), None  # the published update, written in lambda = -ln sigma
    for i in range(12):
        denoised = x - sigmas[i] * model(x, sigmas[i].expand(20))
        now, later = -sigmas[i].log(), -sigmas[i + 1].log()
        mix = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (now + sigmas[i - 1].log()) / (later - now)
            mix = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = (-later).exp() / (-now).exp() * x - torch.expm1(now - later) * mix
        old = denoised
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-5)


def test_the_sde_has_the_flows_marginals_on_the_way_and_at_the_end():
    mu, std, seen = 1.5, 0.5, {}
    noise, ts = torch.randn(40_000, 1, generator=seeded(0)), flow.schedule(200, 1.0, "clean")
    x = flow.sample(blobs([[mu]], std), noise, ts, method="sde", generator=seeded(1),
                    callback=lambda i, t, x, x0: seen.update({round(t, 3): x}))
    for t, state in [(0.75, seen[0.75]), (0.5, seen[0.5]), (0.25, seen[0.25]), (0.0, x)]:
        assert state.mean().item() == pytest.approx((1 - t) * mu, abs=0.02)
        assert state.std().item() == pytest.approx(math.sqrt(((1 - t) * std) ** 2 + t**2), rel=0.02)


def test_the_sde_forgets_its_noise_and_the_flow_does_not():
    model, noise, ts = blobs([[0.0]], 1.0), torch.randn(2000, 1, generator=seeded(0)), flow.schedule(100)

    def kept(method):
        x = flow.sample(model, noise, ts, method=method, generator=seeded(1))
        return torch.corrcoef(torch.stack([noise[:, 0], x[:, 0]]))[0, 1].item()

    assert kept("euler") > 0.999
    assert kept("sde") < 0.8


def test_per_picture_generators_make_a_picture_independent_of_its_batch():
    model, noise, ts = blobs([[0.5, -0.5]], 0.5), torch.randn(4, 2, generator=seeded(0)), flow.schedule(10)
    together = flow.sample(model, noise, ts, method="sde", generator=[seeded(i) for i in range(4)])
    for i in range(4):
        alone = flow.sample(model, noise[i : i + 1], ts, method="sde", generator=[seeded(i)])
        torch.testing.assert_close(alone[0], together[i])
    other = flow.sample(model, noise, ts, method="sde", generator=[seeded(i + 9) for i in range(4)])
    assert not torch.allclose(other, together)


def test_noise_is_a_function_of_the_seeds():
    batch = flow.draw_noise((3, 2, 2), [seeded(i) for i in (7, 8, 9)])
    assert torch.equal(batch[1], flow.draw_noise((2, 2), seeded(8)))
    assert torch.equal(flow.draw_noise((3, 2), seeded(1)), flow.draw_noise((3, 2), seeded(1)))


@pytest.mark.parametrize("method, calls", [("euler", 10), ("heun", 19), ("dpmpp_2m", 10), ("sde", 10)])
def test_each_method_asks_the_model_as_often_as_it_says_and_never_at_time_zero(method, calls):
    times = []

    def spy(x, t):
        assert t.shape == (3,) and t.dtype == torch.float32
        times.append(t[0].item())
        return x

    ts = flow.schedule(10)
    flow.sample(spy, torch.ones(3, 2), ts, method=method)
    assert len(times) == calls and min(times) > 0 and set(times) == set(ts[:-1].tolist())


@pytest.mark.parametrize("kind", ["clean", "reference"])
@pytest.mark.parametrize("steps, shift", [(4, 1e300), (1000, 1e9), (3, 1e-300)])
def test_a_shift_that_leaves_no_room_between_times_is_refused_by_its_name(kind, steps, shift):
    with pytest.raises(ValueError, match="the shift is"):
        flow.schedule(steps, shift, kind)


def test_the_callback_sees_every_state_and_the_picture_predicted_from_it():
    seen, noise, ts = [], torch.randn(3, 2, generator=seeded(0)), flow.schedule(6)
    model = blobs([[1.0, -1.0]], 0.5)
    x = flow.sample(model, noise, ts, callback=lambda *step: seen.append(step))
    assert [i for i, *_ in seen] == list(range(6)) and [t for _, t, *_ in seen] == ts[:-1].tolist()
    assert torch.equal(seen[0][2], noise)
    for _, t, state, x0 in seen:
        torch.testing.assert_close(x0, state - t * model(state, torch.full((3,), t)))
    assert torch.equal(seen[-1][3], x)


def test_sampling_can_start_from_a_half_noised_picture():
    mu, std, n = 1.0, 0.5, torch.randn(100, 1, generator=seeded(0))
    half = 0.5 * mu + math.sqrt((0.5 * std) ** 2 + 0.5**2) * n  # where the exact flow of n is at t = 0.5
    x = flow.sample(blobs([[mu]], std), half, torch.linspace(0.5, 0, 200), method="heun")
    torch.testing.assert_close(x, mu + std * n, rtol=0, atol=1e-3)


def test_conditions_reach_the_model_and_no_graph_is_kept():
    weight, y = torch.ones((), requires_grad=True), torch.tensor([[1.0], [2.0]])

    def model(x, t, y):
        return weight * y.expand_as(x)

    x = flow.sample(model, torch.zeros(2, 3), flow.schedule(3), y=y)
    torch.testing.assert_close(x, -y.expand(2, 3))  # a constant velocity y for one unit of time
    assert not x.requires_grad and flow.loss(model, torch.zeros(2, 3), y=y).requires_grad


# ---- guidance --------------------------------------------------------------------------------------------


def conditional(x, t, y):
    return (x * y[:, :, None, None]).sin() + t[:, None, None, None]


@quick
@given(st.floats(-2, 12), st.integers(1, 4), st.integers(1, 16))
def test_guidance_moves_every_channel_from_uncond_towards_and_past_cond(scale, batch, channels):
    x = torch.randn(batch, channels, 2, 2, generator=seeded(0))
    t = torch.rand(batch, generator=seeded(1))
    yes, no = torch.randn(2, batch, channels, generator=seeded(2))
    found = flow.guided(conditional, scale, {"y": yes}, {"y": no})(x, t)
    v_c, v_u = conditional(x, t, yes), conditional(x, t, no)
    torch.testing.assert_close(found, v_u + scale * (v_c - v_u), rtol=1e-4, atol=1e-5)
    time = t[:, None, None, None]  # guiding the predicted x0 is the same
    x0 = (x - time * v_u) + scale * ((x - time * v_c) - (x - time * v_u))
    torch.testing.assert_close(x - time * found, x0, rtol=1e-4, atol=1e-4)


def test_scale_one_is_cond_in_one_pass_and_scale_zero_is_uncond():
    x, t = torch.randn(3, 4, 2, 2, generator=seeded(0)), torch.rand(3, generator=seeded(1))
    yes, no = torch.randn(2, 3, 4, generator=seeded(2))
    sizes = []

    def spy(x, t, y):
        sizes.append(len(x))
        return conditional(x, t, y)

    torch.testing.assert_close(flow.guided(spy, 1, {"y": yes}, {"y": no})(x, t), conditional(x, t, yes))
    torch.testing.assert_close(flow.guided(spy, 0, {"y": yes}, {"y": no})(x, t), conditional(x, t, no))
    flow.guided(spy, 5.0, {"y": yes}, {"y": no})(x, t)
    assert sizes == [3, 6, 6]


def test_the_guided_batch_is_cond_first():
    seen = []
    yes, no = {"y": torch.ones(2, 1)}, {"y": torch.zeros(2, 1)}
    flow.sample(flow.guided(lambda x, t, y: seen.append(y) or x, 2.0, yes, no), torch.ones(2, 3), [1, 0])
    assert torch.equal(seen[0], torch.tensor([[1.0], [1.0], [0.0], [0.0]]))


def test_guidance_is_mixed_in_float32():
    # in bfloat16 0.5 * (256 + 1) rounds back to 128; the two answers themselves are exact in bfloat16
    def model(x, t, y):
        return y.to(torch.bfloat16)

    yes, no = {"y": torch.full((1, 1), 256.0)}, {"y": torch.full((1, 1), 1.0)}
    assert flow.guided(model, 0.5, yes, no)(torch.zeros(1, 1), torch.ones(1)).item() == 128.5


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda: flow.sample_t("lognormal", 4), "lognormal.*logit_normal"),
    (lambda: flow.t_density("lognormal", torch.ones(1)), "lognormal.*logit_normal"),
    (lambda: flow.sample_t("mode", 4, mode_scale=1.8), "mode_scale = 1.8"),
    (lambda: flow.sample_t("logit_normal", 4, s=0.0), "s = 0.0"),
    (lambda: flow.shift_t(0.5, 0.0), "above 0"),
    (lambda: flow.schedule(0), "at least 1"),
    (lambda: flow.schedule(4, shift=-1.0), "above 0"),
    (lambda: flow.schedule(4, kind="karras"), "karras.*reference, clean"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [1, 0], method="ddim"), "ddim.*euler, heun"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [0, 1]), "fall"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [1, 0.5, 0.5, 0]), "without repeats"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [1, 0.5]), "exactly 0"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [1000.0, 500.0, 0.0]), "at most 1"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [float("nan"), 0.0]), "fall"),
    (lambda: flow.sample(constant(0.0), torch.ones(1, 1), [0.0]), "schedule"),
    (lambda: flow.sample(lambda x, t: x[:, :1], torch.ones(2, 3), [1, 0]), r"\(2, 3\) to \(2, 1\)"),
    (lambda: flow.loss(lambda x, t: x[:, :1], torch.ones(2, 3)), r"\(2, 3\) to \(2, 1\)"),
    (lambda: flow.loss(constant(0.0), torch.ones(2, 3), t=torch.ones(1)), "its own t"),
    (lambda: flow.loss(constant(0.0), torch.ones(2, 3), noise=torch.ones(3)), "its own t and noise"),
    (lambda: flow.draw_noise((3, 1), [seeded(0)]), "1 generators for 3"),
    (lambda: flow.guided(constant(0.0), 2, {"y": torch.ones(3)}, {"y": torch.ones(4)}), r"\(4,\).*differ"),
    (lambda: flow.guided(constant(0.0), 2, {"y": torch.ones(3)}, {}), "differ"),
])
def test_bad_input_raises_a_value_error_of_one_line_that_names_cause_and_remedy(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", flow.METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_overflows_stops_sampling_at_the_step_where_it_happened(method, bad):
    def model(x, t):
        return torch.where(t[:, None] < 0.6, bad, 0.0) * torch.ones_like(x)

    with pytest.raises(FloatingPointError, match=r"t = 0.5.*bfloat16"):
        flow.sample(model, torch.ones(2, 3), [1.0, 0.75, 0.5, 0.25, 0.0], method=method)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_times_and_noise_are_the_same_whatever_the_process_dtype(dtype):
    def drawn():
        g = [torch.Generator().manual_seed(i) for i in range(4)]
        return (*(flow.sample_t(d, 3, generator=g[0]) for d in flow.DENSITIES), flow.draw_noise((2, 3), g[1]),
                flow.draw_noise((2, 3), g[2:]))

    usual = drawn()
    torch.set_default_dtype(dtype)
    try:
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(drawn(), usual))
    finally:
        torch.set_default_dtype(torch.float32)
