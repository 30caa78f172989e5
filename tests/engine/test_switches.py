"""What the training tool says to switches that cannot be used."""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.config import instantiate

from mamba_vision.engine import load_config
from mamba_vision.engine.overrides import apply_overrides
from mamba_vision.engine.switches import check_switches
from mamba_vision.errors import UserError


@pytest.fixture(scope="module")
def loaded():
    return load_config("cascade_mask_rcnn_mamba_vision_tiny_3x_coco")


@pytest.fixture
def config(loaded):
    return copy.deepcopy(loaded)


@pytest.mark.parametrize(
    ("switch", "reason"),
    [
        ("amp.dtype=half", r"train\.amp\.dtype=half .* give fp16 or bf16"),
        ("eval_amp=fp32", r"train\.eval_amp=fp32 .* give fp16 or bf16"),
        ("ema_decay=1", r"train\.ema_decay=1 is not from 0"),
        ("ema_decay=-0.1", r"train\.ema_decay=-0\.1 is not from 0"),
        ("patience=-1", r"train\.patience=-1 is not a whole number"),
        ("patience=2.5", r"train\.patience=2\.5 is not a whole number"),
        ("draw_images=-3", r"train\.draw_images=-3 is not a whole number"),
        ("wandb_project=mine", r"train\.wandb_project=mine needs .* pip install wandb"),
    ],
)
def test_refuses_values(config, switch, reason):
    check_switches(config)
    apply_overrides(config, [f"train.{switch}"])
    with pytest.raises(UserError, match=reason):
        check_switches(config)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.best_metric="], "needs to know what is better"),
        (["train.eval_period=0"], "counts evaluations, of which there are none"),
        (["dataloader.evaluator=null"], "counts evaluations, of which there are none"),
    ],
)
def test_patience_needs_evaluations(config, overrides, reason):
    apply_overrides(config, ["train.patience=2"])
    check_switches(config)
    apply_overrides(config, overrides)
    with pytest.raises(UserError, match=rf"train\.patience=2 {reason}"):
        check_switches(config)


def test_pictures_need_tensorboard(config, monkeypatch):
    apply_overrides(config, ["train.draw_images=2"])
    check_switches(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.draw_images=2 needs TensorBoard"):
        check_switches(config)


def test_the_documented_lines_can_be_given(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=True))
    text = (Path(__file__).parents[2] / "docs" / "training_options.md").read_text()
    lines = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(lines) > 12
    apply_overrides(config, lines)
    check_switches(config)


def test_freezing_and_activation_checkpointing_are_one_line_each(config):
    names = ("freeze_at=2", "activation_checkpointing=True")
    apply_overrides(config, [f"model.backbone.bottom_up.{name}" for name in names])
    bottom_up = instantiate(config.model.backbone.bottom_up)
    trained = [any(p.requires_grad for p in level.parameters()) for level in bottom_up.levels]
    assert trained == [False, True, True, True]
    assert all(level.activation_checkpointing for level in bottom_up.levels)


def test_what_changes_more_than_rounding_is_off_as_it_stands(config):
    train = config.train
    names = ("compile", "ema_decay", "eval_amp", "patience", "val_loss", "draw_images")
    assert not any(train[name] for name in (*names, "wandb_project"))
    assert train.fuse_eval
    assert train.cuda_graphs
    assert train.seed == -1
