"""Boxes as deltas from others, in few operations and without waiting for the GPU."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform as _Box2BoxTransform
from torch import Tensor

__all__ = ["Box2BoxTransform"]


class Box2BoxTransform(_Box2BoxTransform):
    """Detectron2's transform, with the same results.

    It treats x and y together, which takes a third of the kernels, and does not look whether the
    source boxes have an area, for which the CPU has to wait. Two weights, those of x and y or those
    of width and height, that differ from each other are left to Detectron2.
    """

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """The deltas (R, 4), from source boxes to target boxes (R, 4), all float32."""
        wx, wy, ww, wh = self.weights
        if wx != wy or ww != wh:
            return super().get_deltas(src_boxes, target_boxes)
        centers, sides = _centers_and_sides(src_boxes)
        target_centers, target_sides = _centers_and_sides(target_boxes)
        shifts = wx * (target_centers - centers) / sides
        return torch.cat([shifts, ww * torch.log(target_sides / sides)], dim=1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """The boxes (R, 4 k), float32, that k deltas (R, 4 k) each make of boxes (R, 4)."""
        wx, wy, ww, wh = self.weights
        if wx != wy or ww != wh:
            return super().apply_deltas(deltas, boxes)
        centers, sides = _centers_and_sides(boxes.float()[:, None])
        shifts, scales = deltas.float().unflatten(1, (-1, 4)).split(2, dim=2)
        centers = shifts / wx * sides + centers
        sides = (scales / ww).clamp(max=self.scale_clamp).exp() * sides
        corners = [centers.sub(sides, alpha=0.5), centers.add(sides, alpha=0.5)]
        return torch.cat(corners, dim=2).flatten(1)


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2) each, of boxes (..., 4)."""
    start, end = boxes.split(2, dim=-1)
    sides = end - start
    return start.add(sides, alpha=0.5), sides
