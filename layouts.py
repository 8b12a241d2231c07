"""What do others call our parameters? The names in published files, apart from weights.py, which reads them.

Our modules have the names of Stability's single files, so those need no translation. diffusers keeps each
part in a folder of its own under other names, older files have yet others. A Recipe says for one of our
parameters which keys of the file it comes from and what has to be done to them:

    joint_blocks.3.x_block.attn.qkv.weight  <-  transformer_blocks.3.attn.to_q.weight  one below the other
                                                transformer_blocks.3.attn.to_k.weight
                                                transformer_blocks.3.attn.to_v.weight
    final_layer.adaLN_modulation.1.weight   <-  norm_out.linear.weight                 halves exchanged
    decoder.mid.attn_1.q.weight             <-  decoder.mid_block.attentions.0.to_q.weight   a 1x1 convolution
    decoder.up.3.block.0.conv1.weight       <-  decoder.up_blocks.0.resnets.0.conv1.weight (counted down)

Exactly two modulations are exchanged, the final layer's and that of the last block's text: there diffusers
has scale before shift, everywhere else shift before scale. Swapping twice changes nothing, so one table
serves for reading and writing.

Also here: keys that may be in a file without being read (IGNORED), and keys that give away files that are
often mistaken for SD3's (FOREIGN).
Run `python layouts.py`: prints examples and asserts that no two parameters claim the same key.
"""
import re
from typing import NamedTuple

import torch


class Recipe(NamedTuple):
    """Where one of our tensors comes from: keys in the file, and what has to happen to them."""
    keys: tuple[str, ...]
    op: str = "join"        # join: one below the other | swap: halves exchanged | conv: Linear to 1x1
                            # | transpose | q, k, v: that third of the rows


QKV = "q", "k", "v"


def assemble(op, parts) -> torch.Tensor:
    """One of our tensors, made of the tensors of its Recipe's keys."""
    t = parts[0]
    if op == "swap":
        return t.roll(len(t) // 2, 0)
    if op == "conv":
        return t.reshape(*t.shape[:2], 1, 1)
    if op == "transpose":
        return t.T
    if op in QKV:
        return t.chunk(3)[QKV.index(op)]
    return torch.cat(parts)


def assembled_shape(op, shapes) -> tuple:
    """The shape that `assemble` gives."""
    first, *rest = shapes
    if not first:                                       # a single number, which fits nowhere
        return ()
    if op == "conv":
        return *first[:2], 1, 1
    if op == "transpose":
        return tuple(first[::-1])
    return first[0] // 3 if op in QKV else first[0] + sum(s[0] for s in rest), *first[1:]


def take_apart(recipe, t) -> list[torch.Tensor]:
    """The reverse of `assemble`, for the two operations that a transformer needs."""
    return [t.roll(len(t) // 2, 0)] if recipe.op == "swap" else list(t.chunk(len(recipe.keys)))


# ------------------------------------------------------------------------------------------- the translations

MMDIT_HEAD = {              # ours: diffusers'
    "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2"}
MMDIT_BLOCK = {             # ours in joint_blocks.i: diffusers' in transformer_blocks.i
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2"}
MMDIT_QKV = {               # the same for three keys each
    "x_block.attn.qkv": "attn.to_{}", "x_block.attn2.qkv": "attn2.to_{}",
    "context_block.attn.qkv": "attn.add_{}_proj"}
VAE_NAMES = [               # pattern in our name, what diffusers has in its place; all applied in turn
    (r"^(en|de)coder\.norm_out", r"\1coder.conv_norm_out"), (r"nin_shortcut", "conv_shortcut"),
    (r"\.down\.(\d+)\.block", r".down_blocks.\1.resnets"),
    (r"\.down\.(\d+)\.downsample", r".down_blocks.\1.downsamplers.0"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"), (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1.")]
VAE_OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
OPENCLIP_NAMES = [          # pattern in our name, what OpenCLIP and OpenAI have in its place
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."), (r"\.layer_norm(\d)", r".ln_\1"),
    (r"\.mlp\.fc1", ".mlp.c_fc"), (r"\.mlp\.fc2", ".mlp.c_proj"),
    (r"\.self_attn\.out_proj", ".attn.out_proj"), (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_")]


def rename(name, table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def same_names(name) -> Recipe:
    return Recipe((name,))


def mmdit_folder(depth):
    """-> the function from our names to diffusers' Recipes, for a transformer of `depth` blocks."""
    last = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"

    def recipe(name):
        stem, dot, leaf = name.rpartition(".") if name != "pos_embed" else (name, "", "")
        op = "swap" if stem in ("final_layer.adaLN_modulation.1", last) else "join"
        if not (block := re.match(r"joint_blocks\.(\d+)\.(.*)", stem)):
            return Recipe((MMDIT_HEAD[stem] + dot + leaf,), op)
        if names := MMDIT_QKV.get(block[2]):
            inside = [names.format(x) for x in QKV]
        else:
            inside = [MMDIT_BLOCK[block[2]]]
        return Recipe(tuple(f"transformer_blocks.{block[1]}.{x}.{leaf}" for x in inside), op)
    return recipe


def vae_folder(levels, old=False):
    """The same for an autoencoder of `levels` levels. old: its attention has the names in use before 2023."""
    def recipe(name):
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
        key = re.sub(r"(up_blocks\.\d+)\.block", r"\1.resnets", key)
        key = rename(key.replace(".upsample.", ".upsamplers.0."), VAE_NAMES)
        for new, ancient in VAE_OLD_NAMES.items() if old else ():
            key = key.replace(new, ancient)
        matrix = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight", name)
        return Recipe((key,), "conv" if matrix else "join")
    return recipe


def clip_bare(name) -> Recipe:
    """A text model that was saved without its outermost level."""
    return Recipe((name.removeprefix("text_model."),))


def clip_openclip(name) -> Recipe:
    """q, k and v are one matrix; the projection is stored for x @ p, not as a Linear's weight."""
    if name == "text_projection.weight":
        return Recipe(("text_projection",), "transpose")
    third = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    return Recipe((rename(name, OPENCLIP_NAMES),), third[1] if third else "join")


def t5_other_name(name) -> Recipe:
    """The table of token embeddings under its second name."""
    return Recipe(("encoder.embed_tokens.weight" if name == "shared.weight" else name,))


# ------------------------------------------------------------------------------------- what is what in a file

NAMES = {"mmdit": "an SD3 transformer", "vae": "an autoencoder (VAE)", "clip_l": "CLIP-L's text encoder",
         "clip_g": "bigG's text encoder", "t5": "a T5 encoder"}
PREFIXES = {                # what a part's keys begin with in a single file; stand-alone parts have no prefix
    "mmdit": ("model.diffusion_model.",), "vae": ("first_stage_model.", "vae."),
    "clip_l": ("text_encoders.clip_l.transformer.",), "clip_g": ("text_encoders.clip_g.transformer.",),
    "t5": ("text_encoders.t5xxl.transformer.",)}
IN_A_FILE = tuple(prefix.split(".")[0] + "." for prefixes in PREFIXES.values() for prefix in prefixes)

CLIP_LAYOUTS = {"text_model.embeddings.token_embedding.weight": lambda count, keys: same_names,
                "embeddings.token_embedding.weight": lambda count, keys: clip_bare,
                "token_embedding.weight": lambda count, keys: clip_openclip}
LAYOUTS = {                 # a key that tells the layout: what makes its Recipes (count: see weights.Source)
    "mmdit": {"joint_blocks.0.x_block.attn.qkv.weight": lambda count, keys: same_names,
              "transformer_blocks.0.attn.add_k_proj.weight":
                  lambda count, keys: mmdit_folder(count("transformer_blocks.{}."))},
    "vae": {"decoder.mid.block_1.conv1.weight": lambda count, keys: same_names,
            "decoder.mid_block.resnets.0.conv1.weight": lambda count, keys: vae_folder(
                count("decoder.up_blocks.{}."), "decoder.mid_block.attentions.0.query.weight" in keys)},
    "clip_l": CLIP_LAYOUTS, "clip_g": CLIP_LAYOUTS,
    "t5": {"shared.weight": lambda count, keys: same_names,
           "encoder.embed_tokens.weight": lambda count, keys: t5_other_name}}

IN_CLIP = ((r"\bposition_ids$", "the numbers 0 to 76"), (r"^attn_mask$", "the causal mask"),
           (r"^logit_scale$", "the temperature of CLIP's training"),
           (r"^(vision_model|visual|visual_projection)\b", "CLIP's picture tower, which SD3 does without"))
IGNORED = {                 # keys that may be there and are not read; all others must find their place
    "mmdit": (), "vae": (), "clip_g": IN_CLIP,
    "clip_l": (*IN_CLIP, (r"^text_projection", "SD3 takes CLIP-L's pooled vector before its projection")),
    "t5": ((r"^(decoder|lm_head)\.", "T5's decoder: only the encoder reads prompts"),
           (r"^encoder\.embed_tokens\.weight$", "the second name of shared.weight"),
           (r"^logit_scale$", "of CLIP's training; ComfyUI writes it for every text encoder")),
    "all": ((r"^(loss|model_ema)\.", "left over from training"),
            (r"\bscaled_fp8$", "a sign that float8 weights have scales"),
            (r"\.(comfy_quant|scale_input|input_scale)$", "for arithmetic in float8"))}
FOREIGN = (                 # keys of files that are often mistaken for SD3's, and what those files are
    (r"lora_|\.lora\.|\.(hada_w|lokr_w)\d", "a LoRA, which only changes a model: give it with --lora"),
    (r"controlnet_blocks\.|^control_model\.|input_hint_block", "a ControlNet"),
    (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d", "a FLUX model"),
    (r"conditioner\.embedders\.|(^|\.)label_emb\.|(^|\.)add_embedding\.", "an SDXL model"),
    (r"(^|\.)input_blocks\.\d|^cond_stage_model\.|(^|\.)down_blocks\.\d+\.attentions\.\d+\.transformer",
     "a Stable Diffusion 1 or 2 model"))


def is_foreign(keys):
    """What a file with these keys is, if it is one of FOREIGN."""
    return next((what for pattern, what in FOREIGN if any(re.search(pattern, k) for k in keys)), None)


def describe(keys) -> str:
    """What a file with these keys is."""
    parts = dict.fromkeys("a CLIP text encoder" if part.startswith("clip") else NAMES[part] for part in NAMES
                          if any(prefix + sign in keys for prefix in (*PREFIXES[part], "")
                                 for sign in LAYOUTS[part]))
    return (is_foreign(keys) or " and ".join(parts)
            or f"of no kind known here: its first tensor is {min(keys, default=None)}")


def why_unknown(key, part) -> str:
    """A guess at why a file has a key for which there is no place here."""
    guesses = (
        (r"_orig_mod\.|^module\.", "it was saved from a compiled or distributed model: save the plain one"),
        (r"quant_conv", "SD3's autoencoder has no such convolution, those of SD 1, SD 2 and SDXL have"),
        (r"\.attn2\.", "only the first blocks can have second attentions, without a gap"),
        (r"block\.[1-9]\d*\..*relative_attention_bias", "UMT5 has position tables in every block, T5 in one"),
        (r"scale|absmax|quant", "quantised in a way that is not read here: get the float16 or bfloat16 file"),
        (r"ln_[qk]|norm_(added_)?[qk]", "some blocks have QK-norm and others not: it mixes two models"))
    return next((why for pattern, why in guesses if re.search(pattern, key)),
                f"not {NAMES[part]} as published")


def demo():
    from mmdit import MMDiT, MMDiTConfig
    from vae import AutoencoderKL, VAEConfig
    with torch.device("meta"):
        modules = {"sd3.5-medium": MMDiT(MMDiTConfig.preset("sd3.5-medium")),
                   "vae": AutoencoderKL(VAEConfig())}
    for (title, module), recipe in zip(modules.items(), (mmdit_folder(24), vae_folder(4))):
        recipes = {name: recipe(name) for name in module.state_dict()}
        keys = [key for r in recipes.values() for key in r.keys]
        assert len(keys) == len(set(keys))
        print(f"{title}: {len(recipes)} tensors in a single file, {len(keys)} in a folder; not only renamed:")
        shown = [n for n, r in recipes.items() if r.op != "join"]
        print("\n".join(f"  {n} <- {recipes[n].keys[0]} ({recipes[n].op})" for n in shown))
        assert len(shown) == {"sd3.5-medium": 4, "vae": 8}[title]


# Exercises. (1) Leave out "swap" in mmdit_folder: real folders still load without a word, and round trips
# are still exact. Which test notices? (2) Could one see in the numbers which half is shift and which scale?

if __name__ == "__main__":
    demo()
