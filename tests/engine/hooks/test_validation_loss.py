"""The loss of the test set: its value, and that computing it changes nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from PIL import Image

from mamba_vision.engine import load_config
from mamba_vision.engine.hooks import validation_loss
from mamba_vision.errors import UserError

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"


def random_states():
    numpy = np.random.get_state()  # noqa: NPY002 - the generator that Detectron2 draws from
    gpu = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist(), gpu


@pytest.fixture
def detector(toy):
    """The nano detector, for the pictures of the toy config."""
    config, pictures = load_config(NANO), load_config(toy)
    config.dataloader.train.dataset.names = pictures.dataloader.train.dataset.names
    config.dataloader.test.dataset.names = pictures.dataloader.test.dataset.names
    config.dataloader.test.num_workers = 0
    config.model.backbone.bottom_up.drop_path_rate = 0.5
    return config, instantiate(config.model).train()


def test_is_the_mean_over_the_images(toy):
    config = load_config(toy)
    model = instantiate(config.model)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    expected = []
    for k in range(3):
        pixels = np.asarray(Image.open(toy.parent / "test_images" / f"{k}.png"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        y = model.conv(image)
        mean, var = (x.view(1, -1, 1, 1) for x in (model.norm.running_mean, model.norm.running_var))
        y = ((y - mean) / (var + model.norm.eps).sqrt()).relu()
        expected.append((y.mean().item() - 1) ** 2)
    assert len({round(x, 5) for x in expected}) == 3
    losses = validation_loss(config, model)
    assert losses == pytest.approx(dict.fromkeys(("total_loss", "loss_toy"), np.mean(expected)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_nothing_changes(detector, device):
    config, model = detector
    model.to(device)
    model.backbone.bottom_up.levels[0].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    before = random_states()
    with EventStorage() as storage:
        validation_loss(config, model)
        assert not storage.histories()
    assert random_states() == before
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_equal_weights_have_equal_losses(detector):
    config, model = detector
    losses = validation_loss(config, model)
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
    assert validation_loss(config, model) == losses
    assert {f"loss_{part}_stage{k}" for part in ("cls", "box_reg", "mask") for k in range(3)} < set(
        losses
    )
    terms = [value for name, value in losses.items() if name != "total_loss"]
    assert losses["total_loss"] == pytest.approx(sum(terms))

    # Nothing is dropped, though half of the branches are in training.
    config.model.backbone.bottom_up.drop_path_rate = 0.0
    undropped = instantiate(config.model)
    undropped.load_state_dict(model.state_dict())
    assert validation_loss(config, undropped) == losses


def test_a_training_is_the_same_with_it(train, read, metrics):
    plain = train("train.eval_period=2")
    watched = train("train.eval_period=2", "train.val_loss=True", output=plain.parent / "watched")
    one, other = (read(folder / "model_final.pth") for folder in (plain, watched))
    torch.testing.assert_close(other["model"], one["model"], rtol=0, atol=0)
    logged = metrics(watched)
    assert [step for step in logged if "val/toy" in logged[step]] == [1, 3, 6]
    assert logged[1]["val/total_loss"] == logged[1]["val/toy"] > logged[6]["val/toy"]
    assert not any("val/total_loss" in values for values in metrics(plain).values())


def test_data_loaders_of_another_make_are_refused(toy):
    config = load_config(toy)
    del config.dataloader.train.mapper
    with pytest.raises(UserError, match=r"train\.val_loss needs .*dataloader\.train"):
        validation_loss(config, instantiate(config.model))
