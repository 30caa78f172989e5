"""``python -m mamba_vision.data FOLDER``: draw scenes of shapes, in COCO's format."""

import sys

from ..errors import ArgumentParser, cli
from .shapes import draw_shapes


@cli
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m mamba_vision.data", description=__doc__)
    parser.add_argument("folder", help="where to draw; it must not exist yet, or be empty")
    parser.add_argument("--images", type=int, default=300, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (%(default)s)")
    args = parser.parse_args(arguments)
    draw_shapes(args.folder, args.images, seed=args.seed)
    print(f"drew {args.images} images into {args.folder}")


if __name__ == "__main__":
    sys.exit(main())
