"""The Mamba mixer: half of the channels scanned, the other half only convolved.

Shape legend: B windows, L tokens, C channels, D = C / 2 channels of each half,
N = 8 states per channel, R = ceil(C / 16) the rank of the step size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import mamba_inner

__all__ = ["MambaVisionMixer"]


class MambaVisionMixer(nn.Module):
    """Mix the tokens of a window with a selective scan (MambaVision, section 3.2).

    The projected input is split in two halves. Each goes through its own depthwise 'same' conv of
    width 3 and SiLU; the first is then scanned (Mamba, algorithm 2); both, concatenated, are
    projected back. The second half does not gate the first.

    The bias of ``dt_proj`` enters the step size twice, delta = softplus(W dt + b + b): the released
    weights were trained so.

    Args:
        dim: C, even.
        scan_backend, conv_backend: passed to :func:`~mamba_vision.ops.selective_scan` and
            :func:`~mamba_vision.ops.depthwise_conv1d_silu`; None leaves the choice to them.
    """

    STATES = 8
    CONV_WIDTH = 3
    KEPT = ("conv1d_x.weight", "conv1d_z.weight", "dt_proj.bias")  # in float32 by the operators

    def __init__(
        self, dim: int, *, scan_backend: str | None = None, conv_backend: str | None = None
    ) -> None:
        super().__init__()
        self.scan_backend = scan_backend
        self.conv_backend = conv_backend
        half, self.dt_rank = dim // 2, math.ceil(dim / 16)
        states = torch.arange(1, self.STATES + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * self.STATES, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = self._depthwise_conv(half)
        self.conv1d_z = self._depthwise_conv(half)

    @classmethod
    def _depthwise_conv(cls, dim: int) -> nn.Conv1d:
        return nn.Conv1d(dim, dim, cls.CONV_WIDTH, padding="same", groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C); the scan's state is float32 at least."""
        A_log = self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))
        # Modules that are not called only hold weights: the op works in (B, L, D), as one.
        y = mamba_inner(
            self.in_proj(x),
            self.conv1d_x.weight.squeeze(1),
            self.conv1d_z.weight.squeeze(1),
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -A_log.exp(),
            self.D,
            scan_backend=self.scan_backend,
            conv_backend=self.conv_backend,
        )
        return self.out_proj(y)
