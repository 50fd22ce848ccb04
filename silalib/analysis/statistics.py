"""Means and intervals over seeds; comparisons paired by cell and seed, and the verdict on them."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, sem, t

from ..errors import UserError
from ..run import Run


def interval(values):
    """(mean, half-width) of the 95% interval by Student's t over independent values; half-width NaN for n < 2."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    return values.mean(), t.ppf(0.975, len(values) - 1) * sem(values)


def plus_minus(mean, half_width, digits=2, signed=False):
    """Text of a mean with its 95% half-width; without one (a single seed) the mean alone; "" for NaN."""
    if np.isnan(mean):
        return ""
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
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


def describe_difference(mean, half_width, baseline):
    """In words, what a mean gain over a baseline with its 95% half-width over seeds says; NaN for one seed."""
    if np.isnan(half_width):
        return "one seed has no interval and shows nothing by itself"
    if abs(mean) <= half_width:
        return f"no detectable difference from {baseline}"
    return f"{'above' if mean > 0 else 'below'} {baseline} by its interval over seeds"


def mcnemar(correct, baseline):
    """Image by image against a baseline: (fixed, broken, p) with p of McNemar's exact two-sided test.

    correct, baseline: whether each network is right, shape (n,). fixed and broken count the images that only the first,
    and only the baseline, has right. Without either, p is 1.
    """
    correct, baseline = np.asarray(correct, bool), np.asarray(baseline, bool)
    fixed, broken = int((correct & ~baseline).sum()), int((baseline & ~correct).sum())
    return fixed, broken, float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


class Pair(NamedTuple):
    """A head of a run beside its counterpart, for one cell and seed of a grid; the gain is NaN without both records."""

    cell: object
    seed: int
    gain: float
    run: Run = None
    run_over: Run = None
    head: int = 0
    head_over: int = 0


@dataclass(frozen=True)
class Effect:
    """One comparison; positive supports the claim.

    mean, half_width: over seeds. images: (mean, half-width) of the same comparison over test images, or None. wins of
    total: cells whose mean over seeds is above zero. missing: the grid's other cells, which lack records. runs: those
    it rests on. exact: it claims equality; wins counts the cells without any difference.
    """

    name: str
    unit: str
    mean: float = np.nan
    half_width: float = np.nan
    seeds: int = 0
    images: tuple | None = None
    wins: int = 0
    total: int = 0
    missing: int = 0
    runs: tuple = ()
    exact: bool = False

    @property
    def verdict(self):
        if not self.total:
            return "not run"
        if self.exact and self.seeds > 1 and self.wins < self.total:
            return "not reproduced"
        if self.seeds < 2 or self.missing:
            return "inconclusive"
        if self.exact or (self.mean > self.half_width and self.wins > self.total / 2):
            return "reproduced"
        if self.mean < -self.half_width and self.wins < self.total / 2:
            return "not reproduced"
        return "inconclusive"

    @property
    def digits(self):
        return 0 if self.exact else 4 if self.unit in ("ratio", "nats") else 2

    @property
    def number(self):
        """The mean with its interval; "" without records."""
        return plus_minus(self.mean, np.nan if self.exact else self.half_width, self.digits, signed=not self.exact)

    @property
    def over_images(self):
        """The mean with its interval over test images; "" where there are no per-image data."""
        return plus_minus(*self.images, self.digits, signed=True) if self.images else ""

    @property
    def cells(self):
        """The count of signs: "3 of 4", with cells that lack records "3 of 4 (2 more incomplete)"; "" without any."""
        more = f" ({self.missing} more incomplete)" if self.missing else ""
        return f"{self.wins} of {self.total}{more}" if self.total else ""

    @property
    def named(self):
        """The name with the unit."""
        return self.name if self.unit in self.name else f"{self.name} ({self.unit})"

    def __str__(self):
        """The mean with its interval and unit; "" without records."""
        return f"{self.number} {self.unit}".strip() if self.number else ""


def paired(name, unit, pairs, records=None, metric=None, exact=False):
    """The `Effect` of pairs: the mean over cells, with its interval over seeds, and the count of signs.

    Only cells and seeds that are `complete` together count, so that every seed is averaged over the same cells. With a
    metric, and per-image data in the records, also the interval over test images.
    """
    pairs = list(pairs)
    table = pd.DataFrame(pairs, columns=Pair._fields).astype({"gain": float})
    gains = complete(table.dropna(subset="gain").pivot(index="cell", columns="seed", values="gain"))
    used = [pair for pair in pairs if pair.cell in gains.index and pair.seed in gains.columns]
    images = over_images(used, records, metric) if used and records and metric else None
    wins = int(((gains == 0).all(axis=1) if exact else gains.mean(axis=1) > 0).sum())
    missing = table["cell"].nunique() - len(gains)
    runs = tuple(dict.fromkeys(run for pair in used for run in (pair.run, pair.run_over) if run is not None))
    mean, half_width = interval(gains.mean(axis=0))
    return Effect(name, unit, mean, half_width, gains.shape[1], images, wins, len(gains), missing, runs, exact)


def complete(table):
    """The largest complete block of a table of cells (rows) and seeds (columns); all cells where two seeds have them:
    a seed that is being trained then changes nothing."""
    all_cells, all_seeds = table.dropna(axis="columns"), table.dropna(axis="index")
    if all_cells.shape[1] > 1:
        return all_cells
    return max(all_seeds, all_cells, key=lambda part: (part.size, part.shape[1]))


def over_images(pairs, records, metric):
    """(mean, half-width) of a paired gain with its 95% interval over test images, the networks taken as they are.

    None where the metric is not kept per image. Several data sets are averaged by their number of pairs.
    """
    differences = defaultdict(list)
    try:
        for pair in pairs:
            own = per_image(records[pair.run], pair.head, metric)
            differences[pair.run.dataset].append(own - per_image(records[pair.run_over], pair.head_over, metric))
    except (UserError, KeyError):
        return None
    parts = [(len(group) / len(pairs), np.mean(group, axis=0)) for group in differences.values()]
    deviation = sum((share * sem(images)) ** 2 for share, images in parts) ** 0.5
    return sum(share * images.mean() for share, images in parts), 1.96 * deviation


def per_image(record, head, metric):
    """A metric of each test image, larger is better: percent right, or log-probability of the truth in nats."""
    if metric == "top1":
        return 100.0 * (record.test[f"predicted_{head}"] == record.test["labels"])
    field, scale = {"top5": ("top5", 100.0), "nll": ("log_probability", 1.0)}[metric]
    return scale * record.test[f"{field}_{head}"].astype(float)
