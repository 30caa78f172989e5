"""The closed list: what stands for each name that a file of weights may use.

Every entry makes plain data out of plain data, checks its arguments, and touches neither the
pickling code of numpy nor that of PyTorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .unpickle import Name, Placeholder, Shell, UnsafeError, refuse_name

__all__ = ["BUILDERS", "Storage", "rebuild_tensor"]


@dataclass
class Storage:
    """The numbers that one or more tensors look into: a 1-D tensor on the CPU."""

    data: torch.Tensor


def rebuild_tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    """View a storage as a tensor, checking that the view stays inside.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has no proper size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.data.numel():
        raise ValueError("a tensor reaches beyond its storage")
    if 0 in size:
        return storage.data.new_empty(size)
    # Not as_strided: tensors that share a storage are to be equals, not views of a third.
    return storage.data.new_empty(0).set_(storage.data.untyped_storage(), offset, size, stride)


def rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _grad: Any,
    _hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> torch.Tensor:
    """As :func:`rebuild_tensor`, of a storage of bytes and a type of its own."""
    return rebuild_tensor(Storage(storage.data.view(dtype)), offset, size, stride)


def _typed(function: Any, _cls: Any, arguments: tuple[Any, ...], _state: Any) -> Any:
    """A tensor with Python attributes: the attributes are left out."""
    if function not in (rebuild_tensor, rebuild_tensor_v3):
        raise ValueError("a tensor is of an unknown class")
    return function(*arguments)


# An array's or number's type in numpy's letters: booleans, integers, floats, complex, strings.
_KINDS = "biufcSU"


def _dtype(code: str, *_: Any) -> Shell:
    """``numpy.dtype(code)``, whose byte order comes as a state ``(version, order, ...)``."""

    def finish(state: tuple[Any, ...]) -> np.dtype[Any] | Placeholder:
        if code[:1] not in _KINDS or not code[1:].isdecimal():
            return Placeholder(f"numpy.dtype {code}")
        return np.dtype(code).newbyteorder(state[1])

    return Shell(finish)


def _array(data: bytes | str, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    if isinstance(dtype, Placeholder):
        return Placeholder("numpy.ndarray")
    # Python 2 wrote bytes as strings.
    data = data.encode("latin1") if isinstance(data, str) else data
    native = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    return native.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> Shell:
    """An empty array, whose state is ``(version, shape, dtype, in Fortran's order, data)``."""

    def finish(state: tuple[Any, ...]) -> Any:
        shape, dtype, fortran, data = state[-4:]
        return _array(data, dtype, shape, "F" if fortran else "C")

    return Shell(finish)


def _scalar(dtype: Any, data: bytes | str) -> Any:
    array = _array(data, dtype, (1,), "C")
    return array[0] if isinstance(array, np.ndarray) else Placeholder("numpy.generic")


def _frombuffer(data: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    return _array(data, dtype, shape, order)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise ValueError(f"bytes are in the encoding {encoding}")
    return text.encode(encoding)


def _bytearray(data: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(data if isinstance(data, bytes) else _encode(data, encoding))


def _items(values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"a container is made of a {type(values).__name__}")
    return list(values)


def _scalars(values: Any) -> list[Any]:
    """Members of a set: see the interpreter's check of keys."""
    if any(isinstance(value, (tuple, frozenset)) for value in _items(values)):
        raise ValueError("a set holds tuples")
    return _items(values)


def _counter(counts: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    if counts is not None and not isinstance(counts, dict):
        raise ValueError("a counter is made of no dict")
    return dict(counts or {})


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    keys = _scalars([key for key, _ in _items(pairs)])
    return OrderedDict(zip(keys, (value for _, value in pairs), strict=True))


def _object(cls: Any, *_: Any) -> Placeholder:
    """``copyreg._reconstructor``: an object of an ordinary class, under the old protocols."""
    return Placeholder(cls.name if isinstance(cls, Name) else "object")


def _attribute(owner: Any, name: Any) -> Placeholder:
    """``getattr``: how old protocols name a class's method, which is then as inert as the class.

    mmengine's HistoryBuffer keeps some of its own.
    """
    if not isinstance(owner, Name) or not isinstance(name, str):
        raise UnsafeError("it takes an attribute of something that is no class")
    refuse_name(f"{owner.name}.{name}")
    return Placeholder(f"{owner.name}.{name}")


def _inert(name: str) -> Any:
    return lambda *_: Placeholder(name)


_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip

_NUMPY = ("numpy.core", "numpy._core")  # before and since numpy 2

_UNUSED = (
    "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__randomstate_ctor",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_wrapper_subclass",
    "torch.serialization._get_layout",
)

BUILDERS: dict[str, Any] = {
    # Types that only label data; PyTorch's storages stand for what a number of theirs is.
    **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    # Tensors
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": lambda size=(): torch.Size(_items(size)),
    "torch.device": lambda *where: torch.device(*where),
    # numpy
    "numpy.dtype": _dtype,
    **{f"{home}.multiarray._reconstruct": _reconstruct for home in _NUMPY},
    **{f"{home}.multiarray.scalar": _scalar for home in _NUMPY},
    **{f"{home}.numeric._frombuffer": _frombuffer for home in _NUMPY},
    # Plain containers and bytes
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # how protocol 2 writes no bytes
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _attribute,
    "builtins.complex": lambda *parts: complex(*map(float, parts)),
    "builtins.set": lambda values=(): set(_scalars(values)),
    "builtins.frozenset": lambda values=(): frozenset(_scalars(values)),
    "builtins.slice": _inert("slice"),
    "builtins.range": _inert("range"),
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda values=(), *_: _items(values),
    "copyreg._reconstructor": _object,
    # Functions that rebuild what no weights need
    **{name: _inert(name) for name in _UNUSED},
}
"""Name in a pickle -> the function or constant that stands for it."""
