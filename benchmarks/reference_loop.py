"""The training loop as most people write it: what train_step.py compares the trainer with.

A DataLoader with four workers that crop, mirror and normalise PIL images one by one; float32 in PyTorch's usual memory
layout; SGD as it comes; the loss of each step read with .item(). SiLa is equation 9 as the paper writes it: the
cross-entropy of each network over the concatenated logits.
"""

import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from silalib.losses import METHODS

MEAN, STD = torch.tensor([0.507, 0.487, 0.441])[:, None, None], torch.tensor([0.267, 0.256, 0.276])[:, None, None]
PADDING = 4


class Pictures(Dataset):
    """Images (n, C, H, W) as PIL pictures, cropped and mirrored at random, as normalised floats."""

    def __init__(self, images, labels):
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
        self.labels = labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        picture = self.pictures[i]
        width, height = picture.size
        x, y = torch.randint(2 * PADDING + 1, (2,)).tolist()
        picture = ImageOps.expand(picture, PADDING).crop((x, y, x + width, y + height))
        if torch.rand(1).item() < 0.5:
            picture = ImageOps.mirror(picture)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
        return (image - MEAN) / STD, self.labels[i]


def cross_entropy(logits, target):
    return sum(F.cross_entropy(z, target) for z in logits)


def concatenated(logits, target):
    labels = torch.cat(logits, 1)
    return sum(F.cross_entropy(labels, target + c * z.shape[1]) for c, z in enumerate(logits))


class Reference:
    """Networks of one run and the loader of their images; `epoch` trains them once on all images."""

    def __init__(self, run, images, labels, device):
        self.device = device
        self.nets = [run.network(slot).to(device).train() for slot in range(len(run.nets))]
        self.loss = {"ind": cross_entropy, "sila": concatenated}.get(run.method) or METHODS[run.method]
        self.optimizer = torch.optim.SGD(
            [p for net in self.nets for p in net.parameters()],
            lr=run.lr, momentum=run.momentum, nesterov=run.nesterov, weight_decay=run.weight_decay,
        )  # fmt: skip
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as people do
        self.loader = DataLoader(
            Pictures(images, labels), run.batch_size, shuffle=True, drop_last=True, num_workers=4,
            pin_memory=device.type == "cuda", persistent_workers=True,
        )  # fmt: skip

    @torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)  # as PyTorch comes
    def epoch(self):
        """The mean loss."""
        total = 0.0
        for images, target in self.loader:
            images, target = images.to(self.device), target.to(self.device)
            logits = []
            for net in self.nets:
                z = net(images)
                logits += z if isinstance(z, tuple) else [z]
            loss = self.loss(logits, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / len(self.loader)

    def worker_seconds(self):
        """CPU seconds of the loader's processes so far (Linux: the clock of another process has a number)."""
        workers = getattr(self.loader._iterator, "_workers", [])
        return sum(time.clock_gettime(~worker.pid << 3 | 2) for worker in workers)
