"""The modules are imported from the repository's root; hypothesis tries few, always the same, examples.

`pytest --hypothesis-profile=thorough` tries many new ones.
"""
import os
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when Triton is imported, and PyTorch imports it unasked
torch.set_num_threads(min(2, torch.get_num_threads()))      # small tensors: more threads only wait

settings.register_profile("default", deadline=None, max_examples=15, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("default")


# of a whole run of a few steps a stage
MICRO = dict(pictures=48, vae_steps=3, vae_batch=4, clip_steps=2, clip_batch=8, t5_steps=2, t5_batch=8,
             flow_steps=6, flow_batch=8, preview_every=0, save_every=2, dtype="float32", device="cpu")


@contextmanager
def single_thread():
    """Inside, sums are rounded in one order only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run, from drawings to transformer, of a few steps a stage; what it said lies beside it in
    said.txt. Tests copy it before they change anything."""
    from train import TrainConfig, train
    folder = tmp_path_factory.mktemp("finished") / "run"
    with single_thread(), open(folder.parent / "said.txt", "w") as said, redirect_stdout(said):
        return train(TrainConfig(**MICRO, out=str(folder)))


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Drawing loss.png takes a sixth of so small a run: in `finished` it is drawn, and in test_faults."""
    if "train" in sys.modules:
        monkeypatch.setattr("train.plot_run", lambda path: None)


@pytest.fixture
def one_thread():
    with single_thread():
        yield


def refuses(call, *words):
    """The call raises CheckpointError, in one line that holds all the words."""
    from checkpoints import CheckpointError     # here: found through the path that is set above
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
