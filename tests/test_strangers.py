"""What comes from outside stays outside: strangers' records, their text, links in the place of files."""

import html
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import strangers
from nbformat import v4
from test_report import shown_by

from silalib import experiments, records
from silalib.__main__ import main
from silalib.analysis import plots, tables
from silalib.errors import CorruptFile
from silalib.experiments import EXHIBITS, Exhibit
from silalib.files import ROOT, from_csv, read_bytes
from silalib.launch.ensure import ensure
from silalib.launch.progress import Progress
from silalib.report import pages
from silalib.training import trainer


def content(folder):
    """Path -> (what it is, how large, its bytes where they are few) of everything in a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    read = lambda path, stat: (
        path.read_bytes() if path.is_file() and not path.is_symlink() and stat.st_size < 10**8 else 0
    )
    return {path: (stat.st_mode, stat.st_size, read(path, stat)) for path, stat in found.items()}


@pytest.fixture
def made(trained):
    """(result, files) of the small run, as training gives them."""
    run, folder = trained
    record = records.load(run, folder)
    result = {name: value for name, value in record.result.items() if name != "files"}
    return result, {name: record.read(name) for name in record.result["files"] if name != "run.json"}


BATCHES = [1, pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=[pytest.mark.slow, pytest.mark.long])]


@pytest.mark.parametrize("batches", BATCHES)
def test_mutated_records_end_no_command(batches, trained, made, plan, results, tmp_path, counts, capsys):
    """Half of the records are whole, and shown; of the others each is damaged, or trained again, or harmless."""
    run, source = trained
    grid = [type(run)(**run.config | {"seed": seed}) for seed in range(80 if batches > 1 else 24)]
    plan(grid)
    tiny = {"tiny": Exhibit("Tiny", EXHIBITS["tiny"].grid, "01_tiny")}
    victim, folder = tmp_path / "victim", results / "quick" / "runs"
    for _ in range(batches):
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
        shown = ensure(grid, "quick", train=False)  # among them those of which the weights alone are damaged
        assert whole <= shown.keys() and f"<dd>{len(shown)} of {len(grid)}</dd>" in page, seed
        assert strangers.Alive(page).found == [], seed
        report.folder.mkdir(exist_ok=True)
        report.write_index()
        with mock.patch.object(trainer, "train", lambda *arguments, **how: made):
            assert main(["train", "tiny", "--workers", "1", "--retry"]) in (0, 1), seed
        error = capsys.readouterr().err
        assert "\x1b" not in error and "Traceback" not in error and "internal error" not in error, (seed, error)
        assert whole <= {each for each in grid if records.state(each) == "done"}, seed
        assert content(victim) == before, seed


HOSTILE = ("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[a](javascript:alert(1)) https://example.org")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_record_is_alive_in_a_page(text, record, tiny, plan, results, monkeypatch):
    """A hostile string in every text of every file, shown by every way from a record into a page."""
    plan([])
    result = record.result
    for name, value in [
        ("device", text),
        ("torch", text),
        ("python", text),
        ("silalib", {"code": text}),
        ("new", text),
    ]:
        result["provenance"][name] = value
    strangers.seal(record.path, result)
    (failed := results / "quick" / "runs" / tiny(seed=7).key).mkdir()
    records.write_failure(failed, text, epoch=text, step=text, lr=text)
    grid = [record.run, tiny(seed=7)]
    exhibits = {"tiny": Exhibit(text, lambda profile, seeds=None: grid, "01_tiny")}
    found = {record.run: records.load(record.run)}
    frame = tables.heads(grid, found).assign(**{text: text}).astype(str)
    outputs = [shown_by(monkeypatch, plots.show_table, frame, "heads", "quick", text, records=found)]
    outputs += [v4.new_output("display_data", {kind: text}) for kind in ("text/markdown", "text/plain", "text/latex")]
    outputs += [v4.new_output("stream", name="stdout", text=text)]
    cells = [v4.new_markdown_cell("# Tiny"), v4.new_code_cell("show()", outputs=outputs, execution_count=1)]
    report = pages.Report("quick", exhibits=exhibits)
    page = report.notebook_page("01_tiny", v4.new_notebook(cells=cells))
    report.folder.mkdir()
    (report.folder / "01_tiny.html").write_text(page)
    (report.folder / "09_claims.html").write_text(report.page("09_claims", "failed", error=text, traceback=[text] * 2))
    report.write_index()
    for path in report.folder.iterdir():
        alive = strangers.Alive(path.read_text()).found
        assert [tag for tag in alive if tag != ("a", [("href", "https://example.org")])] == []
    assert page.count(html.escape(text[:12])) >= 6


@pytest.mark.parametrize("card", ['"x"', "{}", '{"state": "done", "error": "", "trained": "x"}', "[" * 10**5])
def test_a_page_whose_head_is_not_ours_counts_as_not_built(card, plan, results):
    plan([])
    report = pages.Report("quick", exhibits={})
    report.folder.mkdir(parents=True)
    (report.folder / "09_claims.html").write_text(f'<meta name="card" content="{html.escape(card)}"><p>x</p>')
    report.write_index()
    assert "has not been built" in (report.folder / "09_claims.html").read_text()


def test_what_goes_to_a_terminal_moves_nothing(tiny, results, plan, capsys):
    """Also from a file's name, and from a line of progress."""
    text = "\x1b[2J\x1b]0;title\x07a\r\nb\u202e\x9b"
    plan([tiny()])
    (folder := results / "quick" / "runs" / tiny().key).mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({"error": text}))
    assert main(["status", "tiny"]) == 0
    assert main(["train", "tiny", "--workers", "1"]) == 1
    assert main(["data", "folder", "--from", f"/{text}", "--name", "x", "--size", "8"]) == 1
    Progress({tiny(): 1.0}).finish(tiny(), text)
    output = capsys.readouterr()
    for stream in (output.out, output.err):
        assert r"\x1b[2J\x1b]0;title\x07a\r\nb\u202e\x9b" in stream
        assert all(c == "\n" or c.isprintable() for c in stream)


def each_damage(victim):
    """One damage of each kind, done to the first, second .. of the folders of whole records."""

    def value(*path, to):
        def change(folder):
            place = result = json.loads((folder / "result.json").read_bytes())
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = to
            strangers.seal(folder, result)

        return change

    def link(name, target):
        def change(folder):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)

        return change

    def elsewhere(folder):
        folder.rename(victim / folder.name)
        folder.symlink_to(victim / folder.name)

    return [
        value("heads", to=[]),
        value("provenance", "seconds", to="x"),
        value("files", str(victim / "thesis.tex"), to="0" * 64),
        value("heads", 0, "top1", to=float("nan")),
        value("heads", 0, "nll", to=float("inf")),
        value("provenance", "precision", to="<b>"),
        link("history.csv", "/dev/zero"),
        link("test.npz", victim / "thesis.tex"),
        lambda folder: os.truncate(folder / "features.npz", 10**12),
        lambda folder: (folder / "noise.csv").write_text("head\n"),
        elsewhere,
    ]


@pytest.fixture
def each_damaged(trained, plan, results, tmp_path):
    """(grid, victim): a record with each damage, and one that is whole after each."""
    run, source = trained
    (victim := tmp_path / "victim").mkdir()
    (victim / "thesis.tex").write_text("years of work")
    damages = each_damage(victim)
    grid = [type(run)(**run.config | {"seed": seed}) for seed in range(2 * len(damages))]
    for each in grid:
        strangers.forged(folder := results / "quick" / "runs" / each.key, source, each)
        if each.seed % 2 == 0:
            damages[each.seed // 2](folder)
    plan(grid)
    return grid, victim


def test_each_damaged_record_is_named_and_left_out(each_damaged, results, made, capsys):
    grid, victim = each_damaged
    before = content(victim)
    assert main(["status", "tiny"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: ")]
    damaged = grid[:-2:2]  # the link is no record
    assert len(lines) == len(damaged) and all(run.key in line for run, line in zip(damaged, lines))
    assert [records.state(run) for run in grid[1::2]] == ["done"] * (len(grid) // 2)
    with mock.patch.object(trainer, "train", lambda *arguments, **how: made):
        assert main(["train", "tiny", "--workers", "1"]) == 1
    assert "is a link: put the folder itself there" in capsys.readouterr().err
    assert [records.state(run) for run in grid].count("done") == len(grid) - 1
    assert content(victim) == before


def test_the_asked_profile_comes_first_and_a_whole_record_before_a_damaged_one(record, results, capsys):
    """A folder that is no profile, such as a copy, has no records."""
    runs = {name: results / name / "runs" / record.run.key for name in ("quick", "small", "a_copy")}
    for name in ("small", "a_copy"):
        shutil.copytree(runs["quick"], runs[name])
    assert records.find(record.run) == runs["quick"] and records.find(record.run, "small") == runs["small"]
    (runs["a_copy"] / "history.csv").write_text("x")
    (runs["quick"] / "history.csv").write_text("x")
    assert records.find(record.run) == records.find(record.run, "quick") == runs["small"]
    assert records.state(record.run) == "done" and records.load(record.run).path == runs["small"]
    shutil.rmtree(runs["small"])
    assert records.state(record.run) == "damaged"
    shutil.rmtree(runs["quick"])
    assert records.find(record.run) is None and records.state(record.run) == "pending"


@pytest.mark.slow
def test_the_report_names_each_damaged_record_and_shows_the_others(tmp_path):
    """The whole command over Figure 6, of which half of the records are damaged, each in another way."""
    (victim := tmp_path / "victim").mkdir()
    (victim / "thesis.tex").write_text("years of work")
    damages, runs = each_damage(victim), tmp_path / "results" / "small" / "runs"
    seeds = list(range(len(damages)))
    for run in experiments.fig6("small", seeds):
        source = ROOT / "results" / "small" / "runs" / replace(run, seed=0).key
        strangers.forged(folder := runs / run.key, source, run)
        if run.method == "sila":
            damages[run.seed](folder)
    own = {"SILALIB_RESULTS": str(tmp_path / "results"), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for command in (["status", "fig6"], ["report", "fig6", "--no-train"]):
        line = [sys.executable, "-m", "silalib", *command, "--profile", "small", "--seeds", *map(str, seeds)]
        done = subprocess.run(line, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    page = (tmp_path / "results" / "small" / "report" / "07_fig6_mnist_features.html").read_text()
    assert f"<dd>{len(seeds)} of {2 * len(seeds)}</dd>" in page and "could not be built" not in page
    assert (tmp_path / "results" / "small" / "report" / "index.html").exists()
    assert (victim / "thesis.tex").read_text() == "years of work"


def test_a_long_table_of_several_types_is_read_without_a_warning():
    """pandas warns of such a column where it reads a file in pieces; a warning is an error here."""
    frame = from_csv(b"a,b\n" + b"1,0.5\n" * 300000 + b"x,y\n" * 300000)
    assert len(frame) == 600000 and frame["a"].iloc[-1] == "x"


def test_a_folder_in_the_place_of_a_file_keeps_nothing_open(tmp_path):
    open_now = lambda: len(os.listdir("/proc/self/fd"))
    before = open_now()
    for _ in range(3):
        with pytest.raises(CorruptFile):
            read_bytes(tmp_path, "mend it")
    assert open_now() == before
