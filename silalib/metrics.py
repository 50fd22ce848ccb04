"""Metrics of one head's logits (n, N) against targets (n,)."""

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
    top = {f"top{k}": 100 * in_top_k(logits, target, k).double().mean().item() for k in (1, 2, 5)}
    return {"nll": cross_entropy(logits, target).double().mean().item(), **top}
