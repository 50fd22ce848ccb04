"""The losses of "Siamese Labels Auxiliary Learning" (arXiv 2103.00200); this module needs torch alone.

Every loss takes the logits of C heads (C networks, or the C exits of one network) as a list of tensors (B, N), and one
target (B,) of class indices. With z_c (N,) the logits of head c for one sample, s_c = logsumexp(z_c) its log-partition
(the negative free energy) and S = logsumexp(s_1 .. s_C), the cross-entropy over the C*N siamese labels (equations 8 and
9) is S - z_c[y], so one logsumexp serves all C terms and the concatenation of equation 9 is never built:

    L_sila = sum_c beta_c (S   - z_c[y])       equation 10
    L_ind  = sum_c beta_c (s_c - z_c[y])       independent training
    L_sila - L_ind = sum_c beta_c (S - s_c)    the coupling: a peer enters through its s alone

With class weights, label smoothing or soft labels, z_c[y] becomes <q, z_c> and S becomes m S: q (N,) is the target of
the sample and m = sum(q). Half-precision logits are computed in float32: in bfloat16 the gradient is off by percents.
"""

import math
from contextlib import suppress

import torch
import torch.nn.functional as F


def siamese_labels(logits, target, *, betas=None, coupling=1.0, weight=None, ignore_index=-100, label_smoothing=0.0,
                   reduction="mean"):  # fmt: skip
    """The SiLa loss, equations 8 to 11: sum over heads of beta_c times the siamese cross-entropy.
    logits: sequence of C >= 1 tensors (B, N) or (B, N, d1, ..), or these stacked; (N,) for one sample, as under vmap.
    target: class indices (B,) or (B, d1, ..), integers 0 to N-1; or soft labels, floats of the shape of a head.
    betas: C weights of the heads, 1 each by default. The gradient flows into every head, nothing is detached.
    coupling: weight of the coupling beside the independent terms; 1 is SiLa, 0 independent training. A tensor keeps
        its gradient, the coupling itself: it is positive, so a coupling trained with this loss falls without end.
    weight (N,), ignore_index, label_smoothing, reduction ("mean", "sum" or "none"): as in F.cross_entropy, in every
        head. The mean divides by the sum of weight[target] over positions kept, for soft labels by all positions.
    Raises ValueError for shapes that do not fit together, and on a CPU for a label out of range."""
    q = _Target(logits, target, betas, weight, ignore_index, label_smoothing, reduction)
    return q.weighted(_siamese(q, q.logits, coupling))


def _siamese(q, logits, coupling=1.0):
    """The terms of equation 10 before their weights, (C, B, 1, ..). At coupling 0, lerp returns s itself: IND."""
    s = torch.stack([z.logsumexp(q.dim, keepdim=True) for z in logits])
    S = s.logsumexp(0, keepdim=True)
    coupling = coupling.to(s) if torch.is_tensor(coupling) else float(coupling)
    return q.m * torch.lerp(s, S, coupling) - q.dot(logits)


def independent(logits, target, **options):
    """IND: sum over heads of beta_c times the ordinary cross-entropy (equation 1). All as in `siamese_labels`."""
    return siamese_labels(logits, target, coupling=0.0, **options)


def mutual_kl(logits, temperature=1.0, reduction="mean", *, target=None, ignore_index=-100):
    """The mimicry term of DML: sum over heads c of the mean over peers k of KL(p_k || p_c), p = softmax(z/temperature).
    The peer p_k is a fixed target (detached): head c never pulls it. The factor temperature squared keeps the
    gradient's size. Zhang et al., Deep Mutual Learning, 2018. target: class indices, by which positions labelled
    ignore_index are left out. Shapes and reduction as in `siamese_labels`. ValueError for fewer than two heads."""
    q = _Target(logits, target, ignore_index=ignore_index, reduction=reduction)
    if len(q.logits) < 2:
        raise ValueError("mutual learning needs at least two heads")
    log_p = [F.log_softmax(z / temperature, q.dim) for z in q.logits]
    pairs = [(own, peer.detach()) for own in log_p for peer in log_p if peer is not own]
    kl = sum((peer.exp() * (peer - own)).sum(q.dim, keepdim=True) for own, peer in pairs)
    return q.reduced(kl * (temperature**2 / (len(log_p) - 1)), q.kept, q.reduction)


def mutual_learning(logits, target, **options):
    """DML: independent training plus the mimicry term. All as in `siamese_mutual_learning`."""
    return siamese_mutual_learning(logits, target, coupling=0.0, **options)


def siamese_mutual_learning(logits, target, *, coupling=1.0, ignore_index=-100, **options):
    """SiLa+DML: the SiLa loss plus the mimicry term; cross-entropy is not counted twice.
    All as in `siamese_labels`. The mimicry term has no class weight and no smoothing; it leaves out ignored labels."""
    q = _Target(logits, target, ignore_index=ignore_index, **options)
    siamese = q.weighted(_siamese(q, q.logits, coupling))
    return siamese + mutual_kl(q.logits, reduction=q.reduction, target=target, ignore_index=ignore_index)


def zero_peer(logits, target, **options):
    """A control that is not in the paper: every head has a constant peer, all logits -log N and so s = 0, instead of
    the others. Without that peer's cross-entropy it is CE(z_c, y) + 2 log(2 cosh(s_c / 2)). All as in `independent`."""
    q = _Target(logits, target, **options)
    entropy = math.log(q.logits[0].shape[q.dim])
    peer = torch.full_like(q.logits[0], -entropy)
    return q.weighted(torch.stack([_siamese(q, [z, peer]).sum(0) - q.m * entropy for z in q.logits]))


def mean_peer(logits, target, **options):
    """A control that is not in the paper: every head's peer is a constant, the mean of the head's own s over the batch.
    For head c it is CE(z_c, y) + 2 log(2 cosh((s_c - mean(s_c)) / 2)) - 2 log 2, mean detached. As `independent`."""
    q, coupling = _Target(logits, target, **options), []
    for s in (z.logsumexp(q.dim, keepdim=True) for z in q.logits):
        d = s - q.reduced(s, q.kept).detach().nan_to_num()
        coupling.append(F.softplus(d) + F.softplus(-d) - 2 * math.log(2))  # 2 log cosh(d / 2) without overflow
    return q.weighted(_siamese(q, q.logits, 0.0) + q.m * torch.stack(coupling))


METHODS = {"ind": independent, "sila": siamese_labels, "dml": mutual_learning, "sila+dml": siamese_mutual_learning}
METHODS |= {"zero-peer": zero_peer, "mean-peer": mean_peer}
LABELS = dict(zip(METHODS, ("IND", "SiLa", "DML", "SiLa+DML", "zero peer", "mean peer")))
"""Method name -> loss(logits, target, **options), and what tables call it: the paper's methods first, then ours."""


class SiameseLabelsLoss(torch.nn.Module):
    """`siamese_labels` as a module: `SiameseLabelsLoss()([net1(x), net2(x)], y)`. Its options, weight as a buffer."""

    def __init__(self, *, weight=None, **options):
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = options

    def forward(self, logits, target):
        return siamese_labels(logits, target, weight=self.weight, **self.options)


class _Target:
    """What a loss is given, checked: the logits of its heads, in float32 at least, and each position's target q after
    class weights w and smoothing. Class indices without smoothing need no q: m = sum(q) is 1, or w[y]."""

    def __init__(self, heads, target, betas=None, weight=None, ignore_index=-100, label_smoothing=0, reduction="mean"):
        soft = target is not None and target.is_floating_point()
        single = torch.is_tensor(heads) and heads.dim() < (3 if target is None else target.dim() + 2 - soft)
        heads = [heads] if isinstance(heads, dict) or not hasattr(heads, "__iter__") else list(heads)
        if single or not heads:
            raise ValueError("no logits: give a list with one tensor (batch, classes) per head")
        for z in heads:
            if not torch.is_tensor(z):
                mend = ".logits" if hasattr(z, "logits") else '["out"]' if isinstance(z, dict) else "tensor"
                raise ValueError(f"a head is a {type(z).__name__}: give its {mend}")
        shapes = [tuple(z.shape) for z in heads]
        shape, dim = shapes[0], min(len(shapes[0]) - 1, 1)
        if not shape or any(other != shape for other in shapes):
            raise ValueError(f"logits of shapes {shapes}: every head needs the same (batch, classes, ...)")
        indices, N = shape[:dim] + shape[dim + 1 :], shape[dim]
        if target is not None and tuple(target.shape) != (shape if soft else indices):
            mend = f"give class indices as integers {indices}, or soft labels as floats {shape}"
            mend = "of logits (B, T, N) take transpose(1, 2)" if dim and indices != shape[:-1] == target.shape else mend
            raise ValueError(f"target of shape {tuple(target.shape)} for logits {shape}: {mend}")
        if betas is not None and len(betas) != len(heads):
            raise ValueError(f"{len(betas)} betas for {len(heads)} heads: give one weight per head")
        if (weight is not None and len(weight) != N) or not 0 <= label_smoothing <= 1:
            raise ValueError(f"give {N} class weights, and a label_smoothing from 0 to 1, not {label_smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
        self.logits = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in heads]
        self.dim, self.betas, self.reduction, z, w = dim, betas, reduction, self.logits[0], 1.0
        self.m, self.q, self.kept, self.counts = 1.0, None, None, None
        if weight is not None:
            w = torch.as_tensor(weight, dtype=z.dtype, device=z.device).view(-1, *[1] * (z.dim() - dim - 1))
        if target is not None and not soft:
            y = target.long().unsqueeze(dim)
            self.kept = y != ignore_index
            if y.device.type == "cpu" and not torch.compiler.is_compiling():
                with suppress(RuntimeError):  # under vmap there are no values to see
                    for i in y[self.kept & ((y < 0) | (y >= N))][:1].tolist():
                        raise ValueError(f"label {i} out of range: give 0 to {N - 1}, or ignore_index ({ignore_index})")
            self.y = y * self.kept
            self.m = 1.0 if weight is None else w.flatten()[self.y]
            self.counts = self.m * self.kept
        if target is not None and (soft or label_smoothing):
            p = target.to(z.dtype) if soft else torch.zeros_like(z).scatter(dim, self.y, 1.0)
            self.q = w * ((1 - label_smoothing) * p + label_smoothing / N)
            self.m = self.q.sum(dim, keepdim=True)

    def dot(self, logits):
        """<q, z_c> of every head, (C, B, 1, ..)."""
        if self.q is None:
            return self.m * torch.stack([z.gather(self.dim, self.y) for z in logits])
        return torch.stack([(self.q * z).sum(self.dim, keepdim=True) for z in logits])

    def weighted(self, terms):
        """The sum over heads of beta_c times the terms (C, B, 1, ..) of head c, reduced as class weights count."""
        terms = terms if self.betas is None else torch.stack([beta * term for beta, term in zip(self.betas, terms)])
        return self.reduced(terms.sum(0), self.counts, self.reduction)

    def reduced(self, losses, counts, reduction="mean"):
        """The losses (B, 1, ..), 0 where they are ignored, or their sum, or the mean of those that count."""
        losses = losses if self.kept is None else losses.masked_fill(~self.kept, 0)
        if reduction == "mean":  # times 1 exactly, where all count as 1; times infinity, and so NaN, where none does
            return losses.mean() if counts is None else losses.mean() * (losses.numel() / counts.sum().to(losses.dtype))
        return losses.sum() if reduction == "sum" else losses.squeeze(self.dim)
