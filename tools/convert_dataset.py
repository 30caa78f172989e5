#!/usr/bin/env python3
"""Make annotation files in COCO's format: from YOLO's or Pascal VOC's, or from one another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba_vision.checkpoint.files import atomic_write
from mamba_vision.data import coco_format
from mamba_vision.data.conversion import Conversion, read_classes
from mamba_vision.data.voc import read_voc
from mamba_vision.data.yolo import read_yolo
from mamba_vision.errors import ArgumentParser, UserError, cli


@cli
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    return args.run(args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    command = add("yolo", yolo, "convert YOLO's boxes or outlines")
    command.add_argument("source", type=Path, help="data.yaml, or folder of images and labels")
    command.add_argument("--split", metavar="NAME", help="of data.yaml: train, val or test")
    command.add_argument("--boxes", action="store_true", help="keep the boxes of outlines alone")
    add_common(command)

    command = add("voc", voc, "convert Pascal VOC's boxes")
    command.add_argument("source", type=Path, help="folder with Annotations, or of XML files")
    command.add_argument("--split", metavar="NAME", help="list in ImageSets/Main (all files)")
    command.add_argument("--images", type=Path, metavar="DIR", help="where they are (JPEGImages)")
    add_common(command)

    command = add("complete", complete, "add missing 'area' and 'iscrowd' to a file")
    command.add_argument("annotations", type=Path, help="annotation file")
    command.add_argument("output", type=Path, help="new annotation file")

    command = add("split", split, "divide the images of a file at random into two sets")
    command.add_argument("annotations", type=Path, help="annotation file")
    command.add_argument("train", type=Path, help="new annotation file, for training")
    command.add_argument("val", type=Path, help="new annotation file, for evaluation")
    command.add_argument("--part", type=float, default=0.1, help="for evaluation (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    return parser.parse_args(argv)


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", type=Path, help="new annotation file")
    command.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="their names: a text file with one a line, a data.yaml, or a COCO-format .json",
    )
    command.add_argument(
        "--skip", action="store_true", help="leave out what cannot be converted; exit code 1"
    )


def yolo(args: argparse.Namespace) -> int:
    refuse_existing(args.output)
    classes = read_classes(args.classes) if args.classes else None
    return finish(args, read_yolo(args.source, args.split, classes), boxes_only=args.boxes)


def voc(args: argparse.Namespace) -> int:
    refuse_existing(args.output)
    classes = read_classes(args.classes) if args.classes else None
    return finish(args, read_voc(args.source, args.images, args.split, classes))


def finish(args: argparse.Namespace, conversion: Conversion, boxes_only: bool = False) -> int:
    for fault in conversion.faults:
        print(f"{'skipped: ' if args.skip else ''}{fault}", file=sys.stderr)
    faults = len(conversion.faults)
    if faults and not args.skip:
        raise UserError(
            f"{args.source}: {faults} of its lines or files cannot be converted, listed above; "
            "mend them, or give --skip to leave them out"
        )
    content = conversion.content(boxes_only)
    write(args.output, content)
    images, objects = content["images"], content["annotations"]
    empty = len(images) - len({item["image_id"] for item in objects})
    kind = "outlines" if "segmentation" in objects[0] else "boxes"
    print(
        f"wrote {args.output}: {len(images)} images in {conversion.image_root} ({empty} without an "
        f"object), {len(objects)} {kind}, {len(content['categories'])} classes"
        + (f"; skipped: {faults}" if faults else "")
    )
    return 1 if faults else 0


def complete(args: argparse.Namespace) -> None:
    content = coco_format.read(args.annotations)
    refuse_existing(args.output)
    changed = coco_format.complete(content)
    write(args.output, content)
    print(f"wrote {args.output}: {changed} annotations completed")


def split(args: argparse.Namespace) -> None:
    content = coco_format.read(args.annotations)
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
