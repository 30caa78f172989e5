"""Masks of RoIs, and their loss.

Shapes:
    R RoIs of all images together, R_i those of image i; K classes; predicted masks of M x M pixels.
"""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from ..scalars import put_scalars

__all__ = ["MaskHead", "SharedMasks"]


class SharedMasks:
    """Each RoI's mask, out of an image's: of many RoIs that share an object none holds a copy."""

    def __init__(self, masks: BitMasks | PolygonMasks, index: Tensor) -> None:
        """
        Args:
            masks: of an image's objects.
            index: for each RoI its object's place among them, (R_i,).
        """
        self._masks = masks
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item) -> SharedMasks:
        return SharedMasks(self._masks, self._index[item])

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """See :meth:`detectron2.structures.BitMasks.crop_and_resize`; boxes are (R_i, 4)."""
        masks, index = self._masks, self._index
        if len(masks) > len(index) or not isinstance(masks, BitMasks):
            return masks[index].crop_and_resize(boxes, mask_size)
        rois = torch.cat([index[:, None].to(boxes.dtype), boxes], dim=1)
        maps = masks.tensor[:, None].to(boxes.dtype)
        # as BitMasks does, which wants a mask for each box
        return roi_align(maps, rois, mask_size, aligned=True).squeeze(1) >= 0.5


class MaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's mask head, with the same loss and statistics.

    Detectron2 fetches each of the statistics, for which the CPU waits until the GPU is done with
    all that it was given before. With a ``vis_period``, which draws masks, it does so here, too.
    """

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """See :meth:`detectron2.modeling.roi_heads.BaseMaskRCNNHead.forward`.

        In training the RoIs are foreground with ``proposal_boxes``, ``gt_classes`` and
        ``gt_masks``; without any the loss is 0.
        """
        if not self.training or self.vis_period:
            return super().forward(x, instances)
        logits = self.layers(x)
        if len(logits) == 0:
            return {"loss_mask": logits.sum() * 0}
        some = [i for i in instances if len(i)]
        masks = torch.cat(
            [i.gt_masks.crop_and_resize(i.proposal_boxes.tensor, logits.shape[2]) for i in some]
        ).to(logits.device)
        if logits.shape[1] > 1:
            classes = torch.cat([i.gt_classes for i in some])
            logits = logits[torch.arange(len(logits), device=logits.device), classes]
        else:
            logits = logits[:, 0]
        _put_statistics(logits, masks)
        loss = F.binary_cross_entropy_with_logits(logits, masks.to(torch.float32))
        return {"loss_mask": loss * self.loss_weight}


@torch.no_grad()
def _put_statistics(logits: Tensor, masks: Tensor) -> None:
    """Log how many pixels are right, under Detectron2's names."""
    wrong = (logits > 0) != masks
    counts = torch.stack([wrong, wrong & masks, masks]).sum(dim=(1, 2, 3))
    missed, inside = counts[1:]
    put_scalars(
        {
            "mask_rcnn/accuracy": 1 - counts[0] / masks.numel(),
            "mask_rcnn/false_positive": (counts[0] - missed)
            / (masks.numel() - inside).clamp(min=1),
            "mask_rcnn/false_negative": missed / inside.clamp(min=1),
        }
    )
