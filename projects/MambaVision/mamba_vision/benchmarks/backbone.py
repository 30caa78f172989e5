"""Time a config's backbone with its optimisations switched on one after the other.

Each row has one more of them on than the one above; "plain" has none, and is what the others are
measured by. Weights and images are random. First, the features of each row, and the gradients where
it has any, are compared with those of plain in float32: their distance over their length must be at
most twice that of plain in the number format that is timed, and 1e-5 besides.

In every round each row and the first run in turn. Times are medians over the rounds, ratios medians
of the rounds' ratios. Evaluation finds the weights cast already, training casts them in every step.
The memory is the peak of a call over what was there before the row's weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.config import instantiate
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..inference import fuse
from ..precision import cast_weights
from .inputs import calibrate
from .options import add_options, positive, start
from .rows import Row, build, make_rows
from .timing import Memory, Table, alternate, captured, exact, milliseconds, ratio

__all__ = ["add_arguments", "run"]

FLOOR = 1e-5  # of the error that is let pass, in float32
SCALE = 1 / 16  # of the features' gradients, for float16's sake
WARM_UP = 3  # steps of training: CUDA graphs are recorded in the third
COLUMNS = ("row", "padding", "forward ms", "speed", "memory MiB", "error")
BOTH_COLUMNS = (
    *("row", "padding", "forward and backward ms", "speed"),
    *("memory MiB", "error of gradients"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison to ``parser``."""
    add_options(parser)
    parser.add_argument(
        "--images", type=positive, default=2, help="at a time (default: %(default)s)"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave training out")


def run(args: argparse.Namespace) -> int:
    """Print the comparisons as tables; return 1 if a row computed something wrong, else 0."""
    config, switches, dtype = start(args)
    of_backbone = [s for s in switches if s.of_backbone]
    plain = make_rows(config, of_backbone, args.window_padding, ["plain"])
    torch.manual_seed(0)
    model = instantiate(plain[0].float32.model.backbone.bottom_up).eval()
    model = model.to(args.device, memory_format=torch.channels_last)  # as a detector's
    x = torch.randn(args.images, model.in_chans, *args.size, device=args.device)
    calibrate(model, lambda: model(x))
    state = model.state_dict()
    evaluated = [s for s in of_backbone if s.of_evaluation]
    rows = make_rows(config, evaluated, args.window_padding, args.only)
    correct = _forward(rows, plain, state, x, dtype, args)
    if not args.forward_only:
        trained = [s for s in of_backbone if s.of_training]
        rows = make_rows(config, trained, args.window_padding, args.only)
        correct &= _backward(rows, plain, state, x, dtype, args)
    return 0 if correct else 1


def _forward(
    rows: Sequence[Row],
    plain: Sequence[Row],
    state: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> bool:
    """Check and time the rows in evaluation; returns whether all are right."""
    truths, limits = {}, {}
    for row in plain:
        with torch.no_grad(), exact():
            truth = _model(row, state, torch.float32, args.device)(x)
        truths[row.padding] = list(truth.values())
    table = Table(COLUMNS)
    yardstick: Callable[[], object] | None = None
    correct = True
    with torch.no_grad(), torch.autocast(args.device, dtype, enabled=dtype is not torch.float32):
        for row in plain:
            features = _model(row, state, dtype, args.device)(x)
            limits[row.padding] = 2 * _worst(features.values(), truths[row.padding]) + FLOOR
        for row in rows:
            memory = Memory(args.device)
            forward = _evaluated(row, state, x, dtype, args.device)
            error = _worst(forward().values(), truths[row.padding])
            is_right = error <= limits[row.padding]
            correct &= is_right
            used = memory.peak(forward)
            yardstick = yardstick or forward
            times, others = alternate(forward, yardstick, args.rounds, args.device)
            table.add((*_cells(row, times, others, used), _error(error, is_right)))
            del forward  # its memory is the next one's
    return correct


def _backward(
    rows: Sequence[Row],
    plain: Sequence[Row],
    state: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> bool:
    """Check and time the rows in training; returns whether all are right."""
    truths, limits = {}, {}
    for row in plain:
        with exact():
            truths[row.padding] = _step(row, state, x, torch.float32).gradients()
        error = _distance(_step(row, state, x, dtype).gradients(), truths[row.padding])
        limits[row.padding] = 2 * error + 10 * FLOOR
    table = Table(BOTH_COLUMNS)
    yardstick: _Step | None = None
    correct = True
    for row in rows:
        memory = Memory(args.device)
        step = _step(row, state, x, dtype)
        for _ in range(_warm_up(args.device)):
            error = _distance(step.gradients(), truths[row.padding])
        is_right = error <= limits[row.padding]
        correct &= is_right
        for _ in range(_warm_up(args.device)):
            step()
        used = memory.peak(step)
        yardstick = yardstick or step
        times, others = alternate(step, yardstick, args.rounds, args.device)
        table.add((*_cells(row, times, others, used), _error(error, is_right)))
        del step  # its memory is the next one's
    return correct


def _warm_up(device: str) -> int:
    """Steps until one is as all that follow."""
    return WARM_UP if device == "cuda" else 1


def _cells(
    row: Row, times: Sequence[float], others: Sequence[float], memory: str
) -> tuple[str, ...]:
    return *row.cells, milliseconds(times), ratio(others, times), memory


def _error(error: float, is_right: bool) -> str:
    return f"{error:.1e}" + ("" if is_right else " WRONG")


def _model(
    row: Row, state: dict[str, Tensor], dtype: torch.dtype, device: str, *, copied: bool = False
) -> nn.Module:
    state = copy.deepcopy(state) if copied else state
    return build(row.model(dtype).backbone.bottom_up, state, device)


def _evaluated(
    row: Row, state: dict[str, Tensor], x: Tensor, dtype: torch.dtype, device: str
) -> Callable[[], dict[str, Tensor]]:
    """The features of a row, computed as its switches say."""
    model = _model(row, state, dtype, device, copied=bool({"fuse", "dtype"} & row.prepare))
    if "fuse" in row.prepare:
        fuse(model)
    if "dtype" in row.prepare:
        cast_weights(model, dtype)
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
