"""Non-maximum suppression (NMS) of many groups of boxes at once.

Within a group, from the best box down, a box is kept unless it overlaps one already kept:

    keep_j = valid_j and not any(keep_i and IoU(i, j) > threshold for i < j)

with the intersection over the union of the areas as IoU, each operation rounded to float32; boxes
of no area overlap nothing.

    G   groups: one for each level of each image, say
    n   boxes of a group, from the highest score down
    C   4 corner coordinates, x0 y0 x1 y1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backends, check_shape

__all__ = ["BACKENDS", "grouped_nms"]

BACKENDS = Backends(
    operator="grouped_nms",
    variable="MAMBAVISION_NMS_BACKEND",
    modules={
        "triton": f"{__name__}.triton_nms",
        "torchvision": f"{__name__}.torchvision_nms",
    },
)


def grouped_nms(
    boxes: Tensor, valid: Tensor, threshold: float, *, backend: str | None = None
) -> Tensor:
    """Tell which boxes ``torchvision.ops.nms`` would keep of the valid ones of each group.

    Not differentiable. Triton's backend neither waits for the GPU nor depends on more than shapes;
    it needs G n^2 / 8 bytes.

    Args:
        boxes: (G, n, 4) float32, also a strided view.
        valid: (G, n) bool. The others are not kept, and suppress none, whatever their numbers.
        threshold: the largest IoU of two boxes that are both kept.
        backend: "triton", "torchvision", or "auto"; None takes the environment variable
            MAMBAVISION_NMS_BACKEND, and without it "auto": the fastest for the device.

    Returns:
        (G, n) bool.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    check_shape("boxes", boxes, "G n C", {"C": 4})
    if valid.shape != boxes.shape[:2]:
        expected, got = tuple(boxes.shape[:2]), tuple(valid.shape)
        raise ValueError(f"valid must have shape (G, n) = {expected}, not {got}")
    for name, tensor, dtype in (("boxes", boxes, torch.float32), ("valid", valid, torch.bool)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    return BACKENDS.choose(backend, boxes).run(boxes.detach(), valid, threshold=float(threshold))
