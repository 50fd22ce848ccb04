"""AutoAugment's policy for CIFAR-10 (Cubuk et al. 2018), on a whole batch of uint8 images at once.

The operations are those of torchvision.transforms.v2.AutoAugment with its defaults. Each image has a sub-policy of its
own, and for each of its two operations a coin and a sign of its own."""

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch

POLICY = [tuple(map(tuple, pair)) for pair in json.loads(Path(__file__).with_suffix(".json").read_bytes())]
"""The 25 sub-policies: two operations each, as (name, probability, bin of the magnitude)."""

SIGNED = ("ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
# of every sub-policy both operations, each with both signs; some have none
STEPS = [(name, level, n and name in SIGNED) for sub in POLICY for name, _, level in sub for n in (False, True)]
OPERATIONS = (("Identity", None, False), *dict.fromkeys(STEPS))
"""All that can happen to an image in one step: (name, bin of the magnitude, whether the magnitude is negative)."""
NAMES = tuple(dict.fromkeys(name for name, _, _ in OPERATIONS))


def draw(n, generator):
    """The random choices for n images: sub-policy (n,), and for both its operations applied (n, 2), negative (n, 2)."""
    sub_policy = torch.randint(len(POLICY), (n,), generator=generator)
    probability = torch.tensor([[p for _, p, _ in operations] for operations in POLICY])
    applied = torch.rand(n, 2, generator=generator) < probability[sub_policy]
    negative = torch.rand(n, 2, generator=generator) < 0.5
    return sub_policy, applied, negative


def autoaugment(images, sub_policy, applied, negative, fixed_shapes=None):
    """Apply the choices of `draw` to uint8 images (B, H, W, C) of one or three channels; returns new images.
    fixed_shapes: compute each operation for all images, so that the step can be captured in a graph. By default so on a
    GPU; on a CPU the other way is several times faster."""
    fixed_shapes = images.device.type != "cpu" if fixed_shapes is None else fixed_shapes
    constants = _constants(*images.shape[1:3], images.device)
    for stage in range(2):
        operation = constants.operation[sub_policy, stage, negative[:, stage].long()]
        images = apply(images, torch.where(applied[:, stage], operation, 0), fixed_shapes)
    return images


def apply(images, operation, fixed_shapes=False):
    """Apply to each of uint8 images (B, H, W, C) the operation of its index (B,) in OPERATIONS; returns new images."""
    constants = _constants(*images.shape[1:3], images.device)
    for family, function in enumerate(FAMILIES):
        chosen = constants.family[operation] == family
        if fixed_shapes:
            images = torch.where(chosen[:, None, None, None], function(images, operation, constants), images)
        elif len(rows := chosen.nonzero()[:, 0]):
            images = images.index_put((rows,), function(images[rows], operation[rows], constants))
    return images


def _map_levels(images, operation, constants):
    """Operations on each level of each channel: one table (256,) per image and channel, and one gather for all."""
    pixels, levels = images.flatten(1, 2), torch.arange(256, device=images.device)[:, None]
    index = pixels.long()
    low, high = pixels.amin(1, keepdim=True), pixels.amax(1, keepdim=True)
    stretched = ((levels - low.float()) / ((high - low) * (1 / 255))).clamp(0, 255)
    count = torch.zeros(len(images), 256, images.shape[-1], dtype=torch.int32, device=images.device)
    count.scatter_add_(1, index, count.new_ones(1).expand_as(index))
    below = count.cumsum(1, dtype=torch.int32) - count
    step = (pixels.shape[1] - count.gather(1, high.long())) // 255
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    own, other = constants.weights[operation].T[:, :, None, None]
    contrasted = (levels * own + _grey(images).mean((1, 2))[:, None] * other).clamp(0, 255)
    table = constants.table[operation][:, :, None].expand_as(count)
    name = constants.name[operation][:, None, None]
    kinds = ("AutoContrast", low < high, stretched), ("Equalize", step > 0, equalized), ("Contrast", True, contrasted)
    for kind, possible, tables in kinds:
        table = torch.where((name == NAMES.index(kind)) & possible, tables.to(torch.uint8), table)
    return table.gather(1, index).view_as(images)


def nearest(y, x, height, width):
    """Numbers (..., H * W) of the pixels nearest to coordinates (..., H, W), and whether they lie in the image."""
    row, column = y.round().long(), x.round().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, row * width + column, 0).flatten(-2), inside.flatten(-2)


def move(images, source, inside):
    """uint8 images (B, H, W, C) of the pixels `source` (B, H * W), black where not `inside`."""
    moved = images.flatten(1, 2).gather(1, source[:, :, None].expand(-1, -1, images.shape[-1]))
    return (moved * inside[:, :, None]).view_as(images)


def _saturate(images, operation, constants):
    if images.shape[-1] == 1:
        return images
    own, other = constants.weights[operation].T[:, :, None, None, None]
    return (images * own + _grey(images) * other).clamp(0, 255).to(torch.uint8)


def _sharpen(images, operation, constants):
    """Away from, or towards, the mean of a pixel (weight 5) and its eight neighbours; the border stays."""
    _, other = constants.weights[operation].T[:, :, None, None, None]
    x = images.float()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    centre = x[:, 1:-1, 1:-1]
    blurred = ((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * centre) / 13).round()
    centre += (blurred - centre) * other
    return x.clamp(0, 255).to(torch.uint8)


def _grey(images):
    """Whole grey levels of images (n, H, W, C) as floats (n, H, W, 1)."""
    if images.shape[-1] == 1:
        return images.float()
    red, green, blue = images.split(1, -1)
    return red.mul(0.2989).add(green, alpha=0.587).add(blue, alpha=0.114).floor()


_move = lambda images, operation, constants: move(images, constants.source[operation], constants.inside[operation])
FAMILIES = {
    _map_levels: ("Invert", "Solarize", "Posterize", "Brightness", "Contrast", "AutoContrast", "Equalize"),
    _move: ("ShearY", "TranslateX", "TranslateY", "Rotate"), _saturate: ("Color",), _sharpen: ("Sharpness",),
}  # fmt: skip


@lru_cache
def _constants(height, width, device):
    """What depends on the operation alone, as tensors on one device, for images of H x W; K = len(OPERATIONS)."""
    names, magnitudes = zip(*((operation[0], magnitude(*operation, height, width)) for operation in OPERATIONS))
    index = [OPERATIONS.index(step) for step in STEPS]
    family = {name: i for i, members in enumerate(FAMILIES.values()) for name in members}
    source, inside = zip(*(_source(*operation, height, width) for operation in zip(names, magnitudes)))
    tensors = {
        "operation": torch.tensor(index).view(-1, 2, 2),  # in OPERATIONS: (25, 2, 2) by sub-policy, step and sign
        "name": torch.tensor([NAMES.index(name) for name in names]),  # (K,): index in NAMES
        "family": torch.tensor([family.get(name, -1) for name in names]),  # (K,): index in FAMILIES, or identity
        "table": torch.stack([_table(*operation) for operation in zip(names, magnitudes)]),  # (K, 256): new levels
        "source": torch.stack(source),  # (K, H * W): the pixel that each pixel takes its value from
        "inside": torch.stack(inside),  # (K, H * W): whether that lies in the image
        "weights": torch.tensor([(1 + m, -m) for m in magnitudes]),  # (K, 2): of the image, and what it is blended with
    }
    return SimpleNamespace(**{name: tensor.to(device) for name, tensor in tensors.items()})


def magnitude(name, level, negative, height, width):
    """The signed magnitude of an operation in its own unit: slope, pixels, degrees, bits, grey level, factor - 1."""
    if level is None or name == "Posterize":
        return 0.0 if level is None else 8 - round(level * 4 / 9)
    ends = {"ShearY": (0, 0.3), "TranslateX": (0, 150 / 331 * width), "TranslateY": (0, 150 / 331 * height)}
    ends |= {"Rotate": (0, 30.0), "Solarize": (255, 0)}
    value = torch.linspace(*ends.get(name, (0, 0.9)), 10)[level].item()
    return -value if negative else value


def _table(name, m):
    levels = torch.arange(256)
    changes = {
        "Invert": lambda: 255 - levels,
        "Solarize": lambda: torch.where(levels < m, levels, 255 - levels),
        "Posterize": lambda: levels >> (8 - m) << (8 - m),
        "Brightness": lambda: (levels * (1 + m)).clamp(0, 255),
    }
    return changes.get(name, lambda: levels)().to(torch.uint8)


def _source(name, m, height, width):
    """The (source, inside) of `_constants`, both (H * W,); coordinates are in pixels from the image's corner."""
    if name == "Rotate":
        return rotation(torch.tensor(m, dtype=torch.float64), height, width)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width)), indexing="ij")
    moved = {"ShearY": (y + m * x, x), "TranslateX": (y, x - int(m)), "TranslateY": (y - int(m), x)}
    y, x = moved.get(name, (y, x))
    return nearest(y - 0.5, x - 0.5, height, width)


def rotation(degrees, height, width):
    """Where the pixels of images of H x W come from that are turned counter-clockwise about their centre by degrees
    (..., 1, 1), float64: what `nearest` gives."""
    centred = (torch.arange(n, dtype=torch.float64, device=degrees.device) - (n - 1) / 2 for n in (height, width))
    (y, x), angle = torch.meshgrid(*centred, indexing="ij"), torch.deg2rad(degrees)
    c, s = angle.cos(), angle.sin()
    return nearest(s * x + c * y + (height - 1) / 2, c * x - s * y + (width - 1) / 2, height, width)
