import pytest
import torch

from mamba_vision.backbone import mixer as mixer_module
from mamba_vision.backbone.mixer import MambaVisionMixer


def _by_definition(mixer: MambaVisionMixer, tokens: torch.Tensor) -> torch.Tensor:
    """The mixer's equations in float64, one token at a time; tokens (L, C) -> (L, C)."""
    p = {name: value.detach().double() for name, value in mixer.state_dict().items()}
    length, channels = tokens.shape
    half, states = channels // 2, 8
    rank = -(-channels // 16)

    def convolved(values, weight):
        padded = torch.cat((values.new_zeros(1, half), values, values.new_zeros(1, half)))
        sums = torch.stack([(padded[t : t + 3] * weight[:, 0].T).sum(0) for t in range(length)])
        return sums / (1 + torch.exp(-sums))

    projected = tokens @ p["in_proj.weight"].T
    x = convolved(projected[:, :half], p["conv1d_x.weight"])
    z = convolved(projected[:, half:], p["conv1d_z.weight"])
    dt_b_c = x @ p["x_proj.weight"].T
    bias = p["dt_proj.bias"]
    h = torch.zeros(half, states, dtype=torch.float64)
    ys = []
    for t in range(length):
        dt, b, c = dt_b_c[t, :rank], dt_b_c[t, rank : rank + states], dt_b_c[t, rank + states :]
        delta = torch.log1p(torch.exp(p["dt_proj.weight"] @ dt + bias + bias))
        decay = torch.exp(-delta[:, None] * torch.exp(p["A_log"]))
        h = decay * h + delta[:, None] * b * x[t, :, None]
        ys.append(h @ c + p["D"] * x[t])
    return torch.cat((torch.stack(ys), z), dim=1) @ p["out_proj.weight"].T


def _random(dim: int) -> MambaVisionMixer:
    mixer = MambaVisionMixer(dim)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("dim", [16, 40])  # ranks 1 and 3
@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_agrees_with_the_equations(dim, length, dtype, tolerance):
    mixer = _random(dim).to(dtype)
    x = torch.randn(2, length, dim, dtype=dtype)
    expected = torch.stack([_by_definition(mixer, tokens.double()) for tokens in x])
    y = mixer(x)
    assert y.dtype is dtype
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("half_weights", [False, True])
def test_decay_stays_in_float32(half_weights, monkeypatch):
    seen = []

    def inner(xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A, D, **options):
        seen.append(A.dtype)
        return xz

    monkeypatch.setattr(mixer_module, "mamba_inner", inner)
    mixer, x = _random(16), torch.randn(1, 5, 16)
    if half_weights:
        mixer.bfloat16()(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            mixer(x)
    assert seen == [torch.float32]


def test_passes_the_backends_on(monkeypatch):
    seen = {}

    def inner(xz, *others, **options):
        seen.update(options)
        return xz

    monkeypatch.setattr(mixer_module, "mamba_inner", inner)
    MambaVisionMixer(16, scan_backend="one", conv_backend="two")(torch.randn(1, 5, 16))
    assert seen == {"scan_backend": "one", "conv_backend": "two"}


def test_initial_values():
    mixer = MambaVisionMixer(32)
    expected = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    torch.testing.assert_close(mixer.A_log.exp(), expected.expand(16, 8))
    assert torch.equal(mixer.D, torch.ones(16))
