"""What the training tool does, from its arguments on."""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from ..checkpoint import MambaVisionCheckpointer, read_checkpoint
from ..checkpoint.files import fetch
from ..data import check_dataset
from ..errors import ArgumentParser, UserError
from .config import find_config, load_config
from .launching import check_processes, launch
from .machine import build_model, fit_to_machine
from .switches import check_switches
from .train import do_train
from .watching import Watch

__all__ = ["argument_parser", "train_net"]

EPILOG = """
examples:
  on 8 GPUs:          %(prog)s --config-file CONFIG --num-gpus 8
  go on after a stop: %(prog)s --config-file CONFIG --num-gpus 8 --resume
  evaluate:           %(prog)s --config-file CONFIG --eval-only train.init_checkpoint=FILE
  change the config:  %(prog)s --config-file CONFIG train.max_iter=1000 optimizer.lr=1e-4
  on 2 machines:      %(prog)s ... --num-machines 2 --machine-rank {0,1} --dist-url tcp://HOST:PORT
  by a launcher:      torchrun --nproc-per-node 8 %(prog)s --config-file CONFIG
                      srun --ntasks-per-node 8 --gres gpu:8 python %(prog)s --config-file CONFIG

exit codes: 0 done; 2 a mistake, told in one line; 75 stopped by SIGTERM or SIGUSR1, a checkpoint
written, and --resume goes on; 130 Ctrl-C.
"""


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Detectron2's arguments for training, whose errors are :class:`UserError`."""
    return ArgumentParser(
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[default_argument_parser()],
        conflict_handler="resolve",
    )


def train_net(args: argparse.Namespace) -> None:
    """Train or evaluate, in as many processes as asked for.

    Whatever can be checked is checked before a process is started or a file written.

    Args:
        args: as parsed by :func:`argument_parser`.

    Raises:
        UserError: an argument, a file or a data set cannot be used.
    """
    args.config_file = str(find_config(args.config_file))
    config = load_config(args.config_file, args.opts)
    check_processes(args, config)
    check_switches(config)
    _check_weights(args, config)
    _check_data(args, config)
    launch(_run, args)


def _run(args: argparse.Namespace) -> None:
    """One process."""
    config = load_config(args.config_file, args.opts)
    words = fit_to_machine(args, config)
    default_setup(config, args)
    logger = setup_logger(config.train.output_dir, comm.get_rank(), name="mamba_vision")
    for word in words:
        logger.warning(word)
    if not args.eval_only:
        do_train(args, config)
        return
    model = build_model(config)
    checkpointer = MambaVisionCheckpointer(model, config.train.output_dir)
    watch = Watch(config, checkpointer)
    # What --resume finds may hold an average too; any other file is what is to be evaluated.
    checkpointer.resume_or_load(config.train.init_checkpoint, resume=args.resume)
    watch.test()


def _check_weights(args: argparse.Namespace, config: DictConfig) -> None:
    output = Path(config.train.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"train.output_dir={output} is not a folder; name another")
    weights = config.train.get("init_checkpoint") or ""
    tag = output / "last_checkpoint"
    if args.resume and tag.is_file():
        weights = output / tag.read_text().strip()
    elif args.eval_only and not weights:
        raise UserError("--eval-only needs weights; give train.init_checkpoint=FILE")
    elif tag.is_file() and not args.eval_only:
        raise UserError(
            f"train.output_dir={output} holds a training already; give --resume to go on with it, "
            "or another train.output_dir"
        )
    if weights:
        read_checkpoint(fetch(weights))


def _check_data(args: argparse.Namespace, config: DictConfig) -> None:
    loaders = ("test",) if args.eval_only else ("train", "test")
    found = (OmegaConf.select(config, f"dataloader.{x}.dataset.names") or () for x in loaders)
    names = [name for x in found for name in ([x] if isinstance(x, str) else x)]
    classes = OmegaConf.select(config, "model.roi_heads.num_classes")
    for name in dict.fromkeys(names):
        check_dataset(name, classes)
