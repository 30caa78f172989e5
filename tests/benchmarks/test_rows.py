"""The switches, and the rows that they make."""

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.poolers import ROIPooler
from omegaconf import OmegaConf

from mamba_vision import roi_heads
from mamba_vision.benchmarks.rows import (
    SWITCHES,
    Switch,
    check_names,
    make_rows,
    usable_switches,
)
from mamba_vision.engine import load_config
from mamba_vision.errors import UserError


@pytest.fixture
def config():
    return load_config("cascade_mask_rcnn_mamba_vision_nano_shapes")


def test_each_row_has_one_more_on(config):
    switches = [
        Switch("a", (("optimizer.lr", "1.0", "2.0"),)),
        Switch("b", (("train.max_iter", "1", "2"),), half=True),
        Switch("c", prepare="fuse"),
    ]
    rows = make_rows(config, switches, ["full", "fit"], [])
    names = ["plain", "+ a", "+ b", "all (+ c)"]
    assert [row.cells for row in rows] == [(n, p) for p in ("full", "fit") for n in names]
    values = [
        (row.config.optimizer.lr, row.config.train.max_iter, set(row.prepare)) for row in rows
    ]
    assert values[:4] == [(1, 1, set()), (2, 1, set()), (2, 2, set()), (2, 2, {"fuse"})]
    assert values[4:] == values[:4]
    # what does nothing in float32 is on there
    assert [row.float32.train.max_iter for row in rows] == [2] * 8
    paddings = [row.model(torch.float32).backbone.bottom_up.window_padding for row in rows]
    assert paddings == ["full"] * 4 + ["fit"] * 4
    assert config.optimizer.lr == 3e-3


@pytest.mark.parametrize(
    ("only", "names"),
    [(["plain", "all"], ["plain", "all (+ b)"]), (["b"], ["all (+ b)"]), (["a"], ["+ a"])],
)
def test_only_some(config, only, names):
    switches = [Switch("a", prepare="fuse"), Switch("b", prepare="dtype")]
    assert [row.name for row in make_rows(config, switches, ["full"], only)] == names


def test_an_unknown_row():
    check_names(["plain", "fuse", "all"])
    with pytest.raises(UserError, match="--only: 'fused' is none of the rows plain, operators"):
        check_names(["plain", "fused"])


def test_plain_has_none_of_our_parts(config):
    switches, _ = usable_switches(config, "cpu", torch.float32)
    plain, *_, everything = make_rows(config, switches, ["full"], [])
    backbones = [row.config.model.backbone.bottom_up for row in (plain, everything)]
    assert [x.scan_backend for x in backbones] == ["reference", None]  # the recurrence itself
    assert [x.conv_backend for x in backbones] == ["torch", None]
    heads = plain.config.model.roi_heads
    assert heads.box_pooler._target_ == f"{ROIPooler.__module__}.ROIPooler"
    assert everything.config.model.roi_heads.mask_pooler._target_.startswith(roi_heads.__name__)
    ours = [
        key
        for part in ("proposal_generator", "roi_heads")
        for key in _targets(plain.config.model[part], part)
    ]
    assert ours == ["roi_heads"]  # the cascade itself: Detectron2 has none like it
    evaluator = plain.config.dataloader.evaluator._target_
    assert evaluator == "detectron2.evaluation.COCOEvaluator"
    assert COCOEvaluator.__module__.startswith("detectron2.evaluation")


def _targets(node, path):
    """Where in a config something of this project's is built."""
    if OmegaConf.is_list(node):
        items = enumerate(node)
    elif OmegaConf.is_dict(node):
        target = node.get("_target_")
        name = target if isinstance(target, str) else getattr(target, "__module__", "")
        if name.startswith("mamba_vision"):
            yield path
        items = ((key, node[key]) for key in node if key != "_target_")
    else:
        return
    for key, inner in items:
        yield from _targets(inner, f"{path}.{key}")


def test_says_what_changes_nothing(config):
    usable, words = usable_switches(config, "cpu", torch.float32)
    assert "without cuda_graphs: it does nothing on a CPU" in words
    assert "without cast_once: it does nothing in float32" in words
    assert len(usable) + len(words) == len(SWITCHES)
    half, _ = usable_switches(config, "cpu", torch.bfloat16)
    assert {s.name for s in half} - {s.name for s in usable} == {"cast_once"}


def test_a_part_of_another_kind_stays(config):
    config.model.roi_heads.box_pooler._target_ = "torch.nn.Identity"
    config.model.roi_heads.mask_pooler = None
    usable, words = usable_switches(config, "cpu", torch.float32)
    assert "without pooler: the config has no such part" in words
    assert "pooler" not in [s.name for s in usable]


def test_no_mamba_vision(config):
    config.model.backbone.bottom_up = {"_target_": "torch.nn.Identity"}
    with pytest.raises(UserError, match="bottom_up is not a MambaVision; give the config of"):
        usable_switches(config, "cpu", torch.float32)
