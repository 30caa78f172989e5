"""Processes: started here, by torchrun, or by Slurm's srun."""

from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from .stopping import EXIT_CODE, forward_signals

__all__ = ["Place", "check_processes", "find_place", "launch"]

Worker = Callable[[argparse.Namespace], Any]

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started, one per GPU.

    Attributes:
        launcher: ``"torchrun"`` or ``"srun"``.
        rank, world_size: among all processes.
        local_rank, local_size: among those of this machine.
        url: where they meet, as ``torch.distributed.init_process_group`` takes it.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


def find_place(environ: Mapping[str, str] | None = None) -> Place | None:
    """What the environment variables of torchrun or srun say; ``None`` without such a launcher.

    Under srun the processes meet on the step's first machine, at a port made from the job's number;
    ``MASTER_ADDR`` and ``MASTER_PORT`` say otherwise.

    Raises:
        UserError: srun did not start equally many tasks on every machine.
    """
    environ = os.environ if environ is None else environ
    if all(name in environ for name in TORCHRUN):
        rank, world_size, local_rank, local_size = (int(environ[name]) for name in TORCHRUN[:4])
        return Place("torchrun", rank, world_size, local_rank, local_size, "env://")
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks < 2 or not all(name in environ for name in SRUN):
        return None
    rank, local_rank = (int(environ[name]) for name in SRUN[:2])
    per_node = re.fullmatch(r"(\d+)(?:\(x\d+\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
    if per_node is None:
        raise UserError(
            f"srun started {environ['SLURM_STEP_TASKS_PER_NODE']} tasks on its nodes; start as "
            "many on each, with --ntasks-per-node"
        )
    host = environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"])
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    port = environ.get("MASTER_PORT") or 20000 + job % 20000
    return Place("srun", rank, tasks, local_rank, int(per_node[1]), f"tcp://{host}:{port}")


def check_processes(args: argparse.Namespace, config: DictConfig) -> None:
    """Check the number of processes against the machine and the batch.

    With ``train.device=cpu``, ``--num-gpus`` is the number of processes, which then talk through
    gloo.

    Raises:
        UserError: an argument is out of range, asks for more GPUs than there are, or for processes
            where a launcher has started them; or the batch cannot be shared evenly.
    """
    if args.num_gpus < 0 or args.num_machines < 1:
        raise UserError("--num-gpus must be 0 or more and --num-machines 1 or more; change them")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} must be from 0 to --num-machines - 1 = "
            f"{args.num_machines - 1}; change one of them"
        )
    place = find_place()
    found = torch.cuda.device_count()
    has = "no GPU" if found == 0 else f"{found} GPU" if found == 1 else f"{found} GPUs"
    wants_gpus = not str(config.train.get("device", "cuda")).startswith("cpu")
    if place is not None:
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError(
                f"{place.launcher} has started {place.world_size} processes, one per GPU; leave "
                "out --num-gpus and --num-machines, or start without it"
            )
        # a launcher may show each process its own GPU alone
        if wants_gpus and args.num_gpus and 1 < found < place.local_size:
            raise UserError(
                f"{place.launcher} has started {place.local_size} processes on this machine, which "
                f"has {has}; start one per GPU"
            )
    elif args.num_gpus > max(found, 1) and (wants_gpus or found):
        remedy = f"give --num-gpus {found}" if found else "leave it out to run on the CPU"
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {has}; {remedy}")
    _check_batch(config, place.world_size if place else args.num_gpus * args.num_machines)


def launch(worker: Worker, args: argparse.Namespace) -> None:
    """Run ``worker(args)`` in as many processes as there should be.

    Under torchrun, or srun with several tasks, this process is one of them, and ends with the
    worker: nothing after this call is run. Otherwise those that the arguments ask for are started.

    Raises:
        UserError: a process raised one.
        SystemExit: the processes stopped upon a signal (:mod:`.stopping`).
    """
    place = find_place()
    if place is not None:
        _join(place, args)
        _work(worker, args)
    if args.num_gpus * args.num_machines < 2:
        worker(args)
        return
    with forward_signals() as stop:
        try:
            engine.launch(
                _work,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(worker, args),
            )
        except ProcessExitedException as error:
            if error.exit_code == EXIT_CODE or stop.received:
                raise SystemExit(EXIT_CODE) from error
            raise
        except ProcessRaisedException as error:
            # A process hands its error over as text: the traceback, and last the error's own line.
            line = str(error).rstrip().rsplit("\n", 1)[-1]
            name = f"{UserError.__module__}.{UserError.__qualname__}: "
            if line.startswith(name):
                raise UserError(line.removeprefix(name)) from error
            raise


def _join(place: Place, args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count() if args.num_gpus else 0
    if gpus:
        torch.cuda.set_device(place.local_rank % gpus)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=place.url,
        world_size=place.world_size,
        rank=place.rank,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(place.local_size)
    comm.synchronize()


def _work(worker: Worker, args: argparse.Namespace) -> NoReturn:
    """Run in one of several processes, part from the others, and end the process.

    Gloo's threads outlive the groups that they serve, and one that lets go of its last tensor while
    Python shuts down aborts the process (pytorch/pytorch#179291): so Python does not shut down.
    """
    code = 0
    try:
        worker(args)
    except SystemExit as error:  # which all processes agreed on
        code = int(error.code or 0)
    comm.synchronize()
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_batch(config: DictConfig, processes: int) -> None:
    batch = config.dataloader.get("train", {}).get("total_batch_size")
    accumulate = config.train.get("accumulate", 1)
    if accumulate < 1:
        raise UserError(f"train.accumulate={accumulate}; give 1 or more")
    parts = max(processes, 1) * accumulate
    if batch is not None and batch % parts:
        of = (
            f"{processes} processes"
            if accumulate == 1
            else (f"{max(processes, 1)} process(es) in train.accumulate={accumulate} parts")
        )
        raise UserError(
            f"dataloader.train.total_batch_size={batch} cannot be shared by {of} evenly; make it "
            f"a multiple of {parts}"
        )


def _first_host(nodes: str) -> str:
    """The first name in a list of Slurm's, such as ``gpu[07-09,12]-ib,login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
