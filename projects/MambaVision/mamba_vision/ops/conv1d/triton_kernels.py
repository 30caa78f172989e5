"""Triton kernels of the depthwise convolution with SiLU.

They work on one or two halves of a wide tensor side by side, (B, L, halves * D), each with weights
(D, 3) and an output of its own: the mixer's halves go different ways after their convolution. A
program walks T tokens of a block of channels with the neighbouring tokens in registers, so that
each number is read once. Rows follow each other at a constant distance, image after image.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointers, t, stride, L, inside):
    """Token t; zeros outside the sequence."""
    here = inside & (t >= 0) & (t < L)
    return tl.load(pointers + t * stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _weight(weight, i: tl.constexpr, columns, inside):
    """w_i of (D, 3)."""
    return tl.load(weight + columns * 3 + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    x, weight_1, weight_2, y_1, y_2, L, D, x_row, y_1_row, y_2_row,
    T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y_1 and y_2 (B, L, D) from the halves of x."""
    blocks, chunks = tl.cdiv(D, CHANNELS), tl.cdiv(L, T)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * T
    half = tl.program_id(1) // blocks
    weight, y, y_row = weight_1, y_1, y_1_row
    if half == 1:
        weight, y, y_row = weight_2, y_2, y_2_row
    columns = (tl.program_id(1) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    w_0, w_1 = _weight(weight, 0, columns, inside), _weight(weight, 1, columns, inside)
    w_2 = _weight(weight, 2, columns, inside)
    x += batch * L * x_row + half * D + columns
    y += batch * L * y_row + columns
    before, here = _load(x, start - 1, x_row, L, inside), _load(x, start, x_row, L, inside)
    for s in range(T // S):
        for i in tl.static_range(S):
            t = start + s * S + i
            after = _load(x, t + 1, x_row, L, inside)
            sums = w_0 * before + w_1 * here + w_2 * after
            out = (sums * tl.sigmoid(sums)).to(y_1.dtype.element_ty)
            tl.store(y + t * y_row, out, mask=inside & (t < L))
            before, here = here, after


@triton.jit
def _before_silu(dy, sums):
    """The gradient with respect to the argument of SiLU."""
    s = tl.sigmoid(sums)
    return dy * s * (1.0 + sums * (1.0 - s))


@triton.jit
def convolve_back(
    x, weight_1, weight_2, dy_1, dy_2, dx, dweight, L, D, x_row, dy_1_row, dy_2_row, dx_row,
    T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx like x, and parts of the sums over tokens, dweight (B * chunks, halves, 3, D)."""
    blocks, chunks = tl.cdiv(D, CHANNELS), tl.cdiv(L, T)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * T
    half = tl.program_id(1) // blocks
    weight, dy, dy_row = weight_1, dy_1, dy_1_row
    if half == 1:
        weight, dy, dy_row = weight_2, dy_2, dy_2_row
    columns = (tl.program_id(1) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < D
    w_0, w_1 = _weight(weight, 0, columns, inside), _weight(weight, 1, columns, inside)
    w_2 = _weight(weight, 2, columns, inside)
    x += batch * L * x_row + half * D + columns
    dx += batch * L * dx_row + half * D + columns
    dy += batch * L * dy_row + columns
    x_0, x_1 = _load(x, start - 2, x_row, L, inside), _load(x, start - 1, x_row, L, inside)
    x_2, x_3 = _load(x, start, x_row, L, inside), _load(x, start + 1, x_row, L, inside)
    dy_t = _load(dy, start - 1, dy_row, L, inside)
    left = _before_silu(dy_t, w_0 * x_0 + w_1 * x_1 + w_2 * x_2)
    dy_t = _load(dy, start, dy_row, L, inside)
    middle = _before_silu(dy_t, w_0 * x_1 + w_1 * x_2 + w_2 * x_3)
    dw_0 = tl.zeros(columns.shape, tl.float32)
    dw_1, dw_2 = dw_0, dw_0
    for s in range(T // S):
        for i in tl.static_range(S):
            t = start + s * S + i
            x_4 = _load(x, t + 2, x_row, L, inside)
            dy_t = _load(dy, t + 1, dy_row, L, inside)
            right = _before_silu(dy_t, w_0 * x_2 + w_1 * x_3 + w_2 * x_4)
            out = (w_2 * left + w_1 * middle + w_0 * right).to(dx.dtype.element_ty)
            tl.store(dx + t * dx_row, out, mask=inside & (t < L))
            dw_0 += middle * x_1
            dw_1 += middle * x_2
            dw_2 += middle * x_3
            x_1, x_2, x_3 = x_2, x_3, x_4
            left, middle = middle, right
    halves = tl.num_programs(1) // blocks
    dweight += (tl.program_id(0).to(tl.int64) * halves + half) * 3 * D + columns
    tl.store(dweight, dw_0, mask=inside)
    tl.store(dweight + D, dw_1, mask=inside)
    tl.store(dweight + 2 * D, dw_2, mask=inside)
