"""A run is its configuration; its record on disk is the evidence.

`Run` holds everything that changes a result. `ensure(runs)` loads the records of finished runs, resumes unfinished
ones and trains missing ones; `load(run)` reads one record; `load_network(run, head)` gives back a trained network.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np

from .augment import AUGMENTATIONS
from .data import dataset, known_checksum
from .errors import Damaged, NoRoom, Stopped, UserError
from .losses import LABELS, METHODS
from .models import EXITS, MODELS, SMALLEST_IMAGE, STEMS
from .paths import results_folder

PROTOCOL = 1
"""Raised when training changes its meaning: records of another protocol are refused."""

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")
"""The last checkpoint of a run, and the one before it, from which the run goes on where the last one is damaged."""

AGAIN = "python -m silalib train, or ensure(), sets it aside and trains the run again"

MAX_WIDTH = 100
"""No network as wide as this fits into a machine."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

PAPER_MILESTONES = (30, 55, 80, 105, 135, 160, 180, 200, 220, 240)


@dataclass(frozen=True)
class Run:
    """One training: C networks (or one network with C exits) on one data set with one method and seed.

    The defaults are the paper's protocol for Tables 1 and 2, completed by our decisions where it is silent.
    """

    dataset: str = "cifar100"
    nets: tuple = ("resnet18", "resnet18")
    method: str = "sila"
    seed: int = 0
    width: float = 1.0  # of every network
    stem: str = "cifar"  # or "imagenet": the first layers of every network
    betas: tuple | None = None  # one weight per head, None for 1 each
    coupling: float = 1.0  # SiLa's coupling beside the independent terms
    epochs: int = 260
    batch_size: int = 128  # the last incomplete batch of an epoch is dropped
    lr: float = 0.1
    milestones: tuple = PAPER_MILESTONES  # in epochs, whole or not
    gamma: float = 0.5  # factor on the learning rate at each milestone
    warmup: float = 1.0  # epochs of linear warm-up
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    augment: str = "crop+flip"
    train_size: int | None = None  # a fixed, class-balanced subset
    holdout: int = 0  # training images kept out, for calibration
    noise_images: int = 0  # training images under parameter noise at the end (Figure 7b); 0 leaves it out
    noise_sigmas: int = 10
    noise_draws: int = 10
    hessian_images: int = 0  # training images for the largest Hessian eigenvalue at the end; 0 leaves it out
    blocks: int | None = None  # of an MSDNet: its own network of so many blocks; None for all
    init: str = "he"  # initial weights: those of each network's family, or "pytorch": PyTorch's own of every layer

    def __post_init__(self):
        nets = (self.nets,) if isinstance(self.nets, str) else self.nets
        plain = {}
        lists = {"nets": (nets, str), "milestones": (self.milestones, float), "betas": (self.betas, float)}
        numbers = {int: index, int | None: index, float: float, str: str}
        for field in fields(self):  # equal numbers of another type are the same run
            try:
                if field.name in lists:
                    values, convert = lists[field.name]
                    plain[field.name] = (
                        None if field.name == "betas" and values is None else tuple(map(convert, values))
                    )
                elif field.type in numbers and getattr(self, field.name) is not None:
                    plain[field.name] = numbers[field.type](getattr(self, field.name))
            except (TypeError, ValueError):
                kind = "a list" if field.name in lists else "a number" if field.type is float else "a whole number"
                raise UserError(f"{field.name} must be {kind}, not {getattr(self, field.name)!r}") from None
        plain["method"] = plain["method"].lower()
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._validate()

    def _validate(self):
        for name, value, known in [
            ("method", self.method, METHODS),
            ("augmentation", self.augment, AUGMENTATIONS),
            ("init", self.init, ("he", "pytorch")),
            *[("network", net, MODELS) for net in self.nets],
        ]:
            if value not in known:
                raise UserError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
        height, width = dataset(self.dataset).image[1:]
        if not isinstance(self.nesterov, bool):
            raise UserError(f"nesterov must be True or False, not {self.nesterov!r}")
        if not self.nets:
            raise UserError("a run needs at least one network")
        self._validate_exits()
        if "dml" in self.method and self.n_heads < 2:
            raise UserError(f"{LABELS[self.method]} needs at least two networks or exits")
        if self.betas is not None and len(self.betas) != self.n_heads:
            kind = "exits" if self.nets[0] in EXITS else "networks"
            raise UserError(f"{len(self.betas)} betas for {self.n_heads} {kind}: give one each")
        if self.coupling != 1 and "sila" not in self.method:
            raise UserError(f"coupling belongs to SiLa; {LABELS[self.method]} has none")
        numbers = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), (int, float))
        }
        numbers |= {f"milestone {i + 1}": m for i, m in enumerate(self.milestones)}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value}")
            if name in ("width", "epochs", "batch_size", "lr", "gamma") and value <= 0:
                raise UserError(f"{name} must be above 0, not {value}")
            if value < 0:
                raise UserError(f"{name} must not be negative, but is {value}")
        if self.width > MAX_WIDTH:
            raise UserError(f"width must be at most {MAX_WIDTH}, not {self.width}")
        if self.momentum >= 1:
            raise UserError(f"momentum must be below 1, not {self.momentum}")
        if self.betas is not None and not all(math.isfinite(b) and b >= 0 for b in self.betas):
            raise UserError(f"betas {self.betas}: give finite weights that are not negative")
        if self.noise_images and not (self.noise_sigmas > 0 and self.noise_draws > 0):
            raise UserError("noise_sigmas and noise_draws must be above 0 where noise_images is")
        for net in self.nets:
            least = SMALLEST_IMAGE.get(net, 1)
            if min(height, width) < least:
                raise UserError(f"{net} needs images of {least}x{least} or more; {self.dataset} has {height}x{width}")
            if self.stem not in (stems := STEMS.get(net, ("cifar",))):
                raise UserError(f"{net} has no stem {self.stem!r}: choose from {', '.join(stems)}")
        if self.train_size is not None and self.train_size < self.batch_size:
            raise UserError(f"train_size {self.train_size} is below the batch size {self.batch_size}")

    def _validate_exits(self):
        if not set(self.nets) & set(EXITS):
            if self.blocks is not None:
                raise UserError(f"blocks belongs to MSDNet; {self.nets[0]} has none")
            return
        net = self.nets[0]
        if len(self.nets) > 1:
            raise UserError(f"{'+'.join(self.nets)}: the exits of an MSDNet are its heads, so it is trained alone")
        if self.blocks is not None and not 1 <= self.blocks <= EXITS[net]:
            raise UserError(f"blocks must be from 1 to {EXITS[net]} for {net}, not {self.blocks}")
        if self.noise_images or self.hessian_images:
            raise UserError(f"noise_images and hessian_images are for networks with one head; {net} has {self.n_heads}")

    @property
    def n_heads(self):
        """How many heads a loss sees: the networks, or the exits of one network."""
        return self.blocks or EXITS.get(self.nets[0], len(self.nets))

    def slot(self, head):
        """The slot of the network that a head belongs to; all exits of an MSDNet belong to slot 0."""
        return min(head, len(self.nets) - 1)

    def network(self, slot):
        """A new network of one slot, with initial weights from torch's generator."""
        spec = dataset(self.dataset)
        of_exits = {"blocks": self.blocks} if self.nets[slot] in EXITS else {}
        network = MODELS[self.nets[slot]](spec.classes, spec.image[0], self.width, self.stem, **of_exits)
        if self.init == "pytorch":
            for layer in network.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        return network

    @property
    def config(self):
        """The full configuration as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self):
        """A readable prefix and a hash of the fields that are not at their default: a new field keeps old keys."""
        defaults = {f.name: f.default for f in fields(self)}
        changed = {k: v for k, v in asdict(self).items() if v != defaults[k]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.dataset}-{'+'.join(self.nets)}-{self.method}-s{self.seed}-{digest}"

    def __str__(self):
        blocks = f" with {self.blocks} blocks" if self.blocks else ""
        return f"{self.dataset} {'+'.join(self.nets)}{blocks} {LABELS.get(self.method, self.method)} seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """What a finished run left on disk; files are verified when they are read.

    result: final metrics per head (a list, with the curvature if it was measured), provenance. history: data frame
    with a row per epoch and head.
    test, features: arrays by name, one entry per head with suffix _0, _1 ..; noise, budgeted: data frames. With images
    held out, test has their labels, confidence and predicted class too (calibration_*). Reading a part that
    was not measured, was not kept, is missing or is damaged raises UserError.
    """

    run: Run
    path: Path
    result: dict

    @property
    def heads(self):
        return self.result["heads"]

    @cached_property
    def history(self):
        return self._table("history.csv")

    @cached_property
    def noise(self):
        return self._table("noise.csv")

    @cached_property
    def budgeted(self):
        return self._table("budgeted.csv")

    @cached_property
    def test(self):
        return self._arrays("test.npz")

    @cached_property
    def features(self):
        return self._arrays("features.npz")

    def read(self, name):
        """The bytes of one of the record's files, checked against result.json."""
        expected = self.result["files"].get(name)
        if expected is None:
            older = "or is older than it: then delete the folder and train the run again"
            raise UserError(f"the record {self.path} has no {name}: the run was not asked for it, {older}")
        if not self.keeps(name):
            raise UserError(f"{name} of {self.run.key} was not kept: delete {self.path} and train the run again")
        content = read_bytes(self.path / name)
        if sha256(content) != expected:
            raise Damaged(self.path / name, AGAIN)
        return content

    def keeps(self, name):
        """False for a file that is not here and need not be: weights, and what the networks make of each test image but
        where that is shown, which is for runs that are measured under noise."""
        spared = ("weights.safetensors", "test.npz") if not self.run.noise_images else ("weights.safetensors",)
        return name not in spared or (self.path / name).exists()

    def _table(self, name):
        import pandas as pd

        return pd.read_csv(io.BytesIO(self.read(name)))

    def _arrays(self, name):
        with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def read_bytes(path, what=AGAIN):
    """A file's bytes. Raises Damaged where it is missing or the disk cannot read it, and says what to do."""
    try:
        return path.read_bytes()
    except PermissionError:
        raise UserError(f"cannot read {path}: permission denied") from None
    except OSError:
        raise Damaged(path, what) from None


def write_atomically(path, content, previous=None):
    """Write bytes under a temporary name, flush them to disk, rename: the file is whole or not there.

    previous: what to rename a file to that is there already. Raises NoRoom on a disk that is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it a power cut can undo the renaming
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise NoRoom(
                f"cannot write {path} ({error.strerror}): make room and start again to go on; what was there is kept"
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_sealed(path, value):
    """Write JSON, and before it its checksum to <name>.sha256, in the form that `sha256sum -c` reads."""
    content = to_json(value)
    write_atomically(path.with_suffix(".sha256"), f"{sha256(content)}  {path.name}\n".encode())
    write_atomically(path, content)


def read_sealed(path, what=AGAIN, required=True):
    """The value that `write_sealed` wrote. Raises Damaged for a file that is not what its checksum says.

    required: whether the checksum must be there. It may cover run.json in the same folder too.
    """
    content, seal = read_bytes(path, what), path.with_suffix(".sha256")
    if required or seal.exists():
        written = read_bytes(seal, what)
        names = [name for name in ("run.json", path.name) if f"  {name}\n".encode() in written]
        expected = [f"{sha256(read_bytes(path.with_name(name), what))}  {name}\n" for name in names]
        if path.name not in names or "".join(expected).encode() != written:
            raise Damaged(path if path.name in names else seal, what)
    try:
        return json.loads(content)
    except ValueError:
        raise Damaged(path, what) from None


def to_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def to_csv(rows):
    """A list of dicts as CSV; columns of all rows, numbers in full precision."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_npz(arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def to_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_record(run, folder, result, files):
    """Write a finished run: its files first, result.json with their checksums last, which marks it as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {**files, "run.json": to_json({"protocol": PROTOCOL, "config": run.config})}
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_sealed(folder / "result.json", {**result, "files": {name: sha256(files[name]) for name in files}})
    remove_leftovers(folder)
    return load_folder(run, folder)


def device_kind(part):
    """ "cpu" or "cuda": where a part of a run was trained, by what `Training.here` said; older records do not name it,
    but a processor's name ends with what it can do in parentheses."""
    return part.get("kind") or ("cpu" if part["device"].endswith(")") else "cuda")


def begun(folder):
    """How the run in a folder began: (when its record was finished, or "" for a checkpoint; what `Training.here` says).

    None where neither is there and whole. Nothing else in the folder is looked at.
    """
    try:
        provenance = json.loads((folder / "result.json").read_bytes())["provenance"]
        return provenance["finished"], provenance.get("parts", [provenance])[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass
    from .trainer import read_checkpoint

    for path in [path for name in CHECKPOINTS if (path := folder / name).exists()]:
        try:
            return "", read_checkpoint(path, "cpu")["parts"][0]
        except (UserError, KeyError, IndexError):
            continue
    return None


def remove_leftovers(folder, but=()):
    """Remove all checkpoints of a run and why it failed, but for files of these names."""
    for leftover in (*folder.glob("checkpoint*.pt"), folder / "failed.json"):
        if leftover.name not in but:
            leftover.unlink(missing_ok=True)


def find(run):
    """The folder of the run's record, finished in whichever profile, or None."""
    for result in sorted(results_folder("*").parent.glob(f"*/runs/{run.key}/result.json")):
        return result.parent
    return None


def load(run):
    """The Record of a finished run.

    Raises UserError where it is missing, or of another protocol or other data, and Damaged where a file is not what
    was written; weights are read and verified by `load_network`.
    """
    folder = find(run)
    if folder is None:
        raise UserError(f"no record of {run.key}: train it with ensure([run]), or python -m silalib train")
    return load_folder(run, folder)


def load_folder(run, folder):
    path = folder / "result.json"
    try:
        result = read_sealed(path, required=False)
        if "run.json" in result["files"]:  # records from before there were checksums of these two do not have it
            read_sealed(path)
        result["heads"], result["provenance"]
        record = Record(run, folder, result)
        for name in result["files"]:
            if name != "weights.safetensors" and record.keeps(name):
                record.read(name)
        path = folder / "run.json"
        identity = json.loads(read_bytes(path))
        config, protocol = identity["config"], identity["protocol"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(path, AGAIN) from None
    if protocol != PROTOCOL:
        raise UserError(f"{folder} was trained under protocol {protocol}, this is {PROTOCOL}: move it away")
    changed = [k for k, v in run.config.items() if k in config and config[k] != v]
    if changed:
        raise UserError(f"{folder} was trained with another {', '.join(changed)}: a default changed; move it away")
    known = known_checksum(run.dataset)
    if known and known != result["provenance"].get("data_sha256"):
        raise UserError(f"{folder} was trained on other data than {run.dataset} is here: move it away")
    return record


def damage(run):
    """What is wrong with a run's record, weights included where they are kept: an error, or None. Reads all of it."""
    if find(run) is None:
        return None
    try:
        record = load(run)
        if record.keeps("weights.safetensors"):
            record.read("weights.safetensors")
    except UserError as error:
        return error
    return None


def set_aside(damaged, mark="result.json"):
    """Rename the file that a Damaged error names to *.corrupt, and beside it the one that marks all as finished.

    Returns what was done, in words.
    """
    path = damaged.path
    what = f"was damaged and is now {path.name}.corrupt" if path.exists() else "was missing"
    try:
        for name in (mark, path.name):
            old = path.with_name(name)
            if old.exists():
                old.replace(f"{old}.corrupt")
    except OSError as error:
        raise UserError(f"cannot set {path} aside ({error.strerror}): it is damaged; delete it yourself") from None
    return f"{path} {what}"


def folders(run):
    """Where a run may have left something, in whichever profile."""
    return list(results_folder("*").parent.glob(f"*/runs/{run.key}"))


def state(run):
    """Where a run stands: "done", "damaged", "running", "failed", "started" (a checkpoint is there) or "pending"."""
    if find(run) is not None:
        return "damaged" if damage(run) else "done"
    if any(_is_locked(folder) for folder in folders(run)):
        return "running"
    for names, label in [(("failed.json",), "failed"), (CHECKPOINTS, "started")]:
        if any((folder / name).exists() for folder in folders(run) for name in names):
            return label
    return "pending"


def failure(run):
    """Why a run has failed: what `write_failure` wrote, or None."""
    for path in [folder / "failed.json" for folder in folders(run) if (folder / "failed.json").exists()]:
        try:
            return {"error": str(json.loads(path.read_bytes())["error"])} | json.loads(path.read_bytes())
        except (OSError, ValueError, KeyError, TypeError):
            return {"error": f"{path} is damaged, so the reason is not known"}
    return None


def write_failure(folder, error, **details):
    write_atomically(folder / "failed.json", to_json({"error": str(error), **details}))


def _is_locked(folder):
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a results folder that cannot be written has no process training in it
        return False


@contextmanager
def lock(folder, wait, message=lambda text: None):
    """Hold a run's folder for this process; the operating system lets go of a dead process's lock.

    wait() is asked every half second whether to go on waiting for another process.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock")
        told = False
        while True:
            try:
                held.acquire(timeout=0.5 if told else 0)
                break
            except Timeout:
                if not told:
                    message("another process is training this run: waiting for it")
                told = True
                if not wait():
                    raise Stopped("stopped while waiting for another process") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}): set SILALIB_RESULTS to a folder of yours") from None
    try:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield
    finally:
        held.release()


def ensure(
    runs,
    profile="quick",
    device="auto",
    workers=None,
    train=True,
    budget=None,
    only_whole=False,
    retry=False,
    backend="local",
    ray_address=None,
    gpus_per_run=None,
    graphs=True,
):
    """Records of the runs, as a dict in their order: finished ones are loaded, unfinished resumed, missing trained.

    A run with a damaged record is trained again; the damaged file becomes *.corrupt.
    profile: the folder under results/ for new records. device: "auto", "cpu", "cuda" or "cuda:1".
    workers: runs trained at once, by default one per CPU core on a CPU (one thread each) and one on each GPU; more
    share the GPUs in turn.
    train: False only loads; a run without a record, or with a damaged one, is then left out of the dict.
    budget: seconds after which training stops cleanly; only_whole gives a run up, with a checkpoint, as soon as its
    measured speed says that its training would not end in them.
    retry: train runs again that failed before.
    backend: "local", or "ray" to submit the runs to a Ray cluster, at ray_address or as `cluster.Ray` finds it;
    gpus_per_run: of its GPUs for each run, 1 by default; a fraction such as 0.5 shares one. workers is then how many
    runs are under way at once, by default as many as fit.
    graphs: whether a GPU may replay steps as CUDA graphs; a run whose graph cannot be captured is done without.
    Raises MissingData, Stopped (work is left, checkpointed), or UserError when a run failed; nothing finished is lost.
    """
    from . import cluster, launch, trainer
    from .experiments import check_profile

    check_profile(profile)
    runs = [None] if isinstance(runs, Run) else list(dict.fromkeys(runs))
    if not all(isinstance(run, Run) for run in runs):
        raise UserError("ensure() takes a list of runs: ensure([run])")
    if train:
        if backend not in ("local", "ray"):
            raise UserError(f"unknown backend {backend!r}: use local or ray")
        if backend == "local" and (ray_address is not None or gpus_per_run is not None):
            raise UserError("ray_address and gpus_per_run belong to the backend ray")
        if gpus_per_run is not None and not (isinstance(gpus_per_run, (int, float)) and gpus_per_run >= 0):
            raise UserError(f"gpus_per_run must be a number from 0, or None, not {gpus_per_run!r}")
        ray = cluster.Ray(ray_address, gpus_per_run) if backend == "ray" else None
        if ray:
            cluster.installed()
        else:
            trainer.pick_device(device)
        if workers is not None and not (isinstance(workers, int) and workers >= 1):
            raise UserError(f"workers must be a whole number from 1, or None, not {workers!r}")
        if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
            raise UserError(f"budget must be a number of seconds above 0, or None, not {budget!r}")
        pending = [run for run in runs if find(run) is None or isinstance(damage(run), Damaged)]
        if pending:
            launch.train_all(pending, profile, device, workers, budget, only_whole, retry, ray, graphs)
    records = {}
    for run in runs:
        if find(run) is not None:
            try:
                records[run] = load(run)
            except UserError as error:
                if train:
                    raise
                print(f"left out: {error}", file=sys.stderr)
    return records


def load_network(run, head=0):
    """The trained network `head` of a finished run, in evaluation mode, on the CPU.

    It takes uint8 images (B, C, H, W), or floats from 0 to 1, and gives logits (B, N), or a tuple with those of every
    exit; its second module is the bare network, its first the normalisation. Raises UserError where the weights were
    not kept.
    """
    import torch
    from safetensors.torch import load as load_tensors

    from .augment import Normalise

    record = load(run)
    if not 0 <= head < len(run.nets):
        known = f"heads 0 to {len(run.nets) - 1}" if len(run.nets) > 1 else "one network: leave head at 0"
        raise UserError(f"head {head}: this run has {known}")
    tensors = load_tensors(record.read("weights.safetensors"))
    network = run.network(head)
    prefix = f"{head}."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return torch.nn.Sequential(Normalise(tensors["mean"], tensors["std"]), network).eval()
