"""The learning rate by layer, and parameters that are spared weight decay."""

import pytest
from torch import nn

from mamba_vision.errors import UserError
from mamba_vision.solver import layer_decay, parameter_groups

UP = "backbone.bottom_up."


@pytest.mark.parametrize(
    ("name", "factor"),
    [  # stem, 1 + 2 + 3 + 10 blocks, and all that is new: powers 17 down to 0
        (UP + "patch_embed.conv_down.0.weight", 2**-17),
        (UP + "patch_embed.conv_down.4.bias", 2**-17),
        (UP + "levels.0.blocks.0.conv1.weight", 2**-16),
        (UP + "levels.0.downsample.reduction.0.weight", 2**-16),
        (UP + "levels.1.blocks.0.norm1.bias", 2**-15),
        (UP + "levels.1.blocks.1.conv2.weight", 2**-14),
        (UP + "levels.1.downsample.reduction.0.weight", 2**-14),
        (UP + "levels.2.blocks.0.mixer.A_log", 2**-13),
        (UP + "levels.2.blocks.2.mixer.qkv.weight", 2**-11),
        (UP + "levels.2.downsample.reduction.0.weight", 2**-11),
        (UP + "levels.3.blocks.0.gamma_1", 2**-10),
        (UP + "levels.3.blocks.1.mlp.fc1.weight", 2**-9),
        (UP + "levels.3.blocks.9.mlp.fc1.weight", 2**-1),
        (UP + "outnorm0.weight", 1),
        (UP + "outnorm3.bias", 1),
        ("backbone.fpn_lateral2.weight", 1),
        ("proposal_generator.rpn_head.conv.weight", 1),
        ("roi_heads.box_head.0.conv1.norm.weight", 1),
    ],
)
def test_layer_decay_by_hand(name, factor):
    assert layer_decay((1, 2, 3, 10), 0.5)(name) == factor
    assert layer_decay((1, 2, 3, 10), 1)(name) == 1
    bare = layer_decay([1, 2, 3, 10], 0.5, prefix="")
    assert bare(name.removeprefix(UP)) == factor


@pytest.mark.parametrize("rate", [0, -0.5, 1.1, float("nan")])
def test_layer_decay_refuses_a_rate_out_of_range(rate):
    with pytest.raises(UserError, match=r"rate is .*; give"):
        layer_decay((1, 1, 2, 2), rate)


@pytest.mark.parametrize("block", ["levels.2.blocks.2.", "levels.4.blocks.0.", "levels.4.downs."])
def test_layer_decay_refuses_another_backbones_names(block):
    with pytest.raises(UserError, match=rf"depths are \(1, 1, 2, 2\), but .*{block}"):
        layer_decay((1, 1, 2, 2), 0.5)(f"{UP}{block}norm1.weight")


def test_parameter_groups():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "norm": nn.LayerNorm(2)})
    model["conv"].bias.requires_grad = False
    decayed, spared = parameter_groups(model, no_decay=["^norm", r"norm\.bias$"])
    assert decayed["params"] == [model["conv"].weight]
    assert "weight_decay" not in decayed
    assert spared["params"] == [model["norm"].weight, model["norm"].bias]
    assert spared["weight_decay"] == 0
    (everything,) = parameter_groups(model)
    assert len(everything["params"]) == 3


@pytest.mark.parametrize(
    ("pattern", "reason"), [("norm(", "not a regular expression"), ("nrom", "matches no parameter")]
)
def test_parameter_groups_refuse_a_mistyped_pattern(pattern, reason):
    with pytest.raises(UserError, match=reason) as raised:
        parameter_groups(nn.ModuleDict({"norm": nn.LayerNorm(2)}), no_decay=[pattern])
    assert repr(pattern) in str(raised.value)
