"""The command-line options that the comparisons of backbone and detector share."""

from __future__ import annotations

import argparse

import torch
from omegaconf import DictConfig

from ..backbone.windows import PADDINGS
from ..engine.config import load_config
from ..engine.machine import limit_threads
from .rows import Switch, check_names, usable_switches
from .timing import DTYPES, check_device, machine

__all__ = ["add_options", "positive", "start"]

TINY = "cascade_mask_rcnn_mamba_vision_tiny_3x_coco"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the shared options to ``parser``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--config-file", default=TINY, metavar="FILE", help="config, or its name (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of autocast (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=_size, default="800x1280", metavar="HxW", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--window-padding", nargs="+", choices=PADDINGS, default=list(PADDINGS), metavar="NAME"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW",
        help="these rows, and what they are checked by",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides; last")


def start(args: argparse.Namespace) -> tuple[DictConfig, list[Switch], torch.dtype]:
    """Check the shared options and print what the tables need to be understood.

    Returns:
        The config, the switches that change something, and the number format of the rows.

    Raises:
        UserError: there is no such device, row or config.
    """
    check_device(args.device, args.rounds)
    check_names(args.only)
    limit_threads(args.device)
    config = load_config(args.config_file, args.opts)
    config.train.device = args.device
    dtype = DTYPES[args.dtype]
    switches, words = usable_switches(config, args.device, dtype)
    height, width = args.size
    print(f"{machine(args.device)}; {args.rounds} rounds")
    print(f"{args.config_file}, {args.dtype}, images of {height} x {width} pixels")
    for word in words:
        print(word)
    return config, switches, dtype


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    if not by:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as in 800x1280")
    return positive(height), positive(width)
