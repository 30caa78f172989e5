import pytest

_NANO = {
    "dim": 16,
    "in_dim": 8,
    "depths": (1, 1, 3, 2),
    "num_heads": (2, 4, 4, 8),
    "window_size": (8, 8, 4, 3),
}


@pytest.fixture
def nano():
    """Constructor arguments of a backbone that runs in milliseconds."""
    return dict(_NANO)
