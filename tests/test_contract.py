"""What scripts rely on, in processes of their own: exit statuses, and one line on standard error for each fault."""

import os
import subprocess
import sys

import pytest

from silalib.files import ROOT

pytestmark = pytest.mark.slow


def call(*arguments, folder):
    environment = os.environ | {"SILALIB_RESULTS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "silalib", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["status", "fig6"], ["data", "digits"], ["report", "fig6", "--no-train"]],
    ids=" ".join,
)
def test_what_succeeds_is_0(arguments, tmp_path):
    done = call(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Traceback" not in done.stderr and "error" not in done.stderr


@pytest.mark.parametrize(
    "status, arguments, line",
    [
        (75, ["train", "fig6", "--workers", "1", "--budget", "0.01s"], "silalib: stopped with 4 of 4 runs left; "),
        (75, ["report", "fig6", "--workers", "1", "--budget", "0.01s"], "silalib: stopped with 4 of 4 runs left; "),
        (1, ["train", "fig6", "--device", "tpu"], "silalib: error: unknown device 'tpu'"),
        (1, ["data", "cifar"], "silalib: error: unknown data set 'cifar'"),
        (2, ["train", "table9"], "python -m silalib train: error: argument EXHIBIT: invalid choice: 'table9'"),
        (2, ["status", "--profile", "fast"], "python -m silalib status: error: argument --profile: invalid choice"),
        (2, [], "python -m silalib: error: the following arguments are required: command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_is_one_line(status, arguments, line, tmp_path):
    done = call(*arguments, folder=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert (done.stdout == "" or arguments[0] == "report") and not list(tmp_path.rglob("result.json"))
