"""Stopping when the machine asks for it, so that the run can go on elsewhere.

SIGTERM (a cluster takes the machine back) and SIGUSR1 (Slurm's warning before a time limit) let the
step end and a checkpoint be written. The process then exits with :data:`EXIT_CODE`, on which
tools/slurm/train.sbatch puts the job back into the queue.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["EXIT_CODE", "StopHook", "StopSignals", "forward_signals"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

Handler = Callable[[int, FrameType | None], None]


class StopSignals:
    """While entered, the signals are noted instead of ending the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handling = _handling(self._note)

    def __enter__(self) -> StopSignals:
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(signum)


class StopHook(HookBase):
    """End the process once its trainer is stopping, after what the hooks before this one do.

    For all processes, registered behind the hook that writes the checkpoint.
    """

    def after_step(self) -> None:
        if self.trainer.stopping:
            comm.synchronize()  # until the first process has written
            raise self.trainer.failure or SystemExit(EXIT_CODE)


@contextmanager
def forward_signals() -> Iterator[StopSignals]:
    """Hand the signals on to the processes that this one has started, and note them."""
    stop = StopSignals()

    def forward(signum: int, frame: FrameType | None) -> None:
        stop._note(signum, frame)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signum)

    with _handling(forward):
        yield stop


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
