"""THE rule, and what it judges: effects, paired by cell and seed, and claims that rest on effects."""

from collections import defaultdict, namedtuple
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import ndtri, stdtrit

from ..errors import UserError
from .statistics import interval, plus_minus, standard_error


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


def seeds_to_decide(values, delta, level=0.95):
    """How many seeds give a half-width of at most delta/2 at the spread of these values, whatever their mean."""
    spread, tail = np.std(values, ddof=1), (1 + level) / 2
    n = max(2, int((2 * ndtri(tail) * spread / delta) ** 2))  # t is wider than the normal distribution
    while stdtrit(n - 1, tail) * spread / n**0.5 > delta / 2:
        n += 1
    return n


Pair = namedtuple("Pair", "cell seed gain run run_over head head_over why", defaults=(None, None, 0, 0, ""))
"""A head of a `Run` beside that of its counterpart, for one cell and seed of a grid. The gain is NaN before both
runs have ended; where it is and they have, `why` says why there is none."""


@dataclass(frozen=True)
class Effect:
    """One comparison; positive supports the claim.

    gains: seed -> mean over the cells, of the seeds that have them all. planned: the number of seeds, from 0, by which
    it is judged; other seeds judge nothing, until it is extended: to twice the seeds, at 99%, the one extension that is
    allowed. delta: the smallest effect of interest, None for what is shown and judges nothing. lost: seed -> why it has
    no gain though its runs have ended; then there is no verdict. begun: whether both sides have a record. wins of
    total: the cells whose mean over seeds is above zero. images: (mean, half-width) of the same comparison over test
    images, or None. runs: those it rests on; awaited: those of planned seeds that are missing. paper: the paper's own
    mean. exact: it claims equality, and is counted. counted: of what the cells are, beside the number. In words, "" (or
    "-") where there is none: number, over_images (with intervals), cells ("3 of 4"), papers.
    """

    name: str
    unit: str
    gains: dict = field(default_factory=dict)
    planned: int = 0
    delta: float | None = None
    lost: dict = field(default_factory=dict)
    begun: bool = False
    wins: int = 0
    total: int = 0
    images: tuple | None = None
    runs: tuple = ()
    awaited: tuple = ()
    paper: float = np.nan
    exact: bool = False
    counted: str = ""

    extended = property(lambda self: self.planned > 0 and {*self.gains, *self.lost} >= set(range(2 * self.planned)))
    seeds_that_judge = property(lambda self: range((1 + self.extended) * self.planned))

    def judged(self, by_seed):
        return [by_seed[seed] for seed in self.seeds_that_judge if seed in by_seed]

    values = property(lambda self: self.judged(self.gains))
    seeds = property(lambda self: len(self.values))
    hindered = property(lambda self: "; ".join(dict.fromkeys(self.judged(self.lost))))
    error = property(lambda self: 0.01 if self.extended else 0.05)
    mean = property(lambda self: interval(self.values)[0])
    half_width = property(lambda self: interval(self.values, 1 - self.error)[1])
    digits = property(lambda self: 3 if self.unit in ("log ratio", "nats") else 2)
    papers = property(lambda self: plus_minus(self.paper, np.nan, self.digits, signed=True) or "-")
    over_images = property(lambda self: plus_minus(*self.images, self.digits, signed=True) if self.images else "")
    cells = property(lambda self: f"{self.wins} of {self.total}{self.counted}" if self.total else "")

    def judge(self, comparisons=1):
        """The verdict in a word, or why there is none; comparisons: among so many effects any one decides a claim."""
        ended = self.seeds + len(self.judged(self.lost))
        if self.exact:
            return "reproduced" if self.wins == self.total else "contradicted"
        if not (self.begun or ended):
            return "not run"
        if self.delta is None:
            return "shown"
        if ended < self.planned:
            return f"so far, {ended} of {self.planned} seeds"
        if self.hindered or self.planned < 2 or np.ptp(self.values) < 1e-9:
            return "no verdict"
        return decide(*interval(self.values, 1 - self.error / comparisons), self.delta)

    verdict = property(judge)

    @property
    def remark(self):
        """What belongs beside the verdict; "" where nothing is to be said."""
        notes = [self.hindered] if self.hindered else []
        if self.verdict == "no verdict" and not notes:
            notes.append("no spread over seeds" if self.planned > 1 else "one seed")
        if self.verdict == "negligible" and self.mean > self.half_width:
            notes.append("but above zero")
        if self.delta and self.paper < self.delta:
            notes.append(f"the paper's own gain, {self.papers}, is below {self.delta:.{self.digits}f}")
        if self.extended:
            notes.append("extended to twice the seeds, at 99%")
        return "; ".join(notes)

    @property
    def said(self):
        """The verdict with the remark, in a cell of a table."""
        if self.delta is None and not self.exact:
            return "shown, judges nothing" if self.runs else "not run"
        return f"{self.verdict} ({self.remark})" if self.remark else self.verdict

    @property
    def number(self):
        return f"{self.total - self.wins}" if self.exact else plus_minus(self.mean, self.half_width, self.digits, True)

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

    runs = property(lambda self: tuple(dict.fromkeys(run for effect in self.effects for run in effect.runs)))

    @property
    def verdict(self):
        """Reproduced where all primary effects are; contradicted, or else negligible, where any one is at the level of
        Bonferroni; before the planned seeds that, and where an effect has no verdict none."""
        alone = [effect.verdict for effect in self.primary]
        judging = [effect for effect in self.primary if effect.exact or self.profile != "quick"]
        if not judging and (self.effects or self.profile == "quick"):
            return "judges nothing"
        if set(alone) <= {"not run"}:
            return "not run"
        if waiting := [e for e in self.primary if e.verdict == "not run" or e.verdict.startswith("so far")]:
            least = min(waiting, key=lambda effect: effect.seeds)
            return least.verdict if least.verdict != "not run" else f"so far, 0 of {least.planned} seeds"
        if set(alone) == {"reproduced"}:
            return "reproduced"
        words = {effect.judge(len(alone)) for effect in self.primary}
        rest = "no verdict" if "no verdict" in alone else "undecided"
        return next((word for word in ("contradicted", "negligible") if word in words), rest)

    @property
    def said(self):
        extended = any(effect.extended for effect in self.primary)
        return f"{self.verdict}, extended" if extended else self.verdict


def paired(name, unit, pairs, plan=None, records=None, metric=None, **more):
    """The `Effect` of pairs: for each seed the mean over all cells; a seed that lacks one does not count. With a
    metric, and per-image data in the records, also the interval over test images. plan: shape of a run (the run with
    seed 0) -> how many seeds are planned of it. more: the other fields of `Effect`."""
    pairs, plan, records = list(pairs), plan or {}, records or {}
    planned = max((plan.get(replace(pair.run, seed=0), 0) for pair in pairs if pair.run), default=0) or 1
    cells, by_seed, by_cell = {pair.cell for pair in pairs}, defaultdict(list), defaultdict(list)
    for pair in pairs:
        if np.isfinite(pair.gain) or pair.why:
            by_seed[pair.seed].append(pair)
    whole = {int(seed): group for seed, group in sorted(by_seed.items()) if {pair.cell for pair in group} == cells}
    lost = {seed: "; ".join(dict.fromkeys(p.why for p in group if p.why)) for seed, group in whole.items()}
    gains = {seed: float(np.mean([p.gain for p in group])) for seed, group in whole.items() if not lost[seed]}
    found = Effect(name, unit, gains, planned, lost={seed: why for seed, why in lost.items() if why})
    judging = found.seeds_that_judge
    used = [pair for seed in judging if seed in gains for pair in whole[seed]]
    for pair in pairs:
        if pair.seed in judging and np.isfinite(pair.gain):
            by_cell[pair.cell].append(pair.gain)
    own, over = {pair.run for pair in pairs}, {pair.run_over for pair in pairs}
    measured = dict(
        begun=bool(records.keys() & own and records.keys() & over),
        awaited=tuple(run for run in own | over if run and run.seed < planned and run not in records),
        wins=sum(np.mean(gains) > 0 for gains in by_cell.values()),
        total=len(by_cell),
        images=over_images(used, records, metric) if used and metric else None,
        runs=tuple(dict.fromkeys(run for p in used for run in (p.run, p.run_over) if run)),
    )
    return replace(found, **measured | more)


def over_images(pairs, records, metric):
    """(mean, half-width) of a paired gain with its 95% interval over test images, the networks taken as they are: in
    percent right, or nats of the truth's log-probability. None where the metric is not kept per image. Several data
    sets are averaged by their number of pairs."""

    def per_image(run, head):
        test = records[run].test
        if metric == "top1":
            return 100.0 * (test[f"predicted_{head}"] == test["labels"])
        field, scale = {"top5": ("top5", 100.0), "nll": ("log_probability", 1.0)}[metric]
        return scale * test[f"{field}_{head}"].astype(float)

    differences = defaultdict(list)
    try:
        for pair in pairs:
            gain = per_image(pair.run, pair.head) - per_image(pair.run_over, pair.head_over)
            differences[pair.run.dataset].append(gain)
    except (UserError, KeyError):
        return None
    parts = [(len(group) / len(pairs), np.mean(group, axis=0)) for group in differences.values()]
    deviation = sum((share * standard_error(images)) ** 2 for share, images in parts) ** 0.5
    return sum(share * images.mean() for share, images in parts), 1.96 * deviation
