"""A compiled backbone: the same names, numbers and gradients, whatever the size of the image."""

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from omegaconf import OmegaConf
from torch import nn

from mamba_vision.backbone import MambaVision
from mamba_vision.engine import build_model
from mamba_vision.errors import UserError
from mamba_vision.ops import depthwise_conv1d_silu


def config(model, device="cpu"):
    return OmegaConf.create(
        {"model": model, "train": {"device": device, "compile": True}},
        flags={"allow_objects": True},
    )


def compare(device, sizes, activation_checkpointing=False):
    model = LazyCall(MambaVision)(
        dim=16,
        in_dim=8,
        depths=(1, 1, 2, 2),  # the last block skips padding
        num_heads=(1, 1, 2, 2),
        window_size=(8, 8, 4, 4),
        drop_path_rate=0.0,
        out_features=("res3", "res5"),
    )
    plain = instantiate(model).to(device)
    model.activation_checkpointing = activation_checkpointing
    compiled = build_model(config(model, device))
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    calls = []
    for size in sizes:
        images = torch.randn(2, 3, *size, device=device)
        gradients = []
        weights = None
        for each in (plain, compiled):
            features = each(images)
            weights = weights or {k: torch.randn_like(v) for k, v in features.items()}
            each.zero_grad()
            sum((v * weights[k]).sum() for k, v in features.items()).backward()
            gradients.append([p.grad for p in each.parameters()])
            calls.append(features)
        before, after = calls[-2:]
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-3)
        for one, other in zip(*gradients):
            scale = 1e-3 * max(g.abs().max() for g in gradients[0])
            torch.testing.assert_close(other, one, rtol=1e-2, atol=scale.item())
    for (name, one), other in zip(plain.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_equals_the_plain_one(monkeypatch, activation_checkpointing):
    compiled = []

    def traced(call, **options):
        compiled.append(call)
        return compile_(call, **options, backend="aot_eager")  # no need of a C++ compiler

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    compare("cpu", [(64, 96), (96, 64)], activation_checkpointing)
    assert len(compiled) == 6  # one a block


@pytest.mark.cuda
@pytest.mark.slow
def test_equals_the_plain_one_on_a_gpu(monkeypatch):
    # TensorFloat-32 would round the two, whose convolutions cuDNN may choose differently, by 1e-3.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compare("cuda", [(128, 192), (192, 128), (256, 256)])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_compiled_convolution_has_gradients(backend):
    """Which torch.compile, left to trace the work in place of it, takes for zero."""
    inputs = [torch.randn(2, 8, 4), torch.randn(4, 3)]
    gradients = []
    for call in (depthwise_conv1d_silu, torch.compile(depthwise_conv1d_silu, backend="eager")):
        tensors = [tensor.clone().requires_grad_() for tensor in inputs]
        call(*tensors, backend=backend).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


def test_a_model_without_mamba_vision_is_refused():
    with pytest.raises(UserError, match=r"train\.compile"):
        build_model(config(LazyCall(nn.Linear)(in_features=1, out_features=1)))
