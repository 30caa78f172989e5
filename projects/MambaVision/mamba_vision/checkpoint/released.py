"""Where NVIDIA publishes the detectors, as listed on https://github.com/NVlabs/MambaVision."""

from __future__ import annotations

__all__ = ["DETECTORS"]

DETECTORS: dict[str, str] = {
    name: f"https://huggingface.co/nvidia/{name}/resolve/main/{name}.pth"
    for name in (
        "cascade_mask_rcnn_mamba_vision_tiny_3x_coco",
        "cascade_mask_rcnn_mamba_vision_small_3x_coco",
        "cascade_mask_rcnn_mamba_vision_base_3x_coco",
    )
}
"""Config name -> address of the weights that mmdetection trained to it (CC-BY-NC-SA-4.0)."""
