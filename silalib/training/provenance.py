"""Where a result comes from: code, versions, device."""

import hashlib
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from ..files import PACKAGE, ROOT
from .execution import amx


def device_kind(part):
    """ "cpu" or "cuda", by what `here` said; older records name no kind, but end a processor's name in parentheses."""
    return part.get("kind") or ("cpu" if part["device"].endswith(")") else "cuda")


def here(device, ranks, dtypes, graphs):
    """What this process trains with; a run that resumes elsewhere has several such `parts`."""
    gpu = device.type == "cuda"
    cuda = {"graphs": graphs, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if gpu else {}
    precision = "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    part = {"silalib": code_version(), "python": platform.python_version(), "torch": str(torch.__version__)}
    part |= {"kind": device.type, "device": torch.cuda.get_device_name(device) if gpu else processor(), "amx": amx()}
    part |= {"threads": torch.get_num_threads(), "processes": ranks.size}
    return part | {"layout": "network-parallel" if ranks.parallel else None, **cuda, "precision": precision}


def code_version():
    """{"code": hash of the package's source, "commit": of the checkout, "+" if it was changed}."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("data/*.json")]):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    version = {"code": digest.hexdigest()[:12]}
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", ROOT, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        version["commit"] = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    return version


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*\S)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
