"""What every test shares: the ``cuda`` marker and the random seed."""

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
