"""A detector's way from images to objects in fixed shapes, so that a GPU can replay most of it.

Shape legend: N images; D detections of an image at most.
"""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor

from ..proposals import image_bounds, to_device
from ..transfer import begin_fetch
from .graphs import Graphs

__all__ = ["GraphedDetector"]


class GraphedDetector:
    """Detectron2's ``GeneralizedRCNN.inference`` with CUDA graphs, waiting for the GPU once.

    It waits for the numbers of detections. Masks of as many as there may be are predicted
    meanwhile, so that the GPU has work while the CPU lets them be pasted, by Detectron2, and goes
    on to the next images.

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
        counts = begin_fetch(lengths)
        masks = heads.run_masks(features, boxes, found[-1]) if heads.mask_on else None
        found = [x.clone() for x in found]  # the next images' will lie where these lie
        results = []
        for i, (size, n) in enumerate(zip(wanted, counts(), strict=True)):
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
