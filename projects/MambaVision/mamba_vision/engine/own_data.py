"""Fitting a config to data of the user's own."""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from ..data.coco_sets import CocoSet, read_set, register_set
from ..errors import UserError

__all__ = [
    "OwnData",
    "add_arguments",
    "drop_masks",
    "fit_to_data",
    "read_own_data",
    "register_data_sets",
]

EPOCHS = 36  # what the released detectors' training made over COCO
MIN_ITER = 1000  # steps; a few dozen images are to be seen more often


class OwnData(NamedTuple):
    """The arguments of :func:`fit_to_data` but for the config."""

    train: CocoSet | None
    val: CocoSet
    epochs: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name data of the user's own."""
    group = parser.add_argument_group(
        "your own data",
        "annotations in COCO's format, to which classes, heads and schedule of the config are "
        "fitted; see docs/fine_tuning.md",
    )
    for part, purpose in (("train", "to train on"), ("val", "to evaluate on")):
        group.add_argument(f"--{part}-json", metavar="FILE", help=f"annotations {purpose}")
        group.add_argument(f"--{part}-images", metavar="DIR", help="folder of their images")
    group.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the training images ({EPOCHS}, and at least {MIN_ITER} steps)",
    )


def read_own_data(args: argparse.Namespace) -> OwnData | None:
    """Read the data that the options name, if they name any.

    Args:
        args: with the options of :func:`add_arguments` and ``eval_only``.

    Raises:
        UserError: an option is missing, or the data cannot be used.
    """
    sets: dict[str, CocoSet] = {}
    for part in ("train", "val"):
        given = {key: getattr(args, f"{part}_{key}") for key in ("json", "images")}
        if any(given.values()):
            for key, value in given.items():
                if not value:
                    other = "images" if key == "json" else "json"
                    raise UserError(f"--{part}-{other} needs --{part}-{key} too; give both")
            sets[part] = read_set(given["json"], given["images"])
    if args.epochs is not None and ("train" not in sets or args.epochs < 1):
        raise UserError(
            f"--epochs {args.epochs} must be 1 or more and goes with --train-json; change it, or "
            "set train.max_iter"
        )
    if not sets:
        return None
    if "val" not in sets:
        raise UserError(
            "--train-json needs --val-json and --val-images too; give them, or divide your data "
            "with tools/convert_dataset.py split"
        )
    if "train" not in sets and not args.eval_only:
        raise UserError(
            "--val-json alone cannot be trained on; give --train-json and --train-images, or "
            "--eval-only"
        )
    return OwnData(sets.get("train"), sets["val"], args.epochs)


def fit_to_data(
    config: DictConfig, train: CocoSet | None, val: CocoSet, epochs: int | None = None
) -> list[str]:
    """Fit a config, in place, to data of the user's own, and register them.

    - ``dataloader``: trained on ``train``, evaluated on ``val``; ``data_sets`` holds what
      :func:`register_data_sets` needs to register both again.
    - ``model``: as many classes as the data have, and no mask heads if the data have no masks.
    - ``train``: ``max_iter`` is ``epochs`` passes over the training images. Evaluations and
      checkpoints keep their number, but are a pass apart at least; a warm-up given in steps takes a
      twentieth at most.

    Args:
        config: any config with ``model.roi_heads.num_classes``.
        train: ``None`` is for evaluation: model and schedule stay as they are.
        val: has the classes of ``train``, and masks if ``train`` has.
        epochs: 36, and at least 1000 steps, if ``None``.

    Returns:
        A word on each change.

    Raises:
        UserError: the classes of the two sets differ, the first alone has masks, or the config
            cannot be fitted.
    """
    _check_likeness(config, train, val)
    dataloader = config.dataloader
    own = {"train": train, "test": val} if train else {"test": val}
    for part, data in own.items():
        dataloader[part].dataset.names = data.name
    evaluator = dataloader.get("evaluator")
    if evaluator is not None and not OmegaConf.is_interpolation(evaluator, "dataset_name"):
        evaluator.dataset_name = val.name
    config.data_sets = {
        data.name: {
            "json_file": data.json_file,
            "image_root": data.image_root,
            "thing_classes": list(data.classes),
        }
        for data in own.values()
    }
    register_data_sets(config)

    words = []
    if train:
        if OmegaConf.select(config, "model.roi_heads.num_classes") is None:
            raise UserError(
                "--train-json: the config has no model.roi_heads.num_classes to set; take one of "
                "the project's, or register the data in the config (docs/data.md)"
            )
        config.model.roi_heads.num_classes = len(train.classes)
        words += [f"{len(train.classes)} classes: {', '.join(train.classes)}"]
        words += [_fit_schedule(config, train, epochs)]
        if not train.has_masks and drop_masks(config.model, dataloader):
            words += [f"{train.name} has no masks: the model is built without mask heads"]
    makes_masks = OmegaConf.select(config, "model.roi_heads.mask_in_features") is not None
    if evaluator is not None and makes_masks:
        evaluator.tasks = None if val.has_masks else ["bbox"]  # None: whatever the model finds
        if not val.has_masks:
            words += [f"{val.name} has no masks: only boxes are evaluated"]
    return words


def register_data_sets(config: DictConfig) -> None:
    """Register the data sets that a config holds under ``data_sets``, if it holds any.

    Raises:
        UserError: an entry lacks one of ``json_file``, ``image_root`` and ``thing_classes``.
    """
    for name, entry in (config.get("data_sets") or {}).items():
        try:
            register_set(name, entry.json_file, entry.image_root, list(entry.thing_classes))
        except (AttributeError, TypeError):
            raise UserError(
                f"data_sets: {name!r} is {entry!r}; give it json_file, image_root and thing_classes"
            ) from None


def drop_masks(model: DictConfig, dataloader: DictConfig) -> bool:
    """Take the mask heads out of a config's model, in place, and the masks out of its training.

    Returns:
        Whether there were any.
    """
    keys = ("mask_in_features", "mask_pooler", "mask_head", "mask_heads")
    found = [model.roi_heads.pop(key) for key in keys if key in model.roi_heads]
    if "mapper" in dataloader.train:
        dataloader.train.mapper.use_instance_mask = False
    return bool(found)


def _check_likeness(config: DictConfig, train: CocoSet | None, val: CocoSet) -> None:
    """Refuse a class list that is not the one trained on, and a lack of masks."""
    if train:
        source, classes = train.name, train.classes
        if train.name == val.name and train.image_root != val.image_root:
            raise UserError(
                f"--train-json and --val-json are both {train.name}, with different images; give "
                "each its own file"
            )
        if train.has_masks and not val.has_masks:
            raise UserError(
                f"{train.name} has masks and {val.name} has none; give masks to both, or take "
                "'segmentation' out of the first to train on boxes alone"
            )
    elif config.get("data_sets"):
        source, classes = "the config's data_sets", _classes_of(config)
    else:
        return  # their number is compared with the model's when the set is checked
    if val.classes == classes:
        return
    missing = [name for name in classes if name not in val.classes]
    extra = [name for name in val.classes if name not in classes]
    differences = [f"{val.name} lacks {', '.join(missing)}"] if missing else []
    differences += [f"{source} lacks {', '.join(extra)}"] if extra else []
    raise UserError(
        f"the classes of {source} and {val.name} differ: "
        f"{'; '.join(differences) or 'the same names, in another order of ids'}; give 'categories' "
        "the same list in both files"
    )


def _classes_of(config: DictConfig) -> tuple[str, ...]:
    return tuple(next(iter(config.data_sets.values())).thing_classes)


def _fit_schedule(config: DictConfig, data: CocoSet, epochs: int | None) -> str:
    schedule, dataset = config.train, config.dataloader.train.dataset
    images = data.training_images if dataset.get("filter_empty", True) else data.images
    if not images:
        raise UserError(f"{data.name}: no image has an object to train on; check its annotations")
    batch = config.dataloader.train.total_batch_size
    one_pass = math.ceil(images / batch)
    length = (epochs or EPOCHS) * one_pass
    if epochs is None:
        length = max(length, MIN_ITER)
    ratio = length / schedule.max_iter
    schedule.max_iter = length
    for group, key in ((schedule, "eval_period"), (schedule.get("checkpointer"), "period")):
        if group is not None and group.get(key):
            group[key] = max(one_pass, round(group[key] * ratio))
    warmup = config.lr_multiplier.get("warmup_iters")
    if warmup:
        config.lr_multiplier.warmup_iters = min(warmup, math.ceil(length / 20))
    passes = f"{length * batch / images:.3g} passes over {images}"
    return f"{length} steps of {batch} images: {passes}"
