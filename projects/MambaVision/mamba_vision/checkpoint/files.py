"""Files from elsewhere, and files written all or nothing."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from detectron2.utils.file_io import PathManager

from ..errors import UserError

__all__ = ["atomic_write", "fetch", "remove_partial_files"]

PARTIAL = ".partial"


def fetch(path: str | os.PathLike[str]) -> str:
    """Get a local copy of a file.

    Args:
        path: a local file, or anything that Detectron2's PathManager knows: an ``https://`` URL is
            downloaded once, into fvcore's cache ($FVCORE_CACHE, else ~/.torch/iopath_cache).

    Returns:
        The path of the copy, or the local file's own.

    Raises:
        UserError: there is no such file, or it cannot be downloaded.
    """
    path = os.fspath(path)
    is_url = re.match(r"https?://", path)
    try:
        # A query, such as Hugging Face's ?download=true, would become part of the copy's name.
        local = PathManager.get_local_path(path.partition("?")[0] if is_url else path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be downloaded: {error}; check the address and the network, or "
            "download it by hand and give the file"
        ) from None
    if not os.path.isfile(local):
        reason = "it is a directory" if os.path.isdir(local) else "there is no such file"
        raise UserError(f"{path}: {reason}; check the path")
    return local


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only once it is complete and on the disk.

    Until then, and for good if anything goes wrong, a file that had the name before stays.

    Args:
        path: where the file goes; its directory must exist.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL, delete=False
        ) as file:
            partial = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is its owner's alone; this one is to be as readable as any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
        partial = None
        _flush(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save's own complaint of a half-written file hides the system's
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written: {reason.strerror or reason}; check the directory, its "
            "permissions and the free space"
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Remove what :func:`atomic_write` had begun in a folder when its process was killed.

    Nothing else may be writing there.
    """
    for path in Path(folder).glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Let a file's new name outlive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
