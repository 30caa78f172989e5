"""The operators that the benchmark times: how to draw their inputs, and what they take at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Backends
from .conv1d import BACKENDS as CONV_BACKENDS
from .conv1d import WIDTH, depthwise_conv1d_silu
from .inner import mamba_inner
from .selective_scan import BACKENDS as SCAN_BACKENDS
from .selective_scan import selective_scan

__all__ = ["OPERATORS", "Operator", "Shape"]


class Shape(NamedTuple):
    """Images, tokens, channels and state numbers per channel."""

    B: int
    L: int
    D: int
    N: int


def _draw_scan(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    batch, length, width, states = shape
    rates = torch.arange(1.0, states + 1).repeat(width, 1)
    u, delta = torch.randn(2, batch, length, width).to(dtype)
    B, C = torch.randn(2, batch, length, states).to(dtype)
    return [u, delta - 2, -rates, B, C, torch.ones(width), torch.randn(width) / 2]


def _draw_conv(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*shape[:3]).to(dtype), torch.randn(shape.D, WIDTH).to(dtype)]


def _draw_mixer(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """The input, and a mixer's weights, which autocast casts; D is half of the mixer's channels."""
    batch, length, half, states = shape
    rank = -(-half // 8)

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs) / inputs**0.5

    return [
        torch.randn(batch, length, 2 * half).to(dtype),
        weight(2 * half, 2 * half),
        weight(half, WIDTH),
        weight(half, WIDTH),
        weight(rank + 2 * states, half),
        weight(half, rank),
        torch.randn(half) / 2 - 1,
        -torch.arange(1.0, states + 1).repeat(half, 1),
        torch.ones(half),
        weight(2 * half, 2 * half),
    ]


def _mixer(x: Tensor, in_proj: Tensor, *others: Tensor, backend: str) -> Tensor:
    """From in_proj to out_proj; in half precision under autocast."""
    *inner, out_proj = others
    scan, conv = MIXERS[backend]
    half = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    with torch.autocast(x.device.type, dtype=half, enabled=half == x.dtype):
        xz = F.linear(x, in_proj)
        return F.linear(mamba_inner(xz, *inner, scan_backend=scan, conv_backend=conv), out_proj)


MIXERS = {  # the operators' backends
    "triton": ("triton", "triton"),
    "mamba_ssm": ("mamba_ssm", "causal_conv1d"),
    "torch": ("torch", "torch"),
    "reference": ("reference", "reference"),
}


def _obstacle(backends: Backends) -> Callable[[str, Sequence[Tensor]], str | None]:
    return lambda name, tensors: backends.obstacle(name, *tensors, states=1)


def _mixer_obstacle(name: str, tensors: Sequence[Tensor]) -> str | None:
    scan, conv = MIXERS[name]
    return SCAN_BACKENDS.obstacle(scan, *tensors, states=1) or CONV_BACKENDS.obstacle(
        conv, *tensors
    )


class Operator(NamedTuple):
    function: Callable[..., Tensor]
    backends: Sequence[str]
    obstacle: Callable[[str, Sequence[Tensor]], str | None]
    draw: Callable[[Shape, torch.dtype], list[Tensor]]
    exponentials: Callable[[Shape], int]  # of forward and backward, at the least
    products: Callable[[Shape], int]  # multiply-adds of matrix products, likewise


OPERATORS = {
    "selective_scan": Operator(
        selective_scan,
        tuple(SCAN_BACKENDS.modules),
        _obstacle(SCAN_BACKENDS),
        _draw_scan,
        lambda s: 2 * s.B * s.L * s.D * (s.N + 2),
        lambda s: 0,
    ),
    "depthwise_conv1d_silu": Operator(
        depthwise_conv1d_silu,
        tuple(CONV_BACKENDS.modules),
        _obstacle(CONV_BACKENDS),
        _draw_conv,
        lambda s: 2 * s.B * s.L * s.D,
        lambda s: 0,
    ),
    "mixer": Operator(
        _mixer,
        tuple(MIXERS),
        _mixer_obstacle,
        _draw_mixer,
        lambda s: 2 * s.B * s.L * s.D * (s.N + 4),
        lambda s: 3 * s.B * s.L * s.D * (8 * s.D + -(-s.D // 8) * 2 + 2 * s.N),
    ),
}
