"""Functions in turn, and what they keep in memory."""

import gc
import weakref

import pytest
import torch

from mamba_vision.benchmarks.timing import Memory, alternate, captured


def test_two_functions_run_in_turn():
    calls = []
    times, others = alternate(lambda: calls.append("a"), lambda: calls.append("b"), 2, "cpu")
    assert "".join(calls) == "babab"
    assert len(times) == len(others) == 2
    assert min(*times, *others) > 0


def test_a_function_is_its_own_yardstick():
    calls = []

    def call():
        calls.append(1)

    times, others = alternate(call, call, 3, "cpu")
    assert times is others
    assert len(times) == len(calls) == 3


def test_no_memory_on_a_cpu():
    calls = []
    assert Memory("cpu").peak(lambda: calls.append(1)) == "-"


@pytest.mark.cuda
def test_memory_of_a_call():
    there = torch.zeros(2**20, device="cuda")
    memory = Memory("cuda")
    kept = torch.zeros(2**22, device="cuda")  # 16 MiB
    assert memory.peak(lambda: torch.zeros(2**23, device="cuda").add_(there[0])) == "48"
    del kept


@pytest.mark.cuda
def test_memory_of_a_graph():
    memory = Memory("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(2**24, device="cuda").add_(1)  # 64 MiB, which no tensor holds afterwards
    assert float(memory.peak(graph.replay)) >= 64
    del graph
    assert float(memory.peak(lambda: None)) < 64


@pytest.mark.cuda
def test_a_replay_keeps_what_it_reads():
    def double():
        weight = torch.full((2**22,), 3.0, device="cuda")
        result = torch.zeros_like(weight)
        return captured(lambda: torch.mul(weight, 2, out=result)), result, weakref.ref(weight)

    replay, result, weight = double()
    gc.collect()
    torch.cuda.empty_cache()
    assert weight() is not None
    result.zero_()
    replay()
    assert result.unique().tolist() == [6.0]
