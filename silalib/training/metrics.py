"""Metrics of one head's logits (n, N) against targets (n,), and of what test.npz keeps of them (NumPy, shape (n,))."""

import math
from itertools import combinations, permutations

import numpy as np
import torch

from ..models import EXITS

TEMPERATURES = (0.05, 20.0)  # of scaling: where all images are right, a smaller one is always better
STATISTICS = ("train_nll", "train_top1", "z_y", "alpha", "s", "gap", "equation5", "gradient", "offset")
"""Columns of history.csv that are means over an epoch's augmented training batches; see `statistics`."""


def cross_entropy(logits, target):
    """Negative log-likelihood of each sample, shape (n,), in nats."""
    return logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]


def in_top_k(logits, target, k):
    """Whether the truth is among the k largest logits, shape (n,); always so when k reaches the number of classes."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == target[:, None]).any(1)


def wrong_logsumexp(logits, target):
    """alpha of equation 4: the log-sum-exp over the wrong classes, shape (n,)."""
    return logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)


def summaries(heads, target):
    """Of each head's logits (n, N): NLL in nats, top-1, top-2 and top-5 accuracy in percent; asked at once."""
    mean = lambda values: values.double().mean()
    rows = [[mean(cross_entropy(z, target)), *(100 * mean(in_top_k(z, target, k)) for k in (1, 2, 5))] for z in heads]
    values = torch.stack([torch.stack(row) for row in rows]).tolist()
    return [dict(zip(("nll", "top1", "top2", "top5"), row)) for row in values]


def best_temperature(logits, target):
    """The T in TEMPERATURES that minimises the mean NLL of logits / T (Guo et al. 2017, equation 9).
    logits: (n, N), float64. The mean NLL is convex in 1/T, with the derivative E[z] - z_y; T is where it is 0."""
    z_y = logits.gather(1, target[:, None])[:, 0].mean()
    slope = lambda log_t: ((logits * (logits / math.exp(log_t)).softmax(1)).sum(1).mean() - z_y).item()
    coldest, hottest = map(math.log, TEMPERATURES)
    if slope(coldest) <= 0:  # with every colder one the NLL is lower still
        return TEMPERATURES[0]
    from scipy.optimize import brentq  # a third of a second, in every process

    return TEMPERATURES[1] if slope(hottest) >= 0 else math.exp(brentq(slope, coldest, hottest, xtol=1e-12))


def ece(logits, target):
    """Expected calibration error in percent, 15 bins of equal width (Guo et al. 2017, equation 3)."""
    confidence, predicted = logits.softmax(1).max(1)
    return expected_calibration_error(confidence.cpu().numpy(), (predicted == target).cpu().numpy())


def calibration(logits, target):
    """How far confidence is off, before and after temperature scaling: ece, ece_scaled in percent, nll_scaled in nats.
    logits: (n, N). "temperature" is [of the even-numbered images, of the odd ones]; each scales the others."""
    logits, target = logits.double().cpu(), target.cpu()
    temperatures, scaled = [best_temperature(logits[half::2], target[half::2]) for half in (0, 1)], logits.clone()
    for half in (0, 1):
        scaled[half::2] /= temperatures[1 - half]
    found = {"ece": ece(logits, target), "temperature": temperatures}
    return found | {"nll_scaled": cross_entropy(scaled, target).mean().item(), "ece_scaled": ece(scaled, target)}


def ensemble(heads, target):
    """Several networks together: (their metrics, log p (n, N) in float64), p the mean over networks of softmax(z_c).
    heads: C >= 2 logits (n, N). The metrics are top1, top5, nll, ece and nll_scaled of log p in the place of logits,
    `disagreement`, and divergence, the mean KL(p_c || p_k) over images and ordered pairs, in nats."""
    target = target.cpu()
    each = torch.stack([z.double().cpu().log_softmax(1) for z in heads])
    together = each.logsumexp(0) - math.log(len(heads))
    kl = [((own.exp() * own).sum(1) - (own.exp() * peer).sum(1)).mean().item() for own, peer in permutations(each, 2)]
    found = summaries([together], target)[0] | calibration(together, target)
    found |= {"disagreement": disagreement([z.argmax(1) for z in heads]), "divergence": sum(kl) / len(kl)}
    return {k: found[k] for k in ("top1", "top5", "nll", "ece", "nll_scaled", "disagreement", "divergence")}, together


def disagreement(predicted):
    """The percentage of images to which two networks give different classes, mean over pairs; predicted: C of (n,)."""
    differ = [(a != b).double().mean().item() for a, b in combinations(predicted, 2)]
    return 100 * sum(differ) / len(differ)


def reliability(confidence, correct, bins=15, mass=False):
    """The reliability diagram: (mean confidence in percent, accuracy in percent, images) of each bin that holds any.
    confidence: largest probability of each image; correct: whether its class is the truth. Bins are of equal width over
    [0, 1], closed on the right, or with `mass` of an equal number of images in the order of confidence."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if mass:
        _, same, count = np.unique(confidence, return_inverse=True, return_counts=True)
        correct = (np.bincount(same, correct) / count)[same]  # those of one confidence share it: their order is chance
        groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    else:
        at = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
        groups = [np.flatnonzero(at == i) for i in range(bins)]
    rows = [(100 * confidence[g].mean(), 100 * correct[g].mean(), len(g)) for g in groups if len(g)]
    return tuple(np.array(rows).reshape(-1, 3).T)


def expected_calibration_error(confidence, correct, bins=15, mass=False):
    """ECE in percent: mean over images of |accuracy - mean confidence| of their bin; arguments as in `reliability`."""
    mean, accuracy, images = reliability(confidence, correct, bins, mass)
    return float((np.abs(accuracy - mean) * images).sum() / images.sum())


def statistics(logits, gradients, target):
    """One row of means over a batch, float64 (C, 9), in the order of STATISTICS, per head; gradient None leaves it out.
    NLL and top-1 of the head alone; z_y, alpha (equation 4), s and mean |s_c - s_k| to the peers (NaN without one);
    1 - p_y of equation 5; |dL/dz_y| of the loss that is trained, per sample; and the mean of z over the classes."""
    batch = len(target)
    s = torch.cat(logits).logsumexp(1).view(-1, batch)  # all heads at once: few operations, whatever their number
    own = [c for c, gradient in enumerate(gradients) if gradient is not None]
    z, gradient = (torch.cat([values[c] for c in own]) for values in (logits, gradients))
    target = target.repeat(len(own))
    z_y = z.gather(1, target[:, None])[:, 0]
    s_own = torch.stack([s[c] for c in own])
    gap = (s - s_own[:, None]).abs().sum(1) / (len(s) - 1)  # 0/0 without a peer
    nll = s_own.flatten() - z_y
    top1, alpha, dz_y = 100 * in_top_k(z, target, 1), wrong_logsumexp(z, target), gradient.gather(1, target[:, None])
    rows = [nll, top1, z_y, alpha, s_own, gap, -torch.expm1(-nll), dz_y[:, 0].abs() * batch, z.mean(1)]
    return torch.stack([row.view(len(own), batch).double().mean(1) for row in rows], 1)


def per_image(logits, target, network):
    """What test.npz keeps of one head, in half precision but for an exit's confidence, in which images must not tie."""
    log_p = logits.log_softmax(1)
    largest, predicted = log_p.max(1)
    arrays = {"log_probability": log_p.gather(1, target[:, None])[:, 0].half()}
    arrays["confidence"] = largest.exp() if network in EXITS else largest.exp().half()
    arrays |= {"predicted": predicted.short(), "top5": in_top_k(logits, target, 5)}
    arrays |= {"s": logits.logsumexp(1).half(), "offset": logits.mean(1).half()}
    return {k: v.cpu().numpy() for k, v in arrays.items()}
