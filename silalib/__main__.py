"""The command line: python -m silalib train|status|report|data.

Exit status: 0 all done, 75 stopped with work left, 1 a run or page failed or data are missing, 2 wrong usage.
"""

import argparse
import os
import re
import signal
import sys
from collections import Counter
from functools import partial
from itertools import chain

from .errors import Stopped, UserError, missing_extra, printable

STOPPED = 75  # EX_TEMPFAIL: start again to go on


def seconds(text):
    """Seconds of a duration such as 90, 90s, 9m or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: use 90s, 9m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def whole_number(text, least=1):
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help tells more\n")


def parser():
    from .experiments import EXHIBITS, PROFILES

    top = Parser(prog="python -m silalib", description="Siamese Labels Auxiliary Learning, reproduced.")
    commands = top.add_subparsers(dest="command", required=True)
    every, few, from_0 = [*EXHIBITS, "all"], dict(nargs="?", default="all"), partial(whole_number, least=0)
    for name, action, text in [
        ("train", train, "train what an exhibit is missing"),
        ("status", status, "what is done, running, pending or failed, and the time left"),
        ("report", report, "train what is missing, execute the notebooks and render the HTML report"),
        ("data", fetch_data, "fetch or prepare a data set, and verify it"),
    ]:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action, wrong_usage=sub.error)
        option, profile = sub.add_argument, None if name == "status" else "quick"
        if name == "data":
            option("dataset", help="its name; 'imagenet100' and 'folder' are prepared from your own files")
            option("--from", dest="source", metavar="DIR", help="the folder with train/<class>/ and val/<class>/")
            option("--name", help="with 'folder': what to call the data set")
            option("--size", type=whole_number, help="with 'folder': height and width of its images in pixels")
            option("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
            option("--workers", type=whole_number, metavar="N", help="threads that decode; default one per CPU core")
            continue
        option("exhibit", choices=every, metavar="EXHIBIT", help=", ".join(every), **few if name != "train" else {})
        option("--profile", default=profile, choices=PROFILES, help=f"default: {profile or 'a word on each'}")
        option("--seeds", type=from_0, nargs="+", metavar="N", help="default: the profile's own")
        if name == "status":
            continue
        option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        option("--workers", type=whole_number, metavar="N", help="runs at once; default one per CPU core or GPU")
        option("--budget", type=seconds, metavar="TIME", help="stop cleanly after this time, such as 9m; then exit 75")
        option("--only-whole", action="store_true", help="with --budget: train no run that would not end in it")
        option("--backend", default="local", choices=["local", "ray"], help="ray: the runs on a Ray cluster")
        option("--ray-address", metavar="HOST", help="default: RAY_ADDRESS, the cluster on this machine, or a new one")
        option("--gpus-per-run", type=float, metavar="N", help="of the Ray cluster's, 1 by default; 0.5 shares one")
        option("--no-graphs", dest="graphs", action="store_false", help="on a GPU: no CUDA graphs, slower")
        option("--retry", action="store_true", help="train runs again that failed before")
        if name == "report":
            option("--no-train", action="store_true", help="render only what is on disk; the rest says 'not run'")
    return top


def grids(options):
    """exhibit -> its runs, for the exhibits asked for; seeds that the profile does not plan are named in one line."""
    from .experiments import EXHIBITS, tiers

    names = EXHIBITS if options.exhibit == "all" else [options.exhibit]
    found = {name: EXHIBITS[name].grid(options.profile, options.seeds) for name in names}
    if options.seeds and (outside := set().union(*found.values()) - set(tiers(options.profile))):
        listed = ", ".join(map(str, sorted({run.seed for run in outside})))
        told = f"are outside of what {options.profile} plans: shown, judged only with all of twice the seeds"
        print(f"{len(outside)} runs of seed {listed} {told}", file=sys.stderr)
    return found


def train_missing(options, runs):
    """Records of those runs that have one, after training."""
    from .launch import torchrun
    from .launch.ensure import ensure

    names = ("profile", "device", "workers", "budget", "only_whole", "retry", "backend", "ray_address", "gpus_per_run")
    with torchrun.leading(options.device):
        return ensure(runs, graphs=options.graphs, **{name: getattr(options, name) for name in names})


def train(options):
    runs = dict.fromkeys(chain(*grids(options).values()))
    done = len(train_missing(options, runs))
    left = len(runs) - done
    print(f"{done} of {len(runs)} runs are trained, {left} not run" if left else f"{done} runs are trained")


def report(options):
    from .analysis.status import recall
    from .experiments import EXHIBITS
    from .launch.ensure import training_time
    from .records import find, state
    from .report import build, pages

    if options.exhibit != "all" and not EXHIBITS[options.exhibit].notebook:
        raise UserError(f"{options.exhibit} has no page: use `train {options.exhibit}` and `status {options.exhibit}`")
    runs, code = dict.fromkeys(chain(*grids(options).values())), 0
    made = pages.Report(options.profile, options.seeds)
    names = list(made.notebooks) if options.exhibit == "all" else [EXHIBITS[options.exhibit].notebook]
    pending = [run for run in runs if not find(run, options.profile)]
    planned = f"{len(pending)} of {len(runs)} runs to train, " if pending and not options.no_train else ""
    print(f"profile {options.profile}: {planned}{len(names)} pages in {made.folder / 'index.html'}", flush=True)
    if planned:
        made.write_index()
        if options.backend == "local":
            time = training_time(pending, options.device, options.workers)
            print(f"about {time} of training; pages appear as their runs end", flush=True)
    try:
        if not options.no_train:
            with build.beside_training(made, names if pending else []):
                train_missing(options, runs)
    except Stopped:
        made.write_index()
        raise
    except UserError as error:  # the report shows what there is
        print(f"silalib: {error}", file=sys.stderr)
        code = 1
    code = build.build(options.profile, names, options.seeds, options.device, options.workers, train=False) or code
    states = Counter(state(run, options.profile) for run in runs)
    if missing := len(runs) - states["done"] - states["damaged"]:
        print(f"{missing} of {len(runs)} runs not run; the pages say what is missing", file=sys.stderr)
    if damaged := states["damaged"]:
        print(f"silalib: error: {damaged} of {len(runs)} runs with a damaged record, see `status`", file=sys.stderr)
    print(*map(printable, recall()["lines"]), f"The report: {made.folder / 'index.html'}", sep="\n")
    return 1 if damaged else code


def status(options):
    from .analysis import status

    if options.profile is None and options.exhibit == "all" and not options.seeds:
        print(*map(printable, status.summary()), sep="\n")
        return
    options.profile = options.profile or "quick"
    print(*map(printable, status.lines(options.profile, options.seeds, grids(options))), sep="\n")


def fetch_data(options):
    from . import data
    from .data import prepared
    from .launch.prepare import prepare

    name = options.dataset
    if name == "folder" and None in (options.source, options.name, options.size):
        options.wrong_usage("'folder' needs --from DIR, --name and --size")
    if name != "folder" and (options.name or options.size):
        options.wrong_usage("--name and --size belong to 'folder'")
    if name not in ("folder", "imagenet100") and options.source:
        options.wrong_usage("--from belongs to 'imagenet100' and 'folder'")
    name = options.name or name
    if options.source:
        prepare(name, options.source, options.size, options.skip_broken, options.workers)
    spec, images = data.dataset(name), data.load(name)
    if spec.prepared and not options.source:
        prepared.verify(data.data_folder() / spec.folder)
    where = f"in {data.data_folder() / spec.folder}, verified" if spec.folder else "without a file to download"
    train, test = len(images.train_labels), len(images.test_labels)
    if (train, test) != (spec.train, spec.test):
        known = f"{spec.title} has {spec.train:,} training and {spec.test:,} test images, but here are"
        unlike = f"{train:,} and {test:,}: results will not compare with the paper's"
        print(f"silalib: warning: {known} {unlike}", file=sys.stderr)
    print(f"{spec.title}: {train} training and {test} test images {where}")


def mend_streams():
    """Open what of standard input, output and error was closed, and write in it what its encoding lacks as escapes."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed: what is opened next would take its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def act(options):
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["RANK"]):  # not the first of torchrun's processes
        if "retry" in options and not getattr(options, "no_train", False):
            from .launch import torchrun

            torchrun.follow(options.device)
        return 0
    return options.action(options)


def main(arguments=None):
    mend_streams()
    try:
        try:
            return act(parser().parse_args(arguments)) or 0
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is expected
    except (Stopped, KeyboardInterrupt) as error:
        line, code = str(error) or "interrupted; start again to go on", STOPPED
    except UserError as error:
        line, code = f"error: {error}", 1
    except ModuleNotFoundError as error:
        line, code = f"error: {missing_extra(error)}", 1
    except BrokenPipeError:  # who reads the output wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        line, code = f"error: {error.filename or 'a file'}: {error.strerror or error}", 1
    print(f"silalib: {printable(line)}", file=sys.stderr)
    return code


def leave(status):
    """End this process; under torchrun without Python's shutdown, which a thread of the process group can abort."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also before training looks after both signals itself
    leave(main())
