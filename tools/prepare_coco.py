#!/usr/bin/env python3
"""Check, complete or split an annotation file in COCO's format."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba_vision.checkpoint.files import atomic_write
from mamba_vision.data import coco_format
from mamba_vision.errors import ArgumentParser, UserError, cli

SHOWN = 20  # problems


@cli
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    content = coco_format.read(args.annotations)
    return args.run(args, content)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("check", help="list what is wrong; exit code 1 if anything is")
    command.add_argument("annotations", type=Path, help="annotation file")
    command.add_argument("--images", type=Path, metavar="DIR", help="check that they exist, too")
    command.set_defaults(run=check)

    command = commands.add_parser("complete", help="add missing 'area' and 'iscrowd'")
    command.add_argument("annotations", type=Path, help="annotation file")
    command.add_argument("output", type=Path, help="new annotation file")
    command.set_defaults(run=complete)

    command = commands.add_parser("split", help="divide the images at random into two sets")
    command.add_argument("annotations", type=Path, help="annotation file")
    command.add_argument("train", type=Path, help="new annotation file, for training")
    command.add_argument("val", type=Path, help="new annotation file, for evaluation")
    command.add_argument("--part", type=float, default=0.1, help="for evaluation (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    command.set_defaults(run=split)
    return parser.parse_args(argv)


def check(args: argparse.Namespace, content: dict[str, Any]) -> int:
    problems = list(coco_format.problems(content, args.images))
    for problem in problems[:SHOWN]:
        print(problem)
    if problems:
        print(f"{args.annotations}: {len(problems)} problems, {min(SHOWN, len(problems))} shown")
        return 1
    objects = Counter(annotation["category_id"] for annotation in content["annotations"])
    for category in content["categories"]:
        print(f"{objects[category['id']]:>9}  {category['name']}")
    print(f"{objects.total():>9}  objects in {len(content['images'])} images; nothing is wrong")
    return 0


def complete(args: argparse.Namespace, content: dict[str, Any]) -> None:
    refuse_existing(args.output)
    changed = coco_format.complete(content)
    write(args.output, content)
    print(f"wrote {args.output}: {changed} annotations completed")


def split(args: argparse.Namespace, content: dict[str, Any]) -> None:
    refuse_existing(args.train, args.val)
    if problem := next(coco_format.problems(content, None), None):
        raise UserError(f"{args.annotations}: {problem}")
    for path, part in zip((args.train, args.val), coco_format.split(content, args.part, args.seed)):
        write(path, part)
        print(f"wrote {path}: {len(part['images'])} images, {len(part['annotations'])} objects")


def refuse_existing(*paths: Path) -> None:
    if len(set(paths)) < len(paths):
        raise UserError(f"{paths[0]} is named twice; name two files")
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already; name a new file")


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())


if __name__ == "__main__":
    sys.exit(main())
