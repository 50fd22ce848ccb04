"""Metrics of one head's logits (n, N) against targets (n,), and of what test.npz keeps of them (NumPy, shape (n,))."""

import numpy as np
import torch


def cross_entropy(logits, target):
    """Negative log-likelihood of each sample, shape (n,), in nats."""
    return logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]


def in_top_k(logits, target, k):
    """Whether the truth is among the k largest logits, shape (n,); always so when k reaches the number of classes."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == target[:, None]).any(1)


def wrong_logsumexp(logits, target):
    """alpha of equation 4: the log-sum-exp over the wrong classes, shape (n,)."""
    return logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)


def summary(logits, target):
    """NLL in nats, top-1, top-2 and top-5 accuracy in percent, as floats."""
    return summaries([logits], target)[0]


def summaries(heads, target):
    """The `summary` of each head's logits (n, N), brought from their device at once."""
    names, values = ("nll", "top1", "top2", "top5"), []
    for z in heads:
        top = [100 * in_top_k(z, target, k).double().mean() for k in (1, 2, 5)]
        values.append(torch.stack([cross_entropy(z, target).double().mean(), *top]))
    return [dict(zip(names, row)) for row in torch.stack(values).tolist()]


def reliability(confidence, correct, bins=15, mass=False):
    """The reliability diagram: (mean confidence in percent, accuracy in percent, images) of each bin that holds any.

    confidence: largest probability of each image; correct: whether its class is the truth. Bins of equal width over
    [0, 1], closed on the right, or, with `mass`, of an equal number of images (up to one) in the order of confidence;
    images of the same confidence then share their mean accuracy, so that the order of the images does not matter.
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if mass:
        order = np.argsort(confidence, kind="stable")
        _, same, count = np.unique(confidence, return_inverse=True, return_counts=True)
        correct = (np.bincount(same, correct) / count)[same]
        groups = np.array_split(order, min(bins, len(order)))
    else:
        at = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
        groups = [np.flatnonzero(at == i) for i in range(bins)]
    rows = [(100 * confidence[g].mean(), 100 * correct[g].mean(), len(g)) for g in groups if len(g)]
    return tuple(np.array(rows).reshape(-1, 3).T)


def expected_calibration_error(confidence, correct, bins=15, mass=False):
    """ECE in percent: mean over images of |accuracy - mean confidence| of their bin; arguments as in `reliability`."""
    mean, accuracy, images = reliability(confidence, correct, bins, mass)
    return float((np.abs(accuracy - mean) * images).sum() / images.sum())


def compare(correct, baseline):
    """Image by image against a baseline: (fixed, broken, p) with p of McNemar's exact two-sided test.

    correct, baseline: whether each network is right, shape (n,). fixed: images that only the first has right; broken:
    those that only the baseline has right. Without either, p is 1.
    """
    from scipy.stats import binomtest

    correct, baseline = np.asarray(correct, bool), np.asarray(baseline, bool)
    fixed, broken = int((correct & ~baseline).sum()), int((baseline & ~correct).sum())
    return fixed, broken, float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
