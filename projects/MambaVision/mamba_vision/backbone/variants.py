"""The published sizes of MambaVision (arXiv:2407.08083, table 1, and the later releases).

Windows are those of ImageNet classification, at 224 pixels unless the name says otherwise; a
detector sets its own. The 21K models differ from those of the same size in their weights alone.
"""

from __future__ import annotations

from typing import Any

__all__ = ["VARIANTS"]

_TINY: dict[str, Any] = {
    "dim": 80,
    "in_dim": 32,
    "depths": (1, 3, 8, 4),
    "num_heads": (2, 4, 8, 16),
    "window_size": (8, 8, 14, 7),
    "drop_path_rate": 0.2,
}
_SMALL = _TINY | {"dim": 96, "in_dim": 64, "depths": (3, 3, 7, 5)}
_BASE = _SMALL | {"dim": 128, "depths": (3, 3, 10, 5), "layer_scale": 1e-5, "drop_path_rate": 0.3}
_LARGE = _BASE | {"dim": 196, "num_heads": (4, 8, 16, 32)}
_LARGE2 = _LARGE | {"depths": (3, 3, 12, 5)}
_LARGE3 = _LARGE | {"dim": 256, "depths": (3, 3, 20, 10), "drop_path_rate": 0.5}
_512 = {"window_size": (8, 8, 32, 16)}

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny2": _TINY | {"depths": (1, 3, 11, 4)},
    "small": _SMALL,
    "base": _BASE,
    "large": _LARGE,
    "large2": _LARGE2,
    "large2_512": _LARGE2 | _512,
    "large3_256": _LARGE3 | {"window_size": (8, 8, 16, 8)},
    "large3_512": _LARGE3 | _512,
}
"""Constructor arguments of :class:`~mamba_vision.backbone.MambaVision`, by variant."""
