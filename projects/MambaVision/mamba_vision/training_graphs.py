"""CUDA graphs of modules in training: the kernels of both passes, launched by one call each."""

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

from .errors import UserError
from .precision import weights_to_cast
from .recorder import Arena, CudaRecorder, Record, autocast_now, copy_each

__all__ = ["TrainingGraphs"]

logger = logging.getLogger(__name__)


class TrainingGraphs:
    """Calls a module, in training on a GPU from recordings of it.

    Passes are recorded when inputs of a form (shapes, dtypes, autocast's dtype, and the like) come
    for the third time; the first ``limit`` forms stay, and with all others the module is simply
    called. So it is where a recording would be wrong: in a second forward pass while the backward
    pass of a recorded one is still to come, with hooks, compiled, within checkpointing.
    Weights may change in place; once they lie elsewhere, or are frozen, all is recorded anew.

    A copy, and what a pickle holds, starts with no recordings.

    Args:
        limit: forms that are recorded at most; with 0 the module is always simply called. Their
            recordings share memory.
        record: how to record; None for CUDA graphs.

    Attributes:
        recordings: how many forms were recorded so far.
    """

    EAGER_CALLS = 2

    def __init__(self, limit: int = 2, record: Record | None = None) -> None:
        self.recordings = 0
        self._limit = limit
        self._given = record
        self._failed = False
        self._pending: weakref.ref[_Token] | None = None
        self._start(())

    def __reduce__(self) -> tuple:
        return type(self), (self._limit,)

    def records(self, x: Tensor) -> bool:
        """Whether calls with inputs on the device of ``x`` may be recorded."""
        return self._limit > 0 and not self._failed and (x.is_cuda or self._given is not None)

    def __call__(self, module: nn.Module, *inputs: Tensor) -> Any:
        """Call a module.

        Args:
            module: whose parameters and submodules are the same in every call. It gives a tensor or
                a tuple of tensors, draws random numbers at most, and does not synchronize.
            inputs: on one device.

        Returns:
            What the module returns. Gradients go through it once; a second time raises
            :class:`UserError`.
        """
        if self.records(inputs[0]) and _is_recordable(module):
            modules = list(module.modules())
            weights = _weights(modules)
            gradient = any(x.requires_grad for x in (*inputs, *weights))
            plain = all(map(_is_plain, modules)) and (torch.is_grad_enabled() or not gradient)
            recording = self._find(module, _state(modules, weights), inputs) if plain else None
            if recording is not None:
                token = _Token()
                if recording.asked:
                    self._pending = weakref.ref(token)
                outputs = _Replay.apply(recording, token, *inputs, *weights)
                return outputs if recording.several else outputs[0]
        return module(*inputs)

    def _start(self, state: tuple) -> None:
        """Forget all recordings, and expect the blocks to stay in a state."""
        self._state = state
        self._seen: Counter[tuple] = Counter()
        self._known: dict[tuple, _Recording] = {}
        self._record = self._given
        self._inputs: Arena | None = None
        self._casts: dict[tuple[str, torch.dtype], Tensor] = {}

    def _find(
        self, module: nn.Module, state: tuple, inputs: tuple[Tensor, ...]
    ) -> _Recording | None:
        """The recording to replay; None if none may be."""
        if state != self._state:
            self._start(state)
        if self._pending is not None and self._pending() is not None:
            return None
        autocast = autocast_now(inputs[0].device.type)
        forms = ((x.shape, x.stride(), x.dtype, x.requires_grad) for x in inputs)
        form = (*forms, autocast)
        if form not in self._known and len(self._known) < self._limit:
            self._seen[form] += 1
            if self._seen[form] > self.EAGER_CALLS:
                self._try(form, module, inputs, autocast)
        return self._known.get(form)

    def _try(
        self,
        form: tuple,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        autocast: torch.dtype | None,
    ) -> None:
        try:
            self._record = self._record or CudaRecorder(inputs[0].device)
            self._inputs = self._inputs or Arena(inputs[0].device)
            memory = self._inputs.place([x.detach() for x in inputs])
            for place, x in zip(memory, inputs):
                place.copy_(x.detach()).requires_grad_(x.requires_grad)
            self._known[form] = _Recording(module, memory, autocast, self._record, self._casts)
            self.recordings += 1
        except RuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            logger.warning("No CUDA graphs of a part of the model, which trains slower: %s", reason)
            self._failed = True
            self._start(())


class _Token:
    """Lives from a recorded forward pass to its backward pass, or until that cannot come."""


class _Recording:
    """Both passes of a module for inputs of one form.

    Args:
        module: what is recorded.
        inputs: of the form, written before each forward pass, and left as they are till after the
            backward pass.
        autocast: its dtype; None if it is off.
        record: how to record.
        casts: the weights in autocast's dtype, written before each forward pass; by name and dtype.
            Those that are missing are added.

    Attributes:
        inputs: those given.
        outputs: written by the forward pass.
        several: whether the module gives a tuple.
        asked: which of the inputs and weights get gradients.
        output_gradients: written before the backward pass; None where there can be none.
        gradients: of each input and weight, written by the backward pass, perhaps in autocast's
            dtype; None where none is required. The next forward pass may overwrite them.
        forward, backward: run the passes.
    """

    outputs: tuple[Tensor, ...]
    several: bool
    output_gradients: list[Tensor | None]
    gradients: list[Tensor | None]

    def __init__(
        self,
        module: nn.Module,
        inputs: list[Tensor],
        autocast: torch.dtype | None,
        record: Record,
        casts: dict[tuple[str, torch.dtype], Tensor],
    ) -> None:
        self.inputs = inputs
        # Leaves of their own, in the same memory: hooks on a weight see its true gradients alone.
        # All that autocast would cast one by one, there and back, is cast at once.
        cast = set(weights_to_cast(module)) if autocast is not None else set()
        weights, masters, halves = {}, [], []
        for name, weight in module.named_parameters():
            leaf = weight.detach()
            if autocast is not None and weight in cast:
                half = torch.empty_like(leaf, dtype=autocast)
                masters.append(leaf)
                leaf = casts.setdefault((name, autocast), half)
                halves.append(leaf.detach())
            weights[name] = leaf.requires_grad_(weight.requires_grad)
        leaves = [*self.inputs, *weights.values()]
        self.asked = [i for i, x in enumerate(leaves) if x.requires_grad]
        device = leaves[0].device.type

        def forward() -> None:
            self.gradients = []
            # Casts of the weights kept from before would not follow the weights.
            autocasting = torch.autocast(
                device, autocast, autocast is not None, cache_enabled=False
            )
            copy_each(masters, halves)
            with torch.set_grad_enabled(bool(self.asked)), autocasting:
                outputs = functional_call(module, weights, tuple(self.inputs))
            self.several = isinstance(outputs, tuple)
            self.outputs = outputs if self.several else (outputs,)
            self.output_gradients = [
                torch.empty_like(y) if y.requires_grad else None for y in self.outputs
            ]

        def backward() -> None:
            pairs = [(y, g) for y, g in zip(self.outputs, self.output_gradients) if g is not None]
            gradients = torch.autograd.grad(
                [y for y, _ in pairs],
                [leaves[i] for i in self.asked],
                [g for _, g in pairs],
                allow_unused=True,
            )
            self.outputs = tuple(y.detach() for y in self.outputs)
            self.gradients = [None] * len(leaves)
            for i, gradient in zip(self.asked, gradients):
                self.gradients[i] = gradient

        if self.asked:
            self.forward, self.backward = record(forward, backward)
        else:
            (self.forward,) = record(forward)


class _Replay(torch.autograd.Function):
    """The node in the graph of autograd that stands for the whole module."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, token: _Token, *tensors: Tensor) -> tuple:
        for memory, x in zip(recording.inputs, tensors):
            memory.detach().copy_(x)
        recording.forward()
        ctx.recording, ctx.token = recording, token
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.set_materialize_grads(False)
        outputs = tuple(y.detach().clone() for y in recording.outputs)
        without = zip(outputs, recording.output_gradients)
        ctx.mark_non_differentiable(*(y for y, gradient in without if gradient is None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.token is None:
            raise UserError(
                "the argument cuda_graphs is True (of MambaVision or the RoI heads), which keeps "
                "activations for one backward pass only: give False to run a second one"
            )
        recording = ctx.recording
        for memory, gradient in zip(recording.output_gradients, gradients):
            if memory is not None:
                memory.zero_() if gradient is None else memory.copy_(gradient)
        recording.backward()
        ctx.token = None
        # Autograd would make what it is given a parameter's .grad.
        copies = [
            None if gradient is None else torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(recording.gradients, ctx.dtypes)
        ]
        copy_each(
            [gradient for gradient in recording.gradients if gradient is not None],
            [copy for copy in copies if copy is not None],
        )
        return None, None, *copies


def _is_recordable(module: nn.Module) -> bool:
    """Whether a module is called to be trained, and nothing looks at what it does meanwhile."""
    return (
        all(child.training for child in module.children())
        and not torch.is_anomaly_enabled()
        # A checkpoint around the module counts the tensors saved in both of its runs.
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
