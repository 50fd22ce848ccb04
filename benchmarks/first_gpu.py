"""The parts of first_gpu.sh that train: python benchmarks/first_gpu.py PART --device auto --out DIR.

On a CPU every part uses the embedded digits and tiny networks: it shows that the part runs, and measures nothing.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import torch

from silalib import experiments
from silalib.analysis import tables
from silalib.errors import UserError
from silalib.experiments import cifar_run
from silalib.files import results_folder
from silalib.launch.ensure import ensure
from silalib.models import NAMES
from silalib.records import load
from silalib.training.execution import pick_device
from silalib.training.provenance import processor

MINUTES = 8
"""What a part may train; starting and packing come on top."""
TAR_BYTES = 15 * 2**20
VARIANTS = {
    "pytorch-cifar100": experiments.SILENT,
    "silalib's defaults": dict(augment="crop+flip", gamma=0.5, nesterov=True, init="he"),
}
"""The two answers to what the paper does not say; docs/protocol.md names the rule that chooses."""
SCALE = {"top1": 0.70, "top5": 0.70, "nll": 0.06}
"""What a difference to the printed IND row is divided by."""


def versions(options, device):
    """What this machine is."""
    facts = {"python": sys.version.split()[0], "torch": torch.__version__, "processor": processor()}
    facts["cores"] = len(os.sched_getaffinity(0))
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["memory"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def table1_run(device, net, **changes):
    """IND of one network of Table 1, alone, under other silent choices; on a CPU of `quick`."""
    profile = "paper" if device.type == "cuda" else "quick"
    small = {} if device.type == "cuda" else dict(epochs=1)
    run = cifar_run(profile, (net,), method="ind", seed=0, **changes, **small)
    return profile, run


def ind(options, device):
    """One network alone in both variants, one after the other; how far each is from the printed IND row.

    What does not fit is trained by the next call.
    """
    runs = {}
    for name, changes in VARIANTS.items():
        profile, runs[name] = table1_run(device, options.net, **changes)
    try:
        train(list(runs.values()), profile, options, workers=1)
    except UserError as error:  # the other one may have ended
        print(f"silalib: {error}", file=sys.stderr)
    paper = tables.printed("table1")
    printed = paper[(paper["method"] == "ind") & (paper["pair"] == NAMES[options.net])]
    printed = printed.set_index("metric")["value"]
    rows = []
    for name, record in [(name, found(run)) for name, run in runs.items()]:
        if record is None:
            print(f"{options.net}, {name}: not finished")
            continue
        head, origin = record.heads[0], record.result["provenance"]
        row = {"variant": name} | {metric: head[metric] for metric in SCALE}
        row["distance"] = sum(abs(head[metric] - printed[metric]) / scale for metric, scale in SCALE.items())
        rows.append(row | {"seconds": origin["seconds"], "graphs": origin.get("graphs")})
        numbers = ", ".join(f"{metric} {head[metric]:.2f} (paper {printed[metric]:.2f})" for metric in SCALE)
        print(f"{options.net}, {name}: {numbers}; distance {row['distance']:.2f}; {origin['seconds']:.0f} s")
    return rows


def workers(options, device):
    """The same training by 1, 2, 4 and 8 processes at once: images a second of all together, without warm-up."""
    rows, gpu = [], device.type == "cuda"
    profile, epochs, steady = ("small", 30, 10) if gpu else ("quick", 2, 2)
    base = experiments.fig3(profile, [0])[0]
    base = experiments.plain(base, epochs=epochs, milestones=[m for m in base.milestones if m < epochs])
    for number in (1, 2, 4, 8) if gpu else (2,):
        for net in ("resnet18", "mobilenet"):
            first = 1000 + 100 * options.mps + 10 * number  # seeds of no grid, and of no other round
            runs = [replace(base, nets=(net,) * 2, seed=first + i) for i in range(number)]
            train(runs, profile, options, workers=number)
            histories = [load(run).history for run in runs]
            spent = [history.loc[history["epoch"] >= steady, "seconds_train"].median() for history in histories]
            rate = sum(base.train_size / seconds for seconds in spent)
            rows.append({"net": net, "processes": number, "mps": options.mps, "images_per_second": rate})
            keep(rows, "workers" + ("_mps" if options.mps else ""), options)
            print(f"{net} pair, {number} at once{', MPS' if options.mps else ''}: {rate:,.0f} images/s", flush=True)
    return None


def repeat(options, device):
    """The same seed twice (A/A), each in a process of its own: how much of a difference is the GPU's own."""
    profile = "small" if device.type == "cuda" else "quick"
    (run, *_), usual = experiments.fig3(profile, [0]), Path(os.environ["SILALIB_RESULTS"])
    os.environ["SILALIB_RESULTS"] = str(usual / "repeat" / options.half)
    train([run], profile, options)
    if options.half == "a":
        return None
    b = load(run).heads
    os.environ["SILALIB_RESULTS"] = str(usual / "repeat" / "a")
    a = load(run).heads
    os.environ["SILALIB_RESULTS"] = str(usual)
    rows = []
    for number, (one, two) in enumerate(zip(a, b)):
        row = {name: (one[name], two[name]) for name in ("top1", "nll", "train_nll", "ece")}
        rows.append(row)
        print(f"Net{number + 1}: " + ", ".join(f"{name} {x:.4f} and {y:.4f}" for name, (x, y) in row.items()))
    print("equal to the last bit" if a == b else "the two differ")
    return rows


def small(options, device):
    """All of `small`, in its order; on a CPU Figure 3 of quick."""
    gpu = device.type == "cuda"
    runs = list(experiments.turns("small")) if gpu else experiments.fig3("quick", [0])
    try:
        train(runs, "small" if gpu else "quick", options, workers=8 if gpu else None)
    except UserError as error:
        print(f"silalib: {error}", file=sys.stderr)
    records = [record for run in runs if (record := found(run))]
    print(f"{len(records)} of {len(runs)} runs have a record")
    return [{"key": record.run.key, "seconds": record.result["provenance"]["seconds"]} for record in records]


def keep(measured, name, options):
    (Path(options.out) / f"{name}_measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def train(runs, profile, options, workers=None):
    ensure(runs, profile, device=options.device, workers=workers, budget=60 * MINUTES, only_whole=True)


def found(run):
    try:
        return load(run)
    except UserError:
        return None


def pack(options, device):
    """Finished records, without weights, in tar files of at most 15 MiB each."""
    folders = [path.parent for path in sorted(results_folder("*").parent.glob("*/runs/*/result.json"))]
    packs, size = [], TAR_BYTES
    for folder in folders:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".sha256", ".csv", ".npz")]
        needed = sum(path.stat().st_size + 1024 for path in files)
        if size + needed > TAR_BYTES:
            packs.append([])
            size = 0
        packs[-1] += [(path, path.relative_to(folder.parents[2]).as_posix()) for path in files]
        size += needed
    for number, files in enumerate(packs):
        with tarfile.open(Path(options.out) / f"records{number}.tar", "w") as tar:
            for path, name in files:
                content = path.read_bytes()
                member = tarfile.TarInfo(name)  # nothing of the machine or its user
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
    print(f"{len(folders)} records in {len(packs)} tar files: unpack them in results/")


PARTS = {f.__name__: f for f in (versions, ind, workers, repeat, small, pack)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", required=True)
    parser.add_argument("--net", default="resnet18", choices=("resnet18", "mobilenet", "vgg13"))
    parser.add_argument("--half", default="a", choices=("a", "b"), help="of the part repeat")
    parser.add_argument("--mps", action="store_true", help="say that the processes share the GPU by MPS")
    options = parser.parse_args()
    try:
        measured = PARTS[options.part](options, pick_device(options.device))
    except UserError as error:
        sys.exit(f"silalib: error: {error}")
    if measured is not None:
        print(json.dumps(measured) if options.part == "versions" else "")
        keep(measured, options.net if options.part == "ind" else options.part, options)


if __name__ == "__main__":
    main()
