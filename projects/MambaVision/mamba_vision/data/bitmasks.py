"""Masks as bitmaps from the start: polygons are filled before the image is resized and cropped."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as rle

from .mappers import OpenCVDatasetMapper

__all__ = ["BitmaskMapper"]


class BitmaskMapper(OpenCVDatasetMapper):
    """The training mapper of the released detectors; arguments as for Detectron2's.

    The ``gt_masks`` are ``BitMasks`` whatever the annotations hold: a polygon is filled at the size
    of the file, and the bitmap goes through the augmentations with nearest-neighbour sampling, as
    in the reference's training. Detectron2 itself clips polygons to a crop, for which it needs the
    package shapely.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.instance_mask_format = "bitmask"

    def _transform_annotations(self, dataset_dict: dict[str, Any], transforms, image_shape) -> None:
        size = dataset_dict["height"], dataset_dict["width"]
        for annotation in dataset_dict["annotations"]:
            polygons = annotation.get("segmentation")
            if self.use_instance_mask and isinstance(polygons, list):
                annotation["segmentation"] = rle.merge(rle.frPyObjects(polygons, *size))
        super()._transform_annotations(dataset_dict, transforms, image_shape)
