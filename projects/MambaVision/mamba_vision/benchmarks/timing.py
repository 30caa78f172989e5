"""What all comparisons share: times, memory and tables."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ..errors import UserError

__all__ = [
    "DTYPES",
    "Memory",
    "Table",
    "alternate",
    "captured",
    "check_device",
    "exact",
    "machine",
    "milliseconds",
    "ratio",
    "seconds",
    "synchronize",
]

SECONDS_PER_TIMING = 0.5  # short runs are repeated, one upon the other, to fill it
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_device(device: str, rounds: int) -> None:
    """Check ``--device`` and ``--rounds``.

    Raises:
        UserError: there is no such device, or nothing to time.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; take --device cpu")
    if rounds < 1:
        raise UserError("--rounds: at least one round is needed")


def machine(device: str) -> str:
    """The device's name and the versions of what runs on it, in a line."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    if device == "cuda":
        triton = importlib.metadata.version("triton")
        name = torch.cuda.get_device_name()
        return f"{name}, {versions}, CUDA {torch.version.cuda}, Triton {triton}"
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}, {versions}"


def synchronize(device: str) -> None:
    """Wait for what the device has been given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of a call, the mean of as many as fill ``SECONDS_PER_TIMING``."""

    def repeat(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / times

    once = repeat(1)
    times = int(SECONDS_PER_TIMING / once)
    return repeat(times) if times > 1 else once


def alternate(
    function: Callable[[], object], yardstick: Callable[[], object], rounds: int, device: str
) -> tuple[list[float], list[float]]:
    """Time a function and what it is measured by, in turn; both are warm.

    Returns:
        Seconds of each, a number per round; one list twice if they are the same.
    """
    if yardstick is function:
        times = [seconds(function, device) for _ in range(rounds)]
        return times, times
    yardstick()  # under an autocast of its own it casts its weights once
    pairs = [(seconds(function, device), seconds(yardstick, device)) for _ in range(rounds)]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """A replay of the kernels that the function launches; what they read lives as long."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return partial(_replay, graph, function)


def _replay(graph: torch.cuda.CUDAGraph, _function: Callable[[], object]) -> None:
    graph.replay()


@contextmanager
def exact() -> Iterator[None]:
    """While open, float32 is float32: no convolution or product of matrices rounds to TF32."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


class Memory:
    """What a GPU's memory holds over what was in use when this was made."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            _release()
            self._before = torch.cuda.memory_allocated() + _kept_by_graphs()

    def peak(self, function: Callable[[], object]) -> str:
        """A cell: the peak in a call of a function that is warm, in MiB; "-" on a CPU."""
        if not self._cuda:
            return "-"
        _release()
        torch.cuda.reset_peak_memory_stats()
        function()
        peak = torch.cuda.max_memory_allocated() + _kept_by_graphs()
        return f"{(peak - self._before) / 2**20:.0f}"


def _release() -> None:
    """Give back what nothing needs any more, such as the memory of graphs that are gone."""
    gc.collect()
    torch.cuda.empty_cache()


def _kept_by_graphs() -> int:
    """Bytes that CUDA graphs write to in a replay, and that nobody else may be given."""
    segments = torch.cuda.memory_snapshot()
    pools = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in pools)


class Table:
    """A Markdown table, printed as it grows."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._width = len(columns)
        print(f"\n| {' | '.join(columns)} |")
        print(f"|{' --- |' * self._width}", flush=True)

    def add(self, cells: Iterable[str]) -> None:
        """Print a row of as many cells as there are columns."""
        row = list(cells)
        assert len(row) == self._width, (row, self._width)
        print(f"| {' | '.join(row)} |", flush=True)


def milliseconds(times: Sequence[float], digits: int = 2) -> str:
    """A cell: the median of times in seconds."""
    return f"{1e3 * statistics.median(times):.{digits}f}" if times else "-"


def ratio(yardstick: Sequence[float], times: Sequence[float]) -> str:
    """A cell: how many times as fast as the yardstick, the median over the rounds."""
    if not yardstick or not times:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(yardstick, times)):.2f} x"
