"""run_all.sh on a fresh clone, with a Python that only pretends: killed, started twice at once, through a link."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from silalib.files import ROOT

PYTHON = f"""#!/usr/bin/env bash
# A virtual environment is of use once it is whole; a half installation is never mended by another one.
case "$*" in
*find_spec*) [ -e "$(dirname "$0")/../whole" ] ;;
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && sleep 0.15 && touch .venv/pip ;;
"-m pip --version") [ -e .venv/pip ] ;;
"-m pip install"*)
    echo >>installations
    [ ! -e .venv/half ] || exit 1
    touch .venv/half && sleep 0.3 && rm .venv/half && touch .venv/whole
    ;;
"-m silalib"*) echo "$PWD ${{SILALIB_RESULTS:-}} $*" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A checkout without an environment; clone(**environment) starts its run_all.sh."""
    folder, programs = tmp_path / "clone", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    for name in ("run_all.sh", "environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "python3"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)

    def start(script=folder / "run_all.sh", cwd=tmp_path, **environment):
        environment = {"PATH": f"{programs}:/usr/bin:/bin"} | environment
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([script], cwd=cwd, env=environment, start_new_session=True, **pipes)

    start.folder = folder
    return start


def ends_well(process):
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and output.splitlines()[-1].endswith("-m silalib report"), error


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_installation_begins_again(kills, clone, counts):
    """With all that it started, or the script alone, whose children then go on for a while."""
    chance = random.Random(0)
    for _ in range(kills):
        shutil.rmtree(clone.folder / ".venv", ignore_errors=True)
        process = clone()
        time.sleep(chance.uniform(0, 1.2))
        (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        counts["installations killed"] += 1
        ends_well(clone())
    ends_well(clone())


def test_two_at_once_install_once(clone):
    for process in [clone() for _ in range(3)]:
        ends_well(process)
    assert (clone.folder / "installations").read_text() == "\n"


def test_an_environment_without_pip_is_made_again(clone):
    (clone.folder / ".venv" / "bin").mkdir(parents=True)
    (clone.folder / ".venv" / "bin" / "python").symlink_to("/bin/false")
    ends_well(clone())


def test_a_failed_installation_says_so_and_begins_again(clone):
    (clone.folder / ".venv").mkdir()
    (clone.folder / ".venv" / "pip").touch()
    (clone.folder / ".venv" / "half").touch()
    (clone.folder / ".venv" / "bin").mkdir()
    shutil.copy(clone.folder.parent / "programs" / "python", clone.folder / ".venv" / "bin")
    process = clone()
    assert "the installation failed: see above" in process.communicate()[1] and process.returncode == 1
    ends_well(clone())


def test_started_through_a_link_from_elsewhere(clone, tmp_path):
    """Relative folders are those of where it was started, and no CDPATH leads away."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "all").symlink_to("../link")
    (tmp_path / "link").symlink_to(clone.folder / "run_all.sh")
    process = clone(tmp_path / "x" / "all", tmp_path / "x", SILALIB_RESULTS="../r", CDPATH="/tmp:/")
    output = process.communicate()[0].splitlines()[-1]
    assert output == f"{clone.folder} {tmp_path}/x/../r -m silalib report"
