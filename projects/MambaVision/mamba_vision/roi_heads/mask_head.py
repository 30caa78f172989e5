"""Masks of RoIs, and their loss.

Shapes:
    R RoIs of all images together, R_i those of image i; K classes; predicted masks of M x M pixels.
"""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ..scalars import put_scalars
from ..training_graphs import TrainingGraphs

__all__ = ["MaskHead", "SharedMasks", "StageMaskHeads"]

ROWS = 64  # recorded are multiples of this many RoIs, or of a quarter of a power of two
STATISTICS = (  # Detectron2's names
    "mask_rcnn/accuracy",
    "mask_rcnn/false_positive",
    "mask_rcnn/false_negative",
)


class StageMaskHeads(nn.ModuleList):
    """One mask head per cascade stage; called as a whole it averages them (test time)."""

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Set ``pred_masks`` to the mean over the stages of the predicted probabilities.

        Args:
            x: pooled features, (R, C, H, W).
            instances: N images' detections, with ``pred_classes``.

        Returns:
            The same instances, with ``pred_masks`` (R_i, 1, M, M) in [0, 1].
        """
        per_stage = [[i.pred_masks for i in head(x, instances)] for head in self]
        for instances_i, masks in zip(instances, zip(*per_stage, strict=True), strict=True):
            instances_i.pred_masks = torch.stack(masks).mean(dim=0)
        return instances


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

    Attributes:
        graphs: to call it by in training, if not None.
    """

    graphs: TrainingGraphs | None = None

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """See :meth:`detectron2.modeling.roi_heads.BaseMaskRCNNHead.forward`.

        In training the RoIs are foreground with ``proposal_boxes``, ``gt_classes`` and
        ``gt_masks``; without any the loss is 0.
        """
        if not self.training or self.vis_period:
            return super().forward(x, instances)
        if len(x) == 0:
            return {"loss_mask": self.layers(x).sum() * 0}
        some = [i for i in instances if len(i)]
        classes = torch.cat([i.gt_classes for i in some])
        size = 2 * x.shape[-1]  # after the deconvolution
        masks = torch.cat(
            [i.gt_masks.crop_and_resize(i.proposal_boxes.tensor, size) for i in some]
        ).to(x.device)
        ending = _Ending(self)
        if self.graphs is None or not self.graphs.records(x):
            loss, statistics = ending(x, classes, masks)
        else:
            more = recorded_rows(len(x)) - len(x)
            x, masks = (F.pad(t, (0, 0) * (t.dim() - 1) + (0, more)) for t in (x, masks))
            loss, statistics = self.graphs(ending, x, F.pad(classes, (0, more), value=-1), masks)
        put_scalars(dict(zip(STATISTICS, statistics.unbind())))
        return {"loss_mask": loss}


def recorded_rows(count: int) -> int:
    """With how many RoIs the recording runs that so many, at least one, go through."""
    step = max(ROWS, (1 << (count - 1).bit_length()) // 4)
    return -(-count // step) * step


class _Ending(nn.Module):
    """A mask head's layers, and its loss and statistics.

    Args:
        head: the mask head.
    """

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, classes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss and the ``STATISTICS``.

        Args:
            x: pooled features, (R, C, H, W).
            classes: (R,); -1 for padding.
            masks: bool, (R, M, M).
        """
        logits = self.head.layers(x)
        own = classes.clamp(min=0) if logits.shape[1] > 1 else torch.zeros_like(classes)
        logits = logits[torch.arange(len(logits), device=logits.device), own]
        there = (classes >= 0)[:, None, None].expand_as(masks)
        apart = F.binary_cross_entropy_with_logits(
            logits, masks.to(torch.float32), reduction="none"
        )
        loss = apart.where(there, 0).sum() / there.sum()
        return loss * self.head.loss_weight, _statistics(logits, masks, there)


@torch.no_grad()
def _statistics(logits: Tensor, masks: Tensor, there: Tensor) -> Tensor:
    """How many pixels are right."""
    wrong = ((logits > 0) != masks) & there
    inside = masks & there
    counts = torch.stack([wrong, wrong & inside, inside, there]).sum(dim=(1, 2, 3))
    wrong, missed, inside, total = counts.unbind()
    outside = total - inside
    return torch.stack(
        [
            1 - wrong / total,
            (wrong - missed) / outside.clamp(min=1),
            missed / inside.clamp(min=1),
        ]
    )
