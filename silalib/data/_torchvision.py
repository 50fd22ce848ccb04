"""Import torchvision through this module: it works even where its compiled operators do not fit the installed torch.

A torchvision built for another device then fails with 'operator torchvision::nms does not exist'. Nothing here uses its
operators, so what its import asks for is declared instead.
"""

try:
    import torchvision
except RuntimeError:
    from torch import library

    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
