"""An exponential moving average of the weights."""

from __future__ import annotations

from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["EMA"]

Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA(HookBase):
    """Averages the weights after every step: ema = d * ema + (1 - d) * weights.

    The average starts from the weights that the training starts from. In step t, counted from 1,
    d = min(decay, (1 + t) / (10 + t)), as in TensorFlow's ``ExponentialMovingAverage``: without
    such a warm-up the first weights would stay for some 1 / (1 - decay) steps. Buffers, as batch
    norms' statistics, are the model's own.

    Args:
        model: on its device, not in ``DistributedDataParallel``.
        decay: in (0, 1); averages over some 1 / (1 - decay) steps.

    Attributes:
        averaged: PyTorch's ``AveragedModel``, for a checkpointer to keep.
        model: the averaged model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averaged = AveragedModel(model, multi_avg_fn=self._average)
        self.averaged.requires_grad_(False)
        self.model: nn.Module = self.averaged.module
        self._trained = model

    @property
    def started(self) -> bool:
        """Whether there is an average, of this training or of one that is resumed."""
        return bool(self.averaged.n_averaged)

    def before_train(self) -> None:
        if not self.started:
            self.averaged.update_parameters(self._trained)

    def after_step(self) -> None:
        self.averaged.update_parameters(self._trained)

    def _average(self, averages: Tensors, weights: Tensors, _: Tensor | int) -> None:
        # AveragedModel counts the weights that the average started from, too: at step t it is t.
        step = int(self.averaged.n_averaged)
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, weights, step)
