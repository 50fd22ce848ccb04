"""Which images a folder holds, in which order, and of which class each is: train/<class>/* and val/<class>/*."""

import csv
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Listing:
    """Names of the classes; {"train", "test"} -> paths below the folder; the same -> numbers of their classes."""

    classes: list
    paths: dict
    labels: dict

    @property
    def checksum(self):
        """sha256 of the classes and of every image's path and label."""
        rows = [f"{n}\t{path}" for split in self.paths for path, n in zip(self.paths[split], self.labels[split])]
        return hashlib.sha256("\n".join([*self.classes, *rows]).encode(errors="surrogateescape")).hexdigest()


def list_images(source, first=None):
    """The Listing of `source`, a folder with train/ and val/, both with one folder for each class.

    val/ may also hold the images themselves, where ImageNet's ground truth is found (see `ground_truth`).
    first: only so many classes, the first WordNet ids in sorted order. Raises UserError for a folder of another form.
    """
    train, val = source / "train", source / "val"
    for folder in (source, train, val):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the one that holds train/ and val/")
    classes, in_val = _folders(train), _folders(val)
    if not classes:
        raise UserError(f"{train} has no folders: it needs one for each class")
    if first:
        classes = [name for name in classes if re.fullmatch(r"n\d{8}", name)][:first]
        if len(classes) < first:
            raise UserError(f"{train} has {len(classes)} class folders such as n01440764: {first} are needed")
    elif unknown := sorted(set(in_val) - set(classes)):
        raise UserError(f"{val / unknown[0]} is of a class that {train} does not have")
    found = {"train": [_images(source, train / name) for name in classes]}
    found["test"] = [_images(source, val / name) for name in classes] if in_val else _flat(source, classes)
    for folder, by_class in zip((train, val), found.values()):
        for name, paths in zip(classes, by_class):
            if not paths:
                raise UserError(f"class {name} has no images in {folder}")
    return Listing(
        classes,
        {split: [path for paths in found[split] for path in paths] for split in found},
        {split: [label for label, paths in enumerate(found[split]) for _ in paths] for split in found},
    )


def _folders(folder):
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _is_image(name):
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images(source, folder):
    """Paths below `source` of the images in `folder` and its folders, sorted."""
    found = [Path(where, name) for where, _, names in os.walk(folder) for name in names if _is_image(name)]
    return sorted(path.relative_to(source).as_posix() for path in found)


def _flat(source, classes):
    """A val/ without class folders: the images of each class, by the ground truth."""
    truth, images = ground_truth(source), {name: [] for name in classes}
    for name in filter(_is_image, sorted(os.listdir(source / "val"))):
        if Path(name).stem not in truth:
            raise UserError(f"{source / 'val' / name} is not in ImageNet's ground truth")
        images.get(truth[Path(name).stem], []).append(f"val/{name}")
    return list(images.values())


def ground_truth(source):
    """WordNet ids of ImageNet's validation images, {"ILSVRC2012_val_00000001": "n01751748", ...}.

    Read from the devkit's ILSVRC2012_validation_ground_truth.txt and meta.mat, or from Kaggle's LOC_val_solution.csv,
    in `source` or in one of the three folders above it.
    """
    for base in (source, *source.resolve().parents[:3]):
        if (solution := base / "LOC_val_solution.csv").is_file():
            with open(solution, newline="") as file:
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        for devkit in ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "."):
            numbers, meta = (base / devkit / n for n in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
            if numbers.is_file() and meta.is_file():
                from scipy.io import loadmat

                ids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in loadmat(meta, squeeze_me=True)["synsets"]}
                lines = numbers.read_text().split()
                return {f"ILSVRC2012_val_{i:08d}": ids[int(line)] for i, line in enumerate(lines, 1)}
    raise UserError(
        f"{source / 'val'} has no class folders: put ILSVRC2012_devkit_t12/ (unpacked) or LOC_val_solution.csv "
        f"into {source}, so that its images can be told apart"
    )
