"""Fitting a run to the machine: processes, device, precision and norms."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from detectron2 import engine
from detectron2.config import instantiate
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from ..errors import UserError

__all__ = ["build_model", "check_processes", "fit_to_machine", "launch"]


def check_processes(args: argparse.Namespace, config: DictConfig) -> None:
    """Check ``--num-gpus``, ``--num-machines`` and ``--machine-rank`` against the machine.

    With ``train.device=cpu``, ``--num-gpus`` is the number of processes, which then talk through
    gloo.

    Raises:
        UserError: an argument is out of range, or asks for more GPUs than there are.
    """
    if args.num_gpus < 0 or args.num_machines < 1:
        raise UserError("--num-gpus must be 0 or more and --num-machines 1 or more; change them")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} must be from 0 to --num-machines - 1 = "
            f"{args.num_machines - 1}; change one of them"
        )
    found = torch.cuda.device_count()
    wants_gpus = not str(config.train.get("device", "cuda")).startswith("cpu")
    if args.num_gpus > max(found, 1) and (wants_gpus or found):
        has = "no GPU" if found == 0 else f"{found} GPU" if found == 1 else f"{found} GPUs"
        remedy = f"give --num-gpus {found}" if found else "leave it out to run on the CPU"
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {has}; {remedy}")
    world_size = args.num_gpus * args.num_machines
    batch = config.dataloader.get("train", {}).get("total_batch_size")
    if batch is not None and world_size > 1 and batch % world_size:
        raise UserError(
            f"dataloader.train.total_batch_size={batch} cannot be shared by {world_size} processes "
            f"evenly; make it a multiple of {world_size}"
        )


def fit_to_machine(args: argparse.Namespace, config: DictConfig) -> list[str]:
    """Set, in place, what the machine cannot do to what it can; returns a word on each change."""
    words = []
    train = config.train
    train.device = train.get("device", "cuda")
    if str(train.device).startswith("cuda") and (
        args.num_gpus == 0 or not torch.cuda.is_available()
    ):
        train.device = "cpu"
        words.append("No GPU" + (" found" if args.num_gpus else " asked for") + ": using the CPU")
    if train.device == "cpu" and train.get("amp", {}).get("enabled", False):
        train.amp.enabled = False
        words.append("On the CPU train.amp is off: everything is computed in float32")
    return words


def build_model(config: DictConfig) -> nn.Module:
    """The model of a config, on ``train.device``.

    ``torch.nn.SyncBatchNorm`` cannot work between processes on the CPU; there Detectron2's
    ``NaiveSyncBatchNorm``, whose state has the same names, takes its place.
    """
    model = instantiate(config.model)
    if config.train.device == "cpu" and comm.get_world_size() > 1:
        model = _with_naive_sync_norms(model)
    return model.to(config.train.device)


def launch(worker: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run ``worker(args)`` in as many processes as the arguments ask for.

    Raises:
        UserError: a process raised one.
    """
    try:
        engine.launch(
            worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessRaisedException as error:
        # A process hands its error over as text: the traceback, and last the error's own line.
        line = str(error).rstrip().rsplit("\n", 1)[-1]
        name = f"{UserError.__module__}.{UserError.__qualname__}: "
        if line.startswith(name):
            raise UserError(line.removeprefix(name)) from error
        raise


def _with_naive_sync_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.SyncBatchNorm):
        norm = NaiveSyncBatchNorm(
            module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
            stats_mode="N",  # processes may bring different numbers of boxes, or none
        )
        norm.load_state_dict(module.state_dict())
        return norm
    for name, child in module.named_children():
        setattr(module, name, _with_naive_sync_norms(child))
    return module
