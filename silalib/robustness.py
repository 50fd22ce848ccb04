"""What a trained network is like around its parameters (Figure 7b) and before its last layer (Figure 6)."""

import torch

from .metrics import cross_entropy, in_top_k
from .randomness import generator

ABSOLUTE_SIGMA = 0.02
"""Largest standard deviation of the noise in Figure 7b."""
FILTER_SIGMA = 0.5
"""Largest noise relative to a filter's norm."""


def filter_norms(parameter):
    """The norm of each filter (row of a weight, element of a vector), shaped to multiply the parameter."""
    if parameter.dim() < 2:
        return parameter.abs()
    return parameter.flatten(1).norm(dim=1).view(-1, *[1] * (parameter.dim() - 1))


def noise_directions(parameters, kind, seed, draw):
    """Gaussian noise for every parameter: of standard deviation 1 ("absolute"), or about as long as its filter.

    Drawn where the parameters are: a GPU draws other numbers than a CPU.
    """
    device = parameters[0].device
    g = generator(seed, "noise", draw, device=device)
    directions = []
    for p in parameters:
        noise = torch.randn(p.shape, generator=g, device=device).to(p)
        if kind == "filter":
            per_filter = p[0].numel() if p.dim() > 1 else 1
            noise = noise * (filter_norms(p) / per_filter**0.5)
        directions.append(noise)
    return directions


@torch.no_grad()
def parameter_noise(network, predict, target, sigmas, draws, kind, seed):
    """Training NLL after Gaussian noise on every parameter, BatchNorm's included, running statistics not (Figure 7b).

    predict(network) -> logits (n, N). sigmas: number of equal steps from 0 to the kind's largest sigma.
    Each draw is one direction, scaled by every sigma. Yields {"kind", "sigma", "draw", "nll", "top1"}; the
    parameters are put back as they were.
    """
    parameters = list(network.parameters())
    saved = [p.clone() for p in parameters]
    largest = {"absolute": ABSOLUTE_SIGMA, "filter": FILTER_SIGMA}[kind]
    try:
        for draw in range(draws):
            directions = noise_directions(saved, kind, seed, draw)
            for step in range(0 if draw == 0 else 1, sigmas + 1):
                sigma = largest * step / sigmas
                for p, original, direction in zip(parameters, saved, directions):
                    p.copy_(original + sigma * direction)
                logits = predict(network)
                yield {
                    "kind": kind,
                    "sigma": sigma,
                    "draw": draw,
                    "nll": cross_entropy(logits, target).double().mean().item(),
                    "top1": 100 * in_top_k(logits, target, 1).double().mean().item(),
                }
    finally:
        for p, original in zip(parameters, saved):
            p.copy_(original)


def concentration(features, labels):
    """Within- over between-class scatter of features (n, d): trace(S_w) / trace(S_b); smaller is more concentrated."""
    features = features.double()
    mean = features.mean(0)
    within = between = 0.0
    for label in labels.unique():
        group = features[labels == label]
        centre = group.mean(0)
        within += (group - centre).square().sum()
        between += len(group) * (centre - mean).square().sum()
    return (within / between).item()


def largest_eigenvalue(loss, parameters, scaled=False, steps=100, tolerance=1e-2, seed=0):
    """The largest signed Hessian eigenvalue of `loss()` by power iteration with Hessian-vector products.

    scaled: of the Hessian in coordinates relative to each filter's norm, which does not change when a filter and the
    BatchNorm behind it are rescaled. Power iteration finds the eigenvalue of largest size; if it is negative, or two
    of opposite sign are about as large, a second one on the shifted Hessian finds the largest.
    Returns (eigenvalue, steps used, relative residual |Hv - ev| / |e|).
    """
    parameters = list(parameters)
    norms = [filter_norms(p).detach() for p in parameters] if scaled else None
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)

    def product(vector):
        if scaled:
            vector = [v * n for v, n in zip(vector, norms)]
        result = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        return [r * n for r, n in zip(result, norms)] if scaled else list(result)

    def iterate(shift):
        g = generator(seed, "eigenvector")
        vector = _unit([torch.randn(p.shape, generator=g).to(p) for p in parameters])
        for used in range(1, steps + 1):  # noqa: B007
            image = product(vector)
            value = _dot(vector, image)
            residual = sum((i - value * v).square().sum() for i, v in zip(image, vector)).sqrt() / value.abs()
            if residual < tolerance:
                break
            vector = _unit([i - shift * v for i, v in zip(image, vector)])
        return value.item(), used, residual.item(), _dot(image, image).sqrt().item()

    value, used, residual, size = iterate(0.0)
    if value < 0 or residual >= tolerance:
        other, more, rest, _ = iterate(-size)
        used += more
        if value < 0 or rest < residual:
            value, residual = other, rest
    return value, used, residual


def _dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b))


def _unit(vector):
    norm = _dot(vector, vector).sqrt()
    return [v / norm for v in vector]
