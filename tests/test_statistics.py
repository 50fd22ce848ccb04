"""Means and intervals, on numbers whose answer is known by hand."""

import numpy as np
import pytest

from silalib.analysis import statistics


def test_interval_by_hand():
    # mean 4, standard deviation 2, t(0.975, 2) = 4.3027, so half = 4.3027 * 2 / sqrt(3)
    mean, half = statistics.interval([2, 4, 6])
    assert mean == 4
    assert half == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert statistics.interval([2, 4, 6], 0.99)[1] == pytest.approx(9.9248 * 2 / 3**0.5, rel=1e-4)


def test_interval_of_one_or_no_value():
    assert statistics.interval([3.0])[0] == 3
    assert np.isnan(statistics.interval([3.0])[1])
    assert np.isnan(statistics.interval([])).all()


@pytest.mark.parametrize(
    "counts, text",
    [([3, 3], "3 seeds"), ([1], "1 seed"), ([0, 3, 1], "1 to 3 seeds"), ([0, 2], "2 seeds"), ([0], ""), ([], "")],
)
def test_seeds_in_words(counts, text):
    assert statistics.seeds(counts) == text
    assert statistics.seeds(np.array(counts), ", over ") == (text and f", over {text}")


@pytest.mark.parametrize(
    "mean, half, text", [(1.234, 0.5, "1.23 ± 0.50"), (1.234, np.nan, "1.23"), (np.nan, np.nan, "")]
)
def test_plus_minus(mean, half, text):
    assert statistics.plus_minus(mean, half) == text
