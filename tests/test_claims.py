"""Verdicts on made-up records whose answer is known by hand, and the paper's own score from its printed tables."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from silalib import experiments
from silalib.analysis import claims, tables
from silalib.analysis.claims import CLAIMS, VERDICTS, evidence, judge_all, score
from silalib.analysis.statistics import Effect, Pair, over_images
from silalib.experiments import Exhibit, cifar_run
from silalib.run import Run

SEEDS = (0, 1, 2)
GAINS = {
    "reproduced": (2.0, 2.5, 3.0),  # mean 2.5, standard deviation 0.5: half-width 4.3027 * 0.5 / sqrt(3) = 1.242
    "not reproduced": (-2.0, -2.5, -3.0),
    "inconclusive": (-2.0, 0.5, 3.0),  # mean 0.5 and half-width 6.2: the interval holds zero
    "not run": (),
}
EPOCHS = 4


def table(exhibit):
    """Tables: SiLa and DML better by the gain in every metric, SiLa+DML by twice the gain."""
    grid = experiments.table1("paper", SEEDS)
    share = {"ind": 0, "sila": 1, "dml": 1, "sila+dml": 2}

    def heads(run, gain):
        better = share[run.method] * gain
        one = {
            "top1": 50 + better,
            "top2": 60 + better,
            "top5": 70 + better,
            "best": 55 + better,
            "nll": 2 - better / 10,
        }
        return {"heads": [one] * len(run.nets)}

    return {exhibit: grid}, heads


def training(_):
    """Curves: SiLa above IND by the gain; the networks of IND's pair 10, 20 or 10 apart, those of SiLa closer by it."""
    null = {0: 10, 1: 10, 2: 20}

    def history(run, gain):
        rows = []
        for head in range(len(run.nets)):
            for epoch in range(1, EPOCHS + 1):
                better = gain if run.method == "sila" else 0
                apart = (null[run.seed] - better) / 2 * (1 if (epoch + head) % 2 else -1)
                top1 = 50 + 10 * run.seed + better + apart
                rows.append({"epoch": epoch, "head": head, "test_top1": top1})
        return {"history": pd.DataFrame(rows), "heads": [{}] * len(run.nets)}

    return {"fig3": experiments.fig3("paper", SEEDS)}, history


def early_exits(_):
    """Three exits, every one better by the gain at the same cost."""
    net = dict(nets="msdnet_anytime", blocks=3)
    base = [Run(**net, method=method, seed=seed) for seed in SEEDS for method in ("ind", "sila")]
    top1 = lambda run, gain, k: 50 + k + (gain if run.method == "sila" else 0)

    def record(run, gain):
        heads = [{"top1": top1(run, gain, k), "macs": k} for k in range(3)]
        exits = {f"{name}_{k}": 0.5 for name in ("threshold", "share") for k in range(3)}
        return {"heads": heads, "budgeted": pd.DataFrame(heads).assign(q=1.0, **exits)}

    return {"fig5": base, "fig4": [replace(run, holdout=5000) for run in base]}, record


def features(_):
    heads = lambda run, gain: [{"test_concentration": 7 - (gain if run.method == "sila" else 0)}] * len(run.nets)
    return {"fig6": experiments.fig6("paper", SEEDS)}, lambda run, gain: {"heads": heads(run, gain)}


def robustness(_):
    """SiLa's last training NLL is higher by the gain; its change under noise and DML's are lower by it."""

    def record(run, gain):
        heads = range(len(run.nets))
        last = 9 + (gain if run.method == "sila" else 0)
        history = [{"epoch": e, "head": h, "train_nll": nll} for h in heads for e, nll in ((1, 99.0), (2, last))]
        change = 20 - (gain if run.method in ("sila", "dml") else 0)
        # clean NLL 1, then the change -1 and +1 in two draws; noise by filter would say the contrary
        noise = [("absolute", 0.0, 1.0), ("absolute", 0.1, change), ("absolute", 0.1, change + 2), ("filter", 0.0, 1.0)]
        noise = [*noise, ("filter", 0.1, -change)]
        noise = [dict(head=h, kind=kind, sigma=sigma, nll=nll) for h in heads for kind, sigma, nll in noise]
        return {"history": pd.DataFrame(history), "noise": pd.DataFrame(noise), "heads": [{}] * len(run.nets)}

    return {"fig7": experiments.fig7("paper", SEEDS)}, record


BUILDERS = {1: table, 2: table, 3: table, 4: training, 5: early_exits, 6: features, 7: robustness}


def made_up(number, gains, dataset=None):
    """Evidence for a claim with one gain per seed."""
    grids, content = BUILDERS[number]("table3" if number == 3 else "table1")
    if dataset:
        grids = {name: [replace(run, dataset=dataset) for run in grid] for name, grid in grids.items()}
    gains = dict(enumerate(gains))
    runs = [run for grid in grids.values() for run in grid if run.seed in gains]
    records = {run: SimpleNamespace(run=run, test={}, **content(run, gains[run.seed])) for run in runs}
    for record in records.values():
        record.heads = [{"parameters": 1} | head for head in record.heads]
    return evidence(grids, records)


def judged(number, *arguments):
    return judge_all(made_up(number, *arguments))[number - 1]


def signs(claim):
    """(cells above zero, all cells) of a claim's effects together."""
    return sum(effect.wins for effect in claim.effects), sum(effect.total for effect in claim.effects)


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("number", BUILDERS)
def test_every_claim_has_every_verdict(number, verdict):
    claim = judged(number, GAINS[verdict])
    assert claim.number == number
    assert claim.verdict == verdict
    assert {effect.verdict for effect in claim.effects} == {verdict}
    for effect in claim.effects:
        scale = 0.1 if effect.name.startswith("NLL") else 1  # the tables' NLL moves by a tenth
        if verdict == "not run":
            assert (effect.seeds, effect.total, str(effect)) == (0, 0, "")
            continue
        assert effect.mean == pytest.approx(scale * np.mean(GAINS[verdict]))
        assert effect.half_width == pytest.approx(scale * 4.3027 * np.std(GAINS[verdict], ddof=1) / 3**0.5, rel=1e-4)
        assert effect.seeds == 3
        assert effect.wins == (effect.total if effect.mean > 0 else 0)
    assert bool(claim.runs) == (verdict != "not run")


@pytest.mark.parametrize("number", BUILDERS)
def test_a_single_seed_is_inconclusive_and_says_so(number):
    claim = judged(number, [2.0])
    assert claim.verdict == "inconclusive"
    assert "fewer than two seeds" in claim.note
    assert {run.seed for run in claim.runs} == {0}


def test_an_effect_of_a_single_seed_is_named_beside_one_of_several():
    """Of Figures 5 and 4 the second has one seed."""
    found = made_up(5, GAINS["reproduced"])
    kept = {run: record for run, record in found.records.items() if run.seed == 0 or not run.holdout}
    claim = judge_all(evidence(found.grids, kept))[4]
    assert [effect.seeds for effect in claim.effects] == [3, 1]
    assert f'fewer than two seeds of "{claim.effects[1].name}"' in claim.note


@pytest.mark.parametrize("number", BUILDERS)
def test_stand_in_data_judge_nothing(number):
    claim = judged(number, GAINS["reproduced"], "digits")
    assert claim.verdict == "not run" and claim.measured == "reproduced"
    assert "stand-in data judge nothing" in claim.note


@pytest.mark.parametrize(
    "added, seeds, verdict",
    [(0, SEEDS, "reproduced"), (1, SEEDS, "not reproduced"), (0, (0,), "inconclusive"), (0, (), "not run")],
)
def test_added_parameters(added, seeds, verdict):
    grid = experiments.table1("paper", SEEDS)
    own = {"mobilenet": 30, "resnet18": 110, "vgg13": 280}
    extra = lambda run: added * (run.method == "sila")
    records = {
        run: SimpleNamespace(test={}, heads=[{"parameters": own[net] + extra(run)} | METRICS for net in run.nets])
        for run in grid
        if run.seed in seeds
    }
    claim = judge_all(evidence({"table1": grid}, records))[7]
    assert claim.verdict == verdict
    if seeds:
        assert str(claim.effects[0]) == str(added)
        assert claim.effects[0].total == 10  # both networks of five pairs


METRICS = dict.fromkeys(("top1", "top2", "top5", "best", "nll"), 0.0)


# -- the paper's own score


def test_the_papers_own_score():
    by_number = {claim.number: claim for claim in judge_all(claims.printed())}
    # Tables 1 and 2: 13 rows of SiLa with four numbers; Table 3: 20 with two. Two ties and one loss, all in top-2.
    assert signs(by_number[1]) == (89, 92)
    # SiLa+DML over SiLa has 13 rows with four numbers, over DML 16
    both = by_number[2].effects[2:]
    assert [(effect.wins, effect.total) for effect in both] == [(50, 52), (63, 64)]
    assert sum(effect.wins for effect in both) == 113 and sum(effect.total for effect in both) == 116
    assert signs(by_number[3]) == (37, 40)
    for number in (4, 5, 6, 7, 8):
        assert signs(by_number[number]) == (0, 0)
    assert all(claim.verdict in ("inconclusive", "not run") for claim in by_number.values())  # no spread is printed


# -- judging


@pytest.mark.parametrize(
    "mean, half, won, verdict",
    [
        (2, 1, 3, "reproduced"),
        (2, 2, 3, "inconclusive"),  # the interval ends at zero
        (2, 1, 2, "inconclusive"),  # only half of the cells agree
        (-2, 1, 0, "not reproduced"),
        (-2, 1, 3, "inconclusive"),
        (0, 0, 0, "inconclusive"),
    ],
)
def test_an_effect_needs_its_interval_and_most_signs(mean, half, won, verdict):
    assert Effect("x", "points", mean, half, seeds=3, wins=won, total=4).verdict == verdict


def test_a_claim_needs_all_of_its_effects():
    good, bad = [Effect("x", "", g, 0.5, seeds=3, wins=g > 0, total=1) for g in (1, -1)]
    open_, none = Effect("x", "", 0.1, 0.5, seeds=3, wins=1, total=1), Effect("y", "")
    verdict = lambda *effects: claims.ClaimVerdict(1, "a claim", effects).verdict
    assert verdict(good, good) == "reproduced"
    assert verdict(good, bad) == verdict(open_, bad) == verdict(none, bad) == "not reproduced"
    assert verdict(good, open_) == verdict(good, none) == verdict(open_, none) == "inconclusive"
    assert verdict(none, none) == "not run"


def test_missing_cells_leave_an_effect_open():
    verdict = lambda **more: Effect("x", "points", seeds=3, total=4, missing=1, **more).verdict
    assert verdict(mean=2, half_width=1, wins=4) == verdict(mean=-2, half_width=1, wins=0) == "inconclusive"
    assert verdict(mean=0, half_width=0, wins=4, exact=True) == "inconclusive"
    assert verdict(mean=1, half_width=0, wins=3, exact=True) == "not reproduced"  # one difference refutes equality
    assert Effect("x", "", missing=4).verdict == "not run"


def table2_in_part(only_pair_seeds, won=2.0, lost=-1.5):
    """Table 2 with all runs of seed 0, and of other seeds the ResNet18 pair alone, the one network that SiLa helps."""
    grid = experiments.table2("paper", SEEDS)
    pair = lambda run: set(run.nets) == {"resnet18"}

    def head(run):
        gain = 0 if run.method == "ind" else (won if pair(run) else lost)
        return {"top1": 60 + gain + run.seed / 100 * gain, "top5": 80 + gain, "best": 61 + gain, "nll": 1 - gain / 10}

    runs = [run for run in grid if run.seed == 0 or (run.seed in only_pair_seeds and pair(run))]
    return grid, {
        run: SimpleNamespace(run=run, test={}, heads=[head(run) | {"parameters": 1}] * len(run.nets)) for run in runs
    }


def test_a_part_of_a_table_is_not_its_verdict():
    """Gains of the pair: 2, 2.02 and 2.04, so 2.02 +- 4.3027 * 0.02 / sqrt(3); four of six networks lose 1.5."""
    grid, records = table2_in_part((1, 2))
    claim = judge_all(evidence({"table2": grid}, records))[0]
    top1 = claim.effects[0]
    assert (top1.wins, top1.total, top1.missing, top1.seeds) == (2, 2, 4, 3)
    assert (top1.mean, top1.half_width) == (pytest.approx(2.02), pytest.approx(0.0497, abs=1e-4))
    assert top1.verdict == claim.verdict == "inconclusive"
    left_out = "without Table 1: CIFAR-100, Table 3: AutoAugment"
    names = " and ".join(f'"{metric}, SiLa over IND"' for metric in ("Top-1", "Top-5", "BEST", "NLL"))
    assert claim.note == f"records for only 2 of 6 cells of {names}; {left_out}"
    # claim 2 counts the signs of four metrics
    sila = judge_all(evidence({"table2": grid}, records))[1].effects[0]
    assert (sila.wins, sila.total, sila.missing, sila.verdict) == (8, 8, 16, "inconclusive")


def test_the_notebooks_score_is_the_claims():
    metrics = ("top1", "top5", "best", "nll")
    for seeds in ((), (1,), (1, 2)):
        grid, records = table2_in_part(seeds)
        claim = judge_all(evidence({"table2": grid}, records))[1].effects[0]
        score = tables.score(tables.cells(grid, records, metrics, "table2"), "sila")
        assert (score.wins, score.total, score.missing) == (claim.wins, claim.total, claim.missing)
        assert (score.mean, score.half_width) == pytest.approx((claim.mean, claim.half_width), nan_ok=True)


def test_a_missing_exit_and_a_missing_network_are_counted():
    found = made_up(5, GAINS["reproduced"])
    more = {name: [replace(run, blocks=5) for run in grid] for name, grid in found.grids.items()}
    claim = judge_all(evidence({name: grid + more[name] for name, grid in found.grids.items()}, found.records))[4]
    assert [(e.total, e.missing) for e in claim.effects] == [(3, 5), (1, 1)]
    assert claim.verdict == "inconclusive"
    only, (anytime, budgeted) = "records for only", (effect.name for effect in claim.effects)
    assert claim.note == f'{only} 3 of 8 cells of "{anytime}"; {only} 1 of 2 cells of "{budgeted}"'
    only_anytime = {run: record for run, record in found.records.items() if run in found.grids["fig5"]}
    assert judge_all(evidence(found.grids, only_anytime))[4].note.startswith(f'"{budgeted}" not run; without Figure 4')


def test_a_network_without_a_record_may_have_other_parameters():
    grid = experiments.table1("paper", SEEDS)
    records = {run: SimpleNamespace(test={}, heads=[{"parameters": 1} | METRICS] * 2) for run in grid}
    claim = lambda: judge_all(evidence({"table1": grid}, records))[7]
    assert claim().verdict == "reproduced"
    for run in [run for run in grid if run.method == "sila" and set(run.nets) == {"vgg13"}]:
        del records[run]
    short = "records for only 8 of 10 cells of"
    assert (claim().verdict, claim().note) == ("inconclusive", f'{short} "parameters added to a network"')
    # more in one seed and fewer in another is no equality
    first, second = (run for run in grid if run.method == "ind" and set(run.nets) == {"resnet18"} and run.seed < 2)
    records[first].heads[0]["parameters"], records[second].heads[0]["parameters"] = 0, 2
    assert claim().verdict == "not reproduced"


def test_a_seed_in_progress_and_a_table_that_was_not_run():
    found = made_up(1, GAINS["reproduced"])
    kept = {run: r for run, r in found.records.items() if run.seed < 2 or run.nets[0] == "resnet18"}
    claim = judge_all(evidence(found.grids, kept))[0]
    assert [effect.name.split(",")[0] for effect in claim.effects] == ["Top-1", "Top-5", "BEST", "NLL"]
    assert {run.seed for run in claim.runs} == {0, 1}
    assert claim.effects[0].mean == pytest.approx(2.25)
    left_out = "without Table 2: ImageNet-100, Table 3: AutoAugment"
    assert claim.effects[0].missing == 0 and claim.note == left_out
    # a table that is planned and not run adds its cells: ten networks on each of two data sets, top-5 on one
    planned = {"table3": experiments.table3("paper", SEEDS)}
    claim = judge_all(evidence(found.grids | planned, kept))[0]
    assert [effect.name.split(",")[0] for effect in claim.effects] == ["Top-1", "Top-5", "BEST", "NLL"]
    assert [(effect.total, effect.missing) for effect in claim.effects] == [(10, 20), (10, 10), (10, 0), (10, 0)]
    only = "records for only"
    cells = f'{only} 10 of 30 cells of "Top-1, SiLa over IND"; {only} 10 of 20 cells of "Top-5, SiLa over IND"'
    assert claim.note == f"{cells}; {left_out}"


def test_only_metrics_that_the_paper_prints_are_judged():
    names = lambda number, dataset: {e.name for e in judged(number, GAINS["reproduced"], dataset).effects}
    printed = {f"{metric}, SiLa over IND" for metric in ("Top-1", "Top-5", "BEST", "NLL")}
    assert names(1, None) == names(1, "digits") == printed  # Table 1 has no top-2
    # Table 3 has top-1 with top-2 on CIFAR-10 and with top-5 on CIFAR-100: ten networks, two metrics
    for dataset in ("cifar10", "cifar100"):
        assert signs(judged(3, GAINS["reproduced"], dataset))[1] == 20


def test_exits_of_another_cost_are_not_compared():
    found = made_up(5, GAINS["reproduced"])
    for run, record in found.records.items():
        if run.method == "sila":
            record.heads = [head | {"macs": 2 * head["macs"]} for head in record.heads]
    assert judge_all(found)[4].effects[0].total == 1  # the first exit costs 0 in both


# -- over test images


def with_predictions(run, right, log_probability):
    labels = np.zeros(len(right), int)
    test = {"labels": labels, "predicted_0": 1 - np.array(right), "log_probability_0": np.array(log_probability)}
    return SimpleNamespace(run=run, test=test)


def test_interval_over_test_images_by_hand():
    a, b = Run(nets="resnet18", method="ind"), Run()
    records = {
        a: with_predictions(a, [1, 0, 0, 1], [-1, -2, -3, -4]),
        b: with_predictions(b, [1, 1, 1, 0], [-1, -1, -1, -1]),
    }
    rows = [Pair("cell", 0, 0.0, b, a)]
    # differences 0, 100, 100, -100: mean 25, variance (625 + 2 * 5625 + 15625) / 3
    mean, half = over_images(rows, records, "top1")
    assert (mean, half) == (25, pytest.approx(1.96 * (27500 / 3 / 4) ** 0.5))
    assert over_images(rows, records, "nll")[0] == pytest.approx(1.5)
    assert over_images(rows, records, "best") is None
    # another data set with the same four differences halves the variance of the mean
    c, d = replace(a, dataset="cifar10"), replace(b, dataset="cifar10")
    records |= {c: with_predictions(c, [1, 0, 0, 1], [0] * 4), d: with_predictions(d, [1, 1, 1, 0], [0] * 4)}
    both = over_images([*rows, Pair("other", 0, 0.0, d, c)], records, "top1")
    assert both == (25, pytest.approx(half / 2**0.5))


def test_records_without_per_image_data_have_no_such_interval():
    claim = judged(1, GAINS["reproduced"])
    assert all(effect.images is None and effect.over_images == "" for effect in claim.effects)


# -- from disk


def test_a_damaged_record_counts_as_missing(record):
    exhibits = {"fig6": Exhibit("Tiny", lambda profile, seeds=None: [record.run], "00_tiny")}
    judged = lambda: judge_all(claims.collect("quick", exhibits=exhibits))
    assert judged()[5].left_out == ()
    (record.path / "history.csv").write_text("damaged")
    assert judged()[5].left_out == ("fig6",)
    assert [claim.verdict for claim in judged()] == ["not run"] * len(CLAIMS)
    assert score(judged()) == "claims: 8 not run"


def test_score_in_a_line():
    claim = lambda mean: claims.ClaimVerdict(1, "", (Effect("", "", mean, 1.0, seeds=3, wins=mean > 0, total=1),))
    assert score([claim(2), claim(2), claim(0.5)]) == "claims: 2 reproduced, 1 inconclusive"
    run = cifar_run("quick", ("resnet18",))
    stand_in = claims.ClaimVerdict(1, "", (Effect("", "", 2.0, 1.0, seeds=3, wins=1, total=1, runs=(run,)),))
    assert score([stand_in]) == "claims: 1 not run (stand-in data judge nothing)"


def test_in_words():
    good = Effect("top-1", "points", 2.0, 0.5, seeds=3, wins=4, total=4)
    claim = claims.ClaimVerdict(1, "It helps", (good, Effect("NLL", "nats")))
    assert claims.in_words(claim) == (
        "- top-1: +2.00 ± 0.50 points. Reproduced.\n- NLL: no record. Not run.\n\n**It helps: inconclusive**."
    )
    stand_in = claims.ClaimVerdict(
        1, "It helps", (replace(good, runs=(Run(dataset="digits"), Run(dataset="digits", seed=1))),)
    )
    assert claims.in_words(stand_in).endswith("**It helps: not run** (stand-in data judge nothing in the paper).")
