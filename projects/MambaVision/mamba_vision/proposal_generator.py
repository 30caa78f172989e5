"""Detectron2's RPN, decoding only the boxes that it may keep, and without waiting for the GPU.

Shapes:
    N images; levels of H x W cells with A anchors each; R = H W A anchors of a level, cell by cell;
    K anchors of an image that enter NMS, of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN as _RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

__all__ = ["RPN", "AnchorGenerator"]

_LOG_PERIOD = 20  # steps; that of Detectron2's writers


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

    What is drawn at random has the same distribution, but comes from other random numbers; and of
    the numbers of sampled anchors every 20th alone is logged, as each makes the CPU wait.

    In training Detectron2 raises ``FloatingPointError`` at a box that is not finite. Here such a
    box is dropped, as Detectron2 does at test time. The loss tells all the same, and other
    processes, in the midst of the same step, do not wait for one that has raised.
    """

    def __init__(self, *, decode_top: bool = True, **kwargs) -> None:
        """
        Args:
            decode_top: decode only the ``pre_nms_topk`` anchors of each level that enter NMS, not
                all. The proposals are the same.
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
        boxes, logits, levels = self.candidates([features[name] for name in self.in_features])
        proposals = [
            self.keep_best(boxes_i, logits_i, levels, size)
            for boxes_i, logits_i, size in zip(boxes, logits, images.image_sizes, strict=True)
        ]
        return proposals, {}

    @torch.no_grad()
    def candidates(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Find the boxes that :meth:`keep_best` is to choose from, at test time.

        Args:
            features: of each level, (N, C, H, W).

        Returns:
            As from :meth:`top_boxes`.
        """
        logits, deltas = self.rpn_head(features)
        return self.top_boxes(
            self.anchor_generator(features),
            [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
            [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas],
        )

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
        boxes, logits, levels = self.top_boxes(anchors, pred_objectness_logits, pred_anchor_deltas)
        return [
            self.keep_best(boxes_i, logits_i, levels, size)
            for boxes_i, logits_i, size in zip(boxes, logits, image_sizes, strict=True)
        ]

    def top_boxes(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the ``pre_nms_topk`` anchors of highest objectness of each level.

        Nothing here waits for the GPU, or depends on more than shapes.

        Args:
            anchors: of each level, R boxes.
            logits: of each level, (N, R).
            deltas: of each level, (N, R, 4).

        Returns:
            Boxes (N, K, 4), float32; their logits (N, K); and the levels (K,) that they are of.
        """
        found = []
        for level, (anchors_l, logits_l, deltas_l) in enumerate(
            zip(anchors, logits, deltas, strict=True)
        ):
            count = min(logits_l.shape[1], self.pre_nms_topk[self.training])
            top, index = logits_l.topk(count, dim=1)
            found.append(
                (
                    anchors_l.tensor[index],
                    deltas_l.gather(1, index[..., None].expand(-1, -1, 4)),
                    top,
                    index.new_full((count,), level),
                )
            )
        chosen_anchors, chosen_deltas, chosen_logits, levels = zip(*found)
        logits_k = torch.cat(chosen_logits, dim=1)
        boxes = self.box2box_transform.apply_deltas(
            torch.cat(chosen_deltas, dim=1).flatten(0, 1),
            torch.cat(chosen_anchors, dim=1).flatten(0, 1),
        )
        return boxes.view(*logits_k.shape, 4), logits_k, torch.cat(levels)

    def keep_best(
        self, boxes: Tensor, logits: Tensor, levels: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """Choose the proposals of one image among its K boxes from :meth:`top_boxes`.

        Boxes are clipped to the image; those not finite or too small are dropped, and NMS within
        each level leaves at most ``post_nms_topk``.

        Args:
            boxes: (K, 4).
            logits, levels: (K,).
            image_size: height and width in pixels.

        Returns:
            ``proposal_boxes`` and ``objectness_logits``, from the highest logit down.
        """
        clipped = clip_boxes_to_image(boxes, image_size)
        large = (clipped[:, 2:] - clipped[:, :2] > self.min_box_size).all(dim=1)
        usable = boxes.isfinite().all(dim=1) & logits.isfinite() & large
        index = usable.nonzero()[:, 0]
        boxes, logits = clipped[index], logits[index]
        keep = batched_nms(boxes, logits.float(), levels[index], self.nms_thresh)
        keep = keep[: self.post_nms_topk[self.training]]
        return Instances(
            image_size, proposal_boxes=Boxes(boxes[keep]), objectness_logits=logits[keep]
        )


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
    storage = get_event_storage()
    if storage.iter % _LOG_PERIOD == 0:
        positive, negative = torch.stack([labels == 1, labels == 0]).sum(dim=(1, 2)).tolist()
        storage.put_scalar("rpn/num_pos_anchors", positive / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", negative / len(labels))
