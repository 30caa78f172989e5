"""Operators that PyTorch lacks or is slow at: those of the window stages, and two of the heads.

Shape legend of those of the window stages, which take (B, L, D):

    B   batch: windows (or whole maps) scanned side by side
    L   tokens of a sequence, row by row over a window
    D   channels, half the width of the mixer
    N   state numbers a channel keeps (8 in MambaVision)

``selective_scan``          the recurrence of Mamba (arXiv:2312.00752, equation 2 and section 3.2)
``depthwise_conv1d_silu``   a 'same' convolution of width 3 along L, then SiLU (arXiv:2407.08083,
                            equation 6)
``mamba_inner``             both, with the projections between them
``add_layer_norm``          a residual connection and the LayerNorm after it, in one pass
``linear``                  a linear layer, whose backward pass is faster
``mlp``                     two with a GELU between, which also keep less for it
``multi_level_roi_align``   RoIAlign over the levels of a feature pyramid (arXiv:1703.06870, section
                            3); its folder has its shape legend
``grouped_nms``             non-maximum suppression of many groups of boxes at once

Each operator is a folder: its ``__init__`` holds the public function, ``reference.py`` the
definition, but for NMS, where torchvision has it, and each further file one faster backend;
``backends.py`` chooses among them.
"""

from .conv1d import depthwise_conv1d_silu
from .inner import mamba_inner
from .layer_norm import add_layer_norm
from .linear import linear, mlp
from .nms import grouped_nms
from .roi_align import multi_level_roi_align
from .selective_scan import selective_scan

__all__ = [
    "add_layer_norm",
    "depthwise_conv1d_silu",
    "grouped_nms",
    "linear",
    "mamba_inner",
    "mlp",
    "multi_level_roi_align",
    "selective_scan",
]
