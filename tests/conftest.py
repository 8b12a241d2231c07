"""The modules are imported from the repository's root; hypothesis tries few, always the same, examples.

`pytest --hypothesis-profile=thorough` tries many new ones.
"""
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when Triton is imported, and PyTorch imports it unasked
# Of small tensors' work more threads would only wait. Sums are rounded in one order; demos run meanwhile.
torch.set_num_threads(1)

from mmdit import MMDiTConfig  # noqa: E402
from vae import VAEConfig  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=15, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("default")


# of a whole run of a few steps a stage
MICRO = dict(pictures=48, vae_steps=3, vae_batch=4, clip_steps=2, clip_batch=8, t5_steps=2, t5_batch=8,
             flow_steps=6, flow_batch=8, preview_every=0, save_every=2, dtype="float32", device="cpu")


def shrink(patch, mmdit=MMDiTConfig.preset, vae=VAEConfig.preset):
    """Makes the miniature smaller still, and other transformers as small."""
    less = {"depth": 2, "heads": 2, "head_dim": 16}
    patch.setattr(MMDiTConfig, "preset", lambda name, **changes: mmdit(name, **less | changes))
    patch.setattr(VAEConfig, "preset", lambda name, **changes: vae(
        name, **({"ch": 8, "num_groups": 4} if name == "tiny" else {}) | changes))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run, from drawings to transformer, of a few steps a stage; what it said lies beside it in
    said.txt. Tests copy it before they change anything."""
    import watch
    from train import TrainConfig, train
    folder = tmp_path_factory.mktemp("finished") / "run"
    with (pytest.MonkeyPatch.context() as patch, open(folder.parent / "said.txt", "w") as said,
          redirect_stdout(said)):
        shrink(patch)
        patch.setattr("train.plot_run", watch.plot_run)
        return train(TrainConfig(**MICRO, out=str(folder)))


@pytest.fixture(scope="session", autouse=True)
def ahead(request, tmp_path_factory):
    """{what: what comes of it, later}: the "card" of test_devices.py, "kernels" that test_kernels_aot.py
    compiles, and the README's demos by their commands, as far as they are asked for. They run, one by one,
    beside the tests before them."""
    asked, later = {name for item in request.session.items for name in item.fixturenames}, {}
    with ThreadPoolExecutor(1) as pool:
        def run(*command):
            return pool.submit(subprocess.run, [sys.executable, *map(str, command)], capture_output=True,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               cwd=tmp_path_factory.mktemp("ahead"))

        if "card" in asked:
            later["card"] = run(ROOT / "tests" / "test_devices.py", tmp_path_factory.mktemp("card"))
        if "everything" in asked:
            from test_kernels_aot import compile_all
            later["kernels"] = pool.submit(compile_all, tmp_path_factory.mktemp("kernels"))
        for item in request.session.items:
            if item.name.startswith("test_the_demos_of_the_readme_pass["):
                command = item.callspec.params["command"]
                later[command] = run(ROOT / command.split()[-1])
        yield later
        pool.shutdown(cancel_futures=True)


def blank(path):
    """In place of the curves, which take a sixth of so small a run."""
    Path(path).with_name("loss.png").touch()


@pytest.fixture(scope="module")
def miniature():
    """Whole runs take seconds. (Curves are drawn in `finished` and in test_faults.py.)"""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr("train.plot_run", blank)
        yield


def names_of(cache):
    """The pictures of a prepare.Cache, by number, as its files name them."""
    from run_folder import about_of
    return [name for file in cache.files["latents"] for name in about_of(cache.folder / file)["names"]]


def pickled():
    """What makes a folder of the name "unpickled", if anything unpickles it."""
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("unpickled",)
    return pickle.dumps(Payload())


def refuses(call, *words):
    """The call raises CheckpointError, in one line that holds all the words."""
    from tensor_files import CheckpointError    # here: found through the path that is set above
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
