"""Which of the paper's claims hold: each claim is a function of records that gives a verdict.

A claim is made of effects: comparisons over cells (networks, metrics, exits) and seeds, turned so that positive speaks
for the claim. An effect is judged by its mean over the cells, with a 95% interval by Student's t over the paired
seeds, and by the count of signs. The functions that read tables also run on the numbers that the paper prints.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from . import early_exit, summary
from .errors import UserError
from .experiments import EXHIBITS
from .losses import LABELS
from .runs import ensure

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not run")
TABLES = ("table1", "table2", "table3")
PAPER_DATA = ("cifar10", "cifar100", "imagenet100", "mnist")
"""Records on any other data set show that everything runs, and judge nothing in the paper."""


@dataclass(frozen=True)
class Effect:
    """One comparison, positive where it speaks for the claim.

    mean, half: over seeds, half-width NaN for one seed; images: (mean, half) of the same comparison over test images,
    or None. won of total: cells whose mean over seeds is above zero. missing: cells of the grid that are not in total,
    for want of records. runs: the runs it rests on. exact: a comparison that claims equality, so that any difference
    speaks against it.
    """

    name: str
    unit: str
    mean: float = np.nan
    half: float = np.nan
    seeds: int = 0
    images: tuple | None = None
    won: int = 0
    total: int = 0
    missing: int = 0
    runs: tuple = ()
    exact: bool = False

    @property
    def verdict(self):
        if not self.total:
            return "not run"
        if self.seeds < 2:
            return "inconclusive"
        if self.exact and self.won < self.total:
            return "not reproduced"
        if self.missing:
            return "inconclusive"
        if self.exact:
            return "reproduced"
        if self.mean > self.half and self.won > self.total / 2:
            return "reproduced"
        if self.mean < -self.half and self.won < self.total / 2:
            return "not reproduced"
        return "inconclusive"

    def __str__(self):
        """The mean with its interval and unit; "" without records."""
        return f"{self.number} {self.unit}".strip() if self.number else ""

    @property
    def number(self):
        """The mean with its interval; "" without records."""
        digits = 0 if self.exact else 4 if self.unit in ("ratio", "nats") else 2
        return summary.plus_minus(self.mean, np.nan if self.exact else self.half, digits, signed=not self.exact)

    @property
    def named(self):
        """The name with the unit."""
        return self.name if self.unit in self.name else f"{self.name} ({self.unit})"

    @property
    def over_images(self):
        """The interval over test images, as text without the unit; "" where there are no per-image data."""
        digits = 4 if self.unit in ("ratio", "nats") else 2
        return summary.plus_minus(*self.images, digits, signed=True) if self.images else ""


@dataclass(frozen=True)
class Judged:
    """A claim's verdict and what it rests on."""

    number: int
    claim: str
    effects: tuple
    left_out: tuple = ()  # exhibits of the claim without any record

    @property
    def runs(self):
        return tuple(dict.fromkeys(run for effect in self.effects for run in effect.runs))

    @property
    def seeds(self):
        return sorted({run.seed for run in self.runs})

    @property
    def stand_in(self):
        """Whether it rests on stand-in data, and so judges nothing in the paper."""
        return any(run.dataset not in PAPER_DATA for run in self.runs)

    @property
    def measured(self):
        """The verdict on the records as they are, stand-in data or not: that of all effects together."""
        verdicts = {effect.verdict for effect in self.effects}
        for verdict in ("not reproduced", "not run", "reproduced"):
            if verdicts == {verdict}:
                return verdict
        return "not reproduced" if "not reproduced" in verdicts else "inconclusive"

    @property
    def verdict(self):
        return "not run" if self.stand_in else self.measured

    @property
    def won(self):
        return sum(effect.won for effect in self.effects)

    @property
    def total(self):
        return sum(effect.total for effect in self.effects)

    @property
    def note(self):
        """Why the verdict is not better, in words; "" where nothing is to be said."""
        notes, listed = [], lambda names: " and ".join(f'"{name}"' for name in names)
        if self.stand_in:
            notes.append("stand-in data judge nothing in the paper")
        single = [e.name for e in self.effects if e.seeds == 1]
        if self.runs and single:
            every = len(single) == sum(e.seeds > 0 for e in self.effects)
            notes.append("fewer than two seeds" + ("" if every else f" of {listed(single)}"))
        parts = defaultdict(list)
        for e in self.effects:
            if e.total and e.missing:
                parts[f"records for only {e.total} of {e.total + e.missing} cells"].append(e.name)
        notes += [f"{cells} of {listed(names)}" for cells, names in parts.items()]
        missing = [effect.name for effect in self.effects if not effect.total]
        if self.runs and missing:
            notes.append(f"{listed(missing)} not run")
        if self.runs and self.left_out:
            notes.append(f"without {', '.join(EXHIBITS[name].title for name in self.left_out)}")
        return "; ".join(notes)


@dataclass(frozen=True)
class Evidence:
    """What claims are judged by: the grids of the exhibits and the records of those runs that are finished.

    tables: the numbers of Tables 1 to 3, in the form of `summary.measured`.
    """

    grids: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)
    tables: pd.DataFrame = None

    def planned(self, exhibit, method):
        """The runs of an exhibit with a method, finished or not."""
        return [run for run in self.grids.get(exhibit, ()) if run.method == method]

    def found(self, exhibit, method):
        """The finished runs of an exhibit with a method."""
        return [run for run in self.planned(exhibit, method) if run in self.records]


def evidence(grids, records):
    frames = []
    for table in TABLES:
        paper = summary.printed(table)
        frame = summary.measured(grids.get(table, ()), records, list(paper["metric"].unique()))
        shown = set(zip(paper["dataset"], paper["metric"]))  # Table 3 has another metric for each data set
        kept = [pair in shown for pair in zip(summary.in_the_paper(frame, paper), frame["metric"])]
        frames.append(frame.loc[kept].assign(exhibit=table))
    return Evidence(grids, records, _joined(frames))


def printed():
    """The paper's own Tables 1 to 3 as evidence: one number a cell gives a score, but no interval."""
    return Evidence(tables=_joined([summary.printed(table).assign(exhibit=table) for table in TABLES]))


def collect(profile, seeds=None):
    """The evidence of a profile: its records, trained before; a damaged one counts as missing."""
    grids = {name: exhibit.grid(profile, seeds) for name, exhibit in EXHIBITS.items()}
    return evidence(grids, ensure([run for grid in grids.values() for run in grid], profile, train=False))


def judge(profile, seeds=None):
    """The verdict on every claim by the records of a profile."""
    return judge_all(collect(profile, seeds))


def judge_all(found):
    judged = []
    for number, (claim, exhibits, effects) in CLAIMS.items():
        left_out = [name for name in exhibits if not any(run in found.records for run in found.grids.get(name, ()))]
        judged.append(Judged(number, claim, tuple(effects(found)), tuple(left_out)))
    return judged


def in_words(claim):
    """A judged claim as Markdown: a line for each of its effects, then the verdict and why it is not better."""
    lines = [
        f"- {effect.name}: {str(effect) or 'no record'}. {effect.verdict.capitalize()}." for effect in claim.effects
    ]
    lines.append(f"\n**{claim.claim}: {claim.verdict}**" + (f" ({claim.note})." if claim.note else "."))
    return "\n".join(lines)


def score(judged):
    """In a line: claims: 2 reproduced, 1 inconclusive, 5 not run."""
    counts = Counter(claim.verdict for claim in judged)
    text = "claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return text + (" (stand-in data judge nothing)" if any(claim.stand_in for claim in judged) else "")


# The claims: functions from evidence to effects


def every_cell(found):
    """Claim 1: SiLa over IND in every metric that the tables print."""
    better = gains(found.tables, "sila", "ind")
    for metric, title in summary.METRICS.items():
        if metric == "top1" or better.loc[better["metric"] == metric, "gain"].notna().any():
            unit = "nats" if metric == "nll" else "points"
            yield table_effect(f"{title}, SiLa over IND", unit, better[better["metric"] == metric], found, metric)


def every_method(found):
    """Claim 2: DML and SiLa over IND, SiLa+DML over both, in Tables 1 and 2: mean of top-1, signs of every metric."""
    tables = found.tables[found.tables["exhibit"] != "table3"]
    for method, over in (("sila", "ind"), ("dml", "ind"), ("sila+dml", "sila"), ("sila+dml", "dml")):
        name = f"{LABELS[method]} over {LABELS[over]}"
        yield table_effect(f"top-1, {name}", "points", gains(tables, method, over), found)


def autoaugment(found):
    """Claim 3: SiLa over IND in Table 3: mean of top-1, signs of every metric."""
    better = gains(found.tables[found.tables["exhibit"] == "table3"], "sila", "ind")
    yield table_effect("top-1 with AutoAugment, SiLa over IND", "points", better, found)


def easier_to_train(found):
    """Claim 4: test top-1, mean over the epochs; and the distance of Net1 and Net2 against that in IND's pair."""
    grid, records = found.grids.get("fig3", ()), found.records
    ind, nets = ([summary.curves(grid, records, method, head) for head in (0, 1)] for method in ("ind", "sila"))
    runs = {(r.method, r.seed): r for r in grid if r in records}
    rows = [
        row(f"Net{h + 1}", seed, net.loc[seed].mean() - ind[h].loc[seed].mean(), runs["sila", seed], runs["ind", seed])
        for h, net in enumerate(nets)
        for seed in net.index.intersection(ind[h].index)
    ]
    yield effect("top-1 over the epochs, SiLa over IND", "points", rows)
    within, null = tracking(*nets), tracking(*ind)
    rows = [
        row("Net1 to Net2", seed, null[seed] - within[seed], runs["sila", seed], runs["ind", seed])
        for seed in within.index.intersection(null.index)
    ]
    yield effect("closer than in IND's pair, Net1 and Net2", "points", rows)


def tracking(net1, net2):
    """Distance in test top-1 of two networks, a value per seed: its mean over the second half of the epochs."""
    return summary.second_half((net1 - net2).abs())


def exits(found):
    """Claim 5: top-1 of every exit at its cost (anytime, Figure 5), and at equal average costs (budgeted, Figure 4).

    A cell is an exit of a network in the first, and a network in the second, with its mean over the costs: the top-1
    at neighbouring costs is nearly the same number.
    """
    rows = []
    for run, alone in with_alone(found, "fig5"):
        for k in range(run.n_heads):
            gain = np.nan
            if run in found.records and alone in found.records:
                a, b = found.records[run].heads[k], found.records[alone].heads[k]
                gain = a["top1"] - b["top1"] if a["macs"] == b["macs"] else np.nan
            rows.append(row((*network(run), k), run.seed, gain, run, alone, k, k))
    yield effect("top-1 of each exit (anytime), SiLa over IND", "points", rows, found.records, "top1")
    networks = defaultdict(list)
    for pair in with_alone(found, "fig4"):
        networks[network(pair[0])].append(pair)
    rows = []
    for cell, pairs in networks.items():
        done = [pair for pair in pairs if all(run in found.records for run in pair)]
        curves, baselines = ([early_exit.budgeted(found.records[pair[i]]) for pair in done] for i in (0, 1))
        gains = dict(zip(done, early_exit.gains_at_equal_costs(curves, baselines).mean(axis=1)))
        rows += [row(cell, pair[0].seed, gains.get(pair, np.nan), *pair) for pair in pairs]
    yield effect("top-1 at equal average costs (budgeted), SiLa over IND", "points", rows)


def with_alone(found, exhibit):
    """Pairs of runs of an exhibit, finished or not: with SiLa over the exits, and the same network without."""
    planned = set(found.planned(exhibit, "ind"))
    pairs = [(run, replace(run, method="ind")) for run in found.planned(exhibit, "sila")]
    return [(run, alone) for run, alone in pairs if alone in planned]


def concentrated(found):
    """Claim 6: the scatter ratio of the test features, IND over SiLa."""
    rows = [
        row(f"Net{head + 1}", run.seed, a["test_concentration"] - values["test_concentration"], run, alone)
        for run, alone in beside_ind(found, "fig6", "sila")
        for a in found.records[alone].heads[:1]
        for head, values in enumerate(found.records[run].heads)
    ]
    yield effect("scatter ratio of the features, IND above SiLa", "ratio", rows)


def robust(found):
    """Claim 7: training NLL of the last epoch (Figure 7a), and its change under absolute noise (Figure 7b)."""
    last = lambda run, head: found.records[run].history.query("head == @head")["train_nll"].iloc[-1]
    for over in ("ind", "dml"):
        rows = []
        for run, other in beside(found, "fig7", "sila", over):
            for head in range(len(run.nets)):
                value = last(run, head) - last(other, other.slot(head))
                rows.append(row(f"Net{head + 1}", run.seed, value, run, other))
        yield effect(f"last training NLL, SiLa above {LABELS[over]}", "nats", rows)
    for method in ("sila", "dml"):
        rows = [
            row(
                f"Net{head + 1}",
                run.seed,
                change(found.records[alone], alone.slot(head)) - change(found.records[run], head),
                run,
                alone,
            )
            for run, alone in beside_ind(found, "fig7", method)
            for head in range(len(run.nets))
        ]
        yield effect(f"change under absolute noise, {LABELS[method]} below IND", "nats", rows)


def change(record, head, kind="absolute"):
    """Change of training NLL under noise on the parameters, mean over the draws and over sigma above 0 (Figure 7b)."""
    noise = record.noise[(record.noise["head"] == head) & (record.noise["kind"] == kind)]
    return noise[noise["sigma"] > 0]["nll"].mean() - noise[noise["sigma"] == 0]["nll"].mean()


def nothing_added(found):
    """Claim 8: parameters of every network trained with SiLa, against the same network trained alone."""
    rows = []
    for exhibit in found.grids:
        if exhibit in ("coupling", "equal_compute", "regime", "choices"):  # ours: the paper's networks once more
            continue
        alone = {(*network(run), run.seed): run for run in found.planned(exhibit, "ind")}
        for run in found.planned(exhibit, "sila"):
            for head in range(run.n_heads):
                same = network(run, run.slot(head))
                if ind := alone.get((*same, run.seed)):
                    added = np.nan
                    if run in found.records and ind in found.records:
                        values = found.records[run].heads[head], found.records[ind].heads[ind.slot(head)]
                        added = values[0]["parameters"] - values[1]["parameters"]
                    rows.append(row((exhibit, run.nets, *same, head), run.seed, added, run, ind))
    yield effect("parameters added to a network", "", rows, exact=True)


CLAIMS = {
    1: ("SiLa beats IND for every network, in each printed metric", TABLES, every_cell),
    2: ("DML and SiLa each beat IND, and SiLa+DML beats both", TABLES[:2], every_method),
    3: ("SiLa helps with AutoAugment too", TABLES[2:], autoaugment),
    4: ("SiLa makes the network easier to train, and Net1 and Net2 track each other", ("fig3",), easier_to_train),
    5: ("SiLa raises the accuracy of every exit of MSDNet at the same cost", ("fig5", "fig4"), exits),
    6: ("SiLa's features are more concentrated", ("fig6",), concentrated),
    7: ("SiLa ends with higher training NLL; SiLa and DML change less under noise", ("fig7",), robust),
    8: ("No parameters are added", (), nothing_added),
}
"""Number -> (the claim, the exhibits that it is about, the function from evidence to its effects)."""


# From comparisons to effects


def network(run, slot=0):
    """What makes the network of a slot the same network in two runs of an exhibit."""
    return run.dataset, run.nets[slot], run.width, run.stem, run.blocks


def row(cell, seed, gain, run, run_over, head=0, head_over=0):
    """One comparison of a grid; its gain is NaN where a record is missing."""
    return dict(cell=cell, seed=seed, gain=gain, run=run, run_over=run_over, head=head, head_over=head_over)


def beside(found, exhibit, method, over):
    """Pairs of finished runs of an exhibit: of a method, and of another with the same seed and first network."""
    others = {(run.nets[0], run.seed): run for run in found.found(exhibit, over)}
    runs = [(run, others.get((run.nets[0], run.seed))) for run in found.found(exhibit, method)]
    return [(run, other) for run, other in runs if other]


def beside_ind(found, exhibit, method):
    return beside(found, exhibit, method, "ind")


def gains(tables, method, over):
    """`summary.gains` of each table."""
    parts = [table for _, table in tables.groupby("exhibit")] or [tables]
    return _joined([summary.gains(part, method, over) for part in parts])


def table_effect(name, unit, better, found, metric=None):
    """An effect over cells of tables, which `gains` gives. Without a metric: the mean of top-1, the signs of all."""
    rows = [
        row(
            (g.exhibit, g.dataset, g.pair, g.net, g.metric),
            g.seed,
            g.gain,
            g.run,
            g.run_over,
            g.net - 1,
            g.net_over - 1,
        )
        for g in better.itertuples()
    ]
    if metric:
        return effect(name, unit, rows, found.records, metric)
    every = effect(name, unit, rows)
    top1 = [r for r in rows if r["cell"][-1] == "top1"]
    return replace(
        effect(name, unit, top1, found.records, "top1"), won=every.won, total=every.total, missing=every.missing
    )


def effect(name, unit, rows, records=None, metric=None, exact=False):
    """The Effect of comparisons made by `row`, on cells and seeds that are complete together (`summary.over_cells`).

    With a metric, and per-image data in the records, also its interval over test images.
    """
    if not rows:
        return Effect(name, unit, exact=exact)
    over = summary.over_cells(pd.DataFrame(rows))
    used = [r for r in rows if r["cell"] in over.gains.index and r["seed"] in over.gains.columns]
    if not used:
        return Effect(name, unit, missing=over.missing, exact=exact)
    return Effect(
        name,
        unit,
        over.mean,
        over.half,
        seeds=over.gains.shape[1],
        images=over_images(used, records, metric) if metric else None,
        won=int((over.gains == 0).all(axis=1).sum()) if exact else over.won,
        total=over.total,
        missing=over.missing,
        runs=tuple(dict.fromkeys(run for r in used for run in (r["run"], r["run_over"]) if run is not None)),
        exact=exact,
    )


def over_images(rows, records, metric):
    """(mean, half) of a paired gain with its 95% interval over test images, the networks taken as they are.

    None where the metric is not kept per image. Several data sets are averaged by their number of comparisons.
    """
    differences = defaultdict(list)
    for r in rows:
        try:
            pair = [per_image(records[r[f"run{o}"]], r[f"head{o}"], metric) for o in ("", "_over")]
        except (UserError, KeyError):
            return None
        differences[r["run"].dataset].append(pair[0] - pair[1])
    mean = variance = 0.0
    for group in differences.values():
        each, share = np.mean(group, axis=0), len(group) / len(rows)
        mean += share * each.mean()
        variance += share**2 * each.var(ddof=1) / len(each)
    return mean, 1.96 * variance**0.5


def per_image(record, head, metric):
    """A metric of each test image, larger is better: percent right, or log-probability of the truth in nats."""
    if metric == "nll":
        return record.test[f"log_probability_{head}"].astype(float)
    if metric == "top5":
        return 100.0 * record.test[f"top5_{head}"]
    if metric == "top1":
        return 100.0 * (record.test[f"predicted_{head}"] == record.test["labels"])
    raise KeyError(metric)


def _joined(frames):
    """Data frames under each other; an empty one would make pandas doubt the types of the rest."""
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
