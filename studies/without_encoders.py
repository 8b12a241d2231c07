"""What does each text encoder add? The paper's figure 9 in miniature: drawing without some of the three.

Training drops each encoder's features for itself, so a finished model can do without any of them. The paper
finds that without T5, the largest, pictures are as pleasing but follow long prompts less and misspell text;
it keeps T5 for these. Here a trained run is asked the drawn world's prompts with zeros in the place of some
encoders' features; nothing is trained.

    python studies/without_encoders.py runs/drawn               as long as scoring six times

Scores are kept in RUN/without/, so a stopped command goes on where it was; beside it, without.csv.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402
from drawn_world import TASKS  # noqa: E402
from pipeline import Pipeline  # noqa: E402
from run_folder import read_json, read_run  # noqa: E402
from studies.training_length import by_task, flags, is_newer, told_in_one_line, write_table  # noqa: E402
from tensor_files import write_json  # noqa: E402

DROPS = ((), ("t5",), ("clip_l",), ("clip_g",), ("clip_l", "clip_g"), ("clip_l", "clip_g", "t5"))


def scored(run: Path, pipe: Pipeline, drop: tuple, n: int, per_prompt: int) -> dict:
    """The scores without the encoders in `drop`: those kept, or of pictures that are drawn now."""
    path = run / "without" / f"{'-'.join(drop) or 'none'}-{n}x{per_prompt}.json"
    if not is_newer(path, run):
        path.parent.mkdir(exist_ok=True)
        result = evaluate.score(
            lambda prompts, seeds: pipe(prompts, seed=seeds, drop=drop), n=n, per_prompt=per_prompt)
        write_json(path, {key: result[key] for key in ("score", "error", "shape", "unseen")})
    return read_json(path)


def main(argv=None) -> None:
    p = flags("score without some of the text encoders")
    p.add_argument("--pictures", type=int, default=4, help="pictures of a prompt (default: 4)")
    args = p.parse_args(argv)
    with told_in_one_line():
        read_run(args.run)                                      # CheckpointError where there is none
        pipe, rows = Pipeline.from_pretrained(args.run), []
        for drop in DROPS:
            found = scored(args.run, pipe, drop, args.n, args.pictures)
            rows.append({"without": " ".join(drop) or "none", **by_task(found)})
            print(f"without {rows[-1]['without']:15s} score {100 * rows[-1]['overall']:5.1f} +- "
                  f"{100 * rows[-1]['error']:.1f}  "
                  + "  ".join(f"{t} {100 * rows[-1][t]:.0f}" for t in TASKS), flush=True)
        write_table(rows, args.run / "without.csv")


if __name__ == "__main__":
    main()
