"""What a training can do besides stepping: a file each, switched in ``configs/common/train.py``."""

from .early_stopping import EarlyStopping, StopTraining
from .ema import EMA
from .pictures import draw_predictions
from .validation_loss import validation_loss
from .weights_and_biases import WandbWriter, check_wandb

__all__ = [
    "EMA",
    "EarlyStopping",
    "StopTraining",
    "WandbWriter",
    "check_wandb",
    "draw_predictions",
    "validation_loss",
]
