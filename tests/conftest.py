"""What every test shares: the ``cuda`` marker, the random seed and a config to train with."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    """Draw the same random numbers whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def pinning(monkeypatch):
    """Let memory be pinned also where there is no GPU: a mark on a copy stands for it."""
    if torch.cuda.is_available():
        return

    def pin_memory(tensor):
        if tensor.is_pinned():
            return tensor
        pinned = tensor.clone()
        pinned.marked = True
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: hasattr(tensor, "marked"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.fixture
def toy(tmp_path):
    """A copy of toy_config.py, its data drawn beside it, where its output goes too."""
    from detectron2.config import LazyConfig
    from detectron2.utils.logger import setup_logger

    path = shutil.copy(Path(__file__).with_name("data") / "toy_config.py", tmp_path / "toy.py")
    LazyConfig.load(str(path))
    yield path

    # Detectron2 keeps a logger's files and the terminal that it found for the whole process.
    setup_logger.cache_clear()
    for logger in map(logging.getLogger, ("detectron2", "fvcore", "mamba_vision")):
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
