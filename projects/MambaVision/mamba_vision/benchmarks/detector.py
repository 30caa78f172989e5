"""Time a config's detector with its optimisations switched on one after the other.

Each row has one more of them on than the one above; "plain" has none. The others are measured by
the first row. Weights and images are random, but such that about as much is found as by a trained
detector. First each row's detections are compared with those of plain in float32: "lost" is the
share of detections without a counterpart of the same class. In float32 without TF32 it must have
the score to 0.01, the box with an intersection over union of 0.9 and the mask with one of 0.8, and
a row may lose 2%. In the number format that is timed, 0.05, 0.8 and 0.7 will do, and a row may lose
twice what plain loses, and 5% besides; by rounding alone random weights lose many, most of all in
bfloat16. In training a row's first loss may differ from plain's by 10%.

In every round each row runs in turn. Times are medians over the rounds, ratios medians of the
rounds' ratios; autocast surrounds all calls, as in an evaluation. An image is on the CPU at first,
and its masks are pasted at the size of its file. "First" and "second" are the first calls of a row,
of one image, and of one of another size; what is compiled or chosen once in a process is left to
the row that comes first (--only). The memory is the peak over what was there before the row, for
evaluation without the weights, which rows share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from . import loops, training
from .inputs import draw_images
from .options import add_options, positive, start
from .rows import Row, make_rows
from .subject import ROUGH, Weights, detector, draw_weights, evaluate, lost
from .timing import Memory, Table, exact, milliseconds, ratio, seconds, synchronize

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
    training.add_arguments(parser)
    loops.add_arguments(parser)


@dataclass
class Entry:
    """What was seen of one row; times in seconds, a number per round."""

    row: Row
    model: nn.Module = field(default_factory=nn.Identity)
    memory: float | None = None
    first_calls: list[float] = field(default_factory=list)  # two of each of two sizes
    latency: list[float] = field(default_factory=list)
    throughput: dict[int, list[float]] = field(default_factory=dict)
    exact_error: float = 0.0
    error: float = 0.0
    correct: bool = True


def run(args: argparse.Namespace) -> int:
    """Print the tables; return 1 if a row computed something wrong, else 0."""
    config, switches, dtype = start(args)
    evaluated = [s for s in switches if not s.training and not s.loop]
    rows = make_rows(config, evaluated, args.window_padding, args.only)
    plain = make_rows(config, evaluated, args.window_padding, ["plain"])
    weights = draw_weights(plain[0], args.size, args.device)
    correct = True
    if {"latency", "throughput"} & set(args.tasks):
        correct &= _evaluation(rows, plain, weights, dtype, args)
    if "training" in args.tasks:
        correct &= training.compare(config, switches, weights, dtype, args)
    if args.varied:
        loops.run_varied(rows, weights, dtype, args)
    if args.dataset:
        in_loop = [s for s in switches if not s.training]
        rows = make_rows(config, in_loop, args.window_padding, args.only)
        loops.run_dataset(rows, weights, dtype, args)
    return 0 if correct else 1


def _evaluation(
    rows: Sequence[Row],
    plain: Sequence[Row],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> bool:
    """Check the rows and time them in evaluation; returns whether all are right."""
    images = draw_images(1, args.size)
    entries = [Entry(row) for row in rows]
    truths = {}
    with exact():
        for row in plain:
            model = detector(row, weights, torch.float32, args.device)
            truths[row.padding] = evaluate(model, images)
        for entry in entries:
            model = detector(entry.row, weights, torch.float32, args.device)
            found = [evaluate(model, images) for _ in range(_calls(entry.row))]
            entry.exact_error = lost(found[-1], truths[entry.row.padding])
            entry.correct = entry.exact_error <= LOST
            del model

    with torch.autocast(args.device, dtype, enabled=dtype is not torch.float32):
        limits = {}
        for row in plain:
            model = detector(row, weights, dtype, args.device)
            error = lost(evaluate(model, images), truths[row.padding], ROUGH)
            limits[row.padding] = 2 * error + LOST_ROUGHLY
        for entry in entries:
            found = _first_calls(entry, images, weights, dtype, args)
            entry.error = lost(found, truths[entry.row.padding], ROUGH)
            entry.correct &= entry.error <= limits[entry.row.padding]
        if "latency" in args.tasks:
            for _ in range(args.rounds):
                for entry in entries:
                    call = partial(evaluate, entry.model, images)
                    entry.latency.append(seconds(call, args.device))
        for count in args.batch_sizes if "throughput" in args.tasks else ():
            batch = draw_images(count, args.size)
            for entry in entries:
                for _ in range(_calls(entry.row)):
                    evaluate(entry.model, batch)
                entry.throughput[count] = []
            for _ in range(args.rounds):
                for entry in entries:
                    call = partial(evaluate, entry.model, batch)
                    entry.throughput[count].append(seconds(call, args.device))
    _print(entries, args)
    return all(entry.correct for entry in entries)


def _calls(row: Row) -> int:
    """How many calls it takes until a new size of image is met as all that follow are."""
    return 3 if "cuda_graphs" in row.prepare else 1


def _first_calls(
    entry: Entry,
    images: list[dict[str, Any]],
    weights: Weights,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> list[Instances]:
    """Make the row's model and time its first calls; returns what it found in the images."""
    height, width = args.size
    memory = Memory(args.device)
    entry.model = detector(entry.row, weights, dtype, args.device)
    for sample in (images, draw_images(1, (height + STEP, width))):
        for _ in range(2):
            synchronize(args.device)
            start = time.perf_counter()
            evaluate(entry.model, sample)
            synchronize(args.device)
            entry.first_calls.append(time.perf_counter() - start)
    found = evaluate(entry.model, images)
    entry.memory = memory.peak()
    return found


def _print(entries: Sequence[Entry], args: argparse.Namespace) -> None:
    table = Table(COLUMNS)
    for entry in entries:
        table.add(
            (
                *entry.row.cells,
                milliseconds(entry.latency),
                ratio(entries[0].latency, entry.latency),
                *(milliseconds([call]) for call in entry.first_calls),
                "-" if entry.memory is None else f"{entry.memory:.0f}",
                f"{entry.exact_error:.1%}",
                f"{entry.error:.1%}" + ("" if entry.correct else " WRONG"),
            )
        )
    if "throughput" not in args.tasks:
        return
    table = Table(["row", "padding", *(f"images/s, {n} at a time" for n in args.batch_sizes)])
    for entry in entries:
        speeds = (n / statistics.median(times) for n, times in entry.throughput.items())
        table.add((*entry.row.cells, *(f"{speed:.1f}" for speed in speeds)))
