"""Make the report: execute the notebooks whose inputs have changed, beside the training and after it."""

import threading
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain

from .. import data, files, records
from ..errors import NoRoom, Stopped, UserError
from ..experiments import EXHIBITS
from .notebooks import CONTENTS, FOLDER, execute_all, first_line, say
from .pages import Report, read_card

LIBRARIES = ("torch", "numpy", "pandas", "scipy", "matplotlib", "nbconvert", "papermill", "latex2mathml")


def build(
    profile, stems=None, seeds=None, device="auto", workers=None, train=True, folder=FOLDER, exhibits=EXHIBITS,
    stopped=None,
):  # fmt: skip
    """Execute the notebooks of these stems, by default all, and render their pages and the index. A page stays as it is
    where its notebook, records, code, libraries and parameters are those it was made of. Returns the exit status: 0, or
    1 if a page failed; such a page then says so. Raises Stopped after a signal, or once the event `stopped` is set; the
    pages that were not finished stay as they were. folder: of the notebooks; what is before it are their parameters."""
    report = Report(profile, seeds, folder, exhibits)
    executed = report.folder.with_name("notebooks")
    made_of = {stem: inputs(report, stem, train) for stem in stems or report.notebooks}
    card = lambda stem: read_card(report.folder / f"{stem}.html") if (executed / f"{stem}.ipynb").exists() else {}
    changed = [stem for stem in made_of if card(stem).get("inputs") != made_of[stem]]
    if changed:
        if not all((report.folder / f"{stem}.html").exists() for stem in report.notebooks):
            report.write_index()
        executed.mkdir(exist_ok=True)
    if len(changed) < len(made_of):
        say(f"{len(made_of) - len(changed)} of {len(made_of)} pages are as their records and code are: kept")
    parameters = dict(profile=profile, seeds=seeds, device=device, workers=workers, train=train)
    failed = 0
    try:
        for stem, future in execute_all([folder / f"{stem}.ipynb" for stem in changed], parameters, stopped):
            try:
                notebook = future.result()
                page = report.notebook_page(stem, notebook, made_of[stem])
                files.write_atomically(executed / f"{stem}.ipynb", files.to_json(notebook))
            except Exception as error:  # whatever it is, the other pages are built, if there is room for them
                if isinstance(error, NoRoom) or getattr(error, "errno", None) in files.FULL:
                    raise error if isinstance(error, NoRoom) else files.unwritable(report.folder, error) from None
                line = str(error) if isinstance(error, UserError) else first_line(type(error).__name__, error)
                page = report.page(stem, "failed", error=line, traceback=getattr(error, "traceback", ()))
                (executed / f"{stem}.ipynb").unlink(missing_ok=True)
                say(f"{stem}: failed", f"  {line}")
                failed += 1
            files.write_atomically(report.folder / f"{stem}.html", page.encode())
    finally:
        report.write_index()
    return 1 if failed else 0


def inputs(report, stem, train=False):
    """A checksum of what a page is made of."""
    runs, notebook = runs_of(report, stem), report.source / f"{stem}.ipynb"
    here = [(name, data.is_available(name)) for name in sorted({run.dataset for run in runs})]
    content = [repr([report.seeds, train, here, [version(name) for name in LIBRARIES]]).encode()]
    for path in [notebook, *sorted(files.PACKAGE.rglob("*"))]:
        if path.is_file() and path.suffix != ".pyc":
            content.append(f"{path.name}\0".encode() + path.read_bytes())
    for path in sorted(path for run in runs for folder in records.folders(run) for path in folder.glob("*.*")):
        if path.suffix not in (".pt", ".tmp"):
            content.append(f"{path.parent.name} {path.name} {path.stat().st_size}\0".encode())
        if path.name in ("result.sha256", "failed.json"):
            content.append(path.read_bytes())
    return files.sha256(b"".join(content))


def runs_of(report, stem):
    """The runs that a page rests on: those of its exhibits, or all."""
    every = CONTENTS["pages"].get(stem, {}).get("every_run")
    names = report.exhibits if every else report.notebooks[stem][1]
    return list(dict.fromkeys(chain(*(report.exhibits[name].grid(report.profile, report.seeds) for name in names))))


@contextmanager
def beside_training(report, stems, build=build):
    """Meanwhile pages are made as their runs end; the one under way when training stops is given up."""
    ended, stopped = threading.Event(), threading.Event()
    waiting = {stem: runs_of(report, stem) for stem in stems}
    has_ended = lambda run: records.find(run, report.profile) or records.failure(run, report.profile)

    def work():
        while waiting and not ended.wait(1):
            ready = [stem for stem, runs in waiting.items() if all(map(has_ended, runs))]
            try:
                if ready:
                    build(report.profile, ready, report.seeds, train=False, stopped=stopped)
            except Stopped:
                return
            except UserError as error:
                say(f"{', '.join(ready)}: {error}")
            for stem in ready:
                del waiting[stem]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        ended.set()
        thread.join()
