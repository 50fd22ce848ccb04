"""Between steps: when a run saves, reports and stops; its checkpoints, and how it resumes from one."""

import hashlib
import io
import json
import time
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import CorruptFile, Stopped, UserError
from ..files import quarantine, read_bytes, write_atomically
from ..run import PROTOCOL
from .execution import precision
from .provenance import device_kind

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
"""The current checkpoint of a run, and the previous one, from which it resumes where the current one is damaged."""

FORMAT = 2
"""Of the state in a checkpoint: a run with one of another format starts anew."""

OF_TRAINING = ("step", "rows", "seconds", "cpu_seconds", "sums", "parts")
"""What a checkpoint holds of a Training's attributes, beside the networks and the optimizer."""

SECONDS = 60
SAVING_SHARE = 0.05
"""An epoch's end is saved too, unless saving would then take a larger share of the time than this."""

REPORT_SECONDS = 2

PROBE_STEPS, PROBE_SECONDS = 50, 5
"""After so many steps, in which algorithms are searched for and graphs captured, the speed of a run is taken; after so
much more time it is known well enough to say whether the run will end in a time limit."""


class Pauses:
    """What happens between the steps of a `trainer.Training`, which resumes from its checkpoint here; see `train`."""

    def __init__(self, training, folder, stop=lambda: None, time_limit=None, every=SECONDS, clock=time.monotonic):
        self.training, self.folder, self.clock = training, Path(folder), clock
        self.stop, self.time_limit, self.every = stop, time_limit, every
        self.saving = 0.0  # how long the last checkpoint took
        self.resume()
        self.cpu_before = training.cpu_seconds - time.process_time()
        part = training.here()
        if not training.parts or training.parts[-1] != {"from_step": training.parts[-1]["from_step"], **part}:
            training.parts.append({"from_step": training.step, **part})
        self.started = self.saved = self.reported = clock()
        self.before, self.first, self.probe = training.seconds, training.step, None

    def after_step(self):
        """Save once a minute, report, stop when asked to or when the run would not end in time. Raises Stopped."""
        training, now = self.training, self.clock()
        training.seconds = self.before + now - self.started
        reason = self.stop() or self.too_slow(now)
        since, epoch_ended = now - self.saved, training.step % training.steps_per_epoch == 0
        due = since > self.every or (epoch_ended and SAVING_SHARE * since > self.saving)
        reason, due = training.ranks.agree(reason, due)
        if reason or (due and training.step < training.total):  # the end is saved before the final evaluations
            self.save()
        if reason:
            raise Stopped(f"{training.run}: {reason}; step {training.step} of {training.total} is saved")
        if epoch_ended:  # the training has reported it
            self.reported = now
        elif now - self.reported > REPORT_SECONDS:
            self.reported = now
            training.report()

    def too_slow(self, now):
        """Why the run is given up: its measured speed says that it would not end in the time limit."""
        training = self.training
        if self.time_limit and training.step - self.first == PROBE_STEPS:
            self.probe = training.step, now
        elif self.probe and now - self.probe[1] > PROBE_SECONDS:
            pace = (now - self.probe[1]) / (training.step - self.probe[0])
            if now - self.started + pace * (training.total - training.step) > self.time_limit:
                return "it would not end in the budget"
        return None

    def check(self):
        """Between the parts of the final evaluations: stop when asked to; the training is saved."""
        if reason := self.training.ranks.agree(self.stop(), False)[0]:
            raise Stopped(f"{self.training.run}: {reason} in the final evaluations; the training is saved")

    def cpu_seconds(self):
        """CPU time of this process for the run, that before its checkpoint included."""
        return self.cpu_before + time.process_time()

    # -- checkpoints

    def save(self):
        """Write this process's file of a checkpoint; the first one's comes last: with it, all of a step are there.

        The previous checkpoint is kept where one process trains.
        """
        training, ranks, began = self.training, self.training.ranks, self.clock()
        training.cpu_seconds = self.cpu_seconds()
        state = {
            "format": FORMAT,
            "protocol": PROTOCOL,
            "config": json.dumps(training.run.config),
            "data_sha256": training.material.checksum,
            "nets": [net.state_dict() for net in training.nets.values()],
            "optimizer": training.optimizer.state_dict(),
            **{name: getattr(training, name) for name in OF_TRAINING},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        latest, previous = (self.folder / name for name in CHECKPOINTS)
        path, content = self.file_of(training.step), checkpoint_bytes(state)
        if ranks.rank:
            write_atomically(path, content)
        ranks.barrier()
        if not ranks.rank:
            write_atomically(latest, content, None if ranks.parallel else previous)
        ranks.barrier()
        if ranks.rank:
            for old in set(self.folder.glob(f"checkpoint.{ranks.rank}-*.pt")) - {path}:
                old.unlink()
        self.saved = self.clock()
        self.saving = self.saved - began

    def file_of(self, step):
        """This process's file of the checkpoint at a step."""
        rank = self.training.ranks.rank
        return self.folder / (f"checkpoint.{rank}-{step}.pt" if rank else CHECKPOINTS[0])

    def resume(self):
        """Go back to the last whole checkpoint: the first process finds it, the others read their files of its step."""
        training = self.training
        found = None if training.ranks.rank else self.restore_last()
        found, step = training.ranks.broadcast((found, training.step))
        if found and training.ranks.rank:
            path = self.file_of(step)
            self.restore(path, read_checkpoint(path, training.device))

    def restore_last(self):
        """Whether a checkpoint was restored; damaged ones become *.corrupt."""
        for path in [path for name in CHECKPOINTS if (path := self.folder / name).exists()]:
            try:
                state = read_checkpoint(path, self.training.device)
            except CorruptFile as error:
                self.training.report(text=f"{quarantine(error, path.name)}; the run resumes from what is before it")
                continue
            if state.get("format") == FORMAT:
                self.restore(path, state)
                return True
            self.training.report(text=f"{path} is of another version of silalib: the run starts anew")
            break
        return False

    def restore(self, path, state):
        """Raises UserError for a checkpoint of another run, other data, another device or other processes."""
        training = self.training
        run, last, held = training.run, state["parts"][-1], len(state["nets"])
        if state["protocol"] != PROTOCOL or json.loads(state["config"]) != run.config:
            raise UserError(f"{path} is of another configuration: delete it to train the run from its start")
        if state["data_sha256"] != training.material.checksum:
            raise UserError(f"{path} was trained on other data than {run.dataset} is here: delete it to start anew")
        if (kind := device_kind(last)) != training.device.type:
            where = "go on like that, or set SILALIB_RESULTS to another folder"
            raise UserError(f"{path} was written with --device {kind}: {where}")
        if held != len(training.nets):  # a process of network-parallel holds one
            count = f"torchrun --nproc-per-node {len(run.nets)}" if held == 1 else "one process"
            raise UserError(f"{path} was written by {count}: go on like that, or delete it to start again")
        try:
            for net, weights in zip(training.nets.values(), state["nets"]):
                net.load_state_dict(weights)
            own = training.optimizer.state_dict()["param_groups"]  # whose learning rate is of this device's kind
            training.optimizer.load_state_dict({**state["optimizer"], "param_groups": own})
        except (RuntimeError, ValueError, KeyError):
            raise UserError(f"{path} is of another version of its networks: delete it to start anew") from None
        for name in OF_TRAINING:
            setattr(training, name, state[name])
        training.dtypes = [precision(net, training.device, "bfloat16" in last["precision"]) for net in run.nets]
        training.report(resumed=True)


def checkpoint_bytes(state):
    """A checkpoint file: what torch.save makes of the state, then 32 bytes of its sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getbuffer()


def read_checkpoint(path, device):
    """The state in a checkpoint file. Raises CorruptFile for anything that was not written; nothing is executed."""
    instead = "delete checkpoint*.pt beside it to train the run from its start"
    content = memoryview(read_bytes(path, instead))
    with suppress(UnpicklingError):  # something else than tensors and plain values, which no checkpoint has
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return torch.load(io.BytesIO(content[:-32]), map_location=device, weights_only=True)
    raise CorruptFile(path, instead)
