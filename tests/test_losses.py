"""The losses against the paper's own form (a concatenation and torch's cross-entropy), hand cases and identities."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import silalib
from silalib.experiments import PAPER_METHODS
from silalib.losses import (
    LABELS,
    METHODS,
    SiameseLabelsLoss,
    independent,
    mean_peer,
    mutual_kl,
    mutual_learning,
    siamese_labels,
    siamese_mutual_learning,
    zero_peer,
)
from silalib.training.network_parallel import COUPLED_BY_S

B, N = 6, 5


def heads(count, dtype=torch.float64, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(B, N, generator=g)).to(dtype).requires_grad_() for _ in range(count)]


TARGET = torch.tensor([0, 1, 2, 3, 4, 4])


def copies(logits):
    return [z.detach().clone().requires_grad_() for z in logits]


def gradients(loss, logits):
    return torch.autograd.grad(loss, logits)


def naive_siamese(logits, target, betas, coupling=1.0):
    """Equations 8 to 10 to the letter, per sample: labels y + (c-1)N on the concatenation; IND + coupling * rest."""
    z = torch.cat(logits, 1)
    n = logits[0].shape[1]
    siamese = sum(b * F.cross_entropy(z, target + c * n, reduction="none") for c, b in enumerate(betas))
    alone = sum(b * F.cross_entropy(z_c, target, reduction="none") for z_c, b in zip(logits, betas))
    return alone + coupling * (siamese - alone)


UNEVEN = {1: (0.7,), 2: (0.5, 2.0), 3: (1.0, 0.0, 3.0), 7: (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)}


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_siamese_labels_is_cross_entropy_over_the_concatenation(count, uneven, coupling):
    betas = UNEVEN[count] if uneven else None
    logits = heads(count)
    reference = copies(logits)
    ours = siamese_labels(logits, TARGET, betas=betas, coupling=coupling, reduction="none")
    expected = naive_siamese(reference, TARGET, betas or (1.0,) * count, coupling)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    # different weights per sample, so that a mistake in one sample cannot cancel in the sum
    weights = torch.linspace(0.5, 1.5, B, dtype=torch.float64)
    torch.testing.assert_close(
        gradients((weights * ours).sum(), logits),
        gradients((weights * expected).sum(), reference),
        rtol=1e-11,
        atol=1e-12,
    )


def test_default_coupling_is_sila():
    logits = heads(3)
    expected = naive_siamese(logits, TARGET, (1, 1, 1)).mean()
    torch.testing.assert_close(siamese_labels(logits, TARGET), expected, rtol=1e-12, atol=0)


def test_reductions():
    logits, betas = heads(2), (0.5, 2.0)
    each = naive_siamese(logits, TARGET, betas)
    for loss, arguments in [
        (siamese_labels(logits, TARGET, betas=betas), each.mean()),
        (siamese_labels(logits, TARGET, betas=betas, reduction="mean"), each.mean()),
        (siamese_labels(logits, TARGET, betas=betas, reduction="sum"), each.sum()),
        (siamese_labels(logits, TARGET, betas=betas, reduction="none"), each),
    ]:
        torch.testing.assert_close(loss, arguments, rtol=1e-12, atol=0)
    kl = mutual_kl(logits, reduction="none")
    assert kl.shape == (B,)
    torch.testing.assert_close(mutual_kl(logits), kl.sum() / B)
    torch.testing.assert_close(mutual_kl(logits, reduction="sum"), kl.sum())


def test_sila_is_independent_training_plus_a_coupling():
    logits, betas = heads(3), (0.5, 2.0, 1.0)
    s = torch.stack([z.logsumexp(1) for z in logits], 1)
    cross_entropy = sum(b * F.cross_entropy(z, TARGET, reduction="sum") for z, b in zip(logits, betas))
    coupling = -(F.log_softmax(s, 1) * torch.tensor(betas)).sum()
    ours = siamese_labels(logits, TARGET, betas=betas, reduction="sum")
    torch.testing.assert_close(ours, cross_entropy + coupling, rtol=1e-12, atol=0)


def test_gradient_identity():
    """dL/dz_c = b softmax(s)_c p_c - beta_c e_y for each sample, with b the sum of betas."""
    logits, betas = heads(3), (0.5, 2.0, 1.0)
    share = torch.stack([z.logsumexp(1) for z in logits], 1).softmax(1)
    truth = F.one_hot(TARGET, N)
    actual = gradients(siamese_labels(logits, TARGET, betas=betas, reduction="sum"), logits)
    for c, z in enumerate(logits):
        expected = sum(betas) * share[:, c, None] * z.softmax(1) - betas[c] * truth
        torch.testing.assert_close(actual[c], expected, rtol=1e-11, atol=1e-12)


def test_two_heads_couple_through_the_hyperbolic_cosine():
    """For C = 2 and beta = 1 the coupling is 2 log(2 cosh((s_1 - s_2) / 2)), at least 2 log 2."""
    logits = heads(2)
    difference = logits[0].logsumexp(1) - logits[1].logsumexp(1)
    coupling = siamese_labels(logits, TARGET, reduction="none") - independent(logits, TARGET, reduction="none")
    torch.testing.assert_close(coupling, 2 * torch.log(2 * torch.cosh(difference / 2)), rtol=1e-11, atol=0)
    assert (coupling > 2 * math.log(2)).all()


def equal_free_energies(count):
    first, *others = heads(count)
    s = first.logsumexp(1, keepdim=True)
    return copies([first, *(z - z.logsumexp(1, keepdim=True) + s for z in others)])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_zero_peer_is_cross_entropy_and_the_coupling_to_zero(reduction):
    """CE + 2 log(2 cosh(s / 2)) for every head by itself, and so for its gradient."""
    logits, betas = heads(2), (0.5, 2.0)
    expected = sum(
        beta * (F.cross_entropy(z, TARGET, reduction="none") + 2 * torch.log(2 * torch.cosh(z.logsumexp(1) / 2)))
        for beta, z in zip(betas, logits)
    )
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    actual = zero_peer(logits, TARGET, betas=betas, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    for a, b in zip(gradients(actual.sum(), logits), gradients(expected.sum(), logits)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_mean_peer_is_independent_training_and_the_coupling_to_the_own_mean(reduction):
    """A copy of `independent`, and 2 log(2 cosh((s - m) / 2)) - 2 log 2 with m a number: no gradient flows into it."""
    logits, betas = heads(2), (0.5, 2.0)
    expected = 0
    for beta, z in zip(betas, logits):
        s = z.logsumexp(1)
        m = s.mean().item()
        coupling = 2 * torch.log(2 * torch.cosh((s - m) / 2)) - 2 * math.log(2)
        expected = expected + independent([z], TARGET, betas=[beta], reduction="none") + beta * coupling
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    actual = mean_peer(logits, TARGET, betas=betas, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    for a, b in zip(gradients(actual.sum(), logits), gradients(expected.sum(), logits)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_mean_peer_by_hand():
    """Two samples of one class: cross-entropy 0, s = z = 0 and 2, the mean 1: the coupling is 2 log cosh(1/2) in both.

    Its gradient is tanh((s - 1) / 2), over the batch of two.
    """
    z = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    loss = mean_peer([z], torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(2 * math.log((math.exp(0.5) + math.exp(-0.5)) / 2), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.flatten().tolist() == pytest.approx([-math.tanh(0.5) / 2, math.tanh(0.5) / 2], rel=1e-12)
    # a level that all samples share costs nothing, and no s is too large
    (far,) = gradients(mean_peer([z + 1e4], torch.tensor([0, 0])), [z])
    torch.testing.assert_close(far, gradient, rtol=1e-9, atol=0)


def test_zero_peer_has_the_gradient_of_independent_training_where_s_is_zero():
    z = (heads(1)[0] - heads(1)[0].logsumexp(1, keepdim=True)).detach().requires_grad_()
    (actual,) = gradients(zero_peer([z], TARGET), [z])
    torch.testing.assert_close(actual, gradients(independent([z], TARGET), [z])[0], rtol=1e-11, atol=1e-15)
    shifted = (z.detach() + 3).requires_grad_()  # which changes no prediction, and is pulled back
    assert (gradients(zero_peer([shifted], TARGET, reduction="sum"), [shifted])[0].sum(1) > 0).all()


@pytest.mark.parametrize("count", [2, 3])
def test_where_free_energies_agree_the_gradient_is_the_independent_one(count):
    logits = equal_free_energies(count)
    alone = [F.cross_entropy(z, TARGET) for z in logits]
    torch.testing.assert_close(
        gradients(siamese_labels(logits, TARGET), logits), gradients(sum(alone), logits), rtol=1e-11, atol=1e-13
    )


def test_uneven_betas_are_at_rest_where_the_free_energies_differ_by_the_log_ratio():
    """The coupling's minimum over s_1 - s_2 is at log(beta_1 / beta_2): there a shift of all logits changes nothing."""
    betas = (3.0, 0.5)
    first, second = equal_free_energies(2)
    logits = copies([first + math.log(betas[0] / betas[1]), second])
    for gradient in gradients(siamese_labels(logits, TARGET, betas=betas, reduction="sum"), logits):
        torch.testing.assert_close(gradient.sum(1), torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("betas", [None, (0.5, 2.0, 1.0)])
def test_independent_is_coupling_zero_to_the_last_bit(dtype, betas):
    logits, again = heads(3, dtype), heads(3, dtype)
    a, b = independent(logits, TARGET, betas=betas), siamese_labels(again, TARGET, betas=betas, coupling=0)
    assert torch.equal(a, b)
    assert all(map(torch.equal, gradients(a, logits), gradients(b, again)))
    expected = sum(w * F.cross_entropy(z, TARGET) for w, z in zip(betas or (1, 1, 1), again))
    torch.testing.assert_close(a, expected)


def test_a_head_without_coupling_does_not_feel_its_peer():
    logits = heads(2, torch.float32)
    (paired, _), (alone,) = (gradients(independent(z, TARGET), z) for z in (logits, logits[:1]))
    assert torch.equal(paired, alone)


def test_one_head_has_nothing_to_couple_with():
    (z,) = heads(1)
    torch.testing.assert_close(siamese_labels([z], TARGET), F.cross_entropy(z, TARGET), rtol=1e-12, atol=0)


@pytest.mark.parametrize("betas", [None, (0.5, 2.0)])
def test_gradcheck(betas):
    assert torch.autograd.gradcheck(lambda *z: siamese_labels(z, TARGET, betas=betas), heads(2))


# -- mutual learning


def hand_case():
    """Two heads, two samples, three classes: logarithms of simple probabilities, moved by a constant per sample.

    head 1: (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4); head 2: (1/4, 1/2, 1/4) and (1/4, 1/4, 1/2); truth: class 0 and 2.
    """
    p1 = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]], dtype=torch.float64)
    p2 = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], dtype=torch.float64)
    moved = torch.tensor([[3.0], [-1.0]])
    return [(p1.log() + moved).requires_grad_(), (p2.log() - 2 * moved).requires_grad_()], torch.tensor([0, 2]), p1, p2


def test_mutual_learning_by_hand():
    logits, target, _, _ = hand_case()
    log = math.log
    # cross-entropy: -log p[y]
    first = log(2) + log(4)  # head 1: -log 1/2; head 2: -log 1/4
    second = log(4 / 3) + log(2)  # head 1: -log 3/4; head 2: -log 1/2
    # KL(p_2 || p_1) and KL(p_1 || p_2) of the first sample; their third class agrees and adds nothing
    kl_first = (1 / 4 * log(1 / 2) + 1 / 2 * log(2)) + (1 / 2 * log(2) + 1 / 4 * log(1 / 2))
    # of the second: p_2 log(p_2/p_1) is 1/4 log 2 twice, and 1/2 log 2/3;
    # p_1 log(p_1/p_2) is 1/8 log 1/2 twice, and 3/4 log 3/2
    kl_second = (2 / 4 * log(2) + 1 / 2 * log(2 / 3)) + (2 / 8 * log(1 / 2) + 3 / 4 * log(3 / 2))
    assert mutual_kl(logits).item() == pytest.approx((kl_first + kl_second) / 2, rel=1e-12)
    expected = (first + second + kl_first + kl_second) / 2
    assert mutual_learning(logits, target).item() == pytest.approx(expected, rel=1e-12)
    weighted = (3 * log(2) + 5 * log(4) + 3 * log(4 / 3) + 5 * log(2) + kl_first + kl_second) / 2
    assert mutual_learning(logits, target, betas=(3, 5)).item() == pytest.approx(weighted, rel=1e-12)


def test_each_head_is_pulled_to_its_peer_and_does_not_pull_it():
    """KL(p_k || p_c) with p_k fixed has the gradient p_c - p_k in z_c, and no other term."""
    logits, _, p1, p2 = hand_case()
    actual = gradients(mutual_kl(logits, reduction="sum"), logits)
    torch.testing.assert_close(actual, (p1 - p2, p2 - p1), rtol=1e-12, atol=1e-14)
    # the gradient that the other direction, KL(p_c || p_k), would have
    for p, q, gradient in [(p1, p2, actual[0]), (p2, p1, actual[1])]:
        kl = (p * (p / q).log()).sum(1, keepdim=True)
        reverse = p * ((p / q).log() - kl)
        assert (gradient - reverse).abs().max() > 0.04
    # where a peer is no longer trained, the other head's gradient stays as it was
    alone = gradients(mutual_kl([logits[0], logits[1].detach()], reduction="sum"), logits[:1])
    assert torch.equal(alone[0], actual[0])


def test_three_heads_average_over_their_peers():
    logits = heads(3)
    p = [z.softmax(1) for z in logits]
    kl = lambda k, c: (p[k] * (p[k].log() - p[c].log())).sum(1)
    expected = sum((kl(a, c) + kl(b, c)) / 2 for c, a, b in [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
    torch.testing.assert_close(mutual_kl(logits, reduction="none"), expected, rtol=1e-11, atol=1e-13)
    actual = gradients(mutual_kl(logits, reduction="sum"), logits)
    for c, a, b in [(0, 1, 2), (1, 0, 2), (2, 0, 1)]:
        torch.testing.assert_close(actual[c], p[c] - (p[a] + p[b]) / 2, rtol=1e-11, atol=1e-13)


def test_temperature_softens_and_keeps_the_gradients_size():
    """At temperature T the loss is T^2 KL of softmax(z/T), with the gradient T (q_c - q_k)."""
    logits, temperature = heads(2), 4.0
    q = [(z / temperature).softmax(1) for z in logits]
    expected = temperature**2 * sum((q[k] * (q[k] / q[c]).log()).sum(1) for c, k in [(0, 1), (1, 0)])
    torch.testing.assert_close(mutual_kl(logits, temperature, reduction="none"), expected, rtol=1e-11, atol=1e-12)
    actual = gradients(mutual_kl(logits, temperature, reduction="sum"), logits)
    torch.testing.assert_close(actual[0], temperature * (q[0] - q[1]), rtol=1e-11, atol=1e-13)


def test_agreeing_heads_have_no_mutual_loss():
    (z,) = heads(1)
    logits = [z, (z + 7).detach().requires_grad_()]
    assert mutual_kl(logits).abs().item() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(mutual_kl(logits), logits))


# -- methods


def test_methods():
    assert list(METHODS) == list(LABELS)
    assert PAPER_METHODS == ("ind", "sila", "dml", "sila+dml") == tuple(METHODS)[:4]
    logits, betas = heads(3), (0.5, 2.0, 1.0)
    alone = sum(b * F.cross_entropy(z, TARGET) for b, z in zip(betas, logits))
    sila = naive_siamese(logits, TARGET, betas).mean()
    peers = [(c, k) for c in range(3) for k in range(3) if k != c]
    log_p = [F.log_softmax(z, 1) for z in logits]
    kl = sum(F.kl_div(log_p[c], log_p[k], reduction="batchmean", log_target=True) for c, k in peers) / 2
    for method, expected in {"ind": alone, "sila": sila, "dml": alone + kl, "sila+dml": sila + kl}.items():
        torch.testing.assert_close(METHODS[method](logits, TARGET, betas=betas), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            METHODS[method](logits, TARGET, betas=betas, reduction="sum"), B * expected, rtol=1e-12, atol=0
        )
    half = siamese_mutual_learning(logits, TARGET, betas=betas, coupling=0.5)
    torch.testing.assert_close(half, (alone + sila) / 2 + kl, rtol=1e-12, atol=0)


def per_head_losses(method, logits, target):
    """What each head is charged with, the way of a loop over networks."""
    n = logits[0].shape[1]
    for c, z in enumerate(logits):
        siamese = "sila" in method
        loss = F.cross_entropy(torch.cat(logits, 1), target + c * n) if siamese else F.cross_entropy(z, target)
        if "dml" in method:
            peers = [k for k in range(len(logits)) if k != c]
            for k in peers:
                p = logits[k].detach().softmax(1)
                loss = loss + F.kl_div(z.log_softmax(1), p, reduction="batchmean") / len(peers)
        if "peer" in method:
            s = z.logsumexp(1)
            s = s - (s.mean().detach() if method == "mean-peer" else 0)
            loss = loss + (2 * F.softplus(s) - s).mean() - (2 * math.log(2) if method == "mean-peer" else 0)
        yield loss


@pytest.mark.parametrize("method", [*PAPER_METHODS, "zero-peer", "mean-peer"])
@pytest.mark.parametrize("count", [2, 3])
def test_one_backward_of_the_sum_is_one_backward_per_head(method, count):
    torch.manual_seed(0)
    nets = [torch.nn.Linear(4, N).double() for _ in range(count)]
    x = torch.randn(B, 4, dtype=torch.float64)
    parameters = [p for net in nets for p in net.parameters()]
    METHODS[method]([net(x) for net in nets], TARGET).backward()
    together = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for loss in per_head_losses(method, [net(x) for net in nets], TARGET):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(together, [p.grad for p in parameters], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", [*COUPLED_BY_S, "dml", "sila+dml"])
def test_where_the_peers_s_is_enough_its_logits_do_not_matter(method):
    own, peer = heads(2)
    even = (peer.detach().logsumexp(1) - math.log(N))[:, None].expand(-1, N)  # other logits with the same s
    found = [gradients(METHODS[method]([own, other], TARGET), [own])[0] for other in (peer.detach(), even)]
    assert torch.allclose(*found, rtol=1e-10, atol=1e-14) == (method in COUPLED_BY_S)


# -- numbers and types


@pytest.mark.parametrize("method", [*PAPER_METHODS, "zero-peer", "mean-peer"])
def test_extreme_logits_stay_finite(method):
    g = torch.Generator().manual_seed(0)
    logits = [(1e4 * torch.randint(-1, 2, (B, N), generator=g)).float().requires_grad_() for _ in range(2)]
    exact = [z.detach().double() for z in logits]
    loss = METHODS[method](logits, TARGET)
    expected = sum(per_head_losses(method, exact, TARGET))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert loss > 100
    assert all(g.isfinite().all() for g in gradients(loss, logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method, dtype):
    logits = heads(2, dtype, scale=8.0)
    wide = copies([z.float() for z in logits])
    loss, expected = METHODS[method](logits, TARGET), METHODS[method](wide, TARGET)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    eps = torch.finfo(dtype).eps  # each of two terms, and their sum, may be rounded once to the logits' precision
    for narrow, exact in zip(gradients(loss, logits), gradients(expected, wide)):
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.float(), exact, rtol=2 * eps, atol=eps / B)


@pytest.mark.parametrize("loss", [siamese_labels, lambda z, target: mutual_kl(z)])
def test_half_precision_gradients_are_rounded_once(loss):
    logits = heads(2, torch.bfloat16, scale=8.0)
    wide = copies([z.float() for z in logits])
    for narrow, exact in zip(gradients(loss(logits, TARGET), logits), gradients(loss(wide, TARGET), wide)):
        assert torch.equal(narrow, exact.bfloat16())


def test_any_sequence_of_heads_will_do():
    logits = heads(2)
    expected = siamese_labels(logits, TARGET)
    assert torch.equal(siamese_labels(tuple(logits), TARGET), expected)
    assert torch.equal(siamese_labels((z for z in logits), TARGET), expected)
    assert torch.equal(siamese_labels(torch.stack(logits), TARGET), expected)


Z = torch.zeros(4, 3)
Y = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: siamese_labels([], Y), "no logits"),
        (lambda: independent([], Y), "no logits"),
        (lambda: mutual_kl([]), "no logits"),
        (lambda: siamese_labels([Z, Z[:, :2]], Y), r"\(4, 3\), \(4, 2\)"),
        (lambda: siamese_labels([Z, Z[:3]], Y), r"\(4, 3\), \(3, 3\)"),
        (lambda: siamese_labels([Z[None]], Y), r"\(1, 4, 3\)"),
        (lambda: mutual_kl([Z, Z[:, :2]]), r"\(4, 3\), \(4, 2\)"),
        (lambda: siamese_labels([Z, Z], Y, betas=(1,)), "1 betas for 2 heads"),
        (lambda: mutual_learning([Z, Z], Y, betas=(1, 1, 1)), "3 betas for 2 heads"),
        (lambda: siamese_labels([Z, Z], Y, reduction="median"), "'median'"),
        (lambda: mutual_kl([Z, Z], reduction="average"), "'average'"),
        (lambda: mutual_kl([Z]), "at least two heads"),
        (lambda: mutual_learning([Z], Y), "at least two heads"),
        (lambda: siamese_mutual_learning([Z], Y), "at least two heads"),
        (lambda: siamese_labels([Z, Z], Y[:3]), r"target of shape \(3,\)"),
        (lambda: siamese_labels([Z, Z], F.one_hot(Y, 3)), r"target of shape \(4, 3\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- for people with their own loop


def test_module_is_the_function():
    logits, betas = heads(2), (0.5, 2.0)
    assert torch.equal(SiameseLabelsLoss()(logits, TARGET), siamese_labels(logits, TARGET))
    module = SiameseLabelsLoss(betas=betas, coupling=0.5, reduction="sum")
    expected = naive_siamese(logits, TARGET, betas, 0.5).sum()
    torch.testing.assert_close(module(logits, TARGET), expected, rtol=1e-12, atol=0)
    assert not list(module.parameters())


def test_module_trains_two_networks():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = 3 * torch.eye(3)[y] + 0.3 * torch.randn(60, 3, generator=g)
    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 3) for _ in range(2)]
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.5)
    criterion = SiameseLabelsLoss()
    for _ in range(50):
        optimizer.zero_grad()
        loss = criterion([net(x) for net in nets], y)
        loss.backward()
        optimizer.step()
    # the least value of the loss is 2 log 2, with both networks right and their free energies equal
    assert 2 * math.log(2) < loss.item() < 2 * math.log(2) + 0.3
    assert all((net(x).argmax(1) == y).all() for net in nets)


def test_the_losses_need_torch_alone():
    heavy = "torchvision", "pandas", "matplotlib", "sklearn", "scipy", "seaborn", "safetensors", "IPython"
    code = "import silalib.losses\nfrom silalib import siamese_labels\nimport sys\n"
    code += f"print(*[m for m in {heavy} if m in sys.modules])"
    root = Path(silalib.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_public_names():
    assert {"siamese_labels", "SiameseLabelsLoss", "METHODS", "Run", "ensure", "load", "load_network"} <= {
        name for name in silalib.__all__ if getattr(silalib, name) is not None
    }
    with pytest.raises(AttributeError, match="no attribute 'siamese'"):
        silalib.siamese  # noqa: B018


def test_a_single_tensor_and_wrong_targets_are_explained():
    logits, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="give a list with one tensor"):
        siamese_labels(logits, target)
    with pytest.raises(ValueError, match="give class indices"):
        siamese_labels([logits, logits], target.float())
