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
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor
from torch.nn import functional as F

from .matcher import Matcher
from .proposals import select_proposals, to_device
from .scalars import put_scalars

__all__ = ["RPN", "AnchorGenerator"]

# Of objects and anchors, up to which images are matched together. IoUs of more fill the memory.
_PAIRS = 2**25


class AnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors, computed where they are needed.

    Detectron2 copies the coordinates of every level from the CPU, each time; a GPU runs dry.
    """

    def _grid_anchors(self, grid_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One (R, 4) tensor per level, of H x W cells in ``grid_sizes``; x0 y0 x1 y1 in pixels."""
        grids = []
        for (height, width), stride, cell in zip(grid_sizes, self.strides, self.cell_anchors):
            end = max(height, width) * stride
            centers = torch.arange(self.offset * stride, end, stride, device=cell.device)
            both = centers.to(cell.dtype)[:, None, None] + cell
            x, y = both[:width, :, 0::2], both[:height, None, :, 1::2]
            shape = height, width, len(cell), 2
            grids.append(torch.stack([x.expand(shape), y.expand(shape)], dim=-1).view(-1, 4))
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

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`detectron2.modeling.proposal_generator.RPN.label_and_sample_anchors`."""
        if not isinstance(self.anchor_matcher, Matcher):
            return super().label_and_sample_anchors(anchors, gt_instances)
        every = Boxes.cat(anchors)
        counts = [len(image) for image in gt_instances]
        if len(counts) > 1 and sum(counts) * len(every) > _PAIRS:
            found = [self.label_and_sample_anchors(anchors, [image]) for image in gt_instances]
            return [labels for (labels,), _ in found], [boxes for _, (boxes,) in found]

        objects = Boxes.cat([image.gt_boxes for image in gt_instances])
        iou = retry_if_cuda_oom(pairwise_iou)(objects, every)
        found = retry_if_cuda_oom(self.anchor_matcher.match_images)(iou, counts)
        del iou
        matches, labels = (x.to(every.device) for x in found)  # from the CPU if memory was short
        if self.anchor_boundary_thresh >= 0:
            sizes = [image.image_size for image in gt_instances]
            labels.masked_fill_(~self._inside(every.tensor, sizes), -1)
        boxes = [
            of_image[index] if len(of_image) else torch.zeros_like(every.tensor)
            for of_image, index in zip(objects.tensor.split(counts), matches, strict=True)
        ]
        return list(self._subsample_labels(labels)), boxes

    def _inside(self, anchors: Tensor, image_sizes: list[tuple[int, int]]) -> Tensor:
        """Which anchors (R, 4) lie inside each image but for ``anchor_boundary_thresh``; (N, R)."""
        margin = self.anchor_boundary_thresh
        ends = [(width + margin, height + margin) for height, width in image_sizes]
        before_end = anchors[:, 2:] < to_device(ends, anchors.device)[:, None]
        return (anchors[:, :2] >= -margin).all(dim=1) & before_end.all(dim=2)

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Keep a random sample of the labels 0 and 1 of each image; the others become -1, in place.

        Of ``batch_size_per_image`` up to the share ``positive_fraction`` are positive, and as many
        as are left negative.

        Args:
            label: of an image's anchors, (R,), or of N images', (N, R).
        """
        total = self.batch_size_per_image
        others = torch.stack([label != 1, label != 0])
        keys = torch.rand(others.shape, device=label.device).masked_fill_(others, -1)
        keys, places = keys.topk(min(total, label.shape[-1]), dim=-1)
        chosen = keys >= 0
        positive, negative = chosen
        positive[..., int(total * self.positive_fraction) :] = False
        left = total - positive.sum(dim=-1, keepdim=True)
        negative &= torch.arange(negative.shape[-1], device=label.device) < left
        positive, negative = torch.zeros_like(others).scatter_(-1, places, chosen)
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
        images = len(gt_labels)
        labels = torch.cat(gt_labels)
        count = min(len(labels), images * self.batch_size_per_image)
        # (S,): the places of the sampled anchors of all images; where these are fewer, the last
        # place fills up.
        ranks = torch.arange(1, count + 1, device=labels.device)
        places = torch.searchsorted((labels >= 0).cumsum(dim=0), ranks)
        filler = places == len(labels)
        places.clamp_(max=len(labels) - 1)
        labels = labels[places].masked_fill_(filler, -1)
        positive, negative = labels == 1, labels == 0
        counts = torch.stack([positive, negative]).sum(dim=1) / images
        put_scalars(dict(zip(("rpn/num_pos_anchors", "rpn/num_neg_anchors"), counts)))

        logits = torch.cat(pred_objectness_logits, dim=1).flatten().index_select(0, places)
        classification = F.binary_cross_entropy_with_logits(
            logits, positive.to(torch.float32), reduction="none"
        )
        # Both are masked, not their loss, which at a NaN would have a gradient all the same.
        others = (labels != 1)[:, None]
        deltas = torch.cat(pred_anchor_deltas, dim=1).flatten(0, 1).index_select(0, places)
        deltas = deltas.float().masked_fill_(others, 0)
        sources = torch.cat([level.tensor for level in anchors])
        targets = self.box2box_transform.get_deltas(
            sources[places % len(sources)], torch.cat(gt_boxes)[places]
        ).masked_fill_(others, 0)
        sums = {
            "loss_rpn_cls": classification.masked_fill_(filler, 0).sum(),
            "loss_rpn_loc": F.smooth_l1_loss(
                deltas, targets, beta=self.smooth_l1_beta, reduction="sum"
            ),
        }
        scale = images * self.batch_size_per_image
        return {name: x * (self.loss_weight.get(name, 1.0) / scale) for name, x in sums.items()}

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
