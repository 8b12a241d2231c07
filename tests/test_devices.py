"""Claims about a card, checked without one: nothing that works on it meets a tensor that was left behind.

pretended_card.py makes a process believe that it has a CUDA card. This file runs itself in such a process:
`python tests/test_devices.py FOLDER` trains, draws and scores there.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def test_on_a_card_everything_that_meets_is_there(tmp_path):
    """Training in four stages up to a sample grid, cut off once and resumed; drawing with every way of
    placing the weights, by own and by published ones; scoring."""
    card = subprocess.run([sys.executable, __file__, tmp_path / "card"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert card.returncode == 0, card.stdout[-2000:] + card.stderr[-4000:]
    for words in ("a meeting is noticed", "device: cuda", "bfloat16 (this GPU has it)",
                  "going on at step 2 of 3", "flow: at most", "--offload text: at most",
                  "--offload model: at most", "--offload block: at most", "validation loss",
                  "of 2 GB of the card", "all passed"):
        assert words in card.stdout + card.stderr, words


def noticed() -> None:
    import torch
    x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    assert (x * torch.tensor(2.0)).cpu().sum() == 8 and x[torch.tensor([0])].device.type == "cuda"
    for wrong in (lambda: x + y, lambda: y @ x, lambda: y[x[0].long()], lambda: y + x.sum(), x.numpy,
                  lambda: torch.randn(2, device="cuda", generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError), match="card"):
            wrong()
    print("a meeting is noticed")


def everything(folder: Path) -> None:
    import report
    import sample
    import train
    from conftest import MICRO, blank, shrink
    from make_fake_checkpoint import BUILD, main as fake

    shrink(pytest.MonkeyPatch())
    report.HELDOUT, run, judge, train.plot_run = 8, folder / "run", train.judge, blank
    config = train.TrainConfig(**MICRO | dict(
        device="cuda", dtype="auto", pictures=40, vae_critic=0.1, flow_steps=3, accumulate=2,
        checkpointing=True, preview_every=3, out=str(run), minutes=0))

    def power_cut(state, *numbers):
        if (state.stage, state.step) == ("flow", 2):
            raise KeyboardInterrupt
        return judge(state, *numbers)

    train.judge = power_cut
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    train.judge, train.time_stages = judge, lambda run, parts, todo, stages: {}
    train.train(*train.parse(["--resume", "--out", str(run)]))
    fake([str(folder), "--config", "small", "--parts", *BUILD])
    published, picture = folder / "small.safetensors", HERE.parent / "assets" / "emoji.png"
    for how in (f"--model {run}", f"--model {run} --offload model --method sde",
                f"--model {run} --offload text --int8 --dtype bfloat16 --image {picture}",
                f"--model {published} --height 64 --width 64 --offload block --int8",
                f"--model {published} --height 64 --width 64 --offload model --drop-t5"):
        sample.main(["a star", "--steps", "2", "--device", "cuda", "--out", f"{folder}/", *how.split()])
    report.main(f"--run {run} --measures loss,fid -n 1 --pictures 1 --steps 1 --device cuda".split())
    fake([str(folder), *"--draw model --int8 --steps 1 --side 64 --limit 2".split()])
    with pytest.raises(ValueError, match=r"needs 0\.8 GB on the card .* and 0\.8 GB are free"):
        fake([str(folder), *"--draw none --side 64 --limit 0.801".split()])


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    import pretended_card
    pretended_card.install()
    noticed()
    everything(Path(sys.argv[1]))
    print("all passed")
