"""WRN-16-10 (Zagoruyko & Komodakis, 2016): a wide residual network with pre-activation, without dropout."""

from torch import nn

from .layers import ClassLayer, Conv2d, check_stem


class Block(nn.Module):
    """BatchNorm and ReLU stand before each convolution; where the channels change, the shortcut begins after them."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != channels
        self.shortcut = Conv2d(inputs, channels, 1, stride, bias=False) if changes else None

    def forward(self, x):
        active = self.bn1(x).relu_()
        out = self.conv2(self.bn2(self.conv1(active)).relu_())
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes); `blocks` in each of three groups, the last two of stride 2."""

    def __init__(self, blocks, widen, num_classes, in_channels, width):
        super().__init__()
        stem, *channels = (max(1, round(c * width)) for c in (16, 16 * widen, 32 * widen, 64 * widen))
        layers, inputs = [Conv2d(in_channels, stem, 3, 1, 1, bias=False)], stem
        for group, c in enumerate(channels):
            for block in range(blocks):
                layers.append(Block(inputs, c, 2 if group and not block else 1))
                inputs = c
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.fc = ClassLayer(inputs, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def wrn16_10(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """WRN-16-10: 16 layers, ten times the channels; see WideResNet."""
    check_stem(stem)
    return WideResNet(2, 10, num_classes, in_channels, width)
