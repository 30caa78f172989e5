"""Choosing one of several implementations of an operator.

A backend is a module that holds

    run(*tensors, **options) -> Tensor      the operator
    obstacle(*tensors) -> str | None        why it cannot run on these tensors; None if it can

It imports what it needs at its top, and is itself imported when it is first considered: until then
an optional accelerator costs nothing and may be missing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Backends", "check_shape", "without_autocast"]

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What the module of a backend offers."""

    def run(self, *tensors: Tensor | None, **options) -> Tensor: ...

    def obstacle(self, *tensors: Tensor | None) -> str | None: ...


@dataclass
class Backends:
    """The backends of one operator.

    Args:
        operator: name for messages.
        variable: environment variable that names a backend when the caller does not.
        modules: absolute module name of each backend, in the order in which ``auto`` tries them.
        remedies: how to get a backend whose module cannot be imported.
    """

    operator: str
    variable: str
    modules: Mapping[str, str]
    remedies: Mapping[str, str] = field(default_factory=dict)
    _loaded: dict[str, Backend | str] = field(default_factory=dict, init=False, repr=False)
    _announced: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)

    def choose(self, asked: str | None, *tensors: Tensor | None) -> Backend:
        """Return the backend to use on ``tensors`` (the operator's, in its own order).

        ``asked`` wins over the environment variable. Without either, or with "auto", the first
        backend that can run is taken, and the log says once per kind of device which one it is.

        Raises:
            UserError: the backend asked for is unknown, not installed, or cannot take the tensors.
        """
        source = "argument" if asked else self.variable
        name = asked or os.environ.get(self.variable) or "auto"
        if name == "auto":
            return self._best(*tensors)
        if name not in self.modules:
            raise UserError(
                f"{self.operator}: no backend is called {name!r} (given by {source}); "
                f"choose from: {', '.join(['auto', *self.modules])}"
            )
        backend = self._usable(name, *tensors)
        if isinstance(backend, str):
            raise UserError(
                f"{self.operator}: backend {name!r} (given by {source}) cannot be used: {backend}"
            )
        return backend

    def obstacle(self, name: str, *tensors: Tensor | None) -> str | None:
        """Return why the backend called ``name`` cannot be used on ``tensors``, None if it can."""
        backend = self._usable(name, *tensors)
        return backend if isinstance(backend, str) else None

    def _best(self, *tensors: Tensor | None) -> Backend:
        passed = []
        for name in self.modules:
            backend = self._usable(name, *tensors)
            if isinstance(backend, str):
                passed.append(f"{name}: {backend}")
                continue
            device = next(t for t in tensors if t is not None).device.type
            if (name, device) not in self._announced:
                self._announced.add((name, device))
                why = f" ({'; '.join(passed)})" if passed else ""
                logger.info("%s on %s: using backend %r%s", self.operator, device, name, why)
            return backend
        raise UserError(f"{self.operator}: no backend can take these tensors: {'; '.join(passed)}")

    def _usable(self, name: str, *tensors: Tensor | None) -> Backend | str:
        """The backend, or in words why it cannot be used."""
        if name not in self._loaded:
            try:
                self._loaded[name] = cast(Backend, importlib.import_module(self.modules[name]))
            except (ImportError, OSError) as error:  # OSError: a shared library that does not load
                reason = f"{error}".splitlines()[0]
                remedy = self.remedies.get(name)
                self._loaded[name] = f"{reason}; {remedy}" if remedy else reason
        backend = self._loaded[name]
        return backend if isinstance(backend, str) else backend.obstacle(*tensors) or backend


def check_shape(name: str, tensor: Tensor, legend: str, sizes: dict[str, int]) -> None:
    """Check a tensor against a legend such as "B L D"; a letter seen first is bound in ``sizes``.

    Raises:
        ValueError: another number of dimensions or another size than a letter is bound to.
        TypeError: the tensor does not hold real floating-point numbers.
    """
    letters = legend.split()
    if tensor.dim() == len(letters):
        for letter, size in zip(letters, tensor.shape):
            sizes.setdefault(letter, size)
    expected = [sizes.get(letter) for letter in letters]
    if list(tensor.shape) != expected:
        bound = ", ".join(f"{k} = {n}" for k, n in zip(letters, expected) if n is not None)
        where = f" with {bound}" if bound else ""
        got = tuple(tensor.shape)
        raise ValueError(f"{name} must have shape ({', '.join(letters)}){where}, not {got}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must hold real floating-point numbers, not {tensor.dtype}")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast leaves dtypes alone: the operators choose theirs themselves."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
