"""One short loop for every method and every network: one backward pass of the summed loss, one optimizer.

The learning rate and all randomness are functions of the step: resumed runs and paired methods match exactly."""

import gc
import math
import time
import traceback
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from itertools import chain, cycle

import torch

from .. import data
from ..data.augment import Normalise, epoch_plan, transform
from ..data.batches import TrainingBatches, in_batches
from ..errors import NoDevice, UserError
from ..losses import METHODS
from ..randomness import derive
from . import checkpoint, measure, metrics
from .execution import GraphedCallable, fast, pick_device, precision, settings, wait_for_earlier_steps
from .network_parallel import Ranks

EVAL_BATCH = {"cpu": 125, "cuda": 500}  # images evaluated at once: more leave a CPU's caches, fewer do not fill a GPU
EVAL_PIXELS = 500 * 64 * 64  # 64 channels of so many are 0.5 GB in float32: of larger images there are fewer at once


class Diverged(UserError):
    """The loss became infinite or not a number: in this epoch (from 1), after so many steps, at this learning rate."""

    def __init__(self, run, epoch, step, lr):  # which `args` keeps for unpickling
        self.epoch, self.step, self.lr = epoch, step, lr

    def __str__(self):
        return "{}: the loss is not finite in epoch {}, step {}, lr {:g}".format(*self.args)


def learning_rate(run, step, steps_per_epoch):
    """The learning rate at a step (from 0): linear warm-up, then lr * gamma^(milestones passed)."""
    warmup = run.warmup * steps_per_epoch
    passed = sum(step >= round(m * steps_per_epoch) for m in run.milestones)
    return run.lr * run.gamma**passed * min(1.0, (step + 1) / warmup if warmup else 1.0)


def train(run, folder, device="auto", *, progress=lambda **message: None, ranks=None, bf16=None, graphs=True, **pauses):
    """Train one run to the end, resuming from a checkpoint in `folder` if there is one: (result, files) of its record.
    progress(**message) hears of each epoch, and of the step every other second. graphs: whether to use CUDA graphs.
    ranks: the processes that train it together; the first one returns the record, the others None.
    bf16: whether to use bfloat16, by default where it pays on this device; a checkpoint decides for itself.
    pauses: stop, time_limit and checkpoint_seconds, see `checkpoint.Pauses`, which raises Stopped.
    Raises Diverged for a loss that is not finite, NoDevice for a device that cannot be used, and GraphFailed where a
    graph cannot be captured: nothing more must then be trained in this process."""
    device = pick_device(device)
    check_usable(device)
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), settings(device):
            training = Training(run, device, fast(device, bf16, graphs), ranks, progress)
            pauses = checkpoint.Pauses(training, folder, **pauses)
            training.loop(pauses)
            return measure.final(training, pauses)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the networks
        raise
    finally:
        training = pauses = None
        if gpus:
            give_memory_back()


def give_memory_back():  # a GPU's, for the next run and for other processes
    gc.collect()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # of every stream; not in a PyTorch for CPUs
    with suppress(RuntimeError):  # after a failed capture the allocator refuses; its process trains nothing more
        torch.cuda.empty_cache()


def check_usable(device):
    """Raises NoDevice where the first use of a GPU fails: its driver is too old, or another process has it alone."""
    try:
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise NoDevice(f"device {device} cannot be used ({why}): mend that, or use --device cpu") from None


class Material:
    """What a run brings to the loop: networks, splits, batches, how images enter a network, loss, optimizer, schedule.
    splits: {"train", "test", "holdout"} -> data.Split on the device, by default those of the run's data set."""

    def __init__(self, run, device, splits=None):
        self.run, self.device, self.network = run, device, run.network
        self.splits, self.checksum = (splits, None) if splits else data.splits(run, device)
        coupling = {"coupling": run.coupling} if "sila" in run.method else {}
        self.loss = partial(METHODS[run.method], betas=run.betas, **coupling)
        train = self.splits["train"]
        self.steps_per_epoch = len(train) // run.batch_size
        self.learning_rate = partial(learning_rate, run, steps_per_epoch=self.steps_per_epoch)
        self.loader = TrainingBatches(train.images, run.augment)
        self.normalise = Normalise(*data.normalisation(train)).to(device)
        height, width = self.splits["test"].images.shape[1:3]
        # fewer large images, but never below a training batch, which takes more memory
        self.eval_batch = min(EVAL_BATCH[device.type], max(run.batch_size, EVAL_PIXELS // (height * width)))

    def epoch(self, number, first_step, end_step):
        """Batches `first_step` up to `end_step` of an epoch, from 0: uint8 images (B, H, W, C), target (B,), and what
        `transform` needs."""
        labels, size = self.splits["train"].labels, self.run.batch_size
        plan = epoch_plan(self.run, number, len(labels), self.device)
        for images, index, choices in self.loader([part[first_step * size : end_step * size] for part in plan], size):
            yield images, labels[index], *choices

    def inputs(self, images, channels_last=True):
        """Normalised images (B, C, H, W), as networks take them, for uint8 images (B, H, W, C)."""
        x = self.normalise(images.permute(0, 3, 1, 2))
        return x if channels_last else x.contiguous()

    def optimizer(self, nets, fused):
        """One SGD for all networks. On a GPU its learning rate is a tensor, which a captured graph reads."""
        run, parameters = self.run, chain(*(net.parameters() for net in nets))
        lr = run.lr if self.device.type == "cpu" else torch.tensor(run.lr, device=self.device)
        momentum = {"momentum": run.momentum, "nesterov": run.nesterov and run.momentum > 0}
        return torch.optim.SGD(parameters, lr, **momentum, weight_decay=run.weight_decay, fused=fused)


class Training:
    """The state of one run in progress, or of this process's part of it; networks are kept by slot."""

    def __init__(self, run, device, speed, ranks=None, progress=lambda **message: None, material=None):
        self.run, self.device, self.speed, self.progress = run, device, speed, progress
        self.ranks, self.material = ranks or Ranks(), material or Material(run, device)
        self.splits, self.steps_per_epoch = self.material.splits, self.material.steps_per_epoch
        layout = torch.channels_last if speed.channels_last else torch.contiguous_format
        slots, self.heads = self.ranks.own(len(run.nets)), self.ranks.own(run.n_heads)
        self.nets = {s: self.material.network(s).to(device, memory_format=layout) for s in slots}
        self.dropout = {s: any(isinstance(m, torch.nn.Dropout) for m in net.modules()) for s, net in self.nets.items()}
        self.dtypes = [precision(net, device, speed.bf16) for net in run.nets]
        self.optimizer = self.material.optimizer(self.nets.values(), speed.fused)
        if self.steps_per_epoch == 0:
            raise UserError(f"batch size {run.batch_size} is above the {len(self.splits['train'])} training images")
        self.total = run.epochs * self.steps_per_epoch
        self.step, self.rows, self.seconds, self.cpu_seconds, self.parts = 0, [], 0.0, 0.0, []
        self.sums = torch.zeros(len(self.heads), len(metrics.STATISTICS), dtype=torch.float64, device=device)
        self.at_test = None  # logits of the test images after the last epoch
        self.graphed = speed.graphs and not self.ranks.parallel  # what processes tell each other cannot be captured
        self.captured_update, self.captured_forwards = self.captured(Training.update), {}

    def captured(self, method, **arguments):
        """A method, as a CUDA graph where `speed` asks for it. It does not keep this object and its memory alive."""
        function = partial(method, weakref.proxy(self), **arguments)
        return GraphedCallable(function) if self.graphed else function

    def loop(self, pauses):
        """All steps that are left, epoch by epoch; between them `pauses` saves, reports and stops."""
        queued = deque()
        while self.step < self.total:
            epoch, first_step = divmod(self.step, self.steps_per_epoch)
            self.epoch_began = time.monotonic()
            for images, target, *choices in self.material.epoch(epoch, first_step, self.steps_per_epoch):
                self.set_step()
                self.captured_update(images, target, *choices)
                self.step += 1
                wait_for_earlier_steps(queued, self.device)
                if self.step % self.steps_per_epoch == 0:
                    self.end_of_epoch(epoch)
                pauses.after_step()

    def set_step(self):
        """Set what depends on the step's number: the learning rate and, on a GPU, the seed of dropout."""
        self.lr = self.material.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(self.lr) if torch.is_tensor(group["lr"]) else self.lr
        if self.device.type == "cuda" and any(self.dropout.values()):
            # one seed a step: a captured graph takes it when it is replayed, and Net1's masks are drawn first
            part = [self.ranks.rank] if self.ranks.rank else []
            torch.cuda.manual_seed(derive(self.run.seed, "dropout", self.step, *part))

    def update(self, images, target, *choices):
        """One training step on one batch: forward passes, the method's loss (for SiLa equation 10), one backward pass,
        one optimizer step."""
        self.optimizer.zero_grad()
        logits = self.forward(transform(images, *choices), training=True)
        for z in logits:
            z.retain_grad()
        logits = self.ranks.all_heads(logits, self.run.method)
        self.material.loss(logits, target).backward()
        self.optimizer.step()
        means = metrics.statistics([z.detach() for z in logits], [z.grad for z in logits], target)
        self.sums += means * (len(target) / self.run.batch_size)  # the last batch of an epoch may be smaller

    def forward(self, images, training=False, only=None):
        """float32 logits (B, N) of every head here, or of one slot's, for uint8 images (B, H, W, C)."""
        x, logits = self.material.inputs(images, self.speed.channels_last), []
        for slot in self.nets if only is None else [only]:
            net = self.nets[slot].train(training)
            if training and self.dropout[slot] and self.device.type == "cpu":
                torch.random.default_generator.manual_seed(derive(self.run.seed, "dropout", slot, self.step))
            with torch.autocast(self.device.type, self.dtypes[slot], enabled=self.dtypes[slot] != torch.float32):
                z = net(x)
            logits += z if isinstance(z, tuple) else [z]
        return [z.float() for z in logits]

    def end_of_epoch(self, epoch):
        """Evaluate on the test images and add a row for each head to the history. Raises Diverged."""
        train, test = self.splits["train"], self.splits["test"]
        means = (self.sums / min(self.steps_per_epoch, len(train) / self.run.batch_size)).tolist()  # waits for a GPU
        self.sums.zero_()
        began = time.monotonic()
        self.at_test = self.predict(test.images)
        test = metrics.summaries(self.at_test, test.labels)
        norms = [sum(p.detach().float().square().sum() for p in net.parameters()).sqrt() for net in self.nets.values()]
        norms = cycle(torch.stack(norms).tolist())
        ended = dict(seconds_train=round(began - self.epoch_began, 4), seconds_test=round(time.monotonic() - began, 4))
        rows = [{"epoch": epoch + 1, "head": head, "lr": self.lr} | dict(zip(metrics.STATISTICS, values))
                | {f"test_{k}": v for k, v in at_test.items()} | {"weight_norm": norm} | ended
                for head, values, at_test, norm in zip(self.heads, means, test, norms)]  # fmt: skip
        rows = list(chain(*self.ranks.gather(rows)))
        self.rows += rows
        if not all(math.isfinite(row["train_nll"] + row["test_nll"]) for row in rows):
            raise Diverged(self.run, epoch + 1, self.step, self.lr)
        self.report(top1=[round(row["test_top1"], 2) for row in rows])

    @torch.no_grad()
    def predict(self, images, slot=None):
        """float32 logits (n, N) of every head here, or of one slot's, in evaluation mode."""
        forward = self.captured_forwards.setdefault(slot, self.captured(Training.forward, only=slot))
        batches = [forward(batch) for batch in in_batches(images, self.material.eval_batch)]
        return [torch.cat(head) for head in zip(*batches)]

    def report(self, **more):
        self.progress(run=self.run, step=self.step, total=self.total, **more)
