"""RoIAlign over all levels in one Triton kernel, on maps whose channels come last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from . import triton_kernels as kernels

__all__ = ["obstacle", "run"]

LEVELS = 5
COLUMNS = 4  # pixels of a row whose loads are in flight together
CHANNELS = 256


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> str | None:
    """Why the kernels cannot take such tensors; None if they can."""
    if sizes["levels"] > LEVELS:
        return f"it pools from at most {LEVELS} levels, not {sizes['levels']}"
    return support.obstacle(device, dtypes)


def run(
    *features: Tensor,
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
) -> Tensor:
    """See :func:`mamba_vision.ops.multi_level_roi_align`; differentiable once."""
    return _roi_align(features, boxes.float(), images, levels, scales, output_size)


def _launch(kernel, maps, boxes, images, levels, pooled, sizes, scales) -> None:
    """Run a kernel on maps or their gradients, (B, H, W, C) in memory, and pooled boxes
    (R, C, S, S)."""
    count, channels, side, _ = pooled.shape
    heights, widths = map(float, sizes[0::2]), map(float, sizes[1::2])

    def padded(entries):
        entries = tuple(entries)
        return entries + entries[-1:] * (LEVELS - len(entries))

    grid = (count * side * side, triton.cdiv(channels, CHANNELS))
    if count:
        with support.on_device_of(pooled):
            kernel[grid](
                padded(maps), boxes.contiguous(), images.contiguous(), levels.contiguous(), pooled,
                padded(heights), padded(widths), padded(scales), side, channels,
                COLUMNS=COLUMNS, CHANNELS=CHANNELS, num_warps=1,
            )  # fmt: skip


def _roi_align_now(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
) -> Tensor:
    pooled = _roi_align_fake(features, boxes, images, levels, scales, output_size)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in features]
    _launch(kernels.pool, maps, boxes, images, levels, pooled, _sizes(features), scales)
    return pooled


def _roi_align_fake(features, boxes, images, levels, scales, output_size):
    first = features[0]
    return torch.empty(
        (len(boxes), first.shape[1], output_size, output_size),
        dtype=first.dtype,
        device=first.device,
        memory_format=torch.channels_last,
    )


def _sizes(features: Sequence[Tensor]) -> list[int]:
    """Height and width of each level, in a row."""
    return [n for x in features for n in x.shape[2:]]


def _roi_align_backward_now(
    dpooled: Tensor,
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    sizes: Sequence[int],
    batch: int,
) -> Tensor:
    dpooled = dpooled.contiguous(memory_format=torch.channels_last)
    counts = _counts(dpooled.shape[1], sizes, batch)
    sums = dpooled.new_zeros(sum(counts), dtype=torch.float32)
    maps = sums.split(counts)
    _launch(kernels.pool_back, maps, boxes, images, levels, dpooled, sizes, scales)
    return sums.to(dpooled.dtype)


def _roi_align_backward_fake(dpooled, boxes, images, levels, scales, sizes, batch):
    return dpooled.new_empty(sum(_counts(dpooled.shape[1], sizes, batch)))


def _counts(channels: int, sizes: Sequence[int], batch: int) -> list[int]:
    """How many numbers the map of each level holds."""
    return [batch * channels * h * w for h, w in zip(sizes[0::2], sizes[1::2])]


def _maps(numbers: Tensor, channels: int, sizes: Sequence[int], batch: int) -> list[Tensor]:
    """The levels' maps (B, C, H, W), channels last, that lie one after the other."""
    parts = numbers.split(_counts(channels, sizes, batch))
    shapes = [(batch, *size, channels) for size in zip(sizes[0::2], sizes[1::2])]
    return [part.view(shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes)]


def _keep(ctx, inputs, output) -> None:
    features, boxes, images, levels, scales, _ = inputs
    ctx.save_for_backward(boxes, images, levels)
    ctx.scales, ctx.sizes, ctx.batch = scales, _sizes(features), len(features[0])


def _gradients(ctx, dpooled):
    numbers = _roi_align_backward(dpooled, *ctx.saved_tensors, ctx.scales, ctx.sizes, ctx.batch)
    dfeatures = _maps(numbers, dpooled.shape[1], ctx.sizes, ctx.batch)
    return dfeatures, None, None, None, None, None


_roi_align_backward = support.define(
    "multi_level_roi_align_backward", _roi_align_backward_now, _roi_align_backward_fake
)
_roi_align = support.define(
    "multi_level_roi_align", _roi_align_now, _roi_align_fake, _gradients, _keep
)
