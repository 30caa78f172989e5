#!/usr/bin/env python3
"""Train or evaluate the model of a LazyConfig."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mamba_vision.engine import argument_parser, train_net
from mamba_vision.errors import cli


@cli
def main(argv: Sequence[str] | None = None) -> None:
    train_net(argument_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
