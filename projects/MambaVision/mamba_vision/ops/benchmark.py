"""Time every backend of the operators side by side, each checked against float64 first.

In every round each backend runs in turn, so that whatever else the machine does meets all of them.
Times are medians over the rounds, ratios medians of the rounds' ratios. On a GPU it is the GPU's
time, that of a replayed CUDA graph: what Python takes to launch the kernels is left out, unless
--eager is given. The floor is the time for reading the inputs and writing the results once, or for
the exponentials and matrix products if that is longer, at the speeds of this GPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..benchmarks.timing import (
    DTYPES,
    Memory,
    Table,
    captured,
    check_device,
    machine,
    milliseconds,
    ratio,
    seconds,
)
from ..errors import UserError
from .benchmark_operators import OPERATORS, Operator, Shape

__all__ = ["add_arguments", "run"]

SHAPES = {  # one image at strides 16 and 32, and windows of ImageNet's size
    "cpu": ("1,12544,160,8", "1,3136,320,8", "16,196,160,8"),
    "cuda": ("2,12544,160,8", "2,3136,320,8", "128,196,160,8"),
}
COLUMNS = (
    *("operator", "B, L, D, N", "dtype", "backend", "forward ms", "forward and backward ms"),
    *("memory MiB", "speed of forward", "of both", "floor of both", "error"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison to ``parser``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SHAPES, default=device, help="(default: %(default)s)")
    parser.add_argument(
        "--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="NAME"
    )
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", help="only these; default: all that can run"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="B,L,D,N",
        help="images, tokens, channels, states; default: MambaVision's for the device",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU: with the time that launching takes"
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison as a table; return 1 if a backend computed something wrong, else 0."""
    check_device(args.device, args.rounds)
    known = {name for key in args.operators for name in OPERATORS[key].backends}
    for name in args.backends or ():
        if name not in known:
            raise UserError(f"--backends: {name!r} is none of {', '.join(sorted(known))}")

    print(f"{machine(args.device)}; {args.rounds} rounds")
    names = {key: _names(OPERATORS[key], key, args) for key in args.operators}
    table = Table(COLUMNS)
    ceilings = _ceilings() if args.device == "cuda" else None
    correct = True
    for key in args.operators:
        for shape in args.shapes or map(_shape, SHAPES[args.device]):
            for dtype in args.dtypes:
                entries = _compare(OPERATORS[key], names[key], shape, DTYPES[dtype], args)
                correct &= all(entry.correct for entry in entries)
                floor = _floor(OPERATORS[key], shape, entries[0], ceilings)
                _print(table, key, shape, dtype, entries, floor)
    return 0 if correct else 1


def _shape(text: str) -> Shape:
    try:
        shape = Shape(*map(int, text.split(",")))
        if min(shape) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not four positive numbers B,L,D,N, as in 1,3136,320,8"
        ) from None
    return shape


def _names(operator: Operator, key: str, args: argparse.Namespace) -> list[str]:
    """The backends to compare, first the one that the others are measured by."""
    tensors = [x.to(args.device) for x in operator.draw(Shape(1, 1, 8, 1), torch.float32)]
    names = []
    for name in operator.backends:
        if args.backends and name not in args.backends:
            continue
        if name == "reference" and args.device == "cuda" and not args.backends:
            continue  # a kernel or more for every token: minutes
        if reason := operator.obstacle(name, tensors):
            if args.backends:
                raise UserError(f"--backends: {name!r} cannot be used: {reason}")
            print(f"{key} without {name}: {reason}")
        else:
            names.append(name)
    # The accelerators that others are measured by, else the definition.
    yardsticks = ("mamba_ssm", "causal_conv1d", "reference")
    return sorted(names, key=lambda name: (*yardsticks, name).index(name))


@dataclass
class Entry:
    """What was seen of one backend; times in seconds, a number per round."""

    backend: str
    call: Callable[..., Tensor]
    inputs: list[Tensor]
    weights: Tensor
    error: float = 0.0  # the worst of all results, over the largest number of that result
    correct: bool = True
    memory: str = "-"  # MiB, the peak of forward and backward over what was there
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def run_forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def run_both(self) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        y = self.call(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, self.weights.to(y.dtype))]


def _compare(
    operator: Operator,
    names: Sequence[str],
    shape: Shape,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> list[Entry]:
    """Check and time the backends called ``names``."""
    torch.manual_seed(0)
    inputs = [x.to(args.device) for x in operator.draw(shape, dtype)]
    weights = torch.randn(inputs[0].shape).to(args.device, dtype)

    def entry(name: str, tensors: Sequence[Tensor]) -> Entry:
        def call(*x: Tensor) -> Tensor:
            return operator.function(*x, backend=name)

        return Entry(name, call, list(tensors), weights)

    # On a GPU the definition would take minutes; the chunked scan agrees with it, as tests show.
    plain = "reference" if args.device == "cpu" else "torch"
    truth = entry(plain, [x.double() for x in inputs]).run_both()
    usual = entry(plain, inputs).run_both()
    entries = [entry(name, inputs) for name in names]
    for current in entries:
        _check(current, truth, usual)
    del truth, usual
    calls: list[tuple[Callable[[], object], Callable[[], object]]]
    calls = [(current.run_forward, current.run_both) for current in entries]
    if args.device == "cuda" and not args.eager:
        calls = [(captured(forward), captured(both)) for forward, both in calls]
    for _ in range(args.rounds):
        for current, (forward, both) in zip(entries, calls):
            current.forward.append(seconds(forward, args.device))
            current.both.append(seconds(both, args.device))
    return entries


def _check(entry: Entry, truth: Sequence[Tensor], usual: Sequence[Tensor]) -> None:
    """Fill in error, correctness and memory.

    Correct is an error of at most twice that of plain PyTorch in the same dtype, and 16 units in
    the last place of float32 besides, in the measure of the largest number.
    """
    entry.memory = Memory(entry.weights.device.type).peak(entry.run_both)
    results = entry.run_both()
    for result, exact, plain in zip(results, truth, usual):
        error, limit = ((x.double() - exact).abs().max().item() for x in (result, plain))
        largest = exact.abs().max().item()
        entry.error = max(entry.error, error / largest)
        entry.correct &= error <= 2 * limit + 16 * torch.finfo(torch.float32).eps * largest


class Ceilings(NamedTuple):
    """What the GPU does in a second, as measured."""

    bytes: float
    exponentials: float
    products: float  # multiply-adds of 16-bit matrices


def _ceilings() -> Ceilings:
    large = torch.randn(2**28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = seconds(captured(large.clone), "cuda")
    matmul = seconds(captured(lambda: square @ square), "cuda")
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.run(query, capture_output=True, check=True).stdout.split()[0])
    # 16 a cycle and multiprocessor (CUDA C++ programming guide, arithmetic instructions)
    exponentials = 16 * clock * torch.cuda.get_device_properties("cuda").multi_processor_count
    return Ceilings(2 * large.nbytes / copy, exponentials, 8192**3 / matmul)


def _floor(
    operator: Operator, shape: Shape, entry: Entry, ceilings: Ceilings | None
) -> float | None:
    """The seconds that forward and backward take at the least."""
    if ceilings is None:
        return None
    # Forward: inputs, result. Backward: inputs, the result's gradient; the inputs' gradients.
    moved = 3 * sum(x.nbytes for x in entry.inputs) + 2 * entry.weights.nbytes
    return max(
        moved / ceilings.bytes,
        operator.exponentials(shape) / ceilings.exponentials,
        operator.products(shape) / ceilings.products,
    )


def _print(
    table: Table,
    operator: str,
    shape: Shape,
    dtype: str,
    entries: Sequence[Entry],
    floor: float | None,
) -> None:
    for entry in entries:
        table.add(
            (
                operator,
                ", ".join(map(str, shape)),
                dtype,
                entry.backend,
                milliseconds(entry.forward, 3),
                milliseconds(entry.both, 3),
                entry.memory,
                ratio(entries[0].forward, entry.forward),
                ratio(entries[0].both, entry.both),
                "-" if floor is None else f"{floor / statistics.median(entry.both):.0%}",
                f"{entry.error:.1e}" + ("" if entry.correct else " WRONG"),
            )
        )
