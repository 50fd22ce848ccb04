"""The 12-layer network of Figure 6: ten convolutions, a layer of two units that can be drawn, and the class layer.

After Large-Margin Softmax (Liu et al., 2016), which the paper follows: 3x3 convolutions in groups of 1, 3, 3 and 3
with BatchNorm and ReLU, a 2x2 max-pool after the first three groups.
"""

from torch import nn

from .layers import ClassLayer, check_stem, conv_bn_relu


class ConvNet12(nn.Module):
    """(B, in_channels, 28, 28) -> (B, num_classes); `embed(x)` gives the (B, 2) features before the last layer."""

    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        channels = max(1, round(64 * width))
        layers, inputs = [], in_channels
        for group, n in enumerate((1, 3, 3, 3)):
            if group:
                layers.append(nn.MaxPool2d(2))
            for _ in range(n):
                layers += conv_bn_relu(inputs, channels, 3)
                inputs = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.feature = nn.Linear(9 * channels, 2)
        self.fc = ClassLayer(2, num_classes)

    def embed(self, x):
        return self.feature(self.features(x))

    def forward(self, x):
        return self.fc(self.embed(x))


def convnet12(num_classes, in_channels=1, width=1.0, stem="cifar"):
    """The 12-layer network of Figure 6 with 64 channels at width 1; see ConvNet12."""
    check_stem(stem)
    return ConvNet12(num_classes, in_channels, width)
