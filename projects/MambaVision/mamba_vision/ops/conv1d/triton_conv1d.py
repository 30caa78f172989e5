"""The depthwise convolution with SiLU in Triton: it reads and writes (B, L, D) as it lies, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from ..triton_sums import sum_parts
from . import triton_kernels as kernels

__all__ = ["backward", "forward", "obstacle", "run"]

CHUNK = 32  # tokens of a program
STRIDE = 8  # of them whose loads are in flight together
CHANNELS = 64

obstacle = support.obstacle


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`; differentiable once."""
    return _convolution(x, weight)


def _launch(kernel, x: Tensor, *arguments) -> None:
    batch, length, width = x.shape
    grid = (batch * triton.cdiv(length, CHUNK), triton.cdiv(width, CHANNELS))
    with support.on_device_of(x):
        kernel[grid](x, *arguments, T=CHUNK, S=STRIDE, CHANNELS=CHANNELS, num_warps=1)


def forward(x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Convolve each half of ``x`` with weights of its own into an output of its own.

    Args:
        x: (B, L, halves * D).
        weights: for each of one or two halves (D, 3), contiguous.
        outputs: for each half (B, L, D); filled. They and x as
            :func:`~mamba_vision.ops.triton_support.rows` has them.
    """
    first, last = outputs[0], outputs[-1]
    if x.numel():
        _launch(
            kernels.convolve, x, weights[0], weights[-1], first, last,
            x.shape[1], first.shape[2], x.shape[2], *map(support.distance, (x, first, last)),
        )  # fmt: skip


def backward(
    x: Tensor, weights: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`, for those of the outputs.

    Returns:
        dx like x, contiguous, and the gradients of the weights below each other,
        (halves * D, 3) float32.
    """
    batch, length, width = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = x.new_empty((3, width), dtype=torch.float32)
    if not x.numel():
        return dx, dweight.zero_().t()
    parts = dweight.new_empty(batch * triton.cdiv(length, CHUNK), *dweight.shape)
    first, last = douts[0], douts[-1]
    _launch(
        kernels.convolve_back, x, weights[0], weights[-1], first, last, dx, parts,
        length, first.shape[2], width, *map(support.distance, (x, first, last, dx)),
    )  # fmt: skip
    sum_parts(parts, dweight)
    return dx, dweight.t()


def _convolution_now(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    forward(support.rows(x), [weight.contiguous()], [y])
    return y


def _convolution_fake(x, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _convolution_backward_now(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = backward(support.rows(x), [weight.contiguous()], [support.rows(dy)])
    return dx, support.copy(dweight, like=weight)


def _convolution_backward_fake(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return _convolution_backward(dy, *ctx.saved_tensors)


_convolution_backward = support.define(
    "depthwise_conv1d_silu_backward", _convolution_backward_now, _convolution_backward_fake
)
_convolution = support.define(
    "depthwise_conv1d_silu", _convolution_now, _convolution_fake, _gradients, _keep
)
