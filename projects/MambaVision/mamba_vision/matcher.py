"""Matching boxes with objects, without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

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
        matches, labels = self.match_images(match_quality_matrix, [len(match_quality_matrix)])
        return matches[0], labels[0]

    def match_images(self, iou: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Match the same boxes with the objects of each of N images.

        Args:
            iou: IoUs (M, R) of all images' objects, image by image, with R boxes, none negative.
            counts: how many objects each image has, N numbers of sum M.

        Returns:
            For each image and box the number of one of the image's objects (N, R), int64, 0 if
            there is none; and the label of their IoU, int8.
        """
        best = iou.new_empty(len(counts), iou.shape[1])
        matches = torch.empty_like(best, dtype=torch.int64)
        for best_i, matches_i, iou_i in zip(best, matches, iou.split(list(counts)), strict=True):
            if len(iou_i):
                torch.max(iou_i, dim=0, out=(best_i, matches_i))
            else:
                best_i.zero_()
                matches_i.zero_()
        labels = torch.full_like(matches, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds[1:-1], self.labels[1:]):
            labels.masked_fill_(best >= threshold, label)
        if self.allow_low_quality_matches and iou.numel():
            is_best = iou == iou.amax(dim=1, keepdim=True)
            has_best = torch.empty_like(labels, dtype=torch.bool)
            for has_best_i, is_best_i in zip(has_best, is_best.split(list(counts)), strict=True):
                torch.any(is_best_i, dim=0, out=has_best_i)
            labels.masked_fill_(has_best, 1)
        return matches, labels
