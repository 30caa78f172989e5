"""Numbers to log that are still on the device, and are fetched together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from .transfer import begin_fetch

__all__ = ["begin_flush", "flush_scalars", "put_scalars"]


class _Scalar(NamedTuple):
    name: str
    step: int
    value: Tensor


_pending: WeakKeyDictionary[EventStorage, list[_Scalar]] = WeakKeyDictionary()


def put_scalars(scalars: Mapping[str, Tensor]) -> None:
    """Log scalars without waiting for the device.

    They reach the current ``EventStorage``, under its current name scope and step, with the next
    :func:`flush_scalars`, which a training loop may call when it waits for the device anyway. In
    one that does not know of it, they do when the next step puts its own.

    Args:
        scalars: name to value, a tensor of one element. One that is NaN is not logged.
    """
    storage = get_event_storage()
    if _pending.get(storage) and _pending[storage][0].step != storage.iter:
        flush_scalars()
    pending = _pending.setdefault(storage, [])
    scope = storage._current_prefix
    pending.extend(_Scalar(scope + k, storage.iter, v.detach()) for k, v in scalars.items())


def flush_scalars(numbers: Tensor | None = None) -> list[float]:
    """Log all that was put, and fetch other numbers in the same transfer from the device.

    Args:
        numbers: what else is wanted, (n,), of any real dtype, on the same device.

    Returns:
        Those n numbers, in float32's precision.
    """
    return begin_flush(numbers)()


def begin_flush(numbers: Tensor | None = None) -> Callable[[], list[float]]:
    """Let the device send what :func:`flush_scalars` fetches, as soon as it is computed.

    Args:
        numbers: as there.

    Returns:
        What ends it: it waits for the transfer, but not for what the device is given after this,
        and logs and returns as there.
    """
    storage = get_event_storage()
    pending = _pending.pop(storage, [])
    tensors = [] if numbers is None else [numbers]
    if pending:
        tensors.append(torch.stack([scalar.value.reshape(()) for scalar in pending]))
    if not tensors:
        return list
    fetch = begin_fetch(torch.cat([tensor.float() for tensor in tensors]))

    def end() -> list[float]:
        fetched = fetch()
        count = len(fetched) - len(pending)
        scope, storage._current_prefix = storage._current_prefix, ""  # the names are whole
        for scalar, value in zip(pending, fetched[count:], strict=True):
            if not math.isnan(value):
                storage.put_scalar(scalar.name, value, cur_iter=scalar.step)
        storage._current_prefix = scope
        return fetched[:count]

    return end
