"""Region heads: the pooler, and the cascade with class-specific boxes and a mask head per stage."""

from .cascade import ClassSpecificCascadeROIHeads, StageMaskHeads
from .mask_head import MaskHead
from .pooler import ROIPooler
from .predictor import ClassSpecificOutputLayers

__all__ = [
    "ClassSpecificCascadeROIHeads",
    "ClassSpecificOutputLayers",
    "MaskHead",
    "ROIPooler",
    "StageMaskHeads",
]
