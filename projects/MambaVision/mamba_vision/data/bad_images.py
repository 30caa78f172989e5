"""Counting training images that there is something wrong with."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping

from detectron2.utils import comm

from ..errors import UserError

__all__ = ["BadImages"]

logger = logging.getLogger(__name__)


class BadImages:
    """Images that could not be used as they are, each with the reason, and how many may be.

    Args:
        limit: more than this many are an error.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.found: dict[str, str] = {}
        self._news: dict[str, str] = {}

    def add(self, file_name: str, reason: str) -> None:
        """Note an image, with a warning when it is new."""
        if file_name not in self.found:
            self.found[file_name] = self._news[file_name] = reason
            self._warn(reason)

    def check(self) -> None:
        """Raise :class:`UserError` if there are more than ``limit``."""
        if len(self.found) > self.limit:
            last = list(self.found.values())[-1]
            raise UserError(
                f"{len(self.found)} bad training images, more than "
                f"train.max_bad_images={self.limit}, the last: {last}; mend or remove them (the "
                "log names all), or raise train.max_bad_images"
            )

    def _warn(self, reason: str) -> None:
        logger.warning("Bad training image %d: %s", len(self.found), reason)

    def has_news(self) -> bool:
        """Whether images were added since :meth:`take_news`."""
        return bool(self._news)

    def take_news(self) -> dict[str, str]:
        """What was added since the last time."""
        news, self._news = self._news, {}
        return news

    def merge(self, others: Iterable[Mapping[str, str]]) -> None:
        """Add what other processes found."""
        for name, reason in itertools.chain.from_iterable(other.items() for other in others):
            if name not in self.found:
                self.found[name] = reason
                if comm.is_main_process():
                    self._warn(reason)
