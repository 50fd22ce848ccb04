"""The losses' keywords, shapes and types, against torch's cross-entropy on the concatenation of the heads."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from silalib.losses import (
    METHODS,
    SiameseLabelsLoss,
    independent,
    mutual_kl,
    mutual_learning,
    siamese_labels,
    siamese_mutual_learning,
)

N = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
UNEVEN = (0.7, 2.0, 0.0)


def made(shape, count, seed=0, dtype=torch.float64):
    """Logits of `count` heads and labels; shape: that of the labels."""
    g = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(*shape[:1], N, *shape[1:], generator=g, dtype=torch.float64) for _ in range(count)]
    return [z.to(dtype).requires_grad_() for z in logits], torch.randint(N, shape, generator=g)


def same(loss, expected, logits, tolerance=1e-10):
    """Whether two losses agree, and their gradients for different weights of the positions."""
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    weigh = lambda x: (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum()
    found = (torch.autograd.grad(weigh(x), logits) for x in (loss, expected))
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def concatenated(
    logits, target, betas, coupling, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """Equations 8 to 10 by torch alone; soft labels are put into the block of their head."""
    joined, total, count = torch.cat(logits, 1), 0, len(logits)
    for c, (z, beta) in enumerate(zip(logits, betas)):
        if target.is_floating_point():
            label = torch.cat([target if k == c else torch.zeros_like(target) for k in range(count)], 1)
        else:
            label = torch.where(target == ignore_index, target, target + c * N)
        keywords = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        repeated = None if weight is None else weight.repeat(count)
        siamese = F.cross_entropy(joined, label, repeated, **keywords)
        alone = F.cross_entropy(z, target, weight, **keywords)
        total = total + beta * (alone + coupling * (siamese - alone))
    return total


GRID = list(itertools.product([0.0, 0.5, 1.0], [None, WEIGHT], [-100, 255, 2], [0.0, 0.1], ["mean", "sum", "none"]))


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_combination_of_keywords_is_torchs_on_the_concatenation(shape, count):
    """864 a shape: even heads with torch's smoothing over C*N labels, uneven ones without smoothing."""
    logits, labels = made(shape, count)
    for coupling, weight, ignore_index, smoothing, reduction in GRID:
        target = labels.clone()
        target[0] = ignore_index
        keywords = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }
        for betas in (None,) if smoothing else (None, UNEVEN[:count]):
            ours = siamese_labels(logits, target, betas=betas, coupling=coupling, **keywords)
            same(ours, concatenated(logits, target, betas or (1,) * count, coupling, **keywords), logits)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 2)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_soft_labels_are_torchs_on_the_concatenation(shape, count):
    """Their sum need not be 1."""
    logits, _ = made(shape, count)
    soft = made(shape, 1, seed=1)[0][0].detach().abs()
    options = itertools.product([0.0, 0.5, 1.0], [None, WEIGHT], [0.0, 0.1], ["mean", "sum", "none"])
    for coupling, weight, smoothing, reduction in options:
        keywords = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        for betas in (None,) if smoothing else (None, UNEVEN[:count]):
            ours = siamese_labels(logits, soft, betas=betas, coupling=coupling, **keywords)
            same(ours, concatenated(logits, soft, betas or (1,) * count, coupling, **keywords), logits)


@pytest.mark.parametrize("method", METHODS)
def test_soft_labels_of_one_class_are_that_class(method):
    """Also with uneven heads and smoothing, which is the same for every head and not over all C*N labels."""
    logits, target = made((6,), 2)
    soft = F.one_hot(target, N).to(torch.float64)
    keywords = {"betas": (0.5, 2.0), "weight": WEIGHT, "label_smoothing": 0.1, "reduction": "none"}
    loss = METHODS[method]
    same(loss(logits, soft, **keywords), loss(logits, target, **keywords), logits)


def test_smoothing_is_per_head():
    """Uneven heads by hand: each term has its own q = 0.9 e_y + 0.1 / N in its own block."""
    logits, target = made((6,), 2)
    total = torch.logsumexp(torch.cat(logits, 1), 1)
    terms = [total - 0.9 * z[torch.arange(6), target] - 0.1 * z.mean(1) for z in logits]
    ours = siamese_labels(logits, target, betas=(0.5, 2.0), label_smoothing=0.1, reduction="none")
    same(ours, 0.5 * terms[0] + 2 * terms[1], logits)


@pytest.mark.parametrize("method", METHODS)
def test_an_ignored_position_is_as_if_it_were_not_there(method):
    """Also where its logits are not finite."""
    logits, target = made((6,), 2)
    target[[1, 4]] = 255
    kept = [z[[0, 2, 3, 5]] for z in logits]
    with torch.no_grad():
        logits[0][1, 0] = math.inf
    for weight, smoothing in itertools.product([None, WEIGHT], [0.0, 0.1]):
        keywords = {"betas": (0.5, 2.0), "weight": weight, "label_smoothing": smoothing}
        find = lambda z, y, keywords=keywords, **more: METHODS[method](z, y, **keywords, **more)
        for reduction in ("mean", "sum"):
            ours = find(logits, target, ignore_index=255, reduction=reduction)
            torch.testing.assert_close(ours, find(kept, target[[0, 2, 3, 5]], reduction=reduction))
        each = find(logits, target, ignore_index=255, reduction="none")
        assert each[[1, 4]].tolist() == [0, 0]
        torch.testing.assert_close(each[[0, 2, 3, 5]], find(kept, target[[0, 2, 3, 5]], reduction="none"))


@pytest.mark.parametrize("method", METHODS)
def test_where_all_is_ignored_the_mean_is_nan_and_the_sum_0_as_in_torch(method):
    logits, target = made((6,), 2)
    target[:] = -100
    assert METHODS[method](logits, target).isnan() and F.cross_entropy(logits[0], target).isnan()
    assert METHODS[method](logits, target, reduction="sum") == 0
    ours, torchs = (
        torch.autograd.grad(loss, logits[:1])[0]
        for loss in (METHODS[method](logits, target), F.cross_entropy(logits[0], target))
    )
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_is_nan_as_in_torch(method):
    logits, target = made((0,), 2)
    assert METHODS[method](logits, target).isnan() and METHODS[method](logits, target, reduction="none").shape == (0,)


def test_mimicry_knows_no_class_weight_and_no_smoothing():
    logits, target = made((6,), 3)
    target[2] = -100
    mimicry = lambda: mutual_kl([z[target >= 0] for z in logits])
    same(mutual_kl(logits, target=target), mimicry(), logits)
    keywords = {"weight": WEIGHT, "label_smoothing": 0.1}
    for joint, alone in [(mutual_learning, independent), (siamese_mutual_learning, siamese_labels)]:
        same(joint(logits, target, **keywords), alone(logits, target, **keywords) + mimicry(), logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_labels_of_any_width(dtype):
    logits, target = made((2, 3, 2), 2)
    expected = siamese_labels(logits, target)
    assert torch.equal(siamese_labels(logits, target.to(dtype)), expected)
    void = 255 if dtype != torch.int8 else -1
    target[0, 0] = void
    ours = siamese_labels(logits, target.to(dtype), ignore_index=void)
    assert torch.equal(ours, siamese_labels(logits, target, ignore_index=void)) and ours != expected


@pytest.mark.parametrize("method", METHODS)
def test_stacked_heads(method):
    for shape in [(6,), (2, 3, 2)]:
        logits, target = made(shape, 3)
        for labels in (target, F.one_hot(target, N).movedim(-1, 1).double()):
            assert torch.equal(METHODS[method](torch.stack(logits), labels), METHODS[method](logits, labels))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keywords", [{}, {"weight": WEIGHT, "label_smoothing": 0.1}], ids=["plain", "weighted"])
def test_gradients_per_sample_by_vmap(method, keywords):
    """Of one sample (N,), and of a batch of one (1, N), one of them ignored, beside a Python loop."""
    logits, target = made((4,), 2)
    target[2] = -100
    loss = lambda z, y: METHODS[method](z, y, reduction="sum", **keywords)
    for alone in (lambda x: x, lambda x: x[None]):
        one = lambda a, b, y, alone=alone: loss([alone(a), alone(b)], alone(y))
        found = torch.func.vmap(torch.func.grad(one, (0, 1)))(*logits, target)
        for i in range(4):
            expected = torch.autograd.grad(one(logits[0][i], logits[1][i], target[i]), logits)
            torch.testing.assert_close([g[i] for g in found], [g[i] for g in expected], rtol=1e-11, atol=1e-13)
    stacked = torch.func.vmap(loss)(torch.stack(logits, 1), target)  # (C, N) of one sample
    expected = [loss([z[i] for z in logits], target[i]) for i in range(4)]
    torch.testing.assert_close(stacked, torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mean-peer"])
def test_second_derivatives(method):
    """By numbers, in one head, as DML's peers are fixed: the first derivative in a head has them as they are."""
    logits, target = made((3,), 2)
    target[1] = -100
    soft = made((3,), 1, seed=1)[0][0].detach().abs()
    for labels in (target, soft):
        for keywords in ({}, {"weight": WEIGHT, "label_smoothing": 0.1}):
            loss = lambda z, y=labels, more=keywords: METHODS[method]([z, logits[1].detach()], y, **more)
            assert torch.autograd.gradgradcheck(loss, logits[:1])


def test_second_derivatives_of_the_mean_peer():
    """Its peer is a fixed number, which numeric differences would move: the coupling's own are 1 / (2 cosh(d/2)^2)."""
    logits, target = made((3,), 1)
    s = logits[0].logsumexp(1)
    fixed = ((s - s.detach().mean()) / 2).cosh().log() * 2
    alone = F.cross_entropy(logits[0], target, reduction="none")
    first = [
        torch.autograd.grad(x, logits, create_graph=True)[0]
        for x in (METHODS["mean-peer"](logits, target, reduction="sum"), (alone + fixed).sum())
    ]
    second = [torch.autograd.grad((g * torch.arange(15.0).view(3, 5)).sum(), logits)[0] for g in first]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-12)


class Counted:
    """A backend of torch.compile that compiles nothing and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_without_a_graph_break(method):
    logits, target = made((6,), 2)
    target[2] = -100
    soft = made((6,), 1, seed=1)[0][0].detach().abs()
    for labels in (target, soft):
        for keywords in ({}, {"betas": (0.5, 2.0), "weight": WEIGHT, "label_smoothing": 0.1}):
            torch._dynamo.reset()
            compiled = torch.compile(METHODS[method], backend="aot_eager", fullgraph=True)
            same(compiled(logits, labels, **keywords), METHODS[method](logits, labels, **keywords), logits)


def test_a_tensor_as_coupling_is_scheduled_without_recompiling():
    logits, target = made((6,), 2)
    torch._dynamo.reset()
    compiled = torch.compile(siamese_labels, backend=(counted := Counted()), fullgraph=True)
    for value in (0.0, 0.3, 1.0):
        coupling = torch.tensor(value, dtype=torch.float64)
        expected = siamese_labels(logits, target, coupling=value)
        torch.testing.assert_close(compiled(logits, target, coupling=coupling), expected, rtol=1e-12, atol=0)
    assert counted.graphs == 1


def test_the_gradient_in_the_coupling_is_the_coupling_itself():
    logits, target = made((6,), 3)
    coupling = torch.tensor(0.3, requires_grad=True)  # in float32, beside logits in float64
    (slope,) = torch.autograd.grad(siamese_labels(logits, target, coupling=coupling), coupling)
    itself = siamese_labels(logits, target) - independent(logits, target)
    torch.testing.assert_close(slope.double(), itself, rtol=1e-6, atol=0)
    assert slope > 3 * math.log(3) - 1e-6


def test_a_hypergradient_on_held_out_data():
    """One step of SGD on the loss, then the held-out cross-entropy: its slope in the coupling, beside a difference."""
    g = torch.Generator().manual_seed(0)
    x, held_out = torch.randn(2, 8, 4, generator=g, dtype=torch.float64)
    y = torch.arange(8) % N
    start = torch.randn(2, 4, N, generator=g, dtype=torch.float64)

    def after_a_step(coupling):
        weights = start.clone().requires_grad_()
        loss = siamese_labels([x @ w for w in weights], y, coupling=coupling)
        (step,) = torch.autograd.grad(loss, weights, create_graph=True)
        return F.cross_entropy(held_out @ (weights - 0.5 * step)[0], y)

    coupling = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(after_a_step(coupling), coupling)
    difference = (after_a_step(0.5 + 1e-5) - after_a_step(0.5 - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)


def test_the_plain_form_is_what_records_were_trained_with_to_the_last_bit():
    """In float32 with class indices, also where a neighbour is ignored."""
    for count, size in [(2, 6), (3, 127), (7, 64)]:
        logits, target = made((size,), count, dtype=torch.float32)
        s = torch.stack([z.logsumexp(1) for z in logits])
        truth = torch.stack([z.gather(1, target[:, None])[:, 0] for z in logits])
        plain = (torch.lerp(s, s.logsumexp(0, keepdim=True), 1.0) - truth).sum(0)
        ours = siamese_labels(logits, target)
        assert torch.equal(ours, plain.mean())
        assert all(map(torch.equal, *(torch.autograd.grad(x, logits) for x in (ours, plain.mean()))))
        target = torch.where(torch.arange(size) == 3, -100, target)
        each = siamese_labels(logits, target, reduction="none")
        assert torch.equal(each[target >= 0], plain[target >= 0])


def test_the_module_has_every_keyword_and_class_weights_as_a_buffer():
    logits, target = made((6,), 2)
    target[0] = 255
    keywords = {"betas": (0.5, 2.0), "coupling": 0.5, "ignore_index": 255, "label_smoothing": 0.1, "reduction": "sum"}
    module = SiameseLabelsLoss(weight=WEIGHT.float(), **keywords)
    assert list(module.state_dict()) == ["weight"] and not list(module.parameters())
    module.double()
    assert module.weight.dtype == torch.float64
    same(module(logits, target), siamese_labels(logits, target, weight=WEIGHT, **keywords), logits)
    with pytest.raises(TypeError, match="wieght"):
        SiameseLabelsLoss(wieght=WEIGHT)(logits, target)


def test_class_weights_may_be_a_list_and_of_another_precision():
    logits, target = made((6,), 2)
    expected = siamese_labels(logits, target, weight=WEIGHT)
    assert torch.equal(siamese_labels(logits, target, weight=WEIGHT.tolist()), expected)
    assert torch.equal(siamese_labels(logits, target, weight=WEIGHT.float()), expected)  # halves are exact in both


class Output(dict):
    """As a model of transformers gives it."""

    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


Z, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
TOKENS, MASK = torch.zeros(2, 7, 3), torch.zeros(2, 1, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: siamese_labels([Output(Z), Output(Z)], Y), r"a head is a Output: give its \.logits"),
        (lambda: siamese_labels(Output(Z), Y), r"give its \.logits"),
        (lambda: siamese_labels([{"out": Z, "aux": Z}] * 2, Y), r'a head is a dict: give its \["out"\]'),
        (lambda: siamese_labels([(Z,), (Z,)], Y), "a head is a tuple: give its tensor"),
        (lambda: mutual_kl([Output(Z), Output(Z)]), r"give its \.logits"),
        (
            lambda: siamese_labels([TOKENS] * 2, torch.zeros(2, 7, dtype=torch.long)),
            r"\(B, T, N\) take transpose\(1, 2\)",
        ),
        (lambda: siamese_labels([torch.zeros(2, 3, 4, 5)] * 2, MASK), r"class indices as integers \(2, 4, 5\)"),
        (lambda: siamese_labels([Z, Z], F.one_hot(Y, 3)), r"or soft labels as floats \(4, 3\)"),
        (
            lambda: siamese_labels([Z, Z], Y.float()),
            r"class indices as integers \(4,\), or soft labels as floats \(4, 3\)",
        ),
        (lambda: siamese_labels(torch.zeros(2, 3, 4, 5), MASK[:, 0]), "a list with one tensor"),
        (lambda: siamese_labels([Z, Z], Y + 3), r"label 3 out of range: give 0 to 2, or ignore_index \(-100\)"),
        (lambda: siamese_labels([Z, Z], Y - 1), "label -1 out of range: give 0 to 2"),
        (lambda: siamese_labels([Z, Z], (Y - 1).to(torch.uint8)), "label 255 out of range"),
        (lambda: siamese_labels([Z, Z], Y - 100, ignore_index=255), r"label -100 .* ignore_index \(255\)"),
        (lambda: mutual_learning([Z, Z], Y + 7), "label 7 out of range"),
        (lambda: siamese_labels([Z, Z], Y, weight=torch.ones(2)), "give 3 class weights"),
        (lambda: siamese_labels([Z, Z], Y, label_smoothing=1.1), "label_smoothing from 0 to 1, not 1.1"),
    ],
)
def test_a_mistake_is_told_with_its_mend(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_class_weights_are_never_taken_for_betas(method):
    with pytest.raises(TypeError, match="positional"):
        METHODS[method]([Z, Z], Y, torch.tensor([1.0, 5.0]))
