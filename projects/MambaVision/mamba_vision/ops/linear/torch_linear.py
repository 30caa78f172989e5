"""Linear layers and MLPs by PyTorch's own operators; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever PyTorch does."""


def run(x: Tensor, weight: Tensor, bias: Tensor, *second: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.linear`; with a second layer :func:`mamba_vision.ops.mlp`."""
    y = F.linear(x, weight, bias)
    return F.linear(F.gelu(y), *second) if second else y
