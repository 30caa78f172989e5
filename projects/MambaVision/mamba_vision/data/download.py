"""Large files from a server: resumed where they stopped, and checked."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError

__all__ = ["download", "fault"]

ATTEMPTS = 5  # in a row, without a byte received
PAUSE = 2.0  # seconds after the first, doubled after each further one
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20  # bytes
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP errors that may not last


def download(url: str, target: Path, size: int, md5: str) -> None:
    """Download a file; what an interrupted download left is gone on with.

    Until it is complete and right, it is called ``<target>.partial``.

    Args:
        url: of the file; ``http``, ``https`` or whatever urllib opens.
        target: where to, in a folder that exists.
        size: its length in bytes.
        md5: its MD5 digest in hexadecimal digits.

    Raises:
        UserError: the server does not give the file, the connection breaks again and again, the
            disk is full, or the file is not the one expected (it is removed then).
    """
    partial = target.with_name(f"{target.name}.partial")
    failures = 0
    with _bar(target.name, size) as bar:
        while (have := _length(partial)) < size:
            bar.update(have - bar.n)
            try:
                _go_on(url, partial, have, size, bar)
                error: Exception | str = "the connection was closed"
            except urllib.error.HTTPError as caught:
                if caught.code not in PASSING:
                    raise UserError(f"{url}: {caught}; check the address") from caught
                error = caught
            except OSError as caught:
                if caught.errno == errno.ENOSPC:
                    raise UserError(
                        f"{partial}: the disk is full; free some space and run this again"
                    ) from caught
                error = caught
            except http.client.HTTPException as caught:
                error = caught
            failures = 0 if _length(partial) > have else failures + 1
            if failures == ATTEMPTS:
                raise UserError(
                    f"{url}: {error}; {_length(partial)} of {size} bytes are kept: run this again "
                    "to go on"
                )
            if failures:
                time.sleep(PAUSE * 2 ** (failures - 1))
    if reason := fault(partial, size, md5):
        partial.unlink()
        raise UserError(f"{url}: {reason}, and was removed; run this again, or check the address")
    os.replace(partial, target)


def fault(path: Path, size: int, md5: str) -> str | None:
    """Why a file is not the one expected, by its size in bytes and its MD5; ``None`` if it is."""
    found = _length(path)
    if found != size:
        return f"the file has {found} bytes instead of {size}"
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, _bar(f"checking {path.name}", size) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != md5:
        return f"the file has the MD5 {digest.hexdigest()} instead of {md5}"
    return None


def _go_on(url: str, partial: Path, have: int, size: int, bar: tqdm) -> None:
    """Append what is missing, as far as the server gives it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
        length = length or response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != size:
            raise UserError(
                f"{url}: the server's file has {length} bytes instead of {size}; check the address"
            )
        appends = response.status == 206 and have
        with partial.open("ab" if appends else "wb") as file:
            if not appends:
                bar.reset()
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                if file.tell() > size:
                    raise UserError(f"{url}: the server sends more than {size} bytes; check it")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(title: str, size: int) -> tqdm:
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, unit_divisor=1024)
