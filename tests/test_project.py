"""The project as a whole: notebooks, links, packaging."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from silalib import summary
from silalib.experiments import EXHIBITS
from silalib.paths import ROOT

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


def test_every_exhibit_has_its_notebook():
    assert {exhibit.notebook for exhibit in EXHIBITS.values()} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_networks_page_is_what_the_code_counts():
    lines = [line for line in (ROOT / "docs" / "networks.md").read_text().splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    counted = summary.networks()
    assert header == list(counted.columns)
    assert rows == counted.astype(str).values.tolist()


def test_documented_sizes_of_networks():
    for row in summary.networks().to_dict("records"):
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
def test_the_python_of_the_readme_runs(results):
    """In a process of its own, as its reader would, with two networks and a batch for the first snippet."""
    given = (
        "import torch\n"
        "net1, net2 = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)) for _ in range(2))\n"
        "images, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 5\n"
    )
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = given + "\n".join(blocks) + "\nassert loss.isfinite() and logits.shape == (500, 10) and len(exits) == 500\n"
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
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no URLs, no local versions"
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
    assert {re.match(r"[\w-]+", d)[0].lower() for d in wanted} <= set(names)


def test_scripts_are_valid_and_executable():
    for name in ("run_all.sh", "run_tests.sh", ".ci/run", "environment.sh"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)
        assert name == "environment.sh" or (ROOT / name).stat().st_mode & 0o100, name
