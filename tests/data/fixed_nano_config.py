"""The nano detector without chance and without what images of a batch do to each other.

Norms are frozen, images padded to one size, and every anchor and every proposal is sampled, so that
it does not matter in which process or micro-batch an image is.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver.build import get_default_optimizer_params

from mamba_vision import model_zoo

config = model_zoo.get_config("cascade_mask_rcnn_mamba_vision_nano_shapes")
dataloader, lr_multiplier, train = config.dataloader, config.lr_multiplier, config.train


def frozen(detector):
    return FrozenBatchNorm2d.convert_frozen_batchnorm(detector)


detector = config.model
detector.backbone.square_pad = 320

detector.proposal_generator.update(batch_size_per_image=30000, post_nms_topk=(40, 40))
detector.roi_heads.update(batch_size_per_image=1000, positive_fraction=1.0, proposal_append_gt=True)
for matcher in detector.roi_heads.proposal_matchers:
    matcher.thresholds = [0.1]  # so that an untrained net's proposals hit something

model = L(frozen)(detector=detector)

dataloader.train.update(aspect_ratio_grouping=False, num_workers=0)
dataloader.evaluator = None
# Adam's first steps depend on a gradient's sign alone, and would blow up roundings
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(), lr=0.01, momentum=0.9, weight_decay=1e-4
)
lr_multiplier.warmup_iters = 1
train.update(device="cpu", seed=3, max_iter=3, log_period=1)
