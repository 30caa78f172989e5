"""How far the detections of two detectors lie apart."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from mamba_vision.benchmarks.subject import ROUGH, lost


def found(boxes, scores, classes, masks=None):
    instances = Instances((20, 20), pred_boxes=Boxes(torch.tensor(boxes).float().view(-1, 4)))
    instances.scores, instances.pred_classes = torch.tensor(scores), torch.tensor(classes)
    if masks is not None:
        instances.pred_masks = masks
    return [instances]


TRUTH = found([[0, 0, 10, 10], [5, 5, 15, 15]], [0.9, 0.5], [1, 2])


@pytest.mark.parametrize(
    ("boxes", "scores", "classes", "share"),
    [
        ([[5, 5, 15, 15], [0, 0, 10, 10]], [0.5, 0.9], [2, 1], 0),  # in another order
        ([[0, 0, 10, 10], [5, 5, 15, 15]], [0.9, 0.5], [1, 1], 0.5),
        ([[0, 0, 10, 10], [5, 5, 15, 15]], [0.9, 0.52], [1, 2], 0.5),
        ([[0, 0, 10, 10], [5, 5, 15, 13.5]], [0.9, 0.5], [1, 2], 0.5),  # IoU 0.85
        ([[0, 0, 10, 10]], [0.9], [1], 0.5),
        ([[0, 0, 10, 10], [5, 5, 15, 15], [0, 0, 2, 2]], [0.9, 0.5, 0.3], [1, 2, 0], 1 / 3),
        ([], [], [], 1),
    ],
)
def test_share_without_a_counterpart(boxes, scores, classes, share):
    assert lost(found(boxes, scores, classes), TRUTH) == pytest.approx(share)


def test_roughly():
    moved = found([[0, 0, 10, 10], [5, 5, 15, 13.5]], [0.9, 0.52], [1, 2])
    assert lost(moved, TRUTH, ROUGH) == 0


@pytest.mark.parametrize(("columns", "share"), [(10, 0), (8, 0), (7, 1)])
def test_masks(columns, share):
    whole, part = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    whole[:, :, :10], part[:, :, :columns] = True, True
    box = [[0, 0, 10, 20]], [0.9], [1]
    assert lost(found(*box, part), found(*box, whole)) == share


def test_nothing_found_is_no_agreement():
    nothing = found([], [], [])
    assert lost(nothing, nothing) == 1
