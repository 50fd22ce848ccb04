"""Early exit: what each exit costs, anytime prediction, budgeted batch classification, and inference that stops early.

A sample leaves at the first exit whose confidence, its largest softmax probability, reaches that exit's threshold; the
last takes the rest. Thresholds come from images held out of the training set. Exits count from 0, costs are MACs."""

import timeit
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from torch import nn

from .errors import UserError
from .models import macs_by_layer
from .models.msdnet import MSDNet

SWEEP = np.geomspace(1 / 20, 20, 41).tolist()  # q: from nearly every sample at the first exit to all at the last


def exit_costs(network, image, budgeted=False):
    """Multiply-accumulates (MACs) of every exit for an image of shape (C, H, W), as a list; one without exits.
    Exit k needs blocks 0..k and classifier k; budgeted: classifiers 0..k, each is asked whether the image may leave."""
    macs = macs_by_layer(network, image)
    if not isinstance(network, MSDNet):
        return [sum(macs.values())]
    part = lambda prefix: sum(n for layer, n in macs.items() if layer.startswith(prefix))
    blocks, classifiers = ([part(f"{of}.{k}.") for k in range(len(network.blocks))] for of in ("blocks", "classifiers"))
    return [b + c for b, c in zip(accumulate(blocks), accumulate(classifiers) if budgeted else classifiers)]


def anytime(record):
    """Anytime prediction (Figure 5): a data frame with a row per exit: exit, macs, top1, top5 (percent), nll."""
    return pd.DataFrame(record.heads, columns=["macs", "top1", "top5", "nll"]).rename_axis("exit").reset_index()


def exit_distribution(q, exits):
    """The share of samples that leaves at each exit, proportional to q^k; shape (exits,). UserError unless q > 0."""
    if not 0 < q < np.inf:
        raise UserError(f"q must be a number above 0, not {q}")
    powers = np.arange(exits) * np.log(q)
    shares = np.exp(powers - powers.max())
    return shares / shares.sum()


def distribution_for(budget, costs):
    """The `exit_distribution` (C,) whose average cost is the budget, in MACs an image; above the last exit's cost every
    sample goes to the last exit. Raises UserError for a budget below the first exit's cost."""
    costs = np.asarray(costs, float)
    if not budget >= costs[0]:
        raise UserError(f"a budget of {budget:g} MACs an image is below the first exit's cost, {costs[0]:g}")
    excess = lambda log_q: exit_distribution(np.exp(log_q), len(costs)) @ costs - budget
    if excess(40) <= 0 or excess(-40) >= 0:  # where all samples are at one end, up to rounding
        return np.eye(len(costs))[-1 if excess(40) <= 0 else 0]
    from scipy.optimize import brentq  # a third of a second, in every process

    return exit_distribution(np.exp(brentq(excess, -40, 40, xtol=1e-12)), len(costs))


def thresholds(confidence, shares):
    """Thresholds (C,) at which the samples of confidence (C, n) leave in the given shares (C,), up to ties.
    Samples with equal confidence leave together; the next exits then let fewer go. An exit where nobody should leave
    has the threshold infinity, the last one minus infinity. Raises ValueError for shares that do not add up to 1."""
    exits, n = confidence.shape
    if len(shares) != exits or not np.isclose(np.sum(shares), 1) or np.min(shares) < 0:
        raise ValueError(f"shares {shares}: give one for each of {exits} exits, none negative, which add up to 1")
    chosen, waiting = np.array([np.inf] * (exits - 1) + [-np.inf]), np.ones(n, bool)
    for k, target in enumerate(np.rint(n * np.cumsum(shares)).astype(int)[:-1]):
        here = confidence[k, waiting]
        leave = target - (n - len(here))
        if leave > 0:
            chosen[k] = np.partition(here, -leave)[-leave]
            waiting &= confidence[k] < chosen[k]
    return chosen


def exit_index(confidence, limits):
    """The exit (n,) at which each sample leaves, for confidence (C, n) and thresholds (C,)."""
    reached = confidence >= np.asarray(limits)[:, None]
    reached[-1] = True
    return reached.argmax(0)


def evaluate(confidence, correct, limits, costs):
    """What thresholds (C,) give on samples of confidence and correctness (C, n), with the exits' budgeted costs (C,):
    top1 in percent, macs (the mean cost) and shares (C,) that left at each exit. Raises UserError without samples."""
    if not confidence.shape[1]:
        raise UserError("there are no samples to evaluate: give at least one")
    exits = exit_index(confidence, limits)
    shares = np.bincount(exits, minlength=len(costs)) / len(exits)
    top1 = 100 * float(correct[exits, np.arange(len(exits))].mean())
    return {"top1": top1, "macs": float(shares @ np.asarray(costs, float)), "shares": shares}


def exit_predictions(record, split):
    """(confidence, predicted, labels) of a record's "test" or "calibration" images; (C, n), (C, n), (n,).
    Raises UserError where the run held no images out, and where the predictions of each image were not kept."""
    _check_held_out(record)
    return _predictions(record.test, "calibration_" if split == "calibration" else "", len(record.heads))


def _predictions(arrays, prefix, exits):
    stacked = (np.stack([arrays[f"{prefix}{name}_{k}"] for k in range(exits)]) for name in ("confidence", "predicted"))
    return *stacked, arrays[f"{prefix}labels"]


def sweep(arrays, costs):
    """The rows of budgeted.csv, from the arrays of test.npz: of each q macs, top1, a threshold and a share per exit."""
    held_out, *_ = _predictions(arrays, "calibration_", len(costs))
    confidence, predicted, labels = _predictions(arrays, "", len(costs))
    for q in SWEEP:
        limits = thresholds(held_out, exit_distribution(q, len(costs)))
        found = evaluate(confidence, predicted == labels, limits, costs)
        row = {"q": q, "macs": found["macs"], "top1": found["top1"]}
        row |= {f"threshold_{k}": float(limit) for k, limit in enumerate(limits)}
        yield row | {f"share_{k}": float(share) for k, share in enumerate(found["shares"])}


def budgeted(record):
    """Budgeted batch classification (Figure 4): a data frame with a row for each q of the sweep.
    Columns: q; macs and top1 (percent) of the test images; thresholds, chosen on the images held out, and shares of the
    test images, lists with an entry per exit. Raises UserError where the run held no images out."""
    _check_held_out(record)
    table = record.budgeted
    listed = lambda name: table[[f"{name}_{k}" for k in range(len(record.heads))]].to_numpy().tolist()
    return table[["q", "macs", "top1"]].assign(thresholds=listed("threshold"), shares=listed("share"))


def _check_held_out(record):
    if not record.run.holdout:
        raise UserError(f"{record.run} held no images out to choose thresholds from: train it with holdout above 0")


def truncated_msdnet(model, exit):
    """An MSDNet that ends at one exit, as a function: images -> its logits (B, N); for a budget known before.
    model: an MSDNet, or what `load_network` gives. Raises UserError for an exit that it does not have."""
    before, network = _parts(model.eval())
    if not 0 <= exit < len(network.blocks):
        raise UserError(f"exit {exit}: this network has exits 0 to {len(network.blocks) - 1}")
    blocks = nn.Sequential(before, *network.blocks[: exit + 1])
    return torch.no_grad()(lambda images: network.classifiers[exit](blocks(images)[-1]))


class EarlyExit(nn.Module):
    """An MSDNet that computes no further than it must: images (B, ...) -> (logits (B, N), exit (B,)), in their order.
    model: an MSDNet, or what `load_network` gives. thresholds: one per exit. After every exit the samples whose
    confidence reaches its threshold leave; only the others enter the next block."""

    def __init__(self, model, thresholds):
        super().__init__()
        self.before, self.network = _parts(model)
        self.thresholds = [float(t) for t in thresholds]
        if len(self.thresholds) != len(self.network.blocks):
            raise ValueError(f"{len(self.thresholds)} thresholds for {len(self.network.blocks)} exits: give one each")
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        features = self.before(images)
        waiting = torch.arange(len(images), device=features.device)
        exits, logits = torch.full_like(waiting, len(self.thresholds) - 1), None
        for k, threshold in enumerate(self.thresholds):
            features = self.network.blocks[k](features)
            z = self.network.classifiers[k](features[-1])
            logits = z if logits is None else logits.index_copy_(0, waiting, z)
            leave = z.log_softmax(1).amax(1).exp() >= threshold  # not so for NaN
            exits[waiting[leave]] = k
            if leave.all():
                break
            if leave.any():
                features, waiting = [f[~leave] for f in features], waiting[~leave]
        return logits, exits


def _parts(model):  # what comes before the network, and the MSDNet
    *before, network = model if isinstance(model, nn.Sequential) else [model]
    if not isinstance(network, MSDNet):
        raise UserError(f"early exit needs an MSDNet, not {type(network).__name__}")
    return nn.Sequential(*before), network


def milliseconds(model, images, batch_size, repeats=3):
    """Measured milliseconds an image of model(batch) over all images, here and now: the fastest of some repeats."""
    from torch.utils import benchmark

    batches = images.split(batch_size)
    work = lambda: [model(batch) for batch in batches]
    with torch.no_grad():
        model(batches[0])  # warms up; the clock waits for a GPU
        return 1000 * min(timeit.repeat(work, timer=benchmark.timer, number=1, repeat=repeats)) / len(images)
