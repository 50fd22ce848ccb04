"""Randomness as a pure function of (seed, purpose, slot, epoch or step); nothing depends on a global generator."""

import hashlib

import torch


def derive(seed, *path):
    """A 63-bit seed for one purpose, e.g. derive(run.seed, "order", epoch)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed, *path):
    """A CPU generator for one purpose: the draws are the same on every device."""
    return torch.Generator().manual_seed(derive(seed, *path))
