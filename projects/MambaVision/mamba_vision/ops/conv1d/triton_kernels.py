"""Triton kernels of the depthwise convolution with SiLU.

They work on one or two halves of a wide tensor side by side, (B, L, halves * D), each with weights
(D, 3) and an output of its own: the mixer's halves go different ways after their convolution.
A program takes a tile of tokens and channels; neighbouring tokens are read again, out of the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, rows, columns, inside, x_row, L):
    """Tokens of all channels of the tile; zeros outside the sequence."""
    here = ((rows >= 0) & (rows < L))[:, None] & inside
    return tl.load(x + rows[:, None] * x_row + columns, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _weights(weight, columns, inside):
    """w_0, w_1 and w_2 of (D, 3)."""
    before = tl.load(weight + columns * 3, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(weight + columns * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(weight + columns * 3 + 2, mask=inside, other=0.0).to(tl.float32)
    return before, here, after


@triton.jit
def convolve(
    x, weight_1, weight_2, y_1, y_2,
    L, D, x_batch, x_row, y_1_batch, y_1_row, y_2_batch, y_2_row,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y_1 and y_2 (B, L, D) from the halves of x."""
    blocks, tiles = tl.cdiv(D, CHANNELS), tl.cdiv(L, TOKENS)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    half = tl.program_id(1) // blocks
    weight, y, y_batch, y_row = weight_1, y_1, y_1_batch, y_1_row
    if half == 1:
        weight, y, y_batch, y_row = weight_2, y_2, y_2_batch, y_2_row
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(1) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    before, here, after = _weights(weight, columns, inside)
    x += batch * x_batch + half * D
    sums = before * _tile(x, rows - 1, columns, inside, x_row, L)
    sums += here * _tile(x, rows, columns, inside, x_row, L)
    sums += after * _tile(x, rows + 1, columns, inside, x_row, L)
    out = (sums * tl.sigmoid(sums)).to(y_1.dtype.element_ty)
    where = y + batch * y_batch + rows[:, None] * y_row + columns
    tl.store(where, out, mask=(rows < L)[:, None] & inside)


@triton.jit
def _before_silu(dy, sums):
    """The gradient with respect to the argument of SiLU."""
    s = tl.sigmoid(sums)
    return dy * s * (1.0 + sums * (1.0 - s))


@triton.jit
def convolve_back(
    x, weight_1, weight_2, dy_1, dy_2, dx, dweight,
    L, D, x_batch, x_row, dy_1_batch, dy_1_row, dy_2_batch, dy_2_row, dx_batch, dx_row,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx like x, and parts of the sums over tokens, dweight (B * tiles, halves, 3, D)."""
    blocks, tiles = tl.cdiv(D, CHANNELS), tl.cdiv(L, TOKENS)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    half = tl.program_id(1) // blocks
    weight, dy, dy_batch, dy_row = weight_1, dy_1, dy_1_batch, dy_1_row
    if half == 1:
        weight, dy, dy_batch, dy_row = weight_2, dy_2, dy_2_batch, dy_2_row
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(1) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    before, here, after = _weights(weight, columns, inside)
    x += batch * x_batch + half * D
    dy += batch * dy_batch
    x_0 = _tile(x, rows - 2, columns, inside, x_row, L)
    x_1 = _tile(x, rows - 1, columns, inside, x_row, L)
    x_2 = _tile(x, rows, columns, inside, x_row, L)
    x_3 = _tile(x, rows + 1, columns, inside, x_row, L)
    x_4 = _tile(x, rows + 2, columns, inside, x_row, L)
    left = before * x_0 + here * x_1 + after * x_2
    middle = before * x_1 + here * x_2 + after * x_3
    right = before * x_2 + here * x_3 + after * x_4
    left = _before_silu(_tile(dy, rows - 1, columns, inside, dy_row, L), left)
    middle = _before_silu(_tile(dy, rows, columns, inside, dy_row, L), middle)
    right = _before_silu(_tile(dy, rows + 1, columns, inside, dy_row, L), right)
    out = (after * left + here * middle + before * right).to(dx.dtype.element_ty)
    where = dx + batch * dx_batch + rows[:, None] * dx_row + half * D + columns
    tl.store(where, out, mask=(rows < L)[:, None] & inside)
    halves = tl.num_programs(1) // blocks
    dweight += (tl.program_id(0).to(tl.int64) * halves + half) * 3 * D
    tl.store(dweight + columns, tl.sum(middle * x_1, 0), mask=inside)
    tl.store(dweight + D + columns, tl.sum(middle * x_2, 0), mask=inside)
    tl.store(dweight + 2 * D + columns, tl.sum(middle * x_3, 0), mask=inside)
