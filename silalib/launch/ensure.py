"""Records of runs: finished ones are loaded, unfinished resumed, missing trained."""

import sys
import time

import torch

from .. import data, experiments, records
from ..errors import CorruptFile, MissingData, Stopped, UserError
from ..files import results_folder
from ..run import Run
from ..training import execution, provenance
from . import ray_cluster, torchrun
from .estimate import cost
from .processes import cpu_cores, interruptible
from .progress import Progress
from .workers import Job, Schedule, in_this_process, in_workers, unlike


def ensure(
    runs,
    profile="quick",
    device="auto",
    workers=None,
    train=True,
    budget=None,
    only_whole=False,
    retry=False,
    backend="local",
    ray_address=None,
    gpus_per_run=None,
    graphs=True,
):
    """Records of the runs, as a dict in their order: finished ones are loaded, unfinished resumed, missing trained.

    A run with a damaged record is trained again; the damaged file becomes *.corrupt.
    profile: the folder under results/ for new records. device: "auto", "cpu", "cuda" or "cuda:1".
    workers: runs trained at once, by default one per CPU core on a CPU (one thread each) and one on each GPU; more
    share the GPUs in turn.
    train: False only loads; a run without a record, or with a damaged one, is then left out of the dict.
    budget: seconds after which training stops cleanly; only_whole gives a run up, with a checkpoint, as soon as its
    measured speed says that its training would not end in them.
    retry: train runs again that failed before.
    backend: "local", or "ray" to submit the runs to a Ray cluster, at ray_address or as `ray_cluster.Ray` finds it;
    gpus_per_run: of its GPUs for each run, 1 by default; a fraction such as 0.5 shares one. workers is then how many
    runs are under way at once, by default as many as fit.
    graphs: whether a GPU may replay steps as CUDA graphs; a run whose graph cannot be captured is done without.
    Raises MissingData, Stopped (work is left, checkpointed), or UserError when a run failed; nothing finished is lost.
    """
    experiments.check_profile(profile)
    runs = [None] if isinstance(runs, Run) else list(dict.fromkeys(runs))
    if not all(isinstance(run, Run) for run in runs):
        raise UserError("ensure() takes a list of runs: ensure([run])")
    if train:
        check_settings(runs, workers, budget, backend, ray_address, gpus_per_run)
        ray = ray_cluster.Ray(ray_address, gpus_per_run) if backend == "ray" else None
        if ray:
            ray_cluster.installed()
        else:
            execution.pick_device(device)
        pending = [run for run in runs if records.find(run) is None or isinstance(records.damage(run), CorruptFile)]
        if pending:
            train_all(pending, profile, device, workers, budget, only_whole, retry, ray, graphs)
    found = {}
    for run in [run for run in runs if records.find(run) is not None]:
        try:
            found[run] = records.load(run)
        except UserError as error:
            if train:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return found


def check_settings(runs, workers, budget, backend, ray_address, gpus_per_run):
    number = lambda value: isinstance(value, (int, float))
    for name, value, fine, what in [
        ("workers", workers, isinstance(workers, int) and workers >= 1, "a whole number from 1"),
        ("budget", budget, number(budget) and budget > 0, "a number of seconds above 0"),
        ("gpus_per_run", gpus_per_run, number(gpus_per_run) and gpus_per_run >= 0, "a number from 0"),
    ]:
        if value is not None and not fine:
            raise UserError(f"{name} must be {what}, or None, not {value!r}")
    if backend not in ("local", "ray"):
        raise UserError(f"unknown backend {backend!r}: use local or ray")
    if backend == "local" and (ray_address is not None or gpus_per_run is not None):
        raise UserError("ray_address and gpus_per_run belong to the backend ray")
    if torchrun.size() > 1 and (workers or backend == "ray"):
        raise UserError("torchrun's processes train the runs together: leave out --workers and --backend ray")
    most = max((len(run.nets) for run in runs), default=1)
    if runs and torchrun.size() > most:
        more = f"no run here has more than {most} network{'s' if most > 1 else ''}: use --nproc-per-node {most}"
        raise UserError(f"torchrun started {torchrun.size()} processes, but {more}")


def train_all(pending, profile, device, workers, budget, only_whole, retry, ray=None, graphs=True, train_by=None):
    """Train the pending runs of a profile; see `ensure`, `ray_cluster.Ray` and `workers.Job` for the arguments.

    A run that fails, whose data are missing, or whose block is of another kind of device, does not keep the others from
    training; that is raised at the end. Runs on data that must be prepared are left out, and one line says so.
    """
    missing = {}
    for name in dict.fromkeys(run.dataset for run in pending):
        try:
            data.download(name)
        except MissingData as error:
            missing[name] = error
    folder = results_folder(profile) / "runs"
    here = in_turns([run for run in pending if run.dataset not in missing], profile)
    alike = trained_alike(here, profile, folder)
    place, refusal = None if ray else execution.pick_device(device), None
    if refused := [run for run in here if place and alike[run][0] not in (None, place.type)]:
        refusal = f"{len(refused)} of {len(pending)} runs are refused on {place.type}: {unlike(alike[refused[0]][0])}"
        print(refusal, file=sys.stderr, flush=True)
        here = [run for run in here if run not in refused]
    workers, threads = (workers, 1) if ray else share(place, workers, len(here))
    deadline, begun = budget and time.time() + budget, {run.key: alike[run] for run in here}
    job = Job(folder, device, threads, deadline, only_whole, retry, begun, graphs, train_by)
    outcomes = {}
    if here:
        progress = Progress({run: cost(run) for run in here})
        try:
            with interruptible() as stopped:
                schedule = Schedule(here, job, stopped, progress)
                (ray or (in_this_process if workers == 1 else in_workers))(schedule, workers)
                outcomes = schedule.outcomes
        finally:
            progress.close()
    failed = [e for e in outcomes.values() if isinstance(e, Exception) and not isinstance(e, Stopped)]
    left = [run for run in here if isinstance(outcomes.get(run, Stopped()), Stopped)]
    if failed:
        raise UserError(f"{len(failed)} of {len(pending)} runs failed, the first: {failed[0]}")
    if left:
        raise Stopped(f"stopped with {len(left)} of {len(pending)} runs left; start again to go on")
    if refusal:
        raise UserError(refusal)
    for name, error in missing.items():
        if not data.dataset(name).prepared:
            raise MissingData(f"{error}, or use --profile quick")
        rows = sum(run.dataset == name for run in pending)
        print(f"{rows} of {len(pending)} runs not run: {error}", file=sys.stderr, flush=True)


def in_turns(runs, profile):
    """The runs in the turns of `experiments.turns`, in each the longest first, so that no worker ends with a long one.

    What no profile plans comes last.
    """
    turns = experiments.turns(profile)
    return sorted(runs, key=lambda run: (turns.get(run, (99, 0)), -cost(run)))


def share(place, workers, runs):
    """(how many of so many runs are trained at once, threads of each): by default a core, or a GPU that is meant, each.

    torchrun's processes train one run at a time, and share the cores of their machine.
    """
    cpu, together = place.type == "cpu", torchrun.size() > 1
    own = cpu_cores() if cpu else torch.cuda.device_count() if place.index is None else 1
    beside = torchrun.local_size() if together else workers or own
    return 1 if together else min(beside, runs), max(1, cpu_cores() // beside) if cpu else 1


def trained_alike(pending, profile, folder):
    """Run -> how its block was begun (`experiments.block`): (kind of device or None, whether in bfloat16 or None).

    The first record of the block decides, or without one a checkpoint. None where they do not tell: nothing is
    trained, or networks alone that are in float32 everywhere, or no profile plans the run.
    """
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
