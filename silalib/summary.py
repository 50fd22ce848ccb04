"""Means, intervals and gains over seeds, beside the numbers the paper prints."""

from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from .data import dataset
from .experiments import training_images
from .losses import LABELS
from .models import MODELS, NAMES, count_macs, count_parameters
from .runs import device_kind, failure
from .speed import precision

METRICS = {"top1": "Top-1", "top2": "Top-2", "top5": "Top-5", "best": "BEST", "nll": "NLL"}
"""Metric -> the paper's column; all but NLL in percent."""


def interval(values):
    """(mean, half-width) of the 95% interval by Student's t over independent values; half-width NaN for n < 2."""
    from scipy.stats import t

    values = np.asarray(values, float)
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), half


def reported(table):
    """The paper's own numbers of "table1", "table2" or "table3" as a data frame; an empty cell is not printed.

    "networks" gives the documented sizes of the networks.
    """
    return pd.read_csv(files("silalib") / "reported" / f"{table}.csv")


COLUMNS = ["dataset", "pair", "method", "net", "network", "metric", "seed", "value", "run"]


def measured(grid, records, metrics):
    """One row per network row, metric and seed of a table's grid: what our records hold, NaN where there is none.

    IND's pair counts as two single networks of one kind, and stands under their name, as the paper's IND does.
    Columns: dataset (its title), pair, method, net (1 or 2), network, metric, seed, value, run.
    """
    rows = []
    for run in grid:
        nets = run.nets if run.method != "ind" else run.nets[:1]
        same = dict(dataset=dataset(run.dataset).title, pair="+".join(NAMES[net] for net in nets))
        same |= dict(method=run.method, seed=run.seed, run=run)
        for head, net in enumerate(run.nets):
            row = same | dict(net=head + 1, network=NAMES[net])
            numbers = records[run].heads[head] if run in records else dict.fromkeys(metrics, np.nan)
            rows += [row | dict(metric=metric, value=numbers[metric]) for metric in metrics]
    return pd.DataFrame(rows, columns=COLUMNS)


def printed(table):
    """The paper's numbers of a table in the form of `measured`; its single number counts as seed 0 of no run."""
    methods = {label: method for method, label in LABELS.items()}
    rows = []
    for line in reported(table).to_dict("records"):
        pair = line["net1"] if pd.isna(line["net2"]) else f"{line['net1']}+{line['net2']}"
        row = dict(dataset=line["dataset"], pair=pair, method=methods[line["method"]], net=int(line["net"][-1]))
        row |= dict(network=line["model"], seed=0, run=None)
        rows += [row | dict(metric=m, value=line[m]) for m in METRICS if not pd.isna(line.get(m, np.nan))]
    return pd.DataFrame(rows, columns=COLUMNS)


def gains(frame, method, over):
    """The rows of a method in `measured` or `printed` with their gain over another, positive when better.

    IND is Net_c of the same network's own pair, or its one network, as in the paper, where it was trained alone; any
    other method is that of the same network of the same pair. Paired by seed; a row that has no counterpart in the
    frame is left out, and one with a missing value has the gain NaN. Adds the columns gain, run_over and net_over.
    """
    keys = ["dataset", "network", "metric", "seed", "net"] + ([] if over == "ind" else ["pair"])
    baseline = frame[frame["method"] == over].assign(net_over=frame["net"])
    if over == "ind":  # what has no second network stands beside both
        slots = frame["net"].unique()
        baseline = pd.concat([baseline, *(baseline[baseline["net"] == 1].assign(net=slot) for slot in slots)])
    baseline = baseline[[*keys, "value", "run", "net_over"]]
    merged = frame[frame["method"] == method].merge(baseline.drop_duplicates(keys), on=keys, suffixes=("", "_over"))
    sign = merged["metric"].map(lambda metric: -1.0 if metric == "nll" else 1.0)
    return merged.assign(gain=(sign * (merged["value"] - merged["value_over"])).astype(float))


def in_the_paper(frame, paper):
    """For each row of `measured` the data set that `printed` has beside it: its own, or the first for a stand-in."""
    return frame["dataset"].where(frame["dataset"].isin(paper["dataset"]), paper["dataset"].iloc[0])


def curves(grid, records, method, head=0, column="test_top1"):
    """A column of the histories of a method's runs, as a data frame with a row per seed and a column per epoch."""
    found = {run.seed: records[run].history for run in grid if run.method == method and run in records}
    return pd.DataFrame({s: h[h["head"] == head].set_index("epoch")[column] for s, h in found.items()}).T


def second_half(values):
    """The mean of each row of `curves` over the second half of the epochs."""
    return values.iloc[:, values.shape[1] // 2 :].mean(axis=1)


def networks():
    """Every network's parameters and forward MACs at its input size, counted, beside the documented figures.

    A data frame of text; an empty cell is a figure that is not documented.
    """
    rows = []
    for known in reported("networks").fillna("").to_dict("records"):
        image = known["channels"], known["size"], known["size"]
        with torch.device("meta"):
            network = MODELS[known["network"]](known["classes"], known["channels"], known["width"], known["stem"])
        rows.append(
            {
                "network": NAMES[known["network"]],
                "stem": known["stem"],
                "width": f"{known['width']:g}",
                "classes": known["classes"],
                "input": "x".join(map(str, image)),
                "parameters": f"{count_parameters(network):,}",
                "documented parameters": known["parameters"],
                "million MACs": f"{count_macs(network, image) / 1e6:,.1f}",
                "documented million MACs": known["million_macs"],
            }
        )
    return pd.DataFrame(rows)


def exit_networks(grid, records, learned=0.0):
    """A table to look at of the MSDNets of a grid: what each is trained on, its size, its records, its last exit.

    learned: a network whose last exit of IND stays under this top-1 is marked 'did not learn'.
    """
    rows = []
    for dataset_name, blocks in dict.fromkeys((run.dataset, run.n_heads) for run in grid):
        runs = [run for run in grid if (run.dataset, run.n_heads) == (dataset_name, blocks)]
        done = [records[run] for run in runs if run in records]
        last = [record.heads[-1]["top1"] for record in done if record.run.method == "ind"]
        weak = " (did not learn)" if last and np.mean(last) < learned else ""
        rows.append(
            {
                "data": dataset(dataset_name).title,
                "blocks": blocks,
                "parameters, both methods": " and ".join(f"{n:,}" for n in {r.heads[0]["parameters"] for r in done}),
                "training images": training_images(runs[0]),
                "held out": runs[0].holdout,
                "epochs": runs[0].epochs,
                "width": f"{runs[0].width:g}",
                "runs with a record": f"{len(done)} of {len(runs)}",
                "last exit of IND, top-1 (%)": plus_minus(*interval(last)) + weak if last else "not run",
            }
        )
    return pd.DataFrame(rows)


def cells(grid, records, metrics, table=None):
    """`measured` with gains, and the paper's numbers beside: a row per network row, metric and seed of a table.

    grid: the exhibit's runs. records: dict run -> Record of those that are finished. Columns: dataset, pair, method (as
    the paper spells it), net (1 or 2), network, metric, seed, value (NaN where there is no record), failed (where
    training failed, in words), gain over IND of the same network, data set, seed and net (positive is better), paper,
    paper_gain. A stand-in has the paper's first data set beside it. Net2 of IND's pair is a baseline and no row.
    """
    keys = ["pair", "method", "net", "metric"]
    frame = _with_gains(measured(grid, records, metrics))
    frame = frame[(frame["method"] != "ind") | (frame["net"] == 1)]
    if table:
        paper = printed(table)
        numbers = _with_gains(paper).rename(columns={"dataset": "beside", "value": "paper", "gain": "paper_gain"})
        numbers = numbers[["beside", *keys, "paper", "paper_gain"]]
        frame = frame.assign(beside=in_the_paper(frame, paper)).merge(numbers, "left", ["beside", *keys])
    else:
        frame = frame.assign(paper=np.nan, paper_gain=np.nan)
    failed = {run: "" if run in records else failed_at(run) for run in grid}
    frame = frame.assign(method=frame["method"].map(LABELS), failed=frame["run"].map(failed))
    return frame.drop(columns=["run", "beside"], errors="ignore")


def _with_gains(frame):
    keys = ["dataset", "pair", "method", "net", "metric", "seed"]
    found = [gains(frame, method, "ind")[[*keys, "gain"]] for method in LABELS if method != "ind"]
    return frame.merge(pd.concat(found).drop_duplicates(keys), "left", keys)


def mixed(records):
    """In words, the data sets and seeds whose runs were not all trained on one kind of device and in one precision, so
    that their differences are not those of the methods alone; "" where all were."""
    found = {}
    for run, record in records.items():
        for part in record.result["provenance"].get("parts", [record.result["provenance"]]):
            kinds, precisions = found.setdefault((dataset(run.dataset).title, run.seed), (set(), set()))
            kind = device_kind(part)
            kinds.add(kind)
            if any(precision(net, torch.device(kind), True).itemsize < 4 for net in run.nets):
                precisions.add("bfloat16" if "bfloat16" in part["precision"] else "float32")
    named = [
        f"{title}, seed {seed} ({' and '.join(sorted(kinds if len(kinds) > 1 else precisions))})"
        for (title, seed), (kinds, precisions) in found.items()
        if max(len(kinds), len(precisions)) > 1
    ]
    return "; ".join(named)


def failed_at(run):
    """Of a run that has failed, where: "seed 0 failed: epoch 2, step 12, lr 0.1"; of any other ""."""
    if not (found := failure(run)):
        return ""
    place = f": epoch {found['epoch']}, step {found['step']}, lr {found['lr']:g}" if "lr" in found else ""
    return f"seed {run.seed} failed{place}"


def over_seeds(frame):
    """`cells` summarised over seeds: mean and half-width of value and gain, n of each, and the paper's numbers."""
    keys = ["dataset", "pair", "method", "net", "network", "metric"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        values, gains = group["value"].dropna(), group["gain"].dropna()
        row = dict(zip(keys, key)) | {"n": len(values)}
        row["mean"], row["half"] = interval(values)
        row["gain"], row["gain_half"] = interval(gains)
        row["gain_n"] = len(gains)
        row["failed"] = "; ".join(filter(None, group["failed"].unique()))
        rows.append(row | {"paper": group["paper"].iloc[0], "paper_gain": group["paper_gain"].iloc[0]})
    return pd.DataFrame(rows)


class OverCells(NamedTuple):
    """What `over_cells` gives."""

    gains: pd.DataFrame  # a row per cell and a column per seed, without gaps
    mean: float
    half: float
    won: int
    total: int
    missing: int


def over_cells(rows):
    """Paired gains over cells and seeds, in numbers: an `OverCells`.

    rows: a data frame with a row for each cell and seed of the grid; columns cell, seed and gain, NaN without records.
    Only cells and seeds that are `complete` together count, so that every seed is averaged over the same cells.
    mean, half: of the seeds' means over the cells, with the 95% interval over seeds. won of total: cells whose mean
    over seeds is above zero. missing: the grid's other cells.
    """
    found = complete(rows[rows["gain"].notna()].pivot(index="cell", columns="seed", values="gain"))
    won = int((found.mean(axis=1) > 0).sum())
    return OverCells(found, *interval(found.mean(axis=0)), won, len(found), rows["cell"].nunique() - len(found))


def complete(table):
    """A part without gaps of a table of cells (rows) and seeds (columns).

    All cells where two seeds or more have them all: a seed that is being trained then changes nothing. Else the larger
    of all cells and all seeds.
    """
    all_cells, all_seeds = table.dropna(axis="columns"), table.dropna(axis="index")
    if all_cells.shape[1] > 1:
        return all_cells
    return max(all_seeds, all_cells, key=lambda part: (part.size, part.shape[1]))


class Score(NamedTuple):
    """What `score` gives."""

    won: int
    total: int
    mean: float
    half: float
    missing: int


def score(frame, method, column="gain"):
    """How a method does against IND over the cells of `cells`, by `over_cells`: a `Score`.

    column: "gain" of our records or "paper_gain". won, total and missing count the cells of all metrics; mean and half
    are of top-1 over all network rows, half NaN for one seed, and for the paper.
    """
    chosen = frame[frame["method"] == LABELS[method]]
    if column == "paper_gain":  # it stands beside every seed; a cell that is not printed is not missing
        chosen = chosen[(chosen["seed"] == chosen["seed"].min()) & chosen[column].notna()]
    cell = list(zip(*(chosen[key] for key in ("dataset", "pair", "net", "metric"))))
    rows = pd.DataFrame({"cell": pd.Series(cell, chosen.index, object), "seed": chosen["seed"], "gain": chosen[column]})
    every, top1 = over_cells(rows), over_cells(rows[chosen["metric"] == "top1"])
    return Score(every.won, every.total, top1.mean, top1.half, every.missing)


def scores(frame, methods):
    """A table to look at of `score` for each method: ours beside the paper's."""
    rows = []
    for method in methods:
        row = {"method": LABELS[method]}
        for whose, column in (("ours", "gain"), ("paper", "paper_gain")):
            found = score(frame, method, column)
            row[f"cells won, {whose}"] = won_of(found.won, found.total, found.missing) or "not run"
            row[f"mean top-1 gain, {whose}"] = plus_minus(found.mean, found.half, signed=True) or "not run"
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(frame, methods):
    """A line of Markdown for each method: whether its mean gain in top-1 can be told from zero over seeds."""
    lines = []
    for method in methods:
        won, total, gain, half, missing = score(frame, method)
        if not total:
            lines.append(f"- {LABELS[method]}: not run.")
            continue
        word = told_apart(gain, half, "IND")
        if missing:
            word = f"inconclusive, with {total} of {total + missing} cells of the grid"
        lines.append(
            f"- {LABELS[method]} beats IND in {won} of {total} cells; its mean gain in top-1 is "
            f"{plus_minus(gain, half, signed=True)} points: {word}."
        )
    return "\n".join(lines)


def told_apart(mean, half, baseline):
    """In words, what a mean gain over a baseline with its 95% half-width over seeds says; NaN for one seed."""
    if np.isnan(half):
        return "one seed has no interval and shows nothing by itself"
    if abs(mean) <= half:
        return f"not told apart from {baseline}"
    return f"{'above' if mean > 0 else 'below'} {baseline} by its interval over seeds"


def stand_in(profile):
    """What stands below a verdict in the quick profile; "" in any other."""
    if profile != "quick":
        return ""
    return (
        "\nThese are stand-in data and tiny networks: they show that every part works and judge nothing in the paper."
    )


def won_of(won, total, missing):
    """Text of a count of cells: "3 of 4", with those that lack records "3 of 4 (2 more incomplete)"; "" without any."""
    return (f"{won} of {total}" + (f" ({missing} more incomplete)" if missing else "")) if total else ""


def seeds(counts, before=""):
    """Text of how many seeds some numbers rest on: "3 seeds", "1 to 3 seeds"; "" without any.

    counts: the seeds of each number; those without any do not count. before: what comes before the text.
    """
    found = sorted({int(n) for n in counts} - {0})
    if not found:
        return ""
    span = f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}"
    return f"{before}{span} seed{'' if found == [1] else 's'}"


def over_seeds_of(values, digits=2, signed=False):
    """Text of a field of several records, one value a seed, as `plus_minus`; "not run" without records, and "not
    recorded" where a record is older than the field (None)."""
    if None in values:
        return "not recorded"
    return plus_minus(*interval(values), digits, signed) or "not run"


def plus_minus(mean, half, digits=2, signed=False):
    """Text of a mean with its 95% half-width; without one (a single seed) the mean alone; "" for NaN."""
    if np.isnan(mean):
        return ""
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def unit(metrics):
    """The units of some metrics, for a caption."""
    return ", ".join(f"{METRICS[m]} in {'nats' if m == 'nll' else 'percent'}" for m in metrics)


def comparison(summary, metrics, learned=0.0):
    """A table of `over_seeds` to look at: for each metric our mean and interval, the paper's number, the gain over IND.

    learned: a network whose IND stays under this top-1 is marked 'did not learn'. Returns a data frame of text with
    two levels of columns; a row without records says 'not run', or 'failed', and where.
    """
    weak = summary[(summary["method"] == LABELS["ind"]) & (summary["metric"] == "top1") & (summary["mean"] < learned)]
    summary = summary[summary["metric"].isin(metrics)]
    rows, index = [], ["pair", "method", "net", "network"]
    for (pair, method, net, network), group in summary.groupby(index, sort=False):
        failed = " (did not learn)" if network in set(weak["network"]) else ""
        row = {("", "Networks"): pair, ("", "Method"): method}
        row["", "Net"] = failed.strip() if method == LABELS["ind"] else f"Net{net}{failed}"
        if reason := group["failed"].iloc[0]:
            row["", "Net"] = f"{row['', 'Net']} ({reason})".strip()
        for cell in group.set_index("metric").loc[list(metrics)].reset_index().to_dict("records"):
            title = METRICS[cell["metric"]]
            row[title, "ours"] = plus_minus(cell["mean"], cell["half"]) or ("failed" if reason else "not run")
            row[title, "paper"] = plus_minus(cell["paper"], np.nan) or "-"
            row[title, "gain"] = plus_minus(cell["gain"], cell["gain_half"], signed=True)
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame
