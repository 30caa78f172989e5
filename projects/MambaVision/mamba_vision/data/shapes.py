"""The drawn data set: scenes of :mod:`.scenes` on disk in COCO's format, and its registration.

A drawn folder holds ``images/*.jpg`` and ``annotations.json``. It appears in one step when it is
whole, so a folder that is there is complete, whatever became of the process that drew it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from pycocotools import mask as rle
from tqdm import tqdm

from ..errors import UserError
from . import scenes
from .scenes import CLASSES, COLORS, Scene, draw_scene

__all__ = ["CLASSES", "COLORS", "draw_shapes", "register_shapes"]

ANNOTATIONS = "annotations.json"
IMAGES = "images"
GENERATOR = "mamba_vision.data.shapes"

VERSION = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:12]
"""Changes with every change to how scenes are drawn."""


def draw_shapes(folder: str | os.PathLike, images: int, *, seed: int = 0, split: str = "") -> None:
    """Draw a set of scenes into a new folder.

    Image i depends on ``seed``, ``split`` and i alone: a larger set begins with the smaller one.

    Args:
        folder: where to; it must not exist yet, or be empty.
        images: how many, at least one.
        seed: a number that is not negative.
        split: a name, so that sets of one seed differ.

    Raises:
        UserError: the folder is in use or cannot be written, or a number is out of range.
    """
    if images < 1 or seed < 0:
        raise UserError(
            f"cannot draw {images} images with seed {seed}; ask for one image or more, and a seed "
            "of 0 or more"
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new folder, or remove it first")
    try:
        _draw(folder, images, seed, split)
    except OSError as error:
        raise UserError(
            f"cannot draw into {folder}: {error.strerror or error}; name a folder that can be "
            "written (DETECTRON2_DATASETS holds the registered sets)"
        ) from error


def register_shapes(
    name: str, folder: str | os.PathLike, images: int, *, seed: int = 0, split: str = ""
) -> None:
    """Register a drawn set with Detectron2's catalogs; it is drawn when it is first asked for.

    A set in ``folder`` that was drawn otherwise (by another version, or with other arguments) is
    drawn anew; a folder of any other origin is left alone, with a :class:`UserError`.

    Args:
        name: the name of the data set.
        folder, images, seed, split: as for :func:`draw_shapes`.
    """
    folder = Path(folder)
    load = partial(_load, name, folder, images, seed, split)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(folder / ANNOTATIONS),
        image_root=str(folder / IMAGES),
        evaluator_type="coco",
        thing_classes=list(CLASSES),
        thing_colors=[list(color) for color in COLORS],
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
    )


def _load(name: str, folder: Path, images: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Draw the set unless it is there, and read it."""
    try:
        with file_lock(str(folder)):  # the processes of one training job all ask at once
            if not _is_current(folder, _info(images, seed, split)):
                _remove(folder)
                draw_shapes(folder, images, seed=seed, split=split)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent}: {error.strerror or error}; set DETECTRON2_DATASETS "
            "to a folder that can be written"
        ) from error
    return load_coco_json(str(folder / ANNOTATIONS), str(folder / IMAGES), name)


def _info(images: int, seed: int, split: str) -> dict[str, Any]:
    """What a set depends on, as its annotation file states it."""
    return {
        "description": "Drawn scenes of overlapping shapes",
        "generator": GENERATOR,
        "version": VERSION,
        "images": images,
        "seed": seed,
        "split": split,
    }


def _is_current(folder: Path, info: dict[str, Any]) -> bool:
    """Whether the folder holds the set that ``info`` states."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / ANNOTATIONS).read_text())["info"]
        drawn = found["generator"] == GENERATOR
    except (OSError, ValueError, KeyError, TypeError):
        drawn = False
    if not drawn and any(folder.iterdir()):
        raise UserError(
            f"{folder} is in the way of the drawn data set and was not drawn by it; move it away, "
            "or set DETECTRON2_DATASETS to another folder"
        )
    return drawn and found == info


def _remove(folder: Path) -> None:
    """Take a drawn folder away in one step, if there is one."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        folder.rename(old / folder.name)
        shutil.rmtree(old)


def _draw(folder: Path, images: int, seed: int, split: str) -> None:
    """Draw beside the folder and move the whole there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.new.", dir=folder.parent) as new:
        draft = Path(new) / folder.name
        (draft / IMAGES).mkdir(parents=True)
        records: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        title = "drawing " + "/".join(folder.parts[-2:])
        for i in tqdm(range(images), desc=title, unit="image", leave=False):
            scene = draw_scene(np.random.default_rng([seed, zlib.crc32(split.encode()), i]))
            height, width = scene.image.shape[:2]
            record = {"id": i + 1, "file_name": f"{i + 1:06d}.jpg", "height": height}
            records.append(record | {"width": width})
            annotations += _annotate(scene, image_id=i + 1, first_id=len(annotations) + 1)
            _write_jpeg(draft / IMAGES / f"{i + 1:06d}.jpg", scene)
        content = {
            "info": _info(images, seed, split),
            "images": records,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        }
        (draft / ANNOTATIONS).write_text(json.dumps(content))
        draft.rename(folder)


def _annotate(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The COCO annotations of a scene: run-length masks of what is seen, and what follows."""
    encoded = rle.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": label + 1,
            "iscrowd": 0,
            "area": int(rle.area(mask)),
            "bbox": rle.toBbox(mask).tolist(),
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},
        }
        for i, (label, mask) in enumerate(zip(scene.labels, encoded))
    ]


def _write_jpeg(path: Path, scene: Scene) -> None:
    written, data = cv2.imencode(
        ".jpg", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 93]
    )
    assert written
    path.write_bytes(data.tobytes())
