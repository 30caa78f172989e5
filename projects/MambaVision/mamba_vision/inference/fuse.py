"""Folding batch norms, which at test time are fixed affine maps, into the convs before them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..backbone.blocks import ConvBlock
from ..errors import UserError

__all__ = ["fuse"]


def fuse(module: nn.Module) -> None:
    """Fold, in place, every batch norm that directly follows a conv into that conv.

    Found are the pairs in an ``nn.Sequential``, in the backbone's convolutional blocks, whose layer
    scale is folded too, and in Detectron2's ``Conv2d`` with a ``norm``; batch norms of PyTorch and
    Detectron2, frozen or not. ``nn.Identity`` takes a norm's place. The results stay the same to
    rounding, but parameters and state dict do not, and training would: give a copy, and keep the
    original for whatever reads or writes checkpoints.

    Args:
        module: in eval mode, any of it that has batch norms and convs.

    Raises:
        UserError: a part of the module is in training mode.
    """
    if any(part.training for part in module.modules()):
        raise UserError(
            f"fuse's argument module, a {type(module).__name__}, is in training mode, in which "
            "batch norms follow each batch: call its eval() first"
        )
    for conv, owner, name in list(_pairs(module)):
        norm = getattr(owner, name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        setattr(owner, name, nn.Identity())
    for block in module.modules():
        if isinstance(block, ConvBlock) and isinstance(block.norm2, nn.Identity):
            _fold_layer_scale(block)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module, str]]:
    """Each conv that a batch norm follows, the module that holds the norm, and its name there."""
    for owner in module.modules():
        follows: list[tuple[nn.Module | None, str]] = []
        if isinstance(owner, nn.Sequential):
            children = list(owner.named_children())
            follows = [(first, name) for (_, first), (name, _) in pairwise(children)]
        elif isinstance(owner, ConvBlock):
            follows = [(owner.conv1, "norm1"), (owner.conv2, "norm2")]
        elif isinstance(owner, Conv2d):
            follows = [(owner, "norm")]
        for conv, name in follows:
            if _is_fixed(getattr(owner, name)) and _ends_in_conv(conv, owner):
                assert isinstance(conv, nn.Conv2d)
                yield conv, owner, name


def _is_fixed(norm: nn.Module | None) -> bool:
    """Whether it is a batch norm with statistics of its own; without them it uses the batch's."""
    return isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)) and norm.running_mean is not None


def _ends_in_conv(conv: nn.Module | None, owner: nn.Module) -> bool:
    """Whether nothing stands between the conv and what ``owner`` does next."""
    if isinstance(conv, Conv2d) and conv is not owner:
        return conv.norm is None and conv.activation is None
    return isinstance(conv, Conv2d) or type(conv) is nn.Conv2d


@torch.no_grad()
def _fold_layer_scale(block: ConvBlock) -> None:
    if block.gamma is not None:
        block.conv2.weight *= block.gamma.view(-1, 1, 1, 1)
        block.conv2.bias *= block.gamma  # type: ignore[operator]  # the block's convs have one
        block.gamma = None
