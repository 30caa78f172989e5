"""The depthwise convolution with SiLU by causal-conv1d's CUDA kernel.

The kernel is causal: y_t = silu(w_0 x_(t-2) + w_1 x_(t-1) + w_2 x_t). With one more zero token at
the end, and the first output dropped, it is the 'same' convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> str | None:
    """Why the kernel cannot take such tensors; None if it can."""
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, these are on {device.type}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None


def run(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mamba_vision.ops.depthwise_conv1d_silu`."""
    padded = F.pad(x, (0, 0, 0, 1)).transpose(1, 2)  # (B, D, L + 1), channels contiguous
    if x.shape[2] % 8:
        padded = padded.contiguous()  # the kernel for contiguous channels loads eight at a time
    y = causal_conv1d_fn(padded, weight.contiguous(), activation="silu")
    # Transposed first: the gradient of the slice is then born with its channels contiguous.
    return y.transpose(1, 2)[:, 1:]
