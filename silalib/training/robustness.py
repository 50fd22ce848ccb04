"""Weight-noise curves and Hessian sharpness (Figure 7b), and the scatter of features (Figure 6)."""

from contextlib import suppress

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ..randomness import generator
from .metrics import summaries

LARGEST_SIGMA = {"absolute": 0.02, "filter": 0.5}  # standard deviation of the noise, or its length in filters' norms


def filter_norms(parameter):
    """The norm of each filter (row of a weight, element of a vector), shaped to multiply the parameter."""
    if parameter.dim() < 2:
        return parameter.abs()
    return parameter.flatten(1).norm(dim=1).view(-1, *[1] * (parameter.dim() - 1))


def noise_directions(parameters, kind, seed, draw):
    """Gaussian noise for every parameter: of standard deviation 1 ("absolute"), or about as long as its filter.
    Drawn where the parameters are: a GPU draws other numbers than a CPU."""
    g = generator(seed, "noise", draw, device=parameters[0].device)
    drawn = (torch.randn(p.shape, generator=g, device=p.device).to(p) for p in parameters)
    length = lambda p: filter_norms(p) / p[0].numel() ** 0.5
    return [d * length(p) if kind == "filter" else d for d, p in zip(drawn, parameters)]


@torch.no_grad()
def parameter_noise(network, predict, target, sigmas, draws, kind, seed):
    """Training NLL after Gaussian noise on every parameter, BatchNorm's included, running statistics not (Figure 7b).
    predict(network) -> logits (n, N). sigmas: number of equal steps from 0 to the kind's largest; each draw is one
    direction, scaled by every sigma. Yields {"kind", "sigma", "draw", "nll", "top1"} and puts the parameters back."""
    parameters, saved = list(network.parameters()), [p.clone() for p in network.parameters()]
    try:
        for draw in range(draws):
            directions = noise_directions(saved, kind, seed, draw)
            for step in range(0 if draw == 0 else 1, sigmas + 1):
                sigma = LARGEST_SIGMA[kind] * step / sigmas
                for p, original, direction in zip(parameters, saved, directions):
                    p.copy_(original + sigma * direction)
                (found,) = summaries([predict(network)], target)
                yield {"kind": kind, "sigma": sigma, "draw": draw, "nll": found["nll"], "top1": found["top1"]}
    finally:
        for p, original in zip(parameters, saved):
            p.copy_(original)


def scatter_ratio(features, labels):
    """Within- over between-class scatter of features (n, d): trace(S_w) / trace(S_b); smaller is more concentrated."""
    features = features.double()
    groups = [features[labels == label] for label in labels.unique()]
    within = sum((group - group.mean(0)).square().sum() for group in groups)
    between = sum(len(group) * (group.mean(0) - features.mean(0)).square().sum() for group in groups)
    return (within / between).item()


def largest_eigenvalue(loss, parameters, scaled=False, tolerance=1e-4, iterations=50, seed=0):
    """The largest signed eigenvalue of the Hessian of `loss()`, by Lanczos iteration with Hessian-vector products:
    (eigenvalue, products used, relative residual |Hv - ev| / |e|). iterations: restarts, then `tolerance` is widened.
    scaled: of the Hessian in coordinates relative to each filter's norm, which does not change when a filter and the
    BatchNorm behind it are rescaled."""
    parameters = list(parameters)
    flat = lambda tensors: torch.cat([tensor.flatten() for tensor in tensors])
    units = flat(filter_norms(p).detach().expand_as(p) if scaled else torch.ones_like(p) for p in parameters)
    gradient = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
    products, n = 0, len(units)

    def product(vector):
        nonlocal products
        products += 1
        direction = units * torch.from_numpy(vector).to(units)
        image = torch.autograd.grad(gradient, parameters, direction, retain_graph=True)
        return (units * flat(image)).cpu().numpy()

    hessian = LinearOperator((n, n), matvec=product, dtype=np.float32)
    start = torch.randn(n, generator=generator(seed, "eigenvector")).numpy()
    for widened in (tolerance, 100 * tolerance, 1e30):  # the last one is always met
        with suppress(ArpackNoConvergence):
            # ncv vectors as long as all parameters are held in the host's memory
            (value,), vectors = eigsh(hessian, 1, which="LA", v0=start, ncv=min(8, n), tol=widened, maxiter=iterations)
            break
    value, vector = float(value), vectors[:, 0]
    return value, products, float(np.linalg.norm(product(vector) - value * vector) / abs(value))
