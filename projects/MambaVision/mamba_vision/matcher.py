"""Matching boxes with objects, without waiting for the GPU."""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher as _Matcher
from torch import Tensor

__all__ = ["Matcher"]


class Matcher(_Matcher):
    """Detectron2's matcher, with the same results.

    Detectron2 looks whether any IoU is negative, and lists the best boxes of each object; for both
    the CPU has to wait until the GPU is done with all that it was given before.
    """

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match each box with the object of highest IoU.

        Args:
            match_quality_matrix: IoUs (M, R) of M objects with R boxes, none negative.

        Returns:
            For each box an object's number (R,), int64, 0 if there is none; and the label of its
            IoU, int8.
        """
        if not match_quality_matrix.numel():
            return super().__call__(match_quality_matrix)
        iou, matches = match_quality_matrix.max(dim=0)
        labels = torch.full_like(matches, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds[1:-1], self.labels[1:]):
            labels.masked_fill_(iou >= threshold, label)
        if self.allow_low_quality_matches:
            best = match_quality_matrix.amax(dim=1, keepdim=True)
            labels.masked_fill_((match_quality_matrix == best).any(dim=0), 1)
        return matches, labels
