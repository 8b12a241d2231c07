"""How is a large model changed a little? LoRA adapters, and DPO, with which the paper teaches its models what
people prefer (its appendix C).

    LoRA   y = W x + b + (alpha / rank) B A x       W stays as it is; only A (rank, in), small random numbers,
                                                    and B (out, rank), zeros at first, learn
    DPO    two pictures of one prompt, one better than the other, with the same t and the same noise:
           loss = -log sigmoid(beta [(L_ref(better) - L(better)) - (L_ref(worse) - L(worse))])

L is the loss of flow.py, a mean over the latent's numbers; L_ref that of the model as it was, whose adapters
are switched off. What counts is the difference between the two: it is not enough to draw both better.

An adapter's file is a hundredth of a model's. Three naming schemes are in use, and `Lora` reads them all:

    diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight, .lora_B.weight, .alpha   ours, ComfyUI's
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight                diffusers', peft's
    lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, .lora_up.weight, .alpha     kohya's scripts'

It is added to the weights as these are read (`sample.py --lora FILE`), after which drawing costs no more
than before.

What surprises
- peft's alpha is in the file's metadata, or in adapter_config.json beside it, or nowhere: then it is rank.
- Where diffusers has the halves of a modulation exchanged, the rows of B have to be exchanged with them.
- Only a difference counts in DPO: with too small a beta both pictures become worse, the worse one faster.
- The last block's text projection stays: SelfAttention.project_kv cuts dead queries off the weight itself.

Sources: LoRA arXiv 2106.09685, DPO 2305.18290, for diffusion 2311.12908 (whose beta is twice ours).
Run `python finetune.py`: an adapter learns what a small model does not know, and is merged, saved and read.
"""
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import flow
from layouts import describe, is_foreign, mmdit_folder, same_names
from tensor_files import CheckpointError, open_safetensors, write_safetensors

# Keys: layer.lora_A.weight and its other spellings; what may precede a layer's name; those of text encoders.
FACTOR = re.compile(r"(.+?)\.(?:lora_([AB])|lora[_.](down|up))(\.[^.]+)?\.weight")
PREFIX = re.compile(r"^(base_model\.model\.|(model\.)?diffusion_model\.|transformer\.|lora_unet_|"
                    r"lora_transformer_|lycoris_)*")
OF_TEXT = re.compile(r"^(lora_te\d?_|text_encoder|(clip_[lg]|t5(xxl)?|bundle_emb)\.)")
OTHERS = (                  # other ways of changing weights, by their keys
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA, which also changes the lengths of weights"),
    (r"\.(hada_w|lokr_w)\d", "a LoHa or LoKr, whose factors are multiplied in another way"),
    (r"\.(diff|diff_b|lora_mid\.weight|oft_blocks)$", "not a plain LoRA"))


# ------------------------------------------------------------------------------------------------- learning

class LoRALinear(nn.Linear):
    """A Linear that stays as it is, with an adapter that learns."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator=None):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.alpha, self.on = linear.weight, linear.bias, float(alpha), True
        like = dict(device=linear.weight.device, dtype=torch.float32)       # though W may be bfloat16
        start = torch.randn(rank, self.in_features, generator=generator) / self.in_features ** 0.5
        self.lora_A = nn.Parameter(start.to(**like))                                            # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))                # (out, rank)

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)                                    # (..., rank)
        return y + (F.linear(low, self.lora_B) * (self.alpha / len(self.lora_A))).to(y.dtype)

    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, up to the rounding of its weights."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        add(plain.weight.data, self.lora_A.data, self.lora_B.data, self.alpha / len(self.lora_A))
        return plain


def add(weight, A, B, scale) -> None:
    """weight += scale B A, in float32."""
    change = B.to(weight.device).float().flatten(1) @ A.to(weight.device).float().flatten(1)
    weight.copy_(weight.float() + scale * change.view(weight.shape))


def add_lora(model: nn.Module, rank: int, alpha: float | None = None, seed: int = 0) -> nn.Module:
    """Give each Linear in an MMDiT's joint blocks an adapter, as in the paper; only adapters learn. alpha:
    rank unless given. Until they have learned something the model computes what it did. Returns the model."""
    if adapters(model):
        raise ValueError("this model has adapters already: merge_lora makes them part of it first")
    widest = min(min(p.shape) for p in model.joint_blocks.parameters() if p.ndim > 1)
    if not 1 <= rank <= widest:
        raise ValueError(f"the adapters' rank is {rank}: it must be 1 to {widest}, that of the weights")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    dead = f"joint_blocks.{len(model.joint_blocks) - 1}.context_block.attn.qkv"
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("joint_blocks.") and name != dead:
            model.set_submodule(name, LoRALinear(layer, rank, rank if alpha is None else alpha, generator))
    return model


def adapters(model) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@contextmanager
def without_lora(model):
    """Inside, the model is what it was before its adapters learned."""
    layers = adapters(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Make the adapters part of the weights they belong to. Returns the model."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.merged())
    return model


def save_lora(model: nn.Module, path) -> None:
    """The model's adapters, and nothing else, as a file that sample.py and ComfyUI read."""
    tensors, found = {}, adapters(model)
    if not found:
        raise ValueError("this model has no adapters to save: add_lora gives it some, merge_lora takes them")
    for name, layer in found.items():
        key = f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_A.weight": layer.lora_A, f"{key}.lora_B.weight": layer.lora_B,
                    f"{key}.alpha": torch.tensor(layer.alpha)}
    write_safetensors(path, {key: ("F32", t.shape) for key, t in tensors.items()}, tensors.values())


# ------------------------------------------------------------------------------------------------ preferences

def dpo_loss(model, better, worse, *, t, noise, beta, **cond) -> torch.Tensor:
    """How far the model, with its adapters, still is from preferring `better` to `worse` (DPO for flows).

    better, worse (B, C, H, W): latents of two pictures of the same prompts; t (B,), noise (B, C, H, W) and
    cond, (B, ...) each: shared by both. beta: the larger, the nearer it stays to the model without adapters.
    -> (B,): log 2 where it prefers `better` no more than that model does, near 0 where it clearly does."""
    both = {k: torch.cat([x, x]) for k, x in {"t": t, "noise": noise, **cond}.items()}
    x0, B = torch.cat([better, worse]), len(better)
    with torch.no_grad(), without_lora(model):
        before = flow.loss(model, x0, **both)                                               # (2B,)
    gain = before - flow.loss(model, x0, **both)
    return -F.logsigmoid(beta * (gain[:B] - gain[B:]))


# --------------------------------------------------------------------------------------------------- reading

class Lora:
    """An adapter in a file. `find` its places in a model first, from names and shapes alone, then `change`
    the model's tensors one by one. CheckpointError if it is something else, or for another model.

    strength: a factor on its changes; 0: none. left_out: how many of its keys are for text encoders."""

    def __init__(self, path, strength: float = 1.0):
        self.path, self.strength = Path(path), strength
        with open_safetensors(self.path) as f:
            keys, about = list(f.keys()), f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in keys}
        found = {key: m for key in keys if (m := FACTOR.fullmatch(key))}
        for key in keys:
            if other := next((what for pattern, what in OTHERS if re.search(pattern, key)), None):
                raise CheckpointError(f"{path} is {other}: merge it into a model with the program it is for")
        if not found and (is_foreign(keys) or "").startswith("a LoRA"):
            raise CheckpointError(f"{path} is a LoRA in a naming that is not read here, such as {min(keys)}: "
                                  "convert it to that of diffusers, ComfyUI or kohya's scripts")
        if not found:
            raise CheckpointError(f"{path} has no factors of a LoRA, it is {describe(keys)}: give a model "
                                  "with --model, and an adapter in one of the namings of finetune.py")
        names = {m[4] for key, m in found.items() if not OF_TEXT.match(key)}
        if len(names) > 1:                                              # peft can save several
            raise CheckpointError(f"{path} holds several adapters ({', '.join(sorted(map(str, names)))}): "
                                  "save one alone")
        self.left_out = sum(bool(OF_TEXT.match(key)) for key in keys)
        self.factors, pairs = {}, {}
        for key, (stem, which, old, _) in ((key, m.groups()) for key, m in found.items()):
            if not OF_TEXT.match(key):
                pairs.setdefault(stem, {})[which or {"down": "A", "up": "B"}[old]] = tensors[key]
        for stem, pair in pairs.items():
            fit = pair.keys() == {"A", "B"} and pair["A"].shape[:1] == pair["B"].shape[1:2] != (0,)
            if not fit or not all(t.is_floating_point() for t in pair.values()):
                raise CheckpointError(f"{path} is damaged: the two factors of {stem} do not belong together")
            self.factors[stem] = pair["A"], pair["B"], self.scale(stem, tensors, about, len(pair["A"]))
        if not self.factors:
            raise CheckpointError(f"{path} changes text encoders alone, which stay as they are here: leave "
                                  "it out")
        known = found.keys() | {f"{stem}.alpha" for stem in self.factors}
        if unknown := [key for key in keys if key not in known and not OF_TEXT.match(key)]:
            raise CheckpointError(f"{path} has an unknown {unknown[0]}: it is not a plain LoRA")

    def scale(self, stem, tensors, about, rank) -> float:
        """What the product of the factors is multiplied by: alpha / rank. If alpha is not a tensor, peft has
        written it elsewhere, for all layers and for those that match a pattern."""
        beside = self.path.with_name("adapter_config.json")
        try:
            if f"{stem}.alpha" in tensors:
                alpha, root = tensors[f"{stem}.alpha"].item(), False
            else:
                text = about.get("lora_adapter_metadata", "{}")
                if stem.startswith("base_model.model.") and beside.is_file():
                    text = beside.read_text(encoding="utf-8")
                told = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
                layer, patterns = PREFIX.sub("", stem), told.get("alpha_pattern") or {}
                alpha = next((a for pattern, a in patterns.items()
                              if re.fullmatch(rf"(.*\.)?({pattern})", layer)), told.get("lora_alpha", rank))
                root = told.get("use_rslora")
            if not math.isfinite(alpha):
                raise ValueError(f"alpha is {alpha}")
            return alpha / (rank ** 0.5 if root else rank)
        except (ValueError, AttributeError, TypeError, RuntimeError, OSError, re.error) as e:
            raise CheckpointError(
                f"{self.path}: the scale of {stem} is damaged ({e}): get it again") from None

    def find(self, shapes: dict, depth: int) -> None:
        """shapes: {our name of a tensor: its shape}, of a transformer of `depth` blocks."""
        table, folder = {}, mmdit_folder(depth)
        for name in (name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1):
            for recipe in (same_names(name), folder(name)):
                for i, key in enumerate(recipe.keys):
                    stem = key.removesuffix(".weight")
                    table[stem] = table[stem.replace(".", "_")] = name, i, recipe
        self.places = {}
        for stem, (A, B, _) in self.factors.items():
            if (place := table.get(PREFIX.sub("", stem))) is None:
                raise CheckpointError(f"{self.path} is for another model: it changes {stem}, which is not in "
                                      f"this one of {depth} blocks")
            name, i, recipe = place
            if any(taken[1:] == (i, recipe) for taken in self.places.get(name, ())):
                raise CheckpointError(f"{self.path} changes {stem} twice, under two names: it is damaged")
            rows, *columns = shapes[name]
            needed = rows // len(recipe.keys), torch.Size(columns).numel()
            if (told := (len(B), A[0].numel())) != needed or B[0].numel() != len(A):
                raise CheckpointError(f"{self.path} is for another model: it changes {stem} as a {told[0]} x "
                                      f"{told[1]} matrix, this model's is {needed[0]} x {needed[1]}")
            self.places.setdefault(name, []).append((stem, i, recipe))

    @torch.no_grad()
    def change(self, name: str, t: torch.Tensor) -> None:
        """Add the adapter's change to the tensor of this name, in place."""
        for stem, i, recipe in self.places.get(name, ()):
            A, B, scale = self.factors[stem]
            B = B.roll(len(B) // 2, 0) if recipe.op == "swap" else B
            add(t.chunk(len(recipe.keys))[i], A, B, self.strength * scale)
        if name in self.places and not t.isfinite().all():
            raise CheckpointError(f"{self.path} makes {name} NaN or infinite: it is damaged, get it again")


def change_all(model: nn.Module, loras) -> nn.Module:
    """Make these adapters' changes to the model, or none unless all of them fit it. Returns the model."""
    tensors = model.state_dict()
    for lora in loras:
        lora.find({name: t.shape for name, t in tensors.items()}, len(model.joint_blocks))
    for lora in loras:
        for name in lora.places:
            lora.change(name, tensors[name])
    return model


# ------------------------------------------------------------------------------------------------------ demo

def demo() -> None:
    """A small model has learned the mean of two pictures for each of two prompts. One adapter teaches it
    which picture belongs to which prompt, from the pictures; another one, from which is preferred."""
    from copy import deepcopy
    from tempfile import TemporaryDirectory

    from mmdit import MMDiT, MMDiTConfig

    torch.manual_seed(0)
    base = MMDiT(MMDiTConfig.preset("tiny", depth=2, heads=2))
    c = base.config
    x0, noise = torch.randn(2, c.in_channels, 8, 8), torch.randn(1, c.in_channels, 8, 8).repeat(2, 1, 1, 1)
    given = {"t": torch.ones(2), "noise": noise, "pooled": torch.zeros(2, c.pooled_dim),
             "context": torch.randn(2, 12, c.context_dim)}                  # one noise, at t = 1, is enough

    def learn(model, loss, steps, rate):
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=rate, fused=True)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).mean().backward()
            optimizer.step()
        return sum(p.numel() for p in learning)

    def errors(model):
        with torch.no_grad():
            return [flow.loss(model, x, **given).mean().item() for x in (x0, x0.flip(0))]

    learn(base, lambda m: flow.loss(m, x0, **given) + flow.loss(m, x0.flip(0), **given), 60, 5e-4)
    taught, preferring, loose = (add_lora(deepcopy(base), rank=4) for _ in range(3))
    few = learn(taught, lambda m: flow.loss(m, x0, **given), 100, 5e-3)
    for model, beta in ((preferring, 100), (loose, 10)):
        learn(model, lambda m: dpo_loss(m, x0, x0.flip(0), beta=beta, **given), 60, 1e-3)
    print(f"{few:,} numbers learn beside {sum(p.numel() for p in base.parameters()):,} that stay")
    for what, model in (("before", base), ("taught", taught), ("DPO, beta 100", preferring),
                        ("DPO, beta 10", loose)):
        print("{:14s} squared error of its own picture {:.3f}, of the other one {:.3f}".format(
            what, *errors(model)))
    assert errors(taught)[0] < 0.5 * errors(base)[0] and errors(preferring)[0] < 0.9 * errors(preferring)[1]
    assert errors(loose)[0] > errors(base)[0]

    with TemporaryDirectory() as folder:
        file = Path(folder, "taught.safetensors")
        save_lora(taught, file)
        read, size = change_all(base, [Lora(file)]), file.stat().st_size
    merged = merge_lora(taught)
    print(f"its file has {size:,} bytes; read from there, and merged, the error is {errors(read)[0]:.3f}")
    assert abs(errors(read)[0] - errors(merged)[0]) < 1e-5


# Exercises (assertions of demo() may then fail, as they should). (1) Adapt only the attentions' layers in
# add_lora: how much rank makes up for it? (2) Give both factors zeros, or both random numbers, at the start:
# why does neither do? (3) Add flow.loss of the better picture to dpo_loss, in demo: does it save the model
# with beta = 10?

if __name__ == "__main__":
    demo()
