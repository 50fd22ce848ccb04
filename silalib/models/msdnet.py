"""MSDNet (Huang et al., 2018): one network with an exit after every block; multi-scale features, dense connections.

A layer holds feature maps at several scales, each half the size of the one before. The classifiers read the coarsest
scale. Later layers drop the finest scales, which no classifier reads.
"""

from itertools import pairwise
from math import ceil

import torch
import torch.nn.functional as F
from torch import nn

from .layers import ClassLayer, channels_last, check_stem, conv_bn_relu


class Scales(nn.Module):
    """The first feature maps: image (B, C, H, W) -> a list with one tensor per scale, the finest first."""

    def __init__(self, stem, channels):
        super().__init__()
        down = [nn.Sequential(*conv_bn_relu(a, b, 3, 2)) for a, b in pairwise(channels)]
        self.scales = nn.ModuleList([stem, *down])

    def forward(self, x):
        features = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return features


def branch(inputs, channels, factor, stride=1):
    """A 3x3 convolution behind a 1x1 bottleneck."""
    inner = min(inputs, factor * channels)
    return nn.Sequential(*conv_bn_relu(inputs, inner, 1), *conv_bn_relu(inner, channels, 3, stride))


def chain(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def as_one(bottlenecks, x):
    """What each 1x1 convolution with BatchNorm and ReLU gives for the same x, in training, computed as one: MSDNet is a
    few hundred small operations, whose number costs more than their size."""
    convolutions, norms, _ = zip(*bottlenecks)
    parallel = type(norms[0]) is not nn.BatchNorm2d  # data-parallel networks have another kind
    if len(norms) == 1 or parallel or not channels_last(x):
        return [chain(layers, x) for layers in bottlenecks]
    mean, variance, weight, bias = (
        torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = F.conv2d(x, torch.cat([convolution.weight for convolution in convolutions]))
    x = F.batch_norm(x, mean, variance, weight, bias, True, norms[0].momentum, norms[0].eps)
    channels = [norm.num_features for norm in norms]
    for norm, m, v in zip(norms, mean.split(channels), variance.split(channels)):
        norm.running_mean.copy_(m)
        norm.running_var.copy_(v)
        norm.num_batches_tracked += 1
    return dense(F.relu(x, inplace=True).split(channels, 1))


def dense(parts):
    """Parts of the channels, on a CPU each in memory of its own: it is slow on a few channels of every position."""
    return [part.clone() for part in parts] if parts[0].device.type == "cpu" else parts


class Concatenate(torch.autograd.Function):
    """torch.cat of old and new channels. The gradient of the new ones is dense; that of the old is added to others."""

    @staticmethod
    def forward(old, *new):
        return torch.cat([old, *new], 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.channels = [x.shape[1] for x in inputs]

    @staticmethod
    def backward(ctx, grad):
        old, *new = grad.split(ctx.channels, 1)
        return old, *(dense(new) if channels_last(grad) else new)


class Layer(nn.Module):
    """A dense layer: at every scale new channels are concatenated to the old; `drop` removes the finest scale.

    The new channels come from the scale itself and, in equal parts, from the next finer one where there is one.
    """

    def __init__(self, channels, growth, factors, drop):
        super().__init__()
        self.drop = int(drop)
        self.down, self.normal = nn.ModuleList(), nn.ModuleList()
        for i in range(self.drop, len(channels)):
            new = growth[i] // 2 if i else growth[i]
            self.normal.append(branch(channels[i], new, factors[i]))
            if i:
                self.down.append(branch(channels[i - 1], new, factors[i - 1], stride=2))

    def forward(self, features):
        new = [[] for _ in features]
        for i, x in enumerate(features):
            readers = [(i, list(self.normal[i - self.drop]))] if i >= self.drop else []
            if i + 1 < len(features):
                readers.append((i + 1, list(self.down[i])))
            bottlenecks = [layers[:3] for _, layers in readers]
            inner = as_one(bottlenecks, x) if self.training else [chain(layers, x) for layers in bottlenecks]
            for (scale, layers), y in zip(readers, inner):
                new[scale].insert(0, chain(layers[3:], y))  # a scale's own channels before those of the finer one
        return [Concatenate.apply(x, *parts) for x, parts in zip(features[self.drop :], new[self.drop :])]


class Transition(nn.Module):
    """A 1x1 convolution at every scale."""

    def __init__(self, inputs, channels):
        super().__init__()
        self.scales = nn.ModuleList(nn.Sequential(*conv_bn_relu(a, b, 1)) for a, b in zip(inputs, channels))

    def forward(self, features):
        return [scale(x) for scale, x in zip(self.scales, features)]


class Classifier(nn.Module):
    """The coarsest scale (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, inputs, channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(*conv_bn_relu(inputs, channels, 3, 2), *conv_bn_relu(channels, channels, 3, 2))
        self.fc = ClassLayer(channels, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class MSDNet(nn.Module):
    """(B, in_channels, H, W) -> a tuple with the logits (B, num_classes) of every exit, the earliest first.

    stem: image -> features of the finest scale. layers: dense layers of each block. channels, growth: of the finest
    scale; those of scale i are factors[i] times as many. head: channels inside a classifier, None for its input's.
    `blocks[k]` and `classifiers[k]` can be run one by one; a block gives a list of features, of which the classifier
    reads the last.
    """

    def __init__(self, stem, layers, channels, growth, factors, head, num_classes):
        super().__init__()
        self.blocks, self.classifiers = nn.ModuleList(), nn.ModuleList()
        every = ceil(sum(layers) / len(factors))  # a scale is dropped after so many layers
        done = 0
        for count in layers:
            block = [] if self.blocks else [Scales(stem, scaled(channels, factors))]
            for _ in range(count):
                drop = done > 0 and done % every == 0
                block.append(Layer(scaled(channels, factors), scaled(growth, factors), factors, drop))
                channels += growth
                done += 1
                if drop:
                    factors = factors[1:]
                    block.append(Transition(scaled(channels, factors), scaled(channels // 2, factors)))
                    channels //= 2
            self.blocks.append(nn.Sequential(*block))
            coarsest = channels * factors[-1]
            self.classifiers.append(Classifier(coarsest, head or coarsest, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                kernel = m.kernel_size[0] * m.kernel_size[1]
                nn.init.normal_(m.weight, std=(2 / (kernel * m.out_channels)) ** 0.5)
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, x):
        logits = []
        for block, classifier in zip(self.blocks, self.classifiers):
            x = block(x)
            logits.append(classifier(x[-1]))
        return tuple(logits)


def scaled(number, factors):
    return [number * factor for factor in factors]


LAYERS_OF_BLOCKS = {
    "msdnet_anytime": (4, 2, 2, 2, 2, 2, 2),
    "msdnet_budgeted": (1, 2, 3, 4, 5),
    "msdnet_imagenet": (4,) * 5,
}
"""Network -> the dense layers of each block.

A network with fewer blocks has as many layers in each as here, but drops its scales earlier, since there are fewer
layers in all: it is a network of its own, and its exits cost less than the first ones of the whole."""


def layers_of(name, blocks):
    """The dense layers of each block of a network, of the first `blocks` blocks or of all for None."""
    if blocks is not None and not 1 <= blocks <= len(LAYERS_OF_BLOCKS[name]):
        raise ValueError(f"{name} has 1 to {len(LAYERS_OF_BLOCKS[name])} blocks, not {blocks}")
    return LAYERS_OF_BLOCKS[name][:blocks]


def small(name, num_classes, in_channels, width, stem, blocks):
    """For 32x32 images: three scales."""
    check_stem(stem)
    channels = max(1, round(16 * width))
    first = nn.Sequential(*conv_bn_relu(in_channels, channels, 3))
    growth, head = max(1, round(6 * width)), max(1, round(128 * width))
    return MSDNet(first, layers_of(name, blocks), channels, growth, (1, 2, 4), head, num_classes)


def msdnet_anytime(num_classes, in_channels=3, width=1.0, stem="cifar", blocks=None):
    return small("msdnet_anytime", num_classes, in_channels, width, stem, blocks)


def msdnet_budgeted(num_classes, in_channels=3, width=1.0, stem="cifar", blocks=None):
    return small("msdnet_budgeted", num_classes, in_channels, width, stem, blocks)


def msdnet_imagenet(num_classes, in_channels=3, width=1.0, stem="imagenet", blocks=None):
    """For 224x224 images: four scales behind a stem that divides the size by four."""
    check_stem(stem, ("imagenet",))
    channels = max(1, round(32 * width))
    first = nn.Sequential(
        nn.Conv2d(in_channels, channels, 7, 2, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    layers, growth = layers_of("msdnet_imagenet", blocks), max(1, round(16 * width))
    return MSDNet(first, layers, channels, growth, (1, 2, 4, 4), None, num_classes)
