"""Weights of other origins: reading them safely, translating their names, loading them."""

from .checkpointer import MambaVisionCheckpointer
from .convert import Conversion, convert
from .reader import read_checkpoint

__all__ = ["Conversion", "MambaVisionCheckpointer", "convert", "read_checkpoint"]
