"""When pages are made: beside the training as their runs end, and anew only where something has changed."""

import threading

import pytest
from conftest import train
from nbformat import v4
from test_report import exhibits, write  # noqa: F401  (a fixture)

from silalib.errors import Stopped
from silalib.files import results_folder
from silalib.report import build, pages

COUNT = "import os\nopen(os.environ['COUNTED'], 'a').write('x')\nprint('shown')"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A file to which a notebook adds a letter each time it is executed."""
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    (tmp_path / "counted").touch()
    return tmp_path / "counted"


def test_a_page_is_made_anew_where_what_it_is_made_of_has_changed(tmp_path, exhibits, results, counted, capsys):  # noqa: F811
    folder = tmp_path / "notebooks"
    folder.mkdir()
    make = lambda: build.build("quick", ["01_tiny"], train=False, folder=folder, exhibits=exhibits)
    write(folder, "01_tiny", "# Tiny", v4.new_code_cell(COUNT))
    page = results_folder("quick") / "report" / "01_tiny.html"
    assert make() == 0 and counted.read_text() == "x"
    first = page.read_bytes()
    capsys.readouterr()
    assert make() == 0 and counted.read_text() == "x" and page.read_bytes() == first
    assert capsys.readouterr().err == "1 of 1 pages are as their records and code are: kept\n"
    # a record, the notebook, the executed copy and the page itself
    run = exhibits["tiny"].grid("quick")[1]
    train(run, results / "quick" / "runs" / run.key)
    assert make() == 0 and counted.read_text() == "xx"
    write(folder, "01_tiny", "# Tiny", v4.new_code_cell(COUNT + "\nprint('more')"))
    assert make() == 0 and counted.read_text() == "xxx" and b"more" in page.read_bytes()
    (results / "quick" / "notebooks" / "01_tiny.ipynb").unlink()
    assert make() == 0 and counted.read_text() == "xxxx"
    page.write_text("damaged")
    assert make() == 0 and counted.read_text() == "xxxxx"


def test_a_page_that_failed_is_tried_again(tmp_path, exhibits, results, counted):  # noqa: F811
    write(tmp_path, "01_tiny", "# Tiny", v4.new_code_cell(COUNT + "\nraise ValueError"))
    for letters in ("x", "xx"):
        assert build.build("quick", ["01_tiny"], folder=tmp_path, exhibits=exhibits) == 1
        assert counted.read_text() == letters


def test_pages_are_made_beside_the_training_once_their_runs_have_ended(exhibits, results):  # noqa: F811
    """A page that rests on no run at once, then that of two runs, and one of all runs."""
    report, built, made = pages.Report("quick", exhibits=exhibits), [], threading.Event()

    def note(profile, stems, seeds, train, stopped):
        built.append(stems)
        if "01_tiny" in stems:
            made.set()

    first, second = exhibits["tiny"].grid("quick")
    with build.beside_training(report, list(report.notebooks), note):
        train(first, results / "quick" / "runs" / first.key)
        assert not made.wait(1.5)
        train(second, results / "quick" / "runs" / second.key)
        assert made.wait(30)
    assert built == [["00_siamese_labels"], ["01_tiny", "09_claims"]]


def test_what_stops_the_training_stops_the_page_under_way(exhibits, results):  # noqa: F811
    report, under_way = pages.Report("quick", exhibits=exhibits), threading.Event()

    def slow(profile, stems, seeds, train, stopped):
        under_way.set()
        assert stopped.wait(30)
        raise Stopped

    for run in exhibits["tiny"].grid("quick"):
        train(run, results / "quick" / "runs" / run.key)
    with pytest.raises(Stopped, match="by hand"), build.beside_training(report, ["01_tiny"], slow):
        assert under_way.wait(30)
        raise Stopped("by hand")
