"""Errors that a user can act on, and how the command-line tools show them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

__all__ = ["UserError", "cli"]


class UserError(ValueError):
    """The user gave something that cannot be used.

    The message is one line that names the file, key or argument, the reason and the remedy.
    """


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap the ``main`` of a tool: a :class:`UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped
