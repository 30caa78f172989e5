"""A detector's way from images to objects in fixed shapes, so that a GPU can replay most of it.

Shape legend: N images; D detections of an image at most.
"""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor

from ..proposals import image_bounds, to_device
from .graphs import Graphs

__all__ = ["GraphedDetector"]

FEW = 16  # detections: images with no more than these have smaller graphs of their masks


class GraphedDetector:
    """Detectron2's ``GeneralizedRCNN.inference`` with CUDA graphs, waiting for the GPU once.

    It waits for the numbers of detections; the masks are predicted, and pasted by Detectron2,
    while the CPU goes on.

    Args:
        model: in eval mode, with this package's RPN, anchors, cascade, predictor and poolers.
        graphs: where its own are recorded.
    """

    def __init__(self, model: GeneralizedRCNN, graphs: Graphs) -> None:
        self._model = model
        graphs.install(self, "find")
        if model.roi_heads.mask_on:
            graphs.install(model.roi_heads, "run_masks")

    def __call__(self, inputs: list[dict]) -> list[dict]:
        """See :meth:`detectron2.modeling.GeneralizedRCNN.inference`."""
        model, heads = self._model, self._model.roi_heads
        images = model.preprocess_image(inputs)
        wanted = [
            (x.get("height", height), x.get("width", width))
            for x, (height, width) in zip(inputs, images.image_sizes, strict=True)
        ]
        sizes = to_device(list(zip(images.image_sizes, wanted)), images.tensor.device)
        features = model.backbone(images.tensor)
        boxes, *found, lengths = self.find(features, sizes)
        counts = lengths.tolist()
        masks = None
        if heads.mask_on:
            most = FEW if max(counts) <= FEW else boxes.shape[1]
            masks = heads.run_masks(features, boxes[:, :most], found[-1][:, :most])
        found = [x.clone() for x in found]  # the next images' will lie where these lie
        results = []
        for i, (size, n) in enumerate(zip(wanted, counts, strict=True)):
            rescaled, scores, classes = (x[i, :n] for x in found)
            objects = Instances(
                size, pred_boxes=Boxes(rescaled), scores=scores, pred_classes=classes
            )
            if masks is not None:
                pasted = ROIMasks(masks[i, :n]).to_bitmasks(objects.pred_boxes, *size)
                objects.pred_masks = pasted.tensor
            results.append({"instances": objects})
        return results

    def find(
        self, features: dict[str, Tensor], sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Find the objects of N images and rescale their boxes, without waiting for the GPU.

        As Detectron2's ``detector_postprocess`` does, those are dropped whose box is empty then.

        Args:
            features: maps (N, C, H, W) by name.
            sizes: (N, 2, 2), heights and widths of the images as they are, then as they are wanted.

        Returns:
            Boxes in the image as it is (N, D, 4) and as it is wanted (N, D, 4), scores (N, D) from
            the highest down, classes (N, D), and how many there are, (N,).
        """
        rpn, heads = self._model.proposal_generator, self._model.roi_heads
        given, wanted = sizes.unbind(dim=1)
        proposals, _, counts = rpn.candidates([features[name] for name in rpn.in_features], given)
        boxes, scores, classes, _, counts = heads.detect(features, proposals, counts, given)

        edges, scales = (image_bounds(x)[:, None] for x in (wanted, wanted / given))
        rescaled = (boxes * scales).clamp(min=0).minimum(edges)
        there = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
        there &= (rescaled[..., 2:] > rescaled[..., :2]).all(dim=2)
        order = there.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        corners = order[..., None].expand_as(boxes)
        return (
            boxes.gather(1, corners),
            rescaled.gather(1, corners),
            scores.gather(1, order),
            classes.gather(1, order),
            there.sum(dim=1),
        )
