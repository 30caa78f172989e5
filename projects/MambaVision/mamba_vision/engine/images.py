"""Which image files a user means, and where the pictures made of them go."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..checkpoint.files import atomic_write
from ..data.image_files import SUFFIXES
from ..errors import UserError

__all__ = ["find_images", "name_pictures", "write_png"]


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs mean, each once, in order.

    Of a folder they are the images right in it, by suffix; a path or a glob is taken at its word.

    Raises:
        UserError: a path does not exist, or a folder or a glob gives nothing.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not images:
                raise UserError(f"folder {path} holds no image; give one that does")
            found.extend(images)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(text):
            matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
            if not any(p.is_file() for p in matches):
                raise UserError(f"no file matches {text}; give another pattern")
            found.extend(p for p in matches if p.is_file())
        else:
            raise UserError(f"image {path} does not exist; give a file, a folder or a glob")
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def name_pictures(images: Sequence[Path], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """A PNG file in a folder for each image: its stem, with a number where that is taken.

    Args:
        images: what the pictures are made of; none of these is ever named.
        folder: it need not exist.
        overwrite: name files that exist already, too.

    Raises:
        UserError: the folder is a file, or a file exists already and ``overwrite`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name another")
    taken = {path.resolve() for path in images}
    pictures: list[Path] = []
    for image in images:
        picture, number = folder / f"{image.stem}.png", 1
        while picture.resolve() in taken:
            number += 1
            picture = folder / f"{image.stem}-{number}.png"
        if picture.exists() and not overwrite:
            raise UserError(f"{picture} exists; name another folder, or give --overwrite")
        taken.add(picture.resolve())
        pictures.append(picture)
    return pictures


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB image, (H, W, 3), uint8, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, format="PNG")
