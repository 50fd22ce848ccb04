"""The pages of docs/: what they tell the reader to do is done here, and what they say is compared."""

import os
import pkgutil
import re
import shutil
import subprocess
import sys
from inspect import ismodule
from itertools import pairwise

import pytest

import silalib
from silalib.data import DATASETS
from silalib.files import ROOT

DOCS = ROOT / "docs"


def blocks(page):
    """(heading, language, code) of every fenced block of a page, in its order."""
    found = []
    for section in re.split(r"^(?=##+ )", (DOCS / page).read_text(), flags=re.M):
        heading = section.splitlines()[0] if section else ""
        found += [(heading.strip("# "), *block) for block in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)]
    return found


def file_of(code):
    """The file that a block is, or changes, or None: it is named in the first line."""
    found = re.match(r"# (\S+\.py)\n", code)
    return found and found[1]


def change(folder, language, code):
    """Write a file, or make a change to it: the lines that are not new must be there once, as they are."""
    path, content = folder / file_of(code), code.split("\n", 1)[1]
    if language == "python":
        assert not path.exists()
        path.write_text(content)
        return
    text = path.read_text()
    for hunk in content.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +" for line in lines)
        old, new = "".join(line[1:] for line in lines if line[0] == " "), "".join(line[1:] for line in lines)
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture
def copy(tmp_path):
    """A copy of the code and its tests."""
    folder = tmp_path / "copy"
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("silalib", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder, language, code):
    """The output of a block, run in a folder by this Python with the silalib that is there."""
    command = {"python": [sys.executable, "-c", code], "bash": ["bash", "-euo", "pipefail", "-c", code]}[language]
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_is_added_is_small_and_fits(copy):
    added = {}
    for heading, language, code in blocks("extending.md"):
        if file_of(code):
            change(copy, language, code)
            new = code.splitlines()[1:] if language == "python" else re.findall(r"^\+(.*)", code, re.M)
            added[heading] = added.get(heading, 0) + sum(bool(line.strip()) for line in new)
    assert list(added) == ["A network", "A data set", "A method"]
    assert max(added.values()) < 20
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "silalib"], cwd=copy, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_what_is_added_trains_and_is_tested(copy, results):
    outputs = {}
    for heading, language, code in blocks("extending.md"):
        if file_of(code):
            change(copy, language, code)
        else:
            outputs.setdefault(heading, []).append(run(copy, language, code))
    table, tests = outputs["A network"]
    assert table.count("All-CNN x2") == 2 and "not run" not in table  # Net1 and Net2
    trained, counted = outputs["A data set"]
    assert trained.count("stripes, profile quick") == 2
    assert counted.startswith("stripes: 800 training and 200 test images")
    assert (copy / "detached.png").stat().st_size > 10000
    for passed in (tests, outputs["A method"][1]):
        assert re.search(r"[1-9]\d* passed", passed) and "failed" not in passed
    keys = [path.parent.name for path in results.glob("quick/runs/*/result.json")]
    assert {name: sum(name in key for key in keys) for name in ("allcnn", "stripes", "detached")} == {
        "allcnn": 4, "stripes": 2, "detached": 2,
    }  # fmt: skip


def test_a_number_is_reproduced(monkeypatch):
    """Every block that is followed by its output gives it; the last line of the last one is the cell of the page."""
    monkeypatch.delenv("SILALIB_RESULTS")
    page = blocks("reproduce.md")
    (_, language, cell), *_ = page
    assert language == "text"
    outputs = [
        (run(ROOT, language, code), expected)
        for (_, language, code), (_, following, expected) in pairwise(page)
        if language in ("python", "bash") and following == "text"
    ]
    assert len(outputs) == 4
    for output, expected in outputs:
        assert output == expected
    assert outputs[-1][0].splitlines()[-1] == cell.strip()
    assert cell.strip() in (ROOT / "results/paper/report/07_fig6_mnist_features.html").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_a_number_is_trained_in_quick():
    heading, language, code = blocks("reproduce.md")[-1]
    assert (heading, language) == ("Train it again", "bash")
    output = run(ROOT, language, code)
    assert "result.json: OK" in output and output.count('"test_concentration"') == 2  # Net1 and Net2


def test_the_model_cards_hours_are_summed(monkeypatch):
    ((_, language, code),) = blocks("model_card.md")
    assert re.search(r"^paper: \d+\.\d hours on ", run(ROOT, language, code), re.M)


def table(page, first):
    """The rows of the table whose header begins with these words."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_data_card_is_what_the_code_says():
    image = lambda spec: "x".join(map(str, spec.image))
    assert table("data_card.md", "name | data set") == [
        [f"`{name}`", spec.title, str(spec.classes), image(spec), str(spec.train), str(spec.test)]
        for name, spec in DATASETS.items()
    ]
    fixed = [[f"`{name}`", spec.sha256] for name, spec in DATASETS.items() if spec.sha256]
    assert table("data_card.md", "name | sha256") == fixed


MODULES = [found.name for found in pkgutil.walk_packages(silalib.__path__, "silalib.")]
SUFFIXES = ("py", "json", "csv", "toml", "svg", "md", "ipynb")

PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "data" / "README.md", *ROOT.glob("notebooks/*.ipynb")]


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: path.name)
def test_what_a_page_names_is_there(path):
    """Files of this project, and modules with their names as Python would import them."""
    text = path.read_text()
    files = re.findall(r"`((?:silalib|tests|benchmarks|docs)/[\w/]+\.(?:py|sh|md))`", text)
    made_here = {file_of(code) for _, _, code in blocks("extending.md")}
    assert [name for name in files if not (ROOT / name).exists() and name not in made_here] == []
    for name in re.findall(r"`silalib((?:\.\w+)+)", text) + re.findall(r"-m silalib((?:\.\w+)+)", text):
        assert pkgutil.resolve_name(f"silalib{name}"), name
    lines = re.findall(r"^(?: *\"?)(from silalib[\w.]* import [\w, ]+)", text, re.M)
    for line in lines:
        module, names = line.removeprefix("from ").split(" import ")
        for name in re.split(r",\s*", names.strip()):
            found = pkgutil.resolve_name(f"{module}.{name}")
            if ismodule(found):
                assert [each for each in re.findall(rf"\b{name}\.(\w+)", text) if not in_one_of([found], each)] == [], (
                    line
                )
    for room, name in re.findall(r"`(\w+)\.(\w+)[`(]", text):
        found = [pkgutil.resolve_name(full) for full in MODULES if full.endswith(f".{room}")]
        assert not found or in_one_of(found, name), f"{room}.{name}"


def in_one_of(modules, name):
    """Whether a module has such a name or a module below it, or the name is that of a kind of file."""
    below = {f"{module.__name__}.{name}" for module in modules}
    return below & set(MODULES) or name in SUFFIXES or any(hasattr(module, name) for module in modules)


def test_the_architecture_shows_the_rooms_that_are_there():
    """All rooms, and of the modules inside them only such that exist."""
    tree = re.search(r"```\nsilalib/\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)[1]
    package, rooms = ROOT / "silalib", []
    for indent, name in re.findall(r"^( +)([\w/]+)", tree, re.M):
        path = package / (name if indent == "  " else f"{rooms[-1]}{name}")
        assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), name
        rooms += [name] if indent == "  " else []
    found = [path for path in package.iterdir() if path.suffix == ".py" or path.name.isalpha()]
    assert {name.strip("/") for name in rooms} == {path.stem for path in found} - {"__init__"}


def test_nothing_is_left_out():
    index, benchmarks = (DOCS / "README.md").read_text(), (DOCS / "benchmarks.md").read_text()
    assert [path.name for path in DOCS.glob("*.md") if f"({path.name})" not in index] == ["README.md"]
    assert not [path.name for path in (ROOT / "benchmarks").glob("*.py") if f"benchmarks/{path.name}" not in benchmarks]
    assert f": {silalib.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
