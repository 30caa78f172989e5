"""Pictures of detections."""

from __future__ import annotations

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, Visualizer

__all__ = ["draw_instances"]


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, scale: float = 1.0
) -> np.ndarray:
    """Draw masks, boxes, class names and scores on an image.

    Unlike Detectron2's ``Visualizer.draw_instance_predictions`` this leaves the holes of masks open
    and gives a class always the same colour: ``metadata.thing_colors``, if there are any.

    Args:
        image: RGB, (H, W, 3), uint8; kept as it is.
        instances: detections as a model of Detectron2 returns them, on the CPU.
        metadata: ``thing_classes`` and ``thing_colors`` are used.
        scale: size of the picture, where the image's is 1; small images want more, or the labels
            hide them.

    Returns:
        The picture, RGB, (scale * H, scale * W, 3), uint8.
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
        image = image.copy()
        for k in (-instances.pred_boxes.area()).argsort().tolist():  # the smallest on top
            inside = instances.pred_masks[k].numpy()
            image[inside] = 0.5 * image[inside] + 0.5 * 255 * colors[classes[k] % len(colors)]
        masks = [GenericMask(m, *image.shape[:2]) for m in instances.pred_masks.numpy()]
    picture = Visualizer(image, metadata, scale=scale).overlay_instances(
        masks=masks,
        boxes=instances.pred_boxes,
        labels=labels,
        assigned_colors=[colors[c % len(colors)] for c in classes],
        alpha=0,  # outlines: to fill them would fill the holes of masks too
    )
    return picture.get_image()
