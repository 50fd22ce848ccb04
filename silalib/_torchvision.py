"""Import torchvision even where its compiled operators do not fit the installed torch.

A torchvision built for another device fails at import with 'operator torchvision::nms does not exist'. Nothing
here uses those operators, so where torchvision's own library cannot be loaded their schemas are declared instead.
Import torchvision through this module only: `from silalib._torchvision import torchvision`.
"""

import importlib.util
from pathlib import Path

import torch
from torch import library

_OPERATORS = ("nms", "qnms")


def _load_operators():
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    for compiled in package.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            continue
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_load_operators()

import torchvision  # noqa: E402, F401
