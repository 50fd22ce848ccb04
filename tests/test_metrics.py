"""Metrics against scikit-learn's, and against loops."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, top_k_accuracy_score

from silalib.analysis.statistics import mcnemar
from silalib.training import metrics
from silalib.training.metrics import (
    TEMPERATURES,
    best_temperature,
    calibration,
    cross_entropy,
    ece,
    ensemble,
    expected_calibration_error,
    in_top_k,
    reliability,
    summaries,
    wrong_logsumexp,
)


def summary(logits, target):
    return summaries([logits], target)[0]


def sample(classes, n=200):
    g = torch.Generator().manual_seed(classes)
    return 2 * torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)


@pytest.mark.parametrize("classes", [6, 10, 100])
def test_summary_against_scikit_learn(classes):
    logits, target = sample(classes)
    labels = list(range(classes))
    actual = summary(logits, target)
    assert list(actual) == ["nll", "top1", "top2", "top5"]
    assert all(isinstance(v, float) for v in actual.values())
    assert actual["nll"] == pytest.approx(log_loss(target, logits.double().softmax(1), labels=labels), rel=1e-6)
    for k in (1, 2, 5):
        assert actual[f"top{k}"] == pytest.approx(
            100 * top_k_accuracy_score(target, logits.numpy(), k=k, labels=labels), rel=1e-12
        )


def test_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, math.log(2)], [5.0, 1.0, 0.0]])
    target = torch.tensor([2, 2, 2])  # second, first and last
    assert in_top_k(logits, target, 1).tolist() == [False, True, False]
    assert in_top_k(logits, target, 2).tolist() == [True, True, False]
    assert summary(logits, target)["top1"] == pytest.approx(100 / 3)
    # the second sample has the probabilities 1/4, 1/4, 1/2
    assert cross_entropy(logits, target)[1].item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_top5_with_fewer_than_five_classes(classes):
    logits, target = sample(classes)
    assert in_top_k(logits, target, 5).all()
    assert summary(logits, target)["top5"] == 100
    assert summary(logits, target)["top2"] == pytest.approx(
        100 * np.mean([t in z.argsort()[-2:] for z, t in zip(logits.numpy(), target.numpy())])
    )
    assert summary(logits, target)["top1"] < 100


@pytest.mark.parametrize("classes", [2, 5])
def test_wrong_logsumexp_against_a_loop(classes):
    logits, target = sample(classes, n=20)
    before = logits.clone()
    expected = [
        math.log(sum(math.exp(v) for j, v in enumerate(z) if j != y)) for z, y in zip(logits.tolist(), target.tolist())
    ]
    np.testing.assert_allclose(wrong_logsumexp(logits, target), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before)


def test_large_logits():
    logits, target = torch.tensor([[1e4, -1e4], [1e4, -1e4]]), torch.tensor([0, 1])
    assert cross_entropy(logits, target).tolist() == [0, 2e4]
    assert wrong_logsumexp(logits, target).tolist() == [-1e4, 1e4]


# -- calibration


def confidences(n=1000):
    """Confidences of an overconfident classifier and whether it is right, with no confidence at the edge of a bin."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 0.999, n)
    return confidence, rng.random(n) < confidence**2


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("bins", [1, 7, 10])
def test_reliability_against_scikit_learn(bins, mass):
    confidence, correct = confidences()
    mean, accuracy, images = reliability(confidence, correct, bins, mass)
    if mass:
        assert images.sum() == 1000 and np.ptp(images) <= 1
        order = np.argsort(confidence)  # scikit-learn's quantiles put an image or two into the next bin
        parts = np.array_split(np.arange(1000), bins)
        true, predicted = [np.array([v[order][part].mean() for part in parts]) for v in (correct, confidence)]
    else:
        true, predicted = calibration_curve(correct, confidence, n_bins=bins)
    np.testing.assert_allclose(accuracy, 100 * true)
    np.testing.assert_allclose(mean, 100 * predicted)


def test_expected_calibration_error_by_hand():
    confidence, correct = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], [0, 1, 1, 1, 1, 0]
    # halves: (0.2, 0.4) with accuracy 1/2 and (0.6, 0.8, 1, 1) with 3/4, mean confidences 0.3 and 0.85
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx(100 * (2 * 0.2 + 4 * 0.1) / 6)
    # three images each: mean confidence 0.4 against 2/3, and 14/15 against 2/3
    expected = 100 * (2 / 3 - 0.4 + 14 / 15 - 2 / 3) / 2
    assert expected_calibration_error(confidence, correct, 2, mass=True) == pytest.approx(expected)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0
    assert expected_calibration_error([1.0, 0.0], [0, 1]) == 100  # both ends lie in a bin


def test_equal_mass_does_not_depend_on_the_order_of_ties():
    rng = np.random.default_rng(1)
    confidence = np.array([0.5] * 3 + [0.75] * 3 + [1.0] * 6)
    correct = np.array([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1])
    errors = set()
    for _ in range(10):
        shuffled = rng.permutation(12)
        errors.add(round(expected_calibration_error(confidence[shuffled], correct[shuffled], 5, mass=True), 9))
    # by hand, bins of 3, 3, 2, 2, 2 images: accuracies 1/3, 2/3 and three times 5/6
    assert errors == {round(100 * (3 * (1 / 2 - 1 / 3) + 3 * (3 / 4 - 2 / 3) + 6 * (1 - 5 / 6)) / 12, 9)}


def test_more_bins_than_images():
    for mass in (False, True):
        assert expected_calibration_error([0.3, 0.9], [0, 1], 15, mass) == pytest.approx(100 * (0.3 + 0.1) / 2)


def test_mcnemar_by_hand():
    # two fixed and none broken: both sides of a fair coin thrown twice, 2 * 1/4
    assert mcnemar([1, 1, 1, 0], [0, 0, 1, 0]) == (2, 0, 0.5)
    # five fixed, one broken: 2 * (1 + 6) / 64
    assert mcnemar([1] * 5 + [0], [0] * 5 + [1]) == (5, 1, pytest.approx(14 / 64))
    assert mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)


# -- temperature scaling and ensembles, computed a second time with NumPy and SciPy


def confident(classes, n, scale, seed=0):
    """float32 logits that are right in about half of the cases, and too sure or not sure enough by the scale."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n,), generator=g)
    z = torch.randn(n, classes, generator=g)
    z[torch.arange(n), target] += 1.5
    return scale * z + torch.randn(n, 1, generator=g), target


def binned_error(probabilities, target):
    """ECE by a loop over images and bins, in percent."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == target
    total = 0.0
    for i in range(15):
        inside = [k for k, c in enumerate(confidence) if i / 15 < c <= (i + 1) / 15]
        total += abs(sum(right[k] for k in inside) - sum(confidence[k] for k in inside))
    return 100 * total / len(target)


def mean_nll(z, target):
    return (logsumexp(z, axis=1) - z[np.arange(len(z)), target]).mean()


def searched(z, target):
    """The best temperature by a search over its logarithm."""
    found = minimize_scalar(
        lambda t: mean_nll(z / np.exp(t), target), bounds=(-2.9, 2.9), method="bounded", options={"xatol": 1e-12}
    )
    return np.exp(found.x)


@pytest.mark.parametrize("classes, n, scale", [(10, 500, 1.0), (100, 2001, 4.0), (10, 301, 0.3)])
def test_calibration_against_numpy_and_scipy(classes, n, scale):
    logits, target = confident(classes, n, scale)
    actual = calibration(logits, target)
    z, y = logits.double().numpy(), target.numpy()
    even, odd = searched(z[::2], y[::2]), searched(z[1::2], y[1::2])
    scaled = z / np.where(np.arange(n) % 2, even, odd)[:, None]  # the temperature of the other half
    assert actual["temperature"] == pytest.approx([even, odd], rel=1e-6)
    assert actual["nll_scaled"] == pytest.approx(mean_nll(scaled, y), rel=1e-6)
    assert actual["ece"] == pytest.approx(binned_error(softmax(z, axis=1), y), abs=1e-6)
    assert actual["ece_scaled"] == pytest.approx(binned_error(softmax(scaled, axis=1), y), abs=1e-6)
    assert ece(logits.double(), target) == actual["ece"]
    assert actual["nll_scaled"] < mean_nll(z, y)  # what it is for


def test_temperature_by_hand():
    """Two classes, logits (a, 0), right in three of four: p = 3/4 at a/T = log 3."""
    logits = torch.tensor([[5.0, 0.0]] * 4, dtype=torch.float64)
    target = torch.tensor([0, 0, 0, 1])
    assert best_temperature(logits, target) == pytest.approx(5 / math.log(3), rel=1e-9)
    # all right: the colder the better; worse than chance: the hotter the better
    assert best_temperature(logits, target * 0) == TEMPERATURES[0]
    assert best_temperature(logits, target * 0 + 1) == TEMPERATURES[1]


@pytest.mark.parametrize("count", [2, 3])
def test_ensemble_against_numpy_and_scipy(count):
    pairs = [confident(20, 400, 2.0 + c, seed=c) for c in range(count)]
    heads, target = [z for z, _ in pairs], pairs[0][1]
    actual, log_p = ensemble(heads, target)
    z, y = [head.double().numpy() for head in heads], target.numpy()
    each = [log_softmax(head, axis=1) for head in z]
    p = sum(np.exp(lp) for lp in each) / count
    np.testing.assert_allclose(log_p.exp().numpy(), p, rtol=1e-12)
    order = np.argsort(-p, axis=1)
    assert actual["top1"] == pytest.approx(100 * (order[:, 0] == y).mean())
    assert actual["top5"] == pytest.approx(100 * (order[:, :5] == y[:, None]).any(1).mean())
    assert actual["nll"] == pytest.approx(-np.log(p[np.arange(400), y]).mean(), rel=1e-6)
    assert actual["ece"] == pytest.approx(binned_error(p, y), abs=1e-6)
    half = [searched(np.log(p[i::2]), y[i::2]) for i in (0, 1)]
    scaled = np.log(p) / np.where(np.arange(400) % 2, *half)[:, None]
    assert actual["nll_scaled"] == pytest.approx(mean_nll(scaled, y), rel=1e-6)
    differ, kl = [], []
    for a in range(count):
        for b in range(count):
            if a != b:
                differ.append(100 * (z[a].argmax(1) != z[b].argmax(1)).mean())
                kl.append((np.exp(each[a]) * (each[a] - each[b])).sum(1).mean())
    assert actual["disagreement"] == pytest.approx(np.mean(differ), rel=1e-6)
    assert actual["divergence"] == pytest.approx(np.mean(kl), rel=1e-6)


def test_equal_networks_agree():
    logits, target = confident(10, 300, 2.0)
    actual, _ = ensemble([logits, logits], target)
    assert (actual["disagreement"], actual["divergence"]) == (0, 0)
    alone = summary(logits.double(), target) | calibration(logits, target)
    for name in ("top1", "top5", "nll", "ece", "nll_scaled"):
        assert actual[name] == pytest.approx(alone[name], rel=1e-9)
    assert metrics.disagreement([target, target, (target + 1) % 10]) == pytest.approx(200 / 3)
