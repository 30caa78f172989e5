"""Fitting a run to the machine: device, precision and norms."""

from __future__ import annotations

import argparse
import logging

import torch
from detectron2.config import instantiate
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..precision import precision
from .compilation import compile_backbone

__all__ = ["autocast_dtype", "build_model", "fit_to_machine", "limit_threads", "scale_lr"]

logger = logging.getLogger(__name__)

REFERENCE_BATCH = 16  # images a step, for which a config's learning rate is written


def fit_to_machine(args: argparse.Namespace, config: DictConfig) -> list[str]:
    """Set, in place, what the machine cannot do to what it can; returns a word on each change."""
    words = []
    train = config.train
    train.device = train.get("device", "cuda")
    if str(train.device).startswith("cuda") and (
        args.num_gpus == 0 or not torch.cuda.is_available()
    ):
        train.device = "cpu"
        words.append("No GPU" + (" found" if args.num_gpus else " asked for") + ": using the CPU")
    if train.device == "cpu" and train.get("amp", {}).get("enabled", False):
        train.amp.enabled = False
        words.append("On the CPU train.amp is off: everything is computed in float32")
    limit_threads(train.device)
    return words


def limit_threads(device: str | torch.device) -> None:
    """For a GPU let PyTorch's operators on the CPU run in the thread that calls them.

    They are small there, but for some, as the maximum of two numbers by which Detectron2 pads
    images, PyTorch wakes other threads. Beside data loaders that costs milliseconds each time.
    """
    if torch.device(device).type != "cpu":
        torch.set_num_threads(1)


def autocast_dtype(config: DictConfig) -> torch.dtype | None:
    """What ``train.amp`` lets a training compute in; ``None`` for float32 throughout.

    Raises:
        UserError: there is no such ``train.amp.dtype``.
    """
    amp = config.train.get("amp", {})
    if not amp.get("enabled", False):
        return None
    return precision(amp.get("dtype", "fp16"), "train.amp.dtype")


def scale_lr(config: DictConfig) -> None:
    """With ``train.auto_scale_lr``, scale ``optimizer.lr`` by the images a step over 16, in place.

    This is the linear scaling rule (arXiv:1706.02677, section 2.1). The number of steps, the
    warm-up and the weight decay stay as they are.
    """
    if not config.train.get("auto_scale_lr", False):
        return
    batch, before = config.dataloader.train.total_batch_size, config.optimizer.lr
    config.optimizer.lr = before * batch / REFERENCE_BATCH
    logger.info(
        "train.auto_scale_lr: optimizer.lr = %g x %d / %d = %g",
        before,
        batch,
        REFERENCE_BATCH,
        config.optimizer.lr,
    )


def build_model(config: DictConfig) -> nn.Module:
    """The model of a config, on ``train.device``; ``train.compile`` compiles its backbone.

    ``torch.nn.SyncBatchNorm`` cannot work between processes on the CPU; there Detectron2's
    ``NaiveSyncBatchNorm``, whose state has the same names, takes its place.
    """
    model = instantiate(config.model)
    if config.train.device == "cpu" and comm.get_world_size() > 1:
        model = _with_naive_sync_norms(model)
    model = model.to(config.train.device)
    if config.train.device != "cpu":
        # The maps are so in memory; else a convolution's weights would be turned at every call.
        model = model.to(memory_format=torch.channels_last)
    if config.train.get("compile"):
        compile_backbone(model)
    return model


def _with_naive_sync_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.SyncBatchNorm):
        norm = NaiveSyncBatchNorm(
            module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
            stats_mode="N",  # processes may bring different numbers of boxes, or none
        )
        norm.load_state_dict(module.state_dict())
        return norm
    for name, child in module.named_children():
        setattr(module, name, _with_naive_sync_norms(child))
    return module
