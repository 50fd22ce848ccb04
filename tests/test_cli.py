"""The command line as a user calls it: exit statuses, and one line for every mistake."""

import argparse
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from unittest import mock

import pytest

from silalib import experiments
from silalib.__main__ import main, seconds
from silalib.files import ROOT, results_folder
from silalib.launch.progress import Progress, duration
from silalib.run import Run


@pytest.fixture
def one_exhibit(plan):
    """An exhibit of two tiny runs."""

    def grid(profile="quick", seeds=None):
        seeds = experiments.seeds_for("tiny", profile, seeds)
        return [
            Run("digits", ("convnet12",) * (1 + (m == "sila")), m, s, width=0.0625, epochs=1, train_size=64,
                batch_size=32, milestones=(), augment="none")
            for s in seeds for m in ("ind", "sila")
        ]  # fmt: skip

    plan(grid)
    return grid


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "table9"], "invalid choice: 'table9'"),
        (["train", "table1", "--profile", "fast"], "invalid choice: 'fast'"),
        (["train", "table1", "--seeds", "-1"], "'-1' is not a whole number from 0"),
        (["train", "table1", "--seeds", "x"], "'x' is not a whole number from 0"),
        (["train", "table1", "--workers", "0"], "'0' is not a whole number from 1"),
        (["train", "table1", "--budget", "soon"], "'soon' is no duration: use 90s, 9m or 1.5h"),
        (["train"], "required"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_is_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data", "cifar"], "unknown data set 'cifar': choose from digits, digits64, mnist,"),
        (["train", "table1", "--device", "tpu"], "unknown device 'tpu'"),
        (["train", "table1", "--device", "cuda:99"], "is not here"),
    ],
)
def test_a_mistake_is_one_line_and_1(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_missing_data_is_one_line_and_1(data_folder, no_network, capsys):
    assert main(["train", "fig6", "--profile", "paper"]) == 1
    error = capsys.readouterr().err
    missing = f"no network and {data_folder / 'MNIST/raw'} is missing"
    assert error.splitlines()[-1] == f"silalib: error: {missing}: put MNIST there, or use --profile quick"
    assert "Traceback" not in error and no_network


def test_train_status_and_resume(one_exhibit, results, capsys):
    arguments = ["train", "tiny", "--workers", "1"]
    assert main([*arguments, "--budget", "0.01s"]) == 75
    assert "stopped with 2 of 2 runs left; start again to go on" in capsys.readouterr().err
    assert main(["status", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "profile quick; claims: 1 reproduced, 7 not judged (stand-in data)"
    # a process that has trained before is quick enough to start a run
    assert lines[2].split() in (["tiny", *"---2--"], ["tiny", *"--11--"])
    assert main(arguments) == 0
    assert main(["status", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["tiny", "2", "-", "-", "-", "-", "-"]
    assert lines[-1] == "2 of 2 runs done"
    before = {p: p.read_bytes() for p in results.rglob("result.json")}
    assert len(before) == 2
    for content in before.values():  # each says where it comes from
        provenance = json.loads(content)["provenance"]
        assert {"silalib", "torch", "device", "precision", "data_sha256", "seconds", "finished"} <= set(provenance)
    assert main(arguments) == 0  # trains nothing
    assert {p: p.read_bytes() for p in results.rglob("result.json")} == before


def test_data_that_must_be_prepared_count_as_success(one_exhibit, plan, data_folder, capsys):
    elsewhere = Run("imagenet100", "msdnet_imagenet", "sila", stem="imagenet", augment="flip")
    plan(lambda profile="quick", seeds=None: [*one_exhibit(profile, [0]), elsewhere])
    assert main(["train", "tiny", "--workers", "1"]) == 0
    output = capsys.readouterr()
    assert output.out == "2 of 3 runs are trained, 1 not run\n"
    assert "1 of 3 runs not run: " in output.err


@pytest.mark.slow
@pytest.mark.long
def test_only_whole_gives_up_what_cannot_end(one_exhibit, plan, capsys):
    """A run that would take longer than the budget is given up soon after its first seconds."""
    plan(lambda profile="quick", seeds=None: [replace(r, epochs=10**6) for r in one_exhibit(profile, [0])[:1]])
    assert main(["train", "tiny", "--workers", "1", "--budget", "1h", "--only-whole"]) == 75
    assert "stopped with 1 of 1 runs left" in capsys.readouterr().err


@pytest.mark.parametrize("text, value", [("90", 90), ("90s", 90), ("9m", 540), ("1.5h", 5400)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    "value, text",
    [(59, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (5 * 86400, "5 days"), (366 * 86400, "over a year")],
)
def test_durations_in_words(value, text):
    assert duration(value) == text


def test_progress_fits_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    run = Run("cifar100", ("resnet18",) * 2, "sila")
    with open(theirs, "w") as terminal, redirect_stderr(terminal):
        progress = Progress({run: 1.0, "another": 1.0}, clock=lambda: 0.0)  # no time left is said in the first seconds
        progress.message(run, step=50, total=100, top1=(79.4, 84.6))
        progress.bar.refresh()
        progress.finish(run, "top-1 79.4 84.6 in 2 min 04 s")
        progress.bar.close()
    written = b""
    with suppress(OSError):  # which says that all is read, as the other end is closed
        while piece := os.read(ours, 1 << 20):
            written += piece
    os.close(ours)
    lines = re.split(r"[\r\n]+", written.decode())
    assert max(map(len, lines)) <= 80
    assert any(
        re.search(r"\d%\|.{10}\| \d\d:\d\d, 0/2 runs, epoch \d+.0 of \d+, top-1 79.4 84.6", line) for line in lines
    )
    assert f"1/2 runs, {run}: top-1 79.4 84.6 in 2 min 04 s" in lines


def test_time_left_is_weighted_by_cost_and_counts_what_was_trained_since_the_start(capsys):
    """The longer run, resumed at half, is at three quarters after 100 s: half of the work that was left is done."""
    now, long, short = [0.0], *(Run("cifar100", ("resnet18",), "ind", seed=seed) for seed in (0, 1))
    progress = Progress({long: 3.0, short: 1.0}, clock=lambda: now[0])
    progress.finish(short, "done")
    now[0] = 1.0
    progress.message(long, step=50, total=100, resumed=True)
    now[0] = 100.0
    progress.message(long, step=75, total=100)
    # of 4 units 1 + 0.99 * 0.75 * 3 = 3.2275 are done, 0.99 * 0.5 * 3 = 1.485 of them before: 100 / 1.7425 * 0.7725
    assert capsys.readouterr().err.splitlines()[-1].startswith("1/2 runs, 44 s left, epoch 195.0 of 260")


@pytest.mark.parametrize("command", [[], ["train"], ["status"], ["report"], ["data"]], ids=lambda c: " ".join(c) or "-")
def test_help_fits_a_terminal(command, capsys):
    with pytest.raises(SystemExit), mock.patch.dict(os.environ, COLUMNS="80"):
        main([*command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("text", ["", "0", "m", "-5m", "9 minutes"])
def test_bad_durations(text):
    with pytest.raises(argparse.ArgumentTypeError):
        seconds(text)


def test_data_command(capsys):
    assert main(["data", "digits"]) == 0
    assert "1297 training and 500 test images" in capsys.readouterr().out


def test_results_folder_is_moved_by_the_environment(results):
    assert results_folder("quick") == results / "quick"


def test_a_results_folder_that_cannot_be_written(one_exhibit, results, capsys):
    results.write_text("not a folder")
    assert main(["train", "tiny", "--workers", "1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Traceback" not in error and str(results) in error


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["data", "digits"], ["--help"]], ids=" ".join)
def test_a_reader_that_wants_no_more_is_no_error(command, unbuffered, results):
    """As of `data digits | head`: the other end of the pipe is closed before anything is written."""
    command, flushed = [sys.executable, "-m", "silalib", *command], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, cwd=ROOT, env=flushed, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == b"" and (process.returncode == 1 or "--help" in command)  # argparse itself takes no notice
