#!/usr/bin/env python3
"""Measure how far detections move between reading images with Pillow and with OpenCV."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from detectron2.utils.logger import setup_logger

from mamba_vision.checkpoint import MambaVisionCheckpointer
from mamba_vision.data import check_dataset
from mamba_vision.data.agreement import READERS, compare, evaluate_reader
from mamba_vision.engine import build_model, load_config
from mamba_vision.errors import ArgumentParser, UserError, cli


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config, or its name")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint, path or URL")
    parser.add_argument("--dataset", metavar="NAME", help="registered set (the config's test set)")
    parser.add_argument(
        "--score", default=0.3, type=float, help="compare detections from here on (%(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    args = parser.parse_args(argv)

    config = load_config(args.config_file)
    if args.dataset:
        config.dataloader.test.dataset.names = args.dataset
    name = config.dataloader.test.dataset.names
    if not isinstance(name, str):
        raise UserError("the config tests on several data sets; choose one with --dataset")
    config.dataloader.evaluator.update(dataset_name=name, output_dir=None)
    check_dataset(name, config.model.roi_heads.num_classes)
    config.train.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config).eval()
    MambaVisionCheckpointer(model).load(args.weights)
    setup_logger(name="detectron2")

    findings = []
    for reader in READERS:
        results, found = evaluate_reader(reader, config, model)
        findings.append(found)
        aps = "  ".join(f"{task} AP {metrics['AP']:.3f}" for task, metrics in results.items())
        print(f"{reader}: {aps}")
    moved = compare(findings[0], findings[1], args.score)
    print(
        f"{len(moved.box_moves)} pairs of score {args.score:g} and more; without a partner: "
        + ", ".join(f"{count} ({name})" for count, name in zip(moved.unmatched, READERS))
    )
    quantiles = torch.tensor([0.5, 0.95, 1.0])
    for what, moves in (("box, pixels", moved.box_moves), ("score", moved.score_moves)):
        if len(moves):
            median, most, worst = moves.quantile(quantiles).tolist()
            print(f"{what}: median {median:.4f}, 95 % within {most:.4f}, largest {worst:.4f}")


if __name__ == "__main__":
    sys.exit(main())
