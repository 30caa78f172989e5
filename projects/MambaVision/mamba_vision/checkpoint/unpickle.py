"""An interpreter for pickles that can build data and nothing else.

A pickle is a program for a stack machine. What makes the ordinary machine dangerous is that it
imports any name the program gives (``GLOBAL``) and calls the outcome (``REDUCE``, ``NEWOBJ``,
``BUILD``). This one imports nothing. A name is looked up in the closed list of
:mod:`~mamba_vision.checkpoint.builders`; every other name becomes a :class:`Name`, an inert word
that cannot be called, and what the program makes of it an equally inert :class:`Placeholder`.
So nothing in a file is ever run. On top of that, a file that asks for a *function* to be called, or
that names a part of the system, is refused by :func:`refuse_name` and :func:`refuse_call` instead
of being read around: no weights file needs that, and its user should know.
"""

from __future__ import annotations

import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

__all__ = [
    "Interpreter",
    "Name",
    "Placeholder",
    "Shell",
    "UnsafeError",
    "refuse_call",
    "refuse_name",
]

# Training checkpoints of large detectors take some 100,000 steps; no step makes more than a few
# hundred bytes out of nothing, so this bounds the time and the memory that a pickle can cost.
MAX_STEPS = 5_000_000


class UnsafeError(Exception):
    """The pickle asks for something that no file of weights needs."""


class Placeholder:
    """Stands for an object whose class is not on the closed list; holds its name only."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


class Name(Placeholder):
    """Stands for a class that the file names and that is not on the closed list."""

    __slots__ = ()


class Shell:
    """An object that the pickle fills in by a later step (``BUILD``) and that only then exists."""

    def __init__(self, finish: Callable[[Any], Any]):
        self.finish = finish
        self.result: list[Any] = []

    def build(self, state: Any) -> None:
        self.result[:] = [self.finish(state)]

    @property
    def value(self) -> Any:
        if not self.result:
            raise ValueError("it uses an object before its contents are known")
        return self.result[0]


# Parts of the standard library that are refused as attributes of other modules too (``torch.os``).
SYSTEM = {
    "asyncio", "bdb", "builtins", "code", "codeop", "ctypes", "distutils", "importlib", "marshal",
    "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "posix", "pty", "runpy", "setuptools",
    "shutil", "socket", "subprocess", "sys", "tempfile", "timeit",
}  # fmt: skip
# Plain data of the standard library that training checkpoints hold beside the weights.
STANDARD = {
    "argparse.Namespace", "builtins.bool", "builtins.dict", "builtins.float", "builtins.int",
    "builtins.list", "builtins.object", "builtins.str", "builtins.tuple", "builtins.type",
    "collections.UserDict", "collections.UserList", "datetime.date", "datetime.datetime",
    "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal",
    "fractions.Fraction", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath",
    "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pathlib._local.Path", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "time.struct_time", "types.SimpleNamespace", "uuid.UUID",
}  # fmt: skip


def refuse_name(name: str) -> None:
    """Refuse a name of the system: the standard library but for its plain data types.

    Raises:
        UnsafeError: the name may not stand in a file of weights.
    """
    parts = name.split(".")
    hidden = any(p.startswith("__") and p.endswith("__") and p != "__main__" for p in parts)
    if name not in STANDARD and (
        parts[0] in sys.stdlib_module_names or not SYSTEM.isdisjoint(parts) or hidden
    ):
        raise UnsafeError(f"it names {name}, part of the system and not of any weights")


def refuse_call(target: Any) -> None:
    """Refuse a call of anything but a class, which by custom is a name in CapWords.

    Raises:
        UnsafeError: the call may not stand in a file of weights.
    """
    if not isinstance(target, Name):
        raise UnsafeError(f"it calls a {type(target).__name__}, which is no class")
    last = target.name.rpartition(".")[2].lstrip("_")
    if not last[:1].isupper() and target.name not in STANDARD:
        raise UnsafeError(f"it calls the function {target.name}")


def _key(key: Any) -> Any:
    """Check a dict key or set member: hashing a deeply nested tuple would overflow the C stack."""
    if isinstance(key, (tuple, frozenset)) and any(isinstance(k, (tuple, frozenset)) for k in key):
        raise ValueError("a key nests tuples")
    return key


class Interpreter:
    """Runs one pickle.

    Args:
        builders: the closed list: name -> function or constant that stands for it.
        load_persistent: turns a persistent id (how PyTorch refers to storages) into an object.

    Raises (from :meth:`load`):
        UnsafeError: see the module.
        ValueError, IndexError, KeyError, TypeError, EOFError, UnicodeError: the pickle is damaged.
    """

    def __init__(
        self,
        builders: Mapping[str, Any],
        load_persistent: Callable[[Any], Any] | None = None,
    ):
        self.builders = builders
        self.load_persistent = load_persistent
        # Compared by identity: what a pickle may call are exactly the values of the closed list.
        self.callables = {id(b) for b in builders.values() if callable(b)}

    def load(self, stream: IO[bytes]) -> Any:
        """Run the pickle that starts at the stream's position; leave the stream behind its end."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step > MAX_STEPS:
                raise ValueError(f"it takes more than {MAX_STEPS:,} steps to read")
            if opcode.name == "STOP":
                return self.pop()
            if opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _FRESH:
                self.stack.append(_FRESH[opcode.name]())
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise ValueError(f"it uses the operation {opcode.name}, which weights never need")
        raise EOFError("it ends too early")

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("it takes more than there is")
        value = self.stack.pop()
        return value.value if isinstance(value, Shell) else value

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = [v.value if isinstance(v, Shell) else v for v in self.stack[start:]]
        del self.stack[start:]
        return values

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def find(self, module: str, name: str) -> Any:
        # The protocols of Python 2 keep its names, as pickle itself does when it writes them.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in self.builders:
            return self.builders[full]
        refuse_name(full)
        return Name(full)

    def call(self, target: Any, arguments: Iterable[Any]) -> None:
        if id(target) in self.callables:
            self.stack.append(target(*arguments))
        else:
            refuse_call(target)
            self.stack.append(Placeholder(target.name))

    def call_first(self, values: list[Any]) -> None:
        self.call(values[0], values[1:])

    def new(self, target: Any, arguments: Iterable[Any]) -> None:
        """``target.__new__``, which only classes have: an unknown name is a class's."""
        if isinstance(target, Name):
            self.stack.append(Placeholder(target.name))
        else:
            self.call(target, arguments)

    def build(self, _: Any) -> None:
        """Take a state: shells are finished; other objects are plain data or absorb it."""
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Shell):
            target.build(state)
        elif isinstance(target, OrderedDict):
            # A state dict keeps the versions of its modules in an attribute.
            metadata = state.get("_metadata") if isinstance(state, dict) else None
            if isinstance(metadata, dict):
                target._metadata = metadata  # type: ignore[attr-defined]
        elif not isinstance(target, Placeholder):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))
        elif not isinstance(target, Placeholder):
            raise ValueError(f"it adds items to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        elif not isinstance(target, Placeholder):
            raise ValueError(f"it sets items of a {type(target).__name__}")

    def pops(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def persistent(self, _: Any) -> None:
        if self.load_persistent is None:
            raise ValueError("it refers to data outside the file")
        self.stack.append(self.load_persistent(self.pop()))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])


_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}


def _dict(values: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


# How each remaining operation of the pickle machine changes the state ``m``; ``x`` is its argument.
_STEPS: dict[str, Callable[[Interpreter, Any], Any]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.pops(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.pops(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.pops(3))),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "DICT": lambda m, _: m.stack.append(_dict(m.pop_mark())),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(_key, m.pop_mark()))),
    "APPEND": lambda m, _: m.extend(m.pops(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pops(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "PUT": Interpreter.remember,
    "BINPUT": Interpreter.remember,
    "LONG_BINPUT": Interpreter.remember,
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "GET": Interpreter.recall,
    "BINGET": Interpreter.recall,
    "LONG_BINGET": Interpreter.recall,
    "GLOBAL": lambda m, x: m.stack.append(m.find(*x.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack.append(m.find(*m.pops(2))),
    "REDUCE": lambda m, _: m.call(*m.pops(2)),
    "INST": lambda m, x: m.call(m.find(*x.split(" ", 1)), m.pop_mark()),
    "OBJ": lambda m, _: m.call_first(m.pop_mark()),
    "NEWOBJ": lambda m, _: m.new(*m.pops(2)),
    "NEWOBJ_EX": lambda m, _: m.new(*m.pops(3)[:2]),
    "BUILD": Interpreter.build,
    "BINPERSID": Interpreter.persistent,
}
