"""What test_faults does in processes that it kills, limits or races; imported by its fork server too."""

import os
import resource
import signal
import sys

import torch
from conftest import TINY

from silalib import experiments, records
from silalib.__main__ import main
from silalib.run import Run
from silalib.training import trainer


def noting(note, train=trainer.train):
    """`trainer.train` with a checkpoint after every step, before which note(run, number of the step) is called."""

    def noted(run, folder, device, *, stop=lambda: None, progress=lambda **message: None, **how):
        step = 0

        def tell(**message):
            nonlocal step
            step = message["step"] if message.get("resumed") else step
            progress(**message)

        def ask():
            nonlocal step
            if step < run.epochs * (run.train_size // run.batch_size):  # later it is asked between the evaluations
                note(run, step)
            step += 1
            return stop()

        return train(run, folder, device, stop=ask, progress=tell, checkpoint_seconds=-1, **how)

    return noted


def prepare(log):
    """One thread; the training that writes every step's number to the file `log`."""
    torch.set_num_threads(1)
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return noting(lambda run, step: os.write(lines, f"{run.seed} {step}\n".encode()))


def train(folder, log, changes):
    run = Run(**TINY | changes)
    records.write_record(run, folder, *prepare(log)(run, folder, "cpu"))


def command(arguments, results, log, changes, limit=None):
    """`python -m silalib` on an exhibit "tiny" of three seeds; limit: bytes that a file may have, as on a full disk."""
    trainer.train = prepare(log)
    os.environ["SILALIB_RESULTS"] = results
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
    with records.lock(folder):
        ready.set()
        signal.pause()
