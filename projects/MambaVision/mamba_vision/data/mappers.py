"""The pixel path of mmdetection: images read and resized by OpenCV.

Detectron2 reads and resizes with Pillow, which differs in:

- The filter. Where an image shrinks, Pillow's bilinear filter averages all pixels that merge into
  one, while OpenCV's ``INTER_LINEAR`` mixes four neighbours at any scale. Where an image grows, as
  most of COCO's do on their way to 800 x 1333, both agree to one step of 255.
- The size. mmdetection multiplies both sides by min(max_size / long, short_edge_length / short) and
  rounds halves up. Detectron2's ``ResizeShortestEdge`` scales by the short side first and again if
  the long one is too long: the same in exact arithmetic, but a rounded half may fall the other way.
  At 800 and 1333 that makes one pixel of difference for one in five thousand sizes.
- The decoder. The wheels of both bring libjpeg-turbo and give the same pixels; builds upon other
  libraries need not.

Boxes are brought back to the size of the file by Detectron2's ``detector_postprocess``, by the
ratio of the two sizes per axis, as in mmdetection.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import Transform
from numpy.typing import NDArray

from ..errors import UserError

__all__ = ["OpenCVDatasetMapper", "OpenCVResize", "OpenCVResizeTransform", "read_image"]


def read_image(file_name: str, image_format: str = "RGB") -> NDArray[np.uint8]:
    """Read an image with OpenCV, turned as its EXIF orientation says.

    Args:
        file_name: a path or a URL that Detectron2's ``PathManager`` knows.
        image_format: ``"RGB"`` or ``"BGR"``.

    Returns:
        (H, W, 3) uint8; grey images have three equal channels, transparency is dropped.

    Raises:
        UserError: there is no such file, it is not an image, or the format is another one.
    """
    if image_format not in ("RGB", "BGR"):
        raise UserError(f"image_format {image_format!r} cannot be read; use 'RGB' or 'BGR'")
    try:
        with PathManager.open(file_name, "rb") as file:
            data = np.frombuffer(file.read(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except OSError as error:
        raise UserError(
            f"cannot read image {file_name}: {error.strerror or error}; check the path"
        ) from error
    except cv2.error:  # a size beyond OpenCV's limits; a file that is merely broken gives None
        image = None
    if image is None:
        raise UserError(f"cannot read image {file_name}: not a whole image; replace the file")
    if image_format == "RGB":
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return image.astype(np.uint8, copy=False)


class OpenCVResizeTransform(Transform):
    """Resize from (h, w) to (new_h, new_w) with OpenCV; sizes in pixels."""

    def __init__(
        self, h: int, w: int, new_h: int, new_w: int, interpolation: int = cv2.INTER_LINEAR
    ) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interpolation: int | None = None) -> np.ndarray:
        """Resize (h, w) or (h, w, C) of any type that OpenCV resizes, or bool."""
        assert img.shape[:2] == (self.h, self.w), (img.shape, self.h, self.w)
        if interpolation is None:
            interpolation = self.interpolation
        pixels = img.astype(np.uint8) if img.dtype == bool else img
        resized = cv2.resize(pixels, (self.new_w, self.new_h), interpolation=interpolation)
        # OpenCV drops a last axis of one channel.
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:]).astype(img.dtype, copy=False)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interpolation=cv2.INTER_NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (N, 2) coordinates, each axis by its own true ratio."""
        return coords * np.array([self.new_w / self.w, self.new_h / self.h], np.float64)

    def inverse(self) -> OpenCVResizeTransform:
        return OpenCVResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interpolation)


class OpenCVResize(T.Augmentation):
    """mmdetection's ``Resize(scale=(max_size, short_edge_length), keep_ratio=True)``.

    Args:
        short_edge_length: the length of the short side in pixels, or several, one of which is drawn
            with even odds for each image.
        max_size: what the long side must not exceed, in pixels; the ratio is kept.
    """

    def __init__(self, short_edge_length: int | Sequence[int], max_size: int) -> None:
        super().__init__()
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length,)
        self.short_edge_length = tuple(short_edge_length)
        self.max_size = max_size
        if min(self.short_edge_length, default=0) < 1 or max_size < max(self.short_edge_length):
            raise UserError(
                f"OpenCVResize cannot use short_edge_length {short_edge_length} with max_size "
                f"{max_size}; give lengths from 1 to max_size"
            )

    def get_transform(self, image: np.ndarray) -> OpenCVResizeTransform:
        h, w = image.shape[:2]
        choice = int(self._rand_range(0, len(self.short_edge_length)))
        return OpenCVResizeTransform(h, w, *self.output_size(h, w, self.short_edge_length[choice]))

    def output_size(self, h: int, w: int, short_edge_length: int) -> tuple[int, int]:
        """The (new_h, new_w) of an image of (h, w)."""
        scale = min(self.max_size / max(h, w), short_edge_length / min(h, w))
        return int(h * scale + 0.5), int(w * scale + 0.5)


class OpenCVDatasetMapper(DatasetMapper):
    """Detectron2's mapper for detection, reading with OpenCV; arguments as there.

    It resizes with what its ``augmentations`` hold: give it :class:`OpenCVResize`. Semantic maps
    and precomputed proposals are not read.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map a data set's record to what the model takes.

        Returns:
            The record with ``image`` (3, H, W) uint8 and, in training, ``instances``.

        Raises:
            UserError: the image cannot be read, or has another size than the record says.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            utils.check_image_size(dataset_dict, image)
        except utils.SizeMismatchError as error:
            raise UserError(str(error)) from error

        seen = T.AugInput(image)
        transforms = self.augmentations(seen)
        channels_first = np.ascontiguousarray(seen.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.from_numpy(channels_first)

        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, seen.image.shape[:2])
        return dataset_dict
