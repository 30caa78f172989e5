"""What the Triton backends promise; without a GPU their kernels run in Triton's interpreter."""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mamba_vision.backbone.stages import WindowStage
from mamba_vision.ops import depthwise_conv1d_silu, mamba_inner, selective_scan, triton_support
from mamba_vision.ops.conv1d import triton_conv1d
from mamba_vision.ops.inner import triton_inner
from mamba_vision.ops.linear import triton_linear
from mamba_vision.ops.selective_scan import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCAN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
INNER = ("xz", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A", "D")


def draw_scan(batch, length, width, states=8):
    rates = torch.arange(1.0, states + 1).repeat(width, 1)
    u, delta = torch.randn(2, batch, length, width)
    B, C = torch.randn(2, batch, length, states)
    return [u, delta - 2, -rates, B, C, torch.randn(width), torch.randn(width) / 2]


def differentiate(function, inputs, weights):
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(weights.to(y))
    return [y.detach(), *(x.grad for x in inputs if x is not None)]


def compare(judge, names, function, reference, inputs, weights):
    exact = [None if x is None else x.double() for x in inputs]
    truth = differentiate(reference, exact, weights.double())
    plain = differentiate(reference, inputs, weights)
    on_device = [None if x is None else x.to(DEVICE) for x in inputs]
    results = [x.cpu() for x in differentiate(function, on_device, weights.to(DEVICE))]
    judge(["y", *(f"gradient of {name}" for name in names)], results, truth, plain)


# Small shapes around the kernels' chunks of 32 tokens and blocks of 32 channels.


@pytest.mark.parametrize(
    ("batch", "length", "width", "states"), [(1, 1, 3, 3), (1, 33, 2, 2), (2, 9, 33, 1)]
)
def test_scan(judge, batch, length, width, states):
    compare(
        judge,
        SCAN,
        functools.partial(triton_scan.run, delta_softplus=True),
        functools.partial(selective_scan, backend="reference"),
        draw_scan(batch, length, width, states),
        torch.randn(batch, length, width),
    )


@pytest.mark.parametrize("missing", ["D", "delta_bias"])
def test_scan_without(judge, missing):
    inputs = draw_scan(1, 9, 4, 2)
    inputs[1] = F.softplus(inputs[1])
    inputs[6] = inputs[6].abs()
    inputs[SCAN.index(missing)] = None
    compare(
        judge,
        [name for name in SCAN if name != missing],
        functools.partial(triton_scan.run, delta_softplus=False),
        functools.partial(selective_scan, delta_softplus=False, backend="reference"),
        inputs,
        torch.randn(1, 9, 4),
    )


@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 3), (2, 70, 40)])
def test_conv(judge, batch, length, width):
    compare(
        judge,
        ("x", "weight"),
        triton_conv1d.run,
        functools.partial(depthwise_conv1d_silu, backend="reference"),
        [torch.randn(batch, length, width), torch.randn(width, 3)],
        torch.randn(batch, length, width),
    )


@pytest.mark.parametrize(("batch", "length", "half"), [(2, 1, 3), (1, 34, 3)])
def test_inner(judge, draw_inner, batch, length, half):
    compare(
        judge,
        INNER,
        triton_inner.run,
        functools.partial(mamba_inner, scan_backend="reference", conv_backend="reference"),
        draw_inner(batch, length, half, states=2),
        torch.randn(batch, length, 2 * half),
    )


@pytest.mark.parametrize("x", [-90.0, -20.0, -7.0, -1.0, 0.0, 1e-3, 1.0, 20.0, 90.0])
def test_softplus_keeps_its_digits(x):
    """Where the output is the step size: one token, with u = B = C = 1 and no D."""
    ones = torch.ones(1, 1, 1, device=DEVICE)
    delta = torch.full((1, 1, 1), x, device=DEVICE)
    A = -torch.ones(1, 1, device=DEVICE)
    y = triton_scan.run(ones, delta, A, ones, ones, None, None, delta_softplus=True)
    expected = F.softplus(torch.tensor(x, dtype=torch.float64)).item()
    assert y.item() == pytest.approx(expected, rel=1e-6, abs=0 if x > -80 else 1e-37)


def test_the_operators_are_well_formed(draw_inner):
    """Schemas, fake tensors, autograd and tracing, as torch.library wants them."""
    inputs = [x.to(DEVICE).requires_grad_() for x in draw_scan(1, 5, 3, 2)]
    torch.library.opcheck(torch.ops.mamba_vision.selective_scan.default, (*inputs, True))
    x, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((1, 5, 3), (3, 3)))
    torch.library.opcheck(torch.ops.mamba_vision.depthwise_conv1d_silu.default, (x, weight))
    inputs = [x.to(DEVICE).requires_grad_() for x in draw_inner(1, 5, 3, states=2)]
    torch.library.opcheck(torch.ops.mamba_vision.mamba_inner.default, tuple(inputs))


def test_modes_see_the_operators():
    """Fake tensors can go where the kernels could not take them."""
    with FakeTensorMode():
        x, weight = (torch.empty(s, requires_grad=True) for s in ((2, 5, 3), (3, 3)))
        y = triton_conv1d.run(x, weight)
        gradients = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    assert [g.shape for g in (y, *gradients)] == [x.shape, x.shape, weight.shape]


def test_a_second_derivative_is_refused():
    x, weight = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((1, 5, 3), (3, 3)))
    y = triton_conv1d.run(x, weight)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def window_stage(dim, dtype=torch.float32, **options):
    stage = WindowStage(
        dim,
        [0.0, 0.0],
        num_heads=2,
        window_size=4,
        window_padding="full",
        mlp_ratio=2.0,
        layer_scale=None,
        downsample=True,
        **{
            "activation_checkpointing": False,
            "skip_padding": True,
            "scan_backend": None,
            "conv_backend": None,
            "norm_backend": None,
            "linear_backend": None,
            "attention_backend": None,
            "cuda_graphs": False,
            **options,
        },
    )
    return stage.to(DEVICE, dtype)


def test_the_operators_compile_whole(monkeypatch):
    for module in (triton_scan, triton_conv1d):
        monkeypatch.setattr(module, "obstacle", lambda *_, **__: None)
    u, delta, A, B, C, D, bias = (x.to(DEVICE) for x in draw_scan(1, 5, 3, 2))
    weight = torch.randn(3, 3, device=DEVICE)

    def both(u, weight):
        u = depthwise_conv1d_silu(u, weight, backend="triton")
        return selective_scan(u, delta, A, B, C, D, bias)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, weight), both(u, weight))


@pytest.mark.slow
def test_a_window_stage_compiles_whole(monkeypatch):
    """No graph break, and equal numbers; here too the choice falls on Triton."""
    for module in (triton_support, triton_conv1d, triton_linear):
        monkeypatch.setattr(module, "obstacle", lambda *_, **__: None)
    stage = window_stage(16)
    x = torch.randn(1, 16, 3, 4, device=DEVICE)

    def outcome(function):
        stage.zero_grad()
        feature, after = function(x)
        (feature.square().sum() + after.sum()).backward()
        return [feature.detach(), after.detach(), *(p.grad.clone() for p in stage.parameters())]

    torch._dynamo.reset()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for one, other in zip(outcome(compiled), outcome(stage)):
        torch.testing.assert_close(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_inputs_give_equal_results(draw_inner, dtype):
    inputs = [x.to(DEVICE) for x in draw_inner(2, 3136, 160, dtype=dtype)]
    weights = torch.randn(2, 3136, 320, device=DEVICE)
    first, *others = (differentiate(triton_inner.run, inputs, weights) for _ in range(3))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other))


@pytest.mark.cuda
def test_cuda_graph(check_replay, draw_inner):
    inputs = [x.to(DEVICE).requires_grad_() for x in draw_inner(1, 500, 40)]
    weights = torch.randn(1, 500, 80, device=DEVICE)

    def step():
        return torch.autograd.grad((triton_inner.run(*inputs) * weights).sum(), inputs)

    check_replay(step, inputs)


@pytest.mark.cuda
def test_activation_checkpointing(draw_inner):
    inputs = [x.to(DEVICE) for x in draw_inner(2, 196, 40, dtype=torch.float16)]
    weights = torch.randn(2, 196, 80, device=DEVICE)
    expected = differentiate(mamba_inner, inputs, weights)
    results = differentiate(
        lambda *x: checkpoint(mamba_inner, *x, use_reentrant=False), inputs, weights
    )
    assert all(torch.equal(one, other) for one, other in zip(results, expected))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_window_stage_under_inductor(dtype):
    stage = window_stage(64)
    x = torch.randn(2, 64, 14, 10, device=DEVICE)

    def outcome(function, dtype):
        stage.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            feature, after = function(x)
        (feature.float().square().sum() + after.float().sum()).backward()
        return [feature.detach(), after.detach(), *(p.grad.clone() for p in stage.parameters())]

    torch._dynamo.reset()
    results = outcome(torch.compile(stage, fullgraph=True), dtype)
    expected, exact = outcome(stage, dtype), outcome(stage, torch.float32)
    for result, wanted, truth in zip(results, expected, exact):
        slack = 1e-4 if dtype == torch.float32 else 5e-3
        allowed = 2 * (wanted - truth).abs().max() + slack * truth.abs().max()
        assert (result - truth).abs().max() <= allowed


@pytest.mark.cuda
def test_auto_takes_triton_on_a_gpu():
    inputs = [x.to(DEVICE) for x in draw_scan(1, 70, 24)]
    expected = selective_scan(*inputs, backend="triton")
    assert torch.equal(selective_scan(*inputs), expected)
    assert torch.equal(selective_scan(*inputs, backend="auto"), expected)


@pytest.mark.parametrize(
    ("device", "dtypes", "reason"),
    [
        ("cpu", (torch.float32,), "needs tensors on a CUDA device, these are on cpu"),
        (
            "cuda",
            (torch.float16, torch.float64),
            "takes float32, float16 and bfloat16, not torch.f",
        ),
    ],
)
def test_what_it_cannot_take(device, dtypes, reason):
    assert reason in triton_support.obstacle(torch.device(device), dtypes)
    assert reason in triton_scan.obstacle(torch.device(device), dtypes, states=8)


def test_it_holds_sixteen_states():
    reason = triton_scan.obstacle(torch.device("cuda"), (torch.float32,), states=17)
    assert reason == "it holds at most 16 state numbers per channel, not 17"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "it needs a GPU of compute capability 8.0 or newer, An old one has 7.5"),
        ((8, 0), None),
        ((9, 0), None),
    ],
)
def test_old_gpus_fall_back(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old one")
    triton_support._obstacle_of_machine.cache_clear()
    found = triton_support.obstacle(torch.device("cuda"), (torch.float32,))
    triton_support._obstacle_of_machine.cache_clear()
    assert found == reason


def test_old_versions_of_triton_fall_back(monkeypatch):
    """What they cannot import is passed over, with the reason."""
    spec = importlib.util.spec_from_file_location("on_old_triton", triton_support.__file__)
    monkeypatch.setattr(triton_support.triton, "__version__", "3.1.0")
    with pytest.raises(ImportError, match=r"needs Triton 3\.3 or newer, .* not 3\.1\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
