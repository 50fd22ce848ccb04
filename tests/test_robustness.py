"""Scatter ratio, Hessian eigenvalues and parameter noise against exact values of small cases."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from silalib.training.robustness import (
    filter_norms,
    largest_eigenvalue,
    noise_directions,
    parameter_noise,
    scatter_ratio,
)

# -- scatter ratio


def test_scatter_ratio_by_hand():
    # class means (1, 0) and (1, 4), all points 1 from theirs; the means are 2 from the mean of all: 4 * 1 / (4 * 4)
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    assert scatter_ratio(features, torch.tensor([3, 3, 7, 7])) == pytest.approx(1 / 4)


def test_scatter_ratio_against_scatter_matrices():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [5, 20, 9])
    x = rng.normal(size=(34, 3)) + 2 * rng.normal(size=(3, 3))[labels]
    within, between = np.zeros((3, 3)), np.zeros((3, 3))
    for c in range(3):
        group = x[labels == c]
        within += len(group) * np.cov(group.T, bias=True)
        d = (group.mean(0) - x.mean(0))[:, None]
        between += len(group) * d @ d.T
    actual = scatter_ratio(torch.from_numpy(x).float(), torch.from_numpy(labels))
    assert actual == pytest.approx(np.trace(within) / np.trace(between), rel=1e-5)
    moved = scatter_ratio(torch.from_numpy(100 + 7 * x), torch.from_numpy(labels))
    assert moved == pytest.approx(actual, rel=1e-5)


# -- sharpness


def small_problem(seed=0):
    """(network, x, y) of 31 parameters in float64."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return network.double(), torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3


def exact_hessian(network, x, y, sign=1.0):
    parameters = dict(network.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat):
        parts = flat.split(sizes)
        values = {k: v.view_as(p) for (k, p), v in zip(parameters.items(), parts)}
        return sign * F.cross_entropy(functional_call(network, values, x), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(loss, flat)


def norm_of_every_weight(network):
    """For each single parameter the norm of the filter (row) it belongs to; of vectors each element is its own."""
    rows = []
    for p in network.parameters():
        for row in p.detach().numpy():
            rows += [math.sqrt((row**2).sum())] * row.size
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_largest_eigenvalue_of_a_network(scaled, sign):
    network, x, y = small_problem()
    hessian = exact_hessian(network, x, y, sign)
    if scaled:
        d = norm_of_every_weight(network)
        hessian = d[:, None] * hessian * d
    spectrum = torch.linalg.eigvalsh(hessian)
    assert (spectrum[-1] > -spectrum[0]) == (sign > 0)  # with the sign changed the largest in size is negative
    loss = lambda: sign * F.cross_entropy(network(x), y)
    value, steps, residual = largest_eigenvalue(loss, network.parameters(), scaled)
    assert value == pytest.approx(spectrum[-1].item(), rel=1e-4)
    assert residual < 1e-4
    assert 1 < steps < 200


def quadratic(eigenvalues):
    """A loss with a diagonal Hessian, and its parameters: a 2x2 matrix and a vector."""
    parameters = [torch.ones(2, 2, requires_grad=True), torch.ones(len(eigenvalues) - 4, requires_grad=True)]
    h = torch.tensor(eigenvalues)
    return (lambda: (h * torch.cat([p.flatten() for p in parameters]) ** 2).sum() / 2), parameters


@pytest.mark.parametrize(
    "eigenvalues, largest",
    [
        ((1.0, 0.5, 7.0, 0.0, -2.0, 3.0), 7.0),
        ((1.0, 0.5, -7.0, 0.0, -2.0, 3.0), 3.0),  # the largest in size is negative
        ((5.0, 1.0, -4.95, 0.0, 0.5, 0.2), 5.0),  # or nearly so
        ((4.95, 1.0, -5.0, 0.0, 0.5, 0.2), 4.95),
        ((-1.0, -5.0, -7.0, -2.0, -2.0, -3.0), -1.0),  # all are
    ],
)
def test_signs_of_eigenvalues(eigenvalues, largest):
    loss, parameters = quadratic(eigenvalues)
    value, _, residual = largest_eigenvalue(loss, parameters)
    assert value == pytest.approx(largest, rel=1e-3)
    assert residual < 1e-3


def test_scaled_eigenvalue_by_hand():
    """Each second derivative is multiplied by the squared norm of its filter; a vector's elements stand alone."""
    loss, parameters = quadratic((1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    with torch.no_grad():
        parameters[0].copy_(torch.tensor([[1.0, 1.0], [3.0, 4.0]]))  # squared norms 2 and 25
        parameters[1].copy_(torch.tensor([-4.0, 2.0]))  # 16 and 4
    value, _, _ = largest_eigenvalue(loss, parameters, scaled=True)
    assert value == pytest.approx(25, rel=1e-4)
    with torch.no_grad():
        parameters[1][0] = -6.0
    value, _, _ = largest_eigenvalue(loss, parameters, scaled=True)
    assert value == pytest.approx(36, rel=1e-4)


def test_scaled_eigenvalue_does_not_see_a_rescaled_filter():
    """A filter before BatchNorm may be scaled freely: the function stays, the plain eigenvalue changes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3, eps=1e-12), nn.Flatten(), nn.Linear(12, 3)
    )
    network.double()
    x, y = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.arange(9) % 3
    loss = lambda: F.cross_entropy(network(x), y)
    measure = lambda scaled: largest_eigenvalue(loss, network.parameters(), scaled)[0]
    plain, scaled = measure(False), measure(True)
    with torch.no_grad():
        network[0].weight.mul_(0.1)
    assert measure(True) == pytest.approx(scaled, rel=1e-5)
    assert abs(measure(False) / plain - 1) > 0.5


@pytest.mark.parametrize("lowest, highest", [(0.9, 1.0), (-1.0, 0.001)])
def test_what_does_not_converge_gives_a_number_and_its_residual(lowest, highest):
    """400 eigenvalues close together, and too few iterations to tell them apart; the residual bounds the error."""
    eigenvalues = torch.linspace(lowest, highest, 400)
    loss, parameters = quadratic(eigenvalues.tolist())
    value, products, residual = largest_eigenvalue(loss, parameters, iterations=1)
    assert lowest < value < highest + 1e-6 and products < 100
    assert residual > 1e-4
    assert (eigenvalues - value).abs().min() <= residual * abs(value)
    assert all(p.grad is None for p in parameters)


# -- noise


def predict(x):
    return lambda network: network(x)


def noisy_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()
    return network, torch.randn(8, 1, 4, 4), torch.arange(8) % 4


@pytest.mark.parametrize("kind", ["absolute", "filter"])
def test_noise_leaves_the_network_as_it_was(kind):
    network, x, y = noisy_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    rows = list(parameter_noise(network, predict(x), y, sigmas=4, draws=3, kind=kind, seed=0))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    largest = {"absolute": 0.02, "filter": 0.5}[kind]
    expected = [(0, 0.0)] + [(draw, largest * step / 4) for draw in range(3) for step in (1, 2, 3, 4)]
    assert [row["draw"] for row in rows] == [draw for draw, _ in expected]
    assert [row["sigma"] for row in rows] == pytest.approx([sigma for _, sigma in expected])
    assert {row["kind"] for row in rows} == {kind}
    clean = F.cross_entropy(network(x), y).item()
    assert rows[0]["nll"] == pytest.approx(clean, rel=1e-6)
    assert rows[0]["top1"] == pytest.approx(100 * (network(x).argmax(1) == y).double().mean().item())
    assert len({row["nll"] for row in rows}) == len(rows)  # every draw and every sigma tells


def test_noise_reaches_every_parameter_and_no_buffer():
    network, x, y = noisy_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trainable = {k for k, _ in network.named_parameters()}
    noisy = parameter_noise(network, predict(x), y, sigmas=1, draws=1, kind="absolute", seed=0)
    last = list(islice(noisy, 2))[-1]
    assert last["sigma"] == 0.02
    for key, value in network.state_dict().items():
        assert (value != before[key]).any() == (key in trainable), key
    noisy.close()  # a caller that does not read on
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_failing_prediction_leaves_the_network_as_it_was():
    network, x, y = noisy_network()
    before = [p.clone() for p in network.parameters()]
    calls = iter([network(x)])
    with pytest.raises(RuntimeError):
        list(parameter_noise(network, lambda _: next(calls), y, sigmas=2, draws=1, kind="filter", seed=0))
    assert all(map(torch.equal, network.parameters(), before))


def test_noise_in_a_known_direction():
    """One weight per class: the logits are (w + sigma d) x, the NLL log(1 + exp(-margin))."""
    network = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0], [1.0]]))
    (direction,) = noise_directions([network.weight.detach()], "absolute", seed=0, draw=0)
    change = (direction[0] - direction[1]).item()  # of the margin of class 0 per unit of x and of sigma
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    rows = list(parameter_noise(network, predict(x), y, sigmas=2, draws=1, kind="absolute", seed=0))
    for row, sigma in zip(rows, (0, 0.01, 0.02), strict=True):
        margin = 2 + sigma * change
        assert row["sigma"] == pytest.approx(sigma)
        nll = (math.log1p(math.exp(-margin)) + math.log1p(math.exp(2 * margin))) / 2
        assert row["nll"] == pytest.approx(nll, rel=1e-5)
        assert row["top1"] == 50  # a margin of either sign is right for one of the two images


def test_directions():
    shapes = [torch.zeros(40, 50), torch.zeros(300)]
    directions = noise_directions(shapes, "absolute", seed=3, draw=1)
    assert [d.shape for d in directions] == [p.shape for p in shapes]
    assert directions[0].mean().item() == pytest.approx(0, abs=0.1)
    assert directions[0].std().item() == pytest.approx(1, abs=0.1)
    torch.manual_seed(99)
    assert all(map(torch.equal, directions, noise_directions(shapes, "absolute", seed=3, draw=1)))
    for seed, draw in [(3, 2), (4, 1)]:
        assert not torch.equal(directions[0], noise_directions(shapes, "absolute", seed, draw)[0])


def test_filter_noise_has_the_norm_of_its_filter():
    torch.manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 30.0])
    parameters = [torch.randn(3, 4, 3, 3) * scale[:, None, None, None], torch.randn(3, 8) * scale[:, None], -scale]
    draws = 500
    mean = [torch.zeros(3) for _ in parameters]
    for draw in range(draws):
        for total, noise in zip(mean, noise_directions(parameters, "filter", 0, draw)):
            total += noise.flatten(1).square().sum(1) / draws if noise.dim() > 1 else noise.square() / draws
    # relative error of a mean of chi-squares with d degrees of freedom: sqrt(2 / (d * draws))
    for p, squared, d in zip(parameters, mean, (36, 8, 1)):
        expected = p.flatten(1).square().sum(1) if p.dim() > 1 else p.square()
        torch.testing.assert_close(squared / expected, torch.ones(3), rtol=0, atol=4 * math.sqrt(2 / (d * draws)))


def test_filter_norms_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert filter_norms(weight).tolist() == [[5.0], [2.0]]
    assert filter_norms(weight.reshape(2, 1, 1, 2)).flatten().tolist() == [5.0, 2.0]
    assert filter_norms(weight.reshape(2, 1, 1, 2)).shape == (2, 1, 1, 1)
    assert filter_norms(torch.tensor([-3.0, 2.0])).tolist() == [3.0, 2.0]
