"""Settings of all tests: one thread, results in a temporary folder, a small run that several tests read."""

import os
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from silalib import data, records
from silalib.experiments import EXHIBITS, Exhibit
from silalib.files import ROOT
from silalib.models import MODELS
from silalib.run import Run
from silalib.training import trainer

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # also for what is started here, and for `ensure.share`: more would spin, not help
sys.path.append(str(ROOT / "benchmarks"))  # which tests measure small things with

TINY = {
    "dataset": "digits",
    "nets": ("convnet12",) * 2,
    "method": "sila",
    "width": 0.0625,
    "epochs": 2,
    "train_size": 64,
    "batch_size": 32,
    "milestones": (1,),
    "augment": "crop",
}


COUNTS = Counter()


def train(run, folder, device="cpu", **more):
    """The Record of a run that is trained here and now; arguments as `trainer.train`."""
    return records.write_record(run, folder, *trainer.train(run, folder, device, **more))


def losses(training, steps):
    """Training NLL of every head in each of the next steps of a `trainer.Training`, (steps, C), without evaluations."""
    rows = []
    for i in range(steps):
        epoch, first = divmod(training.step, training.steps_per_epoch)
        if first == 0 or i == 0:
            batches = training.material.epoch(epoch, first, training.steps_per_epoch)
        training.set_step()
        training.captured_update(*next(batches))
        training.step += 1
        rows.append(training.sums[:, 0].clone())
        training.sums.zero_()
    return torch.stack(rows).cpu()


@pytest.fixture
def counts():
    """Counts of faults that were survived, printed at the end."""
    return COUNTS


COSTLY = (
    "cluster", "redraw", "fake_cuda", "torchrun", "contract", "golden", "environments", "strangers", "evidence",
    "trainer", "gpu", "models", "answer", "faults", "claims", "browser", "msdnet", "runs", "prepare", "build", "readme",
    "early_exit", "report", "comparison",
)  # fmt: skip
"""Files whose tests take long, roughly the longest first: processes that each take the next file then end together."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist, which has files of few tests last, whatever these cost


def pytest_collection_modifyitems(items):
    turn = {f"test_{name}": number for number, name in enumerate(COSTLY)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one prints for all
        session.config.workeroutput["counts"] = dict(COUNTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    COUNTS.update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.write_line("faults: " + ", ".join(f"{n} {what}" for what, n in COUNTS.items()))


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """The folder of all records of this test."""
    folder = tmp_path / "results"
    monkeypatch.setenv("SILALIB_RESULTS", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny():
    """tiny(**changes) -> a Run of four steps on 64 digits."""
    return lambda **changes: Run(**TINY | changes)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """(run, folder) of a small SiLa run with every part of a record."""
    run = tiny(noise_images=20, noise_sigmas=2, noise_draws=2, hessian_images=10)
    folder = tmp_path_factory.mktemp("trained") / run.key
    train(run, folder)
    return run, folder


@pytest.fixture
def record(trained, results):
    """The Record of the small run, in this test's own results folder, free to be damaged."""
    run, folder = trained
    shutil.copytree(folder, results / "quick" / "runs" / run.key)
    return records.load(run)


@pytest.fixture(scope="session")
def comparable():
    """comparable(record) -> everything in it that must not depend on when, where and beside what it was trained."""

    def evidence(record):
        files = {name: record.read(name) for name in record.result["files"] if name != "history.csv"}
        history = record.history[[c for c in record.history.columns if "seconds" not in c]].to_csv()
        return files, history, record.heads, (record.path / "run.json").read_bytes()

    return evidence


@pytest.fixture
def own_models():
    """MODELS, to which a test may add networks of its own."""
    with mock.patch.dict(MODELS):
        yield MODELS


@pytest.fixture
def plan():
    """plan(grid) makes a function (profile, seeds) -> runs the only exhibit, "tiny"; a list is one of all profiles."""
    with mock.patch.dict(EXHIBITS, clear=True):

        def only(grid):
            function = grid if callable(grid) else lambda profile="quick", seeds=None: grid
            EXHIBITS["tiny"] = Exhibit("Tiny", function, None)

        yield only


@pytest.fixture
def usual_interrupt():
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored, as in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder, with nothing remembered of another one."""
    monkeypatch.setenv("SILALIB_DATA", str(tmp_path / "data"))
    data.load.cache_clear()
    yield tmp_path / "data"
    data.load.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails; returns the list of what was asked for."""
    asked = []

    def refuse(request, *_, **__):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.fixture
def real_data():
    """real_data(name) -> the data set's Images from SILALIB_DATA; skips where it is not there."""

    def images(name):
        root, folder = os.environ.get("SILALIB_DATA"), data.DATASETS[name].folder
        if not root:
            pytest.skip("SILALIB_DATA is not set")
        if not (Path(root) / folder).is_dir():
            pytest.skip(f"SILALIB_DATA has no folder {folder}")
        return data.load(name)

    return images


@pytest.fixture
def cores():
    """cores(n): until the end of the test this process may use n of its CPU cores, and so may those that it starts; all
    of them as threads, which elsewhere are one."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs to choose its CPU cores")
    before = os.sched_getaffinity(0)
    with mock.patch.dict(os.environ):
        del os.environ["OMP_NUM_THREADS"]
        yield lambda n: os.sched_setaffinity(0, sorted(before)[:n])
    os.sched_setaffinity(0, before)
