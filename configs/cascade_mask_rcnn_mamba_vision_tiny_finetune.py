# From released weights to classes of one's own; here those of the drawn scenes.

from mamba_vision.model_zoo import RELEASED as _RELEASED

from .common.data.coco import dataloader
from .common.fine_tuning import lr_multiplier, optimizer, train
from .common.models.cascade_mask_rcnn_mamba_vision import model

# What other data change; docs/fine_tuning.md tells how to do it in a file of one's own.
dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
model.roi_heads.num_classes = 6
train.init_checkpoint = _RELEASED["cascade_mask_rcnn_mamba_vision_tiny_3x_coco"]
train.max_iter = 5000
optimizer.lr = 5e-5  # 1e-4 at 16 images a step, and with the square root of their number
dataloader.train.total_batch_size = 4

train.output_dir = "./output/cascade_mask_rcnn_mamba_vision_tiny_finetune"
