"""The residual blocks: convolutional for the first two stages, token-mixing for the last two.

Shape legend: B images or windows, C channels, H x W rows and columns, L tokens per window, M of
them wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from ..ops import add_layer_norm, mlp

__all__ = ["ConvBlock", "MixerBlock"]


def _layer_scale(dim: int, value: float | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Multiply the last axis of ``x`` by ``gamma``, where there is one."""
    return x if gamma is None else x * gamma


class ConvBlock(nn.Module):
    """x + drop_path(gamma * BN(conv(GELU(BN(conv(x)))))) (MambaVision, section 3.1).

    Args:
        dim: C.
        norm: builds a normalization layer for a number of channels.
        drop_path: the probability of dropping the branch, per image.
        layer_scale: the start of gamma; None leaves gamma out.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: Callable[[int], nn.Module],
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = norm(dim)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = norm(dim)
        self.gamma = _layer_scale(dim, layer_scale)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.act1(_normalized(self.conv1, self.norm1, x))
        y = _normalized(self.conv2, self.norm2, y)
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)


def _normalized(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), without the sums of a gradient that is 0."""
    if conv.bias is None or not (isinstance(norm, _BatchNorm) and norm.training):
        return norm(conv(x))
    bias = conv.bias.detach()
    y = F.conv2d(x, conv.weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return _Independent.apply(norm(y), conv.bias)


class _Independent(torch.autograd.Function):
    """``y``, which a bias only seems to change: a batch norm's mean takes it away again.

    The bias has a gradient all the same, as DistributedDataParallel wants of every weight. Where a
    mean is that of several processes, the sum of theirs is 0, and they add theirs up.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors
        return gradient, torch.zeros_like(bias)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between.

    Args:
        dim: C.
        hidden: channels between the layers.
        backend: passed to :func:`~mamba_vision.ops.mlp`.
    """

    def __init__(self, dim: int, hidden: int, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        # The layers are not called, they only hold weights.
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return mlp(x, *weights, backend=self.backend)


class MixerBlock(nn.Module):
    """A token mixer and an MLP, each normalized first and added (MambaVision, section 3.2).

    Args:
        dim: C.
        mixer: (B, L, C) -> (B, L, C): attention, which also takes the tokens whose outcome is
            wanted, or the Mamba mixer.
        mlp_ratio: the MLP's hidden channels over C.
        drop_path: the probability of dropping a branch, per window.
        layer_scale: the start of gamma_1 and gamma_2; None leaves them out.
        norm_backend: passed to :func:`~mamba_vision.ops.add_layer_norm`.
        linear_backend: passed to :func:`~mamba_vision.ops.mlp`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_backend: str | None = None,
        linear_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm_backend = norm_backend
        self.gamma_1 = _layer_scale(dim, layer_scale)
        self.gamma_2 = _layer_scale(dim, layer_scale)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), linear_backend)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(
        self,
        x: Tensor,
        normed: Tensor | None = None,
        wanted: Tensor | None = None,
        following: nn.LayerNorm | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: (B, L, C).
            normed: like x, that normalized by ``norm1``, where it is known; None to compute it.
            wanted: (B, M, C), the tokens of x whose outcome is wanted, if the mixer attends; None
                for all.
            following: normalizes the outcome, which costs less here than by itself.

        Returns:
            (B, M, C); with ``following`` two of these, the outcome and that normalized.
        """
        normed = self._add_norm(self.norm1, x)[1] if normed is None else normed
        if wanted is None:
            branch = self.mixer(normed)
        else:
            x, branch = wanted, self.mixer(normed, self._add_norm(self.norm1, wanted)[1])
        x, normed = self._add_norm(self.norm2, x, branch, self.gamma_1)
        branch = self.mlp(normed)
        if following is not None:
            return self._add_norm(following, x, branch, self.gamma_2)
        return x + self.drop_path(_scaled(branch, self.gamma_2))

    def _add_norm(
        self,
        norm: nn.LayerNorm,
        x: Tensor,
        branch: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x + drop_path(gamma * branch), and that normalized."""
        keep = None if branch is None else self._keep(len(branch))
        weights = norm.weight, norm.bias, norm.eps
        return add_layer_norm(x, branch, gamma, *weights, keep=keep, backend=self.norm_backend)

    def _keep(self, windows: int) -> Tensor | None:
        """What drop path multiplies each window's branch by; None for ones."""
        drop = self.drop_path
        if not drop.training or drop.p == 0:
            return None
        return drop(self.norm1.weight.new_ones(windows, dtype=torch.float32))
