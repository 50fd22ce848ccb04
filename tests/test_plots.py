"""What is saved of every figure and table: the same bytes every time, readable by others, with its origin beside it."""

import json
import re
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from test_tables import made_up

import silalib
from silalib.analysis import plots, tables
from silalib.experiments import table3

AWKWARD = ["50% ± 1.5", "a_b_c *x*", "R&D #1 $2 {x}", "a|b <b>", r"c:\d ~ ^2 `e`"]


@pytest.fixture(autouse=True)
def style():
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context():
        plots.use_style()
        yield


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, the last one at the end."""
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    return displayed


def scatter(points=2000):
    fig, ax = plots.plt.subplots()
    ax.scatter(*np.random.default_rng(0).normal(size=(2, points)), label="a")
    ax.fill_between([0, 1], [0, 1], [1, 2], alpha=0.2)
    ax.set_xlabel("epoch")
    ax.legend()
    return fig


def saved(folder, name):
    return {path.suffix: path.read_bytes() for path in folder.glob(f"{name}.*")}


def test_equal_figures_are_equal_bytes_without_a_date(results):
    for name in ("one", "two"):
        plots.show(scatter(), name, "paper", alt="Points")
    one, two = (saved(results / "paper" / "figures", name) for name in ("one", "two"))
    assert one == two and set(one) == {".png", ".svg", ".pdf", ".json"}
    assert one[".png"].startswith(b"\x89PNG") and one[".pdf"].startswith(b"%PDF")
    assert not any(word in b"".join(one.values()) for word in (b"Date", b"date>", b"Creator", b"Producer", b"Software"))
    assert not plots.plt.get_fignums()


def test_many_points_are_pixels_in_the_svg_and_few_are_not(results):
    for points in (2000, 20):
        plots.show(scatter(points), f"of_{points}", "paper", alt="Points")
    images, shapes = [], []
    for points in (2000, 20):
        root = ElementTree.fromstring(saved(results / "paper" / "figures", f"of_{points}")[".svg"])
        tags = [element.tag.split("}")[1] for element in root.iter()]
        images.append(tags.count("image"))
        shapes.append(tags.count("use"))
    assert images == [1, 0] and shapes[0] < shapes[1]


def test_a_figure_of_records_says_where_they_come_from(record, results):
    fig = scatter()
    plots.show(fig, "with", "quick", alt="Points", records={record.run: record})
    assert [text.get_text() for text in fig.texts] == ["stand-in data"]
    origin = json.loads(saved(results / "quick" / "figures", "with")[".json"])
    run = origin.pop("runs").pop()
    assert origin == {"silalib": silalib.__version__, "profile": "quick", "seeds": [record.run.seed]}
    assert run == {"key": record.run.key} | record.result["provenance"]
    assert {"silalib", "python", "torch", "device", "precision", "data_sha256"} <= set(run)
    for name, profile, records in (("schematic", "quick", {}), ("real", "paper", {record.run: record})):
        fig = scatter()
        plots.show(fig, name, profile, alt="Points", records=records)
        assert not fig.texts
    assert json.loads(saved(results / "quick" / "figures", "schematic")[".json"])["runs"] == []


def test_what_is_not_run_is_words_and_no_empty_figure(results, shown):
    fig, axes = plots.plt.subplots(1, 3, sharey=True)
    axes[1].plot([1, 2], [np.nan, np.nan])
    axes[2].axhline(0)
    plots.show(fig, "nothing", "paper", alt="None")
    assert "Not run" in shown.pop().data and not saved(results / "paper" / "figures", "nothing")
    fig, axes = plots.plt.subplots(1, 2, sharey=True)
    axes[0].plot([1, 2])
    plots.show(fig, "half", "paper", alt="A line")
    assert [[text.get_text() for text in ax.texts] for ax in axes] == [[], ["not run"]]
    assert axes[0].yaxis.get_tick_params()["labelleft"] and not axes[1].xaxis.get_tick_params()["labelbottom"]
    assert shown.pop().alt == "A line" and saved(results / "paper" / "figures", "half")
    assert not plots.plt.get_fignums()


def test_tables_are_saved_for_others(record, results):
    text, numbers = pd.DataFrame({"a": ["1.0 ± 0.5"]}), pd.DataFrame({"mean": [1.0], "half": [0.5]})
    plots.show_table(text, "both", "small", "A caption", data=numbers, records={record.run: record})
    plots.show_table(numbers, "alone", "small", "A caption")
    files = saved(results / "small" / "tables", "both")
    assert files[".csv"] == saved(results / "small" / "tables", "alone")[".csv"] == b"mean,half\n1.0,0.5\n"
    assert files[".md"].decode() == "A caption\n\n| a |\n| --- |\n| 1.0 ± 0.5 |\n"
    assert [run["key"] for run in json.loads(files[".json"])["runs"]] == [record.run.key]


def test_columns_of_words_are_set_to_the_left(results, shown):
    frame = pd.DataFrame([["IND", "1.0 ± 0.1", 3]])
    frame.columns = pd.MultiIndex.from_tuples([("", "method"), ("top-1", "ours"), ("top-1", "seeds")])
    plots.show_table(frame, "words", "paper", "A caption")
    assert re.findall(r"#T_\w+ (\S+) {\s*text-align: left;\s*}", shown.pop().data) == [".col0"]


def test_markdown_shows_every_character(results):
    """Read again by another parser of Markdown."""
    import mistune

    frame = pd.DataFrame([AWKWARD, range(5)], columns=[f"{name} | 1" for name in "abcde"])
    shown = mistune.create_markdown(plugins=["table", "strikethrough"])(plots.markdown(frame))
    cells = [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", shown)]
    assert cells == [*frame.columns, *AWKWARD, *"01234"]


def test_latex_escapes_what_has_a_meaning_there():
    frame = pd.DataFrame([AWKWARD, range(5)], columns=["share, %", "n_1", "b", "c", "d"])
    lines = plots.latex(frame, "100% of a_b").splitlines()
    assert r"\caption{100\% of a\_b}" in lines
    assert r"share, \% & n\_1 & b & c & d \\" in lines
    cells = [r"50\% ± 1.5", r"a\_b\_c *x*", r"R\&D \#1 \$2 \{x\}", "a|b <b>"]
    assert " & ".join([*cells, r"c:\textbackslash d \textasciitilde \space \textasciicircum 2 `e` \\"]) in lines
    assert r"0 & 1 & 2 & 3 & 4 \\" in lines


def test_html_shows_every_character(results, shown):
    from bs4 import BeautifulSoup

    frame = pd.DataFrame([AWKWARD], columns=[f"{name} <i>" for name in "abcde"])
    plots.show_table(frame, "awkward", "paper", "5 < 6 & <b>")
    table = BeautifulSoup(shown.pop().data, "html.parser").table
    assert [cell.get_text() for cell in table.find_all(["th", "td"])] == [*frame.columns, *AWKWARD]
    assert table.caption.get_text() == "5 < 6 & <b>"


def test_headers_of_two_levels():
    frame = pd.DataFrame([["IND", "1", "2"]])
    frame.columns = pd.MultiIndex.from_tuples([("", "Method"), ("Top-1", "ours"), ("Top-1", "paper")])
    assert plots.markdown(frame).splitlines()[0] == "| Method | Top-1 ours | Top-1 paper |"
    lines = plots.latex(frame, "").splitlines()
    assert r" & \multicolumn{2}{c}{Top-1} \\" in lines and r"Method & ours & paper \\" in lines


def test_one_seed_is_drawn_without_a_bar():
    for seeds, title in (([0], ", 1 seed"), ([0, 1], ", 2 seeds")):
        grid = table3("paper", seeds)
        records = made_up(grid, lambda run, head: 50.0 + run.seed * (run.method == "sila"))
        rows = tables.over_seeds(tables.cells(grid, records, ("top1",), "table3"))
        fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
        bars = fig.axes[0].containers[0].lines[2][0].get_segments()
        drawn = [bar for bar in bars if np.isfinite(bar).all() and len(bar)]
        assert len(drawn) == (10 if len(seeds) > 1 else 0)  # both networks of five pairs
        assert fig.axes[0].get_title(loc="right") == f"Title{title}"
        plots.plt.close(fig)


def test_a_figure_of_gains_without_records_says_so():
    """It holds the paper's crosses alone, so no method of ours is in its legend."""
    rows = tables.over_seeds(tables.cells(table3("paper", [0]), {}, ("top1",), "table3"))
    fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
    assert fig.axes[0].get_title(loc="right") == "Title, not run"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["the paper's gain"]
    plots.plt.close(fig)


def test_a_legend_has_each_label_once():
    fig, axes = plots.plt.subplots(1, 3)
    plots.legend_below(fig, axes)
    assert not fig.legends
    for ax, labels in zip(axes, ("ab", "bc", "")):
        for label in labels:
            ax.plot([0, 1], label=label)
    plots.legend_below(fig, axes)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b", "c"]
    plots.plt.close(fig)
