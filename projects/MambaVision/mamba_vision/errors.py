"""Errors that a user can act on, and how the command-line tools show them."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["ArgumentParser", "UserError", "cli"]


class UserError(ValueError):
    """The user gave something that cannot be used.

    The message is one line that names the file, key or argument, the reason and the remedy.
    """


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`UserError`, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap the ``main`` of a tool.

    A :class:`UserError` becomes one line on stderr and exit code 2; Ctrl-C one line and exit
    code 130.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {_last_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def _last_line(error: UserError) -> str:
    # An error of a data loader's worker arrives with the worker's traceback in its message, the
    # line that was meant for the user last.
    line = str(error).rstrip().rsplit("\n", 1)[-1]
    return line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
