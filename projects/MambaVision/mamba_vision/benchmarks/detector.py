"""Time a config's detector with its optimisations switched on one after the other.

Each row has one more of them on than the one above; "plain" has none. The others are measured by
the first row. Weights and images are random, but such that about as much is found as by a trained
detector. First each row's detections are compared with those of plain in float32: "lost" is the
share of detections without a counterpart of the same class. In float32 without TF32 it must have
the score to 0.01, the box with an intersection over union of 0.9 and the mask with one of 0.8, and
a row may lose 2%. In the number format that is timed, 0.05, 0.8 and 0.7 will do, and a row may lose
twice what plain loses, and 5% besides; by rounding alone random weights lose many, most of all in
bfloat16. In training a row's first loss may differ from plain's by 10%.

In every round each row and the first run in turn. Times are medians over the rounds, ratios medians
of the rounds' ratios; autocast surrounds all calls, as in an evaluation. An image is on the CPU at
first, and its masks are pasted at the size of its file. "First" and "second" are the first calls of
a row, of one image, and of one of another size; what is compiled or chosen once in a process is
left to the row that comes first (--only). The memory is the peak of a call over what was there
before the row, for evaluation without the weights, which rows share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.structures import Instances
from omegaconf import DictConfig
from torch import nn

from . import loops, training
from .inputs import draw_images
from .options import add_options, positive, start
from .profiling import print_profile
from .rows import Row, Switch, make_rows
from .subject import ROUGH, Weights, detector, draw_weights, evaluate, lost
from .timing import Memory, Table, alternate, exact, milliseconds, ratio, seconds, synchronize

__all__ = ["add_arguments", "run"]

LOST = 0.02  # of the detections, in float32
LOST_ROUGHLY = 0.05  # besides twice what plain loses
STEP = 32  # pixels that the second size is higher
COLUMNS = (
    *("row", "padding", "latency ms", "speed", "first ms", "second ms"),
    *("new size: first ms", "second ms", "memory MiB", "lost in fp32", "lost as timed"),
)
TASKS = ("latency", "throughput", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison to ``parser``."""
    add_options(parser)
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="NAME", help="(all three)"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 2, 4, 8, 16], metavar="N"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also what the CPU and the GPU do in an image and in a training step of all",
    )
    training.add_arguments(parser)
    loops.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables; return 1 if a row computed something wrong, else 0."""
    config, switches, dtype = start(args)
    evaluated = [s for s in switches if s.of_evaluation]
    rows = make_rows(config, evaluated, args.window_padding, args.only)
    plain = make_rows(config, evaluated, args.window_padding, ["plain"])
    weights = draw_weights(plain[0], args.size, args.device)
    correct = True
    if {"latency", "throughput"} & set(args.tasks):
        correct &= _latency(rows, plain, weights, dtype, args)
    if "throughput" in args.tasks:
        _throughput(rows, weights, dtype, args)
    if "training" in args.tasks:
        correct &= training.compare(config, switches, weights, dtype, args)
    if args.profile:
        _profiles(config, switches, weights, dtype, args)
    if args.varied:
        loops.run_varied(rows, weights, dtype, args)
    if args.dataset:
        in_loop = [s for s in switches if not s.training]
        rows = make_rows(config, in_loop, args.window_padding, args.only)
        loops.run_dataset(rows, weights, dtype, args)
    return 0 if correct else 1


def _latency(
    rows: Sequence[Row],
    plain: Sequence[Row],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> bool:
    """Check the rows and time them on one image; returns whether all are right."""
    images = draw_images(1, args.size)
    truths, limits = {}, {}
    for row in plain:
        with exact():
            model = detector(row, weights, torch.float32, args.device)
            truths[row.padding] = evaluate(model, images)
        with _autocast(dtype, args):
            model = detector(row, weights, dtype, args.device)
            error = lost(evaluate(model, images), truths[row.padding], ROUGH)
        limits[row.padding] = 2 * error + LOST_ROUGHLY
    del model

    table = Table(COLUMNS)
    yardstick: Callable[[], object] | None = None
    correct = True
    for row in rows:
        with exact():
            model = detector(row, weights, torch.float32, args.device)
            exact_error = lost(_settled(row, model, images), truths[row.padding])
        del model
        with _autocast(dtype, args):
            memory = Memory(args.device)
            model = detector(row, weights, dtype, args.device)
            first_calls = _first_calls(model, images, args)
            error = lost(_settled(row, model, images), truths[row.padding], ROUGH)
            call = partial(evaluate, model, images)
            used = memory.peak(call)
            yardstick = yardstick or call
            rounds = args.rounds if "latency" in args.tasks else 0
            times, others = alternate(call, yardstick, rounds, args.device)
        is_right = exact_error <= LOST and error <= limits[row.padding]
        correct &= is_right
        table.add(
            (
                *row.cells,
                milliseconds(times),
                ratio(others, times),
                *(milliseconds([first]) for first in first_calls),
                used,
                f"{exact_error:.1%}",
                f"{error:.1%}" + ("" if is_right else " WRONG"),
            )
        )
        del model, call  # their memory is the next row's
    return correct


def _autocast(dtype: torch.dtype, args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, dtype, enabled=dtype is not torch.float32)


def _settled(row: Row, model: nn.Module, images: list[dict[str, Any]]) -> list[Instances]:
    """Call a row's model until it does all that it does in later calls; returns what it found.

    A part becomes a CUDA graph in its second call, and again when the one before it has become one.
    """
    for _ in range(5 if "cuda_graphs" in row.prepare else 0):
        evaluate(model, images)
    return evaluate(model, images)


def _first_calls(
    model: nn.Module, images: list[dict[str, Any]], args: argparse.Namespace
) -> list[float]:
    """Seconds of the first two calls with images, and with one of another size."""
    height, width = args.size
    times = []
    for sample in (images, draw_images(1, (height + STEP, width))):
        for _ in range(2):
            synchronize(args.device)
            start = time.perf_counter()
            evaluate(model, sample)
            synchronize(args.device)
            times.append(time.perf_counter() - start)
    return times


def _throughput(
    rows: Sequence[Row], weights: Weights, dtype: torch.dtype, args: argparse.Namespace
) -> None:
    table = Table(["row", "padding", *(f"images/s, {n} at a time" for n in args.batch_sizes)])
    for row in rows:
        model = detector(row, weights, dtype, args.device)
        speeds = []
        with _autocast(dtype, args):
            for count in args.batch_sizes:
                images = draw_images(count, args.size)
                _settled(row, model, images)
                call = partial(evaluate, model, images)
                times = [seconds(call, args.device) for _ in range(args.rounds)]
                speeds.append(count / statistics.median(times))
        table.add((*row.cells, *(f"{speed:.1f}" for speed in speeds)))
        del model, call  # their memory is the next row's


def _profiles(
    config: DictConfig,
    switches: Sequence[Switch],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> None:
    """Print what all does in an evaluation's image and in a training's step."""
    images = draw_images(1, args.size)
    evaluated = [s for s in switches if s.of_evaluation]
    for row in make_rows(config, evaluated, args.window_padding, ["all"]):
        with _autocast(dtype, args):
            model = detector(row, weights, dtype, args.device)
            _settled(row, model, images)
            call = partial(evaluate, model, images)
            print_profile(f"an image of {row.name}, {row.padding}", call, args.device)
        del model, call
    for title, step in training.warm_steps(config, switches, weights, dtype, args):
        print_profile(title, step, args.device)
