"""ResNet18 and ResNet34 (He et al., 2016), with torchvision's names so that its weights load."""

from torch import nn

from . import layers


class BasicBlock(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = layers.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = layers.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                layers.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        return (out + (x if self.downsample is None else self.downsample(x))).relu_()


class ResNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    stem: "cifar" is one 3x3 convolution with stride 1 and no pooling; "imagenet" a 7x7 one with stride 2 and a 3x3
    max-pool with stride 2, for images of about 224x224.
    """

    def __init__(self, blocks, num_classes, in_channels, width, stem):
        super().__init__()
        channels = [max(1, round(c * width)) for c in (64, 128, 256, 512)]
        large = layers.check_stem(stem, ("cifar", "imagenet")) == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = layers.Conv2d(in_channels, channels[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs = channels[0]
        for i, (c, n) in enumerate(zip(channels, blocks), 1):
            strides = [1 if i == 1 else 2] + [1] * (n - 1)
            stage = [BasicBlock(inputs if j == 0 else c, c, s) for j, s in enumerate(strides)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            inputs = c
        self.fc = layers.ClassLayer(inputs, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """ResNet18 with the stem "cifar" or "imagenet"; see ResNet."""
    return ResNet((2, 2, 2, 2), num_classes, in_channels, width, stem)


def resnet34(num_classes, in_channels=3, width=1.0, stem="cifar"):
    """ResNet34 with the stem "cifar" or "imagenet"; see ResNet."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels, width, stem)
