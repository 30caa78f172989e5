import pytest
import torch
from detectron2.config import instantiate

from mamba_vision import model_zoo
from mamba_vision.errors import UserError

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"


def test_names_are_the_leaf_configs():
    detector = "cascade_mask_rcnn_mamba_vision_{}"
    sizes = ("tiny_3x_coco", "small_3x_coco", "base_3x_coco", "nano_shapes")
    assert {detector.format(size) for size in sizes} <= set(model_zoo.names())
    assert not any(name.startswith("common") for name in model_zoo.names())


def test_get_config_gives_a_fresh_config():
    changed = model_zoo.get_config(NANO)
    changed.train.max_iter = -1
    assert model_zoo.get_config(f"{NANO}.py").train.max_iter > 0


def test_get_builds_the_model_of_the_config():
    model = model_zoo.get(NANO, device="cpu")
    expected = instantiate(model_zoo.get_config(NANO).model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}


@pytest.mark.cuda
def test_get_prefers_the_gpu():
    assert {p.device.type for p in model_zoo.get(NANO).parameters()} == {"cuda"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cascade_mask_rcnn_mamba_vision_nano_shape", f"did you mean {NANO!r}"),
        ("retinanet", "choose from"),
        ("common/train", "choose from"),
        ("../configs/cascade_mask_rcnn_mamba_vision_nano_shapes", "did you mean"),
    ],
)
def test_unknown_name(name, hint):
    with pytest.raises(UserError, match=hint):
        model_zoo.get_config(name)


def test_no_released_weights():
    with pytest.raises(UserError, match="has no released weights"):
        model_zoo.get(NANO, trained=True)


def test_released_weights_are_loaded(monkeypatch, tmp_path):
    trained = model_zoo.get(NANO, device="cpu")
    torch.save({"model": trained.state_dict()}, tmp_path / "weights.pth")
    monkeypatch.setitem(model_zoo.RELEASED, NANO, str(tmp_path / "weights.pth"))
    loaded = model_zoo.get(NANO, trained=True, device="cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())
