"""What a function has the CPU launch and wait for, and how long that keeps the GPU busy."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .timing import Table, milliseconds, synchronize

__all__ = ["busy_seconds", "print_profile"]

CALLS = 5
OPERATORS = 15  # of those that cost the CPU most
COUNTED = {  # parts of the names of calls of CUDA's
    "kernel launches": "LaunchKernel",
    "graph launches": "GraphLaunch",
    "synchronizations": "Synchronize",
}
SPAN = "mamba_vision.benchmarks"


def print_profile(title: str, function: Callable[[], object], device: str) -> None:
    """Print what a call of a function does, the mean of some, and what of it costs the CPU most.

    The GPU is busy in copies, too. The profiler slows the CPU down, but not the GPU.

    Args:
        title: what a call is.
        function: which is warm.
        device: that it uses.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities) as seen, record_function(SPAN):
        for _ in range(CALLS):
            function()
    table = Table(["per call", *COUNTED, "GPU busy ms"])
    busy = milliseconds([busy_seconds(seen) / CALLS]) if device == "cuda" else "-"
    table.add((title, *(f"{count / CALLS:g}" for count in _counts(seen)), busy))
    print()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=OPERATORS), flush=True)


def _counts(seen: profile) -> list[int]:
    """How often what is ``COUNTED`` was called before the span ended: the profiler waits, too."""
    events = [e for e in seen.events() or () if e.device_type == DeviceType.CPU]
    end = max(event.time_range.end for event in events if event.name == SPAN)
    names = [event.name for event in events if event.time_range.start < end]
    return [sum(part in name for name in names) for part in COUNTED.values()]


def busy_seconds(seen: profile) -> float:
    """Seconds in which the GPU ran something."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    covered = last = 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered / 1e6
