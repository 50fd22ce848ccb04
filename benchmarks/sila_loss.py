"""The SiLa loss against the form that concatenates, forward and backward: python benchmarks/sila_loss.py

Both run in every round, in turns; printed are medians of the time (CPU time on a CPU) and of the ratio, with quartiles
in brackets. Shapes are (batch, heads, classes).
"""

import argparse
import time

import torch
from reference_loop import concatenated
from train_step import spread

from silalib.losses import siamese_labels
from silalib.training.execution import pick_device


def seconds(loss, logits, target):
    gpu = target.device.type == "cuda"
    logits = [z.clone().requires_grad_() for z in logits]
    if gpu:
        torch.cuda.synchronize()
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    loss(logits, target).backward()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="auto")
    options.add_argument("--rounds", type=int, default=11)
    options = options.parse_args()
    device = pick_device(options.device)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} on {device}, eager, one thread, {options.rounds} rounds")
    for batch, heads, classes in [(128, 2, 10), (128, 2, 100), (64, 7, 100), (4096, 7, 1000)]:
        logits = [torch.randn(batch, classes, device=device) for _ in range(heads)]
        target = torch.randint(classes, (batch,), device=device)
        ours, naive = [], []
        for i in range(options.rounds + 2):  # the first two warm up
            for loss, times in [(siamese_labels, ours), (concatenated, naive)][:: 1 if i % 2 else -1]:
                times.append(seconds(loss, logits, target))
        ours, naive = ours[2:], naive[2:]
        ratio = spread([n / o for n, o in zip(naive, ours)])
        print(f"({batch}, {heads}, {classes}): ours {spread(ours, 1000)} ms, naive {spread(naive, 1000)} ms, {ratio}x")


if __name__ == "__main__":
    main()
