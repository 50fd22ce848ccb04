"""The project as a whole: notebooks, links, packaging."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zlib
from functools import cache
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from silalib.analysis import tables
from silalib.experiments import EXHIBITS
from silalib.files import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean(path):
    import nbformat

    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assigned = [node.targets[0].id for node in ast.parse(parameters.source).body]
    assert assigned == ["profile", "seeds", "device", "workers", "train"]
    assert notebook.cells[0].source.startswith("# ")


def code_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell["metadata"].get("tags") != ["installed"]]
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_verdict_comes_first_and_a_notebook_decides_nothing(path):
    """A verdict is that of `claims`, in the cell after the runs and before any table or figure."""
    code = code_of(path)
    judged = [i for i, source in enumerate(code) if "claims.judge" in source and "printed" not in source]
    drawn = [i for i, source in enumerate(code) if re.search(r"plots\.(show|table_page)", source)]
    if path.stem in ("11_coupling", "14_your_own_network"):
        assert not judged
    elif path.stem != "13_regime_choices":  # which asks whether other choices would change a verdict
        assert judged[0] < drawn[0]
    pattern = r"told apart|\bdecide\(|not settled|\bworse\b|\b(?:reproduced|contradicted|negligible)\b"
    assert not re.search(pattern, "\n".join(code))


def test_the_index_of_the_notebooks_has_all():
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text) == [path.stem for path in NOTEBOOKS]


def test_the_notebooks_are_short():
    """Lines of code that are not blank: of the paper's pages, and of all."""
    lines = {path: sum(bool(line.strip()) for line in "\n".join(code_of(path)).splitlines()) for path in NOTEBOOKS}
    assert sum(n for path, n in lines.items() if path.stem < "10") <= 1000
    assert sum(lines.values()) <= 1400


def test_a_notebook_says_in_a_line_where_silalib_is_to_be_had(tmp_path):
    """The first cell, which is the same in all, in a Python without silalib."""
    first = [json.loads(path.read_text(encoding="utf-8"))["cells"][1] for path in NOTEBOOKS]
    assert all(cell["source"] == first[0]["source"] and cell["metadata"]["tags"] == ["installed"] for cell in first)
    source = "".join(first[0]["source"]).partition("    %pip")[0]
    done = subprocess.run([sys.executable, "-I", "-S", "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("silalib is not installed: put its wheel beside")
    (tmp_path / "silalib-1-py3-none-any.whl").touch()
    assert subprocess.run([sys.executable, "-I", "-S", "-c", source], cwd=tmp_path).returncode == 0


def test_schematics_need_nothing_from_elsewhere():
    found = sorted((ROOT / "notebooks").glob("*.svg"))
    assert [path.name for path in found] == ["fig1_two_networks.svg", "fig2_early_exits.svg"]
    shown = "\n".join(code_of(NOTEBOOKS[0]))
    for path in found:
        text = path.read_text()
        assert path.stem in shown and "<text" not in text and len(text) < 50_000
        links = re.findall(r'href="([^"]+)"', text)
        assert links and all(link.startswith(("#", "data:image/png;base64")) for link in links)


def test_every_exhibit_has_its_notebook():
    assert {exhibit.notebook for exhibit in EXHIBITS.values()} - {None} <= {path.stem for path in NOTEBOOKS}


def markdown(path):
    """The Markdown of a file or of a notebook's cells, without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.DOTALL)
    return re.sub(r"`([^`\n]+)`", lambda code: code[1].replace("](", ""), text)  # its words count in a heading


def slugs(text):
    """The anchors that GitHub makes of the headings of a Markdown text."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        same = sum(other == slug or re.fullmatch(re.escape(slug) + r"-\d+", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return found


class Page(HTMLParser):
    """The links, and the anchors, of an HTML page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes["id"]} if "id" in attributes else set()
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]


@cache
def links_and_anchors(path):
    if path.suffix == ".html":
        page = Page(path)
        return page.links, page.anchors
    text = markdown(path)
    links = re.findall(r"\]\(<?([^)\s>]+)[^)]*\)", text) + re.findall(r"^\[[^]]+\]: *(\S+)", text, re.M)
    return links + re.findall(r"""\s(?:href|src)=["']([^"']+)""", text), set(slugs(text))


def resolves(link, path):
    name, _, anchor = unquote(link).partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not anchor or target.suffix not in (".md", ".html") or anchor in links_and_anchors(target)[1]


def broken(path):
    """The links of a file that lead nowhere in this project."""
    inside = [link for link in links_and_anchors(path)[0] if not re.match(r"(https?|mailto|data):", link)]
    return [link for link in inside if not resolves(link, path)]


LINKING = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("benchmarks/*.md")]
LINKING += [*NOTEBOOKS, *ROOT.glob("notebooks/*.md"), *ROOT.glob("results/*.md"), *ROOT.glob("results/*/report/*.html")]


@pytest.mark.parametrize("path", sorted(LINKING), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_anchors_resolve(path):
    assert broken(path) == []


def test_a_broken_link_or_anchor_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "b.html").write_text('<h2 id="A-part">A part</h2><a href="a.md#no">x</a><a href="#A-part">y</a>')
    text = "# One `code`, twice\n## Two\n## Two\n[a](#one-code-twice) [b](b.html#A-part) [c](#two-1) [d](#two-2) "
    text += (
        "[e](none.md) [f](b.html#part) ![g](https://h)\n```\n# No heading [i](j.md)\n```\n[k](../l.md) `[m](n.md)`\n"
    )
    (tmp_path / "a.md").write_text(text)
    (tmp_path.parent / "l.md").touch()
    assert broken(tmp_path / "a.md") == ["#two-2", "none.md", "b.html#part", "../l.md"]
    assert broken(tmp_path / "b.html") == ["a.md#no"]


def test_the_networks_page_is_what_the_code_counts():
    lines = [line for line in (ROOT / "docs" / "networks.md").read_text().splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    counted = tables.networks()
    assert header == list(counted.columns)
    assert rows == counted.astype(str).values.tolist()


def test_documented_sizes_of_networks():
    for row in tables.networks().to_dict("records"):
        parameters, macs = row["documented parameters"], row["documented million MACs"]
        if parameters.startswith("about"):
            millions = parameters.split()[1]
            digits = len(millions.split(".")[1])
            assert abs(int(row["parameters"].replace(",", "")) / 1e6 - float(millions)) < 10**-digits
        elif parameters:
            assert row["parameters"] == parameters
        if macs:
            assert abs(float(row["million MACs"].replace(",", "")) - float(macs.replace(",", ""))) < 1


@pytest.mark.slow
@pytest.mark.long
def test_the_python_of_the_readme_runs(results):
    """In a process of its own, as its reader would."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/usage.md")]
    blocks = [re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in pages]
    assert [len(found) for found in blocks] == [2, 3]
    whole = "\n".join([*blocks[0], blocks[1][0], blocks[1][2]])  # the weights in git are tested with the records
    code = f"{whole}\nassert logits.shape == (500, 10) and len(exits) == 500\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_environment_installs_what_pyproject_says():
    """No conda here: the file is read, not solved."""
    text = (ROOT / "environment.yml").read_text()
    assert re.search(r"^ +- pip:\n +- -c constraints.txt\n +- -e \.\[lab\]$", text, re.M)
    minimum = re.search(
        r">=([\d.]+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    assert f"python={minimum[1]}" in text


def test_constraints_name_every_dependency_once_and_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    wanted = [d for d in wanted if not d.startswith("silalib[")]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no URLs, no local versions"
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert {re.match(r"[\w-]+", d)[0].lower() for d in wanted} <= set(names)


def test_a_wheel_has_every_file_of_the_package():
    """And the notebooks, and of the committed records all but what is measured on each image: at most 2 MiB."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = lambda name: ROOT / tool["package-dir"].get(name, name.replace(".", "/"))
    inside = [path for path in (ROOT / "silalib").rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    assert {path.parent for path in inside if path.suffix == ".py"} <= {folder(name) for name in tool["packages"]}
    listed = [
        (name, path) for name, globs in tool["package-data"].items() for g in globs for path in folder(name).glob(g)
    ]
    data = {path for name, path in listed if name not in tool["package-dir"]}
    assert {path for path in inside if path.suffix != ".py"} == data
    brought = {path for name, path in listed if name in tool["package-dir"]}
    assert {*NOTEBOOKS, *(ROOT / "notebooks").glob("*.svg"), ROOT / "results" / "answer.json"} <= brought
    kept = {path for path in brought if path.match("runs/*/*")}
    assert {path.name for path in kept} == {
        "history.csv",
        "noise.csv",
        "result.json",
        "result.sha256",
        "run.json",
    } or not kept
    assert {path.parts[-4] for path in kept} <= {"paper", "small"}
    assert sum(len(zlib.compress(path.read_bytes())) for path in brought) < 2**21


def test_scripts_are_valid_and_executable():
    for name in ("run_all.sh", "run_tests.sh", ".ci/run", "environment.sh"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)
        assert name == "environment.sh" or (ROOT / name).stat().st_mode & 0o100, name
