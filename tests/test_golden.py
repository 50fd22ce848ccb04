"""Golden runs give on every processor what they gave when tests/golden.npz was made, see golden.py."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import golden
import numpy as np
import pytest

KEPT = Path(__file__).with_name("golden.npz")
ROUNDED = ("/test/", "/features/")
"""In half precision."""
COUNTED = ("ece", "top", "best", "disagreement", "predicted", "temperature", "labels")
"""Decided by single images, or by few numbers: another rounding may move them by one image, or by more than itself."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Trained in a process of its own: networks and settings are replaced in it."""
    path = tmp_path_factory.mktemp("golden") / "found.npz"
    subprocess.run(
        [sys.executable, golden.__file__, "keep", path], check=True, capture_output=True, cwd=golden.ROOT,
        env={**os.environ, "PYTHONPATH": str(golden.ROOT)},
    )  # fmt: skip
    return golden.read(path)


def part(values, chosen):
    return {name: value for name, value in values.items() if chosen(name)}


@pytest.mark.slow
def test_golden_runs_are_what_they_were(found):
    expected = golden.read(KEPT)
    counted = lambda name: any(word in name.rsplit("/", 1)[1] for word in COUNTED)
    rounded = lambda name: any(word in name for word in ROUNDED)
    exact = lambda name: not (counted(name) or rounded(name))
    assert golden.differences(part(found, exact), part(expected, exact), 1e-5, 1e-6) == []
    half = lambda name: rounded(name) and not counted(name)
    assert golden.differences(part(found, half), part(expected, half), 2e-3, 2e-3) == []
    near = lambda name: counted(name) and "temperature" not in name and "predicted" not in name
    assert golden.differences(part(found, near), part(expected, near), 0.02, 3.2) == []  # two of 64 images
    assert set(found) == set(expected)


@pytest.mark.slow
def test_a_run_that_is_killed_from_outside_ends_as_one_that_is_not(tmp_path, counts):
    """SIGKILL at random times, up to six, until the run ends all the same."""
    command = [sys.executable, golden.__file__, "one", "sila"]
    environment = {**os.environ, "PYTHONPATH": str(golden.ROOT)}
    whole, folder, found = tmp_path / "whole.npz", tmp_path / "results", tmp_path / "found.npz"
    began = time.monotonic()
    subprocess.run([*command, tmp_path / "whole", whole], check=True, capture_output=True, env=environment)
    seconds, kills = time.monotonic() - began, 0
    draw = random.Random(0)
    while not found.exists():
        process = subprocess.Popen([*command, folder, found], env=environment, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(None if kills == 6 else draw.uniform(0.2, 0.7) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills and golden.differences(golden.read(found), golden.read(whole)) == []
    counts["kills of a golden run"] += kills


def test_differences_are_found():
    """Names, types, shapes, text, numbers; curvature within a percent."""
    a = {"x": np.arange(3.0), "text": np.array("a b"), "heads/0/curvature/absolute": np.array(1.0)}
    assert golden.differences(a, a) == golden.differences(a, a, 1e-5) == []
    for changed in (
        {"x": np.arange(4.0)},
        {"x": np.arange(3)},
        {"x": np.array([0.0, 1.0, 2.000000001])},
        {"text": np.array("b a")},
        {"more": np.zeros(1)},
        {"heads/0/curvature/absolute": np.array(1.02)},
    ):
        assert len(golden.differences(a | changed, a)) == 1
    assert golden.differences(a | {"x": np.array([0.0, 1.0, 2.000000001])}, a, 1e-5) == []
    assert golden.differences(a | {"heads/0/curvature/absolute": np.array(1.005)}, a) == []


@pytest.mark.slow
@pytest.mark.long
def test_a_commit_equals_itself_to_the_bit(tmp_path):
    """What `against` is for: here and a worktree of the last commit, if nothing was changed since."""
    git = ["git", "-C", golden.ROOT]
    changed = subprocess.run([*git, "status", "--porcelain", "silalib"], capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        pytest.skip("needs a checkout in which silalib is as committed")
    done = subprocess.run([sys.executable, golden.__file__, "against", "HEAD"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"runs": len(golden.RUNS), "differences": 0}
