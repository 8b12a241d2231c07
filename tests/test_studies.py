"""Claims about studies/: each makes its table and picture from a run, and goes on where it was stopped."""
import csv
import os
import shutil
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))

from run_folder import load_part  # noqa: E402
from studies import captions, channels, timesteps, training_length, without_encoders  # noqa: E402
from tensor_files import write_json  # noqa: E402


@pytest.fixture
def run(finished, miniature, tmp_path, monkeypatch):
    parse = training_length.report.parse                        # what is drawn matters little here
    monkeypatch.setattr(training_length.report, "parse",
                        lambda argv: parse([*argv, "--pictures", "1", "--steps", "2"]))
    monkeypatch.setattr(training_length, "USUAL", training_length.USUAL | {"pictures": 1, "steps": 2})
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
    rows = table(run / "length.csv")
    assert [(row["seed"], row["steps"]) for row in rows] == [("0", "2"), ("0", "6"), ("1", "2")]
    assert len({row["loss"] for row in rows}) == 3 and all(0 < float(row["loss"]) < 10 for row in rows)
    assert Image.open(run / "length.png").width > 1000
    assert "score" in capsys.readouterr().out.splitlines()[-1]
    for part, shared in (("t5", True), ("vae", True), ("mmdit", False)):
        first, shorter, other = ((folder / f"{part}.safetensors").read_bytes() for folder in (
            run, run / "lengths" / "seed0-steps2", run / "lengths" / "seed1-steps2"))
        assert (first == shorter) == shared and first != other


def test_a_report_with_other_settings_or_of_earlier_weights_is_not_believed(run):
    first = training_length.scores(run, 1, "drawn")
    settings = first["settings"]
    for changed in ({"settings": settings | {"guidance": 1.0}}, {"settings": settings | {"pictures": 4}}):
        write_json(run / "scores.json", first | changed | {"score": {"overall": 2.0}})
        assert training_length.scores(run, 1, "drawn")["score"] == first["score"]
    write_json(run / "scores.json", first | {"score": {"overall": 2.0}})
    assert training_length.scores(run, 1, "drawn")["score"] == {"overall": 2.0}         # these are kept,
    os.utime(run / "scores.json", (0, 0))                                               # but not from before
    assert training_length.scores(run, 1, "drawn")["score"] == first["score"]


def table(path):
    with open(path, encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_each_density_of_times_trains_its_own_transformer_on_the_same_encoders(run, monkeypatch, capsys):
    monkeypatch.setattr(timesteps.report, "STEPS", (1, 2))
    monkeypatch.setattr(timesteps, "DENSITIES", ("uniform", "cosmap"))     # two are enough
    flags = [str(run), "-n", "1", "--steps", "2"]
    timesteps.main(flags)
    rows = table(run / "timesteps.csv")
    assert [r["density"] for r in rows] == ["uniform", "cosmap"]
    assert rows[0]["loss"] != rows[1]["loss"] and all(0 <= float(r["score_1"]) <= 1 for r in rows)
    of_t = [sum(float(r[f"loss_{k / 8}"]) for k in range(1, 8)) / 7 for r in rows]
    assert of_t == pytest.approx([float(r["loss"]) for r in rows], abs=2e-4)
    assert Image.open(run / "timesteps.png").width > 1000
    for part, kinds in (("t5", 1), ("vae", 1), ("mmdit", 2)):
        files = [f.read_bytes() for f in (run / "timesteps").glob(f"*/{part}.safetensors")]
        assert len(files) == 2 and len(set(files)) == kinds
    monkeypatch.setattr(training_length, "train", None)         # what is there is not made again
    monkeypatch.setattr(training_length.report, "measure", None)
    timesteps.main(flags)
    assert "in 1 steps" in capsys.readouterr().out.splitlines()[-1]


def test_each_share_of_synthetic_captions_trains_its_own_transformer(run, monkeypatch, capsys):
    monkeypatch.setattr(captions, "SHARES", (0.0, 1.0))
    captions.main([str(run), "-n", "1", "--steps", "2"])
    assert [float(r["synthetic"]) for r in table(run / "captions.csv")] == [0, 1]
    assert len({f.read_bytes() for f in (run / "captions").glob("*/mmdit.safetensors")}) == 2
    assert Image.open(run / "captions.png").width > 800
    assert "100 % synthetic" in capsys.readouterr().out.splitlines()[-1]


def test_each_number_of_channels_trains_its_own_autoencoder_and_transformer_on_the_same_text(
        run, monkeypatch, capsys):
    monkeypatch.setattr(channels, "CHANNELS", (4, 16))
    monkeypatch.setattr(channels, "PICTURES", 8)
    channels.main([str(run), "-n", "1", "--steps", "2"])
    rows = table(run / "channels.csv")
    assert [r["channels"] for r in rows] == ["4", "16"] and rows[0]["psnr"] != rows[1]["psnr"]
    made = sorted((run / "channels").iterdir())
    assert [load_part(folder, "mmdit").config.in_channels for folder in made] == [16, 4]
    assert [load_part(folder, "vae").config.z_channels for folder in made] == [16, 4]
    assert all((f / "t5.safetensors").read_bytes() == (run / "t5.safetensors").read_bytes() for f in made)
    assert "16 channels  PSNR" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_is_scored_without_each_encoder_and_what_is_scored_is_kept(run, monkeypatch, capsys):
    asked, call = [], without_encoders.Pipeline.__call__
    monkeypatch.setattr(without_encoders.Pipeline, "__call__", lambda self, prompts, **how: asked.append(
        how["drop"]) or call(self, prompts, **how, steps=1))
    monkeypatch.setattr(without_encoders, "DROPS", ((), ("t5",)))
    flags = [str(run), "-n", "1", "--pictures", "1"]
    without_encoders.main(flags)
    without_encoders.main(flags)
    assert asked == [(), ("t5",)]                               # once each
    assert [r["without"] for r in table(run / "without.csv")] == ["none", "t5"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("without t5")


@pytest.mark.parametrize("study", [training_length, timesteps, captions, channels, without_encoders])
def test_a_folder_without_a_run_and_a_wrong_flag_are_named_in_one_line(study, tmp_path, capsys):
    for flags, named in (([str(tmp_path)], str(tmp_path)), (["run", "--stepz", "1"], "--stepz")):
        with pytest.raises(SystemExit) as e:
            study.main(flags)
        said = capsys.readouterr().err
        assert e.value.code == 2 and named in said and said.count("\n") == 1
