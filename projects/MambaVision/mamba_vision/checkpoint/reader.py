"""Reading files of weights without running anything in them.

Three formats hold pickles, and PyTorch's own reader takes just two of them, only if every class in
the file is importable and trusted:

- PyTorch's archive (since 1.6): a zip of ``*/data.pkl`` and one member ``*/data/<key>`` a storage;
- PyTorch's older stream: pickles of a magic number, a version, the machine's sizes, the object and
  the keys of the storages, then each storage as its length and its numbers;
- a single pickle of numpy arrays, as in Detectron2's model zoo.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import UserError
from .builders import BUILDERS, Storage
from .unpickle import Interpreter, Placeholder, UnsafeError

__all__ = ["read_checkpoint"]

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of PyTorch's older stream
VERSION = 1001  # the second

# What files of weights turn out to be: how they begin, and what to say.
_FOREIGN = (
    (rb"\s*<", "it is a web page; download the file itself, not the page that shows it"),
    (rb"version https://git-lfs", "it is a Git LFS pointer; fetch the file with `git lfs pull`"),
    (rb".{8}\{\"", "it is in the safetensors format; take the .pth or .pth.tar of the same model"),
    (rb"\x1f\x8b", "it is compressed with gzip; unpack it with gunzip"),
    (rb"BZh", "it is compressed with bzip2; unpack it with bunzip2"),
    (rb"\xfd7zXZ", "it is compressed with xz; unpack it with unxz"),
    (rb"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it with unzstd"),
    (rb".{257}ustar", "it is a tar archive; unpack it with tar and name the file inside"),
    (rb"\s*[\[{#]", "it is text; name the file of weights that belongs to it"),
)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of weights: PyTorch's (either format) or a pickle of Detectron2's model zoo.

    Neither the packages that wrote the file nor any of its classes are imported, and nothing in it
    is run: tensors, numpy arrays and numbers, and plain containers are rebuilt by a closed list of
    functions; an object of any other class becomes an inert
    :class:`~mamba_vision.checkpoint.unpickle.Placeholder`.

    Args:
        path: a local file.

    Returns:
        The dict in the file. Tensors are on the CPU, with the sharing of storages kept; attributes
        of tensors and whether they need gradients are left out.

    Raises:
        UserError: there is no such file, it is something else or damaged, or it was made to run a
            command.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = _read(file)
    except UnsafeError as error:
        raise UserError(
            f"{path}: refused, and nothing in it was run: {error}; do not use this file, and get "
            "the weights from their author"
        ) from None
    except _UnfitError as error:
        raise UserError(f"{path}: not a file of weights: {error}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; check the path"
        ) from None
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it refers to {reason}, which it does not hold"
        raise UserError(
            f"{path}: not a file of weights, or damaged: {reason[:200]}; download or save it again"
        ) from None
    return data


class _UnfitError(Exception):
    """The file is sound but of another kind; the message says which, and the remedy."""


def _read(file: IO[bytes]) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    if not head:
        raise _UnfitError("it is empty; download or save it again")
    if head.startswith(b"PK"):
        data = _read_archive(zipfile.ZipFile(file), size)
    else:
        for start, reason in _FOREIGN:
            if re.match(start, head, re.DOTALL):
                raise _UnfitError(reason)
        # Unlike a file, a map never makes room for the length that a read asks for.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            data = _read_stream(stream, size)  # type: ignore[arg-type]
    if isinstance(data, Placeholder):
        raise _UnfitError(f"it holds a whole {data.name}; save its state_dict() instead")
    if not isinstance(data, dict):
        raise _UnfitError(f"it holds a {type(data).__name__} where a dict of weights belongs")
    return data


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    """Read PyTorch's zip archive. Its members are stored as they are, so none can be a bomb."""
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise _UnfitError(
            "it is a zip archive of something else; name a file that torch.save wrote"
        )
    home = pickles[0].removesuffix("data.pkl")
    if f"{home}constants.pkl" in members:
        raise _UnfitError("it is a TorchScript program; save its state_dict() instead")
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise ValueError("the archive is compressed, which PyTorch's never is")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("the archive claims to hold more than the file does")
    order = members.get(f"{home}byteorder")
    if order is not None and archive.read(order).decode() != sys.byteorder:
        raise _UnfitError("its numbers are in the other byte order; save it again on this machine")

    storages: dict[str, Storage] = {}

    def load_storage(identity: Any) -> Storage:
        dtype, key, count, _ = _storage_identity(identity)
        if key not in storages:
            info = members[f"{home}data/{key}"]
            if info.file_size != count * dtype.itemsize:
                raise ValueError(f"storage {key} has {info.file_size} bytes, not {count} numbers")
            data = torch.empty(count, dtype=dtype)
            with archive.open(info) as member:
                _fill(data, member)
            storages[key] = Storage(data)
        return storages[key]

    return Interpreter(BUILDERS, load_storage).load(io.BytesIO(archive.read(pickles[0])))


def _read_stream(stream: IO[bytes], size: int) -> Any:
    """Read PyTorch's older stream, or else the single pickle that the file then is."""
    first = Interpreter(BUILDERS).load(stream)
    if first != MAGIC:
        return first
    if Interpreter(BUILDERS).load(stream) != VERSION:
        raise ValueError("it has an unknown version")
    Interpreter(BUILDERS).load(stream)  # the sizes of C's types on the machine that wrote it

    storages: dict[str, Storage] = {}
    views: dict[tuple[str, str], Storage] = {}
    claimed = 0

    def load_storage(identity: Any) -> Storage | Any:
        nonlocal claimed
        if isinstance(identity, tuple) and identity[:1] == ("module",):
            return identity[1]  # a class, with its source code
        dtype, key, count, view = _storage_identity(identity)
        if key not in storages:
            claimed += count * dtype.itemsize
            if claimed > size:
                raise ValueError("the storages claim to hold more than the file does")
            storages[key] = Storage(torch.empty(count, dtype=dtype))
        if view is None:
            return storages[key]
        name, offset, length = view
        if (key, name) not in views:
            views[key, name] = Storage(storages[key].data[offset : offset + length])
        return views[key, name]

    data = Interpreter(BUILDERS, load_storage).load(stream)
    for key in Interpreter(BUILDERS).load(stream):
        storage = storages[key].data
        (count,) = struct.unpack("<q", stream.read(8))
        if count != storage.numel():
            raise ValueError(f"storage {key} has {count} numbers, not {storage.numel()}")
        _fill(storage, stream)
    return data


def _storage_identity(identity: Any) -> tuple[torch.dtype, str, int, Any]:
    kind, dtype, key, _device, count, *view = identity
    if kind != "storage" or not isinstance(dtype, torch.dtype):
        raise ValueError("it refers to something that is no storage")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("it refers to a storage without a proper name or length")
    return dtype, key, count, view[0] if view else None


def _fill(data: torch.Tensor, source: IO[bytes]) -> None:
    """Read a tensor's numbers from where a stream stands."""
    wanted = data.numel() * data.element_size()
    content = source.read(wanted)
    if len(content) != wanted:
        raise EOFError("it ends too early")
    if wanted:
        data.view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
