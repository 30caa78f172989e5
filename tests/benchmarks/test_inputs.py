"""Random weights, images and targets."""

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from mamba_vision.benchmarks.inputs import add_targets, calibrate, draw_images, set_threshold
from mamba_vision.engine import load_config


def test_images_are_those_of_a_seed():
    first, second = draw_images(2, (64, 96))
    assert first["image"].shape == (3, 64, 96)
    assert first["image"].dtype == torch.uint8
    assert (first["height"], first["width"]) == (38, 58)
    assert not torch.equal(first["image"], second["image"])
    assert torch.equal(first["image"], draw_images(2, (64, 96))[0]["image"])


def test_targets_are_ellipses_within_the_image():
    images = draw_images(2, (96, 128))
    add_targets(images, 5, 3, masks=True)
    for sample in images:
        objects = sample["instances"]
        assert len(objects) == 5
        assert set(objects.gt_classes.tolist()) <= {0, 1, 2}
        x0, y0, x1, y1 = objects.gt_boxes.tensor.T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= 128).all()
        assert (y1 <= 96).all()
        for box, mask in zip(objects.gt_boxes.tensor, objects.gt_masks.tensor):
            rows, columns = mask.nonzero().T
            left, top, right, bottom = box.tolist()
            assert columns.min() + 1 > left
            assert columns.max() < right
            assert rows.min() + 1 > top
            assert rows.max() < bottom
            area = torch.pi / 4 * (right - left) * (bottom - top)
            assert mask.sum().item() == pytest.approx(area, rel=0.2, abs=8)


def test_without_masks():
    images = draw_images(1, (64, 64))
    add_targets(images, 2, 3, masks=False)
    assert not images[0]["instances"].has("gt_masks")


def test_norms_and_last_layers_are_calibrated():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.objectness_logits = nn.Conv2d(4, 2, 1)
            self.gamma = nn.Parameter(torch.full((4,), 1e-5))

        def forward(self, x):
            self.seen = self.conv(x)
            return self.objectness_logits(self.norm(self.seen))

    net = Net().eval()
    x = 5 + 3 * torch.randn(8, 3, 16, 16)
    calibrate(net, lambda: net(x))
    logits = net(x)
    assert logits.std(dim=(0, 2, 3)).mean().item() == pytest.approx(1, rel=0.5)
    assert logits.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    mean, variance = net.seen.mean(dim=(0, 2, 3)), net.seen.var(dim=(0, 2, 3))
    assert ((net.norm.running_mean - mean).abs() <= 0.2 * variance.sqrt()).all()
    assert (net.norm.running_var / variance).sub(1).abs().max() <= 0.3
    assert net.gamma.min() >= 0.5


def test_a_random_detector_finds_objects():
    config = load_config("cascade_mask_rcnn_mamba_vision_nano_shapes")
    model = instantiate(config.model).eval()
    images = draw_images(1, (64, 96))
    calibrate(model, lambda: model(images))
    threshold = set_threshold(model, lambda: model(images))
    with torch.no_grad():
        found = model(images)[0]["instances"]
    assert 0 < threshold < 1
    assert len(found) > 10
    assert found.scores.min() >= threshold
    assert "predict_probs" not in vars(model.roi_heads.box_predictor[-1])
