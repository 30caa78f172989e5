"""The depthwise convolution with SiLU in Triton: it reads and writes (B, L, D) as it lies, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from . import triton_kernels as kernels

__all__ = ["backward", "forward", "obstacle", "run"]

TOKENS, CHANNELS = 32, 32  # of a tile
WARPS = 4

obstacle = support.obstacle


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`; differentiable once."""
    return _convolution(x, weight)


def _grid(batch: int, length: int, width: int, halves: int) -> tuple[int, int]:
    return batch * triton.cdiv(length, TOKENS), halves * triton.cdiv(width, CHANNELS)


def forward(x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Convolve each half of ``x`` with weights of its own into an output of its own.

    Args:
        x: (B, L, halves * D), rows of adjacent numbers.
        weights: for each of one or two halves (D, 3), contiguous.
        outputs: for each half (B, L, D), rows of adjacent numbers; filled.
    """
    batch, length, width = outputs[0].shape
    first, last = outputs[0], outputs[-1]
    if not first.numel():
        return
    with support.on_device_of(x):
        kernels.convolve[_grid(batch, length, width, len(outputs))](
            x, weights[0], weights[-1], first, last,
            length, width, *x.stride()[:2], *first.stride()[:2], *last.stride()[:2],
            TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip


def backward(
    x: Tensor, weights: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`, for those of the outputs.

    Returns:
        dx like x, contiguous, and the gradients of the weights, (halves, D, 3) float32.
    """
    batch, length, width = douts[0].shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = _grid(batch, length, width, len(douts))
    dweight = x.new_empty((grid[0], len(douts), 3, width), dtype=torch.float32)
    if x.numel():
        with support.on_device_of(x):
            kernels.convolve_back[grid](
                x, weights[0], weights[-1], douts[0], douts[-1], dx, dweight, length, width,
                *(n for t in (x, douts[0], douts[-1], dx) for n in t.stride()[:2]),
                TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
    return dx, dweight.sum(0).transpose(1, 2)


@torch.library.custom_op("mamba_vision::depthwise_conv1d_silu", mutates_args=())
def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    forward(support.rows(x), [weight.contiguous()], [y])
    return y


@_convolution.register_fake
def _(x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("mamba_vision::depthwise_conv1d_silu_backward", mutates_args=())
def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = backward(support.rows(x), [weight.contiguous()], [support.rows(dy)])
    return dx, support.copy(dweight[0], like=weight)


@_convolution_backward.register_fake
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return _convolution_backward(dy, *ctx.saved_tensors)


_convolution.register_autograd(_gradients, setup_context=_keep)
