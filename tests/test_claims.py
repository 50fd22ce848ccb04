"""Verdicts on made-up records whose answer is known by hand, and the paper's own score from its printed tables."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from silalib import experiments, records
from silalib.analysis import claims
from silalib.analysis.claims import VERDICTS, judge_all, score
from silalib.analysis.evidence import evidence
from silalib.analysis.verdict import ClaimVerdict, Effect, Pair, over_images
from silalib.experiments import EXHIBITS, Exhibit
from silalib.run import Run

SEEDS = (0, 1, 2)
GAINS = {  # of three seeds: spread 0.1, half-width 4.3027 * 0.1 / sqrt(3) = 0.2484
    "reproduced": (2.4, 2.5, 2.6),
    "contradicted": (-2.4, -2.5, -2.6),
    "negligible": (-0.03, -0.01, 0.01),  # half-width 0.0497
    "undecided": (-2.0, 0.5, 3.0),  # half-width 6.2
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
    """Curves: SiLa above IND by the gain; IND's networks 10 apart, those of SiLa 10 / exp(gain / 10)."""

    def history(run, gain):
        rows = []
        better, apart = (gain, 10 / np.exp(gain / 10)) if run.method == "sila" else (0, 10)
        for head in range(len(run.nets)):
            for epoch in range(1, EPOCHS + 1):
                sign = 1 if (epoch + head) % 2 else -1
                rows.append({"epoch": epoch, "head": head, "test_top1": 50 + 10 * run.seed + better + sign * apart / 2})
        return {"history": pd.DataFrame(rows), "heads": [{"ece": 20.0 - better}] * len(run.nets)}

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
    """The scatter ratio 7 of IND is exp(gain / 10) times that of SiLa."""
    heads = lambda run, gain: [{"test_concentration": 7 / np.exp(gain / 10 * (run.method == "sila"))}] * len(run.nets)
    return {"fig6": experiments.fig6("paper", SEEDS)}, lambda run, gain: {"heads": heads(run, gain)}


def robustness(_):
    """SiLa's last training NLL is exp(gain / 10) times the others'; IND's change under noise so many times SiLa's."""

    def record(run, gain):
        heads = range(len(run.nets))
        last = 9 * np.exp(gain / 10 * (run.method == "sila"))
        history = [{"epoch": e, "head": h, "train_nll": nll} for h in heads for e, nll in ((1, 99.0), (2, last))]
        change = 20 / np.exp(gain / 10 * (run.method in ("sila", "dml")))
        # clean NLL 1, then the change -1 and +1 in two draws; noise by filter would say the contrary
        noise = [("absolute", 0.0, 1.0), ("absolute", 0.1, change), ("absolute", 0.1, change + 2), ("filter", 0.0, 1.0)]
        noise = [*noise, ("filter", 0.1, -change)]
        noise = [dict(head=h, kind=kind, sigma=sigma, nll=nll) for h in heads for kind, sigma, nll in noise]
        return {"history": pd.DataFrame(history), "noise": pd.DataFrame(noise), "heads": [{}] * len(run.nets)}

    return {"fig7": experiments.fig7("paper", SEEDS)}, record


def twice_as_long(_):
    """IND alone with twice the epochs, IND's pair, which is better and does not count, and SiLa."""
    top1 = lambda run, gain: (
        99.0 if run.method == "ind" and len(run.nets) == 2 else 50.0 + gain * (run.method == "sila")
    )
    record = lambda run, gain: {"heads": [{"top1": top1(run, gain)}] + [{"top1": 0.0}] * (len(run.nets) - 1)}
    return {"equal_compute": experiments.equal_compute("paper", SEEDS)}, record


BUILDERS = {"1": table, "2": table, "3": table, "4": training, "5": early_exits, "6": features, "7": robustness}
BUILDERS |= {"A": twice_as_long, "B": training}


def made_up(name, gains, profile="paper"):
    """Evidence for a claim with one gain per seed."""
    grids, content = BUILDERS[name]("table3" if name == "3" else "table1")
    gains = dict(enumerate(gains))
    runs = [run for grid in grids.values() for run in grid if run.seed in gains]
    records = {run: SimpleNamespace(run=run, test={}, **content(run, gains[run.seed])) for run in runs}
    return evidence(grids, records, profile)


def judged(name, *arguments):
    (claim,) = judge_all(made_up(name, *arguments), [name])
    return claim


def signs(claim):
    """(cells above zero, all cells) of a claim's effects together."""
    return sum(effect.wins for effect in claim.effects), sum(effect.total for effect in claim.effects)


@pytest.mark.parametrize("verdict", [*VERDICTS, "not run"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_claim_has_every_verdict(name, verdict):
    claim = judged(name, GAINS[verdict])
    assert (claim.name, claim.verdict) == (name, verdict)
    assert {effect.verdict for effect in claim.primary} == {verdict}
    for effect in claim.primary:
        scale = 0.1 if effect.unit in ("nats", "log ratio") else 1  # so the records are made
        assert effect.planned == 3
        if verdict == "not run":
            assert (effect.seeds, effect.total, str(effect)) == (0, 0, "")
            continue
        assert effect.values == pytest.approx([scale * gain for gain in GAINS[verdict]], abs=1e-9)
        assert effect.wins == (effect.total if effect.mean > 0 else 0)
    assert bool(claim.runs) == (verdict != "not run")


@pytest.mark.parametrize("name", BUILDERS)
def test_fewer_than_the_planned_seeds_have_no_verdict(name):
    claim = judged(name, GAINS["reproduced"][:2])
    assert claim.verdict == "so far, 2 of 3 seeds" and {effect.seeds for effect in claim.primary} == {2}
    assert {run.seed for run in claim.runs} == {0, 1}


@pytest.mark.parametrize("name", BUILDERS)
def test_quick_judges_nothing(name):
    claim = judged(name, GAINS["reproduced"], "quick")
    assert claim.verdict == "judges nothing"
    assert "judges nothing" in claims.in_words(claim)
    if name in claims.CLAIMS:
        assert score([claim]) == "claims: 1 not judged (stand-in data)"


def test_deltas_are_those_of_the_protocol():
    """docs/protocol.md, "What is judged": at `small`, and of the whole Table 1."""
    deltas = lambda name, profile: [effect.delta for effect in judged(name, GAINS["reproduced"], profile).primary]
    ratio = pytest.approx(np.log(1.1))
    assert deltas("1", "small") == [0.70, 0.06] and deltas("1", "paper") == [0.79, 0.076]
    assert deltas("2", "small") == [0.70, 0.50, 0.50, 0.50] and deltas("2", "paper") == [0.79, 0.83, 0.50, 0.50]
    assert deltas("3", "small") == [1.05] and deltas("3", "paper") == [0.50]
    assert deltas("4", "small") == [0.70, ratio] and deltas("5", "small") == [0.50, 0.50]
    assert deltas("6", "small") == [ratio] and deltas("7", "paper") == [ratio] * 4
    assert deltas("A", "small") == [0.70] and deltas("B", "small") == [1.0]


def test_scope_stands_in_every_name():
    grids = {name: EXHIBITS[name].grid("small") for name in ("table1", "table3", "fig5", "fig4")}
    names = [effect.name for claim in judge_all(evidence(grids, {}, "small"), "135") for effect in claim.effects]
    assert "top-1, SiLa over IND (Table 1, ResNet18 pair, 2 networks)" in names
    assert "top-1, SiLa over IND (Table 3, CIFAR-100, MobileNet pair, 2 networks)" in names
    assert "top-1 of the exits (anytime), SiLa over IND (Figure 5, 5 exits)" in names
    _, three, five = judge_all(evidence(grids, {}, "small"), "135")
    assert len(three.primary) == 1 and len(three.effects) == 2  # CIFAR-10 is shown and judges nothing
    assert len(five.primary) == 2 and len(five.effects) == 3  # as are seven blocks


# -- claim 8: by counting, without any run


def test_no_parameters_are_added():
    (claim,) = judge_all(evidence({}, {}), ["8"])
    (effect,) = claim.effects
    assert claim.verdict == "reproduced" and effect.number == "0" and not claim.runs
    # five pairs of Table 1, three of Table 2, five of Table 3 on two data sets, eight MSDNets, Figure 6
    assert effect.total == 5 + 3 + 10 + 8 + 1


def test_an_added_parameter_is_counted():
    effect = claims.added_parameters(lambda: torch.nn.Linear(1, 1, bias=False))
    assert effect.verdict == "contradicted" and effect.wins == 0 < effect.total


# -- the paper's own score


def test_the_papers_own_score():
    by_name = {claim.name: claim for claim in judge_all(claims.printed())}
    # Tables 1 and 2: 13 rows of SiLa with four numbers; Table 3: 20 with two. Two ties and one loss, all in top-2.
    assert signs(by_name["1"]) == (52, 52) and signs(by_name["3"]) == (37, 40)
    # SiLa+DML over SiLa has 13 rows with four numbers, over DML 16
    both = [effect for effect in by_name["2"].effects if "SiLa+DML over" in effect.name]
    assert (sum(effect.wins for effect in both), sum(effect.total for effect in both)) == (113, 116)
    for name in "4567AB":
        assert signs(by_name[name]) == (0, 0)
    means = {effect.name: effect.mean for effect in by_name["1"].effects}
    # the seven printed top-1 gains of SiLa in Table 1: 2.28, 1.40, 2.27, 0.75, 1.00, 1.98, 1.41
    assert means["top-1, SiLa over IND (Table 1, 7 networks)"] == pytest.approx(11.09 / 7)
    assert all(claim.verdict not in VERDICTS for name, claim in by_name.items() if name != "8")  # no spread is printed


# -- what is missing


def test_a_network_without_records_leaves_its_seeds_out():
    found = made_up("1", GAINS["reproduced"])
    kept = {run: r for run, r in found.records.items() if run.seed < 2 or run.nets[0] == "resnet18"}
    (claim,) = judge_all(evidence(found.grids, kept), ["1"])
    assert claim.verdict == "so far, 2 of 3 seeds"
    assert {run.seed for run in claim.runs} == {0, 1} and claim.effects[0].mean == pytest.approx(2.45)


def test_data_of_ones_own_never_hold_a_verdict_up(data_folder):
    """Figure 5 on ImageNet-100, which is not here, beside CIFAR-100."""
    found = made_up("5", GAINS["reproduced"])
    own = [replace(run, dataset="imagenet100", nets="msdnet_imagenet", stem="imagenet") for run in found.grids["fig5"]]
    grids = {"fig5": [*found.grids["fig5"], *own], "fig4": found.grids["fig4"]}
    (claim,) = judge_all(evidence(grids, found.records), ["5"])
    assert claim.verdict == "reproduced"


def test_seeds_outside_of_the_plan_are_shown_and_not_judged():
    found = made_up("6", GAINS["reproduced"])
    plan = [run for run in found.records if run.seed < 2]
    (claim,) = judge_all(evidence(found.grids, found.records, "paper", plan), ["6"])
    (effect,) = claim.effects
    assert effect.planned == effect.seeds == 2 and set(effect.gains) == {0, 1, 2}


def test_a_run_that_diverged_counts_with_chance_in_top1_and_hinders_the_rest(results):
    found = made_up("1", GAINS["reproduced"])
    lost = next(r for r in found.records if r.method == "sila" and r.seed == 2 and set(r.nets) == {"resnet18"})
    kept = {run: record for run, record in found.records.items() if run != lost}
    folder = results / "paper" / "runs" / lost.key
    folder.mkdir(parents=True)
    records.write_failure(folder, "not finite", epoch=1, step=1, lr=0.1)
    (claim,) = judge_all(evidence(found.grids, kept), ["1"])
    top1, nll = claim.primary
    # eight networks gain 2.6, two fall from 50 to 1
    assert top1.gains[2] == pytest.approx((8 * 2.6 - 2 * 49) / 10) and top1.verdict == "undecided"
    assert (nll.verdict, nll.remark.split(";")[0]) == ("no verdict", "SiLa seed 2 diverged")
    assert claim.verdict == "no verdict"
    # a run that failed in another way, a full disk or an error of ours, is a missing one
    records.write_failure(folder, "no space", traceback="")
    (claim,) = judge_all(evidence(found.grids, kept), ["1"])
    assert claim.verdict == "so far, 2 of 3 seeds" and set(claim.primary[0].gains) == {0, 1}


def test_a_field_that_old_records_lack_is_named():
    found = made_up("B", GAINS["reproduced"])
    for record in found.records.values():
        record.heads = [{}] * len(record.heads)
    (claim,) = judge_all(found, ["B"])
    assert claim.verdict == "no verdict" and "SiLa seed 0: not recorded" in claim.effects[0].remark


def test_a_change_without_a_logarithm_gives_no_verdict_and_says_so():
    """Noise that lowers the training NLL of one network: its seed is trained, and must not go missing."""
    found = made_up("7", GAINS["reproduced"])
    run = next(run for run in found.records if run.method == "sila" and run.seed == 1)
    found.records[run].noise["nll"] = np.where(found.records[run].noise["sigma"] > 0, -5.0, 1.0)
    (claim,) = judge_all(found, ["7"])
    change = claim.primary[2]
    assert (change.verdict, change.seeds) == ("no verdict", 2) and "without a logarithm" in change.remark
    assert claim.verdict == "no verdict"


def failed(results, runs):
    for run in runs:
        folder = results / "paper" / "runs" / run.key
        folder.mkdir(parents=True, exist_ok=True)
        records.write_failure(folder, "not finite", epoch=1, step=1, lr=0.1)


def without(found, lost):
    kept = {run: record for run, record in found.records.items() if run not in lost}
    return evidence(found.grids, kept, found.profile)


@pytest.mark.parametrize("name", ["1", "4", "5", "A"])
def test_where_all_of_silas_runs_diverge_top1_is_that_of_chance(name, results):
    found = made_up(name, GAINS["reproduced"])
    lost = [run for run in found.records if run.method == "sila"]
    failed(results, lost)
    (claim,) = judge_all(without(found, lost), [name])
    top1 = claim.primary[0]  # chance has no spread over seeds, nor has IND but for claim 4
    assert claim.verdict == top1.verdict == ("contradicted" if name == "4" else "no verdict")
    assert top1.seeds == 3 and top1.mean < -40
    assert all(effect.verdict == "no verdict" for effect in claim.primary[1:] if effect.unit != "points")


def test_a_run_that_diverged_outside_of_the_plan_hinders_nothing(results):
    found = made_up("4", GAINS["reproduced"])
    extra = [replace(run, seed=9) for run in found.grids["fig3"] if run.seed == 0]
    failed(results, extra[1:])
    grids = {"fig3": [*found.grids["fig3"], *extra]}
    (claim,) = judge_all(evidence(grids, found.records, plan=found.grids["fig3"]), ["4"])
    assert claim.verdict == "reproduced" and {run.seed for run in claim.runs} == {0, 1, 2}


def test_signs_count_the_seeds_that_judge():
    """Two planned seeds gain, four others lose more."""
    found = made_up("6", (2.4, 2.5, -20.0))
    plan = [run for run in found.records if run.seed < 2]
    (claim,) = judge_all(evidence(found.grids, found.records, plan=plan), ["6"])
    assert claim.effects[0].cells == "2 of 2" and claim.verdict == "reproduced"


def test_table_2_judges_nothing_at_small():
    grids = {"table2": experiments.table2("small", SEEDS)}
    heads = lambda run: [dict(top1=50, top5=70, best=51, nll=2 + (run.method == "sila"))] * len(run.nets)
    own = {run: SimpleNamespace(run=run, test={}, heads=heads(run)) for run in grids["table2"]}
    (claim,) = judge_all(evidence(grids, own, "small"), ["1"])
    assert claim.verdict == "judges nothing" and not claim.primary and len(claim.effects) == 4


def test_the_papers_number_is_that_of_the_same_data_set():
    """Table 3, MobileNet on CIFAR-100: 73.62 - 70.34 = 3.28 and 71.28 - 70.34 = 0.94, mean 2.11."""
    (claim,) = judge_all(evidence({"table3": EXHIBITS["table3"].grid("small")}, {}, "small"), ["3"])
    assert claim.primary[0].paper == pytest.approx(2.11)


def test_exits_are_compared_with_those_of_the_same_network():
    """Figure 4's and Figure 5's networks of the same name differ in what they hold out."""
    found = made_up("5", GAINS["reproduced"])
    both = {"fig5": found.grids["fig4"] + found.grids["fig5"], "fig4": found.grids["fig4"]}
    (claim,) = judge_all(evidence(both, found.records), ["5"])
    assert claim.effects[0].total == 6  # three exits of two networks


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
    claim = judged("1", GAINS["reproduced"])
    assert all(effect.images is None and effect.over_images == "" for effect in claim.effects)


# -- from disk, and in words


def test_a_damaged_record_counts_as_missing(record):
    exhibits = {"fig6": Exhibit("Tiny", lambda profile, seeds=None: [record.run], "00_tiny")}
    (record.path / "history.csv").write_text("damaged")
    assert claims.collect("quick", exhibits=exhibits).records == {}


def test_score_in_a_line():
    verdict = lambda name, gains: ClaimVerdict(name, "", (Effect("", "", dict(enumerate(gains)), 3, 0.5),), "paper")
    good, bad, begun = GAINS["reproduced"], GAINS["contradicted"], GAINS["reproduced"][:1]
    found = [verdict("1", good), verdict("2", good), verdict("3", bad), verdict("4", begun), verdict("A", good)]
    assert score(found) == "claims: 2 reproduced, 1 contradicted, 1 in progress"


def test_in_words():
    good = Effect("top-1", "points", {0: 2.4, 1: 2.5, 2: 2.6}, 3, 0.5, runs=(Run(),))
    words = claims.in_words(ClaimVerdict("1", "It helps", (good, Effect("BEST", "points")), "paper"))
    first = "- top-1: +2.50 ± 0.25 points, 3 seeds: reproduced; the smallest effect of interest is 0.50."
    assert words == f"**It helps: reproduced.**\n\n{first}\n- BEST: no record (shown, judges nothing)."


def test_what_would_decide_it():
    """Spread 2.5, delta 0.79: 157 seeds, as t(0.975, 156) * 2.5 / sqrt(157) = 0.394 and 0.395 is half of delta."""
    claim = replace(judged("1", GAINS["undecided"]), records={})
    with mock.patch.object(claims, "seconds_left", lambda runs, records: {run: 3600 for run in runs[:6]}):
        text, _ = claims.what_decides(claim)
        words = claims.in_words(claim)
    assert (
        ": 157 seeds would decide it by its spread. One extension is allowed, to 6 seeds, judged at 99%, 6.0 " in text
    )
    assert text.endswith("`python -m silalib train table1 --profile paper --seeds 3 4 5`.")
    assert "157 seeds would decide it" in words
    assert list(claims.what_decides(judged("1", GAINS["reproduced"]))) == []


@pytest.mark.parametrize("name, exhibit", [("A", "equal_compute"), ("4", "fig3"), ("6", "fig6"), ("B", "fig3")])
def test_the_command_trains_what_the_effect_rests_on(name, exhibit):
    for text in claims.what_decides(judged(name, GAINS["undecided"]), timed=False):
        assert f"`python -m silalib train {exhibit} --profile paper --seeds 3 4 5`" in text


def test_an_effect_that_only_bonferroni_leaves_open_is_named():
    """Half-widths 0.2484 and, for two effects, 0.3583 of a spread of 0.1: 0.45 is above the one and below the other."""
    good = Effect("good", "points", {0: 2.4, 1: 2.5, 2: 2.6}, 3, 0.5)
    small = Effect("small", "points", {0: 0.1, 1: 0.2, 2: 0.3}, 3, 0.45)
    claim = ClaimVerdict("1", "It helps", (good, small), "paper")
    assert small.verdict == "negligible" and claim.verdict == "undecided"
    (text,) = claims.what_decides(claim, timed=False)
    # t(0.9875, 3) = 4.1765 and t(0.9875, 4) = 3.4954: half-widths 0.209 of four seeds, 0.156 of five (0.225 is asked)
    assert text.startswith("small: 4 seeds would decide it by its spread.")


def test_a_headline_says_a_scope_once_in_a_row():
    effects = [
        Effect(name, "points", {0: 1.0}, 3, 0.5)
        for name in ("one (Table 1, 2 networks)", "two (Table 1, 2 networks)", "three (Table 2)", "four")
    ]
    _, text = claims.headline(ClaimVerdict("1", "It helps", tuple(effects), "paper")).split(".** ")
    assert [part.split(":")[0] for part in text.split("; ")] == [
        "one (Table 1, 2 networks)",
        "two",
        "three (Table 2)",
        "four",
    ]
