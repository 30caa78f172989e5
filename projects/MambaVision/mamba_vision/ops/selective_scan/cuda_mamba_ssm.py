"""The selective scan by mamba-ssm's compiled CUDA extension (arXiv:2312.00752, section 3.3).

The extension alone is imported: the package around it pulls in language models and more. It works
in (B, D, L) layout, one CUDA block per image and channel, and wants sequences contiguous along L;
the transposes to it and back are made here.
"""

from __future__ import annotations

from typing import Any

import selective_scan_cuda
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_STATE = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], *, states: int) -> str | None:
    """Why the extension cannot take such tensors; None if it can."""
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, these are on {device.type}"
    if dtypes[0] not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtypes[0]}"
    if states > MAX_STATE:
        return f"it holds at most {MAX_STATE} state numbers per channel, not {states}"
    return None


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
    """See :func:`mamba_vision.ops.selective_scan`; differentiable once."""
    dtype = u.dtype
    widest = dtype  # the kernel takes one dtype for all four; the widest loses nothing
    for tensor in (delta, B, C):
        widest = torch.promote_types(widest, tensor.dtype)
    u, delta, B, C = (x.to(widest).transpose(1, 2).contiguous() for x in (u, delta, B, C))
    A = A.float().contiguous()
    D = None if D is None else D.float().contiguous()
    delta_bias = None if delta_bias is None else delta_bias.float().contiguous()
    y = _ExtensionScan.apply(u, delta, A, B[:, None], C[:, None], D, delta_bias, delta_softplus)
    return y.transpose(1, 2).to(dtype)


class _ExtensionScan(torch.autograd.Function):
    """u, delta (B, D, L); B, C (B, 1, N, L), the 1 a single group of channels; out (B, D, L)."""

    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, delta_bias, delta_softplus: bool) -> Tensor:
        # The None stands for the gate z, which MambaVision does not have.
        out, states, *_ = selective_scan_cuda.fwd(
            u, delta, A, B, C, D, None, delta_bias, delta_softplus
        )
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        ctx.delta_softplus = delta_softplus
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        # The Nones: the gate z, the output before the gate, and room for the gate's gradient.
        du, ddelta, dA, dB, dC, dD, dbias, *_ = selective_scan_cuda.bwd(
            *(u, delta, A, B, C, D, None, delta_bias, dout.contiguous(), states),
            *(None, None, ctx.delta_softplus, False),
        )
        dD, dbias = (dD if D is not None else None), (dbias if delta_bias is not None else None)
        return du, ddelta, dA, dB, dC, dD, dbias, None
