"""What runs cost beside each other, and how long they take on this machine."""

import time
from collections import Counter
from functools import cache

import torch

from .. import data
from ..models import count_macs
from ..run import Run
from ..training import execution, provenance
from .progress import duration


def seconds_left(left, records):
    """Run of `left` -> about how long its training takes on this machine: CPU seconds, on a GPU seconds.
    From the records of the same networks that were trained on this kind of machine; without one, a step is timed."""
    device, seconds, units = execution.pick_device("auto"), Counter(), Counter()
    gpu = device.type == "cuda"
    for run, record in records.items():
        origin, net = record.result["provenance"], run.nets[0]
        if provenance.device_kind(origin) == device.type and (gpu or origin.get("amx") == execution.amx()):
            seconds[net] += origin.get("seconds" if gpu else "cpu_seconds", 0)
            units[net] += cost(run)
    for run in left:
        if not seconds[net := run.nets[0]]:
            seconds[net], units[net] = timed_step(run, device), 1
    return {run: cost(run) * seconds[run.nets[0]] / units[run.nets[0]] for run in left}


def hours(seconds):
    """What `seconds_left` gives, in words: "12.5 core-hours"; where no CPU should do it, that too."""
    unit = "GPU" if execution.pick_device("auto").type == "cuda" else "core"
    if seconds < 3600:
        return f"{duration(seconds)} of one {unit}"
    return f"{seconds / 3600:,.1f} {unit}-hours" + (", a task for GPUs" if unit == "core" and seconds > 4e6 else "")


def timed_step(run, device, images=32):
    """Seconds that a unit of `cost` takes here: a run's first network forward and backward, on made-up images."""
    net, batch = run.network(0), torch.rand(images, *data.dataset(run.dataset).image)
    net, batch = (each.to(device, memory_format=torch.channels_last) for each in (net, batch))
    dtype = execution.precision(run.nets[0], device, execution.bfloat16_pays(device))
    times, clock = [], time.perf_counter if device.type == "cuda" else time.process_time
    with execution.one_thread():
        for _ in range(3):
            began = clock()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                z = net(batch)
            sum(head.float().logsumexp(1).mean() for head in (z if isinstance(z, tuple) else (z,))).backward()
            sum(p.grad.sum() for p in net.parameters()).item()  # waits for a GPU
            times.append(clock() - began)
    return min(times) / (3 * images * forward_macs(run.dataset, run.nets[0], run.width, run.stem, run.blocks))


@cache
def cost(run):
    """Relative cost of a run: multiply-accumulates of its training and of the test set after each epoch."""
    spec = data.dataset(run.dataset)
    forward = sum(forward_macs(run.dataset, net, run.width, run.stem, run.blocks) for net in run.nets)
    return run.epochs * forward * (3 * (run.train_size or spec.train) + spec.test)


@cache  # runs share theirs, as it takes a while to build a network
def forward_macs(dataset, net, width, stem, blocks):
    run = Run(dataset, net, "ind", width=width, stem=stem, blocks=blocks)
    return count_macs(run.network(0), data.dataset(dataset).image)
