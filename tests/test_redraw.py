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


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_records_are_redrawn_to_the_same_bytes(redraw, results, profile):
    """Every page once, and one of them again."""
    status, errors = redraw(profile)
    assert status == 0
    first = {kind: contents(results / profile / kind) for kind in ("figures", "tables", "runs")}
    assert redraw(profile, "fig6")[0] == 0
    second = {kind: contents(results / profile / kind) for kind in first}
    assert first == second and first["runs"] == contents(ROOT / "results" / profile / "runs")
    for kind in ("figures", "tables"):
        assert len(first[kind]) > 10 and any(path.name.startswith("fig6") for path in first[kind])
    grid = {run for exhibit in experiments.EXHIBITS.values() for run in exhibit.grid(profile)}
    missing = sum(records.find(run) is None for run in grid)
    assert f"{missing} of {len(grid)} runs not run" in errors
    for stem, (_, exhibits) in notebooks.contents(experiments.EXHIBITS).items():
        page = (results / profile / "report" / f"{stem}.html").read_text(encoding="utf-8")
        own = {run for name in exhibits for run in experiments.EXHIBITS[name].grid(profile)}
        left = sum(records.find(run) is None for run in own)
        assert (f"{left} of {len(own)} runs of this page are missing" in page) == bool(left)
        shown = {replace(run, seed=0) for run in own if records.find(run)}  # a cell can lack a seed alone
        assert shown == {replace(run, seed=0) for run in own} or re.search("not run", page, re.IGNORECASE)


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
