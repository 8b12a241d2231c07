"""What does training longer buy? The paper's figure 8 in miniature: loss and score against training.

Each point is a whole training of the transformer, warm-up to decay, not a moment of a longer one: before its
rate falls, a run is worse than a shorter one that is finished. RUN itself is one. The encoders are RUN's for
every point but those of other seeds, which train everything anew and say how far a figure depends on luck.

    python studies/training_length.py runs/drawn                               four lengths: hours on a laptop
    python studies/training_length.py runs/drawn --steps 2000 --seeds 1 2      whole runs from other seeds

Everything lies in RUN/lengths/ and is kept: a stopped command goes on where it was, and a later one adds
points. Beside it, length.csv and length.png hold what has been finished so far.

The paper finds that validation loss falls smoothly with training and that GenEval and human preference follow
it. Here: the same loss (equidistant t, the same pictures and noise) and the drawn world's score. Another
seed's autoencoder makes other latents, so that its loss compares with nothing here.
"""
import argparse
import csv
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402
from drawn_world import TASKS  # noqa: E402
from run_folder import read_json  # noqa: E402
from settings import TrainConfig  # noqa: E402
from stages import PARTS_OF  # noqa: E402
from tensor_files import write_atomically, write_json  # noqa: E402
from train import train  # noqa: E402
from watch import read_metrics  # noqa: E402

USUAL = {"pictures": 4, "steps": 20, "guidance": 3.0, "seed": 0, "prompts": None, "clip": None, "data": None}


def trained(run: Path, folder: Path, **changes) -> Path:
    """The run `folder`, trained now if it is not finished, with RUN's settings except for the changes. Its
    encoders are RUN's, unless its seed differs; so is its autoencoder, unless vae_channels is among the
    changes."""
    saved = read_json(run / "config.json")
    if not (folder / "config.json").is_file():
        partly = folder.with_name(folder.name + ".part")            # an interrupted copy does not count
        shutil.rmtree(partly, ignore_errors=True)
        partly.mkdir(parents=True)
        if changes.get("seed", saved["seed"]) == saved["seed"]:
            shared = ("clip", "t5") if "vae_channels" in changes else ("vae", "clip", "t5")
            for name in (name for stage in shared for name in PARTS_OF[stage]):
                shutil.copy(run / f"{name}.safetensors", partly)
            for name in ("tokenizers", *["cache"] * ("vae" in shared)):
                if (run / name).is_dir():
                    shutil.copytree(run / name, partly / name)
        known = {k: v for k, v in saved.items() if k not in ("origin", "cache")}
        write_json(partly / "config.json", known | {"minutes": 0} | changes | {"out": str(folder)})
        partly.rename(folder)
    if not (folder / "mmdit.safetensors").is_file():
        train(TrainConfig(**read_json(folder / "config.json")), resume=True)
        shutil.rmtree(folder / "cache")                             # 290 MB that nothing reads any more
    return folder


def scores(folder: Path, prompts: int, measures: str = "drawn,loss") -> dict:
    """What scores.json says; made anew if it is missing, older than the weights, lacks a measure or was made
    with other settings."""
    path = folder / "scores.json"
    found = read_json(path) if is_newer(path, folder) else {}
    wanted = {"score" if name == "drawn" else name for name in measures.split(",")}
    asked = USUAL | {"n": prompts}
    if not wanted <= found.keys() or asked != {k: found["settings"].get(k) for k in asked}:
        report.measure(report.parse(["--run", str(folder), "--measures", measures, "-n", str(prompts)]))
        found = read_json(path)
    return found


def is_newer(path: Path, run: Path) -> bool:
    """Is there such a file, made after the run's transformer?"""
    return path.is_file() and path.stat().st_mtime > (run / "mmdit.safetensors").stat().st_mtime


def by_task(found: dict) -> dict:
    """Columns of a table: the score of all tasks, of each one, and their standard errors over the choice of
    prompts. What another training of the same kind would score differs by more."""
    tasks = {task: found["score"][task] for task in TASKS}
    errors = {f"{task}_error": found["error"][task] for task in TASKS}
    return {"overall": found["score"]["overall"], "error": found["error"]["overall"], **tasks, **errors,
            "shape": found["shape"], "unseen": found["unseen"]}


def point(folder: Path, prompts: int) -> dict:
    """One row of the table."""
    found, config = scores(folder, prompts), read_json(folder / "config.json")
    steps, minutes = 0, 0.0
    for line in (line for line in read_metrics(folder / "metrics.csv") if line["stage"] == "flow"):
        pictures = (int(line["step"]) - steps) * config["flow_batch"]
        minutes += pictures / float(line["samples_per_s"]) / 60
        steps = int(line["step"])
    return {"seed": config["seed"], "steps": steps, "minutes": minutes, "loss": found["loss"]["mean"],
            "loss_error": found["loss"]["error"], **by_task(found)}


def plot(rows: list[dict], path: Path) -> None:
    fig, panels = figure(1, 3, figsize=(13, 3.8))
    seeds = list(dict.fromkeys(r["seed"] for r in rows))                  # RUN's own first
    first = seeds[0]
    line = [r for r in rows if r["seed"] == first]
    for panel, key, error in ((panels[0], "loss", "loss_error"), (panels[1], "overall", "error")):
        for seed in seeds[:1] if key == "loss" else seeds:      # losses on other latents do not compare
            own = [r for r in rows if r["seed"] == seed]
            panel.errorbar([r["steps"] for r in own], [r[key] for r in own], [r[error] for r in own],
                           fmt="o-" if seed == first else "x", capsize=2, label=f"seed {seed}")
    for task in TASKS:
        panels[2].plot([r["steps"] for r in line], [r[task] for r in line], "o-", ms=3, label=task)
    for panel, title in zip(panels, ("validation loss", "score, all tasks", f"score by task, seed {first}")):
        panel.set(title=title, xlabel="steps of the transformer, and their minutes", xscale="log")
        panel.set_xticks([r["steps"] for r in line],
                         [f"{r['steps']:,}\n{r['minutes']:.0f} min" for r in line])
        panel.set_xticks([], minor=True)
        panel.legend(fontsize="small")
    save_figure(fig, path)


def figure(*rows_and_columns, figsize):
    """-> figure, panels; in inches."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*rows_and_columns, figsize=figsize, layout="constrained")


def save_figure(fig, path: Path) -> None:
    import matplotlib.pyplot as plt
    write_atomically(path, partial(fig.savefig, dpi=100, format="png"))
    plt.close(fig)


def write_table(rows: list[dict], path: Path) -> None:
    def write(path):
        with open(path, "w", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, rows[0].keys())
            table.writeheader()
            for row in rows:
                table.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomically(path, write)


def flags(what: str) -> argparse.ArgumentParser:
    """The flags that all studies have."""
    p = argparse.ArgumentParser(description=what)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}: see python studies/{p.prog} --help\n")
    p.add_argument("run", type=Path, help="a finished run of drawn pictures, whose encoders are used")
    p.add_argument("-n", type=int, default=64, help="prompts a task (default: 64)")
    return p


@contextmanager
def told_in_one_line():
    """Inside, an error ends the program with one line and exit code 2."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)


def main(argv=None) -> None:
    p = flags("score and loss against the length of training")
    p.add_argument("--steps", type=int, nargs="+", default=[750, 1500, 3000, 8000],
                   help="steps of the transformer (default: 750 1500 3000 8000)")
    p.add_argument("--seeds", type=int, nargs="+", help="seeds to train with (default: RUN's own)")
    args = p.parse_args(argv)
    with told_in_one_line():
        for seed in args.seeds or [read_json(args.run / "config.json")["seed"]]:
            for steps in args.steps:
                folder = args.run / "lengths" / f"seed{seed}-steps{steps}"
                scores(trained(args.run, folder, seed=seed, flow_steps=steps), args.n)
        folders = [args.run, *(f.parent for f in (args.run / "lengths").glob("seed*/scores.json"))]
        rows = [point(folder, args.n) for folder in folders]
        own = rows[0]["seed"]
        rows.sort(key=lambda r: (r["seed"] != own, r["seed"], r["steps"]))
        write_table(rows, args.run / "length.csv")
        plot(rows, args.run / "length.png")
    for r in rows:
        print(f"seed {r['seed']}  {r['steps']:6d} steps  loss {r['loss']:.4f} +- {r['loss_error']:.4f}  "
              f"score {100 * r['overall']:.1f} +- {100 * r['error']:.1f}")


if __name__ == "__main__":
    main()
