"""A run is its configuration: every field that changes a result, and the key made of them.

torch takes a second to import, so what needs it is imported when the first run is made: help does without."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from operator import index

from .errors import UserError

PROTOCOL = 1
"""Training protocol version; bump it when results change: records of another protocol are refused."""
PAPER_MILESTONES = (30, 55, 80, 105, 135, 160, 180, 200, 220, 240)
CASTS = {
    int: (index, "a whole number"), float: (float, "a number"), str: (str, "a word"),
    bool: (lambda value: {"True": True, "False": False}[repr(value)], "True or False"),
    "nets": (lambda names: (names,) if isinstance(names, str) else tuple(map(str, names)), "a list"),
    tuple: (lambda values: tuple(map(float, values)), "a list"),
}  # fmt: skip
CASTS |= {int | None: CASTS[int], tuple | None: CASTS[tuple]}
"""Name or type of a field -> what makes equal settings equal values, or raises, and what the field takes in words."""


@dataclass(frozen=True)
class Run:
    """One training: C networks (or one network with C exits) on one data set with one method and seed.
    The defaults are the paper's protocol for Tables 1 and 2, completed by our decisions where it is silent."""

    dataset: str = "cifar100"
    nets: tuple = ("resnet18", "resnet18")
    method: str = "sila"
    seed: int = 0
    width: float = 1.0  # of every network
    stem: str = "cifar"  # or "imagenet": the first layers of every network
    betas: tuple | None = None  # one weight per head, None for 1 each
    coupling: float = 1.0  # SiLa's coupling beside the independent terms
    epochs: int = 260
    batch_size: int = 128  # the last incomplete batch of an epoch is dropped
    lr: float = 0.1
    milestones: tuple = PAPER_MILESTONES  # in epochs, whole or not
    gamma: float = 0.5  # factor on the learning rate at each milestone
    warmup: float = 1.0  # epochs of linear warm-up
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    augment: str = "crop+flip"
    train_size: int | None = None  # a fixed, class-balanced subset
    holdout: int = 0  # training images kept out, for calibration
    noise_images: int = 0  # training images under parameter noise at the end (Figure 7b); 0 leaves it out
    noise_sigmas: int = 10
    noise_draws: int = 10
    hessian_images: int = 0  # training images for the largest Hessian eigenvalue at the end; 0 leaves it out
    blocks: int | None = None  # of an MSDNet: its own network of so many blocks; None for all
    init: str = "he"  # initial weights: those of each network's family, or "pytorch": PyTorch's own of every layer

    def __post_init__(self):
        for field in fields(self):  # equal numbers of another type are the same run
            value, (cast, kind) = getattr(self, field.name), CASTS.get(field.name) or CASTS[field.type]
            if value is not None or field.default is not None:
                try:
                    object.__setattr__(self, field.name, cast(value))
                except (KeyError, TypeError, ValueError):
                    raise UserError(f"{field.name} must be {kind}, not {value!r}") from None
        object.__setattr__(self, "method", self.method.lower())
        self._validate()

    def _validate(self):
        from .data import dataset
        from .data.augment import AUGMENTATIONS
        from .losses import LABELS, METHODS
        from .models import EXITS, MODELS, SMALLEST_IMAGE, STEMS

        named = [("method", self.method, METHODS), ("augmentation", self.augment, AUGMENTATIONS)]
        named += [("init", self.init, ("he", "pytorch")), *(("network", net, MODELS) for net in self.nets)]
        for name, value, known in named:
            if value not in known:
                raise UserError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
        if not self.nets:
            raise UserError("a run needs at least one network")
        numbers = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), (int, float))}
        for name, values in (("milestone", self.milestones), ("beta", self.betas or ())):
            numbers |= {f"{name} {i}": value for i, value in enumerate(values, 1)}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value}")
            if name in ("width", "epochs", "batch_size", "lr", "gamma", "noise_sigmas", "noise_draws") and value <= 0:
                raise UserError(f"{name} must be above 0, not {value}")
            if value < 0:
                raise UserError(f"{name} must not be negative, but is {value}")
        net, label, heads, exits = self.nets[0], LABELS[self.method], self.n_heads, EXITS.get(self.nets[0], 0)
        blocks, betas, train_size, batch = self.blocks, self.betas, self.train_size, self.batch_size
        measured, kind = self.noise_images or self.hessian_images, "exits" if exits else "networks"
        mixed = len(self.nets) > 1 and not set(EXITS).isdisjoint(self.nets)
        for bad, message in [
            (mixed, f"{'+'.join(self.nets)}: the exits of an MSDNet are its heads, so it is trained alone"),
            (blocks is not None and not exits, f"blocks belongs to MSDNet; {net} has none"),
            (blocks not in (None, *range(1, exits + 1)), f"blocks must be from 1 to {exits} for {net}, not {blocks}"),
            (exits and measured, f"noise_images and hessian_images are for networks with one head; {net} has {heads}"),
            ("dml" in self.method and heads < 2, f"{label} needs at least two networks or exits"),
            (betas is not None and len(betas) != heads, f"{len(betas or ())} betas for {heads} {kind}: give one each"),
            ("sila" not in self.method and self.coupling != 1, f"coupling belongs to SiLa; {label} has none"),
            (self.width > 100, f"width must be at most 100, not {self.width}"),  # catches typing errors
            (self.momentum >= 1, f"momentum must be below 1, not {self.momentum}"),
            (train_size is not None and train_size < batch, f"train_size {train_size} is below the batch size {batch}"),
        ]:
            if bad:
                raise UserError(message)
        height, width = dataset(self.dataset).image[1:]
        for net in self.nets:
            if min(height, width) < (least := SMALLEST_IMAGE.get(net, 1)):
                raise UserError(f"{net} needs images of {least}x{least} or more; {self.dataset} has {height}x{width}")
            if self.stem not in (stems := STEMS.get(net, ("cifar",))):
                raise UserError(f"{net} has no stem {self.stem!r}: choose from {', '.join(stems)}")

    @property
    def n_heads(self):
        """How many heads a loss sees: the networks, or the exits of one network."""
        from .models import EXITS

        return self.blocks or EXITS.get(self.nets[0], len(self.nets))

    def slot(self, head):
        """The slot of the network that a head belongs to; all exits of an MSDNet belong to slot 0."""
        return min(head, len(self.nets) - 1)

    def network(self, slot):
        """A new network of one slot with its initial weights, a function of (seed, slot) alone."""
        from torch.random import default_generator, fork_rng

        from .data import dataset
        from .models import EXITS, MODELS
        from .randomness import derive

        spec, name = dataset(self.dataset), self.nets[slot]
        of_exits = {"blocks": self.blocks} if name in EXITS else {}
        with fork_rng(devices=[]):
            default_generator.manual_seed(derive(self.seed, "weights", slot))
            network = MODELS[name](spec.classes, spec.image[0], self.width, self.stem, **of_exits)
            for layer in network.modules() if self.init == "pytorch" else ():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        return network

    @property
    def config(self):
        """The full configuration as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self):
        """A readable prefix and a hash of the fields that are not at their default: a new field keeps old keys."""
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.dataset}-{'+'.join(self.nets)}-{self.method}-s{self.seed}-{digest}"

    def __str__(self):
        from .losses import LABELS

        blocks = f" with {self.blocks} blocks" if self.blocks else ""
        return f"{self.dataset} {'+'.join(self.nets)}{blocks} {LABELS.get(self.method, self.method)} seed {self.seed}"
