"""Means with their intervals over seeds, and such numbers in words."""

import numpy as np
from scipy.special import stdtrit

standard_error = lambda values: np.std(values, ddof=1) / len(values) ** 0.5


def interval(values, level=0.95):
    """(mean, half-width) of the interval by Student's t over independent values; half-width NaN for n < 2."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    return values.mean(), stdtrit(len(values) - 1, (1 + level) / 2) * standard_error(values)


def plus_minus(mean, half_width, digits=2, signed=False):
    """Text of a mean with its 95% half-width; without one (a single seed) the mean alone; "" for NaN."""
    if np.isnan(mean):
        return ""
    text = f"{mean:{'+' if signed else ''}z.{digits}f}"
    return text if np.isnan(half_width) else f"{text} ± {half_width:.{digits}f}"


def over_seeds_of(values, digits=2, signed=False):
    """`plus_minus` of one value a seed; "not run" without any, "not recorded" where a record lacks the field (None)."""
    if None in values:
        return "not recorded"
    return plus_minus(*interval(values), digits, signed) or "not run"


def seeds(counts, before=""):
    """Text of how many seeds some numbers rest on, after `before`: "3 seeds", "1 to 3 seeds"; "" without any."""
    found = sorted({int(n) for n in counts} - {0})
    if not found:
        return ""
    span = f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}"
    return f"{before}{span} seed{'' if found == [1] else 's'}"


def mcnemar(correct, baseline):
    """Image by image against a baseline: (fixed, broken, p) with p of McNemar's exact two-sided test, 1 without either.

    correct, baseline: whether each network is right, shape (n,). fixed and broken count the images that only the first,
    and only the baseline, has right.
    """
    correct, baseline = np.asarray(correct, bool), np.asarray(baseline, bool)
    fixed, broken = int((correct & ~baseline).sum()), int((baseline & ~correct).sum())
    from scipy.stats import binomtest  # a third of a second, in every process

    return fixed, broken, float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
