#!/usr/bin/env python3
"""Bring COCO 2017 to where the configs look for it: download, check, unpack.

What is there already is left alone, and what was interrupted is gone on with: run the same command
again. The exit code is 0 if all is there in the end, 1 if something is missing, and 2 if something
cannot be had.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba_vision.data.coco_2017 import ARCHIVES, SERVER, missing, prepare
from mamba_vision.errors import ArgumentParser, UserError, cli


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--datasets",
        type=Path,
        default=Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))),
        metavar="DIR",
        help="folder of data sets, for coco in it ($DETECTRON2_DATASETS, or datasets: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=ARCHIVES,
        default=list(ARCHIVES),
        metavar="PART",
        help=f"only these: {', '.join(ARCHIVES)}",
    )
    parser.add_argument("--zips", type=Path, metavar="DIR", help="folder of zip files you have")
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--keep-zips", action="store_true", help="keep what was downloaded")
    parser.add_argument("--server", default=SERVER, metavar="URL", help="%(default)s")
    args = parser.parse_args(argv)
    if args.zips and not args.zips.is_dir():
        raise UserError(f"--zips {args.zips} is not a folder; give the one with the zip files")
    return args


@cli
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    coco = args.datasets / "coco"
    if not args.check:
        for part in ARCHIVES:  # in this order: the annotations say what the others must hold
            if part in args.parts:
                for line in prepare(coco, part, args.zips, args.server, args.keep_zips):
                    print(line)
    lacking = {part: missing(coco, part) for part in args.parts}
    for part, line in lacking.items():
        print(f"{part}: {line or 'complete'}")
    return 1 if any(lacking.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
