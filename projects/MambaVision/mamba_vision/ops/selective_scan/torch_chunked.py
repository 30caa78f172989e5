"""The selective scan in plain PyTorch, parallel over chunks of the sequence; any device.

A stretch of the sequence is cut into K chunks of T tokens, and its chunks take step t together:

    1. every chunk runs from a zero state and yields its end state;
    2. the true start states follow from chunk to chunk: over a whole chunk a state decays by
       exp(A * sum of delta), one number per channel and state;
    3. every chunk runs again, from its true start, and yields the states at all its tokens.

Every factor is a decay of at most 1 (A < 0) and none is divided by, so nothing overflows whatever
delta is. Stretches follow each other in order; they are small enough for a CPU's cache.

The backward pass keeps the inputs and the chunks' start states, runs step 3 again and solves the
adjoint recurrence g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1) in the same way from right to left.

Shapes, besides those of ``ops``: T steps of a chunk, K chunks of a stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import without_autocast


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever PyTorch does."""


@torch.compiler.disable  # Compiled, its loops over steps would be unrolled.
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
    return _ChunkedScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, delta_bias, delta_softplus: bool) -> Tensor:
        inputs = _prepare(u, delta, A, B, C, delta_bias, delta_softplus)
        y, starts = _forward(inputs)
        if D is not None:
            y.addcmul_(inputs.u, D.to(y.dtype))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, starts)
            ctx.delta_softplus = delta_softplus
        return y.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        u, delta, A, B, C, D, delta_bias = tensors
        dD = dbias = None
        with without_autocast(dy.device):
            inputs = _prepare(u, delta, A, B, C, delta_bias, ctx.delta_softplus)
            dy = dy.to(inputs.u.dtype)
            grads = _backward(inputs, starts, dy)
            du = grads.drive * inputs.delta
            ddelta = grads.delta.addcmul_(grads.drive, inputs.u)
            if ctx.delta_softplus:
                ddelta.mul_(-torch.expm1(-inputs.delta))  # softplus' in terms of softplus
            if delta_bias is not None:
                dbias = ddelta.sum((0, 1))
            if D is not None:
                du.addcmul_(dy, D.to(dy.dtype))
                dD = (dy * inputs.u).sum((0, 1))
        results = (du, ddelta, grads.A.t(), grads.B, grads.C, dD, dbias)
        return *(
            result.to(tensor.dtype) if needed and result is not None else None
            for result, tensor, needed in zip(results, tensors, ctx.needs_input_grad)
        ), None


class _Inputs(NamedTuple):
    """What the recurrence runs on, in the state's dtype."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D), bias and softplus done
    drive: Tensor  # (B, L, D), delta * u
    A: Tensor  # (N, D): in a state the channels lie together
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)


class _Grads(NamedTuple):
    """Gradients with respect to what the recurrence runs on."""

    drive: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D), where it enters exp(delta A)
    A: Tensor  # (N, D)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)


def _prepare(u, delta, A, B, C, delta_bias, delta_softplus: bool) -> _Inputs:
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C = (tensor.to(dtype) for tensor in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    return _Inputs(u, delta, delta * u, A.to(dtype).t().contiguous(), B, C)


class _Stretch(NamedTuple):
    """``chunks * steps`` tokens from token ``start`` on; its chunks count from ``first``."""

    start: int
    chunks: int
    steps: int
    first: int

    def fold(self, x: Tensor) -> Tensor:
        """(B, L, C) -> the tokens of the stretch, a view (T, B, K, C)."""
        x = x.narrow(1, self.start, self.chunks * self.steps)
        return x.unflatten(1, (self.chunks, self.steps)).permute(2, 0, 1, 3)

    def rows(self, x: Tensor) -> Tensor:
        """(B, L, C) -> a view (T, B, K, 1, C)."""
        return self.fold(x).unsqueeze(-2)

    def columns(self, x: Tensor) -> Tensor:
        """(B, L, C) -> a view (T, B, K, C, 1)."""
        return self.fold(x).unsqueeze(-1)

    def part(self, workspace: Tensor) -> Tensor:
        """(T, B, K, N, D) of the largest stretch -> a view of what this one needs."""
        return workspace[: self.steps, :, : self.chunks]


def _stretches(inputs: _Inputs) -> list[_Stretch]:
    """Cut the sequence; the first stretch is the largest."""
    # A CPU wants what a step touches in its cache, a GPU few and large kernels.
    steps, block = (32, 2**15) if inputs.u.device.type == "cpu" else (64, 2**20)
    batch, length, _ = inputs.u.shape
    most_chunks = max(1, block // max(1, batch * inputs.A.numel()))
    stretches = []
    start = first = 0
    while start < length:
        chunks = max(1, min(most_chunks, (length - start) // steps))
        stretches.append(_Stretch(start, chunks, min(steps, length - start), first))
        start, first = start + chunks * stretches[-1].steps, first + chunks
    return stretches


def _workspace(inputs: _Inputs, stretches: Sequence[_Stretch]) -> Tensor:
    """Room for a number per token, state and channel of any stretch: (T, B, K, N, D)."""
    steps, chunks = (stretches[0].steps, stretches[0].chunks) if stretches else (0, 0)
    return inputs.u.new_empty(steps, len(inputs.u), chunks, *inputs.A.shape)


def _forward(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Return y without D's part, (B, L, D), and the chunks' start states, (B, chunks, N, D)."""
    stretches = _stretches(inputs)
    spaces = [_workspace(inputs, stretches) for _ in range(2)]
    y = inputs.u.new_empty(inputs.u.shape)
    state = y.new_zeros(len(y), *inputs.A.shape)
    starts = y.new_empty(len(y), sum(stretch.chunks for stretch in stretches), *inputs.A.shape)
    for stretch in stretches:
        decays, states, chunk_decays = _expand(inputs, stretch, *spaces)
        start = starts.narrow(1, stretch.first, stretch.chunks)
        state = _solve(decays.unbind(), states.unbind(), chunk_decays, state, start)
        stretch.rows(y).copy_(stretch.rows(inputs.C) @ states)
    return y, starts


def _backward(inputs: _Inputs, starts: Tensor, dy: Tensor) -> _Grads:
    """Return the gradients for dy (B, L, D), given the start states that the forward pass kept."""
    stretches = _stretches(inputs)
    spaces = [_workspace(inputs, stretches) for _ in range(3)]
    grads = _Grads(
        drive=dy.new_empty(dy.shape),
        delta=dy.new_empty(dy.shape),
        A=torch.zeros_like(inputs.A),
        B=dy.new_empty(inputs.B.shape),
        C=dy.new_empty(inputs.C.shape),
    )
    adjoint = dy.new_zeros(len(dy), *inputs.A.shape)
    for stretch in reversed(stretches):
        decays, states, chunk_decays = _expand(inputs, stretch, *spaces[:2])
        start = starts.narrow(1, stretch.first, stretch.chunks)
        _walk(decays.unbind(), states.unbind(), start)
        stretch.rows(grads.C).copy_(stretch.rows(dy) @ states.mT)

        adjoints = stretch.part(spaces[2])
        torch.mul(stretch.rows(dy), stretch.columns(inputs.C), out=adjoints)
        # Step t takes the decay of step t + 1, the last step 1: its decay was applied as `leaving`.
        later = [torch.ones_like(decays[0, :1, :1, :1, :1]), *decays.unbind()[:0:-1]]
        adjoint = _solve(
            later,
            adjoints.unbind()[::-1],
            chunk_decays,
            adjoint,
            torch.empty_like(start),
            leaving=decays[0],
            reverse=True,
        )
        stretch.rows(grads.B).copy_(stretch.rows(inputs.drive) @ adjoints.mT)
        stretch.rows(grads.drive).copy_(stretch.rows(inputs.B) @ adjoints)

        # With respect to delta A: adjoint * decay * state before.
        exponents = decays.mul_(adjoints)
        exponents[1:].mul_(states[:-1])
        exponents[0].mul_(start)
        grads.A.add_(torch.mul(exponents, stretch.rows(inputs.delta), out=states).sum((0, 1, 2)))
        stretch.fold(grads.delta).copy_(exponents.mul_(inputs.A).sum(-2))
    return grads


def _expand(
    inputs: _Inputs, stretch: _Stretch, decays: Tensor, drives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill workspaces with exp(delta A) and delta u B; return these, (T, B, K, N, D), and the decay
    over whole chunks, (B, K, N, D)."""
    decays, drives = stretch.part(decays), stretch.part(drives)
    delta = stretch.rows(inputs.delta)
    torch.mul(delta, inputs.A, out=decays).exp_()
    torch.mul(stretch.rows(inputs.drive), stretch.columns(inputs.B), out=drives)
    return decays, drives, (delta.sum(0) * inputs.A).exp_()


def _walk(decays: Sequence[Tensor], drives: Sequence[Tensor], start: Tensor) -> Tensor:
    """Turn the drives, step by step, into x = decay * (x before) + drive; return the last x."""
    x = start
    for decay, drive in zip(decays, drives, strict=True):
        x = torch.addcmul(drive, decay, x, out=drive)
    return x


def _solve(
    decays: Sequence[Tensor],
    drives: Sequence[Tensor],
    chunk_decays: Tensor,
    carry: Tensor,
    starts: Tensor,
    *,
    leaving: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Solve x = decay * (x before) + drive over a stretch, all its chunks side by side.

    Args:
        decays, drives: (B, K, N, D) per step, in the order of the walk; the drives become x.
        chunk_decays: (B, K, N, D), the decay over a whole chunk, that of ``leaving`` included.
        carry: (B, N, D), what enters the first chunk of the walk.
        starts: (B, K, N, D), filled with what enters each chunk.
        leaving: (B, K, N, D), a decay between a chunk's last step and the next chunk, or None.
        reverse: whether the walk goes from the last chunk to the first.

    Returns:
        (B, N, D), what leaves the last chunk of the walk.
    """
    if starts.shape[1] == 1:
        starts.copy_(carry.unsqueeze(1))
        last = _walk(decays, drives, starts)
        return (last if leaving is None else last * leaving).squeeze(1).clone()

    ends = torch.zeros_like(starts)
    for decay, drive in zip(decays, drives, strict=True):
        torch.addcmul(drive, decay, ends, out=ends)
    if leaving is not None:
        ends.mul_(leaving)
    chunks = list(zip(starts.unbind(1), chunk_decays.unbind(1), ends.unbind(1), strict=True))
    for start, decay, end in reversed(chunks) if reverse else chunks:
        start.copy_(carry)
        carry = torch.addcmul(end, decay, carry)
    _walk(decays, drives, starts)
    return carry
