"""Runs on a Ray cluster of two machines, both of them here."""

import importlib.util
import os
import signal
import sys
from dataclasses import dataclass

import pytest

from silalib import cluster, launch, trainer
from silalib.__main__ import main
from silalib.errors import Stopped, UserError
from silalib.paths import ROOT
from silalib.runs import CHECKPOINTS, ensure, failure, state, write_failure

PRESENT = importlib.util.find_spec("ray") is not None or "SILALIB_NEEDS_RAY" in os.environ
needs_ray = pytest.mark.skipif(not PRESENT, reason="Ray is not installed: pip install -e '.[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's warnings are not ours to mend


@pytest.fixture(scope="module")
def two_machines():
    """A Ray cluster with one CPU core on each of two nodes, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        machines.add_node(num_cpus=1)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(address=machines.address, log_to_driver=False)
        yield machines
        ray.shutdown()
        machines.shutdown()


@dataclass(frozen=True)
class Watched(launch.Job):
    """Notes every step in steps.txt beside the runs; `die` ends the worker, as a crash would, in one step of a run."""

    die: tuple = (None, None)

    def train(self, run, stopped, tell):
        step, notes = trainer.Training.one_step, self.folder / "steps.txt"

        def one_step(training, *batch):
            with open(notes, "a") as file:
                file.write(f"{training.run.key} {training.step}\n")
            if (training.run.key, training.step) == self.die and not (died := self.folder / "died").exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            step(training, *batch)

        trainer.Training.one_step, before = one_step, trainer.CHECKPOINT_SECONDS
        trainer.CHECKPOINT_SECONDS = 0
        try:
            return super().train(run, stopped, tell)
        finally:
            trainer.Training.one_step, trainer.CHECKPOINT_SECONDS = step, before


def watched(monkeypatch, die=(None, None)):
    monkeypatch.setattr(launch, "Job", lambda *args, **more: Watched(*args, **more, die=die))


def interrupt(monkeypatch):
    """SIGINT to the driver when it hears of a run for the first time."""
    hand_on, heard = cluster.hand_on, []

    def and_interrupt(messages, progress):
        hand_on(messages, progress)
        if messages and not heard:
            heard.extend(messages)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cluster, "hand_on", and_interrupt)


def grid(tiny, seeds=3):
    return [tiny(seed=seed, epochs=1) for seed in range(seeds)]


@needs_ray
def test_a_killed_workers_run_is_resumed_and_nothing_trained_twice(
    two_machines, tiny, results, monkeypatch, comparable, tmp_path, capsys
):
    """Its step 1 was not saved: it is begun again, all others are trained once."""
    runs = [tiny(seed=seed, epochs=2) for seed in range(3)]
    watched(monkeypatch, die=(runs[1].key, 2))
    records = ensure(runs, device="cpu", backend="ray")
    assert list(records) == runs
    folder = results / "quick" / "runs"
    assert (folder / "died").exists()
    steps = sorted((folder / "steps.txt").read_text().splitlines())
    assert steps == sorted([f"{run.key} {step}" for run in runs for step in range(4)] + [f"{runs[1].key} 2"])
    printed = capsys.readouterr().err
    assert "Ray: 2 machines, 2 CPU cores, 0 GPUs" in printed
    assert f"{runs[1]}: goes on after epoch 1.0 of 2" in printed
    assert "3/3 runs, " in printed
    assert not list(folder.glob(".driver-*"))
    for run, record in records.items():  # and what one process gives
        assert comparable(record) == comparable(trainer.train(run, tmp_path / run.key, "cpu"))


@needs_ray
def test_without_a_shared_folder_records_come_through_ray(
    two_machines, tiny, results, monkeypatch, comparable, tmp_path
):
    monkeypatch.setattr(cluster.Path, "touch", lambda path: None)  # no worker sees the driver's mark
    (run,) = grid(tiny, 1)
    folder = results / "quick" / "runs" / run.key
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(b"damaged")
    (record,) = ensure([run], device="cpu", backend="ray").values()
    assert record.path == folder
    assert (folder / "result.json.corrupt").read_bytes() == b"damaged"
    assert comparable(record) == comparable(trainer.train(run, tmp_path / run.key, "cpu"))


@needs_ray
def test_a_stopped_run_brings_its_checkpoint_without_a_shared_folder(
    two_machines, tiny, results, monkeypatch, usual_interrupt, capsys
):
    monkeypatch.setattr(cluster.Path, "touch", lambda path: None)
    """And goes on from the one before it where that is damaged."""
    run, steps = tiny(epochs=5000), []
    latest, previous = (results / "quick" / "runs" / run.key / name for name in CHECKPOINTS)
    for _ in range(2):
        interrupt(monkeypatch)
        with pytest.raises(Stopped, match="1 of 1 runs left"):
            ensure([run], device="cpu", backend="ray")
        assert state(run) == "started"
        steps.append(trainer.read_checkpoint(latest, "cpu")["step"])
        latest.replace(previous)
        latest.write_bytes(b"damaged")
    assert 0 < steps[0] < steps[1]
    assert latest.with_name("checkpoint.pt.corrupt").read_bytes() == b"damaged"
    assert f"{run}: goes on after epoch " in capsys.readouterr().err


@needs_ray
def test_a_failing_run_does_not_stop_the_others(two_machines, tiny, capsys):
    good, bad = tiny(epochs=1), tiny(lr=1e6)
    with pytest.raises(UserError, match=r"1 of 2 runs failed, the first: .*not finite"):
        ensure([good, bad], device="cpu", backend="ray")
    assert (state(good), state(bad)) == ("done", "failed")


@needs_ray
def test_a_failure_comes_back_without_a_shared_folder(two_machines, tiny, results, monkeypatch, capsys):
    monkeypatch.setattr(cluster.Path, "touch", lambda path: None)
    earlier, now = tiny(lr=1e6), tiny(lr=1e7)
    (results / "quick" / "runs" / earlier.key).mkdir(parents=True)
    write_failure(results / "quick" / "runs" / earlier.key, "a bad kernel")
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        ensure([earlier, now], device="cpu", backend="ray")
    assert f"{earlier} failed before: a bad kernel" in capsys.readouterr().err
    assert failure(earlier)["error"] == "a bad kernel"
    assert (failure(now)["epoch"], failure(now)["lr"]) == (1, 1e7)


@needs_ray
def test_a_signal_stops_the_workers(two_machines, tiny, monkeypatch, usual_interrupt, capsys):
    interrupt(monkeypatch)
    runs = [tiny(seed=seed, epochs=5000) for seed in range(3)]
    with pytest.raises(Stopped, match="stopped with 3 of 3 runs left"):
        ensure(runs, device="cpu", backend="ray")
    assert "started" in {state(run) for run in runs}


@needs_ray
def test_more_gpus_than_there_are(two_machines, tiny):
    with pytest.raises(UserError, match=r"0.5 GPUs a run, but the cluster has 0"):
        ensure(grid(tiny, 1), backend="ray", gpus_per_run=0.5)


@needs_ray
def test_no_cluster_at_the_address(monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert main(["train", "fig6", "--backend", "ray", "--ray-address", "127.0.0.1:9"]) == 1
    assert "silalib: error: no Ray cluster at 127.0.0.1:9" in capsys.readouterr().err


def test_without_the_extra_one_line_says_how_to_install_it(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["train", "fig6", "--backend", "ray"]) == 1
    error = capsys.readouterr().err
    assert error == "silalib: error: Ray is not installed: pip install -c constraints.txt -e '.[cluster]'\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backend": "slurm"}, "unknown backend 'slurm': use local or ray"),
        ({"ray_address": "auto"}, "belong to the backend ray"),
        ({"gpus_per_run": 1}, "belong to the backend ray"),
        ({"backend": "ray", "gpus_per_run": -1}, "must be a number from 0, or None, not -1"),
    ],
)
def test_bad_arguments(arguments, message, tiny):
    with pytest.raises(UserError, match=message):
        ensure(grid(tiny, 1), **arguments)
