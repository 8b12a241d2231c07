"""Claims about the documents: the README's commands run, its list of differences is the code's,
its files exist."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import report
import sample
import train

pytestmark = pytest.mark.usefixtures("miniature")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if kind == "bash"]
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()
            if "python " in line]
SOURCES = [p for p in ROOT.rglob("*.py")
           if "tests" not in p.parts and not any(part.startswith(".") for part in p.parts)]
SMALL = ("--pictures 40 --vae-steps 2 --vae-batch 2 --clip-steps 1 --clip-batch 4 --t5-steps 1 --t5-batch 4 "
         "--flow-steps 2 --flow-batch 4 --preview-every 0 --dtype float32 --device cpu").split()


def words(command):
    return shlex.split(command.split("&&")[-1])[1:]             # without `python`


def test_the_two_commands_of_a_fresh_machine_are_there():
    for command in ("pip install -r requirements.txt && python train.py --tiny",
                    "pip install -r requirements.txt && python -m pytest"):
        assert command in README


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "train.py" in c and "torchrun" not in c}))
def test_training_commands_of_the_readme_run_with_tiny_settings(command, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, *flags = words(command)
    if "DIR" in flags:
        from PIL import Image
        (tmp_path / "DIR").mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64), (60 * i, 90, 90)).save(tmp_path / "DIR" / f"{i}.png")
            (tmp_path / "DIR" / f"{i}.txt").write_text(f"colour {i}", encoding="utf-8")
    if "--resume" in flags:
        shutil.copytree(finished, tmp_path / "runs" / "drawn")
        train.main(flags)
    else:
        kept = {f for f in flags if f.startswith("--")}
        small = [x for pair in zip(SMALL[::2], SMALL[1::2])
                 if pair[0] not in kept or pair[0].endswith("steps") for x in pair]
        train.main(flags + small)                               # the last of two equal flags counts
    assert list(tmp_path.glob("runs/*/mmdit.safetensors"))


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "sample.py" in c}))
def test_sampling_commands_of_the_readme_run(command, finished, tmp_path_factory, monkeypatch, capsys):
    work = tmp_path_factory.getbasetemp() / "readme"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    if not (work / "runs").exists():
        shutil.copytree(finished, work / "runs" / "drawn")
    _, *flags = words(command)
    capsys.readouterr()
    sample.main(flags + ["--steps", "1", "--device", "cpu"])
    assert capsys.readouterr().out.strip().endswith(".png")


# For each file that it is told: what `python FILE` does, but forked from a process that has imported PyTorch
# (and the part that optimizers import), which takes longer than most demos.
FORKS = """
import json, os, runpy, sys, tempfile, matplotlib.pyplot, torch._dynamo
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as said:
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.argv, sys.path[0] = [line.strip()], os.path.dirname(line)
            runpy.run_path(line.strip(), run_name="__main__")
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        print(json.dumps([code, said.read()[-4000:]]), flush=True)
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    with subprocess.Popen([sys.executable, "-c", FORKS], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=tmp_path_factory.mktemp("demos"),
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as forks:
        yield forks


# What demos say that their own assertions do not show.
SAID = {"budget.py": ["counted"], "curate.py": ["nothing to remove"],
        "data.py": ["19 pictures, skipped 07.png ("],
        "checkpoints.py": ["from step 20 to 25", "from step 10 to 25", "went back to step 10"],
        "kernels/int8.py": ["int8"], "metrics.py": ["by the formula"], "muon.py": ["weakest"],
        "prepare.py": ["150 pictures in the cache"], "report.py": ["1 skipped in all"],
        "text_encoders.py": ["passed"], "evaluate.py": ["100.0 %"]}


@pytest.mark.parametrize("command", sorted(
    set(re.findall(r"`(python [\w/]+\.py)`", README.partition("## From a toy")[0]))))
def test_the_demos_of_the_readme_pass(command, forks):
    file = command.split()[-1]
    print(ROOT / file, file=forks.stdin, flush=True)
    code, said = json.loads(forks.stdout.readline())
    assert code == 0 and said and all(words in said for words in SAID.get(file, ())), said


@pytest.mark.parametrize("command", [line.split(" #")[0].strip() for block in re.findall(
    r"^```text\n(.*?)^```", README, re.S | re.M) for line in block.splitlines() if ".py" in line])
def test_commands_that_need_more_than_a_laptop_have_flags_that_exist(command, capsys):
    before, program, flags = command.partition("train.py" if "train.py" in command else "sample.py")
    flags = shlex.split(flags)
    assert before.startswith(("python ", "torchrun ")) and flags
    dry = program == "train.py" and "--dry-run" in flags
    kind = ["cache"] * (flags[0] == "cache") + ["--dry-run"] * dry
    with pytest.raises(SystemExit) as end:
        (train if program == "train.py" else sample).main([*kind, "--help"])
    told = set(re.findall(r"(?<!\S)--[\w-]+", capsys.readouterr().out)) | {"--dry-run"}
    assert end.value.code == 0 and {f for f in flags if f.startswith("--")} <= told


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "evaluate.py" in c}))
def test_scoring_commands_of_the_readme_are_understood(command):
    report.parse(words(command)[1:])


def test_the_readme_lists_every_place_marked_as_different():
    marked = {p.relative_to(ROOT).as_posix(): len(re.findall(r"DIFFERS:", p.read_text(encoding="utf-8")))
              for p in SOURCES}
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \(DIFFERS x (\d+)\)", README, re.M))
    assert {k: str(n) for k, n in marked.items() if n} == listed


def test_every_file_that_the_readme_names_exists():
    for name in set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|png|txt|jsonl|md))`", README)) - {
            "name.png", "name.txt", "captions.jsonl"}:
        assert (ROOT / name).exists() or name in ("loss.png", "heart.png", "scores.png", "scores.txt"), name
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_what_the_readme_finds_of_the_paper_is_where_it_says():
    table = README.partition("## From the paper to the code")[2].partition("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py)`((?:[:,] `\w+`)*)", table)
    assert len(places) > 20
    for file, names in places:
        defined = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(re.findall(r"\w+", names)) <= defined, file


def test_no_function_is_longer_than_75_lines():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 75, (path.name, node.name)
