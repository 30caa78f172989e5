"""Which RoIs a stage is trained on: drawn at random, for all images at once.

Shapes:
    N images; C candidates of all images together; S to draw of an image at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_samples"]


@torch.no_grad()
def draw_samples(
    classes: Tensor,
    images: Tensor,
    num_images: int,
    *,
    background: int,
    batch_size_per_image: int,
    positive_fraction: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a random sample of each image's candidates, of which some are foreground.

    The distribution is that of Detectron2's ``subsample_labels``: any foreground of the allowed
    size is as likely as any other, and so is any background that fills the sample up. That waits
    for the GPU six times an image; nothing here waits, or depends on more than shapes.

    Args:
        classes: of the candidates, (C,); -1 for one not to be drawn.
        images: whose they are, (C,), from 0 to N - 1.
        num_images: N.
        background: the class that is no foreground.
        batch_size_per_image: S.
        positive_fraction: the largest share of them that may be foreground.

    Returns:
        The places of those drawn among the candidates, (N S,), image by image, foreground first;
        where these are fewer, they come first, and -1 after them. Then how many are foreground,
        and how many background, in each image, (N,) each.
    """
    # Sorted by image, then foreground, background and the rest; in random order within these.
    kinds = 3 * images.to(torch.float64) + (classes == background) + 2 * (classes == -1)
    kinds += torch.rand(len(classes), device=classes.device)
    kinds, order = kinds.sort(stable=True)
    numbers = torch.arange(3 * num_images, dtype=torch.float64, device=classes.device)
    starts, middles, ends = torch.searchsorted(kinds, numbers).view(num_images, 3).unbind(dim=1)

    foreground = (middles - starts).clamp(max=int(batch_size_per_image * positive_fraction))
    others = (ends - middles).minimum(batch_size_per_image - foreground)
    last = (foreground + others).cumsum(dim=0)
    slots = torch.arange(num_images * batch_size_per_image, device=classes.device)
    owners = torch.searchsorted(last, slots, right=True).clamp(max=num_images - 1)
    own = slots - (last - foreground - others)[owners]
    behind = own - foreground[owners]
    places = torch.where(behind < 0, starts[owners] + own, middles[owners] + behind)
    there = slots < last[-1]
    drawn = order[places.where(there, 0)] if len(order) else places
    return drawn.where(there, -1), foreground, others
