"""What every test shares: the ``cuda`` marker, the random seed and a config to train with."""

import logging
import shutil
from pathlib import Path

import pytest
import torch


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
def toy(tmp_path):
    """A copy of toy_config.py; its data and its output go beside it."""
    yield shutil.copy(Path(__file__).with_name("data") / "toy_config.py", tmp_path / "toy.py")

    # Detectron2 keeps a logger's files and the terminal that it found for the whole process.
    from detectron2.utils.logger import setup_logger

    setup_logger.cache_clear()
    for logger in map(logging.getLogger, ("detectron2", "fvcore", "mamba_vision")):
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
