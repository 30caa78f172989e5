"""Where NVIDIA publishes the weights, as listed on https://github.com/NVlabs/MambaVision."""

from __future__ import annotations

__all__ = ["BACKBONES", "DETECTORS"]

_HOME = "https://huggingface.co/nvidia/{repository}/resolve/main/{file}"


def _url(repository: str, file: str) -> str:
    return _HOME.format(repository=repository, file=file)


DETECTORS: dict[str, str] = {
    name: _url(name, f"{name}.pth")
    for name in (
        "cascade_mask_rcnn_mamba_vision_tiny_3x_coco",
        "cascade_mask_rcnn_mamba_vision_small_3x_coco",
        "cascade_mask_rcnn_mamba_vision_base_3x_coco",
    )
}
"""Config name -> address of the detector that mmdetection trained to it."""

BACKBONES: dict[str, str] = {
    "mambavision_tiny_1k": _url("MambaVision-T-1K", "mambavision_tiny_1k.pth.tar"),
    "mambavision_tiny2_1k": _url("MambaVision-T2-1K", "mambavision_tiny2_1k.pth.tar"),
    "mambavision_small_1k": _url("MambaVision-S-1K", "mambavision_small_1k.pth.tar"),
    "mambavision_base_1k": _url("MambaVision-B-1K", "mambavision_base_1k.pth.tar"),
    "mambavision_large_1k": _url("MambaVision-L-1K", "mambavision_large_1k.pth.tar"),
    "mambavision_large2_1k": _url("MambaVision-L2-1K", "mambavision_large2_1k.pth.tar"),
    "mambavision_base_21k": _url("MambaVision-B-21K", "mambavision_base_21k.pth.tar"),
    "mambavision_large_21k": _url("MambaVision-L-21K", "mambavision_large_21k.pth.tar"),
    "mambavision_large2_512_21k": _url(
        "MambaVision-L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar"
    ),
    "mambavision_large3_256_21k": _url(
        "MambaVision-L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar"
    ),
    "mambavision_large3_512_21k": _url(
        "MambaVision-L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar"
    ),
}
"""Name -> address of the backbone that was trained on ImageNet."""
