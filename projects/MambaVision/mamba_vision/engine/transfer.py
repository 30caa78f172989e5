"""Images and their objects on the way to a GPU, while the CPU goes on.

A copy from memory that is not pinned, as data loaders give it, makes the CPU wait until the GPU is
done with all that it was given before.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

__all__ = ["send"]


def send(images: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """What Detectron2's models take, such that they need not wait for it on a GPU.

    Args:
        images: each with ``image`` (C, H, W), and perhaps ``instances``.
        device: the model's.

    Returns:
        The same, with pixels on the device, and instances that go there when they are told to;
        until then they lie where they were, for what draws them.
    """
    if device.type != "cuda":
        return images
    sent = []
    for image in images:
        own = {name: _copy(x, device) if name == "image" else x for name, x in image.items()}
        if isinstance(objects := image.get("instances"), Instances):
            own["instances"] = _Instances(objects.image_size, **objects.get_fields())
        sent.append(own)
    return sent


class _Instances(Instances):
    """Detectron2's, whose copy on a GPU is not waited for."""

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        fields = {name: _copy(x, *args, **kwargs) for name, x in self.get_fields().items()}
        return Instances(self.image_size, **fields)


def _copy(x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, (Boxes, BitMasks)):
        return type(x)(_copy(x.tensor, *args, **kwargs))
    if isinstance(x, Tensor):
        pinned: Any = x if x.is_cuda else x.pin_memory()
        return pinned.to(*args, **kwargs, non_blocking=True)
    return x.to(*args, **kwargs) if hasattr(x, "to") else x
