"""How fast the trainer is here: python benchmarks/train_step.py [--nets resnet18] [--methods ind sila] [--speeds fast]

Against a plain loop (reference_loop.py), against what the device can do, and for each exhibit's grid. Everything is
measured in one run and in turns, so that the ratios hold on a busy machine too. On a CPU seconds are CPU seconds of the
process and of its loader's workers, on a GPU wall seconds.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reference_loop import Reference

from silalib import data
from silalib.__main__ import whole_number
from silalib.errors import UserError
from silalib.experiments import EXHIBITS
from silalib.files import results_folder, to_json, write_atomically
from silalib.launch.estimate import cost
from silalib.launch.progress import duration
from silalib.models import EXITS, count_macs
from silalib.run import Run
from silalib.training.execution import Speed, fast, no_search, one_thread, pick_device, settings
from silalib.training.provenance import processor
from silalib.training.trainer import Material, Training

NETS = ("resnet18", "mobilenet", "vgg13", "msdnet_anytime")
PLAIN = Speed(bf16=False, channels_last=False, fused=False)
"""What the fast settings are compared with."""

SPEEDS = {
    "fast": lambda device: fast(device),
    "eager": lambda device: fast(device, graphs=False),
    "compiled": lambda device: fast(device),
    "float32": lambda device: fast(device, bf16=False),
    "nchw": lambda device: replace(fast(device), channels_last=False),
    "plain": lambda device: PLAIN,
}
"""Name -> settings of the trainer; "fast" is what trainings have, "compiled" the same with torch.compile."""

TEST_IMAGES = 500


def configuration(nets, method):
    """The paper's run of these networks (a name, or two with a plus) on CIFAR-100; two of a kind where it needs two."""
    nets = tuple(nets.split("+"))
    exits, large = nets[0] in EXITS, nets[0] == "msdnet_imagenet"
    return Run(
        dataset="imagenet100" if large else "cifar100",
        nets=nets * 2 if len(nets) == 1 and not exits and method != "ind" else nets,
        method=method,
        batch_size=256 if large else 64 if exits else 128,
        stem="imagenet" if large else "cifar",
    )


def made_up(run, n):
    """Random images (n + TEST_IMAGES, C, H, W) in the place of the data set's, which need not be here, and labels."""
    spec, total = data.dataset(run.dataset), n + TEST_IMAGES
    pixels = torch.randint(0, 256, (total, *spec.image), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pixels, torch.arange(total) % spec.classes


class Ours:
    """The trainer on all images of an epoch, without the evaluation at its end; and that, on the test images."""

    def __init__(self, run, device, speed, images, labels, compiled=False):
        size = len(labels) - TEST_IMAGES
        images, labels = images.permute(0, 2, 3, 1).contiguous().to(device), labels.to(device)
        split = lambda part: data.Split(images[part], labels[part])
        splits = {"train": split(slice(size)), "test": split(slice(size, None))}
        self.training = Training(run, device, speed, material=Material(run, device, splits))
        self.epochs = 0
        for net in self.training.nets.values() if compiled else ():
            net.compile()

    def epoch(self):
        training = self.training
        for batch in training.material.epoch(self.epochs, 0, training.steps_per_epoch):
            training.set_step()
            training.captured_update(*batch)
            training.step += 1
        self.epochs += 1
        return training.sums.sum().item()  # waits for a GPU

    def test(self):
        return [z.sum().item() for z in self.training.predict(self.training.splits["test"].images)]


def seconds(device, loop, function):
    """Of one call: CPU seconds with those of the loop's workers, on a GPU wall seconds (`function` waits for it)."""
    workers = getattr(loop, "worker_seconds", lambda: 0.0)
    clock = time.perf_counter if device.type == "cuda" else lambda: time.process_time() + workers()
    started = clock()
    function()
    return clock() - started


def quartiles(values):
    """[first quartile, median, third quartile]."""
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def spread(values, unit=1.0):
    """The median with the quartiles in brackets, in words."""
    low, middle, high = (unit * value for value in quartiles(values))
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def peak(device, dtype, rounds=5):
    """FLOP/s of a large matrix product: the most that this device shows in this precision."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    product = lambda: (a @ a)[0, 0].item()
    return 2 * n**3 / min([seconds(device, None, product) for _ in range(rounds + 1)][1:])  # the first one warms up


def memory(device, reset=False):
    """Bytes of the device: (in use, at most since the last reset); on a CPU of the process, None where Linux is not."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    except OSError:
        return None


def held(device, memory):
    """Bytes taken from the device, with those of captured graphs, whose tensors count as freed; see `memory`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    return (memory(device) or [None])[0]


def measure(loops, device, rounds, memory=memory):
    """Of loops, name -> function that makes one: their epochs, in turns. Returns (name -> loop, name -> seconds of an
    epoch in each round, name -> of the test pass where there is one, name -> most bytes that it took, or None)."""
    made, own = {}, {}
    for name, make in loops.items():  # one after the other, so that each one's own memory is known
        before = held(device, memory)
        made[name] = make()
        for _ in range(2):  # warm up, and capture graphs
            made[name].epoch()
        for _ in range(4 if hasattr(made[name], "test") else 0):
            made[name].test()
        own[name] = None if before is None else held(device, memory) - before
    times, tests, most = {name: [] for name in made}, {name: [] for name in made}, dict.fromkeys(made)
    for i in range(rounds):
        for name, loop in list(made.items())[:: 1 if i % 2 else -1]:
            before = memory(device, reset=True)
            times[name].append(seconds(device, loop, loop.epoch))
            if own[name] is not None:
                most[name] = max(most[name] or 0, own[name] + memory(device)[1] - before[0])
            if hasattr(loop, "test"):
                tests[name].append(seconds(device, loop, loop.test))
    return made, times, tests, most


def rows_of(run, device, speeds, rounds, steps):
    """A dict for each of `speeds`, measured beside the reference loop."""
    spec, n = data.dataset(run.dataset), steps * run.batch_size
    images, labels = made_up(run, n)
    loops = {"reference": lambda: Reference(run, images[:n], labels[:n], device)}
    for name in speeds:
        loops[name] = lambda name=name: Ours(run, device, SPEEDS[name](device), images, labels, name == "compiled")
    made, times, tests, most = measure(loops, device, rounds)
    with no_search():
        macs = sum(count_macs(net, spec.image) for net in made[speeds[0]].training.nets.values())
    for name in speeds:
        dtype, middle = made[name].training.dtypes[0], quartiles(times[name])[1]
        rate, best = 6 * macs * n / middle, peak(device, dtype)  # a step is three forwards of two FLOP a MAC
        yield {
            "nets": "+".join(run.nets),
            "method": run.method,
            "speed": name,
            "precision": str(dtype).removeprefix("torch."),
            "batch_size": run.batch_size,
            "images_per_second": quartiles([n / t for t in times[name]]),
            "reference_images_per_second": quartiles([n / t for t in times["reference"]]),
            "ratio": quartiles([r / t for r, t in zip(times["reference"], times[name])]),
            "gflops": rate / 1e9,
            "peak_gflops": best / 1e9,
            "share_of_peak": rate / best,
            "peak_memory_bytes": most[name],
            "seconds_per_epoch": spec.train * middle / n + spec.test * quartiles(tests[name])[1] / TEST_IMAGES,
        }


def projected(rows, speed):
    """Exhibit -> seconds of its `paper` grid with one seed, one run after the other; see `estimate.cost`.

    A run that was not measured takes the mean speed of those that share a network with it, or else of all.
    """
    speeds = {}
    for row in [row for row in rows if row["speed"] == speed]:
        run = configuration(row["nets"], row["method"])
        speeds[run.nets, run.method] = row["seconds_per_epoch"] * run.epochs / cost(run)

    def seconds_of(run):
        related = [v for (nets, _), v in speeds.items() if set(nets) & set(run.nets)] or list(speeds.values())
        return speeds.get((run.nets, run.method), sum(related) / len(related)) * cost(run)

    return {name: sum(map(seconds_of, exhibit.grid("paper", [0]))) for name, exhibit in EXHIBITS.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Images/s here, against a plain loop and the device's measured peak.")
    parser.add_argument("--nets", nargs="+", default=NETS, help="names, or pairs such as mobilenet+vgg13")
    parser.add_argument("--methods", nargs="+", default=("ind", "sila"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--speeds", nargs="+", default=["fast"], help=f"of the trainer: {', '.join(SPEEDS)}")
    parser.add_argument("--rounds", type=whole_number, default=5)
    parser.add_argument("--steps", type=whole_number, help="batches in a round; default 2 on a CPU, 100 on a GPU")
    parser.add_argument("--output", type=Path, help="the JSON file; default bench.json in the results folder")
    options = parser.parse_args(arguments)
    try:
        bench(options)
    except UserError as error:
        print(f"silalib: error: {error}", file=sys.stderr)
        return 1
    return 0


def bench(options):
    """Measure, print a table, and write what it rests on as JSON."""
    device, speeds = pick_device(options.device), options.speeds
    if unknown := [name for name in speeds if name not in SPEEDS]:
        raise UserError(f"unknown speed {unknown[0]!r}: choose from {', '.join(SPEEDS)}")
    gpu = device.type == "cuda"
    threads = torch.get_num_threads() if gpu else 1
    runs = dict.fromkeys(configuration(net, method) for net in options.nets for method in options.methods)
    where = torch.cuda.get_device_name(device) if gpu else processor()
    print(f"torch {torch.__version__}, {where}, {threads} threads, {options.rounds} rounds; medians [quartiles]")
    print(f"seconds are {'wall seconds' if gpu else 'CPU seconds, of the process and the workers of its loader'}")
    line = "{:23}{:9}{:9}{:24}{:24}{:20}{:>9}{:>9}{:>7}{:>8}{:>10}".format
    titles = ("images/s", "reference", "ratio", "GFLOP/s", "peak", "share", "MiB", "s/epoch")
    print(line("networks", "method", "speed", *titles))
    rows = []
    apart = torch.random.fork_rng(devices=[device] if gpu else [])
    with apart, settings(device), nullcontext() if gpu else one_thread():
        for run in runs:
            for row in rows_of(run, device, speeds, options.rounds, options.steps or (100 if gpu else 2)):
                rows.append(row)
                bytes_used, names = row["peak_memory_bytes"], ("nets", "method", "speed")
                spreads = (spread(row[k]) for k in ("images_per_second", "reference_images_per_second", "ratio"))
                numbers = f"{row['gflops']:.0f} {row['peak_gflops']:.0f} {row['share_of_peak']:.0%}".split()
                size = "-" if bytes_used is None else f"{bytes_used / 2**20:.0f}"
                shown = line(*(row[k] for k in names), *spreads, *numbers, size, f"{row['seconds_per_epoch']:.3g}")
                print(shown, flush=True)
    grids = projected(rows, speeds[0])
    print("projected for one seed of `paper`, one run after the other:")
    print("  " + ", ".join(f"{name} {duration(value)}" for name, value in grids.items()))
    output = options.output or results_folder("paper").parent / "bench.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": str(torch.__version__), "device": where, "threads": threads, "rounds": options.rounds}
    write_atomically(output, to_json({**facts, "rows": rows, "projected_seconds": grids}))
    print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())
