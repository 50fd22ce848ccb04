"""Memory-mapped images, prefetched in order, and the batches that training and evaluation read."""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from .augment import crop_flip, pad

AT_ONCE = 1 << 26  # bytes of images that are brought, or counted, at once
AHEAD = 3  # batches that are gathered before they are needed


class MemoryMapped:
    """Rows `rows` (n,) of uint8 images (N, H, W, C) that stay where they are; `batches` reads them onto the device."""

    def __init__(self, images, rows, device):
        self.images, self.rows, self.device, self.shape = images, rows, device, (len(rows), *images.shape[1:])
        self.thread = ThreadPoolExecutor(1)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, chosen):
        """Images `chosen`, a slice or an index on any device, as one uint8 tensor on the device."""
        chosen = chosen.cpu() if isinstance(chosen, torch.Tensor) else chosen
        return self.images.index_select(0, self.rows[chosen]).to(self.device)

    def resident(self):
        """All of the images on the device, (n, H, W, C)."""
        images = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        size = max(1, AT_ONCE // math.prod(self.shape[1:]))
        for part, batch in zip(images.split(size), self.batches(torch.arange(len(self)), size)):
            part.copy_(batch)
        return images

    def batches(self, order, size):
        """Images `order` (m,) in batches of `size`, the last one maybe smaller: uint8 (B, H, W, C) on the device.
        A thread gathers the next ones meanwhile, for a GPU in pinned memory, copied beside the caller's work."""
        rows, pending = deque(self.rows[order.cpu()].split(size)), deque()
        shape, buffers = (min(size, len(order)), *self.shape[1:]), deque([None])
        if self.copies:  # pinned memory for a batch, and the event of its last copy
            pinned = lambda: torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            buffers = deque((pinned(), torch.cuda.Event()) for _ in range(AHEAD + 1))
        while rows or pending:
            while rows and len(pending) < AHEAD:
                pending.append(self.thread.submit(self._fetch, rows.popleft(), buffers[0]))
                buffers.rotate(-1)
            batch, copied = pending.popleft().result()
            if copied is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                batch.record_stream(stream)  # its memory is not given away before the caller's work is done
            yield batch

    def _fetch(self, rows, buffer):
        if buffer is None:
            return self.images.index_select(0, rows), None
        pinned, copied = buffer
        copied.synchronize()  # the last copy out of this buffer is over
        torch.index_select(self.images, 0, rows, out=pinned[: len(rows)])
        with torch.cuda.stream(self.copies):
            batch = pinned[: len(rows)].to(self.device, non_blocking=True)
            copied.record()
        return batch, copied


def in_batches(images, size, last=None):
    """Batches of `size` of the images, or of the first `last`, of a tensor or of what reads itself."""
    if isinstance(images, torch.Tensor):
        return iter(images[:last].split(size))
    return images.batches(torch.arange(len(images))[:last], size)


class TrainingBatches:
    """Cropped and mirrored training batches: one gather from images on the device, or of MemoryMapped ones."""

    def __init__(self, images, augment):
        self.mapped = images if isinstance(images, MemoryMapped) else None
        self.padded = None if self.mapped else pad(images, augment)
        self.augment, self.size = augment, images.shape[1:3]

    def __call__(self, plan, size):
        """Batches of `size` by a part of `augment.epoch_plan`: (images (B, H, W, C), index (B,), further choices)."""
        upcoming = self.mapped and self.mapped.batches(plan[0], size)
        for index, offset, flip, *choices in zip(*(part.split(size) for part in plan)):
            padded, rows = self.padded, index
            if upcoming:
                padded, rows = pad(next(upcoming), self.augment), torch.arange(len(index), device=index.device)
            yield crop_flip(padded, rows, offset, flip, self.size), index, choices
