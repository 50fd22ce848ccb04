"""Network-parallel training: process c of torchrun's holds network c alone, with its optimizer, and sees every image.

SiLa's processes exchange one float per image, s; DML's exchange logits. No weight and no gradient crosses."""

import math

import torch
import torch.distributed as dist

COUPLED_BY_S = ("ind", "sila", "zero-peer", "mean-peer")
"""Methods in which a peer enters the gradient through its log-partition s at most; any other may need its logits."""


class Ranks:
    """The processes that train one run together; without `parallel` this one has all its slots and heads."""

    def __init__(self, parallel=False):
        self.parallel = parallel
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)

    def own(self, count):
        """Which of so many slots or heads this process has."""
        return [self.rank] if self.parallel else range(count)

    def all_heads(self, logits, method):
        """Logits (B, N) of every head, for a loss whose gradient in this process's own is exact. Others' are fixed:
        their logits where the method needs them, else equal logits with their log-partition s."""
        if not self.parallel:
            return logits
        own, by_s = logits[0].detach(), method in COUPLED_BY_S
        message = own.logsumexp(1) if by_s else own.contiguous()
        received = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(received, message)
        if by_s:
            received = [(s - math.log(own.shape[1]))[:, None].expand_as(own) for s in received]
        received[self.rank] = logits[0]
        return received

    def agree(self, reason, save):
        """Whether to stop (the reason of any process, or None) and whether to save: the same answer everywhere."""
        if not self.parallel:
            return reason, save
        wishes = torch.tensor([bool(reason), save], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        return next(filter(None, self.gather(reason))) if wishes[0] else None, bool(wishes[1])

    def gather(self, value):
        """The values of all processes, in their order."""
        values = [value] * self.size
        if self.parallel:
            dist.all_gather_object(values, value)
        return values

    def barrier(self):
        self.agree(None, False)
