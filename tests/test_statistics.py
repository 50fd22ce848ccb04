"""Means, intervals, paired comparisons and their verdicts, on numbers whose answer is known by hand."""

import numpy as np
import pandas as pd
import pytest

from silalib.analysis import statistics
from silalib.analysis.statistics import Pair


def test_interval_by_hand():
    # mean 4, standard deviation 2, t(0.975, 2) = 4.3027, so half = 4.3027 * 2 / sqrt(3)
    mean, half = statistics.interval([2, 4, 6])
    assert mean == 4
    assert half == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)


def test_interval_of_one_or_no_value():
    assert statistics.interval([3.0])[0] == 3
    assert np.isnan(statistics.interval([3.0])[1])
    assert np.isnan(statistics.interval([])).all()


def test_cells_and_seeds_are_complete_together():
    nan = np.nan
    table = pd.DataFrame({0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, 6.0], 2: [7.0, nan, nan]})
    assert statistics.complete(table).columns.tolist() == [0, 1]  # a seed that has only begun is left out
    table = pd.DataFrame({0: [1.0, 2.0, nan], 1: [4.0, 5.0, 6.0], 2: [7.0, 8.0, 9.0]})
    assert statistics.complete(table).columns.tolist() == [1, 2]  # all cells, as two seeds have them
    table = pd.DataFrame({0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, nan], 2: [7.0, 8.0, nan]})
    assert statistics.complete(table).shape == (2, 3)  # one seed has all cells: the larger part
    table = pd.DataFrame({0: [1.0, 2.0, 3.0, 4.0], 1: [4.0, nan, nan, nan]})
    assert statistics.complete(table).shape == (4, 1)


def test_every_seed_is_averaged_over_the_same_cells():
    """Cell a gains 2 and 4; cell b, which lost 10 in seed 0, has no seed 1; cell c has no record."""
    gain = {("a", 0): 2.0, ("a", 1): 4.0, ("b", 0): -10.0, ("b", 1): np.nan, ("c", 0): np.nan, ("c", 1): np.nan}
    found = statistics.paired("x", "points", [Pair(*key, value) for key, value in gain.items()])
    assert (found.mean, found.seeds, found.wins, found.total, found.missing) == (3, 2, 1, 1, 2)
    assert found.half_width == pytest.approx(12.7062, rel=1e-5)  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert (found.cells, str(found)) == ("1 of 1 (2 more incomplete)", "+3.00 ± 12.71 points")


def test_no_pairs_and_pairs_without_records_are_not_run():
    for pairs, missing in (([], 0), ([Pair("a", 0, np.nan), Pair("b", 0, np.nan)], 2)):
        found = statistics.paired("x", "points", pairs)
        assert (found.verdict, found.total, found.seeds, found.missing) == ("not run", 0, 0, missing)
        assert (found.number, found.cells, str(found)) == ("", "", "")


@pytest.mark.parametrize(
    "counts, text",
    [([3, 3], "3 seeds"), ([1], "1 seed"), ([0, 3, 1], "1 to 3 seeds"), ([0, 2], "2 seeds"), ([0], ""), ([], "")],
)
def test_seeds_in_words(counts, text):
    assert statistics.seeds(counts) == text
    assert statistics.seeds(np.array(counts), ", over ") == (text and f", over {text}")


@pytest.mark.parametrize(
    "mean, half, text",
    [
        (1, 0.5, "above IND by its interval over seeds"),
        (-1, 0.5, "below IND by its interval over seeds"),
        (1, 1, "no detectable difference from IND"),  # the interval ends at zero
        (-1, 1, "no detectable difference from IND"),
        (1, np.nan, "one seed has no interval and shows nothing by itself"),
    ],
)
def test_describe_difference(mean, half, text):
    assert statistics.describe_difference(mean, half, "IND") == text


@pytest.mark.parametrize(
    "mean, half, text", [(1.234, np.nan, "1.23"), (1.234, 0.5, "1.23 ± 0.50"), (np.nan, np.nan, "")]
)
def test_plus_minus(mean, half, text):
    assert statistics.plus_minus(mean, half) == text
    assert statistics.plus_minus(mean, half, signed=True) == (f"+{text}" if text else "")
