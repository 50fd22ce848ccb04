"""`compare`: does SiLa help on one's own network and data? Methods paired by seed, trained by the project's one loop.
Weights depend on the seed and the slot; order, augmentation and dropout on the seed and the epoch or step. So two
methods of one seed differ in their loss alone."""

import math
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from html import escape
from itertools import combinations
from pathlib import Path
from statistics import fmean
from time import monotonic

import pandas as pd
import torch
from torch.nn.modules.dropout import _DropoutNd

from . import files, records
from .analysis.statistics import interval, plus_minus
from .analysis.verdict import Effect, decide
from .errors import CorruptFile, Stopped, UserError, told
from .launch.own import Samples, Task, described
from .launch.processes import interruptible
from .launch.progress import Progress, duration, numbers
from .losses import METHODS
from .randomness import generators_kept
from .training import checkpoint, trainer
from .training.execution import no_search, pick_device

WORDS = {"reproduced": "better", "contradicted": "worse"}


def compare(make_network, train_set, test_set, *, epochs, methods=("ind", "sila", "dml", "sila+dml"), seeds=5,
            networks=2, batch_size=64, optimizer=None, schedule=None, forward=None, metrics=None, equal_compute=True,
            device="auto", folder=None, budget=None, progress=True):  # fmt: skip
    """Train new networks with each method and seed, and judge by top-1 whether each method beats IND.
    make_network() makes a network with logits (B, N), or a tuple of them, its exits; or one such function a network.
    train_set, test_set: a Dataset, a pair of tensors (x, y) or a DataLoader, whose sampler alone is not used. A batch
    is (inputs ..., labels (B,)), or a dictionary with "labels".
    methods: names in `losses.METHODS`, or a dictionary name -> such a name or loss(list of logits, labels). IND is
    always trained, with equal_compute also for `networks` times the epochs. seeds: how many, or a list.
    optimizer(network): by default AdamW at 1e-3. schedule(optimizer, steps): stepped after each batch, by default a
    warm-up of 5% and a cosine. forward(network, batch): by default network(inputs ...) or network(**inputs), and its
    `.logits`. metrics: name -> function of logits (n, N) and labels (n,), shown beside top-1 and ECE (%), NLL (nats).
    folder: keeps finished trainings and checkpoints, from which a second call resumes. budget: seconds, after which
    what is finished is returned. progress: whether to print the cost, the time left and a bar.
    Returns a `Comparison`. Raises UserError for what cannot be trained, before training where that can be known, and
    Stopped after Ctrl-C. float32; methods are paired exactly on a CPU, up to rounding on a GPU."""
    with told("seeds, methods or networks"):
        seeds = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
        methods = [methods] if isinstance(methods, str) else methods
        methods = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
        makers = list(make_network) if isinstance(make_network, (list, tuple)) else [make_network] * networks
    ind = next((name for name, value in methods.items() if value == "ind"), "ind")
    losses, longer = {ind: "ind"} | methods, f"{ind} x{networks}"
    counts = dict(epochs=epochs, networks=networks, batch_size=batch_size)
    for bad, message in [
        (any(not isinstance(n, int) or n < 1 for n in counts.values()), f"{counts}: give whole numbers from 1"),
        (not seeds or any(not isinstance(s, int) or s < 0 for s in seeds), f"seeds {seeds}: give whole numbers from 0"),
        (len(makers) != networks or any(isinstance(make, torch.nn.Module) or not callable(make) for make in makers),
         f"make_network must be a function that makes a network, or {networks} such functions, and not a network"),
        (losses[ind] != "ind" or longer in losses, f"{ind!r} and {longer!r} are the baselines: rename your method"),
        (unknown := [value for value in losses.values() if not callable(value) and value not in METHODS],
         f"unknown methods {unknown}: choose from {', '.join(METHODS)}, or give a function of logits and labels"),
        (not isinstance(budget or 1, (int, float)) or (budget or 1) <= 0, f"budget {budget!r}: give seconds"),
    ]:  # fmt: skip
        if bad:
            raise UserError(message)
    if len(seeds) == 1:
        warnings.warn("one seed has no interval and judges nothing: give seeds=5 or more", stacklevel=2)
    device = pick_device(device)
    trainer.check_usable(device)
    arms = {name: (value if callable(value) else METHODS[value], epochs) for name, value in losses.items()}
    arms |= {longer: (arms[ind][0], networks * epochs)} if equal_compute and networks > 1 else {}
    shared = dict(nets=makers, call=forward, metrics=dict(metrics or {}), device=device, result=None)
    shared["new_optimizer"] = optimizer or (lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3))
    shared["new_schedule"] = schedule or warmup_and_cosine
    with generators_kept([device] if device.type == "cuda" else []), no_search():
        train = Samples("train_set", train_set, batch_size, device)
        test = Samples("test_set", test_set, max(batch_size, 500), device)
        shared |= dict(splits={"train": train, "test": test}, batch_size=train.size, eval_batch=test.size)
        tasks = [Task(method=name, loss=loss, epochs=n, seed=seed, **shared)
                 for seed in seeds for name, (loss, n) in arms.items()]  # fmt: skip
        rehearse(tasks)
        with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
            train_all(tasks, Path(place), folder, budget, progress)
    return Comparison(tasks, [name for name in (ind, longer) if name in arms])


def warmup_and_cosine(optimizer, steps):
    """The learning rate rises over the first 5% of the steps, then falls to 0 along a cosine."""
    factor = lambda step: min((step + 1) / math.ceil(steps / 20), (1 + math.cos(math.pi * step / steps)) / 2)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def rehearse(tasks):
    """Do on throwaway networks what each method's training does: what is wrong is told before it begins."""
    first = list({task.method: task for task in reversed(tasks)}.values())
    train, test = tasks[0].splits.values()
    with told("make_network"):
        nets = [tasks[0].network(slot).to(train.device).train() for slot in [*range(len(tasks[0].nets)), 0]]
    weights = [list(net.parameters()) for net in nets]
    if not all(weights) or len({id(p) for own in weights for p in own}) < sum(map(len, weights)):
        raise UserError("make_network must make a new network, with parameters of its own, whenever it is called")
    dropout = any(isinstance(module, _DropoutNd) for net in nets for module in net.modules())
    if not dropout and any(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in combinations(weights[:-1], 2)):
        warnings.warn("two networks start with equal weights, without dropout: IND keeps them equal", stacklevel=3)
    rows = torch.arange(len(train) % train.size or train.size)
    batch = next(train.batches(rows, len(rows)))
    with told(f"the network fails on {len(rows)} samples, an epoch's last batch"):
        outputs = [net(batch) for net in nets[:-1]]
    counts, labels = sorted({z.shape[1] for own in outputs for z in own}), torch.cat([train.labels, test.labels])
    if len(counts) > 1:
        raise UserError(f"networks for {' and '.join(map(str, counts))} classes: all must have the same classes")
    low, high, n = *labels.aminmax(), counts[0]
    if low < 0 or high >= n:
        raise UserError(f"labels from {low} to {high} for networks with {n} classes: they must be 0 to {n - 1}")
    for task in tasks:
        task.heads = [(net, exit) for net, own in enumerate(outputs, 1) for exit in range(1, len(own) + 1)]
    for task in first:
        with told(f"a training step of {task.method!r}"):
            training = task.training()
            training.set_step()
            training.update(batch, train.target(batch))
            logits = training.predict(test)
            idle = any(all(p.grad is None for p in net.parameters()) for net in training.nets.values())
            if idle or not all(z.isfinite().all() for z in logits):
                raise UserError(f"{task.method!r} leaves a network without a gradient, or not finite after one step")
            task.measured(logits)
    shapes = [{name: tuple(value.shape) for name, value in net.state_dict().items()} for net in nets]
    for task in tasks:  # an optimizer's text has its settings
        task.recipe = described([shapes, list(map(str, nets)), [str(optimizer) for optimizer, _ in training.optimizer]])


def finished(folder):
    """What a training in this folder gave, None where it did not end or is damaged."""
    with suppress(CorruptFile):
        return files.read_sealed(folder / "result.json", "")


def train_all(tasks, place, folder, budget, progress):
    """Give as many tasks their `result` as the budget allows, breadth first over the seeds."""
    with told("folder"):
        place.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        task.result = finished(place / task.key)
    left = {task: task.epochs for task in tasks if task.result is None}
    bar, total = Progress(left) if progress and left else None, sum(left.values())
    say = bar.line if bar else lambda text: None
    more = f"; {len(tasks) - len(left)} more are in {folder}" if len(left) < len(tasks) else ""
    say(f"{len(left)} trainings of {len(tasks[0].nets)} networks, {total} epochs in all{more}")
    began, end = None, monotonic() + (budget or math.inf)

    def tell(run, top1=None, **message):
        if bar:
            bar.message(run=run, top1=top1, **message)
        if top1 and run is next(iter(left)) and message["step"] == run.steps_per_epoch:
            say(f"about {duration((monotonic() - began) * total)} in all, by the first epoch")

    with interruptible() as stopped, closing(bar.bar) if bar else nullcontext():
        stop = lambda: "interrupted" if stopped.is_set() else "the budget is used up" if monotonic() > end else None
        for task in left:
            if stop():
                break
            path = place / task.key
            with suppress(Stopped), records.lock(path, lambda: not stop(), say):
                if (result := finished(path)) is None:  # else another process has trained it meanwhile
                    training, heads, failed = task.training(tell), [], None
                    pauses, began = checkpoint.Pauses(training, path, stop=stop), monotonic()
                    try:
                        training.loop(pauses)
                        heads = task.measured(training.at_test or training.predict(task.splits["test"]))
                    except trainer.Diverged as error:
                        failed = str(error)
                    result = dict(heads=heads, failed=failed, seconds=round(training.seconds, 2), history=training.rows)
                    files.write_sealed(path / "result.json", result)
                    for name in checkpoint.CHECKPOINTS:
                        (path / name).unlink(missing_ok=True)
                task.result = result
                if bar:
                    bar.finish(task, result["failed"] or f"top-1 {numbers(row['top1'] for row in result['heads'])}")
    ended = [task for task in tasks if task.result]
    if stopped.is_set() or not ended:
        kept = f"what was begun is in {folder}, call compare again to go on" if folder else "give a folder to keep them"
        raise Stopped(f"stopped with {len(ended)} of {len(tasks)} trainings finished: {kept}")


class Comparison:
    """What `compare` found. verdicts: a row per method and baseline with its gain in points of top-1, half of its
    interval, the verdict and a remark. history: a row per method, seed, network and epoch. notes: what else to know."""

    def __init__(self, tasks, baselines):
        self.baselines, self.results, rows, history = baselines, {}, [], []
        self.methods, self.seeds = (list(dict.fromkeys(getattr(t, name) for t in tasks)) for name in ("method", "seed"))
        for task in [task for task in tasks if task.result]:
            result = self.results[task.method, task.seed] = task.result
            for head, (network, exit) in enumerate(task.heads):
                where = {"method": task.method, "seed": task.seed, "network": network, "exit": exit}
                history += [where | row for row in result["history"] if row["head"] == head]
                rows += [where | own | {"seconds": result["seconds"]} for own in result["heads"][head : head + 1]]
        unused = ["head"] if any(exit > 1 for _, exit in tasks[0].heads) else ["head", "exit"]
        empty = {name: [] for name in ("method", "seed", "network", "top1", "nll", "seconds")}  # where all have failed
        frames = (pd.DataFrame(found or empty) for found in (rows, history))
        self.frame, self.history = (frame.drop(columns=unused, errors="ignore") for frame in frames)
        compared = [(method, base) for method in self.methods if method not in baselines for base in baselines]
        self.family = max(1, len(compared))
        columns = ["method", "against", "gain", "half_width", "verdict", "remark"]
        self.verdicts = pd.DataFrame([self.judged(*pair) for pair in compared], columns=columns)
        train, test = map(len, tasks[0].splits.values())
        counts = f"{len(self.results)} of {len(tasks)} trainings; {train} training and {test} test samples"
        shown = f"gains with {100 * (1 - 0.05 / self.family):.1f}% intervals, other means with 95%"
        self.notes = [f"{counts}, {tasks[0].epochs} epochs; {shown}", *self.unconverged()]

    def to_frame(self):
        """A row per method, seed, network (and exit): its metrics, the ensemble's, and the training's seconds."""
        return self.frame.copy()

    def judged(self, method, base):
        """A row of verdicts. A gain without spread over seeds has none; what is equal in every seed is undecided."""
        gains, lost = {}, {}
        for rank, seed in enumerate(self.seeds):
            both = [self.results[name, seed] for name in (method, base) if (name, seed) in self.results]
            if failed := [result["failed"] for result in both if result["failed"]]:
                lost[rank] = "; ".join(failed)
            elif len(both) == 2:
                gains[rank] = fmean(a["top1"] - b["top1"] for a, b in zip(both[0]["heads"], both[1]["heads"]))
        effect = Effect(method, "points", gains, len(self.seeds), delta=0.0, lost=lost)
        word, (gain, half) = effect.judge(self.family), interval(effect.values, 1 - 0.05 / self.family)
        verdict = "undecided" if gain == half == 0 else WORDS.get(word, word)
        visible = f"a gain below {half:.2f} would not be visible" if half > 0 else ""
        remark = "; ".join(filter(None, [effect.remark, visible]))
        return [method, base, round(gain, 9) + 0.0, half, verdict, remark]

    def unconverged(self):
        """Why IND may have needed more training; another method's gain may then be one of speed alone."""
        ind, *longer = self.baselines
        own = [self.frame[self.frame["method"] == name].groupby("seed") for name in self.baselines]
        for metric, sign in (("top1", 1), ("nll", -1)) if longer else ():
            mean, half = interval(sign * (own[1][metric].mean() - own[0][metric].mean()).dropna())
            if decide(mean, half, 0.0) == "reproduced":
                yield f"{ind} has not converged: {longer[0]} is better in {metric}, by {plus_minus(mean, half, 3)}"
        nll = self.history[self.history["method"] == ind].groupby("epoch")["train_nll"].mean()
        before, *_, last = nll.iloc[-1 - math.ceil(len(nll) / 10) :] if len(nll) > 1 else (0, 0)
        if last < min(0.95 * before, before - 0.01):
            yield f"{ind} has not converged: its training NLL still fell, from {before:.3f} to {last:.3f}"

    def summary(self):
        """A row per method: the mean over networks of every metric, and its 95% interval over seeds."""
        if self.frame.empty:
            return self.frame.copy()
        frame = self.frame.drop(columns=["network", "exit", "seconds"], errors="ignore")
        means = frame.groupby(["method", "seed"], sort=False).mean()
        text = lambda values: plus_minus(*interval(values), 2 if means[values.name].max() > 5 else 3)
        return means.groupby("method", sort=False).agg(text).reset_index()

    def tables(self):
        gains = [plus_minus(*pair, 2, signed=True) for pair in zip(self.verdicts["gain"], self.verdicts["half_width"])]
        return self.verdicts.assign(gain=gains).drop(columns="half_width"), self.summary()

    def __str__(self):
        return "\n\n".join([*(table.to_string(index=False) for table in self.tables()), "\n".join(self.notes)])

    __repr__ = __str__

    def _repr_html_(self):
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return "".join(table.to_html(index=False, border=0) for table in self.tables()) + f"<ul>{notes}</ul>"

    def to_markdown(self):
        cells = lambda row: f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |\n"
        tables = [[table.columns, ["---"] * len(table.columns), *table.to_numpy()] for table in self.tables()]
        return "\n".join(["".join(map(cells, rows)) for rows in tables]) + "".join(f"\n- {note}" for note in self.notes)

    def plot(self, ax=None):
        """Draw the gains with their intervals, and return the axes; needs matplotlib."""
        import matplotlib.pyplot as plt

        from .analysis import plots

        ax, names = ax or plt.subplots()[1], list(dict.fromkeys(self.verdicts["method"]))
        series = [(list(range(len(names))), part["gain"], part["half_width"], dict(fmt="o", label=f"over {base}"))
                  for base, part in self.verdicts.groupby("against")]  # fmt: skip
        plots.intervals(ax, names, series, "gain in top-1 (percentage points)")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(series))
        return ax
