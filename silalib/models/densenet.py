"""DenseNet121 (Huang et al., 2017) for small images, with torchvision's names so that its weights load."""

from collections import OrderedDict

import torch
from torch import nn

from .layers import ClassLayer, Conv2d, check_stem

DENSE_LAYERS = (6, 12, 24, 16)
"""Of each block."""
GROWTH = 32


class DenseLayer(nn.Sequential):
    """(B, inputs, H, W) -> (B, growth, H, W) through a 1x1 bottleneck of four times the growth."""

    def __init__(self, inputs, growth):
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(inputs),
                relu1=nn.ReLU(inplace=True),
                conv1=Conv2d(inputs, 4 * growth, 1, bias=False),
                norm2=nn.BatchNorm2d(4 * growth),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
            )
        )


class DenseBlock(nn.Module):
    """Every layer reads the input and what all layers before it gave."""

    def __init__(self, layers, inputs, growth):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, x):
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes). The stem is one 3x3 convolution with stride 1 and no pooling."""

    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        growth = max(1, round(GROWTH * width))
        channels = 2 * growth
        features = OrderedDict(
            conv0=Conv2d(in_channels, channels, 3, 1, 1, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
        )
        for i, layers in enumerate(DENSE_LAYERS, 1):
            features[f"denseblock{i}"] = DenseBlock(layers, channels, growth)
            channels += layers * growth
            if i < len(DENSE_LAYERS):
                features[f"transition{i}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(inplace=True),
                        conv=Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        self.features = nn.Sequential(features | {"norm5": nn.BatchNorm2d(channels)})
        self.classifier = ClassLayer(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x):
        return self.classifier(self.features(x).relu_().mean((2, 3)))


def densenet121(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """DenseNet121: four dense blocks of 6, 12, 24 and 16 layers; see DenseNet."""
    check_stem(stem)
    return DenseNet(num_classes, in_channels, width)
