"""Processes and signals: how many cores, how training is asked to stop, how futures are waited for."""

import os
import signal
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack, contextmanager


def cpu_cores():
    """CPU cores that this process may use: the least of affinity, its cgroup's quota and SLURM's share of a task."""
    with warnings.catch_warnings(action="ignore"):  # about shared memory
        from joblib import cpu_count
    return min(cpu_count(), whole_number("SLURM_CPUS_PER_TASK") or cpu_count())


def whole_number(variable):
    """An environment variable's number from 1, the first of several; None for anything else."""
    first = os.environ.get(variable, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


@contextmanager
def interruptible():
    """An event that SIGINT and SIGTERM set, so that training stops at the next batch; a second one acts as usual."""
    stopped, usual = threading.Event(), {}

    def ask(number, frame):
        stopped.set()
        os.write(2, b"\nstopping after this step ...\n")  # print() must not be called in a signal handler
        signal.signal(number, usual[number])

    with ExitStack() as at_end:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                usual[number] = signal.getsignal(number)
                at_end.callback(signal.signal, number, usual[number])
                signal.signal(number, ask)
        yield stopped


def finished(futures, stopped, tick=lambda: None):
    """Pop each future from the dict `futures` when it ends, and yield it with its value; tick(), which is called first
    and several times a second, may add others. Once `stopped` is set, or the loop left, what waits is cancelled."""
    try:
        tick()
        while futures:
            for future in wait(futures, 0.05, FIRST_COMPLETED).done:
                yield future, futures.pop(future)
            for future in [future for future in futures if stopped.is_set() and future.cancel()]:
                del futures[future]
            tick()
    finally:
        for future in futures:
            future.cancel()
