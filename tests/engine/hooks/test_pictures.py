"""Pictures of predictions: which images, what is drawn, and where they go."""

import io

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mamba_vision.engine import draw_instances, load_config
from mamba_vision.engine.predictor import dataset_metadata


@pytest.fixture
def pictures():
    """From an output folder, the name to the pictures in TensorBoard's file, by step."""

    def read(folder):
        events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        return {
            name: {
                event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
                for event in events.Images(name)
            }
            for name in events.Tags()["images"]
        }

    return read


def test_the_same_images_are_drawn_at_every_evaluation(toy, train, pictures):
    drawn = pictures(train("train.eval_period=2", "train.draw_images=2"))
    assert set(drawn) == {"predictions/00_0", "predictions/01_1"}
    metadata = dataset_metadata(load_config(toy))
    for name, steps in drawn.items():
        assert set(steps) == {1, 3, 6}
        # What the toy always finds, drawn at 800 pixels.
        found = Instances((64, 64), scores=torch.tensor([0.75]), pred_classes=torch.tensor([1]))
        found.pred_boxes = Boxes(torch.tensor([[16.0, 16.0, 48.0, 48.0]]))
        found.pred_masks = torch.zeros(1, 64, 64, dtype=torch.bool)
        found.pred_masks[:, 16:48, 16:48] = True
        image = np.asarray(Image.open(toy.parent / "test_images" / f"{name[-1]}.png"))
        expected = draw_instances(image, found, metadata, scale=800 / 64)
        assert expected.shape == (800, 800, 3)
        for picture in steps.values():
            np.testing.assert_array_equal(picture, expected)


def test_no_more_than_there_are(train, pictures):
    out = train("train.max_iter=1", "train.draw_images=5")
    assert [name[-1] for name in pictures(out)] == ["0", "1", "2"]


def test_off_none_is_drawn(train, pictures):
    assert pictures(train("train.max_iter=1")) == {}
