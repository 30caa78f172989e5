"""Reading and resizing as mmdetection does, against OpenCV, Pillow, PyTorch and plain numbers."""

import cv2
import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetMapper, detection_utils
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch.nn import functional as F

from mamba_vision.data.mappers import (
    OpenCVDatasetMapper,
    OpenCVResize,
    OpenCVResizeTransform,
    read_image,
)
from mamba_vision.errors import UserError


@pytest.fixture
def pixels():
    """A 60 x 80 RGB image: a smooth picture with some noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (80, 60), interpolation=cv2.INTER_CUBIC).astype(int)
    return (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


# Sizes.


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 427, (1199, 800)),  # 800 / 427 = 1.87354; 640 of it are 1199.06
        (640, 480, (1067, 800)),  # 1066.67
        (427, 640, (800, 1199)),
        (640, 360, (1333, 750)),  # 1333 / 640 = 2.08281 < 800 / 360; 360 of it are 749.81
        (500, 100, (1333, 267)),  # 266.6
        (1333, 800, (1333, 800)),
        (2000, 1500, (1067, 800)),
        (86, 33, (1333, 512)),  # 33 * 1333 / 86 = 511.5 exactly: a half goes up
        (100, 100, (800, 800)),
    ],
)
def test_sizes_by_hand(width, height, expected):
    resize = OpenCVResize(800, 1333)
    transform = resize.get_transform(np.zeros((height, width, 3), np.uint8))
    assert (transform.new_w, transform.new_h) == expected


def test_sizes_are_detectron2s_but_for_halves():
    differing = {}
    for height in range(32, 700):
        for width in range(height, 700, 7):
            ours = OpenCVResize(800, 1333).output_size(height, width, 800)
            theirs = T.ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
            if ours != theirs:
                differing[height, width] = ours, theirs
    assert differing  # there is a difference
    assert len(differing) < 20
    for (height, width), (ours, theirs) in differing.items():
        # The exact value is k + 1/2, in whole numbers; each side took one of its neighbours.
        assert 2 * height * 1333 % (2 * width) == width
        k = height * 1333 // width
        assert {ours, theirs} == {(k, 1333), (k + 1, 1333)}


def test_lengths_are_drawn_evenly():
    np.random.seed(0)  # noqa: NPY002  Detectron2's augmentations draw from it
    resize = OpenCVResize((480, 512, 800), 1333)
    image = np.zeros((50, 60, 3), np.uint8)
    drawn = [resize.get_transform(image).new_h for _ in range(600)]
    assert set(drawn) == {480, 512, 800}
    assert min(drawn.count(length) for length in (480, 512, 800)) > 150


@pytest.mark.parametrize(("lengths", "max_size"), [((), 10), (0, 10), (11, 10), ((5, 11), 10)])
def test_lengths_that_cannot_be(lengths, max_size):
    with pytest.raises(UserError, match=f"max_size {max_size}"):
        OpenCVResize(lengths, max_size)


# Pixels.


@pytest.mark.parametrize("size", [(120, 160), (30, 40), (97, 131), (60, 80), (45, 90)])
def test_image_is_opencvs_and_pytorchs(pixels, size):
    resized = OpenCVResizeTransform(60, 80, *size).apply_image(pixels)
    direct = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resized, direct)
    # Plain bilinear interpolation without averaging, in floating point.
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    exact = F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0]
    assert np.abs(resized - exact.permute(1, 2, 0).numpy()).max() < 1


def test_pillow_differs_where_an_image_shrinks_only(pixels):
    def difference(*size):
        pillow = T.ResizeTransform(60, 80, *size).apply_image(pixels).astype(int)
        return np.abs(pillow - OpenCVResizeTransform(60, 80, *size).apply_image(pixels)).max()

    assert difference(100, 133) <= 1
    assert difference(24, 32) > 5


@pytest.mark.parametrize("shape", [(60, 80), (60, 80, 1), (60, 80, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_shapes_and_types(shape, dtype):
    image = np.ones(shape, dtype)
    resized = OpenCVResizeTransform(60, 80, 90, 100).apply_image(image)
    assert resized.shape == (90, 100, *shape[2:])
    assert resized.dtype == dtype
    assert (resized == 1).all()


def test_flipped_view(pixels):
    """A flip makes a view of negative stride."""
    flip, resize = T.HFlipTransform(80), OpenCVResizeTransform(60, 80, 100, 133)
    flipped = T.TransformList([flip, resize]).apply_image(pixels)
    np.testing.assert_array_equal(flipped, resize.apply_image(pixels[:, ::-1].copy()))


def test_segmentation_takes_the_nearest():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    doubled = OpenCVResizeTransform(3, 4, 6, 8).apply_segmentation(labels)
    np.testing.assert_array_equal(doubled, labels.repeat(2, axis=0).repeat(2, axis=1))


# Coordinates.


def test_coordinates_follow_each_axis():
    resize = OpenCVResizeTransform(427, 640, 800, 1199)
    corner = resize.apply_coords(np.array([[640.0, 427.0], [64, 42.7]]))
    np.testing.assert_allclose(corner, [[1199, 800], [119.9, 80]])
    np.testing.assert_allclose(
        resize.apply_box(np.array([[64, 42.7, 640, 427]]))[0][:2], [119.9, 80]
    )
    polygon = np.array([[0, 0], [640, 0], [64, 42.7]])
    np.testing.assert_allclose(
        resize.apply_polygons([polygon])[0], [[0, 0], [1199, 0], [119.9, 80]]
    )
    np.testing.assert_allclose(resize.inverse().apply_coords(corner), [[640, 427], [64, 42.7]])


def test_flip_and_resize_change_places():
    boxes = np.array([[3.0, 5, 20, 41], [0, 0, 80, 60]])
    resize = OpenCVResizeTransform(60, 80, 101, 133)
    one = T.TransformList([T.HFlipTransform(80), resize]).apply_box(boxes)
    other = T.TransformList([resize, T.HFlipTransform(133)]).apply_box(boxes)
    np.testing.assert_allclose(one, other)


def test_postprocessing_brings_boxes_back():
    boxes = np.array([[3.0, 5, 20, 41], [0, 0, 640, 427]])
    transform = OpenCVResize(800, 1333).get_transform(np.zeros((427, 640, 3), np.uint8))
    found = Instances((transform.new_h, transform.new_w))
    found.pred_boxes = Boxes(torch.from_numpy(transform.apply_box(boxes)))
    back = detector_postprocess(found, 427, 640).pred_boxes.tensor
    np.testing.assert_allclose(back, boxes, rtol=1e-6)


# Reading.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reads_upright(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "photo.jpg")
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    image = read_image(path)
    assert image.shape == ((60, 80, 3) if orientation <= 4 else (80, 60, 3))
    # Decoders may differ by a little; a wrong turn or exchanged channels differ by far more.
    assert np.abs(image.astype(int) - detection_utils.read_image(path, "RGB")).max() <= 8
    np.testing.assert_array_equal(read_image(path, "BGR"), image[..., ::-1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_three_channels_of_any_image(tmp_path, pixels, mode):
    path = str(tmp_path / "image.png")
    if mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (60, 80, 3)
    assert image.dtype == np.uint8
    if mode in ("L", "I;16"):
        assert (image == image[..., :1]).all()
    if mode == "I;16":
        assert np.abs(image[..., 0].astype(int) - pixels[..., 0]).max() <= 1


@pytest.mark.parametrize("content", [None, b"", b"<html>", "cut", "folder"])
def test_unreadable_image_is_named(tmp_path, pixels, content):
    path = tmp_path / "photo.png"
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:20])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*photo\.png") as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_format():
    with pytest.raises(UserError, match="'L'"):
        read_image("any.png", "L")


# The mapper.


@pytest.fixture
def record(tmp_path, pixels):
    path = str(tmp_path / "image.png")
    Image.fromarray(pixels).save(path)
    box = {"bbox": [8.0, 6, 20, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2}
    polygons = [[8.0, 6, 28, 6, 28, 36, 8, 36], [10.0, 10, 20, 10, 15, 20]]
    crowd = box | {"iscrowd": 1, "segmentation": {"size": [60, 80], "counts": [0, 4800]}}
    return {
        "file_name": path,
        "height": 60,
        "width": 80,
        "image_id": 7,
        "annotations": [box | {"segmentation": polygons}, crowd],
    }


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_training_sample_is_detectron2s_but_for_the_pixels(record, mask_format):
    def sample(mapper, resize):
        lazy = LazyCall(mapper)(
            is_train=True,
            augmentations=[
                LazyCall(T.RandomFlip)(prob=1.0),
                LazyCall(resize)(short_edge_length=[90], max_size=200),
            ],
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format=mask_format,
        )
        if resize is T.ResizeShortestEdge:
            lazy.augmentations[1].sample_style = "choice"
        return instantiate(lazy)(record)

    before = repr(record)
    ours, theirs = (
        sample(OpenCVDatasetMapper, OpenCVResize),
        sample(DatasetMapper, T.ResizeShortestEdge),
    )
    assert repr(record) == before
    assert ours.keys() == theirs.keys()
    assert ours["image"].shape == (3, 90, 120)
    assert ours["image"].dtype == torch.uint8
    assert (ours["image"].int() - theirs["image"].int()).abs().max() <= 1
    a, b = ours["instances"], theirs["instances"]
    assert len(a) == len(b) == 1
    torch.testing.assert_close(a.gt_boxes.tensor, b.gt_boxes.tensor)
    assert a.gt_boxes.tensor[0].tolist() == [78, 9, 108, 54]  # 80 - 28, 6, 80 - 8, 36; times 1.5
    assert a.gt_classes.tolist() == [2]
    if mask_format == "polygon":
        for one, other in zip(a.gt_masks.polygons[0], b.gt_masks.polygons[0], strict=True):
            np.testing.assert_allclose(one, other)
    else:
        torch.testing.assert_close(a.gt_masks.tensor, b.gt_masks.tensor)


def test_inference_sample(record, pixels):
    mapper = OpenCVDatasetMapper(
        is_train=False, augmentations=[OpenCVResize(120, 200)], image_format="RGB"
    )
    sample = mapper(record)
    assert "annotations" not in sample
    assert "instances" not in sample
    assert (sample["height"], sample["width"], sample["image_id"]) == (60, 80, 7)
    expected = cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)
    bare = mapper({"file_name": record["file_name"]})
    assert (bare["height"], bare["width"]) == (60, 80)


def test_wrong_size_in_the_record(record):
    mapper = OpenCVDatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    with pytest.raises(UserError, match=r"image\.png"):
        mapper(record | {"width": 81})
