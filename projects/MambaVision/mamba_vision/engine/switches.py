"""The switches of a training, checked before it starts."""

from __future__ import annotations

import importlib.util
from typing import Any

from omegaconf import DictConfig

from ..errors import UserError
from ..precision import precision
from .hooks import check_wandb

__all__ = ["check_switches"]


def check_switches(config: DictConfig) -> None:
    """Check the switches of a config's ``train``; any may be absent.

    Raises:
        UserError: one has a value that it cannot have, or needs another, or a package.
    """
    train = config.train
    if name := (train.get("amp") or {}).get("dtype"):
        precision(name, "train.amp.dtype")
    if name := train.get("eval_amp"):
        precision(name, "train.eval_amp")
    decay = train.get("ema_decay", 0)
    _check(0 <= decay < 1, f"train.ema_decay={decay} is not from 0 (off) to below 1")
    for key in ("patience", "draw_images"):
        count = train.get(key, 0)
        _check(_is_count(count), f"train.{key}={count} is not a whole number from 0 (off)")
    metric, patience = train.get("best_metric"), train.get("patience")
    _check(
        not patience or metric,
        f"train.patience={patience} needs to know what is better; give train.best_metric=segm/AP",
    )
    _check(
        not patience or (train.eval_period > 0 and config.dataloader.get("evaluator")),
        f"train.patience={patience} counts evaluations, of which there are none; "
        "give train.eval_period=STEPS and dataloader.evaluator",
    )
    project = train.get("wandb_project")
    if project:
        check_wandb(project)
    _check(
        not train.get("draw_images") or project or importlib.util.find_spec("tensorboard"),
        f"train.draw_images={train.get('draw_images')} needs TensorBoard to show them; "
        "run pip install tensorboard",
    )


def _check(holds: Any, otherwise: str) -> None:
    if not holds:
        raise UserError(f"{otherwise}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
