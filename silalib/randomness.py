"""Randomness as a pure function of (seed, purpose, slot, epoch or step); nothing depends on a global generator."""

import hashlib

import torch


def derive(seed, *path):
    """A 63-bit seed for one purpose, e.g. derive(run.seed, "order", epoch)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed, *path, device="cpu"):
    """A generator for one purpose. That of the CPU draws the same wherever its numbers go; a GPU's own draws others."""
    return torch.Generator(device).manual_seed(derive(seed, *path))
