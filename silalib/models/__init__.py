"""The networks of the paper. MODELS: name -> factory(num_classes, in_channels=3, width=1.0, stem="cifar").

`width` scales every layer's channels (and VGG's 4096 units); 1 is the published network. `stem` "imagenet" gives the
ResNets the first layers for large images; a network without such a stem raises ValueError.
"""

from math import prod

import torch
from torch import nn

from .convnet import convnet12
from .densenet import densenet121
from .mobilenet import mobilenet
from .msdnet import LAYERS_OF_BLOCKS, msdnet_anytime, msdnet_budgeted, msdnet_imagenet
from .resnet import resnet18, resnet34
from .vgg import vgg13, vgg19
from .wrn import wrn16_10

MODELS = {
    "mobilenet": mobilenet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "vgg13": vgg13,
    "vgg19": vgg19,
    "wrn16_10": wrn16_10,
    "densenet121": densenet121,
    "convnet12": convnet12,
    "msdnet_anytime": msdnet_anytime,
    "msdnet_budgeted": msdnet_budgeted,
    "msdnet_imagenet": msdnet_imagenet,
}

NAMES = {
    "mobilenet": "MobileNet",
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "vgg13": "VGG13",
    "vgg19": "VGG19",
    "wrn16_10": "WRN-16-10",
    "densenet121": "DenseNet121",
    "convnet12": "12-layer ConvNet",
    "msdnet_anytime": "MSDNet (anytime)",
    "msdnet_budgeted": "MSDNet (budgeted)",
    "msdnet_imagenet": "MSDNet (ImageNet)",
}
"""Network name -> the paper's spelling."""

STEMS = {
    "resnet18": ("cifar", "imagenet"),
    "resnet34": ("cifar", "imagenet"),
    "msdnet_imagenet": ("imagenet",),
}
"""Network -> the stems it has, where that is not "cifar" alone."""

EXITS = {name: len(layers) for name, layers in LAYERS_OF_BLOCKS.items()}
"""Network -> the number of its exits, where it has more than one; it gives a tuple of logits then."""

SMALLEST_IMAGE = {"vgg13": 32, "vgg19": 32}
"""Network name -> the smallest height and width it takes, where it has a limit."""


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_macs(model, input_shape):
    """Multiply-accumulates of the convolutions and linear layers in one forward pass of one image (C, H, W)."""
    return sum(macs_by_layer(model, input_shape).values())


def macs_by_layer(model, input_shape):
    """Name of each convolution and linear layer -> its multiply-accumulates for one image (C, H, W)."""
    macs = {}

    def count(name):
        def add(module, inputs, output):
            # every output element is one inner product over the weights of its channel
            macs[name] = macs.get(name, 0) + output[0].numel() * prod(module.weight.shape[1:])

        return add

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(count(name)) for name, m in layers]
    training, device = model.training, next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, *input_shape, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return macs
