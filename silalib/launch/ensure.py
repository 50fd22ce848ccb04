"""Records of runs: finished ones are loaded, unfinished resumed, missing trained."""

import math
import os
import sys
import time
from contextlib import closing
from functools import partial

import torch

from .. import data, experiments, records
from ..errors import CorruptFile, MissingData, Stopped, UserError
from ..files import results_folder
from ..run import Run
from ..training import execution, provenance
from . import torchrun
from .estimate import cost, seconds_left
from .processes import cpu_cores, interruptible, whole_number
from .progress import Progress, duration
from .ray_cluster import in_cluster
from .workers import UNLIKE, Job, Schedule, in_this_process, in_workers


def ensure(
    runs, profile="quick", device="auto", workers=None, train=True, budget=None, only_whole=False, retry=False,
    backend="local", ray_address=None, gpus_per_run=None, graphs=True,
):  # fmt: skip
    """Records of the runs, as a dict in their order: finished ones are loaded, unfinished resumed, missing trained.
    A damaged record becomes *.corrupt, and its run is trained again. profile: the folder under results/ for new ones.
    device: "auto", "cpu", "cuda" or "cuda:1". train: False only loads, and leaves out runs without a whole record.
    workers: runs trained at once, by default one per CPU core (one thread each) or GPU; more share the GPUs in turn.
    budget: seconds after which training stops cleanly; only_whole gives a run up, with a checkpoint, as soon as its
    measured speed says that its training would not end in them. retry: train runs again that failed before.
    backend: "local", or "ray" for a Ray cluster, at ray_address or as `in_cluster` finds it, with gpus_per_run of its
    GPUs, 1 by default, 0.5 to share one; workers is then how many runs are under way, by default as many as fit.
    graphs: whether a GPU may replay steps as CUDA graphs; a run whose graph cannot be captured is done without.
    Raises MissingData, Stopped (work is left, checkpointed), or UserError when a run failed; nothing done is lost."""
    experiments.check_profile(profile)
    runs = [None] if isinstance(runs, Run) else list(dict.fromkeys(runs))
    if not all(isinstance(run, Run) for run in runs):
        raise UserError("ensure() takes a list of runs: ensure([run])")
    if train:
        check_settings(runs, workers, budget, backend, ray_address, gpus_per_run)
        ray = partial(in_cluster, address=ray_address, gpus_per_run=gpus_per_run) if backend == "ray" else None
        damaged = lambda run: isinstance(records.damage(run, profile=profile), CorruptFile)
        pending = [run for run in runs if records.find(run) is None or damaged(run)]
        train_all(pending, profile, device, workers, budget, ray, only_whole=only_whole, retry=retry, graphs=graphs)
    found = {}
    for run in filter(records.find, runs):
        try:
            found[run] = records.load(run, profile=profile)
        except UserError as error:
            if train:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return found


def check_settings(runs, workers, budget, backend, ray_address, gpus_per_run):
    wrong = lambda value, least, *kinds: value is not None and not (isinstance(value, kinds) and value >= least)
    size, local, of_ray = torchrun.size(), backend == "local", (ray_address, gpus_per_run)
    most = max((len(run.nets) for run in runs), default=size)
    more = f"no run here has more than {most} network{'s' if most > 1 else ''}: use --nproc-per-node {most}"
    together = "torchrun's processes train the runs together: leave out --workers and --backend ray"
    for bad, message in [
        (wrong(workers, 1, int), f"workers must be a whole number from 1, or None, not {workers!r}"),
        (wrong(budget, 1e-9, int, float), f"budget must be a number of seconds above 0, or None, not {budget!r}"),
        (wrong(gpus_per_run, 0, int, float), f"gpus_per_run must be a number from 0, or None, not {gpus_per_run!r}"),
        (backend not in ("local", "ray"), f"unknown backend {backend!r}: use local or ray"),
        (local and of_ray != (None, None), "ray_address and gpus_per_run belong to the backend ray"),
        (size > 1 and (workers or not local), together),
        (size > most, f"torchrun started {size} processes, but {more}"),
    ]:
        if bad:
            raise UserError(message)


def train_all(pending, profile, device="auto", workers=None, budget=None, ray=None, **how):
    """Train the pending runs of a profile; see `ensure` and, for what else there is, `Job`; ray trains a Schedule.
    A run that fails, whose data are missing, or whose block is of another kind of device, does not keep the others from
    training; that is raised at the end. Runs on data that must be prepared are left out, and one line says so."""
    place, missing, of_all = None if ray else execution.pick_device(device), {}, f"of {len(pending)} runs"
    for name in dict.fromkeys(run.dataset for run in pending):
        try:
            data.download(name)
        except MissingData as error:
            missing[name] = error
    folder, here = results_folder(profile) / "runs", [run for run in pending if run.dataset not in missing]
    here, begun = in_turns(here, profile), trained_alike(here, profile, folder)
    if refused := [run for run in here if place and begun[run][0] not in (None, place.type)]:
        refusal = f"{len(refused)} {of_all} are refused on {place.type}: {UNLIKE.format(begun[refused[0]][0])}"
        print(refusal, file=sys.stderr, flush=True)
        here = [run for run in here if run not in refused]
    workers, threads = (workers, 1) if ray else share(place, workers, len(here))
    job, outcomes = Job(folder, device, threads, time.time() + (budget or math.inf), begun, **how), {}
    if here:
        on_cpu = place and place.type == "cpu"  # a step timed on a GPU would hold its memory
        progress = Progress(seconds_left(here, {}) if on_cpu else {run: cost(run) for run in here})
        with closing(progress.bar), interruptible() as stopped:
            schedule = Schedule(here, job, stopped, progress)
            (ray or (in_this_process if workers == 1 else in_workers))(schedule, workers)
        outcomes = schedule.outcomes
    left = [run for run in here if isinstance(outcomes.get(run, Stopped()), Stopped)]
    if failed := [outcomes[run] for run in here if run not in left and isinstance(outcomes[run], Exception)]:
        raise UserError(f"{len(failed)} {of_all} failed, the first: {failed[0]}")
    if left:
        raise Stopped(f"stopped with {len(left)} {of_all} left; start again to go on")
    if refused:
        raise UserError(refusal)
    for name, error in missing.items():
        if not data.dataset(name).prepared:
            raise MissingData(f"{error}, or use --profile quick")
        rows = sum(run.dataset == name for run in pending)
        print(f"{rows} {of_all} not run: {error}", file=sys.stderr, flush=True)


def in_turns(runs, profile):
    """The runs in the turns of `experiments.turns`, what no profile plans last; in each the longest first."""
    turns = experiments.turns(profile)
    return sorted(runs, key=lambda run: (turns.get(run, (99, 0)), -cost(run)))


def share(place, workers, runs):
    """(how many of so many runs are trained at once, threads of each): by default each has a core, or a GPU meant.
    OMP_NUM_THREADS bounds the threads, but under torchrun, which sets it to 1 and whose processes share the cores."""
    cpu, together = place.type == "cpu", torchrun.size() > 1
    own = cpu_cores() if cpu else torch.cuda.device_count() if place.index is None else 1
    beside = int(os.environ["LOCAL_WORLD_SIZE"]) if together else workers or own
    most = None if together else whole_number("OMP_NUM_THREADS")
    threads = max(1, cpu_cores() // beside) if cpu else 1
    return 1 if together else min(beside, runs), min(threads, most or threads)


def training_time(pending, device, workers):
    """About how long the runs take here, in words; those on data that must be one's own and are not here left out."""
    here = [run for run in pending if not data.dataset(run.dataset).prepared or data.is_available(run.dataset)]
    at_once, _ = share(execution.pick_device(device), workers, max(1, len(here)))
    return duration(sum(seconds_left(here, {}).values()) / at_once)


def trained_alike(pending, profile, folder):
    """Run -> how its block was begun (`experiments.block`): (kind of device or None, whether in bfloat16 or None).
    The first record of the block decides, or without one a checkpoint; None where they do not tell."""
    alike = dict.fromkeys(pending, (None, None))
    for dataset, seed in dict.fromkeys((run.dataset, run.seed) for run in pending):
        block = experiments.block(profile, dataset, seed)
        found = [(begun, run) for run in block if (begun := records.begun(folder / run.key))]
        kind = bf16 = None
        for (_, part), run in sorted(found, key=lambda pair: pair[0][0] or "~"):  # checkpoints last
            kind = kind or provenance.device_kind(part)
            if bf16 is None and any(execution.precision(n, torch.device(kind), True).itemsize < 4 for n in run.nets):
                bf16 = "bfloat16" in part["precision"]
        alike |= {run: (kind, bf16) for run in block if run in alike}
    return alike
