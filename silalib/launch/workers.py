"""Train many runs on one machine: one process per worker, stopped cleanly by a signal or a budget."""

import math
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from .. import files, records
from ..errors import CorruptFile, GraphFailed, NoDevice, NoRoom, ProcessSpoilt, Stopped, UserError
from ..training import trainer
from . import torchrun
from .estimate import cost
from .processes import finished
from .progress import duration, numbers

UNLIKE = "what they are compared with was trained on {0}; use --device {0}, or another SILALIB_RESULTS for all"


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; plain values, so that it can be sent to another process."""

    folder: Path
    device: str
    threads: int = 1
    deadline: float = math.inf  # of time.time()
    begun: dict = field(default_factory=dict)  # run -> what `trained_alike` says of it
    only_whole: bool = False
    retry: bool = False
    graphs: bool = True
    train_by: Callable | None = None  # in place of `trainer.train`

    def train(self, run, stopped, tell):
        """Train one run unless another process has done it meanwhile. Returns the outcome in words."""
        folder, profile = self.folder / run.key, self.folder.parent.name
        stop = lambda: "stopped" if stopped() else "the budget is used up" if time.time() > self.deadline else None
        if reason := stop():
            raise Stopped(reason)
        with records.lock(folder, wait=lambda: not stop(), message=lambda text: tell(run=run, text=text)):
            damaged = records.damage(run, profile=profile)  # of what another process may have written meanwhile
            if (again := isinstance(damaged, CorruptFile)) and damaged.path.parent == folder:
                tell(run=run, text=f"{files.quarantine(damaged)}: the run is trained again")
            if again or records.find(run) is None:
                if (failure := records.failure(run)) and not self.retry:
                    raise UserError(f"{run} failed before: {failure['error']}; --retry (retry=True) trains it again")
                (folder / "failed.json").unlink(missing_ok=True)
                train = self.train_by or (torchrun.train if torchrun.size() > 1 else trainer.train)
                left = self.deadline - time.time() if self.only_whole else None
                how = dict(time_limit=left, bf16=self.begun.get(run, (None, None))[1], graphs=self.graphs)
                try:
                    made = train(run, folder, self.device, stop=stop, progress=tell, **how)
                except trainer.Diverged as error:
                    records.remove_leftovers(folder)  # the checkpoints may hold weights that are lost already
                    records.write_failure(folder, error, epoch=error.epoch, step=error.step, lr=error.lr)
                    raise
                records.write_record(run, folder, *made)
            record = records.load(run, profile=profile)
        accuracy = numbers(head["top1"] for head in record.heads)
        return f"top-1 {accuracy} in {duration(record.result['provenance']['seconds'])}"


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
            how = "use fewer --workers or --device cpu"
            return UserError(f"{run}: out of GPU memory at batch size {run.batch_size}: {how}")
        folder, line = job.folder / run.key, f"{type(error).__name__}: {error}".strip().splitlines()[0]
        with suppress(UserError, OSError):
            records.write_failure(folder, line, traceback=traceback.format_exc())
        text = f"{run}: {line} (an internal error; more in {folder / 'failed.json'})"
        if torchrun.size() > 1:  # the other processes may wait for this one: torchrun ends them when it ends
            raise SystemExit(f"silalib: error: {text}") from None
        return (ProcessSpoilt if isinstance(error, torch.AcceleratorError) else UserError)(text)


class Schedule:
    """The runs that wait, and the outcomes of those that ended: words, or the exception."""

    def __init__(self, pending, job, stopped, progress):
        self.waiting, self.job, self.stopped, self.progress = list(pending), job, stopped, progress
        self.outcomes, self.eager = {}, set()
        self.seconds = Counter()  # of a unit of cost: network -> those of the slowest run

    def next(self):
        """(run, job) of the next run to train; None where nothing waits any more, or training was stopped."""
        while self.waiting and not self.stopped.is_set():
            run = self.waiting.pop(0)
            late = self.job.only_whole and time.time() + self.seconds[run.nets[0]] * cost(run) > self.job.deadline
            if not late or records.state(run) != "pending":  # one that has a checkpoint finds out by itself
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
            with suppress(UserError):
                origin, net = records.load(run).result["provenance"], run.nets[0]
                speed = (origin["seconds"] + origin["seconds_final"]) / cost(run)
                self.seconds[net] = max(speed, self.seconds[net])
        if not isinstance(outcome, Stopped):
            self.progress.finish(run, f"failed: {outcome}" if isinstance(outcome, Exception) else outcome)
        return not isinstance(outcome, ProcessSpoilt)


def in_this_process(schedule, workers=1):
    """Train what waits here, one run after the other, until the process is spoilt; then in a fresh one."""
    with ExitStack() as at_end:
        at_end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(schedule.job.threads)
        while chosen := schedule.next():
            run, job = chosen
            if not schedule.end(run, attempt(job, run, schedule.stopped.is_set, schedule.progress.message)):
                in_workers(schedule, 1)


def in_workers(schedule, workers):
    """Train what waits by processes of their own; once one is spoilt all end after their runs, and fresh ones go on."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # a step is 5 to 10% faster in large pages
    context = multiprocessing.get_context("spawn")
    while schedule.waiting and not schedule.stopped.is_set():
        try:
            messages, places, stop = context.Queue(), context.Queue(), context.Event()
            for place in range(workers):
                places.put(place)
            with ProcessPoolExecutor(workers, context, start, (messages, places, stop)) as pool:
                in_pool(schedule, workers, partial(pool.submit, work), messages, stop.set)
        except BrokenProcessPool:
            why = "out of memory (use fewer workers), or ensure() is called outside of `if __name__ == '__main__':`"
            raise UserError(f"a worker process died: {why}; start again to go on") from None
        except OSError as error:  # of semaphores; those of a run are its outcome
            how = "make /dev/shm writable, or use --workers 1"
            raise UserError(f"no shared memory for worker processes ({error.strerror or error}): {how}") from None


def in_pool(schedule, workers, submit, messages, stop):
    """Keep so many workers busy until nothing waits or one is spoilt; submit(job, run) -> the future outcome."""
    futures, sound = {}, True

    def tick():
        if schedule.stopped.is_set():
            stop()
        while not messages.empty():
            schedule.progress.message(**messages.get())
        while sound and len(futures) < workers and (chosen := schedule.next()):
            run, job = chosen
            futures[submit(job, run)] = run

    try:
        for future, run in finished(futures, schedule.stopped, tick):
            sound = schedule.end(run, future.result()) and sound
    finally:
        stop()


def start(messages, places, stop):
    """In a new worker: its place, from 0, chooses its GPU; signals are left to the main process, with which it ends."""

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # at any moment: the run resumes from its last checkpoint

    global _messages, _place, _stop
    _messages, _place, _stop = messages, places.get(), stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def work(job, run):
    torch.set_num_threads(job.threads)
    job = replace(job, device=torchrun.own_gpu(job.device, _place))
    return attempt(job, run, _stop.is_set, lambda **message: _messages.put(message))
