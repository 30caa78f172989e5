"""Steps of training, row by row."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf

from ..data import check_dataset
from ..engine.machine import build_model
from ..engine.trainer import Trainer
from ..transfer import pin
from .inputs import add_targets, draw_images
from .options import positive
from .rows import BOTTOM_UP, Row, Switch, make_rows
from .subject import Weights
from .timing import Memory, Table, milliseconds, ratio, synchronize

__all__ = ["add_arguments", "compare"]

Batch = list[dict[str, Any]]

LOSS = 0.1  # of plain's, by which a row's first loss may differ
STEPS = 3  # in a row, in every round
WARM_UP = 4  # steps: CUDA graphs are recorded in the third
OVERFLOWS = 20  # steps more at most, for float16's gradient scale to settle
OBJECTS = 8  # in an image, as in COCO's
PHASES = ("data", "forward", "backward", "optimizer")
COLUMNS = (
    *("row", "padding", "step ms", "speed", *(f"{phase} ms" for phase in PHASES)),
    *("memory MiB", "loss"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training steps to ``parser``."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train-images", type=positive, default=2, metavar="N", help="a step (%(default)s)"
    )
    group.add_argument(
        "--checkpointing", action="store_true", help="also all with activation checkpointing"
    )
    group.add_argument("--compile", action="store_true", help="also all with train.compile")
    group.add_argument(
        "--data", action="store_true", help="train on what the config's loader gives"
    )


def compare(
    config: DictConfig,
    switches: Sequence[Switch],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> bool:
    """Check the rows and time them in training; returns whether all are right.

    The learning rate is 0, so that all steps of all rows begin with the same weights.
    """
    config = _config(config, args)
    trained = [s for s in switches if s.of_training]
    plain = make_rows(config, trained, args.window_padding, ["plain"])
    rows = make_rows(config, trained, args.window_padding, args.only)
    rows += _rows_beyond(config, trained, args)
    images = _images(config, args)
    losses = {
        row.padding: _Training(row, weights, dtype, args.device).loss(images) for row in plain
    }
    batches = _batches(config, args)
    correct = True
    yardstick: _Training | None = None
    table = Table(COLUMNS)
    for row in rows:
        memory = Memory(args.device)
        training = _Training(row, weights, dtype, args.device)
        loss = training.loss(images)
        training.settle(batches)
        used = memory.peak(partial(training.step, batches))
        is_right = abs(loss / losses[row.padding] - 1) <= LOSS
        correct &= is_right
        yardstick = yardstick or training
        phases, steps, others = [], [], []
        for _ in range(args.rounds):
            phases.append(training.time(batches))
            steps.append(sum(phases[-1]))
            others.append(steps[-1] if yardstick is training else sum(yardstick.time(batches)))
        table.add(
            (
                *row.cells,
                milliseconds(steps),
                ratio(others, steps),
                *(milliseconds(times) for times in zip(*phases)),
                used,
                f"{loss:.3f}" + ("" if is_right else " WRONG"),
            )
        )
        del training  # its memory is the next one's
    return correct


def warm_steps(
    config: DictConfig,
    switches: Sequence[Switch],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a step of training of all is called, and one that is warm, for each padding."""
    config = _config(config, args)
    trained = [s for s in switches if s.of_training]
    for row in make_rows(config, trained, args.window_padding, ["all"]):
        batches = _batches(config, args)
        training = _Training(row, weights, dtype, args.device)
        training.settle(batches)
        yield f"a step of {row.name}, {row.padding}", partial(training.step, batches)


def _config(config: DictConfig, args: argparse.Namespace) -> DictConfig:
    if args.data:
        names = config.dataloader.train.dataset.names
        for name in [names] if isinstance(names, str) else names:
            check_dataset(name, config.model.roi_heads.num_classes)
        OmegaConf.update(config, "dataloader.train.total_batch_size", args.train_images)
    config.optimizer.lr = 0.0
    return config


def _images(config: DictConfig, args: argparse.Namespace) -> Batch:
    images = draw_images(args.train_images, args.size)
    masks = "mask_in_features" in config.model.roi_heads
    add_targets(images, OBJECTS, config.model.roi_heads.num_classes, masks)
    return [pin(image) for image in images] if args.device == "cuda" else images  # as loaders do


def _batches(config: DictConfig, args: argparse.Namespace) -> Iterator[Batch]:
    if args.data:
        return iter(instantiate(config.dataloader.train))
    return itertools.repeat(_images(config, args))


def _rows_beyond(
    config: DictConfig, switches: Sequence[Switch], args: argparse.Namespace
) -> list[Row]:
    rows = []
    for row in make_rows(config, switches, args.window_padding, ["all"]):
        if args.checkpointing:
            changed = row.config.copy()
            OmegaConf.update(changed, f"{BOTTOM_UP}.activation_checkpointing", True)
            rows.append(replace(row, name="all, checkpointed", config=changed))
        if args.compile:
            changed = row.config.copy()
            changed.train.compile = True
            rows.append(replace(row, name="all, compiled", config=changed))
    return rows


class _Training(HookBase):
    """A row's training: the project's own trainer, and a look at the clock between the phases."""

    def __init__(self, row: Row, weights: Weights, dtype: torch.dtype, device: str) -> None:
        config = row.config.copy()
        model = build_model(config)
        model.load_state_dict(weights.state)
        config.optimizer.params.model = model
        self._device = device
        self._batches: Iterator[Batch] = iter(())
        self._marks: list[Any] = []
        self._storage = EventStorage()
        half = None if dtype is torch.float32 else dtype
        optimizer = instantiate(config.optimizer)
        self._trainer = Trainer(model, self, optimizer, seed=0, dtype=half, max_nonfinite=99)
        self._trainer.register_hooks([self])
        self._trainer.iter = 0
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def after_backward(self) -> None:
        self._mark()

    def loss(self, images: Batch) -> float:
        """The total loss of a step, NaN if it is not finite."""
        self.step(itertools.repeat(images))
        return self._storage.latest().get("total_loss", (math.nan, 0))[0]

    def settle(self, batches: Iterator[Batch]) -> None:
        """Step until all is as in any later step, and float16's gradients do not overflow."""
        scaler = self._trainer.grad_scaler
        for step in range(WARM_UP + OVERFLOWS):
            before = scaler.get_scale()
            self.step(batches)
            if step + 1 >= WARM_UP and scaler.get_scale() >= before:
                return

    def time(self, batches: Iterator[Batch]) -> list[float]:
        """Seconds that a step spends in each phase, the mean of some in a row."""
        synchronize(self._device)
        phases = []
        for _ in range(STEPS):
            self.step(batches)
            phases.append(self._marks)
        synchronize(self._device)
        steps = [[_between(a, b) for a, b in itertools.pairwise(marks)] for marks in phases]
        return [statistics.mean(times) for times in zip(*steps)]

    def step(self, batches: Iterator[Batch]) -> None:
        """Train on the next batch."""
        self._batches, self._marks = batches, []
        with self._storage:
            self._mark()
            self._trainer.run_step()
            self._mark()

    def _mark(self) -> None:
        if self._device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
