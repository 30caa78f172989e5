"""Region heads: the pooler, and the cascade with class-specific boxes and a mask head per stage."""

from .cascade import ClassSpecificCascadeROIHeads, StageMaskHeads
from .pooler import ROIPooler

__all__ = ["ClassSpecificCascadeROIHeads", "ROIPooler", "StageMaskHeads"]
