"""Classes and boxes of RoIs, their losses, and which are detections.

Shapes:
    N images; R RoIs of all images together, or M of each; K foreground classes; class logits
    (R, K + 1), background last; deltas (R, 4 K), class by class (dx, dy, dw, dh).
"""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from ..proposals import to_device
from ..scalars import put_scalars
from .selection import Detections, select_detections

__all__ = ["ClassSpecificOutputLayers", "giou_loss"]


class ClassSpecificOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictor, with the same results, of class-specific boxes by GIoU.

    Detectron2 lists the foreground, and at test time the boxes of high scores, for which the CPU
    waits until the GPU is done with all that it was given before. Here the box loss is a sum over
    all RoIs, in which background counts nothing, and all boxes go through NMS, class by class.
    """

    LOSSES = ("loss_cls", "loss_box_reg")
    STATISTICS = (  # Detectron2's names
        "fast_rcnn/cls_accuracy",
        "fast_rcnn/fg_cls_accuracy",
        "fast_rcnn/false_negative",
    )

    def __init__(self, *args, box_reg_loss_type: str = "giou", **kwargs) -> None:
        """
        Args:
            args, kwargs: as for ``FastRCNNOutputLayers``, but those below.
            box_reg_loss_type: ``"giou"``.

        Raises:
            UserError: another loss is asked for.
        """
        super().__init__(*args, box_reg_loss_type=box_reg_loss_type, **kwargs)
        asked = {
            f"box_reg_loss_type={box_reg_loss_type}": box_reg_loss_type != "giou",
            "cls_agnostic_bbox_reg": self.bbox_pred.out_features != 4 * self.num_classes,
            "use_sigmoid_ce": self.use_sigmoid_ce,
        }
        for argument, wrong in asked.items():
            if wrong:
                raise UserError(
                    f"{argument}: this predictor has softmax and class-specific boxes with GIoU "
                    "alone; use detectron2.modeling.roi_heads.FastRCNNOutputLayers"
                )

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """See :meth:`detectron2.modeling.roi_heads.FastRCNNOutputLayers.inference`.

        The CPU waits once for the GPU, to learn how many detections there are.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        counts = [len(b) for b in boxes]
        logits, deltas = (
            pad_sequence(x.split(counts), batch_first=True).flatten(0, 1) for x in predictions
        )
        device = logits.device
        sizes = [p.image_size for p in proposals]
        *found, lengths = self.detect(
            (logits, deltas),
            pad_sequence(boxes, batch_first=True),
            to_device(counts, device),
            to_device(sizes, device),
        )
        instances, rois = [], []
        for size, n, *of_image in zip(sizes, lengths.tolist(), *found, strict=True):
            boxes_i, scores, classes, rois_i = (x[:n] for x in of_image)
            instances.append(
                Instances(size, pred_boxes=Boxes(boxes_i), scores=scores, pred_classes=classes)
            )
            rois.append(rois_i)
        return instances, rois

    def detect(
        self,
        predictions: tuple[Tensor, Tensor],
        boxes: Tensor,
        counts: Tensor,
        image_sizes: Tensor,
    ) -> Detections:
        """Choose the detections of N images in fixed shapes, without waiting for the GPU.

        Args:
            predictions: class logits (N M, K + 1) and deltas (N M, 4 K).
            boxes: (N, M, 4), which the deltas refine; the first of an image, the rest is padding.
            counts: how many an image has, (N,).
            image_sizes: (N, 2), height and width in pixels.

        Returns:
            At most ``test_topk_per_image`` of an image; see
            :func:`~mamba_vision.roi_heads.selection.select_detections`.
        """
        logits, deltas = predictions
        shape = boxes.shape[:2]
        moved = self.box2box_transform.apply_deltas(deltas, boxes.flatten(0, 1))
        return select_detections(
            moved.view(*shape, self.num_classes, 4),
            logits.softmax(dim=1).view(*shape, self.num_classes + 1),
            torch.arange(shape[1], device=boxes.device) < counts[:, None],
            image_sizes,
            score_threshold=self.test_score_thresh,
            nms_threshold=self.test_nms_thresh,
            most=self.test_topk_per_image,
        )

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses of samples.

        Args:
            predictions: class logits (R, K + 1) and deltas (R, 4 K).
            proposals: N images' samples, with ``proposal_boxes``, ``gt_classes`` (K for background)
                and, where the image has objects, ``gt_boxes``.

        Returns:
            ``loss_cls``, the mean cross entropy, and ``loss_box_reg``, the sum of 1 - GIoU over the
            foreground divided by R; weighted.
        """
        classes = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        objects = torch.cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        losses, statistics = self.sum_up(predictions, boxes, classes, objects)
        self.log(statistics)
        return dict(zip(self.LOSSES, losses.unbind()))

    def sum_up(
        self, predictions: tuple[Tensor, ...], boxes: Tensor, classes: Tensor, objects: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses and statistics of samples; does not wait for the GPU.

        Args:
            predictions: class logits (R, K + 1) and deltas (R, 4 K).
            boxes: the samples', (R, 4).
            classes: K for background, (R,); -1 for a row that is no sample.
            objects: the boxes of the objects matched, (R, 4).

        Returns:
            ``LOSSES``, weighted, and ``STATISTICS``.
        """
        logits, deltas = predictions
        count = (classes >= 0).sum()
        foreground = (classes >= 0) & (classes < self.num_classes)

        own = classes.clamp(0, self.num_classes - 1)[:, None, None].expand(-1, 1, 4)
        deltas = deltas.view(-1, self.num_classes, 4).gather(1, own).squeeze(1)
        # Chosen before they are used: a box without a size may have a loss whose gradient is none.
        inside = foreground[:, None]
        moved = self.box2box_transform.apply_deltas(deltas.where(inside, 0), boxes)
        apart = giou_loss(moved, objects.where(inside, boxes))
        cross_entropy = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
        sums = {"loss_cls": cross_entropy, "loss_box_reg": apart.where(foreground, 0).sum()}
        losses = [sums[k] * self.loss_weight.get(k, 1.0) / count.clamp(min=1) for k in self.LOSSES]
        return torch.stack(losses), _statistics(logits, classes, foreground, count)

    def log(self, statistics: Tensor) -> None:
        """Log the ``STATISTICS``; without foreground those of it are NaN."""
        put_scalars(dict(zip(self.STATISTICS, statistics.unbind())))


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - GIoU of paired boxes (arXiv:1902.09630).

    ``fvcore.nn.giou_loss`` without its assertions and its list of the boxes that meet, for which
    the CPU would wait.

    Args:
        boxes, others: (R, 4), from corner to corner.

    Returns:
        (R,), from 0 to 2; of a box without area, too, with a finite gradient.
    """
    tiny = 1e-7
    start, end = boxes.split(2, dim=1)
    other_start, other_end = others.split(2, dim=1)
    sizes = torch.stack(
        [
            end - start,
            other_end - other_start,
            (torch.minimum(end, other_end) - torch.maximum(start, other_start)).clamp(min=0),
            torch.maximum(end, other_end) - torch.minimum(start, other_start),
        ]
    )
    widths, heights = sizes.unbind(dim=2)
    area, other_area, common, hull = widths * heights  # prod() would wait in the backward pass
    union = area + other_area - common
    return 1 - common / (union + tiny) + (hull - union) / (hull + tiny)


@torch.no_grad()
def _statistics(logits: Tensor, classes: Tensor, foreground: Tensor, count: Tensor) -> Tensor:
    predicted = logits.argmax(dim=1)
    right = predicted == classes
    missed = predicted == logits.shape[1] - 1
    counts = torch.stack([right, right & foreground, missed & foreground, foreground]).sum(dim=1)
    return torch.cat([counts[:1] / count, counts[1:3] / counts[3]])
