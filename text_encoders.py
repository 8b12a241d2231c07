"""The text encoders: how does a prompt become (B, 154, 4096) and (B, 2048)?

Three frozen models read the same prompt; SD3 joins their features into two tensors:

    encoder        parameters  tokens           width  features from                  pooled vector
    CLIP ViT-L/14     123.1 M  77, BOS .. EOS     768  penultimate layer, no norm      at EOS, 768
    OpenCLIP bigG     694.7 M  77, BOS .. EOS    1280  penultimate layer, no norm      at EOS, projected, 1280
    T5-v1.1-XXL     4,762.3 M  T = 77, .. EOS    4096  last layer, after final norm    none

                   0        768           2048                4096
                 0 +---------+--------------+-------------------+
    context        | CLIP-L  |     bigG     |       zeros       |     pooled (B, 2048) = [CLIP-L | bigG]
    (B,154,4096) 77+---------+--------------+-------------------+
                   |                     T5                     |     context: the transformer's text stream,
               154 +--------------------------------------------+     pooled: its modulation

In float16 the weights take 0.25, 1.4 and 9.5 GB, and T5 costs more than the others together. None of them
changes while SD3 trains: encode each caption once and store its features; `drop_encoders` works on those.

Worth knowing before reading on
- Padding is attended to, in CLIP, in T5 and in the transformer; the real models were trained so. Hence T
  is part of the conditioning: 77 and 256 give different pictures.
- CLIP-L pads with EOS, bigG with id 0, which is "!". CLIP-L has x * sigmoid(1.702 x) where bigG has GELU.
- T5 has no 1/sqrt(d) in its attention; one table of relative positions, in block 0, serves all blocks. It
  overflows in float16: use bfloat16 or float32.
- Training drops (zeroes) each encoder independently, so any of them may be left out when sampling.
  The empty prompt of guidance is not dropped but encoded like any other (models trained here: zeros).

How text becomes token ids is the question of tokens.py; where the miniatures' pre-training differs from the
published one is told at init_weights and the losses.

Dims: B batch, L tokens, D width, nh heads, hd head dim. Parameter names are those of the Hugging Face files.
Run `python text_encoders.py`: trains tiny tokenizers and asserts the layout drawn above, in seconds.
"""
import math
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from tokens import EOS, load_clip_tokenizer, load_t5_tokenizer, train_clip_tokenizer, train_t5_tokenizer

ENCODERS = ("clip_l", "clip_g", "t5")   # the order of `drop`, `dropped` and `tokenizers`


def preset(cls, name, **changes):
    """A config by its name in PRESETS, with changes."""
    if name not in cls.PRESETS:
        raise ValueError(f"no {cls.__name__} preset {name!r}: choose from {', '.join(cls.PRESETS)}")
    return cls(**{**dict(zip(cls.__dataclass_fields__, cls.PRESETS[name])), **changes})


def init_weights(model):
    """The published schemes: normal weights with these deviations, zero biases; norms stay at 1.

    DIFFERS: the original starts T5's table of relative positions at D^-0.5, from where short training hardly
    learns word order: "tiny" reaches a masked-span loss of 2.6 in 300 steps of 64 texts; from 2.0, 0.5.
    """
    c, a = model.config, model.config.width ** -0.5
    if isinstance(c, T5Config):
        q, o = a * c.head_dim ** -0.5, (c.heads * c.head_dim) ** -0.5   # q has the scale missing in attention
        std = {"q": q, "k": a, "v": a, "o": o, "wi_0": a, "wi_1": a, "wo": c.ffn ** -0.5, "shared": 1.0,
               "relative_attention_bias": 2.0}
    else:
        out = a * (2 * c.layers) ** -0.5    # additions to the residual stream: smaller in deeper models
        std = {"q_proj": a, "k_proj": a, "v_proj": a, "out_proj": out, "fc1": a * 2 ** -0.5, "fc2": out,
               "text_projection": a, "visual_projection": a, "token_embedding": 0.02,
               "position_embedding": 0.01 if isinstance(c, CLIPTextConfig) else a}
    for name, module in model.named_modules():
        if (leaf := name.rpartition(".")[2]) in std:
            nn.init.normal_(module.weight, std=std[leaf])
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def attention(x, nh, to_q, to_k, to_v, to_out, **how):
    """Self-attention of x (B, L, D) with four linear layers and nh heads."""
    q, k, v = (to(x).unflatten(-1, (nh, -1)).transpose(1, 2) for to in (to_q, to_k, to_v))  # (B, nh, L, hd)
    out = F.scaled_dot_product_attention(q, k, v, **how)                                    # (B, nh, L, hd)
    return to_out(out.transpose(1, 2).flatten(2))                                           # (B, L, D)


class LayerNorm(nn.LayerNorm):          # CLIP's norm, in float32 whatever the dtype of weights and input
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class RMSNorm(nn.RMSNorm):              # T5's norm: x / rms(x) * weight, no mean, no bias; float32 as well
    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


# ------------------------------------------------------------------------------------------------------- CLIP

@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int                     # for the tiny ones, the trained tokenizer's
    width: int
    layers: int
    heads: int
    ffn: int
    activation: str                     # "quick_gelu" (OpenAI) | "gelu" (OpenCLIP)
    context_length: int = 77            # tokens, with BOS and EOS
    projection_dim: int | None = None   # None: no text_projection, pooled has `width` numbers
    eos_token_id: int | None = None     # None: the last id. (Old config files say 2; that is not the id)
    preset = classmethod(preset)
    PRESETS = {                         # CLIP-L as SD3 uses it; OpenAI's own file has projection_dim=768
        "clip_l": (49408, 768, 12, 12, 3072, "quick_gelu"),                 # 123,060,480 parameters
        "clip_g": (49408, 1280, 32, 20, 5120, "gelu", 77, 1280),            # 694,659,840
        "tiny_l": (1024, 64, 2, 2, 256, "quick_gelu", 20),                  #     166,912
        "tiny_g": (1024, 96, 3, 3, 384, "gelu", 20, 96)}                    #     445,152


@dataclass(frozen=True)
class CLIPImageConfig:
    image_size: int                     # pixels along a side
    patch_size: int
    width: int
    layers: int
    heads: int
    ffn: int
    activation: str
    projection_dim: int                 # as wide as the text tower's pooled vector
    preset = classmethod(preset)
    PRESETS = {"clip_l": (224, 14, 1024, 24, 16, 4096, "quick_gelu", 768),  # 303,966,208 parameters
               "tiny": (64, 16, 128, 3, 4, 512, "quick_gelu", 64)}          #     704,128


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer, the same in both towers."""

    def __init__(self, config):
        super().__init__()
        D, self.heads, self.quick = config.width, config.heads, config.activation == "quick_gelu"
        if not self.quick and config.activation != "gelu":
            raise ValueError(f"no activation {config.activation!r}: choose quick_gelu or gelu")
        self.layer_norm1, self.layer_norm2 = LayerNorm(D), LayerNorm(D)
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(D, D) for n in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, config.ffn), "fc2": nn.Linear(config.ffn, D)})

    def forward(self, x, causal=False):
        a, h = self.self_attn, self.layer_norm1(x)
        x = x + attention(h, self.heads, a.q_proj, a.k_proj, a.v_proj, a.out_proj, is_causal=causal)
        h = self.mlp.fc1(self.layer_norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        return x + self.mlp.fc2(h)


class CLIPTextEncoder(nn.Module):
    """Causal transformer, trained to match captions with pictures (Radford et al. 2021, arXiv 2103.00020)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config, D = config, config.width
        layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(config.vocab_size, D),
                                         "position_embedding": nn.Embedding(config.context_length, D)}),
            "encoder": nn.ModuleDict({"layers": layers}), "final_layer_norm": LayerNorm(D)})
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(D, config.projection_dim, bias=False)
        self.eos = config.vocab_size - 1 if config.eos_token_id is None else config.eos_token_id
        init_weights(self)

    def forward(self, ids):
        """ids (B, L), L <= context_length -> penultimate (B, L, D), pooled (B, projection_dim or D).

        penultimate: the last layer's input. pooled: its output at the first EOS, normed, then projected if
        there is a text_projection. ValueError if ids are too long or a row has no EOS.
        """
        is_eos, text, (B, L) = ids == self.eos, self.text_model, ids.shape
        if L > self.config.context_length or not is_eos.any(1).all():
            raise ValueError(f"CLIP needs EOS ({self.eos}) in each row and at most "
                             f"{self.config.context_length} ids: use this model's own tokenizer")
        x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding.weight[:L]  # (B, L, D)
        for layer in text.encoder.layers:
            penultimate, x = x, layer(x, causal=True)
        first = is_eos.int().argmax(1)  # (the usual ids.argmax fails if added tokens have larger ids)
        pooled = text.final_layer_norm(x[torch.arange(B, device=ids.device), first])              # (B, D)
        return penultimate, pooled if self.config.projection_dim is None else self.text_projection(pooled)


class CLIPImageEncoder(nn.Module):
    """CLIP's other half, a vision transformer. Not part of SD3; it trains tiny CLIPs and scores pictures."""

    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        self.config, D, P = config, config.width, config.patch_size
        embeddings = nn.Module()
        embeddings.class_embedding = nn.Parameter(torch.randn(D) * D ** -0.5)
        embeddings.patch_embedding = nn.Conv2d(3, D, P, stride=P, bias=False)
        embeddings.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, D)
        layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.vision_model = nn.ModuleDict({
            "embeddings": embeddings, "pre_layrnorm": LayerNorm(D),     # spelt like this in all checkpoints
            "encoder": nn.ModuleDict({"layers": layers}), "post_layernorm": LayerNorm(D)})
        self.visual_projection = nn.Linear(D, config.projection_dim, bias=False)
        init_weights(self)

    def forward(self, images):
        """images (B, 3, S, S) in [0, 1], S = image_size -> (B, projection_dim), not normalised."""
        vision, embed, S = self.vision_model, self.vision_model.embeddings, self.config.image_size
        if images.shape[1:] != (3, S, S) or not images.is_floating_point():
            raise ValueError(f"images {tuple(images.shape)}, {images.dtype}: resize them to "
                             f"(B, 3, {S}, {S}), in [0, 1]")
        mean = images.new_tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)   # of CLIP's training set
        std = images.new_tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
        x = embed.patch_embedding((images - mean) / std).flatten(2).transpose(1, 2)     # (B, N, D)
        x = torch.cat([embed.class_embedding.expand(len(x), 1, -1), x], dim=1)          # (B, 1+N, D)
        x = vision.pre_layrnorm(x + embed.position_embedding.weight)
        for layer in vision.encoder.layers:
            x = layer(x)
        return self.visual_projection(vision.post_layernorm(x[:, 0]))


def clip_loss(image_embeds, text_embeds, logit_scale, everyone=None, first=0):
    """Symmetric InfoNCE -> scalar: every picture picks its caption in the batch, every caption its picture.

    image_embeds, text_embeds (B, E). logit_scale: learned scalar, log of the inverse temperature, as in the
    checkpoints; starts at ln(1 / 0.07), is clamped to ln 100. everyone: (images, texts) of a larger batch to
    pick from, in which these rows begin at `first`.
    DIFFERS: the tiny CLIP-L has no text projection, as in SD3; its image tower projects to the text's width.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text = (F.normalize(e.float(), dim=-1) for e in (image_embeds, text_embeds))
        images, texts = (F.normalize(e.float(), dim=-1) for e in everyone or (image_embeds, text_embeds))
        scale = logit_scale.float().clamp(max=math.log(100)).exp()
        own = torch.arange(first, first + len(image), device=image.device)
        picks = scale * image @ texts.T, scale * text @ images.T            # pictures x captions, the reverse
        return sum(F.cross_entropy(logits, own) for logits in picks) / 2


# --------------------------------------------------------------------------------------------------------- T5

@dataclass(frozen=True)
class T5Config:
    vocab_size: int                     # for the tiny one, the trained tokenizer's
    width: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    buckets: int = 32                   # of relative positions, half of them for each direction
    max_distance: int = 128             # tokens; all from here on share a bucket
    preset = classmethod(preset)
    PRESETS = {"xxl": (32128, 4096, 24, 64, 64, 10240),                     # 4,762,310,656 parameters
               "tiny": (1024, 192, 2, 4, 32, 512)}                          #       984,128


def relative_buckets(L, buckets=32, max_distance=128, device=None):
    """(L, L) bucket of key j as seen from query i (T5, arXiv 1910.10683, section 2.1; details from its code).

    The second half of the buckets is for keys to the right. In each half, distances 0 to 7 have buckets of
    their own; the others begin at 8, 12, 16, 23, 32, 46, 64, 91, a factor of about sqrt 2 apart. (The edges
    are whole numbers, so that every device agrees.)
    """
    half, exact = buckets // 2, buckets // 4
    growth = (max_distance / exact) ** (1 / (half - exact))
    edges = [math.ceil(exact * growth ** i - 1e-6) for i in range(1, half - exact)]
    offset = torch.arange(L, device=device)[None, :] - torch.arange(L, device=device)[:, None]      # j - i
    far = exact + torch.bucketize(offset.abs(), torch.tensor(edges, device=device), right=True)
    return torch.where(offset.abs() < exact, offset.abs(), far) + half * (offset > 0)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_table: bool):
        super().__init__()
        D, inner, self.heads = config.width, config.heads * config.head_dim, config.heads
        attn = nn.ModuleDict({n: nn.Linear(D, inner, bias=False) for n in "qkv"})
        attn["o"] = nn.Linear(inner, D, bias=False)
        if has_table:
            attn["relative_attention_bias"] = nn.Embedding(config.buckets, config.heads)
        mlp = nn.ModuleDict({n: nn.Linear(D, config.ffn, bias=False) for n in ("wi_0", "wi_1")})
        mlp["wo"] = nn.Linear(config.ffn, D, bias=False)
        self.layer = nn.ModuleList([
            nn.ModuleDict({"layer_norm": RMSNorm(D, eps=1e-6), "SelfAttention": attn}),
            nn.ModuleDict({"layer_norm": RMSNorm(D, eps=1e-6), "DenseReluDense": mlp})])

    def forward(self, x, bias):
        (norm1, a), (norm2, mlp) = (part.values() for part in self.layer)
        x = x + attention(norm1(x), self.heads, a.q, a.k, a.v, a.o, attn_mask=bias, scale=1.0)
        h = norm2(x)
        return x + mlp.wo(F.gelu(mlp.wi_0(h), approximate="tanh") * mlp.wi_1(h))    # gated, despite its name


class T5Encoder(nn.Module):
    """The encoder half of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; gated GELU: arXiv 2002.05202)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config, D = config, config.width
        self.shared = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.ModuleDict({
            "block": nn.ModuleList(T5Block(config, has_table=i == 0) for i in range(config.layers)),
            "final_layer_norm": RMSNorm(D, eps=1e-6)})
        init_weights(self)

    def forward(self, ids, mask=None):
        """ids (B, L) -> hidden (B, L, D), normed. mask (B, L) bool: tokens to attend to; SD3 gives none."""
        if self.shared.weight.dtype == torch.float16:
            raise ValueError("T5 overflows in float16: load it in bfloat16 or float32")
        x, c = self.shared(ids), self.config
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(relative_buckets(ids.shape[1], c.buckets, c.max_distance, ids.device))
        bias = bias.permute(2, 0, 1)[None].contiguous()             # (1, nh, L, L), as fused kernels need it
        if mask is not None:            # not -inf: a row without any tokens must not become NaN
            bias = bias.masked_fill(~mask.bool()[:, None, None, :], -1e30)          # (B, nh, L, L)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


def masked_span_loss(encoder, ids, *, generator, rate=0.15, span=2, rows=slice(None)):
    """Pre-trains a T5 encoder alone: spans are hidden and guessed from both sides -> scalar cross-entropy.

    ids (B, L). About `rate` of the text tokens are hidden, at least one in a row with text, in spans of
    `span`, longer where two meet. All tokens of a row's n-th span become <extra_id_n>, whose ids are counted
    from the last one down. Logits are outputs times embeddings times D^-0.5, as in T5.
    rows: which to compute; the result is their part of the loss of all ids. What is hidden does not change.
    DIFFERS: T5 puts one sentinel for a span, of mean length 3, and a decoder spells it out. Here lengths stay
    and the encoder itself answers, as in BERT, so there is no decoder. Our captions are short, hence span 2.
    """
    L, is_text = ids.shape[1], ids > 2                                  # 0 1 2 are <pad> </s> <unk>
    if not is_text.any():
        raise ValueError("masked_span_loss: no text in this batch; leave out empty captions")
    rand = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device) + ~is_text
    drawn = is_text & ((rand < rate / span) | (rand == rand.min(1, keepdim=True).values))   # 1 or more a row
    hidden = is_text & torch.stack([F.pad(drawn, (k, 0))[:, :L] for k in range(span)]).any(0)
    starts = hidden & ~F.pad(hidden, (1, 0))[:, :L]                     # spans that touch have become one
    shown = torch.where(hidden, encoder.config.vocab_size - starts.cumsum(1), ids)
    count = hidden.sum()                                                # of all rows, even if `rows` has few
    ids, hidden, shown = ids[rows], hidden[rows], shown[rows]
    output = encoder(shown)[hidden]                                                         # (hidden, D)
    logits = F.linear(output, encoder.shared.weight) * encoder.config.width ** -0.5
    return F.cross_entropy(logits.float(), ids[hidden], reduction="sum") / count


# --------------------------------------------------------------------------------------------------- the join

@dataclass
class Conditioning:
    context: torch.Tensor               # (B, 77 + T, 4096)
    pooled: torch.Tensor                # (B, 2048)


class TextEncoders(nn.Module):
    """Prompts to conditioning. The encoders and their tokenizers, in the order of ENCODERS; no gradients.

    An encoder may be None: its features are zeros, `widths` wide, as if training had dropped it. (diffusers
    does the same without T5; others leave its tokens out: t5_length=0.) ValueError if parts do not fit.
    """

    def __init__(self, clip_l, clip_g, t5, tokenizers, widths=(768, 1280, 4096)):
        super().__init__()
        self.clip_l, self.clip_g, self.t5, self.tokenizers = clip_l, clip_g, t5, tokenizers
        configs = [e.config if e else None for e in (clip_l, clip_g, t5)]
        self.widths = [c.width if c else w for c, w in zip(configs, widths)]
        self.pooled_dims = [c.projection_dim or c.width if c else w for c, w in zip(configs[:2], widths)]
        self.pooled_dims += [0]                                                 # T5 has no pooled vector
        self.clip_length = next((c.context_length for c in configs[:2] if c), 77)
        for e, tok in zip((clip_l, clip_g, t5), tokenizers):
            if e and (tok.vocab_size > e.config.vocab_size or tok.eos != getattr(e, "eos", 1)):
                raise ValueError("a tokenizer does not fit its encoder: load both from one model's folder")
        if sum(self.widths[:2]) > self.widths[2]:
            raise ValueError(f"widths {self.widths}: T5's must hold both CLIPs'; give `widths` if T5 is None")

    @torch.no_grad()
    def forward(self, prompts, t5_length=77, drop=()) -> Conditioning:
        """B prompts -> context (B, 77 + t5_length, 4096), pooled (B, 2048), on the first encoder's device.
        drop: names from ENCODERS; these are not run, their slices are zero."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        drop = (drop,) if isinstance(drop, str) else drop
        if not prompts:
            raise ValueError("no prompts: give one or more")
        if unknown := set(drop) - set(ENCODERS):
            raise ValueError(f"cannot drop {sorted(unknown)}: choose from {', '.join(ENCODERS)}")
        B, reference, features, pooled = len(prompts), next(self.parameters(), torch.zeros(())), [], []
        for name, tokenizer, D, P in zip(ENCODERS, self.tokenizers, self.widths, self.pooled_dims):
            encoder, length = getattr(self, name), t5_length if name == "t5" else self.clip_length
            if encoder is None or name in drop or length == 0:
                hidden, vector = reference.new_zeros(B, length, D), reference.new_zeros(B, P)
            else:
                ids = tokenizer(prompts, length).to(next(encoder.parameters()).device)
                hidden, vector = encoder(ids) if name != "t5" else (encoder(ids), reference.new_zeros(B, P))
            features.append(hidden.to(reference.device))                # encoders may be on different devices
            pooled.append(vector.to(reference.device))
        clips = torch.cat(features[:2], dim=-1)                                 # (B, 77, 768 + 1280)
        clips = F.pad(clips, (0, self.widths[2] - clips.shape[-1]))             # (B, 77, 4096)
        return Conditioning(torch.cat([clips, features[2]], dim=1), torch.cat(pooled, dim=-1))


def sample_drops(n, generator, p):
    """(n, 3) bool: which of ENCODERS each of n training samples goes without. p: of each, 0.464 in the paper
    (appendix B.3; section 5.3.3: 46.3 %)."""
    return torch.rand(n, 3, generator=generator, device=generator.device) < p


def drop_encoders(context, pooled, dropped, clip_length, widths):
    """Zeroes the slices of dropped encoders in joined features, perhaps stored ones -> (context, pooled).

    dropped (B, 3) bool; clip_length: tokens before T5's. widths: CLIP-L's and bigG's, in both tensors.
    """
    wl, wg = widths
    if pooled.shape[-1] != wl + wg:
        raise ValueError(f"pooled {tuple(pooled.shape)} is not {wl} + {wg} wide: give the CLIPs' own widths")
    no_l, no_g, no_t5 = dropped.to(context.device)[:, :, None].unbind(1)    # (B, 1) each
    clips, t5 = context.split([clip_length, context.shape[1] - clip_length], dim=1)
    wide = torch.cat([no_l.expand(-1, wl), no_g.expand(-1, wg)], dim=1)     # (B, wl + wg)
    clips = clips.masked_fill(F.pad(wide, (0, clips.shape[-1] - wl - wg))[:, None], 0)
    t5 = t5.masked_fill(no_t5[:, None], 0)
    return torch.cat([clips, t5], dim=1), pooled.masked_fill(wide, 0)


def demo():
    """The layout at the top of this file, measured: which numbers change when an encoder is dropped."""
    captions = ["a red star left of a blue ring", "two green hearts", "a big white circle at the top left"]
    with TemporaryDirectory() as folder:
        train_clip_tokenizer(captions, folder + "/clip", 600)
        train_t5_tokenizer(captions, folder + "/t5", 600)
        toks = [load_clip_tokenizer(folder + "/clip", pad, length=20) for pad in (EOS, "!")]
        toks += [load_t5_tokenizer(folder + "/t5", length=20)]
    for name, tok in zip(ENCODERS, toks):
        print(f"{name:6s}", *(tok.tok.id_to_token(i) for i in tok(captions[0])[0, :14].tolist()), "...")
    clips = [CLIPTextEncoder(CLIPTextConfig.preset(f"tiny_{x}", vocab_size=toks[0].vocab_size)) for x in "lg"]
    encode = TextEncoders(*clips, T5Encoder(T5Config.preset("tiny", vocab_size=toks[2].vocab_size)), toks)
    full = encode(captions, t5_length=16)
    context, pooled = full.context, full.pooled                             # (3, 36, 192), (3, 160)
    l, g, t5 = ((context != encode(captions, 16, drop=(name,)).context).all(0) for name in ENCODERS)
    owner = l + 2 * g + 4 * t5                                              # (36, 192)
    print(f"context {tuple(context.shape)}, pooled {tuple(pooled.shape)}; a letter is 4 tokens x 4 features:")
    print("\n".join("  " + "".join(".LG?T???"[k] for k in row) for row in owner[::4, ::4].tolist()))
    expected = torch.tensor([1] * 64 + [2] * 96 + [0] * 32).repeat(36, 1)
    expected[20:] = 4
    assert torch.equal(owner, expected) and not context[:, :20, 160:].any() and pooled.shape == (3, 64 + 96)
    print("passed: L, G and T fill their own rectangles and no others; the rest is zero")


# Exercises. (1) Pad CLIP-L with "!": its features change only after EOS, its pooled vector not at all. Why?
# (2) Zero relative_attention_bias: T5 becomes blind to order: "b a" has the features of "a b", swapped.
# (3) Give clip_loss a batch of equal captions: it cannot fall below ln B. Why, in both directions?

if __name__ == "__main__":
    demo()
