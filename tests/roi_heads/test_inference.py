"""The cascade at test time, against numbers worked out by hand and Detectron2's own."""

import math

import pytest
import torch
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from mamba_vision.errors import UserError
from mamba_vision.roi_heads.cascade import _move


def constant_predictions(heads, logits, deltas):
    """Make every stage predict the same for every RoI: (K + 1) logits, (K, 4) deltas."""
    with torch.no_grad():
        for predictor, logits_k, deltas_k in zip(heads.box_predictor, logits, deltas):
            predictor.cls_score.weight.zero_()
            predictor.cls_score.bias.copy_(torch.tensor(logits_k))
            predictor.bbox_pred.weight.zero_()
            predictor.bbox_pred.bias.copy_(torch.tensor(deltas_k).flatten())


def test_a_box_is_refined_with_the_deltas_of_its_class(make_heads, proposals_at):
    heads = make_heads(num_classes=3).eval()
    # dx of 1, 2 and 3 for the three classes: 0.1, 0.2 and 0.3 of a width of 10 in stage 0
    deltas = torch.zeros(4, 3, 4)
    deltas[:, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    deltas[3, 2] = torch.tensor([0.0, 0.0, 5 * math.log(2), 50.0])  # twice as wide; clamped in dh
    logits = torch.tensor(
        [[5.0, 1, 2, 0], [1, 5, 2, 0], [1, 2, 3, 9], [0, 0, 1, 0]]  # the third: background wins
    )
    proposals = [proposals_at([[10, 10, 20, 20]] * 3), proposals_at([[40, 20, 50, 30]])]
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    frames = torch.tensor([96.0, 64, 96, 64]).expand(4, 4)
    # 10 * 1000 / 16 = 625 high, which leaves the image above and below
    last = [35.0, 0, 55, 64]
    expected = torch.tensor([[11.0, 10, 21, 20], [12, 10, 22, 20], [13, 10, 23, 20], last])
    predictor = heads.box_predictor[0]
    assert_close(_move(predictor, (logits, deltas.flatten(1)), boxes, frames), expected)

    # in training: the matched class for foreground, the highest foreground logit for background
    expected[0] = torch.tensor([13.0, 10, 23, 20])
    matched = torch.tensor([2, 3, 3, 3])
    assert_close(_move(predictor, (logits, deltas.flatten(1)), boxes, frames, matched), expected)


def test_logits_are_averaged_and_boxes_are_the_last_stages(make_heads, features, proposals_at):
    heads = make_heads(num_classes=2, masks=False).eval()
    logits = [[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.5, 1.5]]
    deltas = [
        [[1.0, 0, 0, 0], [7.0, 0, 0, 0]],  # class 0: 0.1 of the width to the right
        [[7.0, 0, 0, 0], [0, 2.0, 0, 0]],  # class 1: 2 * 0.05 of the height down
        [[1.0, 0, 0, 0], [0, 1.0, 0, 0]],  # 0.033 right for class 0, 0.033 down for class 1
    ]
    constant_predictions(heads, logits, deltas)
    proposals = [proposals_at([[20, 10, 40, 30]]), proposals_at([])]
    (found, nothing), losses = heads(None, features, proposals)
    assert losses == {}
    assert len(nothing) == 0
    # mean logits 4/3, 4.5/3, 1.5/3: class 1 leads, by the softmax of the mean and not by the mean
    # of the softmaxes
    total = sum(math.exp(x / 3) for x in (4, 4.5, 1.5))
    assert found.pred_classes.tolist() == [1, 0]
    assert_close(found.scores, torch.tensor([math.exp(1.5) / total, math.exp(4 / 3) / total]))
    expected = [[22, 12 + 0.66, 42, 32 + 0.66], [22 + 0.66, 12, 42 + 0.66, 32]]
    assert_close(found.pred_boxes.tensor, torch.tensor(expected))


def test_masks_are_the_mean_of_the_stages_probabilities(make_heads, features):
    heads = make_heads(num_classes=2).eval()
    biases = [[-3.0, 2.0], [0.0, 2.5], [3.0, 0.5]]
    with torch.no_grad():
        for head, bias in zip(heads.mask_head, biases):
            head.predictor.weight.zero_()
            head.predictor.bias.copy_(torch.tensor(bias))
    given = [
        Instances(
            (64, 96), pred_boxes=Boxes(torch.tensor(boxes)), pred_classes=torch.tensor(classes)
        )
        for boxes, classes in (
            ([[8.0, 8, 40, 40], [30, 10, 60, 50]], [1, 0]),
            ([[0.0, 0, 96, 64]], [1]),
        )
    ]
    first, second = heads.forward_with_given_boxes(features, given)
    mean = [sum(1 / (1 + math.exp(-b[c])) for b in biases) / 3 for c in (0, 1)]
    assert first.pred_masks.shape == (2, 1, 28, 28)
    assert_close(first.pred_masks[0], torch.full((1, 28, 28), mean[1]))
    assert_close(first.pred_masks[1], torch.full((1, 28, 28), mean[0]))
    assert_close(second.pred_masks, torch.full((1, 1, 28, 28), mean[1]))


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("masks", [True, False])
def test_images_without_proposals_have_no_detections(
    make_heads, features, proposals_at, masks, norm
):
    heads = make_heads(masks=masks, norm=norm).eval()
    detections, _ = heads(None, features, [proposals_at([]), proposals_at([])])
    for found in detections:
        assert len(found) == 0
        assert found.pred_boxes.tensor.shape == (0, 4)
        assert found.has("pred_masks") == masks
        if masks:
            assert found.pred_masks.shape == (0, 1, 28, 28)


def test_boxes_are_detectron2s_where_the_two_cascades_coincide(make_heads, parts, features, scene):
    """One class, and scores that do not depend on the RoI: then how to average is all the same."""
    ours = make_heads(num_classes=1, masks=False).eval()
    theirs = CascadeROIHeads(**parts(1, agnostic=True)).eval()
    for predictor in ours.box_predictor:
        predictor.cls_score.weight.data.zero_()
        predictor.cls_score.bias.data.copy_(torch.tensor([1.0, 0.0]))
    assert_same_detections(ours, theirs, features, scene[0])


def test_one_stage_of_one_class_is_detectron2s(make_heads, parts, features, scene):
    ours = make_heads(num_classes=1, stages=1, masks=False).eval()
    theirs = CascadeROIHeads(**parts(1, stages=1, agnostic=True)).eval()
    assert_same_detections(ours, theirs, features, scene[0])


def assert_same_detections(ours, theirs, features, proposals):
    theirs.load_state_dict(ours.state_dict())
    found, _ = ours(None, features, proposals)
    expected, _ = theirs(None, features, proposals)
    for f, e in zip(found, expected):
        assert len(e) > 1
        assert_close(f.pred_boxes.tensor, e.pred_boxes.tensor)
        assert_close(f.scores, e.scores)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("keypoint_in_features", {"keypoint_in_features": ["p2"]}),
        ("box_predictors.0", {"num_classes": 4}),
        ("mask_heads", {"mask_heads": []}),
    ],
)
def test_what_it_cannot_do_is_one_clear_error(make_heads, parts, named, changes):
    with pytest.raises(UserError, match=named) as caught:
        make_heads(box_predictors=parts(3)["box_predictors"], **changes)
    assert "\n" not in str(caught.value)
