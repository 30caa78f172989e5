"""Every backend of the depthwise convolution with SiLU against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba_vision.ops import depthwise_conv1d_silu

RESULTS = ("y", "gradient of x", "gradient of weight")
BACKENDS = (
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("torch", "cuda", id="torch-cuda", marks=pytest.mark.cuda),
    pytest.param("causal_conv1d", "cuda", id="causal_conv1d-cuda", marks=pytest.mark.cuda),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.cuda),
)
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def differentiate(x, weight, weights, **options):
    """y, and the gradients of (y * weights).sum() for both inputs, by a backend; all on the CPU."""
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    y = depthwise_conv1d_silu(x, weight, **options)
    y.backward(weights.to(y))
    return [y.detach().cpu(), x.grad.cpu(), weight.grad.cpu()]


def test_reference_by_hand():
    """Channel 0 takes the token before, channel 1 the difference of the tokens around."""
    x = torch.tensor([[[1.0, 1.0], [2.0, 3.0], [4.0, 7.0]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    convolved = torch.tensor([[[0.0, 3.0], [1.0, 6.0], [2.0, -3.0]]], dtype=torch.float64)
    y = depthwise_conv1d_silu(x, weight, backend="reference")
    torch.testing.assert_close(y, convolved / (1 + torch.exp(-convolved)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[len("torch.") :]
)
@pytest.mark.parametrize("width", [3, 60, 160])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 196, 1000, 3136])
@every_backend
def test_agrees_with_the_definition(judge, backend, device, length, width, dtype):
    x, weights = torch.randn(2, 2, length, width).to(dtype)
    weight = torch.randn(width, 3).to(dtype)
    truth = differentiate(x.double(), weight.double(), weights.double(), backend="reference")
    plain = differentiate(x, weight, weights, backend="reference")
    results = differentiate(*(t.to(device) for t in (x, weight, weights)), backend=backend)
    judge(RESULTS, results, truth, plain)


@pytest.mark.parametrize("width", [24, 30])
@every_backend
def test_strided_views(backend, device, width):
    """Halves of a wider tensor give what copies of them give."""
    wide = torch.randn(2, 100, 2 * width, device=device)
    weight = torch.randn(width, 3, device=device)

    def outcome(copy):
        source = wide.clone().requires_grad_()
        halves = (half.contiguous() if copy else half for half in source.chunk(2, dim=-1))
        y = [depthwise_conv1d_silu(half, weight, backend=backend) for half in halves]
        sum(half.square().sum() for half in y).backward()
        return *y, source.grad

    for view, copied in zip(outcome(copy=False), outcome(copy=True)):
        torch.testing.assert_close(view, copied, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_autocast_keeps_the_dtype(judge, backend, device, dtype):
    """The weights stay float32 under autocast, and so does their gradient; y has x's dtype."""
    x, weights = torch.randn(2, 2, 50, 24).to(dtype)
    weight = torch.randn(24, 3)
    truth = differentiate(x.double(), weight.double(), weights.double(), backend="reference")
    plain = differentiate(x, weight, weights, backend="reference")
    with torch.autocast(device, dtype=torch.bfloat16):
        results = differentiate(*(t.to(device) for t in (x, weight, weights)), backend=backend)
    judge(RESULTS, results, truth, plain)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    x, weight = torch.randn(2, 5, 3).double(), torch.randn(3, 3).double()
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv1d_silu(*t, backend=backend), inputs)


def test_is_pytorchs_convolution():
    x, weight = torch.randn(2, 9, 4).double(), torch.randn(4, 3).double()
    expected = F.silu(F.conv1d(x.mT, weight[:, None], padding="same", groups=4)).mT
    torch.testing.assert_close(depthwise_conv1d_silu(x, weight, backend="reference"), expected)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"weight must have shape \(D, W\) with D = 4, W = 3"):
        depthwise_conv1d_silu(torch.zeros(2, 5, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, L, D\), not \(5, 4\)"):
        depthwise_conv1d_silu(torch.zeros(5, 4), torch.zeros(4, 3))
