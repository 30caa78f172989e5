"""Detectors ready to be evaluated, and how far the detections of two of them lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from ..inference import prepare
from ..ops.backends import without_autocast
from .inputs import calibrate, draw_images, limit_detections, set_threshold
from .rows import Row, build
from .timing import exact

__all__ = ["CLOSE", "ROUGH", "Tolerance", "Weights", "detector", "draw_weights", "evaluate", "lost"]


class Tolerance(NamedTuple):
    """Up to where two detections of a class are the same.

    Args:
        score: difference.
        box, mask: intersection over union, at least.
    """

    score: float
    box: float
    mask: float


CLOSE = Tolerance(score=0.01, box=0.9, mask=0.8)
ROUGH = Tolerance(score=0.05, box=0.8, mask=0.7)


@dataclass(frozen=True)
class Weights:
    """What all rows share: the state of a detector, and the least score of a detection."""

    state: dict[str, Tensor]
    threshold: float


def draw_weights(plain: Row, size: tuple[int, int], device: str) -> Weights:
    """Random weights of a detector that finds as much as a trained one."""
    torch.manual_seed(0)
    model = instantiate(plain.model(torch.float32)).eval()
    model = model.to(device, memory_format=torch.channels_last)  # as on a GPU and by prepare
    images = draw_images(1, size)
    with exact():
        calibrate(model, lambda: model(images))
        threshold = set_threshold(model, lambda: model(images))
    return Weights(model.state_dict(), threshold)


def detector(row: Row, weights: Weights, dtype: torch.dtype, device: str) -> nn.Module:
    """The detector of a row, prepared for inference as its switches say, with shared weights."""
    model = build(row.model(dtype), weights.state, device)
    limit_detections(model, weights.threshold)
    if not row.prepare:
        return model
    return prepare(
        model,
        dtype=dtype if "dtype" in row.prepare and dtype is not torch.float32 else None,
        fuse="fuse" in row.prepare,
        cuda_graphs="cuda_graphs" in row.prepare,
    )


def evaluate(model: nn.Module, images: Sequence[Mapping[str, Any]]) -> list[Instances]:
    """The detections in images, on the model's device."""
    with torch.no_grad():
        return [found["instances"] for found in model(list(images))]


def lost(
    found: Sequence[Instances], truth: Sequence[Instances], tolerance: Tolerance = CLOSE
) -> float:
    """The share of detections that the others do not have, the larger of both directions.

    Args:
        found, truth: of the same images; with ``pred_masks`` or without.
        tolerance: what makes a detection another's counterpart, besides its class.

    Returns:
        In [0, 1]; 1 if nothing was found at all.
    """
    missed = [0, 0]
    counts = [sum(map(len, found)), sum(map(len, truth))]
    for ours, theirs in zip(found, truth, strict=True):
        boxes = (Boxes(x.pred_boxes.tensor.float()) for x in (ours, theirs))
        same = pairwise_iou(*boxes) >= tolerance.box
        same &= ours.pred_classes[:, None] == theirs.pred_classes
        same &= (ours.scores.float()[:, None] - theirs.scores.float()).abs() <= tolerance.score
        if ours.has("pred_masks"):
            same &= _mask_iou(ours.pred_masks, theirs.pred_masks) >= tolerance.mask
        missed[0] += int((~same.any(dim=1)).sum())
        missed[1] += int((~same.any(dim=0)).sum())
    return max(m / n if n else 1.0 for m, n in zip(missed, counts))


def _mask_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """(R, H, W) and (S, H, W) bool -> (R, S); two empty masks are the same."""
    a, b = ours.flatten(1).float(), theirs.flatten(1).float()
    with without_autocast(a.device):  # float16 does not count so far
        common = a @ b.T
    union = a.sum(dim=1)[:, None] + b.sum(dim=1) - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)
