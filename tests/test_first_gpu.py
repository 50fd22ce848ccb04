"""The script for a GPU's first half hour, rehearsed on a CPU."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from silalib.files import ROOT
from silalib.records import load
from silalib.run import Run


def script(*arguments, folder, **environment):
    return subprocess.run(
        [ROOT / "benchmarks" / "first_gpu.sh", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_an_unknown_part_is_wrong_usage(tmp_path):
    done = script("everything", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("unknown part everything: choose from tests steps compile workers repeat")


@pytest.mark.slow
@pytest.mark.long
def test_the_rehearsal_ends_with_records_that_load(tmp_path, results):
    """Started through a link and from elsewhere; nothing is written into the checkout."""
    before = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True).stdout
    out = tmp_path / "out"
    few = "-k follows"  # of the part `tests`, which pytest runs elsewhere
    parts = ("tests", "repeat", "vgg13", "small")
    done = script("--device", "cpu", *parts, folder=tmp_path, OUT=str(out), PYTEST_ADDOPTS=few)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the last bit" in done.stdout  # on a CPU a seed repeats exactly
    for name in ("versions_measured.json", "repeat_measured.json", "vgg13_measured.json", "small_measured.json"):
        assert (out / name).stat().st_size > 10
    with tarfile.open(out / "records0.tar") as tar:
        assert all(member.uname == member.gname == "" and member.mtime == 0 for member in tar)
        assert not any("weights" in name or "checkpoint" in name for name in tar.getnames())
        tar.extractall(results, filter="data")
    assert (out / "records0.tar").stat().st_size < 15 * 2**20
    folders = list(results.glob("*/runs/*/run.json"))
    assert len(folders) == 4  # two variants, and Figure 3's two runs; the repeats are no records of a profile
    for path in folders:
        assert load(Run(**json.loads(path.read_bytes())["config"])).heads
    assert subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True).stdout == before
