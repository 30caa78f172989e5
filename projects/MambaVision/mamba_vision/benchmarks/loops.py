"""Detectors over images of many sizes, and in Detectron2's evaluation loop."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from omegaconf import DictConfig
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..data import check_dataset
from ..engine import COCOEvaluator
from ..engine.evaluation import run_evaluator
from .inputs import draw_images
from .options import positive
from .profiling import busy_seconds
from .rows import Row
from .subject import Weights, detector, evaluate
from .timing import Table, milliseconds, synchronize

__all__ = ["add_arguments", "run_dataset", "run_varied"]

LONG = 1333 / 800  # the longest side of an image over its shortest, as they are resized
WARM_UP = 5  # passes of a data set, in which every size is recorded
PASSES = 4  # CUDA graphs are recorded in the second, and some again
VARIED_COLUMNS = (
    *("row", "padding", "sizes", "first pass ms", "slowest ms", "last pass ms"),
    *("CUDA graphs", "torch.compile", "Triton kernels", "memory MiB"),
)
LOOP_COLUMNS = (
    *("row", "padding", "images", "image ms", "loader ms", "model ms", "evaluator ms"),
    "GPU busy",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the loops to ``parser``."""
    group = parser.add_argument_group("many images")
    group.add_argument(
        "--varied", type=positive, metavar="N", help="also N sizes, the short side as in --size"
    )
    group.add_argument(
        "--dataset", metavar="NAME", help="also Detectron2's evaluation loop on a data set"
    )
    group.add_argument(
        "--dataset-images", type=positive, default=500, metavar="N", help="at most (%(default)s)"
    )


def run_varied(
    rows: Sequence[Row], weights: Weights, dtype: torch.dtype, args: argparse.Namespace
) -> None:
    """Show ``PASSES`` times each of ``args.varied`` sizes to the rows; print what was compiled."""
    table = Table(VARIED_COLUMNS)
    sizes = varied_sizes(args.varied, min(args.size))
    for row in rows:
        with (
            _counted() as count,
            torch.autocast(args.device, dtype, enabled=dtype is not torch.float32),
        ):
            model = detector(row, weights, dtype, args.device)
            passes = [_pass(model, sizes, args.device) for _ in range(PASSES)]
            counts = count()
        memory = "-"
        if args.device == "cuda":
            memory = f"{torch.cuda.memory_reserved() / 2**20:.0f}"
            del model
            torch.cuda.empty_cache()
        table.add(
            (
                *row.cells,
                str(len(sizes)),
                milliseconds(passes[0]),
                milliseconds([max(passes[0])]),
                milliseconds(passes[-1]),
                *counts,
                memory,
            )
        )


def _pass(model: nn.Module, sizes: Iterable[tuple[int, int]], device: str) -> list[float]:
    times = []
    for size in sizes:
        images = draw_images(1, size)
        synchronize(device)
        start = time.perf_counter()
        evaluate(model, images)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def varied_sizes(count: int, short: int) -> list[tuple[int, int]]:
    """Sizes of images as a data set's come to be when they are resized, all different.

    Args:
        count: how many; at most all that there are.
        short: length of the shorter side, of which the longer has up to 5/3; that of an image that
            is longer still is shorter.

    Returns:
        Heights and widths, landscape and portrait in turn, in a random but fixed order.
    """
    longest = round(LONG * short)
    sides = [(short, long) for long in range(short, longest + 1)]
    sides += [(side, longest) for side in range(short - 1, short // 2, -1)]
    random.Random(0).shuffle(sides)
    return [(b, a) if i % 2 else (a, b) for i, (a, b) in enumerate(sides[:count])]


@contextmanager
def _counted() -> Iterator[Callable[[], list[str]]]:
    """Count the CUDA graphs, graphs of torch.compile and Triton kernels made while this is open.

    "-" for what cannot be counted.
    """
    from torch._dynamo.utils import counters

    graphs = kernels = 0
    compiled = counters["stats"]["unique_graphs"]
    begin = torch.cuda.CUDAGraph.capture_begin

    def counting_begin(*arguments: Any, **options: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return begin(*arguments, **options)

    def counting_kernel(**_: Any) -> None:
        nonlocal kernels
        kernels += 1

    runtime = _triton_runtime()
    hook = getattr(runtime, "jit_post_compile_hook", None)
    try:
        torch.cuda.CUDAGraph.capture_begin = counting_begin  # type: ignore[method-assign]
        if runtime is not None:
            runtime.jit_post_compile_hook = counting_kernel
        yield lambda: [
            str(graphs),
            str(counters["stats"]["unique_graphs"] - compiled),
            "-" if runtime is None else str(kernels),
        ]
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]
        if runtime is not None:
            runtime.jit_post_compile_hook = hook


def _triton_runtime() -> Any:
    """Where Triton's hooks are; None where there is no Triton, or an older one."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime


def run_dataset(
    rows: Sequence[Row], weights: Weights, dtype: torch.dtype, args: argparse.Namespace
) -> None:
    """Run the rows in Detectron2's evaluation loop; print where the time of an image goes.

    The images pass to warm up, until all CUDA graphs are recorded, then to take the time, and once
    more to sum up what the GPU does.

    Raises:
        UserError: the data set of ``args.dataset`` cannot be used.
    """
    table = Table(LOOP_COLUMNS)
    for row in rows:
        check_dataset(args.dataset, row.config.model.roi_heads.num_classes)
        model = detector(row, weights, dtype, args.device)
        for _ in range(WARM_UP if "cuda_graphs" in row.prepare else 1):
            _Loop(row.config, args.dataset, args.dataset_images).run(model, dtype, args.device)
        loop = _Loop(row.config, args.dataset, args.dataset_images)
        loop.run(model, dtype, args.device)
        busy = "-"
        if args.device == "cuda":
            again = _Loop(row.config, args.dataset, args.dataset_images)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                again.run(model, dtype, args.device)
            busy = f"{busy_seconds(seen) / loop.seconds:.0%}"
        images = len(loop)
        parts = (sum(loop.waits), loop.model_seconds, sum(loop.processing))
        table.add(
            (
                *row.cells,
                str(images),
                milliseconds([loop.seconds / images]),
                *(milliseconds([part / images]) for part in parts),
                busy,
            )
        )


class _Loop(DatasetEvaluator):
    """The loader of the test set and its evaluator, with a look at the clock.

    Attributes:
        seconds: from the first image's arrival on.
        waits: seconds for each of the other images.
        processing: seconds in the evaluator for each image.
    """

    def __init__(self, config: DictConfig, dataset: str, images: int) -> None:
        config = config.copy()
        config.dataloader.test.dataset.names = dataset
        self._loader = instantiate(config.dataloader.test)
        self._evaluator = instantiate(config.dataloader.evaluator)
        self._images = min(images, len(self._loader))
        self.seconds = 0.0
        self.waits: list[float] = []
        self.processing: list[float] = []

    @property
    def model_seconds(self) -> float:
        return self.seconds - sum(self.waits) - sum(self.processing)

    def run(self, model: nn.Module, dtype: torch.dtype, device: str) -> None:
        ours = isinstance(self._evaluator, COCOEvaluator)
        loop: Callable[..., Any] = run_evaluator if ours else inference_on_dataset
        self._loader.pin_memory = ours and device == "cuda"  # as run_evaluator has it
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loop(model, self, self)

    def __len__(self) -> int:
        return self._images

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        batch = next(batches)
        start = time.perf_counter()
        for _ in range(1, self._images):
            yield batch
            asked = time.perf_counter()
            batch = next(batches)
            self.waits.append(time.perf_counter() - asked)
        yield batch
        self.seconds = time.perf_counter() - start

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        start = time.perf_counter()
        self._evaluator.process(inputs, outputs)
        self.processing.append(time.perf_counter() - start)

    def evaluate(self) -> dict[str, Any]:
        """Wait for what the evaluator still has in hand; no metric is computed."""
        start = time.perf_counter()
        for work in getattr(self._evaluator, "_pending", ()):
            work.result()
        self.processing.append(time.perf_counter() - start)
        self.seconds += self.processing[-1]
        return {}
