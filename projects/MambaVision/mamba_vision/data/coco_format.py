"""Annotation files in COCO's format: reading them, what can be wrong with them, splitting them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from ..errors import UserError

__all__ = [
    "class_names",
    "complete",
    "is_box",
    "missing_images",
    "problems",
    "read",
    "record_problems",
    "split",
]

SECTIONS = ("images", "annotations", "categories")
# Of an annotation, Detectron2 needs the first four; COCO's evaluation the others.
KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
}


def read(json_file: str | os.PathLike) -> dict[str, Any]:
    """Read an annotation file.

    Returns:
        The parsed file: an object with lists under ``images``, ``annotations`` and ``categories``.
        Image information of a test set, COCO's files ``image_info_*.json``, has no annotations: its
        list is empty.

    Raises:
        UserError: there is no such file, it is not JSON, or it lacks one of the three.
    """
    path = Path(json_file)
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(
            f"annotation file {path} does not exist; put it there, or set DETECTRON2_DATASETS to "
            "the folder that holds your data sets"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read annotation file {path}: {error.strerror}; check the path and its rights"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"annotation file {path} is not JSON: {reason}; export or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"annotation file {path} holds a {type(content).__name__}, not an object with "
            f"{', '.join(SECTIONS)}; export it in COCO's instances format"
        )
    if path.name.startswith("image_info"):
        content.setdefault("annotations", [])
    for section in SECTIONS:
        if not isinstance(content.get(section), list):
            state = "is not a list" if section in content else "is missing"
            raise UserError(
                f"key {section!r} {state} in annotation file {path}; export it in COCO's instances "
                "format"
            )
    return content


def class_names(content: dict[str, Any]) -> tuple[str, ...]:
    """The names of the categories, in the order of their ids: Detectron2's classes 0, 1, ..."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return tuple(category["name"] for category in categories)


def problems(content: dict[str, Any], image_root: str | os.PathLike | None) -> Iterator[str]:
    """Find what training or evaluation would stumble over, cheapest first.

    Args:
        content: as :func:`read` returns it.
        image_root: the folder of the images; ``None`` leaves the image files unchecked.

    Yields:
        One line for each problem.
    """
    whole = True
    for section in ("categories", "images", "annotations"):
        for problem in record_problems(section, content[section]):
            whole = False
            yield problem
    if not content["images"]:
        yield "'images' is empty; list at least one"
    if not whole:
        return
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    yield from _sizes(sizes)
    yield from _annotations(content["annotations"], sizes, categories)
    if image_root is not None:
        yield from missing_images((image["file_name"] for image in content["images"]), image_root)


def missing_images(file_names: Iterable[str], image_root: str | os.PathLike) -> Iterator[str]:
    """Say in one line which image files are missing, listing every folder once.

    Args:
        file_names: relative to ``image_root``.
        image_root: a local folder.
    """
    root = Path(image_root)
    if not root.is_dir():
        yield (
            f"image folder {root} does not exist; put it there, or set DETECTRON2_DATASETS to the "
            "folder that holds your data sets"
        )
        return
    present: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        if folder not in present:
            here = root / folder
            present[folder] = set(os.listdir(here)) if here.is_dir() else set()
        if base not in present[folder]:
            missing.append(file_name)
    if missing:
        number = f"{len(missing)} images are" if len(missing) > 1 else "1 image is"
        yield f"{number} missing in folder {root}, such as {missing[0]}; add or unlist them"


def split(
    content: dict[str, Any], part: float, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide the images of a data set at random, with their annotations.

    Args:
        content: as :func:`read` returns it.
        part: of the images that go to the second set, between 0 and 1.
        seed: of the random choice.

    Returns:
        Both sets, neither empty, with all categories and whatever else the file holds.

    Raises:
        UserError: one of the sets would be empty.
    """
    ids = sorted(image["id"] for image in content["images"])
    count = round(part * len(ids))
    if not 0 < count < len(ids):
        raise UserError(
            f"a part of {part:g} of {len(ids)} images leaves a set empty; choose another part"
        )
    second = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:count]}

    def subset(chosen: bool) -> dict[str, Any]:
        images = [image for image in content["images"] if (image["id"] in second) is chosen]
        kept = {image["id"] for image in images}
        annotations = [item for item in content["annotations"] if item["image_id"] in kept]
        return content | {"images": images, "annotations": annotations}

    return subset(False), subset(True)


def complete(content: dict[str, Any]) -> int:
    """Add what exporters leave out and COCO's evaluation needs, in place: ``area``, ``iscrowd``.

    The area is that of the mask in pixels, or of the box where there is no mask; nothing counts as
    a crowd. An annotation that cannot be understood is left for :func:`problems` to tell.

    Returns:
        The number of annotations that were added to.
    """
    sizes = {
        image.get("id"): (image.get("height"), image.get("width"))
        for image in content["images"]
        if isinstance(image, dict)
    }
    changed = 0
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict) or {"area", "iscrowd"} <= annotation.keys():
            continue
        annotation.setdefault("iscrowd", 0)
        area = _area(annotation, sizes)
        if area is not None:
            annotation.setdefault("area", area)
        changed += 1
    return changed


def _area(annotation: dict[str, Any], sizes: dict[Any, Any]) -> float | None:
    mask, box, image = (annotation.get(key) for key in ("segmentation", "bbox", "image_id"))
    size = sizes.get(image) if isinstance(image, int) else None
    if mask and size and not any(_sizes({0: size})) and _is_mask(mask, size):
        if isinstance(mask, list):  # as Detectron2 does, leave out what is no polygon
            mask = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
            mask = rle.merge(rle.frPyObjects(mask, *size)) if mask else None
        elif isinstance(mask["counts"], list):
            mask = rle.frPyObjects(mask, *size)
        if mask:
            return float(rle.area(mask))
    return float(box[2] * box[3]) if box and is_box(box) else None


def record_problems(section: str, records: list[Any]) -> Iterator[str]:
    """Tell the records of a section that are no objects, lack a key or share an id."""
    seen = set()
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            yield f"{section}[{i}] is a {type(record).__name__}, not an object"
            continue
        label = f"{section}[{i}] (id {record.get('id')!r})"
        absent = [key for key in KEYS[section] if key not in record]
        if absent:
            remedy = "add them" if len(absent) > 1 else "add it"
            if {"area", "iscrowd"}.issuperset(absent):
                remedy += ", or have tools/convert_dataset.py do it"
            yield f"{label} lacks {', '.join(map(repr, absent))}; {remedy}"
        elif not isinstance(record["id"], int):
            yield f"{label} has an id that is not a whole number; number them"
        elif record["id"] in seen:
            yield f"{label} has the id of an earlier one; ids must differ"
        elif section == "categories" and not isinstance(record["name"], str):
            yield f"{label} has a name that is not text; put it in quotes"
        else:
            seen.add(record["id"])


def _sizes(sizes: dict[int, tuple[Any, Any]]) -> Iterator[str]:
    for image_id, size in sizes.items():
        if not all(isinstance(side, int) and side > 0 for side in size):
            yield f"image {image_id} has height {size[0]!r} and width {size[1]!r}; mend them"


def _annotations(
    annotations: list[dict[str, Any]], sizes: dict[int, tuple[int, int]], categories: set[int]
) -> Iterator[str]:
    some_masks = any(annotation.get("segmentation") for annotation in annotations)
    for annotation in annotations:
        label = f"annotation {annotation['id']}"
        category, image = annotation["category_id"], annotation["image_id"]
        if not isinstance(category, int) or category not in categories:
            yield (
                f"{label} has category_id {category!r}, which 'categories' does not list; add it "
                "there, or mend the annotation"
            )
        if not isinstance(image, int) or image not in sizes:
            yield f"{label} belongs to image {image!r}, which 'images' does not list; remove it"
            continue
        if not is_box(annotation["bbox"]):
            yield f"{label} has bbox {annotation['bbox']!r}; give [x, y, width, height] in pixels"
        if annotation.get("ignore"):
            yield f"{label} has 'ignore' set, which Detectron2 does not read; use 'iscrowd'"
        segmentation = annotation.get("segmentation")
        if segmentation and not _is_mask(segmentation, sizes[image]):
            yield (
                f"{label} has a segmentation that is neither a list of polygons [x, y, x, y, ...] "
                "nor a run-length mask of its image's size; mend it"
            )
        elif some_masks and not segmentation:
            yield f"{label} has no segmentation, though others have; add it, or remove them all"


def is_box(box: Any) -> bool:
    """Whether something is [x, y, width, height], four finite numbers, the sides 0 or more."""
    return isinstance(box, list) and len(box) == 4 and _are_numbers(box) and min(box[2:]) >= 0


def _is_mask(segmentation: Any, size: tuple[int, int]) -> bool:
    if isinstance(segmentation, dict):
        return "counts" in segmentation and segmentation.get("size") == list(size)
    return isinstance(segmentation, list) and all(
        isinstance(polygon, list) and _are_numbers(polygon) for polygon in segmentation
    )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
