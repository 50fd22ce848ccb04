"""Means, intervals and gains over seeds, on records whose answer is known by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from silalib import summary
from silalib.experiments import PROFILES, fig5, table1, table3


def made_up(grid, value):
    """Records whose metrics are value(run, head) for accuracies and a hundredth of it for NLL."""

    def heads(run):
        numbers = [value(run, head) for head in range(len(run.nets))]
        return [{"top1": n, "top5": n, "best": n, "nll": n / 100} for n in numbers]

    return {run: SimpleNamespace(heads=heads(run)) for run in grid}


def test_interval_by_hand():
    # mean 4, standard deviation 2, t(0.975, 2) = 4.3027, so half = 4.3027 * 2 / sqrt(3)
    mean, half = summary.interval([2, 4, 6])
    assert mean == 4
    assert half == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)


def test_interval_of_one_or_no_value():
    assert summary.interval([3.0])[0] == 3
    assert np.isnan(summary.interval([3.0])[1])
    assert np.isnan(summary.interval([])).all()


def test_gains_are_paired_by_seed_and_positive_when_better():
    grid = table1("paper", [0, 1])
    base = {("ind", 0): 50.0, ("ind", 1): 60.0, ("sila", 0): 53.0, ("sila", 1): 61.0}
    records = made_up(grid, lambda run, head: base.get((run.method, run.seed), 40.0) + head)
    cells = summary.cells(grid, records, ("top1", "nll"), "table1")
    rows = summary.over_seeds(cells).set_index(["pair", "method", "net", "metric"])
    one = rows.loc[("ResNet18+ResNet18", "SiLa", 1, "top1")]
    assert (one["mean"], one["n"], one["gain"]) == (57, 2, 2)  # gains 3 and 1
    assert one["gain_half"] == pytest.approx(12.7062 * 2**0.5 / 2**0.5, rel=1e-4)  # t(0.975, 1), deviation sqrt(2)
    # Net2 is compared with Net2 of IND's pair, which is better by 1 here; Net2 of another pair with its own network's
    assert rows.loc[("ResNet18+ResNet18", "SiLa", 2, "top1"), "gain"] == 2
    assert rows.loc[("MobileNet+ResNet18", "SiLa", 2, "top1"), "gain"] == 2
    assert ("ResNet18", "IND", 2, "top1") not in rows.index
    # a larger NLL is worse, so the same differences count as losses
    assert rows.loc[("ResNet18+ResNet18", "SiLa", 1, "nll"), "gain"] == pytest.approx(-0.02)
    assert rows.loc[("ResNet18+ResNet18", "DML", 1, "top1"), "gain"] == -15
    assert np.isnan(rows.loc[("ResNet18", "IND", 1, "top1"), "gain"])


def test_the_papers_numbers_stand_beside_ours():
    cells = summary.cells(table1("paper", [0]), {}, ("top1", "top5", "best", "nll"), "table1")
    rows = summary.over_seeds(cells).set_index(["pair", "method", "net", "metric"]).sort_index()
    # printed: MobileNet alone 66.90 and NLL 1.46; with ResNet18 and SiLa+DML 71.51 and 1.10
    assert rows.loc[("MobileNet", "IND", 1, "top1"), "paper"] == 66.9
    mixed = rows.loc[("MobileNet+ResNet18", "SiLa+DML", 1)]
    assert mixed.loc["top1", "paper"] == 71.51
    assert mixed.loc["top1", "paper_gain"] == pytest.approx(4.61)
    assert mixed.loc["nll", "paper_gain"] == pytest.approx(0.36)
    # Net2 is compared with its own network alone: ResNet18's 76.88 with 76.45
    assert rows.loc[("MobileNet+ResNet18", "SiLa+DML", 2, "top1"), "paper_gain"] == pytest.approx(0.43)
    assert np.isnan(rows.loc[("ResNet18+ResNet18", "SiLa", 2, "top1"), "paper"])  # not in our copy of the table
    assert rows["mean"].isna().all() and (rows["n"] == 0).all()


def test_table3_has_two_data_sets():
    grid = table3("paper", [0])
    records = made_up(grid, lambda run, head: 50.0 + (run.dataset == "cifar100") * (run.method == "sila"))
    cells = summary.cells(grid, records, ("top1",), "table3")
    rows = summary.over_seeds(cells).set_index(["dataset", "pair", "method", "net"]).sort_index()
    # printed: VGG19 alone 94.55 and 73.82, Net1 with SiLa 94.77 and 74.12
    for dataset, gain, paper, paper_gain in [("CIFAR-10", 0, 94.77, 0.22), ("CIFAR-100", 1, 74.12, 0.3)]:
        row = rows.loc[(dataset, "VGG19+VGG19", "SiLa", 1)]
        assert (row["gain"], row["paper"]) == (gain, paper)
        assert row["paper_gain"] == pytest.approx(paper_gain)
    assert summary.score(cells, "sila")[:3] == (10, 20, 0.5)
    # each printed row has two numbers: top-1, and top-2 or top-5
    printed = summary.reported("table3")
    rows = (printed["method"] == "SiLa").sum()
    both = summary.cells(grid, {}, ("top1", "top2", "top5"), "table3")
    assert summary.score(both, "sila", "paper_gain")[1] == 2 * rows


def test_a_stand_in_has_the_papers_first_data_set_beside_it():
    cells = summary.cells(table3("quick", [0]), {}, ("top1",), "table3").set_index(["pair", "method", "net"])
    assert cells.loc[("VGG19", "IND", 1), "paper"] == 94.55
    assert set(cells["dataset"]) == {"digits (8x8, enlarged)"}


def test_verdicts_by_hand():
    grid = table3("paper", [0, 1, 2])
    better = made_up(grid, lambda run, head: 50.0 + (run.method == "sila") * (1 + run.seed / 10))
    cells = summary.cells(grid, better, ("top1",), "table3")
    (line,) = summary.verdicts(cells, ("sila",)).splitlines()
    assert "SiLa beats IND in 20 of 20 cells" in line and "+1.10 ± 0.25" in line  # 4.3027 * 0.1 / sqrt(3)
    assert "above IND by its interval" in line
    even = made_up(grid, lambda run, head: 50.0 + (run.method == "sila") * (run.seed - 1))
    assert "not told apart from IND" in summary.verdicts(summary.cells(grid, even, ("top1",), "table3"), ("sila",))
    one = [run for run in grid if run.seed == 0]
    assert "one seed has no interval" in summary.verdicts(summary.cells(one, better, ("top1",), "table3"), ("sila",))
    assert summary.verdicts(summary.cells(grid, {}, ("top1",), "table3"), ("sila",)) == "- SiLa: not run."
    table = summary.scores(cells, ("sila",)).iloc[0]
    assert table["cells won, ours"] == "20 of 20" and table["mean top-1 gain, ours"] == "+1.10 ± 0.25"


def test_score_of_the_printed_table():
    cells = summary.cells(table1("paper", [0]), {}, ("top1", "top5", "best", "nll"), "table1")
    # 7 SiLa rows and 10 of each other method are printed with four numbers; every one is above IND
    for method, rows in (("sila", 7), ("dml", 10), ("sila+dml", 10)):
        won, total, gain, half, missing = summary.score(cells, method, "paper_gain")
        assert (won, total, missing) == (4 * rows, 4 * rows, 0)
        assert gain > 0 and np.isnan(half)
    # the seven printed top-1 gains of SiLa: 2.28, 1.40, 2.27, 0.75, 1.00, 1.98, 1.41
    assert summary.score(cells, "sila", "paper_gain")[2] == pytest.approx(11.09 / 7)


def test_score_of_records():
    grid = table1("paper", [0, 1, 2])
    gains = {0: 1.0, 1: 2.0, 2: 3.0}
    better = made_up(grid, lambda run, head: 50.0 + (gains[run.seed] if run.method == "sila" else 0))
    cells = summary.cells(grid, better, ("top1", "nll"))
    won, total, gain, half, missing = summary.score(cells, "sila")
    assert (won, total, gain, missing) == (10, 20, 2, 0)  # ten top-1 cells won, ten NLL cells lost
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert summary.score(cells, "dml")[:3] == (0, 20, 0)  # equal is not won
    assert summary.score(summary.cells(grid, {}, ("top1",)), "sila")[:2] == (0, 0)


def test_cells_and_seeds_are_complete_together():
    nan = np.nan
    table = pd.DataFrame({0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, 6.0], 2: [7.0, nan, nan]})
    assert summary.complete(table).columns.tolist() == [0, 1]  # a seed that has only begun is left out
    table = pd.DataFrame({0: [1.0, 2.0, nan], 1: [4.0, 5.0, 6.0], 2: [7.0, 8.0, 9.0]})
    assert summary.complete(table).columns.tolist() == [1, 2]  # all cells, as two seeds have them
    table = pd.DataFrame({0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, nan], 2: [7.0, 8.0, nan]})
    assert summary.complete(table).shape == (2, 3)  # one seed has all cells: the larger part
    table = pd.DataFrame({0: [1.0, 2.0, 3.0, 4.0], 1: [4.0, nan, nan, nan]})
    assert summary.complete(table).shape == (4, 1)


def test_every_seed_is_averaged_over_the_same_cells():
    """Cell a gains 2 and 4; cell b, which lost 10 in seed 0, has no seed 1; cell c has no record."""
    gain = {("a", 0): 2.0, ("a", 1): 4.0, ("b", 0): -10.0, ("b", 1): np.nan, ("c", 0): np.nan, ("c", 1): np.nan}
    found = summary.over_cells(pd.DataFrame([dict(cell=c, seed=s, gain=g) for (c, s), g in gain.items()]))
    assert found.gains.loc["a"].tolist() == [2, 4]
    assert found[1:2] + found[3:] == (3, 1, 1, 2)  # the mean, one cell of one won, two missing
    assert found.half == pytest.approx(12.7062, rel=1e-5)  # t(0.975, 1) * sqrt(2) / sqrt(2)


def test_scores_say_which_cells_are_missing():
    grid = table3("paper", [0, 1])
    better = made_up(grid, lambda run, head: 50.0 + (run.method == "sila") * (1 + run.seed / 10))
    kept = {run: record for run, record in better.items() if run.dataset == "cifar10"}
    cells = summary.cells(grid, kept, ("top1",), "table3")
    assert summary.scores(cells, ("sila",)).iloc[0]["cells won, ours"] == "10 of 10 (10 more incomplete)"
    line = summary.verdicts(cells, ("sila",))
    assert "inconclusive, with 10 of 20 cells of the grid" in line and "above" not in line


@pytest.mark.parametrize(
    "counts, text",
    [([3, 3], "3 seeds"), ([1], "1 seed"), ([0, 3, 1], "1 to 3 seeds"), ([0, 2], "2 seeds"), ([0], ""), ([], "")],
)
def test_seeds_in_words(counts, text):
    assert summary.seeds(counts) == text
    assert summary.seeds(np.array(counts), ", over ") == (text and f", over {text}")


@pytest.mark.parametrize(
    "mean, half, text",
    [
        (1, 0.5, "above IND by its interval over seeds"),
        (-1, 0.5, "below IND by its interval over seeds"),
        (1, 1, "not told apart from IND"),  # the interval ends at zero
        (-1, 1, "not told apart from IND"),
        (1, np.nan, "one seed has no interval and shows nothing by itself"),
    ],
)
def test_told_apart(mean, half, text):
    assert summary.told_apart(mean, half, "IND") == text


def test_one_seed_is_drawn_without_a_bar():
    from silalib import plots

    for seeds, title in (([0], ", 1 seed"), ([0, 1], ", 2 seeds")):
        grid = table3("paper", seeds)
        records = made_up(grid, lambda run, head: 50.0 + run.seed * (run.method == "sila"))
        rows = summary.over_seeds(summary.cells(grid, records, ("top1",), "table3"))
        fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
        bars = fig.axes[0].containers[0].lines[2][0].get_segments()
        drawn = [bar for bar in bars if np.isfinite(bar).all() and len(bar)]
        assert len(drawn) == (10 if len(seeds) > 1 else 0)  # both networks of five pairs
        assert fig.axes[0].get_title(loc="right") == f"Title{title}"
        plots.plt.close(fig)


def test_a_figure_of_gains_without_records_says_so():
    """It holds the paper's crosses alone, so no method of ours is in its legend."""
    from silalib import plots

    rows = summary.over_seeds(summary.cells(table3("paper", [0]), {}, ("top1",), "table3"))
    fig = plots.gains(rows[rows["dataset"] == "CIFAR-10"], ("sila",), "Title")
    assert fig.axes[0].get_title(loc="right") == "Title, not run"
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["the paper's gain"]
    plots.plt.close(fig)


def test_comparison_says_what_was_not_run_and_what_did_not_learn():
    grid = table1("quick", [0])
    records = made_up(grid, lambda run, head: 70.0 if run.nets == ("mobilenet",) * 2 and run.method == "ind" else 90.0)
    records = {run: record for run, record in records.items() if "vgg13" not in run.nets}
    table = summary.comparison(summary.over_seeds(summary.cells(grid, records, ("top1",), "table1")), ("top1",), 80)
    assert len(table) == 33
    shown = table.set_index([("", "Networks"), ("", "Method"), ("", "Net")])["Top-1"]
    assert shown.loc[("ResNet18", "IND", ""), "ours"] == "90.00"
    assert shown.loc[("MobileNet", "IND", "(did not learn)"), "ours"] == "70.00"
    assert shown.loc[("MobileNet+ResNet18", "SiLa", "Net1 (did not learn)"), "gain"] == "+20.00"
    assert shown.loc[("MobileNet+ResNet18", "SiLa", "Net2"), "gain"] == "+0.00"
    assert shown.loc[("VGG13+VGG13", "DML", "Net1"), "ours"] == "not run"
    assert shown.loc[("VGG13+VGG13", "DML", "Net1"), "paper"] == "73.76"


@pytest.mark.parametrize(
    "mean, half, text", [(1.234, np.nan, "1.23"), (1.234, 0.5, "1.23 ± 0.50"), (np.nan, np.nan, "")]
)
def test_plus_minus(mean, half, text):
    assert summary.plus_minus(mean, half) == text
    assert summary.plus_minus(mean, half, signed=True) == (f"+{text}" if text else "")


def test_the_msdnets_of_a_grid():
    grid = fig5("small", (0, 1))
    whole = [run for run in grid if run.n_heads == 7 and run.method == "ind"]
    one = lambda top1: SimpleNamespace(run=whole[0], heads=[{"parameters": 3067960, "top1": 1.0}, {"top1": top1}])
    records = dict(zip(whole, (one(70.0), one(74.0))))
    rows = summary.exit_networks(grid, records, learned=80)
    assert rows["blocks"].tolist() == [5, 7]
    assert rows["parameters, both methods"].tolist() == ["", "3,067,960"]
    assert rows["training images"].tolist() == ["10,000", "10,000"]
    assert rows["runs with a record"].tolist() == ["0 of 4", "2 of 4"]
    # t(0.975, 1) = 12.7062 times the deviation sqrt(8), over sqrt(2)
    assert rows["last exit of IND, top-1 (%)"].tolist() == ["not run", "72.00 ± 25.41 (did not learn)"]


def test_only_quick_is_said_to_be_a_stand_in():
    assert "stand-in" in summary.stand_in("quick")
    assert [summary.stand_in(profile) for profile in PROFILES[1:]] == ["", "", ""]


def test_a_legend_has_each_label_once():
    from silalib import plots

    fig, axes = plots.plt.subplots(1, 3)
    plots.legend_below(fig, axes)
    assert not fig.legends
    for ax, labels in zip(axes, ("ab", "bc", "")):
        for label in labels:
            ax.plot([0, 1], label=label)
    plots.legend_below(fig, axes)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b", "c"]
    plots.plt.close(fig)
