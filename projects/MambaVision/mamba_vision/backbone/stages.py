"""The parts of the backbone between two resolutions: the stem and the two kinds of stages.

Shape legend: B images, C channels, H x W rows and columns of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..training_graphs import TrainingGraphs
from .attention import Attention
from .blocks import ConvBlock, MixerBlock
from .mixer import MambaVisionMixer
from .windows import crop_windows, cut_windows, join_windows, window_shape

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
        return self._run_all(list(self.blocks), x)

    def _run_all(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if not self._is_checkpointed():
            return block(*inputs)
        contexts = partial(_checkpoint_contexts, block)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    def _is_checkpointed(self) -> bool:
        return self.activation_checkpointing and self.training and torch.is_grad_enabled()


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
    Padded tokens take part like any other and are dropped at the end. If the last block attends,
    those at the end of a single row or column of windows are only attended to: nothing else is
    seen of what the block makes of them.
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
        skip_padding: bool,
        cuda_graphs: bool,
        scan_backend: str | None,
        conv_backend: str | None,
        norm_backend: str | None,
        linear_backend: str | None,
        attention_backend: str | None,
    ) -> None:
        depth = len(drop_paths)
        first_attention = depth - depth // 2

        def mixer(index: int) -> nn.Module:
            if index >= first_attention:
                return Attention(dim, num_heads, attention_backend, linear_backend)
            return MambaVisionMixer(dim, scan_backend=scan_backend, conv_backend=conv_backend)

        def block(index: int) -> MixerBlock:
            return MixerBlock(
                dim,
                mixer(index),
                mlp_ratio=mlp_ratio,
                drop_path=drop_paths[index],
                layer_scale=layer_scale,
                norm_backend=norm_backend,
                linear_backend=linear_backend,
            )

        super().__init__(
            [block(index) for index in range(depth)],
            Downsample(dim) if downsample else None,
            activation_checkpointing,
        )
        self.window_size = window_size
        self.window_padding = window_padding
        self.skip_padding = skip_padding and first_attention < depth
        self.graphs = TrainingGraphs() if cuda_graphs else None

    def _mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        shape = window_shape(height, width, self.window_size, self.window_padding)
        windows, normed = self._run_first(cut_windows(x, shape))
        # A window longer than the map is the only one along its axis.
        part = (min(shape[0], height), min(shape[1], width)) if self.skip_padding else shape
        wanted = None if part == shape else crop_windows(windows, shape, part)
        windows = self._run(self.blocks[-1], windows, normed, wanted)
        return join_windows(windows, part, (height, width))

    def _run_first(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """All blocks but the last; also what the last one's first norm gives, unless it is left to
        that, which then keeps less."""
        *blocks, last = cast(list[MixerBlock], list(self.blocks))
        if not blocks or self._is_checkpointed():
            return self._run_all(blocks, x), None
        if self.graphs is None or torch.compiler.is_compiling():
            return _run_chain(blocks, last.norm1, x)
        return self.graphs(_Chain(blocks, last.norm1), x)


class _Chain(nn.Module):
    """See :func:`_run_chain`."""

    def __init__(self, blocks: Sequence[MixerBlock], following: nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.following = following

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = cast(list[MixerBlock], list(self.blocks))
        return _run_chain(blocks, self.following, x)


def _run_chain(
    blocks: Sequence[MixerBlock], following: nn.LayerNorm, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Run mixer blocks in turn, each of which also normalizes its outcome for the next.

    Args:
        blocks: at least one.
        following: the norm behind the last of them.
        x: (B, L, C).

    Returns:
        Two of (B, L, C): the outcome, and that normalized.
    """
    normed = None
    for block, norm in zip(blocks, [*(block.norm1 for block in blocks[1:]), following]):
        x, normed = block(x, normed, following=norm)
    assert normed is not None
    return x, normed
