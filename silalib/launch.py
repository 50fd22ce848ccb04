"""Train many runs on one machine: one process per worker, stopped cleanly by a signal or a budget."""

import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from . import data, experiments, runs, speed, torchrun, trainer
from .errors import Damaged, GraphFailed, MissingData, NoDevice, NoRoom, ProcessSpoilt, Stopped, UserError
from .models import count_macs
from .paths import results_folder
from .progress import Progress, duration, numbers


def train_all(pending, profile, device, workers, budget, only_whole, retry, ray=None, graphs=True):
    """Train the pending runs of a profile; see `runs.ensure` for the arguments, `cluster.Ray` for ray.

    They are trained in the turns of `experiments.turns`, in each turn the longest first, so that no worker is left with
    a long one at the end. A run that fails, whose data are missing, or whose block is of another kind of device, does
    not keep the others from training; that is raised at the end. Data that cannot be downloaded, only prepared, are
    not raised: their runs are left out and said to be.
    """
    if torchrun.size() > 1 and (workers or ray):
        raise UserError("torchrun's processes train the runs together: leave out --workers and --backend ray")
    missing = {}
    for name in dict.fromkeys(run.dataset for run in pending):
        try:
            data.fetch(name)
        except MissingData as error:
            missing[name] = error
    here, turns = [run for run in pending if run.dataset not in missing], experiments.turns(profile)
    here.sort(key=lambda run: (turns.get(run, LAST), -cost(run)))
    folder = results_folder(profile) / "runs"
    alike = trained_alike(here, profile, folder)
    kind = None if ray else trainer.pick_device(device).type
    refused = [run for run in here if kind and alike[run][0] not in (None, kind)]
    here = [run for run in here if run not in refused]
    if refused:
        begun = alike[refused[0]][0]
        refusal = (
            f"{len(refused)} of {len(pending)} runs are refused on {kind}: what they are compared with was trained on "
            f"{begun}; use --device {begun}, or set SILALIB_RESULTS to another folder and train all anew"
        )
        print(refusal, file=sys.stderr, flush=True)
    threads = 1
    if ray is None:
        place, shared = trainer.pick_device(device), torchrun.size() > 1
        cpu = place.type == "cpu"
        own = cpu_cores() if cpu else torch.cuda.device_count() if place.index is None else 1
        at_once = torchrun.local_size() if shared else workers or own
        threads = max(1, cpu_cores() // at_once) if cpu else 1
        workers = 1 if shared else min(at_once, len(here))
    job = Job(
        folder,
        device,
        threads,
        deadline=None if budget is None else time.time() + budget,
        only_whole=only_whole,
        retry=retry,
        begun={run.key: alike[run] for run in here},
        graphs=graphs,
    )
    outcomes = {}
    if here:
        progress = Progress({run: cost(run) for run in here})
        try:
            with interruptible() as stopped:
                train_here = ray or (in_this_process if workers == 1 else in_workers)
                outcomes = train_here(here, job, workers, stopped, progress)
        finally:
            progress.close()
    failed = [e for e in outcomes.values() if isinstance(e, Exception) and not isinstance(e, Stopped)]
    left = [run for run in here if outcomes.get(run) is None or isinstance(outcomes[run], Stopped)]
    if failed:
        raise UserError(f"{len(failed)} of {len(pending)} runs failed, the first: {failed[0]}")
    if left:
        raise Stopped(f"stopped with {len(left)} of {len(pending)} runs left; start again to go on")
    if refused:
        raise UserError(refusal)
    for name, error in missing.items():
        if not data.dataset(name).prepared:
            raise MissingData(f"{error}, or use --profile quick")
        rows = sum(run.dataset == name for run in pending)
        print(f"{rows} of {len(pending)} runs not run: {error}", file=sys.stderr, flush=True)


LAST = (99, 0)
"""The turn of runs that no profile plans."""


def trained_alike(pending, profile, folder):
    """Run -> how its block was begun (`experiments.block`): (kind of device or None, whether in bfloat16 or None).

    The first record of the block decides, or without one a checkpoint. None where they do not tell: nothing is
    trained, or networks alone that are in float32 everywhere, or no profile plans the run.
    """
    alike = {}
    for dataset, seed in dict.fromkeys((run.dataset, run.seed) for run in pending):
        block = experiments.block(profile, dataset, seed)
        found = [(begun, run) for run in block if (begun := runs.begun(folder / run.key))]
        kind = half = None
        for (_, part), run in sorted(found, key=lambda pair: pair[0][0] or "~"):  # checkpoints last
            kind = kind or runs.device_kind(part)
            if half is None and any(speed.precision(net, torch.device(kind), True).itemsize < 4 for net in run.nets):
                half = "bfloat16" in part["precision"]
        alike |= {run: (kind, half) for run in block}
    return {run: alike.get(run, (None, None)) for run in pending}


def cpu_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; plain values, so that it can be sent to another process."""

    folder: Path
    device: str
    threads: int
    deadline: float | None
    only_whole: bool
    retry: bool
    begun: dict = field(default_factory=dict)  # key of a run -> what `trained_alike` says of it
    graphs: bool = True

    def train(self, run, stopped, tell):
        """Train one run unless another process has done it meanwhile. Returns the outcome in words."""
        folder = self.folder / run.key

        def stop():
            if stopped():
                return "stopped"
            if self.deadline and time.time() > self.deadline:
                return "the budget is used up"
            return None

        if reason := stop():
            raise Stopped(reason)
        with runs.lock(folder, wait=lambda: not stop(), message=lambda text: tell(run=run, text=text)):
            damaged = runs.damage(run)  # of a record that another process may have written meanwhile
            if isinstance(damaged, Damaged):
                tell(run=run, text=f"{runs.set_aside(damaged)}: the run is trained again")
            if runs.find(run) is None:
                if (failure := runs.failure(run)) and not self.retry:
                    raise UserError(f"{run} failed before: {failure['error']}; --retry (retry=True) trains it again")
                (folder / "failed.json").unlink(missing_ok=True)
                hurry = self.deadline - time.time() if self.deadline and self.only_whole else None
                torch.set_num_threads(self.threads)
                try:
                    train = torchrun.train if torchrun.size() > 1 else trainer.train
                    kind, half = self.begun.get(run.key, (None, None))
                    if kind not in (None, trainer.pick_device(self.device).type):  # of a machine of a cluster
                        raise UserError(
                            f"{run}: what it is compared with was trained on {kind}: use --device {kind}, or set "
                            "SILALIB_RESULTS to another folder and train all anew"
                        )
                    more = dict(half=half, graphs=self.graphs)
                    train(run, folder, self.device, stop, tell, hurry, **more)
                except trainer.Diverged as error:
                    runs.remove_leftovers(folder)  # the checkpoints may hold weights that are lost already
                    runs.write_failure(folder, error, epoch=error.epoch, step=error.step, lr=error.lr)
                    raise
            record = runs.load(run)
        seconds = record.result["provenance"]["seconds"]
        return f"top-1 {numbers(head['top1'] for head in record.heads)} in {duration(seconds)}"


class Pace:
    """How long runs take here, from those that ended: with --only-whole none is started that would not end in time."""

    def __init__(self, job):
        self.job, self.seconds = job, {}

    def learn(self, run):
        """After a run: seconds for a unit of its `cost`; the slowest of its first network counts."""
        with suppress(UserError):
            origin = runs.load(run).result["provenance"]
            speed = (origin["seconds"] + origin["seconds_final"]) / cost(run)
            self.seconds[run.nets[0]] = max(speed, self.seconds.get(run.nets[0], 0))

    def too_long(self, run):
        """Whether a run is known not to end before the deadline; one that has a checkpoint finds out by itself."""
        if not (self.job.only_whole and self.job.deadline and run.nets[0] in self.seconds):
            return False
        left = self.job.deadline - time.time()
        return runs.state(run) == "pending" and self.seconds[run.nets[0]] * cost(run) > left


TOO_LONG = "it would not end in the budget"


def again_without_graph(run, outcomes, progress):
    """{run} if its graph failed, which is then no outcome: it is done again; else an empty set."""
    if not isinstance(outcomes[run], GraphFailed):
        return set()
    progress.message(run=run, text=f"{outcomes.pop(run)}: done again without, in another process")
    return {run}


def in_this_process(pending, job, workers, stopped, progress):
    outcomes, pace, waiting = {}, Pace(job), list(pending)
    threads = torch.get_num_threads()
    try:
        while waiting:
            run = waiting.pop(0)
            outcomes[run] = (
                Stopped(TOO_LONG) if pace.too_long(run) else attempt(job, run, stopped.is_set, progress.message)
            )
            spoilt = isinstance(outcomes[run], ProcessSpoilt)
            again = again_without_graph(run, outcomes, progress)
            if not again:
                settle(run, outcomes[run], progress, stopped, pace)
            if spoilt:  # a fresh process for all others
                return outcomes | in_workers([*again, *waiting], job, 1, stopped, progress, eager=again)
    finally:
        torch.set_num_threads(threads)
    return outcomes


def in_workers(pending, job, workers, stopped, progress, eager=()):
    """Outcomes of runs trained by processes of their own. A run of `eager` is trained without CUDA graphs.

    When one of the processes is spoilt all of them end after their runs, and fresh ones go on; a run whose graph could
    not be captured becomes eager.
    """
    outcomes, waiting, eager, pace = {}, list(pending), set(eager), Pace(job)
    while waiting and not stopped.is_set():
        context = multiprocessing.get_context("spawn")
        messages, places, stop, sound = context.Queue(), context.Queue(), context.Event(), True
        for place in range(workers):
            places.put(place)
        pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(messages, places, stop))
        with large_pages(), pool:
            futures = {}
            try:
                while futures or (waiting and sound and not stopped.is_set()):
                    if stopped.is_set():
                        stop.set()
                    while waiting and sound and len(futures) < workers and not stopped.is_set():
                        run = waiting.pop(0)
                        if pace.too_long(run):
                            outcomes[run] = Stopped(TOO_LONG)
                            continue
                        futures[pool.submit(work, replace(job, graphs=job.graphs and run not in eager), run)] = run
                    drain(messages, progress)
                    for future in [f for f in futures if f.done()]:
                        run = futures.pop(future)
                        outcomes[run] = future.result()
                        sound = sound and not isinstance(outcomes[run], ProcessSpoilt)
                        again = again_without_graph(run, outcomes, progress)
                        eager |= again
                        waiting[:0] = again
                        if not again:
                            settle(run, outcomes[run], progress, stopped, pace)
            except BrokenProcessPool:
                raise UserError(
                    "a worker process died: out of memory (use fewer workers), or a script that calls ensure() outside "
                    "of `if __name__ == '__main__':`; start again to go on"
                ) from None
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
    return outcomes


@contextmanager
def large_pages():
    """Processes started in here, on Linux, ask for memory in large pages: a step is 5 to 10% faster."""
    name = "GLIBC_TUNABLES"
    if name in os.environ:  # the user's own
        yield
        return
    os.environ[name] = "glibc.malloc.hugetlb=1"
    try:
        yield
    finally:
        del os.environ[name]


def drain(messages, progress):
    """Hand on what the workers have said, waiting a moment for the first message."""
    try:
        progress.message(**messages.get(timeout=0.05))  # a worker may have ended, and wait for its next run
        while True:
            progress.message(**messages.get_nowait())
    except queue.Empty:
        pass


def settle(run, outcome, progress, stopped, pace=None):
    if isinstance(outcome, Stopped):
        return
    if isinstance(outcome, (NoRoom, NoDevice)):  # the other runs have none either
        stopped.set()
    if pace and not isinstance(outcome, Exception):
        pace.learn(run)
    progress.finish(run, f"failed: {outcome}" if isinstance(outcome, Exception) else outcome)


def attempt(job, run, stopped, tell):
    """The outcome of one run: words, or the exception that ended it."""
    try:
        return job.train(run, stopped, tell)
    except UserError as error:
        return error.with_traceback(None)  # which would keep the networks in memory
    except torch.OutOfMemoryError:
        return out_of_memory(run)
    except OSError as error:
        return UserError(f"{run}: {error.strerror or error} ({error.filename or 'results folder'})")
    except Exception as error:  # whatever it is, the other runs go on
        if re.search(r"out of memory|ALLOC(ATION)?_FAILED|unable to find an engine", str(error)):
            return out_of_memory(run)
        folder = job.folder / run.key
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        with suppress(UserError, OSError):
            runs.write_failure(folder, line, traceback=traceback.format_exc())
        text = f"{run}: {line} (an error that is not yours to mend; more in {folder / 'failed.json'})"
        if torchrun.size() > 1:  # the other processes may wait for this one: torchrun ends them when it ends
            raise SystemExit(f"silalib: error: {text}") from None
        spoilt = isinstance(error, torch.AcceleratorError)  # every later call to the GPU fails too
        return ProcessSpoilt(text) if spoilt else UserError(text)


def out_of_memory(run):
    return UserError(f"{run}: out of GPU memory at batch size {run.batch_size}: use fewer --workers or --device cpu")


def start_worker(messages, places, stop):
    """A worker leaves signals to the main process, which tells it when to stop. Each has a place of its own, from 0."""
    global _messages, _place, _stop
    _messages, _place, _stop = messages, places.get(), stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=outlive_nothing, daemon=True).start()


_working = threading.Lock()


def outlive_nothing():
    """End this worker when the main process is gone, once the run in progress is saved; it would wait for ever."""
    multiprocessing.parent_process().join()
    _working.acquire()
    os._exit(1)


def work(job, run):
    stopped = lambda: _stop.is_set() or not multiprocessing.parent_process().is_alive()
    with _working:
        job = replace(job, device=own_gpu(job.device, _place))
        return attempt(job, run, stopped, lambda **message: _messages.put(message))


def own_gpu(name, place):
    """The device of the worker at a place: with several GPUs and none of them named they are taken in turn."""
    device = trainer.pick_device(name)
    if device.type != "cuda" or device.index is not None:
        return name
    return f"cuda:{place % torch.cuda.device_count()}"


@contextmanager
def interruptible():
    """An event that SIGINT and SIGTERM set, so that training stops at the next batch; a second one acts as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        stopped.set()
        os.write(2, b"\nstopping after this step ...\n")  # print() must not be called in a signal handler
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stopped
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def seconds_left(left, records):
    """Run -> about how long its training takes on this machine, from `left`: CPU seconds, on a GPU seconds.

    From the records of the same networks that were trained on this kind of machine; without one, a step is timed.
    """
    device = trainer.pick_device("auto")
    seconds, units = Counter(), Counter()
    for run, record in records.items():
        origin = record.result["provenance"]
        if runs.device_kind(origin) == device.type and (device.type == "cuda" or origin.get("amx") == speed.amx()):
            seconds[run.nets[0]] += origin.get("cpu_seconds" if device.type == "cpu" else "seconds", 0)
            units[run.nets[0]] += cost(run)
    per_unit = {net: seconds[net] / units[net] for net in seconds if seconds[net]}
    for run in left:
        if run.nets[0] not in per_unit:
            per_unit[run.nets[0]] = timed_step(run, device)
    return {run: cost(run) * per_unit[run.nets[0]] for run in left}


def timed_step(run, device, images=32):
    """Seconds that a unit of `cost` takes here: a run's first network forward and backward, on made-up images."""
    net = trainer.build(run, 0).to(device, memory_format=torch.channels_last)
    batch = torch.rand(images, *data.dataset(run.dataset).image, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    dtype = speed.precision(run.nets[0], device, speed.bfloat16_pays(device))
    times, clock = [], time.perf_counter if device.type == "cuda" else time.process_time
    with speed.one_thread():
        for _ in range(3):
            began = clock()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                z = net(batch)
            sum(head.float().logsumexp(1).mean() for head in (z if isinstance(z, tuple) else (z,))).backward()
            sum(p.grad.sum() for p in net.parameters()).item()  # waits for a GPU
            times.append(clock() - began)
    return min(times) / (3 * images * forward_macs(alone(run, 0)))


@cache
def cost(run):
    """Relative cost of a run: multiply-accumulates of its training and of the test set after each epoch."""
    spec = data.dataset(run.dataset)
    forward = sum(forward_macs(alone(run, slot)) for slot in range(len(run.nets)))
    return run.epochs * forward * (3 * (run.train_size or spec.train) + spec.test)


def alone(run, slot):
    """A run of one network: what its size depends on, and nothing else."""
    return runs.Run(run.dataset, run.nets[slot], "ind", width=run.width, stem=run.stem, blocks=run.blocks)


@cache
def forward_macs(run):
    """Multiply-accumulates for one image of a run's first network; runs share theirs, which takes a while to build."""
    return count_macs(trainer.build(run, 0), data.dataset(run.dataset).image)
