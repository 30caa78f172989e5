"""Precision: what its names mean, and in what a training and an evaluation compute."""

import argparse

import pytest
import torch
from detectron2.config import instantiate
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_vision.backbone import MambaVision
from mamba_vision.engine import Predictor, do_test, do_train, load_config
from mamba_vision.errors import UserError
from mamba_vision.precision import autocast, precision, weights_to_cast


@pytest.fixture
def dtypes(monkeypatch):
    """What the convolutions of a model give, as they are called."""
    seen = []
    forward = torch.nn.Conv2d.forward

    def noted(module, x):
        y = forward(module, x)
        seen.append(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    return seen


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_names(name, dtype):
    assert precision(name, "key") == dtype


def test_a_device_without_it_is_told():
    with pytest.raises(UserError, match=r"train\.eval_amp=bf16 cannot be used here"):
        autocast("bf16", "meta")


def test_other_names_are_refused():
    with pytest.raises(UserError, match=r"train\.amp\.dtype=fp8 .* fp16 or bf16"):
        precision("fp8", "train.amp.dtype")
    with pytest.raises(UserError, match=r"train\.eval_amp=int8"):
        autocast("int8", "cpu")


class _Casts(TorchDispatchMode):
    """Notes where what is cast lies in memory."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.places.add(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


def test_the_weights_to_cast_are_those_that_autocast_casts():
    model = MambaVision(
        dim=16,
        in_dim=8,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 2),
        window_size=(8, 8, 4, 4),
        layer_scale=0.1,
        layer_scale_conv=0.1,
    )
    with _Casts() as casts, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    found = {name for name, w in model.named_parameters() if w.data_ptr() in casts.places}
    named = {id(weight) for weight in weights_to_cast(model)}
    listed = {name for name, w in model.named_parameters() if id(w) in named}
    # On a CPU the operators are composed, and cast their weights to what they compute in, or not.
    inside = ("conv1d_x.weight", "conv1d_z.weight", "dt_proj.bias")
    assert listed == {name for name in found if not name.endswith(inside)}
    assert len(listed) > 30


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], torch.float32),
        (["+train.eval_amp="], torch.float32),
        (["+train.eval_amp=bf16"], torch.bfloat16),
        (["+train.eval_amp=fp16"], torch.float16),
    ],
)
def test_an_evaluation_computes_in_what_is_asked_for(toy, dtypes, overrides, dtype):
    config = load_config(toy, overrides)
    results = do_test(config, instantiate(config.model))
    assert dtypes == [dtype] * 3
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_so_does_one_on_a_gpu(toy, dtypes, name):
    config = load_config(toy, [f"+train.eval_amp={name}"])
    do_test(config, instantiate(config.model).cuda())
    assert dtypes == [precision(name, "")] * 3


@pytest.mark.parametrize(("name", "dtype"), [("", torch.float32), ("bf16", torch.bfloat16)])
def test_so_does_a_predictor(toy, dtypes, name, dtype):
    config = load_config(toy, [f"+train.eval_amp={name}"])
    weights = toy.parent / "weights.pth"
    torch.save({"model": instantiate(config.model).state_dict()}, weights)
    predictor = Predictor(config, weights, "cpu")
    for _ in range(2):
        found = predictor(toy.parent / "test_images" / "0.png")
        assert found.scores.dtype == torch.float32
    assert dtypes == [dtype] * 2


def test_so_does_an_evaluation_in_the_course_of_a_training(toy, dtypes):
    """Which itself computes in float32."""
    overrides = ["train.device=cpu", "train.amp.enabled=False", "train.max_iter=2"]
    config = load_config(toy, [*overrides, "+train.eval_amp=bf16", "+train.val_loss=True"])
    do_train(argparse.Namespace(resume=False), config)
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 6  # three images, twice


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_training_computes_in_what_is_asked_for(toy, dtypes, name):
    overrides = ["train.device=cpu", "train.amp.enabled=True", f"+train.amp.dtype={name}"]
    config = load_config(toy, [*overrides, "train.max_iter=2"])
    do_train(argparse.Namespace(resume=False), config)
    assert dtypes == [precision(name, "")] * 2 + [torch.float32] * 3
    saved = torch.load(toy.parent / "output" / "model_final.pth", weights_only=True)
    assert bool(saved["trainer"]["grad_scaler"]) == (name == "fp16")  # bfloat16 needs no scaling
    assert saved["model"]["conv.weight"].dtype == torch.float32
