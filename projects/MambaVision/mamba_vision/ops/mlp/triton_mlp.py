"""The MLP as one operator: PyTorch's matrix products, and Triton's kernels in the backward pass.

Kept for the backward pass are x and the hidden numbers before the GELU. One kernel reads these
and the gradient, and makes the numbers after the GELU once more, the gradient before it, and the
sums of that, bias_1's gradient. Sums run in a fixed order, without atomics: equal inputs give equal
results. M is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import triton_support as support
from ..backends import without_autocast
from ..triton_sums import sum_parts
from . import torch_mlp
from . import triton_kernels as kernels

__all__ = ["obstacle", "run"]

ROWS, COLUMNS = 4, 128  # tokens and channels that a program holds at a time
PROGRAMS = 2048  # about; several fit on a multiprocessor

obstacle = support.obstacle


def run(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.mlp`; differentiable once."""
    if not torch.is_grad_enabled():  # nothing is kept, not even for a moment
        return torch_mlp.run(x, weight_1, bias_1, weight_2, bias_2)
    return _mlp(x, weight_1, bias_1, weight_2, bias_2)[0]


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


def _forward_now(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> tuple[Tensor, Tensor]:
    """The result (..., O), and the hidden numbers before the GELU (M, H)."""
    y = x.new_empty(*x.shape[:-1], len(weight_2))
    hidden = torch.addmm(bias_1, _rows(x), weight_1.t())
    torch.addmm(bias_2, F.gelu(hidden), weight_2.t(), out=_rows(y))
    return y, hidden


def _forward_fake(x, weight_1, bias_1, weight_2, bias_2):
    tokens = _rows(x).shape[0]
    return x.new_empty(*x.shape[:-1], len(weight_2)), x.new_empty(tokens, len(weight_1))


def _backward_now(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight_1: Tensor,
    weight_2: Tensor,
    asked: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the five inputs, in their order; nothing for those not asked for."""
    of_x, of_weight_1, of_bias_1, of_weight_2, of_bias_2 = asked
    dx, dweight_1, dbias_1, dweight_2, dbias_2 = (x.new_empty(0) for _ in asked)
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
    if of_weight_1:
        dweight_1 = gradient.t() @ _rows(x)
    if of_x:
        dx = (gradient @ weight_1).view(x.shape)
    return dx, dweight_1, dbias_1, dweight_2, dbias_2


def _backward_fake(dy, x, hidden, weight_1, weight_2, asked):
    shapes = (x.shape, weight_1.shape, weight_1.shape[:1], weight_2.shape, weight_2.shape[:1])
    return tuple(x.new_empty(shape if one else (0,)) for shape, one in zip(shapes, asked))


def _keep(ctx, inputs, output) -> None:
    x, weight_1, _, weight_2, _ = inputs
    _, hidden = output
    ctx.save_for_backward(x, hidden, weight_1, weight_2)
    ctx.asked = [t.requires_grad for t in inputs]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    with without_autocast(dy.device):
        gradients = _backward(dy, *ctx.saved_tensors, ctx.asked)
    return tuple(g if one else None for g, one in zip(gradients, ctx.asked))


_backward = support.define("mlp_backward", _backward_now, _backward_fake)
_mlp = support.define("mlp", _forward_now, _forward_fake, _gradients, _keep)
