"""Cascade R-CNN (arXiv:1712.00726) with class-specific boxes and a mask head per stage.

Detectron2's ``CascadeROIHeads`` refines one box per RoI, averages the stages' softmaxes and has
one mask head. The cascade with which MambaVision's detectors were trained differs in what this
module holds, and in nothing else.

Shapes:
    N images; R RoIs of all images together, R_i those of image i, or M of each, the rest padding;
    K foreground classes; D detections of an image at most;
    class logits (R, K + 1), background last; deltas (R, 4 K), class by class (dx, dy, dw, dh);
    in training S samples of an image at most, N S of all with padding behind them, and G
    ground-truth objects of an image with padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..proposals import image_bounds, to_device
from ..training_graphs import TrainingGraphs
from .mask_head import MaskHead, SharedMasks, StageMaskHeads
from .predictor import ClassSpecificOutputLayers
from .sampling import Objects, Sampler, Samples, pad_candidates, pad_objects
from .selection import Detections

__all__ = ["ClassSpecificCascadeROIHeads"]

FORMS = 8  # of inputs that are recorded of each part


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

    def __init__(
        self,
        *,
        mask_heads: Sequence[nn.Module] | None = None,
        cuda_graphs: bool = True,
        **kwargs,
    ) -> None:
        """
        Args:
            mask_heads: one mask head for each stage, such as Detectron2's
                ``MaskRCNNConvUpsampleHead``; they become ``mask_head.0``, ``mask_head.1``, ...
                ``None`` leaves masks out, whatever ``mask_in_features`` says.
            cuda_graphs: in training on a GPU record sampling, predictors, losses and mask heads,
                and launch each pass of them as a CUDA graph. Changes no number.
            kwargs: as for ``CascadeROIHeads``, without ``mask_head`` and keypoints. The predictors
                must be class-specific.

        Raises:
            UserError: a predictor is class-agnostic, a matcher allows low-quality matches, the
                number of mask heads is not that of stages, or keypoints are asked for.
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
        for k, matcher in enumerate(self.proposal_matchers):
            if getattr(matcher, "allow_low_quality_matches", False):
                raise UserError(
                    f"roi_heads.proposal_matchers.{k}.allow_low_quality_matches is True, which is "
                    "for anchors; set it to False"
                )

        limit = FORMS if cuda_graphs else 0
        self._sampling = [TrainingGraphs(limit) for _ in self.box_head]
        self._ending = [TrainingGraphs(limit) for _ in self.box_head]
        for head in self.mask_head if self.mask_on else ():
            if isinstance(head, MaskHead):
                head.graphs = TrainingGraphs(limit)

    def forward(self, images, features, proposals, targets=None):
        """See :meth:`detectron2.modeling.roi_heads.ROIHeads.forward`.

        In training the losses are ``loss_cls_stage{k}``, ``loss_box_reg_stage{k}`` and, with
        masks, ``loss_mask_stage{k}``; the instances returned are the samples of the first stage.
        """
        if not self.training:
            return super().forward(images, features, proposals)
        objects = pad_objects(targets)
        bounds = image_bounds(to_device([p.image_size for p in proposals], objects.boxes.device))
        boxes, images = pad_candidates(proposals)
        first: list[Instances] = []
        losses: dict[str, Tensor] = {}
        for k in range(self.num_cascade_stages):
            samples = self._sample(boxes, images, objects, k)
            first = first or samples.instances(targets)
            with get_event_storage().name_scope(f"stage{k}"):
                stage_losses, boxes = self._train_boxes(features, samples, targets, bounds, k)
                images = samples.candidates
                if self.mask_on:
                    foreground = samples.foreground_instances(targets)
                    stage_losses |= self._mask_losses(features, foreground, targets, k)
            losses |= {f"{name}_stage{k}": loss for name, loss in stage_losses.items()}
        return first, losses

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances], stage: int = 0
    ) -> list[Instances]:
        """Match proposals at the IoU of ``stage`` and sample those to train it on.

        The CPU waits once for the GPU, to learn how many there are.

        Args:
            proposals: N images' ``proposal_boxes``.
            targets: N images' ``gt_boxes`` and ``gt_classes``.
            stage: cascade stage, from 0.

        Returns:
            N images' samples, foreground first: ``proposal_boxes``, ``gt_classes`` (K for
            background), ``is_ground_truth`` (bool: a target added to the proposals) and, where the
            image has targets, ``gt_boxes`` and ``gt_index`` (the target's place among the image's
            targets).
        """
        candidates = pad_candidates(proposals)
        return self._sample(*candidates, pad_objects(targets), stage).instances(targets)

    @torch.no_grad()
    def _sample(self, boxes: Tensor, images: Tensor, objects: Objects, stage: int) -> Samples:
        """Sample candidates (C, 4) of the images (C,), -1 for those that may not be sampled."""
        sampler = Sampler(
            self.proposal_matchers[stage],
            num_classes=self.num_classes,
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            append_objects=self.proposal_append_gt,
        )
        floats, integers, counts = self._sampling[stage](sampler, boxes, images, *objects)
        count = len(objects.counts)
        numbers = counts.tolist()
        samples = Samples(floats, integers, numbers[:count], numbers[count:])
        storage = get_event_storage()
        with storage.name_scope(f"stage{stage}"):
            storage.put_scalar("roi_head/num_fg_samples", sum(samples.foreground) / count)
            storage.put_scalar("roi_head/num_bg_samples", sum(samples.others) / count)
        return samples

    def _train_boxes(
        self,
        features: dict[str, Tensor],
        samples: Samples,
        targets: list[Instances],
        bounds: Tensor,
        stage: int,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of a stage, and the boxes (N S, 4) that it makes of the samples."""
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [Boxes(boxes) for boxes in samples.of_images("boxes")])
        x = self.box_head[stage](pooled)
        missing = len(samples.floats) - len(x)
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        predictor = self.box_predictor[stage]
        if getattr(type(predictor), "losses", None) is ClassSpecificOutputLayers.losses:
            losses, statistics, boxes = self._ending[stage](
                _Ending(predictor), x, samples.floats, samples.integers, bounds
            )
            predictor.log(statistics)
            return dict(zip(predictor.LOSSES, losses.unbind())), boxes
        predictions, flaw = _finite(predictor(x))
        count = len(samples)
        known = tuple(p[:count] for p in predictions)
        found = predictor.losses(known, samples.instances(targets))
        boxes = _refine(predictor, predictions, samples.floats, samples.integers, bounds)
        return {name: loss + flaw for name, loss in found.items()}, boxes

    def _predict(self, features: list[Tensor], boxes: list[Boxes], stage: int):
        pooled = self.box_pooler(features, boxes)
        return self.box_predictor[stage](self.box_head[stage](pooled))

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
                boxes = _move(self.box_predictor[k], (logits, deltas), boxes, frames)
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


class _Ending(nn.Module):
    """What a stage does after its box head: losses, statistics and the boxes refined.

    Args:
        predictor: the stage's.
    """

    def __init__(self, predictor: ClassSpecificOutputLayers) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(
        self, x: Tensor, floats: Tensor, integers: Tensor, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``ClassSpecificOutputLayers.sum_up`` for the first two; then boxes (N S, 4).

        Args:
            x: from the box head, (N S, ...).
            floats, integers: see :class:`Samples`.
            bounds: of the images, (N, 4).
        """
        predictions, flaw = _finite(self.predictor(x))
        losses, statistics = self.predictor.sum_up(
            predictions, floats[:, :4], integers[:, 0], floats[:, 4:]
        )
        boxes = _refine(self.predictor, predictions, floats, integers, bounds)
        return losses + flaw, statistics, boxes


@torch.no_grad()
def _refine(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, ...],
    floats: Tensor,
    integers: Tensor,
    bounds: Tensor,
) -> Tensor:
    """The next stage's candidates: each box moved by the deltas of its class and clipped."""
    frames = bounds[integers[:, 2]]  # the padding's does not matter
    return _move(predictor, predictions, floats[:, :4], frames, integers[:, 0])


def _move(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, ...],
    boxes: Tensor,
    frames: Tensor,
    matched: Tensor | None = None,
) -> Tensor:
    """The boxes (R, 4), moved by the deltas of their classes and clipped to their ``frames``.

    The class is the one in ``matched`` (R,), if it is given and a foreground class, else the
    foreground class of highest logit.
    """
    logits, deltas = predictions
    count = logits.shape[1] - 1
    classes = logits[:, :-1].argmax(dim=1)
    if matched is not None:
        classes = torch.where(matched < count, matched, classes)
    deltas = deltas.view(-1, count, 4)
    deltas = deltas[torch.arange(len(deltas), device=deltas.device), classes]
    moved = predictor.box2box_transform.apply_deltas(deltas, boxes)
    # A box of numbers that are none would be pooled from anywhere.
    return moved.nan_to_num(nan=0.0).clamp(min=0).minimum(frames)


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
