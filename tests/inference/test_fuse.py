import copy

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mamba_vision import UserError, model_zoo
from mamba_vision.inference import fuse

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"
EXACT = {"rtol": 0, "atol": 1e-10}
NORMS = (_BatchNorm, FrozenBatchNorm2d)


def _backbone(**options):
    config = model_zoo.get_config(NANO).model.backbone.bottom_up
    config.update(options)
    return instantiate(config)


def _randomize(module):
    """Give every batch norm and layer scale numbers of its own, and set eval mode."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter)
    for norm in module.modules():
        if isinstance(norm, NORMS):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def _fused(module):
    result = copy.deepcopy(module)
    fuse(result)
    return result


def _norms(module):
    return [m for m in module.modules() if isinstance(m, NORMS)]


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN", "FrozenBN"])
@pytest.mark.parametrize("layer_scale_conv", [None, 0.5])
def test_the_backbone_gives_the_same_features(norm, layer_scale_conv):
    model = _backbone(norm=norm, layer_scale_conv=layer_scale_conv).double()
    _randomize(model)
    fused = _fused(model)
    assert len(_norms(model)) == 2 + 2 * 2  # the stem's, and those of two blocks
    assert not _norms(fused)
    assert all(block.gamma is None for level in fused.levels[:2] for block in level.blocks)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features = model(x)
    for name, feature in fused(x).items():
        torch.testing.assert_close(feature, features[name], **EXACT)


def _detector():
    config = model_zoo.get_config(NANO).model
    config.pixel_mean, config.pixel_std = [128.0] * 3, [60.0] * 3
    config.backbone.bottom_up.layer_scale_conv = 0.5
    for predictor in config.roi_heads.box_predictors:
        predictor.test_score_thresh = 0.0
    return _randomize(instantiate(config))


@torch.no_grad()
def test_the_parts_of_the_detector_give_the_same_numbers():
    detector = _detector().double()
    fused = _fused(detector)
    assert len(_norms(detector)) == 2 + 2 * 2 + 3  # the backbone's, and one per box head
    assert not _norms(fused)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    maps, same_maps = detector.backbone(x), fused.backbone(x)
    for name, feature_map in maps.items():
        torch.testing.assert_close(same_maps[name], feature_map, **EXACT)
    pooled = torch.randn(5, 32, 7, 7, dtype=torch.float64)
    for before, after in zip(detector.roi_heads.box_head, fused.roi_heads.box_head):
        torch.testing.assert_close(after(pooled), before(pooled), **EXACT)


@torch.no_grad()
def test_the_detector_finds_the_same():
    detector = _detector()
    images = [{"image": torch.randint(0, 256, (3, 64, size))} for size in (64, 96)]
    for before, after in zip(detector(images), _fused(detector)(images)):
        before, after = before["instances"], after["instances"]
        assert len(before) > 0
        assert torch.equal(after.pred_classes, before.pred_classes)
        assert torch.equal(after.pred_masks, before.pred_masks)
        torch.testing.assert_close(after.scores, before.scores, rtol=0, atol=1e-5)
        boxes = before.pred_boxes.tensor
        torch.testing.assert_close(after.pred_boxes.tensor, boxes, rtol=0, atol=1e-2)


def test_nothing_else_changes():
    model = _randomize(_backbone())
    fused = _fused(model).state_dict()
    convs = ("conv_down.0.", "conv_down.3.", ".conv1.", ".conv2.")
    norms = ("conv_down.1.", "conv_down.4.", ".norm1.", ".norm2.")
    conv_stages = ("patch_embed.", "levels.0.", "levels.1.")
    for name, tensor in model.state_dict().items():
        if not name.startswith(conv_stages) or "downsample" in name:
            assert torch.equal(fused.pop(name), tensor), name
        else:
            assert any(part in name for part in convs + norms), name
    assert all(any(part in name for part in convs) for name in fused)


class _Between(nn.Module):
    """A batch norm that does not follow the conv that its container holds before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x).relu())


@pytest.mark.parametrize(
    ("module", "left"),
    [
        (Conv2d(3, 4, 3, bias=False, norm=nn.BatchNorm2d(4), activation=nn.ReLU()), 0),
        (Conv2d(3, 4, 3, norm=NaiveSyncBatchNorm(4), activation=torch.relu), 0),
        (Conv2d(3, 4, 3, norm=nn.GroupNorm(2, 4)), 0),
        (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4, affine=False)), 0),
        (nn.Sequential(Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 1),
        (nn.Sequential(Conv2d(3, 4, 3, activation=torch.relu), nn.BatchNorm2d(4)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1),
        (_Between(), 1),
    ],
)
def test_only_a_norm_right_after_a_conv_is_folded(module, left):
    module = module.double().eval()
    for norm in _norms(module):
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    fused = _fused(module)
    assert len(_norms(fused)) == left
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), module(x), **EXACT)


def test_a_module_in_training_mode_is_refused():
    model = _backbone().eval()
    model.levels[0].train()
    with pytest.raises(UserError, match=r"fuse's argument module, a MambaVision, .* eval\(\)"):
        fuse(model)
    assert len(_norms(model)) == 6
