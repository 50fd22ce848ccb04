"""What claims are judged by: grids with their records, and the pairs of runs that they compare."""

from collections import Counter
from dataclasses import dataclass, field, replace
from math import log

import numpy as np
import pandas as pd

from .. import data
from ..experiments import EXHIBITS, tiers
from ..launch.ensure import ensure
from ..losses import LABELS
from . import tables
from .verdict import Pair

TABLES = ("table1", "table2", "table3")


@dataclass(frozen=True)
class Evidence:
    """What claims are judged by: the grids of the exhibits and the records of those runs that are finished. diverged:
    the runs whose loss was not finite. plan: shape of a run (the run with seed 0) -> how many seeds the profile plans
    of it. tables: the numbers of Tables 1 to 3, in the form of `tables.measured`."""

    profile: str = "paper"
    grids: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)
    diverged: frozenset = frozenset()
    plan: dict = field(default_factory=dict)
    tables: pd.DataFrame = None

    def table(self, exhibit):
        return self.tables[self.tables["exhibit"] == exhibit]

    def counts(self, run):
        """Whether a run is among the planned cells: data that must be one's own count once a run on them has ended."""
        ended = self.records.keys() | self.diverged
        return run is None or not data.dataset(run.dataset).prepared or run.dataset in {each.dataset for each in ended}

    def why(self, runs, reason):
        """Why runs give no number though they have ended: those that diverged, or the reason; "" before they have."""
        gone = [run for run in runs if run not in self.records]
        if None in runs or not self.diverged.issuperset(gone):
            return ""
        name = lambda run: f"{LABELS[run.method]} seed {run.seed}"
        return ", ".join(f"{name(run)} diverged" for run in gone) or f"{name(runs[0])}: {reason}"


def evidence(grids, records, profile="paper", plan=None):
    """plan: by default the runs of the grids."""
    frames = []
    for table in TABLES:
        paper = tables.printed(table)
        frame = tables.measured(grids.get(table, ()), records, list(paper["metric"].unique()), table)
        shown = set(zip(paper["dataset"], paper["metric"]))  # Table 3 has another metric for each data set
        frames.append(frame.loc[[pair in shown for pair in zip(tables.in_the_paper(frame, paper), frame["metric"])]])
    frame = pd.concat([frame for frame in frames if len(frame)] or frames[:1])  # empty ones would change its types
    runs = {run for grid in grids.values() for run in grid}
    diverged = frozenset(run for run in runs if tables.diverged(run, records))
    return Evidence(profile, grids, records, diverged, Counter(replace(run, seed=0) for run in plan or runs), frame)


def printed():
    """The paper's own Tables 1 to 3 as evidence: one number a cell gives means and signs, but no interval."""
    return Evidence(tables=pd.concat([tables.printed(table) for table in TABLES]))


def collect(profile, seeds=None, exhibits=EXHIBITS):
    """The evidence of a profile: its records, trained before; a damaged one counts as missing. Without seeds: those
    that are planned, and once more as many where they have records."""
    grids = {name: exhibit.grid(profile, seeds) for name, exhibit in exhibits.items()}
    more = {}
    for name, grid in grids.items() if seeds is None else ():
        planned = 1 + max((run.seed for run in grid), default=-1)
        more[name] = exhibits[name].grid(profile, list(range(planned, 2 * planned))) if planned else []
    runs = dict.fromkeys(run for grid in [*grids.values(), *more.values()] for run in grid)
    records = ensure(list(runs), profile, train=False)
    for name, extension in more.items():
        ended = [run for run in extension if run in records or tables.diverged(run, records)]
        grids[name] = list(dict.fromkeys([*grids[name], *ended]))
    return evidence(grids, records, profile, tiers(profile))


def ratio(value, turned=False):
    """A value as its logarithm, so that a difference is a log ratio; turned where a smaller one supports the claim."""

    def logarithm(record, head):
        number = value(record, head)
        return (-1 if turned else 1) * (log(number) if number > 0 else np.nan)

    return logarithm


def pairs(found, exhibit, method, over, value, others=None, top1=False):
    """The `Pair`s of an exhibit's runs, ended or not: each head of a method beside the same network of another. A cell
    is a head of a network in a pair; IND's single network stands beside both of a pair. value(record, head): what is
    compared. others: seed -> the run that stands beside it, by default that of the same network. top1: what is compared
    is an accuracy, so that a run that diverged has that of chance."""
    network = lambda run, slot: (run.dataset, run.nets[slot], run.width, run.stem, run.blocks, run.holdout)
    grid = found.grids.get(exhibit, ())
    same = {(network(run, 0), run.seed): run for run in grid if run.method == over}

    def at(run, head):
        if run in found.records:
            return value(found.records[run], head)
        return tables.chance(run) if top1 and run in found.diverged else np.nan

    for run in (run for run in grid if run.method == method):
        for head in range(run.n_heads):
            own = network(run, run.slot(head))
            if other := others.get(run.seed) if others is not None else same.get((own, run.seed)):
                beside = min(head, other.n_heads - 1)
                gain = at(run, head) - at(other, beside)
                why = "" if np.isfinite(gain) else found.why((run, other), "not recorded, or without a logarithm")
                yield Pair((exhibit, run.nets, own, head), run.seed, gain, run, other, head, beside, why)


def of_head(frame, head):
    """The rows of one head in a record's history or noise."""
    return frame[frame["head"] == head]
