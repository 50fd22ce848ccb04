"""Which claims hold: each is a function of records that gives its effects, judged by `statistics.decide`.

docs/protocol.md says what is judged, and stood there before the records did. An effect is a mean over cells (networks,
exits, costs) for each seed, signed so that positive supports the claim. What reads tables also runs on the numbers that
the paper prints.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache
from math import log

import numpy as np
import pandas as pd
import torch

from .. import data, early_exit
from ..experiments import EXHIBITS, fig4, fig5, fig6, table1, table2, table3, tiers
from ..launch.ensure import ensure
from ..launch.estimate import seconds_left
from ..launch.progress import duration
from ..losses import LABELS, SiameseLabelsLoss
from ..models import count_parameters
from . import tables
from .statistics import ClaimVerdict, Effect, Pair, paired, seeds_to_decide

VERDICTS = ("reproduced", "negligible", "contradicted", "undecided")

TABLES = ("table1", "table2", "table3")

RATIO = log(1.1)
"""Smallest ratio of interest, as its logarithm."""


@dataclass(frozen=True)
class Evidence:
    """What claims are judged by: the grids of the exhibits and the records of those runs that are finished.

    plan: all runs that the profile plans. tables: the numbers of Tables 1 to 3, in the form of `tables.measured`.
    """

    profile: str = "paper"
    grids: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)
    plan: frozenset = frozenset()
    tables: pd.DataFrame = None

    def table(self, exhibit):
        return self.tables[self.tables["exhibit"] == exhibit]


def evidence(grids, records, profile="paper", plan=None):
    """plan: by default the runs of the grids."""
    frames = []
    for table in TABLES:
        paper = tables.printed(table)
        frame = tables.measured(grids.get(table, ()), records, list(paper["metric"].unique()), table)
        shown = set(zip(paper["dataset"], paper["metric"]))  # Table 3 has another metric for each data set
        frames.append(frame.loc[[pair in shown for pair in zip(tables.in_the_paper(frame, paper), frame["metric"])]])
    plan = frozenset(plan or (run for grid in grids.values() for run in grid))
    # empty frames would change the types of columns
    return Evidence(profile, grids, records, plan, pd.concat([frame for frame in frames if len(frame)] or frames[:1]))


def printed():
    """The paper's own Tables 1 to 3 as evidence: one number a cell gives means and signs, but no interval."""
    return Evidence(tables=pd.concat([tables.printed(table) for table in TABLES]))


def collect(profile, seeds=None, exhibits=EXHIBITS):
    """The evidence of a profile: its records, trained before; a damaged one counts as missing.

    Without seeds: those that are planned, and once more as many where they have records.
    """
    grids = {name: exhibit.grid(profile, seeds) for name, exhibit in exhibits.items()}
    more = {}
    for name, grid in grids.items() if seeds is None else ():
        planned = 1 + max((run.seed for run in grid), default=-1)
        more[name] = exhibits[name].grid(profile, list(range(planned, 2 * planned))) if planned else []
    runs = dict.fromkeys(run for grid in [*grids.values(), *more.values()] for run in grid)
    records = ensure(list(runs), profile, train=False)
    for name, extension in more.items():
        grids[name] = list(dict.fromkeys([*grids[name], *(run for run in extension if run in records)]))
    return evidence(grids, records, profile, tiers(profile))


def judge(profile, seeds=None, names=None):
    """The verdict on every claim, or on those named, by the records of a profile."""
    wanted = {name for claim in names or () for name in (CLAIMS | OURS)[claim][1]} if names else set(EXHIBITS)
    return judge_all(collect(profile, seeds, {name: EXHIBITS[name] for name in EXHIBITS if name in wanted}), names)


def judge_all(found, names=None):
    """The paper's claims, then ours, or those named."""
    chosen = {name: value for name, value in (CLAIMS | OURS).items() if names is None or name in names}
    judged = lambda name, claim, effects: ClaimVerdict(name, claim, tuple(effects(found)), found.profile, found.records)
    return [judged(name, claim, effects) for name, (claim, _, effects) in chosen.items()]


def headline(*judged):
    """Judged claims as Markdown, a paragraph each: in bold the verdict, then the numbers on which it rests."""
    paragraphs = []
    for claim in judged:
        numbers = "; ".join(f"{effect.name}: **{effect}**" for effect in claim.primary if str(effect))
        paragraphs.append(f"**{claim.claim}: {claim.verdict}.** {numbers}".strip() + "." * bool(numbers))
    return "\n\n".join(paragraphs)


def in_words(claim):
    """A judged claim as Markdown: the verdict, then a line for each effect, and what would decide it."""
    lines = [f"**{claim.claim}: {claim.verdict}.**\n"]
    for effect in claim.effects:
        line = f"- {effect.name}: {str(effect) or 'no record'}"
        if effect.runs:
            line += f", {effect.seeds} seed{'s' * (effect.seeds != 1)}"
        if effect in claim.primary and claim.profile != "quick":
            line += f": {effect.verdict}" + (f" ({effect.remark})" if effect.remark else "")
            line += f"; the smallest effect of interest is {effect.delta:.2f}" if effect.delta else ""
        elif effect not in claim.primary:
            line += " (shown, judges nothing)"
        lines.append(line + ".")
        if effect.delta and claim.profile != "quick" and effect.verdict == "undecided":
            lines.append(f"  {what_decides(effect, claim.profile, claim.records)}")
    return "\n".join(lines)


def what_decides(effect, profile, records):
    """A sentence: how many seeds would decide an effect, how long they take here, and what trains the next ones."""
    n, more = seeds_to_decide(effect.values, effect.delta), range(effect.planned, 2 * effect.planned)
    exhibit = next(name for name, value in EXHIBITS.items() if set(effect.runs) & set(value.grid(profile)))
    methods = {run.method for run in effect.runs}
    runs = [run for run in EXHIBITS[exhibit].grid(profile, list(more)) if run.method in methods]
    seconds = sum(seconds_left(runs, records).values()) / len(more) * (n - effect.seeds)
    return (
        f"{n} seeds would decide it by its spread, {duration(seconds)} more of one core or GPU like this one. One "
        f"extension is allowed, to {2 * effect.planned} seeds: `python -m silalib train {exhibit} --profile {profile} "
        f"--seeds {' '.join(map(str, more))}`."
    )


def score(judged):
    """In a line: claims: 2 reproduced, 1 undecided, 5 not run."""
    papers = [claim for claim in judged if claim.name in CLAIMS]
    short = lambda verdict: "in progress" if verdict.startswith("so far") else verdict
    counts = Counter(short(claim.verdict).replace("judges nothing", "not judged (stand-in data)") for claim in papers)
    order = [*VERDICTS, "in progress", "no verdict", "not judged (stand-in data)", "not run"]
    return "claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def scope(better):
    """What an effect of tables is about: "Table 1, ResNet18 pair, 2 networks"."""
    rows = better.drop_duplicates(["dataset", "pair", "net"])
    title, nets, sets = EXHIBITS[rows["exhibit"].iloc[0]].title.split(":")[0], rows["network"], rows["dataset"]
    pair = f"{nets.iloc[0]} pair, " if nets.nunique() == 1 and rows["pair"].nunique() == 1 else ""
    where = f"{sets.iloc[0]}, " if title == "Table 3" and sets.nunique() == 1 else ""
    return f"{title}, {where}{pair}{len(rows)} networks"


def of_tables(found, names, method, over, deltas, metrics):
    """Effects of a method over another in tables: primary in the metrics that deltas has, shown in the others.

    deltas: metric -> table, or "small", -> delta. With one metric the signs of all are counted. A table whose data must
    be one's own and are not here is left out.
    """
    for name in names:
        better = tables.gains(found.table(name), method, over)
        better = better[better["run"].map(worth).astype(bool)]
        paper = tables.gains(tables.printed(name), method, over)
        if found.profile == "small" and name == "table2":
            continue
        for metric in [metric for metric in metrics if metric in set(better["metric"])]:
            rows, own = better[better["metric"] == metric], paper[paper["metric"] == metric]
            same = own[own["pair"].isin(set(rows["pair"]))]
            delta = deltas.get(metric, {}).get("small" if found.profile == "small" else name)
            title = (
                f"{tables.METRICS[metric].replace('Top', 'top')}, {LABELS[method]} over {LABELS[over]} ({scope(rows)})"
            )
            unit = "nats" if metric == "nll" else "points"
            lost = hindrance(rows["run"], rows["run_over"], found.records) if metric != "top1" else ""
            cells = (better if len(metrics) == 1 else rows).groupby(["dataset", "pair", "net", "metric"])["gain"]
            signs = cells.mean().dropna() > 0
            counts = dict(wins=int(signs.sum()), total=len(signs))
            more = dict(delta=delta, hindered=lost, paper=same["gain"].mean(), **counts)
            yield tables.effect(title, unit, better, metric, found.plan, found.records, **more)


def worth(run):
    """Whether a run counts among the planned cells: its data are here, or can be downloaded."""
    return run is None or not data.dataset(run.dataset).prepared or data.is_available(run.dataset)


def hindrance(runs, others, records):
    """Why runs give no verdict: "SiLa seed 3 diverged"; ""."""
    lost = dict.fromkeys(run for run in [*runs, *others] if run is not None and tables.diverged(run, records))
    return ", ".join(f"{LABELS[run.method]} seed {run.seed} diverged" for run in lost)


def every_cell(found):
    """Claim 1: SiLa over IND in Tables 1 and 2, by top-1 and NLL; BEST and top-5 are shown."""
    top1, nll = {"small": 0.70, "table1": 0.79, "table2": 0.51}, {"small": 0.06, "table1": 0.076, "table2": 0.05}
    deltas = {"top1": top1, "nll": nll}
    yield from of_tables(found, TABLES[:2], "sila", "ind", deltas, ("top1", "nll", "top5", "best"))


def every_method(found):
    """Claim 2: DML and SiLa over IND, SiLa+DML over both, in Tables 1 and 2."""
    half = dict.fromkeys(("small", *TABLES), 0.50)
    sila, dml = {"small": 0.70, "table1": 0.79, "table2": 0.51}, {"small": 0.50, "table1": 0.83, "table2": 0.58}
    compared = (("sila", "ind", sila), ("dml", "ind", dml), ("sila+dml", "sila", half), ("sila+dml", "dml", half))
    for method, over, delta in compared:
        yield from of_tables(found, TABLES[:2], method, over, {"top1": delta}, ("top1",))


def autoaugment(found):
    """Claim 3: SiLa over IND in Table 3, at `small` on CIFAR-100 alone."""
    frame = found.table("table3")
    small = found.profile == "small"
    own = frame[frame["dataset"] == data.DATASETS["cifar100"].title] if small else frame
    chosen = Evidence(found.profile, found.grids, found.records, found.plan, own)
    deltas = {"top1": {"small": 1.05, "table3": 0.50}}
    yield from of_tables(chosen, TABLES[2:], "sila", "ind", deltas, ("top1",))
    if small:
        rest = Evidence(found.profile, found.grids, found.records, found.plan, frame.drop(own.index))
        yield from of_tables(rest, TABLES[2:], "sila", "ind", {}, ("top1",))


def easier_to_train(found):
    """Claim 4: test top-1, mean over the epochs; and the distance of Net1 and Net2 against that in IND's pair."""
    top1 = lambda record, head: of_head(record.history, head)["test_top1"].mean()
    where = "Figure 3, ResNet18 pair"
    name = f"top-1, mean over the epochs, SiLa over IND ({where}, 2 networks)"
    yield compared(found, name, "points", pairs(found, "fig3", "sila", "ind", top1), 0.70)
    apart = [pair for pair in pairs(found, "fig3", "sila", "ind", ratio(distance, turned=True)) if pair.head == 0]
    yield compared(found, f"distance of Net1 and Net2, IND over SiLa ({where})", "log ratio", apart, RATIO)


def distance(record, head):
    """The mean over the epochs of |test top-1 of Net1 - of Net2|."""
    net1, net2 = (of_head(record.history, head)["test_top1"].to_numpy() for head in (0, 1))
    return np.abs(net1 - net2).mean()


def exits(found):
    """Claim 5: top-1 of every exit at its cost (anytime, Figure 5), and at equal average costs (budgeted, Figure 4).

    Anytime is a mean over exits, budgeted over the costs that all curves reach. `small` is judged by the five blocks.
    """
    top1 = lambda record, head: record.heads[head]["top1"]
    rows = [pair for pair in pairs(found, "fig5", "sila", "ind", top1) if worth(pair.run)]
    judged = {run for run in found.grids.get("fig4", ()) if found.profile == "small"}
    own = [pair for pair in rows if not judged or pair.run in judged]
    name = "top-1 of the exits (anytime), SiLa over IND (Figure 5, {})"
    yield compared(found, name.format(f"{len({p.cell for p in own})} exits"), "points", own, 0.50, metric="top1")
    if rest := [pair for pair in rows if pair not in own]:
        blocks = {pair.run.n_heads for pair in rest}
        yield compared(found, name.format(f"{', '.join(map(str, blocks))} blocks"), "points", rest, None)
    networks = defaultdict(list)
    for pair in pairs(found, "fig4", "sila", "ind", lambda record, head: 0.0):
        if pair.head == 0 and worth(pair.run):
            networks[pair.cell].append(pair)
    rows = []
    for planned in networks.values():
        done = [pair for pair in planned if pair.gain == 0]
        runs = [pair.run for pair in done], [pair.run_over for pair in done]
        curves = [[early_exit.budgeted(found.records[run]) for run in side] for side in runs]
        gains = dict(zip(done, tables.gains_at_equal_costs(*curves).mean(axis=1)))
        rows += [pair._replace(gain=gains.get(pair, np.nan)) for pair in planned]
    name = f"top-1 at equal average costs (budgeted), SiLa over IND (Figure 4, {len(networks)} networks)"
    yield compared(found, name, "points", rows, 0.50)


def concentrated(found):
    """Claim 6: the scatter ratio of the test features, IND over SiLa."""
    scatter = ratio(lambda record, head: record.heads[head]["test_concentration"], turned=True)
    name = "scatter ratio of the features, IND over SiLa (Figure 6, 2 networks)"
    yield compared(found, name, "log ratio", pairs(found, "fig6", "sila", "ind", scatter), RATIO)


def robust(found):
    """Claim 7: training NLL of the last epoch (Figure 7a), and its change under absolute noise (Figure 7b)."""
    last = ratio(lambda record, head: of_head(record.history, head)["train_nll"].iloc[-1])
    for over in ("ind", "dml"):
        name = f"last training NLL, SiLa over {LABELS[over]} (Figure 7a, ResNet18 pair, 2 networks)"
        yield compared(found, name, "log ratio", pairs(found, "fig7", "sila", over, last), RATIO)
    for method in ("sila", "dml"):
        name = f"change under noise, IND over {LABELS[method]} (Figure 7b, ResNet18 pair, 2 networks)"
        rows = pairs(found, "fig7", method, "ind", ratio(change, turned=True))
        yield compared(found, name, "log ratio", rows, RATIO)


def change(record, head, kind="absolute"):
    """Change of training NLL under noise on the parameters, mean over the draws and over sigma above 0 (Figure 7b)."""
    noise = of_head(record.noise, head).query("kind == @kind")
    return noise[noise["sigma"] > 0]["nll"].mean() - noise[noise["sigma"] == 0]["nll"].mean()


def nothing_added(found):
    """Claim 8: parameters of every network of the paper, within the training with SiLa and outside of it; no run."""
    planned = {run for grid in (table1, table2, table3, fig4, fig5, fig6) for run in grid("paper", [0])}
    runs = sorted((run for run in planned if run.method == "sila"), key=lambda run: run.key)
    alone = lambda run: sum(parameters(run, slot) for slot in range(len(run.nets)))
    added = {run: trained(run.nets, run) - alone(run) for run in runs}
    name = "parameters added to the networks of a training with SiLa"
    yield Effect(name, "", wins=sum(n == 0 for n in added.values()), total=len(added), exact=True)


@cache
def parameters(run, slot):
    with torch.device("meta"):
        return count_parameters(run.network(slot))


def trained(nets, run):
    """Parameters of all that is trained with SiLa: the networks, and the loss."""
    with torch.device("meta"):
        modules = [run.network(slot) for slot in range(len(nets))]
    return count_parameters(torch.nn.ModuleList([*modules, SiameseLabelsLoss()]))


def equal_compute(found):
    """Ours, A: SiLa's Net1 against IND alone with twice the epochs."""
    top1 = lambda record, head: record.heads[head]["top1"]
    grid = found.grids.get("equal_compute", ())
    longer = {run.seed: run for run in grid if run.method == "ind" and len(run.nets) == 1}
    rows = pairs(found, "equal_compute", "sila", "ind", top1, longer)
    name = "top-1, SiLa's Net1 over IND with twice the epochs (ResNet18)"
    yield compared(found, name, "points", [pair for pair in rows if pair.head == 0], 0.70)


def calibrated(found):
    """Ours, B: expected calibration error."""
    ece = lambda record, head: -record.heads[head].get("ece", np.nan)
    name = "ECE, IND over SiLa (Table 1, ResNet18 pair, 2 networks)"
    yield compared(found, name, "points", pairs(found, "fig3", "sila", "ind", ece), 1.0)


CLAIMS = {
    "1": ("SiLa beats IND for every network", TABLES[:2], every_cell),
    "2": ("DML and SiLa each beat IND, and SiLa+DML beats both", TABLES[:2], every_method),
    "3": ("SiLa helps with AutoAugment too", TABLES[2:], autoaugment),
    "4": ("SiLa makes the network easier to train, and Net1 and Net2 track each other", ("fig3",), easier_to_train),
    "5": ("SiLa raises the accuracy of every exit of MSDNet at the same cost", ("fig5", "fig4"), exits),
    "6": ("SiLa's features are more concentrated", ("fig6",), concentrated),
    "7": ("SiLa ends with higher training NLL; SiLa and DML change less under noise", ("fig7",), robust),
    "8": ("No parameters are added", (), nothing_added),
}
"""Number -> (the paper's claim, the exhibits that it is about, the function from evidence to its effects)."""

OURS = {
    "A": ("SiLa beats one network with the same compute", ("equal_compute",), equal_compute),
    "B": ("SiLa's networks are better calibrated", ("fig3",), calibrated),
}
"""Two questions that are not the paper's, judged by the same rule and never counted among its claims."""


def compared(found, name, unit, rows, delta, metric=None):
    """The effect of `Pair`s of runs; one that diverged gives no verdict."""
    rows = list(rows)
    lost = hindrance([pair.run for pair in rows], [pair.run_over for pair in rows], found.records)
    return paired(name, unit, rows, found.plan, found.records, metric, delta=delta, hindered=lost)


def ratio(value, turned=False):
    """A value as its logarithm, so that a difference is a log ratio; turned where a smaller one supports the claim."""

    def logarithm(record, head):
        number = value(record, head)
        return (-1 if turned else 1) * (log(number) if number > 0 else np.nan)

    return logarithm


def pairs(found, exhibit, method, over, value, others=None):
    """The `Pair`s of an exhibit's runs, finished or not: each head of a method beside the same network of another.

    value(record, head): what is compared. A cell is a head of a network in a pair; IND's single network stands beside
    both of a pair. others: seed -> the run that stands beside it, by default that of the same network.
    """
    network = lambda run, slot: (run.dataset, run.nets[slot], run.width, run.stem, run.blocks, run.holdout)
    grid = found.grids.get(exhibit, ())
    same = {(network(run, 0), run.seed): run for run in grid if run.method == over}
    for run in (run for run in grid if run.method == method):
        for head in range(run.n_heads):
            own = network(run, run.slot(head))
            if other := others.get(run.seed) if others is not None else same.get((own, run.seed)):
                gain, at = np.nan, min(head, other.n_heads - 1)
                if run in found.records and other in found.records:
                    gain = value(found.records[run], head) - value(found.records[other], at)
                yield Pair((exhibit, run.nets, own, head), run.seed, gain, run, other, head, at)


def of_head(frame, head):
    """The rows of one head in a record's history or noise."""
    return frame[frame["head"] == head]
