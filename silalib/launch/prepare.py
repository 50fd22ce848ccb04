"""Prepare any folder of images as a data set: decoded once, in parallel, into memory-mapped arrays.

A tree train/<class>/*, val/<class>/* becomes a folder with train.npy and test.npy, uint8 (n, H, W, 3), their labels,
and dataset.json, which is written last and marks it as complete. Until then the folder shards/ in it holds

    plan.json        what is prepared; a start with another plan is refused
    train-00012.npy  some decoded images, written atomically: done if none is missing
    skipped.json     the broken images that are left out, once all are decoded; from then on nothing is decoded

In the end each shard is copied to its place in the array, flushed to the disk and removed; one that is still there is
copied to the same place again. So the next start resumes after a kill or a full disk at any moment and ends with the
same bytes, and the disk needs room for one shard more than the result.

Pillow decodes, with its bilinear filter, which averages over all source pixels where it makes an image smaller. It
works without Python's lock, so threads decode, and there are no processes to start, to stop and to outlive.
"""

import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from ..data import DATASETS, data_folder, load
from ..data.prepared import FILES, checksums, describe, verify
from ..errors import CorruptFile, MissingData, Stopped, UserError
from ..files import quarantine, read_sealed, to_npy, write_atomically, write_sealed
from .listing import list_images
from .processes import cpu_cores, interruptible

CHUNK = 128
"""Images in a shard: what a thread decodes at once, and what an interruption costs."""


def decode(path, size, square=None):
    """The image as uint8 RGB (size, size, 3).

    square: resized to (square, square) first, whatever its shape; by default the shorter side is resized to `size`,
    which leaves an image of that size untouched. Then the centre is cut out. Transparency is dropped.
    """
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


def prepare(name, source, size=None, skip_broken=False, workers=None, chunk=CHUNK):
    """Make the data set `name` of the images in the folder `source`, or resume where an interrupted call ended.

    "imagenet100" takes the first hundred classes of an ImageNet at 224 pixels: resized to 256x256, the centre cut out.
    Any other name takes all classes at `size` pixels: the shorter side resized to it, the centre cut out.
    skip_broken: leave out images that cannot be decoded. workers: threads, by default one per CPU core. chunk: images
    in a shard. Where the data set is complete, its content is verified. Raises Stopped after SIGINT or SIGTERM,
    UserError for what the user can mend; nothing that is decoded gets lost.
    """
    taken = {*DATASETS, "folder", *(Path(spec.folder).parts[0].lower() for spec in DATASETS.values() if spec.folder)}
    title, square, first = name, None, None
    if name == "imagenet100":
        title, size, square, first = DATASETS[name].title, 224, 256, 100
    elif name.lower() in taken:
        raise UserError(f"{name!r} is the name of a built-in data set or its folder: choose another --name")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} is no name for a data set: use letters, digits, '.', '_' and '-'")
    source, folder = Path(source), data_folder() / name
    try:
        listing = list_images(source, first)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror or error}") from None
    plan = {"listing": listing.checksum, "size": size, "square": square}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            if not _complete(folder, plan):
                shards, skipped = _decode_all(listing, source, folder, plan, chunk, skip_broken, workers)
                _finish(listing, folder, plan, title, shards, skipped)
            shutil.rmtree(folder / "shards", ignore_errors=True)
    except Timeout:
        raise UserError(f"another process is preparing {folder}") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error}); start again to go on") from None
    load.cache_clear()


def _complete(folder, plan):
    """Whether the folder is prepared and whole. Damage becomes *.corrupt; another plan raises UserError."""
    try:
        if describe(folder)["plan"] != plan:
            raise UserError(f"{folder} was prepared from other files or at another size: delete it, or change --name")
        verify(folder)
    except MissingData:
        return False
    except CorruptFile as error:
        print(f"{quarantine(error, 'dataset.json')}: all is decoded again", file=sys.stderr)
        shutil.rmtree(folder / "shards", ignore_errors=True)
        return False
    return True


def _decode_all(listing, source, folder, plan, chunk, skip_broken, workers):
    """Decode what is left. Returns the shards, {"train", "test"} -> {file: its paths}, and the paths to leave out."""
    shards, anew, begun = folder / "shards", f"delete {folder} to start anew", plan | {"chunk": chunk}
    shards.mkdir(exist_ok=True)
    if not (shards / "plan.json").exists():
        for name in FILES:  # left behind by a description that is gone or damaged
            (folder / name).unlink(missing_ok=True)
        write_sealed(shards / "plan.json", begun)
    if read_sealed(shards / "plan.json", anew) != begun:
        raise UserError(f"{folder} is half prepared from other files or at another size: {anew}")
    files = {
        split: {shards / f"{split}-{i // chunk:05d}.npy": paths[i : i + chunk] for i in range(0, len(paths), chunk)}
        for split, paths in listing.paths.items()
    }
    if not (shards / "skipped.json").exists():
        broken = _decode_missing(files["train"] | files["test"], source, plan, workers)
        skipped = [path for paths in listing.paths.values() for path in paths if path in broken]
        for path in skipped:
            print(f"broken: {source / path}: {broken[path]}", file=sys.stderr)
        if skipped and not skip_broken:
            total = sum(map(len, listing.paths.values()))
            how = "mend them and start again, or leave them out with --skip-broken; the others are decoded"
            raise UserError(f"{len(skipped)} of {total} images are broken: {how}")
        if any(broken.keys() >= set(paths) for paths in listing.paths.values()):
            raise UserError(f"{source} has no image that can be decoded in train/ or in val/")
        write_sealed(shards / "skipped.json", skipped)
    return files, read_sealed(shards / "skipped.json", anew)


def _decode_missing(files, source, plan, workers):
    """Decode the shards that do not have all of their images. Returns {path: error} of the broken ones."""
    missing = {file: paths for file, paths in files.items() if _length(file) < len(paths)}
    total, left = (sum(map(len, some.values())) for some in (files, missing))
    first = next(iter(files))  # no shard is larger, and the disk needs room for one more than the result
    needed, free = (left + len(files[first])) * 3 * plan["size"] ** 2, shutil.disk_usage(first.parent).free
    if left and needed > free:
        raise UserError(
            f"{first.parents[1]} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room, or set "
            "SILALIB_DATA to a folder on a larger disk"
        )
    with (
        tqdm(total=total, initial=total - left, unit=" images", disable=None) as bar,
        warnings.catch_warnings(action="ignore"),
        interruptible() as stopped,
        ThreadPoolExecutor(workers or cpu_cores()) as pool,
    ):
        futures = {pool.submit(_decode_shard, *item, source, plan): len(item[1]) for item in missing.items()}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
                if stopped.is_set():
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    if left := sum(n for future, n in futures.items() if future.cancelled()):
        raise Stopped(f"stopped with {left} of {total} images left; start again to go on")
    return {path: error for future in futures for path, error in future.result().items()}


def _length(shard):
    """How many images a shard holds, -1 where it is missing or damaged."""
    try:
        return len(np.load(shard, mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        return -1


def _decode_shard(shard, paths, source, plan):
    """Write the images that can be decoded to the file `shard`. Returns {path: error} of the others."""
    pixels, n, broken = np.empty((len(paths), plan["size"], plan["size"], 3), np.uint8), 0, {}
    for path in paths:
        try:
            pixels[n] = decode(source / path, plan["size"], plan["square"])
            n += 1
        except Exception as error:  # Pillow raises many kinds for a damaged file
            broken[path] = (str(error) or repr(error)).splitlines()[0]
    write_atomically(shard, to_npy(pixels[:n]))
    return broken


def _finish(listing, folder, plan, title, shards, skipped):
    """Move the shards into the arrays, write labels and checksums, and last the description."""
    counts, size, gone = {}, plan["size"], set(skipped)
    for split, paths in listing.paths.items():
        labels = [label for path, label in zip(paths, listing.labels[split]) if path not in gone]
        counts[split] = len(labels)
        lengths = {file: sum(path not in gone for path in paths) for file, paths in shards[split].items()}
        _move(lengths, folder / f"{split}.npy", (len(labels), size, size, 3))
        write_atomically(folder / f"{split}_labels.npy", to_npy(np.array(labels, np.int64)))
    description = {
        "title": title,
        "classes": listing.classes,
        "image": [3, size, size],
        **counts,
        "skipped": skipped,
        "plan": plan,
        "decoder": f"Pillow {PIL.__version__}",
        "files": checksums(folder),
    }
    write_sealed(folder / "dataset.json", description)


def _move(lengths, array, shape):
    """Copy the shards (file -> number of images) into the file `array` of uint8 `shape`; each is removed after that."""
    mode = "w+" if next(iter(lengths)).exists() else "r+"  # the first is removed when the array is begun
    offset = np.lib.format.open_memmap(array, mode, np.uint8, shape).offset
    with open(array, "r+b") as file:  # not through the memory map, where a full disk kills the process
        for shard, length in lengths.items():
            if shard.exists():
                if _length(shard) != length:
                    raise CorruptFile(shard, f"delete {array.parent} to start anew")
                file.seek(offset)
                file.write(np.load(shard).data)
                file.flush()
                os.fsync(file.fileno())
                shard.unlink()
            offset += length * shape[1] * shape[2] * shape[3]
