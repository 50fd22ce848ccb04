"""VGG13 and VGG19 with BatchNorm (Simonyan & Zisserman, 2014), with torchvision's names so that its weights load."""

from torch import nn

from .layers import ClassLayer, Conv2d, check_stem

CONVOLUTIONS = {13: (2, 2, 2, 2, 2), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """(B, in_channels, 32, 32) -> (B, num_classes): five stages ending in a 2x2 max-pool, two layers of 4096 units.

    The five pools need an input of at least 32x32; a larger one is averaged to 1x1 before the linear layers.
    """

    def __init__(self, depth, num_classes, in_channels, width):
        super().__init__()
        layers, inputs = [], in_channels
        for base, n in zip((64, 128, 256, 512, 512), CONVOLUTIONS[depth]):
            channels = max(1, round(base * width))
            for _ in range(n):
                layers += [Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                layers.append(nn.ReLU(inplace=True))
                inputs = channels
            layers.append(nn.MaxPool2d(2))
        units = max(1, round(4096 * width))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(inputs, units), nn.ReLU(), nn.Dropout(),
            nn.Linear(units, units), nn.ReLU(), nn.Dropout(),
            ClassLayer(units, num_classes),
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def vgg13(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """VGG13 with BatchNorm; see VGG."""
    check_stem(stem)
    return VGG(13, num_classes, in_channels, width)


def vgg19(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """VGG19 with BatchNorm; see VGG."""
    check_stem(stem)
    return VGG(19, num_classes, in_channels, width)
