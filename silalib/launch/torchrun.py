"""torchrun -m silalib train ...: the first process drives, and all of them train every run together, one by one."""

import os
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import Stopped, UserError
from ..training import execution, trainer
from ..training.network_parallel import Ranks
from .processes import interruptible


def size():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def own_gpu(name, place=None):
    """The device of the process at a place, from 0, by default that of torchrun: GPUs are taken in turn."""
    device = execution.pick_device(name)
    if place is None and device.index is not None:
        raise UserError(f"device {name} is one GPU for {size()} processes: use --device auto")
    place, several = os.environ.get("LOCAL_RANK") if place is None else place, device == torch.device("cuda")
    return torch.device("cuda", int(place) % torch.cuda.device_count()) if several else device


@contextmanager
def leading(device):
    """In the first of torchrun's processes: all of them train what is trained meanwhile.
    The others are released at the end, and by a UserError; after any other error, torchrun ends them."""
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
    """Join the processes that torchrun has started, which ends all when one dies: they wait as long as it takes."""
    device, backend = own_gpu(device), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))


def say(order):
    """Broadcast what is trained next; None ends. The first process gives it, the others get it."""
    orders = [order]
    dist.broadcast_object_list(orders)
    return orders[0]


def train(run, folder, device, *, stop, progress, graphs, **how):
    """`trainer.train` by all processes, called by the first; a run of another number of networks it trains alone."""
    if len(run.nets) != size():
        progress(run=run, text=f"{len(run.nets)} of {size()} processes are needed: the first one trains it alone")
        return trainer.train(run, folder, own_gpu(device), stop=stop, progress=progress, graphs=graphs, **how)
    progress(run=run, text=f"network-parallel on {size()} processes")
    say((run, folder, device, torch.get_num_threads(), how["bf16"]))
    return together(run, folder, device, stop=stop, progress=progress, **how)  # not graphs: they cannot hold messages


def follow(device):
    """In the other processes: train what the first one says, until it says that there is nothing more."""
    connect(device)
    with interruptible() as stopped:
        while order := say(None):
            run, folder, device, threads, bf16 = order
            torch.set_num_threads(threads)
            with suppress(Stopped, trainer.Diverged):  # the first process tells
                together(run, folder, device, stop=lambda: "stopped" if stopped.is_set() else None, bf16=bf16)
    dist.destroy_process_group()


def together(run, folder, device, **how):
    try:
        return trainer.train(run, folder, own_gpu(device), ranks=Ranks(parallel=True), **how)
    except (Stopped, trainer.Diverged):  # in all processes alike
        raise
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # in this process alone, maybe: the others would wait
        raise SystemExit(f"silalib: error: {error}") from None
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise SystemExit("silalib: error: another process ended: see above; start again to go on") from None
