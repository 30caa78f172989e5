"""Which RoIs a stage is trained on: drawn at random, for all images at once.

Shapes:
    N images; C candidates of all images together, C_i those of image i; R of them drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_samples"]


@torch.no_grad()
def draw_samples(
    classes: Tensor,
    counts: Sequence[int],
    *,
    background: int,
    batch_size_per_image: int,
    positive_fraction: float,
) -> tuple[Tensor, list[int], list[int]]:
    """Draw a random sample of each image's candidates, of which some are foreground.

    The distribution is that of Detectron2's ``subsample_labels``: any foreground of the allowed
    size is as likely as any other, and so is any background that fills the sample up. That waits
    for the GPU six times an image; here the CPU learns once how many candidates there are.

    Args:
        classes: of the candidates, image by image, (C,); -1 for one not to be drawn.
        counts: how many of them each image has, N numbers of sum C.
        background: the class that is no foreground.
        batch_size_per_image: candidates to draw; where these are fewer, all.
        positive_fraction: the largest share of them that may be foreground.

    Returns:
        The places of those drawn among the candidates, (R,), image by image, foreground first; and
        how many are foreground and background in each image.
    """
    numbers = torch.arange(3 * len(counts), dtype=torch.float64, device=classes.device)
    images = torch.cat([numbers[i].expand(count) for i, count in enumerate(counts)])
    # Sorted by image, then foreground, background and the rest; in random order within these.
    kinds = 3 * images + (classes == background) + 2 * (classes == -1)
    kinds += torch.rand(len(classes), device=classes.device)
    kinds, order = kinds.sort(stable=True)
    starts = torch.searchsorted(kinds, numbers).tolist()

    parts, foreground, others = [], [], []
    for start, middle, end in zip(starts[::3], starts[1::3], starts[2::3], strict=True):
        limit = int(batch_size_per_image * positive_fraction)
        foreground.append(min(middle - start, limit))
        others.append(min(end - middle, batch_size_per_image - foreground[-1]))
        parts.append(order[start : start + foreground[-1]])
        parts.append(order[middle : middle + others[-1]])
    return torch.cat(parts), foreground, others
