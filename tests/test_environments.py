"""The report in users' environments: none of them changes a figure, or loses one."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from silalib.files import ROOT
from silalib.report import notebooks

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


OURS = [matplotlibrc, matplotlibrc_here, configuration, kernelspec, ipython, jupyter, python, home, ascii_alone]
OURS += [few_threads]


def pictures(folder, environment):
    """The bytes of Figure 6 of this project's records, made in a folder with a relative one for results."""
    shown = [path for path in (ROOT / "results" / "small" / "runs").iterdir() if path.name.startswith("mnist")]
    for path in shown:
        shutil.copytree(path, folder / "resulté" / "small" / "runs" / path.name)
    own = {"PYTHONPATH": str(ROOT)} | environment | {"SILALIB_RESULTS": "resulté", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "silalib", "report", "fig6", "--profile", "small", "--no-train"]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    figures = sorted((folder / "resulté" / "small" / "figures").iterdir())
    return {path.name: path.read_bytes() for path in figures if path.suffix != ".json"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("clean"), {})


@pytest.mark.slow
@pytest.mark.parametrize("foreign", OURS, ids=lambda function: function.__name__)
def test_no_environment_changes_a_figure(foreign, clean, tmp_path):
    assert len(clean) == 6
    assert pictures(tmp_path, foreign(tmp_path) or {}) == clean


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
