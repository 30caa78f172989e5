"""Multi-head self-attention over a window.

Shape legend: B windows, L tokens, M of them asked, C channels, H heads of E = C / H channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention"]


class Attention(nn.Module):
    """Self-attention, softmax(q k^T / sqrt(E)) v, without a mask (MambaVision, section 3.2).

    Args:
        dim: C, divisible by ``num_heads``.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, asked: Tensor | None = None) -> Tensor:
        """Let tokens attend to all of a window.

        Args:
            x: (B, L, C), the window's tokens.
            asked: (B, M, C), those whose outcome is wanted; None for all.

        Returns:
            (B, M, C).
        """
        if asked is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            # The layer holds the weights of q, k and v below each other.
            dim, weight, bias = self.qkv.in_features, self.qkv.weight, self.qkv.bias
            (q,) = self._heads(F.linear(asked, weight[:dim], bias[:dim]), 1)
            k, v = self._heads(F.linear(x, weight[dim:], bias[dim:]), 2)
        channels = q.shape[-1]
        scale = channels**-0.5
        # The fused CUDA kernels want E in eights (the large variants have 49); without them the
        # L x L scores would be stored. Zeros change neither the scores nor the real channels.
        if extra := -channels % 8:
            q, k, v = (F.pad(t, (0, extra)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :channels]
        return self.proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, count: int) -> Tensor:
        """(B, L, count C) -> (count, B, H, L, E), a view."""
        return x.unflatten(-1, (count, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
