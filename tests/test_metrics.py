"""Metrics against scikit-learn's, and against loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, top_k_accuracy_score

from silalib.metrics import (
    compare,
    cross_entropy,
    expected_calibration_error,
    in_top_k,
    reliability,
    summary,
    wrong_logsumexp,
)


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


def test_compare_by_hand():
    # two fixed and none broken: both sides of a fair coin thrown twice, 2 * 1/4
    assert compare([1, 1, 1, 0], [0, 0, 1, 0]) == (2, 0, 0.5)
    # five fixed, one broken: 2 * (1 + 6) / 64
    assert compare([1] * 5 + [0], [0] * 5 + [1]) == (5, 1, pytest.approx(14 / 64))
    assert compare([1, 0], [1, 0]) == (0, 0, 1.0)
