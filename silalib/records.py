"""A finished run's record: what it holds, where it is, in which state, and how its networks are loaded."""

import io
import json
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load as load_tensors

from .data import known_checksum
from .data.augment import Normalise
from .errors import CorruptFile, Stopped, UserError
from .files import read_bytes, read_sealed, results_folder, sha256, to_json, write_atomically, write_sealed
from .run import PROTOCOL, Run
from .training.checkpoint import CHECKPOINTS, read_checkpoint

AGAIN = "python -m silalib train, or ensure(), renames it and trains the run again"


@dataclass(frozen=True)
class Record:
    """What a finished run left on disk; files are verified when they are read.

    result: final metrics per head (a list, with the curvature if it was measured), provenance. history: data frame
    with a row per epoch and head; noise, budgeted: data frames. test, features: arrays by name, one entry per head with
    suffix _0, _1 ..; test has labels, confidence and predicted class of held-out images too (calibration_*).
    Reading a part that was not measured, was not kept, is missing or is damaged raises UserError.
    """

    run: Run
    path: Path
    result: dict

    heads = property(lambda self: self.result["heads"])
    history = cached_property(lambda self: self._table("history.csv"))
    noise = cached_property(lambda self: self._table("noise.csv"))
    budgeted = cached_property(lambda self: self._table("budgeted.csv"))
    test = cached_property(lambda self: self._arrays("test.npz"))
    features = cached_property(lambda self: self._arrays("features.npz"))

    def read(self, name):
        """The bytes of one of the record's files, checked against result.json."""
        expected = self.result["files"].get(name)
        if expected is None or not self.has(name):
            why = "was not kept" if expected else "is not there, as the run was not asked for it or is older than it"
            raise UserError(f"{name} of {self.run.key} {why}: delete {self.path} and train the run again")
        content = read_bytes(self.path / name, AGAIN)
        if sha256(content) != expected:
            raise CorruptFile(self.path / name, AGAIN)
        return content

    def has(self, name):
        """Whether a file must be here, or is: weights may be absent, and test.npz of runs not measured under noise."""
        optional = ("weights.safetensors", *([] if self.run.noise_images else ["test.npz"]))
        return name not in optional or (self.path / name).exists()

    def _table(self, name):
        return pd.read_csv(io.BytesIO(self.read(name)))

    def _arrays(self, name):
        with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}


def write_record(run, folder, result, files):
    """Write a finished run: its files first, result.json with their checksums last, which marks it as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {**files, "run.json": to_json({"protocol": PROTOCOL, "config": run.config})}
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_sealed(folder / "result.json", {**result, "files": {name: sha256(files[name]) for name in files}})
    remove_leftovers(folder)
    return load(run, folder)


def begun(folder):
    """How the run in a folder began, if anything tells: (when its record was finished, or ""; `provenance.here`)."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        provenance = json.loads((folder / "result.json").read_bytes())["provenance"]
        return provenance["finished"], provenance.get("parts", [provenance])[0]
    for name in CHECKPOINTS:
        with suppress(UserError, KeyError, IndexError):
            return "", read_checkpoint(folder / name, "cpu")["parts"][0]
    return None


def remove_leftovers(folder):
    """All checkpoints of a run, and why it failed."""
    for leftover in (*folder.glob("checkpoint*.pt"), folder / "failed.json"):
        leftover.unlink(missing_ok=True)


def find(run):
    """The folder of the run's record, finished in whichever profile, or None."""
    return next((folder for folder in folders(run) if (folder / "result.json").exists()), None)


def load(run, folder=None):
    """The Record of a finished run, from any profile or from a `folder`.

    Raises UserError where it is missing, or of another protocol or other data, CorruptFile where a file is not what was
    written; weights are read and verified by `load_network`.
    """
    if (folder := folder or find(run)) is None:
        raise UserError(f"no record of {run.key}: train it with ensure([run]), or python -m silalib train")
    path = folder / "result.json"
    try:
        result = read_sealed(path, AGAIN, required=False)
        read_sealed(path, AGAIN, required="run.json" in result["files"])  # not in records from before it had a checksum
        result["heads"], result["provenance"]
        record = Record(run, folder, result)
        for name in result["files"]:
            if name != "weights.safetensors" and record.has(name):
                record.read(name)
        path = folder / "run.json"
        identity = json.loads(read_bytes(path, AGAIN))
        config, protocol = identity["config"], identity["protocol"]
        changed = [k for k, v in run.config.items() if config.get(k, v) != v]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CorruptFile(path, AGAIN) from None
    known = known_checksum(run.dataset)
    for wrong, how in [
        (protocol != PROTOCOL, f"under protocol {protocol}, this is {PROTOCOL}"),
        (changed, f"with another {', '.join(changed)} (a default changed)"),
        (known and known != result["provenance"].get("data_sha256"), f"on other data than {run.dataset} is here"),
    ]:
        if wrong:
            raise UserError(f"{folder} was trained {how}: move it away")
    return record


def damage(run):
    """What is wrong with a run's record, weights included where they are kept: an error, or None. Reads all of it."""
    try:
        if find(run) and (record := load(run)).has("weights.safetensors"):
            record.read("weights.safetensors")
    except UserError as error:
        return error
    return None


def folders(run):
    """Where a run may have left something, in whichever profile."""
    return sorted(results_folder("*").parent.glob(f"*/runs/{run.key}"))


def state(run):
    """Where a run stands: "done", "damaged", "running", "failed", "started" (a checkpoint is there) or "pending"."""
    if find(run):
        return "damaged" if damage(run) else "done"
    try:
        for folder in folders(run):
            with lock(folder):
                pass
    except Stopped:
        return "running"
    except UserError:
        pass  # a results folder that cannot be written has no process training in it
    if failure(run):
        return "failed"
    return "started" if any((folder / name).exists() for folder in folders(run) for name in CHECKPOINTS) else "pending"


def failure(run):
    """Why a run has failed: what `write_failure` wrote, or None."""
    path = next((path for folder in folders(run) if (path := folder / "failed.json").exists()), None)
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes())
        return found | {"error": str(found["error"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"error": f"{path} is damaged, so the reason is not known"}


def write_failure(folder, error, **details):
    write_atomically(folder / "failed.json", to_json({"error": str(error), **details}))


@contextmanager
def lock(folder, wait=lambda: False, message=lambda text: None):
    """Hold a run's folder. While another process does, wait() is asked twice a second whether to go on; if not, raises
    Stopped. The operating system releases a dead process's lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held, seconds = FileLock(folder / ".lock"), 0
        while not held.is_locked:
            try:
                held.acquire(timeout=seconds)
            except Timeout:
                if not seconds:
                    message("another process is training this run: waiting for it")
                if not wait():
                    raise Stopped("stopped while waiting for another process") from None
                seconds = 0.5
    except OSError as error:
        how = f"({error.strerror or error}): set SILALIB_RESULTS to a folder of yours"
        raise UserError(f"cannot write to {folder} {how}") from None
    try:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def load_network(run, head=0):
    """The trained network `head` of a finished run, in evaluation mode, on the CPU.

    It takes uint8 images (B, C, H, W), or floats from 0 to 1, and gives logits (B, N), or a tuple with those of every
    exit; it is a Sequential of the normalisation and the bare network. Raises UserError where no weights were kept.
    """
    record = load(run)
    if not 0 <= head < len(run.nets):
        known = f"heads 0 to {len(run.nets) - 1}" if len(run.nets) > 1 else "one network: leave head at 0"
        raise UserError(f"head {head}: this run has {known}")
    tensors = load_tensors(record.read("weights.safetensors"))
    network = run.network(head)
    network.load_state_dict({k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{head}.")})
    return torch.nn.Sequential(Normalise(tensors["mean"], tensors["std"]), network).eval()
