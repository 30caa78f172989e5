"""Detectron2's training loop on a config."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from omegaconf import DictConfig

from ..checkpoint import MambaVisionCheckpointer
from ..errors import UserError
from .evaluation import do_test
from .machine import build_model

__all__ = ["do_train"]

logger = logging.getLogger(__name__)


def do_train(args: argparse.Namespace, config: DictConfig) -> None:
    """Train the model of a config, evaluating it on the way and at the end.

    With ``args.resume`` the training goes on after the newest checkpoint in ``train.output_dir``:
    weights, optimizer, learning-rate schedule, gradient scaler and step are that checkpoint's. The
    data are shuffled anew.

    Args:
        args: ``resume`` is used.
        config: see :func:`.config.load_config`; ``train.init_checkpoint`` gives the weights to
            start from, unless there is a checkpoint to resume.

    Raises:
        UserError: the weights cannot be read, or the loss became infinite or NaN.
    """
    train = config.train
    model = build_model(config)
    logger.info("Model:\n%s", model)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    loader = instantiate(config.dataloader.train)

    ddp = dict(train.get("ddp", {}))
    if train.device == "cpu":
        ddp["device_ids"] = None  # Detectron2 would name a GPU
    model = create_ddp_model(model, **ddp)
    kind = AMPTrainer if train.get("amp", {}).get("enabled", False) else SimpleTrainer
    trainer = kind(model, loader, optimizer)
    checkpointer = MambaVisionCheckpointer(model, train.output_dir, trainer=trainer)

    main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer) if main else None,
            hooks.EvalHook(train.eval_period, lambda: do_test(config, model)),
            hooks.PeriodicWriter(_writers(config), period=train.log_period) if main else None,
        ]
    )

    start = 0
    if args.resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load(train.init_checkpoint, resume=True)
        start = trainer.iter + 1
        logger.info("Resuming after step %d", start)
    else:
        if args.resume:
            logger.warning("No checkpoint to resume in %s: starting anew", train.output_dir)
        checkpointer.resume_or_load(train.init_checkpoint, resume=False)
    if start >= train.max_iter:
        logger.warning(
            "Nothing to train: %s is of step %d and train.max_iter is %d; evaluating",
            checkpointer.get_checkpoint_file(),
            start,
            train.max_iter,
        )
        do_test(config, model)
        return
    try:
        trainer.train(start, train.max_iter)
    except FloatingPointError as error:
        raise UserError(
            f"training stopped at step {trainer.iter + 1}, its loss being infinite or NaN; "
            f"lower optimizer.lr, or check the data; {_way_on(checkpointer)}"
        ) from error
    except KeyboardInterrupt:
        logger.warning("Interrupted in step %d; %s", trainer.iter + 1, _way_on(checkpointer))
        raise


def _writers(config: DictConfig) -> list[EventWriter]:
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    writers = [
        CommonMetricPrinter(config.train.max_iter),
        JSONWriter(str(folder / "metrics.json")),
    ]
    if importlib.util.find_spec("tensorboard") is None:
        logger.warning("TensorBoard is not installed: metrics go to the terminal and metrics.json")
    else:
        writers.append(TensorboardXWriter(str(folder)))
    return writers


def _way_on(checkpointer: MambaVisionCheckpointer) -> str:
    if not checkpointer.has_checkpoint():
        return "no checkpoint was written yet"
    return f"--resume goes on from {checkpointer.get_checkpoint_file()}"
