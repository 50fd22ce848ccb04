"""Records as a stranger may send them: mutated in types, lengths, names, depth, numbers, links and sizes."""

import hashlib
import io
import json
import os
import shutil
import zipfile
from contextlib import suppress
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from nbformat import v4

from silalib.training import checkpoint

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](http://example.org/x.png) https://example.org",
    "\x1b[2J\x1b]0;title\x07\r\n\u202e",
    "$$\\nosuch{x}$$ `x` **x** | x",
    "${jndi} {{ 7 * 7 }} {% raw %}",
)
DEEP = "DEEP"
"""Stands for lists in lists, 100,000 deep, which Python's own writer refuses."""
VALUES = [None, True, False, -1, 0, 1e300, 10**400, float("inf"), float("-inf"), float("nan"), "", "x", "x" * 10**5]
VALUES += [[], {}, [None] * 1000, [[1, 2], [3]], {"a": {"b": {"c": 1}}}, DEEP, *HOSTILE, "../../../victim/thesis.tex"]


def forged(folder, source, run):
    """The record in the folder `source` as that of another run, whole."""
    shutil.copytree(source, folder)
    identity = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(json.dumps(identity | {"config": run.config}))
    seal(folder, json.loads((folder / "result.json").read_bytes()), ["run.json"])


def seal(folder, result, changed=()):
    """Write result.json with the checksums of the changed files, and its own."""
    if isinstance(result, dict) and isinstance(result.get("files"), dict):
        for name in changed:
            if readable(folder / name):
                result["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    content = dumped(result)
    if any(path.exists() and not path.is_file() for path in (folder / "result.json", folder / "result.sha256")):
        return  # a pipe would wait for its reader
    (folder / "result.json").write_bytes(content)
    (folder / "result.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  result.json\n")


def dumped(value):
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5).encode()


def mutate(folder, victim, chance):
    """Change one thing of the record in a folder, or several; `victim` is a folder outside, to which links lead."""
    kinds = (json_value, json_value, json_value, table, arrays, kind_of_file, names, identity, failed, linked)
    for _ in range(chance.choice((1, 1, 1, 3))):
        with suppress(OSError, IndexError):  # what an earlier change has left may not allow this one
            chance.choice(kinds)(folder, victim, chance)


def nodes(value, found=None):
    """Every (container, key) in a JSON value."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def changed(value, chance):
    """A JSON value with one node replaced, removed, added or renamed."""
    places = nodes(value)
    if not places or chance.random() < 0.03:
        return chance.choice(VALUES)
    container, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.7:
        container[key] = chance.choice(VALUES)
    elif kind < 0.8:
        del container[key]
    elif isinstance(container, dict):
        container[chance.choice(["run", "seed", "top1", "ece", "kind", "x" * 5000, *HOSTILE])] = (
            container.pop(key) if kind < 0.9 else chance.choice(VALUES)
        )
    else:
        container += container * chance.choice((1, 5, 500))
    return value


def readable(path):
    """Whether a path leads to a file, and not to one of the sparse ones of 10^12 bytes."""
    return path.is_file() and path.stat().st_size < 10**8


def load(folder, name="result.json"):
    """A JSON file, {} where it is no more."""
    try:
        return json.loads((folder / name).read_bytes()) if readable(folder / name) else {}
    except (ValueError, RecursionError):
        return {}


def json_value(folder, victim, chance):
    if not (folder / "result.json").is_symlink():
        seal(folder, changed(load(folder), chance))


def names(folder, victim, chance):
    result = load(folder)
    if isinstance(result, dict) and isinstance(result.get("files"), dict) and not (folder / "result.json").is_symlink():
        name = chance.choice(
            (str(victim / "thesis.tex"), "../../../../victim/thesis.tex", "", ".", "..", "x.exe", "\0")
        )
        result["files"][name] = "0" * 64
        if chance.random() < 0.5:
            result["files"].pop(chance.choice(list(result["files"])))
        seal(folder, result)


def write(folder, name, content):
    """Write a file of the record and the checksums; what is no plain file stays."""
    if (folder / name).is_symlink() or not (folder / name).is_file() or (folder / "result.json").is_symlink():
        return
    (folder / name).write_bytes(content)
    seal(folder, load(folder), [name])


def table(folder, victim, chance):
    name = chance.choice(("history.csv", "noise.csv"))
    if not readable(folder / name) or (folder / name).read_bytes().partition(b"\n")[0].count(b",") > 100:
        return  # 10**5 columns, from an earlier mutation, would take gigabytes here
    try:
        frame = pd.read_csv(folder / name, low_memory=False)
    except ValueError:
        return
    if not len(frame):
        return
    column, cell = chance.choice(list(frame)), chance.choice(("inf", "nan", "", "1e400", "x", "-1", *HOSTILE))
    kind = chance.randrange(8)
    if kind == 0:
        frame = frame.drop(columns=column)
    elif kind == 1:
        frame = frame.rename(columns={column: cell})
    elif kind == 2:
        frame = frame.astype(object)
        frame.loc[chance.randrange(len(frame)), column] = cell
    elif kind == 3:
        frame = frame.iloc[: chance.randrange(len(frame))]
    elif kind == 4:
        frame = pd.concat([frame, frame])
    elif kind == 5:
        frame = frame.sample(frac=1, random_state=chance.randrange(99))
    content = frame.to_csv(index=False).encode()
    if kind == 6:
        content = b",".join([b"a"] * 10**5) + b"\n" + content
    elif kind == 7:
        content = chance.randbytes(1000) + content
    write(folder, name, content)


def arrays(folder, victim, chance):
    name = chance.choice(("test.npz", "features.npz"))
    if not readable(folder / name):  # a pipe would wait for its writer
        return
    try:
        with np.load(folder / name) as found:
            found = {key: found[key] for key in found.files}
    except Exception:
        return
    key, kind = chance.choice(list(found)), chance.randrange(11)
    if kind == 0:
        del found[key]
    elif kind == 1:
        found[key] = found[key][: chance.randrange(len(found[key]))]
    elif kind == 2:
        found[key] = found[key][None]
    elif kind == 3:
        found[key] = found[key].astype(chance.choice(("U5", "complex64", "S3", "datetime64[s]")))
    elif kind == 4:
        found[key] = np.array([{}], dtype=object)
    elif kind == 5:
        found[chance.choice(("confidence_9", "x", "../../victim/x", "run"))] = found[key]
    elif kind == 6:
        found[key] = np.array(0.5)
    elif kind == 7:
        found = {}
    elif kind == 8:
        found = {key: value[:0] for key, value in found.items()}
    np.savez_compressed(buffer := io.BytesIO(), **found)
    if kind == 9:  # a header that promises more than any memory holds
        with zipfile.ZipFile(buffer, "a") as archive:
            head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
            archive.writestr("s_9.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    elif kind == 10:
        buffer = io.BytesIO(chance.randbytes(1000))
    write(folder, name, buffer.getvalue())


def kind_of_file(folder, victim, chance):
    found = sorted(path.name for path in folder.iterdir()) if not folder.is_symlink() else []
    if not found:
        return
    path, kind = folder / chance.choice(found), chance.randrange(8)
    if path.is_dir() and not path.is_symlink():
        return
    content = path.read_bytes() if readable(path) and not path.is_symlink() else b""
    path.unlink()
    if kind == 0:
        path.symlink_to(victim / "thesis.tex")
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.symlink_to(folder / "nowhere")
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.mkdir()
        (path / "x").touch()
    elif kind == 5:
        with open(path, "wb") as file:
            file.truncate(10**12)
    elif kind == 6:
        path.write_bytes(content[: len(content) // 2])
    if chance.random() < 0.3:
        lock = folder / chance.choice((".lock", "failed.json", f".history.csv.{os.getpid()}.tmp", "checkpoint.pt"))
        if not lock.exists() and not lock.is_symlink():
            lock.symlink_to(victim / "thesis.tex")


def identity(folder, victim, chance):
    if not (folder / "run.json").is_symlink() and (folder / "run.json").is_file():
        write(folder, "run.json", dumped(changed(load(folder, "run.json"), chance)))


def failed(folder, victim, chance):
    """No record, but why there is none, and maybe a checkpoint of values that no training has."""
    path = folder / "result.json"
    if path.is_file() or path.is_symlink():
        path.unlink()
    found = {"error": chance.choice(HOSTILE), "epoch": 1, "step": 2, "lr": 0.1, "traceback": HOSTILE[0]}
    if not (folder / "failed.json").exists() and not (folder / "failed.json").is_symlink():
        (folder / "failed.json").write_bytes(dumped(changed(found, chance) if chance.random() < 0.8 else found))
    if (
        not (folder / "checkpoint.pt").exists()
        and chance.random() < 0.5
        and not (folder / "checkpoint.pt").is_symlink()
    ):
        state = {
            "format": 2,
            "parts": chance.choice(([], {}, [{"device": 1}], [{"device": "x)", "precision": 3}], "x")),
        }
        (folder / "checkpoint.pt").write_bytes(checkpoint.checkpoint_bytes(state))


def linked(folder, victim, chance):
    """The record lies elsewhere, whole, and a link leads there."""
    if not folder.is_symlink() and not (victim / folder.name).exists():
        shutil.move(folder, victim / folder.name)
        folder.symlink_to(victim / folder.name)


def reset(folder, victim):
    """No records, and a victim as it is at first."""
    for path in (folder, victim):
        shutil.rmtree(path, ignore_errors=True)
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")


class Alive(HTMLParser):
    """What in a page is not text any more: tags that run or fetch, handlers, links to elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = [value or "" for name, value in attributes if name in ("href", "src", "content", "style")]
        run = tag in ("script", "iframe", "object", "embed", "base", "form") or any(
            n[:2] == "on" for n, _ in attributes
        )
        fetched = any("example.org" in value or "javascript:" in value for value in values if "{" not in value[:1])
        if run or fetched or ("src", "x") in attributes:
            self.found.append((tag, attributes))


EMPTY = v4.new_notebook(cells=[v4.new_markdown_cell("# Tiny")])
