"""Making a trained detector fast: what holds only when no more training follows."""

from .fuse import fuse

__all__ = ["fuse"]
