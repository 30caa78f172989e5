"""Fitting a run to the machine."""

import argparse

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from mamba_vision.engine import build_model, fit_to_machine
from mamba_vision.engine.machine import scale_lr


def arguments(**changes):
    return argparse.Namespace(**{"num_gpus": 1, "num_machines": 1, "machine_rank": 0} | changes)


def config(device="cuda", batch=16, amp=True):
    return OmegaConf.create(
        {
            "dataloader": {"train": {"total_batch_size": batch}},
            "train": {"device": device, "amp": {"enabled": amp}},
        }
    )


@pytest.fixture
def threads(monkeypatch):
    """The numbers of threads that PyTorch was told to use."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.fixture
def gpus(monkeypatch, threads):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return pretend


def test_falls_back_to_the_cpu_with_a_word(gpus):
    gpus(0)
    changed = config()
    words = fit_to_machine(arguments(), changed)
    assert changed.train.device == "cpu"
    assert not changed.train.amp.enabled
    assert words == [
        "No GPU found: using the CPU",
        "On the CPU train.amp is off: everything is computed in float32",
    ]


@pytest.mark.parametrize(("count", "told"), [(0, []), (1, [1])])
def test_beside_a_gpu_the_cpus_operators_take_one_thread(gpus, threads, count, told):
    gpus(count)
    fit_to_machine(arguments(), config())
    assert threads == told


def test_says_nothing_when_all_is_well(gpus):
    gpus(1)
    changed = config()
    assert fit_to_machine(arguments(), changed) == []
    assert changed == config()


def test_no_gpus_asked_for_means_the_cpu(gpus):
    gpus(1)
    changed = config(amp=False)
    assert fit_to_machine(arguments(num_gpus=0), changed) == ["No GPU asked for: using the CPU"]
    assert changed.train.device == "cpu"


def test_synchronised_norms_between_processes_on_the_cpu(monkeypatch):
    """Another class, same state: its formula is tested in test_train.py."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.SyncBatchNorm(4, eps=0.5)))
    nn.init.uniform_(net[1][0].weight)
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    model = OmegaConf.create({"_target_": lambda: net}, flags={"allow_objects": True})
    whole = OmegaConf.create(
        {"model": model, "train": {"device": "cpu"}}, flags={"allow_objects": True}
    )
    assert isinstance(build_model(whole)[1][0], nn.SyncBatchNorm)

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    built = build_model(whole)
    assert isinstance(built[1][0], NaiveSyncBatchNorm)
    assert built[1][0].eps == 0.5
    assert built.state_dict().keys() == expected.keys()
    for key, value in built.state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    ("batch", "on", "expected"), [(64, True, 4e-4), (2, True, 1.25e-5), (64, False, 1e-4)]
)
def test_the_rate_follows_the_batch(batch, on, expected):
    changed = config(batch=batch)
    changed.train.auto_scale_lr = on
    changed.optimizer = {"lr": 1e-4, "params": {"base_lr": "${..lr}"}}
    scale_lr(changed)
    assert changed.optimizer.lr == changed.optimizer.params.base_lr == pytest.approx(expected)
