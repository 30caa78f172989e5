import copy
import functools

import pytest
import torch
from torch import nn

from mamba_vision import MambaVision, UserError
from mamba_vision.backbone.attention import ATTENTION_BACKENDS, Attention


@pytest.mark.parametrize(("dim", "heads"), [(32, 4), (40, 1), (14, 2)])  # heads of 8, 40 and 7
def test_agrees_with_multihead_attention(dim, heads):
    ours = Attention(dim, heads).double()
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(3, 11, dim, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    z, _ = theirs(x, x, x, need_weights=False)
    torch.testing.assert_close(y, z)
    direction = torch.randn_like(y)
    (dy,) = torch.autograd.grad(y, x, direction)
    (dz,) = torch.autograd.grad(z, x, direction)
    torch.testing.assert_close(dy, dz)


@pytest.mark.parametrize("count", [1, 5, 11])
def test_some_tokens_alone(count):
    """They get what they get among all, and all weights the gradients of these."""
    attention = Attention(14, 2).double()
    nn.init.normal_(attention.qkv.bias)
    x = torch.randn(3, 11, 14, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, count, 14, dtype=torch.float64)
    outcomes = []
    for y in (attention(x)[:, :count], attention(x, x[:, :count])):
        grads = torch.autograd.grad(y, [x, *attention.parameters()], direction)
        outcomes.append((y, *grads))
    for one, other in zip(*outcomes):
        torch.testing.assert_close(other, one)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [40, 49])
def test_scores_of_a_large_window_are_not_stored(channels, dtype):
    # The scores of 112 x 112 tokens and 4 heads alone would take 1.2 GiB in half precision.
    attention = Attention(4 * channels, 4).cuda().to(dtype)
    x = torch.randn(1, 112 * 112, 4 * channels, device="cuda", dtype=dtype, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    attention(x).sum().backward()
    assert torch.cuda.max_memory_allocated() < 2**29


def _by_definition(attention, x):
    """softmax(q k^T / sqrt(E)) v, in float64, head by head."""
    attention, x = copy.deepcopy(attention).double(), x.double()
    channels = attention.proj.in_features // attention.num_heads
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for t in range(0, attention.proj.in_features, channels):
        q_t, k_t, v_t = (y[..., t : t + channels] for y in (q, k, v))
        weights = (q_t @ k_t.transpose(1, 2) / channels**0.5).softmax(dim=-1)
        heads.append(weights @ v_t)
    return attention.proj(torch.cat(heads, dim=-1))


def _run(function, x):
    """The output, and the gradient of its sum of squares by the input."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.double().square().sum(), x)[0]


@pytest.mark.parametrize("backend", [None, "auto", "math", "flash"])
def test_every_backend_of_the_cpu_computes_attention(backend):
    attention = Attention(32, 4, backend)
    x = torch.randn(2, 33, 32)
    want = _run(functools.partial(_by_definition, attention), x)
    for got, expected in zip(_run(attention, x), want):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_the_backend_asked_for_is_the_one_that_runs(backend):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Attention(32, 4, backend)(torch.randn(2, 33, 32))
    operators = {event.key for event in profile.key_averages()}
    assert any(backend in name for name in operators if "_scaled_dot_product" in name)


def test_a_compiled_attention_keeps_its_backend():
    x = torch.randn(2, 33, 32)
    for backend in (None, "math", "flash"):
        attention = Attention(32, 4, backend)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        for got, expected in zip(_run(compiled, x), _run(attention, x)):
            torch.testing.assert_close(got, expected)


def test_the_backend_holds_where_activations_are_computed_again(nano):
    model = MambaVision(
        **nano, attention_backend="math", activation_checkpointing=True, drop_path_rate=0.0
    )
    x = torch.randn(1, 3, 64, 64)
    sum(y.sum() for y in model(x).values()).backward()  # the first call tries the backend, too
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sum(y.sum() for y in model(x).values()).backward()
    calls = {e.key: e.count for e in profile.key_averages() if "_scaled_dot_product" in e.key}
    assert calls == {"aten::_scaled_dot_product_attention_math": 4}  # two blocks, twice


def test_an_unknown_backend_is_refused(nano):
    with pytest.raises(UserError, match='attention_backend is \'fast\': give "auto", "cudnn"'):
        MambaVision(**nano, attention_backend="fast")


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_backend_that_cannot_run_is_refused(nano, backend):
    model = MambaVision(**nano, attention_backend=backend)
    with pytest.raises(UserError, match=rf"attention_backend is '{backend}', .* on cpu: leave it"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.cuda
@pytest.mark.parametrize("channels", [40, 48, 49, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_every_backend_of_a_gpu_computes_attention(backend, dtype, channels):
    attention = Attention(2 * channels, 2, backend).cuda().to(dtype)
    plain = Attention(2 * channels, 2, "math").cuda().to(dtype)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(2, 200, 2 * channels, device="cuda", dtype=dtype)
    want = _run(functools.partial(_by_definition, attention), x)
    for got, same, expected in zip(_run(attention, x), _run(plain, x), want):
        assert got.dtype == dtype
        error, allowed = ((t.double() - expected).norm() for t in (got, same))
        assert error <= 2 * allowed


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_the_backend_asked_for_runs_on_a_gpu_backward_too(backend):
    attention = Attention(128, 2, backend).cuda().half()
    x = torch.randn(1, 256, 128, device="cuda", dtype=torch.half, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(x).sum().backward()
    names = {e.key for e in profile.key_averages() if "_scaled_dot_product" in e.key}
    assert {f"aten::_scaled_dot_product_{backend}_attention{s}" for s in ("", "_backward")} <= names


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_half_precision_only_backends_refuse_float32(backend):
    with pytest.raises(UserError, match=rf"attention_backend is '{backend}', .* torch.float32"):
        Attention(128, 2, backend).cuda()(torch.randn(1, 256, 128, device="cuda"))


@pytest.mark.cuda
def test_a_compiled_attention_keeps_its_backend_on_a_gpu():
    x = torch.randn(1, 256, 128, device="cuda", dtype=torch.half)
    for backend in (None, "efficient"):
        attention = Attention(128, 2, backend).cuda().half()
        compiled = torch.compile(attention, fullgraph=True)
        for got, expected in zip(_run(compiled, x), _run(attention, x)):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
