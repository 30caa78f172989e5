"""Overrides of a config's values: Hydra's grammar, and an error for a key that does not exist.

Detectron2's ``LazyConfig.apply_overrides`` takes any key, so that a mistyped one changes nothing.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError

__all__ = ["apply_overrides"]


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Change values of a config in place.

    ``a.b=value`` changes a value that the config has, or gives an argument that it leaves out
    although the ``_target_`` at ``a`` takes one of that name. ``+a.b=value`` adds any key. Elements
    of lists go by their index, ``a.0.b=value``.

    Args:
        config: the config, as loaded by ``LazyConfig``.
        overrides: texts in Hydra's grammar for basic overrides.

    Raises:
        UserError: a text cannot be parsed, names a key that is not there (the message names the
            nearest that is) or has a value of the wrong kind.
    """
    parser = OverridesParser.create()
    for text in overrides:
        override = _parse(parser, text)
        key, value = override.key_or_group, override.value()
        if not (override.is_add() or override.is_force_add()):
            value = _fit(text, value, _current(config, key))
        try:
            OmegaConf.update(config, key, value, merge=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            reason = str(error).split("\n", 1)[0]
            raise UserError(f"override {text!r} cannot be applied: {reason}; mend it") from error


def _parse(parser: OverridesParser, text: str) -> Override:
    if text.startswith("--"):
        raise UserError(f"option {text} stands behind the overrides; move it before them")
    try:
        override = parser.parse_override(text)
    except HydraException as error:
        raise UserError(
            f"override {text!r} is not of the form key=value; write lists as key=[1,2] and text "
            "with special characters as 'key=\"text\"'"
        ) from error
    if override.is_delete():
        raise UserError(f"override {text!r} deletes a key, which is not supported; set it to null")
    if override.is_sweep_override():
        raise UserError(f"override {text!r} gives several values; write a list as key=[1,2]")
    return override


def _current(config: DictConfig, key: str) -> Any:
    """The value of a key before the override; None if an argument of the same name may be added."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent, last = ".".join(parts[:depth]), depth == len(parts) - 1
        if isinstance(node, ListConfig):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(
                    f"there is no config key {key!r}: {parent} is a list, of length {len(node)}; "
                    "name an element by its index from 0"
                )
            node = node[int(part)]
        elif not isinstance(node, DictConfig):
            raise UserError(f"there is no config key {key!r}: {parent} is {node!r}; mend the key")
        elif part in list(node):  # DictConfig's own test overlooks interpolations without a value
            if last and _dangles(node, part):
                return None
            node = node[part]
        elif last and part in _arguments(node):
            return None
        else:
            near = difflib.get_close_matches(key, list(_keys(config)), n=1)
            remedy = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"there is no config key {key!r}; {remedy}(+{key}=... would add it)")
    return node


def _fit(text: str, value: Any, current: Any) -> Any:
    """The value, as an int where a whole number was one and is written like 1e4."""
    if value is None or (isinstance(value, str) and "${" in value):
        return value
    if isinstance(current, DictConfig) and not isinstance(value, dict):
        raise UserError(f"override {text!r} puts a value in place of a group; name a key inside it")
    if isinstance(current, bool) and not isinstance(value, bool):
        raise UserError(f"override {text!r} needs true or false; the config has {current}")
    if isinstance(current, (int, float)) and not isinstance(current, bool):
        if isinstance(value, (str, bool)):
            raise UserError(f"override {text!r} needs a number; the config has {current}")
        if isinstance(current, int) and isinstance(value, float) and value.is_integer():
            return int(value)
    return value


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key below a node that an override may name."""
    if isinstance(node, DictConfig):
        yield from (f"{prefix}{name}" for name in _arguments(node) if name not in list(node))
        inner: list[Any] = [name for name in node if name != "_target_"]
    elif isinstance(node, ListConfig):
        inner = list(range(len(node)))
    else:
        return
    for name in inner:
        yield f"{prefix}{name}"
        if not _dangles(node, name):
            yield from _keys(node[name], f"{prefix}{name}.")


def _dangles(node: Any, name: Any) -> bool:
    """Whether an entry is an interpolation or missing, so that reading it may fail."""
    return OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name)


def _arguments(node: DictConfig) -> list[str]:
    """Names of the arguments that the ``_target_`` of a node takes."""
    target = node.get("_target_")
    try:
        call: Callable | None = locate(target) if isinstance(target, str) else target
        parameters = inspect.signature(call).parameters.values() if callable(call) else ()
    except (ImportError, TypeError, ValueError):  # not importable here, or a signature in C
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in named]
