"""RoIAlign level by level with torchvision's kernel; any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> None:
    """Runs wherever torchvision does."""


def run(
    *features: Tensor,
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
) -> Tensor:
    """See :func:`mamba_vision.ops.multi_level_roi_align`."""
    wide = torch.promote_types(features[0].dtype, torch.float32)
    rois = torch.cat((images[:, None], boxes), dim=1).to(wide)
    pooled = rois.new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own, feature = levels == level, feature.to(wide)
        if rois.is_cuda:
            # To count a level's boxes the host would have to wait. Emptied, the others have no
            # samples: they cost next to nothing and give zeros.
            emptied = rois.masked_fill(~own[:, None], 0.0)
            pooled += roi_align(feature, emptied, output_size, scale, 0, aligned=True)
        else:
            which = own.nonzero(as_tuple=True)
            pooled.index_put_(
                which, roi_align(feature, rois[which], output_size, scale, 0, aligned=True)
            )
    return pooled.to(features[0].dtype, memory_format=torch.channels_last)
