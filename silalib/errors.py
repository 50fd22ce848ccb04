"""Errors that a user can cause: one line that says what to do, in a terminal and in a notebook, never a traceback."""

from contextlib import contextmanager
from pathlib import Path

from . import __version__

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"  # which a wheel has not
REPORT = "IPython", "jinja2", "jupyter_client", "jupyter_core", "latex2mathml", "matplotlib", "nbconvert", "papermill"


def printable(text):
    """Text of whatever origin in one line: what would move the cursor, change colours or turn the line is spelled."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class UserError(Exception):
    """Something the user can mend; the message is one line."""

    def __str__(self):
        return printable(super().__str__())

    def _render_traceback_(self):  # the name IPython looks for
        return [f"{type(self).__name__}: {self}"]


class MissingData(UserError):
    """A data set is not on this machine and cannot be downloaded."""


class MissingExtra(UserError, ImportError):
    """A package is not installed that one of silalib's extras brings."""


def missing_extra(error):
    """The `MissingExtra` to raise for a ModuleNotFoundError; one for a module of silalib's own is raised as it is."""
    name = (error.name or "silalib").partition(".")[0]
    if name == "silalib":
        raise error
    extra = "cluster" if name == "ray" else "report" if name in REPORT else "train"
    mend = f"pip install 'silalib-{__version__}-py3-none-any.whl[{extra}]', with the path of that wheel"
    if CONSTRAINTS.exists():
        mend = f"in the checkout, pip install -c constraints.txt -e '.[{extra}]'"
    return MissingExtra(f"{name} is not installed: {mend}")


class CorruptFile(UserError):
    """A file is missing or is not what was written; what: how to mend that."""

    def __init__(self, path, what=None):
        super().__init__(f"{path} is {'damaged' if path.exists() else 'missing'}: {what}" if what else path)
        self.path = path  # without `what` it is being unpickled: the message, and then the path


class NoRoom(UserError):
    """Nothing can be written where the results are."""


class NoDevice(UserError):
    """The device is there and cannot be used."""


class ProcessSpoilt(UserError):
    """The GPU is of no more use to this process, which must train nothing more."""


class GraphFailed(ProcessSpoilt):
    """A CUDA graph could not be captured: the process may be left in capture mode."""


class Stopped(UserError):
    """Training was stopped by a signal or a budget, with everything unfinished checkpointed."""


@contextmanager
def told(what):
    """Turn an error in the caller's own code into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
