"""What comes from outside stays outside: strangers' records, their text, links in the place of files."""

import random
from unittest import mock

import pytest
import strangers

from silalib import records
from silalib.__main__ import main
from silalib.experiments import EXHIBITS, Exhibit
from silalib.report import pages
from silalib.training import trainer


def content(folder):
    """Path -> (what it is, its bytes) of everything in a folder."""
    return {path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


@pytest.fixture
def made(trained):
    """(result, files) of the small run, as training gives them."""
    run, folder = trained
    record = records.load(run, folder)
    result = {name: value for name, value in record.result.items() if name != "files"}
    return result, {name: record.read(name) for name in record.result["files"] if name != "run.json"}


@pytest.mark.parametrize("batches", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_mutated_records_end_no_command(batches, trained, made, plan, results, tmp_path, counts, capsys):
    """Half of the records are whole, and shown; of the others each is damaged, or trained again, or harmless."""
    run, source = trained
    grid = [type(run)(**run.config | {"seed": seed}) for seed in range(80 if batches > 1 else 24)]
    plan(grid)
    tiny = {"tiny": Exhibit("Tiny", EXHIBITS["tiny"].grid, "01_tiny")}
    victim, folder = tmp_path / "victim", results / "quick" / "runs"
    for batch in range(batches):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        strangers.reset(folder, victim)
        for each in grid:
            strangers.forged(folder / each.key, source, each)
            if each.seed % 2:
                strangers.mutate(folder / each.key, victim, chance)
                counts["records mutated"] += 1
        before = content(victim)
        assert main(["status", "tiny"]) in (0, 1), seed
        assert "\x1b" not in (told := capsys.readouterr().out) and "Traceback" not in told, seed
        whole = {each for each in grid if records.state(each) == "done"}
        assert {each for each in grid if each.seed % 2 == 0} <= whole, seed
        report = pages.Report("quick", exhibits=tiny)
        page = report.notebook_page("01_tiny", strangers.EMPTY)
        assert f"<dd>{len(whole)} of {len(grid)}</dd>" in page, seed
        assert strangers.Alive(page).found == [], seed
        report.folder.mkdir(exist_ok=True)
        report.write_index()
        with mock.patch.object(trainer, "train", lambda *arguments, **how: made):
            assert main(["train", "tiny", "--workers", "1", "--retry"]) in (0, 1), seed
        error = capsys.readouterr().err
        assert "\x1b" not in error and "Traceback" not in error and "internal error" not in error, (seed, error)
        assert whole <= {each for each in grid if records.state(each) == "done"}, seed
        assert content(victim) == before, seed
