"""MobileNetV1 (Howard et al., 2017) for small images: a stem of stride 1 and four stages of stride 2."""

from torch import nn

from .layers import ClassLayer, check_stem, conv_bn_relu

CHANNELS_AND_STRIDES = (
    ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)) + ((512, 1),) * 5 + ((1024, 2), (1024, 1))
)
"""Of the thirteen depthwise-separable blocks."""


class MobileNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        inputs = max(1, round(32 * width))
        layers = conv_bn_relu(in_channels, inputs, 3)
        for base, stride in CHANNELS_AND_STRIDES:
            channels = max(1, round(base * width))
            layers += conv_bn_relu(inputs, inputs, 3, stride, groups=inputs)
            layers += conv_bn_relu(inputs, channels, 1)
            inputs = channels
        self.features = nn.Sequential(*layers)
        self.fc = ClassLayer(inputs, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def mobilenet(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """MobileNetV1; see MobileNet."""
    check_stem(stem)
    return MobileNet(num_classes, in_channels, width)
