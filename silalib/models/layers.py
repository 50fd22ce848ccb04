"""Layers that several networks share."""

import torch
import torch.nn.functional as F
from torch import nn

SMALL_MAP = 16
"""Positions of an output at most for which a matrix product may be faster on a CPU than oneDNN's convolution."""
WIDE = 1024
"""Weights for each position and place in the kernel: a 3x3 kernel with more is slow there in bfloat16."""


def channels_last(x):
    """Whether x lies in memory as in trainings; in PyTorch's usual layout networks are computed layer by layer."""
    return x.is_contiguous(memory_format=torch.channels_last)


class Conv2d(nn.Conv2d):
    """A convolution that is computed as matrix products where that is faster: on a CPU, in channels-last layout, with
    an output of at most 4x4 positions; a 3x3 one if it is in bfloat16 and wide. Any other is nn.Conv2d's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        kernel, stride = self.kernel_size[0], self.stride[0]
        square = self.stride == (stride, stride) and self.kernel_size == (kernel, kernel)
        usual = (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
        self.usual = square and usual and self.padding == (kernel // 2, kernel // 2)

    def forward(self, x):
        if not (self.usual and x.device.type == "cpu" and channels_last(x)):
            return super().forward(x)
        kernel, stride = self.kernel_size[0], self.stride[0]
        positions = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        if positions <= SMALL_MAP:
            if kernel == 1:
                rows = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
                return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
            wide = self.in_channels * self.out_channels > WIDE * positions
            if kernel == 3 and wide and x.dtype == torch.bfloat16:
                x = Convolution3x3.apply(x, self.weight.to(x.dtype), stride)
                return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
        return super().forward(x)


class Convolution3x3(torch.autograd.Function):
    """With padding 1, as matrix products: of the weights, or the gradient, and what the kernel sees at each place."""

    @staticmethod
    def forward(x, weight, stride):
        return product(x, weight.permute(0, 2, 3, 1).flatten(1).T, stride)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        outputs = grad.permute(1, 0, 2, 3).flatten(1).contiguous()  # it is slow to multiply by columns
        grad_weight = (outputs @ patches(x, ctx.stride)).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        if ctx.stride == 1:
            grad_x = product(grad, weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2), 1)
        else:
            grad_x = nn.grad.conv2d_input(x.shape, weight, grad, ctx.stride, padding=1)
        return grad_x, grad_weight, None


def patches(x, stride):
    """What a 3x3 kernel sees of x (B, C, H, W) at each of its places: (places in all images, 9 C)."""
    x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(0, 2).flatten(1)


def product(x, matrix, stride):
    """Of the patches and a (9 C, outputs) matrix: (B, outputs, H, W) over the stride."""
    size = [-(-n // stride) for n in x.shape[2:]]
    return (patches(x, stride) @ matrix).unflatten(0, (len(x), *size)).permute(0, 3, 1, 2)


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
    conv = Conv2d(inputs, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def check_stem(stem, known=("cifar",)):
    """`stem`, the name of a network's first layers. Raises ValueError where the network has no such stem."""
    if stem not in known:
        raise ValueError(f"no stem {stem!r} for this network: choose from {', '.join(known)}")
    return stem
