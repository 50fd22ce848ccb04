"""A data set that was prepared: dataset.json and four arrays, verified before they are used."""

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import CorruptFile, MissingData, UserError
from ..files import fits, is_number, is_text, read_sealed, to_json, write_atomically

FILES = ("train.npy", "train_labels.npy", "test.npy", "test_labels.npy")
VERIFIED = ".verified.json"
AGAIN = "prepare it again (python -m silalib data ... --from DIR)"
FORM = {"classes": [lambda name: isinstance(name, str)], "image": [is_number], "train": is_number, "test": is_number}
FORM |= {"files": dict.fromkeys(FILES, is_text), ...: lambda value: True}


def describe(folder):
    """The content of dataset.json: title, classes (their names), image shape, numbers of images, checksums.
    Raises MissingData where the folder is missing or not complete, CorruptFile where the file is damaged."""
    if not (folder / "dataset.json").exists():
        how = f"python -m silalib data {folder.name} --from DIR makes it of the images below DIR, see data/README.md"
        raise MissingData(f"{folder} is not prepared: {how}")
    if not fits(found := read_sealed(folder / "dataset.json", AGAIN), FORM):
        raise CorruptFile(folder / "dataset.json", AGAIN)
    return found


def open_arrays(folder):
    """The four arrays in the order of FILES, the images memory-mapped, and the checksum of their verified content."""
    description = describe(folder)
    if not (folder / VERIFIED).exists() or (folder / VERIFIED).read_bytes() != to_json(stamp(folder)):
        verify(folder)
    arrays = []
    for name in FILES:
        try:
            arrays.append(np.load(folder / name, mmap_mode=None if "labels" in name else "r"))
        except (OSError, ValueError, EOFError):
            raise CorruptFile(folder / name, AGAIN) from None
    largest = len(description["classes"]) - 1
    if any(len(labels) and not 0 <= labels.min() <= labels.max() <= largest for labels in arrays[1::2]):
        raise UserError(f"{folder} has labels outside of 0 to {largest}: prepare it again")
    return arrays, content_checksum(description)


def stamp(folder):
    try:
        found = [(folder / name).stat() for name in FILES]
    except OSError as error:
        raise CorruptFile(Path(error.filename), AGAIN) from None
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in zip(FILES, found)}


def content_checksum(description):
    """One sha256 for the four files: of the lines that sha256sum prints for them."""
    lines = "".join(f"{description['files'][name]}  {name}\n" for name in FILES)
    return hashlib.sha256(lines.encode()).hexdigest()


def checksums(folder):
    found = {}
    for name in tqdm(FILES, desc="checksums", unit=" files", disable=None, leave=False):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def verify(folder):
    """Read everything and compare it with the stored checksums. Raises CorruptFile where they differ."""
    description, verified = describe(folder), stamp(folder)
    for name, found in checksums(folder).items():
        if description["files"][name] != found:
            raise CorruptFile(folder / name, AGAIN)
    with suppress(OSError, UserError):  # a folder of someone else is verified each time
        write_atomically(folder / VERIFIED, to_json(verified))
