"""Detectron2's pooler of boxes, all levels of the pyramid at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from detectron2.layers import cat
from detectron2.modeling.poolers import ROIPooler as _ROIPooler
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from ..errors import UserError
from ..ops import multi_level_roi_align

__all__ = ["ROIPooler"]

NEAR = 4096  # float32 numbers on either side of a power of two


class ROIPooler(_ROIPooler):
    """Detectron2's with RoIAlignV2, without its wait for the device at each level.

    The numbers are the same to rounding. Maps in half precision are pooled as they are, under
    autocast too, which would cast and copy all of them at every call; so the result has their
    dtype.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
        *,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            output_size, scales, sampling_ratio, pooler_type, canonical_box_size, canonical_level:
                as for Detectron2's, of which this is "ROIAlignV2" with the sampling ratio 0, in
                squares.
            backend: as for :func:`~mamba_vision.ops.multi_level_roi_align`.

        Raises:
            UserError: another type, sampling ratio or form of the result.
        """
        super().__init__(
            output_size, scales, sampling_ratio, pooler_type, canonical_box_size, canonical_level
        )
        height, _ = self.output_size
        for name, given, wanted in (
            ("pooler_type", pooler_type, "ROIAlignV2"),
            ("sampling_ratio", sampling_ratio, 0),
            ("output_size", self.output_size, (height, height)),
        ):
            if given != wanted:
                raise UserError(
                    f"{name} must be {wanted!r} in this pooler, not {given!r}; for others take "
                    "detectron2.modeling.poolers.ROIPooler"
                )
        self.scales = tuple(scales)
        self.backend = backend

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool the boxes of all images, each from the level for its size.

        Args:
            x: for each level a map (N, C, H, W).
            box_lists: N images' boxes, in pixels of the input.

        Returns:
            (R, C, S, S), image after image, in the dtype of ``x``, in memory as channels_last.

        Raises:
            ValueError: another number of images or levels.
        """
        if len(box_lists) != len(x[0]):
            raise ValueError(
                f"box_lists must have an entry for each of {len(x[0])} images, not {len(box_lists)}"
            )
        boxes = cat([of_image.tensor for of_image in box_lists])
        images = boxes.new_empty(len(boxes), dtype=torch.int32)
        for i, own in enumerate(images.split([len(of_image) for of_image in box_lists])):
            own.fill_(i)
        widths, heights = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        least = _least_areas(
            boxes.device,
            self.min_level,
            self.max_level,
            self.canonical_box_size,
            self.canonical_level,
        )
        levels = torch.bucketize(widths * heights, least, out_int32=True, right=True)
        return multi_level_roi_align(
            x, boxes, images, levels, self.scales, self.output_size[0], backend=self.backend
        )


@functools.cache
def _least_areas(
    device: torch.device,
    min_level: int,
    max_level: int,
    canonical_box_size: int,
    canonical_level: int,
) -> Tensor:
    """The least areas that Detectron2 assigns to each level but the first: (levels - 1,).

    Its logarithms, rounded as on this device, put these a little beside powers of two. They are
    sought among the float32 numbers around those.
    """
    levels = torch.arange(min_level + 1, max_level + 1, device=device)[:, None]
    powers = canonical_box_size**2 * 4.0 ** (levels - canonical_level)
    steps = torch.arange(-NEAR, NEAR, dtype=torch.int32, device=device)
    areas = (powers.view(torch.int32) + steps).view(torch.float32)
    zeros, ones = torch.zeros_like(areas), torch.ones_like(areas)
    boxes = Boxes(torch.stack((zeros, zeros, areas, ones), dim=2).flatten(0, 1))
    found = assign_boxes_to_levels(
        [boxes], min_level, max_level, canonical_box_size, canonical_level
    )
    below = (found.view_as(areas) + min_level < levels).sum(dim=1, keepdim=True)
    return areas.gather(1, below).squeeze(1)
