"""What is launched, waited for, and covered."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from mamba_vision.benchmarks.profiling import SPAN, _counts, busy_seconds, print_profile


def event(name, start, end, device=DeviceType.CPU, annotation=False):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=annotation
    )


def profile(*events):
    return SimpleNamespace(events=lambda: events)


def test_busy_time_counts_once_what_overlaps():
    times = [(50, 60), (10, 30), (20, 40), (25, 35)]
    seen = profile(
        *(event("kernel", *pair, DeviceType.CUDA) for pair in times),
        event(SPAN, 0, 1e9, DeviceType.CUDA, annotation=True),
        event("operator", 0, 1e9),
    )
    assert busy_seconds(seen) == pytest.approx(40e-6)


def test_counts_what_is_called_within_the_span():
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaStreamSynchronize"]
    seen = profile(
        event(SPAN, 0, 10, annotation=True),
        event(SPAN, 5, 20, DeviceType.CUDA, annotation=True),
        *(event(name, 5, 6) for name in (*names, "cudaMemcpyAsync")),
        event("cudaDeviceSynchronize", 11, 12),  # the profiler's
    )
    assert _counts(seen) == [2, 1, 1]


def test_of_a_real_profile(tables):
    print_profile("a sum", lambda: torch.ones(3).sum(), "cpu")
    ((row,),) = tables()
    counts = "kernel launches", "graph launches", "synchronizations", "GPU busy ms"
    assert [row[column] for column in ("per call", *counts)] == ["a sum", "0", "0", "0", "-"]


@pytest.mark.cuda
def test_on_a_gpu(tables):
    x = torch.zeros(1 << 26, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x + 1

    def call():
        graph.replay()
        (x * 2).sum().item()

    call()
    print_profile("a call", call, "cuda")
    ((row,),) = tables()
    assert (row["kernel launches"], row["graph launches"]) == ("2", "1")
    assert row["synchronizations"] == "1"
    assert float(row["GPU busy ms"]) > 0.1  # it reads 768 MiB and writes 512
