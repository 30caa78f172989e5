"""Every backend of the residual connection with LayerNorm against its definition in float64.

Without a GPU the Triton kernels run in Triton's interpreter, which takes them one by one.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba_vision.errors import UserError
from mamba_vision.ops import add_layer_norm
from mamba_vision.ops.layer_norm import BACKENDS, torch_layer_norm, triton_layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = [pytest.mark.cuda]
NAMES = ("x", "branch", "gamma", "weight", "bias")
EPS = 1e-5
every_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(torch_layer_norm, "cpu", id="torch-cpu"),
        pytest.param(torch_layer_norm, "cuda", id="torch-cuda", marks=GPU),
        pytest.param(triton_layer_norm, DEVICE, id="triton"),
    ],
)


def by_definition(x, branch, gamma, weight, bias, *, keep=None):
    if branch is not None:
        branch = branch if gamma is None else gamma * branch
        if keep is not None:
            branch = torch.stack([k * b for k, b in zip(keep.to(branch), branch)])
        x = x + branch
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return x, (x - mean) / torch.sqrt(variance + EPS) * weight + bias


def draw(shape, dtype=torch.float32, *, branch=True, gamma=True):
    """Inputs in the order of the operator's arguments; the numbers of x lie off 0."""
    vectors = torch.randn(3, shape[-1])
    x, added = (torch.randn(shape).to(dtype) for _ in range(2))
    return [
        x + 1,
        added if branch else None,
        vectors[0] if branch and gamma else None,
        1 + vectors[1] / 2,
        vectors[2],
    ]


def differentiate(function, inputs, weights):
    """The sum, normed, and the gradients of their product with weights; all on the CPU."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = function(*inputs)
    outputs = results if inputs[1] is not None else results[1:]
    torch.autograd.backward(outputs, [w.to(y) for y, w in zip(outputs, weights[-len(outputs) :])])
    grads = [x.grad for x in inputs if x is not None]
    return [y.detach().cpu() for y in (*outputs, *grads)]


def names(inputs):
    outputs = ["normed"] if inputs[1] is None else ["sum", "normed"]
    return outputs + [f"gradient of {n}" for n, x in zip(NAMES, inputs) if x is not None]


def compare(judge, function, inputs, device, dtype, keep=None):
    """With what the definition gives in float64, by the error of PyTorch's own operators."""
    definition = by_definition
    if keep is not None:
        definition = functools.partial(by_definition, keep=keep)
        function = functools.partial(function, keep=keep.to(device))
    weights = torch.randn(2, *inputs[0].shape)
    exact = [None if x is None else x.double() for x in inputs]
    plain = functools.partial(torch_layer_norm.run, keep=keep, eps=EPS, dtype=dtype)
    judge(
        names(inputs),
        differentiate(function, [None if x is None else x.to(device) for x in inputs], weights),
        differentiate(definition, exact, weights.double()),
        differentiate(plain, inputs, weights),
    )


@pytest.mark.parametrize("kind", ["norm", "add", "scale and add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 19, 80), (5, 321), (3, 1568)])
@every_backend
def test_agrees_with_the_definition(judge, backend, device, shape, dtype, kind):
    if backend is triton_layer_norm and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding")
    inputs = draw(shape, dtype, branch=kind != "norm", gamma=kind == "scale and add")
    function = functools.partial(backend.run, eps=EPS, dtype=dtype)
    compare(judge, function, inputs, device, dtype)


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 5, 24), (4, 1, 80)])
@every_backend
def test_branches_are_kept_by_factors(judge, backend, device, shape, dtype, gamma):
    keep = torch.tensor([0.0, 1.25, 2.0, 0.0])[: shape[0]]
    function = functools.partial(backend.run, eps=EPS, dtype=dtype)
    compare(judge, function, draw(shape, dtype, gamma=gamma), device, dtype, keep)


@pytest.mark.cuda
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 12544, 320), (2, 3136, 640), (12345, 320), (700, 1568)])
def test_agrees_with_the_definition_at_full_size(judge, shape, dtype, gamma):
    function = functools.partial(triton_layer_norm.run, eps=EPS, dtype=dtype)
    compare(judge, function, draw(shape, dtype, gamma=gamma), "cuda", dtype)


def test_a_program_walks_over_many_rows(judge, monkeypatch):
    """37 tiles of one row, of which three programs take thirteen each."""
    monkeypatch.setattr(triton_layer_norm, "TILE", 512)
    monkeypatch.setattr(triton_layer_norm, "PROGRAMS_BACK", 3)
    function = functools.partial(triton_layer_norm.run, eps=EPS, dtype=torch.float32)
    compare(judge, function, draw((37, 260)), DEVICE, torch.float32)


@every_backend
def test_by_hand(backend, device):
    """Sums of 1 and 5, whose mean is 3 and variance 4; with eps = 12 they are divided by 4."""
    x, branch = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]])
    vectors = ([2.0, 4.0], [3.0, 5.0], [0.0, 0.5])
    tensors = [t.to(device) for t in (x, branch, *map(torch.tensor, vectors))]
    total, normed = backend.run(*tensors, eps=12.0, dtype=torch.float32)
    assert total.tolist() == [[1.0, 5.0]]
    torch.testing.assert_close(normed.cpu(), torch.tensor([[-1.5, 3.0]]))


@every_backend
def test_strided_views(backend, device):
    """Views, whose rows lie apart or whose numbers do, give what copies of them give."""
    run = functools.partial(backend.run, eps=EPS, dtype=torch.float32)
    wide, vectors = torch.randn(2, 6, 4, 24, device=device), torch.randn(3, 12, device=device)

    def outcome(view, copy):
        leaf = wide.clone().requires_grad_()
        x, branch = (t.contiguous() if copy else t for t in view(leaf))
        total, normed = run(x, branch, *vectors)
        (total.square().sum() + normed.pow(3).sum()).backward()
        return total, normed, leaf.grad

    for view in (
        lambda t: t.chunk(2, -1),
        lambda t: (t[:, :3, :, :12], t[:, 3:, :, 12:]),
        lambda t: (t.permute(0, 1, 3, 2)[:, :, :12].mT, t.mT[:, :, 12:].mT),
    ):
        for one, other in zip(outcome(view, False), outcome(view, True)):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", [16, 90])
def test_on_the_cpu_it_is_plain_pytorch(width):
    """Bit for bit, which is what fused_norm promises there."""
    norm = nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, branch = torch.randn(2, 3, 5, width)
    total, normed = add_layer_norm(x, branch, None, norm.weight, norm.bias, norm.eps)
    assert torch.equal(total, x + branch)
    assert torch.equal(normed, norm(x + branch))
    same, normed = add_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps)
    assert same is x
    assert torch.equal(normed, norm(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("gamma", [False, True])
def test_dtypes_under_autocast(device, gamma):
    """The sum's is that of PyTorch's own operators, normed has a linear layer's."""
    inputs = [None if x is None else x.to(device) for x in draw((3, 16), torch.bfloat16)]
    if not gamma:
        inputs[2] = None
    exact = torch.float32 if gamma else torch.bfloat16
    assert by_definition(*inputs)[0].dtype == exact
    for backend in ("torch", "auto"):
        outside = add_layer_norm(*inputs, EPS, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            inside = add_layer_norm(*inputs, EPS, backend=backend)
            assert F.linear(inside[0], inside[0]).dtype == torch.bfloat16
        assert [y.dtype for y in outside] == [exact, exact]
        assert [y.dtype for y in inside] == [exact, torch.bfloat16]
        assert torch.equal(inside[1], outside[1].bfloat16())
        asked = add_layer_norm(*inputs, EPS, dtype=torch.float32, backend=backend)
        assert asked[1].dtype == torch.float32


def test_doubles_stay_doubles_under_autocast():
    inputs = [x.double() for x in draw((3, 16))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, normed = add_layer_norm(*inputs, EPS)
    torch.testing.assert_close(normed, by_definition(*inputs)[1], rtol=1e-12, atol=1e-12)


def test_one_result_alone_has_gradients():
    run = functools.partial(triton_layer_norm.run, eps=EPS, dtype=torch.float32)
    for which in range(2):
        grads = []
        for function in (by_definition, run):
            torch.manual_seed(0)
            inputs = [x.to(DEVICE).requires_grad_() for x in draw((3, 7))]
            function(*inputs)[which].pow(3).sum().backward()
            grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs])
        for one, other in zip(*grads):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_and_backends():
    x, branch, gamma, weight, bias = draw((3, 16))
    with pytest.raises(ValueError, match=r"weight must have shape \(C\) with C = 16, not \(8,\)"):
        add_layer_norm(x, branch, gamma, weight[:8], bias, EPS)
    with pytest.raises(ValueError, match=r"gamma must have shape"):
        add_layer_norm(x, branch, gamma[:8], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"branch has shape \(2, 16\), x has \(3, 16\)"):
        add_layer_norm(x, branch[:2], gamma, weight, bias, EPS)
    with pytest.raises(ValueError, match=r"keep must have shape \(B\) with B = 3, not \(4,\)"):
        add_layer_norm(x, branch, gamma, weight, bias, EPS, keep=torch.ones(4))
    with pytest.raises(UserError, match="no backend is called 'nowhere'"):
        add_layer_norm(x, branch, gamma, weight, bias, EPS, backend="nowhere")
    reason = triton_layer_norm.obstacle(torch.device("cuda"), (torch.float32,), width=4097)
    assert reason == "it holds at most 4096 channels, not 4097"


@pytest.mark.parametrize("kind", ["norm", "add", "scale and add"])
def test_the_operator_is_well_formed(kind):
    """Schema, fake tensors, autograd and tracing, as torch.library wants them."""
    inputs = draw((3, 7), branch=kind != "norm", gamma=kind == "scale and add")
    inputs = [None if x is None else x.to(DEVICE).requires_grad_() for x in inputs]
    operator = torch.ops.mamba_vision.add_layer_norm.default
    factors = torch.tensor([0.0, 2.0, 1.0], device=DEVICE)
    for keep in (None, factors) if kind != "norm" else (None,):
        torch.library.opcheck(operator, (*inputs, keep, EPS, torch.float32))


def test_it_compiles_whole(monkeypatch):
    monkeypatch.setattr(triton_layer_norm, "obstacle", lambda *_, **__: None)
    inputs = [x.to(DEVICE) for x in draw((2, 5, 24))]
    assert BACKENDS.name_for(None, *inputs, width=24) == "triton"

    def both(*tensors):
        total, normed = add_layer_norm(*tensors, EPS)
        return add_layer_norm(normed, None, None, *tensors[3:], EPS)[1] + total

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), both(*inputs))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_inputs_give_equal_results(dtype):
    run = functools.partial(triton_layer_norm.run, eps=EPS, dtype=dtype)
    inputs = [x.cuda() for x in draw((12345, 320), dtype)]
    weights = torch.randn(2, 12345, 320, device="cuda")
    first, *others = (differentiate(run, inputs, weights) for _ in range(3))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other))


@pytest.mark.cuda
def test_cuda_graph(check_replay):
    run = functools.partial(triton_layer_norm.run, eps=EPS, dtype=torch.float16)
    inputs = [x.cuda().requires_grad_() for x in draw((2, 500, 320), torch.float16)]

    def step():
        total, normed = run(*inputs)
        loss = total.float().square().sum() + normed.float().pow(3).sum()
        return total, normed, *torch.autograd.grad(loss, inputs)

    check_replay(step, inputs)


def test_activation_checkpointing():
    run = functools.partial(triton_layer_norm.run, eps=EPS, dtype=torch.float32)
    inputs, weights = [x.to(DEVICE) for x in draw((3, 24))], torch.randn(2, 3, 24)
    expected = differentiate(run, inputs, weights)
    again = differentiate(lambda *x: checkpoint(run, *x, use_reentrant=False), inputs, weights)
    assert all(torch.equal(one, other) for one, other in zip(again, expected))
