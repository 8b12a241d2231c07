"""Claims about studies/: each makes its table and picture from a run, and goes on where it was stopped."""
import csv
import shutil
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "studies"))

import training_length  # noqa: E402


@pytest.fixture
def run(finished, miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(training_length.report, "HELDOUT", 8)
    return shutil.copytree(finished, tmp_path / "run")


def test_each_length_is_a_whole_run_from_the_same_encoders_each_seed_has_its_own_and_none_is_made_twice(
        run, monkeypatch, capsys):
    flags = [str(run), "-n", "1", "--steps", "2"]
    training_length.main(flags)
    training_length.main([*flags, "--seeds", "1"])
    monkeypatch.setattr(training_length, "train", None)         # what is there is not trained again
    monkeypatch.setattr(training_length.report, "measure", None)
    training_length.main(flags)
    with open(run / "length.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(row["seed"], row["steps"]) for row in rows] == [("0", "2"), ("0", "6"), ("1", "2")]
    assert len({row["loss"] for row in rows}) == 3 and all(0 < float(row["loss"]) < 10 for row in rows)
    assert Image.open(run / "length.png").width > 1000
    assert "score" in capsys.readouterr().out.splitlines()[-1]
    for part, shared in (("t5", True), ("vae", True), ("mmdit", False)):
        first, shorter, other = ((folder / f"{part}.safetensors").read_bytes() for folder in (
            run, run / "lengths" / "seed0-steps2", run / "lengths" / "seed1-steps2"))
        assert (first == shorter) == shared and first != other


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        training_length.main([str(tmp_path)])
    assert e.value.code == 2 and str(tmp_path) in capsys.readouterr().err
