"""Small heads, images and proposals for the cascade's tests."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from mamba_vision.roi_heads import (
    ClassSpecificCascadeROIHeads,
    ClassSpecificOutputLayers,
    MaskHead,
)
from mamba_vision.scalars import flush_scalars

CHANNELS = 4
SIZE = (64, 96)  # of an image: height, width
STDS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]


def _parts(num_classes, stages=3, norm="BN", agnostic=False):
    """Arguments that the cascade shares with Detectron2's."""
    options = {"cls_agnostic_bbox_reg": True, "box_reg_loss_type": "giou"} if agnostic else {}
    return {
        "num_classes": num_classes,
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "box_in_features": ["p2", "p3"],
        "box_pooler": ROIPooler(7, (1 / 4, 1 / 8), 0, "ROIAlignV2"),
        "box_heads": [
            FastRCNNConvFCHead(
                ShapeSpec(channels=CHANNELS, height=7, width=7),
                conv_dims=[CHANNELS],
                fc_dims=[8],
                conv_norm=norm,
            )
            for _ in range(stages)
        ],
        "box_predictors": [
            (FastRCNNOutputLayers if agnostic else ClassSpecificOutputLayers)(
                ShapeSpec(channels=8),
                box2box_transform=Box2BoxTransform([1 / s for s in STDS[k]]),
                num_classes=num_classes,
                test_score_thresh=0.05,
                loss_weight={"loss_cls": 0.5**k, "loss_box_reg": 10 * 0.5**k},
                **options,
            )
            for k in range(stages)
        ],
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)[:stages]],
    }


def _mask_heads(num_classes, stages=3):
    return [
        MaskHead(
            ShapeSpec(channels=CHANNELS, height=14, width=14),
            num_classes=num_classes,
            conv_dims=[CHANNELS, CHANNELS],
            loss_weight=0.5**k,
        )
        for k in range(stages)
    ]


@pytest.fixture
def make_heads():
    """Build a cascade, its weights large enough for boxes to move by pixels."""

    def make(num_classes=3, stages=3, masks=True, norm="BN", **changes):
        heads = ClassSpecificCascadeROIHeads(
            **{
                **_parts(num_classes, stages, norm),
                "mask_in_features": ["p2", "p3"],
                "mask_pooler": ROIPooler(14, (1 / 4, 1 / 8), 0, "ROIAlignV2"),
                "mask_heads": _mask_heads(num_classes, stages) if masks else None,
                **changes,
            }
        )
        with torch.no_grad():
            for predictor in heads.box_predictor:
                predictor.bbox_pred.weight.normal_(std=0.3)
                predictor.cls_score.weight.normal_(std=0.3)
        return heads

    return make


@pytest.fixture
def features():
    """Two images' maps p2 and p3."""
    return {
        f"p{i}": torch.randn(2, CHANNELS, SIZE[0] // 2**i, SIZE[1] // 2**i, requires_grad=True)
        for i in (2, 3)
    }


def _proposals_at(boxes):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))


def _targets_at(boxes, classes):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
        mask[y0:y1, x0 : (x0 + x1) // 2] = True
    return Instances(
        SIZE,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.as_tensor(classes, dtype=torch.int64),
        gt_masks=BitMasks(masks),
    )


@pytest.fixture
def proposals_at():
    """From boxes to one image's proposals."""
    return _proposals_at


@pytest.fixture
def targets_at():
    """From boxes and classes to one image's ground truth; a mask is the left half of its box."""
    return _targets_at


@pytest.fixture
def parts():
    """The arguments that the cascade shares with Detectron2's."""
    return _parts


@pytest.fixture
def scene():
    """Two images' proposals, some near an object and some not, and their targets."""
    proposals, targets = [], []
    for boxes, classes in (([[8, 8, 40, 40], [48, 16, 88, 56]], [0, 2]), ([[20, 4, 60, 60]], [1])):
        targets.append(_targets_at(boxes, classes))
        around = targets[-1].gt_boxes.tensor.repeat(20, 1)
        moves = (torch.rand_like(around) - 0.5) * 20
        boxes = (around + moves).clamp(min=0).minimum(torch.tensor([SIZE[1], SIZE[0]] * 2))
        proposals.append(_proposals_at(boxes))
    return proposals, targets


@pytest.fixture
def train(monkeypatch):
    """Run a training step; returns the losses, and every stage's samples and predictions."""

    def step(heads, features, proposals, targets):
        samples, predictions = [], []
        sample = heads._sample

        def spy(*args):
            found = sample(*args)
            samples.append(found.instances(targets))
            return found

        def note(predictor, inputs, outputs):
            count = sum(map(len, samples[-1]))  # after them comes padding
            predictions.append(tuple(x[:count] for x in outputs))

        monkeypatch.setattr(heads, "_sample", spy)
        hooks = [p.register_forward_hook(note) for p in heads.box_predictor]
        with EventStorage() as storage:
            _, losses = heads.train()(None, features, proposals, targets)
            flush_scalars()
        monkeypatch.undo()
        for hook in hooks:
            hook.remove()
        return losses, samples, predictions, storage

    return step
