"""Which claims hold: each has effects, by claims.toml, that are taken from records and judged by `verdict.decide`.

docs/protocol.md says what is judged, and what of it stood there before the records did. An effect is a mean over cells
(networks, exits, costs) for each seed, signed so that positive supports the claim. What reads tables also runs on the
numbers that the paper prints.
"""

import tomllib
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from importlib.resources import files
from math import log

import numpy as np
import pandas as pd
import torch

from .. import early_exit
from ..experiments import EXHIBITS, PROFILES, fig4, fig5, fig6, table1, table2, table3
from ..launch.estimate import hours, seconds_left
from ..losses import LABELS, SiameseLabelsLoss
from ..models import count_parameters
from . import tables
from .evidence import TABLES, collect, of_head, pairs, printed, ratio  # noqa: F401  (printed: for pages)
from .verdict import ClaimVerdict, Effect, Pair, paired, seeds_to_decide

EVERY = tomllib.loads((files("silalib.analysis") / "claims.toml").read_text(encoding="utf-8"))
EVERY = {name: (of["claim"], of["exhibits"], of.get("effects", ())) for name, of in EVERY.items()}
CLAIMS = {name: value for name, value in EVERY.items() if name.isdigit()}
"""Number -> (the paper's claim, the exhibits that it is about, the rows of its effects)."""
OURS = {name: value for name, value in EVERY.items() if name not in CLAIMS}
"""Two questions that are not the paper's, judged by the same rule and never counted among its claims."""

VERDICTS = ("reproduced", "negligible", "contradicted", "undecided")
SCALED = "ECE after temperature scaling"


def judge(profile, seeds=None, names=None):
    """The verdict on every claim, or on those named, by the records of a profile."""
    wanted = {name for claim in names for name in EVERY[claim][1]} if names else EXHIBITS
    return judge_all(collect(profile, seeds, {name: EXHIBITS[name] for name in EXHIBITS if name in wanted}), names)


def judge_all(found, names=None):
    """The paper's claims, then ours, or those named."""
    chosen = {name: claim for name, (claim, *_) in EVERY.items() if names is None or name in names}
    judged = lambda name, claim: ClaimVerdict(name, claim, tuple(effects(found, name)), found.profile, found.records)
    return [judged(name, claim) for name, claim in chosen.items()]


def of_exhibit(claim, exhibit):
    """A judged claim with those of its effects that are about one exhibit, such as "Table 1"."""
    effects = tuple(effect for effect in claim.effects if exhibit in effect.name)
    return replace(claim, claim=f"{claim.claim} ({exhibit})", effects=effects)


def headline(*judged):
    """Judged claims as Markdown, a paragraph each: in bold the verdict, then the numbers on which it rests. A scope
    that several effects in a row have, as "(Figure 7a, ResNet18 pair, 2 networks)", is said once."""
    return tables.words().headline(judged)


def in_words(claim):
    """A judged claim as Markdown: the verdict, then a line for each effect, and what would decide it."""
    return tables.words().in_words(claim, what_decides(claim)).rstrip()


def what_decides(claim, timed=True):
    """What would decide an undecided claim, a sentence for each effect that is open: how many seeds, how long the
    extension takes here, if it is to be timed, and what trains it."""
    for effect in claim.primary if claim.verdict == "undecided" else ():
        if effect.extended and effect.verdict != "reproduced":
            yield f"{effect.name}: extended once, which is all that the protocol allows."
        elif effect.verdict != "reproduced":
            grids = {name: exhibit.grid(claim.profile) for name, exhibit in EXHIBITS.items()}
            holding = [name for name, grid in grids.items() if set(effect.runs) <= set(grid)]
            exhibit = min(holding, key=lambda name: len(grids[name]))
            more = range(effect.planned, 2 * effect.planned)
            level = 0.95 if effect.verdict == "undecided" else 1 - 0.05 / len(claim.primary)
            left = seconds_left(EXHIBITS[exhibit].grid(claim.profile, list(more)), claim.records) if timed else {}
            long = f", {hours(sum(left.values()))} at this machine's speed" if timed else ""
            command = f"train {exhibit} --profile {claim.profile} --seeds {' '.join(map(str, more))}"
            yield (
                f"{effect.name}: {seeds_to_decide(effect.values, effect.delta, level)} seeds would decide it by its "
                f"spread. One extension is allowed, to {2 * effect.planned} seeds, judged at 99%{long}: "
                f"`python -m silalib {command}`."
            )


def score(judged):
    """In a line: claims: 2 reproduced, 1 undecided, 5 not run."""
    papers = [claim for claim in judged if claim.name in CLAIMS]
    short = lambda verdict: "in progress" if verdict.startswith("so far") else verdict
    counts = Counter(short(claim.verdict).replace("judges nothing", "not judged (stand-in data)") for claim in papers)
    order = [*VERDICTS, "in progress", "no verdict", "not judged (stand-in data)", "not run"]
    return "claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


# -- from evidence to effects


def effects(found, name):
    """The effects of a claim, in the order of claims.toml."""
    if name == "8":
        yield added_parameters()
    rows = [row for row in EVERY[name][2] if found.profile in row.get("profiles", PROFILES)]
    for row in rows:
        delta = log(row["ratio"]) if "ratio" in row else row.get("delta")
        delta = (row.get("small", delta) if found.profile == "small" else delta) or None
        if row["exhibit"] not in TABLES:
            yield of_figure(found, row, delta)
        elif effect := of_table(found, row, delta, all_metrics=len({row["of"] for row in rows}) == 1):
            yield effect


def of_table(found, row, delta, all_metrics):
    """The effect in a metric of a table, or None where it has no rows. all_metrics: the signs of all are counted."""
    name, method, over, metric = (row[key] for key in ("exhibit", "better", "than", "of"))
    better = tables.gains(found.table(name), method, over, name)
    better = better[better["run"].map(found.counts).astype(bool)]
    better = better[better["dataset"] == row.get("dataset", better["dataset"])]
    rows = better[better["metric"] == metric]
    if rows.empty:
        return None
    cells = rows.drop_duplicates(["dataset", "pair", "net"])
    one = {column: cells[column].iloc[0] * (cells[column].nunique() == 1) for column in ("dataset", "pair", "network")}
    pair = f"{one['network']} pair" if one["network"] and one["pair"] else ""
    scope = [EXHIBITS[name].title.split(":")[0], one["dataset"] * (name == "table3"), pair, f"{len(cells)} networks"]
    both = f"{LABELS[method]} over {LABELS[over]}"
    both = f"{LABELS[over]} minus {LABELS[method]}" if metric == "nll" else both  # the less, the better
    what = f"{tables.METRICS[metric].replace('Top', 'top')}, {both} ({', '.join(filter(None, scope))})"
    compared = [
        Pair((row.dataset, row.pair, row.net), row.seed, row.gain, row.run, row.run_over, row.net - 1, row.net_over - 1,
             "" if np.isfinite(row.gain) else found.why((row.run, row.run_over), "no number"))
        for row in rows.itertuples()
    ]  # fmt: skip
    more = dict(delta=delta, paper=cells["paper_gain"].mean())
    if all_metrics:
        signs = better.groupby(["dataset", "pair", "net", "metric"])["gain"].mean().dropna() > 0
        more |= dict(wins=int(signs.sum()), total=len(signs), counted=" in all metrics")
    return paired(what, "nats" if metric == "nll" else "points", compared, found.plan, found.records, metric, **more)


def of_figure(found, row, delta):
    """The effect of a figure's runs. Where they are compared at equal costs, their gains are means over these."""
    exhibit, over, of = row["exhibit"], row["than"], row["of"]
    value = VALUES.get(of, lambda record, head: record.heads[head].get(of, np.nan))
    sign = -1 if row.get("turned") else 1
    signed = ratio(value, sign < 0) if "ratio" in row else lambda record, head: sign * value(record, head)
    alone = {run.seed: run for run in found.grids.get(exhibit, ()) if run.method == over and len(run.nets) == 1}
    both = pairs(found, exhibit, row["better"], over, signed, alone if "alone" in row else None, of.startswith("top1"))
    kept = [pair for pair in both if found.counts(pair.run) and row.get("net", pair.head + 1) == pair.head + 1]
    kept = [pair for pair in kept if row.get("blocks", pair.run.n_heads) == pair.run.n_heads]
    kept, n = at_equal_costs(found, kept) if of == AT_COSTS else kept, len({pair.cell for pair in kept})
    what = row["what"].replace("N networks", f"{n} network{'s' * (n != 1)}").replace("N exits", f"{n} exits")
    unit = "log ratio" if "ratio" in row else "points"
    return paired(what, unit, kept, found.plan, found.records, row.get("images"), delta=delta)


def at_equal_costs(found, pairs):
    """`Pair`s of early-exit networks with their gain in top-1 at equal average costs, the mean over all costs."""
    networks, moved = defaultdict(list), []
    for pair in pairs:
        networks[pair.cell].append(pair)
    for planned in networks.values():
        judging = paired("", "", planned, found.plan, found.records).seeds_that_judge
        done = [pair for pair in planned if np.isfinite(pair.gain) and pair.seed in judging]
        sides = [[curve(found, run) for run in side] for side in ([p.run for p in done], [p.run_over for p in done])]
        gains = dict(zip(done, tables.gains_at_equal_costs(*sides).mean(axis=1)))
        moved += [pair._replace(gain=gains.get(pair, np.nan)) for pair in planned]
    return moved


def curve(found, run):
    """Top-1 against average cost; of a run that diverged that of chance, whatever the cost."""
    if run in found.records:
        return early_exit.budgeted(found.records[run])
    return pd.DataFrame({"macs": [0.0, 1e30], "top1": [tables.chance(run)] * 2})


def change(record, head, kind="absolute"):
    """Change of training NLL under noise on the parameters, mean over the draws and over sigma above 0 (Figure 7b)."""
    noise = of_head(record.noise, head).query("kind == @kind")
    parts = [noise.loc[chosen, "nll"].mean(skipna=False) for chosen in (noise["sigma"] > 0, noise["sigma"] == 0)]
    return parts[0] - parts[1]


AT_COSTS = "top1 at equal costs"
by_epoch = lambda record, head, column="test_top1": of_head(record.history, head)[column].to_numpy()
VALUES = {
    "top1 by epoch": lambda record, head: by_epoch(record, head).mean(),
    "distance": lambda record, head: np.abs(by_epoch(record, 0) - by_epoch(record, 1)).mean(),  # of Net1 and Net2
    "last training NLL": lambda record, head: by_epoch(record, head, "train_nll")[-1],
    "change under noise": change,
    AT_COSTS: lambda record, head: 0.0,  # until all runs are there
}
"""What is compared -> value(record, head), where it is not a field of result.json."""


@cache
def added_parameters(loss=SiameseLabelsLoss):
    """Claim 8: parameters of every network of the paper, within the training with SiLa and outside of it; no run."""
    planned = {run for grid in (table1, table2, table3, fig4, fig5, fig6) for run in grid("paper", [0])}
    counts = []
    for run in (run for run in planned if run.method == "sila"):
        with torch.device("meta"):
            networks = [run.network(slot) for slot in range(len(run.nets))]
            trained = count_parameters(torch.nn.ModuleList([*networks, loss()]))
        counts.append(trained - sum(map(count_parameters, networks)))
    name = "parameters of the networks in a training with SiLa"
    return Effect(name, "parameters added", wins=counts.count(0), total=len(counts), exact=True)
