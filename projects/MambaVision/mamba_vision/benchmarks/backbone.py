"""Time a config's backbone with its optimisations switched on one after the other.

Each row has one more of them on than the one above; "plain" has none, and is what the others are
measured by. Weights and images are random. First, the features of each row, and the gradients where
it has any, are compared with those of plain in float32: their distance over their length must be at
most twice that of plain in the number format that is timed, and 1e-5 besides.

In every round each row runs in turn. Times are medians over the rounds, ratios medians of the
rounds' ratios. Evaluation finds the weights cast already, training casts them in every step. The
memory is the peak over what was there before the row's weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from detectron2.config import instantiate
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..inference import fuse
from .inputs import calibrate
from .options import add_options, positive, start
from .rows import Row, build, make_rows
from .timing import Memory, Table, captured, exact, milliseconds, ratio, seconds

__all__ = ["add_arguments", "run"]

FLOOR = 1e-5  # of the error that is let pass, in float32
SCALE = 1 / 16  # of the features' gradients, for float16's sake
COLUMNS = (
    *("row", "padding", "forward ms", "speed", "memory MiB"),
    *("forward and backward ms", "speed", "memory MiB", "error", "of gradients"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison to ``parser``."""
    add_options(parser)
    parser.add_argument(
        "--images", type=positive, default=2, help="at a time (default: %(default)s)"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave training out")


@dataclass
class Entry:
    """What was seen of one row; times in seconds, a number per round."""

    row: Row
    forward: Callable[[], object] = list
    both: Callable[[], object] = list
    error: float = 0.0
    gradient_error: float | None = None
    correct: bool = True
    forward_memory: float | None = None
    both_memory: float | None = None
    forward_times: list[float] = field(default_factory=list)
    both_times: list[float] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Print the comparison as a table; return 1 if a row computed something wrong, else 0."""
    config, switches, dtype = start(args)
    of_backbone = [s for s in switches if s.of_backbone]
    rows = make_rows(config, of_backbone, args.window_padding, args.only)
    references = make_rows(config, of_backbone, args.window_padding, ["plain"])

    torch.manual_seed(0)
    model = instantiate(references[0].float32.model.backbone.bottom_up).to(args.device).eval()
    x = torch.randn(args.images, model.in_chans, *args.size, device=args.device)
    calibrate(model, lambda: model(x))
    state = model.state_dict()
    entries = [Entry(row) for row in rows]
    _forward(entries, references, state, x, dtype, args)
    if not args.forward_only:
        _backward(entries, references, state, x, dtype, args)

    table = Table(COLUMNS)
    for entry in entries:
        first = entries[0]
        table.add(
            (
                *entry.row.cells,
                milliseconds(entry.forward_times),
                ratio(first.forward_times, entry.forward_times),
                "-" if entry.forward_memory is None else f"{entry.forward_memory:.0f}",
                milliseconds(entry.both_times),
                ratio(first.both_times, entry.both_times),
                "-" if entry.both_memory is None else f"{entry.both_memory:.0f}",
                f"{entry.error:.1e}" + ("" if entry.correct else " WRONG"),
                "-" if entry.gradient_error is None else f"{entry.gradient_error:.1e}",
            )
        )
    return 0 if all(entry.correct for entry in entries) else 1


def _forward(
    entries: list[Entry],
    references: list[Row],
    state: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> None:
    """Check and time the rows in evaluation."""
    truths = {}
    for reference in references:
        with torch.no_grad(), exact():
            truth = _model(reference, state, torch.float32, args.device)(x)
        truths[reference.padding] = list(truth.values())
    with torch.no_grad(), torch.autocast(args.device, dtype, enabled=dtype is not torch.float32):
        limits = {}
        for reference in references:
            features = _model(reference, state, dtype, args.device)(x)
            error = _worst(features.values(), truths[reference.padding])
            limits[reference.padding] = 2 * error + FLOOR
        for entry in entries:
            memory = Memory(args.device)
            entry.forward = _evaluated(entry.row, state, x, dtype, args.device)
            features = entry.forward()
            entry.forward_memory = memory.peak()
            entry.error = _worst(features.values(), truths[entry.row.padding])
            entry.correct &= entry.error <= limits[entry.row.padding]
        for _ in range(args.rounds):
            for entry in entries:
                entry.forward_times.append(seconds(entry.forward, args.device))
    for entry in entries:
        del entry.forward


def _backward(
    entries: list[Entry],
    references: list[Row],
    state: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> None:
    """Check and time the rows in training."""
    entries = [entry for entry in entries if not entry.row.prepare]
    truths, limits = {}, {}
    for reference in references:
        with exact():
            step = _step(reference, state, x, torch.float32)
            truths[reference.padding] = step.gradients()
        error = _distance(_step(reference, state, x, dtype).gradients(), truths[reference.padding])
        limits[reference.padding] = 2 * error + 10 * FLOOR
    for entry in entries:
        memory = Memory(args.device)
        step = _step(entry.row, state, x, dtype)
        entry.both = step
        step()
        entry.both_memory = memory.peak()
        error = _distance(step.gradients(), truths[entry.row.padding])
        entry.gradient_error = error
        entry.correct &= error <= limits[entry.row.padding]
    for _ in range(args.rounds):
        for entry in entries:
            entry.both_times.append(seconds(entry.both, args.device))


def _model(
    row: Row, state: dict[str, Tensor], dtype: torch.dtype, device: str, *, copied: bool = False
) -> nn.Module:
    state = copy.deepcopy(state) if copied else state
    return build(row.model(dtype).backbone.bottom_up, state, device)


def _evaluated(
    row: Row, state: dict[str, Tensor], x: Tensor, dtype: torch.dtype, device: str
) -> Callable[[], dict[str, Tensor]]:
    """The features of a row, computed as its switches say."""
    model = _model(row, state, dtype, device, copied="fuse" in row.prepare)
    if "fuse" in row.prepare:
        fuse(model)
    if "cuda_graphs" not in row.prepare:
        return lambda: model(x)
    features: dict[str, Tensor] = {}
    replay = captured(lambda: features.update(model(x)))

    def replayed() -> dict[str, Tensor]:
        replay()
        return features

    return replayed


def _step(row: Row, state: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> _Step:
    return _Step(_model(row, state, dtype, x.device.type, copied=True), x, dtype)


class _Step:
    """Forward and backward of a model in training."""

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        self._model = model.train()
        self._x, self._dtype = x, dtype
        self._weights: list[Tensor] = []

    def __call__(self) -> None:
        self._model.zero_grad()
        with torch.autocast(
            self._x.device.type, self._dtype, enabled=self._dtype is not torch.float32
        ):
            features = list(self._model(self._x).values())
        if not self._weights:
            generator = torch.Generator().manual_seed(0)
            draw = (torch.randn(y.shape, generator=generator) for y in features)
            self._weights = [SCALE * w.to(y) for w, y in zip(draw, features)]
        torch.autograd.backward(features, self._weights)

    def gradients(self) -> list[Tensor]:
        """Those of the parameters, if no path is dropped."""
        with _nothing_dropped(self._model):
            self()
        return [x.grad.clone() for x in self._model.parameters() if x.grad is not None]


@contextmanager
def _nothing_dropped(model: nn.Module) -> Iterator[None]:
    drops = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    rates = [drop.p for drop in drops]
    for drop in drops:
        drop.p = 0.0
    try:
        yield
    finally:
        for drop, rate in zip(drops, rates):
            drop.p = rate


def _worst(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    return max(_distance([a], [b]) for a, b in zip(found, truth, strict=True))


def _distance(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """The length of the difference over that of the truth, all tensors together."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, truth, strict=True)]
    lengths = (
        sum(float(x.square().sum()) for x in xs) for xs in zip(*[(a - b, b) for a, b in pairs])
    )
    difference, length = lengths
    return (difference / length) ** 0.5
