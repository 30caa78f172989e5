"""Images and their objects on the way to a GPU, and numbers on the way back, while the CPU goes on.

A copy to or from memory that is not pinned makes the CPU wait until the GPU is done with all that
it was given before. To pin is to copy too, on the CPU; data loaders do that beside the training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

__all__ = ["begin_fetch", "pin", "send"]


def pin(x: Any) -> Any:
    """The same in pinned memory, where it is not there or on a GPU already.

    Args:
        x: a tensor, boxes, bitmap masks, instances of these, or a dictionary of all that; what is
            none of it, as polygons are not, is left as it is.
    """
    return _change(x, _pin)


def send(images: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """What Detectron2's models take, such that they need not wait for it on a GPU.

    Args:
        images: each with ``image`` (C, H, W), and perhaps ``instances``; best if pinned.
        device: the model's.

    Returns:
        The same, with pixels on the device, and instances that go there when they are told to;
        until then they lie where they were, for what draws them.
    """
    if device.type != "cuda":
        return images
    sent = []
    for image in images:
        own = {name: _move(x, device) if name == "image" else x for name, x in image.items()}
        if isinstance(objects := image.get("instances"), Instances):
            own["instances"] = _Instances(objects.image_size, **objects.get_fields())
        sent.append(own)
    return sent


def begin_fetch(numbers: Tensor) -> Callable[[], list]:
    """Let a GPU send numbers as soon as they are computed.

    Args:
        numbers: of any shape and dtype; on a CPU they are simply there.

    Returns:
        What ends it: it waits for the numbers, but not for what the GPU is given after this, and
        gives them as ``tolist`` does.
    """
    if not numbers.is_cuda:
        return numbers.tolist
    sent = torch.empty_like(numbers, device="cpu", pin_memory=True)
    sent.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.current_stream(numbers.device).record_event()

    def end() -> list:
        arrived.synchronize()
        return sent.tolist()

    return end


class _Instances(Instances):
    """Detectron2's, whose copy on a GPU is not waited for."""

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        return Instances.to(_move(self, *args, **kwargs), *args, **kwargs)  # and what else can go


def _move(x: Any, *args: Any, **kwargs: Any) -> Any:
    return _change(x, lambda tensor: _pin(tensor).to(*args, **kwargs, non_blocking=True))


def _pin(tensor: Tensor) -> Any:
    return tensor if tensor.is_cuda else tensor.pin_memory()  # which copies nothing twice


def _change(x: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """A copy with other tensors."""
    if isinstance(x, Tensor):
        return how(x)
    if isinstance(x, (Boxes, BitMasks)):
        return type(x)(how(x.tensor))
    if isinstance(x, dict):
        return {name: _change(value, how) for name, value in x.items()}
    if isinstance(x, Instances):
        changed = copy.copy(x)
        changed._fields = _change(x.get_fields(), how)
        return changed
    return x
