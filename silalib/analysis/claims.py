"""Which of the paper's claims hold: each claim is a function of records that gives its effects.

An effect compares networks over cells (networks, metrics, exits) and seeds, signed so that positive supports the claim.
It is judged by its mean over the cells, with a 95% interval by Student's t over the paired seeds, and by the count of
signs. The functions that read tables also run on the numbers that the paper prints.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from .. import early_exit
from ..experiments import EXHIBITS
from ..launch.ensure import ensure
from ..losses import LABELS
from . import tables
from .statistics import Pair, paired

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not run")

TABLES = ("table1", "table2", "table3")

OURS = ("coupling", "equal_compute", "regime", "choices")
"""Exhibits that train the paper's networks once more, for questions that are not the paper's."""

PAPER_DATA = ("cifar10", "cifar100", "imagenet100", "mnist")
"""Records on any other data set show that everything runs, and judge nothing in the paper."""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's verdict and what it rests on."""

    number: int
    claim: str
    effects: tuple
    left_out: tuple = ()  # exhibits of the claim without any record

    @property
    def runs(self):
        return tuple(dict.fromkeys(run for effect in self.effects for run in effect.runs))

    @property
    def stand_in(self):
        """Whether it rests on stand-in data, and so judges nothing in the paper."""
        return any(run.dataset not in PAPER_DATA for run in self.runs)

    @property
    def measured(self):
        """The verdict on the records as they are, stand-in data or not: that of all effects together."""
        verdicts = {effect.verdict for effect in self.effects}
        if len(verdicts) == 1:
            return verdicts.pop()
        return "not reproduced" if "not reproduced" in verdicts else "inconclusive"

    @property
    def verdict(self):
        return "not run" if self.stand_in else self.measured

    @property
    def note(self):
        """Why the verdict is not better, in words; "" where nothing is to be said."""
        if not self.runs:
            return ""
        listed = lambda effects: " and ".join(f'"{effect.name}"' for effect in effects)
        notes = ["stand-in data judge nothing in the paper"] if self.stand_in else []
        done = [effect for effect in self.effects if effect.total]
        if single := [effect for effect in done if effect.seeds == 1]:
            notes.append("fewer than two seeds" + (f" of {listed(single)}" if len(single) < len(done) else ""))
        parts = defaultdict(list)
        for effect in done:
            if effect.missing:
                parts[f"records for only {effect.total} of {effect.total + effect.missing} cells"].append(effect)
        notes += [f"{cells} of {listed(effects)}" for cells, effects in parts.items()]
        if len(done) < len(self.effects):
            notes.append(f"{listed(effect for effect in self.effects if not effect.total)} not run")
        if self.left_out:
            notes.append(f"without {', '.join(EXHIBITS[name].title for name in self.left_out)}")
        return "; ".join(notes)


@dataclass(frozen=True)
class Evidence:
    """What claims are judged by: the grids of the exhibits and the records of those runs that are finished.

    tables: the numbers of Tables 1 to 3, in the form of `tables.measured`.
    """

    grids: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)
    tables: pd.DataFrame = None


def evidence(grids, records):
    frames = []
    for table in TABLES:
        paper = tables.printed(table)
        frame = tables.measured(grids.get(table, ()), records, list(paper["metric"].unique()), table)
        shown = set(zip(paper["dataset"], paper["metric"]))  # Table 3 has another metric for each data set
        frames.append(frame.loc[[pair in shown for pair in zip(tables.in_the_paper(frame, paper), frame["metric"])]])
    # empty frames would change the types of columns
    return Evidence(grids, records, pd.concat([frame for frame in frames if len(frame)] or frames[:1]))


def printed():
    """The paper's own Tables 1 to 3 as evidence: one number a cell gives signs, but no interval."""
    return Evidence(tables=pd.concat([tables.printed(table) for table in TABLES]))


def collect(profile, seeds=None, exhibits=EXHIBITS):
    """The evidence of a profile: its records, trained before; a damaged one counts as missing."""
    grids = {name: exhibit.grid(profile, seeds) for name, exhibit in exhibits.items()}
    return evidence(grids, ensure([run for grid in grids.values() for run in grid], profile, train=False))


def judge(profile, seeds=None):
    """The verdict on every claim by the records of a profile."""
    return judge_all(collect(profile, seeds))


def judge_all(found):
    judged = []
    for number, (claim, exhibits, effects) in CLAIMS.items():
        left_out = [name for name in exhibits if not any(run in found.records for run in found.grids.get(name, ()))]
        judged.append(ClaimVerdict(number, claim, tuple(effects(found)), tuple(left_out)))
    return judged


def in_words(claim):
    """A judged claim as Markdown: a line for each of its effects, then the verdict and why it is not better."""
    lines = [f"- {e.name}: {str(e) or 'no record'}. {e.verdict.capitalize()}." for e in claim.effects]
    lines.append(f"\n**{claim.claim}: {claim.verdict}**" + (f" ({claim.note})." if claim.note else "."))
    return "\n".join(lines)


def score(judged):
    """In a line: claims: 2 reproduced, 1 inconclusive, 5 not run."""
    counts = Counter(claim.verdict for claim in judged)
    text = "claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return text + (" (stand-in data judge nothing)" if any(claim.stand_in for claim in judged) else "")


def every_cell(found):
    """Claim 1: SiLa over IND in every metric that the tables print."""
    better = tables.gains(found.tables, "sila")
    for metric, title in tables.METRICS.items():
        if metric == "top1" or better.loc[better["metric"] == metric, "gain"].notna().any():
            unit = "nats" if metric == "nll" else "points"
            yield tables.effect(f"{title}, SiLa over IND", unit, better, found.records, metric)


def every_method(found):
    """Claim 2: DML and SiLa over IND, SiLa+DML over both, in Tables 1 and 2: mean of top-1, signs of every metric."""
    frame = found.tables[found.tables["exhibit"] != "table3"]
    for method, over in (("sila", "ind"), ("dml", "ind"), ("sila+dml", "sila"), ("sila+dml", "dml")):
        better = tables.gains(frame, method, over)
        yield tables.effect(f"top-1, {LABELS[method]} over {LABELS[over]}", "points", better, found.records)


def autoaugment(found):
    """Claim 3: SiLa over IND in Table 3: mean of top-1, signs of every metric."""
    better = tables.gains(found.tables[found.tables["exhibit"] == "table3"], "sila")
    yield tables.effect("top-1 with AutoAugment, SiLa over IND", "points", better, found.records)


def easier_to_train(found):
    """Claim 4: test top-1, mean over the epochs; and the distance of Net1 and Net2 against that in IND's pair."""
    top1 = lambda record, head: of_head(record.history, head)["test_top1"].mean()
    yield paired("top-1 over the epochs, SiLa over IND", "points", pairs(found, "fig3", "sila", "ind", top1))
    closer = [pair for pair in pairs(found, "fig3", "sila", "ind", closeness) if pair.head == 0]
    yield paired("closer than in IND's pair, Net1 and Net2", "points", closer)


def closeness(record, head):
    """Minus the distance in test top-1 of a pair's two networks, its mean over the second half of the epochs."""
    net1, net2 = (of_head(record.history, head)["test_top1"].to_numpy() for head in (0, 1))
    return -np.abs(net1 - net2)[len(net1) // 2 :].mean()


def exits(found):
    """Claim 5: top-1 of every exit at its cost (anytime, Figure 5), and at equal average costs (budgeted, Figure 4).

    A cell is an exit of a network in the first, and a network in the second, with its mean over the costs: the top-1
    at neighbouring costs is nearly the same number.
    """
    top1, cost = (
        pairs(found, "fig5", "sila", "ind", lambda record, head, name=name: record.heads[head][name])
        for name in ("top1", "macs")
    )
    rows = [pair if more.gain == 0 else pair._replace(gain=np.nan) for pair, more in zip(top1, cost)]
    yield paired("top-1 of each exit (anytime), SiLa over IND", "points", rows, found.records, "top1")
    rows, networks = [], defaultdict(list)
    for pair in pairs(found, "fig4", "sila", "ind", lambda record, head: 0.0):
        if pair.head == 0:
            networks[pair.cell].append(pair)
    for planned in networks.values():
        done = [pair for pair in planned if pair.gain == 0]
        runs = [pair.run for pair in done], [pair.run_over for pair in done]
        curves = [[early_exit.budgeted(found.records[run]) for run in side] for side in runs]
        gains = dict(zip(done, tables.gains_at_equal_costs(*curves).mean(axis=1)))
        rows += [pair._replace(gain=gains.get(pair, np.nan)) for pair in planned]
    yield paired("top-1 at equal average costs (budgeted), SiLa over IND", "points", rows)


def concentrated(found):
    """Claim 6: the scatter ratio of the test features, IND over SiLa."""
    ratio = lambda record, head: -record.heads[head]["test_concentration"]
    yield paired("scatter ratio of the features, IND above SiLa", "ratio", pairs(found, "fig6", "sila", "ind", ratio))


def robust(found):
    """Claim 7: training NLL of the last epoch (Figure 7a), and its change under absolute noise (Figure 7b)."""
    last = lambda record, head: of_head(record.history, head)["train_nll"].iloc[-1]
    for over in ("ind", "dml"):
        name = f"last training NLL, SiLa above {LABELS[over]}"
        yield paired(name, "nats", pairs(found, "fig7", "sila", over, last))
    stability = lambda record, head: -change(record, head)
    for method in ("sila", "dml"):
        name = f"change under absolute noise, {LABELS[method]} below IND"
        yield paired(name, "nats", pairs(found, "fig7", method, "ind", stability))


def change(record, head, kind="absolute"):
    """Change of training NLL under noise on the parameters, mean over the draws and over sigma above 0 (Figure 7b)."""
    noise = of_head(record.noise, head).query("kind == @kind")
    return noise[noise["sigma"] > 0]["nll"].mean() - noise[noise["sigma"] == 0]["nll"].mean()


def nothing_added(found):
    """Claim 8: parameters of every network trained with SiLa, against the same network trained alone."""
    parameters = lambda record, head: record.heads[head]["parameters"]
    papers = [name for name in found.grids if name not in OURS]
    rows = [pair for name in papers for pair in pairs(found, name, "sila", "ind", parameters)]
    yield paired("parameters added to a network", "", rows, exact=True)


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


def pairs(found, exhibit, method, over, value):
    """The `Pair`s of an exhibit's runs, finished or not: each head of a method beside the same network of another.

    value(record, head): what is compared. A cell is a head of a network in a pair; IND's single network stands beside
    both of a pair.
    """
    network = lambda run, slot: (run.dataset, run.nets[slot], run.width, run.stem, run.blocks)
    grid = found.grids.get(exhibit, ())
    others = {(network(run, 0), run.seed): run for run in grid if run.method == over}
    for run in (run for run in grid if run.method == method):
        for head in range(run.n_heads):
            same = network(run, run.slot(head))
            if other := others.get((same, run.seed)):
                gain, at = np.nan, min(head, other.n_heads - 1)
                if run in found.records and other in found.records:
                    gain = value(found.records[run], head) - value(found.records[other], at)
                yield Pair((exhibit, run.nets, same, head), run.seed, gain, run, other, head, at)


def of_head(frame, head):
    """The rows of one head in a record's history or noise."""
    return frame[frame["head"] == head]
