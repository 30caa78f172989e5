"""Every backend of the linear layer and the MLP against their definitions in float64.

Without a GPU the Triton kernels run in Triton's interpreter, which takes them one by one.
"""

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba_vision.errors import UserError
from mamba_vision.ops import linear, mlp
from mamba_vision.ops.linear import BACKENDS, torch_linear, triton_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.cuda]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.cuda,  # Triton's interpreter cuts bfloat16 off instead of rounding
    ),
]
every_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(torch_linear, "cpu", id="torch-cpu"),
        pytest.param(torch_linear, "cuda", id="torch-cuda", marks=GPU),
        pytest.param(triton_linear, DEVICE, id="triton"),
    ],
)
either = pytest.mark.parametrize("hidden", [None, 50], ids=["linear", "mlp"])


def operator(*tensors, **options):
    return (linear if len(tensors) == 3 else mlp)(*tensors, **options)


def names_of(inputs):
    one, two = ("x", "weight", "bias"), ("x", "weight_1", "bias_1", "weight_2", "bias_2")
    return one if len(inputs) == 3 else two


def by_definition(x, weight, bias, *second):
    y = torch.einsum("...c,oc->...o", x, weight) + bias
    return by_definition(y * (1 + torch.erf(y / math.sqrt(2))) / 2, *second) if second else y


def draw(*shape, hidden, out=None, dtype=torch.float32, device=DEVICE):
    """Inputs in the order of the operator's arguments, those of a linear layer if ``hidden`` is
    None; the hidden numbers are about 1 to 3."""
    channels = shape[-1]
    widths = [channels, *([hidden] if hidden else []), out or channels]
    inputs = [torch.randn(shape)]
    for before, after in pairwise(widths):
        inputs += [1.5 * torch.randn(after, before) / before**0.5, torch.randn(after)]
    return [x.to(device, dtype) for x in inputs]


def differentiate(function, inputs, weights):
    """The result, and the gradients of its product with weights."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(weights.to(y))
    return [y.detach(), *(x.grad for x in inputs)]


def compare(judge, function, inputs):
    """With what the definition gives in float64, by the error of PyTorch's own operators."""
    weights = torch.randn(*inputs[0].shape[:-1], len(inputs[-1]), device=inputs[0].device)
    truth = differentiate(by_definition, [x.double() for x in inputs], weights)
    judge(
        ["y", *(f"gradient of {name}" for name in names_of(inputs))],
        differentiate(function, inputs, weights),
        [x.cpu() for x in truth],
        differentiate(torch_linear.run, inputs, weights),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [
        ((1, 1), None, 1),
        ((37, 24), None, 72),
        ((2, 19, 7), None, 300),
        ((24,), None, 24),
        ((1, 1), 1, 1),
        ((37, 24), 50, 24),
        ((2, 19, 7), 129, 300),
        ((24,), 96, 24),
    ],
)
def test_triton_agrees_with_the_definition(judge, shape, hidden, out, dtype):
    compare(judge, triton_linear.run, draw(*shape, hidden=hidden, out=out, dtype=dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels"), [(25088, 320), (6272, 640), (12345, 320), (700, 1568)]
)
@pytest.mark.parametrize(("hidden", "out"), [(None, 3), (4, 1)])  # over the channels
def test_triton_agrees_with_the_definition_at_full_size(
    judge, tokens, channels, hidden, out, dtype
):
    hidden = hidden and hidden * channels
    inputs = draw(tokens, channels, hidden=hidden, out=out * channels, dtype=dtype)
    compare(judge, triton_linear.run, inputs)


@either
def test_a_program_walks_over_many_rows(judge, monkeypatch, hidden):
    """Nine tiles, the last of five rows, by two blocks of columns, for six programs."""
    for name, value in (("ROWS", 8), ("COLUMNS", 32), ("PROGRAMS", 6)):
        monkeypatch.setattr(triton_linear, name, value)
    compare(judge, triton_linear.run, draw(69, 24, hidden=hidden, out=50))


@every_backend
def test_gelu_and_its_slope(backend, device):
    """At numbers of either sign and all magnitudes, each of them a hidden channel."""
    hidden = torch.cat((torch.linspace(-12, 12, 2001), torch.tensor([-1e15, -1e-30, 1e-30, 1e15])))
    inputs = [torch.ones(1, 1), torch.zeros(len(hidden), 1), hidden]
    inputs = [x.to(device) for x in (*inputs, torch.ones(1, len(hidden)), torch.zeros(1))]
    _, _, _, slopes, values, _ = differentiate(backend.run, inputs, torch.ones(1, 1))
    exact = hidden.double().requires_grad_()
    expected = exact * (1 + torch.erf(exact / math.sqrt(2))) / 2
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(values[0].cpu().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slopes.cpu().double(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@either
def test_torch_is_the_definition_in_float64(device, hidden):
    inputs = [x.double() for x in draw(2, 19, 24, hidden=hidden, out=30, device=device)]
    weights = torch.randn(2, 19, 30, device=device)
    results, truth = (differentiate(f, inputs, weights) for f in (operator, by_definition))
    for result, expected in zip(results, truth):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@every_backend
def test_a_layer_by_hand(backend, device):
    inputs = [[[1.0, 2.0], [3.0, -1.0]], [[1.0, 0.0], [2.0, -1.0]], [0.0, 10.0]]
    inputs = [torch.tensor(t, device=device) for t in inputs]
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    y, dx, dweight, dbias = differentiate(backend.run, inputs, weights)
    assert y.tolist() == [[1, 10], [3, 17]]
    assert dx.tolist() == [[21, -10], [2100, -1000]]
    assert dweight.tolist() == [[301, -98], [3010, -980]]
    assert dbias.tolist() == [101, 1010]


@every_backend
def test_an_mlp_by_hand(backend, device):
    """Hidden numbers 0, 1 and -1, of which the GELU makes 0, 0.84134 and -0.15866."""
    x, weight_1, bias_1 = [[2.0]], [[0.0], [1.0], [0.0]], [0.0, -1.0, -1.0]
    weight_2, bias_2 = [[9.0, 1.0, 0.0], [9.0, 0.0, 1.0]], [0.0, 1.0]
    inputs = [torch.tensor(t, device=device) for t in (x, weight_1, bias_1, weight_2, bias_2)]
    inputs[0].requires_grad_()
    y = backend.run(*inputs)
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.8413447, 0.8413447]]))
    y[0, 0].backward()  # the slope at 1 is 0.84134 + 0.24197
    torch.testing.assert_close(inputs[0].grad.cpu(), torch.tensor([[1.0833155]]))


@every_backend
@either
def test_strided_views(backend, device, hidden):
    """Views, whose rows lie apart or whose numbers do, give what copies of them give."""
    wide = torch.randn(6, 4, 24, device=device)
    weights = draw(12, hidden=hidden, device=device)[1:]

    def outcome(view, copy):
        leaf = wide.clone().requires_grad_()
        x = view(leaf)
        y = backend.run(x.contiguous() if copy else x, *weights)
        y[..., 1::2].pow(3).sum().backward()
        return y, leaf.grad

    views = (lambda t: t[..., 12:], lambda t: t[:, 1, :12], lambda t: t[..., ::2])
    for view in views:
        for one, other in zip(outcome(view, False), outcome(view, True)):
            torch.testing.assert_close(one, other)


@every_backend
@either
def test_a_gradient_that_is_one_number_everywhere(backend, device, hidden):
    """What a sum gives: a view without strides."""
    inputs = [x.requires_grad_() for x in draw(37, 24, hidden=hidden, device=device)]
    backend.run(*inputs).sum().backward()
    expected = differentiate(by_definition, [x.double() for x in inputs], torch.ones(37, 24))[1:]
    for x, gradient in zip(inputs, expected):
        torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
@either
def test_no_tokens(backend, device, shape, hidden):
    inputs = draw(*shape, hidden=hidden, out=30, device=device)
    y, dx, *others = differentiate(backend.run, inputs, torch.empty(*shape[:-1], 30))
    assert y.shape == (*shape[:-1], 30)
    assert dx.shape == shape
    for x, gradient in zip(inputs[1:], others):
        assert torch.equal(gradient, torch.zeros_like(x))


@every_backend
@pytest.mark.parametrize(
    ("hidden", "wanted"),
    [
        (hidden, wanted)
        for hidden, inputs in ((None, range(3)), (50, range(5)))
        for wanted in (*((i,) for i in inputs), inputs[1:], inputs[::2], ())
    ],
)
def test_inputs_without_gradients(backend, device, hidden, wanted):
    inputs, weights = draw(5, 24, hidden=hidden, device=device), torch.randn(5, 24)
    expected = differentiate(backend.run, inputs, weights)
    for i, x in enumerate(inputs):
        x.requires_grad_(i in wanted)
    y = backend.run(*inputs)
    assert torch.equal(y, expected[0])
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(weights.to(y))
    for i, (x, gradient) in enumerate(zip(inputs, expected[1:])):
        if i in wanted:
            torch.testing.assert_close(x.grad, gradient)
        else:
            assert x.grad is None, i


@every_backend
@either
def test_without_gradients_it_gives_the_same(backend, device, hidden):
    inputs = [x.requires_grad_() for x in draw(37, 24, hidden=hidden, device=device)]
    expected = backend.run(*inputs)
    with torch.no_grad():
        y = backend.run(*inputs)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)


@either
def test_its_result_may_be_changed_in_place(hidden):
    inputs = draw(2, 5, 24, hidden=hidden)
    weights = torch.randn(2, 5, 24)
    expected = differentiate(lambda *x: torch_linear.run(*x) * 2, inputs, weights)
    results = differentiate(lambda *x: triton_linear.run(*x).mul_(2), inputs, weights)
    for one, other in zip(results, expected):
        torch.testing.assert_close(one, other)


@either
def test_what_is_kept_stays_as_it_is(hidden):
    """A second backward pass gives what the first one gave."""
    inputs = [x.requires_grad_() for x in draw(37, 24, hidden=hidden)]
    y = triton_linear.run(*inputs)
    first, second = (
        torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def kept(function, inputs):
    """The sizes of what a function keeps for its backward pass, inputs left out."""
    sizes = []
    known = {x.data_ptr() for x in inputs}

    def pack(x):
        if x.data_ptr() not in known:
            sizes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*[x.requires_grad_() for x in inputs])
    return sizes


def test_a_layer_keeps_nothing_but_inputs():
    assert kept(triton_linear.run, draw(37, 24, hidden=None)) == []


def test_the_hidden_numbers_are_kept_once():
    inputs = draw(37, 24, hidden=50)
    assert kept(torch_linear.run, inputs) == [(37, 50), (37, 50)]
    assert kept(triton_linear.run, inputs) == [(37, 50)]


@pytest.fixture
def on_triton(monkeypatch):
    """Let "auto" choose Triton, here perhaps interpreted."""
    monkeypatch.setattr(triton_linear, "obstacle", lambda *_, **__: None)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@either
def test_autocast(judge, on_triton, backend, dtype, hidden):
    """As PyTorch's own layers do: all is cast, and gradients have the dtypes of the inputs."""
    inputs = draw(3, 7, 24, hidden=hidden)
    inputs[0] = inputs[0].to(dtype)
    weights = torch.randn(3, 7, 24, device=DEVICE)

    def under_autocast(function):
        def call(*tensors):
            with torch.autocast(DEVICE, torch.float16):
                return function(*tensors)

        return call

    plain = under_autocast(torch_linear.run)
    chosen = under_autocast(functools.partial(operator, backend=backend))
    results = differentiate(chosen, inputs, weights)
    expected = differentiate(plain, inputs, weights)
    assert results[0].dtype == torch.float16
    assert [g.dtype for g in results[1:]] == [dtype, *[torch.float32] * len(inputs[1:])]
    if backend == "torch":
        assert all(torch.equal(one, other) for one, other in zip(results, expected))
    truth = differentiate(by_definition, [x.double() for x in inputs], weights)
    names = ["y", *(f"gradient of {name}" for name in names_of(inputs))]
    judge(names, results, [x.cpu() for x in truth], expected)


@either
def test_a_backward_pass_within_autocast(on_triton, hidden):
    """It runs in the dtype of the forward pass."""
    inputs, weights = draw(37, 24, hidden=hidden), torch.randn(37, 24, device=DEVICE)
    expected = differentiate(operator, inputs, weights)
    for x in inputs:
        x.requires_grad_()
    y = operator(*inputs)
    with torch.autocast(DEVICE, torch.float16):
        gradients = torch.autograd.grad(y, inputs, weights)
    for gradient, wanted in zip(gradients, expected[1:]):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("width", [16, 90])
def test_on_the_cpu_it_is_plain_pytorch(width):
    """Bit for bit, which is what fused_linear promises there."""
    layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    x = torch.randn(2, 5, width)
    weights = [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]
    assert torch.equal(mlp(x, *weights), layers(x))
    assert torch.equal(linear(x, *weights[:2]), layers[0](x))


def test_wrong_shapes_dtypes_and_backends_of_a_layer(on_triton):
    x, weight, bias = draw(3, 24, hidden=None, out=50)
    with pytest.raises(
        ValueError, match=r"weight must have .* with O = 24, C = 24, not \(24, 50\)"
    ):
        linear(x, weight.t(), bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(O\) with O = 50, not \(49,\)"):
        linear(x, weight, bias[1:])
    with pytest.raises(TypeError, match=r"must have one dtype, not torch\.float32, torch\.float16"):
        linear(x, weight.half(), bias)
    with pytest.raises(UserError, match="no backend is called 'nowhere'"):
        linear(x, weight, bias, backend="nowhere")


def test_wrong_shapes_dtypes_and_backends_of_an_mlp(on_triton):
    x, weight_1, bias_1, weight_2, bias_2 = draw(3, 24, hidden=50)
    with pytest.raises(
        ValueError, match=r"weight_1 must have .* with H = 50, C = 24, not \(50, 8\)"
    ):
        mlp(x, weight_1[:, :8], bias_1, weight_2, bias_2)
    with pytest.raises(ValueError, match=r"bias_1 must have shape \(H\) with H = 50, not \(49,\)"):
        mlp(x, weight_1, bias_1[1:], weight_2, bias_2)
    with pytest.raises(
        ValueError, match=r"weight_2 must have .* with O = 50, H = 50, not \(50, 24\)"
    ):
        mlp(x, weight_1, bias_1, weight_2.t(), bias_2)
    with pytest.raises(ValueError, match=r"bias_2 must have shape \(O\) with O = 24, not \(50,\)"):
        mlp(x, weight_1, bias_1, weight_2, bias_1)
    with pytest.raises(TypeError, match=r"must have one dtype, not torch\.float16, torch\.float32"):
        mlp(x.half(), weight_1, bias_1, weight_2, bias_2)
    with pytest.raises(UserError, match="no backend is called 'nowhere'"):
        mlp(x, weight_1, bias_1, weight_2, bias_2, backend="nowhere")


@either
def test_float64_is_pytorch_s(hidden):
    inputs = [x.double() for x in draw(3, 24, hidden=hidden)]
    assert BACKENDS.name_for(None, *inputs) == "torch"
    reason = triton_linear.obstacle(torch.device("cuda"), (torch.float64,))
    assert reason == "it takes float32, float16 and bfloat16, not torch.float64"


@pytest.mark.parametrize("name", ["linear", "mlp"])
@pytest.mark.parametrize("frozen", [(), (1, 2), (0, 3, 4)])
def test_the_operator_is_well_formed(name, frozen):
    """Schema, fake tensors, autograd and tracing, as torch.library wants them."""
    inputs = draw(5, 7, hidden=9 if name == "mlp" else None)
    inputs = [x.requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    torch.library.opcheck(getattr(torch.ops.mamba_vision, name).default, tuple(inputs))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cuda)]
)
@pytest.mark.parametrize("frozen", [(), (1, 2), (0,)])
@either
def test_it_compiles_whole(on_triton, compiler, frozen, hidden):
    def residual(*tensors):
        return tensors[0] + operator(*tensors)

    def outcome(function):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        y = function(*leaves)
        y.square().sum().backward()
        return [y.detach(), *(x.grad for x in leaves if x.requires_grad)]

    inputs = draw(2, 19, 24, hidden=hidden)
    assert BACKENDS.name_for(None, *inputs) == "triton"
    torch._dynamo.reset()
    compiled = torch.compile(residual, fullgraph=True, backend=compiler)
    for one, other in zip(outcome(compiled), outcome(residual)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@either
def test_activation_checkpointing(dtype, hidden):
    inputs, weights = draw(37, 24, hidden=hidden, dtype=dtype), torch.randn(37, 24)
    expected = differentiate(triton_linear.run, inputs, weights)
    again = differentiate(
        lambda *x: checkpoint(triton_linear.run, *x, use_reentrant=False), inputs, weights
    )
    assert all(torch.equal(one, other) for one, other in zip(again, expected))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [None, 1280])
def test_equal_inputs_give_equal_results(dtype, hidden):
    inputs = draw(12345, 320, hidden=hidden, dtype=dtype)
    weights = torch.randn(12345, 320, device="cuda")
    first, *others = (differentiate(triton_linear.run, inputs, weights) for _ in range(3))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other))


@pytest.mark.cuda
@pytest.mark.parametrize("hidden", [None, 1280])
def test_cuda_graph(check_replay, hidden):
    inputs = [x.requires_grad_() for x in draw(2, 500, 320, hidden=hidden, dtype=torch.float16)]
    weights = torch.randn(2, 500, 320, device="cuda", dtype=torch.float16)

    def step():
        y = triton_linear.run(*inputs)
        return y, *torch.autograd.grad(y, inputs, weights)

    check_replay(step, inputs)


@pytest.mark.cuda
def test_a_training_step_takes_less_memory():
    """Of four layers PyTorch's operators keep the hidden numbers twice each, Triton's once; in a
    layer's backward pass either takes a copy or two of them more."""
    inputs = draw(8192, 320, hidden=1280, dtype=torch.float16)
    hidden = 8192 * 1280 * 2

    def peak(run):
        leaves = [x.clone().requires_grad_() for x in inputs]

        def step():
            y = leaves[0]
            for _ in range(4):
                y = y + run(y, *leaves[1:])
            torch.autograd.grad(y, leaves, torch.ones_like(y))

        step()  # compiles, and lets cuBLAS allocate
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    assert peak(triton_linear.run) < peak(torch_linear.run) - 2 * hidden
