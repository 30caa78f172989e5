"""The predictor: what it feeds to the model, and what it makes of files and weights."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from mamba_vision.engine import Predictor, load_config
from mamba_vision.errors import UserError

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The nano config, with weights that find something in noise, and a picture of noise."""
    folder = tmp_path_factory.mktemp("nano")
    config = load_config(NANO)
    config.train.fuse_eval = False  # it rounds otherwise
    for predictor in config.model.roi_heads.box_predictors:
        predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    torch.save({"model": instantiate(config.model).state_dict()}, folder / "weights.pth")
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return config, folder / "weights.pth", folder / "noise.png", noise


def test_equals_the_model_on_the_rgb_pixels(nano):
    config, weights, path, noise = nano
    before = copy.deepcopy(config)
    found = Predictor(config, weights, device="cpu")(path)
    assert config == before

    model = instantiate(config.model).eval().to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    sample = {"image": torch.from_numpy(noise).permute(2, 0, 1), "height": 90, "width": 130}
    with torch.no_grad():
        expected = model([sample])[0]["instances"]
    assert len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    assert found.pred_masks.shape == (len(found), 90, 130)


def test_knows_the_classes(nano, toy):
    config, weights, *_ = nano
    assert "star" in Predictor(config, weights).metadata.thing_classes
    own = load_config(toy)  # whose classes are in its annotation file
    torch.save({"model": instantiate(own.model).state_dict()}, toy.parent / "toy.pth")
    assert Predictor(own, toy.parent / "toy.pth").metadata.thing_classes == ["circle", "square"]


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_refuses_what_is_no_image(nano, tmp_path, content):
    config, weights, good, _ = nano
    path = tmp_path / "bad.png"
    path.write_bytes(good.read_bytes()[:5000] if content is None else content)
    predictor = Predictor(config, weights)
    with pytest.raises(UserError, match=r"bad\.png"):
        predictor(path)


def test_refuses_a_device_that_is_not_there(nano):
    config, weights, *_ = nano
    for device in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=f"device {device} cannot be used on this machine"):
            Predictor(config, weights, device)
