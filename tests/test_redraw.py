"""What is committed is drawn again from its records, in kernels as a user starts them, without data or training."""

import re
import shutil
from dataclasses import replace

import pytest

from silalib import experiments, records
from silalib.__main__ import main
from silalib.analysis import claims
from silalib.files import ROOT
from silalib.report import notebooks

pytestmark = pytest.mark.slow
PROFILES = [path.parent.name for path in sorted(ROOT.glob("results/*/runs")) if path.parent.name != "quick"]


@pytest.fixture
def redraw(results, data_folder, capfd):
    """redraw(profile, *arguments) -> exit status and standard error of `report --no-train` on committed records."""

    def run(profile, *arguments):
        if not (results / profile).exists():
            shutil.copytree(ROOT / "results" / profile / "runs", results / profile / "runs")
        status = main(["report", *arguments, "--profile", profile, "--no-train"])
        return status, capfd.readouterr().err

    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("profile", [pytest.param(p, marks=pytest.mark.long) if p == "paper" else p for p in PROFILES])
def test_committed_records_are_redrawn_to_the_same_bytes(redraw, results, profile):
    """Two pages, which `report` executes twice; test_frozen.py draws all of them."""
    contained, drawn = notebooks.contents(experiments.EXHIBITS), []
    for _ in range(2):
        shutil.rmtree(results / profile / "report", ignore_errors=True)  # else a second start keeps the pages
        for name in ("table1", "fig6"):
            status, errors = redraw(profile, name)
            grid = set(experiments.EXHIBITS[name].grid(profile))
            left = sum(records.find(run) is None for run in grid)
            assert status == 0 and (f"{left} of {len(grid)} runs not run" in errors) == bool(left)
            (stem,) = (stem for stem, (_, exhibits) in contained.items() if exhibits[:1] == [name])
            page = (results / profile / "report" / f"{stem}.html").read_text(encoding="utf-8")
            assert (f"{left} of {len(grid)} runs of this page are missing" in page) == bool(left)
            shown = {replace(run, seed=0) for run in grid if records.find(run)}  # a cell can lack a seed alone
            assert shown == {replace(run, seed=0) for run in grid} or re.search("not run", page, re.IGNORECASE)
        drawn.append({kind: contents(results / profile / kind) for kind in ("figures", "tables", "runs")})
    assert drawn[0] == drawn[1] and drawn[0]["runs"] == contents(ROOT / "results" / profile / "runs")
    for kind in ("figures", "tables"):
        assert any(path.name.startswith("fig6") for path in drawn[0][kind])


def test_a_damaged_record_is_shown_and_not_trained_again(redraw, results):
    folder = shutil.copytree(ROOT / "results" / "paper" / "runs", results / "paper" / "runs")
    damaged = next(run for run in experiments.fig6("paper") if records.find(run))
    (folder / damaged.key / "history.csv").write_text("damaged")
    before = contents(folder)
    status, errors = redraw("paper", "fig6")
    assert status == 1 and " runs with a damaged record" in errors
    assert contents(folder) == before
    page = (results / "paper" / "report" / "07_fig6_mnist_features.html").read_text(encoding="utf-8")
    assert "(1 with a damaged record)" in page
    assert claims.judge("paper", None, ["6"])[0].verdict == "so far, 2 of 3 seeds"
