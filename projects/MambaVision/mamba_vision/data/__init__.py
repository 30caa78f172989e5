"""Data: the drawn data set, the OpenCV reading path and the checks of a data set.

Importing this package registers ``shapes_train`` and ``shapes_val`` with Detectron2's catalogs. On
first use they are drawn into ``$DETECTRON2_DATASETS/shapes`` (by default ``./datasets/shapes``).
"""

import os
from pathlib import Path

from .checks import check_dataset
from .coco_sets import read_set
from .mappers import OpenCVDatasetMapper, OpenCVResize
from .shapes import CLASSES, COLORS, draw_shapes, register_shapes
from .train_loader import build_train_loader

__all__ = [
    "CLASSES",
    "COLORS",
    "OpenCVDatasetMapper",
    "OpenCVResize",
    "build_train_loader",
    "check_dataset",
    "draw_shapes",
    "read_set",
    "register_shapes",
]

# As Detectron2's built-in data sets do, take the folder once, at import.
_ROOT = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))) / "shapes"

register_shapes("shapes_train", _ROOT / "train", images=600, split="train")
register_shapes("shapes_val", _ROOT / "val", images=100, split="val")
