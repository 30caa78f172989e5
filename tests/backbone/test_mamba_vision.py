import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import FPN
from omegaconf import OmegaConf
from torch import nn
from torchvision.ops import StochasticDepth

from mamba_vision.backbone import VARIANTS, MambaVision
from mamba_vision.errors import UserError
from mamba_vision.ops.layer_norm import triton_layer_norm
from mamba_vision.ops.linear import torch_linear, triton_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = Path(__file__).parents[1] / "data" / "mamba_vision_names.json"


def _narrow(variant: str) -> dict:
    """A variant's arguments with few channels: its depths, heads, windows and options stay."""
    return VARIANTS[variant] | {"dim": 32, "in_dim": 8}


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_names_and_shapes_are_those_of_the_released_detectors(variant):
    with torch.device("meta"):
        state = MambaVision(**VARIANTS[variant]).state_dict()
    expected = json.loads(NAMES.read_text())[variant]
    assert {name: list(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize(
    ("variant", "millions"),  # the published table, for ImageNet-1K classification
    [
        ("tiny", 31.8),
        ("tiny2", 35.1),
        ("small", 50.1),
        ("base", 97.7),
        ("large", 227.9),
        ("large2", 241.5),
        ("large3_256", 739.6),
    ],
)
def test_parameter_counts_are_the_published_ones(variant, millions):
    with torch.device("meta"):
        backbone = MambaVision(**VARIANTS[variant])
    count = sum(p.numel() for name, p in backbone.named_parameters() if "outnorm" not in name)
    channels = backbone.output_shape()["res5"].channels
    count += 2 * channels + 1000 * (channels + 1)  # the classifier's norm and head
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_classification_windows_are_the_whole_map(variant):
    pixels = int(variant.partition("_")[2] or 224)
    assert VARIANTS[variant]["window_size"] == (8, 8, pixels // 16, pixels // 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    backbone = MambaVision(**(_narrow(variant) | {"drop_path_rate": 0.0})).train()
    features = backbone(torch.randn(2, 3, 64, 96))
    sum((f * torch.randn_like(f)).sum() for f in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A batch norm takes away the bias of the conv before it.
        before_norm = name.endswith(("conv1.bias", "conv2.bias"))
        assert before_norm or parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_announced(variant):
    backbone = MambaVision(**_narrow(variant)).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 64))
    announced = backbone.output_shape()
    assert list(features) == list(announced) == ["res2", "res3", "res4", "res5"]
    assert [shape.stride for shape in announced.values()] == [4, 8, 16, 32]
    assert [shape.channels for shape in announced.values()] == [32, 64, 128, 256]
    for name, shape in announced.items():
        size = (2, shape.channels, 96 // shape.stride, 64 // shape.stride)
        assert features[name].shape == size


@pytest.mark.parametrize("padding", ["full", "fit"])
@pytest.mark.parametrize("size", [(32, 32), (32, 2016), (2016, 32)])
def test_extreme_sizes(nano, size, padding):
    backbone = MambaVision(**nano, window_padding=padding).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    assert features["res5"].shape == (1, 128, size[0] // 32, size[1] // 32)
    assert all(feature.isfinite().all() for feature in features.values())


@pytest.mark.parametrize("names", [["res2"], ["res4", "res3"], ["res5"], ["res2", "res5"]])
def test_some_features_equal_those_of_the_whole(nano, names):
    whole = MambaVision(**nano).eval()
    part = MambaVision(**nano, out_features=names).eval()
    unused = part.load_state_dict(whole.state_dict(), strict=False)
    assert not unused.missing_keys
    image = torch.randn(1, 3, 64, 64)
    expected, features = whole(image), part(image)
    assert list(features) == list(part.output_shape()) == sorted(names)
    for name in names:
        assert torch.equal(features[name], expected[name])
    sum(feature.sum() for feature in features.values()).backward()
    assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize(("padding", "tokens"), [("full", 4 * 4), ("fit", 4 * 3)])
def test_fit_cuts_smaller_windows(nano, padding, tokens):
    backbone = MambaVision(**nano, window_padding=padding)
    shapes = []
    backbone.levels[2].blocks[0].register_forward_hook(lambda m, x, y: shapes.append(y[0].shape))
    backbone(torch.randn(3, 3, 64, 96))  # 4 x 6 tokens in windows of 4: two for each image
    assert shapes == [(6, tokens, 64)]


def test_fit_equals_full_on_whole_windows(nano):
    options = nano | {"window_size": (8, 8, 4, 2)}
    full = MambaVision(**options).eval()
    fit = MambaVision(**options, window_padding="fit").eval()
    fit.load_state_dict(full.state_dict())
    image = torch.randn(2, 3, 128, 192)  # 8 x 12 tokens, then 4 x 6
    for a, b in zip(full(image).values(), fit(image).values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN", "FrozenBN"])
def test_activation_checkpointing_changes_nothing(nano, norm):
    options = nano | {"layer_scale": 0.1, "drop_path_rate": 0.5, "norm": norm}
    plain = MambaVision(**options).train()
    thrifty = MambaVision(**options, activation_checkpointing=True).train()
    thrifty.load_state_dict(plain.state_dict())
    image = torch.randn(4, 3, 64, 64)
    for backbone in (plain, thrifty):
        torch.manual_seed(1)
        features = backbone(image)
        sum(feature.square().sum() for feature in features.values()).backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), thrifty.buffers()):
        assert torch.equal(a, b), name
    plain.eval(), thrifty.eval()
    for a, b in zip(plain(image).values(), thrifty(image).values()):
        assert torch.equal(a, b)


def test_activation_checkpointing_keeps_fewer_activations(nano):
    def kept(backbone):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            features = backbone(torch.randn(2, 3, 128, 128))
        del features
        return sum(sizes)

    plain, thrifty = (MambaVision(**nano, activation_checkpointing=c) for c in (False, True))
    assert kept(thrifty) < 0.5 * kept(plain)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        (nn.BatchNorm2d, nn.BatchNorm2d),
    ],
)
def test_norm_kinds(nano, norm, kind):
    backbone = MambaVision(**nano, norm=norm)
    norms = {n: m for n, m in backbone.named_modules() if hasattr(m, "running_mean")}
    assert len(norms) == 2 + 2 * (1 + 1)  # the stem, and two convolutional stages of one block
    for name, module in norms.items():
        assert type(module) is kind
        assert module.eps == (1e-4 if name.startswith("patch_embed") else 1e-5)


def test_synchronized_norms_train_alone_on_a_cpu(nano):
    reference = MambaVision(**nano, drop_path_rate=0.0).train()
    image = torch.randn(2, 3, 64, 64)
    initial = reference.state_dict()
    initial = {name: value.clone() for name, value in initial.items()}
    expected = reference(image)
    for norm in ("SyncBN", "naiveSyncBN"):
        backbone = MambaVision(**nano, norm=norm, drop_path_rate=0.0).train()
        backbone.load_state_dict(initial)
        for a, b in zip(backbone(image).values(), expected.values()):
            assert torch.equal(a, b)
        for a, b in zip(backbone.buffers(), reference.buffers()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(nano, freeze_at):
    parts = [
        ("patch_embed.",),
        ("levels.0.", "outnorm0."),
        ("levels.1.", "outnorm1."),
        ("levels.2.", "outnorm2."),
        ("levels.3.", "outnorm3."),
    ]
    frozen = tuple(prefix for part in parts[:freeze_at] for prefix in part)
    backbone = MambaVision(**nano, freeze_at=freeze_at, drop_path_rate=0.9).train()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    assert list(backbone.state_dict()) == list(MambaVision(**nano).state_dict())

    image = torch.randn(4, 3, 64, 64)
    before = {n: b.clone() for n, b in backbone.named_buffers() if n.startswith(frozen)}
    trained, evaluated = backbone(image), backbone.eval()(image)
    names = ["res2", "res3", "res4", "res5"]
    for name in names[: max(freeze_at - 1, 0)]:  # a frozen stage is one and the same function
        assert not trained[name].requires_grad
        torch.testing.assert_close(trained[name], evaluated[name])
    for name in names[max(freeze_at - 1, 0) :]:
        assert trained[name].requires_grad
    for name, value in before.items():
        assert torch.equal(value, backbone.get_buffer(name)), name


def test_freezing_fewer_stages_than_asked_for(nano):
    backbone = MambaVision(**nano, out_features=["res3"], freeze_at=5)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_backends_reach_every_mixer(nano):
    with pytest.raises(UserError, match="'nowhere'"):
        MambaVision(**nano, scan_backend="nowhere")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="'nowhere'"):
        MambaVision(**nano, conv_backend="nowhere")(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("sizes", [(8, 8, 9, 5), (8, 8, 4, 3)])  # one window; some
@pytest.mark.parametrize("padding", ["full", "fit"])
@pytest.mark.parametrize("depths", [(1, 1, 3, 2), (1, 1, 1, 1)])
def test_switches_change_nothing(nano, monkeypatch, sizes, padding, depths):
    """Features and gradients stay, though Triton, here perhaps interpreted, takes over."""
    options = nano | {"window_size": sizes, "depths": depths, "window_padding": padding}
    # Frozen batch norms, as others leave rounding alone of the gradients of the biases before them.
    options |= {"layer_scale": 0.3, "drop_path_rate": 0.3, "norm": "FrozenBN"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image = torch.randn(2, 3, 96, 160, device=DEVICE)
    off = MambaVision(**options, fused_norm=False, fused_linear=False, skip_padding=False).to(
        DEVICE
    )
    on = MambaVision(**options).to(DEVICE)
    assert list(on.state_dict()) == list(off.state_dict())
    on.load_state_dict(off.state_dict())
    weights = None
    outcomes = []
    for backbone in (off, on):
        torch.manual_seed(1)
        features = backbone(image)
        weights = weights or {k: torch.randn_like(v) for k, v in features.items()}
        sum((v * weights[k]).sum() for k, v in features.items()).backward()
        grads = {name: p.grad for name, p in backbone.named_parameters()}
        outcomes.append(features | grads)
        for module in (triton_layer_norm, triton_linear):  # on: "auto"
            monkeypatch.setattr(module, "obstacle", lambda *_, **__: None)
    for name, expected in outcomes[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            outcomes[1][name], expected, rtol=1e-3, atol=1e-4 * max(scale, 1e-2), msg=name
        )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("skip_padding", "layers"), [(False, 4), (True, 6)])
def test_fused_linear_layers_are_a_choice(nano, monkeypatch, fused, skip_padding, layers):
    """In all of the five blocks with windows, or in none. Two attend, the last of their stages;
    where they skip padding, they compute the queries apart."""
    seen = []

    def run(*tensors):
        seen.append(tensors)
        return torch_linear.run(*tensors)

    monkeypatch.setattr(triton_linear, "obstacle", lambda *_, **__: None)
    monkeypatch.setattr(triton_linear, "run", run)
    options = {"fused_linear": fused, "skip_padding": skip_padding}
    MambaVision(**nano, **options)(torch.zeros(1, 3, 32, 32))
    # x, and a weight and a bias of each layer
    assert Counter(map(len, seen)) == ({3: layers, 5: 5} if fused else {})


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_fused_norms_are_as_exact_as_pytorch_s(nano, dtype, layer_scale):
    """Under autocast, by the features' distance from those in float32."""
    options = nano | {"layer_scale": layer_scale, "window_size": (8, 8, 14, 7)}
    fused = MambaVision(**options).cuda().eval()
    plain = MambaVision(**options, fused_norm=False).cuda().eval()
    plain.load_state_dict(fused.state_dict())
    image = torch.randn(2, 3, 320, 448, device="cuda")
    with torch.no_grad():
        truth = plain(image)
        with torch.autocast("cuda", dtype=dtype):
            results, usual = fused(image), plain(image)
    for name, expected in truth.items():
        assert results[name].dtype == usual[name].dtype == dtype
        error, allowed = ((x[name] - expected).abs().max() for x in (results, usual))
        assert error <= 2 * allowed, name


def test_drop_path_rises_linearly(nano):
    backbone = MambaVision(**nano, drop_path_rate=0.6)  # 7 blocks
    rates = [m.p for m in backbone.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_initial_values():
    backbone = MambaVision(**_narrow("base"))
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            if module.weight.numel() > 10_000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    gammas = {n: p for n, p in backbone.named_parameters() if "gamma" in n}
    assert len(gammas) == 2 * (10 + 5)
    assert all((gamma == 1e-5).all() for gamma in gammas.values())


def test_convolutional_layer_scale(nano):
    backbone = MambaVision(**nano, layer_scale_conv=0.25)
    gammas = {n: p for n, p in backbone.named_parameters() if "gamma" in n}
    assert {n: list(p.shape) for n, p in gammas.items()} == {
        "levels.0.blocks.0.gamma": [16],
        "levels.1.blocks.0.gamma": [32],
    }
    assert all((gamma == 0.25).all() for gamma in gammas.values())
    backbone(torch.randn(1, 3, 64, 64))["res5"].square().sum().backward()
    assert all(gamma.grad.all() for gamma in gammas.values())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
)
def test_mixed_precision(nano, device, dtype):
    backbone = MambaVision(**nano).to(device).eval()
    image = torch.randn(2, 3, 64, 96, device=device)
    expected = backbone(image)
    with torch.autocast(device, dtype):
        features = backbone(image)
    sum(feature.float().sum() for feature in features.values()).backward()
    for name, feature in features.items():
        assert (feature - expected[name]).abs().mean() < 0.03  # of features normalized to 1
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_under_a_feature_pyramid_from_a_lazy_config(nano):
    config = OmegaConf.create(
        {
            "fpn": LazyCall(FPN)(
                bottom_up=LazyCall(MambaVision)(**nano),
                in_features=["res2", "res3", "res4", "res5"],
                out_channels=8,
            )
        },
        flags={"allow_objects": True},
    )
    pyramid = instantiate(config.fpn)
    assert pyramid.size_divisibility == 32
    features = pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features.values()] == [
        (1, 8, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 64, 64), r"shape \(1, 4, 64, 64\): give a batch of images, \(B, 3, H, W\)"),
        ((3, 64, 64), r"shape \(3, 64, 64\): give a batch"),
        ((1, 3, 64, 80), "64 x 80 pixels, not multiples of 32: pad it"),
        ((1, 3, 0, 64), "0 x 64 pixels, not multiples of 32: pad it"),
        ((1, 3, 31, 33), "31 x 33 pixels"),
    ],
)
def test_wrong_input(nano, shape, message):
    with pytest.raises(UserError, match=message) as error:
        MambaVision(**nano)(torch.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("depths", (1, 1, 1), "four positive whole numbers"),
        ("depths", 4, "four positive whole numbers"),
        ("depths", (1, 1, 0, 1), "four positive whole numbers"),
        ("num_heads", (2, 4, 4, 1.5), "four positive whole numbers"),
        ("num_heads", (2, 4, 5, 8), "a divisor of the stage's 64 channels"),
        ("window_size", "8888", "four positive whole numbers"),
        ("dim", 0, "a positive whole number"),
        ("in_dim", True, "a positive whole number"),
        ("in_chans", "3", "a positive whole number"),
        ("mlp_ratio", 0, "a positive number"),
        ("mlp_ratio", "4", "a positive number"),
        ("drop_path_rate", 1.0, r"a number in \[0, 1\)"),
        ("freeze_at", 6, "a whole number from 0 to 5"),
        ("window_padding", "none", '"full" or "fit"'),
        ("norm", "LN", '"BN", "SyncBN", "naiveSyncBN" or "FrozenBN", or a function'),
        ("out_features", ("res1",), "one or more of res2, res3, res4, res5"),
        ("out_features", (), "one or more of"),
        ("out_features", ("res2", "res2"), "one or more of .*, each once"),
    ],
)
def test_wrong_argument(nano, name, value, remedy):
    with pytest.raises(UserError, match=rf"argument {name}.* is .*: give {remedy}") as error:
        MambaVision(**(nano | {name: value}))
    assert "\n" not in str(error.value)
