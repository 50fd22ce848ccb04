"""What an installation brings: torch alone, and extras that are named where they are missing."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import torch

from silalib.errors import missing_extra
from silalib.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMES_AS = {"PIL": "pillow", "sklearn": "scikit-learn"}
COMES_WITH = {
    "joblib": "scikit-learn",
    "IPython": "ipykernel",
    "jupyter_client": "ipykernel",
    "jupyter_core": "ipykernel",
}


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].lower() for line in requirements}


def extra_of(module):
    """The first extra that brings a module, "" where torch alone does."""
    wanted = {**COMES_AS, **COMES_WITH}.get(module, module)
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return next(extra for extra, requirements in extras.items() if wanted in names(requirements))


def imported():
    """(file of the package, what it imports from elsewhere), also inside functions."""
    for path in (ROOT / "silalib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names):
                yield path.relative_to(ROOT / "silalib"), name


def test_dependencies_are_torch_alone():
    assert names(PROJECT["dependencies"]) == {"torch"}
    assert set(PROJECT["optional-dependencies"]) == {"train", "report", "lab", "cluster", "dev", "all"}
    rooms = {path.parts[0] for path, module in imported() if extra_of(module)}
    assert rooms.isdisjoint({"__init__.py", "errors.py", "losses.py", "models"})


def test_training_needs_no_more_than_its_extra():
    for path, module in imported():
        own = path.parts[0] in ("analysis", "report") or path.name == "ray_cluster.py"
        if not own and (path.name, module) != ("comparison.py", "matplotlib"):  # what draws is asked for by name
            assert extra_of(module) in ("", "train"), path


def test_every_missing_module_is_told_with_its_extra():
    for module in {module for _, module in imported()} - {"torch"}:
        told = str(missing_extra(ModuleNotFoundError(name=f"{module}.part")))
        assert told.startswith(f"{module} is not installed: ") and told.endswith(f"'.[{extra_of(module)}]'")
        assert "\n" not in told
    with pytest.raises(ModuleNotFoundError, match="a fault of ours"):
        missing_extra(ModuleNotFoundError("a fault of ours", name="silalib.nothing"))


def test_elsewhere_than_in_a_checkout_the_wheel_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("silalib.errors.CONSTRAINTS", tmp_path / "nothing")
    told = str(missing_extra(ModuleNotFoundError(name="papermill")))
    assert told.startswith("papermill is not installed: pip install 'silalib-") and ".whl[report]'" in told


def without(module, code):
    """A process's exit status, output and errors, in which a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_public_name_and_the_command_line_name_the_extra():
    told = "numpy is not installed: in the checkout, pip install -c constraints.txt -e '.[train]'"
    status, _, errors = without("numpy", "from silalib import load")
    assert status == 1 and errors.splitlines()[-1] == f"silalib.errors.MissingExtra: {told}"
    code = "from silalib.__main__ import main; sys.exit(main(['train', 'fig6']))"
    status, printed, errors = without("numpy", code)
    assert (status, printed) == (1, "") and errors.splitlines()[-1] == f"silalib: error: {told}"
    assert "Traceback" not in errors
    code = "try:\n    from silalib import ensure\nexcept ImportError:\n    print('none')"
    assert without("numpy", code)[1] == "none\n"


def distributions(name, found):
    """The distributions that one needs, and theirs, of those that are here."""
    found.add(name)
    try:
        needed = requires(name) or []
    except PackageNotFoundError:
        return found
    for other in names(line for line in needed if "extra ==" not in line) - found:
        distributions(other, found)
    return found


@pytest.mark.slow
def test_a_wheel_beside_torch_alone_trains_a_pair(tmp_path):
    """In an environment with torch and what torch needs, and nothing else; torch itself is linked, not copied."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("silalib-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    here = Path(torch.__file__).parent.parent
    needed = distributions("torch", set()) - {"numpy"} | {"torchgen", "functorch", "typing_extensions"}
    for path in here.iterdir():
        if path.name.partition(".")[0].partition("-")[0].lower().replace("_", "-") in needed | {"typing-extensions"}:
            (packages / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    script = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert sum(bool(line.strip()) for line in script.splitlines()) == 10
    status, printed, errors = run("-c", script)
    assert status == 0, errors
    assert all(float(accuracy) > 0.9 for accuracy in printed.strip("[]\n").split(", "))
    assert run("-c", "from silalib import MODELS; print(len(MODELS) > 5)")[1] == "True\n"
    status, printed, errors = run("-m", "silalib", "train", "fig6")
    assert (status, printed) == (1, "") and "Traceback" not in errors
    told = errors.splitlines()[-1]  # after torch's own warning that numpy is missing
    assert re.fullmatch(r"silalib: error: \w+ is not installed: pip install '.*\.whl\[train\]'.*", told)
