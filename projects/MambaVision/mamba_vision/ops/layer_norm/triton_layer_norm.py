"""The residual connection and its LayerNorm in Triton: each number is read once, and written once.

The backward pass adds the gradients that come by either way on its one walk through memory. Sums
over tokens run in a fixed order, without atomics: equal inputs give equal results.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from ..triton_sums import sum_parts
from . import triton_kernels as kernels

__all__ = ["MAX_WIDTH", "obstacle", "run"]

MAX_WIDTH = 4096  # channels, all of which a program holds in registers
TILE = 2048  # numbers that it holds at a time; several rows where they are short
NUMBERS_PER_WARP = 1024
STEPS = 4  # tiles of a program
PROGRAMS_BACK = 1024  # each leaves parts of the sums over tokens


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], *, width: int) -> str | None:
    """Why the kernels cannot take such tensors; None if they can."""
    if width > MAX_WIDTH:
        return f"it holds at most {MAX_WIDTH} channels, not {width}"
    return support.obstacle(device, dtypes)


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
    """See :func:`mamba_vision.ops.add_layer_norm`; differentiable once."""
    sums, normed, _ = _add_layer_norm(x, branch, gamma, weight, bias, keep, eps, dtype)
    return x if branch is None else sums, normed


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    warps = max(1, rows * columns // NUMBERS_PER_WARP)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def _rows(x: Tensor | None) -> Tensor | None:
    """``x`` (..., C) as (M, C) with the numbers of a row together: a view, or else a copy."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in vectors)


def _distances(*tensors: Tensor | None) -> tuple[int, ...]:
    """From a row to the next one, in numbers."""
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def _sum_dtype(x: Tensor, branch: Tensor, gamma: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _forward_now(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (..., C), nothing without a branch; normed (..., C); what the backward pass needs:
    each token's mean and inverse deviation, (2, M) float32."""
    sums, normed, statistics = _forward_fake(x, branch, gamma, weight, bias, keep, eps, dtype)
    if not x.numel():
        return sums, normed, statistics
    tokens, channels = statistics.shape[1], x.shape[-1]
    tile = _tile(channels)
    programs = triton.cdiv(tokens, STEPS * tile["ROWS"])
    rows = _rows(x), _rows(branch)
    with support.on_device_of(x):
        kernels.add_normalize[(programs,)](
            *rows, *_contiguous(gamma, weight, bias, keep), sums, normed, statistics,
            tokens, channels, tokens // len(x), eps, *_distances(*rows),
            STEPS=STEPS, ADD=branch is not None, SCALE=gamma is not None, KEEP=keep is not None,
            **tile,
        )  # fmt: skip
    return sums, normed, statistics


def _forward_fake(x, branch, gamma, weight, bias, keep, eps, dtype):
    sums = x.new_empty(0)
    if branch is not None:
        sums = x.new_empty(x.shape, dtype=_sum_dtype(x, branch, gamma))
    statistics = x.new_empty((2, math.prod(x.shape[:-1])), dtype=torch.float32)
    return sums, x.new_empty(x.shape, dtype=dtype), statistics


def _backward_now(
    dsums: Tensor | None,
    dnormed: Tensor,
    sums: Tensor,
    statistics: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    of_branch: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., C) and dbranch (..., C) in the dtypes given, the latter nothing where it is dx;
    dweight, dbias and, with a scale, dgamma, (2 or 3, C) float32."""
    dx, dbranch, dweights = _backward_fake(
        dsums, dnormed, sums, statistics, branch, gamma, keep, weight, dtype, of_branch
    )
    if not sums.numel():
        return dx, dbranch, dweights.zero_()
    tokens, channels = statistics.shape[1], sums.shape[-1]
    tile = _tile(channels)
    tiles = triton.cdiv(tokens, tile["ROWS"])
    steps = triton.cdiv(tiles, PROGRAMS_BACK)
    parts = dweights.new_empty(triton.cdiv(tiles, steps), *dweights.shape)
    rows = _rows(sums), _rows(dsums), _rows(dnormed), _rows(branch)
    with support.on_device_of(sums):
        kernels.add_normalize_back[(len(parts),)](
            *rows, *_contiguous(gamma, weight, keep), statistics, dx, dbranch, parts,
            tokens, channels, tokens // len(sums), steps, *_distances(*rows),
            ADD=dsums is not None, SCALE=gamma is not None, KEEP=keep is not None, **tile,
        )  # fmt: skip
    sum_parts(parts, dweights)
    return dx, dbranch, dweights


def _backward_fake(dsums, dnormed, sums, statistics, branch, gamma, keep, weight, dtype, of_branch):
    dx = sums.new_empty(sums.shape, dtype=dtype)
    apart = gamma is not None or keep is not None
    dbranch = sums.new_empty(sums.shape if apart else 0, dtype=of_branch)
    shape = (2 if gamma is None else 3, sums.shape[-1])
    return dx, dbranch, sums.new_empty(shape, dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x, branch, gamma, weight, bias, keep, _, _ = inputs
    sums, _, statistics = output
    kept = x if branch is None else sums
    of_scale = None if gamma is None else branch
    ctx.save_for_backward(kept, statistics, of_scale, gamma, keep, weight)
    ctx.dtypes = (x.dtype, None if branch is None else branch.dtype, bias.dtype)
    ctx.mark_non_differentiable(statistics, *([sums] if branch is None else []))
    ctx.set_materialize_grads(False)


def _gradients(ctx, dsums, dnormed, _):
    sums, statistics, branch, gamma, keep, weight = ctx.saved_tensors
    of_x, of_branch, of_bias = ctx.dtypes
    if dsums is None and dnormed is None:
        return (None,) * 8
    if dnormed is None:
        dnormed = torch.zeros_like(sums)
    if of_branch is None:
        dsums = None
    dx, dbranch, dweights = _backward(
        dsums, dnormed, sums, statistics, branch, gamma, keep, weight, of_x, of_branch
    )
    if gamma is None and keep is None:
        dbranch = None if of_branch is None else dx.to(of_branch)
    return (
        dx,
        dbranch,
        None if gamma is None else dweights[2].to(gamma.dtype),
        dweights[0].to(weight.dtype),
        dweights[1].to(of_bias),
        None,
        None,
        None,
    )


_backward = support.define("add_layer_norm_backward", _backward_now, _backward_fake)
_add_layer_norm = support.define("add_layer_norm", _forward_now, _forward_fake, _gradients, _keep)
