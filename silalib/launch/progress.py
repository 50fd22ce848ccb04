"""Progress of a grid of runs: a bar in a terminal or notebook, plain lines in a log file."""

import os
import sys
import time

from ..errors import printable

HEARTBEAT_SECONDS = 5  # how often a log file hears of runs that have not ended


def duration(seconds):
    """12 s, 3 min 05 s, 2 h 07 min, 5 days, over a year."""
    seconds, days = round(seconds), round(seconds / 86400)
    if seconds < 3600:
        return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{days} days" if days <= 365 else "over a year"


def numbers(values):
    return " ".join(f"{v:.1f}" for v in values)


class Progress:
    """Follows runs by the messages of `trainer.train`; costs, run -> relative cost, weigh them in the time left."""

    def __init__(self, costs, clock=time.monotonic):
        from tqdm.auto import tqdm

        self.costs, self.clock, self.started, self.last_line = costs, clock, None, clock()
        self.share, self.at_start = dict.fromkeys(costs, 0.0), {}  # of each run, from 0 to 1; of a resumed one at first
        self.accuracy, self.ended = {}, 0  # of each run after its last epoch; how many have ended
        self.notebook = hasattr(sys.modules.get("ipykernel"), "kernelapp")  # whether this is a Jupyter kernel
        hidden = not (self.notebook or sys.stderr.isatty()) or bool(os.environ.get("TQDM_DISABLE"))
        bar = "{bar}" if self.notebook else "{bar:10}"  # a terminal's would shrink to nothing beside the text
        bar = f"{{percentage:3.0f}}%|{bar}| {{elapsed}}{{postfix}}"
        self.bar = tqdm(total=100, bar_format=bar, leave=False, disable=hidden)

    def message(self, run, text=None, step=0, total=1, top1=None, resumed=False, final=None):
        if text:
            return self.line(f"{run}: {text}")
        self.share[run] = 0.99 * step / total  # what comes after training counts as the last hundredth
        epochs = f"epoch {run.epochs * step / total:.1f} of {run.epochs}"
        if resumed:
            self.at_start[run] = self.share[run]
            self.line(f"{run}: goes on after {epochs}")
        if top1:
            self.accuracy[run] = f", top-1 {numbers(top1)}"
        doing = final or epochs + self.accuracy.get(run, "")
        status = f"{self.ended}/{len(self.costs)} runs, {self.left()}{doing} | {run}"  # a terminal cuts off its end
        if not self.bar.disable:
            self.bar.n = 100 * self.weighted(self.share)
            self.bar.set_postfix_str(status)
        elif self.clock() - self.last_line > HEARTBEAT_SECONDS:
            self.line(status)

    def finish(self, run, outcome):
        """A run has ended: `outcome` is its accuracy, or why there is none."""
        self.share[run], self.ended = 1.0, self.ended + 1
        left = self.left() if self.bar.disable else ""  # the bar shows it, and a line should fit a terminal
        self.line(f"{self.ended}/{len(self.costs)} runs, {left}{run}: {outcome}")

    def weighted(self, shares):
        return sum(share * self.costs[run] for run, share in shares.items()) / sum(self.costs.values())

    def left(self):
        self.started = self.clock() if self.started is None else self.started  # until the first message workers start
        done, elapsed = self.weighted(self.share), self.clock() - self.started
        trained = done - self.weighted(self.at_start)
        told = trained >= 0.01 and elapsed >= 3 and done < 1
        return f"{duration(elapsed / trained * (1 - done))} left, " if told else ""

    def line(self, text):
        self.last_line = self.clock()
        standard = self.notebook and not self.bar.disable  # a notebook shows standard error as an error
        self.bar.write(printable(text), file=sys.stdout if standard else sys.stderr)
