"""The mapper that fills polygons before the augmentations."""

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
from detectron2.structures import BoxMode

from mamba_vision.data.bitmasks import BitmaskMapper


@pytest.fixture
def picture(tmp_path):
    """A 40 x 60 picture with a rectangle, a crowd, and a thing in two parts."""
    cv2.imwrite(str(tmp_path / "picture.png"), np.zeros((40, 60, 3), np.uint8))
    return {
        "file_name": str(tmp_path / "picture.png"),
        "annotations": [
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": category,
                "iscrowd": crowd,
                "segmentation": polygons,
            }
            for box, category, crowd, polygons in (
                ([10, 4, 30, 24], 0, 0, [[10, 4, 30, 4, 30, 24, 10, 24]]),
                ([0, 0, 60, 40], 1, 1, {"size": [40, 60], "counts": [0, 2400]}),
                (
                    [40, 10, 58, 30],
                    2,
                    0,
                    [[40, 10, 44, 10, 44, 30, 40, 30], [54, 10, 58, 10, 58, 30, 54, 30]],
                ),
            )
        ],
    }


def test_masks_follow_a_resize_and_a_crop(picture):
    augmentations = [
        T.FixedSizeCrop((40, 60), pad=False),
        T.ResizeTransform(40, 60, 80, 120),
        T.CropTransform(30, 20, 80, 50),
    ]
    mapped = BitmaskMapper(
        is_train=True, augmentations=augmentations, image_format="RGB", use_instance_mask=True
    )(picture)
    instances = mapped["instances"]
    assert mapped["image"].shape == (3, 50, 80)
    assert instances.gt_classes.tolist() == [0, 2]  # the crowd is left out
    # twice as large, then 30 to the left and 20 up
    expected = np.zeros((2, 50, 80), bool)
    expected[0, 0:28, 0:30] = True
    expected[1, 0:40, 50:58] = expected[1, 0:40, 78:80] = True
    assert np.array_equal(instances.gt_masks.tensor.numpy(), expected)
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 30, 28], [50, 0, 80, 40]]


def test_without_masks_none_are_made(picture):
    mapper = BitmaskMapper(is_train=True, augmentations=[], image_format="RGB")
    assert not mapper(picture)["instances"].has("gt_masks")
