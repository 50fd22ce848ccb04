"""Errors that a user can cause: one line that says what to do, in a terminal and in a notebook, never a traceback."""


class UserError(Exception):
    """Something the user can mend; the message is one line."""

    def _render_traceback_(self):  # the name IPython looks for
        return [f"{type(self).__name__}: {self}"]


class MissingData(UserError):
    """A data set is not on this machine and cannot be fetched."""


class Stopped(UserError):
    """Training was stopped by a signal or a budget, with everything unfinished checkpointed."""
