"""Pictures of what a model finds, in the course of its training."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.evaluation.evaluator import inference_context
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import nn

from ...data.mappers import read_image
from ...precision import autocast
from ..drawing import draw_instances
from ..predictor import dataset_metadata

__all__ = ["draw_predictions"]

CONFIDENCE = 0.5
LONG_SIDE = 800  # pixels that a smaller image is drawn at, or labels would hide it


def draw_predictions(config: DictConfig, model: nn.Module) -> None:
    """Hand pictures of a few images of the test set to the writers of the training's events.

    They are the same images each time, spread evenly over the set. Detections of a score of 0.5 and
    above are drawn. The main process draws, the others do nothing.

    Args:
        config: ``train.draw_images``, the number of images, ``train.eval_amp`` and
            ``dataloader.test`` are used.
        model: on its device, not in ``DistributedDataParallel``; its mode is kept.

    Raises:
        UserError: an image cannot be read.
    """
    if not comm.is_main_process():
        return
    test = copy.deepcopy(config.dataloader.test)
    records, mapper = instantiate(test.dataset), instantiate(test.mapper)
    metadata = dataset_metadata(config)
    count = min(config.train.draw_images, len(records))
    device = next(model.parameters()).device
    for k in range(count):
        record = records[k * len(records) // count]
        with (
            inference_context(model),
            torch.no_grad(),
            autocast(config.train.get("eval_amp"), device),
        ):
            found = model([mapper(record)])[0]["instances"].to("cpu")
        image = read_image(record["file_name"])
        scale = max(1.0, LONG_SIDE / max(image.shape))
        picture = draw_instances(image, found[found.scores >= CONFIDENCE], metadata, scale)
        name = f"predictions/{k:02d}_{Path(record['file_name']).stem}"
        get_event_storage().put_image(name, np.ascontiguousarray(picture.transpose(2, 0, 1)))
