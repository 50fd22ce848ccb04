"""The user's machine: settings, cores, streams, and what cannot be written; none of it changes a figure."""

import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from unittest import mock

import pytest
import test_report
import torch
from nbformat import v4

from silalib import records
from silalib.__main__ import main
from silalib.errors import NoRoom
from silalib.experiments import Exhibit
from silalib.files import ROOT
from silalib.launch import ensure, processes
from silalib.report import build, notebooks, pages

RC = "figure.facecolor: red\nfont.size: 30\nlines.linewidth: 9\nsavefig.dpi: 10\ntext.color: blue\nbackend: TkAgg\n"
STARTUP = "import matplotlib\nmatplotlib.rcParams['figure.facecolor'] = 'red'\nprint('startup')\nimport nothing\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def matplotlibrc(folder):
    return {"MATPLOTLIBRC": str(write(folder / "rc" / "matplotlibrc", RC))}


def matplotlibrc_here(folder):
    write(folder / "matplotlibrc", RC)


def configuration(folder):
    write(folder / "mpl" / "stylelib" / "default.mplstyle", RC)
    return {"MPLCONFIGDIR": str(write(folder / "mpl" / "matplotlibrc", RC).parent), "MPLBACKEND": "TkAgg"}


def kernelspec(folder):
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "mine", "language": "python"}
    write(folder / "jupyter" / "kernels" / "python3" / "kernel.json", json.dumps(spec))
    return {"JUPYTER_PATH": str(folder / "jupyter"), "JUPYTER_DATA_DIR": str(folder / "jupyter")}


def ipython(folder):
    write(folder / "ipython" / "profile_default" / "startup" / "00.py", STARTUP)
    write(folder / "ipython" / "profile_default" / "ipython_config.py", "c.InteractiveShellApp.exec_lines = ['1/0']\n")
    return {"IPYTHONDIR": str(folder / "ipython")}


def jupyter(folder):
    write(
        folder / "jupyter" / "jupyter_config.json", '{"KernelManager": {"transport": "ipc", "shutdown_wait_time": 0}}'
    )
    return {"JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "JUPYTER_RUNTIME_DIR": "/proc/self/nowhere"}


def python(folder):
    (folder / "own").symlink_to(ROOT)
    start = str(write(folder / "start.py", STARTUP))
    return {"PYTHONSTARTUP": start, "PYTHONPATH": "own", "PYTHONHASHSEED": "3", "PYTHONOPTIMIZE": "1"}


def home(folder):
    return {"HOME": "/proc/self/nowhere", "XDG_CONFIG_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "TMPDIR": ""}


def ascii_alone(folder):
    return {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}


def few_threads(folder):
    return {"OMP_NUM_THREADS": "1", "SLURM_CPUS_PER_TASK": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "20", "TZ": "Asia/X"}


TOGETHER = [  # what would hide another is in another group
    (matplotlibrc, kernelspec, python, ascii_alone),
    (matplotlibrc_here, ipython, jupyter, few_threads),
    (configuration, home),
]


def pictures(folder, environment, kills=()):
    """The bytes of Figure 6 of this project's records, made in a folder with a relative one for results.

    kills: seconds after which the report, begun again each time, is killed before it may end.
    """
    shown = [path for path in (ROOT / "results" / "small" / "runs").iterdir() if path.name.startswith("mnist")]
    for path in shown:
        shutil.copytree(path, folder / "resulté" / "small" / "runs" / path.name)
    own = {"PYTHONPATH": str(ROOT)} | environment | {"SILALIB_RESULTS": "resulté", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "silalib", "report", "fig6", "--profile", "small", "--no-train"]
    for seconds in kills:
        with contextlib.suppress(subprocess.TimeoutExpired):  # after which it is killed
            subprocess.run(command, cwd=folder, env=os.environ | own, timeout=seconds, stderr=subprocess.DEVNULL)
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True)
    assert not list(folder.rglob("*.tmp")) or kills
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    figures = sorted((folder / "resulté" / "small" / "figures").iterdir())
    return {path.name: path.read_bytes() for path in figures if path.suffix != ".json"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("clean"), {})


@pytest.mark.slow
@pytest.mark.parametrize("group", TOGETHER, ids=lambda group: ", ".join(one.__name__ for one in group))
def test_no_environment_changes_a_figure(group, clean, tmp_path):
    assert len(clean) == 2 * 4  # two figures, each as PNG, SVG, PDF and CSV
    environment = {}
    for foreign in group:
        environment |= foreign(tmp_path) or {}
    assert pictures(tmp_path, environment) == clean


@pytest.mark.slow
@pytest.mark.long
def test_a_report_that_is_killed_ends_with_the_same_bytes(clean, tmp_path, counts):
    began = time.monotonic()
    assert pictures(tmp_path / "timed", {}) == clean
    chance, seconds = random.Random(0), time.monotonic() - began
    assert pictures(tmp_path / "killed", {}, [chance.uniform(0, seconds) for _ in range(6)]) == clean
    counts["kills of a report"] += 6


def test_a_kernel_has_absolute_folders_and_no_settings_of_the_users(tmp_path, monkeypatch):
    foreign = {"MPLBACKEND": "TkAgg", "PYTHONSTARTUP": "x", "IPYTHONDIR": "x", "JUPYTER_PATH": "x", "MATPLOTLIBRC": "x"}
    for name, value in foreign.items() | {("SILALIB_RESULTS", "../r"), ("SILALIB_DATA", "d"), ("PYTHONPATH", "a:/b:")}:
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    found = notebooks.kernel_environment("/private")
    assert found["SILALIB_RESULTS"].endswith("/../r") and found["SILALIB_DATA"] == str(tmp_path / "d")
    assert found["PYTHONPATH"].split(":") == [str(ROOT), str(tmp_path / "a"), "/b"]
    assert found["MPLBACKEND"] == "agg" and found["IPYTHONDIR"] == "/private" and found["HOME"] == os.environ["HOME"]
    assert {"PYTHONSTARTUP", "JUPYTER_PATH", "MATPLOTLIBRC"}.isdisjoint(found)


# -- the share of the CPU


@pytest.mark.parametrize("affinity, quota, slurm, expected", [
    (2, 2, None, 2), (1, 2, None, 1), (2, 1, None, 1), (2, 2, "1", 1), (1, 2, "2", 1), (2, 2, "x", 2), (2, 2, "0", 2),
])  # fmt: skip
def test_cores_are_the_least_of_what_is_allowed(affinity, quota, slurm, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm or "")
    files = {"/sys/fs/cgroup/cpu.max": f"{quota * 100000} 100000"}
    with (
        mock.patch("builtins.open", lambda path, *more: io.StringIO(files[path])),
        mock.patch("os.path.exists", files.get),
    ):
        assert processes.cpu_cores() == expected


@pytest.mark.parametrize("text, threads", [("1", 1), ("2", 2), ("2,1", 2), ("99", 8), ("x", 8), ("", 8)])
def test_threads_of_a_process_are_bounded(text, threads, monkeypatch):
    monkeypatch.setattr(ensure, "cpu_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert ensure.share(torch.device("cpu"), 1, 9) == (1, threads)
    assert ensure.share(torch.device("cpu"), 4, 9) == (4, min(threads, 2))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun sets it to 1 where the user has not
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ensure.share(torch.device("cpu"), None, 9) == (1, 4)


# -- what cannot be written, and why


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EROFS, "set SILALIB_RESULTS to a folder of yours"),
        (errno.EACCES, "set SILALIB_RESULTS to a folder of yours"),
        (errno.ENOLCK, "has no locks (No locks available): set SILALIB_RESULTS to a folder on another one"),
    ],
)
def test_a_cause_has_one_text_with_its_mend(number, words, tiny, plan, results, capsys):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    plan([tiny()])
    place = "fcntl.flock" if number == errno.ENOLCK else "os.fsync"
    with mock.patch(place, fails):
        assert main(["train", "tiny", "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert words in error and ".tmp" not in error and str(results) in error.splitlines()[-1]


SOFT = """
from filelock import SoftFileLock
lock = SoftFileLock({!r})
lock.acquire()
print("held", flush=True)
input()
"""


def test_a_stale_lock_is_told_from_a_running_run(tiny, results):
    """On a file system without flock, a lock is a file with the holder's process in it, which may be dead."""
    run, missing = tiny(), OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    (folder := results / "quick" / "runs" / run.key).mkdir(parents=True)
    command = [sys.executable, "-c", SOFT.format(str(folder / ".lock"))]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with mock.patch("fcntl.flock", side_effect=missing), warnings.catch_warnings(action="ignore"):
        assert records.state(run) == "running"
        holder.kill()
        holder.communicate()
        assert records.state(run) == "pending" and not (folder / ".lock").exists()


def test_workers_without_shared_memory_say_so(tiny, plan, cores, capsys):
    plan([tiny(seed=seed) for seed in range(2)])
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch("_multiprocessing.SemLock", side_effect=error):
        assert main(["train", "tiny", "--workers", "2"]) == 1
    line = "no shared memory for worker processes (Read-only file system): make /dev/shm writable, or use --workers 1"
    assert capsys.readouterr().err.splitlines()[-1] == f"silalib: error: {line}"


@pytest.mark.slow
def test_no_room_ends_a_report_in_one_line_and_old_pages_stay(tmp_path, plan, results):
    plan([])
    grid = {"tiny": Exhibit("Tiny", lambda profile, seeds=None: [], "01_tiny")}
    large = "from IPython.display import HTML\nHTML('<p>large</p>' * 10**5)"
    test_report.write(tmp_path, "00_siamese_labels", v4.new_code_cell(large))
    folder = results / "quick" / "report"
    folder.mkdir(parents=True)
    old = pages.Report("quick", exhibits=grid).page("00_siamese_labels", "failed", error="an old page")
    (folder / "00_siamese_labels.html").write_text(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(NoRoom, match=r"File too large.*: make room and start again"):
            build.build("quick", ["00_siamese_labels"], folder=tmp_path, exhibits=grid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "00_siamese_labels.html").read_text() == old
    assert not [path for path in results.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.slow
def test_a_kernel_without_room_ends_the_report_too(tmp_path, plan, results):
    plan([])
    source = "from silalib.errors import NoRoom\nraise NoRoom('cannot write x (full): make room')"
    test_report.write(tmp_path, "00_siamese_labels", v4.new_code_cell(source))
    with pytest.raises(NoRoom, match=r"^cannot write x"):
        build.build("quick", ["00_siamese_labels"], folder=tmp_path, exhibits={})
    assert not (results / "quick" / "report" / "00_siamese_labels.html").read_text().count("could not be built")


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_closed_streams_harm_nothing(closed, tiny, results):
    """What is opened next would take their numbers, and be written to."""
    close = "; ".join(f"os.close({number})" for number in closed)
    null = "; ".join(f"sys.{('stdin', 'stdout', 'stderr')[number]} = None" for number in closed)
    code = f"import os, sys; {close}; {null}; from silalib.__main__ import main; sys.exit(main(['data', 'nothing']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_text_that_a_stream_cannot_show_is_spelled(tmp_path):
    command = [sys.executable, "-m", "silalib", "data", "folder", "--from", "/é", "--name", "x", "--size", "8"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith(rb"silalib: error: /\xe9 is not a folder")
