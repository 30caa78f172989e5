"""Compiling the backbone's blocks."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone.blocks import ConvBlock, MixerBlock
from ..errors import UserError

__all__ = ["compile_backbone"]

VERSIONS = 8  # of a block: trained or evaluated, on one or many windows, with or without autocast


def compile_backbone(model: nn.Module) -> None:
    """Let ``torch.compile`` fuse what lies between the scans and convolutions of every block.

    Blocks are compiled in place, so that no name in the model's state changes, and for any size of
    image. The cutting into windows, proposals and heads, whose shapes follow their input, are left
    alone. A block compiles when it first runs, in training and in evaluation.

    Raises:
        UserError: the model has no MambaVision.
    """
    blocks = [m for m in model.modules() if isinstance(m, (ConvBlock, MixerBlock))]
    if not blocks:
        raise UserError("train.compile compiles the blocks of MambaVision; this model has none")
    # The limit is of a class, not of an object, and past it torch.compile gives up.
    limit = VERSIONS * len(blocks)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, limit)
    for block in blocks:
        block.compile()
