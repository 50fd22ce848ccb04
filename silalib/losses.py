"""The losses of "Siamese Labels Auxiliary Learning" (arXiv 2103.00200); this module needs torch alone.

Every loss takes the logits of C heads (C networks, or the C exits of one network) as a list of tensors (B, N), and one
target (B,) of class indices. With z_c (N,) the logits of head c for one sample, s_c = logsumexp(z_c) its log-partition
(the negative free energy) and S = logsumexp(s_1 .. s_C), the cross-entropy over the C*N siamese labels (equations 8 and
9) is S - z_c[y], so one logsumexp serves all C terms and the concatenation of equation 9 is never built:

    L_sila = sum_c beta_c (S   - z_c[y])       equation 10
    L_ind  = sum_c beta_c (s_c - z_c[y])       independent training
    L_sila - L_ind = sum_c beta_c (S - s_c)    the coupling: a peer enters through its s alone

With class weights, label smoothing or soft labels, z_c[y] becomes <q, z_c> and S becomes m S: q (N,) is the target of
the sample and m = sum(q); q is one-hot and m = 1 without them. Half-precision logits are computed in float32: in
bfloat16 the gradient is off by several percent.
"""

import math

import torch
import torch.nn.functional as F


def siamese_labels(
    logits, target, *, betas=None, coupling=1.0, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """The SiLa loss, equations 8 to 11: sum over heads of beta_c times the siamese cross-entropy.

    logits: sequence of C >= 1 tensors (B, N) or (B, N, d1, ..), or these stacked; (N,) for one sample, as under vmap.
        The gradient flows into every one, nothing is detached.
    target: class indices (B,) or (B, d1, ..), integers 0 to N-1; or soft labels, floats of the shape of a head.
    betas: C weights of the heads, 1 each by default.
    coupling: weight of the coupling beside the independent terms; 1 is SiLa, 0 independent training. A tensor keeps
        its gradient, the coupling itself: it is positive, so a coupling trained with this loss falls without end.
    weight (N,), ignore_index, label_smoothing, reduction ("mean", "sum" or "none"): as in F.cross_entropy, in every
        head. The mean divides by the sum of weight[target] over positions kept, for soft labels by all positions.
    Raises ValueError for shapes that do not fit together, and on a CPU for a label out of range."""
    logits, q = _checked(logits, target, ignore_index, weight, label_smoothing)
    return q.reduced(_weighted(_siamese(logits, q, coupling), betas), reduction)


def _siamese(logits, q, coupling):
    """The terms of equation 10 before their weights, (C, B, 1, ..); at coupling 0 those of independent training."""
    s = torch.stack([z.logsumexp(q.dim, keepdim=True) for z in logits])
    coupling = coupling.to(s) if torch.is_tensor(coupling) else float(coupling)
    # At coupling 0 lerp returns s itself, so `independent` is this very computation, to the last bit.
    return q.times_m(torch.lerp(s, s.logsumexp(0, keepdim=True), coupling)) - q.dot(logits)


def independent(logits, target, **options):
    """IND: sum over heads of beta_c times the ordinary cross-entropy (equation 1). All as in `siamese_labels`."""
    return siamese_labels(logits, target, coupling=0.0, **options)


def mutual_kl(logits, temperature=1.0, reduction="mean", *, target=None, ignore_index=-100):
    """The mimicry term of DML: sum over heads c of the mean over peers k of KL(p_k || p_c), p = softmax(z/temperature).

    The peer p_k is a fixed target (detached), so head c is pulled towards its peers and never pulls them.
    Scaled by temperature squared, which keeps the gradient's size. Zhang et al., Deep Mutual Learning, 2018.
    target: class indices, by which positions labelled ignore_index are left out of the sum and of the mean.
    Shapes and reduction as in `siamese_labels`. Raises ValueError for fewer than two heads."""
    logits, q = _checked(logits, target, ignore_index)
    return q.reduced(_mimicry(logits, q.dim, temperature), reduction, by_class=False)


def _mimicry(logits, dim, temperature=1.0):
    """The mimicry term of every position, (B, 1, ..)."""
    if len(logits) < 2:
        raise ValueError("mutual learning needs at least two heads")
    log_p = [F.log_softmax(z / temperature, dim) for z in logits]
    targets = [lp.detach() for lp in log_p]
    pairs = [(c, k) for c in range(len(logits)) for k in range(len(logits)) if k != c]
    kl = sum((targets[k].exp() * (targets[k] - log_p[c])).sum(dim, keepdim=True) for c, k in pairs)
    return kl * (temperature**2 / (len(logits) - 1))


def mutual_learning(logits, target, **options):
    """DML: independent training plus the mimicry term. All as in `siamese_mutual_learning`."""
    return siamese_mutual_learning(logits, target, coupling=0.0, **options)


def siamese_mutual_learning(logits, target, *, betas=None, coupling=1.0, reduction="mean", **options):
    """SiLa+DML: the SiLa loss plus the mimicry term; cross-entropy is not counted twice.

    All as in `siamese_labels`. The mimicry term has no class weight and no smoothing; it leaves out ignored labels."""
    logits, q = _checked(logits, target, **options)
    siamese = q.reduced(_weighted(_siamese(logits, q, coupling), betas), reduction)
    return siamese + q.reduced(_mimicry(logits, q.dim), reduction, by_class=False)


def zero_peer(logits, target, *, betas=None, reduction="mean", **options):
    """A control that is not in the paper: every head has a constant peer instead of the other heads.

    The peer's logits are all -log N, so its s is 0 and its own cross-entropy, taken off, is log N. What is left for
    head c is CE(z_c, y) + 2 log(2 cosh(s_c / 2)): the coupling alone. All as in `independent`."""
    logits, q = _checked(logits, target, **options)
    entropy = math.log(logits[0].shape[q.dim])
    peers = [torch.full_like(z, -entropy) for z in logits]
    alone = [_siamese([z, peer], q, 1.0).sum(0) - q.times_m(entropy) for z, peer in zip(logits, peers)]
    return q.reduced(_weighted(torch.stack(alone), betas), reduction)


def mean_peer(logits, target, *, betas=None, reduction="mean", **options):
    """A control that is not in the paper: every head's peer is a constant, the mean of the head's own s over the batch.

    For head c it is CE(z_c, y) + 2 log(2 cosh((s_c - mean(s_c)) / 2)) - 2 log 2, the mean detached: the head is pulled
    towards its own level, by `zero_peer` to 0. All as in `independent`."""
    logits, q = _checked(logits, target, **options)
    alone = []
    for z in logits:
        s = z.logsumexp(q.dim, keepdim=True)
        d = s - q.reduced(s, "mean", by_class=False).detach().nan_to_num()
        # 2 log(2 cosh(d / 2)) without overflow
        coupling = F.softplus(d) + F.softplus(-d) - 2 * math.log(2)
        alone.append(_siamese([z], q, 0.0)[0] + q.times_m(coupling))
    return q.reduced(_weighted(torch.stack(alone), betas), reduction)


METHODS = {
    "ind": independent,
    "sila": siamese_labels,
    "dml": mutual_learning,
    "sila+dml": siamese_mutual_learning,
    "zero-peer": zero_peer,
    "mean-peer": mean_peer,
}
"""Method name -> loss(logits, target, **options), its options those of `independent`."""

LABELS = {"ind": "IND", "sila": "SiLa", "dml": "DML", "sila+dml": "SiLa+DML"}
LABELS |= {"zero-peer": "zero peer", "mean-peer": "mean peer"}
"""Method name -> how it is called in tables and figures: the paper's methods as the paper spells them, then ours."""


class SiameseLabelsLoss(torch.nn.Module):
    """`siamese_labels` as a module: `SiameseLabelsLoss()([net1(x), net2(x)], y)`. Its options, weight as a buffer."""

    def __init__(self, *, weight=None, **options):
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = options

    def forward(self, logits, target):
        return siamese_labels(logits, target, weight=self.weight, **self.options)


class _Target:
    """The target q of every position after class weight w and smoothing: m = sum(q), <q, z>, what counts in a mean."""

    def __init__(self, z, dim, target, ignore_index, weight, smoothing):
        self.dim, self.smoothing, self.w = dim, smoothing, 1.0
        self.m = self.q = self.ignored = self.w_y = None
        if target is None:
            return
        if weight is not None:
            self.w = torch.as_tensor(weight, dtype=z.dtype, device=z.device).view(-1, *[1] * (z.dim() - dim - 1))
        if target.is_floating_point():
            self.q = self.w * ((1 - smoothing) * target.to(z.dtype) + smoothing / z.shape[dim])
            self.m = self.q.sum(dim, keepdim=True)
            return
        target = target.long().unsqueeze(dim)
        self.ignored = _ignored(target, ignore_index, z.shape[dim])
        self.y = target if self.ignored is None else target.masked_fill(self.ignored, 0)
        if weight is not None:
            self.w_y = self.w.flatten()[self.y]
            self.m = (1 - smoothing) * self.w_y + smoothing * self.w.mean()

    def times_m(self, x):
        return x if self.m is None else self.m * x

    def dot(self, logits):
        """<q, z_c> of every head, (C, B, 1, ..)."""
        if self.q is not None:
            return torch.stack([(self.q * z).sum(self.dim, keepdim=True) for z in logits])
        own = torch.stack([z.gather(self.dim, self.y) for z in logits])
        own = own if self.w_y is None else self.w_y * own
        if not self.smoothing:
            return own
        return own.lerp(torch.stack([(self.w * z).mean(self.dim, keepdim=True) for z in logits]), self.smoothing)

    def reduced(self, losses, reduction, by_class=True):
        """The losses (B, 1, ..), 0 where they are ignored, or their sum or mean; by_class: a mean by class weights."""
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction {reduction!r}: use 'mean', 'sum' or 'none'")
        counts = self.w_y if by_class else None
        if self.ignored is not None:
            losses = losses.masked_fill(self.ignored, 0)
            counts = ~self.ignored if counts is None else counts.masked_fill(self.ignored, 0)
        if reduction == "mean":
            # times 1, and so exact, where every position counts as 1; times infinity, and so NaN, where none counts
            return losses.mean() if counts is None else losses.mean() * (losses.numel() / counts.sum().to(losses.dtype))
        return losses.sum() if reduction == "sum" else losses.squeeze(self.dim)


def _ignored(target, ignore_index, classes):
    """Which labels are ignore_index, or None where it is seen that none is. Raises ValueError for one out of range."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            low, high = (label.item() for label in target.aminmax())
        except RuntimeError:  # a batch without values: under vmap, or empty
            return target == ignore_index
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return None
        for label in target[((target < 0) | (target >= classes)) & (target != ignore_index)][:1].tolist():
            raise ValueError(f"label {label} out of range: give 0 to {classes - 1}, or ignore_index ({ignore_index})")
    return target == ignore_index


def _checked(logits, target=None, ignore_index=-100, weight=None, label_smoothing=0.0):
    """The logits as a list of float tensors of one shape (B, N, ..), float32 at least, and the target as `_Target`."""
    soft = target is not None and target.is_floating_point()
    single = torch.is_tensor(logits) and logits.dim() < (3 if target is None else target.dim() + 2 - soft)
    logits = [logits] if isinstance(logits, dict) or not hasattr(logits, "__iter__") else list(logits)
    if single or not logits:
        raise ValueError("no logits: give a list with one tensor (batch, classes) per head")
    for z in logits:
        if not torch.is_tensor(z):
            mend = ".logits" if hasattr(z, "logits") else '["out"]' if isinstance(z, dict) else "tensor"
            raise ValueError(f"a head is a {type(z).__name__}: give its {mend}")
    shapes = [tuple(z.shape) for z in logits]
    shape, dim = shapes[0], min(len(shapes[0]) - 1, 1)
    if not shape or any(other != shape for other in shapes):
        raise ValueError(f"logits of shapes {shapes}: every head needs the same (batch, classes, ...)")
    indices = shape[:dim] + shape[dim + 1 :]
    if target is not None and tuple(target.shape) != (shape if soft else indices):
        mend = f"give class indices as integers {indices}, or soft labels as floats {shape}"
        mend = "of logits (B, T, N) take transpose(1, 2)" if dim and indices != shape[:-1] == target.shape else mend
        raise ValueError(f"target of shape {tuple(target.shape)} for logits {shape}: {mend}")
    if (weight is not None and len(weight) != shape[dim]) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"give {shape[dim]} class weights, and a label_smoothing from 0 to 1, not {label_smoothing}")
    logits = [z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in logits]
    return logits, _Target(logits[0], dim, target, ignore_index, weight, label_smoothing)


def _weighted(losses, betas):
    """The sum over heads of beta_c times the losses (C, B, 1, ..) of head c."""
    if betas is not None:
        if len(betas) != len(losses):
            raise ValueError(f"{len(betas)} betas for {len(losses)} heads: give one weight per head")
        losses = torch.stack([beta * loss for beta, loss in zip(betas, losses)])
    return losses.sum(0)
