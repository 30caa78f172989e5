"""Overrides: what they may change, and what is said to those that may not."""

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from torch import nn

from mamba_vision.engine.overrides import apply_overrides
from mamba_vision.errors import UserError


@pytest.fixture
def config():
    return OmegaConf.create(
        {
            "model": L(nn.Conv2d)(in_channels=3, out_channels="${..classes}", kernel_size=3),
            "classes": 5,
            "shape": L(ShapeSpec)(stride=4),
            "loader": L(build_detection_train_loader)(total_batch_size=16),
            "text": {"_target_": "torch.nn.Linear", "in_features": 2},
            "train": {"max_iter": 90, "lr": 0.1, "amp": {"enabled": False}, "seed": None},
            "steps": [{"size": 1}, {"size": 2}],
            "missing": "???",
        },
        flags={"allow_objects": True},
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=100", "train.max_iter", 100),
        ("train.max_iter=1e2", "train.max_iter", 100),
        ("train.max_iter=null", "train.max_iter", None),
        ("train.lr=1", "train.lr", 1),
        ("train.lr='${train.max_iter}'", "train.lr", 90),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.amp={enabled: true}", "train.amp.enabled", True),
        ("train.seed=7", "train.seed", 7),
        ("classes=[1,2]", "classes", [1, 2]),
        ("missing=x", "missing", "x"),
        ("steps.1.size=9", "steps.1.size", 9),
        ("model.out_channels=6", "model.out_channels", 6),
        ("model.padding=1", "model.padding", 1),  # an argument that the config leaves out
        ("shape.height=8", "shape.height", 8),
        ("text.out_features=4", "text.out_features", 4),
        ("loader.aspect_ratio_grouping=false", "loader.aspect_ratio_grouping", False),
        ("+train.max_itr=3", "train.max_itr", 3),
        ("+new.deep.key=3", "new.deep.key", 3),
        ("train.seed='\"a=b\"'", "train.seed", '"a=b"'),
        ('train.seed="https://a.b/c?d=e"', "train.seed", "https://a.b/c?d=e"),
    ],
)
def test_applies(config, override, key, value):
    apply_overrides(config, [override])
    assert OmegaConf.select(config, key) == value


def test_applies_in_order_and_leaves_the_rest(config):
    before = OmegaConf.to_container(config, resolve=False)
    apply_overrides(config, ["train.lr=1", "train.lr=2"])
    after = OmegaConf.to_container(config, resolve=False)
    assert after["train"].pop("lr") == 2
    before["train"].pop("lr")
    assert after == before
    assert isinstance(after["train"]["max_iter"], int)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.max_itr=3", "train.max_iter"),
        ("trian.max_iter=3", "train.max_iter"),
        ("max_iter=3", "train.max_iter"),
        ("train.amp.enable=true", "train.amp.enabled"),
        ("loader.totl_batch_size=2", "loader.total_batch_size"),
        ("model.paddin=1", "model.padding"),
        ("modle.padding=1", "model.padding"),
        ("steps.0.sise=1", "steps.0.size"),
        ("mising=1", "missing"),
    ],
)
def test_names_the_nearest_key(config, override, nearest):
    before = OmegaConf.to_container(config, resolve=False)
    with pytest.raises(UserError) as caught:
        apply_overrides(config, [override])
    assert f"no config key '{override.split('=')[0]}'; did you mean {nearest}?" in str(caught.value)
    assert OmegaConf.to_container(config, resolve=False) == before


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.max_iter", "not of the form key=value"),
        ("train.max_iter=(1,2)", "not of the form key=value"),
        ("train.max_iter=1,2", "write a list as key=[1,2]"),
        ("~train.max_iter", "not supported; set it to null"),
        ("--resume", "move it before them"),
        ("train.max_iter=many", "needs a number; the config has 90"),
        ("train.max_iter=true", "needs a number"),
        ("train.amp.enabled=flase", "needs true or false; the config has False"),
        ("train.amp.enabled=1", "needs true or false"),
        ("train=3", "in place of a group"),
        ("train.max_iter.deep=3", "train.max_iter is 90"),
        ("steps.2.size=3", "steps is a list, of length 2"),
        ("steps.first=3", "steps is a list"),
        ("zzz=3", "no config key 'zzz'"),
    ],
)
def test_refuses(config, override, reason):
    with pytest.raises(UserError) as caught:
        apply_overrides(config, [override])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
