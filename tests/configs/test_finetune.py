"""The config for fine-tuning, and the config of a user's own that docs/fine_tuning.md derives."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.solver import LRMultiplier

from mamba_vision import MambaVision
from mamba_vision.data import draw_shapes, register_shapes
from mamba_vision.engine import do_train, load_config

ROOT = Path(__file__).parents[2]
LEAF = "cascade_mask_rcnn_mamba_vision_tiny_finetune"
UP = "backbone.bottom_up."

BACKBONE = {
    "dim": 16,
    "in_dim": 8,
    "depths": [1, 1, 2, 2],
    "num_heads": [2, 2, 2, 4],
    "window_size": [8, 8, 8, 4],
}
SMALL = [
    *(f"model.backbone.bottom_up.{key}={value}" for key, value in BACKBONE.items()),
    "model.backbone.out_channels=16",
    *(f"model.roi_heads.box_heads.{k}.fc_dims=[32]" for k in range(3)),
    "model.roi_heads.box_predictors.2.test_score_thresh=0.0",
    "dataloader.train.mapper.augmentations.1.prob=0",
    "dataloader.train.mapper.augmentations.2.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.device=cpu",
    "train.max_iter=2",
    "train.log_period=1",
]


@pytest.fixture
def imagenet(tmp_path):
    """A file of random weights in the form of the released classifiers'."""
    state = MambaVision(**BACKBONE).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value += 0.02 * torch.rand_like(value)  # so that none is as a new model's
    state = {name: value for name, value in state.items() if not name.startswith("outnorm")}
    state |= {"norm.weight": torch.ones(128), "norm.bias": torch.zeros(128)}
    state |= {"norm.running_mean": torch.zeros(128), "norm.running_var": torch.ones(128)}
    state |= {"head.weight": torch.randn(10, 128), "head.bias": torch.zeros(10)}
    path = tmp_path / "mambavision_1k.pth.tar"
    torch.save({"arch": "mamba_vision_T", "epoch": 300, "state_dict": state}, path)
    return path


def optimizer_of(config):
    """A model on no device, the optimizer, and each parameter's names and group."""
    with torch.device("meta"):
        model = instantiate(config.model)
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    return model, optimizer, found


def test_every_parameter_is_in_one_group():
    model, optimizer, found = optimizer_of(load_config(LEAF))
    assert sorted(name for name, _ in found) == sorted(n for n, _ in model.named_parameters())
    # T's 16 blocks, stem and new layers, each with weight decay and without
    assert len(optimizer.param_groups) == 18 * 2
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_learning_rates_fall_towards_the_image():
    _, _, found = optimizer_of(load_config(LEAF, SMALL))
    powers = {  # 6 blocks; every parameter of the model begins with one of these
        f"{UP}patch_embed.": 7,
        f"{UP}levels.0.": 6,  # of one block, and with it what samples down
        f"{UP}levels.1.": 5,
        f"{UP}levels.2.blocks.0.": 4,
        f"{UP}levels.2.blocks.1.": 3,
        f"{UP}levels.2.downsample.": 3,
        f"{UP}levels.3.blocks.0.": 2,
        f"{UP}levels.3.blocks.1.": 1,
        f"{UP}outnorm": 0,
        "backbone.fpn_": 0,
        "proposal_generator.": 0,
        "roi_heads.": 0,
    }
    for name, group in found:
        (power,) = (power for beginning, power in powers.items() if name.startswith(beginning))
        assert group["lr"] == pytest.approx(5e-5 * 0.8**power), name


def test_weight_decay_spares_norms_and_the_scans_a_log_and_d():
    _, _, found = optimizer_of(load_config(LEAF, SMALL))
    spared = {name for name, group in found if group["weight_decay"] == 0}
    assert {group["weight_decay"] for _, group in found} == {0, 0.05}
    affine = ("weight", "bias")
    assert spared == {
        *(f"{UP}patch_embed.conv_down.{i}.{x}" for i in (1, 4) for x in affine),
        *(f"{UP}levels.{i}.blocks.0.norm{k}.{x}" for i in range(4) for k in (1, 2) for x in affine),
        *(f"{UP}levels.{i}.blocks.1.norm{k}.{x}" for i in (2, 3) for k in (1, 2) for x in affine),
        *(f"{UP}levels.{i}.blocks.0.mixer.{x}" for i in (2, 3) for x in ("A_log", "D")),
        *(f"{UP}outnorm{i}.{x}" for i in range(4) for x in affine),
        *(
            f"roi_heads.box_head.{k}.conv{i}.norm.{x}"
            for k in range(3)
            for i in range(1, 5)
            for x in affine
        ),
    }


def test_the_schedule_is_of_the_length_of_the_training():
    for length in (200, 5000):
        config = load_config(LEAF, [*SMALL, f"train.max_iter={length}"])
        _, optimizer, _ = optimizer_of(config)
        schedule = LRMultiplier(optimizer, instantiate(config.lr_multiplier), length)
        for part, factor in ((0, 0.001), (0.05, 0.994), (0.5, 0.5), (0.75, 0.1464), (0.9999, 0)):
            schedule.last_epoch = part * length
            rates = schedule.get_lr()
            # cosine: (1 + cos(pi * part)) / 2, at a twentieth 0.9938
            assert max(rates) == pytest.approx(5e-5 * factor, rel=1e-3, abs=1e-11)
            assert min(rates) == pytest.approx(max(rates) * 0.8**7)


@pytest.mark.parametrize("size", ["small", "base"])
def test_other_sizes_take_the_recipe(size):
    config = load_config(LEAF)
    config.model = load_config(f"cascade_mask_rcnn_mamba_vision_{size}_3x_coco").model
    _, optimizer, found = optimizer_of(config)
    depth = sum(config.model.backbone.bottom_up.depths)
    rates = dict(found)
    assert rates[f"{UP}patch_embed.conv_down.0.weight"]["lr"] == 5e-5 * 0.8 ** (depth + 1)
    assert len(optimizer.param_groups) == (depth + 2) * 2


def test_a_frozen_part_keeps_its_weights_and_statistics(imagenet, tmp_path):
    name = str(tmp_path / "shapes")
    register_shapes(name, name, images=4)
    config = load_config(
        LEAF,
        [
            *SMALL,
            "model.backbone.bottom_up.freeze_at=2",
            f"dataloader.train.dataset.names={name}",
            "dataloader.evaluator=null",
            f"train.init_checkpoint={imagenet}",
            f"train.output_dir={tmp_path / 'output'}",
            "optimizer.lr=1e-3",
        ],
    )
    config.train.amp.enabled = False
    do_train(argparse.Namespace(resume=False), config)

    before = torch.load(imagenet, weights_only=True)["state_dict"]
    trained = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    kept = {
        name
        for name, value in before.items()
        if UP + name in trained and torch.equal(trained[UP + name], value)
    }
    counters = {name for name in before if name.endswith("num_batches_tracked")}
    frozen = {name for name in before if name.startswith(("patch_embed.", "levels.0."))}
    assert kept - counters == frozen - counters
    assert len(frozen) > 10


@pytest.mark.slow
def test_the_documented_config_trains_from_imagenet_weights(imagenet, tmp_path):
    """As a user does it: the data, the config and the command of docs/fine_tuning.md."""
    text = (ROOT / "docs" / "fine_tuning.md").read_text()
    config = re.search(r"```python\n(from .*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_finetune.py").write_text(config)
    data = tmp_path / "datasets" / "more_shapes"
    draw_shapes(data, images=6, seed=1)
    for part in ("train", "val"):
        (data / f"{part}.json").write_text((data / "annotations.json").read_text())

    result = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "lazyconfig_train_net.py",
            "--config-file=my_finetune.py",
            *SMALL,
            f"train.init_checkpoint={imagenet}",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    output = tmp_path / "output" / "mine"
    log = (output / "log.txt").read_text()
    found = re.search(r"not found in the checkpoint:\n(.*?)\n\[", log, re.DOTALL)
    missing = re.sub(r"\x1b\[\d*m", "", found[1]).splitlines()
    new = ("backbone.bottom_up.outnorm", "backbone.fpn_", "proposal_generator.", "roi_heads.")
    assert [name for name in missing if not name.startswith(new)] == []
    assert all(any(name.startswith(beginning) for name in missing) for beginning in new)
    assert "Not used" not in log
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1]
    assert set(json.loads((output / "results.json").read_text())) == {"bbox", "segm"}
    again = load_config(output / "config.yaml")
    rates = dict(optimizer_of(again)[2])
    assert rates[f"{UP}patch_embed.conv_down.0.weight"]["lr"] == 5e-5 * 0.8**7
