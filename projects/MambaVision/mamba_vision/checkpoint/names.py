"""What the released files call their tensors, and what Detectron2 calls them."""

from __future__ import annotations

import re

__all__ = ["CLASSIFIER", "WRAPPERS", "head_name"]

# Prefixes that training with several GPUs or another library's wrapper puts before every name.
WRAPPERS = ("module.", "model.", "encoder.")

# Of an ImageNet file, what follows the backbone.
CLASSIFIER = ("norm.", "head.")

_END = r"(weight|bias)"
_BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

# mmdetection's Cascade Mask R-CNN. A number in braces is that group's, plus what is written after
# it: mmdetection counts layers from 0; Detectron2 counts them from 1, and the levels of its pyramid
# by the power of two of their stride, from 2.
_HEADS = [
    (rf"neck\.lateral_convs\.(\d+)\.conv\.{_END}", "backbone.fpn_lateral{0+2}.{1}"),
    (rf"neck\.fpn_convs\.(\d+)\.conv\.{_END}", "backbone.fpn_output{0+2}.{1}"),
    (rf"rpn_head\.rpn_conv\.{_END}", "proposal_generator.rpn_head.conv.{0}"),
    (rf"rpn_head\.rpn_cls\.{_END}", "proposal_generator.rpn_head.objectness_logits.{0}"),
    (rf"rpn_head\.rpn_reg\.{_END}", "proposal_generator.rpn_head.anchor_deltas.{0}"),
    (
        rf"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.{_END}",
        "roi_heads.box_head.{0}.conv{1+1}.{2}",
    ),
    (
        rf"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.{_BN}",
        "roi_heads.box_head.{0}.conv{1+1}.norm.{2}",
    ),
    (
        rf"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.{_END}",
        "roi_heads.box_head.{0}.fc{1+1}.{2}",
    ),
    (rf"roi_head\.bbox_head\.(\d+)\.fc_cls\.{_END}", "roi_heads.box_predictor.{0}.cls_score.{1}"),
    (rf"roi_head\.bbox_head\.(\d+)\.fc_reg\.{_END}", "roi_heads.box_predictor.{0}.bbox_pred.{1}"),
    (
        rf"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.{_END}",
        "roi_heads.mask_head.{0}.mask_fcn{1+1}.{2}",
    ),
    (rf"roi_head\.mask_head\.(\d+)\.upsample\.{_END}", "roi_heads.mask_head.{0}.deconv.{1}"),
    (rf"roi_head\.mask_head\.(\d+)\.conv_logits\.{_END}", "roi_heads.mask_head.{0}.predictor.{1}"),
]


def head_name(name: str) -> str | None:
    """Detectron2's name of a tensor of mmdetection's neck, RPN or RoI heads; None if it has none.

    The tensors themselves are laid out alike: anchors vary by ratio, box deltas go x, y, w, h
    within a class, the background is the last class, and features are flattened as (C, H, W).
    """
    for pattern, target in _HEADS:
        if match := re.fullmatch(pattern, name):
            return re.sub(
                r"\{(\d)(?:\+(\d))?\}", lambda hole: _fill(match.groups(), *hole.groups()), target
            )
    return None


def _fill(groups: tuple[str, ...], index: str, offset: str | None) -> str:
    value = groups[int(index)]
    return value if offset is None else str(int(value) + int(offset))
