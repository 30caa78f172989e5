"""Triton kernels of RoIAlign over the levels of a pyramid.

A program has one bin of a box and a block of channels. The weight of a pixel in a bin is a product
of one number for its row and one for its column, so that each pixel is met once, however many
samples share it. Maps and pooled boxes have their channels last, without gaps.

Heights and widths come as floats: of integers in a tuple Triton would compile their divisors in.
"""

import triton
import triton.language as tl


@triton.jit
def _of_level(level, values):
    """The entry of one level."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(level == i, values[i], chosen)
    return chosen


@triton.jit
def _samples(start, end, scale, place, S):
    """The first sample of a bin on one axis, the step to the next, and how many there are."""
    start = start * scale - 0.5
    length = tl.div_rn(end * scale - 0.5 - start, S.to(tl.float32))
    count = tl.maximum(tl.ceil(length).to(tl.int32), 0)
    step = length / tl.maximum(count, 1)
    return start + place * length + 0.5 * step, step, count


@triton.jit
def _pixels(first, step, count, size):
    """The range of pixels that such samples lie between."""
    last = first + (count - 1) * step
    low = tl.minimum(tl.maximum(first, 0.0), size - 1.0).to(tl.int32)
    high = tl.minimum(tl.maximum(last, 0.0), size - 1.0).to(tl.int32)
    return low, tl.minimum(high + 2, size)


@triton.jit
def _weights(pixels, first, step, count, size):
    """The mean of each pixel's weights in the samples' linear interpolations."""
    pixels = pixels.to(tl.float32)
    sums = pixels * 0.0
    i = 0
    while i < count:
        place = first + i * step
        inside = (place >= -1.0) & (place <= size)
        place = tl.minimum(tl.maximum(place, 0.0), size - 1.0)
        sums += tl.where(inside, tl.maximum(1.0 - tl.abs(pixels - place), 0.0), 0.0)
        i += 1
    return sums / tl.maximum(count, 1)


@triton.jit
def _work(boxes, images, levels, heights, widths, scales, S):
    """What a program works on: level, image, size of the map, samples down and across."""
    roi, place = tl.program_id(0) // (S * S), tl.program_id(0) % (S * S)
    level = tl.load(levels + roi)
    image = tl.load(images + roi).to(tl.int64)
    H, W = _of_level(level, heights).to(tl.int32), _of_level(level, widths).to(tl.int32)
    scale = _of_level(level, scales)
    x_0, y_0 = tl.load(boxes + roi * 4), tl.load(boxes + roi * 4 + 1)
    x_1, y_1 = tl.load(boxes + roi * 4 + 2), tl.load(boxes + roi * 4 + 3)
    down = _samples(y_0, y_1, scale, place // S, S)
    across = _samples(x_0, x_1, scale, place % S, S)
    return level, image, H, W, down, across


@triton.jit(do_not_specialize=["S"])
def pool(
    features, boxes, images, levels, out, heights, widths, scales, S, C,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out (R, S, S, C) from the levels' features (B, H, W, C)."""
    level, image, H, W, down, across = _work(boxes, images, levels, heights, widths, scales, S)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pixels = _of_level(level, features) + image * H * W * C + channels
    top, bottom = _pixels(down[0], down[1], down[2], H)
    left, right = _pixels(across[0], across[1], across[2], W)
    sums = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    column = left
    while column < right:
        columns = column + tl.arange(0, COLUMNS)[:, None]
        of_columns = _weights(columns, across[0], across[1], across[2], W)
        row = top
        while row < bottom:
            weights = _weights(row, down[0], down[1], down[2], H) * of_columns
            there = (weights > 0) & (channels < C)
            sums += weights * tl.load(pixels + (row * W + columns) * C, mask=there, other=0.0)
            row += 1
        column += COLUMNS
    out += tl.program_id(0).to(tl.int64) * C + channels
    tl.store(out, tl.sum(sums, 0)[None, :].to(out.dtype.element_ty), mask=channels < C)


@triton.jit(do_not_specialize=["S"])
def pool_back(
    dfeatures, boxes, images, levels, dout, heights, widths, scales, S, C,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add to the levels' dfeatures (B, H, W, C) float32, for dout (R, S, S, C)."""
    level, image, H, W, down, across = _work(boxes, images, levels, heights, widths, scales, S)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pixels = _of_level(level, dfeatures) + image * H * W * C + channels
    top, bottom = _pixels(down[0], down[1], down[2], H)
    left, right = _pixels(across[0], across[1], across[2], W)
    dout += tl.program_id(0).to(tl.int64) * C + channels
    gradient = tl.load(dout, mask=channels < C, other=0.0).to(tl.float32)
    column = left
    while column < right:
        columns = column + tl.arange(0, COLUMNS)[:, None]
        of_columns = _weights(columns, across[0], across[1], across[2], W)
        row = top
        while row < bottom:
            weights = _weights(row, down[0], down[1], down[2], H) * of_columns
            there = (weights > 0) & (channels < C)
            to = pixels + (row * W + columns) * C
            tl.atomic_add(to, weights * gradient, mask=there, sem="relaxed")
            row += 1
        column += COLUMNS
