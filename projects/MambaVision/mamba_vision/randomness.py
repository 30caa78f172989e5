"""Random numbers that depend on what is done, not on what was done before.

A training step and a training sample draw from streams of their own, seeded by the run's seed and
by which step or sample it is. So neither evaluation nor hooks, neither the number of data loader
workers nor a stop and ``--resume`` change what is drawn, and one seed in a checkpoint stands for
the states of all generators in all processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seed_all", "seeded"]


def seed_all(*key: int) -> None:
    """Seed the generators of Python, numpy and torch (CPU and GPUs).

    Args:
        *key: numbers from 0 on that together name the stream, the run's seed first.
    """
    torch.manual_seed(_seed_others(*key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """As :func:`seed_all` for the generators on the CPU, which are put back on leaving."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.default_generator.manual_seed(_seed_others(*key))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _seed_others(*key: int) -> int:
    """Seed the generators of Python and numpy; returns the seed for torch's."""
    python, numpy, torch_ = np.random.SeedSequence(key).generate_state(3, np.uint32).tolist()
    random.seed(python)
    np.random.seed(numpy)
    return torch_
