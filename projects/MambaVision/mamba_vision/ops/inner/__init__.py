"""What the mixer does between its two projections (arXiv:2407.08083, section 3.2, equation 6):

    x, z = halves of xz
    x, z = silu(conv(x)), silu(conv(z))
    dt, B, C = split(W_x x)
    y = scan(x, delta = softplus(W_dt dt + b + b), A, B, C, D)
    result = [y, z]

The bias of the step size enters twice: the released weights were trained so. The second half does
not gate the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import without_autocast
from ..conv1d import BACKENDS as CONV_BACKENDS
from ..conv1d import depthwise_conv1d_silu
from ..selective_scan import BACKENDS as SCAN_BACKENDS
from ..selective_scan import selective_scan

__all__ = ["mamba_inner"]


def mamba_inner(
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    scan_backend: str | None = None,
    conv_backend: str | None = None,
) -> Tensor:
    """Convolve both halves of the channels, and scan the first.

    Differentiable in every tensor. If both operators fall to Triton they run as one, in which
    nothing is concatenated or transposed; else they are composed. Under autocast the projections
    are computed in its dtype.

    Args:
        xz: (B, L, 2 D) floating point.
        conv_x, conv_z: (D, 3), the weights of the halves' convolutions.
        x_proj: (R + 2 N, D), from the first half to the step's R numbers, B and C.
        dt_proj: (D, R), from those R numbers to the step sizes.
        dt_bias: (D,)
        A: (D, N) real decay rates.
        D: (D,) weight of the scan's path past the state.
        scan_backend, conv_backend: as for :func:`~mamba_vision.ops.selective_scan` and
            :func:`~mamba_vision.ops.depthwise_conv1d_silu`.

    Returns:
        (B, L, 2 D): the scanned half, then the other.

    Raises:
        UserError: a backend asked for cannot be used.
    """
    tensors = (xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D)
    scan = SCAN_BACKENDS.name_for(scan_backend, xz, A, D, dt_bias, states=A.shape[1])
    conv = CONV_BACKENDS.name_for(conv_backend, xz, conv_x)
    if scan == conv == "triton":
        from . import triton_inner

        with without_autocast(xz.device):
            return triton_inner.run(*tensors)

    x, z = (
        depthwise_conv1d_silu(half, weight, backend=conv)
        for half, weight in zip(xz.chunk(2, dim=-1), (conv_x, conv_z))
    )
    states = A.shape[1]
    dt, B, C = F.linear(x, x_proj).split([dt_proj.shape[1], states, states], dim=-1)
    delta = F.linear(dt, dt_proj, dt_bias)
    y = selective_scan(x, delta, A, B, C, D, dt_bias, delta_softplus=True, backend=scan)
    return torch.cat((y, z), dim=-1)
