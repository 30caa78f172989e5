#!/usr/bin/env python3
"""Time parts of the package; each sub-command checks that what it times is right first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mamba_vision.benchmarks import backbone, detector
from mamba_vision.errors import ArgumentParser, cli
from mamba_vision.ops import benchmark as ops

COMMANDS = {
    "ops": ops,
    "backbone": backbone,
    "detector": detector,
}  # modules with add_arguments(parser) and run(args) -> exit code


@cli
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
    args = parser.parse_args(argv)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
