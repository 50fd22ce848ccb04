"""Execute the notebooks, each in a kernel of its own."""

import os
import signal
import sys
import tempfile
import time
import tomllib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress

from ..data import data_folder
from ..errors import NoRoom, Stopped, UserError, printable
from ..files import NOTEBOOKS, PACKAGE, ROOT, results_folder
from ..launch import processes
from ..launch.progress import duration

FOLDER = NOTEBOOKS
CONTENTS = tomllib.loads((PACKAGE / "report" / "contents.toml").read_text(encoding="utf-8"))
AT_ONCE = 2  # notebooks


def contents(exhibits):
    """Notebook -> (title, names of the exhibits whose runs it shows), in the order of the pages."""
    found = {
        stem: (page["title"], [name for name in page["shows"] if name in exhibits])
        for stem, page in CONTENTS["pages"].items()
        if page["needs"] in ("", *exhibits)
    }
    for name, exhibit in exhibits.items():
        if exhibit.notebook:
            found.setdefault(exhibit.notebook, (exhibit.title, []))[1].append(name)
    return dict(sorted(found.items()))


class PageFailed(UserError):
    """A notebook or its page failed; the message is one line, `traceback` Python's account of it."""

    def __init__(self, line, traceback=()):
        super().__init__(line)
        self.traceback = list(traceback)


def say(*lines):
    sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))  # in one piece, as several threads speak


def execute_all(paths, parameters, stopped=None):
    """Yield (stem, future of the executed notebook) as they finish, AT_ONCE at a time. Raises Stopped after a signal,
    or once the event `stopped` is set; the kernels are then interrupted, and killed after ten seconds."""
    if not paths:
        return
    import papermill  # noqa: F401  once here, before two threads want it

    kernels = {}
    with (
        tempfile.TemporaryDirectory(prefix="silalib-") as private,
        nullcontext(stopped) if stopped else processes.interruptible() as stopped,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        futures = {pool.submit(execute, path, parameters, kernels, private): path.stem for path in paths}
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


def kernel_environment(private):
    """The environment of a kernel, in which nothing of the user's own Python, IPython or matplotlib changes a page.
    private: an empty folder in the place of their settings. Folders are absolute, as a kernel starts in the
    project's."""
    foreign = ("PYTHON", "IPYTHON", "JUPYTER", "MPL", "MATPLOTLIB")
    search = map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    found = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    found |= dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"), private)
    found |= {"SILALIB_RESULTS": str(results_folder("").absolute()), "SILALIB_DATA": str(data_folder().absolute())}
    found |= {"OMP_NUM_THREADS": found.get("OMP_NUM_THREADS") or str(processes.cpu_cores()), "TQDM_DISABLE": "1"}
    search = os.pathsep.join([str(PACKAGE.parent), *search])
    return found | {"PYTHONPATH": search, "PYTHONUTF8": "1", "MPLBACKEND": "agg"}


def execute(path, parameters, kernels, private):
    """The executed notebook; meanwhile kernels[stem] is its kernel's process. Raises UserError for a missing file or
    parameter, PageFailed where a cell failed."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_core.utils import ensure_event_loop
    from papermill.exceptions import PapermillExecutionError

    class Kernel(AsyncKernelManager):
        """This Python, whatever kernels are installed, with this silalib; in the project's folder; without bars."""

        kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

        async def start_kernel(self, **options):
            self.connection_file = os.path.join(private, f"{path.stem}.json")
            await super().start_kernel(**options, cwd=str(ROOT), env=kernel_environment(private))
            kernels[path.stem] = self.provisioner.pid

    began, options = time.monotonic(), dict(kernel_name="python3", kernel_manager_class=Kernel, progress_bar=False)
    options |= dict(shutdown_kernel="immediate", coalesce_streams=True, extra_arguments=["--log-level=40"])
    options |= dict(stderr_file=sys.stderr)  # training and warnings are for the terminal, not for the page
    say(f"{path.stem}: started")
    try:
        if not path.exists():
            raise UserError(f"{path} is missing")
        if unknown := sorted(set(parameters) - set(papermill.inspect_notebook(path))):
            raise UserError(f"{path.name} does not set {', '.join(unknown)} in a cell tagged 'parameters'")
        notebook = papermill.execute_notebook(path, None, parameters, **options)  # written when it is complete
    except PapermillExecutionError as error:
        if error.ename == NoRoom.__name__:
            raise NoRoom(error.evalue) from None
        raise PageFailed(first_line(error.ename, error.evalue), error.traceback) from None
    finally:
        ensure_event_loop().close()  # which the kernel's client has made for this thread
        kernels.pop(path.stem, None)
        say(f"{path.stem}: ended after {duration(time.monotonic() - began)}")
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
