# Fine-tuning on few images: the nearer a layer is to the image, the slower it learns, and norms,
# A_log and D keep their weights. All lengths follow train.max_iter but those counted in steps here.

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from mamba_vision.solver import layer_decay

from .train import train

optimizer = L(torch.optim.AdamW)(
    # params.model is set to the model by the training tool
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        overrides={"A_log": {"weight_decay": 0.0}, "D": {"weight_decay": 0.0}},
        lr_factor_func=L(layer_decay)(depths="${model.backbone.bottom_up.depths}", rate=0.8),
    ),
    lr=5e-5,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    fused=True,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=0.05,  # of the whole training
)

train.eval_period = 500
train.checkpointer.period = 500
train.log_period = 20
