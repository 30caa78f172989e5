"""Checks of a registered data set before anything is built upon it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from . import coco_format

__all__ = ["check_dataset"]

Records = list[dict[str, Any]]

SMALL = 64 << 20  # bytes: reading an annotation file of this size twice takes a few seconds


def check_dataset(name: str, num_classes: int | None = None) -> None:
    """Load a registered data set and make sure that it can be used.

    The set is loaded once: the next ``DatasetCatalog.get(name)`` hands out what was loaded here.
    What Detectron2's reader stumbles over is told in one line. Of an annotation file up to 64 MB
    every record is checked (:func:`.coco_format.problems`), of a larger one that the images exist.

    Args:
        name: of the data set, as registered.
        num_classes: how many classes the model has; ``None`` leaves that unchecked.

    Raises:
        UserError: the name is unknown; the annotation file is missing, is not JSON or not in COCO's
            format; a category, an image, the folder of images or an image file is missing; nothing
            is annotated; or the number of classes is not the model's.
    """
    load = _loader(name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file", ""), metadata.get("image_root", "")
    if metadata.get("evaluator_type") == "coco" and "://" not in json_file + image_root:
        records = _load_coco(name, load, json_file, image_root)
    else:
        records = load()
    _check_content(name, records, json_file)

    classes = metadata.get("thing_classes")
    if num_classes is not None and classes is not None and len(classes) != num_classes:
        raise UserError(
            f"data set {name!r} has {len(classes)} classes and the model {num_classes}; set "
            f"model.roi_heads.num_classes={len(classes)}, or choose another data set"
        )
    DatasetCatalog[name] = _Loaded(load, records)


class _Loaded:
    """A catalog entry that hands out records loaded before, once, and then loads them anew."""

    def __init__(self, load: Callable[[], Records], records: Records) -> None:
        self.load = load
        self._records: Records | None = records

    def __call__(self) -> Records:
        records, self._records = self._records, None
        return self.load() if records is None else records


def _loader(name: str) -> Callable[[], Records]:
    """The function that loads a data set, looked up without calling it."""
    known = DatasetCatalog.list()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "register it first: see docs/data.md"
        raise UserError(f"no data set is registered as {name!r}; {hint}")
    load = DatasetCatalog[name]
    return load.load if isinstance(load, _Loaded) else load


def _load_coco(name: str, load: Callable[[], Records], json_file: str, image_root: str) -> Records:
    try:
        records = load()
    except UserError:
        raise
    except Exception as error:  # the reader checks little, and fails in as many ways
        problem = _first_problem(json_file, image_root) or f"{type(error).__name__}: {error}"
        raise UserError(_told(name, json_file, problem)) from error
    if os.path.getsize(json_file) <= SMALL:
        found = _first_problem(json_file, image_root)
    else:
        files = (record["file_name"] for record in records)
        found = next(coco_format.missing_images(files, image_root), None)
    if found is not None:
        raise UserError(_told(name, json_file, found))
    return records


def _first_problem(json_file: str, image_root: str) -> str | None:
    return next(coco_format.problems(coco_format.read(json_file), image_root), None)


def _told(name: str, json_file: str, problem: str) -> str:
    return " ".join(f"data set {name!r} ({json_file}): {problem}".split())


def _check_content(name: str, records: Records, json_file: str) -> None:
    if not records:
        raise UserError(f"data set {name!r} holds no image; check what it was registered with")
    if os.path.basename(json_file).startswith("image_info"):
        return  # a test set whose annotations are kept by those who evaluate
    if not any(record.get("annotations", True) for record in records):
        raise UserError(f"data set {name!r} holds no annotated object; check its annotations")
