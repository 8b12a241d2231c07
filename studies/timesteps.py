"""At which times should training look? The paper's tables 1 and 2 in miniature: four densities of t.

The paper compares 61 formulations and finds that rectified flow needs more of the middle: logit-normal times
beat uniform ones, most of all where few steps are taken. Here the flow model is trained once with each of
flow.DENSITIES, all else equal (RUN's encoders, latents, seed, batches and shift, which moves every density
towards noise alike), and judged by the drawn world's score in place of FID and CLIP score.

    python studies/timesteps.py runs/drawn                        about four times the time of one flow stage
    python studies/timesteps.py runs/drawn --shift 1              the same without RUN's shift

Everything lies in RUN/timesteps/ and is kept: a stopped command goes on where it was. Beside it,
timesteps.csv and timesteps.png, or those named by their shift, hold the validation loss at each t, the score
of many pictures in 20 steps, and that of fewer, all from the same noise, in 5, 10, 20 and 50.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flow  # noqa: E402
import report  # noqa: E402
from flow import DENSITIES  # noqa: E402
from run_folder import read_json  # noqa: E402
from studies.training_length import (  # noqa: E402
    figure, flags, save_figure, scores, told_in_one_line, trained, write_table)


def row(density: str, steps: int, found: dict) -> dict:
    by_steps = {f"score_{n}": found["steps"][str(n)]["score"] for n in report.STEPS}
    by_t = {f"loss_{t}": x for t, x in found["loss"]["by_t"].items()}
    return {"density": density, "steps": steps, "overall": found["score"]["overall"],
            "error": found["error"]["overall"], **by_steps, "loss": found["loss"]["mean"],
            "loss_error": found["loss"]["error"], **by_t}


def plot(rows: list[dict], shift: float, path: Path) -> None:
    fig, panels = figure(1, 3, figsize=(13, 3.8))
    t = torch.linspace(0.005, 0.995, 199)
    before = flow.shift_t(t, 1 / shift)                                     # t before the shift
    slope = (1 / shift) / (1 + (1 / shift - 1) * t) ** 2                    # d before / d t
    levels = [name.removeprefix("loss_") for name in rows[0] if name.startswith("loss_0")]
    steps = [name.removeprefix("score_") for name in rows[0] if name.startswith("score_")]
    for r in rows:
        how = dict(label=r["density"], ms=4)
        panels[0].plot(t, flow.t_density(r["density"], before) * slope, **how)
        panels[1].plot([float(x) for x in levels],
                       [r[f"loss_{x}"] - rows[0][f"loss_{x}"] for x in levels], "o-", **how)
        panels[2].plot([int(n) for n in steps], [r[f"score_{n}"] for n in steps], "o-", **how)
    panels[0].set(title=f"times in training, shifted by {shift:g}", xlabel="t (1 = noise)", ylim=(0, 6.5))
    panels[1].set(title=f"validation loss, less that of {rows[0]['density']}", xlabel="t (1 = noise)")
    panels[2].set(title="score", xlabel="sampling steps", xscale="log")
    panels[2].set_xticks([int(n) for n in steps], steps)
    panels[2].set_xticks([], minor=True)
    for panel in panels:
        panel.legend(fontsize="small")
    save_figure(fig, path)


def main(argv=None) -> None:
    p = flags("score and loss against the density of training times")
    p.add_argument("--steps", type=int, default=1500, help="steps of the transformer (default: 1500)")
    p.add_argument("--shift", type=float, help="shift of times in training and sampling (default: RUN's)")
    args = p.parse_args(argv)
    with told_in_one_line():
        shift = read_json(args.run / "config.json")["shift"] if args.shift is None else args.shift
        rows, other = [], "" if args.shift is None else f"-shift{shift:g}"
        for density in DENSITIES:
            folder = args.run / "timesteps" / f"{density}-steps{args.steps}{other}"
            trained(args.run, folder, density=density, flow_steps=args.steps, shift=shift)
            rows.append(row(density, args.steps, scores(folder, args.n, "drawn,loss,steps")))
        write_table(rows, args.run / f"timesteps{other}.csv")
        plot(rows, shift, args.run / f"timesteps{other}.png")
    for r in rows:
        print(f"{r['density']:13s} loss {r['loss']:.4f} +- {r['loss_error']:.4f}  "
              f"score {100 * r['overall']:.1f} +- {100 * r['error']:.1f}  "
              + "  ".join(f"in {n} steps {100 * r[f'score_{n}']:.1f}" for n in report.STEPS))


if __name__ == "__main__":
    main()
