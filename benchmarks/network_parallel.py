"""What a second process brings to one SiLa run: one network in each process, against both networks in one.

    torchrun --nproc-per-node 2 benchmarks/network_parallel.py [--net resnet18] [--width 0.25] [--rounds 9]

In every round the first process times steps with both networks alone, with one thread and with two, while the second
one waits; then both time the same steps together with one network and one thread each. On digits, on the CPU. Printed
are medians over the rounds, with quartiles in brackets, and the ratios within the rounds.
"""

import argparse
import tempfile
import time

import torch
import torch.distributed as dist

from silalib.augment import epoch_plan
from silalib.bench import spread
from silalib.parallel import NETWORK, Ranks
from silalib.runs import Run
from silalib.trainer import Training, processor


def seconds_a_step(training, threads, steps, epoch):
    torch.set_num_threads(threads)
    plan, size = training.ranks.own_images(
        epoch_plan(training.run, epoch, len(training.target), training.device), training.run.batch_size
    )
    started = time.perf_counter()
    for step in range(steps):
        training.one_step(*(part[step * size : (step + 1) * size] for part in plan))
    training.ranks.wait()
    return (time.perf_counter() - started) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--method", default="sila")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="a round")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    run = Run("digits", (options.net,) * 2, options.method, width=options.width)
    times = {"one process, one thread": [], "one process, two threads": [], "two processes, one thread each": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare = lambda ranks: Training(
            run, folder, torch.device("cpu"), lambda: None, lambda **message: None, None, ranks
        )
        together = prepare(Ranks(NETWORK))
        first = together.ranks.rank == 0
        alone = prepare(Ranks()) if first else None
        for i in range(options.rounds + 1):  # the first one warms up
            measured = [seconds_a_step(alone, threads, options.steps, i) if first else 0 for threads in (1, 2)]
            together.ranks.wait()
            measured.append(seconds_a_step(together, 1, options.steps, i))
            for values, value in zip(times.values(), measured):
                values += [value] if i else []
    if first:
        precision = str(together.dtypes[0]).removeprefix("torch.")
        print(f"torch {torch.__version__}, {processor()}, {options.rounds} rounds of {options.steps} steps")
        print(f"{run}, width {run.width:g}, batch {run.batch_size}, {precision}")
        for name, values in times.items():
            print(f"{name}: {spread(values, 1000)} ms a step")
        *others, shared = times.items()
        for name, values in others:
            print(f"{name} / {shared[0]}: {spread([a / b for a, b in zip(values, shared[1])])}")
        sent = ", ".join(f"{kind} {count:,}" for kind, count in together.ranks.sent.items())
        print(f"sent by each process in {(options.rounds + 1) * options.steps} steps: {sent} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
