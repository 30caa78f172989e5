"""Cascade R-CNN (arXiv:1712.00726) with class-specific boxes and a mask head per stage.

Detectron2's ``CascadeROIHeads`` refines one box per RoI, averages the stages' softmaxes and has
one mask head. The cascade with which MambaVision's detectors were trained differs in what this
module holds, and in nothing else.

Shapes:
    N images; R RoIs of all images together, R_i those of image i, or M of each, the rest padding;
    K foreground classes; D detections of an image at most;
    class logits (R, K + 1), background last; deltas (R, 4 K), class by class (dx, dy, dw, dh).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import UserError
from ..proposals import image_bounds, to_device
from .mask_head import SharedMasks
from .sampling import draw_samples
from .selection import Detections

__all__ = ["ClassSpecificCascadeROIHeads", "StageMaskHeads"]


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


class ClassSpecificCascadeROIHeads(CascadeROIHeads):
    """Cascade R-CNN whose boxes are regressed per class, with a mask head per stage.

    Departures from :class:`detectron2.modeling.roi_heads.CascadeROIHeads`:

    * the RoIs of every stage in training are sampled anew: the boxes of the stage before, refined
      and clipped, without the ground-truth boxes that had been added to them; then matched at the
      stage's own IoU, with the ground truth added afresh;
    * a box is refined with the deltas of one class: in training that of the matched object for
      foreground RoIs, else (and always at test time) the foreground class of highest logit;
    * the gradient into the pooled features is not divided by the number of stages;
    * at test time the stages' *logits* are averaged before one softmax, and the boxes are those of
      the last stage for each class;
    * every stage has a mask head, trained on that stage's foreground RoIs; at test time the
      probabilities of all of them are averaged.

    In training an image that brings no proposal contributes its whole frame as one, so that no
    layer ever sees an empty batch (Detectron2's convolutions refuse that before SyncBN) and every
    parameter has a gradient on every step, on every worker.

    The weights of the stages' losses are options of the predictors and mask heads.
    """

    def __init__(self, *, mask_heads: Sequence[nn.Module] | None = None, **kwargs) -> None:
        """
        Args:
            mask_heads: one mask head for each stage, such as Detectron2's
                ``MaskRCNNConvUpsampleHead``; they become ``mask_head.0``, ``mask_head.1``, ...
                ``None`` leaves masks out, whatever ``mask_in_features`` says.
            kwargs: as for ``CascadeROIHeads``, without ``mask_head`` and keypoints. The predictors
                must be class-specific.

        Raises:
            UserError: a predictor is class-agnostic, the number of mask heads is not that of
                stages, or keypoints are asked for.
        """
        if mask_heads is None:
            kwargs["mask_in_features"] = None
        else:
            kwargs["mask_head"] = StageMaskHeads(mask_heads)
        super().__init__(**kwargs)
        if self.keypoint_on:
            raise UserError(
                "roi_heads.keypoint_in_features: this cascade has no keypoints; drop it"
            )
        if self.mask_on and len(self.mask_head) != self.num_cascade_stages:
            raise UserError(
                f"roi_heads.mask_heads has {len(self.mask_head)} entries for "
                f"{self.num_cascade_stages} cascade stages; give one mask head per stage"
            )
        for k, predictor in enumerate(self.box_predictor):
            if predictor.bbox_pred.out_features != 4 * self.num_classes:
                raise UserError(
                    f"roi_heads.box_predictors.{k} regresses {predictor.bbox_pred.out_features} "
                    f"numbers instead of 4 for each of {self.num_classes} classes; "
                    "leave cls_agnostic_bbox_reg off and give it the same num_classes"
                )

    def forward(self, images, features, proposals, targets=None):
        """See :meth:`detectron2.modeling.roi_heads.ROIHeads.forward`.

        In training the losses are ``loss_cls_stage{k}``, ``loss_box_reg_stage{k}`` and, with
        masks, ``loss_mask_stage{k}``; the instances returned are the samples of the first stage.
        """
        if not self.training:
            return super().forward(images, features, proposals)
        first: list[Instances] = []
        losses: dict[str, Tensor] = {}
        for k in range(self.num_cascade_stages):
            samples, foreground = self.label_and_sample_proposals(proposals, targets, k)
            first = first or samples
            predictions, flaw = _finite(self._run_stage(features, samples, k))
            with get_event_storage().name_scope(f"stage{k}"):
                stage_losses = self.box_predictor[k].losses(predictions, samples)
                stage_losses = {name: loss + flaw for name, loss in stage_losses.items()}
                if self.mask_on:
                    stage_losses |= self._mask_losses(features, foreground, targets, k)
            losses |= {f"{name}_stage{k}": loss for name, loss in stage_losses.items()}
            if k + 1 < self.num_cascade_stages:
                proposals = self._refine(predictions, samples, k)
        return first, losses

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances], stage: int = 0
    ) -> tuple[list[Instances], list[Instances]]:
        """Match proposals at the IoU of ``stage`` and sample those to train it on.

        The CPU waits once for the GPU, to learn how many there are.

        Args:
            proposals: N images' ``proposal_boxes``; those that ``is_ground_truth`` marks, if it is
                there, are left out.
            targets: N images' ``gt_boxes`` and ``gt_classes``.
            stage: cascade stage, from 0.

        Returns:
            N images' samples, foreground first: ``proposal_boxes``, ``gt_classes`` (K for
            background), ``is_ground_truth`` (bool: a target added to the proposals) and, where the
            image has targets, ``gt_boxes`` and ``gt_index`` (the target's place among the image's
            targets). Then the foreground alone.
        """
        boxes, classes, matches, added = [], [], [], []
        for given, target in zip(proposals, targets, strict=True):
            own = given.proposal_boxes.tensor if len(given) else _whole_frame(given)
            extra = target.gt_boxes.tensor[: None if self.proposal_append_gt else 0]
            boxes.append(torch.cat([own, extra]))
            iou = pairwise_iou(target.gt_boxes, Boxes(boxes[-1]))
            match, label = self.proposal_matchers[stage](iou)
            matches.append(match)
            added.append(torch.arange(len(match), device=match.device) >= len(own))
            classes.append(torch.full_like(match, self.num_classes))
            if len(target):
                classes[-1] = target.gt_classes[match].where(label == 1, self.num_classes)
                classes[-1].masked_fill_(label == -1, -1)
            if len(given) and given.has("is_ground_truth"):
                classes[-1][: len(own)].masked_fill_(given.is_ground_truth, -1)

        drawn, foreground, others = draw_samples(
            torch.cat(classes),
            [len(c) for c in classes],
            background=self.num_classes,
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
        )
        storage = get_event_storage()
        with storage.name_scope(f"stage{stage}"):
            storage.put_scalar("roi_head/num_fg_samples", sum(foreground) / len(foreground))
            storage.put_scalar("roi_head/num_bg_samples", sum(others) / len(others))

        sizes = [f + b for f, b in zip(foreground, others, strict=True)]
        parts = (torch.cat(x)[drawn].split(sizes) for x in (boxes, classes, matches, added))
        samples = []
        for target, boxes_i, classes_i, index, is_ground_truth in zip(targets, *parts, strict=True):
            sample = Instances(target.image_size, proposal_boxes=Boxes(boxes_i))
            sample.gt_classes, sample.is_ground_truth = classes_i, is_ground_truth
            if len(target):
                sample.gt_boxes, sample.gt_index = target.gt_boxes[index], index
            samples.append(sample)
        return samples, [s[:count] for s, count in zip(samples, foreground, strict=True)]

    def _run_stage(self, features, proposals, stage):
        """Class logits (R, K + 1) and deltas (R, 4 K) of one stage."""
        features = [features[name] for name in self.box_in_features]
        return self._predict(features, [p.proposal_boxes for p in proposals], stage)

    def _predict(self, features: list[Tensor], boxes: list[Boxes], stage: int):
        pooled = self.box_pooler(features, boxes)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refine(self, predictions, proposals: list[Instances], stage: int) -> list[Instances]:
        """The next stage's proposals: each box moved by the deltas of its class and clipped.

        Those that were ground truth stay, marked as such, and are not sampled again.
        """
        matched = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        boxes = self._move(predictions, boxes, torch.cat(_frames(proposals)), stage, matched)
        return [
            Instances(
                used.image_size, proposal_boxes=Boxes(moved), is_ground_truth=used.is_ground_truth
            )
            for used, moved in zip(proposals, boxes.split([len(p) for p in proposals]), strict=True)
        ]

    def _move(
        self,
        predictions: tuple[Tensor, Tensor],
        boxes: Tensor,
        frames: Tensor,
        stage: int,
        matched: Tensor | None = None,
    ) -> Tensor:
        """The boxes (R, 4), moved by the deltas of their classes and clipped to their ``frames``.

        The class is the one in ``matched`` (R,), if it is given and a foreground class, else the
        foreground class of highest logit.
        """
        logits, deltas = predictions
        classes = logits[:, :-1].argmax(dim=1)
        if matched is not None:
            classes = torch.where(matched < self.num_classes, matched, classes)
        deltas = deltas.view(-1, self.num_classes, 4)
        deltas = deltas[torch.arange(len(deltas), device=deltas.device), classes]
        moved = self.box_predictor[stage].box2box_transform.apply_deltas(deltas, boxes)
        # A box of numbers that are none would be pooled from anywhere.
        return moved.nan_to_num(nan=0.0).clamp(min=0).minimum(frames)

    def _forward_box(self, features, proposals, targets=None):
        """Detections of N images at test time: the stages' mean logits, the last one's boxes."""
        given = [p.proposal_boxes.tensor for p in proposals]
        predictions, refined = self.run_cascade(features, given, torch.cat(_frames(proposals)))
        last = [
            Instances(used.image_size, proposal_boxes=Boxes(boxes))
            for used, boxes in zip(proposals, refined, strict=True)
        ]
        detections, _ = self.box_predictor[-1].inference(predictions, last)
        return detections

    def detect(
        self, features: dict[str, Tensor], boxes: Tensor, counts: Tensor, image_sizes: Tensor
    ) -> Detections:
        """Find the objects of N images, at test time, without waiting for the GPU.

        The last stage's predictor must be a ``ClassSpecificOutputLayers``.

        Args:
            features: maps (N, C, H, W) by name.
            boxes: the proposals, (N, M, 4); those of an image come first, the rest is padding.
            counts: how many an image has, (N,).
            image_sizes: (N, 2), height and width in pixels.

        Returns:
            See :meth:`ClassSpecificOutputLayers.detect`.
        """
        bounds = image_bounds(image_sizes.to(boxes.dtype))[:, None].expand_as(boxes)
        predictions, refined = self.run_cascade(features, list(boxes), bounds.flatten(0, 1))
        return self.box_predictor[-1].detect(predictions, torch.stack(refined), counts, image_sizes)

    def run_cascade(
        self, features: dict[str, Tensor], rois: list[Tensor], frames: Tensor
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Run all stages on N images, at test time.

        Args:
            features: maps (N, C, H, W) by name.
            rois: each image's boxes, (R_i, 4).
            frames: what to clip them to, (R, 4).

        Returns:
            The stages' mean logits (R, K + 1) and the last stage's deltas (R, 4 K); then each
            image's boxes that those refine, (R_i, 4).
        """
        maps = [features[name] for name in self.box_in_features]
        counts = [len(boxes) for boxes in rois]
        boxes, all_logits = torch.cat(rois), []
        for k in range(self.num_cascade_stages):
            logits, deltas = self._predict(maps, [Boxes(b) for b in boxes.split(counts)], k)
            all_logits.append(logits)
            if k + 1 < self.num_cascade_stages:
                boxes = self._move((logits, deltas), boxes, frames, k)
        return (torch.stack(all_logits).mean(dim=0), deltas), list(boxes.split(counts))

    def run_masks(self, features: dict[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Predict the masks of N images' boxes, as many of each.

        Args:
            features: maps (N, C, H, W) by name.
            boxes: (N, D, 4).
            classes: (N, D).

        Returns:
            (N, D, M, M), probabilities.
        """
        instances = [
            Instances((0, 0), pred_boxes=Boxes(boxes_i), pred_classes=classes_i)
            for boxes_i, classes_i in zip(boxes, classes, strict=True)
        ]
        found = self._forward_mask(features, instances)
        return torch.stack([of_image.pred_masks[:, 0] for of_image in found])

    def _mask_losses(self, features, foreground, targets, stage: int) -> dict[str, Tensor]:
        """Loss of one stage's mask head on the foreground among that stage's samples."""
        for foreground_i, target in zip(foreground, targets, strict=True):
            if len(foreground_i):
                foreground_i.gt_masks = SharedMasks(target.gt_masks, foreground_i.gt_index)
        pooled = self.mask_pooler(
            [features[f] for f in self.mask_in_features],
            [x.proposal_boxes for x in foreground],
        )
        return self.mask_head[stage](pooled, foreground)


def _finite(predictions: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The predictions with zeros for what is not finite, and NaN if there was such, else 0.

    Detectron2's boxes and losses raise an assertion at what is not finite. Here the loss tells, and
    other processes, in the midst of the same step, do not wait for one that has raised.
    """
    finite = torch.stack([x.isfinite().all() for x in predictions]).all()
    flaw = torch.where(finite, 0.0, torch.nan)
    return tuple(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in predictions), flaw


def _frames(proposals: list[Instances]) -> list[Tensor]:
    """For each image (R_i, 4): what bounds its boxes."""
    device = proposals[0].proposal_boxes.device
    bounds = image_bounds(to_device([p.image_size for p in proposals], device))
    return [bound.expand(len(p), 4) for bound, p in zip(bounds, proposals, strict=True)]


def _whole_frame(proposals: Instances) -> Tensor:
    """The image's frame as its one proposal, (1, 4), with the device and dtype of ``proposals``."""
    height, width = proposals.image_size
    return proposals.proposal_boxes.tensor.new_tensor([[0, 0, width, height]])
