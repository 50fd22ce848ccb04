"""Metrics against scikit-learn's, and against loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score

from silalib.metrics import cross_entropy, in_top_k, summary, wrong_logsumexp


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
