"""Detectron2's training loop on a config."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from omegaconf import DictConfig

from ..checkpoint import MambaVisionCheckpointer
from ..checkpoint.files import remove_partial_files
from ..data.train_loader import TrainLoader
from ..errors import UserError
from .checkpoints import PeriodicCheckpointer
from .hooks import StopTraining, WandbWriter
from .machine import autocast_dtype, build_model, scale_lr
from .stopping import StopHook, StopSignals
from .trainer import Trainer
from .watching import Watch

__all__ = ["do_train"]

logger = logging.getLogger(__name__)


def do_train(args: argparse.Namespace, config: DictConfig) -> None:
    """Train the model of a config, evaluating it on the way and at the end.

    With ``args.resume`` the training goes on after the newest checkpoint in ``train.output_dir``,
    as if it had never stopped: weights, optimizer, learning-rate schedule, gradient scaler, step,
    random numbers and the place in the data are that checkpoint's.

    Args:
        args: ``resume`` is used.
        config: see :func:`.config.load_config`; ``train.init_checkpoint`` gives the weights to
            start from, unless there is a checkpoint to resume.

    Raises:
        UserError: the weights cannot be read, a checkpoint cannot be written, or the training
            cannot go on (:meth:`.trainer.Trainer.run_step`).
        SystemExit: a signal asked to stop, and a checkpoint was written (:mod:`.stopping`).
    """
    with StopSignals() as stop:
        _train(args, config, stop)


def _train(args: argparse.Namespace, config: DictConfig, stop: StopSignals) -> None:
    train = config.train
    main = comm.is_main_process()
    model = build_model(config)
    logger.info("Model:\n%s", model)
    scale_lr(config)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    loader = instantiate(config.dataloader.train)
    if isinstance(loader, TrainLoader):
        loader.bad_images.limit = train.get("max_bad_images", loader.bad_images.limit)
        if loader.pin_memory is None:
            loader.pin_memory = train.device != "cpu"

    device_ids = None if train.device == "cpu" else [torch.cuda.current_device()]
    model = create_ddp_model(model, **{"device_ids": device_ids} | dict(train.get("ddp", {})))
    trainer = Trainer(
        model,
        loader,
        optimizer,
        seed=comm.shared_random_seed(),
        accumulate=train.get("accumulate", 1),
        dtype=autocast_dtype(config),
        max_nonfinite=train.get("max_nonfinite", 1),
        output_dir=train.output_dir,
        stop_requested=lambda: stop.received is not None,
    )
    if main:
        remove_partial_files(train.output_dir)
    checkpointer = MambaVisionCheckpointer(model, train.output_dir, trainer=trainer)
    if isinstance(loader, TrainLoader):
        checkpointer.add_checkpointable("data", loader)
    watch = Watch(config, checkpointer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
            watch.ema,
            PeriodicCheckpointer(checkpointer, **train.checkpointer) if main else None,
            StopHook(),
            *watch.hooks(),
            hooks.PeriodicWriter(_writers(config), period=train.log_period) if main else None,
        ]
    )

    start = 0
    if args.resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load(train.init_checkpoint, resume=True)
        start = trainer.iter + 1
        logger.info("Resuming after step %d", start)
        if not isinstance(loader, TrainLoader):
            logger.warning(
                "The data are shuffled anew: dataloader.train is no "
                "mamba_vision.data.build_train_loader, and cannot go on where it was"
            )
    else:
        if args.resume:
            logger.warning("No checkpoint to resume in %s: starting anew", train.output_dir)
        checkpointer.resume_or_load(train.init_checkpoint, resume=False)
    if start >= train.max_iter or (watch.stopping and watch.stopping.exhausted):
        logger.warning(
            "Nothing to train: %s is of step %d and train.max_iter is %d%s; evaluating",
            checkpointer.get_checkpoint_file(),
            start,
            train.max_iter,
            f", and train.patience={train.patience} is used up" if start < train.max_iter else "",
        )
        watch.test()
        return
    try:
        trainer.train(start, train.max_iter)
    except StopTraining as reason:
        logger.info("Stopping early, after step %d: %s", trainer.iter + 1, reason)
        if main:
            checkpointer.save("model_final", iteration=trainer.iter)
    except UserError as error:
        raise UserError(f"{error}; {_way_on(checkpointer)}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"train.output_dir={train.output_dir}: {error.strerror} after step {trainer.iter + 1}; "
            f"make room; {_way_on(checkpointer)}"
        ) from error
    except KeyboardInterrupt:
        logger.warning("Interrupted in step %d; %s", trainer.iter + 1, _way_on(checkpointer))
        raise
    except SystemExit:
        name = stop.received.name if stop.received else "a signal in another process"
        logger.warning(
            "Stopped after step %d by %s; %s", trainer.iter + 1, name, _way_on(checkpointer)
        )
        raise
    watch.finish(trainer.iter)


def _writers(config: DictConfig) -> list[EventWriter]:
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    writers = [
        CommonMetricPrinter(config.train.max_iter),
        JSONWriter(str(folder / "metrics.json")),
    ]
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    if config.train.get("wandb_project"):
        writers.append(WandbWriter(config.train, drop_pictures=not tensorboard))
    if not tensorboard:
        logger.warning("TensorBoard is not installed: metrics go to the terminal and metrics.json")
    else:
        writers.append(TensorboardXWriter(str(folder)))
    return writers


def _way_on(checkpointer: MambaVisionCheckpointer) -> str:
    if not checkpointer.has_checkpoint():
        return "no checkpoint was written yet"
    return f"--resume goes on from {checkpointer.get_checkpoint_file()}"
