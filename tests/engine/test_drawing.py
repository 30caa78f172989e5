"""Pictures of detections, by their pixels and their labels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from mamba_vision.engine import draw_instances

COLORS = [[200, 40, 0], [0, 80, 160]]


def found(classes, masks=True):
    instances = Instances((100, 160))
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 20, 60, 80], [90, 30, 140, 70]]))
    instances.scores = torch.tensor([0.874, 0.5])
    instances.pred_classes = torch.tensor(classes)
    if masks:
        instances.pred_masks = torch.zeros(2, 100, 160, dtype=torch.bool)
        instances.pred_masks[0, 20:80, 20:60] = True
        instances.pred_masks[1, 30:70, 90:140] = True
    return instances


def metadata(**values):
    return SimpleNamespace(get=values.get, **values)


@pytest.fixture
def texts(monkeypatch):
    """The texts that are drawn; they themselves are left out."""
    drawn = []
    monkeypatch.setattr(Visualizer, "draw_text", lambda self, text, *a, **k: drawn.append(text))
    return drawn


def test_masks_are_half_their_classes_colour(texts):
    image = np.full((100, 160, 3), 100, np.uint8)
    picture = draw_instances(image, found([1, 0]), metadata(thing_colors=COLORS))
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert np.abs(picture[50, 40].astype(int) - [50, 90, 130]).max() <= 2
    assert np.abs(picture[50, 115].astype(int) - [150, 70, 50]).max() <= 2
    assert (picture[90:, :] == 100).all()
    assert (image == 100).all()


def test_holes_stay_open_and_small_objects_lie_on_top(texts):
    image = np.full((100, 160, 3), 100, np.uint8)
    instances = found([0, 1])
    instances.pred_masks[0, 40:60, 30:50] = False
    instances.pred_boxes.tensor[1] = torch.tensor([22, 22, 58, 36])
    instances.pred_masks[1] = False
    instances.pred_masks[1, 22:36, 22:58] = True
    picture = draw_instances(image, instances, metadata(thing_colors=COLORS))
    assert (picture[50, 40] == 100).all()
    assert np.abs(picture[70, 40].astype(int) - [150, 70, 50]).max() <= 2
    assert np.abs(picture[29, 40].astype(int) - [75, 75, 105]).max() <= 2


def test_scale(texts):
    image = np.full((100, 160, 3), 100, np.uint8)
    picture = draw_instances(image, found([1, 0]), metadata(thing_colors=COLORS), scale=2)
    assert picture.shape == (200, 320, 3)
    assert np.abs(picture[100, 80].astype(int) - [50, 90, 130]).max() <= 2


def test_labels_are_names_and_scores(texts):
    image = np.zeros((100, 160, 3), np.uint8)
    draw_instances(image, found([1, 0]), metadata(thing_classes=["cat", "dog"]))
    assert sorted(texts) == ["cat 50%", "dog 87%"]


def test_unnamed_classes_go_by_number_and_have_colours_too(texts):
    image = np.zeros((100, 160, 3), np.uint8)
    picture = draw_instances(image, found([0, 999]), metadata(thing_classes=["cat"]))
    assert sorted(texts) == ["999 50%", "cat 87%"]
    assert picture[50, 115].any()


def test_without_masks_the_boxes_are_drawn(texts):
    image = np.full((100, 160, 3), 100, np.uint8)
    picture = draw_instances(image, found([1, 0], masks=False), metadata(thing_colors=COLORS))
    assert (picture[50, 40] == 100).all()
    assert (picture[50, 18:23] != 100).any()


def test_nothing_found_leaves_the_image(texts):
    image = np.random.default_rng(0).integers(0, 256, (100, 160, 3), dtype=np.uint8)
    assert (draw_instances(image, found([1, 0])[[]], metadata()) == image).all()
