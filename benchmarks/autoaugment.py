"""What AutoAugment costs: its share of a ResNet18 training step, and its ratio to torchvision's, image by image.

    python benchmarks/autoaugment.py [--device cpu] [--rounds 15]

All are timed in every round, ours before torchvision's in every other one, on batches of 128 made-up 32x32 colour
images. Printed are medians over the rounds, with quartiles in brackets. torchvision's images are single tensors on the
CPU, as a data loader's worker has them.
"""

import argparse
import time

import torch
from train_step import spread

from silalib import data
from silalib.data._torchvision import torchvision  # noqa: F401
from silalib.data.augment import epoch_plan
from silalib.data.autoaugment import autoaugment
from silalib.run import Run
from silalib.training.execution import fast, pick_device
from silalib.training.trainer import Material, Training


def made_up(n):
    """Smooth, noisy images (n, 3, 32, 32) in the place of CIFAR-10's, which need not be here."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=g) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear", align_corners=False)
    return (smooth + 10 * torch.randn(n, 3, 32, 32, generator=g)).clamp(0, 255).to(torch.uint8)


def seconds(device, function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = pick_device(options.device)
    from torchvision.transforms import v2

    run = Run(dataset="cifar10", nets=("resnet18",), method="ind", augment="crop+flip+autoaugment")
    images, labels = made_up(10 * run.batch_size), torch.arange(10 * run.batch_size) % 10
    split = data.Split(images.permute(0, 2, 3, 1).contiguous().to(device), labels.to(device))
    training = Training(run, device, fast(device), material=Material(run, device, {"train": split, "test": split}))
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    one_by_one = lambda images: [theirs(image) for image in images]

    times = {"step": [], "ours": [], "theirs": []}
    for i in range(options.rounds + 2):  # the first two warm up
        plan = [part[: run.batch_size] for part in epoch_plan(run, i, len(labels), device)]
        batch, index, choices = next(training.material.loader(plan, run.batch_size))
        single = list(batch.permute(0, 3, 1, 2).cpu().contiguous())
        training.set_step()
        measured = {"step": seconds(device, training.captured_update, batch, split.labels[index])}
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            job = (autoaugment, batch, *choices) if name == "ours" else (one_by_one, single)
            measured[name] = seconds(device, *job)
        if i >= 2:
            for name, value in measured.items():
                times[name].append(value)

    precision = str(training.dtypes[0]).removeprefix("torch.")
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print(f"a step of ResNet18 without AutoAugment ({precision}): {spread(times['step'], 1000)} ms")
    print(f"AutoAugment of its batch: {spread(times['ours'], 1000)} ms")
    print(f"torchvision's, image by image: {spread(times['theirs'], 1000)} ms")
    print(f"share of a step: {spread([o / s for o, s in zip(times['ours'], times['step'])], 100)} %")
    print(f"torchvision's time over ours: {spread([t / o for t, o in zip(times['theirs'], times['ours'])])}")


if __name__ == "__main__":
    main()
