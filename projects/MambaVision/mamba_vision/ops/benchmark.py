"""Time every backend of the operators side by side, each checked against float64 first.

In every round each backend runs in turn, so that whatever else the machine does meets all of them.
Times are medians over the rounds, ratios medians of the rounds' ratios. On a GPU it is the GPU's
time, that of a replayed CUDA graph: what Python takes to launch the kernels is left out, unless
--eager is given. The floor is the time for reading the inputs and writing the results once, or for
the exponentials and matrix products if that is longer, at the speeds of this GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .benchmark_operators import OPERATORS, Operator, Shape

__all__ = ["add_arguments", "run"]

SECONDS_PER_TIMING = 0.1  # short runs are repeated to fill it
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; take --device cpu")
    if args.rounds < 1:
        raise UserError("--rounds: at least one round is needed")
    known = {name for key in args.operators for name in OPERATORS[key].backends}
    for name in args.backends or ():
        if name not in known:
            raise UserError(f"--backends: {name!r} is none of {', '.join(sorted(known))}")

    print(f"{_machine(args.device)}; {args.rounds} rounds")
    names = {key: _names(OPERATORS[key], key, args) for key in args.operators}
    print(f"\n| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}", flush=True)
    ceilings = _ceilings() if args.device == "cuda" else None
    correct = True
    for key in args.operators:
        for shape in args.shapes or map(_shape, SHAPES[args.device]):
            for dtype in args.dtypes:
                entries = _compare(OPERATORS[key], names[key], shape, DTYPES[dtype], args)
                correct &= all(entry.correct for entry in entries)
                floor = _floor(OPERATORS[key], shape, entries[0], ceilings)
                _print(key, shape, dtype, entries, floor)
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


def _machine(device: str) -> str:
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    if device == "cuda":
        triton = importlib.metadata.version("triton")
        name = torch.cuda.get_device_name()
        return f"{name}, {versions}, CUDA {torch.version.cuda}, Triton {triton}"
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}, {versions}"


@dataclass
class Entry:
    """What was seen of one backend; times in seconds, a number per round."""

    backend: str
    call: Callable[..., Tensor]
    inputs: list[Tensor]
    weights: Tensor
    error: float = 0.0  # the worst of all results, over the largest number of that result
    correct: bool = True
    memory: float | None = None  # MiB, the peak of forward and backward over what was there
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
        calls = [(_captured(forward), _captured(both)) for forward, both in calls]
    for _ in range(args.rounds):
        for current, (forward, both) in zip(entries, calls):
            current.forward.append(_seconds(forward, args.device))
            current.both.append(_seconds(both, args.device))
    return entries


def _check(entry: Entry, truth: Sequence[Tensor], usual: Sequence[Tensor]) -> None:
    """Fill in error, correctness and memory.

    Correct is an error of at most twice that of plain PyTorch in the same dtype, and 16 units in
    the last place of float32 besides, in the measure of the largest number.
    """
    cuda = entry.weights.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    results = entry.run_both()
    if cuda:
        entry.memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    for result, exact, plain in zip(results, truth, usual):
        error, limit = ((x.double() - exact).abs().max().item() for x in (result, plain))
        largest = exact.abs().max().item()
        entry.error = max(entry.error, error / largest)
        entry.correct &= error <= 2 * limit + 16 * torch.finfo(torch.float32).eps * largest


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    """A replay of the kernels that the function launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _seconds(function: Callable[[], object], device: str) -> float:
    def repeat(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    once = repeat(1)
    times = int(SECONDS_PER_TIMING / once)
    return repeat(times) if times > 1 else once


class Ceilings(NamedTuple):
    """What the GPU does in a second, as measured."""

    bytes: float
    exponentials: float
    products: float  # multiply-adds of 16-bit matrices


def _ceilings() -> Ceilings:
    large = torch.randn(2**28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = _seconds(_captured(large.clone), "cuda")
    matmul = _seconds(_captured(lambda: square @ square), "cuda")
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
    operator: str, shape: Shape, dtype: str, entries: Sequence[Entry], floor: float | None
) -> None:
    for entry in entries:
        share = "-" if floor is None else f"{floor / statistics.median(entry.both):.0%}"
        speeds = (
            statistics.median(a / b for a, b in zip(one, other))
            for one, other in (
                (entries[0].forward, entry.forward),
                (entries[0].both, entry.both),
            )
        )
        cells = (
            operator,
            ", ".join(map(str, shape)),
            dtype,
            entry.backend,
            f"{1e3 * statistics.median(entry.forward):.3f}",
            f"{1e3 * statistics.median(entry.both):.3f}",
            "-" if entry.memory is None else f"{entry.memory:.0f}",
            *(f"{speed:.2f} x" for speed in speeds),
            share,
            f"{entry.error:.1e}" + ("" if entry.correct else " WRONG"),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
