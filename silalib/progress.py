"""Progress of a grid of runs: a bar in a terminal or notebook, plain lines in a log file."""

import os
import sys
import time

HEARTBEAT_SECONDS = 30
"""How often a log file hears of runs that have not ended."""


def duration(seconds):
    """12 s, 3 min 05 s, 2 h 07 min, 5 days, 4 years."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    if seconds < 2 * 365 * 86400:
        return f"{round(seconds / 86400)} days"
    return f"{round(seconds / 365 / 86400)} years"


def in_notebook():
    """Whether this is a Jupyter kernel."""
    return "ipykernel" in sys.modules and hasattr(sys.modules["ipykernel"], "kernelapp")


class Progress:
    """Follows runs weighted by their cost, so that the time left is an estimate and not a count of runs.

    costs: dict run -> relative cost. Messages are those of `trainer.train`.
    """

    def __init__(self, costs):
        self.costs = costs
        self.share = dict.fromkeys(costs, 0.0)  # of each run, from 0 to 1
        self.at_start = {}  # of a resumed run, its share when it came back
        self.accuracy = {}  # of each run, after its last epoch
        self.started = time.monotonic()
        self.last_line = self.started
        self.ended = 0
        self.bar = None
        if (in_notebook() or sys.stderr.isatty()) and not os.environ.get("TQDM_DISABLE"):
            from tqdm.auto import tqdm

            bar = "{bar}" if in_notebook() else "{bar:10}"  # a terminal's would shrink to nothing beside the text
            self.bar = tqdm(total=100, bar_format=f"{{percentage:3.0f}}%|{bar}| {{elapsed}}{{postfix}}", leave=False)

    def message(self, run, text=None, step=0, total=1, top1=None, resumed=False, final=None):
        """One message of a run in progress."""
        if text:
            self.line(f"{run}: {text}")
            return
        # the last steps, after training, are counted as the last hundredth
        self.share[run] = 0.99 * step / total
        if resumed:
            self.at_start[run] = self.share[run]
            self.line(f"{run}: goes on after epoch {run.epochs * step / total:.1f} of {run.epochs}")
        if top1:
            self.accuracy[run] = f", top-1 {numbers(top1)}"
        doing = final or f"epoch {run.epochs * step / total:.1f} of {run.epochs}{self.accuracy.get(run, '')}"
        status = f"{self.ended}/{len(self.costs)} runs, {self.left()}{doing} | {run}"  # a terminal cuts off its end
        if self.bar is not None:
            self.bar.n = 100 * self.done()
            self.bar.set_postfix_str(status)
        elif time.monotonic() - self.last_line > HEARTBEAT_SECONDS:
            self.line(status)

    def finish(self, run, outcome):
        """A run has ended: `outcome` is its accuracy, or why there is none."""
        self.share[run] = 1.0
        self.ended += 1
        left = self.left() if self.bar is None else ""  # which the bar shows, and a line should fit a terminal
        self.line(f"{self.ended}/{len(self.costs)} runs, {left}{run}: {outcome}")

    def done(self):
        return sum(self.share[r] * c for r, c in self.costs.items()) / sum(self.costs.values())

    def left(self):
        """Time left, from what was trained since the start."""
        total = sum(self.costs.values())
        before = sum(self.at_start.get(r, 0) * c for r, c in self.costs.items()) / total
        trained = self.done() - before
        elapsed = time.monotonic() - self.started
        if trained < 0.01 or elapsed < 3:
            return ""
        return f"{duration(elapsed / trained * (1 - self.done()))} left, " if self.done() < 1 else ""

    def line(self, text):
        self.last_line = time.monotonic()
        if self.bar is not None:
            self.bar.write(text, file=None if in_notebook() else sys.stderr)  # where a notebook shows it as an error
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def numbers(values):
    return " ".join(f"{v:.1f}" for v in values)
