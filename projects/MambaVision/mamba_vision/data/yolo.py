"""YOLO's annotations: a text file for each image, a line for each object.

A line is ``class x_center y_center width height`` or, for an outline, ``class x y x y x y ...``
with three points or more; all but the class are parts of the image's width and height.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .conversion import Conversion, read_classes, read_yaml
from .image_files import find_images

__all__ = ["read_yolo"]

TOLERANCE = 0.01  # by which coordinates may leave 0 to 1: some exporters round
CLASS_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "data.yaml")


def read_yolo(
    source: str | os.PathLike, split: str | None = None, classes: Sequence[str] | None = None
) -> Conversion:
    """Read a data set in YOLO's format.

    The labels of ``.../images/a.jpg`` are in ``.../labels/a.txt``, or else beside the image. An
    image without labels has no objects.

    Args:
        source: a data.yaml, or a folder of images.
        split: a key of the data.yaml: ``"train"``, ``"val"`` or ``"test"``.
        classes: the names, in order; ``None`` takes them from the data.yaml, or from a
            ``classes.txt`` or ``obj.names`` in the folder.

    Raises:
        UserError: a file or a folder is missing or cannot be read, or there are no images.
    """
    source = Path(source)
    if source.is_dir():
        if split:
            raise UserError(f"--split {split} needs a data.yaml, and {source} is a folder; give it")
        images, root = find_images(source), source
        if classes is None:
            classes = _classes_of(source)
    else:
        content = read_yaml(source)
        if "kpt_shape" in content:
            raise UserError(f"{source} describes keypoints, which are not converted; remove them")
        images, root = _images_of(source, content, split)
        if classes is None:
            classes = read_classes(source)
    if not images:
        raise UserError(f"no image is in {root}; check the path")

    conversion = Conversion(root, classes)
    for path in tqdm(images, desc="reading", unit="image"):
        if image := conversion.add_image(path):
            _read_labels(conversion, image, _labels_of(path))
    return conversion


def _classes_of(folder: Path) -> list[str]:
    for name in CLASS_FILES:
        if (folder / name).is_file():
            return read_classes(folder / name)
    raise UserError(
        f"{folder} holds none of {', '.join(CLASS_FILES)}; give --classes FILE, a name a line"
    )


def _images_of(source: Path, content: dict[str, Any], split: str | None) -> tuple[list[Path], Path]:
    """The images that a data.yaml lists for a split, and the folder that holds them all."""
    known = [key for key in ("train", "val", "test") if content.get(key)]
    if split not in known:
        asked = f"no split {split!r}" if split else "several splits"
        raise UserError(f"{source} has {asked}; give --split {{{','.join(known)}}}")
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    places = [_place(source, content, str(entry)) for entry in entries]
    images: list[Path] = []
    for place in places:
        images += find_images(place) if place.is_dir() else _listed(place)
    folders = [str(place) for place in places if place.is_dir()] + [
        str(image.parent) for image in images if not all(place.is_dir() for place in places)
    ]
    return list(dict.fromkeys(images)), Path(os.path.commonpath(folders)) if folders else source


def _place(source: Path, content: dict[str, Any], entry: str) -> Path:
    """Where an entry of a data.yaml lies; exporters disagree on what it is relative to."""
    base = source.parent.absolute()
    tried = [
        base / str(content.get("path") or ".") / entry,
        base / entry,
        base / entry.removeprefix("../"),  # written for a folder below
    ]
    for place in tried:
        if place.exists():
            return Path(os.path.normpath(place))
    raise UserError(f"{source}: {tried[0]} does not exist; mend 'path' or the entry {entry!r}")


def _listed(file: Path) -> list[Path]:
    """The images that a text file lists, a path a line."""
    try:
        lines = file.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of images {file}: {error}; check it") from error
    return [Path(os.path.normpath(file.parent / line.strip())) for line in lines if line.strip()]


def _labels_of(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        at = len(parts) - 2 - parts[-2::-1].index("images")
        labels = Path(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
        if labels.is_file():
            return labels
    return image.with_suffix(".txt")


def _read_labels(conversion: Conversion, image: dict[str, Any], file: Path) -> None:
    if not file.is_file():
        return
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        conversion.faults.append(f"{file}: is not a text file")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            label, numbers = _parse(line, len(conversion.classes))
            if len(numbers) == 4:
                x, y, w, h = numbers
                corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
                conversion.add_box(image, label, list(_pixels(corners, image)))
            else:
                conversion.add_polygon(image, label, list(_pixels(numbers, image)))
        except ValueError as error:
            conversion.faults.append(f"{file}:{number}: {error}")


def _parse(line: str, classes: int) -> tuple[int, list[float]]:
    """Class and coordinates; raises ValueError with the reason if the line cannot be used."""
    words = line.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(
            f"{len(words)} values; a box has 5 (class x y width height), an outline an odd number "
            "from 7 (class x y x y x y ...)"
        )
    numbers = [_number(word) for word in words]
    label = numbers[0]
    if label not in range(classes):
        raise ValueError(f"class {words[0]} is none of 0 to {classes - 1}")
    if not all(-TOLERANCE <= number <= 1 + TOLERANCE for number in numbers[1:]):
        raise ValueError("coordinates outside of 0 to 1; they are parts of the image's sides")
    return int(label), numbers[1:]


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{word!r} is not finite")
    return number


def _pixels(numbers: Sequence[float], image: dict[str, Any]) -> Iterator[float]:
    """x, y, x, y, ... in pixels, those a little outside drawn to the border."""
    for i, number in enumerate(numbers):
        yield min(max(number, 0.0), 1.0) * image["height" if i % 2 else "width"]
