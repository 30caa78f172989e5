"""Triton kernels of the backward pass of linear layers and MLPs.

Shape legend: M tokens, N channels, P strips of tokens. A program walks down the ``steps`` tiles of
a strip, each of ROWS tokens and COLUMNS channels, and leaves the sums over the strip's tokens.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution


@triton.jit
def _tile(step, steps, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile's numbers are in a matrix (M, N), and which of them are inside of it."""
    row = (tl.program_id(1).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * N + column, (row < M) & (column < N)


@triton.jit
def _store_part(parts, sums, N, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = parts + tl.program_id(1).to(tl.int64) * N + column
    tl.store(there, tl.sum(sums, 0), mask=column < N)


@triton.jit
def add_columns(x, parts, M, N, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """parts (P, N): sums over a strip of x (M, N)."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    step = 0
    while step < steps:
        where, inside = _tile(step, steps, M, N, ROWS, COLUMNS)
        sums += tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        step += 1
    _store_part(parts, sums, N, COLUMNS)


@triton.jit
def gelu_back(
    hidden, gradient, activated, parts, M, N, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """activated (M, N), if it is wanted: the GELU of hidden; gradient (M, N): of the GELU's result
    before, of hidden afterwards; parts (P, N): sums of that over a strip."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    step = 0
    while step < steps:
        where, inside = _tile(step, steps, M, N, ROWS, COLUMNS)
        h = tl.load(hidden + where, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(gradient + where, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.erf(h * SQRT_HALF)  # the normal distribution
        if activated is not None:
            out = (h * below).to(activated.dtype.element_ty)
            tl.store(activated + where, out, mask=inside)
        d *= below + h * DENSITY_AT_0 * tl.exp(-0.5 * h * h)
        tl.store(gradient + where, d.to(gradient.dtype.element_ty), mask=inside)
        sums += d
        step += 1
    _store_part(parts, sums, N, COLUMNS)
