"""COCO 2017 brought to where Detectron2 looks for it.

::

    coco/annotations/instances_{train,val}2017.json
    coco/{train,val}2017/*.jpg
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UserError
from . import coco_format
from .download import download, fault

__all__ = ["ARCHIVES", "SERVER", "Archive", "missing", "prepare", "unpack"]

SERVER = "http://images.cocodataset.org"
SPLITS = ("train2017", "val2017")


@dataclass(frozen=True)
class Archive:
    """A zip file: where it lies on the server, what it is known by, and what is taken from it."""

    path: str
    size: int  # bytes
    md5: str
    members: str  # a regular expression

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


# The digests are those that many projects' download scripts check against, the sizes those that
# the server states; COCO's own page gives neither.
ARCHIVES = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "f4bbac642086de4f52a3fdda2de5fa2c",
        r"annotations/instances_(train|val)2017\.json",
    ),
    "val2017": Archive(
        "zips/val2017.zip",
        815_585_330,
        "442b8da7639aecaf257c1dceb8ba8c80",
        r"val2017/\d+\.jpg",
    ),
    "train2017": Archive(
        "zips/train2017.zip",
        19_336_861_798,
        "cced6f7f71b7629ddf16f17bbcfab6b2",
        r"train2017/\d+\.jpg",
    ),
}


def missing(coco: Path, part: str) -> str | None:
    """What a folder lacks of a part of the data set, in a line; ``None`` if it is all there.

    Args:
        coco: the folder, ``$DETECTRON2_DATASETS/coco``.
        part: a key of :data:`ARCHIVES`.

    Raises:
        UserError: the annotations, which list the images, cannot be read.
    """
    if part == "annotations":
        files = [_annotations(coco, split) for split in SPLITS]
        absent = [str(file) for file in files if not file.is_file()]
        return f"{', '.join(absent)}: missing" if absent else None
    annotations = _annotations(coco, part)
    if not annotations.is_file():
        return f"{annotations}, which lists the images of {part}: missing"
    names = _listed(annotations, annotations.stat().st_mtime_ns)
    return next(coco_format.missing_images(names, coco / part), None)


def prepare(
    coco: Path, part: str, zips: Path | None = None, server: str = SERVER, keep: bool = False
) -> Iterator[str]:
    """Bring a part of the data set into its folder, unless it is there.

    Args:
        coco: the folder, ``$DETECTRON2_DATASETS/coco``; it need not exist.
        part: a key of :data:`ARCHIVES`; images need the annotations.
        zips: a folder of zip files that need not be downloaded.
        server: where the others come from.
        keep: keep the file that was downloaded, ``coco/<name>.zip``.

    Yields:
        A line on each thing done.

    Raises:
        UserError: a file cannot be had, is not the one expected, or does not fit on the disk.
    """
    archive = ARCHIVES[part]
    if part != "annotations" and not _annotations(coco, part).is_file():
        raise UserError(
            f"{part}: {_annotations(coco, part)}, which lists its images, is missing; prepare the "
            "part annotations first"
        )
    try:
        coco.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{coco}: cannot be made: {error.strerror}; name another folder") from error
    with file_lock(str(coco)):  # two of these at once would write into the same files
        if missing(coco, part) is None:
            yield f"{part}: is there"
            return
        file = _have(archive, coco, zips)
        downloaded = file is None
        if file is None:
            file = coco / archive.name
            done = file.with_name(f"{file.name}.partial")
            left = archive.size - (done.stat().st_size if done.exists() else 0)
            _check_space(coco, left + archive.size, "download and unpack", archive.name)
            download(f"{server}/{archive.path}", file, archive.size, archive.md5)
            yield f"{part}: downloaded {file}"
        elif reason := fault(file, archive.size, archive.md5):
            raise UserError(f"{file}: {reason}; download it again, or remove it to have that done")
        count = unpack(file, coco, archive.members)
        yield f"{part}: unpacked {count} file{'s' * (count != 1)} from {file}"
        if reason := missing(coco, part):
            raise UserError(f"{part}: still incomplete after unpacking {file}: {reason}")
        if downloaded and not keep:
            file.unlink()


def unpack(file: Path, folder: Path, members: str) -> int:
    """Unpack a zip file, without what is there already.

    Args:
        file: the zip file.
        folder: where to.
        members: a regular expression that the names of the wanted members match.

    Returns:
        The number of files written; each appears whole or not at all.

    Raises:
        UserError: it is no zip file or damaged, a member would land outside of the folder or is a
            link (nothing is written then), or the disk is full.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                _check_member(file, member)
            wanted = [
                member
                for member in archive.infolist()
                if re.fullmatch(members, member.filename)
                and not _is_there(folder / member.filename, member.file_size)
            ]
            _check_space(folder, sum(m.file_size for m in wanted), "unpack", file.name)
            for member in tqdm(wanted, desc=f"unpacking {file.name}", unit="file"):
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f"{target.name}.partial")
                with archive.open(member) as source, partial.open("wb") as output:
                    shutil.copyfileobj(source, output, 1 << 20)
                os.replace(partial, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(
            f"{file}: is no zip file, or damaged: {error}; download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {file} to {folder}: {error.strerror or error}; check the folder "
            "and the free space, and run this again"
        ) from error
    return len(wanted)


def _annotations(coco: Path, split: str) -> Path:
    return coco / "annotations" / f"instances_{split}.json"


@functools.cache  # the training set's takes a while
def _listed(annotations: Path, _changed: int) -> tuple[str, ...]:
    return tuple(image["file_name"] for image in coco_format.read(annotations)["images"])


def _have(archive: Archive, coco: Path, zips: Path | None) -> Path | None:
    for folder in (zips, coco):
        if folder is not None and (folder / archive.name).is_file():
            return folder / archive.name
    return None


def _check_member(file: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    leads_out = path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", member.filename)
    if leads_out or stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(
            f"{file}: holds {member.filename!r}, a link or a path that leads out of the folder; "
            "nothing was unpacked: get the file from another source"
        )


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_space(folder: Path, needed: int, purpose: str, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB are free, and to {purpose} {name} takes "
            f"{needed / 1e9:.1f} GB; free some space, or choose another folder"
        )
