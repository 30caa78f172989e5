"""The training's loss on the test set."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.utils.data import DataLoader

from ...errors import UserError
from ...precision import autocast
from ...randomness import seed_all, seeded
from ..evaluation import share_buffers

__all__ = ["validation_loss"]


def validation_loss(config: DictConfig, model: nn.Module) -> dict[str, float]:
    """The mean loss of the images of the test set, term by term, of all processes together.

    A record is read as in training, but augmented as in testing. The norms use their running
    statistics and nothing is dropped. What else is random, as the proposals that a loss is computed
    of, is drawn from the same numbers for each image, so that equal weights have equal losses, on
    however many processes. Nothing of the training changes: neither the model nor the state of its
    random numbers; but processes take over the first one's running statistics, as in testing.

    Args:
        config: ``dataloader`` and ``train.eval_amp`` are used.
        model: on its device, not in ``DistributedDataParallel``.

    Returns:
        Name to value, ``total_loss`` their sum.

    Raises:
        UserError: the data loaders of the config have no such parts.
    """
    sums: dict[str, float] = defaultdict(float)
    images = 0
    device = next(model.parameters()).device
    share_buffers(model)
    with (
        seeded(0),
        torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []),
        _evaluated_layers(model),
        torch.no_grad(),
        autocast(config.train.get("eval_amp"), device),
        EventStorage(),  # for what heads report of training
    ):
        for batch in _loader(config):
            seed_all(0)
            for name, value in model(batch).items():
                sums[name] += float(value) * len(batch)
            images += len(batch)
    parts = comm.all_gather((dict(sums), images))
    count = sum(images for _, images in parts)
    names = list(dict.fromkeys(name for sums, _ in parts for name in sums))
    losses = {name: sum(sums.get(name, 0) for sums, _ in parts) / count for name in names}
    return {"total_loss": sum(losses.values()), **losses}


def _loader(config: DictConfig) -> DataLoader:
    parts = copy.deepcopy(config.dataloader)
    try:
        parts.train.dataset.names = parts.test.dataset.names
        parts.train.mapper.augmentations = parts.test.mapper.augmentations
        return build_detection_test_loader(
            instantiate(parts.train.dataset),
            mapper=instantiate(parts.train.mapper),
            num_workers=parts.test.get("num_workers", 0),
        )
    except OmegaConfBaseException as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            "train.val_loss needs dataset.names and mapper.augmentations in dataloader.train and "
            f"dataloader.test: {reason}; add them, or set train.val_loss=False"
        ) from error


@contextmanager
def _evaluated_layers(model: nn.Module) -> Iterator[None]:
    """Let a model compute losses, and the layers in it work as in testing.

    Containers choose by their mode whether they compute losses; layers, which contain nothing,
    whether they use a batch's statistics or drop something.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = next(module.children(), None) is not None
        model.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
