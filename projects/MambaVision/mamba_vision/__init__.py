"""MambaVision for Detectron2: a hybrid Mamba-Transformer backbone and its Cascade Mask R-CNN."""

__version__ = "0.1.0"
