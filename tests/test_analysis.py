"""Parameters and multiply-adds against counts worked out from the layers' sizes."""

from collections import Counter
from math import ceil

import pytest
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate

from mamba_vision import VARIANTS, model_zoo
from mamba_vision.analysis import analyze
from mamba_vision.errors import UserError

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"
COCO = "cascade_mask_rcnn_mamba_vision_{}_3x_coco"


def backbone_by_hand(dim, in_dim, depths, windows, height, width):
    """Layers, attention and scan of a backbone whose maps are ``windows`` (rows, columns) each."""
    pixels = height * width
    layers = 9 * 3 * in_dim * pixels // 4 + 9 * in_dim * dim * pixels // 16  # the stem's convs
    layers += 2 * in_dim * pixels // 4 + 2 * dim * pixels // 16  # its batch norms: 2 a number
    attention = scan = 0
    for i, depth in enumerate(depths):
        channels, tokens = dim * 2**i, pixels // (16 * 4**i)
        layers += 5 * channels * tokens  # the feature's LayerNorm: 5 a number
        if i < 3:
            layers += 9 * channels * 2 * channels * tokens // 4  # downsampling
        if i < 2:
            layers += 2 * depth * (9 * channels**2 + 2 * channels) * tokens
            continue
        rows, columns = windows[i - 2]
        count = ceil((height >> (2 + i)) / rows) * ceil((width >> (2 + i)) / columns)
        length = rows * columns
        tokens = count * length
        attending, mixing = depth // 2, depth - depth // 2
        half, rank, states = channels // 2, ceil(channels / 16), 8
        layers += depth * tokens * (8 * channels**2 + 2 * 5 * channels)  # MLPs and LayerNorms
        layers += attending * tokens * 4 * channels**2  # to q, k and v, and out
        layers += mixing * tokens * 2 * channels**2  # in and out
        attention += attending * count * 2 * length**2 * channels
        scan += mixing * tokens * 2 * half * 3  # the convolutions of both halves
        scan += mixing * tokens * half * (rank + 2 * states + rank)  # to dt, B, C; to delta
        scan += mixing * tokens * half * (4 * states + 2)
    return {"layers": layers, "attention": attention, "scan": scan}


def full_size(name, windows):
    variant = VARIANTS[name]
    sizes = (variant["dim"], variant["in_dim"], variant["depths"])
    return backbone_by_hand(*sizes, windows, 800, 1280)


@pytest.mark.parametrize(("name", "layers"), [("tiny", 206.8), ("small", 316.8), ("base", 672.9)])
def test_the_count_by_hand_is_the_reference_s(name, layers):
    by_hand = full_size(name, [(112, 112), (56, 56)])
    assert by_hand["layers"] / 1e9 == pytest.approx(layers, abs=0.05)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_backbone_counts_as_by_hand(name):
    model = model_zoo.get_config(COCO.format(name)).model
    model.backbone.bottom_up.update(window_size=(8, 8, 5, 3), window_padding="full")
    cost = analyze(model, (128, 192))["backbone"]
    variant = VARIANTS[name]
    sizes = (variant["dim"], variant["in_dim"], variant["depths"])
    by_hand = backbone_by_hand(*sizes, [(5, 5), (3, 3)], 128, 192)
    assert {kind: cost[kind] for kind in by_hand} == by_hand


@pytest.mark.slow
def test_backbone_at_full_size():
    cost = analyze(model_zoo.get_config(COCO.format("tiny")).model, rois=1, masks=1)["backbone"]
    by_hand = full_size("tiny", [(112, 112), (56, 56)])
    assert {kind: cost[kind] for kind in by_hand} == by_hand


def test_fit_windows_are_counted_as_they_are_cut():
    model = model_zoo.get_config(NANO).model
    model.backbone.bottom_up.update(window_size=(8, 8, 10, 5), window_padding="fit")
    cost = analyze(model, (192, 320))["backbone"]  # maps of 12 x 20 and 6 x 10
    by_hand = backbone_by_hand(16, 16, (1, 1, 2, 2), [(6, 10), (3, 5)], 192, 320)
    assert {kind: cost[kind] for kind in by_hand} == by_hand


def test_neck_and_heads_count_as_by_hand():
    model = model_zoo.get_config(NANO).model  # 32 channels in the neck, 48 in the heads
    costs = analyze(model, (64, 96), rois=7, masks=5)
    cells = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    lateral = sum(16 * 2**i * 32 * n for i, n in enumerate(cells))
    upsampled = 32 * sum(cells[:3])
    assert costs["FPN"] == Counter(
        parameters=(16 + 32 + 64 + 128) * 32 + 4 * (9 * 32 * 32 + 2 * 32),
        layers=lateral + upsampled + 9 * 32 * 32 * sum(cells),
    )
    anchors, rpn_cells = 3, sum(cells) + 1 * 2
    assert costs["RPN"] == Counter(
        parameters=9 * 32 * 32 + 32 + (32 + 1) * 5 * anchors,
        layers=(9 * 32 * 32 + 32 * 5 * anchors) * rpn_cells,
    )
    conv, fc, outputs = 9 * 32 * 48, 48 * 49 * 96, 96 * (7 + 4 * 6)
    assert costs["box heads"] == Counter(
        parameters=3 * (conv + 2 * 48 + fc + 96 + outputs + 7 + 4 * 6),
        layers=3 * 7 * ((conv + 2 * 48) * 49 + fc + outputs),
    )
    convs, deconv, logits = 9 * (32 + 48) * 48, 4 * 48 * 48, 48 * 6
    assert costs["mask heads"] == Counter(
        parameters=3 * (convs + 2 * 48 + deconv + 48 + logits + 6),
        layers=3 * 5 * (convs * 14**2 + deconv * 14**2 + logits * 28**2),
    )
    parameters = sum(p.numel() for p in instantiate(model).parameters())
    assert sum(cost["parameters"] for cost in costs.values()) == parameters


def test_a_detector_with_one_box_head_and_no_masks():
    model = detectron2_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    model.backbone.bottom_up = model_zoo.get_config(NANO).model.backbone.bottom_up
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(part)
    costs = analyze(model, (64, 64), rois=3)
    assert list(costs) == ["backbone", "FPN", "RPN", "box heads"]
    assert costs["box heads"]["layers"] == 3 * 1024 * (256 * 49 + 1024 + 81 + 4 * 80)


def test_the_config_is_left_alone():
    model = model_zoo.get_config(NANO).model
    before = str(model)
    analyze(model, (64, 64))
    assert str(model) == before


def test_another_backbone_is_refused():
    model = detectron2_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    with pytest.raises(UserError, match=r"model\.backbone\.bottom_up is not a MambaVision"):
        analyze(model)


def test_a_one_stage_detector_is_refused():
    model = detectron2_zoo.get_config("common/models/retinanet.py").model
    model.backbone.bottom_up = model_zoo.get_config(NANO).model.backbone.bottom_up
    with pytest.raises(UserError, match=r"model\.proposal_generator is missing"):
        analyze(model)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="100 x 128 pixels, not multiples of 32"):
        analyze(model_zoo.get_config(NANO).model, (100, 128))
