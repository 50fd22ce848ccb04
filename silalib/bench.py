"""How fast the trainer is here: against a plain loop, against what the device can do, and for each exhibit's grid.

Everything is measured in one run and in turns, so that the ratios hold on a busy machine too. On a CPU seconds are CPU
seconds of the process and of its loader's workers, on a GPU wall seconds.
"""

import importlib.util
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from . import data, launch
from .augment import epoch_plan
from .errors import UserError
from .experiments import EXHIBITS
from .models import EXITS, count_macs
from .paths import ROOT, results_folder
from .progress import duration
from .runs import Run, to_json, write_atomically
from .speed import PLAIN, fast, no_search, one_thread, own_stream, settings
from .trainer import Training, pick_device, processor

NETS = ("resnet18", "mobilenet", "vgg13", "msdnet_anytime")
SPEEDS = {
    "fast": lambda device: fast(device),
    "eager": lambda device: replace(fast(device), graphs=False),
    "compiled": lambda device: replace(fast(device), compiled=True),
    "float32": lambda device: replace(fast(device), half=False),
    "nchw": lambda device: replace(fast(device), channels_last=False),
    "plain": lambda device: PLAIN,
}
"""Name -> settings of the trainer; "fast" is what trainings have."""


def configuration(nets, method):
    """The paper's run of these networks (a name, or two with a plus) on CIFAR-100; two of a kind where it needs two."""
    nets = tuple(nets.split("+"))
    exits = nets[0] in EXITS
    if len(nets) == 1 and not exits and method != "ind":
        nets *= 2
    large = nets[0] == "msdnet_imagenet"
    return Run(
        dataset="imagenet100" if large else "cifar100",
        nets=nets,
        method=method,
        batch_size=256 if large else 64 if exits else 128,
        stem="imagenet" if large else "cifar",
    )


def reference_loop():
    """The module benchmarks/reference_loop.py of the checkout."""
    path = ROOT / "benchmarks" / "reference_loop.py"
    if not path.exists():
        raise UserError("bench compares with benchmarks/reference_loop.py: run it in a checkout of the project")
    spec = importlib.util.spec_from_file_location("reference_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def made_up(spec, n, test):
    """Random images in the place of the data set's, which need not be here."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n + test, *spec.image), generator=g, dtype=torch.uint8)
    labels = torch.arange(n + test) % spec.classes
    usual = data.load
    data.load = lambda name: data.Images(pixels[:n], labels[:n], pixels[n:], labels[n:], "made up")
    try:
        yield pixels[:n], labels[:n]
    finally:
        data.load = usual


class Ours:
    """The trainer on all images of an epoch, without the evaluation at its end; and that, on the test images."""

    def __init__(self, run, device, speed):
        with tempfile.TemporaryDirectory() as folder:
            self.training = Training(run, folder, device, lambda: None, lambda **message: None, None, speed=speed)
        self.epochs = 0

    def epoch(self):
        training, size = self.training, self.training.run.batch_size
        plan = epoch_plan(training.run, self.epochs, len(training.target), training.device)
        training.batches.begin(plan[0], size)
        for i in range(training.steps_per_epoch):
            training.one_step(*(part[i * size : (i + 1) * size] for part in plan))
            training.step += 1
        self.epochs += 1
        return training.sums.sum().item()

    def test(self):
        return [z.sum().item() for z in self.training.predict(self.training.splits["test"].images)]

    def worker_seconds(self):
        return 0.0


def seconds(device, loop, function):
    """Of one call: CPU seconds with those of the loop's workers, on a GPU wall seconds (`function` waits for it)."""
    clock = time.perf_counter if device.type == "cuda" else lambda: time.process_time() + loop.worker_seconds()
    started = clock()
    function()
    return clock() - started


def quartiles(values):
    """(first quartile, median, third quartile)."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()


def spread(values, unit=1.0):
    low, middle, high = quartiles([value * unit for value in values])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def peak(device, dtype, rounds=5):
    """FLOP/s of a large matrix product: the most that this device shows in this precision."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    loop = lambda: (a @ a)[0, 0].item()
    loop()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(rounds):
        started = clock()
        loop()
        times.append(clock() - started)
    return 2 * n**3 / min(times)


def held(device):
    """Bytes that are taken from the device, those of captured graphs too, whose tensors count as freed; on a CPU of the
    process, None where Linux is not."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    found = memory(device)
    return found and found[0]


def memory(device, reset=False):
    """(Bytes of the device in use, at most since the last reset); on a CPU of the process, None where Linux is not."""
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


def measure(run, device, speeds, rounds, steps, reference):
    """One row for each of `speeds`, as dicts; the reference loop and all of them in turns, in `rounds` rounds."""
    spec = data.dataset(run.dataset)
    n, test = steps * run.batch_size, 500
    with made_up(spec, n, test) as (images, labels):
        make = {name: lambda name=name: Ours(run, device, SPEEDS[name](device)) for name in speeds}
        make = {"reference": lambda: reference.Reference(run, images, labels, device)} | make
        loops, own = {}, {}
        for name in make:  # one after the other, so that each one's own memory is known
            before = held(device)
            loops[name] = make[name]()
            for _ in range(2):  # warm up, and capture graphs
                loops[name].epoch()
            for _ in range(4 if name in speeds else 0):
                loops[name].test()
            own[name] = before and held(device) - before
        ours = {name: loops[name] for name in speeds}
        times, tests, most = {name: [] for name in loops}, {name: [] for name in ours}, dict.fromkeys(loops)
        for i in range(rounds):
            for name in list(loops)[:: 1 if i % 2 else -1]:
                before = memory(device, reset=True)
                times[name].append(seconds(device, loops[name], loops[name].epoch))
                if before:
                    most[name] = max(most[name] or 0, own[name] + memory(device)[1] - before[0])
                if name in ours:
                    tests[name].append(seconds(device, loops[name], loops[name].test))
        del loops
    with no_search():
        macs = sum(count_macs(net, spec.image) for net in ours[speeds[0]].training.nets.values())
    rows = []
    for name, loop in ours.items():
        dtype = loop.training.dtypes[0]
        rate = 6 * macs * n / quartiles(times[name])[1]  # a step is three forwards of two FLOP a MAC
        best = peak(device, dtype)
        per_epoch = spec.train * quartiles(times[name])[1] / n + spec.test * quartiles(tests[name])[1] / test
        rows.append(
            {
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
                "seconds_per_epoch": per_epoch,
            }
        )
    return rows


def projected(rows, speed):
    """Exhibit -> seconds of its `paper` grid with one seed, one run after the other; see `launch.cost`.

    A run that was not measured takes the mean speed of those that share a network with it, or else of all.
    """
    speeds = {}
    for row in rows:
        if row["speed"] == speed:
            run = configuration(row["nets"], row["method"])
            speeds[run.nets, run.method] = row["seconds_per_epoch"] * run.epochs / launch.cost(run)
    mean = lambda values: sum(values) / len(values)

    def seconds_of(run):
        related = [value for (nets, _), value in speeds.items() if set(nets) & set(run.nets)]
        value = speeds.get((run.nets, run.method)) or mean(related or list(speeds.values()))
        return value * launch.cost(run)

    return {name: sum(map(seconds_of, exhibit.grid("paper", [0]))) for name, exhibit in EXHIBITS.items()}


def bench(nets=NETS, methods=("ind", "sila"), device="auto", speeds=("fast",), rounds=5, steps=None, output=None):
    """Measure, print a table, and write JSON to `output`, by default bench.json in the results folder.

    steps: batches in a round, by default 2 on a CPU and 100 on a GPU.
    """
    device, reference = pick_device(device), reference_loop()
    if unknown := [name for name in speeds if name not in SPEEDS]:
        raise UserError(f"unknown speed {unknown[0]!r}: choose from {', '.join(SPEEDS)}")
    gpu = device.type == "cuda"
    threads = torch.get_num_threads() if gpu else 1
    runs = list(dict.fromkeys(configuration(net, method) for net in nets for method in methods))
    where = torch.cuda.get_device_name(device) if gpu else processor()
    print(f"torch {torch.__version__}, {where}, {threads} threads, {rounds} rounds; medians [quartiles]")
    print(f"seconds are {'wall seconds' if gpu else 'CPU seconds, of the process and the workers of its loader'}")
    header = ("networks", "method", "speed", "images/s", "reference", "ratio", "GFLOP/s", "peak", "share", "MiB")
    line = "{:23}{:9}{:9}{:24}{:24}{:20}{:>9}{:>9}{:>7}{:>8}{:>10}".format
    print(line(*header, "s/epoch"))
    rows = []
    apart = torch.random.fork_rng(devices=[device] if gpu else [])
    with apart, settings(device), own_stream(device), nullcontext() if gpu else one_thread():
        for run in runs:
            for row in measure(run, device, list(speeds), rounds, steps or (100 if gpu else 2), reference):
                rows.append(row)
                shown = [row["images_per_second"], row["reference_images_per_second"], row["ratio"]]
                memory = row["peak_memory_bytes"]
                print(
                    line(
                        *(row[k] for k in ("nets", "method", "speed")),
                        *("{1:.3g} [{0:.3g}, {2:.3g}]".format(*values) for values in shown),
                        f"{row['gflops']:.0f}",
                        f"{row['peak_gflops']:.0f}",
                        f"{row['share_of_peak']:.0%}",
                        "-" if memory is None else f"{memory / 2**20:.0f}",
                        f"{row['seconds_per_epoch']:.3g}",
                    ),
                    flush=True,
                )
    grids = projected(rows, speeds[0])
    print("projected for one seed of `paper`, one run after the other:")
    print("  " + ", ".join(f"{name} {duration(value)}" for name, value in grids.items()))
    output = Path(output) if output else results_folder("paper").parent / "bench.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"torch": str(torch.__version__), "device": where, "threads": threads, "rounds": rounds}
    write_atomically(output, to_json({**facts, "rows": rows, "projected_seconds": grids}))
    print(f"written to {output}")
