"""Golden runs: small trainings with every part of a record, and everything in it that does not depend on the clock.

    python tests/golden.py write FILE       train them with the silalib that is imported, and write what they gave
    python tests/golden.py one NAME FOLDER FILE   the same of one of them, whose record is in a results folder
    python tests/golden.py keep FILE        the same without kinks, in short: tests/golden.npz, for every processor
    python tests/golden.py against COMMIT   train them here and with a commit of the project's, and compare every bit

Only what users see of silalib is used, so that the script runs with older and newer versions of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BASE = {
    "dataset": "digits",
    "width": 0.125,
    "epochs": 2,
    "train_size": 128,
    "batch_size": 32,
    "milestones": (1,),
    "augment": "crop+flip",
    "lr": 0.01,
    "warmup": 0.5,
}
MEASURED = {"noise_images": 20, "noise_sigmas": 2, "noise_draws": 2, "hessian_images": 10}
RUNS = {
    "sila": {"nets": ("convnet12",) * 2, "method": "sila", "augment": "crop+flip+autoaugment", **MEASURED},
    "unequal": {"nets": ("vgg13", "convnet12"), "method": "sila+dml", "betas": (1, 0.5), "seed": 1},
    "dropout": {"nets": ("vgg13",) * 2, "method": "dml"},
    "exits": {"nets": ("msdnet_budgeted",), "method": "sila", "blocks": 3, "holdout": 50, "nesterov": False},
}
ROUGH = "curvature"
"""Eigenvalues are found by iteration: another way to them may differ by a percent."""


def smooth(factory):
    """The network without ReLU and max-pool, where a rounding error could switch a unit and change the gradient."""
    import torch

    def build(*arguments, **more):
        network = factory(*arguments, **more)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(module, name, torch.nn.Tanh())
                if isinstance(child, torch.nn.MaxPool2d):
                    setattr(module, name, torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        return network

    return build


def train(names=tuple(RUNS), folder=None, rounded=False):
    """Name of a run and of what it gave -> array, or text; in float32 on every processor.

    folder: for the records, by default one for the time. rounded: of networks without kinks, so that another
    processor's rounding errors stay small.
    """
    import torch

    torch.set_num_threads(1)
    torch.cpu._is_amx_tile_supported = lambda: False
    from silalib import Run, ensure
    from silalib.models import MODELS

    if rounded:
        MODELS.update({name: smooth(factory) for name, factory in MODELS.items()})
    os.sched_getaffinity = lambda _: {0}  # one run at a time, in this process, with one thread
    runs = {name: Run(**BASE | RUNS[name]) for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SILALIB_RESULTS"] = folder or temporary
        records = ensure(list(runs.values()), "quick", device="cpu", workers=1)
        return {f"{name}/{key}": value for name, run in runs.items() for key, value in parts(records[run]).items()}


def parts(record):
    """Key -> array or text of a record."""
    found = {"key": record.run.key, "files": " ".join(sorted(record.result["files"]))}
    for name in ("history", "noise", "budgeted"):
        if f"{name}.csv" in record.result["files"]:
            table = getattr(record, name)
            for column in [c for c in table.columns if "seconds" not in c]:
                found[f"{name}/{column}"] = text_or_numbers(table[column])
    for i, head in enumerate(record.heads):
        found |= flat(f"heads/{i}", head)
    found |= flat("ensemble", record.result.get("ensemble", {}))
    for name in ("test", "features"):
        if f"{name}.npz" in record.result["files"]:
            found |= {f"{name}/{key}": array for key, array in getattr(record, name).items()}
    from safetensors.numpy import load

    weights = load(record.read("weights.safetensors"))
    return found | {f"weights/{key}": array for key, array in weights.items()}


def text_or_numbers(column):
    return " ".join(column) if column.dtype.kind not in "iufb" else column.to_numpy()


def flat(prefix, values):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(f"{prefix}/{name}", value)
        else:
            found[f"{prefix}/{name}"] = value if isinstance(value, str) else np.array(value)
    return found


def write(path, *options):
    np.savez_compressed(path, **{name: np.array(value) for name, value in train(*options).items()})


def short(name, value):
    """What the committed file keeps: large arrays by their mean, deviation and first numbers."""
    value = np.asarray(value)
    if value.size <= 64 or value.dtype.kind in "US":
        return value
    value = value.astype(float).ravel()
    return np.array([value.size, value.mean(), value.std(), *value[:5]])


def read(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def differences(found, expected, rtol=0.0, atol=0.0):
    """What differs, a line each: names, types and shapes always, numbers by more than rtol and atol."""
    lines = [f"{name}: only in one of both" for name in sorted(set(found) ^ set(expected))]
    for name in sorted(set(found) & set(expected)):
        a, b = found[name], expected[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            lines.append(f"{name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}")
        elif a.dtype.kind in "US":
            lines += [f"{name}: {a} and {b}"] if a != b else []
        elif ROUGH in name:
            if "steps" not in name and "residual" not in name and not np.allclose(a, b, rtol=0.01):
                lines.append(f"{name}: {a} and {b}")
        elif rtol == atol == 0:
            lines += [] if np.array_equal(a, b, equal_nan=True) else [f"{name}: not equal to the bit"]
        elif not np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
            apart = np.abs(np.asarray(a, float) - np.asarray(b, float)).max()
            lines.append(f"{name}: {apart:.2g} apart, of {np.abs(np.asarray(b, float)).max():.2g}")
    return lines


@contextmanager
def worktree(commit):
    """A checkout of one of the project's commits, for the time."""
    with tempfile.TemporaryDirectory() as folder:
        other, git = Path(folder) / "other", ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), commit], check=True, capture_output=True)
        try:
            yield other
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)


def against(commit):
    """Lines of what differs between this checkout and a commit, both trained now by this script."""
    with worktree(commit) as other, tempfile.TemporaryDirectory() as folder:
        for name, root in (("here", ROOT), ("there", other)):
            environment = {**os.environ, "PYTHONPATH": str(root)}
            command = [sys.executable, __file__, "write", f"{folder}/{name}.npz"]
            subprocess.run(command, check=True, cwd=root, env=environment)
        return differences(read(f"{folder}/here.npz"), read(f"{folder}/there.npz"))


if __name__ == "__main__":
    command, argument, *more = sys.argv[1:]
    if command == "write":
        write(argument)
    elif command == "one":
        write(more[1], [argument], more[0])
    elif command == "keep":
        found = train(rounded=True)
        np.savez_compressed(argument, **{name: short(name, value) for name, value in found.items()})
    else:
        lines = against(argument)
        print("\n".join(lines) or "equal to the bit")
        print(json.dumps({"runs": len(RUNS), "differences": len(lines)}))
        sys.exit(bool(lines))
