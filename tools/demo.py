#!/usr/bin/env python3
"""Draw what a detector finds in images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mamba_vision.data.mappers import read_image
from mamba_vision.engine import (
    Predictor,
    draw_instances,
    find_images,
    load_config,
    name_pictures,
    write_png,
)
from mamba_vision.errors import ArgumentParser, UserError, cli


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config, or its name")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint, path or URL")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PATH", help="images, folders, globs in quotes"
    )
    parser.add_argument(
        "--output", default=Path("output/pictures"), type=Path, metavar="DIR", help="%(default)s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures in DIR")
    parser.add_argument(
        "--confidence",
        default=0.5,
        type=float,
        metavar="SCORE",
        help="draw detections of this score, 0 to 1, and above (%(default)s)",
    )
    parser.add_argument(
        "--scale", default=1.0, type=float, help="size of the pictures to the images' (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument(
        "--opts", default=[], nargs=argparse.REMAINDER, help="config overrides, key=value; last"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.confidence <= 1:
        raise UserError(f"--confidence {args.confidence} is not from 0 to 1; change it")
    if not 0.1 <= args.scale <= 10:
        raise UserError(f"--scale {args.scale} is not from 0.1 to 10; change it")
    return args


@cli
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    images = find_images(args.input)
    pictures = name_pictures(images, args.output, overwrite=args.overwrite)
    predictor = Predictor(load_config(args.config_file, args.opts), args.weights, args.device)
    unreadable = 0
    for image, picture in zip(tqdm(images, unit="image"), pictures):
        try:
            found = predictor(image)
            pixels = read_image(str(image))
        except UserError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            unreadable += 1
            continue
        found = found[found.scores >= args.confidence]
        write_png(picture, draw_instances(pixels, found, predictor.metadata, args.scale))
    skipped = f", skipped: {unreadable}" if unreadable else ""
    print(f"pictures in {args.output}: {len(images) - unreadable}{skipped}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
