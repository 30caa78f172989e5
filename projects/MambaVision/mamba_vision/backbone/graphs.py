"""CUDA graphs of blocks in training: the kernels of both passes, launched by one call each.

Shape legend: B windows, L tokens per window, C channels.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torchvision.ops import StochasticDepth

from ..errors import UserError
from ..recorder import CudaRecorder, Record, autocast_now

__all__ = ["TrainingGraphs"]

logger = logging.getLogger(__name__)


class TrainingGraphs:
    """Runs blocks one after another, in training on a GPU from recordings of them.

    Passes are recorded when inputs of a form (shape, dtype, autocast's dtype, and the like) come
    for the third time; the first ``LIMIT`` forms stay, and all others run block by block. So does
    whatever a recording would get wrong: a second forward pass while the backward pass of a
    recorded one is still to come, blocks with hooks, compiled ones, checkpointing around them.
    Weights may change in place; once they lie elsewhere, or are frozen, all is recorded anew.

    A copy, and what a pickle holds, starts with no recordings.

    Args:
        record: how to record; None for CUDA graphs.

    Attributes:
        recordings: how many forms were recorded so far.
    """

    LIMIT = 2
    EAGER_CALLS = 2

    def __init__(self, record: Record | None = None) -> None:
        self.recordings = 0
        self._given = record
        self._failed = False
        self._pending: weakref.ref[_Token] | None = None
        self._start(())

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Run the blocks.

        Args:
            blocks: each (B, L, C) -> (B, L, C); the same ones in every call.
            x: (B, L, C).

        Returns:
            (B, L, C). Gradients go through it once; a second time raises :class:`UserError`.
        """
        if not self._failed and (x.is_cuda or self._given) and _are_trained(blocks):
            sequence = nn.Sequential(*blocks)
            modules = list(sequence.modules())
            weights = _weights(modules)
            plain = all(map(_is_plain, modules)) and any(t.requires_grad for t in (x, *weights))
            recording = self._find(sequence, _state(modules, weights), x) if plain else None
            if recording is not None:
                token = _Token()
                self._pending = weakref.ref(token)
                return _Replay.apply(recording, token, x, *weights)
        for block in blocks:
            x = block(x)
        return x

    def _start(self, state: tuple) -> None:
        """Forget all recordings, and expect the blocks to stay in a state."""
        self._state = state
        self._seen: Counter[tuple] = Counter()
        self._known: dict[tuple, _Recording] = {}
        self._record = self._given

    def _find(self, blocks: nn.Sequential, state: tuple, x: Tensor) -> _Recording | None:
        """The recording to replay; None if none may be."""
        if state != self._state:
            self._start(state)
        if self._pending is not None and self._pending() is not None:
            return None
        autocast = autocast_now(x.device.type)
        form = x.shape, x.stride(), x.dtype, x.requires_grad, autocast
        if form not in self._known and len(self._known) < self.LIMIT:
            self._seen[form] += 1
            if self._seen[form] > self.EAGER_CALLS:
                self._try(form, blocks, x, autocast)
        return self._known.get(form)

    def _try(
        self, form: tuple, blocks: nn.Sequential, x: Tensor, autocast: torch.dtype | None
    ) -> None:
        try:
            self._record = self._record or CudaRecorder(x.device)
            self._known[form] = _Recording(blocks, x, autocast, self._record)
            self.recordings += 1
        except RuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            logger.warning("No CUDA graphs of a stage, which trains slower: %s", reason)
            self._failed = True
            self._start(())


class _Token:
    """Lives from a recorded forward pass to its backward pass, or until that cannot come."""


class _Recording:
    """Both passes of the blocks for inputs of one form.

    Args:
        blocks: (B, L, C) -> (B, L, C).
        x: (B, L, C), an input of the form.
        autocast: its dtype; None if it is off.
        record: how to record.

    Attributes:
        input, output, output_gradient: (B, L, C), written before and by the forward pass, and
            before the backward pass.
        gradients: of the input and of each weight, written by the backward pass; None where none
            is required. The next forward pass may overwrite them.
        forward, backward: run the passes.
    """

    output: Tensor
    output_gradient: Tensor
    gradients: list[Tensor | None]

    def __init__(
        self, blocks: nn.Sequential, x: Tensor, autocast: torch.dtype | None, record: Record
    ) -> None:
        self.input = x.detach().clone().requires_grad_(x.requires_grad)
        # Leaves of their own, in the same memory: hooks on a weight see its true gradients alone.
        weights = {
            name: weight.detach().requires_grad_(weight.requires_grad)
            for name, weight in blocks.named_parameters()
        }
        inputs = [self.input, *weights.values()]
        asked = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
        device = x.device.type

        def forward() -> None:
            self.gradients = []
            # Casts of the weights kept from before would not follow the weights.
            casts = torch.autocast(device, autocast, autocast is not None, cache_enabled=False)
            with torch.enable_grad(), casts:
                self.output = functional_call(blocks, weights, (self.input,))
            self.output_gradient = torch.empty_like(self.output)

        def backward() -> None:
            gradients = torch.autograd.grad(
                self.output, [inputs[i] for i in asked], self.output_gradient, allow_unused=True
            )
            self.output = self.output.detach()
            self.gradients = [None] * len(inputs)
            for i, gradient in zip(asked, gradients):
                self.gradients[i] = gradient

        self.forward, self.backward = record(forward, backward)


class _Replay(torch.autograd.Function):
    """The node in the graph of autograd that stands for all blocks."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, token: _Token, x: Tensor, *_: Tensor) -> Tensor:
        recording.input.copy_(x)
        recording.forward()
        ctx.recording, ctx.token = recording, token
        return recording.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.token is None:
            raise UserError(
                "MambaVision's argument cuda_graphs is True, which keeps activations for one "
                "backward pass only: give False to run a second one"
            )
        recording = ctx.recording
        recording.output_gradient.copy_(gradient)
        recording.backward()
        ctx.token = None
        # Autograd would make what it is given a parameter's .grad.
        dx, *gradients = recording.gradients
        return None, None, None if dx is None else dx.clone(), *_copies(gradients)


def _copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    copies = [None if t is None else torch.empty_like(t) for t in tensors]
    pairs = [(a, b) for a, b in zip(copies, tensors) if a is not None and b is not None]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
    return copies


def _are_trained(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks are run to be trained, and nothing looks at what they do meanwhile."""
    return (
        torch.is_grad_enabled()
        and len(blocks) > 0
        and all(block.training for block in blocks)
        and not torch.is_anomaly_enabled()
        # A checkpoint around the blocks counts the tensors saved in both of its runs.
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a module is a call of its forward as it stands in the source."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # of torch.compile
    )


def _weights(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Those of all modules, in the order of nn.Module.parameters, which takes much longer."""
    weights = (w for module in modules for w in module._parameters.values() if w is not None)
    return list(dict.fromkeys(weights))


def _state(modules: Sequence[nn.Module], weights: Sequence[Tensor]) -> tuple:
    """What a recording depends on besides its input, and what may change in a training."""
    return (
        *((w.data_ptr(), w.dtype, w.requires_grad) for w in weights),
        *((m.training, m.p if isinstance(m, StochasticDepth) else None) for m in modules),
    )
