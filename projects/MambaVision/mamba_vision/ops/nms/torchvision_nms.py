"""torchvision's NMS, group after group; any device. On a GPU it waits at every group."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever torchvision does."""


def run(boxes: Tensor, valid: Tensor, *, threshold: float) -> Tensor:
    """See :func:`mamba_vision.ops.grouped_nms`."""
    keep = torch.zeros_like(valid)
    scores = -torch.arange(valid.shape[1], dtype=torch.float32, device=boxes.device)
    for boxes_g, valid_g, keep_g in zip(boxes, valid, keep):
        places = valid_g.nonzero()[:, 0]
        keep_g[places[nms(boxes_g[places], scores[: len(places)], threshold)]] = True
    return keep
