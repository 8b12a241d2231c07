"""Do full captions help? The paper's table 4 in miniature: original captions, synthetic ones, half of each.

The paper trained on alt texts alone and on a mixture, half of them described in full by a captioner, and saw
the mixture follow prompts better (GenEval 43.3 -> 49.8 %): attribution, position and two objects gained most.
Here an original is "a star left of a ring", the synthetic one names every colour, size and place. Prompts are
like originals.

    python studies/captions.py runs/drawn                         about three times the time of one flow stage

RUN's encoders, latents and seed serve all; only what the flow model is shown differs. Everything lies in
RUN/captions/ and is kept: a stopped command goes on where it was. Beside it, captions.csv and captions.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drawn_world import TASKS  # noqa: E402
from studies.training_length import (  # noqa: E402
    by_task, figure, flags, save_figure, scores, told_in_one_line, trained, write_table)

SHARES = (0.0, 0.5, 1.0)            # of synthetic captions


def row(share: float, steps: int, found: dict) -> dict:
    return {"synthetic": share, "steps": steps, **by_task(found)}


def plot(rows: list[dict], path: Path) -> None:
    fig, panel = figure(figsize=(9, 3.6))
    for i, r in enumerate(rows):
        places = [k + 0.27 * (i - 1) for k in range(len(TASKS) + 1)]
        panel.bar(places, [100 * r[name] for name in (*TASKS, "overall")], 0.25,
                  label=f"{100 * r['synthetic']:.0f} % synthetic captions")
    panel.set_xticks(range(len(TASKS) + 1), [name.replace("_", "\n") for name in (*TASKS, "overall")])
    panel.set(ylabel="right, %", ylim=(0, 100))
    panel.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(rows))
    save_figure(fig, path)


def main(argv=None) -> None:
    p = flags("score against the share of synthetic captions")
    p.add_argument("--steps", type=int, default=1500, help="steps of the transformer (default: 1500)")
    args = p.parse_args(argv)
    with told_in_one_line():
        rows = []
        for share in SHARES:
            folder = args.run / "captions" / f"synthetic{share}-steps{args.steps}"
            trained(args.run, folder, synthetic=share, flow_steps=args.steps)
            rows.append(row(share, args.steps, scores(folder, args.n, "drawn")))
        write_table(rows, args.run / "captions.csv")
        plot(rows, args.run / "captions.png")
    for r in rows:
        print(f"{100 * r['synthetic']:5.0f} % synthetic  score {100 * r['overall']:.1f} +- "
              f"{100 * r['error']:.1f}  " + "  ".join(f"{t} {100 * r[t]:.0f}" for t in TASKS))


if __name__ == "__main__":
    main()
