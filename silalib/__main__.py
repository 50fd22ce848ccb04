"""The command line: python -m silalib train|status|report|data|bench.

Exit status: 0 all done, 75 stopped by the budget or a signal with work left, 1 a run or a page failed or data could
not be downloaded, 2 wrong usage.
"""

import argparse
import os
import re
import signal
import sys

from .errors import Stopped, UserError

STOPPED = 75
"""EX_TEMPFAIL: start again to go on."""


def seconds(text):
    """Seconds of a duration such as 90, 90s, 9m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: use 90s, 9m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def at_least(lowest):
    def whole_number(text):
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest}")
        return int(text)

    return whole_number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help tells more\n")


def parser():
    from .experiments import EXHIBITS, PROFILES

    top = Parser(prog="python -m silalib", description="Siamese Labels Auxiliary Learning, reproduced.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, text, action):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action)
        return sub

    def with_grid(sub):
        sub.add_argument("--profile", default="quick", choices=PROFILES, help="default: quick")
        sub.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help="default: the profile's own")

    def with_exhibit(sub, **optional):
        every = [*EXHIBITS, "all"]
        sub.add_argument("exhibit", choices=every, metavar="EXHIBIT", help=", ".join(every), **optional)

    def with_training(sub):
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        sub.add_argument(
            "--workers",
            type=at_least(1),
            metavar="N",
            help="runs at once; default one per CPU core or GPU; more share the GPUs",
        )
        sub.add_argument(
            "--budget", type=seconds, metavar="TIME", help="stop cleanly after this time, such as 9m; exit status 75"
        )
        sub.add_argument(
            "--only-whole", action="store_true", help="with --budget: train no run that would not end in it"
        )
        sub.add_argument("--backend", default="local", choices=["local", "ray"], help="ray: the runs on a Ray cluster")
        sub.add_argument(
            "--ray-address", metavar="HOST", help="default: RAY_ADDRESS, the cluster on this machine, or a new one"
        )
        sub.add_argument(
            "--gpus-per-run", type=float, metavar="N", help="of the Ray cluster's, 1 by default; 0.5 shares one"
        )
        sub.add_argument("--no-graphs", action="store_true", help="on a GPU: no CUDA graphs, slower")
        sub.add_argument("--retry", action="store_true", help="train runs again that failed before")

    sub = command("train", "train what an exhibit is missing", train)
    with_exhibit(sub)
    with_grid(sub)
    with_training(sub)
    sub = command("status", "what is done, running, pending or failed, and the time left", status)
    with_exhibit(sub, nargs="?", default="all")
    with_grid(sub)
    sub = command("report", "train what is missing, execute the notebooks and render the HTML report", report)
    with_exhibit(sub, nargs="?", default="all")
    with_grid(sub)
    with_training(sub)
    sub.add_argument("--no-train", action="store_true", help="render only what is on disk; the rest says 'not run'")
    sub = command("data", "fetch or prepare a data set, and verify it", fetch_data)
    sub.add_argument("dataset", help="its name; 'imagenet100' and 'folder' are prepared from your own files")
    sub.add_argument("--from", dest="source", metavar="DIR", help="the folder with train/<class>/ and val/<class>/")
    sub.add_argument("--name", help="with 'folder': what to call the data set")
    sub.add_argument("--size", type=at_least(1), help="with 'folder': height and width of its images in pixels")
    sub.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    sub.add_argument("--workers", type=at_least(1), metavar="N", help="processes that decode; default one per CPU core")
    sub.set_defaults(wrong_usage=sub.error)
    sub = command("bench", "images/s here, against a plain loop and the device's measured peak", measure_speed)
    sub.add_argument("--nets", nargs="+", help="names, or pairs such as mobilenet+vgg13; default: four of the paper's")
    sub.add_argument("--methods", nargs="+", help="default: ind sila")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sub.add_argument("--speeds", nargs="+", help="the trainer's: fast (default) eager compiled float32 nchw plain")
    sub.add_argument("--rounds", type=at_least(1), default=5)
    sub.add_argument("--steps", type=at_least(1), help="batches in a round; default 2 on a CPU, 100 on a GPU")
    sub.add_argument("--output", help="the JSON file; default bench.json in the results folder")
    return top


def say_seeds(options):
    """One line where runs are asked for whose seeds the profile does not plan."""
    from .experiments import tiers

    planned = tiers(options.profile)
    outside = {run for grid in grids(options).values() for run in grid if run not in planned}
    if outside:
        seeds = ", ".join(map(str, sorted({run.seed for run in outside})))
        print(
            f"{len(outside)} runs of seed {seeds} are outside of what {options.profile} plans: shown, never judged",
            file=sys.stderr,
        )


def grids(options):
    """exhibit -> its runs, for the exhibits asked for."""
    from .experiments import EXHIBITS

    names = EXHIBITS if options.exhibit == "all" else [options.exhibit]
    return {name: EXHIBITS[name].grid(options.profile, options.seeds) for name in names}


def train_missing(options):
    """Train every run of the exhibits asked for; returns how many have a record, and how many runs there are."""
    from . import torchrun
    from .runs import ensure

    runs = list(dict.fromkeys(run for grid in grids(options).values() for run in grid))
    with torchrun.leading(options.device):
        records = ensure(
            runs,
            options.profile,
            device=options.device,
            workers=options.workers,
            budget=options.budget,
            only_whole=options.only_whole,
            retry=options.retry,
            backend=options.backend,
            ray_address=options.ray_address,
            gpus_per_run=options.gpus_per_run,
            graphs=not options.no_graphs,
        )
    return len(records), len(runs)


def train(options):
    done, total = train_missing(options)
    print(
        f"{done} runs are trained" if done == total else f"{done} of {total} runs are trained, {total - done} not run"
    )
    return 0


def report(options):
    from . import report as pages
    from .experiments import EXHIBITS
    from .runs import state

    if options.exhibit != "all" and not EXHIBITS[options.exhibit].notebook:
        raise UserError(f"{options.exhibit} has no page: use `train {options.exhibit}` and `status {options.exhibit}`")
    code = 0
    if not options.no_train:
        try:
            train_missing(options)
        except Stopped:
            raise
        except UserError as error:  # the report shows what there is
            print(f"silalib: {error}", file=sys.stderr)
            code = 1
    names = None if options.exhibit == "all" else [EXHIBITS[options.exhibit].notebook]
    code = pages.build(options.profile, names, options.seeds, options.device, options.workers, train=False) or code
    shown = dict.fromkeys(run for grid in grids(options).values() for run in grid)
    states = [state(run) for run in shown]
    if missing := len(states) - states.count("done") - states.count("damaged"):
        print(f"{missing} of {len(states)} runs not run; the pages say what is missing", file=sys.stderr)
    if damaged := states.count("damaged"):
        print(f"silalib: error: {damaged} of {len(states)} runs with a damaged record, see `status`", file=sys.stderr)
        code = 1
    return code


def status(options):
    from . import claims, data, summary
    from .experiments import tiers
    from .launch import seconds_left
    from .runs import damage, failure, find, load, state

    labels = ("done", "running", "started", "pending", "failed", "damaged")
    rows, records, left, reasons, known = [], {}, {}, {}, {}
    for name, grid in grids(options).items():
        states = {run: known.get(run) or known.setdefault(run, state(run)) for run in grid}
        rows.append((name, [list(states.values()).count(label) for label in labels]))
        for run, label in states.items():
            if label == "done" and find(run).parent.parent.name == options.profile:
                records[run] = records.get(run) or load(run)
            elif label not in ("done", "damaged", "failed"):
                left[run] = label
            if label == "failed" and (found := failure(run)):
                reasons[run] = f"failed: {found['error']} (--retry trains it again)"
            elif label == "damaged":
                reasons[run] = f"damaged: {damage(run)}"
    print(f"profile {options.profile}; {claims.score(claims.judge(options.profile, options.seeds))}")
    print(f"{'':10}" + "".join(f"{label:>9}" for label in labels))
    for name, counts in rows:
        print(f"{name:10}" + "".join(f"{count or '-':>9}" for count in counts))
    for reason in reasons.values():
        print(reason)
    if unlike := summary.mixed(records):
        print(f"not trained alike: {unlike}")
    lacking = [run for run in left if data.dataset(run.dataset).prepared and not data.here(run.dataset)]
    seconds = seconds_left([run for run in left if run not in lacking], records)
    tier = tiers(options.profile)
    for number in sorted(set(tier.values())):
        mine = {run for run in known if tier.get(run, max(tier.values())) == number}  # what no profile plans is last
        name = f"tier {number}: " if len(set(tier.values())) > 1 else ""
        if mine:
            done = sum(known[run] == "done" for run in mine)
            needed = sum(seconds.get(run, 0) for run in mine)
            text = f"{name}{done} of {len(mine)} runs done"
            text += f", about {hours(needed)} left at this machine's speed" if needed else ""
            wanted = {data.dataset(run.dataset).title for run in mine.intersection(lacking)}
            count = len(mine.intersection(lacking))
            print(text + (f", and {count} that need your {', '.join(sorted(wanted))}" if wanted else ""))
    return 0


def hours(seconds):
    """Of one core, or one GPU: 12 s, 25 min 00 s, 3.4 core-hours."""
    from .progress import duration
    from .trainer import pick_device

    unit = "GPU" if pick_device("auto").type == "cuda" else "core"
    return f"{seconds / 3600:.1f} {unit}-hours" if seconds >= 3600 else f"{duration(seconds)} of one {unit}"


def follow(options):
    """In the processes of torchrun but the first: take part in its training, if it trains; their exit status."""
    from . import torchrun

    if not torchrun.follows():
        return None
    if "retry" in options and not getattr(options, "no_train", False):
        torchrun.follow(options.device)
    return 0


def fetch_data(options):
    from . import data, folders

    free = options.dataset == "folder"
    if free and None in (options.source, options.name, options.size):
        options.wrong_usage("'folder' needs --from DIR, --name and --size")
    if not free and (options.name or options.size):
        options.wrong_usage("--name and --size belong to 'folder'")
    if not free and options.source and options.dataset != "imagenet100":
        options.wrong_usage("--from belongs to 'imagenet100' and 'folder'")
    name = options.name if free else options.dataset
    if options.source:
        data.prepare(name, options.source, options.size, options.skip_broken, options.workers)
    spec = data.dataset(name)
    images = data.load(name)
    if spec.prepared and not options.source:
        folders.verify(data.data_folder() / spec.folder)
    where = f"in {data.data_folder() / spec.folder}, verified" if spec.folder else "without a file to download"
    train, test = len(images.train_labels), len(images.test_labels)
    if (train, test) != (spec.train, spec.test):
        print(
            f"silalib: warning: {spec.title} has {spec.train:,} training and {spec.test:,} test images, but here are "
            f"{train:,} and {test:,}: results will not compare with the paper's",
            file=sys.stderr,
        )
    print(f"{spec.title}: {train} training and {test} test images {where}")
    return 0


def measure_speed(options):
    from .bench import bench

    names = ("nets", "methods", "device", "speeds", "rounds", "steps", "output")
    bench(**{name: value for name in names if (value := getattr(options, name)) is not None})
    return 0


def main(arguments=None):
    try:
        options = parser().parse_args(arguments)
        if getattr(options, "seeds", None):
            say_seeds(options)
        if "RANK" in os.environ and (code := follow(options)) is not None:
            return code
        return options.action(options)
    except Stopped as error:
        print(f"silalib: {error}", file=sys.stderr)
        return STOPPED
    except UserError as error:
        print(f"silalib: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"silalib: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("silalib: interrupted; start again to go on", file=sys.stderr)
        return STOPPED


def leave(status):
    """End this process. One of torchrun's ends at once: Python, while it closes down, is aborted by a thread of the
    process group that lets go of a tensor only then, and torchrun calls the whole command failed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also before training looks after both signals itself
    leave(main())
