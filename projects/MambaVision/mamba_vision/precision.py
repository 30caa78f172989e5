"""Number formats by the names that configs give them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import detectron2.layers
import torch
from torch import nn

from .errors import UserError

__all__ = ["autocast", "cast_weights", "precision", "weights_to_cast"]

PRECISIONS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Layers of whose weights autocast makes a copy in its dtype whenever they are used.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, detectron2.layers.Conv2d)


def precision(name: str, key: str) -> torch.dtype:
    """The dtype that ``"fp16"`` or ``"bf16"``, or PyTorch's own name, means.

    Args:
        name: as the user gave it.
        key: where, for the error's sake.

    Raises:
        UserError: it is another name.
    """
    if name not in PRECISIONS:
        raise UserError(f"{key}={name} is no precision; give fp16 or bf16")
    return PRECISIONS[name]


def autocast(
    name: str | None, device: str | torch.device, key: str = "train.eval_amp"
) -> AbstractContextManager:
    """Automatic mixed precision of a name on a device; an empty name is float32, and does nothing.

    Raises:
        UserError: there is no such precision, or the device does not have it.
    """
    if not name:
        return nullcontext()
    dtype = precision(name, key)
    try:
        return torch.autocast(torch.device(device).type, dtype=dtype)
    except RuntimeError as error:
        raise UserError(f"{key}={name} cannot be used here: {error}; leave it empty") from error


def weights_to_cast(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that may be given to a module in autocast's dtype, which casts them anyway.

    What modules name in ``KEPT`` goes to operators as it is.
    """
    kept = {m.get_parameter(name) for m in module.modules() for name in getattr(m, "KEPT", ())}
    layers = (layer for layer in module.modules() if type(layer) in _CAST)
    weights = (weight for layer in layers for weight in layer.parameters(recurse=False))
    return [weight for weight in dict.fromkeys(weights) if weight not in kept]


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast now, in place, what autocast would cast at every call; see :func:`weights_to_cast`."""
    for weight in weights_to_cast(module):
        weight.data = weight.data.to(dtype)
