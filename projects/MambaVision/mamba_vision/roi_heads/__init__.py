"""Region heads: the pooler, and the cascade with class-specific boxes and a mask head per stage."""

from .cascade import ClassSpecificCascadeROIHeads
from .mask_head import MaskHead, StageMaskHeads
from .pooler import ROIPooler
from .predictor import ClassSpecificOutputLayers

__all__ = [
    "ClassSpecificCascadeROIHeads",
    "ClassSpecificOutputLayers",
    "MaskHead",
    "ROIPooler",
    "StageMaskHeads",
]
