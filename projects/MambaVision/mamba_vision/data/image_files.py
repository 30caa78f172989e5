"""Image files: which they are, and how large their images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image

from ..errors import UserError

__all__ = ["SUFFIXES", "find_images", "image_size"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The images in a folder and in the folders below it, known by their suffixes, sorted."""
    files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in files if path.is_file())


def image_size(path: str | os.PathLike, decode: bool = False) -> tuple[int, int]:
    """The (height, width) of an image in pixels, turned as its EXIF orientation says.

    Args:
        path: of an image file.
        decode: read all pixels, and not the header alone.

    Raises:
        UserError: there is no such file, or it is not a whole image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes and odd metadata: the pixels count
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
                if decode:
                    image.load()
    except Exception as error:  # decoders raise whatever they please
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else _line(error)
        raise UserError(f"cannot read image {path}: {reason}; replace the file") from error
    return (width, height) if turned else (height, width)


def _line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
