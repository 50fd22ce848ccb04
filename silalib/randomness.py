"""Randomness as a pure function of (seed, purpose, slot, epoch or step); nothing depends on a global generator."""

import hashlib
import random
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


def derive(seed, *path):
    """A 63-bit seed for one purpose, e.g. derive(run.seed, "order", epoch)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed, *path, device="cpu"):
    """A generator for one purpose. That of the CPU draws the same wherever its numbers go; a GPU's own draws others."""
    return torch.Generator(device).manual_seed(derive(seed, *path))


def seed_all(seed):
    """Seed the global generators that code which is not ours draws from: Python's, NumPy's and torch's of the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.random.default_generator.manual_seed(seed)


@contextmanager
def generators_kept(devices=()):
    """Leave every global generator as it was; devices: the GPUs whose are."""
    with torch.random.fork_rng(devices=devices), ExitStack() as at_end:
        at_end.callback(random.setstate, random.getstate())
        at_end.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        yield
