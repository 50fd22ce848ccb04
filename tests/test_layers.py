"""The house and its plan: which module may import which, and how large it may be; imports inside functions count."""

import ast
import subprocess
import sys

import pytest

from silalib.files import ROOT

PACKAGE = ROOT / "silalib"

FLOORS = (
    ("errors",),
    ("files", "randomness", "losses", "models"),
    ("data",),
    ("run",),
    ("experiments", "early_exit"),
    ("training",),
    ("records",),
    ("launch",),
    ("analysis",),
    ("comparison",),
    ("report",),
    ("__main__",),
)
"""Rooms, modules or folders, from the ground up: each imports rooms of lower floors, and itself."""

PAPER = ("losses", "run", "experiments", "early_exit", "data", "training")
"""What someone looks for who has read the paper."""

LINES, LINES_OF_PAPER, LINES_OF_A_FILE, MODULES_ON_TOP = 6970, 2600, 400, 11
"""At most; the first without models/."""


def modules():
    """Module -> its path, as "launch" or "models.layers"."""
    paths = {path: list(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


def imports():
    """Module -> the modules of the package that it imports."""
    found = modules()

    def known(name):
        while name not in found:
            name = name.rpartition(".")[0]
        return name

    edges = {}
    for module, path in found.items():
        package = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
        edges[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = [*["silalib", *package][: len(package) + 2 - node.level]] if node.level else []
                base += node.module.split(".") if node.module else []
                names = [".".join([*base, alias.name]) for alias in node.names]
            own = {known(name.removeprefix("silalib").removeprefix(".")) for name in names if is_own(name)}
            edges[module] |= own - {module}
    return edges


def is_own(name):
    return name == "silalib" or name.startswith("silalib.")


def circles(edges):
    """Sets of modules that import each other, on whichever way."""
    reached = {}
    for start in edges:
        seen, waiting = set(), [start]
        while waiting:
            for other in edges[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reached[start] = seen
    found = [{b for b in reached[a] if a in reached[b]} for a in edges if a in reached[a]]
    return [circle for i, circle in enumerate(found) if circle not in found[:i]]


def room(module):
    return module.split(".")[0]


def upward(edges):
    """The imports that the plan does not allow, as (module, what it imports)."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    floor[""] = -1  # the package itself: its version
    found = [(module, other) for module, others in edges.items() for other in others if room(module) != room(other)]
    return [(module, other) for module, other in found if floor[room(module)] <= floor[room(other)]]


def lines(names):
    return sum(len(path.read_text().splitlines()) for name, path in modules().items() if room(name) in names)


def test_no_circles():
    assert circles(imports()) == []


def test_imports_point_down():
    assert upward(imports()) == []


def test_a_circle_and_an_import_upward_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(edges) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []
    edges = {"data.batches": {"data.augment", "run", ""}, "experiments": {"early_exit", "run"}, "run": {"files"}}
    assert sorted(upward(edges)) == [("data.batches", "run"), ("experiments", "early_exit")]


def test_imports_inside_functions_count():
    """Each of these is in a function, to start fast."""
    found = imports()
    assert "report.pages" in found["__main__"] and "launch.ensure" in found["__main__"]


def test_losses_import_nothing_of_ours():
    assert imports()["losses"] == set()


def test_sizes_of_files():
    sizes = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: size for name, size in sizes.items() if size > LINES_OF_A_FILE} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_ON_TOP


def test_size_of_the_paper():
    assert lines(PAPER) <= LINES_OF_PAPER


def test_size_of_the_package():
    assert lines({room(name) for name in modules()} - {"models"}) <= LINES


def test_folders_have_empty_inits():
    """A spawned worker must not import torch to learn a name."""
    filled = {path.parent.name for path in PACKAGE.glob("*/__init__.py") if path.read_text().strip()}
    assert filled == {"data", "models"}


@pytest.mark.parametrize("module", ["silalib", "silalib.files", "silalib.launch.processes", "silalib.launch.progress"])
def test_what_starts_fast_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
