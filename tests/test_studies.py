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
def run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(training_length.report, "HELDOUT", 8)
    return shutil.copytree(finished, tmp_path / "run")


def test_each_length_is_a_whole_run_from_the_same_encoders_and_is_made_once(run, monkeypatch, capsys):
    flags = [str(run), "-n", "1", "--steps", "2"]
    training_length.main(flags)
    training_length.main([*flags, "4"])
    monkeypatch.setattr(training_length, "train", None)         # what is there is not trained again
    monkeypatch.setattr(training_length.report, "measure", None)
    training_length.main([*flags, "4"])
    with open(run / "length.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [row["steps"] for row in rows] == ["2", "4", "6"]                # and the run itself
    assert len({row["loss"] for row in rows}) == 3 and all(0 < float(row["loss"]) < 10 for row in rows)
    assert Image.open(run / "length.png").width > 1000
    lengths = [run / "lengths" / f"seed0-steps{n}" for n in (2, 4)]
    assert {(folder / "t5.safetensors").read_bytes() for folder in lengths} == {
        (run / "t5.safetensors").read_bytes()}
    assert "score" in capsys.readouterr().out.splitlines()[-1]


def test_another_seed_trains_its_own_encoders(run):
    training_length.main([str(run), "-n", "1", "--steps", "2", "--seeds", "1"])
    other = run / "lengths" / "seed1-steps2"
    for part in ("t5", "mmdit"):
        assert (other / f"{part}.safetensors").read_bytes() != (run / f"{part}.safetensors").read_bytes()


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        training_length.main([str(tmp_path)])
    assert e.value.code == 2 and str(tmp_path) in capsys.readouterr().err
