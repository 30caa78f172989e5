"""Which of the boxes of a detector's last stage are its detections, without waiting for the GPU.

Shapes:
    N images; M RoIs of an image; K foreground classes; D detections of an image at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import grouped_nms
from ..proposals import image_bounds

__all__ = ["Detections", "select_detections"]


class Detections(NamedTuple):
    """Of N images; from the highest score down, equal ones by class and RoI.

    After those that there are come boxes of zeros, with scores of minus infinity.
    """

    boxes: Tensor  # (N, D, 4)
    scores: Tensor  # (N, D)
    classes: Tensor  # (N, D), int64
    rois: Tensor  # (N, D), int64, below M: where they come from
    counts: Tensor  # (N,), int64: how many there are


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    there: Tensor,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    most: int,
) -> Detections:
    """Choose the detections of each image, by NMS within each class.

    They are those of Detectron2's ``fast_rcnn_inference``: RoIs with a box or score that is not
    finite are dropped, boxes clipped to their image. On a GPU nothing here waits, or depends on
    more than shapes.

    Args:
        boxes: (N, M, K, 4), float32.
        scores: (N, M, K + 1), background last.
        there: (N, M) bool, which RoIs there are.
        image_sizes: (N, 2), height and width in pixels.
        score_threshold: scores must be larger.
        nms_threshold: of the IoU, in NMS.
        most: detections of an image; all if it is negative.

    Returns:
        D is ``most``, or K M if that is less.
    """
    count = boxes.shape[1]
    usable = there & boxes.flatten(2).isfinite().all(dim=2) & scores.isfinite().all(dim=2)
    scores = scores[..., :-1]
    scores = scores.where(usable[..., None] & (scores > score_threshold), -torch.inf)
    scores, order = scores.transpose(1, 2).sort(dim=2, descending=True, stable=True)
    edges = image_bounds(image_sizes.to(boxes.dtype))[:, None, None]
    boxes = boxes.clamp(min=0).minimum(edges).transpose(1, 2)
    boxes = boxes.gather(2, order[..., None].expand(-1, -1, -1, 4))  # (N, K, M, 4)
    valid = scores > -torch.inf
    keep = grouped_nms(boxes.flatten(0, 1), valid.flatten(0, 1), nms_threshold).view_as(valid)

    scores = scores.where(keep, -torch.inf).flatten(1)
    scores, places = scores.sort(dim=1, descending=True, stable=True)
    if most >= 0:
        scores, places = scores[:, :most], places[:, :most]
    boxes = boxes.flatten(1, 2).gather(1, places[..., None].expand(-1, -1, 4))
    found = scores > -torch.inf
    return Detections(
        boxes.where(found[..., None], 0),
        scores,
        places // max(count, 1),
        order.flatten(1).gather(1, places),
        found.sum(dim=1),
    )
