"""Runs over the machines of a Ray cluster: each is a task, resubmitted when its worker or machine dies.
The driver holds a run's lock and writes its record. Checkpoints lie in the results folder where the worker sees it, so
that a resubmitted run resumes; else in the worker's scratch folder, from which those of a stopped run come back."""

import os
import re
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from .. import data
from ..errors import Stopped, UserError, missing_extra
from ..files import write_atomically
from ..training import execution, trainer
from ..training.checkpoint import CHECKPOINTS
from .workers import UNLIKE, attempt, in_pool

RETRIES, LISTEN_SECONDS = 3, 0.5  # after a worker or node died; how often a worker asks whether to stop


def in_cluster(schedule, workers, address=None, gpus_per_run=None, shared=True):
    """Train what waits in the schedule on a Ray cluster; `workers` runs at a time, or None for all.
    address None: the cluster of RAY_ADDRESS or the one started on this machine, else one is started for the time.
    gpus_per_run may be a fraction: by default one where the cluster has GPUs and the device is not the CPU.
    shared: False where no worker sees the results folder; by default each finds out."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    with ExitStack() as at_end:
        if not ray.is_initialized():
            at_end.callback(ray.shutdown)
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                if place := re.fullmatch(r"([\w.-]+):(\d+)", address or ""):  # Ray itself would try for minutes
                    socket.create_connection((place[1], int(place[2])), timeout=5).close()
                ray.init(address, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or ["no answer"])[0]
                raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
        machines = sum(node["Alive"] for node in ray.nodes())
        cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
        schedule.progress.line(f"Ray: {machines} machines, {cpus:g} CPU cores, {gpus:g} GPUs")
        each = (gpus > 0 and schedule.job.device != "cpu") if gpus_per_run is None else gpus_per_run
        if each > gpus:
            raise UserError(f"{each:g} GPUs a run, but the cluster has {gpus:g}")
        submit_all(ray, schedule, workers or len(schedule.waiting), float(each), shared)


def submit_all(ray, schedule, workers, gpus, shared):
    """A thread of the driver for each run under way does all but the training, and waits for the task that does."""
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages, stops = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(train)  # Ray ends a process that had a GPU
    data_folder = os.environ.get("SILALIB_DATA") and str(Path(os.environ["SILALIB_DATA"]).absolute())

    def by_task(run, folder, device, *, stop, progress, **how):
        lock = (folder / ".lock").stat().st_ino if shared else None
        place = folder.absolute(), lock, saved_in(folder), data_folder
        try:
            result, files = ray.get(task.remote(schedule.job, run, place, device, how, messages, stops))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            died = f"its worker died {RETRIES + 1} times, maybe out of memory ({type(error).__name__})"
            raise UserError(f"{run}: {died}; start again to go on") from None
        if isinstance(result, Stopped):
            for name, content in files.items():
                write_atomically(folder / name, content)
            raise result
        return result, files

    tell, stopped = (lambda **message: messages.put(message)), schedule.stopped.is_set
    submit = lambda job, run: pool.submit(attempt, replace(job, train_by=by_task), run, stopped, tell)
    with ThreadPoolExecutor(workers) as pool:
        in_pool(schedule, workers, submit, messages, lambda: stops.empty() and stops.put(True))


def saved_in(folder):
    return {name: (folder / name).read_bytes() for name in CHECKPOINTS if (folder / name).exists()}


def train(job, run, place, device, how, messages, stops):
    """On a worker: (result, files) of a run, or (Stopped, its checkpoints where the driver does not see them)."""
    folder, lock, saved, data_folder = place
    os.environ |= {"SILALIB_DATA": data_folder} if data_folder else {}
    kind = job.begun.get(run, (None, None))[0]
    if kind not in (None, execution.pick_device(device).type):
        raise UserError(f"{run}: {UNLIKE.format(kind)}")
    data.download(run.dataset)  # this machine may have another data folder than the driver's
    torch.set_num_threads(job.threads)
    asked, answer, tell = 0.0, None, lambda **message: messages.put(message)

    def stop():
        nonlocal asked, answer
        if time.time() - asked > LISTEN_SECONDS:
            asked = time.time()
            answer = "stopped" if asked > job.deadline or not stops.empty() else None
        return answer

    shared = (folder / ".lock").exists() and (folder / ".lock").stat().st_ino == lock
    with tempfile.TemporaryDirectory(prefix="silalib-") as scratch:
        if not shared:
            folder = Path(scratch)
            for name, content in saved.items():
                (folder / name).write_bytes(content)
        try:
            return (job.train_by or trainer.train)(run, folder, device, stop=stop, progress=tell, **how)
        except Stopped as error:
            return error.with_traceback(None), {} if shared else saved_in(folder)
