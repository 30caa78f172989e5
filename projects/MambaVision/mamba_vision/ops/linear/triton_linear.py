"""Either as one operator: PyTorch's matrix products, and Triton's kernels in the backward pass.

A bias's gradient, the sum of the result's over the tokens, comes from a kernel of its own, as
PyTorch's reduction is slow in half precision.

Of an MLP are kept for the backward pass x and the hidden numbers before the GELU. One kernel reads
these and the gradient, and makes the numbers after the GELU once more, the gradient before it, and
the sums of that, bias_1's gradient. Sums run in a fixed order, without atomics: equal inputs give
equal results. M is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import triton_support as support
from ..backends import without_autocast
from ..triton_sums import sum_parts
from . import torch_linear
from . import triton_kernels as kernels

__all__ = ["obstacle", "run"]

ROWS, COLUMNS = 4, 128  # tokens and channels that a program holds at a time
PROGRAMS = 2048  # about; several fit on a multiprocessor

obstacle = support.obstacle


def run(x: Tensor, weight: Tensor, bias: Tensor, *second: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.linear`; with a second layer :func:`mamba_vision.ops.mlp`.

    Differentiable once.
    """
    if not torch.is_grad_enabled():  # nothing is kept, not even for a moment
        return torch_linear.run(x, weight, bias, *second)
    if second:
        return _mlp(x, weight, bias, *second)[0]
    return _linear(x, weight, bias)


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (M, C)."""
    return x.reshape(-1, x.shape[-1])


def _sum_columns(kernel, *matrices: Tensor | None) -> Tensor:
    """Launch a kernel on matrices (M, N), and add the sums that its programs leave: (N,)."""
    first = matrices[0]
    assert first is not None
    tokens, channels = first.shape
    blocks, tiles = triton.cdiv(channels, COLUMNS), triton.cdiv(tokens, ROWS)
    steps = max(1, triton.cdiv(blocks * tiles, PROGRAMS))
    strips = max(1, triton.cdiv(tiles, steps))  # one without tokens leaves zeros
    parts = first.new_empty(strips, channels, dtype=torch.float32)
    with support.on_device_of(first):
        kernel[(blocks, strips)](
            *matrices, parts, tokens, channels, steps, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    sums = first.new_empty(channels)
    sum_parts(parts, sums[None])
    return sums


def _multiply_back(
    dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx (..., C) and dweight (O, C) from dy (M, O); nothing for those not asked for."""
    dweight = dy.t() @ _rows(x) if of_weight else x.new_empty(0)
    dx = (dy @ weight).view(x.shape) if of_x else x.new_empty(0)
    return dx, dweight


def _gradients_fake(asked, x, *weights):
    shapes = [x.shape]
    for weight in weights:
        shapes += [weight.shape, weight.shape[:1]]
    return tuple(x.new_empty(shape if one else (0,)) for shape, one in zip(shapes, asked))


def _gradients_by(backward: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd calls for the gradients of all inputs."""

    def gradients(ctx, dy, *_):
        if dy is None:
            return (None,) * len(ctx.asked)
        with without_autocast(dy.device):
            found = backward(dy, *ctx.saved_tensors, ctx.asked)
        return tuple(g if one else None for g, one in zip(found, ctx.asked))

    return gradients


def _keep(ctx, inputs, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.asked = [t.requires_grad for t in inputs]
    ctx.set_materialize_grads(False)


def _linear_now(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = _linear_fake(x, weight, bias)
    torch.addmm(bias, _rows(x), weight.t(), out=_rows(y))
    return y


def _linear_fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def _linear_backward_now(
    dy: Tensor, x: Tensor, weight: Tensor, asked: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three inputs, in their order; nothing for those not asked for."""
    of_x, of_weight, of_bias = asked
    dy = _rows(dy).contiguous()
    dbias = _sum_columns(kernels.add_columns, dy) if of_bias else x.new_empty(0)
    return *_multiply_back(dy, x, weight, of_x, of_weight), dbias


def _linear_backward_fake(dy, x, weight, asked):
    return _gradients_fake(asked, x, weight)


def _keep_linear(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    _keep(ctx, inputs, x, weight)


def _mlp_now(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> tuple[Tensor, Tensor]:
    """The result (..., O), and the hidden numbers before the GELU (M, H)."""
    y = x.new_empty(*x.shape[:-1], len(weight_2))
    hidden = torch.addmm(bias_1, _rows(x), weight_1.t())
    torch.addmm(bias_2, F.gelu(hidden), weight_2.t(), out=_rows(y))
    return y, hidden


def _mlp_fake(x, weight_1, bias_1, weight_2, bias_2):
    tokens = _rows(x).shape[0]
    return x.new_empty(*x.shape[:-1], len(weight_2)), x.new_empty(tokens, len(weight_1))


def _mlp_backward_now(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight_1: Tensor,
    weight_2: Tensor,
    asked: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the five inputs, in their order; nothing for those not asked for."""
    of_x, of_weight_1, of_bias_1, of_weight_2, of_bias_2 = asked
    dbias_1, dweight_2, dbias_2 = (x.new_empty(0) for _ in range(3))
    dy = _rows(dy).contiguous()
    if of_bias_2:
        dbias_2 = _sum_columns(kernels.add_columns, dy)
    gradient = dy @ weight_2
    activated = torch.empty_like(hidden) if of_weight_2 else None
    sums = _sum_columns(kernels.gelu_back, hidden, gradient, activated)
    if of_bias_1:
        dbias_1 = sums
    if activated is not None:
        dweight_2 = dy.t() @ activated
        del activated  # the other gradients can have its place
    dx, dweight_1 = _multiply_back(gradient, x, weight_1, of_x, of_weight_1)
    return dx, dweight_1, dbias_1, dweight_2, dbias_2


def _mlp_backward_fake(dy, x, hidden, weight_1, weight_2, asked):
    return _gradients_fake(asked, x, weight_1, weight_2)


def _keep_mlp(ctx, inputs, output) -> None:
    x, weight_1, _, weight_2, _ = inputs
    _, hidden = output
    _keep(ctx, inputs, x, hidden, weight_1, weight_2)
    ctx.mark_non_differentiable(hidden)


_linear_backward = support.define("linear_backward", _linear_backward_now, _linear_backward_fake)
_linear = support.define(
    "linear", _linear_now, _linear_fake, _gradients_by(_linear_backward), _keep_linear
)
_mlp_backward = support.define("mlp_backward", _mlp_backward_now, _mlp_backward_fake)
_mlp = support.define("mlp", _mlp_now, _mlp_fake, _gradients_by(_mlp_backward), _keep_mlp)
