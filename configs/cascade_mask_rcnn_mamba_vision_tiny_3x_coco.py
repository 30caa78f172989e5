from .common.data.coco import dataloader
from .common.models.cascade_mask_rcnn_mamba_vision import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier_3x as lr_multiplier
from .common.train import train

train.output_dir = "./output/cascade_mask_rcnn_mamba_vision_tiny_3x_coco"
