"""Region heads: the cascade with class-specific boxes and a mask head per stage."""

from .cascade import ClassSpecificCascadeROIHeads, StageMaskHeads

__all__ = ["ClassSpecificCascadeROIHeads", "StageMaskHeads"]
