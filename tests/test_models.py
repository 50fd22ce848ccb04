"""The networks: sizes as published, logits as torchvision's, one training step each."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from silalib.losses import METHODS
from silalib.models import EXITS, MODELS, NAMES, STEMS, count_macs, count_parameters
from silalib.models.layers import Conv2d, Convolution3x3

ONE_HEAD = [name for name in MODELS if name not in EXITS]
"""MSDNet's exits are tested in test_msdnet.py."""


def on_meta(name, **arguments):
    """A network without memory: its shapes alone."""
    with torch.device("meta"):
        return MODELS[name](100, **arguments)


@dataclass
class Published:
    parameters: int
    million_macs: int


PUBLISHED = {
    "resnet18": Published(11_220_132, 555),
    "resnet34": Published(21_328_292, 1159),
    "vgg13": Published(28_703_140, 248),
    "vgg19": Published(39_327_652, 417),
    "mobilenet": Published(3_309_476, 46),
    "wrn16_10": Published(17_174_324, 2412),
    "densenet121": Published(7_048_676, 888),
}
"""At 100 classes and 3x32x32. WRN-16-10: 17,116,634 at 10 classes (Zagoruyko & Komodakis) and 90 more outputs of 641
weights. DenseNet121: torchvision's 7,978,856 with 900 fewer outputs of 1,025 weights and a stem of 27 instead of 147
weights in each of 64 filters."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(name):
    network = on_meta(name)
    assert count_parameters(network) == PUBLISHED[name].parameters
    assert round(count_macs(network, (3, 32, 32)) / 1e6) == PUBLISHED[name].million_macs


@pytest.mark.parametrize("name, million_macs", [("resnet18", 1814), ("resnet34", 3663)])
def test_size_with_the_imagenet_stem(name, million_macs):
    """torchvision publishes 1.814 and 3.664 GMACs at 1000 classes; 900 fewer outputs save half a million."""
    network = on_meta(name, stem="imagenet")
    assert count_parameters(network) == PUBLISHED[name].parameters + 64 * 3 * (49 - 9)
    assert round(count_macs(network, (3, 224, 224)) / 1e6) == million_macs


@pytest.mark.parametrize("name", MODELS)
def test_a_stem_a_network_does_not_have_is_refused(name):
    for stem in {"cifar", "imagenet", "other"} - set(STEMS.get(name, ("cifar",))):
        with pytest.raises(ValueError, match=f"no stem '{stem}'"):
            on_meta(name, stem=stem)


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_half_of_torchs_flops(name):
    from torch.utils.flop_counter import FlopCounterMode

    network = on_meta(name, in_channels=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert 2 * count_macs(network, (3, 32, 32)) == counter.get_total_flops()


def test_counting_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    # 16 places, 3 filters of 2x3x3; then 48 inputs for each of 5 outputs
    assert count_macs(network, (2, 6, 6)) == 16 * 3 * 18 + 48 * 5
    assert network.training
    assert not any(m._forward_hooks for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert count_parameters(network) == 3 * 18 + 2 * 3 + 48 * 5 + 5


def test_every_network_has_a_name():
    assert set(NAMES) == set(MODELS)


# -- torchvision's networks


def vary(network):
    """Give BatchNorm weights that are not one and zero, so that a wrong one shows."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
                m.bias.copy_(0.2 * torch.randn(m.bias.shape, generator=g))
    return network


def assert_same_logits(ours, theirs, size):
    theirs.load_state_dict(vary(ours).state_dict())
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for training in (True, False):  # the first moves the running statistics that the second uses
            logits = []
            for network in (ours.train(training), theirs.train(training)):
                torch.manual_seed(3)  # the same dropout
                logits.append(network(x))
            assert logits[0].std() > 1e-3
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert all(torch.allclose(mine[k], other[k], rtol=1e-4, atol=1e-5) for k in mine)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnet_is_torchvisions_with_another_stem(name):
    from silalib.data._torchvision import torchvision

    theirs = getattr(torchvision.models, name)(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    assert_same_logits(MODELS[name](10), theirs, size=16)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_resnet_with_the_imagenet_stem_is_torchvisions(name):
    from silalib.data._torchvision import torchvision

    theirs = getattr(torchvision.models, name)(num_classes=10)
    assert_same_logits(MODELS[name](10, stem="imagenet"), theirs, size=64)


def test_densenet_is_torchvisions_with_another_stem():
    from silalib.data._torchvision import torchvision

    theirs = torchvision.models.densenet121(num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.features.pool0 = nn.Identity()
    assert_same_logits(MODELS["densenet121"](10), theirs, size=16)


def test_wrn_is_a_residual_network_with_preactivation():
    """Its logits, written out from the weights with functions alone."""
    torch.manual_seed(0)
    network = vary(MODELS["wrn16_10"](10, 3, 0.125)).eval()
    blocks = [m for m in network.features if hasattr(m, "conv1")]
    assert [(b.conv1.stride[0], b.shortcut is not None) for b in blocks] == [
        (1, True), (1, False), (2, True), (1, False), (2, True), (1, False),
    ]  # fmt: skip
    assert not any(m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d))

    def active(norm, x):
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        x = F.conv2d(images, network.features[0].weight, padding=1)
        for block in blocks:
            a = active(block.bn1, x)
            inner = F.conv2d(a, block.conv1.weight, stride=block.conv1.stride, padding=1)
            inner = F.conv2d(active(block.bn2, inner), block.conv2.weight, padding=1)
            wide = x if block.shortcut is None else F.conv2d(a, block.shortcut.weight, stride=block.shortcut.stride)
            x = inner + wide
        logits = active(network.features[-2], x).mean((2, 3)) @ network.fc.weight.T + network.fc.bias
        torch.testing.assert_close(network(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg13", "vgg19"])
def test_vgg_is_torchvisions_with_another_head(name):
    from silalib.data._torchvision import torchvision

    theirs = getattr(torchvision.models, f"{name}_bn")(num_classes=10, init_weights=False)
    theirs.avgpool = nn.Identity()
    theirs.classifier[0] = nn.Linear(512, 4096)  # after five pools 32x32 is 1x1
    ours = MODELS[name](10)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():  # logits of a size that says something
        for m in ours.classifier:
            if isinstance(m, nn.Linear):
                m.weight.normal_(std=m.in_features**-0.5, generator=g)
                m.bias.normal_(generator=g)
    assert_same_logits(ours, theirs, size=32)


# -- every network


@pytest.mark.parametrize("name", ONE_HEAD)
def test_width_scales_every_channel(name):
    whole, half = (list(on_meta(name, in_channels=3, width=w).modules()) for w in (1.0, 0.5))
    outputs = lambda m: getattr(m, "out_channels", None) or getattr(m, "num_features", None) or m.out_features
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.Linear
    pairs = [(outputs(a), outputs(b)) for a, b in zip(whole, half) if isinstance(a, kinds)]
    fixed = [(2, 2), (100, 100)] if name == "convnet12" else [(100, 100)]
    assert pairs[-len(fixed) :] == fixed
    assert len(pairs) > 10
    assert all(a == 2 * b for a, b in pairs[: -len(fixed)])


@pytest.mark.parametrize("name", ONE_HEAD)
def test_no_width_is_too_small(name):
    network = on_meta(name, in_channels=3, width=0.001)
    assert network.eval()(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 100)


NETWORKS = [(name, stem) for name in ONE_HEAD for stem in STEMS.get(name, ("cifar",))]
"""The method decides what reaches the logits, the network what goes on from there."""


@pytest.mark.parametrize(
    "name, stem, method",
    [*((*network, "sila") for network in NETWORKS), *(("resnet18", "cifar", m) for m in METHODS if m != "sila")],
)
def test_one_step_reaches_every_parameter(name, stem, method):
    torch.manual_seed(0)
    nets = [MODELS[name](10, 3, 0.25, stem) for _ in range(2)]
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    logits = [net(x) for net in nets]
    assert all(z.shape == (8, 10) for z in logits)
    loss = METHODS[method](logits, y)
    loss.backward()
    assert loss.isfinite()
    for net in nets:
        for key, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), key
            # a bias before BatchNorm has no effect, so its gradient may be nil
            assert p.dim() == 1 or p.grad.abs().max() > 0, key


INPUTS = [(name, size) for name in ONE_HEAD for size in (28, 32) if not (size < 32 and name.startswith("vgg"))]
"""VGG's five pools need 32x32."""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name, size", INPUTS)
def test_input(name, size, channels):
    network = on_meta(name, in_channels=channels, width=0.25)
    assert network(torch.empty(2, channels, size, size, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", ONE_HEAD)
def test_a_sample_does_not_depend_on_its_batch_in_evaluation(name):
    torch.manual_seed(0)
    network = MODELS[name](10, 3, 0.125).eval()
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[2:3], network(x[2:3]), rtol=1e-4, atol=1e-6)


def test_convnet12():
    network = MODELS["convnet12"](10, 1, 0.25)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 10
    assert {(m.kernel_size, m.stride, m.padding, m.out_channels) for m in convolutions} == {
        ((3, 3), (1, 1), (1, 1), 16)
    }
    assert [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Linear)] == [(2, 9 * 16), (10, 2)]
    order = "".join({"Conv2d": "c", "MaxPool2d": "p"}.get(type(m).__name__, "") for m in network.modules())
    assert order == "cpcccpcccpccc"
    x = torch.randn(4, 1, 28, 28)
    network.eval()
    features = network.embed(x)
    assert features.shape == (4, 2)
    assert torch.equal(network(x), network.fc(features))


def test_mobilenet_has_four_stages_of_half_the_size():
    network = MODELS["mobilenet"](100)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride[0] for m in convolutions].count(2) == 4
    assert convolutions[0].stride == (1, 1)
    assert len(convolutions) == 1 + 2 * 13
    assert all(m.bias is None for m in convolutions)
    depthwise = [m for m in convolutions if m.kernel_size == (3, 3)][1:]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)


def nodes(tensor):
    """Names of what its gradient passes through."""
    found, ahead = set(), [tensor.grad_fn]
    while ahead:
        if (node := ahead.pop()) is not None:
            found.add(type(node).__name__)
            ahead += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("size, stride", [((4, 4), 1), ((2, 2), 1), ((8, 8), 2), ((5, 7), 2), ((1, 3), 1)])
def test_a_3x3_convolution_as_matrix_products(size, stride):
    """Output and gradients, first and second, are those of torch's convolution in float64."""
    x = torch.randn(3, 4, *size, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    ours, expected = Convolution3x3.apply(x, weight, stride), F.conv2d(x, weight, None, stride, 1)
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    second = []
    for out in (ours, expected):
        first = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
        second.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))))
    torch.testing.assert_close(*second)


CONVOLUTIONS = [
    # inputs, outputs, kernel, size, settings, dtype -> whether it is a matrix product
    ((32, 8, 1, (4, 4), {}, torch.float32), True),
    ((32, 8, 1, (8, 8), dict(stride=2, bias=False), torch.float32), True),
    ((32, 8, 1, (7, 5), dict(stride=2), torch.bfloat16), True),
    ((32, 8, 1, (5, 4), {}, torch.float32), False),
    ((8, 8, 1, (4, 4), dict(groups=8), torch.float32), False),
    ((8, 8, 1, (2, 2), dict(padding=1), torch.float32), False),
    ((129, 128, 3, (4, 4), dict(padding=1), torch.bfloat16), True),
    ((129, 128, 3, (8, 8), dict(padding=1, stride=2, bias=False), torch.bfloat16), True),
    ((128, 128, 3, (4, 4), dict(padding=1), torch.bfloat16), False),
    ((65, 64, 3, (2, 2), dict(padding=1), torch.bfloat16), True),
    ((65, 64, 3, (2, 2), dict(padding=1), torch.float32), False),
    ((65, 64, 3, (4, 4), {}, torch.bfloat16), False),
    ((65, 64, 3, (2, 2), dict(padding=1, padding_mode="reflect"), torch.bfloat16), False),
    ((129, 128, 3, (4, 4), dict(padding=1, dilation=2), torch.bfloat16), False),
    ((129, 128, 3, (4, 4), dict(padding=1, stride=(2, 1)), torch.bfloat16), False),
    ((129, 128, (3, 1), (4, 4), dict(padding=1), torch.bfloat16), False),
]


@pytest.mark.parametrize("layer, product", CONVOLUTIONS)
def test_a_convolution_with_a_small_map_is_torchs_own(layer, product):
    """As matrix products or not: output and gradients agree with torch's on the same layer, under autocast or not."""
    inputs, outputs, kernel, size, settings, dtype = layer
    ours, theirs = Conv2d(inputs, outputs, kernel, **settings), nn.Conv2d(inputs, outputs, kernel, **settings)
    ours, theirs = ours.to(memory_format=torch.channels_last), theirs.to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(6, inputs, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for conv in (ours, theirs):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = conv(x)
        if conv is ours:
            convolved = {"ConvolutionBackward0", "MkldnnConvolutionBackward0"} & nodes(y)
            assert bool(convolved) != product
        y.float().square().sum().backward()
        results.append([y.float(), x.grad.float(), *(p.grad for p in conv.parameters())])
    for a, b in zip(*results, strict=True):
        # 2**-8 is a rounding to bfloat16; sums of rounded numbers stay within a few, of the largest
        torch.testing.assert_close(
            a, b, rtol=0, atol=(4 * 2**-8 if dtype == torch.bfloat16 else 1e-5) * b.abs().max().item()
        )


@pytest.mark.parametrize("kernel, dtype", [(1, torch.float32), (3, torch.bfloat16)])
def test_torch_func_differentiates_matrix_products(kernel, dtype):
    conv = Conv2d(65, 64, kernel, padding=kernel // 2).to(dtype)
    x = torch.randn(2, 65, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    own, names = dict(conv.named_parameters()), list(dict(conv.named_parameters()))
    found = torch.func.grad(lambda p: torch.func.functional_call(conv, p, x).square().sum())(own)
    expected = torch.autograd.grad(F.conv2d(x, *own.values(), padding=kernel // 2).square().sum(), own.values())
    atol = (4 * 2**-8 if dtype == torch.bfloat16 else 1e-5) * max(g.abs().max().item() for g in expected)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol)


def test_an_image_without_a_batch_is_convolved():
    conv, image = Conv2d(8, 8, 1), torch.randn(8, 4, 4)
    assert torch.equal(conv(image), F.conv2d(image, conv.weight, conv.bias))


def test_small_maps_in_another_layout_are_convolved():
    conv = Conv2d(8, 8, 1)
    assert {"ConvolutionBackward0", "MkldnnConvolutionBackward0"} & nodes(conv(torch.randn(2, 8, 4, 4)))
