#!/usr/bin/env python3
"""Look over a data set in COCO's format: its annotations, and every image decoded.

The exit code is 0 if nothing is wrong, 1 if there are problems, and 2 if the set cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba_vision.data.survey import Survey, survey
from mamba_vision.errors import ArgumentParser, UserError, cli


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, help="annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="read the images in DIR, too")
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="problems of each kind (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.show < 0:
        raise UserError(f"--show {args.show} is negative; give 0 or more")
    return args


@cli
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    found = survey(args.annotations, args.images)
    report(found, args.show)
    problems = sum(map(len, found.problems.values()))
    unread = "" if args.images else "; the images were not read (--images DIR)"
    print(f"{args.annotations}: {problems or 'no'} problem{'s' * (problems != 1)}{unread}")
    return 1 if problems else 0


def report(found: Survey, show: int) -> None:
    if found.classes:
        print("  objects     images  class")
        for line in found.classes:
            print(f"{line.objects:>9}  {line.images:>9}  {line.name}")
        total = sum(line.objects for line in found.classes)
        print(
            f"{total:>9}  {found.images:>9}  in all; images without an object: "
            f"{found.empty_images}, crowd regions: {found.crowds}\n"
        )
    for kind, lines in found.problems.items():
        print(f"{kind}: {len(lines)}")
        for line in lines[:show]:
            print(f"  {line}")
        if len(lines) > show:
            print(f"  ... and {len(lines) - show} more (--show)")


if __name__ == "__main__":
    sys.exit(main())
