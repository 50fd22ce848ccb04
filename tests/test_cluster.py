"""Runs on a Ray cluster of two machines, both of them here."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from unittest import mock

import pytest
from conftest import train as trained

from silalib.__main__ import main
from silalib.errors import Stopped, UserError
from silalib.files import ROOT
from silalib.launch.ensure import ensure, train_all
from silalib.launch.progress import Progress
from silalib.launch.ray_cluster import in_cluster
from silalib.launch.workers import Job, Schedule
from silalib.records import failure, load, state, write_failure
from silalib.training import checkpoint, trainer
from silalib.training.checkpoint import CHECKPOINTS

PRESENT = importlib.util.find_spec("ray") is not None or "SILALIB_NEEDS_RAY" in os.environ
needs_ray = pytest.mark.skipif(not PRESENT, reason="Ray is not installed: pip install -e '.[cluster]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's warnings are not ours to mend


@pytest.fixture(scope="module")
def two_machines():
    """A Ray cluster with one CPU core on each of two nodes, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0"):
        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        machines.add_node(num_cpus=1)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(address=machines.address, log_to_driver=False)
        yield machines
        ray.shutdown()
        machines.shutdown()


def on_ray(runs, train_by=None, shared=True):
    """As `ensure` does it; train_by trains on the workers."""
    train_all(runs, "quick", "cpu", ray=partial(in_cluster, shared=shared), train_by=train_by)


def watched(folder, key, last):
    """A training that notes every step in steps.txt and saves after it; after one step of a run, before that is saved,
    it kills its process, as a crash would, once."""

    def train(run, place, device, *, stop, progress, **how):
        steps = [0]

        def tell(**message):
            steps[0] = message["step"] if message.get("resumed") else steps[0]
            progress(**message)

        def ask():
            with open(folder / "steps.txt", "a") as file:
                file.write(f"{run.key} {steps[0]}\n")
            if (run.key, steps[0]) == (key, last) and not (sent := folder / "sent").exists():
                sent.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            steps[0] += 1
            return stop()

        return trainer.train(run, place, device, stop=ask, progress=tell, checkpoint_seconds=0, **how)

    return train


def interrupting(folder):
    """A training at whose first beginning the driver is interrupted."""
    (folder / "sent").unlink(missing_ok=True)

    def train(run, place, device, *, stop, **how):
        if not (folder / "sent").exists():
            (folder / "sent").touch()
            os.kill(driver, signal.SIGINT)
        return trainer.train(run, place, device, stop=stop, **how)

    driver = os.getpid()
    return train


def grid(tiny, seeds=3):
    return [tiny(seed=seed, epochs=1) for seed in range(seeds)]


@needs_ray
@pytest.mark.long
def test_a_killed_workers_run_is_resumed_and_nothing_trained_twice(
    two_machines, tiny, results, comparable, tmp_path, capsys
):
    """The step after which it is killed was not saved: it is trained again, all others once."""
    runs = [tiny(seed=seed, epochs=2) for seed in range(3)]
    on_ray(runs, watched(tmp_path, runs[1].key, 2))
    assert (tmp_path / "sent").exists()
    steps = sorted((tmp_path / "steps.txt").read_text().splitlines())
    assert steps == sorted([f"{run.key} {step}" for run in runs for step in range(4)] + [f"{runs[1].key} 2"])
    printed = capsys.readouterr().err
    assert "Ray: 2 machines, 2 CPU cores, 0 GPUs" in printed
    assert f"{runs[1]}: goes on after epoch 1.0 of 2" in printed
    assert "3/3 runs, " in printed
    for run in runs:  # and what one process gives
        assert comparable(load(run)) == comparable(trained(run, tmp_path / run.key))
        assert not list(load(run).path.glob("*.pt"))


@needs_ray
@pytest.mark.long
def test_without_a_shared_folder_a_killed_workers_run_begins_again(two_machines, tiny, results, tmp_path, capsys):
    run = tiny()
    on_ray([run], watched(tmp_path, run.key, 2), shared=False)
    steps = [int(line.split()[1]) for line in (tmp_path / "steps.txt").read_text().splitlines()]
    assert steps == [0, 1, 2, 0, 1, 2, 3]
    assert state(run) == "done" and "goes on" not in capsys.readouterr().err


@needs_ray
@pytest.mark.long
def test_a_damaged_record_is_trained_again_without_a_shared_folder(two_machines, tiny, results, comparable, tmp_path):
    (run,) = grid(tiny, 1)
    folder = results / "quick" / "runs" / run.key
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(b"damaged")
    on_ray([run], shared=False)
    assert load(run).path == folder
    assert (folder / "result.json.corrupt").read_bytes() == b"damaged"
    assert comparable(load(run)) == comparable(trained(run, tmp_path / run.key))


@needs_ray
@pytest.mark.long
def test_a_stopped_run_brings_its_checkpoint_without_a_shared_folder(
    two_machines, tiny, results, tmp_path, usual_interrupt, capsys
):
    """And goes on from the one before it where that is damaged."""
    run, steps = tiny(epochs=5000), []
    latest, previous = (results / "quick" / "runs" / run.key / name for name in CHECKPOINTS)
    for _ in range(2):
        with pytest.raises(Stopped, match="1 of 1 runs left"):
            on_ray([run], interrupting(tmp_path), shared=False)
        assert state(run) == "started"
        steps.append(checkpoint.read_checkpoint(latest, "cpu")["step"])
        latest.replace(previous)
        latest.write_bytes(b"damaged")
    assert 0 < steps[0] < steps[1]
    assert f"{run}: goes on after epoch " in capsys.readouterr().err


@needs_ray
@pytest.mark.long
def test_a_budget_brings_checkpoints_too(two_machines, tiny, results):
    run = tiny(epochs=10**6)
    with pytest.raises(Stopped, match="1 of 1 runs left"):
        train_all([run], "quick", "cpu", budget=30, ray=partial(in_cluster, shared=False))
    assert state(run) == "started"


@needs_ray
def test_a_failing_run_does_not_stop_the_others(two_machines, tiny, capsys):
    good, bad = tiny(epochs=1), tiny(lr=1e6)
    with pytest.raises(UserError, match=r"1 of 2 runs failed, the first: .*not finite"):
        ensure([good, bad], device="cpu", backend="ray")
    assert (state(good), state(bad)) == ("done", "failed")


@needs_ray
@pytest.mark.long
def test_a_failure_comes_back_without_a_shared_folder(two_machines, tiny, results, capsys):
    earlier, now = tiny(lr=1e6), tiny(lr=1e7)
    (results / "quick" / "runs" / earlier.key).mkdir(parents=True)
    write_failure(results / "quick" / "runs" / earlier.key, "a bad kernel")
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        on_ray([earlier, now], shared=False)
    assert f"{earlier} failed before: a bad kernel" in capsys.readouterr().err
    assert failure(earlier)["error"] == "a bad kernel"
    assert (failure(now)["epoch"], failure(now)["lr"]) == (1, 1e7)


@needs_ray
@pytest.mark.long
def test_an_internal_error_on_a_worker_is_told_with_its_traceback(two_machines, tiny, results, capsys):
    def fails(*arguments, **how):
        raise RuntimeError("a bad kernel\nand more")

    run = tiny()
    with pytest.raises(UserError, match=r"RuntimeError: a bad kernel \(an internal error; more in "):
        on_ray([run], fails)
    assert "in fails" in failure(run)["traceback"] and "and more" not in capsys.readouterr().err


@needs_ray
def test_a_block_begun_on_another_kind_of_device_is_refused_on_the_worker(two_machines, tiny, results, capsys):
    run = tiny()
    job = Job(results / "quick" / "runs", "cpu", begun={run: ("cuda", True)})
    schedule = Schedule([run], job, threading.Event(), Progress({run: 1.0}))
    in_cluster(schedule, 1)
    assert f"{run}: what they are compared with was trained on cuda; use --device cuda" in str(schedule.outcomes[run])


@needs_ray
def test_a_signal_stops_the_workers(two_machines, tiny, tmp_path, usual_interrupt, capsys):
    runs = [tiny(seed=seed, epochs=5000) for seed in range(3)]
    with pytest.raises(Stopped, match="stopped with 3 of 3 runs left"):
        on_ray(runs, interrupting(tmp_path))
    assert "started" in {state(run) for run in runs}


@needs_ray
def test_more_gpus_than_there_are(two_machines, tiny):
    with pytest.raises(UserError, match=r"0.5 GPUs a run, but the cluster has 0"):
        ensure(grid(tiny, 1), backend="ray", gpus_per_run=0.5)


@needs_ray
def test_no_cluster_at_the_address(results):
    command = [sys.executable, "-m", "silalib", "train", "fig6", "--backend", "ray", "--ray-address", "127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "silalib: error: no Ray cluster at 127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_one_line_says_how_to_install_it(tiny, capsys):
    with mock.patch.dict(sys.modules, ray=None):
        assert main(["train", "fig6", "--backend", "ray"]) == 1
    error = capsys.readouterr().err
    assert (
        error
        == "silalib: error: ray is not installed: in the checkout, pip install -c constraints.txt -e '.[cluster]'\n"
    )


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
