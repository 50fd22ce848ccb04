"""MSDNet: sizes and costs as published, its structure, its exits."""

from collections import Counter
from copy import deepcopy
from itertools import accumulate

import pytest
import torch
from torch import nn

from silalib.losses import METHODS
from silalib.models import MODELS, count_parameters, macs_by_layer
from silalib.models.msdnet import LAYERS_OF_BLOCKS, Concatenate


def on_meta(name, classes=100, **arguments):
    """A network without memory: its shapes alone."""
    with torch.device("meta"):
        return MODELS[name](classes, **arguments)


def size_of(name):
    return 224 if name == "msdnet_imagenet" else 32


SIZES = [
    ("msdnet_anytime", 100, 3_067_960),
    ("msdnet_budgeted", 100, 2_078_924),
    ("msdnet_imagenet", 1000, 23_958_440),
    ("msdnet_imagenet", 100, 22_168_340),
]
MILLION_MACS = {
    "msdnet_anytime": (
        [11.416, 17.271, 25.609, 30.733, 36.742, 42.933, 47.603],
        [3.552, 4.436, 3.183, 4.068, 4.953, 3.404, 4.289],
    ),
    "msdnet_budgeted": ([4.568, 8.875, 19.425, 29.231, 41.509], [2.225, 3.109, 2.520, 4.289, 4.436]),
}
"""At 100 classes and 3x32x32: blocks alone, cumulative, and classifiers."""


@pytest.mark.parametrize("name, classes, parameters", SIZES)
def test_parameters(name, classes, parameters):
    assert count_parameters(on_meta(name, classes)) == parameters


@pytest.mark.parametrize("name", MILLION_MACS)
def test_cost_of_every_block_and_classifier(name):
    macs = macs_by_layer(on_meta(name), (3, 32, 32))
    part = lambda prefix: sum(n for layer, n in macs.items() if layer.startswith(prefix))
    blocks, classifiers = MILLION_MACS[name]
    ours = accumulate(part(f"blocks.{k}.") for k in range(len(blocks)))
    assert [round(n / 1e6, 3) for n in ours] == blocks
    assert [round(part(f"classifiers.{k}.") / 1e6, 3) for k in range(len(classifiers))] == classifiers


@pytest.mark.parametrize("name", LAYERS_OF_BLOCKS)
def test_scales(name):
    """Every scale has half the size of the finer one; the finest is dropped every ceil(L / S) layers of all L."""
    network, layers = on_meta(name), sum(LAYERS_OF_BLOCKS[name])
    sizes = [56, 28, 14, 7] if name == "msdnet_imagenet" else [32, 16, 8]
    every = -(-layers // len(sizes))
    x, done = torch.empty(1, 3, size_of(name), size_of(name), device="meta"), 0
    for block, count in zip(network.blocks, LAYERS_OF_BLOCKS[name]):
        x, done = block(x), done + count
        assert [f.shape[-1] for f in x] == sizes[(done - 1) // every :]
        assert [f.shape[1] / x[-1].shape[1] for f in x][-3:] == ([0.5, 1, 1] if len(sizes) == 4 else [0.25, 0.5, 1])[
            -len(x) :
        ]


def test_channels_of_the_anytime_network():
    """By hand: 16 + 6 a layer, halved after the 7th and the 13th of 16 layers; the coarsest scale has four times."""
    network, x, channels = on_meta("msdnet_anytime"), torch.empty(1, 3, 32, 32, device="meta"), []
    for block in network.blocks:
        x = block(x)
        channels.append(x[-1].shape[1])
    # 16+24=40, 52, (58/2=29) 35, 47, 59, (65/2=32) 38, 50
    assert channels == [4 * c for c in (40, 52, 35, 47, 59, 38, 50)]


def test_first_weights_are_normal_with_variance_two_over_the_filters():
    torch.manual_seed(0)
    network = MODELS["msdnet_anytime"](100)
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            assert m.bias is None
            variance = 2 / (m.kernel_size[0] ** 2 * m.out_channels)
            n = m.weight.numel()
            # of n draws, five standard errors
            assert abs(m.weight.square().mean().item() / variance - 1) < 5 * (2 / n) ** 0.5
            assert abs(m.weight.mean().item()) < 5 * (variance / n) ** 0.5
        elif isinstance(m, nn.Linear):
            assert not m.bias.any()
    biased = [m for m in on_meta("msdnet_imagenet").modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert [m.kernel_size for m in biased] == [(7, 7)]


@pytest.mark.parametrize("name", LAYERS_OF_BLOCKS)
@pytest.mark.parametrize("width", [0.001, 0.6])
def test_any_width(name, width):
    network = on_meta(name, 10, in_channels=1, width=width)
    exits = network(torch.empty(2, 1, size_of(name), size_of(name), device="meta"))
    assert isinstance(exits, tuple) and [z.shape for z in exits] == [(2, 10)] * len(LAYERS_OF_BLOCKS[name])
    assert count_parameters(network) < count_parameters(on_meta(name, 10, in_channels=1))


@pytest.mark.parametrize("name", LAYERS_OF_BLOCKS)
def test_fewer_blocks(name):
    for blocks in (1, 3, len(LAYERS_OF_BLOCKS[name])):
        network = on_meta(name, 10, blocks=blocks)
        assert len(network(torch.empty(2, 3, size_of(name), size_of(name), device="meta"))) == blocks
    for blocks in (0, len(LAYERS_OF_BLOCKS[name]) + 1):
        with pytest.raises(ValueError, match=f"has 1 to {len(LAYERS_OF_BLOCKS[name])} blocks, not {blocks}"):
            MODELS[name](10, blocks=blocks)


def test_a_stem_that_is_not_its_own_is_refused():
    for name, own, other in [
        ("msdnet_anytime", "cifar", "imagenet"),
        ("msdnet_budgeted", "cifar", "imagenet"),
        ("msdnet_imagenet", "imagenet", "cifar"),
    ]:
        on_meta(name, stem=own)
        with pytest.raises(ValueError, match=f"no stem '{other}' for this network: choose from {own}"):
            MODELS[name](10, stem=other)


@pytest.mark.parametrize(
    "name, size, method",
    [("msdnet_budgeted", 28, "sila"), ("msdnet_imagenet", 64, "sila"), *(("msdnet_anytime", 32, m) for m in METHODS)],
)
def test_one_step_reaches_every_parameter(name, size, method):
    """The method decides what reaches the logits, the network what goes on from there."""
    torch.manual_seed(0)
    network = MODELS[name](10, 3, 0.25)
    x, y = torch.randn(8, 3, size, size), torch.arange(8)
    loss = METHODS[method](network(x), y)
    loss.backward()
    assert loss.isfinite()
    for key, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.dim() == 1 or p.grad.abs().max() > 0, key


def test_an_exit_depends_on_its_own_blocks_alone():
    torch.manual_seed(0)
    network = MODELS["msdnet_anytime"](10, 1, 0.25).eval()
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        before = network(x)
        for p in network.blocks[3].parameters():
            p.add_(0.1 * torch.randn_like(p))
        after = network(x)
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3]))
    assert not any(torch.equal(a, b) for a, b in zip(before[3:], after[3:]))
    with torch.no_grad():
        for a, b in zip(network(x), network(x[1:2])):  # nor on the other images of the batch
            torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_concatenated_channels(layout):
    """First and second, against finite differences; and torch.func takes them too."""
    parts = [torch.randn(2, n, 2, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_() for n in (3, 1, 2)]
    assert torch.equal(Concatenate.apply(*parts), torch.cat(parts, 1))
    assert torch.autograd.gradcheck(Concatenate.apply, parts)
    assert torch.autograd.gradgradcheck(Concatenate.apply, parts)
    weight = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    found = torch.func.grad(lambda *x: (Concatenate.apply(*x) * weight).sum(), argnums=(0, 1, 2))(*parts)
    assert all(torch.equal(a, b) for a, b in zip(found, weight.split([3, 1, 2], 1), strict=True))


class OneByOne(nn.BatchNorm2d):
    """As data-parallel training has it: another kind of BatchNorm2d, which must not be passed over."""


@pytest.mark.parametrize("name", ["msdnet_anytime", "msdnet_budgeted"])
def test_bottlenecks_computed_as_one_are_those_computed_one_by_one(name):
    """Two steps in float64: logits, gradients, running statistics; and each layer is called where it is not as one."""
    torch.manual_seed(0)
    together = MODELS[name](10, width=0.25, blocks=3).double().to(memory_format=torch.channels_last).train()
    alone = deepcopy(together)
    norms = [m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)]
    called = Counter()
    for norm in norms:
        norm.__class__ = OneByOne
        norm.register_forward_hook(lambda norm, *_: called.update([norm]))
    for _ in range(2):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        for expected, logits in zip(alone(images), together(images), strict=True):
            torch.testing.assert_close(logits, expected)
            for z in (expected, logits):
                z.square().sum().backward(retain_graph=True)
    assert called == Counter(2 * norms)
    torch.testing.assert_close(dict(together.state_dict()), dict(alone.state_dict()))
    for (name, own), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout, as_one", [(torch.channels_last, True), (torch.contiguous_format, False)])
def test_bottlenecks_are_computed_as_one_in_the_layout_of_training(layout, as_one):
    network = MODELS["msdnet_anytime"](10, width=0.25, blocks=1).to(memory_format=layout).train()
    norms, called = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)], Counter()
    for norm in norms:
        norm.register_forward_hook(lambda norm, *_: called.update([norm]))
    network(torch.randn(2, 3, 32, 32).to(memory_format=layout))
    assert (len(called) < len(norms)) == as_one
