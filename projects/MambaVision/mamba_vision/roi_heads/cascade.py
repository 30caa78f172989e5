"""Cascade R-CNN (arXiv:1712.00726) with class-specific boxes and a mask head per stage.

Detectron2's ``CascadeROIHeads`` refines one box per RoI, averages the stages' softmaxes and has
one mask head. The cascade with which MambaVision's detectors were trained differs in what this
module holds, and in nothing else.

Shapes:
    N images; R RoIs of all images together, R_i those of image i; K foreground classes;
    class logits (R, K + 1), background last; deltas (R, 4 K), class by class (dx, dy, dw, dh).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import UserError

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
        samples: list[list[Instances]] = []
        losses: dict[str, Tensor] = {}
        for k in range(self.num_cascade_stages):
            samples.append(self.label_and_sample_proposals(proposals, targets, k))
            predictions, flaw = _finite(self._run_stage(features, samples[k], k))
            with get_event_storage().name_scope(f"stage{k}"):
                stage_losses = self.box_predictor[k].losses(predictions, samples[k])
                stage_losses = {name: loss + flaw for name, loss in stage_losses.items()}
                if self.mask_on:
                    stage_losses |= self._mask_losses(features, samples[k], targets, k)
            losses |= {f"{name}_stage{k}": loss for name, loss in stage_losses.items()}
            if k + 1 < self.num_cascade_stages:
                proposals = self._refine(predictions, samples[k], k)
        return samples[0], losses

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances], stage: int = 0
    ) -> list[Instances]:
        """Match proposals at the IoU of ``stage`` and sample those to train it on.

        Args:
            proposals: N images' ``proposal_boxes`` and ``objectness_logits``.
            targets: N images' ``gt_boxes`` and ``gt_classes``, and whatever else the heads need.
            stage: cascade stage, from 0.

        Returns:
            N images' samples: the proposals' fields, ``gt_classes`` (K for background),
            ``is_ground_truth`` (bool: a target added to the proposals) and, where the image has
            targets, ``gt_boxes`` and ``gt_index`` (the target's place among the image's targets).
        """
        self.proposal_matcher = self.proposal_matchers[stage]
        proposals = [_mark(p if len(p) else _whole_frame(p), False) for p in proposals]
        # A sample carries the number of its target, not a copy of its mask: 512 masks of full
        # size are half a gigabyte an image.
        slim_targets = []
        for target in targets:
            slim = Instances(target.image_size)
            slim.gt_boxes, slim.gt_classes = target.gt_boxes, target.gt_classes
            slim.gt_index = torch.arange(len(target), device=target.gt_classes.device)
            slim_targets.append(_mark(slim, True))
        with get_event_storage().name_scope(f"stage{stage}"):
            return super().label_and_sample_proposals(proposals, slim_targets)

    def _run_stage(self, features, proposals, stage):
        """Class logits (R, K + 1) and deltas (R, 4 K) of one stage."""
        features = [features[name] for name in self.box_in_features]
        return self._predict(features, [p.proposal_boxes for p in proposals], stage)

    def _predict(self, features: list[Tensor], boxes: list[Boxes], stage: int):
        pooled = self.box_pooler(features, boxes)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refine(self, predictions, proposals: list[Instances], stage: int) -> list[Instances]:
        """The next stage's proposals: each box moved by the deltas of its class and clipped."""
        matched = torch.cat([p.gt_classes for p in proposals]) if self.training else None
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        boxes = self._move(predictions, boxes, torch.cat(_frames(proposals)), stage, matched)
        refined = []
        for used, moved in zip(proposals, boxes.split([len(p) for p in proposals]), strict=True):
            instances = Instances(used.image_size, proposal_boxes=Boxes(moved))
            if self.training:  # sampling needs the logits, and adds the ground truth afresh
                instances.objectness_logits = used.objectness_logits
                instances = instances[~used.is_ground_truth]
            refined.append(instances)
        return refined

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
        found = self.run_cascade(
            [features[name] for name in self.box_in_features],
            list(zip(given, _frames(proposals), strict=True)),
        )
        logits, deltas, boxes = zip(*found, strict=True)
        last = [
            Instances(used.image_size, proposal_boxes=Boxes(moved))
            for used, moved in zip(proposals, boxes, strict=True)
        ]
        predictions = torch.cat(logits), torch.cat(deltas)
        detections, _ = self.box_predictor[-1].inference(predictions, last)
        return detections

    def run_cascade(
        self, features: list[Tensor], rois: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run all stages on N images, at test time.

        Args:
            features: for each level a map (N, C, H, W).
            rois: for each image its boxes (R_i, 4), and the frames to clip them to (R_i, 4).

        Returns:
            For each image the stages' mean logits (R_i, K + 1), the last stage's deltas (R_i, 4 K)
            and the boxes that those refine (R_i, 4).
        """
        counts = [len(boxes) for boxes, _ in rois]
        boxes, frames = (torch.cat(x) for x in zip(*rois, strict=True))
        all_logits = []
        for k in range(self.num_cascade_stages):
            logits, deltas = self._predict(features, [Boxes(b) for b in boxes.split(counts)], k)
            all_logits.append(logits)
            if k + 1 < self.num_cascade_stages:
                boxes = self._move((logits, deltas), boxes, frames, k)
        logits = torch.stack(all_logits).mean(dim=0)
        return list(zip(*(x.split(counts) for x in (logits, deltas, boxes)), strict=True))

    def _forward_mask(self, features, instances):
        """Set ``pred_masks`` of detections, at test time; see :class:`StageMaskHeads`."""
        if not self.mask_on:
            return instances
        if self.mask_pooler is None:
            return super()._forward_mask(features, instances)
        masks = self.run_masks(
            [features[name] for name in self.mask_in_features],
            [(found.pred_boxes.tensor, found.pred_classes) for found in instances],
        )
        for found, (masks_i,) in zip(instances, masks, strict=True):
            found.pred_masks = masks_i
        return instances

    def run_masks(
        self, features: list[Tensor], rois: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor]]:
        """Predict the masks of N images' boxes.

        Args:
            features: for each level a map (N, C, H, W).
            rois: for each image its boxes (R_i, 4) and their classes (R_i,).

        Returns:
            For each image, alone in a tuple, its masks (R_i, 1, M, M) in [0, 1].
        """
        boxes = [Boxes(b) for b, _ in rois]
        instances = [Instances((0, 0), pred_classes=classes) for _, classes in rois]
        found = self.mask_head(self.mask_pooler(features, boxes), instances)
        return [(i.pred_masks,) for i in found]

    def _mask_losses(self, features, samples, targets, stage: int) -> dict[str, Tensor]:
        """Loss of one stage's mask head on the foreground among that stage's samples."""
        foreground, _ = select_foreground_proposals(samples, self.num_classes)
        for foreground_i, target in zip(foreground, targets, strict=True):
            if len(foreground_i):
                foreground_i.gt_masks = target.gt_masks[foreground_i.gt_index]
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
    """For each image (R_i, 4): the corner (width, height) that bounds its boxes, twice."""
    frames = []
    for of_image in proposals:
        height, width = of_image.image_size
        # Not from a list to the device at once, which would wait for it.
        frame = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = of_image.proposal_boxes.tensor
        frames.append(frame.to(boxes.device, non_blocking=True).expand(len(boxes), 4))
    return frames


def _mark(instances: Instances, is_ground_truth: bool) -> Instances:
    """A copy with the field ``is_ground_truth``, bool, (R_i,)."""
    marked = Instances(instances.image_size, **instances.get_fields())
    boxes = instances.gt_boxes if is_ground_truth else instances.proposal_boxes
    marked.is_ground_truth = torch.full((len(boxes),), is_ground_truth, device=boxes.device)
    return marked


def _whole_frame(proposals: Instances) -> Instances:
    """The image's frame as its one proposal, with the device and dtype of ``proposals``."""
    height, width = proposals.image_size
    boxes = proposals.proposal_boxes.tensor.new_tensor([[0, 0, width, height]])
    return Instances(
        proposals.image_size,
        proposal_boxes=Boxes(boxes),
        objectness_logits=proposals.objectness_logits.new_zeros(1),
    )
