"""No step on a GPU waits for the host, copies from it or mixes devices: seen without a GPU, see fake_cuda.py."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fake_cuda import CASES, FAULTS

from silalib.files import ROOT

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
TORCH = Path(torch.__file__).parent


def missing():
    """Why this cannot be tested here, or None."""
    if not (sys.platform == "linux" and shutil.which("g++")):
        return "needs Linux and the compiler g++"
    return "needs a PyTorch for CPUs alone: this one asks a real GPU" if torch.backends.cuda.is_built() else None


def train_all():
    """Name of each case and fault -> the traceback that ended its run, or None; all in one process of their own."""
    with tempfile.TemporaryDirectory() as name:
        return compile_and_train(Path(name))


def compile_and_train(folder):
    library = folder / "fake_cuda.so"
    libraries = [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    source = [TESTS / "fake_cuda.cpp", "-o", library, f"-I{TORCH}/include"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *source, *libraries], check=True)
    # torch asks for the devices as it is imported
    script = f"import ctypes; ctypes.CDLL({str(library)!r}); import fake_cuda; fake_cuda.main({str(folder)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def errors():
    if reason := missing():
        pytest.skip(reason)
    return train_all()


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_gpu_neither_waits_in_a_step_nor_mixes_devices(case, errors):
    assert errors[case] is None, errors[case]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, errors):
    assert errors[fault], "the run came to its end"
    assert re.search(FAULTS[fault][1], errors[fault].splitlines()[-1]), errors[fault]
