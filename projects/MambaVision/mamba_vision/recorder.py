"""Work on a GPU recorded once and launched again as one: CUDA graphs.

A graph is bound to the memory that it was recorded with: what it reads must be put there before,
and what it computes lies where it lay the last time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["CudaRecorder", "Record", "Run", "autocast_now"]

Run = Callable[[], object]
Record = Callable[..., tuple[Run, ...]]  # from functions to as many that do the same, only faster


class CudaRecorder:
    """Records CUDA graphs that share their memory: none may run while another's is still needed.

    Args:
        device: the graphs'.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *runs: Run) -> tuple[Run, ...]:
        """Record functions that are always called in the order given.

        Each is called twice: first as it is, for what is chosen, compiled or allocated only once.
        The numbers that this draws are drawn again afterwards.

        Returns:
            For each function one that launches its graph.

        Raises:
            RuntimeError: a function cannot be recorded.
        """
        graphs = [torch.cuda.CUDAGraph() for _ in runs]
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # torch.cuda.graph stays on it after an error
                with torch.random.fork_rng([torch.cuda.current_device()]):
                    for run in runs:
                        run()
                try:
                    for run, graph in zip(runs, graphs):
                        self._record(run, graph)
                except RuntimeError:
                    # PyTorch's random generator waits for the end of the recording that failed, and
                    # refuses to draw until another one ended well.
                    self._pool = torch.cuda.graph_pool_handle()
                    self._record(
                        lambda: torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
                    )
                    raise
            current.wait_stream(self._stream)
        return tuple(graph.replay for graph in graphs)

    def _record(self, run: Run, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.graph(
            graph,
            pool=self._pool,
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
