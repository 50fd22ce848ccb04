"""The house: which module may import which, and how large it may be; imports inside functions count."""

import ast

import pytest

from silalib.paths import ROOT

PACKAGE = ROOT / "silalib"
CIRCLE = {"cluster", "data", "experiments", "folders", "launch", "parallel", "runs", "torchrun", "trainer"}
LINES, LONGEST = 7800, 730
"""Without silalib/models, and of one file."""


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


def lines(path):
    return len(path.read_text().splitlines())


def test_circles():
    assert circles(imports()) in ([], [CIRCLE])


def test_a_circle_is_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(edges) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_sizes():
    sizes = {name: lines(path) for name, path in modules().items() if not name.startswith("models")}
    assert sum(sizes.values()) <= LINES
    assert max(sizes.values()) <= LONGEST


@pytest.mark.parametrize("module", ["losses", "models.layers"])
def test_the_paper_page_imports_nothing_of_ours(module):
    assert imports()["losses"] == set()
    assert module in imports()
