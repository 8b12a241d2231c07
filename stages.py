"""What does each stage of training learn, and from what? Kept apart from train.py so that the loop there
stays on one page.

    stage  trains                 a step's batch              loss
    vae    AutoencoderKL          pictures                    squared error + edges + KL  (vae.vae_loss)
    clip   two text towers, and   pictures, a caption each    InfoNCE of both pairs       (clip_loss)
           the image towers that
           teach them
    t5     T5Encoder              captions with hidden words  cross-entropy of the words  (masked_span_loss)
    flow   MMDiT                  latents, text features,     flow matching               (flow.loss)
                                  noise, times

Each function returns a Stage: the modules to train and loss(step, generator, rows). All randomness comes
from that generator, which depends on (seed, stage, step) alone. Each stage uses what earlier ones have
learnt, frozen.

rows selects the part of the batch to compute: one process of many, or a machine with little memory, takes
less than all of it (parallel.py). A row's random numbers do not depend on this, and what loss returns, for
the log as well, is that part's share of a sum: the shares of all rows add up to the loss of the batch.

The flow reads its batches from a cache on disk (prepare.py). Once that is written, the autoencoder and the
text encoders leave memory; the autoencoder is loaded again to draw a sample grid. With --encoders the
encoders are published ones: they made the cache, and only the flow is left to learn.
"""
import copy
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import flow
from data import contact_sheet, list_pictures, pick_captions, refuse_if_mostly_bad
from finetune import add_lora, merge_lora, save_lora
from mmdit import MMDiT, MMDiTConfig
from parallel import Later, local, whole
from pipeline import Pipeline, to_pil
from prepare import (Batches, Cache, Survey, digest, files_fingerprint, send, source_of, tensors_fingerprint,
                     write_cache)
from run_folder import (bare_encoders, home_of_encoders, is_run, load_encoders, load_part, load_tokenizers,
                        sole_writer)
from tensor_files import write_atomically, write_json
from text_encoders import (ENCODERS, CLIPImageConfig, CLIPImageEncoder, CLIPTextConfig, CLIPTextEncoder,
                           Conditioning, T5Config, T5Encoder, TextEncoders, clip_loss, drop_encoders,
                           masked_span_loss, sample_drops)
from tokens import load_clip_tokenizer, load_t5_tokenizer, train_clip_tokenizer, train_t5_tokenizer
from vae import (AutoencoderKL, PatchDiscriminator, VAEConfig, discriminator_loss, measure_latents, psnr,
                 vae_loss)
from watch import loss_by_t
from weights import config_of, find_tokenizers, load_mmdit, load_vae, locate, read_tensor

PARTS_OF = {"vae": ("vae",), "clip": ("clip_l", "clip_g", "clip_l_image", "clip_g_image"), "t5": ("t5",),
            "flow": ("mmdit",)}
STAGES = tuple(PARTS_OF)


@dataclass
class Stage:
    """What `fit` needs to know about a stage."""
    name: str
    model: nn.Module                        # everything that is trained
    loss: Callable                          # (step, generator, rows) -> (scalar, {name: scalar for the log})
    preview: Callable | None = None         # (step): draws samples -> () -> None: saves them as a grid
    ahead: Callable | None = None           # (step, rows) -> None: begin to read what its loss will need
    ema: bool = False                       # keep an average of the weights and return it
    finish: Callable | None = None          # () -> None: after training, before saving


def make_tokenizers(folder: Path, c, captions: list[str], short: list[str], kept=True) -> dict:
    """CLIP's two (one vocabulary, different padding) and T5's, trained on the captions
    unless the folder has them and `kept` is true.

    Also sets clip_length and t5_length where they are 0: attention to padding is not free, so CLIP gets as
    many tokens as the short captions need and T5 as many as all captions need, up to SD3's 77. Longer ones
    are cut, as in SD3.
    """
    words = folder / "tokenizers"
    if not (kept and (words / "t5" / "tokenizer.json").is_file()):
        train_clip_tokenizer(captions, words / "clip", 2048)
        train_t5_tokenizer(captions, words / "t5", 2048)

    def needed(tokenizer, texts):
        return max(2, int(tokenizer(list(set(texts)), 77).eq(tokenizer.eos).int().argmax(1).max()) + 1)

    c.clip_length = c.clip_length or needed(load_clip_tokenizer(words / "clip"), short)
    c.t5_length = c.t5_length or needed(load_t5_tokenizer(words / "t5"), captions)
    return load_tokenizers(folder, c.clip_length)


def build(c, tokenizers: dict, later=nullcontext()) -> dict[str, nn.Module]:
    """Every part, untrained, by the name of its file. Published encoders come as names and shapes alone. The
    transformer, whose config follows from the others', is made inside `later` (parallel.Later), or left out
    where `pretrained_mmdit` supplies it."""
    torch.manual_seed(c.seed)
    if c.encoders:
        bare = bare_encoders(c.encoders)
        configs = (bare[name].config for name in ("vae", *ENCODERS))
        return bare | ({} if c.origin else {"mmdit": build_mmdit(c, *configs, later)})
    vae = AutoencoderKL(VAEConfig.preset("tiny", z_channels=c.vae_channels))
    clip_l = CLIPTextConfig.preset(
        "tiny_l", vocab_size=tokenizers["clip_l"].vocab_size, context_length=c.clip_length)
    clip_g = CLIPTextConfig.preset(
        "tiny_g", vocab_size=tokenizers["clip_g"].vocab_size, context_length=c.clip_length)
    t5 = T5Config.preset("tiny", vocab_size=tokenizers["t5"].vocab_size)
    mmdit = {} if c.origin else {"mmdit": build_mmdit(c, vae.config, clip_l, clip_g, t5, later)}
    return {"vae": vae, "clip_l": CLIPTextEncoder(clip_l), "clip_g": CLIPTextEncoder(clip_g),
            "clip_l_image": CLIPImageEncoder(CLIPImageConfig.preset("tiny", projection_dim=clip_l.width)),
            "clip_g_image": CLIPImageEncoder(
                CLIPImageConfig.preset("tiny", projection_dim=clip_g.projection_dim)),
            "t5": T5Encoder(t5)} | mmdit


def build_mmdit(c, vae, clip_l, clip_g, t5, later) -> MMDiT:
    """The transformer for the latents and features of an autoencoder and encoders of these configs."""
    tokens = c.size // (2 * vae.factor)                                     # along a side of a picture
    config = MMDiTConfig.preset(
        c.model, in_channels=vae.z_channels, context_dim=t5.width,
        pooled_dim=sum(clip.projection_dim or clip.width for clip in (clip_l, clip_g)),
        pos_max=max(32, 3 * tokens), pos_sample=tokens, pos_base=tokens)
    with later:
        mmdit = MMDiT(config)
        mmdit.context_embedder = WhiteLinear(mmdit.context_embedder)        # during training only
    return mmdit


def to_signed(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32 in [-1, 1], what the VAE takes."""
    return images.to(device).float() / 127.5 - 1


def vae_stage(run, parts, pictures) -> Stage:
    c, vae = run.config, parts["vae"]
    critic = PatchDiscriminator().to(run.device) if c.vae_critic else None

    side = c.size // vae.config.factor

    def loss(step, g, rows=slice(None)):
        i = torch.randint(len(pictures.images), (c.vae_batch,), generator=g)[rows]
        x, share = to_signed(pictures.images[i], run.device), len(i) / c.vae_batch
        noise = flow.draw_noise((c.vae_batch, vae.config.z_channels, side, side), g)[rows].to(run.device)
        if critic is None:
            total, logged, _ = vae_loss(vae, x, noise=noise)
        else:
            critic.requires_grad_(False)                                    # it learns from its own loss only
            total, logged, recon = vae_loss(vae, x, noise=noise, critic=critic, critic_weight=c.vae_critic)
            critic.requires_grad_(True)
            judged = discriminator_loss(critic, x, recon)
            total, logged = total + judged, logged | {"critic": judged.detach()}
        return total * share, {k: v * share for k, v in logged.items()}

    modules = {"vae": vae} if critic is None else {"vae": vae, "critic": critic}
    return Stage("vae", nn.ModuleDict(modules), loss, finish=lambda: measure_vae(run, vae, pictures))


@torch.no_grad()
def measure_vae(run, vae, pictures) -> None:
    """Give the trained VAE the shift and scale of its latents; print how well it reconstructs."""
    some = to_signed(pictures.images[:512], run.device)
    with run.autocast():
        shift, scale = measure_latents(vae, some)
        again = torch.cat([vae.decode(vae.encode(x).mean) for x in some.split(64)])
    vae.config = run.ranks.same(replace(vae.config, shift=shift, scale=scale))
    print(f"vae: {psnr(again, some):.1f} dB from picture to latent and back; "
          f"latent = (z - {shift:.3f}) * {scale:.3f}", flush=True)


def clip_stage(run, parts, pictures, tokenizers) -> Stage:
    """Both text towers, each with an image tower that teaches it what its words look like."""
    c, names = run.config, ("clip_l", "clip_g")
    scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in names})
    scales.to(run.device)
    side = parts["clip_l_image"].config.image_size

    def loss(step, g, rows=slice(None)):
        i = torch.randint(len(pictures.images), (c.clip_batch,), generator=g)
        which = pick_captions([len(pictures.captions[k]) for k in i.tolist()], g, c.synthetic)
        captions = [pictures.captions[k][n] for k, n in zip(i[rows].tolist(), which[rows].tolist())]
        images = pictures.images[i[rows]].to(run.device).float() / 255
        if images.shape[-1] != side:
            images = nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        losses, share = {}, len(captions) / c.clip_batch
        for name in names:
            _, text = parts[name](tokenizers[name](captions).to(run.device))
            image = parts[f"{name}_image"](images)
            everyone = run.ranks.gather(image), run.ranks.gather(text)      # the batch of all ranks
            losses[name] = clip_loss(image, text, scales[name], everyone, rows.start or 0) * share
        return sum(losses.values()), {k: v.detach() for k, v in losses.items()}

    towers = {k: parts[k] for k in PARTS_OF["clip"]}
    return Stage("clip", nn.ModuleDict(towers | {"scales": scales}), loss)


def t5_stage(run, parts, pictures, tokenizers) -> Stage:
    """Each text joins all captions of a picture, so that a hidden "star" can be read from another caption. In
    one caption alone any shape would fit, and T5 would learn to see no difference between them."""
    c, tokenizer = run.config, tokenizers["t5"]
    ids = tokenizer(sorted({", ".join(texts) for texts in pictures.captions}), 77)     # (texts, 77)
    ids = ids[:, :int((ids != tokenizer.pad).sum(1).max())]                            # (texts, L)

    def loss(step, g, rows=slice(None)):
        batch = ids[torch.randint(len(ids), (c.t5_batch,), generator=g)]
        return masked_span_loss(parts["t5"], batch.to(run.device), generator=g, rows=rows), {}

    return Stage("t5", parts["t5"], loss)


def encoder_prints(path) -> tuple[str, str]:
    """Fingerprints of the autoencoder and of the text encoders of a run or of published weights, as a cache
    records them."""
    home = home_of_encoders(path)
    if is_run(home):
        words = [home / name for name in tokenizer_files(home)]
        return (files_fingerprint([home / "vae.safetensors"]),
                files_fingerprint([*(home / f"{name}.safetensors" for name in ENCODERS), *words]))
    prints = {name: f"{config_of(home, name)} {tensors_fingerprint(locate(home, name)[0])}".encode()
              for name in ("vae", *ENCODERS)}
    words = [tokenizer.tok.to_str().encode() for tokenizer in find_tokenizers(home)]
    return digest(prints["vae"]), digest(*(prints[name] for name in ENCODERS), *words)


def pixels(image, size):
    """A picture in memory (3, S, S), as read_picture gives one from a file."""
    return image.permute(1, 2, 0).numpy()


def cached_batches(run, parts, tokenizers, survey, pictures) -> Batches:
    """The flow model's input: from the cache in the run's folder, after encoding what it lacks, or from the
    one that --cache names.

    Pictures that are in memory already are not read or drawn again."""
    c, folder, prints = run.config, run.folder, encoder_prints(run.folder)
    if not c.cache:
        held = {} if c.buckets else dict(zip(pictures.names, pictures.images))
        survey = copy.copy(survey)                          # the caller's must not keep pixels in memory
        survey.entries = [e._replace(picture=partial(pixels, held[e.name])) if e.name in held else e
                          for e in survey.entries]
        encoders = TextEncoders(*(parts[name] for name in ENCODERS), list(tokenizers.values()))
        run.ranks.together(partial(
            write_cache, folder / "cache", survey, parts["vae"], encoders, vae_print=prints[0],
            text_print=prints[1], t5_length=c.t5_length, source=source_of(c), autocast=run.autocast,
            device=run.device, rank=run.ranks.rank, world=run.ranks.world, verify=False))
    cache = Cache(c.cache or folder / "cache")
    cache.compare(*prints)
    return Batches(cache, c.flow_batch, c.seed, synthetic=c.synthetic, locked=run.device.type == "cuda")


def encode_all(run, out, prints, rank, world) -> None:
    """Writes a cache of run.config's data to `out`, with the encoders of run.folder, which may be published
    weights. Each of `world` ranks does its share; if interrupted, the next call goes on from there. It reads
    what is there and makes damaged files again; a run does not when it starts, as that takes long."""
    c = run.config
    listing = list_pictures(c.data, c.size, count=c.pictures, seed=c.seed)
    survey = Survey(listing.entries[:c.pictures], c.size, bucketed=c.buckets)
    home = home_of_encoders(run.folder)
    published = not is_run(home)            # these compute in the dtype of their weights
    vae, encoders = load_encoders(home, dtype=run.dtype)
    skipped = listing.skipped + survey.skipped
    if not survey.entries:
        refuse_if_mostly_bad(c.data, 0, skipped)
    if rank == 0:
        print(f"cache: {len(survey.entries):,} pictures in {len(set(survey.buckets))} shapes with "
              f"{len(survey.captions):,} captions, {len(skipped)} skipped"
              + f", {listing.unnamed:,} without a usable line in captions.jsonl" * bool(listing.unnamed)
              + f", into {out}", flush=True)
    with nullcontext() if rank else sole_writer(out):
        lost = write_cache(out, survey, vae, encoders, vae_print=prints[0], text_print=prints[1],
                           source=source_of(c), origin=str(home.resolve()) if published else "",
                           t5_length=c.t5_length, autocast=nullcontext if published else run.autocast,
                           device=run.device, rank=rank, world=world,
                           say=print if rank == 0 else lambda line: None)
    for name, reason in skipped[:5 * (rank == 0)] + lost[:5]:
        print(f"skipped {name}: {reason}")


def tokenizer_files(run) -> list[Path]:
    """Relative to the run; without what macOS adds to folders that someone has looked at."""
    return [p.relative_to(run) for p in Path(run, "tokenizers").rglob("*")
            if p.is_file() and not p.name.startswith(".")]


def take_over(c, folder) -> None:
    """Copy all that c.origin has learned, unless it is there: its encoders as they are, then its transformer
    to start from. The settings come first, so that an interrupted copy can be resumed."""
    origin = Path(c.origin)
    if any((folder / name).is_file() for name in ("start/mmdit.safetensors", "mmdit.safetensors")):
        return
    files = [f"{name}.safetensors" for stage, names in PARTS_OF.items() for name in names if stage != "flow"]
    files += tokenizer_files(origin)
    files = files if is_run(home_of_encoders(origin)) else []           # published ones stay where they are
    copies = [(name, name) for name in files] + [("mmdit.safetensors", "start/mmdit.safetensors")]
    for source, _ in copies:
        if not (origin / source).is_file():
            raise ValueError(f"--from {origin}: {source} is missing there: only a finished run can be taken "
                             "over")
    write_json(folder / "config.json", asdict(c))
    for source, target in copies:
        write_atomically(folder / target, partial(shutil.copyfile, origin / source))


def pretrained_mmdit(run, vae, later) -> MMDiT:
    """The transformer that --from names: a run's, resized for this run's pictures, or a published one as it
    is. With --lora only its adapters learn; a published one then stays in the dtype of matrix products.

    later: a parallel.Later, with which its tensors stay in the file until they are needed."""
    c = run.config
    if (run.folder / "start").is_dir():
        old = load_part(run.folder / "start", "mmdit", later)
        with later:
            model = resized(old, c.size // (2 * vae.config.factor), white=not c.lora)
    else:
        cut_up, dtype = isinstance(later, Later), run.dtype if c.lora else torch.float32
        model = load_mmdit(c.origin, device="meta" if cut_up else run.device, dtype=dtype)
        model.requires_grad_(True)
        if cut_up:
            source, recipe = locate(c.origin, "mmdit")
            for name, t in model.state_dict().items():
                later.note(t, partial(read_tensor, source, recipe(name), t.shape, "cpu", t.dtype))
            model.pos_embed = later.maker(model.pos_embed)()                # not trained, and not cut up
    return add_lora(model, c.lora, seed=c.seed) if c.lora else model


def resized(old: MMDiT, tokens: int, white: bool = True) -> MMDiT:
    """The same weights for pictures of tokens x tokens. The coordinates of the pictures that it first learned
    are stretched over these (interpolated) and continued beyond (extended), paper section 5.3.2. Smaller
    pictures take the middle of them. white: the layer that reads text will be trained (WhiteLinear)."""
    c = replace(old.config, pos_sample=max(old.config.pos_sample, tokens),
                pos_max=max(old.config.pos_max, 3 * tokens))
    new = MMDiT(c)      # a published table is kept if it is large enough: it may come from another formula
    new.load_state_dict(old.state_dict() | ({} if c == old.config else {"pos_embed": new.pos_embed}))
    new.context_embedder = WhiteLinear(new.context_embedder) if white else new.context_embedder
    return new


class WhiteLinear(nn.Linear):
    """A Linear for training: it sees its input with mean 0 and nearly the identity as covariance.

    Ten directions hold four fifths of the text features' variance, and tell which words there are. Which
    colour belongs to which shape lies in the weak directions, and from raw features would be learned last.
    `folded` is the plain layer that computes the same.

    DIFFERS: the paper's layer reads raw features; half a million steps need no such help."""

    def __init__(self, linear: nn.Linear):
        """Until `measure` is called, it computes what `linear` does."""
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.register_buffer("mean", torch.zeros(self.in_features), persistent=False)
        self.register_buffer("matrix", torch.eye(self.in_features), persistent=False)

    @torch.no_grad()
    def measure(self, some: torch.Tensor, learned: bool = False) -> None:
        """some (n, in): inputs to measure mean and covariance on. learned: the weights were trained on
        raw inputs, and are converted so as to compute the same; else they are untrained, and stay."""
        some = some.cpu().double()                                              # no float64 on MPS
        # (in,), (in, in); for SD3's 4096 it takes half a minute on one core
        values, vectors = torch.linalg.eigh(some.T.cov(correction=0))
        scale = (values.clamp(min=0) + 0.03 * values.mean()).rsqrt()            # floor against rounding
        self.mean.copy_(some.mean(0))                                           # (in,)
        self.matrix.copy_((vectors * scale) @ vectors.T)                        # (in, in)
        if learned:                     # FSDP2 cuts both by the weight's rows: each rank converts its own
            weight, bias = local(self.weight), local(self.bias)
            bias += weight @ self.mean
            weight.copy_(weight @ ((vectors / scale) @ vectors.T).to(weight))       # matrix inverted

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):                  # subtracts large numbers
            x = (x.float() - self.mean) @ self.matrix
        return super().forward(x)

    def folded(self) -> nn.Linear:
        weight, bias = (whole(p.data) for p in (self.weight, self.bias))
        plain = nn.Linear(self.in_features, self.out_features, device=weight.device)
        plain.weight.data = weight @ self.matrix
        plain.bias.data = bias - plain.weight.data @ self.mean
        return plain


def flow_stage(run, parts, tokenizers, survey, pictures) -> Stage:
    """The transformer learns from the cache, which is made here if necessary. After that nothing needs the
    encoders and the pixels: they are removed from `parts` and `pictures`, to free memory."""
    c, model = run.config, parts["mmdit"]
    for name, p in model.joint_blocks[-1].context_block.attn.named_parameters():
        if name.startswith("ln_q"):
            p.requires_grad_(False)                         # the last text queries are not used (parallel.py)
    batches = cached_batches(run, parts, tokenizers, survey, pictures)
    widths = [parts[name].config.width for name in ENCODERS[:2]]
    prompts = preview_prompts(c, pictures.captions)
    text = preview_text(run, parts, tokenizers, batches.cache, prompts)
    with torch.device("meta"):
        unread = AutoencoderKL(parts["vae"].config)
    for name in ("vae", *ENCODERS, "clip_l_image", "clip_g_image"):
        parts.pop(name, None)
    pictures.images = pictures.images.new_empty(0)

    def loss(step, g, rows=slice(None)):
        mean, std, context, pooled = batches.at(step, run.device, rows)     # two (b, C, H, W), and text
        # times and dropped text are few, and drawn for the whole batch; noise, which takes seconds in batches
        # of thousands, is drawn for these rows alone: each has a generator of its own
        t = flow.shift_t(flow.sample_t(c.density, c.flow_batch, generator=g), c.shift)[rows]
        drops = sample_drops(c.flow_batch, g, c.text_drop)[rows]
        seeds = torch.randint(2**62, (c.flow_batch,), generator=g)[rows].tolist()
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        noises = [flow.draw_noise(mean.shape, own) for _ in range(2)]
        t, drops, spread, noise = (send(x, run.device) for x in (t, drops, *noises))
        latents = mean + std * spread                                               # posterior samples
        context, pooled = drop_encoders(context, pooled, drops, c.clip_length, widths)
        losses = flow.loss(model, latents, t=t, noise=noise, context=context, pooled=pooled)
        return losses.mean() * (len(t) / c.flow_batch), {"by_t": loss_by_t(losses, t)}

    white = isinstance(model.context_embedder, WhiteLinear)                 # a published one stays as it is
    if white:
        few = slice(0, max(1, 60_000 // (32 * (c.clip_length + c.t5_length))))          # 1 GB for SD3's own
        some = [batches.at(i, run.device, few)[2].flatten(0, 1) for i in range(32)]     # each (tokens, ctx)
        model.context_embedder.measure(torch.cat(some), learned=bool(c.origin))

    def finish():
        if white:
            model.context_embedder = model.context_embedder.folded().requires_grad_(False)
        if c.lora:
            if run.ranks.rank == 0:
                save_lora(model, run.folder / "lora.safetensors")
            merge_lora(model)

    def preview(step):
        pipe = Pipeline(model, unread, text, shift=c.shift, kind="clean", size=(c.size, c.size),
                        dtype=None if run.dtype == torch.float32 else run.dtype, device=run.device)
        latents = pipe(prompts, guidance=3.0, steps=20, t5_length=c.t5_length, output="latent")     # seed 0
        return partial(save_grid, pipe, latents, step)

    @torch.no_grad()
    def save_grid(pipe, latents, step):
        vae = load_vae(c.encoders, dtype=torch.float32) if c.encoders else load_part(run.folder, "vae")
        pipe.vae = vae.to(run.device)
        with run.autocast():
            images = to_pil((pipe.decode(latents) / 2 + 0.5).clamp(0, 1))
        row = [(np.asarray(image), [prompt]) for image, prompt in zip(images, prompts)]
        sheet = contact_sheet({f"step {step}": row[:4], "": row[4:]})
        write_atomically(run.folder / "samples" / f"{step:06d}.png", partial(sheet.save, format="PNG"))

    return Stage("flow", model, loss, preview, batches.expect, ema=True, finish=finish)


class PrecomputedText:
    """Stands in for text encoders: it knows their features of a few texts, and nothing else."""
    clip_l = clip_g = t5 = True                     # none is missing

    def __init__(self, texts, context, pooled):
        self.texts, self.said = texts, Conditioning(context, pooled)

    def __call__(self, texts, t5_length, drop=()):
        rows = [self.texts.index(text) for text in texts]
        return Conditioning(self.said.context[rows], self.said.pooled[rows])


@torch.no_grad()
def preview_text(run, parts, tokenizers, cache, prompts) -> PrecomputedText:
    """The encoders' features of the prompts, and zeros for "". A given cache holds those of its captions."""
    c, texts = run.config, list(dict.fromkeys(prompts))
    if c.cache:
        pictures = np.array([prompts.index(text) for text in texts]) * len(cache) // 8
        features = cache.text(pictures, torch.zeros(len(pictures), dtype=torch.long))
    else:
        encoders = TextEncoders(*(parts[name] for name in ENCODERS), list(tokenizers.values()))
        with run.autocast():
            features = vars(encoders(texts, c.t5_length)).values()
    return PrecomputedText([*texts, ""], *(torch.cat([x, torch.zeros_like(x[:1])]).float() for x in features))


def preview_prompts(c, captions) -> list[str]:
    """Eight prompts for the sample grids: about the drawn world, or from the data's own captions (a tuple for
    each picture)."""
    if c.data != "drawn" or c.cache:
        return [captions[k * len(captions) // 8][0] for k in range(8)]
    return ["a star", "a red circle", "three hearts", "a ring and a cross", "a square left of a ring",
            "a star above a heart", "a red star left of a blue ring",
            "a small green square at the left and a big white ring at the right"]


def demo() -> None:
    """A stage's loss depends on its weights and on (seed, stage, step), and on nothing else."""
    from tempfile import TemporaryDirectory

    from data import load_pictures
    from settings import TrainConfig
    from train import Run

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
# for places change? (2) Give the flow the latents' means instead of samples: how much does its loss fall, and
# why are the pictures no better? (3) Always drop T5: which of the six tasks suffers first?

if __name__ == "__main__":
    demo()
