"""The rule by which every backend is judged, and random scans and convolutions."""

import pytest
import torch


@pytest.fixture
def judge():
    """Compare results with the truth in float64 and with plain PyTorch in the same dtype.

    The error may be twice that of plain PyTorch, and 16 units in the last place of float32 besides,
    in the measure of the largest number; ``measures`` names those for which that is another.
    """

    def check(names, results, truths, plain, measures=None):
        assert len(results) == len(truths) == len(plain) == len(names)
        for name, result, truth, same in zip(names, results, truths, plain):
            assert result.shape == truth.shape, name
            assert result.dtype == same.dtype, name
            assert result.isfinite().all(), name
            error, usual = ((x.double().cpu() - truth).abs().max() for x in (result, same))
            measure = (measures or {}).get(name, truth.abs().max())
            floor = 16 * torch.finfo(torch.float32).eps * measure
            assert error <= 2 * usual + floor, f"{name}: error {error:.2e}, usual {usual:.2e}"

    return check
