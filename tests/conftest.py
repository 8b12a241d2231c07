"""The modules are imported from the repository's root; hypothesis tries few, always the same, examples.

`pytest --hypothesis-profile=thorough` tries many new ones. The whole suite is tested by two processes.
"""
import multiprocessing
import os
import pickle
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when Triton is imported, and PyTorch imports it unasked
# Of small tensors' work more threads would only wait. Sums are rounded in one order.
torch.set_num_threads(1)

from mmdit import MMDiTConfig  # noqa: E402
from vae import VAEConfig  # noqa: E402

# On a GPU each smaller example of a failure is compiled first: the one that was found has to do.
settings.register_profile("default", deadline=None, max_examples=15, derandomize=True, database=None, phases=[
    p for p in Phase if p != Phase.shrink or not torch.cuda.is_available()])
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("default")


# ---------------------------------------------------------------------------------------------- two processes

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Of many files this process and one forked from it take the next, in turn. (As pytest-xdist would with
    `-n 2 --dist loadfile`; but nothing more is installed, and nothing imported twice.) What the other process
    finds is told in the end."""
    files = [list(items) for _, items in groupby(session.items, key=lambda item: item.path)]
    asked = session.config.option
    if (len(files) < 10 or sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2
            or torch.cuda.is_available() or hasattr(session.config, "workerinput")      # xdist's own
            or asked.collectonly or asked.maxfail or asked.usepdb or session.testsfailed):
        return None                                             # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()              # one folder, before there are two
    tickets, desk = os.pipe()                                   # a byte a file: who reads it, tests the file
    os.write(desk, bytes(range(len(files))))
    os.close(desk)
    with tempfile.TemporaryFile() as told:
        beside = multiprocessing.get_context("fork").Process(
            target=work_beside, args=(session.config, files, tickets, told))
        beside.start()
        work(files, tickets)
        beside.join()
        told.seek(0)
        retell(session.config, told)
    if beside.exitcode:
        pytest.exit(f"the second process ended with {beside.exitcode}, in the file named last", returncode=1)
    return True


def work(files, tickets):
    parent = multiprocessing.parent_process()
    mine = (item for number in iter(lambda: os.read(tickets, 1), b"") for item in files[number[0]])
    item = next(mine, None)
    while item and (parent is None or parent.is_alive()):
        following = next(mine, None)                            # tells which fixtures are needed no more
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


def work_beside(config, files, tickets, told):
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(Teller(config, told))
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()                             # into the first process's file
    capture.start_global_capturing()
    work(files, tickets)
    capture.stop_global_capturing()


class Teller:
    """A plugin that writes down what the terminal is to be told."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def write(self, hook, **what):
        pickle.dump((hook, what), self.file)
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid, location):
        self.write("pytest_runtest_logstart", nodeid=nodeid, location=location)

    def pytest_runtest_logreport(self, report):
        self.write("pytest_runtest_logreport", report=self.config.hook.pytest_report_to_serializable(
            config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.write("pytest_runtest_logfinish", nodeid=nodeid, location=location)

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        warning_message.source = None                           # an object: it stays where it is
        self.write("pytest_warning_recorded", warning_message=warning_message, when=when, nodeid=nodeid,
                   location=location)


def retell(config, told):
    with suppress(EOFError):
        while True:
            name, what = pickle.load(told)
            hook = getattr(config.hook, name)
            if "report" in what:
                what["report"] = config.hook.pytest_report_from_serializable(config=config,
                                                                             data=what["report"])
            if hook.is_historic():
                hook.call_historic(kwargs=what)
            else:
                hook(**what)


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


def blank(path):
    """In place of the curves, which take a sixth of so small a run."""
    Path(path).with_name("loss.png").touch()


@pytest.fixture(scope="module")
def miniature():
    """Whole runs take seconds. (Curves are drawn and stages timed in `finished` and in test_faults.py.)"""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr("train.plot_run", blank)
        patch.setattr("train.time_stages", lambda run, parts, todo, stages: dict.fromkeys(todo, 1.0))
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
