"""What each stage of training learns, and from what: kept apart from train.py so that the loop there stays on
one page.

    stage  trains                 a step's batch              loss
    vae    AutoencoderKL          pictures                    squared error + edges + KL  (vae.vae_loss)
    clip   two text towers, and   pictures, a caption each    InfoNCE of both pairs       (clip_loss)
           the image towers that
           teach them
    t5     T5Encoder              captions with hidden words  cross-entropy of the words  (masked_span_loss)
    flow   MMDiT                  latents, text features,     flow matching               (flow.loss)
                                  noise, times

Each function returns a Stage: the modules to train and loss(step, generator). All randomness comes from that
generator, which depends on (seed, stage, step) alone. Each stage uses what earlier ones have learnt, frozen;
the flow reads it from `cache`.
"""
import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import flow
from data import contact_sheet
from mmdit import MMDiT, MMDiTConfig
from sample import Pipeline
from text_encoders import (CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder, T5Config,
                           T5Encoder, clip_loss, drop_encoders, masked_span_loss, sample_drops)
from vae import (AutoencoderKL, PatchDiscriminator, VAEConfig, discriminator_loss, measure_latents, psnr,
                 vae_loss)
from watch import loss_by_t

PARTS_OF = {"vae": ("vae",), "clip": ("clip_l", "clip_g", "clip_l_image", "clip_g_image"), "t5": ("t5",),
            "flow": ("mmdit",)}
STAGES = tuple(PARTS_OF)


@dataclass
class Stage:
    """What `fit` needs to know of a stage."""
    name: str
    model: nn.Module                        # all that is trained
    loss: object                            # (step, generator) -> (scalar, {name: scalar for the log})
    preview: object = None                  # (step) -> None: a sample grid, drawn with the averaged weights
    ema: bool = False                       # keep an average of the weights and return it


def build(c, tokenizers: dict) -> dict[str, nn.Module]:
    """Every part, untrained, under the name of its file.
    The transformer's config follows from the others'."""
    torch.manual_seed(c.seed)
    vae = AutoencoderKL(VAEConfig.preset("tiny"))
    clip_l = CLIPTextConfig.preset(
        "tiny_l", vocab_size=tokenizers["clip_l"].vocab_size, context_length=c.clip_length)
    clip_g = CLIPTextConfig.preset(
        "tiny_g", vocab_size=tokenizers["clip_g"].vocab_size, context_length=c.clip_length)
    t5 = T5Config.preset("tiny", vocab_size=tokenizers["t5"].vocab_size)
    tokens = c.size // (2 * vae.config.factor)                              # along a side of a picture
    mmdit = MMDiTConfig.preset(
        c.model, in_channels=vae.config.z_channels, context_dim=t5.width,
        pooled_dim=clip_l.width + clip_g.projection_dim,
        pos_max=max(32, 4 * tokens), pos_sample=tokens, pos_base=tokens)
    return {"vae": vae, "clip_l": CLIPTextEncoder(clip_l), "clip_g": CLIPTextEncoder(clip_g),
            "clip_l_image": CLIPImageEncoder(CLIPImageConfig.preset("tiny", projection_dim=clip_l.width)),
            "clip_g_image": CLIPImageEncoder(
                CLIPImageConfig.preset("tiny", projection_dim=clip_g.projection_dim)),
            "t5": T5Encoder(t5), "mmdit": MMDiT(mmdit)}


def to_unit(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32 in [-1, 1], what the VAE takes."""
    return images.to(device).float() / 127.5 - 1


def vae_stage(run, parts, pictures) -> Stage:
    c, vae = run.config, parts["vae"]
    critic = PatchDiscriminator().to(run.device) if c.vae_critic else None

    def loss(step, g):
        x = to_unit(
            pictures.images[torch.randint(len(pictures.images), (c.vae_batch,), generator=g)], run.device)
        if critic is None:
            return vae_loss(vae, x, generator=g)[:2]
        critic.requires_grad_(False)                                        # it learns from its own loss only
        total, logged, recon = vae_loss(vae, x, generator=g, critic=critic, critic_weight=c.vae_critic)
        critic.requires_grad_(True)
        judged = discriminator_loss(critic, x, recon)
        return total + judged, logged | {"critic": judged.detach()}

    return Stage(
        "vae", nn.ModuleDict({"vae": vae} if critic is None else {"vae": vae, "critic": critic}), loss)


@torch.no_grad()
def measure_vae(run, vae, pictures) -> None:
    """Give the trained VAE the shift and scale of its latents; print how well it reconstructs."""
    some = to_unit(pictures.images[:512], run.device)
    with run.autocast():
        shift, scale = measure_latents(vae, some)
        again = torch.cat([vae.decode(vae.encode(x).mean) for x in some.split(64)])
    vae.config = dataclasses.replace(vae.config, shift=shift, scale=scale)
    print(f"vae: {psnr(again, some):.1f} dB from picture to latent and back; "
          f"latent = (z - {shift:.3f}) * {scale:.3f}", flush=True)


def clip_stage(run, parts, pictures, tokenizers) -> Stage:
    """Both text towers, each with an image tower that teaches it what its words look like."""
    c, names = run.config, ("clip_l", "clip_g")
    scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in names})
    scales.to(run.device)
    side = parts["clip_l_image"].config.image_size

    def loss(step, g):
        i = torch.randint(len(pictures.images), (c.clip_batch,), generator=g)
        captions = [choose(pictures.captions[k], g) for k in i.tolist()]
        images = pictures.images[i].to(run.device).float() / 255
        if images.shape[-1] != side:
            images = nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        same = torch.tensor([[a == b for b in captions] for a in captions], device=run.device)
        losses = {}
        for name in names:
            _, pooled = parts[name](tokenizers[name](captions).to(run.device))
            losses[name] = clip_loss(parts[f"{name}_image"](images), pooled, scales[name], same)
        return sum(losses.values()), {k: v.detach() for k, v in losses.items()}

    towers = {k: parts[k] for k in PARTS_OF["clip"]}
    return Stage("clip", nn.ModuleDict(towers | {"scales": scales}), loss)


def choose(options, g):
    return options[torch.randint(len(options), (), generator=g)]


def t5_stage(run, parts, pictures, tokenizers) -> Stage:
    """Its texts hold all captions of a picture: a hidden "star" can then be read in the other caption. In one
    caption alone any shape would do, and T5 would learn to see no difference between them."""
    c, tokenizer = run.config, tokenizers["t5"]
    ids = tokenizer(sorted({", ".join(texts) for texts in pictures.captions}), 77)     # (texts, 77)
    ids = ids[:, :int((ids != tokenizer.pad).sum(1).max())]                            # (texts, L)

    def loss(step, g):
        batch = ids[torch.randint(len(ids), (c.t5_batch,), generator=g)]
        return masked_span_loss(parts["t5"], batch.to(run.device), generator=g), {}

    return Stage("t5", parts["t5"], loss)


@torch.no_grad()
def cache(run, vae, encoders, pictures):
    """Everything that the flow model will be fed, computed once and kept on the device.

    Returns latent mean and standard deviation (n, C, H, W), so that each step still samples the posterior;
    context (captions, M, ctx) and pooled (captions, pool) in bfloat16; and for each picture the row numbers
    of its captions.
    """
    start, mean, std, context, pooled = time.monotonic(), [], [], [], []
    captions = sorted({text for texts in pictures.captions for text in texts})
    index = {text: i for i, text in enumerate(captions)}
    with run.autocast():
        for batch in pictures.images.split(128):
            posterior = vae.encode(to_unit(batch, run.device))
            mean.append(vae.to_latent(posterior.mean))
            std.append(posterior.std * vae.config.scale)
        for i in range(0, len(captions), 512):
            text = encoders(captions[i:i + 512], run.config.t5_length)
            context.append(text.context.bfloat16())
            pooled.append(text.pooled.bfloat16())
    print(f"flow: {len(pictures.images)} latents and {len(captions)} captions encoded "
          f"in {time.monotonic() - start:.0f} s", flush=True)
    rows = [[index[text] for text in texts] for texts in pictures.captions]
    return torch.cat(mean), torch.cat(std), torch.cat(context), torch.cat(pooled), rows


def flow_stage(run, parts, pictures, encoders) -> Stage:
    c, vae, model = run.config, parts["vae"], parts["mmdit"]
    model.gradient_checkpointing = c.checkpointing
    mean, std, context, pooled, rows = cache(run, vae, encoders, pictures)

    def loss(step, g):
        i = torch.randint(len(mean), (c.flow_batch,), generator=g)
        text = torch.tensor([choose(rows[k], g) for k in i.tolist()], device=run.device)
        i = i.to(run.device)
        x0 = mean[i] + std[i] * flow.draw_noise(mean[i].shape, g, run.device)       # (B, C, H, W)
        t = flow.shift_t(flow.sample_t(c.density, len(i), generator=g, device=run.device), c.shift)
        noise = flow.draw_noise(x0.shape, g, run.device)
        ctx, pool = drop_encoders(
            context[text].float(), pooled[text].float(), sample_drops(len(i), g, c.text_drop),
            encoders.clip_length, encoders.widths[:2])
        losses = flow.loss(model, x0, t=t, noise=noise, context=ctx, pooled=pool)
        return losses.mean(), {"by_t": loss_by_t(losses, t)}

    prompts = preview_prompts(c, pictures)
    pipe = Pipeline(model, vae, encoders, t5_length=c.t5_length, shift=c.shift, kind="clean",
                    size=(c.size, c.size), zero_empty=True,
                    dtype=None if run.dtype == torch.float32 else run.dtype)

    def preview(step):
        images = pipe(prompts, guidance=3.0, steps=20)                      # the same eight seeds every time
        row = [(np.asarray(image), [prompt]) for image, prompt in zip(images, prompts)]
        (run.folder / "samples").mkdir(exist_ok=True)
        contact_sheet({f"step {step}": row[:4], "": row[4:]}).save(run.folder / "samples" / f"{step:06d}.png")

    return Stage("flow", model, loss, preview, ema=True)


def preview_prompts(c, pictures) -> list[str]:
    if c.data != "drawn":
        return [pictures.captions[k * len(pictures.captions) // 8][0] for k in range(8)]
    return ["a star", "a red circle", "three hearts", "a ring and a cross", "a square left of a ring",
            "a star above a heart", "a red star left of a blue ring",
            "a small green square at the top left and a big white ring at the right"]


def demo() -> None:
    """A stage's loss depends on its weights and on (seed, stage, step), and on nothing else."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from data import load_pictures
    from train import Run, TrainConfig, make_tokenizers

    pictures = load_pictures("drawn", count=32)
    c = TrainConfig(vae_batch=4, clip_batch=8, t5_batch=8, device="cpu", dtype="float32")
    with TemporaryDirectory() as folder:
        captions = [text for texts in pictures.captions for text in texts]
        tokenizers = make_tokenizers(Path(folder), c, captions, captions)
    run, parts = Run(c, Path("runs")), build(c, tokenizers)
    for stage in (vae_stage(run, parts, pictures), clip_stage(run, parts, pictures, tokenizers),
                  t5_stage(run, parts, pictures, tokenizers)):
        a, b, other = (stage.loss(i, run.generator(stage.name, i))[0].item() for i in (5, 5, 6))
        assert a == b != other
        print(f"{stage.name:4s} untrained loss {a:.4f} at step 5, again {b:.4f}; {other:.4f} at step 6")


# Exercises. (1) Train the CLIP pairs on full captions only (the last of each picture): does the flow's score
# for places change? (2) Give the flow the latents' means instead of samples: what does its loss gain, and why
# is that no better picture? (3) Leave T5 out (drop it always): which of the six tasks suffers first?

if __name__ == "__main__":
    demo()
