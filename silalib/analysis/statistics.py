"""Means and intervals over seeds; comparisons paired by cell and seed, and the one rule that judges them."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, sem, t

from ..errors import UserError
from ..run import Run


def interval(values, level=0.95):
    """(mean, half-width) of the interval by Student's t over independent values; half-width NaN for n < 2."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    return values.mean(), t.ppf((1 + level) / 2, len(values) - 1) * sem(values)


def decide(mean, half_width, delta):
    """THE rule: what an interval mean +- half_width says of an effect whose smallest size of interest is delta > 0.

    "contradicted" where all of it is below 0; else "negligible" where all of it is below delta; else "reproduced" where
    all of it is above 0; else "undecided".
    """
    if mean + half_width < 0:
        return "contradicted"
    if mean + half_width < delta:
        return "negligible"
    return "reproduced" if mean - half_width > 0 else "undecided"


def seeds_to_decide(values, delta):
    """How many seeds give a half-width of at most delta/2 at the spread of these values, whatever their mean."""
    n, spread = 2, np.std(values, ddof=1)
    while t.ppf(0.975, n - 1) * spread / n**0.5 > delta / 2:
        n += 1
    return n


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

    gains: seed -> mean over the cells, of the seeds that have them all. planned: the number of seeds, from 0, by which
    it is judged. delta: the smallest effect of interest, None for what is shown and judges nothing. wins of total: the
    cells whose mean over seeds is above zero. images: (mean, half-width) of the same comparison over test images, or
    None. runs: those it rests on. hindered: why there is no verdict, whatever the numbers say. paper: the paper's own
    mean. exact: it claims equality, and is counted.
    """

    name: str
    unit: str
    gains: dict = field(default_factory=dict)
    planned: int = 0
    delta: float | None = None
    wins: int = 0
    total: int = 0
    images: tuple | None = None
    runs: tuple = ()
    hindered: str = ""
    paper: float = np.nan
    exact: bool = False

    @property
    def extended(self):
        """Whether it is judged by twice the planned seeds, at 99%: the one extension that is allowed."""
        return self.planned > 0 and all(seed in self.gains for seed in range(2 * self.planned))

    @property
    def values(self):
        """The gain of each seed by which it is judged; seeds outside of the plan are none."""
        seeds = range((1 + self.extended) * self.planned)
        return [self.gains[seed] for seed in seeds if seed in self.gains]

    @property
    def seeds(self):
        return len(self.values)

    @property
    def mean(self):
        return interval(self.values)[0]

    @property
    def half_width(self):
        return interval(self.values, 0.99 if self.extended else 0.95)[1]

    def judge(self, comparisons=1):
        """The verdict in a word, or why there is none; comparisons: among so many effects any one decides a claim."""
        if self.exact:
            return "reproduced" if self.wins == self.total else "contradicted"
        if not self.values:
            return "not run"
        if self.delta is None:
            return "shown"
        if self.hindered:
            return "no verdict"
        if self.seeds < self.planned:
            return f"so far, {self.seeds} of {self.planned} seeds"
        if self.planned < 2 or np.ptp(self.values) == 0:
            return "no verdict"
        error = 0.01 if self.extended else 0.05
        return decide(*interval(self.values, 1 - error / comparisons), self.delta)

    @property
    def verdict(self):
        return self.judge()

    @property
    def remark(self):
        """What belongs beside the verdict; "" where nothing is to be said."""
        notes = [self.hindered] if self.hindered else []
        if self.verdict == "no verdict" and not notes:
            notes.append("no spread over seeds" if self.planned > 1 else "one seed")
        if self.verdict == "negligible" and self.mean > self.half_width:
            notes.append("but above zero")
        if self.delta and self.paper < self.delta:
            notes.append(f"the paper's own gain, {self.paper:+.2f}, is below {self.delta:.2f}")
        if self.extended:
            notes.append("extended to twice the seeds, at 99%")
        return "; ".join(notes)

    @property
    def digits(self):
        return 3 if self.unit in ("log ratio", "nats") else 2

    @property
    def number(self):
        """The mean with its interval; "" without records."""
        return f"{self.total - self.wins}" if self.exact else plus_minus(self.mean, self.half_width, self.digits, True)

    @property
    def over_images(self):
        """The mean with its interval over test images; "" where there are no per-image data."""
        return plus_minus(*self.images, self.digits, signed=True) if self.images else ""

    @property
    def cells(self):
        """The count of signs: "3 of 4"; "" without any."""
        return f"{self.wins} of {self.total}" if self.total else ""

    @property
    def named(self):
        """The name with the unit."""
        return self.name if self.unit in self.name else f"{self.name} ({self.unit})"

    def __str__(self):
        """The mean with its interval and unit; "" without records."""
        return f"{self.number} {self.unit}".strip() if self.number else ""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, its effects, and what they say of it together."""

    name: str
    claim: str
    effects: tuple
    profile: str = ""
    records: dict = field(default_factory=dict, repr=False)

    @property
    def primary(self):
        """The effects that judge it; the others are shown."""
        return [effect for effect in self.effects if effect.delta or effect.exact]

    @property
    def runs(self):
        return tuple(dict.fromkeys(run for effect in self.effects for run in effect.runs))

    @property
    def verdict(self):
        """Reproduced where all primary effects are; contradicted, or else negligible, where any one is at the level of
        Bonferroni; before the planned seeds, and where an effect has no verdict, that."""
        alone = [effect.verdict for effect in self.primary]
        if self.profile == "quick" and not any(effect.exact for effect in self.primary):
            return "judges nothing"
        if set(alone) <= {"not run"}:
            return "not run"
        if waiting := [e for e in self.primary if e.verdict == "not run" or e.verdict.startswith("so far")]:
            least = min(waiting, key=lambda effect: effect.seeds)
            return f"so far, {least.seeds} of {least.planned} seeds"
        if set(alone) == {"reproduced"} or "no verdict" in alone:
            return alone[0] if "no verdict" not in alone else "no verdict"
        words = {effect.judge(len(alone)) for effect in self.primary}
        return next((word for word in ("contradicted", "negligible") if word in words), "undecided")


def paired(name, unit, pairs, plan=None, records=None, metric=None, **more):
    """The `Effect` of pairs: for each seed the mean over all cells; a seed that lacks one does not count.

    plan: all runs that are planned; they say how many seeds are. With a metric, and per-image data in the records, also
    the interval over test images. more: the other fields of `Effect`.
    """
    pairs = list(pairs)
    table = pd.DataFrame(pairs, columns=Pair._fields).astype({"gain": float})
    gains = table.pivot(index="cell", columns="seed", values="gain")
    whole = gains.dropna(axis="columns")
    used = [pair for pair in pairs if pair.seed in whole.columns]
    shapes = {replace(pair.run, seed=0) for pair in pairs if pair.run}
    planned = {run.seed for run in plan or () if replace(run, seed=0) in shapes}
    images = over_images(used, records, metric) if used and records and metric else None
    signs = gains.mean(axis=1).dropna()
    runs = tuple(dict.fromkeys(run for pair in used for run in (pair.run, pair.run_over) if run is not None))
    means = {int(seed): float(mean) for seed, mean in whole.mean().items()}
    counts = dict(planned=len(planned) or 1, wins=int((signs > 0).sum()), total=len(signs))
    return Effect(name, unit, means, images=images, runs=runs, **counts | more)


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
