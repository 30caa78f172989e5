from .common.data.coco import dataloader
from .common.models.cascade_mask_rcnn_mamba_vision import bottom_up, model
from .common.optim import optimizer
from .common.schedule import lr_multiplier_3x as lr_multiplier
from .common.train import train

model.backbone.bottom_up = bottom_up("small")
train.output_dir = "./output/cascade_mask_rcnn_mamba_vision_small_3x_coco"
