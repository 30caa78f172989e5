"""Work on a GPU recorded once and launched again as one: CUDA graphs.

A graph is bound to the memory that it was recorded with: what it reads must be put there before,
and what it computes lies where it lay the last time.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["Arena", "CudaRecorder", "Record", "Run", "autocast_now", "copy_each"]

_ALIGNMENT = 256  # bytes, as the allocator's

Run = Callable[[], object]
Record = Callable[..., tuple[Run, ...]]  # from functions to as many that do the same, only faster


class _Pool:
    """Memory of graphs, none of which runs while another's results are still needed."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


# PyTorch forgets a pool with the last of its graphs, and then refuses to hear of it again.
_pools: WeakValueDictionary[torch.device, _Pool] = WeakValueDictionary()


class CudaRecorder:
    """Records CUDA graphs that share their memory: none may run while another's is still needed.

    Of functions recorded together those behind the first share that of all recorders.

    Args:
        device: the graphs'.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._own = _Pool()
        self._common: _Pool | None = None

    def __call__(self, *runs: Run) -> tuple[Run, ...]:
        """Record functions that are always called in the order given.

        Each is called twice: first as it is, for what is chosen, compiled or allocated only once.
        The numbers that this draws are drawn again afterwards.

        What the first computes lies there until it is called again; what the others do, until
        any recorder's others are.

        Returns:
            For each function one that launches its graph.

        Raises:
            RuntimeError: a function cannot be recorded.
        """
        graphs = [torch.cuda.CUDAGraph() for _ in runs]
        pools = [self._own, *(self._find_common() for _ in runs[1:])]
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # torch.cuda.graph stays on it after an error
                with torch.random.fork_rng([torch.cuda.current_device()]):
                    for run in runs:
                        run()
                try:
                    for run, graph, pool in zip(runs, graphs, pools):
                        self._record(run, graph, pool)
                except RuntimeError:
                    # PyTorch's random generator waits for the end of the recording that failed, and
                    # refuses to draw until another one ended well.
                    self._own, self._common = _Pool(), None
                    _pools.pop(self._device, None)
                    self._record(
                        lambda: torch.zeros(1, device=self._device),
                        torch.cuda.CUDAGraph(),
                        self._own,
                    )
                    raise
            current.wait_stream(self._stream)
        return tuple(graph.replay for graph in graphs)

    def _find_common(self) -> _Pool:
        # Not before it is needed: a pool must not outlive its graphs.
        self._common = self._common or _pools.setdefault(self._device, _Pool())
        return self._common

    def _record(self, run: Run, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        with torch.cuda.graph(
            graph,
            pool=pool.handle,
            stream=self._stream,
            capture_error_mode="thread_local",  # other threads may pin memory
        ):
            run()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one to record on: libraries keep a workspace for every stream that they ever saw."""
    return torch.cuda.Stream(device)


def autocast_now(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a kind of device; None if it is off.

    A recording holds for that one alone.
    """
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Arena:
    """Memory in which tensors are placed anew each time, from its start.

    All graphs of a function so share the memory of their inputs, and that of their outputs. Where
    it does not suffice, new memory is taken; the old lives on in the graphs that were recorded
    with it.

    Args:
        device: the memory's.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def address(self) -> int:
        """0 if there is no memory yet."""
        return self._memory.data_ptr()

    @torch.inference_mode(False)  # or it could not be written to outside of that mode
    def place(self, forms: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes, dtypes and, if dense, memory formats of others."""
        likes = [torch.empty_like(form, device="meta") for form in forms]
        starts = [0]
        for like in likes:
            size = like.numel() * like.element_size()
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        if len(self._memory) < starts[-1]:
            size = max(starts[-1], 3 * len(self._memory) // 2)  # that there be few generations
            self._memory = self._memory.new_empty(size)
        placed = []
        for like, start in zip(likes, starts):
            end = start + like.numel() * like.element_size()
            numbers = self._memory[start:end].view(like.dtype)
            placed.append(numbers.as_strided(like.shape, like.stride()))
        return placed


@torch.no_grad()
def copy_each(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes, in as few launches as their dtypes allow."""
    groups = defaultdict(list)
    for source, target in zip(sources, targets, strict=True):
        # If one of a list has other dtypes or strides, each of the list is launched by itself.
        form = source.dtype, target.dtype, source.stride() == target.stride()
        groups[form].append((source, target))
    for pairs in groups.values():
        torch._foreach_copy_([target for _, target in pairs], [source for source, _ in pairs])
