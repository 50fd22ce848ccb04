"""One run on several processes: which part of it each holds, and what they tell each other in a step.

Network-parallel: process c holds network c alone, with its optimizer, and sees every image of the batch. A peer enters
SiLa's gradient only through its log-partition s, so that SiLa exchanges one float per image; DML its logits. No weight
and no gradient crosses while the networks are trained.

Data-parallel: every process holds every network and takes an equal part of each batch. Gradients are averaged
(DistributedDataParallel) and BatchNorm's statistics are those of the whole batch, so that an update is that of one
process; dropout alone draws other masks.
"""

import math
import warnings
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

from .errors import UserError
from .runs import CHECKPOINTS, write_atomically

NETWORK, DATA = "network-parallel", "data-parallel"


def layout(run, size):
    """How `size` processes share a run. Raises UserError where a batch cannot be split evenly."""
    if size == len(run.nets) > 1:
        return NETWORK
    if run.method == "mean-peer":
        raise UserError(f"{run}: its peer is a mean over the whole batch, which {size} processes share: use one")
    if run.batch_size % size:
        raise UserError(f"{run}: a batch of {run.batch_size} cannot be split evenly over {size} processes: use fewer")
    return DATA


class Ranks:
    """The processes that train one run together; with layout None this process trains it alone.

    sent: bytes that this process has sent since the start of training, by kind: a tensor that all peers get counts
    once for each of them, one that is summed over K processes 2 (K-1)/K times, as in a ring.
    """

    def __init__(self, layout=None):
        self.layout = layout
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if layout else (0, 1)
        self.sent = Counter()

    def slots(self, run):
        """The slots of the networks that this process holds."""
        return [self.rank] if self.layout == NETWORK else range(len(run.nets))

    def heads(self, run):
        """The heads that this process evaluates."""
        return [self.rank] if self.layout == NETWORK else range(run.n_heads)

    def checkpoint(self, path, step):
        """This process's file of the checkpoint at a step, of which the first process's is `path`."""
        own = self.rank and self.layout == NETWORK
        return path.with_name(f"checkpoint.{self.rank}-{step}.pt") if own else path

    def save(self, folder, step, content):
        """Write this process's file of a checkpoint; the first one's comes last: with it, all of a step are there.

        The checkpoint before it is kept where it is one file.
        """
        latest, previous = (folder / name for name in CHECKPOINTS)
        path = self.checkpoint(latest, step)
        if path != latest:
            write_atomically(path, content)
        self.wait()
        if self.rank == 0:
            write_atomically(latest, content, None if self.layout == NETWORK else previous)
        self.wait()
        if path != latest:
            for old in set(folder.glob(f"checkpoint.{self.rank}-*.pt")) - {path}:
                old.unlink()

    # -- a step

    def whole_batch(self, nets):
        """Before training: BatchNorm of data-parallel networks takes the statistics of the whole batch."""
        if self.layout != DATA:
            return nets
        for slot, net in nets.items():
            if next(net.parameters()).is_cuda:
                nets[slot] = nn.SyncBatchNorm.convert_sync_batchnorm(net)
            else:
                for module in net.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.__class__, module.ranks = WholeBatchNorm, self
        return nets

    def averaged(self, nets):
        """The networks whose forward in training averages gradients over the processes, where batches are split."""
        if self.layout != DATA:
            return nets
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(group, bucket):
            self.count_sum("gradients", bucket.buffer())
            return allreduce_hook(group, bucket)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers: its new name is not in torch 2.11
            wrapped = {
                slot: nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) for slot, net in nets.items()
            }
        for net in wrapped.values():
            net.register_comm_hook(None, counted)
        return wrapped

    def own_images(self, plan, batch_size):
        """Of each (n, ...) in an epoch's plan, the rows of this process: its part of every batch, and that part's size.

        The last incomplete batch is dropped.
        """
        size = batch_size // self.size if self.layout == DATA else batch_size
        if self.layout == DATA:
            plan = [p[: len(p) // batch_size * batch_size].unflatten(0, (-1, self.size, size)) for p in plan]
            plan = [p[:, self.rank].flatten(0, 1) for p in plan]
        return plan, size

    def all_heads(self, logits, mutual):
        """Logits (B, N) of every head, for a loss whose gradient in this process's own is exact.

        Those of another process are fixed: its logits where the loss is mutual, else equal logits that have its
        log-partition s, which is all of it that enters the gradient of SiLa.
        """
        if self.layout != NETWORK:
            return logits
        own = logits[0].detach()
        message = own.contiguous() if mutual else own.logsumexp(1)
        received = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(received, message)
        self.sent["logits" if mutual else "log-partitions"] += message.nbytes * (self.size - 1)
        if not mutual:
            classes = own.shape[1]
            received = [(s - math.log(classes))[:, None].expand(-1, classes) for s in received]
        received[self.rank] = logits[0]
        return received

    def agree(self, reason, save):
        """Whether to stop (the reason of any process, or None) and whether to save: the same answer everywhere."""
        if not self.layout:
            return reason, save
        wishes = torch.tensor([bool(reason), save], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        self.count_sum("wishes to stop or save", wishes)
        stop, save = wishes.tolist()
        if stop:
            reasons = [None] * self.size
            dist.all_gather_object(reasons, reason)
            reason = next(filter(None, reasons))
        return reason, bool(save)

    def count_sum(self, kind, tensor):
        self.sent[kind] += 2 * (self.size - 1) * tensor.nbytes // self.size

    def bytes_sent(self, steps):
        """In words: what this process sent in each of `steps` steps, on average."""
        return ", ".join(f"{kind} {count / steps:,.0f}" for kind, count in self.sent.items()) + " bytes"

    # -- an epoch, and the end

    def mean(self, values):
        """Of equal parts of the batch, the mean of a float tensor."""
        if self.layout == DATA:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def gather(self, rows):
        """The rows of all heads, in their order, from the lists of all processes."""
        if self.layout != NETWORK:
            return rows
        lists = [None] * self.size
        dist.all_gather_object(lists, rows)
        return [row for rows in lists for row in rows]

    def to_first(self, part):
        """A list of the parts that make up the record, on the first process; None on the others."""
        parts = [None] * self.size if self.rank == 0 else None
        if self.layout == NETWORK:
            dist.gather_object(part, parts)
        elif self.rank == 0:
            parts = [part]
        return parts

    def own_range(self, n):
        """first, last: of n images to evaluate, those of this process; the parts are equal, and may overlap."""
        part = math.ceil(n / self.size) if self.layout == DATA else n
        first = min(self.rank * part, n - part) if self.layout == DATA else 0
        return first, first + part

    def all_images(self, logits, n):
        """(n, N) from the (n', N) of every process, for its `own_range`."""
        if self.layout != DATA:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(parts, logits.contiguous())
        whole = logits.new_empty(n, logits.shape[1])
        for rank, part in enumerate(parts):
            first = min(rank * len(part), n - len(part))
            whole[first : first + len(part)] = part
        return whole

    def from_first(self, value):
        """The first process's value, everywhere; the others wait for it."""
        if self.layout:
            values = [value]
            dist.broadcast_object_list(values)
            (value,) = values
        return value

    def total(self, number):
        """The sum of a number over the processes."""
        if not self.layout:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(value)
        return value.item()

    def wait(self):
        """Until every process has come here."""
        if self.layout:
            dist.all_reduce(torch.zeros(1))


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (b, C, H, W) by mean and variance over the parts of all processes, in float32.

    torch.nn.SyncBatchNorm, which does this on GPUs, does not run on a CPU.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ranks, values = self.ranks, x.float()
        var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        others = mean.new_zeros(ranks.size - 1, 2, len(mean))
        own = torch.stack([mean, var])[None]
        means, variances = SumOverRanks.apply(
            torch.cat([others[: ranks.rank], own, others[ranks.rank :]]), ranks
        ).unbind(1)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        with torch.no_grad():
            n = ranks.size * x.numel() // len(mean)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(x.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values, ranks):
        ctx.ranks = ranks
        return SumOverRanks.summed(values.clone(), ranks)

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.summed(gradient.clone(), ctx.ranks), None

    @staticmethod
    def summed(values, ranks):
        dist.all_reduce(values)
        ranks.count_sum("BatchNorm statistics", values)
        return values
