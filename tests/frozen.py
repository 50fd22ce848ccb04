"""What the pages draw of a frozen set of committed records, by value: the bytes of pictures and the words may change.

    python tests/frozen.py write FILE               draw all pages of the committed records, and write every number
    python tests/frozen.py against COMMIT RECORDS   draw a results folder here and by a commit, and tell what differs

Only the command line of silalib is used, so that the script runs with older and newer versions of it. A
sitecustomize module notes the arrays of each figure when it is saved; tables are read from their CSV files.
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import golden

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("small",)
TIMED = ("fig4_time", "fig5_time")
"""What shows times measured by the machine that draws."""
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")

HOOK = '''
import hashlib, io, json, os
import numpy as np
from matplotlib.figure import Figure

def numbers(array):
    """Shape, and what tells one array from another: mean, deviation, ends, a weighted sum; of the finite numbers."""
    array = np.ma.filled(np.ma.asarray(array, float), np.nan)
    flat = array.ravel()
    if not flat.size:
        return None
    finite = np.isfinite(flat)
    kept = np.where(finite, flat, 0.0)
    found = [finite.sum(), kept.mean(), kept.std(), kept.min(), kept.max(), kept @ np.cos(np.arange(len(kept)))]
    return {"shape": list(array.shape), "numbers": [float(v) for v in found]}

def drawn(figure):
    for ax in figure.axes:
        arrays = [line.get_xydata() for line in ax.lines]
        for points in ax.collections:
            arrays.append(points.get_offsets())
            arrays += [path.vertices for path in points.get_paths()] if len(points.get_paths()) < 200 else []
            arrays += [points.get_array()] if points.get_array() is not None else []
        arrays += [patch.get_path().vertices for patch in ax.patches]
        arrays += [image.get_array() for image in ax.images]
        yield [found for found in map(numbers, arrays) if found]

usual = Figure.savefig
def savefig(self, target, *arguments, **more):
    usual(self, target, *arguments, **more)
    if isinstance(target, io.BytesIO):
        name = hashlib.sha256(target.getvalue()).hexdigest()
        with open(os.path.join(os.environ["FROZEN_DUMP"], name), "w") as file:
            json.dump(list(drawn(self)), file)
Figure.savefig = savefig
'''


def draw(records, profiles, root=ROOT):
    """{"profile/figures/name": arrays by axes, "profile/tables/name": rows of the numbers in each cell}.

    records: a results folder, which is copied; root: the checkout whose code draws.
    """
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hook, dump = folder / "hook", folder / "dump"
        hook.mkdir()
        dump.mkdir()
        (hook / "sitecustomize.py").write_text(HOOK)
        environment = os.environ | {
            "FROZEN_DUMP": str(dump), "SILALIB_DATA": str(folder / "data"), "SILALIB_RESULTS": str(folder / "results"),
            "PYTHONPATH": os.pathsep.join([str(root), str(hook)]),
        }  # fmt: skip
        for profile in profiles:
            shutil.copytree(Path(records, profile, "runs"), folder / "results" / profile / "runs")
            command = [sys.executable, "-m", "silalib", "report", "--profile", profile, "--no-train"]
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results = folder / "results" / profile
            for path in sorted(results.glob("figures/*.png")):
                arrays = dump / hashlib.sha256(path.read_bytes()).hexdigest()
                found[f"{profile}/figures/{path.stem}"] = json.loads(arrays.read_text())
            for path in sorted(results.glob("tables/*.csv")):
                with open(path, newline="") as file:
                    rows = [[values(cell) for cell in row] for row in list(csv.reader(file))[1:]]
                found[f"{profile}/tables/{path.stem}"] = rows
    return {name: value for name, value in found.items() if not name.endswith(TIMED)}


def draw_these(keys):
    """`draw` of committed records; keys: profile -> those of its records."""
    with tempfile.TemporaryDirectory() as folder:
        for profile, runs in keys.items():
            for key in runs:
                shutil.copytree(ROOT / "results" / profile / "runs" / key, Path(folder, profile, "runs", key))
        return draw(folder, keys)


def values(cell):
    """The numbers in a cell of a table."""
    return [float(number) for number in NUMBER.findall(cell)]


def differences(found, expected):
    """What of the expected is missing or differs, a line each; more figures and tables are none."""
    lines = [f"{name} is not drawn" for name in expected if name not in found]
    for name in [name for name in expected if name in found]:
        if not same(found[name], expected[name]):
            lines.append(f"{name} differs: {first_difference(found[name], expected[name])}")
    return lines


def same(a, b):
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def first_difference(a, b, at=""):
    if isinstance(a, dict):
        a, b = a["shape"] + a["numbers"], b["shape"] + b["numbers"]
    if isinstance(a, list) and len(a) == len(b):
        return next(first_difference(x, y, f"{at}[{i}]") for i, (x, y) in enumerate(zip(a, b)) if not same(x, y))
    return f"{at} {str(a)[:80]} and {str(b)[:80]}"


def committed(profile):
    """The keys of the committed records."""
    listed = ["git", "-C", str(ROOT), "ls-files", f"results/{profile}/runs/*/result.json"]
    paths = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
    return [Path(path).parent.name for path in paths]


def read(path):
    return json.loads(Path(path).read_text())


def kept(path):
    """What `write` wrote: the keys of the records, and what was drawn of them."""
    keys, *drawn = json.loads(Path(path).read_text())
    return keys, {name: value for entry in drawn for name, value in entry.items()}


def write(path):
    keys = {profile: committed(profile) for profile in PROFILES}
    lines = [json.dumps(keys)] + [json.dumps({name: value}) for name, value in draw_these(keys).items()]
    Path(path).write_text("[\n" + ",\n".join(lines) + "\n]\n")


def against(commit, records):
    """What this checkout draws in another way than a commit does, both now and of the records of a results folder."""
    profiles = [path.parent.name for path in sorted(Path(records).glob("*/runs"))]
    with golden.worktree(commit) as other:
        return differences(draw(records, profiles), draw(records, profiles, other))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "write":
        write(*arguments)
    else:
        lines = against(*arguments)
        print("\n".join(lines) or "all is drawn alike")
        sys.exit(bool(lines))
