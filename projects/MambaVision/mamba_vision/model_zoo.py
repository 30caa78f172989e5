"""The project's configs and models by name, from a checkout and from an installed wheel alike."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from torch import nn

from .checkpoint import MambaVisionCheckpointer
from .checkpoint.released import DETECTORS as RELEASED
from .errors import UserError

__all__ = ["RELEASED", "get", "get_config", "names"]

CONFIGS = Path(__file__).with_name("configs")


def names() -> list[str]:
    """The names that :func:`get_config` takes, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def get_config(name: str) -> DictConfig:
    """Load a config of the project.

    Args:
        name: the name of a file in ``configs``, with or without ``.py``, e.g.
            ``"cascade_mask_rcnn_mamba_vision_tiny_3x_coco"``.

    Returns:
        A fresh config with the keys ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and
        ``train``, to be changed at will and built with :func:`detectron2.config.instantiate`.

    Raises:
        UserError: there is no config of that name.
    """
    known = names()
    stem = name.removesuffix(".py")
    if stem not in known:
        close = difflib.get_close_matches(stem, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
        raise UserError(f"no config is called {name!r}; {hint}")
    return LazyConfig.load(str(CONFIGS / f"{stem}.py"))


def get(name: str, trained: bool = False, device: str | torch.device | None = None) -> nn.Module:
    """Build the model of a config.

    Args:
        name: as for :func:`get_config`.
        trained: load the released weights, downloaded once and then taken from fvcore's cache;
            else the weights are random.
        device: where the model goes; ``None`` means the GPU if there is one, else the CPU.

    Returns:
        The detector, in training mode as it is built; call ``eval()`` before inference.

    Raises:
        UserError: there is no such config, or it has no released weights.
    """
    config = get_config(name)
    stem = name.removesuffix(".py")
    if trained and stem not in RELEASED:
        raise UserError(
            f"config {stem!r} has no released weights; pass trained=False or one of "
            f"{', '.join(sorted(RELEASED))}"
        )
    model = instantiate(config.model)
    if trained:
        MambaVisionCheckpointer(model).load(RELEASED[stem])
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)
