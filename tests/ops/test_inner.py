"""The inside of the mixer, fused and composed, against its equations in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba_vision.errors import UserError
from mamba_vision.ops import inner, mamba_inner

NAMES = ("xz", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A", "D")
RESULTS = ("y", *(f"gradient of {name}" for name in NAMES))
BACKENDS = (
    pytest.param("torch", "torch", "cpu", id="torch-cpu"),
    pytest.param("torch", "torch", "cuda", id="torch-cuda", marks=pytest.mark.cuda),
    pytest.param("mamba_ssm", "torch", "cuda", id="mamba_ssm-cuda", marks=pytest.mark.cuda),
    pytest.param("triton", "triton", "cuda", id="triton-cuda", marks=pytest.mark.cuda),
)
every_backend = pytest.mark.parametrize(("scan", "conv", "device"), BACKENDS)


def by_definition(xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D):
    """The equations, token after token."""

    def convolved(half, weight):
        padded = F.pad(half, (0, 0, 1, 1))
        sums = sum(weight[:, i] * padded[:, i : i + half.shape[1]] for i in range(3))
        return sums / (1 + torch.exp(-sums))

    half, rank, states = len(D), dt_proj.shape[1], A.shape[1]
    x, z = convolved(xz[..., :half], conv_x), convolved(xz[..., half:], conv_z)
    columns = x @ x_proj.T
    delta = F.softplus(columns[..., :rank] @ dt_proj.T + dt_bias + dt_bias)
    h, ys = 0, []
    for t in range(x.shape[1]):
        B, C = columns[:, t, rank : rank + states], columns[:, t, rank + states :]
        drive = (delta[:, t] * x[:, t])[..., None] * B[:, None]
        h = torch.exp(delta[:, t, :, None] * A) * h + drive
        ys.append((h * C[:, None]).sum(-1) + D * x[:, t])
    return torch.cat((torch.stack(ys, 1), z), -1)


def differentiate(function, inputs, weights):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(weights.to(y))
    return [y.detach().cpu(), *(x.grad.cpu() for x in inputs)]


def run(scan, conv):
    return lambda *inputs: mamba_inner(*inputs, scan_backend=scan, conv_backend=conv)


@pytest.mark.parametrize(("half", "rank"), [(3, 1), (24, 2), (160, 20)])
@pytest.mark.parametrize("length", [1, 2, 65, 196])
@every_backend
def test_agrees_with_the_equations(judge, draw_inner, scan, conv, device, length, half, rank):
    inputs, weights = draw_inner(2, length, half, rank), torch.randn(2, length, 2 * half)
    truth = differentiate(by_definition, [x.double() for x in inputs], weights.double())
    plain = differentiate(run("reference", "reference"), inputs, weights)
    results = differentiate(run(scan, conv), [x.to(device) for x in inputs], weights.to(device))
    judge(RESULTS, results, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 2.0**16])
@pytest.mark.parametrize(("scan", "conv", "device"), BACKENDS[1:])
def test_autocast(judge, draw_inner, scan, conv, device, dtype, scale):
    """Also with the loss scaled, as GradScaler scales it."""
    inputs = draw_inner(2, 300, 40, dtype=dtype)
    weights = torch.randn(2, 300, 80) / 2**14
    truth = differentiate(by_definition, [x.double() for x in inputs], scale * weights.double())
    on_device = [x.to(device) for x in inputs]

    def under_autocast(*backends):
        def function(*tensors):
            with torch.autocast(device, dtype=dtype):
                return run(*backends)(*tensors)

        return differentiate(function, on_device, scale * weights.to(device))

    plain = under_autocast("reference", "reference")
    judge(RESULTS, under_autocast(scan, conv), truth, plain)


def test_what_is_fused_and_what_is_composed(draw_inner, monkeypatch):
    """Both operators by Triton: one operator; otherwise each goes where it was sent."""
    seen = []
    monkeypatch.setattr(inner.SCAN_BACKENDS, "name_for", lambda asked, *_, **__: asked)
    monkeypatch.setattr(inner.CONV_BACKENDS, "name_for", lambda asked, *_, **__: asked)
    fused = type("fused", (), {"run": staticmethod(lambda *x: seen.append("fused") or x[0])})
    monkeypatch.setattr(inner, "triton_inner", fused, raising=False)
    monkeypatch.setattr(
        inner, "selective_scan", lambda u, *_, backend, **__: seen.append(backend) or u
    )
    monkeypatch.setattr(
        inner, "depthwise_conv1d_silu", lambda x, _, backend: seen.append(backend) or x
    )
    inputs = draw_inner(1, 5, 8)
    run("triton", "triton")(*inputs)
    assert seen == ["fused"]
    seen.clear()
    run("mamba_ssm", "triton")(*inputs)
    assert seen == ["triton", "triton", "mamba_ssm"]


def test_a_missing_backend_is_an_error(draw_inner):
    with pytest.raises(UserError, match=r"'triton' \(given by argument\) cannot be used"):
        run("triton", "torch")(*draw_inner(1, 5, 8))
