"""One short loop for every method and every network: one backward of the summed loss, one optimizer.

The learning rate and all randomness are pure functions of the step: a resumed run goes on as an uninterrupted one
would, to the last bit on a CPU with the same threads, and with one seed every method begins from the same weights of
Net1 and sees the same augmented batches in the same order.
"""

import gc
import hashlib
import io
import json
import math
import platform
import subprocess
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from . import data, early_exit, metrics, robustness
from .augment import Normalise, epoch_plan, transform
from .errors import Damaged, NoDevice, Stopped, UserError
from .losses import COUPLED_BY_S, METHODS
from .models import EXITS, count_parameters
from .parallel import DATA, Ranks
from .paths import ROOT
from .randomness import derive
from .runs import CHECKPOINTS, PROTOCOL, device_kind, read_bytes, to_csv, to_npz, write_record
from .speed import Ahead, Captured, amx, fast, no_search, own_stream, precision, settings
from .stream import TrainingBatches, in_batches

EVAL_BATCH = {"cpu": 125, "cuda": 500}
"""Images evaluated at once: more leave the caches of a CPU, fewer do not fill a GPU."""
EVAL_PIXELS = 500 * 64 * 64
"""Evaluation batches of larger images have fewer: 64 channels of a 3x3-stem network are then 0.5 GB in float32."""
CHECKPOINT_SECONDS = 60
SAVING_SHARE = 0.05
"""An epoch's end is saved too, unless saving would then take a larger share of the time than this."""
REPORT_SECONDS = 2
PROBE_STEPS, PROBE_SECONDS = 50, 5
"""After so many steps, in which algorithms are searched for and graphs captured, the speed of a run is taken; after so
much more time it is known well enough to say whether the run will end in a budget."""


class Diverged(UserError):
    """The loss became infinite or not a number: in this epoch (from 1), after so many steps, at this learning rate."""

    def __init__(self, run, epoch, step, lr):
        super().__init__(run, epoch, step, lr)  # what pickle makes it of again, in another process
        self.run, self.epoch, self.step, self.lr = run, epoch, step, lr

    def __str__(self):
        return f"{self.run}: the loss is not finite in epoch {self.epoch}, step {self.step}, lr {self.lr:g}"


def learning_rate(run, step, steps_per_epoch):
    """The learning rate at a step (from 0): linear warm-up, then lr * gamma^(milestones passed)."""
    warmup = run.warmup * steps_per_epoch
    passed = sum(step >= round(m * steps_per_epoch) for m in run.milestones)
    return run.lr * run.gamma**passed * min(1.0, (step + 1) / warmup if warmup else 1.0)


def build(run, slot):
    """The network of one slot with its initial weights, a function of (seed, slot) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(derive(run.seed, "weights", slot))
        return run.network(slot)


def evaluation_batch(run, shape, device):
    """Images (n, H, W, C) of `shape` that are evaluated at once: fewer large ones, but never below a training batch,
    which takes more memory."""
    return min(EVAL_BATCH[device.type], max(run.batch_size, EVAL_PIXELS // (shape[1] * shape[2])))


def pick_device(name):
    """torch.device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1". Raises UserError if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found): use --device cpu or auto")
    return device


def train(
    run,
    folder,
    device="auto",
    stop=lambda: None,
    progress=lambda **message: None,
    hurry=None,
    ranks=None,
    half=None,
    graphs=True,
):
    """Train one run to its end, or on from its checkpoint in `folder`, and write its record there.

    stop() is asked after every step; a true answer (the reason) checkpoints and raises Stopped.
    progress(**message) hears of each epoch, and of the step every other second. hurry, in seconds: give up with
    Stopped as soon as the measured speed says that the run will not end in that time. ranks: the processes that train
    it together; the first one writes and returns the record, the others return None. half: whether to use bfloat16, by
    default where it pays on this device; a checkpoint decides for itself. graphs: whether a GPU may capture CUDA
    graphs. Raises Diverged for a loss that is not finite, NoDevice for a device that cannot be used, GraphFailed where
    a graph cannot be captured: then nothing more must be trained in this process.
    """
    device = pick_device(device)
    check_usable(device)
    gpu = device.type == "cuda"
    speed = fast(device) if half is None else replace(fast(device), half=half)
    speed = replace(speed, graphs=speed.graphs and graphs)
    try:
        with torch.random.fork_rng(devices=[device] if gpu else []), settings(device), own_stream(device):
            training = Training(run, folder, device, stop, progress, hurry, ranks, speed)
            try:
                return training.finish()
            finally:
                training.release()
                del training
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold the networks
        raise
    finally:
        if gpu:
            give_memory_back()


def give_memory_back():
    """To the next run, and to other processes on this GPU."""
    gc.collect()
    # kept for every stream that was used; not in a PyTorch for CPUs
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    with suppress(RuntimeError):  # after a failed capture the allocator refuses; its process trains nothing more
        torch.cuda.empty_cache()


def check_usable(device):
    """Raises NoDevice where the first use of a GPU fails: its driver is too old, or another process has it alone."""
    try:
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NoDevice(f"device {device} cannot be used ({reason}): mend that, or use --device cpu") from None


class Training:
    """The state of one run in progress, or of the part of it that this process has; networks are kept by slot."""

    def __init__(self, run, folder, device, stop, progress, hurry, ranks=None, speed=None):
        self.run, self.folder, self.device, self.speed = run, Path(folder), device, speed or fast(device)
        self.stop, self.progress, self.hurry, self.ranks = stop, progress, hurry, ranks or Ranks()
        self.splits, self.data_checksum = data.splits(run, device)
        self.target = self.splits["train"].labels
        self.batches = TrainingBatches(self.splits["train"].images, run.augment)
        self.eval_batch = evaluation_batch(run, self.splits["test"].images.shape, device)
        self.normalise = Normalise(*data.normalisation(self.splits["train"])).to(device)
        slots = self.ranks.slots(run)
        layout = torch.channels_last if self.speed.channels_last else torch.contiguous_format
        nets = {slot: build(run, slot).to(device, memory_format=layout) for slot in slots}
        self.nets = self.ranks.whole_batch(nets)
        if self.speed.compiled:
            for net in self.nets.values():
                net.compile()
        self.dropout = {s: any(isinstance(m, nn.Dropout) for m in net.modules()) for s, net in self.nets.items()}
        self.dtypes = [precision(net, device, self.speed.half) for net in run.nets]
        self.loss = METHODS[run.method]
        self.loss_arguments = {"betas": run.betas} | ({"coupling": run.coupling} if "sila" in run.method else {})
        self.optimizer = torch.optim.SGD(
            [p for net in self.nets.values() for p in net.parameters()],
            lr=run.lr if device.type == "cpu" else torch.tensor(run.lr, device=device),
            momentum=run.momentum,
            nesterov=run.nesterov and run.momentum > 0,
            weight_decay=run.weight_decay,
            fused=self.speed.fused,
        )
        self.steps_per_epoch = len(self.target) // run.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(f"batch size {run.batch_size} is above the {len(self.target)} training images")
        self.total = run.epochs * self.steps_per_epoch
        self.step, self.rows, self.seconds, self.cpu_seconds = 0, [], 0.0, 0.0
        self.sums = torch.zeros(len(self.ranks.heads(run)), len(STATISTICS), dtype=torch.float64, device=device)
        # what processes tell each other cannot be captured
        self.captured = Captured if self.speed.graphs and not self.ranks.layout else lambda function: function
        self.captured_update, self.captured_forwards = self.captured(self.update), {}
        self.saving, self.parts = 0.0, []
        self.at_test = None  # logits of the test images after the last epoch
        self.resume()
        self.cpu_before = self.cpu_seconds - time.process_time()
        part = self.here()
        if not self.parts or part != {k: v for k, v in self.parts[-1].items() if k != "from_step"}:
            self.parts.append({"from_step": self.step, **part})
        self.averaged = self.ranks.averaged(self.nets)

    def release(self):
        """Let go of what refers to this object, so that its memory and its graphs go with its last name."""
        self.captured_update, self.captured_forwards = None, {}

    # -- the loop

    def finish(self):
        started = self.saved = self.reported = time.monotonic()
        self.probe = None
        first, before, ahead = self.step, self.seconds, Ahead(self.device)
        while self.step < self.total:
            epoch, i = divmod(self.step, self.steps_per_epoch)
            if i == 0 or self.step == first:
                plan = epoch_plan(self.run, epoch, len(self.target), self.device)
                plan, size = self.ranks.own_images(plan, self.run.batch_size)
                self.batches.begin(plan[0][i * size : self.steps_per_epoch * size], size)
                epoch_started = time.monotonic()
            batch = slice(i * size, (i + 1) * size)
            self.one_step(*(part[batch] for part in plan))
            self.step += 1
            ahead.step()
            self.seconds = before + time.monotonic() - started
            if i + 1 == self.steps_per_epoch:
                self.end_of_epoch(epoch, epoch_started)
                self.seconds = before + time.monotonic() - started
            self.pause(first, started)
        if self.ranks.sent:
            self.report(text=f"each process sent in a step: {self.ranks.bytes_sent(self.step - first)}")
        return self.write()

    def one_step(self, index, offset, flip, *choices):
        """One batch. What depends on the number of the step is set here; `update` is the same work in every step."""
        for group in self.optimizer.param_groups:
            lr = learning_rate(self.run, self.step, self.steps_per_epoch)
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.device.type == "cuda" and any(self.dropout.values()):
            # one seed a step: a captured graph takes it when it is replayed, and Net1's masks are drawn first
            part = [self.ranks.rank] if self.ranks.rank else []
            torch.cuda.manual_seed(derive(self.run.seed, "dropout", self.step, *part))
        self.captured_update(self.batches.crop_flip(index, offset, flip), self.target[index], *choices)

    def update(self, images, target, *choices):
        """Equation 10 on one batch: forward of every network here, one loss, one backward, one update."""
        self.optimizer.zero_grad()
        logits = self.forward(transform(images, *choices), training=True)
        for z in logits:
            z.retain_grad()
        logits = self.ranks.all_heads(logits, mutual=self.run.method not in COUPLED_BY_S)
        self.loss(logits, target, **self.loss_arguments).backward()
        self.optimizer.step()
        self.sums += statistics([z.detach() for z in logits], [z.grad for z in logits], target)

    def forward(self, images, training=False, slots=None):
        """float32 logits (B, N) of every head here for uint8 images (B, H, W, C); of the slots asked for, or all."""
        x = self.normalise(images.permute(0, 3, 1, 2))
        if not self.speed.channels_last:
            x = x.contiguous()
        logits = []
        for slot in slots or self.nets:
            net = (self.averaged if training else self.nets)[slot]
            net.train(training)
            if training and self.dropout[slot] and self.device.type == "cpu":
                part = [self.ranks.rank] if self.ranks.layout == DATA else []
                torch.random.default_generator.manual_seed(derive(self.run.seed, "dropout", slot, self.step, *part))
            with torch.autocast(self.device.type, self.dtypes[slot], enabled=self.dtypes[slot] != torch.float32):
                z = net(x)
            logits += z if isinstance(z, tuple) else [z]
        return [z.float() for z in logits]

    def end_of_epoch(self, epoch, epoch_started):
        means = self.ranks.mean(self.sums / self.steps_per_epoch).tolist()  # here the host waits for the device
        self.sums.zero_()
        began = time.monotonic()
        lr = learning_rate(self.run, self.step - 1, self.steps_per_epoch)
        self.at_test = self.predict(self.splits["test"].images)
        test = metrics.summaries(self.at_test, self.splits["test"].labels)
        norms = [sum(p.detach().float().square().sum() for p in net.parameters()).sqrt() for net in self.nets.values()]
        norms = torch.stack(norms).tolist()
        seconds_train, seconds_test = began - epoch_started, time.monotonic() - began
        rows = [
            {"epoch": epoch + 1, "head": head, "lr": lr}
            | dict(zip(STATISTICS, values))
            | {f"test_{k}": v for k, v in at_test.items()}
            | {"weight_norm": norm}
            | {"seconds_train": round(seconds_train, 4), "seconds_test": round(seconds_test, 4)}
            for head, values, at_test, norm in zip(self.ranks.heads(self.run), means, test, cycle(norms))
        ]
        rows = self.ranks.gather(rows)
        self.rows += rows
        if not all(math.isfinite(row["train_nll"] + row["test_nll"]) for row in rows):
            raise Diverged(self.run, epoch + 1, self.step, lr)
        self.report(top1=[round(row["test_top1"], 2) for row in rows])

    @torch.no_grad()
    def predict(self, images, slot=None):
        """float32 logits (n, N) of every head here, or of one slot's, in evaluation mode."""
        if slot not in self.captured_forwards:
            slots = None if slot is None else [slot]
            self.captured_forwards[slot] = self.captured(partial(self.forward, slots=slots))
        forward = self.captured_forwards[slot]
        own = self.ranks.own_range(len(images))
        batches = [forward(batch) for batch in in_batches(images, self.eval_batch, *own)]
        return [self.ranks.all_images(torch.cat(head), len(images)) for head in zip(*batches)]

    # -- interruption

    def check(self):
        """Between the parts of the final evaluations: stop when asked to; the training is saved."""
        if reason := self.ranks.agree(self.stop(), False)[0]:
            raise Stopped(f"{self.run}: {reason} in the final evaluations; the training is saved")

    def report(self, **more):
        self.reported = time.monotonic()
        self.progress(run=self.run, step=self.step, total=self.total, **more)

    def pause(self, first, started):
        """After a step: save once a minute, report, stop when asked to or when the run would not end in time."""
        reason = self.stop()
        if self.hurry is not None and not reason:
            now = time.monotonic()
            if self.step - first == PROBE_STEPS:
                self.probe = self.step, now
            elif self.probe and now - self.probe[1] > PROBE_SECONDS:
                pace = (now - self.probe[1]) / (self.step - self.probe[0])
                if now - started + pace * (self.total - self.step) > self.hurry:
                    reason = "it would not end in the budget"
        since, epoch_ended = time.monotonic() - self.saved, self.step % self.steps_per_epoch == 0
        due = since > CHECKPOINT_SECONDS or (epoch_ended and SAVING_SHARE * since > self.saving)
        reason, due = self.ranks.agree(reason, due)
        if reason or (due and self.step < self.total):  # the end is saved by `write`
            self.save()
        if reason:
            raise Stopped(f"{self.run}: {reason}; step {self.step} of {self.total} is saved")
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self.report()

    def save(self):
        began = time.monotonic()
        state = {
            "protocol": PROTOCOL,
            "config": json.dumps(self.run.config),
            "data_sha256": self.data_checksum,
            "parts": self.parts,
            "step": self.step,
            "rows": self.rows,
            "sums": self.ranks.mean(self.sums.clone()),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_before + time.process_time(),
            "nets": [net.state_dict() for net in self.nets.values()],
            "optimizer": self.optimizer.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.save(self.folder, self.step, checkpoint_bytes(state))
        self.saved = time.monotonic()
        self.saving = self.saved - began

    def resume(self):
        """Go on from the last checkpoint that is whole, if there is one; damaged ones are set aside as *.corrupt.

        The first process chooses it; the others then read it too, or their own files of it.
        """
        path = None
        if self.ranks.rank == 0:
            path = self.resume_last()
        path, step = self.ranks.from_first((path, self.step))
        if path and self.ranks.rank:
            path = self.ranks.checkpoint(path, step)
            self.go_on(path, read_checkpoint(path, self.device))

    def resume_last(self):
        for path in [path for name in CHECKPOINTS if (path := self.folder / name).exists()]:
            try:
                self.go_on(path, read_checkpoint(path, self.device))
                return path
            except Damaged:
                aside = path.replace(f"{path}.corrupt")
                self.report(text=f"{path} was damaged and is now {aside.name}; the run goes on from what is before it")
        return None

    def go_on(self, path, state):
        if state["protocol"] != PROTOCOL or json.loads(state["config"]) != self.run.config:
            raise UserError(f"{path} is of another configuration: delete it to train the run from its start")
        if state["data_sha256"] != self.data_checksum:
            raise UserError(
                f"{path} was trained on other data than {self.run.dataset} is here: delete it to start anew"
            )
        last = state["parts"][-1]
        if (kind := device_kind(last)) != self.device.type:
            raise UserError(
                f"{path} was written with --device {kind}: go on like that, or set SILALIB_RESULTS to another folder"
            )
        if (held := len(state["nets"])) != len(self.nets):  # by a process of network-parallel, one
            count = f"torchrun --nproc-per-node {len(self.run.nets)}" if held == 1 else "one process"
            raise UserError(f"{path} was written by {count}: go on like that, or delete it to start again")
        try:
            for net, weights in zip(self.nets.values(), state["nets"]):
                net.load_state_dict(weights)
            own = self.optimizer.state_dict()["param_groups"]  # whose learning rate is of this device's kind
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": own})
        except (RuntimeError, ValueError, KeyError):
            raise UserError(f"{path} is of another version of its networks: delete it to start anew") from None
        if "cpu_seconds" not in state:
            raise UserError(f"{path} is of an older version, whose records hold less: delete it to start anew")
        names = "step", "rows", "seconds", "cpu_seconds", "sums", "parts"
        self.step, self.rows, self.seconds, self.cpu_seconds, self.sums, self.parts = (state[name] for name in names)
        self.dtypes = [precision(net, self.device, "bfloat16" in last["precision"]) for net in self.run.nets]
        self.report(resumed=True)

    # -- the record

    def write(self):
        """The final evaluations, and the record. Everything is measured now: weights are rarely kept."""
        self.save()  # what follows can take minutes, and is stopped between its parts
        began = time.monotonic()
        run, train, test = self.run, self.splits["train"], self.splits["test"]
        image = data.dataset(run.dataset).image
        self.report(final="final evaluations")
        logits = self.at_test or self.predict(test.images)  # of the last epoch, unless a checkpoint begins here
        clean = self.predict(train.images)
        # on a GPU one image would be a shape to search algorithms for
        counted = self.nets if self.device.type == "cpu" else self.without_weights()
        costs = [macs for net in counted.values() for macs in early_exit.exit_costs(net, image)]
        heads, arrays = [], {"labels": test.labels.cpu().short().numpy()}
        for head, z, at_end, macs in zip(self.ranks.heads(run), logits, clean, costs):
            slot = run.slot(head)
            rows = [row for row in self.rows if row["head"] == head]
            best = max(rows, key=lambda row: row["test_top1"])
            heads.append(
                {"network": run.nets[slot]}
                | metrics.summary(z, test.labels)
                | metrics.calibration(z, test.labels)
                | {"best": best["test_top1"], "best_epoch": best["epoch"]}
                | {f"train_{k}": v for k, v in metrics.summary(at_end, train.labels).items()}
                | {"train_ece": metrics.ece(at_end.double(), train.labels)}
                | {"parameters": count_parameters(self.nets[slot]), "macs": macs}
            )
            arrays |= {f"{name}_{head}": a for name, a in per_image(z, test.labels, run.nets[slot]).items()}
        if run.nets[0] in EXITS:
            for values, macs in zip(heads, early_exit.exit_costs(counted[0], image, budgeted=True)):
                values["macs_budgeted"] = macs
        if run.holdout:
            arrays |= self.calibration()
        embed = all(hasattr(net, "embed") for net in self.without_weights(range(len(run.nets))).values())
        features = self.features(heads) if embed else {}
        noise = self.noise() if run.noise_images else []
        if run.hessian_images:
            for values, curvature in zip(heads, self.curvature()):
                values["curvature"] = curvature
        predicted = [z.argmax(1).cpu() for z in clean]
        used = self.ranks.total(self.cpu_before + time.process_time())
        part = heads, arrays, features, noise, self.weights(), [z.cpu() for z in logits], predicted
        parts = self.ranks.to_first(part)
        if parts is None:  # the first process writes the record
            return None
        heads, arrays, features, noise, weights, logits, predicted = zip(*parts)
        heads, arrays = list(chain(*heads)), union(arrays)
        together = {}
        if run.nets[0] not in EXITS and len(heads) > 1:
            together, per_test_image = ensemble(list(chain(*logits)), test.labels)
            together["train_disagreement"] = metrics.disagreement(list(chain(*predicted)))
            arrays |= per_test_image
        files = {"history.csv": to_csv(self.rows), "test.npz": to_npz(arrays)}
        if run.holdout and run.nets[0] in EXITS:
            costs = [head["macs_budgeted"] for head in heads]
            files["budgeted.csv"] = to_csv(early_exit.sweep(arrays, costs))
        if embed:
            files["features.npz"] = to_npz(union(features))
        if run.noise_images:
            files["noise.csv"] = to_csv(list(chain(*noise)))
        files["weights.safetensors"] = to_safetensors(union(weights))
        result = {"heads": heads} | ({"ensemble": together} if together else {})
        result["provenance"] = self.provenance(time.monotonic() - began, used)
        return write_record(run, self.folder, result, files)

    def without_weights(self, slots=None):
        """The networks of these slots, by default of those here, on torch's meta device."""
        with torch.device("meta"):
            return {slot: self.run.network(slot) for slot in (self.nets if slots is None else slots)}

    def calibration(self):
        """Of the images held out, not augmented: what thresholds of early exit are chosen from."""
        held = self.splits["holdout"]
        arrays = {"calibration_labels": held.labels.cpu().short().numpy()}
        for head, z in zip(self.ranks.heads(self.run), self.predict(held.images)):
            kept = per_image(z, held.labels, self.run.nets[0])
            arrays |= {f"calibration_{name}_{head}": kept[name] for name in ("confidence", "predicted")}
        return arrays

    @torch.no_grad()
    @no_search()
    def features(self, heads):
        """Features before the last layer (Figure 6), its weights, and their concentration into `heads`."""
        arrays = {}
        subset = {"test": self.splits["test"], "train": self.splits["train"]}
        for (head, net), values in zip(self.nets.items(), heads):
            net.eval()
            for name, split in subset.items():
                labels = split.labels[:10000]
                f = torch.cat(
                    [
                        net.embed(self.normalise(images.permute(0, 3, 1, 2))).float()
                        for images in in_batches(split.images, self.eval_batch, last=10000)
                    ]
                )
                arrays[f"{name}_{head}"] = f.cpu().half().numpy()
                arrays[f"{name}_labels"] = labels.cpu().to(torch.uint8).numpy()
                values[f"{name}_concentration"] = robustness.concentration(f, labels)
            arrays[f"weight_{head}"] = net.fc.weight.detach().cpu().numpy()
            arrays[f"bias_{head}"] = net.fc.bias.detach().cpu().numpy()
        return arrays

    def noise(self):
        """Figure 7b: training NLL under noise on the parameters, on fixed, unaugmented training images."""
        run, rows = self.run, []
        images, labels = self.fixed_train_images(run.noise_images)
        for head, net in self.nets.items():
            for kind in ("absolute", "filter"):
                self.check()
                curve = robustness.parameter_noise(
                    net,
                    lambda net, slot=head: self.predict(images, slot)[0],
                    labels,
                    run.noise_sigmas,
                    run.noise_draws,
                    kind,
                    derive(run.seed, "noise", head),
                )
                rows += [{"head": head} | row for row in curve]
            self.report(final=f"noise, network {head + 1} of {len(run.nets)}")
        return rows

    def curvature(self):
        """Largest Hessian eigenvalues of each network's own training NLL, in float32, BatchNorm in evaluation mode."""
        images, labels = self.fixed_train_images(self.run.hessian_images)
        x = self.normalise(images.permute(0, 3, 1, 2))
        for head, net in self.nets.items():
            net.eval()
            values = {"images": len(labels)}
            for name, scaled in (("absolute", False), ("filter", True)):
                self.check()
                loss = lambda net=net: metrics.cross_entropy(net(x), labels).mean()
                with no_search():
                    value, steps, residual = robustness.largest_eigenvalue(loss, net.parameters(), scaled)
                values |= {name: value, f"{name}_steps": steps, f"{name}_residual": residual}
            self.report(final=f"curvature, network {head + 1} of {len(self.run.nets)}")
            yield values

    def fixed_train_images(self, n):
        """The first n training images in the balanced order: the same for every run on this data."""
        chosen = data.balanced_order(self.target.cpu())[:n].to(self.device)
        return self.splits["train"].images[chosen], self.target[chosen]

    def weights(self):
        tensors = {"mean": self.normalise.mean, "std": self.normalise.std}
        for slot, net in self.nets.items():
            tensors |= {f"{slot}.{k}": v for k, v in net.state_dict().items()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}

    def here(self):
        """What this process trains with: a run that goes on elsewhere has several `parts`."""
        gpu = self.device.type == "cuda"
        return {
            "silalib": code_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "kind": self.device.type,
            "device": torch.cuda.get_device_name(self.device) if gpu else processor(),
            "amx": amx(),
            "threads": torch.get_num_threads(),
            "processes": self.ranks.size,
            "layout": self.ranks.layout,
            **({"graphs": self.captured is Captured, **cuda_versions()} if gpu else {}),
            "precision": "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.dtypes)),
        }

    def provenance(self, seconds_final, cpu_seconds):
        """Of the process that ends the run; `parts` says which one trained from which step, if they differ."""
        return {
            **{k: v for k, v in self.parts[-1].items() if k != "from_step"},
            **({"parts": self.parts} if len(self.parts) > 1 else {}),
            "data_sha256": self.data_checksum,
            "train_images": len(self.target),
            "seconds": round(self.seconds, 1),
            "seconds_final": round(seconds_final, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def checkpoint_bytes(state):
    """A checkpoint file: what torch.save makes of the state, then 32 bytes of its sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).digest()
    buffer.write(digest)
    return buffer.getbuffer()


def read_checkpoint(path, device):
    """The state in a checkpoint file. Raises Damaged for anything that was not written; nothing in it is executed."""
    instead = "delete checkpoint*.pt beside it to train the run from its start"
    content = memoryview(read_bytes(path, instead))
    try:
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return torch.load(io.BytesIO(content[:-32]), map_location=device, weights_only=True)
    except UnpicklingError:  # something else than tensors and plain values, which no checkpoint has
        pass
    raise Damaged(path, instead)


STATISTICS = ("train_nll", "train_top1", "z_y", "alpha", "s", "gap", "equation5", "gradient", "offset")
"""Columns of history.csv that are means over an epoch's augmented training batches; see `statistics`."""


def statistics(logits, gradients, target):
    """One row of means over a batch, float64 (C, 9), in the order of STATISTICS, per head; gradient None leaves it out.

    NLL and top-1 of the head alone; z_y, alpha (equation 4), s and mean |s_c - s_k| to the peers (NaN without one);
    |dL_cross/dz_y| = 1 - p_y of equation 5; |dL/dz_y| of the loss that is really trained, per sample; and the offset,
    the mean of z over the classes.
    """
    batch = len(target)
    s = torch.cat(logits).logsumexp(1).view(-1, batch)  # all heads at once: few operations, whatever their number
    own = [c for c, gradient in enumerate(gradients) if gradient is not None]
    z, gradient = (torch.cat([values[c] for c in own]) for values in (logits, gradients))
    target = target.repeat(len(own))
    z_y = z.gather(1, target[:, None])[:, 0]
    s_own = torch.stack([s[c] for c in own])
    gap = (s - s_own[:, None]).abs().sum(1) / (len(s) - 1)  # 0/0 without a peer
    nll = s_own.flatten() - z_y
    rows = [
        nll,
        100 * metrics.in_top_k(z, target, 1),
        z_y,
        metrics.wrong_logsumexp(z, target),
        s_own,
        gap,
        -torch.expm1(-nll),
        gradient.gather(1, target[:, None])[:, 0].abs() * batch,
        z.mean(1),
    ]
    return torch.stack([row.view(len(own), batch).double().mean(1) for row in rows], 1)


def per_image(logits, target, network):
    """What test.npz keeps of one head: enough for calibration, comparison by image and the free energies.

    All in half precision, but for the confidence of an exit: there confident images tie in half precision, and
    thresholds cannot tell them apart.
    """
    log_p = logits.log_softmax(1)
    largest, predicted = log_p.max(1)
    arrays = {
        "log_probability": log_p.gather(1, target[:, None])[:, 0].half(),
        "confidence": largest.exp() if network in EXITS else largest.exp().half(),
        "predicted": predicted.short(),
        "top5": metrics.in_top_k(logits, target, 5),
        "s": logits.logsumexp(1).half(),
        "offset": logits.mean(1).half(),
    }
    return {k: v.cpu().numpy() for k, v in arrays.items()}


def ensemble(logits, target):
    """Several networks together: `metrics.ensemble`, and what test.npz keeps of them for each image."""
    values, log_p = metrics.ensemble(logits, target)
    largest, predicted = log_p.max(1)
    confidence = largest.exp().half()
    return values, {
        "ensemble_predicted": predicted.short().numpy(),
        "ensemble_confidence": confidence.numpy(),
    }


def union(parts):
    """One dict of those of all processes."""
    return {name: value for part in parts for name, value in part.items()}


def to_safetensors(tensors):
    from safetensors.torch import save

    return save(tensors)


def code_version():
    """{"code": hash of the package's source, "commit": of the checkout, "+" if it was changed}."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    version = {"code": digest.hexdigest()[:12]}
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        version["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return version


def cuda_versions():
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
