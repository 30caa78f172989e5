"""The inside of the mixer as one operator: Triton's kernels around two small matrix products.

The scanned half is written beside the other one, where the projection that follows wants it.
Kept for the backward pass: xz, the first half convolved, the projections' results and the scan's
chunk states. M is B L, all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_support as support
from ..backends import without_autocast
from ..conv1d import triton_conv1d as conv
from ..selective_scan import triton_scan as scan

__all__ = ["run"]


def run(
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> Tensor:
    """See :func:`mamba_vision.ops.mamba_inner`; differentiable once."""
    return _inner(xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D)[0]


def _aligned(x: Tensor, columns: int) -> Tensor:
    """An empty (M, columns) for the tokens of ``x`` whose rows begin at multiples of 16 bytes."""
    return x.new_empty(x.shape[0] * x.shape[1], -(-columns // 8) * 8)[:, :columns]


def _split(projected: Tensor, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, R + 2 N) -> dt (M, R), B and C (B, L, N), all of them views."""
    states = A.shape[1]
    rank = projected.shape[1] - 2 * states
    tokens = projected.unflatten(0, x.shape[:2])
    return projected[:, :rank], tokens[..., rank : rank + states], tokens[..., rank + states :]


def _inner_now(
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result (B, L, 2 D), and what the backward pass needs: x (B, L, D), W_x x (M, R + 2 N),
    delta (B, L, D) without its bias, the scan's chunk states."""
    xz, half = support.rows(xz), xz.shape[-1] // 2
    out, x = xz.new_empty(xz.shape), xz.new_empty(*xz.shape[:2], half)
    conv.forward(xz, [conv_x.contiguous(), conv_z.contiguous()], [x, out[..., half:]])
    projected = _aligned(x, len(x_proj))
    torch.mm(x.flatten(0, 1), x_proj.to(x.dtype).t(), out=projected)
    dt, B, C = _split(projected, x, A)
    delta = torch.mm(dt, dt_proj.to(x.dtype).t()).view_as(x)
    bias = 2 * dt_bias.float()
    y = out[..., :half]
    starts = scan.forward(x, delta, A.contiguous(), B, C, D.contiguous(), bias, True, y)
    return out, x, projected, delta, starts


def _inner_fake(xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D):
    x = xz.new_empty(*xz.shape[:2], xz.shape[-1] // 2)
    starts = scan.chunk_states(x, A)
    return xz.new_empty(xz.shape), x, _aligned(x, len(x_proj)), torch.empty_like(x), starts


def _inner_backward_now(
    dout: Tensor,
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    x: Tensor,
    projected: Tensor,
    delta: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the eight inputs, in their order."""
    xz, dout, half, states = support.rows(xz), support.rows(dout), x.shape[-1], A.shape[1]
    dt, B, C = _split(projected, x, A)
    dprojected = _aligned(x, len(x_proj))
    ddt, dBC = dprojected.split([dt.shape[1], 2 * states], dim=1)
    dx, ddelta, dweights = scan.backward(
        x, delta, A.contiguous(), B, C, D.contiguous(), 2 * dt_bias.float(), True,
        starts, dout[..., :half], dBC,
    )  # fmt: skip
    tokens, ddelta = x.flatten(0, 1), ddelta.flatten(0, 1)
    torch.mm(ddelta, dt_proj.to(x.dtype), out=ddt)
    ddt_proj = (ddelta.t() @ dt).to(dt_proj.dtype)
    del ddelta  # the convolution's gradient can have its place
    dx.flatten(0, 1).addmm_(dprojected, x_proj.to(x.dtype))
    weights = [conv_x.contiguous(), conv_z.contiguous()]
    dxz, dconv = conv.backward(xz, weights, [dx, dout[..., half:]])
    return (
        dxz,
        support.copy(dconv[:half], like=conv_x),
        support.copy(dconv[half:], like=conv_z),
        (dprojected.t() @ tokens).to(x_proj.dtype),
        ddt_proj,
        (2 * dweights[states + 1]).to(dt_bias.dtype),
        support.copy(dweights[:states].t(), like=A),
        support.copy(dweights[states], like=D),
    )


def _inner_backward_fake(
    dout, xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D, x, projected, delta, starts
):
    inputs = (xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D)
    return tuple(t.new_empty(t.shape) for t in inputs)


def _keep(ctx, inputs, output) -> None:
    _, *kept = output
    ctx.save_for_backward(*inputs, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, *_):
    if dout is None:
        return (None,) * 8
    with without_autocast(dout.device):
        return _inner_backward(dout, *ctx.saved_tensors)


_inner_backward = support.define("mamba_inner_backward", _inner_backward_now, _inner_backward_fake)
_inner = support.define("mamba_inner", _inner_now, _inner_fake, _gradients, _keep)
