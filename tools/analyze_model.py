#!/usr/bin/env python3
"""Print the parameters and multiply-adds of a detector, part by part."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from mamba_vision.analysis import MULTIPLY_ADDS, analyze
from mamba_vision.backbone.windows import PADDINGS
from mamba_vision.engine import load_config
from mamba_vision.errors import ArgumentParser, cli


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config, or its name")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1280),
        metavar=("H", "W"),
        help="height and width of the image, in pixels (800 1280)",
    )
    parser.add_argument("--window-padding", choices=PADDINGS, help="instead of the config's")
    parser.add_argument(
        "--rois", type=int, default=1000, help="proposals in each box head (%(default)s)"
    )
    parser.add_argument(
        "--masks", type=int, default=100, help="detections in each mask head (%(default)s)"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides; last")
    args = parser.parse_args(argv)

    config = load_config(args.config_file, args.opts)
    if args.window_padding:
        config.model.backbone.bottom_up.window_padding = args.window_padding
    costs = analyze(config.model, tuple(args.size), args.rois, args.masks)
    costs["all"] = sum(costs.values(), Counter())
    height, width = args.size
    print(
        f"an image of {height} x {width}, {args.rois} RoIs, {args.masks} masks; multiply-adds in G"
    )
    print(f"{'part':<12}" + "".join(f"{x:>13}" for x in ("parameters", *MULTIPLY_ADDS, "sum")))
    for part, cost in costs.items():
        numbers = [cost[kind] / 1e9 for kind in MULTIPLY_ADDS]
        row = "".join(f"{number:>13.1f}" for number in (*numbers, sum(numbers)))
        print(f"{part:<12}{cost['parameters']:>13,}{row}")


if __name__ == "__main__":
    sys.exit(main())
