"""Detectron2's RPN, for a training that outlives a step without a finite loss."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN as _RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

__all__ = ["RPN"]


class RPN(_RPN):
    """Detectron2's, which in training raises ``FloatingPointError`` at a box that is not finite.

    Here such a box is dropped, as Detectron2 does at test time. The loss tells all the same, and
    other processes, in the midst of the same step, do not wait for one that has raised.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.forward`."""
        if self.training:
            return super().forward(images, features, gt_instances)
        boxes, logits = self.top_boxes([features[name] for name in self.in_features])
        return self._suppress(boxes, logits, images.image_sizes), {}

    @torch.no_grad()
    def top_boxes(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute the boxes, at test time, that non-maximum suppression is to choose from.

        Args:
            features: for each level a map (N, C, H, W).

        Returns:
            For each level the ``pre_nms_topk`` boxes of highest objectness, (N, k, 4), and their
            logits, (N, k) descending.
        """
        anchors = self.anchor_generator(features)
        boxes, logits = [], []
        for anchors_i, logits_i, deltas_i in zip(anchors, *self.rpn_head(features)):
            logits_i = logits_i.permute(0, 2, 3, 1).flatten(1)
            deltas_i = deltas_i.permute(0, 2, 3, 1).reshape(*logits_i.shape, 4)
            count = min(self.pre_nms_topk[self.training], logits_i.shape[1])
            logits_i, places = logits_i.topk(count, dim=1)
            deltas_i = deltas_i.gather(1, places[..., None].expand(-1, -1, 4))
            boxes_i = self.box2box_transform.apply_deltas(
                deltas_i.flatten(0, 1), anchors_i.tensor[places.flatten()]
            )
            boxes.append(boxes_i.view(*places.shape, 4))
            logits.append(logits_i)
        return boxes, logits

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.predict_proposals`."""
        return self._suppress(
            self._decode_proposals(anchors, pred_anchor_deltas), pred_objectness_logits, image_sizes
        )

    @torch.no_grad()
    def _suppress(
        self, boxes: list[Tensor], logits: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        return find_top_rpn_proposals(
            boxes,
            logits,
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training],
            self.min_box_size,
            training=False,
        )
