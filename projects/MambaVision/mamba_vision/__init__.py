"""MambaVision for Detectron2: a hybrid Mamba-Transformer backbone and its Cascade Mask R-CNN.

The public names, in the order in which an image meets them, and then what stands at the side.
They are imported when first used, so that importing the package alone costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "mamba_vision needs Detectron2, which is not on PyPI; with torch installed, run: "
        "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git",
        name="detectron2",
    )

if TYPE_CHECKING:
    from . import model_zoo
    from .backbone import VARIANTS, MambaVision
    from .checkpoint import MambaVisionCheckpointer, read_checkpoint
    from .errors import UserError
    from .ops import depthwise_conv1d_silu, selective_scan
    from .roi_heads import ClassSpecificCascadeROIHeads

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  the order of the flow
    "MambaVision",
    "VARIANTS",
    "depthwise_conv1d_silu",
    "selective_scan",
    "ClassSpecificCascadeROIHeads",
    "MambaVisionCheckpointer",
    "read_checkpoint",
    "model_zoo",
    "UserError",
]

_HOMES = {
    "MambaVision": "backbone",
    "VARIANTS": "backbone",
    "depthwise_conv1d_silu": "ops",
    "selective_scan": "ops",
    "ClassSpecificCascadeROIHeads": "roi_heads",
    "MambaVisionCheckpointer": "checkpoint",
    "read_checkpoint": "checkpoint",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{_HOMES.get(name, name)}", __name__)
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
