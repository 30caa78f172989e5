"""Every backend of the selective scan against its definition in float64, with all gradients."""

import functools

import pytest
import torch
import torch.nn.functional as F

from mamba_vision.ops import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
RESULTS = ("y", *(f"gradient of {name}" for name in NAMES))
LENGTHS = (1, 2, 63, 64, 65, 196, 1000, 3136)
WIDTHS = (3, 60, 160)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = (
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("torch", "cuda", id="torch-cuda", marks=pytest.mark.cuda),
    pytest.param("mamba_ssm", "cuda", id="mamba_ssm-cuda", marks=pytest.mark.cuda),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.cuda),
)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def draw(batch, length, width, states=8, dtype=torch.float32, seed=0):
    """Inputs in the order of the operator's arguments; what autocast leaves alone is float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=generator, dtype=exact).to(dtype)

    weights = torch.float64 if dtype == torch.float64 else torch.float32
    rates = torch.arange(1, states + 1, dtype=weights).repeat(width, 1)
    return (
        normal(batch, length, width),
        normal(batch, length, width) - 2,
        -rates * torch.exp(0.3 * normal(width, states, dtype=weights)),
        normal(batch, length, states),
        normal(batch, length, states),
        normal(width, dtype=weights),
        0.5 * normal(width, dtype=weights),
    )


def differentiate(inputs, weights, **options):
    """y, and the gradients of (y * weights).sum() for every input, by a backend; all on the CPU."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = selective_scan(*inputs, **options)
    y.backward(weights.to(y))
    return [y.detach().cpu(), *(x.grad.cpu() for x in inputs if x is not None)]


@functools.cache
def case(batch, length, width, states=8, dtype=torch.float32):
    """Inputs, weights of the outputs, the truth in float64, plain PyTorch's results."""
    inputs = draw(batch, length, width, states, dtype)
    weights = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    exact = [x.double() for x in inputs]
    truth = differentiate(exact, weights.double(), backend="reference")
    return inputs, weights, truth, differentiate(inputs, weights, backend="reference")


def measures(backend, inputs, weights):
    """What the backend's roundings are to be measured by, where it is not the result itself.

    mamba-ssm takes the decayed state, exp(delta_t A) h_(t-1), as h_t - delta_t B_t u_t,
    so its gradients of A and of the step size carry roundings of h_t: their measures are the sums
    over t of |delta_t dL/dh_t h_t| and over t and n of |A dL/dh_t h_t|, which the true gradients
    can be far below.
    """
    if backend != "mamba_ssm":
        return {}
    u, delta, A, B, C, _, bias = (x.double() for x in inputs)
    delta = F.softplus(delta + bias)
    decays = torch.exp(delta[..., None] * A)
    drives, reads = (delta * u)[..., None] * B[:, :, None], weights[..., None] * C[:, :, None]
    states, state = [], torch.zeros_like(drives[:, 0])
    for decay, drive in zip(decays.unbind(1), drives.unbind(1)):
        states.append(state := decay * state + drive)
    of_A, of_bias, adjoint = 0, 0, torch.zeros_like(state)
    for t in reversed(range(len(states))):
        adjoint = reads[:, t] + adjoint
        of_A = of_A + (delta[:, t, :, None] * adjoint * states[t]).abs()
        of_bias = of_bias + (A * adjoint * states[t]).abs().sum(-1)
        adjoint = decays[:, t] * adjoint
    return {
        "gradient of A": of_A.sum(0).max(),
        "gradient of delta_bias": of_bias.sum(0).max(),
    }


def same(device, result, expected):
    """Bit for bit on a CPU; a GPU may add up in another order."""
    assert result.dtype == expected.dtype
    torch.testing.assert_close(
        result, expected, **({"rtol": 0, "atol": 0} if device == "cpu" else CLOSE)
    )


def on(device, tensors):
    return [None if x is None else x.to(device) for x in tensors]


def test_reference_is_the_unrolled_sum():
    """y_t = D u_t + sum over s <= t of C_t exp(A (delta_(s+1) + ... + delta_t)) delta_s B_s u_s."""
    u, delta, A, B, C, D, bias = draw(2, 9, 3, 4, torch.float64)
    step = torch.log1p(torch.exp(delta + bias))
    total = step.cumsum(1)
    expected = D * u
    for t in range(9):
        for s in range(t + 1):
            decay = torch.exp(A * (total[:, t] - total[:, s])[..., None])  # (B, D, N)
            path = (C[:, t] * B[:, s])[:, None] * decay
            expected[:, t] += path.sum(-1) * step[:, s] * u[:, s]
    y = selective_scan(u, delta, A, B, C, D, bias, backend="reference")
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
@every_backend
def test_agrees_with_the_definition(judge, backend, device, length, width, dtype):
    inputs, weights, truth, plain = case(1, length, width, dtype=dtype)
    results = differentiate(on(device, inputs), weights.to(device), backend=backend)
    judge(RESULTS, results, truth, plain, measures(backend, inputs, weights))


@pytest.mark.parametrize("states", [1, 3, 16])
@pytest.mark.parametrize("batch", [2, 33])
@every_backend
def test_other_batches_and_state_sizes(judge, backend, device, batch, states):
    inputs, weights, truth, plain = case(batch, 97, 24, states)
    results = differentiate(on(device, inputs), weights.to(device), backend=backend)
    judge(RESULTS, results, truth, plain)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "missing", [(), ("D",), ("delta_bias",), ("D", "delta_bias")], ids="-".join
)
@every_backend
def test_options(judge, backend, device, missing, softplus):
    inputs = list(draw(2, 150, 24))
    if not softplus:
        inputs[1] = F.softplus(inputs[1])
        inputs[6] = inputs[6].abs()
    inputs = [None if name in missing else x for name, x in zip(NAMES, inputs)]
    weights = torch.randn(2, 150, 24)
    exact = [None if x is None else x.double() for x in inputs]
    truth, plain, results = (
        differentiate(tensors, weights.to(tensors[0]), delta_softplus=softplus, backend=name)
        for tensors, name in (
            (exact, "reference"),
            (inputs, "reference"),
            (on(device, inputs), backend),
        )
    )
    names = ["y", *(f"gradient of {name}" for name in NAMES if name not in missing)]
    judge(names, results, truth, plain)


@every_backend
def test_strided_views(backend, device):
    """Halves and columns of wider tensors give what copies of them give."""
    length, width, states = 100, 24, 8
    wide = torch.randn(2, length, 2 * width, device=device)
    steps = torch.randn(2, length, 3 * width, device=device)
    columns = torch.randn(2, length, 5 + 2 * states, device=device)
    _, _, A, _, _, D, bias = on(device, draw(2, length, width, states))

    def outcome(copy):
        sources = [x.clone().requires_grad_() for x in (wide, steps, columns)]
        u, delta = sources[0][..., :width], sources[1][..., ::3]
        _, B, C = sources[2].split([5, states, states], dim=-1)
        tensors = [x.contiguous() if copy else x for x in (u, delta, B, C)]
        y = selective_scan(tensors[0], tensors[1], A, *tensors[2:], D, bias, backend=backend)
        y.square().sum().backward()
        return y, *(x.grad for x in sources)

    for view, copied in zip(outcome(copy=False), outcome(copy=True)):
        same(device, view, copied)


@every_backend
def test_autocast_changes_nothing(backend, device):
    inputs = on(device, draw(2, 100, 24))
    weights = torch.randn(2, 100, 24, device=device)
    expected = differentiate(inputs, weights, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = differentiate(inputs, weights, backend=backend)
    for result, wanted in zip(results, expected):
        same(device, result, wanted)


@every_backend
def test_mixed_dtypes(judge, backend, device):
    """Each gradient comes in its own tensor's dtype, and a wider tensor is not rounded to u's."""
    inputs, weights = list(draw(2, 100, 24)), torch.randn(2, 100, 24)
    inputs[0], inputs[3] = inputs[0].half(), inputs[3].bfloat16()
    exact = [x.double() for x in inputs]
    truth = differentiate(exact, weights.half().double(), backend="reference")
    plain = differentiate(inputs, weights, backend="reference")
    results = differentiate(on(device, inputs), weights.to(device), backend=backend)
    judge(RESULTS, results, truth, plain)


@pytest.mark.parametrize("shift", [20, -20])
@every_backend
def test_large_steps_in_half_precision(judge, backend, device, shift):
    """Steps of 20 and of softplus(-20) neither overflow nor turn to NaN."""
    inputs = list(draw(1, 200, 24, dtype=torch.float16))
    inputs[1] = torch.full_like(inputs[1], shift)
    weights = torch.randn(1, 200, 24).half()
    truth, plain, results = (
        differentiate(tensors, weights.to(tensors[0]), backend=name)
        for tensors, name in (
            ([x.double() for x in inputs], "reference"),
            (inputs, "reference"),
            (on(device, inputs), backend),
        )
    )
    judge(RESULTS, results, truth, plain, measures(backend, inputs, weights))


@every_backend
def test_only_the_gradients_asked_for(backend, device):
    inputs = on(device, draw(1, 70, 8))
    weights = torch.randn(1, 70, 8, device=device)
    expected = dict(zip(RESULTS, differentiate(inputs, weights, backend=backend)))
    for index, name in enumerate(NAMES):
        chosen = [x.detach().requires_grad_(k == index) for k, x in enumerate(inputs)]
        selective_scan(*chosen, backend=backend).backward(weights)
        assert [x.grad is not None for x in chosen] == [k == index for k in range(len(NAMES))]
        torch.testing.assert_close(
            chosen[index].grad.cpu(), expected[f"gradient of {name}"], **CLOSE
        )


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend, length):
    inputs = [x.requires_grad_() for x in draw(2, length, 2, 3, torch.float64)]
    scan = functools.partial(selective_scan, backend=backend)
    assert torch.autograd.gradcheck(scan, inputs, fast_mode=length > 5)


def test_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in draw(1, 5, 2, 3)]
    y = selective_scan(*inputs, backend="torch")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_keeps_inputs_and_chunk_states_only():
    length, width, states = 3136, 40, 8
    inputs = [x.requires_grad_() for x in draw(1, length, width, states)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*inputs, backend="torch")
    others = [x for x in kept if not any(x.data_ptr() == y.data_ptr() for y in inputs)]
    assert len(kept) == len(inputs) + len(others)
    assert sum(x.numel() for x in others) <= length * width * states / 16


def test_without_gradients_nothing_is_kept():
    y = selective_scan(*draw(1, 70, 8), backend="torch")
    assert y.grad_fn is None


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("delta", (2, 7, 5), r"delta must have shape \(B, L, D\) with B = 2, L = 7, D = 4"),
        ("A", (4,), r"A must have shape \(D, N\) with D = 4, not \(4,\)"),
        (
            "C",
            (2, 3, 7),
            r"C must have shape \(B, L, N\) with B = 2, L = 7, N = 3, not \(2, 3, 7\)",
        ),
        ("D", (1,), r"D must have shape \(D\) with D = 4, not \(1,\)"),
        ("delta_bias", (4, 1), r"delta_bias must have shape \(D\) with D = 4, not \(4, 1\)"),
    ],
)
def test_wrong_shapes(name, shape, message):
    inputs = dict(zip(NAMES, draw(2, 7, 4, 3)))
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_complex_rates_are_refused():
    inputs = dict(zip(NAMES, draw(2, 7, 4, 3)))
    inputs["A"] = inputs["A"].to(torch.complex64)
    with pytest.raises(TypeError, match="A must hold real floating-point numbers"):
        selective_scan(**inputs)
