"""Augmentation, batched on the device: crop and flip of uint8 images as one gather, then rotation or AutoAugment."""

import torch
import torch.nn.functional as F

from ..randomness import generator
from . import autoaugment

PADDING = 4
AUGMENTATIONS = ("none", "crop", "flip", "crop+flip", "autoaugment", "crop+flip+autoaugment")
AUGMENTATIONS += ("flip+rotate15", "crop+flip+rotate15")


def pad(images, augment):
    """uint8 (n, H, W, C) -> the padded images that `crop_flip` reads; black borders of 4 pixels for crops."""
    return F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING)) if "crop" in augment else images


def epoch_plan(run, epoch, n, device):
    """Every random choice of one epoch over n images, drawn on the CPU and moved once.
    Returns (order, offset, flip) of shapes (n,), (n, 2) and (n,): which image, where its crop begins in the padded
    image, whether it is mirrored; then, for `transform`, `autoaugment.draw` or angles (n,), -15 to 15 degrees."""
    g = generator(run.seed, "epoch", epoch)
    order = torch.randperm(n, generator=g)
    offset = torch.randint(2 * PADDING + 1, (n, 2), generator=g)
    flip = torch.rand(n, generator=g) < 0.5
    choices = autoaugment.draw(n, g) if "autoaugment" in run.augment else ()
    if "rotate15" in run.augment:
        choices = (15 * (2 * torch.rand(n, generator=g) - 1),)
    for name, choice in (("crop", offset), ("flip", flip)):
        if name not in run.augment:
            choice.zero_()
    return tuple(part.to(device) for part in (order, offset, flip, *choices))


def crop_flip(padded, index, offset, flip, size):
    """Rows `index` of padded (n, H + 2p, W + 2p, C), each cropped at its offset (B, 2), mirrored where flip (B,)."""
    rows, columns = (torch.arange(s, device=padded.device) for s in size)
    y = offset[:, :1] + rows
    x = offset[:, 1:] + torch.where(flip[:, None], columns.flip(0), columns)
    return padded[index[:, None, None], y[:, :, None], x[:, None, :]]


def transform(images, *choices):
    """What follows crop and flip: rotation by the one choice, AutoAugment by the three, or nothing; shapes stay."""
    if not choices:
        return images
    return rotate(images, *choices) if len(choices) == 1 else autoaugment.autoaugment(images, *choices)


def rotate(images, degrees):
    """Turn each of uint8 images (B, H, W, C) counter-clockwise about its centre by degrees (B,): nearest neighbour,
    black where no pixel comes from, as torchvision's RandomRotation."""
    source = autoaugment.rotation(degrees.double()[:, None, None], *images.shape[1:3])
    return autoaugment.move(images, *source)


class Normalise(torch.nn.Module):
    """Images (B, C, H, W), integers from 0 to 255 or floats from 0 to 1, -> (x - mean) / std per channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images):
        scale = (1 if images.is_floating_point() else 1 / 255) / self.std
        shift = -self.mean / self.std
        return torch.addcmul(shift[:, None, None], images.to(self.mean.dtype), scale[:, None, None])
