"""Pictures of detections."""

from __future__ import annotations

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, Visualizer

__all__ = ["draw_instances"]


def draw_instances(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draw masks, boxes, class names and scores on an image.

    Unlike Detectron2's ``Visualizer.draw_instance_predictions`` this gives a class always the same
    colour: ``metadata.thing_colors``, if there are any.

    Args:
        image: RGB, (H, W, 3), uint8; kept as it is.
        instances: detections as a model of Detectron2 returns them, on the CPU.
        metadata: ``thing_classes`` and ``thing_colors`` are used.

    Returns:
        The picture, RGB, (H, W, 3), uint8.
    """
    names = metadata.get("thing_classes") or []
    colors = np.array(metadata.get("thing_colors") or colormap(rgb=True)) / 255
    classes = instances.pred_classes.tolist()
    labels = [
        f"{names[c] if c < len(names) else c} {score:.0%}"
        for c, score in zip(classes, instances.scores.tolist())
    ]
    masks = None
    if instances.has("pred_masks"):
        masks = [GenericMask(m, *image.shape[:2]) for m in instances.pred_masks.numpy()]
    picture = Visualizer(image, metadata).overlay_instances(
        masks=masks,
        boxes=instances.pred_boxes,
        labels=labels,
        assigned_colors=[colors[c % len(colors)] for c in classes],
    )
    return picture.get_image()
