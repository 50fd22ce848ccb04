"""Train many runs on one machine: one process per worker, stopped cleanly by a signal or a budget."""

import multiprocessing
import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from .. import files, records
from ..errors import CorruptFile, GraphFailed, NoDevice, NoRoom, ProcessSpoilt, Stopped, UserError
from ..training import execution, trainer
from . import torchrun
from .estimate import cost
from .processes import finished, start_worker
from .progress import duration, numbers


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; plain values, so that it can be sent to another process."""

    folder: Path
    device: str
    threads: int = 1
    deadline: float | None = None  # of time.time()
    only_whole: bool = False
    retry: bool = False
    begun: dict = field(default_factory=dict)  # key of a run -> what `trained_alike` says of it
    graphs: bool = True
    train_by: Callable | None = None  # instead of `trainer.train`, or torchrun's

    def late(self):
        return self.deadline is not None and time.time() > self.deadline

    def train(self, run, stopped, tell):
        """Train one run unless another process has done it meanwhile. Returns the outcome in words."""
        folder = self.folder / run.key
        stop = lambda: "stopped" if stopped() else "the budget is used up" if self.late() else None
        if reason := stop():
            raise Stopped(reason)
        with records.lock(folder, wait=lambda: not stop(), message=lambda text: tell(run=run, text=text)):
            damaged = records.damage(run)  # of a record that another process may have written meanwhile
            if isinstance(damaged, CorruptFile):
                tell(run=run, text=f"{files.quarantine(damaged)}: the run is trained again")
            if records.find(run) is None:
                if (failure := records.failure(run)) and not self.retry:
                    raise UserError(f"{run} failed before: {failure['error']}; --retry (retry=True) trains it again")
                (folder / "failed.json").unlink(missing_ok=True)
                train = self.train_by or (torchrun.train if torchrun.size() > 1 else trainer.train)
                left = self.deadline - time.time() if self.deadline and self.only_whole else None
                how = dict(time_limit=left, bf16=self.begun.get(run.key, (None, None))[1], graphs=self.graphs)
                try:
                    result, content = train(run, folder, self.device, stop=stop, progress=tell, **how)
                except trainer.Diverged as error:
                    records.remove_leftovers(folder)  # the checkpoints may hold weights that are lost already
                    records.write_failure(folder, error, epoch=error.epoch, step=error.step, lr=error.lr)
                    raise
                records.write_record(run, folder, result, content)
            record = records.load(run)
        seconds = record.result["provenance"]["seconds"]
        return f"top-1 {numbers(head['top1'] for head in record.heads)} in {duration(seconds)}"


def unlike(kind):
    """Why runs are refused whose block was begun on another kind of device."""
    instead = f"use --device {kind}, or set SILALIB_RESULTS to another folder and train all anew"
    return f"what they are compared with was trained on {kind}; {instead}"


def attempt(job, run, stopped, tell):
    """The outcome of one run: words, or the exception that ended it."""
    try:
        return job.train(run, stopped, tell)
    except UserError as error:
        return error.with_traceback(None)  # which would keep the networks in memory
    except OSError as error:
        return UserError(f"{run}: {error.strerror or error} ({error.filename or 'results folder'})")
    except Exception as error:  # whatever it is, the other runs go on
        if re.search(r"out of memory|ALLOC(ATION)?_FAILED|unable to find an engine", str(error)):
            less = "use fewer --workers or --device cpu"
            return UserError(f"{run}: out of GPU memory at batch size {run.batch_size}: {less}")
        folder = job.folder / run.key
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        with suppress(UserError, OSError):
            records.write_failure(folder, line, traceback=traceback.format_exc())
        text = f"{run}: {line} (an internal error; more in {folder / 'failed.json'})"
        if torchrun.size() > 1:  # the other processes may wait for this one: torchrun ends them when it ends
            raise SystemExit(f"silalib: error: {text}") from None
        spoilt = isinstance(error, torch.AcceleratorError)  # every later call to the GPU fails too
        return ProcessSpoilt(text) if spoilt else UserError(text)


class Schedule:
    """The runs that wait, and the outcomes of those that ended: words, or the exception."""

    def __init__(self, pending, job, stopped, progress):
        self.waiting, self.job, self.stopped, self.progress = list(pending), job, stopped, progress
        self.outcomes, self.eager, self.seconds = {}, set(), {}

    def next(self):
        """(run, job) of the next run to train; None where nothing waits any more, or training was stopped."""
        while self.waiting and not self.stopped.is_set():
            run = self.waiting.pop(0)
            if not self.too_long(run):
                return run, replace(self.job, graphs=self.job.graphs and run not in self.eager)
            self.outcomes[run] = Stopped("it would not end in the budget")
        return None

    def end(self, run, outcome):
        """A run has ended; one whose graph failed is done again without. Returns whether its process may train on."""
        if isinstance(outcome, GraphFailed):
            self.eager.add(run)
            self.waiting.insert(0, run)
            self.progress.message(run=run, text=f"{outcome}: done again without, in another process")
            return False
        self.outcomes[run] = outcome
        if isinstance(outcome, (NoRoom, NoDevice)):  # the other runs have none either
            self.stopped.set()
        if not isinstance(outcome, Exception):
            self.learn(run)
        if not isinstance(outcome, Stopped):
            self.progress.finish(run, f"failed: {outcome}" if isinstance(outcome, Exception) else outcome)
        return not isinstance(outcome, ProcessSpoilt)

    def learn(self, run):
        """Seconds for a unit of a run's `cost`; the slowest run of its first network counts."""
        with suppress(UserError):
            origin = records.load(run).result["provenance"]
            speed = (origin["seconds"] + origin["seconds_final"]) / cost(run)
            self.seconds[run.nets[0]] = max(speed, self.seconds.get(run.nets[0], 0))

    def too_long(self, run):
        """Whether a run is known not to end before the deadline; one that has a checkpoint finds out by itself."""
        if not (self.job.only_whole and self.job.deadline and run.nets[0] in self.seconds):
            return False
        left = self.job.deadline - time.time()
        return records.state(run) == "pending" and self.seconds[run.nets[0]] * cost(run) > left


def in_this_process(schedule, workers=1):
    """Train what waits here, one run after the other, until the process is spoilt; then in a fresh one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(schedule.job.threads)
    try:
        while chosen := schedule.next():
            run, job = chosen
            outcome = attempt(job, run, schedule.stopped.is_set, schedule.progress.message)
            if not schedule.end(run, outcome):
                in_workers(schedule, 1)
    finally:
        torch.set_num_threads(threads)


def in_workers(schedule, workers):
    """Train what waits by processes of their own. When one is spoilt all of them end after their runs, and fresh ones
    go on."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # a step is 5 to 10% faster in large pages
    while schedule.waiting and not schedule.stopped.is_set():
        context = multiprocessing.get_context("spawn")
        messages, places, stop = context.Queue(), context.Queue(), context.Event()
        for place in range(workers):
            places.put(place)
        pool = ProcessPoolExecutor(workers, context, initializer=start, initargs=(messages, places, stop))
        try:
            with pool:
                in_pool(schedule, workers, partial(pool.submit, work), messages, stop.set)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died: out of memory (use fewer workers), or a script that calls ensure() outside "
                "of `if __name__ == '__main__':`; start again to go on"
            ) from None


def in_pool(schedule, workers, submit, messages, stop):
    """Keep so many workers busy until nothing waits or one is spoilt, and hand on what they say by `messages`.

    submit(job, run) -> the future outcome; stop() asks all workers to stop.
    """
    futures, sound = {}, True

    def tick():
        if schedule.stopped.is_set():
            stop()
        while not messages.empty():
            schedule.progress.message(**messages.get())

    def fill():
        while sound and len(futures) < workers and (chosen := schedule.next()):
            run, job = chosen
            futures[submit(job, run)] = run

    try:
        fill()
        for future, run in finished(futures, schedule.stopped, tick):
            sound = schedule.end(run, future.result()) and sound
            fill()
        tick()
    finally:
        stop()


busy = threading.Lock()


def start(messages, places, stop):
    """In a new worker: how it hears and is heard, and its place, from 0, which chooses its GPU."""
    global _messages, _place, _stop
    _messages, _place, _stop = messages, places.get(), stop
    start_worker(busy)


def work(job, run):
    torch.set_num_threads(job.threads)
    stopped = lambda: _stop.is_set() or not multiprocessing.parent_process().is_alive()
    with busy:
        job = replace(job, device=own_gpu(job.device, _place))
        return attempt(job, run, stopped, lambda **message: _messages.put(message))


def own_gpu(name, place):
    """The device of the worker at a place: with several GPUs and none of them named they are taken in turn."""
    device = execution.pick_device(name)
    if device.type != "cuda" or device.index is not None:
        return name
    return f"cuda:{place % torch.cuda.device_count()}"
