"""Annotations in other formats, collected into COCO's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from . import coco_format
from .image_files import image_size

__all__ = ["Conversion", "read_classes", "read_yaml"]

OVERHANG = 1.0  # pixel, by which a box may reach over its image's border and be clipped


@dataclass
class Conversion:
    """A data set on its way to COCO's format.

    ``image_root`` is the folder that the images' names are relative to; ``faults`` are lines, each
    with a file, the number of a line where there is one, and a reason.
    """

    image_root: Path
    classes: Sequence[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add_image(self, path: Path) -> dict[str, Any] | None:
        """Take up an image, its size read from the file; ``None`` and a fault if it cannot be."""
        try:
            height, width = image_size(path)
        except UserError as error:
            self.faults.append(f"{path}: {error}")
            return None
        name = path.relative_to(self.image_root).as_posix()
        image = {"id": len(self.images) + 1, "file_name": name, "height": height, "width": width}
        self.images.append(image)
        return image

    def add_box(self, image: dict[str, Any], label: int, corners: Sequence[float]) -> None:
        """Take up an object by its box.

        Args:
            image: as :meth:`add_image` returned it.
            label: the class, from 0.
            corners: x0, y0, x1, y1 in pixels; what reaches over the border is cut off.

        Raises:
            ValueError: nothing is left of it, or it reaches over by more than a pixel; the message
                is the reason.
        """
        self._add(image, label, corners)

    def add_polygon(self, image: dict[str, Any], label: int, points: Sequence[float]) -> None:
        """As :meth:`add_box`, by an outline x, y, x, y, ... of three points or more."""
        xs, ys = points[::2], points[1::2]
        self._add(image, label, (min(xs), min(ys), max(xs), max(ys)))
        clipped = [0.0] * len(points)
        clipped[::2] = [_clip(x, image["width"]) for x in xs]
        clipped[1::2] = [_clip(y, image["height"]) for y in ys]
        self.annotations[-1]["segmentation"] = [clipped]

    def _add(self, image: dict[str, Any], label: int, corners: Sequence[float]) -> None:
        x0, y0, x1, y1 = corners
        width, height = image["width"], image["height"]
        if max(-x0, -y0, x1 - width, y1 - height) > OVERHANG:
            raise ValueError(f"the object reaches over the border of the {width} x {height} image")
        x0, x1, y0, y1 = (
            _clip(v, s) for v, s in ((x0, width), (x1, width), (y0, height), (y1, height))
        )
        if x1 <= x0 or y1 <= y0:
            raise ValueError("the object has no area")
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": label + 1,
                "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
            }
        )

    def content(self, boxes_only: bool = False) -> dict[str, Any]:
        """The set in COCO's format.

        Args:
            boxes_only: leave outlines out.

        Raises:
            UserError: there is no object, or some objects have outlines and others none.
        """
        if not self.annotations:
            raise UserError(f"no object is annotated in {self.image_root}; check the paths")
        bare = [item for item in self.annotations if "segmentation" not in item]
        if boxes_only:
            for item in self.annotations:
                item.pop("segmentation", None)
        elif 0 < len(bare) < len(self.annotations):
            name = self.images[bare[0]["image_id"] - 1]["file_name"]
            raise UserError(
                f"{len(bare)} objects are boxes and {len(self.annotations) - len(bare)} outlines "
                f"(the first box is in {name}); outline all, or give --boxes to keep boxes alone"
            )
        content = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
        }
        coco_format.complete(content)
        return content


def read_classes(path: str | os.PathLike) -> list[str]:
    """The names of classes in a file, in order.

    Args:
        path: a text file with a name a line; a YAML file with ``names``, as YOLO's data.yaml; or
            annotations in COCO's format, ``.json``.

    Raises:
        UserError: the file cannot be read, holds no names, or one twice.
    """
    path = Path(path)
    if path.suffix == ".json":
        names: Any = list(coco_format.class_names(coco_format.read(path)))
    elif path.suffix in (".yaml", ".yml"):
        names = read_yaml(path).get("names")
        if isinstance(names, dict):  # index to name
            if sorted(names) != list(range(len(names))):
                raise UserError(f"{path}: the keys of 'names' are not 0, 1, 2, ...; number them so")
            names = [names[i] for i in range(len(names))]
    else:
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read classes from {path}: {error}; check the path") from error
        names = lines[: len(lines) - next((i for i, x in enumerate(lines[::-1]) if x), len(lines))]
    if not isinstance(names, list) or not names or not all(str(name).strip() for name in names):
        raise UserError(f"{path} holds no list of class names; give one name to each class")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names class {twice!r} twice; names must differ")
    return names


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: there is no such file, or it is none.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path}: {reason}; check the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of keys to values, as YOLO's data.yaml is")
    return content


def _clip(value: float, size: int) -> float:
    return round(min(max(value, 0.0), float(size)), 3)
