"""NMS in Triton: all overlaps at once, then the choice, one program per group."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import triton_support as support
from . import triton_kernels as kernels

__all__ = ["obstacle", "run"]

BOXES = 128  # that a program compares with 32 earlier ones
WORDS = 64  # of 32 earlier boxes each, read together

obstacle = support.obstacle


def run(boxes: Tensor, valid: Tensor, *, threshold: float) -> Tensor:
    """See :func:`mamba_vision.ops.grouped_nms`."""
    return _nms(boxes, valid, threshold)


def _nms_now(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    groups, count = valid.shape
    keep = torch.empty_like(valid, memory_format=torch.contiguous_format)
    if not keep.numel():
        return keep
    words = triton.cdiv(count, 32)
    overlaps = boxes.new_empty((groups, words, count), dtype=torch.int32)
    kept = boxes.new_empty((groups, words), dtype=torch.int32)
    with support.on_device_of(boxes):
        # Fused operations would round otherwise than torchvision on a CPU.
        kernels.find_overlaps[(groups, words, triton.cdiv(count, BOXES))](
            boxes.contiguous(), overlaps, count, words, threshold,
            BOXES=BOXES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        kernels.choose[(groups,)](
            overlaps, valid.contiguous(), kept, keep, count, words, WORDS=WORDS, num_warps=4
        )
    return keep


def _nms_fake(boxes, valid, threshold):
    return torch.empty_like(valid, memory_format=torch.contiguous_format)


_nms = support.define("grouped_nms", _nms_now, _nms_fake)
