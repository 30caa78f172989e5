"""Multi-head self-attention over a window.

Shape legend: B windows, L tokens, C channels, H heads of E = C / H channels.
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, E), views of one tensor
        channels = q.shape[-1]
        scale = channels**-0.5
        # The fused CUDA kernels want E in eights (the large variants have 49); without them the
        # L x L scores would be stored. Zeros change neither the scores nor the real channels.
        if extra := -channels % 8:
            q, k, v = (F.pad(t, (0, extra)) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :channels]
        return self.proj(y.transpose(1, 2).flatten(2))
