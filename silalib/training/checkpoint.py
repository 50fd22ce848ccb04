"""Between steps: when a run saves, reports and stops; its checkpoints, and how it resumes from one."""

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from time import monotonic, process_time

import torch

from ..errors import CorruptFile, Stopped, UserError
from ..files import quarantine, read_bytes, write_atomically
from ..run import PROTOCOL
from .execution import precision
from .provenance import device_kind, here

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
"""The current checkpoint of a run, and the previous one, from which it resumes where the current one is damaged."""
FORMAT = 2  # of the state in a checkpoint: a run with one of another format starts anew
OF_TRAINING = ("step", "rows", "seconds", "cpu_seconds", "sums", "parts")  # the Training's attributes in it


class Pauses:
    """What happens between the steps of a `trainer.Training`, which resumes from its checkpoint in `folder` here.
    stop() is asked after every step; a true answer (the reason) saves and raises Stopped. time_limit, in seconds: give
    up with Stopped once the measured speed says that the run will not end in it. checkpoint_seconds: between saves."""

    def __init__(self, training, folder, stop=lambda: None, time_limit=None, checkpoint_seconds=60, clock=monotonic):
        self.training, self.folder, self.clock = training, Path(folder), clock
        self.stop, self.time_limit, self.checkpoint_seconds = stop, time_limit, checkpoint_seconds
        self.saving = 0.0  # how long the last checkpoint took
        self.resume()
        cpu_before = training.cpu_seconds - process_time()
        self.cpu_seconds = lambda: cpu_before + process_time()  # that before its checkpoint included
        part = here(training.device, training.ranks, training.dtypes, training.graphed)
        if not training.parts or training.parts[-1] != {"from_step": training.parts[-1]["from_step"], **part}:
            training.parts.append({"from_step": training.step, **part})
        self.started = self.saved = self.reported = clock()
        self.before, self.first = training.seconds, training.step

    def after_step(self):
        """Save, report, and stop when asked to or when the run would not end in time. Raises Stopped."""
        training, now = self.training, self.clock()
        training.seconds = self.before + now - self.started
        reason = self.stop() or (self.time_limit and self.too_slow(now))
        since, epoch_ended = now - self.saved, training.step % training.steps_per_epoch == 0
        # an epoch's end is saved too, unless that would take more than 5% of the time
        due = since > self.checkpoint_seconds or (epoch_ended and 0.05 * since > self.saving)
        reason, due = training.ranks.agree(reason, due)
        if reason or (due and training.step < training.total):  # the end is saved before the final evaluations
            self.save()
        if reason:
            raise Stopped(f"{training.run}: {reason}; step {training.step} of {training.total} is saved")
        if epoch_ended or now - self.reported > 2:
            self.reported = now
            if not epoch_ended:  # which the training has reported
                training.report()

    def too_slow(self, now):
        """Why the run is given up: its measured speed says that it would not end in the time limit."""
        steps = self.training.step - self.first - 50  # in these algorithms are searched for
        if steps <= 0:
            self.probed = now
        left = (now - self.probed) / max(steps, 1) * (self.training.total - self.training.step)
        slow = now - self.probed > 5 and now - self.started + left > self.time_limit
        return "it would not end in the budget" if slow else None

    def check(self):
        """Between the parts of the final evaluations: stop when asked to; the training is saved."""
        if reason := self.training.ranks.agree(self.stop(), False)[0]:
            raise Stopped(f"{self.training.run}: {reason} in the final evaluations; the training is saved")

    def save(self):
        """Write this process's file of a checkpoint; the first one's comes last: with it, all of a step are there."""
        training, ranks, began = self.training, self.training.ranks, self.clock()
        training.cpu_seconds = self.cpu_seconds()
        state = {"format": FORMAT, "protocol": PROTOCOL, "config": json.dumps(training.run.config)}
        state |= {"data_sha256": training.material.checksum, "optimizer": training.optimizer.state_dict()}
        state["nets"] = [net.state_dict() for net in training.nets.values()]
        state |= {name: getattr(training, name) for name in OF_TRAINING}
        self.folder.mkdir(parents=True, exist_ok=True)
        path, content = self.file_of(training.step), checkpoint_bytes(state)
        if ranks.rank:
            write_atomically(path, content)
        ranks.barrier()
        if not ranks.rank:
            write_atomically(path, content, None if ranks.parallel else self.folder / CHECKPOINTS[1])
        ranks.barrier()
        for old in set(self.folder.glob(f"checkpoint.{ranks.rank}-*.pt")) - {path}:
            old.unlink()
        self.saved = self.clock()
        self.saving = self.saved - began

    def file_of(self, step):
        rank = self.training.ranks.rank
        return self.folder / (f"checkpoint.{rank}-{step}.pt" if rank else CHECKPOINTS[0])

    def resume(self):
        """Go back to the last whole checkpoint: the first process finds it, the others read their files of its step."""
        training, ranks = self.training, self.training.ranks
        for path in [] if ranks.rank else filter(Path.exists, [self.folder / name for name in CHECKPOINTS]):
            try:
                state = read_checkpoint(path, training.device)
            except CorruptFile as error:
                training.report(text=f"{quarantine(error, path.name)}; the run resumes from what is before it")
                continue
            if state.get("format") == FORMAT:
                self.restore(path, state)
            else:
                training.report(text=f"{path} is of another version of silalib: the run starts anew")
            break
        step = ranks.gather(training.step)[0]
        if step and ranks.rank:
            self.restore(self.file_of(step), read_checkpoint(self.file_of(step), training.device))

    def restore(self, path, state):
        """Raises UserError for a checkpoint of another run, other data, another device or other processes."""
        training, run, last, held = self.training, self.training.run, state["parts"][-1], len(state["nets"])
        kind, config, checksum = device_kind(last), json.loads(state["config"]), training.material.checksum
        anew, same = "delete it to start anew", "go on like that, or"
        count = f"torchrun --nproc-per-node {len(run.nets)}" if held == 1 else "one process"  # which holds all networks
        for other, what in [
            (state["protocol"] != PROTOCOL or config != run.config, f"is of another configuration: {anew}"),
            (state["data_sha256"] != checksum, f"was trained on other data than {run.dataset} is here: {anew}"),
            (kind != training.device.type, f"was written with --device {kind}: {same} set SILALIB_RESULTS elsewhere"),
            (held != len(training.nets), f"was written by {count}: {same} {anew}"),
        ]:
            if other:
                raise UserError(f"{path} {what}")
        try:
            for net, weights in zip(training.nets.values(), state["nets"]):
                net.load_state_dict(weights)
            own = training.optimizer.state_dict()["param_groups"]  # whose learning rate is of this device's kind
            training.optimizer.load_state_dict({**state["optimizer"], "param_groups": own})
        except (RuntimeError, ValueError, KeyError):
            raise UserError(f"{path} is of another version of its networks: {anew}") from None
        for name in OF_TRAINING:
            setattr(training, name, state[name])
        training.dtypes = [precision(net, training.device, "bfloat16" in last["precision"]) for net in run.nets]
        training.report(resumed=True)


def checkpoint_bytes(state):  # what torch.save makes of it, then 32 bytes of its sha256
    torch.save(state, buffer := io.BytesIO())
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
