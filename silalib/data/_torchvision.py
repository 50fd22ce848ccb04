"""Import torchvision through this module: one built for another device lacks operators, which nothing here uses."""

try:
    import torchvision
except RuntimeError:
    from torch import library

    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
