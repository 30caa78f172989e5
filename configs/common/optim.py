import torch
from detectron2.config import LazyCall as L

from mamba_vision.solver import parameter_groups

optimizer = L(torch.optim.AdamW)(
    # params.model is set to the model by the training tool
    params=L(parameter_groups)(no_decay=[r"^backbone\..*norm"]),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    fused=True,
)
