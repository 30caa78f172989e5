"""The backends around compiled extensions, with stand-ins that check what the extensions require.

The stand-ins compute by the definition, in the extensions' own layouts, so that a wrong stride,
order or transpose shows without a GPU too. The tests marked cuda run the extensions themselves.
"""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba_vision.ops
from mamba_vision.ops import selective_scan

OPS = Path(mamba_vision.ops.__file__).parent
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(monkeypatch, folder, name, stand_in):
    """The backend's module, with ``stand_in`` in place of the extension it imports."""
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    full = f"mamba_vision.ops.{folder}.{name}"
    spec = importlib.util.spec_from_file_location(full, OPS / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_scan(u, delta, A, B, C, D, z, bias):
    batch, width, length = u.shape
    states = A.shape[1]
    assert u.dtype in KERNEL_DTYPES
    assert delta.shape == u.shape
    assert A.shape == (width, states)
    assert B.shape == C.shape == (batch, 1, states, length)
    for tensor in (u, delta, B, C):
        assert tensor.dtype == u.dtype
        assert tensor.stride(-1) == 1 or length == 1
    for weight in (A, D, bias):
        assert weight is None or (weight.dtype == torch.float32 and weight.stride(-1) == 1)
    for vector in (D, bias):
        assert vector is None or vector.shape == (width,)
    assert z is None
    assert not torch.is_grad_enabled()


def scan_channels_first(u, delta, A, B, C, D, bias, softplus):
    u, delta, B, C = (x.mT for x in (u, delta, B[:, 0], C[:, 0]))
    return selective_scan(
        u, delta, A, B, C, D, bias, delta_softplus=softplus, backend="reference"
    ).mT.contiguous()


@pytest.fixture
def mamba_ssm(monkeypatch):
    extension = types.ModuleType("selective_scan_cuda")

    def fwd(u, delta, A, B, C, D, z, bias, softplus):
        check_scan(u, delta, A, B, C, D, z, bias)
        chunks = (u.shape[2] + 2047) // 2048
        states = torch.zeros(*u.shape[:2], chunks, 2 * A.shape[1])
        return [scan_channels_first(u, delta, A, B, C, D, bias, softplus), states]

    def bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, softplus, recompute_out_z):
        check_scan(u, delta, A, B, C, D, z, bias)
        assert dout.shape == u.shape
        assert dout.dtype == u.dtype
        assert dout.stride(-1) == 1 or dout.shape[-1] == 1
        assert states.shape[2:] == ((u.shape[2] + 2047) // 2048, 2 * A.shape[1])
        assert (out, dz, recompute_out_z) == (None, None, False)
        tensors = [
            x if x is None else x.detach().requires_grad_() for x in (u, delta, A, B, C, D, bias)
        ]
        given = [x for x in tensors if x is not None]
        with torch.enable_grad():
            y = scan_channels_first(*tensors, softplus)
        grads = iter(torch.autograd.grad(y, given, dout))
        # What was not given has an undefined gradient, which Python sees as None.
        return [None if x is None else next(grads) for x in tensors]

    extension.fwd, extension.bwd = fwd, bwd
    return load(monkeypatch, "selective_scan", "cuda_mamba_ssm", extension)


@pytest.fixture
def causal_conv1d(monkeypatch):
    package = types.ModuleType("causal_conv1d")

    def causal_conv1d_fn(x, weight, bias=None, *, activation):
        _, width, length = x.shape
        assert {x.dtype, weight.dtype} <= set(KERNEL_DTYPES)
        assert weight.shape == (width, 3)
        assert weight.is_contiguous()
        assert x.stride(2) == 1 or x.stride(1) == 1
        if x.stride(1) == 1 and x.stride(2) > 1:
            assert [n % 8 for n in (width, x.stride(2), x.stride(0))] == [0, 0, 0]
        assert (bias, activation) == (None, "silu")
        kernel = weight.to(x.dtype)[:, None]
        return F.silu(F.conv1d(x, kernel, padding=2, groups=width)[..., :length])

    package.causal_conv1d_fn = causal_conv1d_fn
    return load(monkeypatch, "conv1d", "cuda_causal_conv1d", package)


def differentiate(function, inputs, weights):
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(weights)
    return [y.detach(), *(x.grad for x in inputs if x is not None)]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_mamba_ssm(mamba_ssm, length, optional, dtype):
    wide = torch.randn(2, length, 48).to(dtype)
    columns = torch.randn(2, length, 11).to(dtype)
    inputs = [
        wide[..., :24],
        torch.rand(2, 24, length).to(dtype).mT,
        -torch.rand(4, 24).t(),
        columns[..., 3:7],
        columns[..., 7:],
        torch.randn(24).to(dtype) if optional else None,
        torch.rand(48)[::2] if optional else None,
    ]
    weights = torch.randn(2, length, 24).to(dtype)
    results, expected = (
        differentiate(lambda *x, run=run: run(*x), inputs, weights)
        for run in (
            lambda *x: mamba_ssm.run(*x, delta_softplus=optional),
            lambda *x: selective_scan(*x, delta_softplus=optional, backend="reference"),
        )
    )
    for result, same in zip(results, expected):
        assert result.dtype == same.dtype
        torch.testing.assert_close(result, same)


def test_mamba_ssm_computes_in_the_widest_dtype(mamba_ssm):
    inputs = [torch.randn(1, 9, 4).half(), torch.randn(1, 9, 4), -torch.rand(4, 2)]
    inputs += [torch.randn(1, 9, 2).half(), torch.randn(1, 9, 2).bfloat16(), None, None]
    y = mamba_ssm.run(*inputs, delta_softplus=True)
    assert y.dtype == torch.float16
    expected = selective_scan(*inputs, backend="reference")
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_mamba_ssm_obstacles(mamba_ssm):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    half, double = (torch.float16,), (torch.float64,)
    reason = mamba_ssm.obstacle(cpu, half, states=8)
    assert reason == "it needs tensors on a CUDA device, these are on cpu"
    assert mamba_ssm.obstacle(cuda, half, states=8) is None
    assert "not torch.float64" in mamba_ssm.obstacle(cuda, double, states=8)
    assert "at most 256 state numbers" in mamba_ssm.obstacle(cuda, half, states=257)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_causal_conv1d(causal_conv1d, length, width, dtype):
    x = torch.randn(2, length, 3 * width).to(dtype)[..., width : 2 * width]
    weight = torch.randn(3, width).to(dtype).t()
    weights = torch.randn(2, length, width).to(dtype)
    results = differentiate(causal_conv1d.run, (x, weight), weights)
    expected = differentiate(
        lambda *x: F.silu(F.conv1d(x[0].mT, x[1][:, None], padding=1, groups=width)).mT,
        (x, weight),
        weights,
    )
    for result, same in zip(results, expected):
        torch.testing.assert_close(result, same)


def test_causal_conv1d_obstacles(causal_conv1d):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert causal_conv1d.obstacle(cuda, (torch.float16, torch.float16)) is None
    assert "not torch.float64" in causal_conv1d.obstacle(cuda, (torch.float16, torch.float64))
    reason = causal_conv1d.obstacle(cpu, (torch.float32,))
    assert reason == "it needs tensors on a CUDA device, these are on cpu"
