"""Layers that several networks share."""

import torch
from torch import nn


class ClassLayer(nn.Linear):
    """The last linear layer, computed in its weights' float32 under autocast too.

    Logits that come out in bfloat16 are rounded to steps of 0.06 from 8 upwards: they tie, and the loss is coarse.
    """

    def forward(self, x):
        if x.is_meta:  # counting costs; that device knows no autocast
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def conv_bn_relu(inputs, channels, kernel, stride=1, groups=1):
    """The three layers, as a list."""
    conv = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def check_stem(stem, known=("cifar",)):
    """`stem`, the name of a network's first layers. Raises ValueError where the network has no such stem."""
    if stem not in known:
        raise ValueError(f"no stem {stem!r} for this network: choose from {', '.join(known)}")
    return stem
