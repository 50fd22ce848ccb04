"""The one rule, and paired comparisons, on numbers whose answer is known by hand or by integration."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import chi2, norm, t

from silalib.analysis.verdict import ClaimVerdict, Effect, Pair, decide, paired, seeds_to_decide
from silalib.run import Run


@pytest.mark.parametrize(
    "mean, half_width, delta, verdict",
    [
        (-2, 1, 0.5, "contradicted"),
        (-2, 2, 0.5, "negligible"),  # the interval ends at 0, which is not below it
        (0, 0.4, 0.5, "negligible"),
        (0.3, 0.1, 0.5, "negligible"),  # but above zero
        (0.3, 0.2, 0.5, "reproduced"),  # the interval ends at delta, which is not below it
        (2, 1, 0.5, "reproduced"),
        (2, 2, 0.5, "undecided"),  # it begins at 0
        (0, 1, 0.5, "undecided"),
    ],
)
def test_the_rule_at_its_edges(mean, half_width, delta, verdict):
    assert decide(mean, half_width, delta) == verdict


WORDS = ("contradicted", "negligible", "reproduced", "undecided")


def rates(mean, spread, n, delta, level):
    """Probabilities of the four verdicts over normal experiments, integrated over the distribution of the spread."""

    def given(s):  # the observed spread over the true one; the observed mean is independent of it
        half = t.ppf((1 + level) / 2, n - 1) * s * spread / n**0.5
        below = lambda x: norm.cdf((x - mean) * n**0.5 / spread)
        contradicted, small = below(-half), below(delta - half)
        reproduced = 1 - below(max(half, delta - half))
        return contradicted, small - contradicted, reproduced, 1 - small - reproduced

    density = lambda s: chi2.pdf((n - 1) * s**2, n - 1) * 2 * s * (n - 1)
    return [quad(lambda s, i=i: given(s)[i] * density(s), 0, 6, limit=200)[0] for i in range(4)]


@pytest.mark.parametrize(
    "mean, n, delta, comparisons, extended",
    [
        (1.4, 8, 0.7, 1, False),  # an effect like the paper's: found 99 times of 100
        (0.0, 8, 0.7, 1, False),
        (0.0, 8, 0.7, 2, False),  # Bonferroni for two effects
        (0.0, 8, 0.5, 4, False),
        (-1.0, 5, 0.5, 1, False),
        (0.8, 8, 0.5, 1, False),
        (0.35, 8, 0.7, 1, True),  # sixteen seeds at 99%
    ],
)
def test_rates_of_the_verdicts(mean, n, delta, comparisons, extended):
    """Over 2,000 simulated experiments within four standard errors of the exact rates."""
    draw = np.random.default_rng(0)
    seeds = 2 * n if extended else n
    counts = dict.fromkeys(WORDS, 0)
    for _ in range(2000):
        gains = dict(enumerate(draw.normal(mean, 0.8, seeds)))
        counts[Effect("x", "points", gains, n, delta).judge(comparisons)] += 1
    expected = rates(mean, 0.8, seeds, delta, 1 - (0.01 if extended else 0.05) / comparisons)
    for word, rate in zip(WORDS, expected):
        assert abs(counts[word] / 2000 - rate) <= 4 * (rate * (1 - rate) / 2000) ** 0.5 + 1e-3, word


def test_rates_named_in_the_plan():
    """With 8 seeds and a spread of 0.8: 99 of 100 for 1.4; 54 of 100 negligible for none, 42 with two effects."""
    assert rates(1.4, 0.8, 8, 0.7, 0.95)[2] == pytest.approx(0.987, abs=0.005)
    assert rates(0.0, 0.8, 8, 0.7, 0.95)[1] == pytest.approx(0.54, abs=0.01)
    assert rates(0.0, 0.8, 8, 0.7, 0.975)[1] == pytest.approx(0.41, abs=0.015)


def of(gains, planned=3, delta=0.5, **more):
    return Effect("x", "points", dict(enumerate(gains)), planned, delta, **more)


def test_before_the_planned_seeds_there_is_no_verdict():
    assert of([]).verdict == "not run" and str(of([])) == ""
    assert of([2.0]).verdict == "so far, 1 of 3 seeds" and str(of([2.0])) == "+2.00 points"
    assert of([2.0, 2.1]).verdict == "so far, 2 of 3 seeds"
    assert of([2.0, 2.1, 2.2]).verdict == "reproduced"
    # seed 1 is missing: two of three
    assert Effect("x", "points", {0: 2.0, 2: 2.2}, 3, 0.5).verdict == "so far, 2 of 3 seeds"


def test_one_seed_and_no_spread_give_no_verdict():
    assert (of([2.0], planned=1).verdict, of([2.0], planned=1).remark) == ("no verdict", "one seed")
    assert (of([2.0] * 3).verdict, of([2.0] * 3).remark) == ("no verdict", "no spread over seeds")


def test_what_hinders_is_said():
    effect = of([2.0, 2.1], lost={2: "SiLa seed 2 diverged"})
    assert (effect.verdict, effect.remark) == ("no verdict", "SiLa seed 2 diverged")


def test_seeds_outside_of_the_plan_judge_nothing_until_they_are_twice_as_many():
    three = [0.3, 0.6, 0.9]
    assert of([*three, 9.0]).values == of([*three, 9.0, 9.0]).values == three
    assert of([*three, 9.0]).seeds == 3 and of([*three, 9.0]).verdict == of(three).verdict
    six = of([0.4, 0.6, 0.8, 0.5, 0.6, 0.7])
    assert six.extended and six.seeds == 6
    # mean 0.6, standard deviation sqrt(0.1 / 5) = 0.1414: at 99% t(0.995, 5) = 4.0321, 0.2328
    assert (six.mean, six.half_width) == (pytest.approx(0.6), pytest.approx(0.2328, abs=1e-4))
    assert six.verdict == "reproduced" and six.remark == "extended to twice the seeds, at 99%"


def test_remarks():
    assert of([0.1, 0.11, 0.12]).verdict == "negligible" and of([0.1, 0.11, 0.12]).remark == "but above zero"
    assert of([0.1, -0.1, 0.0]).remark == ""
    below = "the paper's own gain, +0.28, is below 0.50"
    assert of([2, 2.1, 2.2], paper=0.28).remark == below and of([2, 2.1, 2.2], paper=0.6).remark == ""


def test_seeds_that_would_decide():
    """Spread 1, delta 1: t(0.975, 17) / sqrt(18) = 0.4973, t(0.975, 16) / sqrt(17) = 0.5142."""
    values = [0.0, 1.0, 2.0]
    assert seeds_to_decide(values, 1.0) == 18
    assert seeds_to_decide([v + 100 for v in values], 1.0) == 18  # whatever the mean


# -- claims of several effects


def claim(*effects, profile="small"):
    return ClaimVerdict("1", "a claim", effects, profile).verdict


def test_a_claim_is_reproduced_by_all_and_contradicted_by_any():
    good, bad = of([2.0, 2.1, 2.2]), of([-2.0, -2.1, -2.2])
    small, open_ = of([0.01, 0.0, -0.01]), of([-2.0, 0.5, 3.0])
    lost = of([2.0, 2.1], lost={2: "why"})
    assert claim(good) == claim(good, good) == "reproduced"
    assert claim(good, bad) == claim(small, bad) == claim(open_, bad) == "contradicted"
    assert claim(good, small) == claim(small, open_) == "negligible"
    assert claim(good, open_) == "undecided"
    assert claim(good, of([2.0])) == claim(bad, of([2.0])) == "so far, 1 of 3 seeds"
    assert claim(good, of([])) == "so far, 0 of 3 seeds" and claim(of([]), of([])) == "not run"
    assert claim(good, lost) == claim(lost, open_) == "no verdict"
    assert claim(bad, lost) == "contradicted" and claim(small, lost) == "negligible"
    assert claim(good, replace(bad, delta=None)) == "reproduced"  # shown, judges nothing
    assert claim(good, profile="quick") == claim(bad, profile="quick") == "judges nothing"


def test_one_of_several_effects_decides_at_the_level_of_bonferroni():
    """Spread 0.1, t(0.975, 2) = 4.3027 and t(0.9875, 2) = 6.2053: half-widths 0.2484 and 0.3583."""
    firm = of([-0.2, -0.3, -0.4])
    assert firm.half_width == pytest.approx(0.2484, abs=1e-4)
    assert firm.verdict == "contradicted" and firm.judge(2) == "negligible"
    assert claim(firm) == "contradicted" and claim(of([2.0, 2.1, 2.2]), firm) == "negligible"


# -- pairs


def test_a_seed_that_lacks_a_cell_does_not_count():
    """Cell a gains 2 and 4; cell b lost 10 in seed 0 and has no seed 1."""
    gain = {("a", 0): 2.0, ("a", 1): 4.0, ("b", 0): -10.0, ("b", 1): np.nan}
    plan = {Run(): 3}
    found = paired("x", "points", [Pair(*key, value, Run(seed=key[1])) for key, value in gain.items()], plan)
    assert (found.gains, found.planned, found.wins, found.total) == ({0: -4.0}, 3, 1, 2)
    assert (found.cells, str(found)) == ("1 of 2", "-4.00 points")


def test_no_pairs_and_pairs_without_records_are_not_run():
    for pairs in ([], [Pair("a", 0, np.nan), Pair("b", 0, np.nan)]):
        found = paired("x", "points", pairs)
        assert (found.verdict, found.total, found.seeds) == ("not run", 0, 0)
        assert (found.number, found.cells, str(found)) == ("", "", "")
