"""Cutting a feature map into windows, and putting it back together.

Shape legend: B images, C channels, H x W the map's rows and columns, h x w a window's,
n windows per image (row by row), L = h * w tokens per window.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["PADDINGS", "crop_windows", "cut_windows", "join_windows", "window_shape"]

PADDINGS = ("full", "fit")


def window_shape(height: int, width: int, window: int, padding: str) -> tuple[int, int]:
    """Rows and columns of the windows that a ``height`` x ``width`` map is cut into.

    Args:
        height, width: the map's size, in tokens.
        window: the nominal side of a window, in tokens.
        padding: ``"full"``: every window is ``window`` x ``window``, as the released weights were
            trained. ``"fit"``: as many windows along each axis, ``ceil(side / window)``, but each
            only as long as covering the map needs.

    Returns:
        ``(h, w)``, each at most ``window``.
    """
    if padding == "full":
        return window, window
    rows, columns = (-(-side // -(-side // window)) for side in (height, width))
    return rows, columns


def cut_windows(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zero-pad a map at the right and the bottom to whole windows, and cut it.

    Args:
        x: (B, C, H, W), any memory format; ``channels_last`` spares a copy.
        shape: ``(h, w)`` of a window.

    Returns:
        (B * n, L, C), contiguous; images in turn, windows row by row, tokens row by row.
    """
    h, w = shape
    x = x.permute(0, 2, 3, 1)
    below, right = -x.shape[1] % h, -x.shape[2] % w
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2).contiguous()


def crop_windows(windows: Tensor, shape: tuple[int, int], part: tuple[int, int]) -> Tensor:
    """Keep the first rows and columns of every window.

    Args:
        windows: (B * n, L, C).
        shape: ``(h, w)`` of a window.
        part: rows and columns to keep, ``(h', w')``.

    Returns:
        (B * n, h' * w', C), contiguous: a map's windows of shape ``part``, if that covers it.
    """
    rows, columns = part
    return windows.unflatten(1, shape)[:, :rows, :columns].flatten(1, 2).contiguous()


def join_windows(windows: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo :func:`cut_windows`: put the windows back in place and drop the padding.

    Args:
        windows: (B * n, L, C).
        shape: ``(h, w)`` of a window.
        size: ``(H, W)`` of the map.

    Returns:
        (B, C, H, W), dense in the ``channels_last`` memory format.
    """
    (h, w), (height, width) = shape, size
    rows, columns = -(-height // h), -(-width // w)
    x = windows.unflatten(1, (h, w)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width].contiguous().permute(0, 3, 1, 2)
