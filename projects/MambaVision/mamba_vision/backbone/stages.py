"""The parts of the backbone between two resolutions: the stem and the two kinds of stages.

Shape legend: B images, C channels, H x W rows and columns of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .blocks import ConvBlock, MixerBlock
from .mixer import MambaVisionMixer
from .windows import cut_windows, join_windows, window_shape

__all__ = ["ConvStage", "Downsample", "Stage", "Stem", "WindowStage"]

Norm = Callable[[int], nn.Module]


class Stem(nn.Module):
    """Two 3x3 stride-2 convs with normalization and ReLU (MambaVision, section 3.1)."""

    EPS = 1e-4

    def __init__(self, in_chans: int, in_dim: int, dim: int, norm: Norm) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, stride=2, padding=1, bias=False),
            self._norm(norm, in_dim),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False),
            self._norm(norm, dim),
            nn.ReLU(),
        )

    @classmethod
    def _norm(cls, norm: Norm, channels: int) -> nn.Module:
        layer = norm(channels)
        layer.eps = cls.EPS  # type: ignore[assignment]  # a float on every normalization layer
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""
        return self.conv_down(x)


class Downsample(nn.Module):
    """A 3x3 stride-2 conv that doubles the channels (MambaVision, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""
        return self.reduction(x)


class _StatisticsKept(AbstractContextManager):
    """While open, the batch norms of a module normalize as before but record nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *_exception: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self.saved):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _checkpoint_contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For a block's first run, and for its second in the backward pass."""
    return nullcontext(), _StatisticsKept(block)


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling that leads to the next.

    Args:
        blocks: run in turn.
        downsample: None in the last stage.
        activation_checkpointing: in training keep only the blocks' inputs, and compute the rest
            again in the backward pass. The numbers stay the same, running statistics included.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: Downsample | None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the stage.

        Args:
            x: (B, C, H, W).

        Returns:
            The stage's feature, (B, C, H, W), and the next stage's input, (B, 2 C, H / 2, W / 2);
            None after the last stage.
        """
        x = self._mix(x)
        return x, None if self.downsample is None else self.downsample(x)

    def _mix(self, x: Tensor) -> Tensor:
        remember = not (self.activation_checkpointing and self.training and torch.is_grad_enabled())
        for block in self.blocks:
            if remember:
                x = block(x)
                continue
            contexts = partial(_checkpoint_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


class ConvStage(Stage):
    """A stage of convolutional blocks; see :class:`Stage`."""

    def __init__(
        self,
        dim: int,
        drop_paths: Sequence[float],
        *,
        norm: Norm,
        layer_scale: float | None,
        downsample: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(
            [ConvBlock(dim, norm=norm, drop_path=p, layer_scale=layer_scale) for p in drop_paths],
            Downsample(dim) if downsample else None,
            activation_checkpointing,
        )


class WindowStage(Stage):
    """A stage that cuts the map into windows: Mamba mixers first, then attention.

    With depth d the last d // 2 blocks attend (MambaVision, section 3.2).
    Padded tokens take part like any other and are dropped at the end.
    """

    def __init__(
        self,
        dim: int,
        drop_paths: Sequence[float],
        *,
        num_heads: int,
        window_size: int,
        window_padding: str,
        mlp_ratio: float,
        layer_scale: float | None,
        downsample: bool,
        activation_checkpointing: bool,
        scan_backend: str | None,
        conv_backend: str | None,
        attention_backend: str | None,
    ) -> None:
        depth = len(drop_paths)
        first_attention = depth - depth // 2

        def mixer(index: int) -> nn.Module:
            if index >= first_attention:
                return Attention(dim, num_heads, attention_backend)
            return MambaVisionMixer(dim, scan_backend=scan_backend, conv_backend=conv_backend)

        super().__init__(
            [
                MixerBlock(dim, mixer(j), mlp_ratio=mlp_ratio, drop_path=p, layer_scale=layer_scale)
                for j, p in enumerate(drop_paths)
            ],
            Downsample(dim) if downsample else None,
            activation_checkpointing,
        )
        self.window_size = window_size
        self.window_padding = window_padding

    def _mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        shape = window_shape(height, width, self.window_size, self.window_padding)
        windows = super()._mix(cut_windows(x, shape))
        return join_windows(windows, shape, (height, width))
