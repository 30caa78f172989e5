"""Data sets in COCO's format that are known by their files alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import UserError
from . import coco_format

__all__ = ["CocoSet", "read_set", "register_set"]


@dataclass(frozen=True)
class CocoSet:
    """What a model and a schedule have to know of a data set.

    ``name`` is the annotation file as it was given, ``json_file`` and ``image_root`` are absolute
    paths, ``classes`` go in the order of their ids, ``images`` counts all and ``training_images``
    those with an object that is no crowd, which are the ones that Detectron2 trains on.
    """

    name: str
    json_file: str
    image_root: str
    classes: tuple[str, ...]
    images: int
    training_images: int
    has_masks: bool


def read_set(json_file: str | os.PathLike, image_root: str | os.PathLike) -> CocoSet:
    """Read an annotation file and make sure that it and its images can be used.

    Args:
        json_file: in COCO's instances format.
        image_root: the folder that its ``file_name`` are relative to.

    Raises:
        UserError: a file cannot be read, an image is missing, or there is something wrong with the
            annotations (the first problem is told).
    """
    content = coco_format.read(json_file)
    if problem := next(coco_format.problems(content, image_root), None):
        raise UserError(f"{json_file}: {problem}")
    objects = [item for item in content["annotations"] if not item["iscrowd"]]
    return CocoSet(
        name=os.fspath(json_file),
        json_file=os.path.abspath(json_file),
        image_root=os.path.abspath(image_root),
        classes=coco_format.class_names(content),
        images=len(content["images"]),
        training_images=len({item["image_id"] for item in objects}),
        has_masks=any(item.get("segmentation") for item in objects),
    )


def register_set(name: str, json_file: str, image_root: str, thing_classes: Sequence[str]) -> None:
    """Register a data set with Detectron2's catalogs, its classes known before it is loaded.

    A set of the same files and classes that is registered already is left alone; one of others is
    replaced.
    """
    metadata = {
        "json_file": json_file,
        "image_root": image_root,
        "thing_classes": list(thing_classes),
        "evaluator_type": "coco",
    }
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if all(known.get(key) == value for key, value in metadata.items()):
            return
        DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
    MetadataCatalog.get(name).set(**metadata)


def _load(name: str, json_file: str, image_root: str) -> list[dict[str, Any]]:
    try:
        return load_coco_json(json_file, image_root, name)
    except AssertionError as error:  # metadata do not change
        if "thing_classes" not in str(error):
            raise
        raise UserError(
            f"annotation file {json_file} lists other classes than the config's data_sets: "
            f"{', '.join(MetadataCatalog.get(name).thing_classes)}; give the file they are from, "
            "or fit the config to this one with --train-json and --val-json"
        ) from error
