"""The depthwise convolution with SiLU in plain PyTorch, as sums of shifted views; any device.

With three weights that beats a general convolution: it reads (B, L, D) as it lies. The backward
pass keeps the inputs only and convolves again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import without_autocast


def obstacle(*tensors: Tensor | None) -> None:
    """Runs wherever PyTorch does."""


@torch.compiler.disable  # Compiled, its work in place would lose the gradients.
def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`; differentiable once."""
    return _ShiftedSum.apply(x, weight.to(x.dtype))


def _convolve(x: Tensor, before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """before * x_(t-1) + here * x_t + after * x_(t+1); x (B, L, D), the weights (D,)."""
    y = x * here
    y[:, 1:].addcmul_(x[:, :-1], before)
    y[:, :-1].addcmul_(x[:, 1:], after)
    return y


class _ShiftedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.silu(_convolve(x, *weight.t().contiguous()), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        before, here, after = weight.t().contiguous()
        dx = dweight = None
        with without_autocast(dy.device):
            dy = torch.ops.aten.silu_backward(dy, _convolve(x, before, here, after))
            if ctx.needs_input_grad[0]:
                dx = _convolve(dy, after, here, before)
            if ctx.needs_input_grad[1]:
                products = (dy[:, 1:] * x[:, :-1], dy * x, dy[:, :-1] * x[:, 1:])
                dweight = torch.stack([product.sum((0, 1)) for product in products], dim=1)
        return dx, dweight
