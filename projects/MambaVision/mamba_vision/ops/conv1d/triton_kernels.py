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
def _half(first, second, D, columns):
    """For each column of both halves the first numbers or the second."""
    return tl.where(columns < D, first, second)


@triton.jit
def _weights(weight_1, weight_2, D, columns, inside):
    """w_0, w_1 and w_2 of (D, 3)."""
    weight = _half(weight_1 + columns * 3, weight_2 + (columns - D) * 3, D, columns)
    w_0 = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    w_1 = tl.load(weight + 1, mask=inside, other=0.0).to(tl.float32)
    w_2 = tl.load(weight + 2, mask=inside, other=0.0).to(tl.float32)
    return w_0, w_1, w_2


@triton.jit
def convolve(
    x, weight_1, weight_2, y_1, y_2, L, D, WIDTH, x_row, y_1_row, y_2_row,
    T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y_1 and y_2 (B, L, D) from the halves of x (B, L, WIDTH)."""
    chunks = tl.cdiv(L, T)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * T
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < WIDTH
    w_0, w_1, w_2 = _weights(weight_1, weight_2, D, columns, inside)
    first = batch * L
    x += first * x_row + columns
    y = _half(y_1 + first * y_1_row + columns, y_2 + first * y_2_row + columns - D, D, columns)
    y_row = _half(y_1_row, y_2_row, D, columns)
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
    x, weight_1, weight_2, dy_1, dy_2, dx, dweight, L, D, WIDTH, x_row, dy_1_row, dy_2_row, dx_row,
    T: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx like x, and parts of the sums over tokens, dweight (B * chunks, 3, WIDTH)."""
    chunks = tl.cdiv(L, T)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks * T
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < WIDTH
    w_0, w_1, w_2 = _weights(weight_1, weight_2, D, columns, inside)
    first = batch * L
    x, dx = x + first * x_row + columns, dx + first * dx_row + columns
    dy = _half(dy_1 + first * dy_1_row + columns, dy_2 + first * dy_2_row + columns - D, D, columns)
    dy_row = _half(dy_1_row, dy_2_row, D, columns)
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
    dweight += tl.program_id(0).to(tl.int64) * 3 * WIDTH + columns
    tl.store(dweight, dw_0, mask=inside)
    tl.store(dweight + WIDTH, dw_1, mask=inside)
    tl.store(dweight + 2 * WIDTH, dw_2, mask=inside)
