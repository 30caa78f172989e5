"""The backbone: MambaVision, and the sizes it is published in."""

from .mamba_vision import MambaVision
from .variants import VARIANTS

__all__ = ["VARIANTS", "MambaVision"]
