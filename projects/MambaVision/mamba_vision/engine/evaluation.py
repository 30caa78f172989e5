"""Evaluation of a model on its config's test set."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, MutableSequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..checkpoint.files import atomic_write
from ..inference import prepare
from ..inference.prepare import Prepared
from ..precision import autocast

__all__ = ["do_test", "prepare_for_test", "run_evaluator", "share_buffers"]

logger = logging.getLogger(__name__)

LOG_PERIOD = 5  # seconds


def do_test(config: DictConfig, model: nn.Module) -> dict[str, dict[str, float]]:
    """Evaluate a model, in all processes together.

    The results are logged, and written to ``results.json`` in ``train.output_dir``, where a metric
    that cannot be computed (NaN) is ``null``.

    Args:
        config: ``dataloader.test``, ``dataloader.evaluator`` and the switches that
            :func:`prepare_for_test` reads are used; without an evaluator nothing is done.
        model: on its device, bare or in ``DistributedDataParallel``; a prepared copy is evaluated.

    Returns:
        Task to metric to value, e.g. ``results["bbox"]["AP"]`` in percent; empty in all processes
        but the first.

    Raises:
        UserError: the device does not have the precision.
    """
    if config.dataloader.get("evaluator") is None:
        return {}
    if isinstance(model, DistributedDataParallel):
        model = model.module
    share_buffers(model)
    results = run_evaluator(
        prepare_for_test(config, model),
        instantiate(config.dataloader.test),
        instantiate(config.dataloader.evaluator),
    )
    if comm.is_main_process():
        print_csv_format(results)
        output = Path(config.train.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / "results.json") as file:
            file.write(json.dumps(_without_nan(results), indent=2).encode())
    return results


def run_evaluator(
    model: nn.Module,
    loader: Collection,
    evaluator: DatasetEvaluator | MutableSequence[DatasetEvaluator],
) -> dict[str, Any]:
    """Detectron2's ``inference_on_dataset``, which waits for the GPU after every batch; this waits
    for nothing, so that a GPU can go on with a batch's last part while the next one is prepared.

    Args:
        model: in evaluation it is put into eval mode.
        loader: batches of the model's inputs, of a known number. A ``DataLoader`` of PyTorch's pins
            them in a thread of its own, if the model is on a GPU.
        evaluator: of what the model finds; or several.

    Returns:
        What the evaluator does, or all of them together; empty if that is None, as in all processes
        but the first.
    """
    weight = next(model.parameters(), torch.empty(0))
    if weight.is_cuda and isinstance(loader, DataLoader):
        loader.pin_memory = True
    if isinstance(evaluator, MutableSequence):
        evaluator = DatasetEvaluators(evaluator)
    total = len(loader)
    logger.info("Evaluating %d batches", total)
    evaluator.reset()
    with inference_context(model), torch.no_grad():
        start = time.perf_counter()
        for done, inputs in enumerate(loader, 1):
            evaluator.process(inputs, model(inputs))
            seconds = (time.perf_counter() - start) / done
            left = timedelta(seconds=int(seconds * (total - done)))
            words = f"{done} of {total} batches done, {seconds:.4f} s each; ETA: {left}"
            log_every_n_seconds(logging.INFO, words, LOG_PERIOD, name=__name__)
    return evaluator.evaluate() or {}


def prepare_for_test(config: DictConfig, model: nn.Module) -> Prepared:
    """Copy a model for inference, as a config's switches say.

    Args:
        config: ``train.eval_amp``, the precision (float32, ``"fp16"`` or ``"bf16"``),
            ``train.fuse_eval`` and ``train.cuda_graphs`` are used; see
            :func:`~mamba_vision.inference.prepare`.
        model: on its device.

    Raises:
        UserError: the device does not have the precision.
    """
    train, name = config.train, config.train.get("eval_amp") or None
    autocast(name, next(model.parameters()).device)  # says which line cannot be used
    return prepare(
        model,
        dtype=name,
        fuse=train.get("fuse_eval", True),
        cuda_graphs=train.get("cuda_graphs", True),
    )


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: what is evaluated is what is saved.

    In training each process moves its own batch norms' running statistics.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
