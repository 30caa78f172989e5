"""Sums over the parts that the programs of a kernel leave, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import triton_support as support

__all__ = ["sum_parts"]


@triton.jit
def _sum(
    parts, out, rows, columns, width, out_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = places < columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = 0
    while first < rows:
        row = (first + tl.arange(0, ROWS))[:, None]
        there = parts + row.to(tl.int64) * columns + places
        sums += tl.load(there, mask=(row < rows) & inside, other=0.0)
        first += ROWS
    to = out + (places // width).to(tl.int64) * out_row + places % width
    tl.store(to, tl.sum(sums, 0).to(out.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Write the sum over the first axis.

    Args:
        parts: (P, ...) float32, contiguous.
        out: (M, W) with M W numbers as there are in a part, rows of adjacent numbers; filled.
    """
    count = len(parts)
    columns = out.numel()
    few = count <= 16
    block = 128 if few else 16
    with support.on_device_of(parts):
        _sum[(triton.cdiv(columns, block),)](
            parts, out, count, columns, out.shape[1], out.stride(0),
            ROWS=8 if few else 256, COLUMNS=block, num_warps=4 if few else 8,
        )  # fmt: skip
