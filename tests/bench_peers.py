"""How fast is this beside diffusers and transformers? Same weights, same inputs, one process, in turns.

    pip install -r tests/requirements-peers.txt
    python tests/bench_peers.py                         # a table; some minutes on two cores
    python tests/bench_peers.py --only vae --rounds 9 --device cuda --dtype bfloat16 --compile

Each part has the real widths but only as many layers as a laptop's memory and patience allow; what is left
out is more of the same. `step` is a whole training step of the miniature. The peers write their random
weights as a folder, which is then read here; both are run once to warm up, compared, and then timed in turns,
so that a busy machine troubles both. The last column is the median of the rounds' ratios, the peer's time
over the time here: above 1, this code is faster.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusers
import transformers

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

import flow
from weights import load_clip, load_mmdit, load_t5, load_vae


def mmdit(folder, **how):
    """One velocity at 512 x 512: 1,024 image and 154 text tokens, SD3.5-medium's width, 2 of its blocks."""
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=2, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=64, dual_attention_layers=(0,), qk_norm="rms_norm")
    theirs.save_pretrained(folder / "transformer")
    ours, theirs = load_mmdit(folder, **how), theirs.to(**how).eval()
    x, context, pooled = (torch.randn(shape, **how) for shape in ((1, 16, 64, 64), (1, 154, 4096), (1, 2048)))
    t = torch.tensor([0.5], device=how["device"])
    return (lambda: ours(x, t, context, pooled),
            lambda: theirs(x, context, pooled, 1000 * t, return_dict=False)[0])


def vae(folder, **how):
    """A 256 x 256 picture out of its latent; the whole decoder."""
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    theirs.save_pretrained(folder / "vae")
    ours, theirs = load_vae(folder, **how), theirs.to(**how).eval()
    z = torch.randn(1, 16, 32, 32, **how)
    return lambda: ours.decode(z), lambda: theirs.decode(z, return_dict=False)[0]


def clip(folder, **how):
    """Two prompts through the whole of CLIP-L."""
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, hidden_act="quick_gelu", projection_dim=768, eos_token_id=2)
    theirs = transformers.CLIPTextModelWithProjection(config)
    theirs.save_pretrained(folder)
    ours, theirs = load_clip(folder, "clip_l", **how), theirs.to(**how).eval()
    ids = torch.randint(0, 49406, (2, 77), device=how["device"])
    ids[:, 0], ids[:, 20:] = 49406, 49407
    return lambda: ours(ids)[0], lambda: theirs(ids, output_hidden_states=True).hidden_states[-2]


def t5(folder, **how):
    """Two prompts of 77 tokens through 1 of T5-XXL's 24 layers."""
    theirs = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=1000, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64,
        feed_forward_proj="gated-gelu"))
    theirs.save_pretrained(folder)
    ours, theirs = load_t5(folder, **how), theirs.to(**how).eval()
    ids = torch.randint(0, 1000, (2, 77), device=how["device"])
    return lambda: ours(ids), lambda: theirs(ids).last_hidden_state


def step(folder, **how):
    """One training step of the whole miniature: 64 latents of 64 x 64 pixels, 28 text tokens; forward, loss,
    backward, clipping, AdamW and the average of the weights. Without Muon, which diffusers has not."""
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=16, out_channels=16, num_layers=4, num_attention_heads=3,
        joint_attention_dim=192, caption_projection_dim=192, pooled_projection_dim=160,
        pos_embed_max_size=32, qk_norm="rms_norm")
    theirs.save_pretrained(folder / "transformer")
    ours, theirs = load_mmdit(folder, **how).requires_grad_(True), theirs.to(**how).eval()
    x0, noise, context, pooled = (torch.randn(64, *shape, **how) for shape in (
        (16, 8, 8), (16, 8, 8), (28, 192), (160,)))
    t = torch.rand(64, device=how["device"])

    def steps_of(model, velocity):
        params = list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.99), eps=1e-15, fused=True)
        average = [p.detach().clone() for p in params]

        def one():
            with torch.enable_grad():
                losses = flow.loss(velocity, x0, t=t, noise=noise, context=context, pooled=pooled)
                losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(average, params, 0.001)
            return losses.detach()

        return one

    return steps_of(ours, ours), steps_of(theirs, lambda x, t, context, pooled: theirs(
        x.to(context.dtype), context, pooled, 1000 * t, return_dict=False)[0])


PARTS = {"mmdit": mmdit, "vae": vae, "clip": clip, "t5": t5, "step": step}


def timed(call, device) -> float:
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def row(name, rounds, device, dtype, compiled) -> str:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = PARTS[name](Path(folder), device=device, dtype=dtype)
    if compiled:
        ours, theirs = torch.compile(ours), torch.compile(theirs)
    a, b = ours().float(), theirs().float()
    error = ((a - b).norm() / b.norm()).item()
    times = [(timed(ours, device), timed(theirs, device)) for _ in range(rounds)]
    mine, peer = (1000 * statistics.median(t) for t in zip(*times))
    ratio = statistics.median(peer / mine for mine, peer in times)
    return f"| {name:6s} | {mine:9.2f} | {peer:9.2f} | {error:8.1e} | {ratio:5.2f} |"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--compile", action="store_true", help="both sides by torch.compile")
    args = p.parse_args(argv)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{time.strftime('%Y-%m-%d')}, {where}, {torch.get_num_threads()} threads, {args.dtype}, torch "
          f"{torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}; "
          f"{'compiled, ' * args.compile}medians of {args.rounds}\n")
    print("| part   | here, ms  | peer, ms  | error    | times |\n|---|---|---|---|---|")
    for name in args.only:
        print(row(name, args.rounds, args.device, getattr(torch, args.dtype), args.compile), flush=True)


if __name__ == "__main__":
    main()
