"""The data sets. DATASETS: name -> Dataset; `load(name)` gives its images, `splits(run, device)` what a run needs.

`digits` (1,797 scans of 8x8 pixels that come with scikit-learn) is embedded and needs no network; MNIST and CIFAR
come through torchvision, which downloads them once and checks their published MD5s. ImageNet-100 and any other folder
of images are prepared once from the user's own files (`prepare`) and then read where they lie, memory-mapped. All
live in the folder of the environment variable SILALIB_DATA, or data/ in the project.
"""

import hashlib
import importlib.util
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import folders
from .errors import MissingData, UserError
from .paths import ROOT
from .stream import Streamed, in_batches


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is loaded.

    image: shape (C, H, W). folder: where its files lie below the data folder, None if embedded.
    sha256: of the decoded pixels and labels, None if not fixed. prepared: from the user's own files, see `folders`.
    read: gives its images and labels as tensors, in the order of `Images`, where they are embedded.
    """

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
    "digits": Dataset("digits (8x8, enlarged)", 10, (1, 32, 32), 1297, 500, read=lambda: _digits(32)),
    "digits64": Dataset("digits (8x8, enlarged to 64x64)", 10, (1, 64, 64), 1297, 500, read=lambda: _digits(64)),
    "mnist": Dataset(
        "MNIST",
        10,
        (1, 28, 28),
        60000,
        10000,
        "MNIST/raw",
        "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    ),
    "cifar10": Dataset(
        "CIFAR-10",
        10,
        (3, 32, 32),
        50000,
        10000,
        "cifar-10-batches-py",
        "9048fcbac9c08a64d57a7c5a5a66750a974ad4eab380914df129f7e223d823df",
    ),
    "cifar100": Dataset(
        "CIFAR-100",
        100,
        (3, 32, 32),
        50000,
        10000,
        "cifar-100-python",
        "283e80e15e3841cce98044da5929d8557a88969bfd2d77d1c1db7bb78ba419f7",
    ),
    "imagenet100": Dataset("ImageNet-100", 100, (3, 224, 224), 129395, 5000, "imagenet100", prepared=True),
}

RESIDENT_SHARE = 0.3
"""Images from a memory map stay on a GPU if they take up less than this share of its free memory."""
HISTOGRAM_BYTES = 1 << 26
"""Pixels that are counted at once for the normalisation."""


@dataclass(frozen=True)
class Images:
    """A whole data set: uint8 images (n, C, H, W), int64 labels (n,), and the sha256 of both.

    mapped: whether the images lie in a file and come into memory only where they are read.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    checksum: str
    mapped: bool = False


@dataclass(frozen=True)
class Split:
    """Images ready for a device: uint8 (n, H, W, C), so that a gathered batch is already channels-last."""

    images: torch.Tensor | Streamed
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)


def data_folder():
    return Path(os.environ.get("SILALIB_DATA") or ROOT / "data")


def dataset(name):
    """The Dataset called `name`: a built-in one, or a folder of images that was prepared. Raises UserError else."""
    if name in DATASETS:
        return DATASETS[name]
    prepared = sorted(path.parent.name for path in data_folder().glob("*/dataset.json"))
    if name not in prepared:
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(dict.fromkeys([*DATASETS, *prepared]))}")
    found = folders.describe(data_folder() / name)
    return Dataset(
        found["title"], len(found["classes"]), tuple(found["image"]), found["train"], found["test"], name, prepared=True
    )


def known_checksum(name):
    """The checksum that `load(name)` will have, known without reading its images, or None."""
    spec = dataset(name)
    if not spec.prepared:
        return spec.sha256
    try:
        return folders.content_checksum(folders.describe(data_folder() / spec.folder))
    except UserError:  # not on this machine, or damaged
        return None


def prepare(name, source, size=None, skip_broken=False, workers=None):
    """Make the data set `name` of the images below the folder `source`; see `folders.prepare`.

    "imagenet100" takes the first hundred classes of an ImageNet at 224 pixels: resized to 256x256, the centre cut out.
    Any other name takes all classes at `size` pixels: the shorter side resized to it, the centre cut out.
    """
    if name == "imagenet100":
        how = dict(title=DATASETS[name].title, size=224, square=256, first=100)
    else:
        taken = {*DATASETS, "folder", *(Path(d.folder).parts[0].lower() for d in DATASETS.values() if d.folder)}
        if name.lower() in taken:
            raise UserError(f"{name!r} is the name of a built-in data set or its folder: choose another --name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f"{name!r} is no name for a data set: use letters, digits, '.', '_' and '-'")
        how = dict(title=name, size=size)
    folders.prepare(source, data_folder() / name, skip_broken=skip_broken, workers=workers, **how)
    load.cache_clear()


@lru_cache(maxsize=2)
def load(name):
    """The whole data set `name` as Images, downloaded first if need be.

    Raises MissingData when it is not here and cannot be downloaded, UserError when its files are damaged.
    """
    if dataset(name).prepared:
        return _prepared(name)
    if DATASETS[name].read:
        return _verified(name, DATASETS[name].read())
    return _from_torchvision(name)


def _verified(name, arrays):
    """The Images of arrays that have the published checksum. Raises ValueError for others."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.contiguous().numpy())
    if DATASETS[name].sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"not the published {DATASETS[name].title}")
    return Images(*arrays, digest.hexdigest())


def here(name):
    """Whether a data set is embedded or its files are here; a cheap look that downloads and verifies nothing."""
    found = dataset(name)
    if found.prepared:
        return (data_folder() / found.folder / "dataset.json").exists()
    return not found.folder or any((data_folder() / found.folder).glob("*"))


def fetch(name):
    """Download a data set that is not here yet; a cheap look where it is. Raises as `load` does."""
    if dataset(name).prepared or not here(name):
        load(name)


def _prepared(name):
    try:
        (train, train_labels, test, test_labels), checksum = folders.open_arrays(data_folder() / name)
    except MissingData as error:
        raise MissingData(
            f"{error}: python -m silalib data {name} --from DIR makes it of the images below DIR, see data/README.md"
        ) from None
    with warnings.catch_warnings():  # torch would rather have arrays that may be written, which these must not be
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        pixels = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in (train, test)]
    labels = [torch.from_numpy(array) for array in (train_labels, test_labels)]
    return Images(pixels[0], labels[0], pixels[1], labels[1], checksum, mapped=True)


def _digits(size):
    """The last 500 images to test on, the others to train on, enlarged to size x size once."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent  # its import takes as long as a small training
    rows = torch.from_numpy(np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", np.uint8, delimiter=","))
    images = rows[:, :-1].float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    labels = rows[:, -1].long()
    n = DATASETS["digits"].train
    return images[:n], labels[:n], images[n:], labels[n:]


def _from_torchvision(name):
    """The published images. What else lies in their place becomes *.corrupt, and they are downloaded."""
    root, where = data_folder(), data_folder() / DATASETS[name].folder
    if (found := _read(name)) is not None:
        return found
    from filelock import FileLock

    state = "missing"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if (found := _read(name)) is not None:  # another process has downloaded it meanwhile
                return found
            if any(where.glob("*")):
                aside = where.with_name(f"{where.name}.corrupt")
                shutil.rmtree(aside, ignore_errors=True)
                where.replace(aside)
                state = f"damaged (it is now {aside.name})"
                print(f"{where} was {state}", file=sys.stderr, flush=True)
            found = _read(name, download=True)
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):  # a URLError has no number
            raise UserError(
                f"cannot write to {root} ({error.strerror}): set SILALIB_DATA to a folder of yours, with room in it"
            ) from None
        found = None
    if found is None:
        raise MissingData(f"no network and {where} is {state}: put {DATASETS[name].title} there")
    return found


def _read(name, download=False):
    """The Images of torchvision's files, None where they are missing or not the published ones.

    CIFAR's pickles are opened only after their MD5 matched.
    """
    from ._torchvision import torchvision

    open_split = getattr(torchvision.datasets, {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name])
    try:
        arrays = []
        for split in [open_split(data_folder(), train=train, download=download) for train in (True, False)]:
            pixels = torch.as_tensor(split.data)
            pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
            arrays += [pixels, torch.as_tensor(split.targets).long()]
        return _verified(name, arrays)
    except (OSError, MemoryError):
        raise
    except Exception:  # torchvision raises many kinds
        return None


def balanced_order(labels, seed=0):
    """A fixed order of the images in which every prefix holds the classes in equal parts, as near as it can."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = labels[shuffled].argsort(stable=True)
    counts = labels.bincount()
    rank = torch.cat([torch.arange(n) for n in counts])  # of each image within its class
    return shuffled[by_class[rank.argsort(stable=True)]]


def splits(run, device):
    """What `run` trains on, holds out and tests on, on `device`: {"train", "holdout", "test"} -> Split, and the Images.

    train_size and holdout take fixed, class-balanced subsets of the training images, the same for every seed.
    Images that do not stay on the device (see `stays`) are Streamed.
    """
    whole = load(run.dataset)
    order = balanced_order(whole.train_labels)
    held = run.holdout
    if held + (run.train_size or 1) > len(order):
        raise UserError(
            f"train_size {run.train_size} with holdout {run.holdout}: {run.dataset} has {len(order)} images"
        )
    end = held + run.train_size if run.train_size else None
    chosen = {"holdout": order[:held].sort().values, "train": order[held:end].sort().values}
    resident = stays(whole, run.augment, device)
    result = {k: _split(whole.train_images, whole.train_labels, i, device, resident) for k, i in chosen.items()}
    everything = torch.arange(len(whole.test_labels))
    result["test"] = _split(whole.test_images, whole.test_labels, everything, device, resident)
    return result, whole.checksum


def stays(whole, augment, device):
    """Whether all images are brought to the device to stay there, with a padded copy where crops are cut from them.

    On a CPU a memory-mapped file is read where it lies; on a GPU its images stay if they leave room for training.
    """
    if not whole.mapped or device.type == "cpu":
        return not whole.mapped
    bytes_needed = (whole.train_images.nbytes + whole.test_images.nbytes) * (2 if "crop" in augment else 1)
    return bytes_needed < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def _split(images, labels, rows, device, resident):
    streamed = Streamed(images.permute(0, 2, 3, 1).contiguous(), rows, device)
    return Split(streamed.resident() if resident else streamed, labels[rows].to(device))


def normalisation(split):
    """Per-channel mean and standard deviation of a split's pixels, in units of 1/255 of the range; shape (C,) each."""
    counts = 0
    for batch in in_batches(split.images, max(1, HISTOGRAM_BYTES // math.prod(split.images.shape[1:]))):
        pixels = batch.flatten(0, 2)
        counts += torch.stack([pixels[:, c].int().bincount(minlength=256) for c in range(pixels.shape[1])])
    counts = counts.double().cpu()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels**2 - mean**2).sqrt()
    return mean.float(), std.float()
