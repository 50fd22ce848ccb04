"""One's own networks and data, as what the loop trains: a `Task` for one training."""

import hashlib
import math
import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from ..errors import UserError, told
from ..files import sha256
from ..randomness import derive, generator, seed_all
from ..run import PROTOCOL
from ..training.execution import Speed
from ..training.metrics import cross_entropy, ece, ensemble
from ..training.trainer import Training

OF_A_LOADER = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


def described(thing):
    """By what a second call knows a function: its code, its defaults and what it closes over; not what it calls."""
    if code := getattr(thing, "__code__", None):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        thing = code.co_code, code.co_consts, code.co_names, thing.__defaults__, cells
    return re.sub(r" at 0x\w+(, file .*?, line \d+)?", "", repr(thing))


class Samples:
    """A data set in batches on the device, read once at the start for its labels (n,) and its checksum."""

    def __init__(self, name, given, size, device):
        loader = given if isinstance(given, DataLoader) else DataLoader([])  # whose settings are the usual ones
        dataset = given.dataset if loader is given else given
        with told(name):
            if isinstance(given, (tuple, list)) and [hasattr(part, "__array__") for part in given] == [True, True]:
                x, y = map(torch.as_tensor, given)
                dataset = TensorDataset(x.float() if x.is_floating_point() else x, y)
        sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not sized or isinstance(dataset, (IterableDataset, tuple)) or loader.batch_sampler is None:
            kinds = "a Dataset with a length, a pair of tensors (x, y), or a DataLoader that makes batches of a Dataset"
            raise UserError(f"{name} must be {kinds}, not {type(dataset).__name__}")
        if len(dataset) < 2:
            raise UserError(f"{name} has {len(dataset) or 'no'} samples: give it two or more")
        self.name, self.dataset, self.device, self.images = name, dataset, device, self
        self.size = loader.batch_size if loader is given and loader.batch_size else size
        self.collate, self.how = loader.collate_fn, {key: getattr(loader, key) for key in OF_A_LOADER}
        labels, digest = [], hashlib.sha256()
        with told(name):
            for batch in self.batches(torch.arange(len(self)), self.size):
                labels.append(self.target(batch))
                for leaf in filter(torch.is_tensor, tree_leaves(batch)):
                    if leaf.is_floating_point() and leaf.isnan().any():
                        raise UserError(f"{name} has NaN: fill or remove what is missing")
                    digest.update(leaf.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.labels, self.checksum = torch.cat(labels), digest.hexdigest()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        """A batch by (seed, rows). What augmentation may draw from is seeded for it, so every worker makes the same."""
        seed, rows = key
        seed_all(seed)
        if isinstance(self.dataset, TensorDataset) and self.collate is default_collate:
            return [tensor[rows] for tensor in self.dataset.tensors]
        at_once = getattr(self.dataset, "__getitems__", None)
        batch = self.collate(at_once(rows) if at_once else [self.dataset[row] for row in rows])
        return dict(batch) if isinstance(batch, Mapping) else batch

    def batches(self, order, size, path=(0, "batch"), first=0):
        """Batches of the rows `order` (m,), from number `first` on; batch i is drawn with the seed of (*path, i)."""
        keys = [(derive(*path, i), rows.tolist()) for i, rows in enumerate(order.split(size))]
        for batch in DataLoader(self, batch_size=None, sampler=keys[first:], **self.how):
            yield tree_map(lambda leaf: leaf.to(self.device) if hasattr(leaf, "to") else leaf, batch)

    def target(self, batch):
        last = batch[-1] if isinstance(batch, (list, tuple)) else None
        target = batch.get("labels") if isinstance(batch, dict) else last
        if not torch.is_tensor(target) or target.dim() != 1 or target.is_floating_point():
            form = "(inputs, labels), or dictionaries with 'labels': one class index a sample, as whole numbers (B,)"
            raise UserError(f"{self.name} must give batches {form}")
        return target.long()


class Adapted(torch.nn.Module):
    """A network of any kind: from a batch to a tuple of logits (B, N)."""

    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, batch):
        if self.call:
            found = self.call(self.network, batch)
        elif isinstance(batch, dict):
            found = self.network(**{name: value for name, value in batch.items() if name != "labels"})
        else:
            found = self.network(*batch[:-1])
        found = getattr(found, "logits", found)
        found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        if not found or not all(torch.is_tensor(z) and z.dim() == 2 and z.shape[1] > 1 for z in found):
            kinds = dict.fromkeys(str(tuple(z.shape)) if torch.is_tensor(z) else type(z).__name__ for z in found)
            raise UserError(f"the network gives {', '.join(kinds)}: it must give logits (batch, classes), one or more")
        return found


class Optimizers(list):
    """Each network's (optimizer, schedule, which sets its learning rate), as what the loop takes for one optimizer."""

    param_groups = ()
    parts = property(lambda self: [part for pair in self for part in pair])
    zero_grad = lambda self: [optimizer.zero_grad() for optimizer, _ in self]
    step = lambda self: [part.step() for part in self.parts]
    state_dict = lambda self: {"param_groups": [], "parts": [part.state_dict() for part in self.parts]}
    load_state_dict = lambda self, state: [part.load_state_dict(o) for part, o in zip(self.parts, state["parts"])]


class Task(SimpleNamespace):
    """One training, with what the loop asks of a `run.Run` and of a `trainer.Material`. `rehearse` adds heads, the
    (network, exit) of each, and recipe, what identifies the networks and their optimizers; `train_all` its result."""

    __hash__, __eq__ = object.__hash__, object.__eq__
    dataset, config, n_heads = "its own", property(lambda self: self.key), property(lambda self: len(self.heads))
    steps_per_epoch = property(lambda self: math.ceil(len(self.splits["train"]) / self.batch_size))
    checksum = property(lambda self: "".join(split.checksum for split in self.splits.values()))
    learning_rate = lambda self, step: float(self.optimizers[0][0].param_groups[0]["lr"])
    inputs = lambda self, batch, channels_last: batch
    __str__ = lambda self: f"{self.method} seed {self.seed}"

    @property
    def key(self):
        """The name of its folder: of settings, functions, networks and data."""
        functions = self.loss, self.call, self.new_schedule, *self.metrics.values()
        settings = self.method, self.seed, self.epochs, self.batch_size, *self.metrics, self.device.type, PROTOCOL
        known = repr([settings, [described(function) for function in functions], self.recipe, self.checksum])
        return re.sub(r"[^\w+]+", "-", f"{self.method}-s{self.seed}-{sha256(known.encode())[:12]}")

    def network(self, slot):
        seed = derive(self.seed, "weights", slot)
        torch.manual_seed(seed)  # a GPU's generators too
        seed_all(seed)
        return Adapted(self.nets[slot](), self.call)

    def optimizer(self, nets, fused):
        own, steps = [self.new_optimizer(net.network) for net in nets], self.epochs * self.steps_per_epoch
        self.optimizers = Optimizers((optimizer, self.new_schedule(optimizer, steps)) for optimizer in own)
        return self.optimizers

    def epoch(self, number, first_step, end_step):
        train = self.splits["train"]
        order = torch.randperm(len(train), generator=generator(self.seed, "epoch", number))
        for batch in train.batches(order, self.batch_size, (self.seed, "batch", number), first_step):
            yield batch, train.target(batch)

    def training(self, progress=lambda **message: None):
        training = Training(self, self.device, Speed(bf16=False, channels_last=False), None, progress, material=self)
        training.dropout = dict.fromkeys(training.nets, True)  # any layer may draw
        return training

    def measured(self, logits):
        """The metrics of each head, and beside them those of the networks' ensemble, of test logits (n, N)."""
        top1, nll = lambda z, y: 100 * (z.argmax(1) == y).double().mean(), lambda z, y: cross_entropy(z, y).mean()
        functions = {"top1": top1, "nll": nll, "ece": ece} | self.metrics
        score = lambda z, y, prefix="": {f"{prefix}{name}": float(f(z, y)) for name, f in functions.items()}
        labels, last = self.splits["test"].labels, {net: z for (net, _), z in zip(self.heads, logits)}
        together = score(ensemble(list(last.values()), labels)[1], labels.cpu(), "ensemble_") if len(last) > 1 else {}
        return [score(z.double(), labels) | together for z in logits]
