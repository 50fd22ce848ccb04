"""What a second process brings to one SiLa run: one network in each process, against both networks in one.

    torchrun --nproc-per-node 2 benchmarks/network_parallel.py [--net resnet18] [--width 0.25] [--rounds 9]

In every round the first process times steps with both networks alone, with one thread and with two, while the second
one waits; then both time the same steps together with one network and one thread each. On digits, on the CPU. Printed
are medians over the rounds, with quartiles in brackets, the ratios within the rounds, and the bytes that each process
sends in a step: a tensor that every peer gets counts once for each of them, one that is summed over all K processes
2 (K - 1) / K times, as in a ring.
"""

import argparse
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist

from silalib.run import Run
from silalib.training.execution import fast
from silalib.training.network_parallel import Ranks
from silalib.training.provenance import processor
from silalib.training.trainer import Training


def counted(function, sent, copies):
    """A function of torch.distributed that adds the bytes of the tensor that it sends so many times."""

    def call(*arguments, **more):
        tensor = next(argument for argument in reversed(arguments) if torch.is_tensor(argument))
        sent[function.__name__] += copies * tensor.nbytes
        return function(*arguments, **more)

    return call


def seconds_a_step(training, threads, steps, epoch):
    torch.set_num_threads(threads)
    batches = list(training.material.epoch(epoch, 0, steps))
    started = time.perf_counter()
    for batch in batches:
        training.set_step()
        training.update(*batch)
        training.step += 1
    training.ranks.barrier()
    return (time.perf_counter() - started) / steps


def spread(values, scale=1):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) * scale
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--method", default="sila")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="a round; at most 10, an epoch of digits")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    run, cpu, sent = (
        Run("digits", (options.net,) * 2, options.method, width=options.width),
        torch.device("cpu"),
        Counter(),
    )
    others = dist.get_world_size() - 1
    together = Training(run, cpu, fast(cpu), Ranks(parallel=True))
    first = together.ranks.rank == 0
    alone = Training(run, cpu, fast(cpu)) if first else None
    times = {"one process, one thread": [], "one process, two threads": [], "two processes, one thread each": []}
    for i in range(options.rounds + 1):  # the first one warms up
        measured = [seconds_a_step(alone, threads, options.steps, i) if first else 0 for threads in (1, 2)]
        together.ranks.barrier()
        measured.append(seconds_a_step(together, 1, options.steps, i))
        for values, value in zip(times.values(), measured):
            values += [value] if i else []
    dist.all_gather = counted(dist.all_gather, sent, others)
    dist.all_reduce = counted(dist.all_reduce, sent, 2 * others / (others + 1))
    together.update(*next(together.material.epoch(0, 0, 1)))
    if first:
        precision = str(together.dtypes[0]).removeprefix("torch.")
        print(f"torch {torch.__version__}, {processor()}, {options.rounds} rounds of {options.steps} steps")
        print(f"{run}, width {run.width:g}, batch {run.batch_size}, {precision}")
        for name, values in times.items():
            print(f"{name}: {spread(values, 1000)} ms a step")
        *slower, shared = times.items()
        for name, values in slower:
            print(f"{name} / {shared[0]}: {spread([a / b for a, b in zip(values, shared[1])])}")
        print(
            "each process sends in a step: " + ", ".join(f"{kind} {count:,.0f} bytes" for kind, count in sent.items())
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
