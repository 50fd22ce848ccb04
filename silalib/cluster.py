"""Runs over the machines of a Ray cluster: each run is a task, resubmitted when its worker or machine dies.

A machine that sees the results folder trains there, so that a resubmitted run goes on from its checkpoint. One that
does not sends the record, or the checkpoint of a stopped run, back through Ray, and the driver writes it.
"""

import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import data, runs
from .errors import Damaged, UserError
from .mailbox import Mailbox

DEATHS = 3
"""How many workers or machines may die under a run before it counts as failed."""
LISTEN_SECONDS = 0.5
"""How often a worker asks whether to stop, and the driver what is new."""


@dataclass(frozen=True)
class Ray:
    """Where to submit runs: the address of a Ray cluster, and the GPUs (a fraction is fine) that each run gets.

    address None: the cluster of RAY_ADDRESS or the one started on this machine, else one is started for the time.
    gpus_per_run None: one where the cluster has GPUs and the device is not the CPU.
    """

    address: str | None = None
    gpus_per_run: float | None = None

    def __call__(self, pending, job, workers, stopped, progress):
        """Outcomes of the runs, as `launch.in_workers` has them; `workers` of them at a time, or None for all."""
        ray = installed()
        with connected(ray, self.address), mark(job.folder) as marker:
            resources = ray.cluster_resources()
            progress.line(
                f"Ray: {sum(node['Alive'] for node in ray.nodes())} machines, {resources.get('CPU', 0):g} CPU cores, "
                f"{resources.get('GPU', 0):g} GPUs"
            )
            gpus = self.gpus_per_run
            if gpus is None:
                gpus = 1 if resources.get("GPU") and job.device != "cpu" else 0
            if gpus > resources.get("GPU", 0):
                raise UserError(f"{gpus:g} GPUs a run, but the cluster has {resources.get('GPU', 0):g}")
            return follow(ray, pending, job, workers, stopped, progress, marker, gpus)


def installed():
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed: pip install -c constraints.txt -e '.[cluster]'") from None
    return ray


@contextmanager
def connected(ray, address):
    """Join the cluster, unless this process has done so; leave it at the end."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address and (place := re.fullmatch(r"([\w.-]+):(\d+)", address)):  # Ray itself would try for minutes
            socket.create_connection((place[1], int(place[2])), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no answer"])[0]
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def mark(folder):
    """A file by which a worker sees whether the results folder is the driver's."""
    marker = folder / f".driver-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): set SILALIB_RESULTS to a folder of yours"
        ) from None
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def follow(ray, pending, job, workers, stopped, progress, marker, gpus):
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .launch import again_without_graph, settle

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    once = {"max_calls": 1} if gpus else {}  # no process trains on a GPU after another's graph has failed in it
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=DEATHS, **once)(train)
    environment = {k: os.environ[k] for k in ("SILALIB_RESULTS", "SILALIB_DATA") if k in os.environ}
    environment = {k: str(Path(v).absolute()) for k, v in environment.items()}
    waiting, futures, outcomes, eager = list(pending), {}, {}, set()
    while waiting or futures:
        if stopped.is_set():
            waiting.clear()
            ray.get(mailbox.stop.remote())
        while waiting and len(futures) < (workers or len(pending)):
            run = waiting.pop(0)
            left = [job.folder / run.key / name for name in (*runs.CHECKPOINTS, "failed.json")]
            left = {path.name: path.read_bytes() for path in left if path.exists()}
            own = replace(job, graphs=job.graphs and run not in eager)
            futures[task.remote(own, run, environment, marker, left, mailbox)] = run
        done, _ = ray.wait(list(futures), timeout=LISTEN_SECONDS) if futures else ([], [])
        hand_on(ray.get(mailbox.collect.remote()), progress)
        for future in done:
            run = futures.pop(future)
            outcomes[run] = outcome(ray, future, run, job.folder / run.key)
            if again := again_without_graph(run, outcomes, progress):
                eager |= again
                waiting[:0] = again
                continue
            settle(run, outcomes[run], progress, stopped)
    return outcomes


def hand_on(messages, progress):
    for message in messages:
        progress.message(**message)


def outcome(ray, future, run, folder):
    """What became of a run, in words or as an exception; files that came with it are written."""
    try:
        result, files = ray.get(future)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        return UserError(f"{run}: its worker died {DEATHS + 1} times, maybe out of memory; start again to go on")
    if files:
        try:
            write(files, run, folder)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{run}: cannot write its record: {error}")
    return result


def write(files, run, folder):
    """Write a run's files that a worker sent, result.json last: with it the record is whole."""
    with runs.lock(folder, wait=lambda: True):
        if isinstance(damaged := runs.damage(run), Damaged):
            runs.set_aside(damaged)
        for name in sorted(files, key=lambda name: name == "result.json"):
            runs.write_atomically(folder / name, files[name])
        runs.remove_leftovers(folder, but=files)


def train(job, run, environment, marker, left, mailbox):
    """On a worker: train one run. Returns its outcome, and its files where the driver cannot see them."""
    import ray

    from .launch import attempt

    os.environ |= environment
    asked, answer = 0.0, False

    def stopped():
        nonlocal asked, answer
        if time.monotonic() - asked > LISTEN_SECONDS:
            asked, answer = time.monotonic(), ray.get(mailbox.is_stopped.remote())
        return answer

    tell = lambda **message: mailbox.tell.remote(message)
    if marker.exists():
        return fetch_and(attempt, job, run, stopped, tell), None
    scratch = Path(tempfile.mkdtemp(prefix="silalib-"))
    try:
        os.environ["SILALIB_RESULTS"] = str(scratch)
        job = replace(job, folder=scratch / job.folder.parent.name / "runs")
        folder = job.folder / run.key
        folder.mkdir(parents=True)
        for name, content in left.items():
            runs.write_atomically(folder / name, content)
        result = fetch_and(attempt, job, run, stopped, tell)
        files = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result, files


def fetch_and(attempt, job, run, stopped, tell):
    try:
        data.fetch(run.dataset)  # this machine may have another data folder than the driver's
    except UserError as error:
        return error
    return attempt(job, run, stopped, tell)
