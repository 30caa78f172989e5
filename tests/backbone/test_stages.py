import math

import pytest
import torch
from torch import nn

from mamba_vision.backbone.attention import Attention
from mamba_vision.backbone.mixer import MambaVisionMixer
from mamba_vision.backbone.stages import ConvStage, WindowStage
from mamba_vision.backbone.windows import window_shape


def _window_stage(depth=2, drop_path=0.0, **options) -> WindowStage:
    defaults = {
        "num_heads": 2,
        "window_size": 4,
        "window_padding": "full",
        "mlp_ratio": 2.0,
        "layer_scale": None,
        "downsample": False,
        "activation_checkpointing": False,
        "skip_padding": True,
        "cuda_graphs": True,
        "scan_backend": None,
        "conv_backend": None,
        "norm_backend": None,
        "linear_backend": None,
        "attention_backend": None,
    }
    return WindowStage(16, [drop_path] * depth, **(defaults | options))


@pytest.mark.parametrize(
    ("depth", "kinds"),
    [(1, "M"), (2, "MA"), (3, "MMA"), (4, "MMAA"), (5, "MMMAA"), (7, "MMMMAAA"), (8, "MMMMAAAA")],
)
def test_which_blocks_attend(depth, kinds):
    letters = {MambaVisionMixer: "M", Attention: "A"}
    assert "".join(letters[type(b.mixer)] for b in _window_stage(depth).blocks) == kinds


@pytest.mark.parametrize(
    ("padding", "h", "w"),
    [("full", 4, 4), ("fit", 3, 4)],  # 5 x 7 in windows of 4: 2 x 2 windows of 3 x 4 suffice
)
@torch.no_grad()
def test_windows_by_hand(padding, h, w):
    stage = _window_stage(3, window_padding=padding).eval()
    x = torch.randn(2, 16, 5, 7)
    expected = torch.zeros(2, 16, 5, 7)
    for i, image in enumerate(x):
        for top in range(0, 5, h):
            for left in range(0, 7, w):
                tokens = torch.zeros(h * w, 16)
                inside = [
                    (r, c) for r in range(h) for c in range(w) if top + r < 5 and left + c < 7
                ]
                for r, c in inside:
                    tokens[r * w + c] = image[:, top + r, left + c]
                for block in stage.blocks:
                    tokens = block(tokens[None])[0]
                for r, c in inside:
                    expected[i, :, top + r, left + c] = tokens[r * w + c]
    feature, following = stage(x)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)
    assert following is None


@pytest.mark.parametrize(
    ("size", "window", "padding", "part"),
    [
        ((3, 5), 8, "full", (3, 5)),  # one window of 8 x 8
        ((5, 3), 8, "full", (5, 3)),
        ((8, 3), 8, "full", (8, 3)),
        ((3, 9), 4, "full", (3, 4)),  # 1 x 3 windows: whole rows, every column
        ((9, 3), 4, "full", (4, 3)),
        ((5, 6), 4, "full", None),  # 2 x 2
        ((4, 9), 4, "full", None),
        ((3, 5), 8, "fit", None),
        ((3, 9), 4, "fit", None),
    ],
)
def test_the_last_block_skips_padding(size, window, padding, part):
    """It leaves out what it may, and nothing else changes: features, gradients, dropped windows."""
    options = {"window_size": window, "window_padding": padding, "layer_scale": 0.5}
    x = torch.randn(2, 16, *size, requires_grad=True)
    direction = torch.randn(2, 16, *size)
    state, outcomes, tokens = None, [], []
    for skip in (False, True):
        stage = _window_stage(3, drop_path=0.4, skip_padding=skip, **options)
        state = state or stage.state_dict()
        stage.load_state_dict(state)
        stage.blocks[-1].mlp.register_forward_hook(lambda m, x, y: tokens.append(y.shape[1]))
        torch.manual_seed(1)
        feature, _ = stage(x)
        grads = torch.autograd.grad(feature, [x, *stage.parameters()], direction)
        outcomes.append((feature, *grads))
    whole = window_shape(*size, window, padding)
    assert tokens == [math.prod(whole), math.prod(part or whole)]
    for one, other in zip(*outcomes):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_mamba_mixer_has_no_padding_to_skip():
    stage = _window_stage(1, window_size=8).eval()
    tokens = []
    stage.blocks[0].mlp.register_forward_hook(lambda m, x, y: tokens.append(y.shape[1]))
    stage(torch.randn(1, 16, 3, 5))
    assert tokens == [64]


def test_downsampling_follows_the_feature():
    stage = _window_stage(downsample=True).eval()
    feature, following = stage(torch.randn(1, 16, 6, 8))
    torch.testing.assert_close(following, stage.downsample.reduction[0](feature))
    assert following.shape == (1, 32, 3, 4)


@pytest.mark.parametrize("training", [True, False])
def test_conv_block_by_its_equation(training):
    """The outcome, the gradients and the statistics; with the batch's and with the running ones."""
    stage = ConvStage(
        6,
        [0.0],
        norm=nn.BatchNorm2d,
        layer_scale=0.5,
        downsample=False,
        activation_checkpointing=False,
    ).double()
    block, x = stage.blocks[0], torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    before = [norm.running_mean.clone() for norm in (block.norm1, block.norm2)]
    means: list[torch.Tensor] = []

    def normalized(conv, norm, x):
        y = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        variance, mean = norm.running_var.clone(), norm.running_mean.clone()
        if training:
            variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        means.append(mean)
        factor = norm.weight / torch.sqrt(variance + 1e-5)
        return (y - mean.view(-1, 1, 1)) * factor.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    y = normalized(block.conv1, block.norm1, x)
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    expected = x + block.gamma.view(-1, 1, 1) * normalized(block.conv2, block.norm2, y)
    actual = stage.train(training)(x)[0]
    torch.testing.assert_close(actual, expected)
    leaves, direction = [x, *block.parameters()], torch.randn_like(x)
    gradients = [torch.autograd.grad(y, leaves, direction) for y in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
    for norm, old, mean in zip((block.norm1, block.norm2), before, means):
        torch.testing.assert_close(norm.running_mean, 0.9 * old + 0.1 * mean if training else old)


def test_mixer_block_by_its_equation():
    block = _window_stage(1, layer_scale=0.3).double().blocks[0]
    block.mixer = nn.Linear(16, 16).double()
    nn.init.normal_(block.gamma_2)

    def normalized(values):
        variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
        return (values - mean) / torch.sqrt(variance + 1e-5)

    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y = x + 0.3 * block.mixer(normalized(x))
    hidden = block.mlp.fc1(normalized(y))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(x), y + block.gamma_2 * block.mlp.fc2(hidden))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_mixer_block_between_its_neighbours(layer_scale):
    """Given its input normalized, and asked to normalize its outcome, it gives the same."""
    block = _window_stage(1, layer_scale=layer_scale).double().blocks[0]
    following = nn.LayerNorm(16).double()
    nn.init.normal_(following.weight)
    nn.init.normal_(following.bias)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters(), *following.parameters()]
    directions = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    outcome = block(x)
    alone = outcome, following(outcome)
    between = block(x, block.norm1(x), following=following)
    for one, other in zip(alone, between, strict=True):
        torch.testing.assert_close(other, one)
    gradients = [torch.autograd.grad(both, leaves, list(directions)) for both in (alone, between)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("following", [None, nn.LayerNorm(16)])
def test_drop_path_drops_whole_windows_and_scales_the_rest(following):
    block = _window_stage(1, drop_path=0.5).blocks[0]
    x = torch.randn(64, 16, 16)

    def check(branch):
        after = block(x) if following is None else block(x, following=following)[0]
        dropped = (after - x).abs().amax((1, 2)) < 1e-5
        assert 16 < dropped.sum() < 48
        torch.testing.assert_close(
            (after - x)[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-4
        )

    nn.init.zeros_(block.mlp.fc2.weight)  # leaves the mixer's branch alone
    nn.init.zeros_(block.mlp.fc2.bias)
    nn.init.normal_(block.mixer.out_proj.weight)
    check(block.mixer(block.norm1(x)))
    nn.init.zeros_(block.mixer.out_proj.weight)  # leaves the MLP's
    nn.init.normal_(block.mlp.fc2.weight)
    check(block.mlp(block.norm2(x)))
