"""Graphed functions: what they give, what they record, and what they keep."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mamba_vision.inference.graphs import Graphed, Graphs

CPU = torch.device("cpu")


def played(*runs):
    """A recording as a device has it: nothing but what was done to the memory it was done in."""
    return runs


def graphs(**options):
    return Graphs(CPU, **{"record": played, **options})


class Counted:
    """(x + 1) and, for a dict of tensors, its sum times a number."""

    calls = 0

    def __call__(self, x, others, factor=1):
        self.calls += 1
        return {"next": x + 1, "sums": [factor * sum(others.values())]}


def call(graphed, *sizes, factor=1):
    """Call it with random tensors; returns what it gave and what it should have given."""
    x, a, b = torch.randn(3, *sizes)
    results = graphed(x, {"a": a, "b": b}, factor)
    return (results["next"], results["sums"][0]), (x + 1, factor * (a + b))


def test_each_form_of_inputs_is_called_then_recorded_then_replayed():
    shared = graphs()
    graphed = Graphed(Counted(), shared)
    expected_captures = 0
    for turn in range(4):
        for sizes, factor in (((2, 3), 1), ((3, 2), 1), ((2, 3), 5), ((0, 4), 1)):
            found, expected = call(graphed, *sizes, factor=factor)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            expected_captures += turn == 1
            assert shared.captures == expected_captures
    assert shared.captures == 4


def test_a_dtype_or_a_precision_is_another_form():
    shared = graphs()
    graphed = Graphed(lambda x: x @ x.t(), shared)
    x = torch.randn(3, 3)
    for _ in range(2):
        assert graphed(x).dtype == torch.float32
        assert graphed(x.double()).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert graphed(x).dtype == torch.bfloat16
    assert shared.captures == 3


def test_results_keep_their_memory_format():
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    graphed = Graphed(lambda x: x * 2, graphs())
    for _ in range(3):
        found = graphed(x)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, x * 2)


def test_results_lie_in_one_place_and_are_handed_on_without_a_copy():
    """Only inputs from elsewhere are copied; a result of another graph is read where it lies."""
    shared = graphs()
    first = Graphed(lambda x: [x + 1], shared)
    seen = []

    def second(maps, y):
        seen.append((maps[0].data_ptr(), y.data_ptr()))
        return maps[0] * y

    after = Graphed(second, shared)
    for _ in range(4):
        x, y = torch.randn(5), torch.randn(5)
        maps = first(x)
        torch.testing.assert_close(after(maps, y), (x + 1) * y)
        assert all(address == maps[0].data_ptr() for address, _ in seen)
    assert shared.captures == 2
    assert len({y for _, y in seen[1:]}) == 1


def test_results_of_a_larger_form_move_and_are_recorded_anew():
    shared = graphs()
    first = Graphed(lambda x: x + 1, shared)
    after = Graphed(lambda x: x * 2, shared)
    for length in (4, 4, 4, 5000, 5000, 5000, 4, 4, 4, 5000, 5000):
        x = torch.randn(length)
        torch.testing.assert_close(after(first(x)), 2 * (x + 1))
    # of the second function also the short form, once more, as its input has moved
    assert shared.captures <= 2 + 3


def test_the_graph_not_used_for_longest_goes():
    shared = graphs(limit=3)
    function = Counted()
    graphed = Graphed(function, shared)
    for length in (1, 1, 2, 2, 3, 3, 1, 4, 4):  # 4 takes the place of 2
        call(graphed, length)
    assert shared.captures == 4
    for length in (1, 3, 4):
        call(graphed, length)
    assert shared.captures == 4
    call(graphed, 2)
    call(graphed, 2)
    assert shared.captures == 5
    assert len(graphed._known) == 3


def test_what_cannot_be_recorded_is_called(caplog):
    def fails(*runs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    shared = graphs(record=fails)
    graphed = Graphed(Counted(), shared)
    for _ in range(4):
        found, expected = call(graphed, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert shared.captures == 0
    assert len(caplog.records) == 1
    assert caplog.messages[0].endswith("not permitted when stream is capturing")


def test_on_a_cpu_a_function_is_just_called():
    shared = Graphs(CPU)
    graphed = Graphed(lambda x: x, shared)
    x = torch.ones(1)
    assert all(graphed(x) is x for _ in range(3))
    assert shared.captures == 0


def test_memory_made_in_inference_mode_can_be_used_outside():
    graphed = Graphed(Counted(), graphs())
    with torch.inference_mode():
        call(graphed, 3)
        call(graphed, 3)
    with torch.no_grad():
        found, expected = call(graphed, 3)
    torch.testing.assert_close(found, expected)


def test_a_method_is_replaced_for_one_object_which_is_freed_as_before():
    shared = graphs()
    one, other = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    shared.install(one, "forward")
    x = torch.randn(3, 2)
    for _ in range(3):
        torch.testing.assert_close(one(x), x @ one.weight.t() + one.bias)
        other(x)
    assert shared.captures == 1
    gone = weakref.ref(one)
    gc.disable()
    try:
        del one
        assert gone() is None
    finally:
        gc.enable()


@pytest.fixture
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.cuda
def test_a_cuda_graph_computes_the_same(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3)).to(cuda)
    model.requires_grad_(False)
    shared = Graphs(cuda)
    first, after = Graphed(model, shared), Graphed(lambda x: x.flatten(1).softmax(1), shared)
    for _ in range(4):
        for size in ((16, 24), (24, 16), (40, 40)):
            x = torch.randn(2, 3, *size, device=cuda)
            torch.testing.assert_close(after(first(x)), model(x).flatten(1).softmax(1))
    assert 6 <= shared.captures <= 8


@pytest.mark.cuda
def test_a_function_that_waits_for_the_device_is_called(cuda, caplog):
    shared = Graphs(cuda)
    waits, works = Graphed(lambda x: x[x > 0].sum(), shared), Graphed(lambda x: x.sum(), shared)
    for _ in range(4):
        x = torch.randn(100, device=cuda)
        torch.testing.assert_close(waits(x), x.clamp(min=0).sum())
        torch.testing.assert_close(works(x), x.sum())
    assert shared.captures == 1
    assert len(caplog.records) == 1


@pytest.mark.cuda
def test_memory_is_bounded(cuda):
    shared = Graphs(cuda, limit=4)
    graphed = Graphed(lambda x: (x.sin() + x.cos()).exp(), shared)
    used = []
    for _turn in range(3):
        for rows in range(64, 96):
            for _ in range(2):
                graphed(torch.ones(rows, 1 << 16, device=cuda))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved(cuda))
    assert shared.captures == 3 * 32
    assert used[2] <= 1.1 * used[0]
