"""The depthwise convolution with SiLU by PyTorch's own convolution; any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def obstacle(*tensors: Tensor | None) -> None:
    """Runs wherever PyTorch does."""


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`."""
    kernel = weight.to(x.dtype).unsqueeze(1)
    y = F.conv1d(x.transpose(1, 2), kernel, padding=1, groups=x.shape[2])
    return F.silu(y).transpose(1, 2)
