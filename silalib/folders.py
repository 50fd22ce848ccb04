"""Any folder of images as a data set: decoded once, in parallel, into memory-mapped arrays.

A tree train/<class>/*, val/<class>/* becomes a folder with train.npy and test.npy, uint8 (n, H, W, 3), their labels,
and dataset.json, which is written last and marks it as complete. Until then journal.jsonl says what is decoded:
starting again after any interruption goes on there, and ends with the same bytes.

Pillow decodes, with its bilinear filter, which averages over all source pixels where it makes an image smaller. The
processes that decode import this module, so it leaves torch to the functions that need it.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import Damaged, MissingData, Stopped, UserError

FILES = ("train.npy", "train_labels.npy", "test.npy", "test_labels.npy")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VERIFIED = ".verified.json"
AGAIN = "prepare it again (python -m silalib data ... --from DIR)"
CHUNK = 128
"""Images that a process decodes at once, and that are decoded again after an interruption."""


# -- what a tree holds


@dataclass(frozen=True)
class Tree:
    """The images of a tree. paths: {"train", "test"} -> paths below the tree; labels: the same -> class numbers."""

    classes: list
    paths: dict
    labels: dict

    @property
    def checksum(self):
        """sha256 of the classes and of every image's path and label."""
        rows = [
            f"{label}\t{path}" for split in self.paths for path, label in zip(self.paths[split], self.labels[split])
        ]
        return hashlib.sha256("\n".join([*self.classes, *rows]).encode(errors="surrogateescape")).hexdigest()


def list_tree(source, first=None):
    """The Tree below `source`, a folder train/ and a folder val/ with one folder for each class.

    val/ may also hold the images themselves, where ImageNet's ground truth is found (see `ground_truth`).
    first: only so many classes, the first WordNet ids in sorted order. Raises UserError for a tree of another form.
    """
    train, val = source / "train", source / "val"
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the one that holds train/ and val/")
    for split in (train, val):
        if not split.is_dir():
            raise UserError(f"{source} has no folder {split.name}/: give the folder that holds train/ and val/")
    classes = _folders(train)
    if first:
        classes = [name for name in classes if re.fullmatch(r"n\d{8}", name)][:first]
        if len(classes) < first:
            raise UserError(f"{train} has {len(classes)} class folders such as n01440764: {first} are needed")
    if not classes:
        raise UserError(f"{train} has no folders: it needs one for each class")
    paths = {"train": [_images(source, train / name) for name in classes]}
    if in_val := _folders(val):
        if not first and (unknown := sorted(set(in_val) - set(classes))):
            raise UserError(f"{val / unknown[0]} is of a class that {train} does not have")
        paths["test"] = [_images(source, val / name) for name in classes]
    else:
        paths["test"] = _flat(source, classes)
    for split, folder in (("train", train), ("test", val)):
        for name, images in zip(classes, paths[split]):
            if not images:
                raise UserError(f"class {name} has no images in {folder}")
    return Tree(
        classes,
        {split: [path for images in paths[split] for path in images] for split in paths},
        {split: [label for label, images in enumerate(paths[split]) for _ in images] for split in paths},
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
    truth = ground_truth(source)
    images = {name: [] for name in classes}
    for name in sorted(e.name for e in os.scandir(source / "val") if _is_image(e.name)):
        label = truth.get(Path(name).stem)
        if label is None:
            raise UserError(f"{source / 'val' / name} is not in ImageNet's ground truth")
        if label in images:
            images[label].append(f"val/{name}")
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


# -- decoding


def decode(path, size, square=None):
    """The image as uint8 RGB (size, size, 3).

    square: resized to (square, square) first, whatever its shape; by default the shorter side is resized to `size`,
    which leaves an image of that size untouched. Then the centre is cut out. Transparency is dropped.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    target = (square, square) if square else (size * width // shorter, size * height // shorter)
    image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in target)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode_rows(array, start, paths, size, square):
    """Decode images into the rows of the array file `array` from `start` on; returns {row: error} of broken ones."""
    pixels = np.zeros((len(paths), size, size, 3), np.uint8)
    broken = {}
    for i, path in enumerate(paths):
        try:
            pixels[i] = decode(path, size, square)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            broken[start + i] = (str(error) or repr(error)).splitlines()[0]
    with open(array, "r+b") as file:  # not through a memory map, where a full disk kills the process
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.seek(start * pixels[0].nbytes, os.SEEK_CUR)
        file.write(pixels.data)
        file.flush()
        os.fsync(file.fileno())
    return broken


def _start_worker():
    """Nothing but results is heard of a worker, and it does not outlive the main process, however that ends."""
    warnings.simplefilter("ignore")
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def decode_all(jobs, workers, done):
    """Run decode_rows(*job) for each job in `jobs` (key -> arguments) in processes; done(key, broken) after each.

    Returns early after SIGINT or SIGTERM, when what was in progress is done.
    """
    from .launch import cpu_cores, interruptible

    signals = {signal.SIGINT, signal.SIGTERM}
    context = multiprocessing.get_context("spawn")
    with interruptible() as stopped, ProcessPoolExecutor(workers or cpu_cores(), context, _start_worker) as pool:
        usual = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited: workers leave signals to this process
        try:
            futures = {pool.submit(decode_rows, *job): key for key, job in jobs.items()}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        try:
            while futures:
                if stopped.is_set():
                    for future in futures:
                        future.cancel()
                    futures = {f: key for f, key in futures.items() if not f.cancelled()}
                for future in wait(futures, 0.2, FIRST_COMPLETED).done:
                    done(futures.pop(future), future.result())
        except BrokenProcessPool:
            raise UserError("a process that decodes died, maybe out of memory: use fewer --workers") from None
        finally:
            for future in futures:
                future.cancel()


# -- preparing


def prepare(source, folder, title, size, square=None, first=None, skip_broken=False, workers=None):
    """Make `folder` the data set of the tree `source`, going on where an interrupted call ended.

    size, square: as in `decode`; first: as in `list_tree`. skip_broken: leave out images that cannot be decoded; the
    last ones take their places. workers: processes, by default one per CPU core. Where the folder is complete, its
    content is verified. Returns its description (see `describe`).
    Raises Stopped after SIGINT or SIGTERM, UserError for what the user can mend; nothing that is decoded gets lost.
    """
    from filelock import FileLock, Timeout

    source, folder = Path(source), Path(folder)
    try:
        tree = list_tree(source, first)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror or error}") from None
    plan = {"listing": tree.checksum, "size": size, "square": square}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            if not _complete(folder, plan):
                _decode_tree(tree, source, folder, title, plan, skip_broken, workers)
            (folder / "journal.jsonl").unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is preparing {folder}") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error}); start again to go on") from None
    return describe(folder)


def _complete(folder, plan):
    """Whether the folder is prepared and whole; what is damaged becomes *.corrupt.

    Raises UserError where it was prepared by another plan.
    """
    from .runs import set_aside

    try:
        if describe(folder)["plan"] != plan:
            raise UserError(
                f"{folder} was prepared from other files or at another size: delete it, or take another name"
            )
        verify(folder)
    except MissingData:
        return False
    except Damaged as error:
        print(f"{set_aside(error, 'dataset.json')}: all is decoded again", file=sys.stderr)
        (folder / "journal.jsonl").unlink(missing_ok=True)
        return False
    return True


def _decode_tree(tree, source, folder, title, plan, skip_broken, workers):
    journal = folder / "journal.jsonl"
    noted = read_journal(journal)
    if noted and noted[0] != plan:
        raise UserError(f"{folder} is half prepared from other files or at another size: delete it to start anew")
    skipped = next((entry["skipped"] for entry in noted[1:] if "skipped" in entry), None)
    if skipped is None:
        finished = {(entry["split"], entry["start"]) for entry in noted[1:]}
        broken = _decode_missing(tree, source, folder, title, plan, finished if noted else None, workers)
        for (split, row), error in sorted(broken.items()):
            print(f"broken: {source / tree.paths[split][row]}: {error}", file=sys.stderr)
        if broken and not skip_broken:
            total = sum(map(len, tree.paths.values()))
            raise UserError(
                f"{len(broken)} of {total} images are broken: mend them and start again, or leave them out with "
                "--skip-broken; the others are decoded"
            )
        skipped = {split: sorted(row for s, row in broken if s == split) for split in tree.paths}
        if any(len(skipped[split]) == len(paths) for split, paths in tree.paths.items()):
            raise UserError(f"{source} has no image that can be decoded in train/ or in val/")
        note(journal, {"skipped": skipped})
    _finish(tree, folder, title, plan, skipped)


def _decode_missing(tree, source, folder, title, plan, finished, workers):
    """Decode all chunks but the `finished` ones, None before the first start. Returns {(split, row): error}."""
    from tqdm import tqdm

    jobs = {
        (split, start): [source / path for path in paths[start : start + CHUNK]]
        for split, paths in tree.paths.items()
        for start in range(0, len(paths), CHUNK)
        if (split, start) not in (finished or ())
    }
    size, square = plan["size"], plan["square"]
    total, left = sum(map(len, tree.paths.values())), sum(map(len, jobs.values()))
    needed, free = left * 3 * size**2, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{title} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
            "make room, or set SILALIB_DATA to a folder on a larger disk"
        )
    journal, broken = folder / "journal.jsonl", {}
    if finished is None:
        for split, paths in tree.paths.items():
            set_rows(folder / f"{split}.npy", len(paths), size, "w+b")
        note(journal, plan)
    with tqdm(total=total, initial=total - left, unit=" images", disable=None) as bar:

        def done(key, errors):
            split, start = key
            broken.update({(split, row): error for row, error in errors.items()})
            if not errors:  # a chunk with broken images is decoded again: they may be mended meanwhile
                note(journal, {"split": split, "start": start})
            bar.update(len(jobs.pop(key)))

        arguments = {
            (s, start): (folder / f"{s}.npy", start, paths, size, square) for (s, start), paths in jobs.items()
        }
        decode_all(arguments, workers, done)
    if jobs:
        left = sum(map(len, jobs.values()))
        raise Stopped(f"stopped with {left} of {total} images left; start again to go on")
    return broken


def _finish(tree, folder, title, plan, skipped):
    """Leave out the rows that are skipped, write labels and checksums, and last the description."""
    import PIL

    from .runs import to_npy, write_atomically, write_sealed

    counts = {}
    for split, paths in tree.paths.items():
        order = order_without(skipped[split], len(paths))
        drop_rows(folder / f"{split}.npy", order, len(paths), plan["size"])
        write_atomically(folder / f"{split}_labels.npy", to_npy(np.array(tree.labels[split], np.int64)[order]))
        counts[split] = len(order)
    description = {
        "title": title,
        "classes": tree.classes,
        "image": [3, plan["size"], plan["size"]],
        **counts,
        "skipped": [tree.paths[split][row] for split, rows in skipped.items() for row in rows],
        "plan": plan,
        "decoder": f"Pillow {PIL.__version__}",
        "files": sums(folder),
    }
    write_sealed(folder / "dataset.json", description)


def note(journal, entry):
    """Add a line to the journal; it is on the disk when this returns."""
    with open(journal, "ab") as file:
        file.write((json.dumps(entry) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_journal(journal):
    """The journal's entries; a last line that was not written to its end is cut off."""
    content = journal.read_bytes() if journal.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
    try:
        return [json.loads(line) for line in content[:whole].splitlines()]
    except ValueError:
        raise UserError(f"{journal} is damaged: delete {journal.parent} to start anew") from None


def set_rows(path, n, size, mode="r+b"):
    """Give an array file its header and length for uint8 (n, size, size, 3); numpy's header keeps its own length."""
    with open(path, mode) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
        )
        length = file.tell() + n * size * size * 3
        file.flush()
        os.fsync(file.fileno())
        file.truncate(length)


def order_without(broken, n):
    """Which of n rows come where when the `broken` ones are left out: the last ones take their places."""
    kept = np.arange(n - len(broken))
    gone = set(broken)
    kept[[row for row in broken if row < len(kept)]] = [row for row in range(len(kept), n) if row not in gone]
    return kept


def drop_rows(path, order, n, size):
    """Bring the array file of n rows to `order`; where that was interrupted before, doing it again does no harm."""
    array = np.load(path, mmap_mode="r+")
    if len(array) == n:
        moved = np.flatnonzero(order != np.arange(len(order)))
        for row in moved:
            array[row] = array[order[row]]
        array.flush()
    del array
    if len(order) < n:
        set_rows(path, len(order), size)


# -- what is prepared


def describe(folder):
    """What dataset.json says: title, classes (their names), image shape, numbers of images, checksums.

    Raises MissingData where the folder is not there or not complete, Damaged where the file is not what was written.
    """
    from .runs import read_sealed

    if not (folder / "dataset.json").exists():
        raise MissingData(f"{folder} is not prepared")
    return read_sealed(folder / "dataset.json", AGAIN)


def open_arrays(folder):
    """The four arrays in the order of FILES, the images memory-mapped, and the checksum of their content.

    The content is verified unless the files have the sizes and times of the last verification.
    """
    from .runs import to_json

    description = describe(folder)
    if not (folder / VERIFIED).exists() or (folder / VERIFIED).read_bytes() != to_json(stamp(folder)):
        verify(folder)
    arrays = []
    try:
        for name in FILES:
            arrays.append(np.load(folder / name, mmap_mode=None if "labels" in name else "r"))
            n = description["train" if name.startswith("train") else "test"]
            channels, height, width = description["image"]
            if arrays[-1].shape != ((n,) if "labels" in name else (n, height, width, channels)):
                raise ValueError
    except (OSError, ValueError, EOFError):
        raise Damaged(folder / name, AGAIN) from None
    for labels in (arrays[1], arrays[3]):
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(description["classes"]):
            raise UserError(f"{folder} has labels outside of 0 to {len(description['classes']) - 1}: prepare it again")
    return arrays, content_checksum(description)


def stamp(folder):
    """Size and time of each of the four files."""
    try:
        found = [(folder / name).stat() for name in FILES]
    except OSError as error:
        raise Damaged(Path(error.filename), AGAIN) from None
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in zip(FILES, found)}


def content_checksum(description):
    """One sha256 for the four files: of the lines that sha256sum prints for them."""
    lines = "".join(f"{description['files'][name]}  {name}\n" for name in FILES)
    return hashlib.sha256(lines.encode()).hexdigest()


def sums(folder):
    """sha256 of each of the four files."""
    from tqdm import tqdm

    total = sum((folder / name).stat().st_size for name in FILES)
    found = {}
    with tqdm(total=total, desc="checksums", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name in FILES:
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while block := file.read(1 << 23):
                    digest.update(block)
                    bar.update(len(block))
            found[name] = digest.hexdigest()
    return found


def verify(folder):
    """Read everything and compare it with the stored checksums. Returns the description."""
    from .runs import to_json, write_atomically

    description, verified = describe(folder), stamp(folder)
    for name, found in sums(folder).items():
        if description["files"][name] != found:
            raise Damaged(folder / name, AGAIN)
    with suppress(OSError, UserError):  # a folder of someone else is verified each time
        write_atomically(folder / VERIFIED, to_json(verified))
    return description
