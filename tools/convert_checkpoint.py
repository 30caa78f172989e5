#!/usr/bin/env python3
"""Turn a released MambaVision file into a Detectron2 checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mamba_vision.checkpoint import convert, read_checkpoint
from mamba_vision.checkpoint.files import atomic_write, fetch
from mamba_vision.errors import ArgumentParser, UserError, cli


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=f"{__doc__} The project's own tools do not need this: they take the released "
        "files as they are.",
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a mambavision_*.pth.tar or cascade_mask_rcnn_mamba_vision_*.pth: a file or URL",
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write, *.pth")
    parser.add_argument("--force", action="store_true", help="write over OUT if it exists")
    return parser.parse_args(argv)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.target.suffix != ".pth":
        raise UserError(
            f"{args.target}: Detectron2 knows a checkpoint by its ending; call it *.pth"
        )
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target}: exists already; choose another name, or give --force")
    source = fetch(args.source)
    try:
        conversion = convert(read_checkpoint(source))
    except UserError as error:
        raise UserError(f"{args.source}: {str(error).removeprefix(f'{source}: ')}") from None
    with atomic_write(args.target) as file:
        torch.save({"model": conversion.weights, "__author__": conversion.source}, file)
    print(f"{args.source}: {conversion}\n-> {args.target}")


if __name__ == "__main__":
    sys.exit(main())
