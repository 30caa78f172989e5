"""Choosing one of several implementations of an operator.

A backend is a module that holds

    run(*tensors, **options)                            the operator: a tensor, or several
    obstacle(device, dtypes, **sizes) -> str | None     why it cannot run on tensors of this kind;
                                                        None if it can

It imports what it needs at its top, and is itself imported when it is first considered: until then
an optional accelerator costs nothing and may be missing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Backends", "autocast_dtype", "check_shape", "without_autocast"]

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What the module of a backend offers."""

    def run(self, *tensors: Tensor | None, **options) -> Any: ...

    def obstacle(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], **sizes: int
    ) -> str | None: ...


@dataclass
class Backends:
    """The backends of one operator.

    Args:
        operator: name for messages, unique.
        variable: environment variable that names a backend when the caller does not.
        modules: absolute module name of each backend, in the order in which ``auto`` tries them.
        remedies: how to get a backend whose module cannot be imported.
    """

    operator: str
    variable: str
    modules: Mapping[str, str]
    remedies: Mapping[str, str] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        _OPERATORS[self.operator] = self

    def choose(self, asked: str | None, *tensors: Tensor | None, **sizes: int) -> Backend:
        """Return the backend called :meth:`name_for`, which raises what that raises."""
        name = self.name_for(asked, *tensors, **sizes)
        return cast(Backend, sys.modules[self.modules[name]])

    def name_for(self, asked: str | None, *tensors: Tensor | None, **sizes: int) -> str:
        """Return the name of the backend to use on ``tensors`` (the operator's).

        ``asked`` wins over the environment variable. Without either, or with "auto", the first
        backend that can run is taken, and the log says once per kind of device which one it is.

        Args:
            asked: a name, "auto", or None.
            tensors: all on one device; None for those left out.
            sizes: numbers that a backend may be unable to take.

        Raises:
            UserError: the backend asked for is unknown, not installed, or cannot take the tensors.
        """
        return _name(self.operator, asked, *_kind(tensors), tuple(sizes.items()))

    def obstacle(self, name: str, *tensors: Tensor | None, **sizes: int) -> str | None:
        """Return why the backend called ``name`` cannot be used on ``tensors``, None if it can."""
        device, dtypes = _kind(tensors)
        return self._obstacle(name, device, dtypes, **sizes)

    def _obstacle(self, name: str, device: torch.device, dtypes, **sizes: int) -> str | None:
        backend = _load(self.modules[name])
        if not isinstance(backend, str):
            return backend.obstacle(device, dtypes, **sizes)
        remedy = self.remedies.get(name)
        return f"{backend}; {remedy}" if remedy else backend

    def _name(self, asked: str | None, device: torch.device, dtypes, **sizes: int) -> str:
        source = "argument" if asked else self.variable
        name = asked or os.environ.get(self.variable) or "auto"
        if name == "auto":
            return self._best(device, dtypes, **sizes)
        if name not in self.modules:
            raise UserError(
                f"{self.operator}: no backend is called {name!r} (given by {source}); "
                f"choose from: {', '.join(['auto', *self.modules])}"
            )
        if reason := self._obstacle(name, device, dtypes, **sizes):
            raise UserError(
                f"{self.operator}: backend {name!r} (given by {source}) cannot be used: {reason}"
            )
        return name

    def _best(self, device: torch.device, dtypes, **sizes: int) -> str:
        passed = []
        for name in self.modules:
            if reason := self._obstacle(name, device, dtypes, **sizes):
                passed.append(f"{name}: {reason}")
                continue
            choice = f"{self.operator} on {device.type}: using backend {name!r}"
            if choice not in self._announced:
                self._announced.add(choice)
                logger.info("%s%s", choice, f" ({'; '.join(passed)})" if passed else "")
            return name
        raise UserError(f"{self.operator}: no backend can take these tensors: {'; '.join(passed)}")


_OPERATORS: dict[str, Backends] = {}


def _kind(tensors: Sequence[Tensor | None]) -> tuple[torch.device, tuple[torch.dtype, ...]]:
    """Device and dtypes of the tensors that are there."""
    given = [x for x in tensors if x is not None]
    return given[0].device, tuple(x.dtype for x in given)


@torch.compiler.assume_constant_result  # a compiled model keeps the choice made while compiling
def _name(operator: str, asked: str | None, device: torch.device, dtypes, sizes) -> str:
    return _OPERATORS[operator]._name(asked, device, dtypes, **dict(sizes))


@functools.cache
def _load(module: str) -> Backend | str:
    """A backend's module, or in words why it cannot be imported."""
    try:
        return cast(Backend, importlib.import_module(module))
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return f"{error}".splitlines()[0]


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


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which autocast, where it is on, casts a linear layer's input of ``dtype``."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return dtype
    return dtype if dtype == torch.float64 else torch.get_autocast_dtype(device.type)
