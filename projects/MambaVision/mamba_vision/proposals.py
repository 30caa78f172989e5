"""Which of the boxes that an RPN found are its proposals, without waiting for the GPU.

Shapes:
    N images; L levels of the pyramid; K boxes of an image, level after level; n boxes of the level
    that has most; M proposals of an image at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import grouped_nms

__all__ = ["image_bounds", "select_proposals", "to_device"]


def select_proposals(
    boxes: Tensor,
    logits: Tensor,
    level_sizes: Sequence[int],
    image_sizes: Tensor,
    *,
    threshold: float,
    min_box_size: float,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best boxes of each image, by NMS within each level.

    Boxes are clipped to their image first, and those dropped that are not finite or too small.
    On a GPU nothing here waits, or depends on more than shapes.

    Args:
        boxes: (N, K, 4), float32.
        logits: (N, K), from the highest down within each level.
        level_sizes: numbers of boxes of the L levels, K together.
        image_sizes: (N, 2), height and width in pixels.
        threshold: of the IoU, in NMS.
        min_box_size: sides must be longer, in pixels.
        most: proposals of an image.

    Returns:
        Boxes (N, M, 4) and logits (N, M), from the highest down, boxes of equal logits in the order
        that they came in; and how many there are, (N,) int64. After these come boxes of zeros, with
        logits of minus infinity. M is ``most``, or L n if that is less.
    """
    edges = image_bounds(image_sizes.to(boxes.dtype))[:, None]
    clipped = boxes.clamp(min=0).minimum(edges)
    large = (clipped[..., 2:] - clipped[..., :2] > min_box_size).all(dim=2)
    finite = boxes.abs().amax(dim=2).maximum(logits.abs()) < torch.inf
    usable = finite & large

    boxes = _pad_levels(clipped, level_sizes, 0)
    logits = _pad_levels(logits.where(usable, -torch.inf), level_sizes, -torch.inf)
    valid = logits > -torch.inf
    keep = grouped_nms(boxes.flatten(0, 1), valid.flatten(0, 1), threshold).view_as(valid)

    logits, order = (
        logits.where(keep, -torch.inf).flatten(1).sort(dim=1, descending=True, stable=True)
    )
    logits, order = logits[:, :most], order[:, :most, None]
    boxes = boxes.flatten(1, 2).gather(1, order.expand(-1, -1, 4))
    there = logits > -torch.inf
    return boxes.where(there[..., None], 0), logits, there.sum(dim=1)


def _pad_levels(x: Tensor, level_sizes: Sequence[int], filler: float) -> Tensor:
    """(N, K, ...) as (N, L, n, ...)."""
    most = max(level_sizes)
    padding = x.new_full((len(x), most - min(level_sizes), *x.shape[2:]), filler)
    parts = []
    for part in x.split(list(level_sizes), dim=1):
        parts += [part, padding[:, : most - part.shape[1]]]
    return torch.cat(parts, dim=1).unflatten(1, (len(level_sizes), most))


def image_bounds(image_sizes: Tensor) -> Tensor:
    """What bounds the boxes of each image, (N, 4): width, height, width, height, from (N, 2)."""
    return image_sizes.flip(1).repeat(1, 2)


def to_device(numbers: Sequence, device: torch.device) -> Tensor:
    """Numbers, however nested, as a tensor of float32; the CPU goes on while they are copied."""
    tensor = torch.tensor(numbers, dtype=torch.float32)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
