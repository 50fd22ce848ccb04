"""Errors that a user can cause: one line that says what to do, in a terminal and in a notebook, never a traceback."""

from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend; the message is one line."""

    def _render_traceback_(self):  # the name IPython looks for
        return [f"{type(self).__name__}: {self}"]


class MissingData(UserError):
    """A data set is not on this machine and cannot be downloaded."""


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
