"""The predictor's and the mask head's losses, gradients and statistics, against Detectron2's."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss as fvcore_giou_loss
from torch.testing import assert_close

from mamba_vision.errors import UserError
from mamba_vision.roi_heads import ClassSpecificOutputLayers, MaskHead
from mamba_vision.roi_heads.mask_head import SharedMasks, recorded_rows
from mamba_vision.roi_heads.predictor import giou_loss
from mamba_vision.scalars import flush_scalars

CLASSES = 4
SIZE = (48, 64)


def boxes(count):
    corners = torch.rand(count, 2) * 30
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 20], dim=1)


def samples(foreground, background, objects=3):
    """An image's samples, with objects that their boxes meet or not."""
    count = foreground + background
    sample = Instances(SIZE, proposal_boxes=Boxes(boxes(count)))
    sample.gt_classes = torch.full((count,), CLASSES)
    sample.gt_classes[:foreground] = torch.randint(CLASSES, (foreground,))
    if objects:
        sample.gt_boxes = Boxes(boxes(objects)[torch.randint(objects, (count,))])
    return sample


def predictor(kind, dtype=torch.float32):
    layers = kind(
        ShapeSpec(channels=6),
        box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        num_classes=CLASSES,
        box_reg_loss_type="giou",
        loss_weight={"loss_cls": 0.5, "loss_box_reg": 5.0},
    )
    return layers.to(dtype)


def run(call, leaves):
    """The losses, their gradients and what is logged."""
    with EventStorage() as storage:
        losses = call()
        flush_scalars()
    gradients = [
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    # zeros where nothing comes back
    gradients = [
        [torch.zeros_like(x) if g is None else g for g, x in zip(of_loss, leaves)]
        for of_loss in gradients
    ]
    return losses, gradients, {name: value for name, (value, _) in storage.latest().items()}


PROPOSALS = {
    "two images": [(5, 20, 3), (2, 9, 1)],
    "one image without objects": [(5, 20, 3), (0, 9, 0)],
    "no foreground": [(0, 9, 2), (0, 3, 0)],
    "only foreground": [(5, 0, 3)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", PROPOSALS)
def test_box_losses_are_detectron2s(case, dtype):
    proposals = [samples(*counts) for counts in PROPOSALS[case]]
    ours, theirs = predictor(ClassSpecificOutputLayers), predictor(FastRCNNOutputLayers)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    count = sum(len(p) for p in proposals)
    logits = torch.randn(count, CLASSES + 1, dtype=dtype, requires_grad=True)
    deltas = torch.randn(count, CLASSES * 4, dtype=dtype, requires_grad=True)
    results = [
        run(lambda x=x: x.losses((logits, deltas), proposals), [logits, deltas])
        for x in (ours, theirs)
    ]
    (losses, gradients, statistics), (expected, their_gradients, their_statistics) = results
    assert_close(losses, expected, check_dtype=False)
    assert_close(gradients, their_gradients)
    assert statistics == pytest.approx(their_statistics)
    assert losses["loss_box_reg"] > 0 or "no foreground" in case


def test_a_box_without_area_spoils_nothing():
    """Neither of background nor of foreground."""
    sample = samples(4, 4)
    for k in (0, 5):
        sample.proposal_boxes.tensor[k, 2:] = sample.proposal_boxes.tensor[k, :2]
        sample.gt_boxes.tensor[k] = sample.proposal_boxes.tensor[k]
    deltas = torch.randn(8, CLASSES * 4, requires_grad=True)
    deltas.data[5:] = 1e30  # overflows, if it is computed
    logits = torch.zeros(8, CLASSES + 1)
    with EventStorage():
        losses = predictor(ClassSpecificOutputLayers).losses((logits, deltas), [sample])
    (gradient,) = torch.autograd.grad(losses["loss_box_reg"], deltas)
    assert gradient.isfinite().all()
    assert gradient[:4].any()
    assert not gradient[4:].any()


def test_giou_is_fvcores_with_its_gradient():
    a, b = boxes(200).double().requires_grad_(), boxes(200).double().requires_grad_()
    ours, theirs = giou_loss(a, b), fvcore_giou_loss(a, b)
    assert theirs.max() > 1 > theirs.min()  # apart, and not
    assert_close(ours, theirs)
    weights = torch.rand(200, dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weights).sum(), [a, b])
    assert_close(torch.autograd.grad((ours * weights).sum(), [a, b]), expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"box_reg_loss_type": "smooth_l1"}, "box_reg_loss_type=smooth_l1"),
        ({"cls_agnostic_bbox_reg": True}, "cls_agnostic_bbox_reg"),
        ({"use_sigmoid_ce": True}, "use_sigmoid_ce"),
    ],
)
def test_another_loss_is_one_clear_error(changes, named):
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    with pytest.raises(UserError, match=named) as caught:
        ClassSpecificOutputLayers(
            ShapeSpec(channels=6), box2box_transform=transform, num_classes=4, **changes
        )
    assert "\n" not in str(caught.value)


def masks(count, kind):
    if kind is BitMasks:
        return BitMasks(torch.rand(count, *SIZE) > 0.4)
    corners = [
        [np.array([2.0, 3 + k, 40, 6, 30 - k, 44]), np.array([0.0, 0, 9, 0, 9, 9 + k])]
        for k in range(count)
    ]
    return PolygonMasks(corners)


def foreground(counts, kind=BitMasks, objects=3):
    """Images' foreground with shared masks, and the same with a mask for each RoI."""
    shared, whole = [], []
    for count in counts:
        sample = samples(count, 0, objects)
        index = torch.randint(objects, (count,))
        of_image = masks(objects, kind)
        shared.append(Instances(SIZE, **sample.get_fields()))
        whole.append(Instances(SIZE, **sample.get_fields()))
        shared[-1].gt_masks, whole[-1].gt_masks = SharedMasks(of_image, index), of_image[index]
    return shared, whole


@pytest.mark.parametrize("objects", [2, 9])  # fewer than RoIs, and more
@pytest.mark.parametrize("kind", [BitMasks, PolygonMasks])
def test_shared_masks_are_cropped_as_detectron2_does(kind, objects):
    ours, theirs = (x[0] for x in foreground([6], kind, objects))
    rois = ours.proposal_boxes.tensor
    cropped = ours.gt_masks.crop_and_resize(rois, 14)
    assert cropped.dtype == torch.bool
    assert 0 < cropped.float().mean() < 1
    assert torch.equal(cropped, theirs.gt_masks.crop_and_resize(rois, 14))
    part = ours[2:4]
    assert len(part.gt_masks) == 2
    assert torch.equal(part.gt_masks.crop_and_resize(rois[2:4], 14), cropped[2:4])


@pytest.mark.parametrize("classes", [CLASSES, 1])  # 1: a mask for any class
@pytest.mark.parametrize("counts", [[5, 3], [0, 4], [0, 0]])
@pytest.mark.parametrize("kind", [BitMasks, PolygonMasks])
def test_mask_losses_are_detectron2s(counts, kind, classes):
    options = {"num_classes": classes, "conv_dims": [6, 6], "loss_weight": 0.5}
    ours = MaskHead(ShapeSpec(channels=6, height=14, width=14), **options)
    theirs = MaskRCNNConvUpsampleHead(ShapeSpec(channels=6, height=14, width=14), **options)
    with torch.no_grad():
        ours.predictor.weight.normal_()
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(sum(counts), 6, 14, 14, requires_grad=True)
    results = [
        run(lambda h=h, i=i: h(features, i), [features, *h.parameters()])
        for h, i in zip((ours, theirs), foreground(counts, kind))
    ]
    (losses, gradients, statistics), (expected, their_gradients, their_statistics) = results
    assert_close(losses, expected)
    assert_close(gradients, their_gradients)
    assert statistics == pytest.approx(their_statistics)
    assert (losses["loss_mask"] > 0) == (sum(counts) > 0)


def test_masks_without_inside_or_outside_have_no_false_pixels():
    head = MaskHead(ShapeSpec(channels=6, height=14, width=14), num_classes=1, conv_dims=[6])
    sample = samples(2, 0)
    for value, wrong in ((True, "false_negative"), (False, "false_positive")):
        whole = BitMasks(torch.full((1, *SIZE), value))
        sample.gt_masks = SharedMasks(whole, torch.tensor([0, 0]))
        with torch.no_grad():
            head.predictor.bias.fill_(-100 if value else 100)
        _, _, statistics = run(
            lambda: head(torch.zeros(2, 6, 14, 14), [sample]), [head.predictor.bias]
        )
        expected = {"accuracy": 0.0, "false_negative": 0.0, "false_positive": 0.0, wrong: 1.0}
        assert statistics == {f"mask_rcnn/{name}": value for name, value in expected.items()}


def test_masks_are_drawn_as_often_as_asked_for():
    head = MaskHead(
        ShapeSpec(channels=6, height=14, width=14), num_classes=1, conv_dims=[6], vis_period=2
    )
    (sample,), _ = foreground([2])
    with EventStorage() as storage:
        for drawn in (2, 2, 4):
            head(torch.zeros(2, 6, 14, 14), [sample])
            assert len(storage._vis_data) == drawn
            storage.step()


def test_few_numbers_of_rois_are_recorded():
    rows = [recorded_rows(count) for count in range(1, 1025)]
    assert sorted(set(rows)) == [64, 128, 192, 256, 384, 512, 768, 1024]
    assert all(count <= row < max(64 + count, 1.5 * count) for count, row in enumerate(rows, 1))
