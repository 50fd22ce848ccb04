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
    both = []
    for _ in range(2):
        plots.show(scatter(), "one", "paper", alt="Points")
        both.append(saved(results / "paper" / "figures", "one"))
    one, two = both
    assert one == two and set(one) == {".png", ".svg", ".pdf", ".csv", ".json"}
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
    assert axes[0].axison and not axes[1].axison
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


def test_a_table_without_records_is_its_other_columns_or_a_sentence(results, shown):
    frame = pd.DataFrame({"network": ["a", "b"], "ours": ["not run", ""], "seeds": [0, 0]})
    plots.show_table(frame.assign(paper=[76.45, 77.85]), "half", "paper", "Top-1")
    plots.show_table(frame, "none", "paper", "Top-1")
    assert "76.45" in shown[0].data and "ours" not in shown[0].data and "seeds" not in shown[0].data
    assert shown[1].data == "**Not run:** Top-1"
    assert saved(results / "paper" / "tables", "none")[".csv"] == b"network,ours,seeds\na,not run,0\nb,,0\n"


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
        rows = tables.over_seeds(grid, records, ("top1",), "table3")
        fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
        bars = fig.axes[0].containers[0].lines[2][0].get_segments()
        drawn = [bar for bar in bars if np.isfinite(bar).all() and len(bar)]
        assert len(drawn) == (10 if len(seeds) > 1 else 0)  # both networks of five pairs
        assert fig.axes[0].get_title(loc="left") == f"Title{title}"
        plots.plt.close(fig)


def test_a_figure_of_gains_without_records_says_so():
    """Nothing is drawn of it, not even the paper's marks, so that `show` puts a sentence in its place."""
    rows = tables.over_seeds(table3("paper", [0]), {}, ("top1",), "table3")
    fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
    assert not plots.anything_drawn(fig) and fig.axes[0].get_title(loc="left") == "Title"
    plots.plt.close(fig)


def test_the_papers_gain_is_a_mark_that_no_dot_hides():
    """VGG19 gains 0.22 in the paper (94.77 over 94.55), and 0.22 here: the diamond is larger, and in front."""
    grid = table3("paper", [0])
    records = made_up(grid, lambda run, head: 94.55 + 0.22 * (run.method == "sila"))
    rows = tables.over_seeds(grid, records, ("top1",), "table3")
    fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
    dots, diamonds = fig.axes[0].lines[:2]
    names = [name.get_text() for name in fig.axes[0].get_yticklabels()]
    row = names.index("VGG19 x2 · Net1")
    assert dots.get_xdata()[row] == pytest.approx(0.22) and diamonds.get_xdata()[row] == pytest.approx(0.22)
    assert diamonds.get_markersize() > 1.5 * dots.get_markersize() and diamonds.get_fillstyle() == "none"
    assert diamonds.get_zorder() > dots.get_zorder()
    plots.plt.close(fig)


def test_names_stand_at_the_ends_of_their_lines_and_apart():
    fig, ax = plots.plt.subplots()
    for name, end in (("low", 0.0), ("high", 10.0), ("higher", 10.1), ("_unnamed", 5.0)):
        ax.plot([0, 1], [5, end], label=name)
    plots.label_lines(ax)
    height = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert list(height) == ["low", "high", "higher"]
    assert height["higher"] - height["high"] > 0.07 and max(height.values()) <= 1
    bottom, top = ax.get_ylim()
    assert height["low"] == pytest.approx((0 - bottom) / (top - bottom))
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.lines[:3]]
    plots.plt.close(fig)


def test_a_difference_has_one_band_over_seeds():
    """At each point two seeds: t(0.975, 1) = 12.7062 times half of their distance."""
    fig, ax = plots.plt.subplots()
    plots.difference(ax, [0, 1], [[1.0, 2.0], [3.0, 2.0]])
    (band,) = ax.collections
    ends = band.get_paths()[0].vertices
    assert sorted(set(ends[ends[:, 0] == 0][:, 1].round(3))) == [2 - 12.706, 2 + 12.706]
    assert set(ends[ends[:, 0] == 1][:, 1]) == {2.0}
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0, 2], [1, 2]])
    plots.plt.close(fig)


def test_the_svg_follows_the_theme_and_is_valid_alone(results):
    """Blue gets lighter and ink light in the dark; in the light nothing is changed, and the ground is transparent."""
    fig, ax = plots.plt.subplots()
    ax.plot([0, 1], color="#0072b2")
    plots.show(fig, "themed", "paper", alt='A "line"')
    svg = saved(results / "paper" / "figures", "themed")[".svg"].decode()
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'A "line"'
    dark = re.search(r"@media screen and \(prefers-color-scheme:dark\)\{(.*)\}</style>", svg)[1]
    rules = dict(re.findall(r'\[style\*="(\w+: #\w+)"\]\{\w+:(#\w+)!', dark))
    light = lambda colour: sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) / 765
    assert 0.5 < light(rules["stroke: #0072b2"]) < 0.8 < light(rules[f"fill: {plots.INK}"])
    assert "fill: #ffffff" not in svg and 'style="fill: none; stroke: #0072b2' in svg


def test_the_csv_of_a_figure_has_its_numbers(results):
    fig, ax = plots.plt.subplots()
    ax.errorbar([1.5], [0], xerr=[0.25], label="SiLa")
    ax.fill_between([0, 1], [0, 0], [2, 2])
    ax.scatter(range(600), range(600))
    ax.set_title("Panel")
    plots.show(fig, "numbers", "paper", alt="")
    lines = saved(results / "paper" / "figures", "numbers")[".csv"].decode().splitlines()
    assert lines[:4] == ["panel,quantity,series,x,y", "Panel,,SiLa,1.5,0", "Panel,,,1.25,0", "Panel,,,1.75,0"]
    assert {"Panel,,,0,2", "Panel,,,1,2"} <= set(lines) and len(lines) < 20


def test_each_panel_has_its_box_in_the_svg(results, shown):
    """In the units of the viewBox, side by side within it; a single panel needs none."""
    fig, axes = plots.plt.subplots(1, 2, figsize=(8, 3))
    for ax in axes:
        ax.plot([0, 1])
    plots.show(fig, "two", "paper", alt="", thumb=1)
    metadata = shown.pop().metadata
    svg = saved(results / "paper" / "figures", "two")[".svg"].decode()
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    (x1, y1, w1, h1), (x2, y2, w2, h2) = metadata["panels"]
    assert x1 >= 0 and x1 + w1 <= x2 + 15 and x2 + w2 <= width + 1 and max(y1 + h1, y2 + h2) <= height + 1
    assert min(w1, w2) > 0.4 * width and min(h1, h2) > 0.8 * height
    small = ElementTree.fromstring(metadata["thumbnail"])
    assert float(small.attrib["width"].removesuffix("pt")) < 230
    plots.show(scatter(), "one", "paper", alt="")
    assert shown.pop().metadata["panels"] == []
