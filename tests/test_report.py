"""Claims of report.py: the command draws once and measures often, says in one line what is wrong, and never
gives a wrong score for what it cannot score."""
import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import drawn_world as world
import evaluate
import make_fake_checkpoint
import metrics
import report
from offload import Places
from pipeline import Pipeline, save_picture
from run_folder import save_part
from stages import build, make_tokenizers
from tensor_files import write_json
from text_encoders import ENCODERS
from train import TrainConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder as train.py leaves it, but untrained: pale noise, with little in it to recognise."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(pictures=60, device="cpu")
    captions = data.load_pictures("drawn", 64, count=60).captions
    tokenizers = make_tokenizers(folder, config, [t for texts in captions for t in texts],
                                 [texts[0] for texts in captions])
    parts = build(config, tokenizers)
    torch.nn.init.normal_(parts["mmdit"].final_layer.linear.weight, std=0.02)   # or all velocities are 0
    parts["vae"].decoder.conv_out.weight.data *= 0.05
    for name, part in parts.items():
        save_part(folder, name, part)
    write_json(folder / "config.json", vars(config))
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def small(monkeypatch):
    for name, value in (("STEPS", (1, 2)), ("HELDOUT", 6), ("REFERENCE", 40), ("NEAREST", 40)):
        monkeypatch.setattr(report, name, value)


def scores(folder):
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def command(*argv):
    report.main([str(a) for a in argv])


def gallery(folder, n=3, per_prompt=2, size=64):
    """A folder of true drawings in GenEval's layout."""
    jobs = evaluate.requests(n, per_prompt=per_prompt)
    for job in jobs:
        path = metrics.picture_path(folder, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.parent.parent / "metadata.jsonl", job.metadata)
        Image.fromarray(evaluate.illustrate(job.metadata, np.random.default_rng(job.seed), size)).save(path)
    return jobs


# --- Runs -------------------------------------------------------------------------------------------------

def test_a_run_is_drawn_once_and_measured_in_every_way(run, small, monkeypatch, capsys):
    command("--run", run, "-n", 2, "--pictures", 2, "--steps", 2, "--measures", "all", "--device", "cpu")
    table, told = capsys.readouterr().out, scores(run)
    assert set(report.MEASURES) - {"drawn"} <= set(told)
    assert set(told["score"]) == set(told["any"]) == set(told["chance"]) == {*world.TASKS, "overall"}
    assert len(told["records"]) == 24 and told["ceilings"]["drawn"]["overall"] == 1
    assert set(told["ceilings"]) == {"drawn", "after VAE"} and "unseen" in told["ceilings"]["after VAE"]
    assert told["loss"]["pictures"] == 6 and told["loss"]["of"] == "fresh drawings"
    assert told["loss"]["mean"] == pytest.approx(np.mean(list(told["loss"]["by_t"].values())), rel=1e-5)
    assert set(told["clip"]) >= {"pictures", "shuffled", "true drawings", "chance"}
    assert told["fid"]["reference_n"] == 40 and told["fid"]["pictures"]["n"] == 24
    assert "not comparable with figures on Inception features" in table
    assert told["steps"]["2"]["lost"] == 0 and told["steps"]["pictures"] == 12
    assert told["steps"]["1"]["path"] == pytest.approx(told["steps"]["1"]["straight"], rel=1e-4)
    assert told["memory"]["training"] == 60 and 0 <= told["memory"]["copies"] <= 1
    beside = told["memory"]["beside"]
    assert list(beside) == ["true copies", "fresh drawings"] and beside["true copies"]["copies"] >= 0.9
    assert beside["true copies"]["median"] > 1                      # they too have been through the VAE
    assert (run / "scores.txt").read_text(encoding="utf-8").strip() in table
    with Image.open(run / "scores.png") as page:
        assert page.width > 900 and page.height > 900

    monkeypatch.setattr(Pipeline, "__call__", lambda *a, **k: pytest.fail("drawn again"))
    command("--run", run, "-n", 2, "--pictures", 2, "--steps", 2, "--measures", "all", "--device", "cpu")
    again = scores(run)
    assert again == told
    command("--run", run, "-n", 1, "--pictures", 1, "--steps", 2, "--device", "cpu")
    assert len(scores(run)["records"]) == 6 and "loss" not in scores(run)       # by default, drawn alone


def test_other_weights_or_settings_are_never_mixed_with_old_pictures(run):
    flags = ("--run", run, "-n", 1, "--pictures", 1, "--steps", 1, "--device", "cpu")
    command(*flags)
    command(*flags, "--guidance", 0)
    part = metrics.load_part(run, "mmdit")
    part.final_layer.linear.bias.data += 1
    save_part(run, "mmdit", part)
    command(*flags)
    folders = [p for p in (run / "pictures").iterdir() if p.is_dir()]
    assert len(folders) == 3 and all(len(list(p.glob("*/samples/*.png"))) == 6 for p in folders)
    assert sorted(json.loads((p / "settings.json").read_text())["guidance"] for p in folders) == [0, 3, 3]


def test_what_draws_decides_whether_pictures_are_those_that_are_there_and_nothing_else_does(run, capsys):
    flags = ("--run", run, "-n", 1, "--pictures", 1, "--steps", 1, "--device", "cpu")

    def drawn():
        command(*flags)
        return "drawing 6" in capsys.readouterr().out

    assert drawn()
    for name in ("cache", "start", "timesteps/uniform"):                # what a run may hold besides
        (run / name).mkdir(parents=True)
        shutil.copy(run / "vae.safetensors", run / name / "mmdit.safetensors")
    assert not drawn()
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"shift": 1.5})
    assert drawn()
    words = run / "tokenizers" / "t5" / "tokenizer.json"
    told = json.loads(words.read_text())
    told["model"]["vocab"][-1][1] -= 1                                  # its last word is rarer
    words.write_text(json.dumps(told))
    assert drawn() and not drawn()


def test_captions_that_come_in_another_order_are_not_scored_with_old_pictures(run, capsys):
    config = json.loads((run / "config.json").read_text())
    folder = run.parent / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    write_json(run / "config.json", config | {"data": str(folder)})
    flags = ("--run", run, "-n", 9, "--pictures", 1, "--steps", 1, "--device", "cpu", "--measures", "clip")
    command(*flags)
    (folder / "0.txt").unlink()
    command(*flags)
    assert "drawing 4 pictures" in capsys.readouterr().out              # all have moved up by one
    jobs = metrics.read_folder(next((run / "pictures").glob("1-*")))[0][:4]
    assert {job.metadata["prompt"] for job in jobs} == {f"number {i}" for i in range(1, 5)}


def test_one_measure_that_fails_does_not_take_the_others_with_it(tmp_path, made, capsys):
    gallery(tmp_path, 1, 1)
    for sub in list(tmp_path.iterdir())[2:]:
        shutil.rmtree(sub)
    with pytest.raises(SystemExit) as end:
        command("--images", tmp_path, "--measures", "drawn,all", "--data", "emoji", "--clip", made)
    assert end.value.code == 2 and "fid could not be measured: KID needs three" in capsys.readouterr().err
    assert len(scores(tmp_path)["records"]) == 2 and {"clip", "memory"} < set(scores(tmp_path))
    assert "fid" not in scores(tmp_path)


def test_the_validation_loss_needs_no_pictures_to_be_drawn(run, small, monkeypatch, capsys):
    monkeypatch.setattr(report, "draw_folder", lambda *_: pytest.fail("drawn"))
    (run / "scores.png").touch()
    command("--run", run, "--measures", "loss", "--device", "cpu")
    assert not (run / "scores.png").exists()                                # of an earlier report
    assert scores(run)["loss"]["pictures"] == 6 and "0 pictures; wrote" in capsys.readouterr().out


def test_the_references_size_is_that_of_most_pictures(tmp_path):
    jobs = gallery(tmp_path, 1, 2)
    paths = [metrics.picture_path(tmp_path, job) for job in jobs]
    Image.new("RGB", (8, 8)).save(paths[0])
    assert report.common_side(paths) == 64
    for path in paths[1:]:
        Image.new("RGB", (96, 64)).save(path)
    assert report.common_side(paths) == 64                                  # the shorter side


def test_the_error_of_clips_figures_counts_prompts_and_not_their_pictures():
    values = [0.0, 0.0, 1.0, 1.0]
    assert report.error_of(values, [1, 1, 2, 2]) == pytest.approx(0.5)
    assert report.error_of(values, [1, 2, 3, 4]) == pytest.approx(0.5 / 3 ** 0.5)
    assert report.error_of(values, [1, 1, 1, 1]) is None                    # one prompt says nothing of it


def test_pictures_do_not_depend_on_how_many_are_drawn_together(run, monkeypatch):
    pipe, jobs = Pipeline.from_pretrained(run, device="cpu"), evaluate.requests(2, per_prompt=2)
    together = metrics.draw_folder(pipe, jobs, run / "a", 2, 3.0)
    for job in reversed(jobs):
        metrics.draw_folder(pipe, [job], run / "b", 2, 3.0)
    one, other = ([metrics.open_picture(metrics.picture_path(run / name, job)).astype(int) for job in jobs]
                  for name in "ab")
    assert together == [metrics.picture_path(run / "a", job) for job in jobs]
    assert max(abs(p - q).max() for p, q in zip(one, other)) <= 1               # of 255: rounding
    assert min(abs(p - q).max() for p, q in zip(one, one[1:])) > 1              # and they are not all alike


def test_a_run_on_other_data_is_asked_for_their_captions(run, small, capsys):
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"data": "emoji", "pictures": 30})
    flags = ("--run", run, "-n", 3, "--pictures", 1, "--steps", 1, "--device", "cpu")
    command(*flags)
    assert "score" not in scores(run) and scores(run)["clip"]["pictures"]
    command(*flags, "--measures", "loss,memory")
    assert scores(run)["loss"]["of"] == "training pictures"
    assert list(scores(run)["memory"]["beside"]) == ["true copies"]


def test_published_prompts_are_drawn_for_genevals_own_scorer(run, tmp_path, capsys):
    flags = ("--model", run, "-n", 1, "--pictures", 2, "--steps", 1, "--out", tmp_path / "g")
    command(*flags)
    assert "evaluate_images.py" in capsys.readouterr().out
    drawn = sorted(p.relative_to(tmp_path / "g").as_posix() for p in (tmp_path / "g").glob("*/samples/*.png"))
    first = (0, 80, 179, 259, 353, 453)         # of each task, as the published file numbers them
    assert drawn == [f"{i:05d}/samples/{k:05d}.png" for i in first for k in (0, 1)]
    told = [json.loads((tmp_path / "g" / f"{i:05d}" / "metadata.jsonl").read_text()) for i in first]
    assert [m["tag"] for m in told] == list(dict.fromkeys(m["tag"] for m in metrics.geneval_prompts()))
    with pytest.raises(SystemExit):
        command(*flags, "--guidance", 1)
    assert "other weights or settings" in capsys.readouterr().err
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps(world.prompts("colors", 1)[0]), encoding="utf-8")
    command("--model", run, "--prompts", mine, "--steps", 1, "--out", tmp_path / "m", "--device", "cpu")
    assert len(scores(tmp_path / "m")["records"]) == 4


def test_published_weights_are_measured_in_every_way_but_by_the_drawn_world(run, small, tmp_path, capsys):
    make_fake_checkpoint.main([str(tmp_path / "model"), "--config", "small", "--parts",
                               *make_fake_checkpoint.BUILD])
    (mine := tmp_path / "mine").mkdir()
    for i in range(8):
        Image.new("RGB", (200, 200), (30 * i, 100, 90)).save(mine / f"{i}.png")
        (mine / f"{i}.txt").write_text(f"colour {i}", encoding="utf-8")
    command("--model", tmp_path / "model" / "small.safetensors", "--clip", run, "--data", mine, "-n", 1,
            "--measures", "all", "--pictures", 1, "--steps", 2, "--out", tmp_path / "g", "--device", "cpu")
    told = scores(tmp_path / "g")
    assert {"loss", "clip", "fid", "steps", "memory"} <= set(told) and "records" not in told
    assert told["loss"]["of"] == str(mine) and told["loss"]["mean"] > 0 and told["steps"]["1"]["path"] > 0
    assert "drawn is left out" in capsys.readouterr().out


# --- The numbers ------------------------------------------------------------------------------------------

class Reader:
    """Towers that see and read the ten colours and eight shapes, and nothing else."""
    name, words = "reader", (*world.COLOURS, *world.SHAPES)
    image = SimpleNamespace(config=SimpleNamespace(image_size=64))

    def read(self, texts):
        return metrics.normed(torch.tensor([[float(w in t.split()) for w in self.words] for t in texts]))

    def look(self, pictures):
        pictures = [p if isinstance(p, np.ndarray) else metrics.open_picture(p) for p in pictures]
        yield self.read([" ".join(f"{f.colour} {f.shape}" for f in evaluate.find_objects(p))
                         for p in pictures])


def cells(line):
    return line[:17].strip(), *(line[i:i + 12].strip() for i in range(17, len(line), 12))


def blank(path, level=128, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level,) * 3).save(path)
    return path


def test_the_table_of_the_drawn_world_tells_the_scores_and_what_true_drawings_get(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "chance", lambda *_: 0.125)               # two thousand judgements a task
    jobs = gallery(tmp_path, 2, 2)
    paths = [metrics.picture_path(tmp_path, job) for job in jobs]
    blank(paths[0])                                                     # wrong; its prompt's second is right
    extra = next(shape for shape in world.SHAPES if shape not in jobs[1].metadata["prompt"])
    asked = jobs[1].metadata["include"][0]["class"]
    things = [world.Thing(asked, "red", 0.3, 0.3, 0.16), world.Thing(extra, "blue", 0.7, 0.7, 0.16)]
    Image.fromarray(world.draw(things, 64)).save(paths[1])                   # right, but not strictly
    result, lines, _ = report.measure_drawn(report.Subject(tmp_path, jobs, paths, [], {}))
    assert [result[key]["single_object"] for key in ("score", "strict", "any")] == [0.75, 0.5, 1]
    assert cells(lines[0]) == ("per cent", "score", "+-", "strict", "any of", "chance", "drawn")
    for line, task in zip(lines[1:], (*world.TASKS, "overall"), strict=False):
        told = [result[key][task] for key in ("score", "error", "strict", "any", "chance")]
        assert cells(line) == (task, *(f"{100 * x:.1f}" for x in told), "100.0")
    for line, key in zip(lines[8:], ("seen", "unseen", "shape", "colour"), strict=True):
        share = "" if result[key] is None else f"{100 * result[key]:.1f}"
        assert (cells(line)[0], cells(line)[1], cells(line)[6]) == (
            key, share, "" if result["ceilings"]["drawn"][key] is None else "100.0")


def test_the_validation_loss_is_told_by_time_and_every_caption_has_its_turn(monkeypatch):
    levels, asked = torch.tensor(metrics.LEVELS)[:, None], []
    monkeypatch.setattr(report, "HELDOUT", 4)
    monkeypatch.setattr(report, "validation_loss", lambda pipe, images, captions: asked.append(
        (images, captions)) or levels + torch.tensor([0.0, 0, 2, 2]))
    s = report.Subject(None, [], [], [], {"data": "drawn", "size": 64, "seed": 3, "pictures": 40})
    result, lines, _ = report.measure_loss(s)
    assert result["by_t"] == {str(t): t + 1 for t in metrics.LEVELS} and result["mean"] == 1.5
    assert result["error"] == pytest.approx((4 / 3) ** 0.5 / 2)
    assert cells(lines[1]) == ("4 pictures", *(f"{t + 1:.4f}" for t in metrics.LEVELS), "1.5000", "0.5774")
    fresh = s.heldout(4)[0]
    assert torch.equal(asked[0][0], fresh.images) and len(fresh.captions[1]) > 1
    assert asked[0][1] == [texts[i % len(texts)] for i, texts in enumerate(fresh.captions)]


def test_towers_that_see_prefer_the_prompt_among_rivals_and_not_when_captions_are_shuffled(tmp_path):
    bench = metrics.geneval_prompts()[0]                                    # no picture of this world
    jobs = [metrics.Job(0, 0, None, bench), *evaluate.requests(6, ("colors",), per_prompt=2)]
    pictures = [np.full((64, 64, 3), 128, np.uint8), *report.true_drawings(jobs[1:], 64)]
    result, lines, _ = report.measure_clip(report.Subject(None, jobs, pictures, [], {}, towers=Reader()))
    told, shuffled, true = (result[name] for name in ("pictures", "shuffled", "true drawings"))
    assert told["score"] == pytest.approx(12 / 13) and true["score"] == pytest.approx(1)
    assert told["error"] == pytest.approx(1 / 7)                            # of seven prompts
    assert told["precision"] == pytest.approx((12 + 1 / 32) / 13) and true["precision"] == 1
    assert shuffled["score"] < 0.6 and shuffled["precision"] < 0.5
    assert result["chance"] == pytest.approx((1 / 32 + 12 / 17) / 13)
    assert cells(lines[1])[:4] == ("pictures", "0.9231", "0.1429", "92.5 %")
    assert "among 17 to 32 captions, where chance is 5.7 %" in lines[-1]


def test_rivals_are_other_captions_at_most_31():
    rng, unknown = np.random.default_rng(0), {"tag": "caption", "include": [], "prompt": "a"}
    assert sorted(report.rivals(unknown, ["a", "b", "c", "b"], rng)) == ["b", "c"]
    bench = report.rivals(metrics.geneval_prompts()[0], ["a"], rng)
    assert len(set(bench)) == 31 and all(text.startswith("a photo of a") for text in bench)


def test_fid_and_kid_are_of_all_pictures_to_all_that_training_has_seen(tmp_path):
    jobs = gallery(tmp_path, 1, 2)
    paths, towers = [metrics.picture_path(tmp_path, job) for job in jobs], Reader()
    config = {"data": "drawn", "size": 64, "seed": 3, "pictures": 20}
    s = report.Subject(tmp_path, jobs, paths, [], config, towers=towers)
    result, lines, _ = report.measure_fid(s)
    seen = data.load_pictures("drawn", 64, count=20, seed=3).images.permute(0, 2, 3, 1).numpy()
    x, y = (torch.cat(list(towers.look(pictures))) for pictures in (paths, list(seen)))
    value, error = metrics.kid(x, y, [job.number for job in jobs])          # of six prompts
    told = result["pictures"]
    assert told["fid"] == pytest.approx(metrics.fid(metrics.Statistics(x), metrics.Statistics(y)), rel=1e-4)
    assert (told["kid"], told["kid_error"]) == pytest.approx((value, error), rel=1e-4)
    assert {name: r["n"] for name, r in result.items() if isinstance(r, dict)} == {
        "pictures": 12, "fresh drawings": 12, "true drawings": 12} and result["reference_n"] == 20
    assert cells(lines[1]) == ("pictures", "12", f"{told['fid']:.3f}", f"{value:.4f}", f"{error:.4f}")
    assert "to 20 pictures (training pictures)" in lines[4] and "FID is far too high" in lines[-1]


def test_what_fewer_steps_lose_is_told_beside_the_most(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "STEPS", (1, 2))
    jobs = evaluate.requests(4, ("colors",), per_prompt=2)

    def draw(jobs, steps):
        paths = [metrics.picture_path(tmp_path / str(steps), job) for job in jobs]
        for i, (path, drawing) in enumerate(zip(paths, report.true_drawings(jobs, 64))):
            drawing = drawing if steps == 2 or i > 1 else drawing * 0 + 128     # in one step two are lost
            save_picture(Image.fromarray(drawing), path, {"path": 3 + i, "straight": 2})
        return paths

    s = report.Subject(tmp_path, jobs, [], [], {}, SimpleNamespace(size=(64, 64)), Reader(), draw)
    result, lines, _ = report.measure_steps(s)
    few = result["1"]
    assert [few[key] for key in ("clip", "lost", "score", "path", "straight")] == pytest.approx(
        [0.5, 0.5, 0.5, 4.5, 2])
    assert few["error"] == pytest.approx((1 / 3) ** 0.5 / 4 ** 0.5) and result["2"]["score"] == 1
    assert cells(lines[1]) == ("1", "0.5000", "50.00", "28.87", "50.0", "4.50", "2.00")
    assert cells(lines[2]) == ("2", "1.0000", "0.00", "0.00", "100.0", "4.50", "2.00")


def test_copies_are_told_from_others_pictures_and_shown_beside_what_they_copy(tmp_path, monkeypatch):
    for i, level in enumerate((20, 120, 220)):
        blank(tmp_path / "seen" / f"{i}.png", level).with_suffix(".txt").write_text("grey")
    levels, shown = (150, 219, 60, 120), []
    paths = [blank(tmp_path / f"{i}.png", level) for i, level in enumerate(levels)]
    jobs = [metrics.Job(i, 0, None, {"prompt": str(level)}) for i, level in enumerate(levels)]
    monkeypatch.setattr(report, "side_by_side", shown.extend)
    s = report.Subject(tmp_path, jobs, paths, [], {}, source=str(tmp_path / "seen"))
    result, lines, _ = report.measure_memory(s)
    assert (result["copies"], result["limit"], result["training"]) == (0.5, 2, 3)
    assert [(prompt, far) for _, _, prompt, far in shown] == [("120", 0), ("219", 1), ("150", 30), ("60", 40)]
    assert [(int(a[0, 0, 0]), int(b[0, 0, 0])) for a, b, _, _ in shown] == [
        (120, 120), (219, 220), (150, 120), (60, 20)]
    assert cells(lines[1])[2] == "50.0" and result["beside"] == {}


def test_pictures_go_through_the_vae_and_come_back_in_their_order(made):
    vae = metrics.load_part(made, "vae")
    images = list(np.random.default_rng(0).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8))
    pipe = SimpleNamespace(vae=vae, places=Places("none", "cpu", None, None))
    with torch.no_grad():
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        x = vae.decode(vae.encode(x).mean).permute(0, 2, 3, 1).numpy()
    expected = np.clip((x + 1) * 127.5, 0, 255)
    found = report.through_vae(pipe, images)
    assert len(found) == 17 and abs(np.stack(found) - expected).max() <= 0.51
    assert expected.std() > 1


def test_training_pictures_are_the_runs_and_no_more_and_others_pictures_have_none_held_out(tmp_path):
    config = {"data": "drawn", "size": 64, "seed": 3, "pictures": 40}
    of_run = report.Subject(None, [], [], [], config).training(4096)[0].images
    assert torch.equal(of_run, data.load_pictures("drawn", 64, count=40, seed=3).images)
    others = gallery(tmp_path, 1, 1)
    paths = [metrics.picture_path(tmp_path, job) for job in others]
    assert report.Subject(None, others, paths, [], {}, source="drawn").heldout(4) == (None, "")


def test_true_drawings_of_one_prompt_differ():
    first, second = report.true_drawings(evaluate.requests(1, ("two_object",), per_prompt=2), 64)
    assert (first != second).any()


def test_every_part_that_draws_has_its_share_in_the_name_of_the_pictures_folder(run):
    pipe, seen = Pipeline.from_pretrained(run, device="cpu"), set()
    for part in ("mmdit", "vae", *ENCODERS):
        seen.add(report.weights_of(run, pipe))
        path = run / f"{part}.safetensors"
        path.write_bytes(path.read_bytes() + b" ")
    assert len(seen | {report.weights_of(run, pipe)}) == 6


def test_without_flags_a_run_draws_what_help_says(run, monkeypatch):
    monkeypatch.setattr(report, "draw_folder", lambda pipe, jobs, *_: jobs)
    args = report.parse(["--run", str(run), "--device", "cpu", "--seed", "5"])
    jobs = report.prepare(args).jobs
    assert len(jobs) == 600 and jobs == evaluate.requests(25, seed=5)
    assert (args.steps, args.guidance) == (20, 3) and report.parse(["--run", "x"]).seed == 0


def test_the_towers_that_are_given_score_and_not_the_runs(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit):
        command("--run", run, "--clip", tmp_path / "other", "--measures", "clip", "--device", "cpu")
    assert f"{tmp_path / 'other'} holds no CLIP" in capsys.readouterr().err


# --- Folders that others filled ---------------------------------------------------------------------------

def test_one_corrupt_picture_among_many_is_skipped_counted_and_named(tmp_path, capsys):
    jobs = gallery(tmp_path, 5, 4)
    bad = metrics.picture_path(tmp_path, jobs[33])
    bad.write_bytes(bad.read_bytes()[:200])
    start = time.process_time()
    command("--images", tmp_path)
    assert time.process_time() - start < 20
    told, out = scores(tmp_path), capsys.readouterr().out
    assert told["score"]["overall"] == told["strict"]["overall"] == 1 and len(told["records"]) == 119
    name = bad.relative_to(tmp_path).as_posix()
    assert [n for n, _ in told["skipped"]] == [name] and name in out and "1 skipped in all" in out


def test_foreign_metadata_is_skipped_with_its_class_and_never_scored(tmp_path, capsys):
    gallery(tmp_path, 2, 1)
    write_json(tmp_path / "00001" / "metadata.jsonl", metrics.geneval_prompts()[0])
    (tmp_path / "10000" / "metadata.jsonl").unlink()
    command("--images", tmp_path)
    told = scores(tmp_path)
    assert len(told["records"]) == 10 and told["score"]["overall"] == 1
    assert told["skipped"] == [["10000/metadata.jsonl", "missing; its pictures are not scored"],
                               ["00001/samples/00000.png", "unknown class 'bench'"]]
    assert "unknown class 'bench'" in capsys.readouterr().out


def test_metadata_may_leave_out_an_empty_exclude_as_genevals_does(tmp_path):
    for job in gallery(tmp_path, 2, 1):
        path = tmp_path / f"{job.number:05d}" / "metadata.jsonl"
        write_json(path, {k: v for k, v in job.metadata.items() if v and k != "unseen"})
    command("--images", tmp_path)
    assert scores(tmp_path)["score"]["overall"] == 1 and not scores(tmp_path)["skipped"]


def test_too_few_tasks_are_said_to_be_too_few_and_oblong_pictures_are_skipped(tmp_path, capsys):
    jobs = gallery(tmp_path, 2, 1)
    for job in jobs:
        if job.metadata["tag"] in ("counting", "position"):
            shutil.rmtree(metrics.picture_path(tmp_path, job).parent.parent)
    Image.new("RGB", (64, 32)).save(metrics.picture_path(tmp_path, jobs[0]))
    command("--images", tmp_path)
    told, out = scores(tmp_path), capsys.readouterr().out
    assert "mean of 4 of the six tasks: no counting, position" in out and told["score"]["overall"] == 1
    assert told["skipped"] == [["00000/samples/00000.png", "not square"]] and len(told["records"]) == 7


def test_large_pictures_of_others_are_scored_as_they_are(tmp_path):
    gallery(tmp_path, 2, 1, size=160)
    command("--images", tmp_path)
    assert scores(tmp_path)["score"]["overall"] == 1


@pytest.mark.parametrize("flags, message", [
    ((), "give --run, --model or --images"), (("--frob",), "see python evaluate.py --help"),
    (("--images", "full", "--run", "x"), "exclude each other"), (("--images", "nowhere"), "is not a folder"),
    (("--images", "empty"), "no such folders"), (("--images", "foreign"), "unknown class 'bench'"),
    (("--images", "full", "--measures", "beauty"), "no measure 'beauty'"),
    (("--images", "full", "--measures", "loss", "--data", "drawn"), "loss needs --run or --model"),
    (("--images", "full", "--measures", "clip"), "clip needs --clip"),
    (("--images", "full", "--measures", "clip", "--clip", "full"), "holds no CLIP"),
    (("--images", "full", "--measures", "memory"), "memory needs --data"),
    (("--images", "full", "--measures", "fid", "--clip", "full"), "fid needs --data"),
    (("--images", "full", "--measures", "fid", "--data", "drawn"), "fid needs --clip"),
    (("--run", "nowhere"), "config.json"), (("--run", "empty"), "config.json"),
    (("--run", "empty", "--pictures", "0"), "at least 1"), (("--run", "empty", "-n", "0"), "at least 1"),
    (("--run", "empty", "--steps", "0"), "at least 1"), (("--run", "empty", "--seed", "-1"), "0 or more"),
    (("--run", "empty", "-n", "few"), "invalid int"),
    (("--model", "empty", "--prompts", "nowhere"), "is not a file"),
    (("--images", "full", "--device", "gpu7"), "device"), (("--run", "list"), "config.json cannot be read"),
    (("--run", "else"), "not a run of train.py"),
    (("--run", "empty", "--guidance", "nan"), "not a number"),
    (("--images", "full", "--out", "file"), "--out"),
    (("--images", "full", "--measures", "memory", "--data", "empty"), "empty")])
def test_bad_input_ends_in_one_line_that_names_the_remedy(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "list").mkdir()
    write_json(tmp_path / "list" / "config.json", [])
    (tmp_path / "else").mkdir()
    write_json(tmp_path / "else" / "config.json", {})
    own, foreign = world.prompts("colors", 1)[0], metrics.geneval_prompts()[0]
    for folder, metadata in (("full", own), ("foreign", foreign)):
        path = tmp_path / folder / "00000" / "samples" / "00000.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(path)
        write_json(tmp_path / folder / "00000" / "metadata.jsonl", metadata)
    with pytest.raises(SystemExit) as stop:
        command(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("evaluate.py: ") and message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/scores.*"))


# --- The page ---------------------------------------------------------------------------------------------

def test_the_sheet_frames_right_pictures_green_and_wrong_ones_red():
    grey = np.full((64, 64, 3), 128, np.uint8)
    records = [{"task": task, "prompt": "a", "correct": ok} for task in "ab" for ok in (True, task == "a")]
    page = np.asarray(report.sheet([grey] * 4, records))
    for name, frames in (("green", 3), ("red", 1)):
        assert (page == world.COLOURS[name]).all(axis=2).sum() == frames * (104 ** 2 - 96 ** 2)


def test_the_sheet_shows_pictures_of_many_prompts_from_the_first_on():
    images = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(20)]
    page = report.sheet(images, [{"task": "a", "prompt": "a", "correct": True}] * 20)
    assert [page.getpixel((128 * j + 60, 60))[0] for j in range(10)] == [20 * j for j in range(10)]


def test_panels_lie_below_one_another_and_a_picture_left_of_its_nearest():
    page = report.stack([Image.new("RGB", (2, 3), "red"), Image.new("RGB", (4, 5), "blue")])
    assert page.size == (4, 8)
    assert (page.getpixel((0, 2)), page.getpixel((3, 3))) == ((255, 0, 0), (0, 0, 255))
    drawn, trained = (torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (50, 90))
    page = report.side_by_side([(drawn, trained, "a", 1.0)])
    assert [page.getpixel((x, 70))[0] for x in (60, 160)] == [50, 90]


def test_matrices_are_darkest_where_the_counts_are():
    nothing = dict.fromkeys(("shape", "colour", "count", "relation"), {})
    page = np.asarray(report.matrices(nothing | {"shape": {"circle": {"circle": 3, "ring": 1}}}))
    for share in (0.75, 0.25):
        ink = int(255 - 175 * share)
        assert (page == (ink, ink, 255)).all(axis=2).sum() > 300
    assert report.matrices(nothing).width == 1


def test_fresh_drawings_are_none_of_the_training_pictures():
    s = report.Subject(None, [], [], [], {"data": "drawn", "size": 64, "seed": 3, "pictures": 40})
    seen, fresh = s.training()[0].images, s.heldout(20)[0].images
    assert not (fresh[:, None] == seen[None]).flatten(2).all(2).any()
