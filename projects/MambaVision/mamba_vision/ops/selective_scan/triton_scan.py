"""The selective scan in Triton, parallel over chunks of the sequence; README.md has the maths.

Nothing is compiled when the package is installed or imported. Sums run in a fixed order, without
atomics: equal inputs give equal results.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from ..triton_sums import sum_parts
from . import triton_kernels as kernels

__all__ = ["MAX_STATE", "backward", "chunk_states", "forward", "obstacle", "run"]

MAX_STATE = 16
CHUNK = 32  # tokens; shorter ones mean more chunk states, longer ones fewer programs
STRIDE = 8  # of them whose loads are in flight together
STRIDE_BACK = 4  # of them whose states the backward pass holds in registers
REGISTERS = 128  # that it may take, so that enough programs share a multiprocessor
LANES = 32  # channels of a program


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], *, states: int) -> str | None:
    """Why the kernels cannot take such tensors; None if they can."""
    if states > MAX_STATE:
        return f"it holds at most {MAX_STATE} state numbers per channel, not {states}"
    return support.obstacle(device, dtypes)


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
    return _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)[0]


class _Sizes:
    """What all launches of a scan have in common."""

    def __init__(self, u: Tensor, A: Tensor) -> None:
        self.batch, self.length, self.width = u.shape
        self.states = A.shape[1]
        self.chunks = max(1, -(-self.length // CHUNK))
        self.blocks = -(-self.width // LANES)

    def grid(self, chunks: int) -> tuple[int, int]:
        return self.batch * chunks, self.blocks

    @property
    def scalars(self) -> tuple[int, int, int]:
        return self.length, self.width, self.chunks

    def options(self, delta_bias: Tensor | None, delta_softplus: bool) -> dict[str, int]:
        return {
            "N": self.states,
            "T": CHUNK,
            "SOFTPLUS": delta_softplus,
            "BIAS": delta_bias is not None,
            "num_warps": 1,
        }

    def chunk_states(self, u: Tensor) -> Tensor:
        make = u.new_zeros if self.chunks == 1 else u.new_empty
        shape = (self.batch, self.chunks, self.states, self.width)
        return make(shape, dtype=torch.float32)

    def totals(self, u: Tensor) -> Tensor:
        return u.new_empty((self.batch, self.chunks, self.width), dtype=torch.float32)

    def join(self, states: Tensor, totals: Tensor, A: Tensor, *, reverse: bool) -> None:
        kernels.join_chunks[self.batch * self.states, self.blocks](
            states, totals, A, self.width, self.chunks,
            N=self.states, CHUNKS=8 if self.chunks <= 8 else 64, REVERSE=reverse, num_warps=1,
        )  # fmt: skip


def chunk_states(u: Tensor, A: Tensor) -> Tensor:
    """What :func:`forward` returns, before it is filled."""
    return _Sizes(u, A).chunk_states(u)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    y: Tensor,
) -> Tensor:
    """Scan into ``y``, and return the states at the chunks' starts.

    Args:
        u, delta, B, C: as :func:`~mamba_vision.ops.triton_support.rows` has them, B and C with the
            same dtype and distance of rows; otherwise, and the rest, as for
            :func:`mamba_vision.ops.selective_scan`.
        A, D, delta_bias: contiguous.
        y: (B, L, D), filled; laid out as u.

    Returns:
        (B, K, N, D) float32.
    """
    sizes = _Sizes(u, A)
    starts = sizes.chunk_states(u)
    options = sizes.options(delta_bias, delta_softplus)
    rows = tuple(map(support.distance, (u, delta, B)))
    if not u.numel():
        return starts
    with support.on_device_of(u):
        if sizes.chunks > 1:
            totals = sizes.totals(u)
            kernels.scan_chunks[sizes.grid(sizes.chunks - 1)](
                u, delta, A, B, C, delta_bias, starts, totals, *sizes.scalars, *rows,
                S=STRIDE, **options,
            )  # fmt: skip
            sizes.join(starts, totals, A, reverse=False)
        kernels.scan_outputs[sizes.grid(sizes.chunks)](
            u, delta, A, B, C, D, delta_bias, starts, y, *sizes.scalars, *rows, support.distance(y),
            S=STRIDE, SKIP=D is not None, **options,
        )  # fmt: skip
    return starts


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor,
    dy: Tensor,
    dBC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward`.

    Args:
        u, ..., starts: as for and from :func:`forward`.
        dy: (B, L, D), laid out as u.
        dBC: (B L, 2 N), filled with dB and then dC; rows of adjacent numbers.

    Returns:
        du (B, L, D) and ddelta (B, L, D), in the dtypes of u and delta, and dweights (N + 2, D)
        float32: dA transposed, then dD and ddelta_bias.
    """
    sizes = _Sizes(u, A)
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dweights = u.new_empty((sizes.states + 2, sizes.width), dtype=torch.float32)
    options = sizes.options(delta_bias, delta_softplus)
    if not u.numel():
        return du, ddelta, dweights.zero_()
    rows = tuple(map(support.distance, (u, delta, B, dy)))
    carries = sizes.chunk_states(u)
    BC_parts = carries.new_empty(sizes.blocks, *dBC.shape)
    parts = carries.new_empty(sizes.batch * sizes.chunks, *dweights.shape)
    with support.on_device_of(u):
        if sizes.chunks > 1:
            totals = sizes.totals(u)
            kernels.scan_chunks_back[sizes.grid(sizes.chunks - 1)](
                delta, A, B, C, delta_bias, dy, carries, totals, *sizes.scalars,
                *rows[1:], S=STRIDE, **options,
            )  # fmt: skip
            sizes.join(carries, totals, A, reverse=True)
        kernels.scan_gradients[sizes.grid(sizes.chunks)](
            u, delta, A, B, C, D, delta_bias, dy, starts, carries, du, ddelta, BC_parts, parts,
            *sizes.scalars, *rows,
            S=STRIDE_BACK, COUNT=triton.next_power_of_2(2 * sizes.states),
            SKIP=D is not None, maxnreg=REGISTERS, **options,
        )  # fmt: skip
    sum_parts(BC_parts, dBC)
    sum_parts(parts, dweights)
    return du, ddelta, dweights


def _scan_now(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the states at the chunks' starts, which the backward pass needs."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, forward(*_laid_out(u, delta, A, B, C, D, delta_bias), delta_softplus, y)


def _scan_fake(u, delta, A, B, C, D, delta_bias, delta_softplus):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, chunk_states(u, A)


def _scan_backward_now(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the seven tensors, in their order; those of absent ones mean nothing."""
    states = A.shape[1]
    inputs = _laid_out(u, delta, A, B, C, D, delta_bias)
    dBC = starts.new_empty(u.shape[:2].numel(), 2 * states)
    du, ddelta, dweights = backward(*inputs, delta_softplus, starts, support.rows(dy), dBC)
    dBC = dBC.unflatten(0, u.shape[:2])
    dB, dC = (support.copy(x, like=y) for x, y in zip(dBC.split(states, dim=-1), (B, C)))
    dA = support.copy(dweights[:states].t(), like=A)
    dD, dbias = (
        support.copy(dweights[states + i], like=A[:, 0] if x is None else x)
        for i, x in enumerate((D, delta_bias))
    )
    return du, ddelta, dA, dB, dC, dD, dbias


def _scan_backward_fake(dy, u, delta, A, B, C, D, delta_bias, starts, delta_softplus):
    vectors = (A[:, 0] if x is None else x for x in (D, delta_bias))
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C, *vectors))


def _laid_out(
    u, delta, A, B, C, D, delta_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors as the kernels want them."""
    u, delta, B, C = (support.rows(x) for x in (u, delta, B, C))
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    if B.dtype != C.dtype or support.distance(B) != support.distance(C):
        B, C = (x.float().contiguous() for x in (B, C))
    return u, delta, A.contiguous(), B, C, D, delta_bias


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    *tensors, starts = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    grads = _scan_backward(dy, *tensors, starts, ctx.delta_softplus)
    return *(None if x is None else dx for x, dx in zip(tensors, grads)), None


_scan_backward = support.define("selective_scan_backward", _scan_backward_now, _scan_backward_fake)
_scan = support.define("selective_scan", _scan_now, _scan_fake, _gradients, _keep)
