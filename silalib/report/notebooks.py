"""Execute the notebooks, each in a kernel of its own."""

import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress

from ..errors import Stopped, UserError
from ..files import ROOT
from ..launch import processes
from ..launch.progress import duration

FOLDER = ROOT / "notebooks"

AT_ONCE = 2  # notebooks


def contents(exhibits):
    """Notebook -> (title, names of the exhibits whose runs it shows), in the order of the pages."""
    found = {
        "00_siamese_labels": ("The method", [name for name in ("fig3",) if name in exhibits]),
        "09_claims": ("Which claims hold?", []),
    }
    if "fig7" in exhibits:  # its runs are on two more pages
        found |= {"11_coupling": ("The coupling, and ensembles", ["fig7"]), "12_calibration": ("Calibration", ["fig7"])}
    if "regime" in exhibits:
        found["13_regime_choices"] = ("The regime, and the silent choices", [])
        found["14_your_own_network"] = ("Your own network, a demonstration", [])
    for name, exhibit in exhibits.items():
        if exhibit.notebook:
            found.setdefault(exhibit.notebook, (exhibit.title, []))[1].append(name)
    return dict(sorted(found.items()))


class PageFailed(UserError):
    """A notebook or its page failed; the message is one line, `traceback` Python's account of it."""

    def __init__(self, line, traceback=()):
        super().__init__(line)
        self.traceback = list(traceback)


def say(text):
    sys.stderr.write(f"{text}\n")  # in one piece, as several threads speak


def execute_all(paths, parameters):
    """Yield (stem, future of the executed notebook) as they finish, AT_ONCE at a time. Raises Stopped after a signal.

    The kernels are then interrupted, which lets training write its checkpoints, and killed after ten seconds.
    """
    import papermill  # noqa: F401  once here, before two threads want it

    kernels = {}
    with processes.interruptible() as stopped, ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(execute, path, parameters, kernels): path.stem for path in paths}
        try:
            while futures and not stopped.is_set():
                for future in wait(futures, 0.3, FIRST_COMPLETED).done:
                    if not stopped.is_set():  # else it may have ended because of the signal
                        yield futures.pop(future), future
        finally:
            for future in futures:
                future.cancel()
            for number in (signal.SIGINT, signal.SIGKILL) if futures else ():
                for process in list(kernels.values()):
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
                wait(futures, 10)
    if futures:
        raise Stopped(f"the report stopped with {len(futures)} of {len(paths)} pages left; start again to go on")


def execute(path, parameters, kernels):
    """The executed notebook; meanwhile kernels[stem] is its kernel's process. Raises as `run_notebook` does."""
    began = time.monotonic()
    say(f"{path.stem}: started")
    try:
        return run_notebook(path, parameters, kernels)
    finally:
        kernels.pop(path.stem, None)
        say(f"{path.stem}: ended after {duration(time.monotonic() - began)}")


def run_notebook(path, parameters, kernels):
    """The executed notebook. Raises UserError for a missing file or parameter, PageFailed where a cell failed."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import ensure_event_loop
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        """This Python, whatever kernels are installed, with this silalib; in the project's folder; without bars."""

        async def start_kernel(self, **options):
            self.kernel_spec.argv[0] = sys.executable
            search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": search, "TQDM_DISABLE": "1"}
            await super().start_kernel(**options, cwd=str(ROOT), env=environment)
            kernels[path.stem] = self.provisioner.pid

    if not path.exists():
        raise UserError(f"{path} is missing")
    if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(path))):
        raise UserError(f"{path.name} does not set {', '.join(unknown)} in a cell tagged 'parameters'")
    try:
        notebook = papermill.execute_notebook(
            path,
            None,  # written when it is complete
            parameters,
            kernel_name="python3",
            kernel_manager_class=Kernel,
            extra_arguments=["--log-level=40"],
            shutdown_kernel="immediate",
            coalesce_streams=True,
            progress_bar=False,
            stderr_file=sys.stderr,  # training and warnings are for the terminal, not for the page
        )
    except PapermillExecutionError as error:
        raise PageFailed(first_line(error.ename, error.evalue), error.traceback) from None
    finally:
        ensure_event_loop().close()  # which the kernel's client has made for this thread
    check_complete(notebook)
    return notebook


def check_complete(notebook):
    """Raise PageFailed unless every code cell ran to its end: to papermill, sys.exit(0) in a cell is a success."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for output in [output for cell in code for output in cell.outputs if output.output_type == "error"]:
        line = first_line(output.ename, output.evalue)
        raise PageFailed(f"a cell ended the notebook early ({line.rstrip(': ')})", output.traceback)
    if left := sum(cell.execution_count is None for cell in code):
        raise PageFailed(f"{left} of {len(code)} code cells were not executed")


def first_line(name, message):
    return f"{name}: {message}".strip().splitlines()[0]
