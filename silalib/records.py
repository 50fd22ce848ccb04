"""A finished run's record: what it holds, where it is, in which state, and how its networks are loaded.

Records are made to be shared: what lies in a run's folder may be a stranger's, and is used once `validate` has seen it.
"""

import json
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from . import files
from .data import dataset, known_checksum
from .data.augment import Normalise
from .errors import CorruptFile, Stopped, UserError, printable
from .experiments import PROFILES
from .files import fits, is_number, is_text, read_bytes, results_folder, sha256, to_json, unwritable, write_atomically
from .models import EXITS
from .run import PROTOCOL, Run
from .training.checkpoint import CHECKPOINTS, read_checkpoint

AGAIN = "python -m silalib train, or ensure(), renames it and trains the run again"
HALF = "net1_half.safetensors"  # Net1 in half precision: what git keeps of the weights of a few runs


@dataclass(frozen=True)
class Record:
    """What a finished run left on disk; files are verified when they are read.
    result: final metrics per head (a list, with the curvature if it was measured), provenance. history: data frame
    with a row per epoch and head; noise, budgeted: data frames. test, features: arrays by name, one entry per head with
    suffix _0, _1 ..; test has labels, confidence and predicted class of held-out images too (calibration_*).
    Reading a part that was not measured, was not kept, is missing or is damaged raises UserError."""

    run: Run
    path: Path
    result: dict

    heads = property(lambda self: self.result["heads"])
    history = cached_property(lambda self: files.from_csv(self.read("history.csv")))
    noise = cached_property(lambda self: files.from_csv(self.read("noise.csv")))
    budgeted = cached_property(lambda self: files.from_csv(self.read("budgeted.csv")))
    test = cached_property(lambda self: files.from_npz(self.read("test.npz")))
    features = cached_property(lambda self: files.from_npz(self.read("features.npz")))

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
        """Whether a file must be here, or is: weights and test.npz, which are large, may be absent."""
        optional = ("weights.safetensors", "test.npz", *["features.npz"] * (files.EVIDENCE in self.path.parents))
        return name not in optional or (self.path / name).exists()


_amount, _percent = partial(is_number, least=0), partial(is_number, least=0, most=100)
_count, _ratio = (lambda value: type(value) is int and value > 0), (lambda value: type(value) is float)
_plain = lambda value: value is None or type(value) is bool or is_text(value) or is_number(value)
_precision = re.compile(r"(bfloat16|float32)(\+(bfloat16|float32))*").fullmatch
ORIGIN = {"silalib": {"code": is_text, "commit?": is_text}, "device": is_text, "torch": is_text, "python": is_text}
ORIGIN |= {"kind?": lambda value: value in ("cpu", "cuda"), "precision": _precision, ...: _plain}
PROVENANCE = ORIGIN | {"seconds": _amount, "seconds_final": _amount, "cpu_seconds?": _amount, "parts?": [ORIGIN]}
PROVENANCE |= {"data_sha256": is_text, "train_images": _count, "finished": datetime.fromisoformat}
HEAD = {"network": is_text, "nll": _amount, "parameters": _count, "macs": _count, "temperature?": [is_number]}
HEAD |= {"test_concentration?": _ratio, "train_concentration?": _ratio}  # nothing, where the features are one point
HEAD |= {"curvature?": {"absolute_residual?": _ratio, "filter_residual?": _ratio, ...: is_number}}  # or the loss flat
HEAD |= {"top1": _percent, "top2": _percent, "top5": _percent, "best": _percent, ...: is_number}
FILES = ("history.csv", "test.npz", "run.json?", "noise.csv?", "budgeted.csv?", "features.npz?", "weights.safetensors?")
RESULT = {"heads": [HEAD], "ensemble?": {...: is_number}, "provenance": PROVENANCE}
RESULT |= {"files": dict.fromkeys(FILES, re.compile("[0-9a-f]{64}").fullmatch)}
"""The form of result.json, see `fits`: what it names are all files that a record may have."""
HISTORY = ["epoch", "head", "lr", "train_nll", "z_y", "alpha", "gap", "equation5", "gradient", "test_nll", "test_top1"]


def validate(record):
    """Raise CorruptFile unless every file has the form that training writes: names, types, lengths, finite numbers."""
    for name in ("result.json", *filter(record.has, record.result["files"])):
        try:
            whole = _is_whole(record, name)
        except UserError:
            raise
        except Exception:  # whatever a stranger's file brings about
            whole = False
        if not whole:
            raise CorruptFile(record.path / name, AGAIN)


def _is_whole(record, name):
    run, heads, drawn = record.run, range(record.run.n_heads), set(record.run.nets) == {"convnet12"}  # in Figure 6
    each = lambda names, *shape: {f"{name}_{k}": shape for name in names.split() for k in heads}
    if name == "result.json":
        budgeted = run.holdout and run.nets[0] in EXITS
        needed = {"noise.csv": run.noise_images, "budgeted.csv": budgeted, "features.npz": drawn}
        named = [head["network"] for head in record.heads if "test_concentration" in head or not drawn]
        here = {name for name in needed if needed[name]} <= record.result["files"].keys()
        return here and named == [run.nets[run.slot(head)] for head in heads]
    if name == "history.csv":
        return _is_table(record.history, HISTORY, list(product(range(1, run.epochs + 1), heads)))
    if name == "noise.csv":
        draws = range(run.noise_sigmas * run.noise_draws + 1)
        rows = [(head, kind) for head, kind, _ in product(heads, ("absolute", "filter"), draws)]
        return _is_table(record.noise, ["head", "kind", "sigma", "draw", "nll", "top1"], rows)
    if name == "budgeted.csv":
        return _is_table(record.budgeted, ["q", "macs", "top1", *each("threshold share")])
    if name == "test.npz":
        n, held = len(record.test["labels"]), run.holdout
        shapes = {"labels": (n,)} | each("log_probability confidence predicted top5 s", n)
        if held:
            shapes |= {"calibration_labels": (held,)} | each("calibration_confidence calibration_predicted", held)
        more = {"ensemble_predicted": (n,), "ensemble_confidence": (n,)} | each("offset", n)
        return n > 0 and _have_shapes(record.test, shapes, more)
    if name == "features.npz":
        classes, width = dataset(run.dataset).classes, 2 if drawn else record.features["weight_0"].shape[1]
        shapes = each("weight", classes, width) | each("bias", classes)
        for split in ("test", "train"):
            n = len(record.features[f"{split}_labels"])
            shapes |= {f"{split}_labels": (n,)} | each(split, n, width)
        return _have_shapes(record.features, shapes)
    return True  # run.json is read before, the weights by `load_network`


def _is_table(table, columns, rows=None):
    """Whether a table has these columns, the first two with these values, and no more than finite numbers in it."""
    values = table.drop(columns=["kind", "gap"], errors="ignore").to_numpy(float)  # there is no gap without a peer
    finite = np.isfinite(values).all() if rows else not np.isnan(values).any()  # a threshold may be infinite
    same = rows is None or list(zip(*(table[name] for name in columns[:2]))) == rows
    return len(table) > 0 and set(columns) <= set(table) and finite and same


def _have_shapes(arrays, needed, more=()):
    found = {name: array.shape for name, array in arrays.items() if array.dtype.kind in "biuf"}
    return len(found) == len(arrays) and needed.items() <= found.items() <= (needed | dict(more)).items()


def write_record(run, folder, result, contents):
    """Write a finished run: its files first, result.json with their checksums last, which marks it as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {**contents, "run.json": to_json({"protocol": PROTOCOL, "config": run.config})}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    sums = {name: sha256(content) for name, content in contents.items()}
    files.write_sealed(folder / "result.json", {**result, "files": sums})
    try:
        record = load(run, folder)
    except CorruptFile as error:  # numbers that are not finite, say: its checkpoint stays
        (folder / "result.json").unlink()
        raise UserError(f"{run}: what was measured is no record, see {error.path}") from None
    remove_leftovers(folder)
    return record


def begun(folder):
    """How the run in a folder began, if anything tells: (when its record was finished, or ""; `provenance.here`)."""
    with suppress(UserError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(read_bytes(folder / "result.json", AGAIN))["provenance"]
        if fits(found, PROVENANCE):
            return found["finished"], found.get("parts", [found])[0]
    for name in CHECKPOINTS:
        with suppress(UserError, KeyError, IndexError, TypeError):
            part = read_checkpoint(folder / name, "cpu")["parts"][0]
            if fits(part, ORIGIN):
                return "", part
    return None


def remove_leftovers(folder):
    for leftover in (*folder.glob("checkpoint*.pt"), folder / "failed.json"):
        leftover.unlink(missing_ok=True)


def folders(run, profile=None):
    """Where a run may have left something: its folders in the profiles, in this one first. A link is none of them."""
    names = sorted(PROFILES, key=lambda name: name != profile)
    found = [root / "runs" / run.key for name in names for root in (results_folder(name), files.EVIDENCE / name)]
    return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]


def find(run, profile=None):
    """The folder of the run's record, finished in whichever profile, or None. Of several, the first whole one."""
    finished = [folder for folder in folders(run, profile) if (folder / "result.json").exists()]
    whole = (folder for folder in finished if len(finished) == 1 or not damage(run, folder))
    return next(whole, finished[0] if finished else None)


def load(run, folder=None, profile=None):
    """The Record of a finished run, from any profile, this one first, or from a `folder`.
    Raises UserError where it is missing, or of another protocol or other data, CorruptFile where a file is not what was
    written, or not what training writes; weights are read and verified by `load_network`."""
    if (folder := folder or find(run, profile)) is None:
        raise UserError(f"no record of {run.key}: train it with ensure([run]), or python -m silalib train")
    path = folder / "result.json"
    try:
        result = files.read_sealed(path, AGAIN, required=False)
        if not fits(result, RESULT):
            raise CorruptFile(path, AGAIN)
        if sealed := "run.json" in result["files"]:  # else from before it had a checksum
            files.read_sealed(path, AGAIN)
        record, path = Record(run, folder, result), folder / "run.json"
        identity = json.loads(record.read("run.json") if sealed else read_bytes(path, AGAIN))
        config, protocol = identity["config"], identity["protocol"]
        changed = [k for k, v in run.config.items() if config.get(k, v) != v]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptFile(path, AGAIN) from None
    known = known_checksum(run.dataset)
    for wrong, how in [
        (protocol != PROTOCOL, f"under protocol {protocol}, this is {PROTOCOL}"),
        (changed, f"with another {', '.join(changed)} (a default changed)"),
        (known and known != result["provenance"]["data_sha256"], f"on other data than {run.dataset} is here"),
    ]:
        if wrong:
            raise UserError(f"{folder} was trained {how}: move it away")
    validate(record)
    return record


def damage(run, folder=None, profile=None):
    """What is wrong with a run's record, weights included where they are kept: an error, or None. Reads all of it."""
    try:
        if folder := folder or find(run, profile):
            record = load(run, folder)
            if record.has("weights.safetensors"):
                record.read("weights.safetensors")
    except UserError as error:
        return error
    return None


def state(run, profile=None):
    """Where a run stands: "done", "damaged", "running", "failed", "started" (a checkpoint is there) or "pending"."""
    if find(run):
        return "damaged" if damage(run, profile=profile) else "done"
    try:
        for folder in folders(run):
            with lock(folder):
                pass
    except UserError as error:  # a results folder that cannot be written has no process training in it
        if isinstance(error, Stopped):
            return "running"
    if failure(run):
        return "failed"
    return "started" if any((folder / name).exists() for folder in folders(run) for name in CHECKPOINTS) else "pending"


def failure(run, profile=None):
    """Why a run has failed: what `write_failure` wrote, "error" in one line; or None."""
    for path in filter(Path.exists, [folder / "failed.json" for folder in folders(run, profile)]):
        with suppress(UserError, ValueError, RecursionError):
            found = json.loads(read_bytes(path, AGAIN))
            if isinstance(found, dict) and isinstance(found.get("error"), str):
                if not all(is_number(found.get(name)) for name in ("epoch", "step", "lr")):
                    found.pop("lr", None)  # without which no place is told
                return found | {"error": printable(found["error"])[:1000]}
        return {"error": f"{path} is damaged, so the reason is not known"}
    return None


def write_failure(folder, error, **details):
    write_atomically(folder / "failed.json", to_json({"error": printable(error), **details}))


@contextmanager
def lock(folder, wait=lambda: False, message=lambda text: None):
    """Hold a run's folder. While another process does, wait() is asked twice a second whether to go on; if not, raises
    Stopped. The operating system releases a dead process's lock."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link: put the folder itself there")
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
    except (OSError, NotImplementedError) as error:  # the latter by older versions of filelock
        raise unwritable(folder, error) from None
    try:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def load_network(run, head=0):
    """The trained network `head` of a finished run, in evaluation mode, on the CPU: a Sequential of the normalisation
    and the bare network, from uint8 images (B, C, H, W), or floats from 0 to 1, to logits (B, N), or a tuple of those
    of every exit. Net1 is in half precision where git has kept it alone. Raises UserError without weights."""
    record = load(run)
    if not 0 <= head < len(run.nets):
        known = f"heads 0 to {len(run.nets) - 1}" if len(run.nets) > 1 else "one network: leave head at 0"
        raise UserError(f"head {head}: this run has {known}")
    kept = head == 0 and not record.has("weights.safetensors") and (record.path / HALF).exists()
    path, network = record.path / (HALF if kept else "weights.safetensors"), run.network(head)
    content = read_bytes(path, AGAIN) if kept else record.read("weights.safetensors")
    try:
        if kept and path.with_suffix(".sha256").read_text().split()[0] != sha256(content):
            raise CorruptFile(path, AGAIN)
        tensors = {name: tensor.float() for name, tensor in load_tensors(content).items()}
        own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{head}.")}
        network.load_state_dict(own)
        return torch.nn.Sequential(Normalise(tensors["mean"], tensors["std"]), network).eval()
    except (SafetensorError, RuntimeError, LookupError, OSError, ValueError):
        raise CorruptFile(path, AGAIN) from None
