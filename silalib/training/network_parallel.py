"""Network-parallel training: process c of torchrun's holds network c alone, with its optimizer, and sees every image.

A peer enters SiLa's gradient only through its log-partition s, so that SiLa exchanges one float per image; DML its
logits. No weight and no gradient crosses while the networks are trained.
"""

import math

import torch
import torch.distributed as dist

COUPLED_BY_S = ("ind", "sila", "zero-peer", "mean-peer")
"""Methods in which a peer enters the gradient through its log-partition s at most; any other may need its logits."""


class Ranks:
    """The processes that train one run together; without `parallel` this process trains it alone."""

    def __init__(self, parallel=False):
        self.parallel = parallel
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)

    def slots(self, run):
        """The slots of the networks that this process holds."""
        return [self.rank] if self.parallel else range(len(run.nets))

    def heads(self, run):
        """The heads that this process evaluates."""
        return [self.rank] if self.parallel else range(run.n_heads)

    def all_heads(self, logits, method):
        """Logits (B, N) of every head, for a loss whose gradient in this process's own is exact.

        Those of another process are fixed: its logits where the method needs them, else equal logits that have its
        log-partition s, which is all of it that enters the gradient of SiLa.
        """
        if not self.parallel:
            return logits
        own, by_s = logits[0].detach(), method in COUPLED_BY_S
        message = own.logsumexp(1) if by_s else own.contiguous()
        received = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(received, message)
        if by_s:
            classes = own.shape[1]
            received = [(s - math.log(classes))[:, None].expand(-1, classes) for s in received]
        received[self.rank] = logits[0]
        return received

    def agree(self, reason, save):
        """Whether to stop (the reason of any process, or None) and whether to save: the same answer everywhere."""
        if not self.parallel:
            return reason, save
        wishes = torch.tensor([bool(reason), save], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        stop, save = wishes.tolist()
        return next(filter(None, self.gather(reason))) if stop else None, bool(save)

    def gather(self, value):
        """The values of all processes, in their order."""
        values = [value] * self.size
        if self.parallel:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The first process's value, everywhere; the others wait for it."""
        values = [value]
        if self.parallel:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self):
        """Wait until every process is here."""
        self.agree(None, False)
