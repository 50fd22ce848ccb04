"""torchrun -m silalib train ...: the first process drives, and all of them train every run together, one by one."""

import os
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from . import trainer
from .errors import Stopped, UserError
from .parallel import Ranks, layout


def size():
    """How many processes torchrun has started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local_size():
    """How many of them share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def follows():
    """Whether this is one of torchrun's processes, but not the first."""
    return size() > 1 and int(os.environ["RANK"]) > 0


def pick_device(name):
    """The device of this process: with "auto" or "cuda" the GPU of its number on this machine, if there are GPUs."""
    device = trainer.pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    elif device.type == "cuda":
        raise UserError(f"device {name} is one GPU for {size()} processes: use --device auto")
    return device


@contextmanager
def leading(device):
    """In the first of torchrun's processes: what is trained meanwhile, all of them train. Without torchrun, nothing.

    The others are sent home at the end, and when a user's error ends it; after any other, torchrun ends them.
    """
    if size() == 1:
        yield
        return
    connect(device)
    try:
        yield
    except UserError:
        say(None)
        raise
    say(None)
    dist.destroy_process_group()


def connect(device):
    """Join the processes that torchrun has started."""
    device = pick_device(device)
    gpu = device.type == "cuda" and local_size() <= torch.cuda.device_count()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # processes wait for each other as long as it takes; torchrun ends them all when one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(days=7))


def say(order):
    """From the first process, what is trained next; the others get it. None: nothing more."""
    orders = [order]
    dist.broadcast_object_list(orders)
    return orders[0]


def train(run, folder, device, stop, progress, hurry, half=None, graphs=True):
    """`trainer.train` by all processes, called by the first; what they tell each other cannot be in a CUDA graph."""
    ranks = Ranks(layout(run, size()))
    progress(run=run, text=f"{ranks.layout} on {size()} processes")
    say((run, folder, device, torch.get_num_threads(), half))
    return together(run, folder, device, stop, progress, hurry, ranks, half)


def follow(device):
    """Train what the first process says, until it says that there is nothing more."""
    from .launch import interruptible

    connect(device)
    with interruptible() as stopped:
        while order := say(None):
            run, folder, device, threads, half = order
            torch.set_num_threads(threads)
            stop = lambda: "stopped" if stopped.is_set() else None
            with suppress(Stopped, trainer.Diverged):  # the first process tells
                ranks = Ranks(layout(run, size()))
                together(run, folder, device, stop, lambda **message: None, None, ranks, half)
    dist.destroy_process_group()


def together(run, folder, device, stop, progress, hurry, ranks, half):
    try:
        return trainer.train(run, folder, pick_device(device), stop, progress, hurry, ranks, half)
    except (Stopped, trainer.Diverged):  # in all processes alike
        raise
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # in this process alone, maybe: the others would wait
        raise SystemExit(f"silalib: error: {error}") from None
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise SystemExit("silalib: error: another process ended: see above; start again to go on") from None
