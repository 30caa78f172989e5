"""Numbers that are logged when the device has been waited for."""

import math

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from mamba_vision.scalars import begin_flush, flush_scalars, put_scalars


def logged(storage):
    return {name: history.values() for name, history in storage.histories().items()}


def test_they_are_logged_under_their_scope_and_step():
    with EventStorage(7) as storage:
        with storage.name_scope("stage0"):
            put_scalars({"a": torch.tensor(0.5), "b": torch.tensor([3])})
        put_scalars({"a": torch.tensor(True)})
        assert logged(storage) == {}
        with storage.name_scope("elsewhere"):
            assert flush_scalars(torch.tensor([1.5, math.inf])) == [1.5, math.inf]
            storage.put_scalar("c", 1)
        assert flush_scalars() == []
    expected = {"stage0/a": 0.5, "stage0/b": 3, "a": 1, "elsewhere/c": 1}
    assert logged(storage) == {name: [(value, 7)] for name, value in expected.items()}


def test_what_is_no_number_is_not_logged():
    with EventStorage() as storage:
        put_scalars({"none": torch.tensor(math.nan), "one": torch.tensor(1.0)})
        flush_scalars()
    assert list(storage.histories()) == ["one"]


def test_a_storage_gets_its_own():
    with EventStorage() as outer:
        put_scalars({"a": torch.tensor(1.0)})
        with EventStorage() as inner:
            put_scalars({"b": torch.tensor(2.0)})
            flush_scalars()
        flush_scalars()
    assert list(outer.histories()) == ["a"]
    assert list(inner.histories()) == ["b"]


def test_what_is_put_after_the_beginning_waits_for_the_next():
    with EventStorage() as storage:
        put_scalars({"a": torch.tensor(1.0)})
        end = begin_flush(torch.tensor([4.0]))
        put_scalars({"b": torch.tensor(2.0)})
        assert end() == [4.0]
        assert logged(storage) == {"a": [(1, 0)]}
        assert flush_scalars() == []
    assert logged(storage) == {"a": [(1, 0)], "b": [(2, 0)]}


@pytest.mark.cuda
def test_a_gpu_is_not_waited_for_longer_than_needed():
    with EventStorage() as storage:
        put_scalars({"a": torch.full((), 3.0, device="cuda")})
        end = begin_flush(torch.full((2,), 5.0, device="cuda"))
        torch.cuda._sleep(2_000_000_000)  # cycles: a second
        assert end() == [5.0, 5.0]
        assert not torch.cuda.current_stream().query()  # it still sleeps
    assert logged(storage) == {"a": [(3, 0)]}
    torch.cuda.synchronize()


@pytest.mark.parametrize("more", [True, False])
def test_gradients_are_not_kept(more):
    weight = torch.ones((), requires_grad=True)
    with EventStorage() as storage:
        put_scalars({"a": weight * 2})
        flush_scalars(weight[None] if more else None)
    assert logged(storage) == {"a": [(2, 0)]}


def test_detectron2s_own_loop_logs_a_step_later():
    class Net(nn.Linear):
        def forward(self, images):
            put_scalars({"number": torch.tensor(10.0 * get_event_storage().iter)})
            return {"loss": super().forward(images).sum()}

    net = Net(2, 1)
    data = iter([torch.ones(1, 2)] * 4)
    trainer = SimpleTrainer(net, data, torch.optim.SGD(net.parameters(), lr=0.1))
    trainer.train(0, 4)
    assert trainer.storage.history("number").values() == [(0, 0), (10, 1), (20, 2)]
