"""A whole data set in COCO's format looked over, every image decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from ..errors import UserError
from . import coco_format
from .image_files import image_size

__all__ = ["ClassCount", "Survey", "survey"]

TOLERANCE = 1.0  # pixel, by which a box may reach over its image's border

Annotations = list[dict[str, Any]]


@dataclass(frozen=True)
class ClassCount:
    """How many objects of a class there are, crowds left out, and in how many images."""

    name: str
    objects: int
    images: int


@dataclass
class Survey:
    """What :func:`survey` found.

    ``problems`` maps a kind of problem to one line for each; ``empty_images`` (without an object)
    and ``crowds`` (regions of many objects, neither learnt nor counted) are no problems.
    """

    images: int
    classes: list[ClassCount] = field(default_factory=list)
    empty_images: int = 0
    crowds: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)


def survey(json_file: str | os.PathLike, image_root: str | os.PathLike | None = None) -> Survey:
    """Look a data set over.

    Args:
        json_file: annotations in COCO's format.
        image_root: the folder of the images; ``None`` leaves the image files unread. They are read
            in as many threads as there are CPU cores, with a progress bar.

    Raises:
        UserError: the annotation file cannot be read, or the folder does not exist.
    """
    content = coco_format.read(json_file)
    found = Survey(len(content["images"]))

    def note(kind: str, lines: Iterable[str]) -> None:
        if lines := list(lines):
            found.problems[kind] = lines

    note("annotation file", coco_format.problems(content, None))
    if any(not _is_whole(section, content[section]) for section in coco_format.KEYS):
        return found  # records cannot be told apart or lack what the rest needs
    images = {image["id"]: image for image in content["images"]}
    annotations = [
        item
        for item in content["annotations"]
        if item["image_id"] in images and coco_format.is_box(item["bbox"])
    ]
    _count(found, content["categories"], annotations)
    note("boxes outside of their image", _outside(annotations, images))
    note("boxes without area", _without_area(annotations))
    note("masks without area", _masks_without_area(annotations))
    note("objects annotated twice", _twice(annotations))
    note("files listed twice", _listed_twice(content["images"]))
    note("classes of the same name", _same_name(content["categories"]))
    if image_root is not None:
        root = Path(image_root)
        if not root.is_dir():
            raise UserError(f"image folder {root} does not exist; check the path")
        for kind, lines in _image_problems(content["images"], root).items():
            note(kind, lines)
    return found


def _is_whole(section: str, records: list[Any]) -> bool:
    return not any(coco_format.record_problems(section, records))


def _count(found: Survey, categories: list[dict[str, Any]], annotations: Annotations) -> None:
    objects = [item for item in annotations if not item["iscrowd"]]
    of_class = Counter(item["category_id"] for item in objects)
    pairs = {(item["category_id"], item["image_id"]) for item in objects}
    in_images = Counter(category for category, _ in pairs)
    found.classes = [
        ClassCount(category["name"], of_class[category["id"]], in_images[category["id"]])
        for category in sorted(categories, key=lambda category: category["id"])
    ]
    found.crowds = len(annotations) - len(objects)
    found.empty_images = found.images - len({item["image_id"] for item in objects})


def _outside(annotations: Annotations, images: dict[int, dict[str, Any]]) -> Iterator[str]:
    for item in annotations:
        x, y, width, height = item["bbox"]
        image = images[item["image_id"]]
        over = max(-x, -y, x + width - image["width"], y + height - image["height"])
        if over > TOLERANCE:
            yield (
                f"{_name(item)}: bbox {item['bbox']} reaches {over:g} pixels over the border of "
                f"{image['width']} x {image['height']}"
            )


def _without_area(annotations: Annotations) -> Iterator[str]:
    for item in annotations:
        if min(item["bbox"][2:]) <= 0:
            yield f"{_name(item)}: bbox {item['bbox']}"


def _masks_without_area(annotations: Annotations) -> Iterator[str]:
    for item in annotations:
        mask = item.get("segmentation")
        if isinstance(mask, list) and mask and all(len(p) < 6 or len(p) % 2 for p in mask):
            yield f"{_name(item)}: no polygon has three points"


def _twice(annotations: Annotations) -> Iterator[str]:
    first: dict[tuple, Any] = {}
    for item in annotations:
        key = (item["image_id"], item["category_id"], *item["bbox"], item["iscrowd"])
        earlier = first.setdefault(key, item)
        if earlier is not item:
            yield f"{_name(item)} has the box and the class of annotation {earlier['id']}"


def _listed_twice(images: list[dict[str, Any]]) -> Iterator[str]:
    first: dict[str, Any] = {}
    for image in images:
        earlier = first.setdefault(image["file_name"], image)
        if earlier is not image:
            yield f"{image['file_name']} is image {earlier['id']} and image {image['id']}"


def _same_name(categories: list[dict[str, Any]]) -> Iterator[str]:
    counts = Counter(category["name"] for category in categories)
    return (f"{name}: {count} categories" for name, count in counts.items() if count > 1)


def _name(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation['id']} (image {annotation['image_id']})"


def _image_problems(images: list[dict[str, Any]], root: Path) -> dict[str, list[str]]:
    problems: dict[str, list[str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release Python's lock
        results = pool.map(lambda image: _image_problem(image, root), images)
        for problem in tqdm(results, total=len(images), desc="decoding", unit="image"):
            if problem:
                problems.setdefault(problem[0], []).append(problem[1])
    return problems


def _image_problem(image: dict[str, Any], root: Path) -> tuple[str, str] | None:
    """The kind of an image's problem and a line on it, if it has one."""
    path = root / image["file_name"]
    if not path.is_file():
        return "missing images", f"image {image['id']}: {path}"
    try:
        size = image_size(path, decode=True)
    except UserError as error:
        return "images that cannot be decoded", f"image {image['id']}: {error}"
    if not cv2.haveImageReader(str(path)):
        return (
            "images that cannot be decoded",
            f"image {image['id']}: OpenCV does not know the format of {path}; save it as JPEG",
        )
    listed = (image["height"], image["width"])
    if size != listed:
        turned = "; the file's EXIF data turn it" if size[::-1] == listed else ""
        return (
            "sizes that differ",
            f"image {image['id']}: {path} is {size[1]} x {size[0]}, listed as "
            f"{listed[1]} x {listed[0]}{turned}",
        )
    return None
