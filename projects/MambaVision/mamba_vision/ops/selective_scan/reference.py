"""The selective scan as it is defined, token after token: the truth in float64, and slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever PyTorch does."""


@torch.compiler.disable  # Compiled, its loop over tokens would be unrolled.
def run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> Tensor:
    """See :func:`mamba_vision.ops.selective_scan`; gradients come from autograd."""
    dtype = u.dtype
    state_dtype = torch.promote_types(dtype, torch.float32)
    u, delta, A, B, C = (tensor.to(state_dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)

    h = u.new_zeros(u.shape[0], *A.shape)  # (B, D, N)
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * u
    return y.to(dtype)
