"""The depthwise convolution with SiLU as it is defined: the truth in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever PyTorch does."""


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`; gradients come from autograd."""
    before, here, after = weight.to(x.dtype).unbind(1)
    padded = F.pad(x, (0, 0, 1, 1))
    y = before * padded[:, :-2] + here * x + after * padded[:, 2:]
    return y * torch.sigmoid(y)
