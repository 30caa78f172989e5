"""The residual connection and its LayerNorm by PyTorch's own operators; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever PyTorch does."""


def run(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    keep: Tensor | None = None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`mamba_vision.ops.add_layer_norm`."""
    if branch is not None:
        branch = branch if gamma is None else gamma * branch
        if keep is not None:
            branch = branch * keep.to(branch.dtype).view(-1, *[1] * (x.dim() - 1))
        x = x + branch
    exact = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(exact), bias.to(exact)
    normed = F.layer_norm(x.to(exact), weight.shape, weight, bias, eps)
    return x, normed.to(dtype)
