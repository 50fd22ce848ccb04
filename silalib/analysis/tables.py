"""The paper's printed numbers, our records as data frames beside them, and the words of captions."""

import re
from collections import defaultdict
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd
import torch

from .. import data
from ..experiments import table1
from ..losses import LABELS
from ..models import MODELS, NAMES, count_macs, count_parameters
from ..records import failure
from ..training.execution import precision
from ..training.provenance import device_kind
from .statistics import interval, over_seeds_of, plus_minus, seeds

METRICS = {"top1": "Top-1", "top2": "Top-2", "top5": "Top-5", "best": "BEST", "nll": "NLL"}
"""Metric -> the paper's column; all but NLL in percent."""
COLUMNS = ["exhibit", "dataset", "pair", "method", "net", "network", "metric", "seed", "value", "run"]
"""Of `measured` and `printed`: the data set's title, net 1 or 2, one value of one run."""
HEAD = ["run", "method", "seed", "net", "network", *METRICS, "ece", "nll_scaled", "ece_scaled", "parameters", "macs"]
HEAD += ["train_nll", "train_top1", "train_ece", "test_concentration", "train_concentration"]
HEAD += [f"curvature_{name}" for name in ("absolute", "filter", "absolute_residual", "filter_residual")]
HEAD += [f"ensemble_{field}" for field in ("top1", "top5", "nll", "ece", "nll_scaled", "disagreement", "divergence")]
"""Columns that `heads` always has: older records lack some, and not all are measured of each run."""


def reported(table):
    """The paper's "table1", "table2" or "table3", or the documented sizes of its "networks"; NaN is not printed."""
    return pd.read_csv(files("silalib.analysis") / "reported" / f"{table}.csv")


def measured(grid, records, metrics, exhibit=""):
    """A row of COLUMNS per network row, metric and seed of a table's grid: what our records hold, NaN where there is
    none. IND's pair counts as two single networks of one kind, and stands under their name, as the paper's IND does."""
    rows = []
    for run in grid:
        pair = "+".join(NAMES[net] for net in (run.nets if run.method != "ind" else run.nets[:1]))
        shared = [exhibit, data.dataset(run.dataset).title, pair, run.method]
        for head, net in enumerate(run.nets):
            lost = dict.fromkeys(metrics, np.nan) | ({"top1": chance(run)} if diverged(run, records) else {})
            values = records[run].heads[head] if run in records else lost
            rows += [[*shared, head + 1, NAMES[net], metric, run.seed, values[metric], run] for metric in metrics]
    return pd.DataFrame(rows, columns=COLUMNS)


def diverged(run, records):
    """Whether the loss was not finite: the run counts with the top-1 of `chance`, and with nothing else. A run that
    failed in another way is missing."""
    return run not in records and "lr" in (failure(run) or {})


def chance(run):
    """The top-1 (percent) of guessing."""
    return 100 / data.dataset(run.dataset).classes


def printed(table):
    """The paper's own numbers in the form of `measured`; its single number counts as seed 0 of no run."""
    frame = reported(table).assign(exhibit=table, seed=0, run=None)
    frame["method"] = frame["method"].map({label: method for method, label in LABELS.items()})
    metrics = [metric for metric in METRICS if metric in frame]
    rows = frame.melt(frame.columns.difference(metrics), metrics, "metric", ignore_index=False)
    return rows.dropna(subset="value").sort_index(kind="stable")[COLUMNS]


def in_the_paper(frame, paper):
    """For each row of `measured` the data set that `printed` has beside it: its own, or the first for a stand-in."""
    return frame["dataset"].where(frame["dataset"].isin(paper["dataset"]), paper["dataset"].iloc[0])


def gains(frame, method=None, over="ind", table=None):
    """The rows of a method in `measured` or `printed` with their gain over another, positive when better.

    IND is Net_c of the same network's own pair, or its one network where it was trained alone, as in the paper; any
    other method is that of the same network of the same pair. Paired by seed; a row without a counterpart in the frame
    is left out. Without a method: all rows. Adds the columns gain (NaN for IND's own, and where a value is missing),
    run_over and net_over; with a table also paper and paper_gain, what the paper prints.
    """
    keys = ["exhibit", "dataset", "network", "metric", "seed", "net"] + ([] if over == "ind" else ["pair"])
    baseline = frame[frame["method"] == over].assign(net_over=lambda rows: rows["net"])
    if over == "ind":  # what has no second network stands beside both
        first = baseline[baseline["net"] == 1]
        baseline = pd.concat([baseline, *(first.assign(net=slot) for slot in frame["net"].unique())])
    baseline = baseline[[*keys, "value", "run", "net_over"]].drop_duplicates(keys)
    chosen, how = (frame[frame["method"] == method], "inner") if method else (frame, "left")
    found = chosen.merge(baseline, how, on=keys, suffixes=("", "_over"))
    gain = (found["value"] - found["value_over"]).astype(float) * np.where(found["metric"] == "nll", -1, 1)
    found = found.assign(gain=gain.where(found["method"] != over))
    if not table:
        return found
    paper, keys = gains(printed(table), method, over), ["beside", "pair", "method", "net", "metric"]
    paper = paper.rename(columns={"dataset": "beside", "value": "paper", "gain": "paper_gain"})
    found = found.assign(beside=in_the_paper(found, printed(table)))
    return found.merge(paper[[*keys, "paper", "paper_gain"]], "left", keys)


def over_seeds(grid, records, metrics, table=None):
    """The runs of a grid over seeds, a row per network row and metric: n, mean and half-width of the values, gain (over
    IND, as in `gains`) with gain_half and gain_n, failed (where training failed, in words), paper and paper_gain.

    records: dict run -> Record of those that are finished. table: whose numbers stand beside; a stand-in has those of
    the paper's first data set. Methods are spelled as in the paper. Net2 of IND's pair is a baseline and no row.
    """
    frame = gains(measured(grid, records, metrics), table=table)
    frame = frame[(frame["method"] != "ind") | (frame["net"] == 1)]
    keys, rows = ["dataset", "pair", "method", "net", "network", "metric"], []
    for key, group in frame.groupby(keys, sort=False):
        values, gained = group["value"].dropna(), group["gain"].dropna()
        failed = "; ".join(failed_at(run) for run in group["run"] if run not in records and failure(run))
        paper = [group[name].iloc[0] if table else np.nan for name in ("paper", "paper_gain")]
        rows.append([*key, len(values), *interval(values), *interval(gained), len(gained), failed, *paper])
    counted = ["n", "mean", "half", "gain", "gain_half", "gain_n", "failed", "paper", "paper_gain"]
    return pd.DataFrame(rows, columns=[*keys, *counted]).replace({"method": LABELS})


def failed_at(run):
    """Of a run that has failed, where: "seed 0 failed: epoch 2, step 12, lr 0.1"."""
    found = failure(run)
    place = f": epoch {found['epoch']}, step {found['step']}, lr {found['lr']:g}" if "lr" in found else ""
    return f"seed {run.seed} failed{place}"


def comparison(summary, metrics, learned=0.0):
    """A table of `over_seeds` to look at: for each metric the gain over IND and our mean, each beside the paper's.

    learned: a network whose IND stays under this top-1 is marked 'did not learn'. Returns a data frame of text with
    two levels of columns; a row without records says 'not run', or 'failed', and where.
    """
    ind, rows = LABELS["ind"], []
    top1 = summary[(summary["method"] == ind) & (summary["metric"] == "top1")].set_index("network")["mean"]
    chosen = summary[summary["metric"].isin(metrics)]
    for (pair, method, net, network), group in chosen.groupby(["pair", "method", "net", "network"], sort=False):
        failed = group["failed"].iloc[0]
        notes = ["(did not learn)"] * (network in top1[top1 < learned]) + [f"({failed})"] * bool(failed)
        name = " · ".join([short(pair), method] + [f"Net{net}"] * (method != ind))
        row = {("", "network"): " ".join([name, *notes])}
        for metric, cell in group.set_index("metric").loc[list(metrics)].iterrows():
            title = METRICS[metric]
            row[title, "gain"] = plus_minus(cell["gain"], cell["gain_half"], signed=True)
            row[title, "paper's gain"] = plus_minus(cell["paper_gain"], np.nan, signed=True)
            row[title, "ours"] = plus_minus(cell["mean"], cell["half"]) or ("failed" if failed else "not run")
            row[title, "paper"] = plus_minus(cell["paper"], np.nan) or "-"
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame


def short(pair):
    """The name of a pair for a narrow column: "R18 x2", "Mobile+R18"."""
    nets = re.sub(r"(Res|Dense|Mobile)Net(?=\d?)", lambda found: found[1].replace("Res", "R"), pair).split("+")
    return f"{nets[0]} x2" if nets[1:] == nets[:1] else "+".join(nets)


def heads(grid, records):
    """The finished runs of a grid as a data frame: a row per run and head, in the grid's order.

    Columns: run, method, seed, net (the head, from 1), network, all of the head's fields in result.json and, with
    "ensemble_" before them, those of its pair's ensemble. Nested ones are flattened (curvature_absolute); what a record
    does not have is NaN.
    """
    rows = []
    for run in (run for run in grid if run in records):
        result = records[run].result
        for slot, head in enumerate(result["heads"]):
            row = head | dict(run=run, method=run.method, seed=run.seed, net=slot + 1)
            rows.append(row | dict(network=NAMES[run.nets[run.slot(slot)]], ensemble=result.get("ensemble", {})))
    frame = pd.json_normalize(rows, sep="_")
    return frame.reindex(columns=list(dict.fromkeys([*HEAD, *frame.columns])))


def difference(own, baseline, column):
    """(mean, half-width) over seeds of a column in one part of `heads` minus that in another, paired by seed and net;
    a baseline with a single network stands beside each. Seeds that lack a value do not count."""
    keys = ["seed", "net"] if baseline["net"].nunique() > 1 else ["seed"]
    both = own.merge(baseline[[*keys, column]], on=keys, suffixes=("", "_over"), validate="many_to_one")
    gain = both[column] - both[f"{column}_over"]
    return interval(gain.groupby(both["seed"]).mean(skipna=False).dropna())


def side_by_side(parts, columns, ind=None, first="network"):
    """A table to look at: a row for each part of `heads`, with differences to IND, then means, with 95% intervals.

    parts: label -> data frame; several networks of a seed are averaged. columns: title -> (column, digits). ind: the
    part to which differences stand beside, paired by seed and network; it has none to itself.
    """
    rows = []
    for label, part in parts.items():
        levels, row = {}, {first: label}
        for title, (column, digits) in columns.items():
            values = [group.mean(skipna=False) for _, group in part.groupby("seed")[column]]
            levels[title] = over_seeds_of([None if np.isnan(value) else value for value in values], digits)
            if ind is not None:
                apart = not part["run"].isin(ind["run"]).all()
                text = plus_minus(*difference(part, ind, column), digits, signed=True) if apart else ""
                row[f"{title}, to IND"] = text
        rows.append(row | levels | {"seeds": part["seed"].nunique()})
    return pd.DataFrame(rows)


def curves(grid, records, method, head=0, column="test_top1"):
    """A column of the histories of a method's runs, as a data frame with a row per seed and a column per epoch."""
    found = {run.seed: records[run].history for run in grid if run.method == method and run in records}
    return pd.DataFrame({s: h[h["head"] == head].set_index("epoch")[column] for s, h in found.items()}).T


def exit_curves(grid, records, curve):
    """(dataset, blocks) of each network in a grid of MSDNets -> method -> seed -> curve(record); every network and
    method is there, in the grid's order, with the seeds that have a record."""
    found = {}
    for run in grid:
        seeds = found.setdefault((run.dataset, run.n_heads), {}).setdefault(run.method, {})
        if run in records:
            seeds[run.seed] = curve(records[run])
    return found


def shared_costs(curves, points=50):
    """The same costs for all seeds of a network: evenly spaced where all of its curves reach; none, shape (0,)."""
    lowest = max((curve["macs"].min() for curve in curves), default=np.inf)
    highest = min((curve["macs"].max() for curve in curves), default=-np.inf)
    return np.linspace(lowest, highest, points) if lowest <= highest else np.empty(0)


def gains_at_equal_costs(curves, baselines, points=50):
    """The gains in top-1 (points) of curves over others at `shared_costs`, paired by seed; shape (seeds, points).

    A curve is a data frame with macs and top1, interpolated linearly. (0, points) without any, or without shared costs.
    """
    costs = shared_costs([*curves, *baselines], points)
    top1 = lambda curve: np.interp(costs, *curve.sort_values("macs")[["macs", "top1"]].to_numpy(float).T)
    pairs = zip(curves, baselines) if len(costs) else ()
    return np.array([top1(curve) - top1(other) for curve, other in pairs]).reshape(-1, points)


def exit_networks(grid, records, learned=0.0):
    """A table to look at of the MSDNets of a grid: what each is trained on, its size, its records, its last exit.
    learned: a network whose last exit of IND stays under this top-1 is marked 'did not learn'."""
    rows = []
    for (dataset, blocks), methods in exit_curves(grid, records, lambda record: record.heads).items():
        first, *_ = runs = [run for run in grid if (run.dataset, run.n_heads) == (dataset, blocks)]
        done = [heads for found in methods.values() for heads in found.values()]
        last = [heads[-1]["top1"] for heads in methods.get("ind", {}).values()]
        weak = " (did not learn)" if last and np.mean(last) < learned else ""
        rows.append({
            "data": data.dataset(dataset).title, "blocks": blocks,
            "parameters, both methods": " and ".join(f"{n:,}" for n in {heads[0]["parameters"] for heads in done}),
            "training images": training_images(first), "held out": first.holdout, "epochs": first.epochs,
            "width": f"{first.width:g}", "runs with a record": f"{len(done)} of {len(runs)}",
            "last exit of IND, top-1 (%)": plus_minus(*interval(last)) + weak or "not run",
        })  # fmt: skip
    return pd.DataFrame(rows)


def networks():
    """Every network's parameters and forward MACs at its input size, counted, beside the documented ones, as text."""
    rows = []
    for known in reported("networks").fillna("").to_dict("records"):
        image = known["channels"], known["size"], known["size"]
        with torch.device("meta"):
            network = MODELS[known["network"]](*(known[name] for name in ("classes", "channels", "width", "stem")))
        rows.append({
            "network": NAMES[known["network"]], "stem": known["stem"], "width": f"{known['width']:g}",
            "classes": known["classes"], "input": "x".join(map(str, image)),
            "parameters": f"{count_parameters(network):,}", "documented parameters": known["parameters"],
            "million MACs": f"{count_macs(network, image) / 1e6:,.1f}",
            "documented million MACs": known["million_macs"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def mixed(records):
    """In words, the data sets and seeds whose runs were not all trained on one kind of device and in one precision, so
    that their differences are not those of the methods alone; "" where all were."""
    kinds, precisions = defaultdict(set), defaultdict(set)
    for run, record in records.items():
        group, provenance = f"{data.dataset(run.dataset).title}, seed {run.seed}", record.result["provenance"]
        for part in provenance.get("parts", [provenance]):
            kinds[group].add(kind := device_kind(part))
            if any(precision(net, torch.device(kind), True).itemsize < 4 for net in run.nets):
                precisions[group].add("bfloat16" if "bfloat16" in part["precision"] else "float32")
    unlike = {group: found if len(found) > 1 else precisions[group] for group, found in kinds.items()}
    return "; ".join(f"{group} ({' and '.join(sorted(found))})" for group, found in unlike.items() if len(found) > 1)


def what_runs(profile, grid, records):
    """Markdown: how many runs of a page have a record, on which data, seeds and schedules; for each data set how many
    are not run, how to get them, and which failed."""
    sets = []
    for name in dict.fromkeys(run.dataset for run in grid):
        runs = [run for run in grid if run.dataset == name]
        left = [run for run in runs if run not in records]
        lost = [failed_at(run) for run in left if failure(run)]
        schedules = dict.fromkeys(map(schedule, runs))
        more = dict(of=data.dataset(name), here=data.is_available(name), schedules=schedules)
        sets.append(dict(name=name, runs=runs, left=left, failed=lost, **more))
    return words().what_runs(profile, grid, records, sets).rstrip()


@cache
def words():
    """The macros of words.md.j2."""
    from jinja2 import Template

    text = (files("silalib.analysis") / "words.md.j2").read_text(encoding="utf-8")
    return Template(text, trim_blocks=True, lstrip_blocks=True).make_module(dict(seeds=seeds, title=title))


def training_images(run):
    """How many images a run is trained on, in words."""
    return f"{run.train_size:,}" if run.train_size else f"all but {run.holdout:,}" if run.holdout else "all"


def schedule(run):
    """What a figure is labelled with beside its `title`: epochs, training images, width."""
    return f"{run.epochs} epochs of {training_images(run)} training images, width {run.width:g}"


def title(profile, dataset):
    """What a figure or table is labelled with: the data it was trained on and the profile."""
    stand_in = ", a stand-in for the real data" if profile == "quick" else ""
    return f"{data.dataset(dataset).title}, profile {profile}{stand_in}"


def scale(profile):
    """How far a profile is from the paper's schedule, and that `quick` is a stand-in; "" for the paper's own."""
    return words().scale(profile, *(schedule(table1(name)[0]) for name in (profile, "paper")))
