"""The losses of "Siamese Labels Auxiliary Learning" (arXiv 2103.00200); this module needs torch alone.

Every loss takes the logits of C heads (C networks, or the C exits of one network) as a list of tensors (B, N), and one
target (B,) of class indices. With z_c (N,) the logits of head c for one sample, s_c = logsumexp(z_c) its log-partition
(the negative free energy) and S = logsumexp(s_1 .. s_C), the cross-entropy over the C*N siamese labels (equations 8 and
9) is S - z_c[y], so one logsumexp serves all C terms and the concatenation of equation 9 is never built:

    L_sila = sum_c beta_c (S   - z_c[y])       equation 10
    L_ind  = sum_c beta_c (s_c - z_c[y])       independent training
    L_sila - L_ind = sum_c beta_c (S - s_c)    the coupling: a peer enters through its s alone

Half-precision logits are computed in float32: in bfloat16 the gradient is off by several percent.
"""

import math
from itertools import permutations

import torch
import torch.nn.functional as F


def siamese_labels(logits, target, betas=None, coupling=1.0, reduction="mean"):
    """The SiLa loss, equations 8 to 11: sum over heads of beta_c times the siamese cross-entropy.

    logits: sequence of C tensors (B, N), C >= 1; the gradient flows into every one, nothing is detached.
    target: (B,) class indices, 0 to N-1.
    betas: C weights, 1 each by default.
    coupling: weight of the coupling beside the independent terms; 1 is SiLa, 0 independent training.
    reduction: "mean" or "sum" over the batch, or "none" for shape (B,).
    Raises ValueError for an empty list, shapes that differ, a wrong number of betas, an unknown reduction."""
    logits = _checked(logits, target)
    s = torch.stack([z.logsumexp(1) for z in logits])
    truth = torch.stack([z.gather(1, target[:, None])[:, 0] for z in logits])
    # At coupling 0 lerp returns s itself, so `independent` is this very computation, to the last bit.
    losses = torch.lerp(s, s.logsumexp(0, keepdim=True), float(coupling)) - truth
    return _reduced(_weighted(losses, betas), reduction)


def independent(logits, target, betas=None, reduction="mean"):
    """IND: sum over heads of beta_c times the ordinary cross-entropy (equation 1). Arguments as in `siamese_labels`."""
    return siamese_labels(logits, target, betas, coupling=0.0, reduction=reduction)


def mutual_kl(logits, temperature=1.0, reduction="mean"):
    """The mimicry term of DML: sum over heads c of the mean over peers k of KL(p_k || p_c), p = softmax(z/temperature).

    The peer p_k is a fixed target (detached), so head c is pulled towards its peers and never pulls them.
    Scaled by temperature squared, which keeps the gradient's size. Zhang et al., Deep Mutual Learning, 2018.
    Shapes and reduction as in `siamese_labels`. Raises ValueError for fewer than two heads."""
    logits = _checked(logits)
    if len(logits) < 2:
        raise ValueError("mutual learning needs at least two heads")
    log_p = [F.log_softmax(z / temperature, 1) for z in logits]
    targets = [lp.detach() for lp in log_p]
    pairs = permutations(range(len(logits)), 2)
    kl = sum(F.kl_div(log_p[c], targets[k], reduction="none", log_target=True).sum(1) for c, k in pairs)
    return _reduced(kl * (temperature**2 / (len(logits) - 1)), reduction)


def mutual_learning(logits, target, betas=None, reduction="mean"):
    """DML: independent training plus the mimicry term."""
    logits = _checked(logits, target)
    return independent(logits, target, betas, reduction) + mutual_kl(logits, reduction=reduction)


def siamese_mutual_learning(logits, target, betas=None, coupling=1.0, reduction="mean"):
    """SiLa+DML: the SiLa loss plus the mimicry term; cross-entropy is not counted twice."""
    logits = _checked(logits, target)
    return siamese_labels(logits, target, betas, coupling, reduction) + mutual_kl(logits, reduction=reduction)


def zero_peer(logits, target, betas=None, reduction="mean"):
    """A control that is not in the paper: every head has a constant peer instead of the other heads.

    The peer's logits are all -log N, so its s is 0 and its own cross-entropy, taken off, is log N. What is left for
    head c is CE(z_c, y) + 2 log(2 cosh(s_c / 2)): the coupling alone. Arguments as in `siamese_labels`."""
    logits = _checked(logits, target)
    entropy = math.log(logits[0].shape[1])
    alone = [siamese_labels([z, torch.full_like(z, -entropy)], target, reduction="none") - entropy for z in logits]
    return _reduced(_weighted(torch.stack(alone), betas), reduction)


def mean_peer(logits, target, betas=None, reduction="mean"):
    """A control that is not in the paper: every head's peer is a constant, the mean of the head's own s over the batch.

    For head c it is CE(z_c, y) + 2 log(2 cosh((s_c - mean(s_c)) / 2)) - 2 log 2, the mean detached: the head is pulled
    towards its own level, by `zero_peer` to 0. Arguments as in `siamese_labels`."""
    logits = _checked(logits, target)
    alone = []
    for z in logits:
        s = z.logsumexp(1)
        d = s - s.mean().detach()
        # 2 log(2 cosh(d / 2)) without overflow
        coupling = F.softplus(d) + F.softplus(-d) - 2 * math.log(2)
        alone.append(independent([z], target, reduction="none") + coupling)
    return _reduced(_weighted(torch.stack(alone), betas), reduction)


METHODS = {
    "ind": independent,
    "sila": siamese_labels,
    "dml": mutual_learning,
    "sila+dml": siamese_mutual_learning,
    "zero-peer": zero_peer,
    "mean-peer": mean_peer,
}
"""Method name -> loss(logits, target, betas=None, reduction="mean")."""

LABELS = {"ind": "IND", "sila": "SiLa", "dml": "DML", "sila+dml": "SiLa+DML"}
LABELS |= {"zero-peer": "zero peer", "mean-peer": "mean peer"}
"""Method name -> how it is called in tables and figures: the paper's methods as the paper spells them, then ours."""

PAPER_METHODS = ("ind", "sila", "dml", "sila+dml")
"""The rows of Tables 1 to 3, in the paper's order."""


class SiameseLabelsLoss(torch.nn.Module):
    """`siamese_labels` as a module: `SiameseLabelsLoss()([net1(x), net2(x)], y)`."""

    def __init__(self, betas=None, coupling=1.0, reduction="mean"):
        super().__init__()
        self.betas, self.coupling, self.reduction = betas, coupling, reduction

    def forward(self, logits, target):
        return siamese_labels(logits, target, self.betas, self.coupling, self.reduction)


def _checked(logits, target=None):
    """The logits as a list of float tensors of one shape (B, N), float32 at least."""
    logits = [] if torch.is_tensor(logits) and logits.dim() < 3 else list(logits)
    if not logits:
        raise ValueError("no logits: give a list with one tensor (batch, classes) per head")
    shapes = [tuple(z.shape) for z in logits]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"logits of shapes {shapes}: every head needs the same (batch, classes)")
    if target is not None and tuple(target.shape) != shapes[0][:1]:
        raise ValueError(f"target of shape {tuple(target.shape)} for logits {shapes[0]}: one class index per sample")
    if target is not None and target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target of {target.dtype}: give class indices as torch.int64")
    return [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in logits]


def _weighted(losses, betas):
    """The sum over heads of beta_c times the losses (C, B) of head c."""
    if betas is not None:
        if len(betas) != len(losses):
            raise ValueError(f"{len(betas)} betas for {len(losses)} heads: give one weight per head")
        losses = torch.stack([beta * loss for beta, loss in zip(betas, losses)])
    return losses.sum(0)


def _reduced(losses, reduction):
    if reduction == "none":
        return losses
    if reduction in ("mean", "sum"):
        return getattr(losses, reduction)()
    raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
