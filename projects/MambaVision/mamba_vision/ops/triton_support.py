"""What the Triton backends share: where they can run, and how their kernels are launched."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["DTYPES", "copy", "define", "distance", "obstacle", "on_device_of", "rows"]

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = "3.3"  # the first whose loops carry tuples
OLDEST_GPU = (8, 0)  # Ampere: the first with bfloat16 in hardware


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


if _numbers(triton.__version__) < _numbers(OLDEST_TRITON):
    raise ImportError(
        f"it needs Triton {OLDEST_TRITON} or newer, as PyTorch 2.7 has it, not {triton.__version__}"
    )


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int) -> str | None:
    """Why Triton's kernels cannot take such tensors; None if they can."""
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, these are on {device.type}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {dtype}"
    return _obstacle_of_machine(device)


@functools.cache
def _obstacle_of_machine(device: torch.device) -> str | None:
    if torch.version.hip:
        return "it was written for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return (
            f"it needs a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or newer, "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return None


def rows(x: Tensor) -> Tensor:
    """``x`` (B, L, D) as the kernels want it: itself, or else a copy.

    The numbers of a token lie together, and tokens follow each other at a constant distance, image
    after image.
    """
    batch, length, width = x.shape
    together = width == 1 or x.stride(2) == 1
    constant = batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)
    return x if together and constant else x.contiguous()


def distance(x: Tensor) -> int:
    """From a token to the next one, in numbers, for ``x`` as from :func:`rows`."""
    return x.stride(1 if x.shape[1] > 1 else 0)


def define(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Make a function of tensors an operator of PyTorch, opaque to autograd and to the compiler.

    As ``torch.library.custom_op`` does, but without what that checks at every call: the function
    must return tensors of its own. Nor does a call go through PyTorch's dispatcher unless something
    watches it, since that takes longer than launching a kernel.

    Args:
        name: of the operator, in the namespace ``mamba_vision``.
        function: its annotations give the schema.
        fake: the same, from empty tensors to empty tensors.
        gradients, keep: ``backward`` and ``setup_context`` of ``torch.library.register_autograd``;
            both or neither.

    Returns:
        A function that calls the operator, with its arguments in order; differentiable once.
    """
    full = f"mamba_vision::{name}"
    torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(full, "default", function)
    torch.library.register_fake(full, fake)
    direct = function
    if gradients is not None and keep is not None:
        torch.library.register_autograd(full, gradients, setup_context=keep)
        direct = _differentiable(name, function, gradients, keep)
    operator = getattr(torch.ops.mamba_vision, name).default

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if _is_watched() else direct(*arguments)

    return call


def _is_watched() -> bool:
    """Whether something must see operators rather than what they do: a compiler, a tracer, fake
    tensors, or another mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
    )


def _differentiable(
    name: str,
    function: Callable[..., Any],
    gradients: Callable[..., Any],
    keep: Callable[..., None],
) -> Callable[..., Any]:
    """The function as a node of autograd's graph."""

    def forward(ctx: Any, arguments: tuple, *_: Any) -> Any:
        output = function(*arguments)
        keep(ctx, arguments, output)
        ctx.lengths = [len(x) if isinstance(x, (list, tuple)) else None for x in arguments]
        return output

    @once_differentiable
    def backward(ctx: Any, *doutputs: Tensor | None) -> tuple[Tensor | None, ...]:
        flat: list[Tensor | None] = [None]
        for length, gradient in zip(ctx.lengths, gradients(ctx, *doutputs)):
            flat += [gradient] if length is None else gradient or [None] * length
        return tuple(flat)

    passes = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node: Any = type(name, (torch.autograd.Function,), passes)

    def call(*arguments: Any) -> Any:
        # Autograd finds tensors among a node's arguments, but not in lists.
        flat: list[Any] = []
        for x in arguments:
            flat += x if isinstance(x, (list, tuple)) else [x]
        return node.apply(arguments, *flat)

    return call


def copy(x: Tensor, *, like: Tensor) -> Tensor:
    """A dense copy in another's dtype."""
    return x.new_empty(x.shape, dtype=like.dtype).copy_(x)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which kernels go to the device of ``x``."""
    _announce()
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _announce() -> None:
    logger.info(
        "Triton compiles a kernel when it first meets a dtype, which takes seconds; "
        "it keeps them in %s",
        triton.knobs.cache.dir if hasattr(triton, "knobs") else "~/.triton/cache",
    )
