"""Anchors, proposals and losses against Detectron2's own."""

import warnings

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform as _Box2BoxTransform
from detectron2.modeling.matcher import Matcher as _Matcher
from detectron2.modeling.proposal_generator import RPN as _RPN
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from mamba_vision import proposal_generator
from mamba_vision.box_regression import Box2BoxTransform
from mamba_vision.matcher import Matcher
from mamba_vision.proposal_generator import RPN, AnchorGenerator
from mamba_vision.scalars import flush_scalars

ANCHORS = {
    "sizes": [[16], [32], [64]],
    "aspect_ratios": [0.5, 1.0, 2.0],
    "strides": [4, 8, 16],
}
MATCHING = [0.3, 0.7], [0, -1, 1], True  # thresholds, labels, matches of low quality
SIZES = [(60, 96), (64, 80)]  # of the images: height, width


def _rpn(cls, generator=AnchorGenerator, **options):
    torch.manual_seed(1)
    transform = Box2BoxTransform if cls is RPN else _Box2BoxTransform
    parts = {
        "in_features": ["p2", "p3", "p4"],
        "head": StandardRPNHead(in_channels=8, num_anchors=3),
        "anchor_generator": generator(**ANCHORS),
        "anchor_matcher": (Matcher if cls is RPN else _Matcher)(*MATCHING),
        "box2box_transform": transform(weights=(1.0, 1.0, 1.0, 1.0)),
        "batch_size_per_image": 32,
        "positive_fraction": 0.5,
        "pre_nms_topk": (150, 100),
        "post_nms_topk": (60, 40),
        "anchor_boundary_thresh": 0.0,
        "smooth_l1_beta": 1 / 9,
    }
    return cls(**parts | options)


def _predictions(rpn, *, ties=False, dtype=torch.float32, device="cpu"):
    """Anchors, logits and deltas of two images of 64 x 96 pixels."""
    maps = [torch.zeros(2, 8, 64 // s, 96 // s, device=device) for s in ANCHORS["strides"]]
    anchors = rpn.to(device).anchor_generator(maps)
    logits = [torch.randn(2, len(a), device=device).to(dtype) for a in anchors]
    deltas = [torch.randn(2, len(a), 4, device=device).to(dtype) for a in anchors]
    if ties:
        logits = [(4 * x).round() / 4 for x in logits]
    return anchors, logits, deltas


def _assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for got, expected in zip(ours, theirs, strict=True):
        assert len(expected) > 0
        assert got.image_size == expected.image_size
        boxes = expected.proposal_boxes.tensor
        torch.testing.assert_close(got.proposal_boxes.tensor, boxes, **tolerance)
        assert torch.equal(got.objectness_logits, expected.objectness_logits)


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5])
def test_anchors_are_those_of_detectron2(offset):
    maps = [torch.zeros(1, 1, *size) for size in [(17, 3), (5, 8), (1, 1)]]
    ours = AnchorGenerator(**ANCHORS, offset=offset)(maps)
    theirs = DefaultAnchorGenerator(**ANCHORS, offset=offset)(maps)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.tensor, expected.tensor)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("min_box_size", [0.0, 12.0])
@pytest.mark.parametrize(
    ("top", "ties"),  # Among more than 1,000 boxes torchvision leaves the order of equals open.
    [(20, False), (20, True), (300, False), (300, True), (10_000, False)],
)
def test_proposals_are_those_of_detectron2(training, min_box_size, ties, top):
    options = {"min_box_size": min_box_size, "pre_nms_topk": (top, top // 2)}
    ours, theirs = (_rpn(cls, **options).train(training) for cls in (RPN, _RPN))
    predictions = _predictions(ours, ties=ties)
    _assert_same(
        ours.predict_proposals(*predictions, SIZES), theirs.predict_proposals(*predictions, SIZES)
    )


def test_proposals_do_not_depend_on_what_is_decoded():
    top, every = _rpn(RPN).train(), _rpn(RPN, decode_top=False).train()
    predictions = _predictions(top)
    _assert_same(
        top.predict_proposals(*predictions, SIZES), every.predict_proposals(*predictions, SIZES)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [1, 2])
def test_what_is_not_finite_is_dropped_as_by_detectron2(value, part):
    ours, theirs = _rpn(RPN).train(), _rpn(_RPN).eval()
    theirs.pre_nms_topk[False], theirs.post_nms_topk[False] = 150, 60
    predictions = _predictions(ours)
    predictions[part][0][:, ::3] = value
    _assert_same(
        ours.predict_proposals(*predictions, SIZES), theirs.predict_proposals(*predictions, SIZES)
    )


def test_an_image_may_bring_no_proposal():
    rpn = _rpn(RPN).eval()
    anchors, logits, deltas = _predictions(rpn)
    for image in rpn.predict_proposals(anchors, [x + torch.nan for x in logits], deltas, SIZES):
        assert image.proposal_boxes.tensor.shape == (0, 4)
        assert image.objectness_logits.shape == (0,)


@pytest.mark.parametrize(("positives", "negatives"), [(3, 40), (30, 40), (30, 10), (0, 5), (4, 0)])
def test_as_many_labels_are_sampled_as_by_detectron2(positives, negatives):
    label = torch.cat(
        [x.expand(n) for x, n in zip(torch.tensor([1, 0, -1]), (positives, negatives, 9))]
    )
    label = label.to(torch.int8)[torch.randperm(len(label))]
    ours, theirs = (
        _rpn(cls, batch_size_per_image=20)._subsample_labels(label.clone()) for cls in (RPN, _RPN)
    )
    assert ours.dtype == theirs.dtype
    for value in (1, 0):
        assert (ours == value).sum() == (theirs == value).sum()
        assert (label[ours == value] == value).all()


def test_every_label_is_as_likely_to_be_sampled_and_the_seed_decides():
    rpn = _rpn(RPN, batch_size_per_image=4)
    labels = torch.tensor(
        [
            [0, 1, 0, 1, 0, 1, 0, 0, 1, -1],  # 2 of 4 positives, 2 of 5 negatives
            [0, 0, 0, 0, -1, 0, 0, 1, 0, 0],  # the positive, 3 of 8 negatives
            [1, 0, 1, 1, 1, -1, 1, 1, 1, -1],  # 2 of 7 positives, the negative
        ]
    )
    expected = torch.tensor([[2 / 5, 2 / 4], [3 / 8, 1], [1, 2 / 7]], dtype=torch.float64)
    expected = expected.gather(1, labels.clamp(min=0)).where(labels >= 0, 0)

    def draws(labels, seed, count):
        torch.manual_seed(seed)
        return torch.stack([rpn._subsample_labels(labels.clone()) for _ in range(count)])

    # five standard deviations
    at_once = (draws(labels, 0, 4000) >= 0).double()
    torch.testing.assert_close(at_once.mean(dim=0), expected, rtol=0, atol=0.04)
    one = (draws(labels[0], 0, 4000) >= 0).double().mean(dim=0)
    torch.testing.assert_close(one, expected[0], rtol=0, atol=0.04)
    # What is drawn for one image tells nothing of another: how often two are drawn together.
    together = (at_once[:, 0, :, None] * at_once[:, 1, None, :]).mean(dim=0)
    torch.testing.assert_close(
        together, expected[0, :, None] * expected[1, None, :], rtol=0, atol=0.04
    )
    assert torch.equal(draws(labels, 1, 3), draws(labels, 1, 3))
    assert not torch.equal(draws(labels, 1, 20), draws(labels, 2, 20))


def _targets(*boxes):
    """Objects of two images."""
    targets = []
    for size, of_image in zip(SIZES, boxes):
        targets.append(Instances(size, gt_boxes=Boxes(torch.tensor(of_image).view(-1, 4))))
    return targets


def _crowd(count):
    corners = torch.rand(count, 2) * torch.tensor([80.0, 50.0])
    return torch.cat([corners, corners + 2 + 30 * torch.rand(count, 2)], dim=1).tolist()


FAR = [[500.0, 500.0, 510.0, 510.0]]  # meets no anchor, for which Detectron2 takes every one


@pytest.mark.parametrize("pairs", [0, 2**25])  # image by image; together
@pytest.mark.parametrize("boundary", [-1.0, 0.0, 12.5])
@pytest.mark.parametrize(
    "boxes",
    [
        (_crowd(2), _crowd(1)),
        (_crowd(5), []),
        ([], _crowd(1)),
        ([], []),
        (_crowd(60), _crowd(3)),
        (FAR, _crowd(4)),
        (_crowd(3) + FAR, []),
    ],
)
def test_anchors_are_labelled_as_by_detectron2(monkeypatch, boxes, boundary, pairs):
    monkeypatch.setattr(proposal_generator, "_PAIRS", pairs)
    options = {"batch_size_per_image": 10_000, "anchor_boundary_thresh": boundary}  # all of them
    ours, theirs = (_rpn(cls, **options).train() for cls in (RPN, _RPN))
    anchors, _, _ = _predictions(ours)
    got, expected = (r.label_and_sample_anchors(anchors, _targets(*boxes)) for r in (ours, theirs))
    for part, expected_part in zip(got, expected, strict=True):
        assert isinstance(part, list)
        for one, other in zip(part, expected_part, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_as_many_anchors_of_each_image_are_sampled_as_by_detectron2():
    ours, theirs = (_rpn(cls).train() for cls in (RPN, _RPN))
    anchors, _, _ = _predictions(ours)
    targets = _targets(_crowd(9), [])
    (got, _), (expected, _) = (r.label_and_sample_anchors(anchors, targets) for r in (ours, theirs))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.sort().values, other.sort().values)
    assert (got[0] == 1).any()


def test_another_matcher_is_left_to_detectron2():
    ours, theirs = (_rpn(c, anchor_matcher=_Matcher(*MATCHING)).train() for c in (RPN, _RPN))
    anchors, _, _ = _predictions(ours)
    targets = _targets(_crowd(9), [])
    (got, _), (expected, _) = (r.label_and_sample_anchors(anchors, targets) for r in (ours, theirs))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.sort().values, other.sort().values)


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
@pytest.mark.parametrize("total", [24, 10_000])  # fewer than there are; every anchor
@pytest.mark.parametrize(
    "boxes",
    [
        ([[8.0, 8.0, 40.0, 40.0], [30.0, 4.0, 70.0, 50.0]], [[0.0, 0.0, 79.0, 63.0]]),
        ([[8.0, 8.0, 40.0, 40.0]], []),
        ([], []),
    ],
)
def test_losses_and_gradients_are_those_of_detectron2(boxes, total, beta):
    options = {
        "batch_size_per_image": total,
        "smooth_l1_beta": beta,
        "loss_weight": {"loss_rpn_cls": 0.5, "loss_rpn_loc": 3.0},
    }
    ours, theirs = (_rpn(cls, **options).train() for cls in (RPN, _RPN))
    anchors, logits, deltas = _predictions(ours)
    labels, matched = ours.label_and_sample_anchors(anchors, _targets(*boxes))
    results = []
    for rpn in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in (*logits, *deltas)]
        with EventStorage() as storage:
            losses = rpn.losses(anchors, inputs[:3], labels, inputs[3:], matched)
            flush_scalars()
        assert list(losses) == ["loss_rpn_cls", "loss_rpn_loc"]
        gradients = torch.autograd.grad(sum(losses.values()), inputs)
        logged = [value for value, _ in storage.latest().values()]
        results.append([*losses.values(), *gradients, torch.tensor(logged)])
    assert results[1][0] > 0
    assert (results[1][1] > 0) == bool(boxes[0])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_deltas_count_where_there_is_an_object_alone():
    rpn = _rpn(RPN).train()
    anchors, logits, deltas = _predictions(rpn)
    targets = _targets([[8.0, 8.0, 40.0, 40.0]], [])
    labels, matched = rpn.label_and_sample_anchors(anchors, targets)
    positive = torch.stack(labels)[..., None].split([len(a) for a in anchors], dim=1)
    results = []
    for filler in (0.0, torch.nan):
        inputs = [x.where(p == 1, filler).requires_grad_() for x, p in zip(deltas, positive)]
        with EventStorage():
            loss = rpn.losses(anchors, logits, labels, inputs, matched)["loss_rpn_loc"]
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert results[0][0] > 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_other_losses_are_left_to_detectron2():
    ours, theirs = (_rpn(cls, box_reg_loss_type="giou").train() for cls in (RPN, _RPN))
    anchors, logits, deltas = _predictions(ours)
    labels, matched = ours.label_and_sample_anchors(anchors, _targets([[8.0, 8.0, 40.0, 40.0]], []))
    with EventStorage():
        got, expected = (r.losses(anchors, logits, labels, deltas, matched) for r in (ours, theirs))
    assert got == expected


@pytest.mark.cuda
def test_a_step_of_training_waits_for_the_gpu_once():
    """Only for the numbers of proposals."""
    rpn = _rpn(RPN).cuda().train()
    features = {
        f"p{2 + i}": torch.randn(2, 8, 64 // s, 96 // s, device="cuda")
        for i, s in enumerate(ANCHORS["strides"])
    }
    images = ImageList(torch.zeros(2, 3, 64, 96, device="cuda"), SIZES)
    targets = [x.to("cuda") for x in _targets([[8.0, 8.0, 40.0, 40.0]], [[0.0, 0.0, 79.0, 63.0]])]
    with EventStorage():
        rpn(images, features, targets)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                _, losses = rpn(images, features, targets)
                sum(losses.values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in waits if "synchroniz" in str(w.message)]
    assert len(waits) <= 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("top", [20, 150, 10_000])
def test_proposals_are_those_of_detectron2_on_a_gpu(dtype, top):
    ours, theirs = (_rpn(cls, pre_nms_topk=(top, top)).cuda().eval() for cls in (RPN, _RPN))
    predictions = _predictions(ours, ties=True, dtype=dtype, device="cuda")
    with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
        # Box2BoxTransform is TorchScript, which on a GPU may fuse, and round otherwise.
        _assert_same(
            ours.predict_proposals(*predictions, SIZES),
            theirs.predict_proposals(*predictions, SIZES),
            rtol=1e-5,
            atol=1e-4,
        )


@pytest.mark.cuda
def test_boxes_are_decoded_without_waiting_for_the_gpu():
    rpn = _rpn(RPN).eval()
    _predictions(rpn, device="cuda")
    maps = [torch.zeros(2, 8, 64 // s, 96 // s, device="cuda") for s in ANCHORS["strides"]]
    _, logits, deltas = _predictions(rpn, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        boxes, _, _ = rpn.top_boxes(rpn.anchor_generator(maps), logits, deltas)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert boxes.isfinite().all()
