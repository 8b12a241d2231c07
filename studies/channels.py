"""How many channels should a latent have? The paper's table 3 and figure 10 in miniature: 4, 8 and 16.

With more channels the autoencoder gives pictures back more exactly (the paper: PSNR 25.1, 26.4, 28.6 dB), but
the transformer has more to predict: there, 16 channels catch up with 8 only in models of 22 blocks. The
miniature has 4 blocks; the README says what it finds.

    python studies/channels.py runs/drawn              about three times an autoencoder and a flow stage

RUN's text encoders and seed serve all; each autoencoder and its transformer are trained anew. Everything lies
in RUN/channels/ and is kept: a stopped command goes on where it was. Beside it, channels.csv: PSNR of fresh
drawings, how many of the prompts' true drawings the scorer still accepts after the autoencoder, and the score
of what the transformer draws.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import load_pictures  # noqa: E402
from run_folder import load_part, read_run  # noqa: E402
from stages import to_signed  # noqa: E402
from studies.training_length import (  # noqa: E402
    by_task, flags, scores, told_in_one_line, trained, write_table)
from vae import psnr  # noqa: E402

CHANNELS = (4, 8, 16)
PICTURES = 512                  # fresh drawings, of which PSNR is told


@torch.no_grad()
def exactness(folder: Path) -> float:
    """PSNR in dB of fresh drawings through a run's autoencoder, by the means of its posteriors."""
    config, vae = read_run(folder), load_part(folder, "vae")
    pictures = load_pictures("drawn", config["size"], count=PICTURES, seed=config["seed"] + 1).images
    x = to_signed(pictures, "cpu")                                                      # (n, 3, S, S)
    return psnr(torch.cat([vae.decode(vae.encode(few).mean) for few in x.split(64)]), x)


def row(channels: int, steps: int, folder: Path, found: dict) -> dict:
    return {"channels": channels, "steps": steps, "psnr": exactness(folder),
            "after_vae": found["ceilings"]["after VAE"]["overall"], **by_task(found)}


def main(argv=None) -> None:
    p = flags("score and exactness against the channels of a latent")
    p.add_argument("--steps", type=int, default=1500, help="steps of the transformer (default: 1500)")
    args = p.parse_args(argv)
    with told_in_one_line():
        rows = []
        for channels in CHANNELS:
            folder = args.run / "channels" / f"{channels}-steps{args.steps}"
            trained(args.run, folder, vae_channels=channels, flow_steps=args.steps)
            rows.append(row(channels, args.steps, folder, scores(folder, args.n, "drawn")))
        write_table(rows, args.run / "channels.csv")
    for r in rows:
        print(f"{r['channels']:3d} channels  PSNR {r['psnr']:.1f} dB  true drawings after it "
              f"{100 * r['after_vae']:.1f}  score {100 * r['overall']:.1f} +- {100 * r['error']:.1f}")


if __name__ == "__main__":
    main()
