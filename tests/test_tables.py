"""Tables of made-up records whose answer is known by hand, beside the numbers that the paper prints."""

from types import SimpleNamespace

import numpy as np
import pytest

from silalib.analysis import tables
from silalib.experiments import PROFILES, fig3, fig5, table1, table3


def made_up(grid, value):
    """Records whose metrics are value(run, head) for accuracies and a hundredth of it for NLL."""

    def heads(run):
        numbers = [value(run, head) for head in range(len(run.nets))]
        return [{"top1": n, "top5": n, "best": n, "nll": n / 100} for n in numbers]

    return {run: SimpleNamespace(heads=heads(run)) for run in grid}


def test_gains_are_paired_by_seed_and_positive_when_better():
    grid = table1("paper", [0, 1])
    base = {("ind", 0): 50.0, ("ind", 1): 60.0, ("sila", 0): 53.0, ("sila", 1): 61.0}
    records = made_up(grid, lambda run, head: base.get((run.method, run.seed), 40.0) + head)
    rows = tables.over_seeds(grid, records, ("top1", "nll"), "table1").set_index(["pair", "method", "net", "metric"])
    one = rows.loc[("ResNet18+ResNet18", "SiLa", 1, "top1")]
    assert (one["mean"], one["n"], one["gain"]) == (57, 2, 2)  # gains 3 and 1
    assert one["gain_half"] == pytest.approx(12.7062 * 2**0.5 / 2**0.5, rel=1e-4)  # t(0.975, 1), deviation sqrt(2)
    # Net2 is compared with Net2 of IND's pair, which is better by 1 here; Net2 of another pair with its own network's
    assert rows.loc[("ResNet18+ResNet18", "SiLa", 2, "top1"), "gain"] == 2
    assert rows.loc[("MobileNet+ResNet18", "SiLa", 2, "top1"), "gain"] == 2
    assert ("ResNet18", "IND", 2, "top1") not in rows.index
    # a larger NLL is worse, so the same differences count as losses
    assert rows.loc[("ResNet18+ResNet18", "SiLa", 1, "nll"), "gain"] == pytest.approx(-0.02)
    assert rows.loc[("ResNet18+ResNet18", "DML", 1, "top1"), "gain"] == -15
    assert np.isnan(rows.loc[("ResNet18", "IND", 1, "top1"), "gain"])


def test_the_papers_numbers_stand_beside_ours():
    rows = tables.over_seeds(table1("paper", [0]), {}, ("top1", "top5", "best", "nll"), "table1")
    rows = rows.set_index(["pair", "method", "net", "metric"]).sort_index()
    # printed: MobileNet alone 66.90 and NLL 1.46; with ResNet18 and SiLa+DML 71.51 and 1.10
    assert rows.loc[("MobileNet", "IND", 1, "top1"), "paper"] == 66.9
    mixed = rows.loc[("MobileNet+ResNet18", "SiLa+DML", 1)]
    assert mixed.loc["top1", "paper"] == 71.51
    assert mixed.loc["top1", "paper_gain"] == pytest.approx(4.61)
    assert mixed.loc["nll", "paper_gain"] == pytest.approx(0.36)
    # Net2 is compared with its own network alone: ResNet18's 76.88 with 76.45
    assert rows.loc[("MobileNet+ResNet18", "SiLa+DML", 2, "top1"), "paper_gain"] == pytest.approx(0.43)
    assert np.isnan(rows.loc[("ResNet18+ResNet18", "SiLa", 2, "top1"), "paper"])  # not in our copy of the table
    assert rows["mean"].isna().all() and (rows["n"] == 0).all()


def test_table3_has_two_data_sets():
    grid = table3("paper", [0])
    records = made_up(grid, lambda run, head: 50.0 + (run.dataset == "cifar100") * (run.method == "sila"))
    rows = tables.over_seeds(grid, records, ("top1",), "table3")
    rows = rows.set_index(["dataset", "pair", "method", "net"]).sort_index()
    # printed: VGG19 alone 94.55 and 73.82, Net1 with SiLa 94.77 and 74.12
    for dataset, gain, paper, paper_gain in [("CIFAR-10", 0, 94.77, 0.22), ("CIFAR-100", 1, 74.12, 0.3)]:
        row = rows.loc[(dataset, "VGG19+VGG19", "SiLa", 1)]
        assert (row["gain"], row["paper"]) == (gain, paper)
        assert row["paper_gain"] == pytest.approx(paper_gain)


def test_a_stand_in_has_the_papers_first_data_set_beside_it():
    rows = tables.over_seeds(table3("quick", [0]), {}, ("top1",), "table3").set_index(["pair", "method", "net"])
    assert rows.loc[("VGG19", "IND", 1), "paper"] == 94.55
    assert set(rows["dataset"]) == {"digits (8x8, enlarged)"}


def test_comparison_says_what_was_not_run_and_what_did_not_learn():
    grid = table1("quick", [0])
    records = made_up(grid, lambda run, head: 70.0 if run.nets == ("mobilenet",) * 2 and run.method == "ind" else 90.0)
    records = {run: record for run, record in records.items() if "vgg13" not in run.nets}
    table = tables.comparison(tables.over_seeds(grid, records, ("top1",), "table1"), ("top1",), 80)
    assert len(table) == 33
    shown = table.set_index([("", "network")])["Top-1"]
    assert list(shown) == ["gain", "paper's gain", "ours", "paper"]
    assert shown.loc["R18 · IND", "ours"] == "90.00"
    assert shown.loc["Mobile · IND (did not learn)", "ours"] == "70.00"
    assert shown.loc["Mobile+R18 · SiLa · Net1 (did not learn)", "gain"] == "+20.00"
    assert shown.loc["Mobile+R18 · SiLa · Net2", "gain"] == "+0.00"
    assert shown.loc["VGG13 x2 · DML · Net1", "ours"] == "not run"
    assert shown.loc["VGG13 x2 · DML · Net1", "paper"] == "73.76"


def test_the_msdnets_of_a_grid():
    grid = fig5("small", (0, 1))
    whole = [run for run in grid if run.n_heads == 7 and run.method == "ind"]
    one = lambda top1: SimpleNamespace(run=whole[0], heads=[{"parameters": 3067960, "top1": 1.0}, {"top1": top1}])
    records = dict(zip(whole, (one(70.0), one(74.0))))
    rows = tables.exit_networks(grid, records, learned=80)
    assert rows["blocks"].tolist() == [5, 7]
    assert rows["parameters, both methods"].tolist() == ["", "3,067,960"]
    assert rows["training images"].tolist() == ["10,000", "10,000"]
    assert rows["runs with a record"].tolist() == ["0 of 4", "2 of 4"]
    # t(0.975, 1) = 12.7062 times the deviation sqrt(8), over sqrt(2)
    assert rows["last exit of IND, top-1 (%)"].tolist() == ["not run", "72.00 ± 25.41 (did not learn)"]


def test_only_quick_is_said_to_be_a_stand_in():
    for text in (tables.scale, lambda profile: tables.what_runs(profile, [], {})):
        assert ["stand-in data" in text(profile) for profile in PROFILES] == [True, False, False, False]


def head(top1, **more):
    return {"network": "resnet18", "top1": top1, "nll": 2.0, "curvature": {"absolute": 3.0}} | more


def pairs_of(values):
    """(grid, records) of Figure 3 with (top-1 of Net1, of Net2) by method and seed."""
    grid = fig3("paper", [0, 1, 2])
    records = {}
    for run in grid:
        if top1 := values.get((run.method, run.seed)):
            result = {"heads": [head(value) for value in top1], "ensemble": {"top1": 60.0}}
            records[run] = SimpleNamespace(run=run, result=result)
    return grid, records


VALUES = {("ind", 0): (40.0, 42.0), ("ind", 1): (41.0, 41.0), ("sila", 0): (43.0, 43.0), ("sila", 1): (42.0, 45.0)}


def test_heads_are_rows_and_old_records_lack_fields():
    grid, records = pairs_of(VALUES | {("sila", 2): (50.0, 51.0)})
    new, old = records[grid[-1]], records[next(iter(records))]
    new.result["heads"][1] |= {"ece": 12.5, "curvature": {"absolute": 4.0, "filter": 5.0}}
    del old.result["ensemble"]
    rows = tables.heads(grid, records)
    assert len(rows) == 2 * len(records) == 10
    assert rows["net"].tolist() == [1, 2] * 5 and set(rows["network"]) == {"ResNet18"}
    assert rows["run"].tolist() == [run for run in grid if run in records for _ in range(2)]
    last = rows.iloc[-1]
    assert (last["method"], last["seed"], last["top1"], last["ece"]) == ("sila", 2, 51.0, 12.5)
    assert (last["curvature_absolute"], last["curvature_filter"], last["ensemble_top1"]) == (4.0, 5.0, 60.0)
    assert rows["ece"].isna().sum() == rows["curvature_filter"].isna().sum() == 9
    assert rows["ensemble_top1"].isna().tolist() == [True, True] + [False] * 8
    assert rows["ensemble_divergence"].isna().all()  # no record has it


def test_heads_of_exits_and_of_no_records():
    run = next(run for run in fig5("small", (0,)) if run.n_heads == 7)
    rows = tables.heads([run], {run: SimpleNamespace(result={"heads": [{"top1": 10.0 * k} for k in range(7)]})})
    assert rows["net"].tolist() == [1, 2, 3, 4, 5, 6, 7] and set(rows["network"]) == {"MSDNet (anytime)"}
    none = tables.heads([run], {})
    assert none.empty and {"top1", "ece", "curvature_absolute", "ensemble_nll"} <= set(none)
    assert np.isnan(tables.difference(none, none, "ece")).all()


def test_a_difference_is_paired_by_seed_and_network():
    """Net1 gains 3 and 1, Net2 1 and 4: means 2 and 2.5 by seed; t(0.975, 1) = 12.7062."""
    rows = tables.heads(*pairs_of(VALUES | {("sila", 2): (99.0, 99.0)}))  # without IND's seed 2
    sila, ind = (rows[rows["method"] == method] for method in ("sila", "ind"))
    mean, half_width = tables.difference(sila, ind, "top1")
    assert (mean, half_width) == (2.25, pytest.approx(12.7062 * 0.25, rel=1e-5))
    assert tables.difference(sila[sila["net"] == 1], ind, "top1") == (2.0, pytest.approx(12.7062, rel=1e-5))
    assert tables.difference(sila[sila["net"] == 2], ind, "top1")[0] == 2.5
    # IND's first network alone stands beside both: gains 3 and 3, 1 and 4
    single = ind[ind["net"] == 1]
    assert tables.difference(sila, single, "top1")[0] == 2.75
    assert tables.difference(sila[sila["net"] == 2], single, "top1")[0] == 3.5
    # a seed in which one network lacks the value does not count
    sila = sila.assign(top1=sila["top1"].where((sila["seed"] != 1) | (sila["net"] != 2)))
    assert tables.difference(sila, ind, "top1")[0] == 2.0
    assert np.isnan(tables.difference(sila, ind, "ece")).all()
