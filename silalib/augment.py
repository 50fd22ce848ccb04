"""Augmentation, batched on the device: random crop and flip of uint8 images as one gather, then AutoAugment."""

import torch
import torch.nn.functional as F

from . import autoaugment
from .randomness import generator

PADDING = 4
AUGMENTATIONS = ("none", "crop", "flip", "crop+flip", "autoaugment", "crop+flip+autoaugment")


def pad(images, augment):
    """uint8 (n, H, W, C) -> the padded images that `crop_flip` reads; black borders of 4 pixels for crops."""
    if "crop" not in augment:
        return images
    return F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))


def epoch_plan(run, epoch, n, device):
    """Every random choice of one epoch over n images, drawn on the CPU and moved once.

    Returns (order, offset, flip) of shapes (n,), (n, 2) and (n,): which image, where its crop begins in the padded
    image, and whether it is mirrored; with AutoAugment its choices follow, see `autoaugment.draw`.
    """
    g = generator(run.seed, "epoch", epoch)
    order = torch.randperm(n, generator=g)
    offset = torch.randint(2 * PADDING + 1, (n, 2), generator=g)
    flip = torch.rand(n, generator=g) < 0.5
    choices = autoaugment.draw(n, g) if "autoaugment" in run.augment else ()
    if "crop" not in run.augment:
        offset.zero_()
    if "flip" not in run.augment:
        flip.zero_()
    return tuple(part.to(device) for part in (order, offset, flip, *choices))


def crop_flip(padded, index, offset, flip, size):
    """Rows `index` of padded (n, H + 2p, W + 2p, C), each cropped at its offset (B, 2) and mirrored where flip (B,).

    Returns uint8 (B, H, W, C) for size = (H, W).
    """
    rows, columns = (torch.arange(s, device=padded.device) for s in size)
    y = offset[:, :1] + rows
    x = offset[:, 1:] + torch.where(flip[:, None], columns.flip(0), columns)
    return padded[index[:, None, None], y[:, :, None], x[:, None, :]]


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
