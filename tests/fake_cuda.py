"""Whole runs on a GPU that is not there: tensors on "cuda" with a shape and a type, but without numbers.

Each of CASES is trained, evaluated and measured as `trainer.train` does it. Tensors without numbers refuse a mixture
of devices, and in a step whatever would make the host wait for a number; `Watch` refuses copies between the two. The
library made of fake_cuda.cpp must be in the process before torch is.

Not covered: every number; what the host decides by numbers between the steps, where it is given made-up ones; the
choice of images by masks and the data sets, which are made up too; images that are streamed, checkpoints, several
processes, and early exit in inference. What a kernel itself waits for is not seen, nor whether it can be captured.
"""

import json
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from silalib import data
from silalib.losses import METHODS
from silalib.models import EXITS, MODELS, STEMS
from silalib.models.layers import ClassLayer
from silalib.run import Run
from silalib.training import checkpoint, execution, measure, metrics, robustness, trainer

aten = torch.ops.aten
BASE = {"dataset": "cifar10", "nets": "convnet12", "method": "ind", "width": 0.0625, "epochs": 1}
BASE |= {"batch_size": 500, "augment": "crop+flip"}
SIZES = {"train": 1000, "holdout": 20, "test": 1000}
"""Two steps, the first of which is free, and two batches that are evaluated."""
EVERY_PART = {"noise_images": 20, "noise_sigmas": 1, "noise_draws": 1, "hessian_images": 10, "holdout": 20}
MEASURED = ("convnet12", "vgg13")
"""Networks with every measurement: in float32 with features, and in bfloat16 with dropout."""


def network(name, stem):
    more = {"blocks": 2, "method": "sila", "holdout": 20} if name in EXITS else {}
    if stem == "imagenet":
        return {"nets": name, "stem": stem, "dataset": "digits64"} | more
    return {"nets": name} | more | (EVERY_PART if name in MEASURED else {})


CASES = {f"{name}, {stem} stem": network(name, stem) for name in MODELS for stem in STEMS.get(name, ("cifar",))}
CASES |= {method: {"nets": ("convnet12",) * 2, "method": method} for method in METHODS}
CASES |= {augment: {"augment": augment} for augment in ("crop+flip+autoaugment", "crop+flip+rotate15")}


class Exchanged(Exception):
    """The host and the GPU exchange something in a step."""


class Watch(TorchDispatchMode):
    """Sees every operation before the tensors without numbers do."""

    in_step = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        indices = args[1] if operation in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()
        mask = lambda t: t is not None and t.dtype == torch.bool
        if self.in_step:
            if any(map(mask, indices)):
                raise Exchanged(f"{operation}: how many a mask chooses")
        elif operation is aten._local_scalar_dense.default:
            return int(args[0].dtype != torch.bool)
        elif operation is aten._unique2.default:
            return args[0][:2], args[0], args[0]
        elif indices:  # as if a mask chose all
            args = (args[0], [torch.arange(len(t), device=t.device) if mask(t) else t for t in indices], *args[2:])
        fused = operation is aten._fused_sgd_.tensor_lr  # it has no shapes to ask for
        result = None if fused else operation(*args, **(kwargs or {}))
        devices = {t.device.type for t in [*given, *tree_leaves(result)] if isinstance(t, torch.Tensor)}
        if self.in_step and len(devices) > 1:
            raise Exchanged(f"{operation}: of {' and '.join(sorted(devices))}")
        return result

    def step(self, method):
        """A method of Training in which nothing may wait; the first step is free to make what then stays on the GPU."""

        def watched(training, /, *args, **more):
            before, self.in_step = self.in_step, training.step > 0
            try:
                return method(training, *args, **more)
            finally:
                self.in_step = before

        return watched


def zeros(tensor):
    """In place of torch.Tensor.numpy."""
    if tensor.device.type != "cpu":
        raise TypeError(f"numpy() of a tensor on {tensor.device}")
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def to_file(tensors):
    """In place of to_safetensors."""
    for tensor in tensors.values():
        zeros(tensor)
    return b""


def convert(module, function, recurse=True):
    """In place of torch.nn.Module._apply, which exchanges the content of two tensors: these have none."""
    for child in module.children():
        child._apply(function)
    for name, p in module._parameters.items():
        module._parameters[name] = None if p is None else torch.nn.Parameter(function(p.detach()), p.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def splits(run, device):
    channels, *size = data.dataset(run.dataset).image
    images = lambda n: torch.empty(n, *size, channels, dtype=torch.uint8, device=device)
    labels = lambda n: torch.zeros(n, dtype=torch.int64, device=device)
    return {k: data.Split(images(n), labels(n)) for k, n in SIZES.items()}, data.known_checksum(run.dataset)


def replace_what_needs_a_gpu_or_numbers():
    for name in ("CUDAGraph", "Event", "Stream", "current_stream", "graph", "manual_seed", "set_rng_state", "stream"):
        setattr(torch.cuda, name, mock.MagicMock())
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda **_: True
    torch.cuda.device_count, torch.cuda.current_device = lambda: 1, lambda: 0
    torch.cuda.get_rng_state = torch.cuda.get_device_name = lambda device: "none"
    FakeTensorMode.avoid_device_init = True
    torch.nn.Module._apply, torch.Tensor.numpy = convert, zeros
    data.splits, data.balanced_order = splits, lambda labels, seed=0: torch.arange(len(labels))
    data.normalisation = lambda split: (torch.zeros(split.images.shape[3]), torch.ones(split.images.shape[3]))
    robustness.generator = lambda *path, device="cpu": None  # that of a GPU is not there
    robustness.eigsh = lambda operator, k, v0, **more: (operator.matvec(v0)[:1], v0[:, None])
    measure.to_safetensors, checkpoint.checkpoint_bytes = to_file, lambda state: b""
    execution.EAGER_CALLS = 100  # a capture would tell every error as its own


# -- faults, each of which must end its run


def in_loss(fault):
    ind = METHODS["ind"]
    return mock.patch.dict(METHODS, ind=lambda logits, target, **more: ind([fault(logits[0])], target, **more))


def in_images(fault):
    return mock.patch.object(trainer, "transform", lambda images, *choices: fault(images))


def in_evaluation(fault):
    forward = ClassLayer.forward
    return mock.patch.object(ClassLayer, "forward", lambda s, x: forward(s, x if s.training else fault(x)))


def in_gradient(fault):
    return in_loss(lambda z: (z.register_hook(fault), z)[1])


def in_learning_rate(fault):
    sgd = torch.optim.SGD
    return mock.patch.object(torch.optim, "SGD", lambda parameters, lr, **more: sgd(parameters, fault(lr), **more))


def at_the_end(fault):
    per_image = metrics.per_image
    return mock.patch.object(metrics, "per_image", lambda z, target, net: per_image(*fault(z, target), net))


MIXED, WAITED, COPIED = "DeviceMismatch", "DataDependentOutput|DynamicOutputShape|a mask", "of cpu and cuda"
FAULTS = {
    "a vector on the host in the loss": (in_loss(lambda z: z + torch.ones(10)), MIXED),
    "an image on the host": (in_images(lambda x: torch.where(x > 9, x, torch.zeros(32, 32, 3).byte())), MIXED),
    "labels on the host at the end": (at_the_end(lambda z, y: (z, y.cpu())), MIXED),
    "a decision in the loss": (in_loss(lambda z: z if z.mean() > 0 else -z), WAITED),
    "a number of the images": (in_images(lambda x: x + x.amax().item()), WAITED),
    "a list of the images": (in_images(lambda x: x + x[0, 0, 0].tolist()[0]), WAITED),
    "the places of zeros": (in_images(lambda x: x[(x == 0).nonzero()[:, 0]]), WAITED),
    "images chosen by a mask": (in_images(lambda x: x[x.amax((1, 2, 3)) > 0]), WAITED),
    "a mask written to": (in_loss(lambda z: z.index_put((z > 9,), z.new_zeros(1))), WAITED),
    "a number in evaluation": (in_evaluation(lambda x: x * x.mean().item()), WAITED),
    "a number in a gradient": (in_gradient(lambda g: g * g.mean().item()), WAITED),
    "a new constant in the loss": (in_loss(lambda z: z * torch.tensor(0.5, device=z.device)), COPIED),
    "a constant on the host in the loss": (in_loss(lambda z: z * torch.tensor(0.5)), COPIED),
    "a vector brought from the host": (in_images(lambda x: x + torch.ones(3).byte().to(x.device)), COPIED),
    "an index on the host": (in_images(lambda x: x[torch.arange(len(x))]), COPIED),
    "logits brought to the host": (in_loss(lambda z: (z.cpu(), z)[1]), COPIED),
    "a constant on the host in a gradient": (in_gradient(lambda g: g * torch.tensor(0.5)), COPIED),
    "a learning rate on the host": (in_learning_rate(lambda lr: lr.cpu()), COPIED),
    "a constant on the host in evaluation": (in_evaluation(lambda x: x * torch.tensor(0.5)), COPIED),
}


def main(folder):
    """Print a JSON line [name, traceback or null] for every case and every fault; records go to `folder`."""
    mode, watch = FakeTensorMode(allow_non_fake_inputs=True), Watch()
    replace_what_needs_a_gpu_or_numbers()
    for name in ("set_step", "update", "forward"):
        setattr(trainer.Training, name, watch.step(getattr(trainer.Training, name)))
    with mode, watch:
        for i, name in enumerate([*CASES, *FAULTS]):
            error = None
            try:
                with FAULTS[name][0] if name in FAULTS else mock.patch.dict({}):
                    trainer.train(Run(**BASE | CASES.get(name, {})), Path(folder) / str(i), "cuda")
            except Exception:
                error = traceback.format_exc()
            print(json.dumps([name, error]), flush=True)
