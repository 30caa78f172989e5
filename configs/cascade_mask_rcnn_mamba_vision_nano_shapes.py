# The whole detector, small enough to train on two CPU cores in minutes, for the drawn scenes.

import torch as _torch

from mamba_vision.data.shapes import CLASSES as _CLASSES

from .common.data.shapes import dataloader
from .common.models.cascade_mask_rcnn_mamba_vision import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier_3x as lr_multiplier
from .common.train import train

model.backbone.bottom_up.update(
    dim=16,
    in_dim=16,
    depths=(1, 1, 2, 2),
    num_heads=(2, 2, 2, 4),
    window_size=(8, 8, 16, 8),
    drop_path_rate=0.0,
)
model.backbone.out_channels = 32

# Images of 192 to 320 pixels: boxes half or a quarter the size that COCO wants, and fewer.
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=(300, 200), post_nms_topk=(200, 100)
)
model.roi_heads.batch_size_per_image = 32
model.roi_heads.box_pooler.canonical_box_size = 112
model.roi_heads.mask_pooler.canonical_box_size = 112

model.roi_heads.num_classes = len(_CLASSES)
for _box_head, _mask_head in zip(model.roi_heads.box_heads, model.roi_heads.mask_heads):
    _box_head.update(conv_dims=[48], fc_dims=[96], conv_norm="BN")
    _mask_head.conv_dims = [48, 48, 48]

dataloader.train.update(total_batch_size=4, num_workers=1)
dataloader.test.num_workers = 1

optimizer.lr = 3e-3
lr_multiplier.warmup_iters = 100

# 640 steps of 4 images see the 600 images 4.3 times
train.update(
    output_dir="./output/cascade_mask_rcnn_mamba_vision_nano_shapes",
    max_iter=640,
    eval_period=0,
    log_period=20,
    seed=1,  # the same order and samples in every run
    device="cuda" if _torch.cuda.is_available() else "cpu",
)
train.amp.enabled = False
train.checkpointer.period = 320
