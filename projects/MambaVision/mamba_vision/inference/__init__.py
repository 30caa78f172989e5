"""Making a trained detector fast: what holds only when no more training follows."""

from .fuse import fuse
from .graphs import Graphs
from .prepare import prepare

__all__ = ["Graphs", "fuse", "prepare"]
