"""Files: the project's folders, atomic writes, checksums, quarantine."""

import errno
import hashlib
import io
import json
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import CorruptFile, NoRoom, UserError

PACKAGE = Path(__file__).resolve().parent
_in_checkout = (PACKAGE.parent / "pyproject.toml").exists()
ROOT = PACKAGE.parent if _in_checkout else Path.cwd()
NOTEBOOKS = (ROOT if _in_checkout else PACKAGE) / "notebooks"
EVIDENCE = PACKAGE / "evidence"
"""What a wheel brings of results/: records without what is measured on each image. A checkout has the folder itself."""
LARGEST = {".sha256": 2**12, ".json": 2**27, ".csv": 2**26, ".npz": 2**30}  # bytes, of archives unpacked too
FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EROFS, errno.EACCES, errno.EPERM)


def results_folder(profile):
    """results/<profile>, or <profile> in the folder of the environment variable SILALIB_RESULTS."""
    return Path(os.environ.get("SILALIB_RESULTS") or ROOT / "results") / profile


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def read_bytes(path, what):
    """A file's bytes. Raises CorruptFile where it is missing, a link, no plain file, larger than its kind can be, or
    where the disk cannot read it, and says what to do."""
    plain = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        with open(path, "rb", opener=plain) as file:  # which closes what turns out to be a folder
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST.get(path.suffix, 2**34):
                return file.read()
    except PermissionError:
        raise UserError(f"cannot read {path}: permission denied") from None
    except OSError:
        pass
    raise CorruptFile(path, what)


def write_atomically(path, content, previous=None):
    """Write bytes under a temporary name, flush them to disk, rename: the file is whole or not there.
    previous: the new name of a file that is there already. Raises NoRoom where nothing can be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never through a link of this name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # without it a power cut can undo the renaming
        os.close(folder)
    except OSError as error:
        if error.errno not in (*FULL, *FORBIDDEN):
            raise
        raise unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path, error):
    """The UserError for an OSError in writing: what failed, and how its cause is mended."""
    reason, number = getattr(error, "strerror", None) or error, getattr(error, "errno", errno.ENOSYS)
    if number in FULL:
        return NoRoom(f"cannot write {path} ({reason}): make room and start again to go on; what was there is kept")
    how = f"set {'SILALIB_RESULTS' if path.is_relative_to(results_folder('')) else 'SILALIB_DATA'} to a folder"
    if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return UserError(f"the file system of {path} has no locks ({reason}): {how} on another one")
    return NoRoom(f"cannot write to {path} ({reason}): {how} of yours")


def write_sealed(path, value):
    """Write JSON, and before it its checksum to <name>.sha256, in the form that `sha256sum -c` reads."""
    content = to_json(value)
    write_atomically(path.with_suffix(".sha256"), f"{sha256(content)}  {path.name}\n".encode())
    write_atomically(path, content)


def read_sealed(path, what, required=True):
    """The value that `write_sealed` wrote. Raises CorruptFile for a file that is not what its checksum says.
    required: whether the checksum must be there. It may cover run.json in the same folder too."""
    content, seal = read_bytes(path, what), path.with_suffix(".sha256")
    if required or seal.exists():
        written = read_bytes(seal, what)
        names = [name for name in ("run.json", path.name) if f"  {name}\n".encode() in written]
        expected = [f"{sha256(read_bytes(path.with_name(name), what))}  {name}\n" for name in names]
        if path.name not in names or "".join(expected).encode() != written:
            raise CorruptFile(path if path.name in names else seal, what)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise CorruptFile(path, what) from None


def fits(value, form):
    """Whether a JSON value, a stranger's maybe, has a form: a test of it, [the form of each item], or {key: form}; then
    "key?" may be absent, and `...` stands for every other key."""
    if isinstance(form, list):
        return isinstance(value, list) and len(value) > 0 and all(fits(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return form(value)
    forms = {key if key is ... else key.removesuffix("?"): own for key, own in form.items()}
    needed, others = form.keys() & (forms.keys() - {...}), forms.get(..., lambda value: False)
    whole = isinstance(value, dict) and needed <= value.keys() and all(map(is_text, value))
    return whole and all(fits(own, forms.get(key, others)) for key, own in value.items())


def is_text(value):
    return isinstance(value, str) and len(value) <= 500 and value.isprintable()


def is_number(value, least=-1e15, most=1e15):
    """Whether this is a finite number, and not too large for a figure."""
    return type(value) in (int, float) and least <= value <= most


def quarantine(damaged, mark="result.json"):
    """Rename the file of a CorruptFile, and `mark` beside it, to *.corrupt. Returns what was done, in words."""
    path = damaged.path
    done = f"{path} was damaged and is now {path.name}.corrupt" if path.exists() else f"{path} was missing"
    try:
        for old in filter(Path.exists, {path, path.with_name(mark)}):
            old.replace(f"{old}.corrupt")
    except OSError as error:
        raise UserError(f"cannot rename {path} ({error.strerror}): it is damaged; delete it yourself") from None
    return done


def to_json(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def to_csv(rows):
    """A list of dicts as CSV; columns of all rows, numbers in full precision."""
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n", na_rep="nan").encode()


def from_csv(content):
    """The data frame in CSV. Raises ValueError for more columns than any of ours has, which would take minutes."""
    if content.partition(b"\n")[0].count(b",") > 1000:
        raise ValueError("too many columns")
    return pd.read_csv(io.BytesIO(content), low_memory=False)  # in one piece: pieces of several types warn


def to_npz(arrays):
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def from_npz(content):
    """The arrays in an archive, by name. Raises ValueError where they would be too large unpacked."""
    if sum(part.file_size for part in zipfile.ZipFile(io.BytesIO(content)).infolist()) > LARGEST[".npz"]:
        raise ValueError("too large")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
