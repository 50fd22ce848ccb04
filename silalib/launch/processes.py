"""Processes and signals: how many cores, how training is asked to stop, how workers end."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager


def cpu_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def finished(futures, stopped, tick=lambda: None):
    """Pop each future from the dict `futures` when it ends, and yield it with its key; others may be added meanwhile.

    tick() is called several times a second. Once `stopped` is set, or the loop is left, what has not begun is
    cancelled; what has is waited for unless the loop is left.
    """
    try:
        while futures:
            tick()
            for future in wait(futures, 0.05, FIRST_COMPLETED).done:
                yield future, futures.pop(future)
            if stopped.is_set():
                for future in [future for future in futures if future.cancel()]:
                    del futures[future]
    finally:
        for future in futures:
            future.cancel()


def start_worker(busy):
    """In a new worker: leave signals to the main process, and end when that is gone, once the lock `busy` is free."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, args=[busy], daemon=True).start()


def exit_with_parent(busy):
    multiprocessing.parent_process().join()
    busy.acquire()
    os._exit(1)
