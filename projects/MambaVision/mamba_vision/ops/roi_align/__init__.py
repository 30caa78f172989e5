"""RoIAlign (arXiv:1703.06870, section 3) over all levels of a feature pyramid at once.

Each box is pooled from the one level it is assigned to: its bins, S x S, are each the mean of the
bilinear interpolations at a grid of ceil(height of the box / S) x ceil(width of the box / S)
points, in pixels of that level, whose pixels have their centres at integers plus 1/2.

Shape legend:

    B          images
    C          channels
    H, W       height and width of a level's map
    R          boxes (RoIs) of all images together
    S          bins along each side of a box
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backends, check_shape, without_autocast

__all__ = ["BACKENDS", "multi_level_roi_align"]

BACKENDS = Backends(
    operator="multi_level_roi_align",
    variable="MAMBAVISION_ROI_ALIGN_BACKEND",
    modules={
        "triton": f"{__name__}.triton_roi_align",
        "torchvision": f"{__name__}.torchvision_roi_align",
    },
)


def multi_level_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Pool each box from the map of its level.

    The numbers are those of ``torchvision.ops.roi_align(aligned=True, sampling_ratio=0)``, summed
    in float32 at least whatever the dtype, under autocast too. Differentiable in ``features``. On
    a GPU nothing waits for the device; the gradients are summed by atomic additions, as
    torchvision's are, so that equal inputs give equal gradients only to rounding.

    Args:
        features: for each level a map (B, C, H, W), floating point; those that are not
            ``channels_last`` are copied to it by the "triton" backend.
        boxes: (R, 4), as x0, y0, x1, y1 in pixels of the input images; finite.
        images: (R,) integers, the image of each box, below B.
        levels: (R,) integers, its place in ``features``.
        scales: for each level a pixel of the input image in pixels of the level, 1 / stride.
        output_size: S.
        backend: "triton", "torchvision" or "auto"; None takes the environment variable
            MAMBAVISION_ROI_ALIGN_BACKEND, and without it "auto": the fastest for the device.

    Returns:
        (R, C, S, S) in the features' dtype, in memory as ``channels_last``.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    if not len(features) == len(scales) > 0:
        raise ValueError(
            f"features and scales must have an entry for each level, not {len(features)} and "
            f"{len(scales)}"
        )
    sizes = {"4": 4}
    for i, feature in enumerate(features):
        check_shape(f"features[{i}]", feature, f"B C H{i} W{i}", sizes)
        if feature.dtype != features[0].dtype:
            raise TypeError(
                f"features[{i}] must have the dtype of features[0], {features[0].dtype}, not "
                f"{feature.dtype}"
            )
    check_shape("boxes", boxes, "R 4", sizes)
    for name, places in (("images", images), ("levels", levels)):
        if places.shape != boxes.shape[:1]:
            raise ValueError(
                f"{name} must have shape (R,) with R = {len(boxes)}, not {tuple(places.shape)}"
            )
        if places.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must hold int32 or int64, not {places.dtype}")
    chosen = BACKENDS.choose(backend, *features, levels=len(features))
    with without_autocast(boxes.device):
        return chosen.run(
            *features,
            boxes=boxes.detach(),
            images=images,
            levels=levels,
            scales=scales,
            output_size=output_size,
        )
