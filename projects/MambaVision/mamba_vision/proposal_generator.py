"""Detectron2's RPN, decoding only the boxes that it may keep, and waiting for the GPU once at most.

Shapes:
    N images; levels of H x W cells with A anchors each; R = H W A anchors of a level, cell by cell;
    K anchors of an image that enter NMS, of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN as _RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from .proposals import select_proposals, to_device
from .scalars import put_scalars

__all__ = ["RPN", "AnchorGenerator"]


class AnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors, computed where they are needed.

    Detectron2 copies the coordinates of every level from the CPU, each time; a GPU runs dry.
    """

    def _grid_anchors(self, grid_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One (R, 4) tensor per level, of H x W cells in ``grid_sizes``; x0 y0 x1 y1 in pixels."""
        grids = []
        for (height, width), stride, cell in zip(grid_sizes, self.strides, self.cell_anchors):
            anchors = cell.new_empty(height, width, len(cell), 4)
            for axis, side in enumerate((width, height)):
                centers = torch.arange(
                    self.offset * stride, side * stride, stride, device=cell.device
                ).to(cell.dtype)
                centers = centers.view(-1, 1, 1) if axis == 0 else centers.view(-1, 1, 1, 1)
                anchors[..., axis::2] = centers + cell[:, axis::2]
            grids.append(anchors.view(-1, 4))
        return grids


class RPN(_RPN):
    """Detectron2's RPN, with the same proposals and losses at less cost.

    What is drawn at random has the same distribution, but comes from other random numbers.

    In training Detectron2 raises ``FloatingPointError`` at a box that is not finite. Here such a
    box is dropped, as Detectron2 does at test time. The loss tells all the same, and other
    processes, in the midst of the same step, do not wait for one that has raised.
    """

    def __init__(self, *, decode_top: bool = True, **kwargs) -> None:
        """
        Args:
            decode_top: decode only the ``pre_nms_topk`` anchors of each level that enter NMS, not
                all, and suppress the boxes of all levels and images at once. The proposals are the
                same.
            kwargs: as for Detectron2's ``RPN``.
        """
        super().__init__(**kwargs)
        self.decode_top = decode_top

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.forward`."""
        if self.training or not self.decode_top:
            return super().forward(images, features, gt_instances)
        sizes = images.image_sizes
        found = self.candidates(
            [features[name] for name in self.in_features],
            to_device(sizes, features[self.in_features[0]].device),
        )
        return _instances(sizes, *found), {}

    @torch.no_grad()
    def candidates(
        self, features: list[Tensor], image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the proposals at test time, without waiting for the GPU.

        Args:
            features: of each level, (N, C, H, W).
            image_sizes: (N, 2), height and width in pixels.

        Returns:
            As from :meth:`select`.
        """
        logits, deltas = self.rpn_head(features)
        found = self.top_boxes(
            self.anchor_generator(features),
            [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
            [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas],
        )
        return self.select(*found, image_sizes)

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Keep a random sample of the labels 0 and 1 of an image's anchors; the others become -1.

        Of ``batch_size_per_image`` up to the share ``positive_fraction`` are positive, and as many
        as are left negative.
        """
        total = self.batch_size_per_image
        positive = _random_subset(label == 1, int(total * self.positive_fraction))
        negative = _random_subset(label == 0, total, total - positive.sum())
        return label.fill_(-1).masked_fill_(positive, 1).masked_fill_(negative, 0)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.losses`."""
        if self.box_reg_loss_type != "smooth_l1":
            return super().losses(
                anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
            )
        labels = torch.stack(gt_labels)
        count = min(labels.shape[1], self.batch_size_per_image)
        # (N, S): the places of the sampled anchors, and of some others where these are fewer.
        places = (labels >= 0).to(torch.uint8).topk(count, dim=1).indices
        labels = labels.gather(1, places)
        _log_samples(labels)

        logits = torch.cat(pred_objectness_logits, dim=1).gather(1, places)
        classification = F.binary_cross_entropy_with_logits(
            logits, (labels == 1).to(torch.float32), reduction="none"
        )
        corners = places[..., None].expand(-1, -1, 4)
        deltas = torch.cat(pred_anchor_deltas, dim=1).gather(1, corners)
        sources = torch.cat([level.tensor for level in anchors])[places]
        positive = (labels == 1)[..., None]
        objects = torch.stack(gt_boxes).gather(1, corners).where(positive, sources)
        targets = self.box2box_transform.get_deltas(sources.flatten(0, 1), objects.flatten(0, 1))
        localization = smooth_l1_loss(deltas, targets.view_as(sources), beta=self.smooth_l1_beta)
        sums = {
            "loss_rpn_cls": classification.where(labels >= 0, 0).sum(),
            "loss_rpn_loc": localization.where(positive, 0).sum(),
        }
        scale = self.batch_size_per_image * len(labels)
        return {name: x / scale * self.loss_weight.get(name, 1.0) for name, x in sums.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.predict_proposals`."""
        if not self.decode_top:
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
        found = self.top_boxes(anchors, pred_objectness_logits, pred_anchor_deltas)
        sizes = to_device(image_sizes, found[0].device)
        return _instances(image_sizes, *self.select(*found, sizes))

    def top_boxes(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Decode the ``pre_nms_topk`` anchors of highest objectness of each level.

        Nothing here waits for the GPU, or depends on more than shapes.

        Args:
            anchors: of each level, R boxes.
            logits: of each level, (N, R).
            deltas: of each level, (N, R, 4).

        Returns:
            Boxes (N, K, 4), float32, level after level; their logits (N, K), from the highest down
            within each level; and how many each level has, K together.
        """
        found = []
        for anchors_l, logits_l, deltas_l in zip(anchors, logits, deltas, strict=True):
            count = min(logits_l.shape[1], self.pre_nms_topk[self.training])
            top, index = logits_l.topk(count, dim=1)
            found.append(
                (
                    anchors_l.tensor[index],
                    deltas_l.gather(1, index[..., None].expand(-1, -1, 4)),
                    top,
                )
            )
        chosen_anchors, chosen_deltas, chosen_logits = zip(*found)
        logits_k = torch.cat(chosen_logits, dim=1)
        boxes = self.box2box_transform.apply_deltas(
            torch.cat(chosen_deltas, dim=1).flatten(0, 1),
            torch.cat(chosen_anchors, dim=1).flatten(0, 1),
        )
        level_sizes = [top.shape[1] for top in chosen_logits]
        return boxes.view(*logits_k.shape, 4), logits_k, level_sizes

    def select(
        self, boxes: Tensor, logits: Tensor, level_sizes: list[int], image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the proposals among the boxes from :meth:`top_boxes`; it does not wait either.

        See :func:`~mamba_vision.proposals.select_proposals`.
        """
        return select_proposals(
            boxes,
            logits,
            level_sizes,
            image_sizes,
            threshold=self.nms_thresh,
            min_box_size=self.min_box_size,
            most=self.post_nms_topk[self.training],
        )


def _instances(
    sizes: list[tuple[int, int]], boxes: Tensor, logits: Tensor, counts: Tensor
) -> list[Instances]:
    """The proposals from :meth:`RPN.select` as Detectron2 wants them; this waits for the GPU."""
    return [
        Instances(size, proposal_boxes=Boxes(boxes_i[:n]), objectness_logits=logits_i[:n])
        for size, boxes_i, logits_i, n in zip(sizes, boxes, logits, counts.tolist(), strict=True)
    ]


def _random_subset(candidates: Tensor, count: int, limit: Tensor | None = None) -> Tensor:
    """A mask of ``count`` candidates, at most ``limit``, or all there are; masks are bool, (R,)."""
    keys = torch.rand(candidates.shape, device=candidates.device).masked_fill_(~candidates, -1)
    keys, places = keys.topk(min(count, len(keys)))
    chosen = keys >= 0
    if limit is not None:
        chosen &= torch.arange(len(chosen), device=chosen.device) < limit
    return torch.zeros_like(candidates).scatter_(0, places, chosen)


def _log_samples(labels: Tensor) -> None:
    """Log how many anchors of an image are sampled, on the average of N; labels are (N, S)."""
    counts = torch.stack([labels == 1, labels == 0]).sum(dim=(1, 2)) / len(labels)
    put_scalars(dict(zip(("rpn/num_pos_anchors", "rpn/num_neg_anchors"), counts)))
