"""A residual connection and the LayerNorm (arXiv:1607.06450) that reads it:

    sum = x + keep * gamma * branch
    normed = (sum - mean) / sqrt(variance + eps) * weight + bias

per token, over its C channels; mean and variance are float32 at least. The next linear layer reads
``normed``, the next residual connection ``sum``; stochastic depth (arXiv:1603.09382) draws
``keep``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Backends, autocast_dtype, check_shape, without_autocast

__all__ = ["BACKENDS", "add_layer_norm"]

BACKENDS = Backends(
    operator="add_layer_norm",
    variable="MAMBAVISION_NORM_BACKEND",
    modules={
        "triton": f"{__name__}.triton_layer_norm",
        "torch": f"{__name__}.torch_layer_norm",
    },
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to ``x``, and normalize the sum; differentiable in every tensor but ``keep``.

    Args:
        x: (..., C) floating point; rows of adjacent numbers at a constant distance spare a copy.
        branch: like x, perhaps of another dtype; None adds nothing.
        gamma: (C,) scale of the branch; None scales nothing.
        weight, bias: (C,).
        eps: added to the variance.
        keep: (B,) factors on the branch of each of the B entries along the first axis of x; None
            for ones. The sum's dtype does not depend on it.
        dtype: of ``normed``; None takes that to which autocast casts the input of a linear layer,
            and without autocast that of ``sum``.
        backend: "triton", "torch", or "auto"; None takes the environment variable
            MAMBAVISION_NORM_BACKEND, and without it "auto": the fastest for the device.

    Returns:
        ``sum``, in the dtype that PyTorch's own addition and multiplication give (``x`` itself if
        there is no branch), and ``normed``, both like x.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    sizes = {"C": x.shape[-1]}
    check_shape("weight", weight, "C", sizes)
    check_shape("bias", bias, "C", sizes)
    if branch is None:
        gamma = keep = None
    elif branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, x has {tuple(x.shape)}")
    if gamma is not None:
        check_shape("gamma", gamma, "C", sizes)
    if keep is not None:
        check_shape("keep", keep, "B", {"B": len(x)})
    tensors = (x, branch, gamma, weight, bias)
    total = x.dtype
    for tensor in (branch, gamma):
        total = total if tensor is None else torch.promote_types(total, tensor.dtype)
    chosen = BACKENDS.choose(backend, *tensors, width=weight.shape[0])
    dtype = dtype or autocast_dtype(x.device, total)
    with without_autocast(x.device):
        return chosen.run(*tensors, keep=keep, eps=eps, dtype=dtype)
