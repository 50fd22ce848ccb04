"""Convolutions with small outputs as matrix products against oneDNN's, on a CPU: python benchmarks/small_maps.py

Forward and backward of one layer in bfloat16, batch 128, on one thread. Both run in every round, in turns; printed are
medians of the CPU time and of the ratio, with quartiles in brackets.
"""

import argparse
import time

import torch
from torch import nn
from train_step import spread

from silalib.models.layers import Conv2d
from silalib.training.execution import one_thread

LAYERS = [
    # inputs, outputs, kernel, stride, size of the input, where it stands, and the precision it is trained in there
    (512, 512, 3, 1, 4, "ResNet18, last stage", torch.bfloat16),
    (256, 512, 3, 2, 8, "ResNet18, its first layer", torch.bfloat16),
    (256, 512, 1, 2, 8, "ResNet18, its shortcut", torch.bfloat16),
    (512, 512, 3, 1, 2, "VGG13, last stage", torch.bfloat16),
    (128, 128, 3, 2, 4, "MSDNet, a classifier", torch.bfloat16),
    (1024, 1024, 1, 1, 2, "MobileNet, last layer", torch.float32),
]


def seconds(layer, x, grad):
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        layer(x).backward(grad)
    return time.process_time() - started


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=11)
    options = options.parse_args()
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds")
    for inputs, outputs, kernel, stride, size, where, dtype in LAYERS:
        settings = dict(stride=stride, padding=kernel // 2, bias=False)
        layers = [kind(inputs, outputs, kernel, **settings) for kind in (Conv2d, nn.Conv2d)]
        layers = [layer.to(memory_format=torch.channels_last) for layer in layers]
        x = torch.randn(128, inputs, size, size).to(dtype, memory_format=torch.channels_last).requires_grad_()
        with torch.no_grad():
            grad = torch.randn_like(layers[1](x.float())).to(dtype)
        times = [], []
        with one_thread():
            for i in range(options.rounds + 2):  # the first two warm up
                for own, layer in list(zip(times, layers))[:: 1 if i % 2 else -1]:
                    own.append(seconds(layer, x, grad))
        ours, theirs = (own[2:] for own in times)
        ratio = spread([t / o for o, t in zip(ours, theirs)])
        shape = f"{kernel}x{kernel}, {inputs} to {outputs} channels, {size}x{size}, stride {stride}, {str(dtype)[6:]}"
        print(f"{shape} ({where}): product {spread(ours, 1000)} ms, oneDNN {spread(theirs, 1000)} ms, {ratio}x")


if __name__ == "__main__":
    main()
