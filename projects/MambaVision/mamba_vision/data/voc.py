"""Pascal VOC's annotations: an XML file for each image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from tqdm import tqdm

from ..errors import UserError
from .conversion import Conversion
from .image_files import find_images

__all__ = ["read_voc"]

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    source: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
) -> Conversion:
    """Read a data set in Pascal VOC's format.

    The pixels of ``bndbox`` count from 1 and belong to the box, as VOC's own do: xmin 1 and xmax W
    are the whole width. Objects marked as difficult are taken like any other.

    Args:
        source: a folder with ``Annotations`` and ``JPEGImages``, or one of XML files.
        image_root: the folder of the images; ``None`` means ``JPEGImages``, or the XML files' own.
        split: take the images that ``ImageSets/Main/<split>.txt`` lists, and not all.
        classes: the names, in order; ``None`` takes all that any XML file of the folder has, of
            whatever split, sorted.

    Raises:
        UserError: a file or a folder is missing or cannot be read, or there are no annotations.
    """
    source = Path(source)
    whole = (source / "Annotations").is_dir()
    files = sorted((source / "Annotations" if whole else source).rglob("*.xml"))
    if not files:
        raise UserError(f"no XML file is in {source}; check the path")
    root = Path(image_root) if image_root else source / "JPEGImages" if whole else source
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; give --images DIR")
    images = {path.stem: path for path in reversed(find_images(root))}
    wanted = _listed(source, split) if split else {path.stem for path in files}

    documents: dict[Path, Node] = {}
    conversion = Conversion(root, [])
    for file in tqdm(files, desc="reading", unit="file"):
        try:
            documents[file] = _parse(file)
        except ValueError as error:
            conversion.faults.append(f"{file}{error}")
    conversion.classes = classes or sorted(set(_names(documents.values())))
    labels = {name: i for i, name in enumerate(conversion.classes)}
    for file, document in documents.items():
        if file.stem in wanted:
            _read(conversion, file, document, images, labels)
    for name in sorted(wanted - {path.stem for path in files}):
        conversion.faults.append(f"{source / 'Annotations' / name}.xml: there is no such file")
    return conversion


@dataclass
class Node:
    """An XML element, and the line that it starts on."""

    tag: str
    line: int
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, tag: str) -> list[Node]:
        return [child for child in self.children if child.tag == tag]

    def get(self, tag: str) -> str | None:
        """The text of the first child of a tag; None if there is no such child, or it is empty."""
        return next((child.text.strip() or None for child in self.all(tag)), None)


def _parse(file: Path) -> Node:
    """The root element; raises ValueError with ":line: reason" if there is none."""
    top = Node("", 0)
    stack = [top]
    parser = expat.ParserCreate()

    def start(tag: str, _: Any) -> None:
        node = Node(tag, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    def entity(*_: Any) -> None:
        raise ValueError(
            f":{parser.CurrentLineNumber}: declares an entity, which no annotation does"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f":{error.lineno}: is not XML: {expat.ErrorString(error.code)}") from None
    except OSError as error:
        raise ValueError(f": cannot be read: {error.strerror}") from None
    return top.children[0]


def _names(documents: Any) -> Iterator[str]:
    for document in documents:
        for item in document.all("object"):
            if name := item.get("name"):
                yield name


def _listed(source: Path, split: str) -> set[str]:
    folder = source / "ImageSets" / "Main"
    try:
        lines = (folder / f"{split}.txt").read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))[:5]) or "none"
        raise UserError(
            f"cannot read the list of images {folder / split}.txt; give --split one of those that "
            f"are there: {there}"
        ) from error
    return {line.split()[0] for line in lines if line.strip()}


def _read(
    conversion: Conversion,
    file: Path,
    document: Node,
    images: dict[str, Path],
    labels: dict[str, int],
) -> None:
    named = Path(document.get("filename") or "").stem
    path = images.get(file.stem) or images.get(named)
    if path is None:
        conversion.faults.append(f"{file}: its image is not in {conversion.image_root}")
        return
    image = conversion.add_image(path)
    if image is None:
        return
    for size in document.all("size"):
        stated = (size.get("width"), size.get("height"))
        if "0" not in stated and stated != (str(image["width"]), str(image["height"])):
            conversion.faults.append(
                f"{file}:{size.line}: says {' x '.join(map(str, stated))}, the image is "
                f"{image['width']} x {image['height']}"
            )
            return
    for item in document.all("object"):
        try:
            label, corners = _object(item, labels)
            conversion.add_box(image, label, corners)
        except ValueError as error:
            conversion.faults.append(f"{file}:{item.line}: {error}")


def _object(item: Node, labels: dict[str, int]) -> tuple[int, list[float]]:
    """Class and x0, y0, x1, y1; raises ValueError with the reason if it cannot be used."""
    name = item.get("name")
    if name is None:
        raise ValueError("the object has no name")
    if name not in labels:
        raise ValueError(f"class {name!r} is none of those given: {', '.join(labels)}")
    box = next(iter(item.all("bndbox")), None)
    texts = [box.get(corner) if box else None for corner in CORNERS]
    try:
        x0, y0, x1, y1 = (float(text or "") for text in texts)
    except ValueError:
        raise ValueError(f"bndbox needs a number for each of {', '.join(CORNERS)}") from None
    if not all(abs(number) < 1e6 for number in (x0, y0, x1, y1)):
        raise ValueError("bndbox has numbers that are no pixels")
    return labels[name], [x0 - 1, y0 - 1, x1, y1]
