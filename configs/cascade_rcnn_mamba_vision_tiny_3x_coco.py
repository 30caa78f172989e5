# Boxes alone: the config of the same size without its mask heads.

from mamba_vision.engine import drop_masks as _drop_masks

from .cascade_mask_rcnn_mamba_vision_tiny_3x_coco import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

_drop_masks(model, dataloader)
train.output_dir = "./output/cascade_rcnn_mamba_vision_tiny_3x_coco"
