"""Detectron2's RPN, for a training that outlives a step without a finite loss."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN as _RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["RPN"]


class RPN(_RPN):
    """Detectron2's, which in training raises ``FloatingPointError`` at a box that is not finite.

    Here such a box is dropped, as Detectron2 does at test time. The loss tells all the same, and
    other processes, in the midst of the same step, do not wait for one that has raised.
    """

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.predict_proposals`."""
        return find_top_rpn_proposals(
            self._decode_proposals(anchors, pred_anchor_deltas),
            pred_objectness_logits,
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training],
            self.min_box_size,
            training=False,
        )
