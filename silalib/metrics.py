"""Metrics of one head's logits (n, N) against targets (n,), and of what test.npz keeps of them (NumPy, shape (n,))."""

import math
from itertools import combinations, permutations

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


TEMPERATURES = (0.05, 20.0)
"""The range in which a temperature is sought: where all images are right, a smaller one is always better."""


def best_temperature(logits, target):
    """The T that minimises the mean NLL of logits / T, within TEMPERATURES (Guo et al. 2017, equation 9).

    logits: (n, N), float64. The mean NLL is convex in 1/T, with the derivative E[z] - z_y; T is where it is 0.
    """
    from scipy.optimize import brentq

    z_y = logits.gather(1, target[:, None])[:, 0].mean()
    slope = lambda log_t: ((logits * (logits / math.exp(log_t)).softmax(1)).sum(1).mean() - z_y).item()
    coldest, hottest = map(math.log, TEMPERATURES)
    if slope(coldest) <= 0:  # with every colder one the NLL is lower still
        return TEMPERATURES[0]
    if slope(hottest) >= 0:
        return TEMPERATURES[1]
    return math.exp(brentq(slope, coldest, hottest, xtol=1e-12))


def ece(logits, target):
    """Expected calibration error in percent, 15 bins of equal width (Guo et al. 2017, equation 3)."""
    confidence, predicted = logits.softmax(1).max(1)
    return expected_calibration_error(confidence.cpu().numpy(), (predicted == target).cpu().numpy())


def calibration(logits, target):
    """How far confidence is off, before and after temperature scaling: {"ece", "temperature", "nll_scaled",
    "ece_scaled"}, in percent and nats.

    logits: (n, N). The temperature is cross-fitted: that of the even-numbered images is applied to the odd ones and
    the other way round; both scaled figures are over all images. "temperature" is [of the even, of the odd].
    """
    logits, target = logits.double().cpu(), target.cpu()
    halves = slice(0, None, 2), slice(1, None, 2)
    temperatures = [best_temperature(logits[half], target[half]) for half in halves]
    scaled = torch.empty_like(logits)
    for half, temperature in zip(halves, reversed(temperatures)):
        scaled[half] = logits[half] / temperature
    return {
        "ece": ece(logits, target),
        "temperature": temperatures,
        "nll_scaled": cross_entropy(scaled, target).mean().item(),
        "ece_scaled": ece(scaled, target),
    }


def ensemble(heads, target):
    """Several networks together: (their metrics, log p), with p = mean over the networks of softmax(z_c).

    heads: C >= 2 logits (n, N). The metrics are top1, top5, nll, ece and nll_scaled of p, whose log takes the place
    of logits; disagreement, the percentage of images to which two networks give different classes, mean over pairs;
    and divergence, the mean KL(p_c || p_k) over images and ordered pairs, in nats. log p is (n, N), float64.
    """
    target = target.cpu()
    each = torch.stack([z.double().cpu().log_softmax(1) for z in heads])
    together = each.logsumexp(0) - math.log(len(heads))
    entropy = (each.exp() * each).sum(2)
    kl = [(entropy[c] - (each[c].exp() * each[k]).sum(1)).mean().item() for c, k in permutations(range(len(heads)), 2)]
    found, scaled = summary(together, target), calibration(together, target)
    values = {name: found[name] for name in ("top1", "top5", "nll")} | {
        "ece": scaled["ece"],
        "nll_scaled": scaled["nll_scaled"],
        "disagreement": disagreement([z.argmax(1) for z in heads]),
        "divergence": sum(kl) / len(kl),
    }
    return values, together


def disagreement(predicted):
    """The percentage of images to which two networks give different classes, mean over pairs; predicted: C of (n,)."""
    differ = [(a != b).double().mean().item() for a, b in combinations(predicted, 2)]
    return 100 * sum(differ) / len(differ)


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
