"""Small runs that test_torchrun.py trains in one process, and this script under torchrun, where it notes what it saw.

Usage: torchrun --nproc-per-node 2 tests/shared_runs.py NAME FOLDER [STEP]: trains GRIDS[NAME] as `python -m silalib
train` does, writes one JSON file per process into FOLDER, and sends itself SIGTERM in a STEP of the second process.
"""

import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from silalib import experiments
from silalib.__main__ import leave, main
from silalib.models import MODELS
from silalib.run import Run
from silalib.training import measure, trainer


def smooth(factory):
    """The network without ReLU and max-pool, where a rounding error could switch a unit and change the gradient."""

    def build(*arguments):
        network = factory(*arguments)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(module, name, torch.nn.Tanh())
                if isinstance(child, torch.nn.MaxPool2d):
                    setattr(module, name, torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        return network

    return build


SMOOTH = {name: smooth(MODELS[name]) for name in ("convnet12", "mobilenet")}
BASE = {
    "dataset": "digits",
    "nets": ("convnet12",) * 2,
    "width": 0.0625,
    "epochs": 2,
    "train_size": 64,
    "batch_size": 16,
    "milestones": (1,),
    "augment": "crop+flip",
    "lr": 0.02,
}
EVERY_PART = {"noise_images": 21, "noise_sigmas": 1, "noise_draws": 1, "hessian_images": 10}
NETWORKS = {
    "sila": Run(**BASE, method="sila"),
    "dml": Run(**BASE, method="dml"),
    "sila+dml": Run(**BASE, method="sila+dml", betas=(1, 0.5), **EVERY_PART),
    "unequal": Run(**BASE | {"nets": ("mobilenet", "convnet12")}, method="sila", coupling=0.7),
}
ALONE = Run(**BASE | {"nets": ("convnet12",)}, method="ind")
GRIDS = {"all": [*NETWORKS.values(), ALONE], "two": [NETWORKS["sila"], NETWORKS["dml"]], "alone": [ALONE]}


def exhibit(name):
    return {"shared": experiments.Exhibit("Shared", lambda profile="quick", seeds=None: GRIDS[name], "00_shared")}


def watched(folder, last_step):
    """Note of each run what is exchanged while it trains, and the parameters that are in memory at its end."""
    messages, seen = Counter(), {}

    def note(function):
        def call(*arguments, **more):
            tensors = [arguments[1] if function.__name__ == "all_gather" else arguments[0]]
            messages.update(f"{function.__name__} {t.dtype} {list(t.shape)}" for t in tensors if torch.is_tensor(t))
            return function(*arguments, **more)

        return call

    dist.all_gather, dist.all_reduce = note(dist.all_gather), note(dist.all_reduce)
    update, final = trainer.Training.update, measure.final

    def noted(self, *batch):
        if self.step == last_step and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        before = messages.copy()
        update(self, *batch)
        seen.setdefault(self.run.key, {"first": self.step, "steps": 0, "step": dict(messages - before)})["steps"] += 1

    def at_end(training, pauses):
        gc.collect()
        parameters = [p for p in gc.get_objects() if type(p) is torch.nn.Parameter]
        seen[training.run.key]["parameters"] = sum(p.numel() for p in parameters)
        return final(training, pauses)

    trainer.Training.update, measure.final = noted, at_end
    try:
        return main(["train", "shared", "--device", "cpu"])
    finally:
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    MODELS.update(SMOOTH)
    experiments.EXHIBITS = exhibit(sys.argv[1])
    leave(watched(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
