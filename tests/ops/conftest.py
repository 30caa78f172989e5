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


@pytest.fixture
def check_replay():
    """A step, recorded as a CUDA graph, follows its inputs bit for bit."""

    def check(step, inputs):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # compiles, and lets cuBLAS allocate
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for x in inputs:
                x.add_(0.01 * torch.randn_like(x))
        graph.replay()
        for one, other in zip(captured, step(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    return check


@pytest.fixture
def draw_inner():
    def draw(batch, length, half, rank=None, states=8, dtype=torch.float32):
        """Inputs in the order of the operator's arguments, of a mixer's usual magnitudes."""
        rank = rank or -(-half // 8)
        return [
            torch.randn(batch, length, 2 * half).to(dtype),
            torch.randn(half, 3) / 2,
            torch.randn(half, 3) / 2,
            torch.randn(rank + 2 * states, half) / half**0.5,
            torch.randn(half, rank) / rank**0.5,
            torch.randn(half) / 2 - 1,
            -torch.arange(1.0, states + 1).repeat(half, 1),
            torch.randn(half),
        ]

    return draw
