import pytest
import torch
from torch import nn

from mamba_vision.backbone.attention import Attention


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
