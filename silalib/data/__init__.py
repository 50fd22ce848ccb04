"""The data sets. DATASETS: name -> DatasetSpec; `load(name)` gives its images, `splits(run, device)` what a run needs.

`digits` comes with scikit-learn; torchvision downloads MNIST and CIFAR once. ImageNet-100 and any other folder of
images are prepared once from the user's own files (`launch.prepare`), then read where they lie, memory-mapped."""

import hashlib
import importlib.util
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock

from ..errors import MissingData, UserError
from ..files import ROOT, unwritable
from . import prepared
from .batches import AT_ONCE, MemoryMapped, in_batches


@dataclass(frozen=True)
class DatasetSpec:
    """Static metadata of a data set, whose image has the shape (C, H, W).
    folder: where its files lie below the data folder, None if embedded; then read() gives the tensors of `Images`.
    sha256: of the decoded pixels and labels, None if not fixed. prepared: from the user's own files, see `prepared`."""

    title: str
    classes: int
    image: tuple
    train: int
    test: int
    folder: str | None = None
    sha256: str | None = None
    prepared: bool = False
    read: Callable | None = None


DATASETS = {
    "digits": DatasetSpec("digits (8x8, enlarged)", 10, (1, 32, 32), 1297, 500, read=lambda: _digits(32)),
    "digits64": DatasetSpec("digits (8x8, enlarged to 64x64)", 10, (1, 64, 64), 1297, 500, read=lambda: _digits(64)),
    "mnist": DatasetSpec("MNIST", 10, (1, 28, 28), 60000, 10000, "MNIST/raw",
                         "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b"),
    "cifar10": DatasetSpec("CIFAR-10", 10, (3, 32, 32), 50000, 10000, "cifar-10-batches-py",
                           "9048fcbac9c08a64d57a7c5a5a66750a974ad4eab380914df129f7e223d823df"),
    "cifar100": DatasetSpec("CIFAR-100", 100, (3, 32, 32), 50000, 10000, "cifar-100-python",
                            "283e80e15e3841cce98044da5929d8557a88969bfd2d77d1c1db7bb78ba419f7"),
    "imagenet100": DatasetSpec("ImageNet-100", 100, (3, 224, 224), 129395, 5000, "imagenet100", prepared=True),
}  # fmt: skip


@dataclass(frozen=True)
class Images:
    """A whole data set: uint8 images (n, C, H, W), int64 labels (n,), and the sha256 of both.
    mapped: whether the images lie in a file and come into memory only where they are read."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    checksum: str
    mapped: bool = False


@dataclass(frozen=True)
class Split:
    """Images ready for a device: uint8 (n, H, W, C), so that a gathered batch is already channels-last."""

    images: torch.Tensor | MemoryMapped
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)


def data_folder():
    """The folder of the environment variable SILALIB_DATA, or data/ in the project."""
    return Path(os.environ.get("SILALIB_DATA") or ROOT / "data")


def dataset(name):
    """The DatasetSpec of a built-in data set or of a prepared folder of images. Raises UserError for other names."""
    if name in DATASETS:
        return DATASETS[name]
    own = sorted(path.parent.name for path in data_folder().glob("*/dataset.json"))
    if name not in own:
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(dict.fromkeys([*DATASETS, *own]))}")
    found = prepared.describe(data_folder() / name)
    counts = len(found["classes"]), tuple(found["image"]), found["train"], found["test"]
    return DatasetSpec(name, *counts, folder=name, prepared=True)


def known_checksum(name):
    """The checksum of the images that `load(name)` gives, without reading them; None where it is not known."""
    if not (spec := dataset(name)).prepared:
        return spec.sha256
    with suppress(UserError):  # not on this machine, or damaged
        return prepared.content_checksum(prepared.describe(data_folder() / spec.folder))


@lru_cache(maxsize=2)
def load(name):
    """The whole data set `name` as Images, downloaded first if need be.
    Raises MissingData when it is not here and cannot be downloaded, UserError when its files are damaged."""
    spec = dataset(name)
    if not spec.prepared:
        return _verified(name, spec.read()) if spec.read else _from_torchvision(name)
    arrays, checksum = prepared.open_arrays(data_folder() / name)
    with warnings.catch_warnings(action="ignore"):  # torch asks for arrays that may be written: these must not be
        train, train_labels, test, test_labels = map(torch.from_numpy, arrays)
    train, test = (images.permute(0, 3, 1, 2) for images in (train, test))
    return Images(train, train_labels, test, test_labels, checksum, mapped=True)


def is_available(name):
    """Whether a data set is embedded or its files are on this machine, without downloading or verifying them."""
    spec = dataset(name)
    return not spec.folder or any((data_folder() / spec.folder).glob("dataset.json" if spec.prepared else "*"))


def download(name):
    """Download a data set that is not on this machine yet, without verifying one that is. Raises as `load` does."""
    if dataset(name).prepared or not is_available(name):
        load(name)


def _digits(size):
    """1,797 scans of 8x8 pixels, enlarged to size x size once: the last 500 to test on, the others to train on."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent  # its import takes as long as a small training
    rows = torch.from_numpy(np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", np.uint8, delimiter=","))
    images = rows[:, :-1].float().view(-1, 1, 8, 8) * (255 / 16)
    labels, n = rows[:, -1].long(), DATASETS["digits"].train
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    return images[:n], labels[:n], images[n:], labels[n:]


def _from_torchvision(name):
    """The published images. What else lies in their place becomes *.corrupt, and they are downloaded."""
    root, where, state = data_folder(), data_folder() / DATASETS[name].folder, "missing"
    if found := _read(name):
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            found = _read(name)  # another process may have downloaded it meanwhile
            if found is None and any(where.glob("*")):
                shutil.rmtree(aside := where.with_name(f"{where.name}.corrupt"), ignore_errors=True)
                where.replace(aside)
                state = f"damaged (it is now {aside.name})"
                print(f"{where} was {state}", file=sys.stderr, flush=True)
            found = found or _read(name, download=True)
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):  # a URLError has no number
            raise unwritable(root, error) from None
    if found is None:
        raise MissingData(f"no network and {where} is {state}: put {DATASETS[name].title} there")
    return found


def _read(name, download=False):
    """The Images of torchvision's files, None where they are missing or not the published ones, unopened."""
    from ._torchvision import torchvision

    of_split = getattr(torchvision.datasets, name.upper())
    try:
        arrays = []
        for split in [of_split(data_folder(), train=train, download=download) for train in (True, False)]:
            pixels, labels = torch.as_tensor(split.data), torch.as_tensor(split.targets).long()
            arrays += [pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2), labels]
        return _verified(name, arrays)
    except (OSError, MemoryError):
        raise
    except Exception:  # torchvision raises many kinds
        return None


def _verified(name, arrays):
    """The Images of arrays that have the published checksum. Raises ValueError for others."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.contiguous().numpy())
    if DATASETS[name].sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"not the published {DATASETS[name].title}")
    return Images(*arrays, digest.hexdigest())


def balanced_order(labels, seed=0):
    """A fixed order of the images in which every prefix holds the classes in equal parts, as near as it can."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = labels[shuffled].argsort(stable=True)
    rank = torch.cat([torch.arange(n) for n in labels.bincount()])  # of each image within its class
    return shuffled[by_class[rank.argsort(stable=True)]]


def splits(run, device):
    """What `run` trains on, holds out and tests on: {"train", "holdout", "test"} -> Split, and the data's checksum.
    train_size and holdout take fixed, class-balanced subsets of the training images, the same for every seed.
    Images that do not fit on the device are MemoryMapped, see `fits_on_device`."""
    whole = load(run.dataset)
    order, held = balanced_order(whole.train_labels), run.holdout
    if held + (run.train_size or 1) > len(order):
        raise UserError(f"train_size {run.train_size} with holdout {held}: {run.dataset} has {len(order)} images")
    end = held + run.train_size if run.train_size else None
    resident = fits_on_device(whole, run.augment, device)

    def split(images, labels, rows):
        mapped = MemoryMapped(images.permute(0, 2, 3, 1).contiguous(), rows, device)
        return Split(mapped.resident() if resident else mapped, labels[rows].to(device))

    chosen = {"holdout": order[:held], "train": order[held:end]}
    parts = {name: split(whole.train_images, whole.train_labels, rows.sort().values) for name, rows in chosen.items()}
    rows = torch.arange(len(whole.test_labels))
    return parts | {"test": split(whole.test_images, whole.test_labels, rows)}, whole.checksum


def fits_on_device(whole, augment, device, free=None):
    """Whether the images, padded too where crops are cut from them, stay on the device. A memory-mapped file does on a
    GPU if it leaves seven tenths of the free memory to training; free: bytes of it, by default what the GPU says."""
    if not whole.mapped or device.type == "cpu":
        return not whole.mapped
    bytes_needed = (whole.train_images.nbytes + whole.test_images.nbytes) * (2 if "crop" in augment else 1)
    return bytes_needed < 0.3 * (torch.cuda.mem_get_info(device)[0] if free is None else free)


def normalisation(split):
    """Per-channel mean and standard deviation of a split's pixels, as fractions of 255; shape (C,) each."""
    counts = 0
    for batch in in_batches(split.images, max(1, AT_ONCE // math.prod(split.images.shape[1:]))):
        pixels = batch.flatten(0, 2)
        counts += torch.stack([channel.int().bincount(minlength=256) for channel in pixels.T])
    counts, levels = counts.double().cpu(), torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    return mean.float(), (share @ levels**2 - mean**2).sqrt().float()
