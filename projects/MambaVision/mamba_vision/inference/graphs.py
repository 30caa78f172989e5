"""Functions of tensors, called as CUDA graphs.

Inputs are copied to where a graph reads them, and what it computes lies where it lay the last time.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..recorder import Arena, CudaRecorder, Record, Run, autocast_now

__all__ = ["Graphed", "Graphs"]

logger = logging.getLogger(__name__)


class Graphs:
    """What the graphed functions of one model share: memory, a stream, and a count.

    They must be called one after another, from one thread, never at once.

    Args:
        device: on another than a CUDA device functions are simply called.
        limit: graphs that each function keeps at most; the one not used for longest goes.
        record: how to record; None for a CUDA graph.

    Attributes:
        captures: how many graphs were recorded so far.
    """

    def __init__(
        self, device: torch.device, *, limit: int = 64, record: Record | None = None
    ) -> None:
        self.captures = 0
        self.device = device
        self.limit = limit
        if record is None and device.type == "cuda":
            record = CudaRecorder(device)
        self._record = record
        self._addresses: set[int] = set()

    def install(
        self,
        owner: Any,
        name: str,
        wrap: Callable[[Graphed], Callable[..., Any]] = lambda graphed: graphed,
    ) -> None:
        """Put a graphed function in the place of a method of an object, for this object alone.

        Args:
            owner: the object.
            name: the method's.
            wrap: what to put there instead, made from the graphed function.
        """
        method = weakref.WeakMethod(getattr(owner, name))  # or the two would keep each other alive

        def call(*args: Any) -> Any:
            bound = method()
            assert bound is not None
            return bound(*args)

        setattr(owner, name, wrap(Graphed(call, self)))


class Graphed:
    """A function of tensors, called from its third call on as a graph.

    The first call with inputs of some form (nesting, shapes, dtypes, numbers) runs the function,
    the second records it too. Under autocast no weight may require a gradient, or a cast copy that
    PyTorch keeps would become part of the graph.

    Args:
        function: of tensors in lists, tuples and dicts, and of hashable constants; gives tensors in
            the same. It neither synchronizes, nor changes or returns its inputs.
        graphs: what it shares with others.
    """

    def __init__(self, function: Callable[..., Any], graphs: Graphs) -> None:
        self._function = function
        self._graphs = graphs
        self._record = graphs._record
        self._known: OrderedDict[tuple, _Outputs | _Graph] = OrderedDict()
        self._input_memory, self._output_memory = Arena(graphs.device), Arena(graphs.device)

    def __call__(self, *args: Any) -> Any:
        """Call the function.

        Returns:
            What the function returns. The tensors are valid until the next call.
        """
        if self._record is None:
            return self._function(*args)
        leaves, structure = tree_flatten(args)
        key = (structure, *map(self._form, leaves), autocast_now(self._graphs.device.type))
        known = self._known.get(key)
        if known is None:
            return self._first(key, args)
        if isinstance(known, _Outputs):
            graph = self._capture(leaves, structure, known)
            if graph is None:
                return self._function(*args)
            self._known[key] = known = graph
        self._known.move_to_end(key)
        return known(leaves)

    def _first(self, key: tuple, args: tuple) -> Any:
        """Call the function as it is, and keep the form of its results."""
        results, structure = tree_flatten(self._function(*args))
        outputs = _Outputs([torch.empty_like(x, device="meta") for x in results], structure)
        self._known[key] = outputs
        if len(self._known) > self._graphs.limit:
            self._known.popitem(last=False)
        held = self._hold(outputs)
        for memory, result in zip(held, results):
            memory.copy_(result)
        return tree_unflatten(held, structure)

    def _form(self, leaf: Any) -> Any:
        """What of an input a graph depends on."""
        if not isinstance(leaf, Tensor):
            return leaf
        form = leaf.shape, leaf.dtype, leaf.device
        return (*form, leaf.stride(), leaf.data_ptr()) if self._stays(leaf) else form

    def _stays(self, x: Tensor) -> bool:
        """Whether a tensor is the result of a graphed function, which lies where it lay before."""
        return x.untyped_storage().data_ptr() in self._graphs._addresses

    def _hold(self, outputs: _Outputs) -> list[Tensor]:
        """Where results of a form are to lie."""
        self._graphs._addresses.discard(self._output_memory.address)
        held = self._output_memory.place(outputs.forms)
        self._graphs._addresses.add(self._output_memory.address)
        return held

    def _capture(self, leaves: list[Any], structure: TreeSpec, outputs: _Outputs) -> _Graph | None:
        """Record the function on inputs of this form; None if that fails."""
        moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not self._stays(x)]
        inputs = self._input_memory.place([leaves[i] for i in moving])
        held = self._hold(outputs)
        static = list(leaves)
        for i, memory in zip(moving, inputs):
            static[i] = memory.copy_(leaves[i])
        args = tree_unflatten(static, structure)

        def run() -> None:
            for memory, result in zip(held, tree_flatten(self._function(*args))[0]):
                memory.copy_(result)

        assert self._record is not None
        try:
            (replay,) = self._record(run)
        except RuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            logger.warning("No CUDA graph of a part of the model, which stays slower: %s", reason)
            self._record = None
            self._known.clear()
            return None
        self._graphs.captures += 1
        return _Graph(moving, inputs, replay, held, outputs.structure)


class _Outputs:
    """The form of what a function gives: tensors without memory, and how they are nested."""

    def __init__(self, forms: list[Tensor], structure: TreeSpec) -> None:
        self.forms, self.structure = forms, structure


class _Graph:
    """One recording.

    Args:
        moving: which of the inputs are copied.
        inputs: where to.
        replay: runs it.
        outputs: where the results lie.
        structure: how they are nested.
    """

    def __init__(
        self,
        moving: list[int],
        inputs: list[Tensor],
        replay: Run,
        outputs: list[Tensor],
        structure: TreeSpec,
    ) -> None:
        self.moving, self.inputs = moving, inputs
        self.replay = replay
        self.outputs, self.structure = outputs, structure

    def __call__(self, leaves: list[Any]) -> Any:
        for i, memory in zip(self.moving, self.inputs):
            memory.copy_(leaves[i], non_blocking=True)
        self.replay()
        return tree_unflatten(self.outputs, self.structure)
