"""Which process this is, from the arguments or from what a launcher says."""

import argparse

import pytest
import torch
from omegaconf import OmegaConf

from mamba_vision.engine import check_processes
from mamba_vision.engine.launching import TORCHRUN, Place, find_place
from mamba_vision.errors import UserError

ELASTIC = dict(zip(TORCHRUN, ("9", "16", "1", "8", "10.0.0.1", "29500")))
STEP = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def arguments(**changes):
    return argparse.Namespace(**{"num_gpus": 1, "num_machines": 1, "machine_rank": 0} | changes)


def config(device="cuda", batch=16, accumulate=1):
    return OmegaConf.create(
        {
            "dataloader": {"train": {"total_batch_size": batch}},
            "train": {"device": device, "accumulate": accumulate},
        }
    )


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Set the variables of a launcher; at first there is none."""
    for name in ("SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def prepare(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return prepare


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return pretend


def test_torchrun():
    assert find_place(ELASTIC) == Place("torchrun", 9, 16, 1, 8, "env://")
    assert find_place(ELASTIC | STEP).launcher == "torchrun"  # started by srun, once a node


def test_srun():
    assert find_place(STEP) == Place("srun", 9, 16, 1, 8, "tcp://gpu07:30004")
    port = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_place(STEP | port).url == "tcp://10.0.0.1:1234"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("r1-gpu[3]-ib", "r1-gpu3-ib"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_list_of_slurms(nodes, first):
    assert find_place(STEP | {"SLURM_STEP_NODELIST": nodes}).url == f"tcp://{first}:30004"


def test_no_launcher():
    assert find_place({}) is None
    assert find_place(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
    assert find_place(batch_script) is None


def test_uneven_tasks():
    with pytest.raises(UserError, match="srun started 8,7 tasks on its nodes; start as many"):
        find_place(STEP | {"SLURM_STEP_TASKS_PER_NODE": "8,7"})


@pytest.mark.parametrize(
    ("count", "changes", "device"),
    [
        (0, {}, "cuda"),
        (0, {"num_gpus": 0}, "cuda"),
        (0, {"num_gpus": 4}, "cpu"),
        (4, {"num_gpus": 4}, "cuda"),
        (4, {"num_gpus": 4, "num_machines": 2, "machine_rank": 1}, "cuda"),
    ],
)
def test_takes_what_the_machine_can_do(gpus, count, changes, device):
    gpus(count)
    check_processes(arguments(**changes), config(device))


@pytest.mark.parametrize("count", [0, 1, 8])  # srun may show a task its own GPU alone
def test_takes_what_a_launcher_started(gpus, launched, count):
    gpus(count)
    launched(STEP)
    check_processes(arguments(), config())


@pytest.mark.parametrize(
    ("count", "changes", "batch", "message"),
    [
        (0, {"num_gpus": 4}, 16, "--num-gpus 4, but this machine has no GPU; leave it out"),
        (1, {"num_gpus": 2}, 16, "--num-gpus 2, but this machine has 1 GPU; give --num-gpus 1"),
        (2, {"num_gpus": 8}, 16, "has 2 GPUs; give --num-gpus 2"),
        (2, {"num_gpus": -1}, 16, "--num-gpus must be 0 or more"),
        (2, {"num_machines": 0}, 16, "--num-machines 1 or more"),
        (2, {"num_machines": 2, "machine_rank": 2}, 16, "--machine-rank 2 must be from 0 to"),
        (4, {"num_gpus": 4}, 6, "dataloader.train.total_batch_size=6 cannot be shared by 4"),
        (2, {"num_gpus": 2, "num_machines": 2}, 6, "cannot be shared by 4"),
    ],
)
def test_refuses_what_it_cannot(gpus, count, changes, batch, message):
    gpus(count)
    with pytest.raises(UserError, match=message):
        check_processes(arguments(**changes), config(batch=batch))


@pytest.mark.parametrize(
    ("processes", "accumulate", "message"),
    [
        (1, 3, r"cannot be shared by 1 process\(es\) in train.accumulate=3 parts .* multiple of 3"),
        (2, 16, "make it a multiple of 32"),
        (1, 0, "train.accumulate=0; give 1 or more"),
    ],
)
def test_refuses_parts_that_are_not_even(gpus, processes, accumulate, message):
    gpus(processes)
    check_processes(arguments(num_gpus=processes), config(accumulate=8))
    with pytest.raises(UserError, match=message):
        check_processes(arguments(num_gpus=processes), config(accumulate=accumulate))


def test_refuses_processes_of_processes(gpus, launched):
    gpus(8)
    launched(ELASTIC)
    with pytest.raises(UserError, match=r"torchrun has started 16 processes.*leave out --num-gpus"):
        check_processes(arguments(num_gpus=8), config())
    with pytest.raises(UserError, match="=12 cannot be shared by 16"):
        check_processes(arguments(), config(batch=12))
    gpus(4)
    with pytest.raises(UserError, match="8 processes on this machine, which has 4 GPUs"):
        check_processes(arguments(), config())
