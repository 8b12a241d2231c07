"""Rectified flow in three lines: what is learned, and how is a picture drawn from it?

    z_t  = (1 - t) x0 + t eps                a straight line from a picture x0 to Gaussian noise eps
    loss = | model(z_t, t) - (eps - x0) |^2  the model learns the velocity v = dz_t / dt along that line
    x   <- x + (t_next - t) model(x, t)      start as pure noise, follow the velocity, arrive at a picture

    data, t = 0  |======================================================|  t = 1, noise
                   training draws t from a density pi(t)
                   <------------------------------------ sampling walks from 1 to 0

Many lines cross at any one point z, and the best answer there is their mean velocity E[eps - x0 | z_t = z].
So the loss has a floor above zero (the lines disagree), and the paths that sampling follows are curved
although every line was straight: a single step from t = 1 lands on the mean of all pictures.

Which t to train on (paper, sec. 3.1): the ends are easy (the best answer is eps - mean(x0) at t = 1, and
mean(eps) - x0 at t = 0), the middle is hard. So SD3 draws t as the sigmoid of a Gaussian: logit-normal.

Which t for large pictures (sec. 5.3.2): neighbouring pixels agree, and averaging them removes noise. With m
pixels instead of n the same t destroys less, so t moves towards noise, by alpha = sqrt(m / n):

    shift_t(t) = alpha t / (1 + (alpha - 1) t)        that is: logit(t) grows by log(alpha)

    B           pictures in a batch
    x0, eps     (B, ...)  data (latents in SD3, points in the demo) and noise; any shape after B
    x, v        (B, ...)  the current state and its velocity
    t           (B,)      float32 in [0, 1]

This file contains no network; `model` is anything that can be called as model(x, t, **cond) -> v. It gets
float32 and may compute in any dtype; its output is cast to float32, the dtype of the path, the loss and every
step of the samplers.

Pitfalls
- The network's sinusoid sees 1000 t. That factor lives in the network; t is in [0, 1] everywhere else.
- Weights trained with a shift must be sampled with the same: 3.0 for SD3 at 1024 x 1024 (human raters
  preferred shifts above 1.5), where sqrt(m / n) from 256 x 256 would be 4.
- A logit-normal m > 0 and a shift alpha > 1 mean more noise. In code whose t = 1 is data they mean less.
- Guidance needs a model that was trained with some captions dropped; stages.py drops them, not this file.
- DIFFERS: the default schedule is that of the public implementation, whose low end is shifted twice.
- DIFFERS: the paper samples with Euler steps; heun, dpmpp_2m and sde are additions.

Run `python flow.py [--out runs/flow.png]`: trains a toy in seconds and compares it with the exact answer.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

DENSITIES = ("uniform", "logit_normal", "mode", "cosmap")
METHODS = ("euler", "heun", "dpmpp_2m", "sde")

# ---- time: how often training draws each t, and the shift for large pictures ------------------------------


def sample_t(density, n, *, m=0.0, s=1.0, mode_scale=1.29, generator=None, device=None):
    """Draw n training times, (n,) float32 in the open interval (0, 1). Paper, section 3.1.

    density: "uniform"; "logit_normal" with location m and width s; "mode" with mode_scale in
    [-1, 2 / (pi - 2)], above 0 for more of the middle; "cosmap", the cosine schedule's density.
    A CPU generator gives the same times on every device. Raises ValueError for a bad density or parameter.
    """
    _check_density(density, s, mode_scale)
    draw = torch.randn if density == "logit_normal" else torch.rand
    r = draw(n, generator=generator, device=generator.device if generator else device, dtype=torch.float32)
    if density == "uniform":
        t = r
    elif density == "logit_normal":
        t = torch.sigmoid(m + s * r)
    elif density == "mode":
        t = _mode(r, mode_scale)
    else:
        t = 1 - 1 / (torch.tan(math.pi / 2 * r) + 1)
    return t.clamp(2**-24, 1 - 2**-24).to(device)  # rand can give 0, and sigmoid can round to 1


def t_density(density, t, *, m=0.0, s=1.0, mode_scale=1.29):
    """pi(t), the density that sample_t draws from, at a tensor t of any shape in (0, 1). Same parameters."""
    _check_density(density, s, mode_scale)
    if density == "uniform":
        return torch.ones_like(t)
    if density == "logit_normal":
        bell = torch.exp(-0.5 * ((torch.logit(t) - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        return bell / (t * (1 - t))
    if density == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    low, high = torch.zeros_like(t), torch.ones_like(t)  # mode: t = f(u) falls with u; bisect for u
    for _ in range(24):
        u = (low + high) / 2
        right = _mode(u, mode_scale) > t
        low, high = torch.where(right, u, low), torch.where(right, high, u)
    return 1 / (1 + mode_scale * (1 - math.pi / 2 * torch.sin(math.pi * u)))  # 1 / |f'(u)|


def _mode(u, scale):
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _check_density(density, s, mode_scale):
    if density not in DENSITIES:
        raise ValueError(f"unknown density {density!r}: choose from {', '.join(DENSITIES)}")
    if not (s > 0 and -1 <= mode_scale <= 2 / (math.pi - 2)):
        raise ValueError(f"s = {s}, mode_scale = {mode_scale}: need s > 0, mode_scale in [-1, 2 / (pi - 2)]")


def shift_t(t, alpha):
    """Move t, a float or tensor, towards noise: alpha t / (1 + (alpha - 1) t). Paper, section 5.3.2.

    alpha = sqrt(m / n) carries a time that suits n pixels over to m pixels. 0 and 1 stay fixed; the alphas of
    successive shifts multiply; a logit-normal t stays logit-normal, its location larger by log(alpha). Raises
    ValueError unless alpha > 0.
    """
    if not alpha > 0:
        raise ValueError(f"the shift is {alpha}: it must be above 0 (1 changes nothing, SD3 uses 3)")
    return alpha * t / (1 + (alpha - 1) * t)


# ---- training: the path, its velocity, the loss -----------------------------------------------------------


def interpolate(x0, eps, t):
    """z_t = (1 - t) x0 + t eps, on the line from data to noise. (B, ...), (B, ...), (B,) -> (B, ...)."""
    t = t.view(-1, *[1] * (x0.ndim - 1))  # (B, 1, 1, ...)
    return (1 - t) * x0 + t * eps


def velocity(x0, eps):
    """dz_t / dt, constant along a line. Conversely, from z_t and v: x0 = z_t - t v, eps = x0 + v."""
    return eps - x0


def loss(model, x0, *, t=None, noise=None, **cond):
    """Squared error of the model's velocity, averaged within each sample: (B,) float32. Paper, sections 2, 3.

    t (B,): if None, logit-normal(0, 1). noise (B, ...): if None, standard normal. Not averaged over B, so
    that a log can bin it by t: it varies more with t than over training. ValueError if shapes disagree.
    """
    if x0.ndim < 2:
        raise ValueError(f"x0 {tuple(x0.shape)} must be (B, ...): samples of at least one number each")
    x0 = x0.float()
    t = sample_t("logit_normal", len(x0), device=x0.device) if t is None else t.float()
    eps = torch.randn_like(x0) if noise is None else noise.float()
    if t.shape != x0.shape[:1] or eps.shape != x0.shape:
        shapes = f"x0 {tuple(x0.shape)}, t {tuple(t.shape)}, noise {tuple(eps.shape)}"
        raise ValueError(f"{shapes} must be (B, ...), (B,), (B, ...): each sample needs its own t and noise")
    v = _predict(model, interpolate(x0, eps, t), t, cond)
    return (v - velocity(x0, eps)).square().flatten(1).mean(1)


def _predict(model, x, t, cond):
    v = model(x, t, **cond).float()
    if v.shape != x.shape:  # (B, 1) against (B, D) would silently broadcast into a wrong loss
        raise ValueError(f"the model maps {tuple(x.shape)} to {tuple(v.shape)}: it must keep the shape")
    return v


# ---- sampling: which times to visit, how to step between them, guidance -----------------------------------


def schedule(steps, shift=3.0, kind="reference"):
    """The times that sampling visits: (steps + 1,) float32 on the CPU, falling to 0.

    "clean": equal steps from 1 to 0, all shifted once.
    "reference": as in the public SD3 code, so that the same noise gives the same picture. Takes equal steps
    between end points that are already shifted, 1 and shift_t(0.001), shifts all of them again, then appends
    0. At shift 3 its last step starts at 0.0089; 0.001 shifted once is 0.0030. ValueError for a bad argument.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: sampling needs at least 1")
    if kind == "clean":
        ts = shift_t(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()
    elif kind == "reference":
        low = torch.tensor(shift_t(0.001, shift), dtype=torch.float32).item()  # rounded as it is there
        ts = torch.linspace(1, low, steps, dtype=torch.float64)  # DIFFERS: shifted once more below
        ts = torch.cat([shift_t(ts, shift), ts.new_zeros(1)]).float()
    else:
        raise ValueError(f"unknown schedule {kind!r}: choose from reference, clean")
    if not (ts[1:] < ts[:-1]).all():
        raise ValueError(f"the shift is {shift}: so far from 1 that some of {steps} steps coincide")
    return ts


@torch.no_grad()
def sample(model, noise, ts, *, method="euler", callback=None, generator=None, **cond):
    """Follow the velocity from noise (B, ...) at time ts[0] to data at time 0: returns (B, ...) float32.

    ts: falling times that end in 0, see schedule(). If ts[0] < 1, pass interpolate(x0, eps, t) as noise.
    method, with its model calls for n steps and how its error falls (with the clean schedule; the last step
    of the reference one does not shrink with n):
      euler     n       1 / n    straight steps, as in the paper
      heun      2n - 1  1 / n^2  the mean of the velocities at both ends of a step
      dpmpp_2m  n       ~1/n^2   DPM-Solver++ (arXiv 2211.01095) as in k-diffusion's 2M, with lambda = -log(t)
      sde       n       1 / n    removes more noise than the step asks for, adds fresh noise; same marginals
    callback(i, t, x, x0) is called before step i with the float t, the state and the x0 predicted from it.
    generator: for sde's noise, see draw_noise. cond goes to every model call.
    Raises ValueError for a bad method or ts, FloatingPointError if the model's output is not finite.
    """
    ts = [float(t) for t in ts] if hasattr(ts, "__iter__") else []
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if len(ts) < 2 or ts[0] > 1 or ts[-1] != 0 or not all(t > s for t, s in zip(ts, ts[1:])):
        raise ValueError("ts must fall, without repeats, from at most 1 to exactly 0: use schedule(steps)")

    x, x0_before = noise.float(), None
    for i, (t, t_next) in enumerate(zip(ts, ts[1:])):
        v = _finite(model, x, t, cond)
        x0 = x - t * v  # where the line through x ends
        dt = t_next - t  # below 0
        if callback is not None:
            callback(i, t, x, x0)
        if t_next == 0:  # every method ends with this Euler step: training never draws t = 0
            x = x0
        elif method == "euler" or method == "dpmpp_2m" and i == 0:  # 2M has no earlier x0 yet
            x = x + dt * v
        elif method == "heun":
            x = x + dt * (v + _finite(model, x + dt * v, t_next, cond)) / 2
        elif method == "dpmpp_2m":  # Euler's step again, but with the x0 expected half-way in log(t)
            half_way = math.log(t / t_next) / math.log(ts[i - 1] / t) / 2
            x = t_next / t * x + (1 - t_next / t) * (x0 + half_way * (x0 - x0_before))
        elif method == "sde":
            # dx = (v - g^2 / 2 score) dt + g dw has the flow's marginals for any g. Here score = -eps / t,
            # and g^2 = t, so that fresh noise fades out towards data (the choice of SiT, arXiv 2401.08740).
            eps, fresh = x0 + v, draw_noise(x.shape, generator, x.device)
            x = x + dt * (v + eps / 2) + math.sqrt(-t * dt) * fresh
        x0_before = x0
    return x


def _finite(model, x, t, cond):
    """The velocity at a time t (float) that all samples share. FloatingPointError unless it is finite:
    otherwise the picture would come out black."""
    v = _predict(model, x, x.new_full((len(x),), t), cond)
    if not v.isfinite().all():
        raise FloatingPointError(f"the model's output is not finite at t = {t:.4f}: check the weights, the "
                                 "guidance and the autocast dtype (float16 overflows; try bfloat16)")
    return v


def draw_noise(shape, generator=None, device=None):
    """Standard normal noise (B, ...), drawn on the CPU, so that a seed means the same on every device.

    generator: a CPU torch.Generator, or a list with one for each picture, which then depends on its own
    seed and not on its neighbours in the batch. Raises ValueError unless the list has B entries.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: give each its own")
    drawn = [torch.randn(shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in generator]
    return torch.stack(drawn).to(device)


def guided(model, scale, cond, uncond, weaker=None):
    """Classifier-free guidance (arXiv 2207.12598): the model v_u + scale (v_c - v_u), on all channels.

    cond, uncond: dicts of tensors (B, ...) for the model, equal in names and shapes, else ValueError. One
    pass over 2B samples, [cond, uncond], gives both; scale 1 is cond alone, in one pass over B. Guiding x0
    instead of v would give the same, as x0 is linear in v.
    weaker: (scale, (low, high), kwargs) adds scale (v_c - v_w) where low < t < high. v_w is the velocity for
    cond with these kwargs as well: guidance away from a handicapped model. For SD3.5-medium that model leaves
    out layers, by skip_layers (skip-layer guidance).
    """
    if scale != 1:
        shapes = [{k: tuple(v.shape) for k, v in side.items()} for side in (cond, uncond)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"cond {shapes[0]} and uncond {shapes[1]} differ: encode both alike")
        both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}  # (2B, ...)
    if weaker:
        weak_scale, (low, high), weak_kwargs = weaker

    def guided_model(x, t):
        if scale == 1:
            v = v_c = model(x, t, **cond).float()
        else:
            v_c, v_u = model(torch.cat([x, x]), torch.cat([t, t]), **both).float().chunk(2)  # (B, ...) each
            v = v_u + scale * (v_c - v_u)
        if weaker and low < t[0] < high:
            v = v + weak_scale * (v_c - model(x, t, **cond, **weak_kwargs).float())
        return v

    return guided_model


def part_way(ts, strength):
    """The last part of a schedule, for changing a picture x0: begin at interpolate(x0, eps, ts[0]).

    strength in (0, 1], else ValueError: the share of the steps that is kept; at 1, nothing is left of x0.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it must be above 0 (the unchanged picture) and at most 1")
    left = math.ceil((len(ts) - 1) * strength - 1e-9)  # 0.07 * 100 is 7.000000000000001
    return ts[len(ts) - 1 - max(1, left):]


# ---- demo: eight blobs in the plane, where the best possible velocity is known ----------------------------


def mixture_velocity(x, t, means, std):
    """E[eps - x0 | z_t = x] if the data are K equal blobs N(mean_k, std^2 I). (B, D), (B,), (K, D) -> (B, D).

    For one blob z_t is N((1 - t) mean_k, var I) and the answer is linear in x; several are averaged, weighted
    by the probability that x came from each.
    """
    t = t[:, None, None]
    var = ((1 - t) * std) ** 2 + t**2  # (B, 1, 1)
    away = x[:, None] - (1 - t) * means  # (B, K, D)
    came_from = torch.softmax(-away.square().sum(2, keepdim=True) / (2 * var), dim=1)  # (B, K, 1)
    return (came_from * ((t - (1 - t) * std**2) / var * away - means)).sum(1)


def demo(out="runs/flow.png"):
    """Train a small network on the blobs; compare its velocity, loss and samples with the exact ones."""
    torch.manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    means, std = 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25  # (8, 2)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.SiLU())]
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), *hidden, nn.Linear(64, 2))

    def data(n):
        return means[torch.randint(8, (n,))] + std * torch.randn(n, 2)

    def exact(x, t):
        return mixture_velocity(x, t, means, std)

    def model(x, t):
        angles = math.pi * t[:, None] * torch.tensor([1.0, 2.0, 4.0])
        return net(torch.cat([x, angles.sin(), angles.cos()], 1))  # (B, 8) -> (B, 2)

    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    warm_and_cool = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, 2500)
    for _ in range(2500):
        optimizer.zero_grad()
        loss(model, data(512)).mean().backward()
        optimizer.step()
        warm_and_cool.step()

    with torch.no_grad():
        x0, eps, t = data(40_000), torch.randn(40_000, 2), sample_t("logit_normal", 40_000)
        z = interpolate(x0, eps, t)
        off = ((model(z, t) - exact(z, t)).square().mean() / exact(z, t).square().mean()).sqrt().item()
        learned, floor = (loss(f, x0, t=t, noise=eps).mean().item() for f in (model, exact))
    path, noise = [], torch.randn(4000, 2)
    x = sample(model, noise, schedule(50, shift=1), callback=lambda i, t, x, x0: path.append(x))
    distance, blob = torch.cdist(x, means).min(1)
    share, inside = blob.bincount(minlength=8) / len(x), (distance < 4 * std).float().mean().item()
    print(f"velocity  {100 * off:.1f} % off the exact one (root mean square)")
    print(f"loss      {learned:.3f}, and the exact velocity gets {floor:.3f}: no model can do better")
    print(f"samples   {100 * inside:.1f} % inside a blob, {share.min():.3f} to {share.max():.3f} in each")
    assert off < 0.12 and floor < learned < 1.01 * floor
    assert inside > 0.98 and share.min() > 0.1 and share.max() < 0.15
    _draw(out, torch.stack([*path, x]), data(4000))


def _draw(out, path, data):
    """Three panels: densities of t; the path (steps + 1, B, 2) from noise to samples; samples over data."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    t, colour_of = torch.linspace(0.001, 0.999, 999), plt.get_cmap("plasma_r")
    for density, colour in zip(DENSITIES, ("#999999", "#2a6fbb", "#e07a1f", "#3a9a5b")):
        left.plot(t, t_density(density, t), color=colour, lw=2, label=density)
    shifted = t_density("logit_normal", t, m=math.log(3))
    left.plot(t, shifted, color="#2a6fbb", lw=2, ls=":", label="logit_normal, shift 3")
    left.set(xlim=(0, 1), ylim=(0, 4.2), title="how often training draws t")
    left.set(xlabel="t", xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0\ndata", 0.25, 0.5, 0.75, "1\nnoise"))
    left.legend(frameon=False)

    few = path[:, :300]
    for i in range(len(few) - 1):  # orange at t = 1, dark blue at t = 0
        pieces = few[i : i + 2].transpose(0, 1).numpy()  # (300, 2, 2): from and to
        middle.add_collection(LineCollection(pieces, color=colour_of(0.2 + 0.8 * i / len(few)), lw=0.9))
    middle.scatter(*few[0].T, s=9, color=colour_of(0.2), label="t = 1: noise")
    middle.scatter(*few[-1].T, s=9, color=colour_of(1.0), zorder=3, label="t = 0: samples")
    middle.set_title("the learned flow: 50 Euler steps from noise to samples")
    right.scatter(*data.T, s=6, color="#bbbbbb", lw=0, label="data")
    right.scatter(*path[-1].T, s=6, color=colour_of(1.0), lw=0, alpha=0.5, label="samples")
    right.set_title("4000 samples over 4000 points of data")
    for panel in (middle, right):
        panel.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), aspect="equal", xticks=[], yticks=[])
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, markerscale=1.5)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=120)
    print(f"picture   {out}")


# Exercises, in demo() (whose assertions may then fail, as they should)
# 1. Sample with schedule(1): the points crowd round the mean of the data, (0, 0), where there are no data.
# 2. Let model() return (net(...) - x) / (1 - t[:, None]), so that net learns eps. It trains, but sampling
#    stops at its first step with FloatingPointError: at t = 1, eps does not determine the velocity.
# 3. Sample with model=exact and compare with 1000 heun steps from the same noise: 50 euler steps end 0.02
#    away on average; 25 heun steps, which call the model as often, 0.002.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train a toy flow and compare it with the exact one")
    parser.add_argument("--out", default="runs/flow.png", help="where the picture goes")
    args = parser.parse_args()
    try:
        demo(args.out)
    except OSError as e:
        parser.error(f"the picture cannot be written ({e}): choose another --out")
