"""Detections, chosen in fixed shapes, are those of Detectron2."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

from mamba_vision.proposals import to_device
from mamba_vision.roi_heads import ClassSpecificOutputLayers
from mamba_vision.roi_heads.selection import select_detections

SIZES = [(60, 90), (90, 50)]
THRESHOLD = 0.15  # of scores
CLASSES = 5


def boxes_and_scores(rois, seed=0):
    """Boxes that overlap, within an image and beyond, and scores: (2, M, K, 4), (2, M, K + 1)."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, rois, CLASSES, 2, generator=draw) * 100 - 10
    sides = 5 + torch.rand(2, rois, CLASSES, 2, generator=draw) * 60
    scores = torch.randn(2, rois, CLASSES + 1, generator=draw).softmax(dim=2)
    return torch.cat([corners, corners + sides], dim=3), scores


def select(boxes, scores, counts, most=100, threshold=THRESHOLD, device="cpu"):
    count = to_device(counts, torch.device(device))
    there = torch.arange(boxes.shape[1], device=device) < count[:, None]
    sizes = to_device(SIZES[: len(boxes)], torch.device(device))
    options = {"score_threshold": threshold, "nms_threshold": 0.5, "most": most}
    return select_detections(boxes.to(device), scores.to(device), there, sizes, **options)


def expect(boxes, scores, counts, most=100, threshold=THRESHOLD):
    """Detectron2's, of the RoIs that there are."""
    return fast_rcnn_inference(
        [b[:n].flatten(1).clone() for b, n in zip(boxes, counts)],  # it clips them in place
        [s[:n].clone() for s, n in zip(scores, counts)],
        SIZES[: len(boxes)],
        threshold,
        0.5,
        most,
    )


def assert_same(found, expected, width):
    *found, counts = (x.cpu() for x in found)
    expected, rois = expected
    assert found[0].shape == (len(expected), width, 4)
    assert all(x.shape == (len(expected), width) for x in found[1:])
    assert counts.tolist() == [len(e) for e in expected]
    for boxes_i, scores_i, classes_i, rois_i, e, r in zip(*found, expected, rois, strict=True):
        n = len(e)
        assert_close(rois_i[:n], r, rtol=0, atol=0)
        assert_close(boxes_i[:n], e.pred_boxes.tensor, rtol=0, atol=0)
        assert_close(scores_i[:n], e.scores, rtol=0, atol=0)
        assert_close(classes_i[:n], e.pred_classes, rtol=0, atol=0)
        assert not boxes_i[n:].any()
        assert (scores_i[n:] == -torch.inf).all()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    ("counts", "most", "width", "found"),
    [
        ((60, 60), 100, 100, 40),  # as many as there may be are not reached
        ((60, 25), 20, 20, 20),  # they are
        ((60, 25), -1, 300, 40),
        ((0, 60), 100, 100, 0),
    ],
)
def test_they_are_detectron2s(images, counts, most, width, found):
    given = [x[:images] for x in boxes_and_scores(60)]
    expected = expect(*given, counts[:images], most)
    assert len(expected[0][0]) >= found
    assert_same(select(*given, counts[:images], most), expected, width)


def test_none_is_found_above_the_threshold():
    given = boxes_and_scores(10)
    assert_same(
        select(*given, (10, 10), threshold=1.0), expect(*given, (10, 10), threshold=1.0), 50
    )


def test_without_rois_there_is_room_for_nothing():
    found = select(*boxes_and_scores(0), (0, 0))
    assert [x.shape for x in found] == [(2, 0, 4), (2, 0), (2, 0), (2, 0), (2,)]
    assert found.counts.tolist() == [0, 0]


def test_rois_whose_numbers_are_none_are_dropped():
    boxes, scores = boxes_and_scores(30)
    boxes[0, 3, 1, 2] = torch.nan  # of one class, which drops the others too
    boxes[1, 4, 0, 0] = torch.inf
    scores[0, 5, CLASSES] = torch.nan
    scores[1, 6, 2] = torch.inf
    expected, rois = expect(boxes, scores, (30, 30))
    assert min(len(e) for e in expected) > 10
    left = [torch.tensor([i for i in range(30) if i not in gone]) for gone in ((3, 5), (4, 6))]
    rois = [left_i[r] for left_i, r in zip(left, rois)]  # Detectron2 counts those left
    assert_same(select(boxes, scores, (30, 30)), (expected, rois), 100)


def test_equal_scores_come_by_class_and_roi():
    apart = torch.arange(3.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    boxes = apart[None, :, None].expand(1, 3, 2, 4)
    scores = torch.tensor([0.4, 0.4, 0.2]).expand(1, 3, 3)
    found = select(boxes, scores, (3,), most=5)
    assert found.counts.tolist() == [5]
    assert found.classes.tolist() == [[0, 0, 0, 1, 1]]
    assert found.rois.tolist() == [[0, 1, 2, 0, 1]]
    assert_close(found.boxes[0], apart[[0, 1, 2, 0, 1]])


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits():
    given = boxes_and_scores(60)
    select(*given, (60, 25), device="cuda")
    boxes, scores = (x.cuda() for x in given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = select(boxes, scores, (60, 25), device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expect(*given, (60, 25)), 100)


@pytest.mark.parametrize("counts", [(30,), (30, 12), (0, 30), (0, 0)])
def test_a_predictor_finds_what_detectron2s_finds(counts):
    predictor = ClassSpecificOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=CLASSES,
        test_score_thresh=THRESHOLD,
        test_topk_per_image=20,
    )
    predictions = torch.randn(sum(counts), CLASSES + 1), torch.randn(sum(counts), 4 * CLASSES)
    proposals = []
    for size, count in zip(SIZES, counts):
        corner = torch.rand(count, 2) * 50
        boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 30], dim=1)
        proposals.append(Instances(size, proposal_boxes=Boxes(boxes)))
    found, rois = predictor.inference(predictions, proposals)
    expected, expected_rois = FastRCNNOutputLayers.inference(predictor, predictions, proposals)
    assert [len(e) > 0 for e in expected] == [count > 0 for count in counts]
    for f, e, r, expected_r in zip(found, expected, rois, expected_rois, strict=True):
        assert f.image_size == e.image_size
        assert_close(f.pred_boxes.tensor, e.pred_boxes.tensor)
        assert_close(f.scores, e.scores)
        assert torch.equal(f.pred_classes, e.pred_classes)
        assert torch.equal(r, expected_r)
