"""Prepare a folder of images, train/<class>/* and val/<class>/*, as a data set: decoded once, into uint8 arrays.
shards/ holds plan.json, decoded images and, once all are decoded, skipped.json. Each shard is then copied into its
array, flushed and only then removed: what resumes after any interruption ends with the same bytes."""

import io
import math
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock, Timeout
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from ..data import DATASETS, data_folder, load
from ..data.prepared import FILES, checksums, describe, verify
from ..errors import CorruptFile, Stopped, UserError, printable
from ..files import quarantine, read_sealed, sha256, unwritable, write_atomically, write_sealed
from .processes import cpu_cores, finished, interruptible

IMAGE = re.compile(r"[^.].*\.(jpe?g|png|bmp|gif|webp|tiff?|ppm|pgm)", re.IGNORECASE | re.DOTALL)
JUNK = re.compile(r"\..*|__MACOSX|__pycache__|@eaDir|\$RECYCLE\.BIN|System Volume Information|lost\+found", re.DOTALL)
"""Folders that are not the user's but of a program that was there: hidden, or of a known name."""


def list_images(source, first=None):
    """(names of the classes, {"train", "test"} -> [(path below `source`, number of its class), ...]).
    Without class folders, the images in val/ have those of ImageNet's `ground_truth`.
    first: only so many classes, the first WordNet ids. Raises UserError for a folder of another form."""
    train, val = source / "train", source / "val"
    for folder in (source, train, val):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the one that holds train/ and val/")
    below = lambda folder: sorted(e.name for e in os.scandir(folder) if e.is_dir() and not JUNK.fullmatch(e.name))
    classes, in_val = below(train), below(val)
    if not classes:
        raise UserError(f"{train} has no folders: it needs one for each class")
    if first:
        classes = [name for name in classes if re.fullmatch(r"n\d{8}", name)][:first]
        if len(classes) < first:
            raise UserError(f"{train} has {len(classes)} class folders such as n01440764: {first} are needed")
    elif unknown := sorted(set(in_val) - set(classes)):
        raise UserError(f"{val / unknown[0]} is of a class that {train} does not have")
    in_folders = lambda split: [(path, i) for i, name in enumerate(classes) for path in _below(split / name, source)]
    images = {"train": in_folders(train), "test": in_folders(val)}
    if not in_val:
        truth, flat = ground_truth(val), _below(val, source)
        if unknown := [path for path in flat if Path(path).stem not in truth]:
            raise UserError(f"{source / unknown[0]} is not in ImageNet's ground truth")
        rows = [(path, classes.index(name)) for path in flat if (name := truth[Path(path).stem]) in classes]
        images["test"] = sorted(rows, key=itemgetter(1))
    for folder, rows in zip((train, val), images.values()):
        if lacking := set(range(len(classes))) - {label for _, label in rows}:
            raise UserError(f"class {classes[min(lacking)]} has no images in {folder}")
    return classes, images


def _below(folder, source):
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not JUNK.fullmatch(name)]
        found += [Path(where, name) for name in names if IMAGE.fullmatch(name)]
    return [path.relative_to(source).as_posix() for path in sorted(found)]


def ground_truth(val):
    """Names of ImageNet's images in val/, without .JPEG -> WordNet ids, by a devkit or Kaggle's table near it."""
    for base in (val.parent, *val.parent.resolve().parents[:3]):
        if (solution := base / "LOC_val_solution.csv").is_file():
            row = r"ImageId,PredictionString|(ILSVRC2012_val_\d{8}),(n\d{8})(\s.*)?"
            return {found[1]: found[2] for found in _lines(solution, row) if found[1]}
        for devkit in ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "."):
            numbers, meta = (base / devkit / n for n in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
            if numbers.is_file() and meta.is_file():
                try:
                    synsets = loadmat(meta, squeeze_me=True)["synsets"]
                    ids = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
                except Exception:  # scipy raises many kinds
                    raise UserError(f"{meta} is damaged: take it from ImageNet's devkit again") from None
                found = enumerate(_lines(numbers, "|".join(ids)), 1)
                return {f"ILSVRC2012_val_{i:08d}": ids[number[0]] for i, number in found}
    needed = f"put ILSVRC2012_devkit_t12/ (unpacked) or LOC_val_solution.csv into {val.parent}"
    raise UserError(f"{val} has no class folders: {needed}, so that its images can be told apart")


def _lines(path, pattern):
    """The match of each line that is not blank. Raises UserError for one that is of another form."""
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").split("\n"), 1):
        if text := line.strip():
            if not (match := re.fullmatch(pattern, text)):
                what = f"{text[:60]!r} is not of ImageNet's ground truth: take it again"
                raise UserError(f"{path}, line {number}: {what}")
            yield match


def decode(path, size, square=None):
    """The image as uint8 RGB (size, size, 3): resized with Pillow's bilinear filter, then its centre; no transparency.
    square: resized to (square, square), whatever its shape; by default the shorter side is resized to `size`. Of an
    image longer than 16 times its width only the middle is resized. Raises ValueError as `in_8_bits` does."""
    with Image.open(path) as image:
        image = in_8_bits(image).convert("RGB")
    if max(image.size) > (longest := 16 * min(image.size)):
        over = [max(0, side - longest) // 2 for side in image.size]
        image = image.crop((*over, *(side - each for side, each in zip(image.size, over))))
    target = (square, square) if square else [size * side // min(image.size) for side in image.size]
    image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in target)
    return np.asarray(image.crop((left, top, left + size, top + size)))


BITS, LARGEST_VALUES, PHOTOMETRIC = 258, (281, 341), 262  # TIFF's tags


def in_8_bits(image):
    """An image whose channels have more than 8 bits in 8, from black to the largest value of its kind or of its tags.
    Floats are from 0 to 1. Raises ValueError where the range cannot be told: of 32 bits without a tag, and of a TIFF
    of 16 bits that leaves the upper half of its range empty, as one of 14 bits does."""
    tags, several = getattr(image, "tag_v2", {}), image.mode[0] not in "IF"
    bits = max(tags.get(BITS, (8 if several else 16,)))
    if several and bits <= 8:
        return image
    values = np.asarray(image).astype(float)  # of several channels Pillow has kept the upper 8 bits
    told = max((np.max(tags[tag]) for tag in LARGEST_VALUES if tag in tags and not several), default=0)
    told = told > 0 and np.log2(told + 1) % 1 == 0 and told  # others are of this image alone
    top = told or (1 if image.mode == "F" else 255 if several else 2**bits - 1)
    sure = told or top == 1 or (bits <= 16 and (image.format != "TIFF" or values[..., :3].max() > top / 2))
    if not sure or not 0 <= values.min() <= values.max() <= top:
        reason = f"the range of its {bits}-bit pixels cannot be told"
        raise ValueError(f"{reason}: save it in 8 bits, or with SMaxSampleValue")
    values = top - values if tags.get(PHOTOMETRIC) == 0 else values
    return image if several else Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def prepare(name, source, size=None, skip_broken=False, workers=None, chunk=128):
    """Make the data set `name` of the images in the folder `source`, or resume where an interrupted call ended.
    "imagenet100" takes the first hundred classes of an ImageNet at 224 pixels: resized to 256x256, the centre cut out.
    Any other name takes all classes at `size` pixels: the shorter side resized to it, the centre cut out.
    skip_broken: leave out images that cannot be decoded. workers: threads, by default one per CPU core. chunk: images
    in a shard. A complete data set is verified. Raises Stopped after SIGINT or SIGTERM, UserError for what the user can
    mend; nothing that is decoded gets lost."""
    taken = {*DATASETS, "folder", *(Path(spec.folder).parts[0].lower() for spec in DATASETS.values() if spec.folder)}
    title, square, first = name, None, None
    if name == "imagenet100":
        title, size, square, first = DATASETS[name].title, 224, 256, 100
    elif name.lower() in taken:
        raise UserError(f"{name!r} is the name of a built-in data set or its folder: choose another --name")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} is no name for a data set: use letters, digits, '.', '_' and '-'")
    source, folder = Path(source), data_folder() / name
    classes, images = list_images(source, first)
    listing = "\n".join([*classes, *(f"{label}\t{path}" for rows in images.values() for path, label in rows)])
    plan = {"listing": sha256(listing.encode(errors="surrogateescape")), "size": size, "square": square}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            if (folder / "dataset.json").exists():
                _check(folder, plan)
            if not (folder / "dataset.json").exists():
                shards, skipped = _decode_all(images, source, folder, plan, chunk, skip_broken, workers)
                _finish(folder, {"title": title, "classes": classes}, plan, shards, skipped)
            shutil.rmtree(folder / "shards", ignore_errors=True)
    except Timeout:
        raise UserError(f"another process is preparing {folder}") from None
    except OSError as error:
        raise unwritable(folder, error) from None
    load.cache_clear()


def _check(folder, plan):
    try:
        if describe(folder)["plan"] != plan:
            raise UserError(f"{folder} was prepared from other files or at another size: delete it, or change --name")
        verify(folder)
    except CorruptFile as error:
        print(f"{quarantine(error, 'dataset.json')}: all is decoded again", file=sys.stderr)
        shutil.rmtree(folder / "shards", ignore_errors=True)


def _decode_all(images, source, folder, plan, chunk, skip_broken, workers):
    """Decode what is left. Returns the shards, {"train", "test"} -> {file: its images}, and the paths to leave out."""
    place, anew, begun = folder / "shards", f"delete {folder} to start anew", plan | {"chunk": chunk}
    place.mkdir(exist_ok=True)
    if not (place / "plan.json").exists():
        for name in FILES:  # left behind by a description that is gone or damaged
            (folder / name).unlink(missing_ok=True)
        write_sealed(place / "plan.json", begun)
    if read_sealed(place / "plan.json", anew) != begun:
        raise UserError(f"{folder} is half prepared from other files or at another size: {anew}")
    shards = {
        split: {place / f"{split}-{i // chunk:05d}.raw": rows[i : i + chunk] for i in range(0, len(rows), chunk)}
        for split, rows in images.items()
    }
    if not (place / "skipped.json").exists():
        broken = _decode_missing(shards["train"] | shards["test"], source, plan, workers)
        for path in sorted(broken):
            print(printable(f"broken: {source / path}: {broken[path]}"), file=sys.stderr)
        if broken and not skip_broken:
            how = "mend them and start again, or leave them out with --skip-broken; the others are decoded"
            raise UserError(f"{len(broken)} of {sum(map(len, images.values()))} images are broken: {how}")
        if any(broken.keys() >= {path for path, _ in rows} for rows in images.values()):
            raise UserError(f"{source} has no image that can be decoded in train/ or in val/")
        write_sealed(place / "skipped.json", sorted(broken))
    return shards, read_sealed(place / "skipped.json", anew)


def _decode_missing(shards, source, plan, workers):
    """Decode the shards (file -> its images) that are not whole. Returns {path: error} of the broken images."""
    size, broken = 3 * plan["size"] ** 2, {}
    whole = lambda file, rows: file.exists() and file.stat().st_size == len(rows) * size
    missing = {file: rows for file, rows in shards.items() if not whole(file, rows)}
    total, left = (sum(map(len, some.values())) for some in (shards, missing))
    first, largest = next(iter(shards.items()))
    needed, free = (left + len(largest)) * size, shutil.disk_usage(first.parent).free
    if left and needed > free:
        room = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise UserError(f"{first.parents[1]} {room}: make room, or set SILALIB_DATA to a folder on a larger disk")
    with (
        tqdm(total=total, initial=total - left, unit=" images", disable=None) as bar,
        warnings.catch_warnings(action="ignore"),
        interruptible() as stopped,
        ThreadPoolExecutor(workers or cpu_cores()) as pool,  # Pillow decodes without Python's lock
    ):
        futures = {pool.submit(_decode_shard, *shard, source, plan): len(shard[1]) for shard in missing.items()}
        for future, n in finished(futures, stopped):
            broken |= future.result()
            bar.update(n)
            left -= n
    if left:
        raise Stopped(f"stopped with {left} of {total} images left; start again to go on")
    return broken


def _decode_shard(shard, rows, source, plan):
    pixels, broken = [], {}
    for path, _ in rows:
        try:
            pixels.append(decode(source / path, plan["size"], plan["square"]).tobytes())
        except Exception as error:  # Pillow raises many kinds for a damaged file
            broken[path] = (str(error) or repr(error)).splitlines()[0]
    write_atomically(shard, b"".join(pixels))
    return broken


def _finish(folder, names, plan, shards, skipped):
    """Copy the shards to their places in the arrays, write labels and checksums, and last the description."""
    gone, image, counts = set(skipped), (plan["size"], plan["size"], 3), {}
    for split, files in shards.items():
        kept = {file: [label for path, label in rows if path not in gone] for file, rows in files.items()}
        labels, array = np.concatenate(list(kept.values())).astype(np.int64), folder / f"{split}.npy"
        mode = "w+" if next(iter(kept)).exists() else "r+"  # the first is removed when the array is begun
        offset = np.lib.format.open_memmap(array, mode, np.uint8, (len(labels), *image)).offset
        with open(array, "r+b") as file:  # not through the memory map, where a full disk kills the process
            for shard, own in kept.items():
                size = len(own) * math.prod(image)
                if shard.exists():
                    if shard.stat().st_size != size:
                        raise CorruptFile(shard, f"delete {folder} to start anew")
                    file.seek(offset)
                    file.write(shard.read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                    shard.unlink()
                offset += size
        np.save(content := io.BytesIO(), labels)
        write_atomically(folder / f"{split}_labels.npy", content.getvalue())
        counts[split] = len(labels)
    made = {"skipped": skipped, "plan": plan, "decoder": f"Pillow {PIL.__version__}", "files": checksums(folder)}
    write_sealed(folder / "dataset.json", names | {"image": [3, *image[:2]]} | counts | made)
