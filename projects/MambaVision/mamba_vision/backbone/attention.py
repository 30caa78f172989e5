"""Multi-head self-attention over a window.

Shape legend: B windows, L tokens, M of them asked, C channels, H heads of E = C / H channels.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from ..ops import linear

__all__ = ["ATTENTION_BACKENDS", "Attention"]

logger = logging.getLogger(__name__)

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ORDER = list(_KERNELS.values())
ATTENTION_BACKENDS = ("auto", *_KERNELS)


class Attention(nn.Module):
    """Self-attention, softmax(q k^T / sqrt(E)) v, without a mask (MambaVision, section 3.2).

    Args:
        dim: C, divisible by ``num_heads``.
        num_heads: H.
        backend: which of PyTorch's kernels computes it, forward and backward: "cudnn", "flash",
            "efficient" or "math". None or "auto": in half precision on a GPU of compute capability
            9 or more the first of these, in this order, that can; elsewhere PyTorch chooses. cuDNN
            plans anew for every shape that it meets first.
        linear_backend: passed to :func:`~mamba_vision.ops.linear`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backend: str | None = None,
        linear_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.linear_backend = linear_backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, asked: Tensor | None = None) -> Tensor:
        """Let tokens attend to all of a window.

        Args:
            x: (B, L, C), the window's tokens.
            asked: (B, M, C), those whose outcome is wanted; None for all.

        Returns:
            (B, M, C).

        Raises:
            UserError: the backend cannot be used here.
        """
        # The layers are not called, they only hold weights: those of q, k and v below each other.
        dim, weight, bias = self.qkv.in_features, self.qkv.weight, self.qkv.bias
        if asked is None:
            q, k, v = self._heads(x, weight, bias)
        else:
            (q,) = self._heads(asked, weight[:dim], bias[:dim])
            k, v = self._heads(x, weight[dim:], bias[dim:])
        channels = q.shape[-1]
        scale = channels**-0.5
        # The fused CUDA kernels want E in eights (the large variants have 49); without them the
        # L x L scores would be stored. Zeros change neither the scores nor the real channels.
        if extra := -channels % 8:
            q, k, v = (F.pad(t, (0, extra)) for t in (q, k, v))
        with _kernels(self.backend, q):
            y = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :channels]
        y = y.transpose(1, 2).flatten(2)
        return linear(y, self.proj.weight, self.proj.bias, backend=self.linear_backend)

    def _heads(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """(B, L, C), (n C, C), (n C) -> n times (B, H, L, E), views whose gradients join in one
        copy."""
        y = linear(x, weight, bias, backend=self.linear_backend)
        parts = y.split(x.shape[-1], dim=-1)
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]


def _kernels(backend: str | None, q: Tensor) -> AbstractContextManager:
    """A context in which PyTorch computes attention with ``backend``."""
    if q.device.type == "meta":
        return nullcontext()
    name = _name(backend or "auto", q.device, q.dtype, q.shape[-1])
    if name == "ordered":
        return sdpa_kernel(_ORDER, set_priority=True)
    return nullcontext() if name == "auto" else sdpa_kernel([_KERNELS[name]])


@torch.compiler.assume_constant_result  # a compiled model keeps the choice made while compiling
def _name(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> str:
    """The backend; "ordered" if "auto" means our order of preference, not PyTorch's."""
    if backend == "auto":
        return "ordered" if _is_ordered(device, dtype) else "auto"
    if not _runs(backend, device, dtype, channels):
        raise UserError(
            f"MambaVision's argument attention_backend is {backend!r}, for which PyTorch has no "
            f"kernel that takes {dtype} and heads of {channels} channels on {device.type}: "
            "leave it out"
        )
    return backend


@cache
def _is_ordered(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    logger.info("attention on cuda in %s: using the first that can of %s", dtype, list(_KERNELS))
    return True


@cache
def _runs(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether PyTorch finds a backend fit for a few tokens."""
    # Without gradients: a checkpointed block counts the tensors that are kept for them.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's reasons against every kernel
        sample = torch.zeros(1, 1, 64, channels, device=device, dtype=dtype)
        try:
            with sdpa_kernel([_KERNELS[backend]]):
                F.scaled_dot_product_attention(sample, sample, sample)
        except RuntimeError:
            return False
    return True
