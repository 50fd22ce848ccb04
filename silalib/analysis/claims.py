"""Which claims hold: each is a function of records that gives its effects, judged by `verdict.decide`.

docs/protocol.md says what is judged, and stood there before the records did. An effect is a mean over cells (networks,
exits, costs) for each seed, signed so that positive supports the claim. What reads tables also runs on the numbers that
the paper prints.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from math import log

import numpy as np
import pandas as pd
import torch

from .. import data, early_exit
from ..experiments import EXHIBITS, fig4, fig5, fig6, table1, table2, table3
from ..launch.estimate import hours, seconds_left
from ..losses import LABELS, SiameseLabelsLoss
from ..models import count_parameters
from . import tables
from .evidence import TABLES, collect, of_field, of_head, pairs, printed, ratio  # noqa: F401  (printed: for pages)
from .statistics import seeds
from .verdict import ClaimVerdict, Effect, Pair, paired, seeds_to_decide

VERDICTS = ("reproduced", "negligible", "contradicted", "undecided")

RATIO = log(1.1)
"""Smallest ratio of interest, as its logarithm."""

SCALED = "ECE after temperature scaling"


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
    """Judged claims as Markdown, a paragraph each: in bold the verdict, then the numbers on which it rests.

    A scope that several effects in a row have, as "(Figure 7a, ResNet18 pair, 2 networks)", is said once: for a phone.
    """
    paragraphs = []
    for claim in judged:
        numbers, before = [], None
        for effect in filter(str, claim.primary):
            what, _, scope = effect.name.rpartition(" (")
            numbers.append(f"{what if scope == before else effect.name}: **{effect}**")
            before = scope
        end = "." * bool(numbers)
        paragraphs.append(f"**{claim.claim}: {claim.verdict}.** {'; '.join(numbers)}".strip() + end)
    return "\n\n".join(paragraphs)


def in_words(claim):
    """A judged claim as Markdown: the verdict, then a line for each effect, and what would decide it."""
    lines = [f"**{claim.claim}: {claim.verdict}.**\n"]
    for effect in claim.effects:
        line = f"- {effect.name}: {str(effect) or effect.hindered or 'no record'}"
        line += seeds([effect.seeds], ", ") if effect.runs else ""
        if effect not in claim.primary:
            line += " (shown, judges nothing)"
        elif claim.profile != "quick":
            line += f": {effect.said}"
            line += f"; the smallest effect of interest is {effect.delta:.{effect.digits}f}" if effect.delta else ""
        lines.append(line + ".")
    return "\n".join([*lines, *(f"  {line}" for line in what_decides(claim))])


def what_decides(claim, timed=True):
    """What would decide an undecided claim, a sentence for each effect that is open: how many seeds, how long the
    extension takes here, if it is to be timed, and what trains it."""
    level = 1 - 0.05 / max(1, len(claim.primary))
    for effect in claim.primary if claim.verdict == "undecided" else ():
        if effect.verdict == "reproduced":
            continue
        if effect.extended:
            yield f"{effect.name}: extended once, which is all that the protocol allows."
            continue
        grids = {name: exhibit.grid for name, exhibit in EXHIBITS.items()}
        holding = [name for name in grids if set(effect.runs) <= set(grids[name](claim.profile))]
        exhibit = min(holding, key=lambda name: len(grids[name](claim.profile)))
        more = range(effect.planned, 2 * effect.planned)
        n = seeds_to_decide(effect.values, effect.delta, 0.95 if effect.verdict == "undecided" else level)
        left = grids[exhibit](claim.profile, list(more)) if timed else ()
        long = f", {hours(sum(seconds_left(left, claim.records).values()))} at this machine's speed" if timed else ""
        command = f"train {exhibit} --profile {claim.profile} --seeds {' '.join(map(str, more))}"
        yield (
            f"{effect.name}: {n} seeds would decide it by its spread. One extension is allowed, to "
            f"{2 * effect.planned} seeds, judged at 99%{long}: `python -m silalib {command}`."
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

    deltas: metric -> table, or "small", -> delta. At `small` Table 2, with a single data set of one's own, judges
    nothing. With one metric the signs of all are counted.
    """
    for name in names:
        better = tables.gains(found.table(name), method, over)
        better = better[better["run"].map(found.counts).astype(bool)]
        paper = tables.gains(tables.printed(name), method, over)
        for metric in [metric for metric in metrics if metric in set(better["metric"])]:
            rows, own = better[better["metric"] == metric], paper[paper["metric"] == metric]
            beside = set(zip(tables.in_the_paper(rows, paper), rows["pair"]))
            same = own[[key in beside for key in zip(own["dataset"], own["pair"])]]
            delta = deltas.get(metric, {}).get("small" if found.profile == "small" else name)
            delta = None if (found.profile, name) == ("small", "table2") else delta
            what = tables.METRICS[metric].replace("Top", "top")
            both = f"{LABELS[method]} over {LABELS[over]}"
            both = f"{LABELS[over]} minus {LABELS[method]}" if metric == "nll" else both  # the less, the better
            title = f"{what}, {both} ({scope(rows)})"
            pairs = [
                Pair((row.dataset, row.pair, row.net), row.seed, row.gain, row.run, row.run_over, row.net - 1,
                     row.net_over - 1, "" if np.isfinite(row.gain) else found.why((row.run, row.run_over), "no number"))
                for row in rows.itertuples()
            ]  # fmt: skip
            more = dict(delta=delta, paper=same["gain"].mean())
            if len(metrics) == 1:
                signs = better.groupby(["dataset", "pair", "net", "metric"])["gain"].mean().dropna() > 0
                more |= dict(wins=int(signs.sum()), total=len(signs), counted=" in all metrics")
            yield paired(
                title, "nats" if metric == "nll" else "points", pairs, found.plan, found.records, metric, **more
            )


def every_cell(found):
    """Claim 1: SiLa over IND in Tables 1 and 2, by top-1 and NLL; BEST and top-5 are shown."""
    top1, nll = {"small": 0.70, "table1": 0.79, "table2": 0.51}, {"small": 0.06, "table1": 0.076, "table2": 0.05}
    deltas = {"top1": top1, "nll": nll}
    yield from of_tables(found, TABLES[:2], "sila", "ind", deltas, ("top1", "nll", "top5", "best"))


def every_method(found):
    """Claim 2: DML and SiLa over IND, SiLa+DML over both, in Tables 1 and 2; SiLa over DML is shown."""
    half = dict.fromkeys(("small", *TABLES), 0.50)
    sila, dml = {"small": 0.70, "table1": 0.79, "table2": 0.51}, {"small": 0.50, "table1": 0.83, "table2": 0.58}
    compared = (("sila", "ind", sila), ("dml", "ind", dml), ("sila+dml", "sila", half), ("sila+dml", "dml", half))
    for method, over, delta in compared:
        yield from of_tables(found, TABLES[:2], method, over, {"top1": delta}, ("top1",))
    yield from of_tables(found, TABLES[:2], "sila", "dml", {}, ("top1",))


def autoaugment(found):
    """Claim 3: SiLa over IND in Table 3, at `small` on CIFAR-100 alone."""
    frame = found.table("table3")
    small = found.profile == "small"
    own = frame[frame["dataset"] == data.DATASETS["cifar100"].title] if small else frame
    chosen = replace(found, tables=own)
    deltas = {"top1": {"small": 1.05, "table3": 0.50}}
    yield from of_tables(chosen, TABLES[2:], "sila", "ind", deltas, ("top1",))
    if small:
        yield from of_tables(replace(found, tables=frame.drop(own.index)), TABLES[2:], "sila", "ind", {}, ("top1",))


def easier_to_train(found):
    """Claim 4: test top-1, mean over the epochs; and the distance of Net1 and Net2 against that in IND's pair."""
    mean = lambda record, head: of_head(record.history, head)["test_top1"].mean()
    where = "Figure 3, ResNet18 pair"
    name = f"top-1, mean over the epochs, SiLa over IND ({where}, 2 networks)"
    yield compared(found, name, "points", pairs(found, "fig3", "sila", "ind", mean, top1=True), 0.70)
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
    rows = [pair for pair in pairs(found, "fig5", "sila", "ind", of_field("top1"), top1=True) if found.counts(pair.run)]
    judged = {run for run in found.grids.get("fig4", ()) if found.profile == "small"}
    own = [pair for pair in rows if not judged or pair.run in judged]
    name = "top-1 of the exits (anytime), SiLa over IND (Figure 5, {})"
    yield compared(found, name.format(count(len({pair.cell for pair in own}), "exit")), "points", own, 0.50, "top1")
    if rest := [pair for pair in rows if pair not in own]:
        blocks = {pair.run.n_heads for pair in rest}
        yield compared(found, name.format(f"{', '.join(map(str, blocks))} blocks"), "points", rest, None)
    networks = defaultdict(list)
    for pair in pairs(found, "fig4", "sila", "ind", lambda record, head: 0.0, top1=True):
        if pair.head == 0 and found.counts(pair.run):
            networks[pair.cell].append(pair)
    rows = []
    for planned in networks.values():
        limit = paired("", "", planned, found.plan, found.records)
        done = [pair for pair in planned if np.isfinite(pair.gain) and pair.seed in limit.seeds_that_judge]
        curves = [[curve(found, run) for run in side] for side in zip(*((pair.run, pair.run_over) for pair in done))]
        gains = dict(zip(done, tables.gains_at_equal_costs(*curves).mean(axis=1))) if done else {}
        rows += [pair._replace(gain=gains.get(pair, np.nan)) for pair in planned]
    name = f"top-1 at equal average costs (budgeted), SiLa over IND (Figure 4, {count(len(networks), 'network')})"
    yield compared(found, name, "points", rows, 0.50)


def curve(found, run):
    """Top-1 against average cost; of a run that diverged that of chance, whatever the cost."""
    if run in found.records:
        return early_exit.budgeted(found.records[run])
    return pd.DataFrame({"macs": [0.0, 1e30], "top1": [tables.chance(run)] * 2})


def count(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def concentrated(found):
    """Claim 6: the scatter ratio of the test features, IND over SiLa."""
    scatter = ratio(of_field("test_concentration"), turned=True)
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
    parts = [noise.loc[chosen, "nll"].mean(skipna=False) for chosen in (noise["sigma"] > 0, noise["sigma"] == 0)]
    return parts[0] - parts[1]


def nothing_added(found):
    """Claim 8: parameters of every network of the paper, within the training with SiLa and outside of it; no run."""
    yield added_parameters()


@cache
def added_parameters(loss=SiameseLabelsLoss):
    planned = {run for grid in (table1, table2, table3, fig4, fig5, fig6) for run in grid("paper", [0])}
    counts = []
    for run in (run for run in planned if run.method == "sila"):
        with torch.device("meta"):
            networks = [run.network(slot) for slot in range(len(run.nets))]
            trained = count_parameters(torch.nn.ModuleList([*networks, loss()]))
        counts.append(trained - sum(map(count_parameters, networks)))
    name = "parameters of the networks in a training with SiLa"
    return Effect(name, "parameters added", wins=counts.count(0), total=len(counts), exact=True)


def equal_compute(found):
    """Ours, A: SiLa's Net1 against IND alone with twice the epochs."""
    longer = {
        run.seed: run for run in found.grids.get("equal_compute", ()) if run.method == "ind" and len(run.nets) == 1
    }
    rows = pairs(found, "equal_compute", "sila", "ind", of_field("top1"), longer, top1=True)
    name = "top-1, SiLa's Net1 over IND with twice the epochs (ResNet18)"
    yield compared(found, name, "points", [pair for pair in rows if pair.head == 0], 0.70)


def calibrated(found):
    """Ours, B: expected calibration error; after temperature scaling it is shown."""
    for name, field, delta in (("ECE", "ece", 1.0), (SCALED, "ece_scaled", None)):
        error = lambda record, head, field=field: -record.heads[head].get(field, np.nan)
        name += ", IND minus SiLa (Table 1, ResNet18 pair, 2 networks)"
        yield compared(found, name, "points", pairs(found, "fig3", "sila", "ind", error), delta)


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
    """The effect of `Pair`s of runs."""
    return paired(name, unit, rows, found.plan, found.records, metric, delta=delta)
