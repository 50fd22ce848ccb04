"""What test_faults does in processes that it kills, limits or races; imported by its fork server too."""

import os
import resource
import signal
import sys

import torch
from conftest import TINY

from silalib import experiments, runs, trainer
from silalib.__main__ import main
from silalib.runs import Run


def prepare(log):
    """One thread, a checkpoint after every step, and every step's number written to the file `log` as it begins."""
    torch.set_num_threads(1)
    trainer.CHECKPOINT_SECONDS = -1
    one_step = trainer.Training.one_step
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def logged(self, *batch):
        os.write(lines, f"{self.run.seed} {self.step}\n".encode())
        one_step(self, *batch)

    trainer.Training.one_step = logged


def train(folder, log, changes):
    prepare(log)
    trainer.train(Run(**TINY | changes), folder, "cpu")


def command(arguments, results, log, changes, limit=None):
    """`python -m silalib` on an exhibit "tiny" of three seeds; limit: bytes that a file may have, as on a full disk."""
    prepare(log)
    os.environ["SILALIB_RESULTS"] = results
    os.sched_getaffinity = lambda process: {0}
    grid = lambda profile="quick", seeds=None: [Run(**TINY | changes | {"seed": seed}) for seed in seeds or (0, 1, 2)]
    experiments.EXHIBITS = {"tiny": experiments.Exhibit("Tiny", grid, "00_tiny")}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with open(f"{log}.err", "w") as file:
        sys.stderr = file
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        status = main(arguments)
    sys.exit(status)


def hold(folder, ready):
    with runs.lock(folder, wait=lambda: False):
        ready.set()
        signal.pause()
