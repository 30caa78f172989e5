"""A linear layer, and the MLP of a block (arXiv:2407.08083, section 3.2), two with a GELU between:

    linear(x) = x W^T + b
    mlp(x) = gelu(x W_1^T + b_1) W_2^T + b_2        gelu(h) = h (1 + erf(h / sqrt(2))) / 2

The GELU is the exact one (arXiv:1606.08415, section 2). PyTorch's own operators keep the hidden
numbers from before it and from after it for the backward pass; a backend may keep fewer.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import Backends, autocast_dtype, check_shape

__all__ = ["BACKENDS", "linear", "mlp"]

BACKENDS = Backends(
    operator="linear",
    variable="MAMBAVISION_LINEAR_BACKEND",
    modules={
        "triton": f"{__name__}.triton_linear",
        "torch": f"{__name__}.torch_linear",
    },
)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute what ``torch.nn.functional.linear`` does; differentiable in every tensor.

    Args:
        x: (..., C) floating point.
        weight, bias: (O, C) and (O,), in the dtype of x, but under autocast, which casts them and x
            as it does for a linear layer.
        backend: "triton", "torch", or "auto"; None takes the environment variable
            MAMBAVISION_LINEAR_BACKEND, and without it "auto": the fastest for the device.

    Returns:
        (..., O) in the dtype of x, or autocast's.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    sizes = {"C": x.shape[-1]}
    check_shape("weight", weight, "O C", sizes)
    check_shape("bias", bias, "O", sizes)
    return _run(backend, x, weight, bias)


def mlp(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute linear(gelu(linear(x))); differentiable in every tensor.

    Args:
        x: (..., C) floating point.
        weight_1, bias_1: (H, C) and (H,), of the layer before the GELU.
        weight_2, bias_2: (O, H) and (O,), of the layer after it. All have the dtype of x, but under
            autocast, which casts them and x as it does for a linear layer.
        backend: as of :func:`linear`.

    Returns:
        (..., O) in the dtype of x, or autocast's.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    sizes = {"C": x.shape[-1]}
    check_shape("weight_1", weight_1, "H C", sizes)
    check_shape("bias_1", bias_1, "H", sizes)
    check_shape("weight_2", weight_2, "O H", sizes)
    check_shape("bias_2", bias_2, "O", sizes)
    return _run(backend, x, weight_1, bias_1, weight_2, bias_2)


def _run(backend: str | None, *given: Tensor) -> Tensor:
    """Cast x and the layers' tensors as autocast would, and run a backend on them."""
    tensors = [t.to(autocast_dtype(t.device, t.dtype)) for t in given]
    if any(t.dtype != tensors[0].dtype for t in tensors):
        dtypes = ", ".join(str(t.dtype) for t in tensors)
        raise TypeError(f"x, weights and biases must have one dtype, not {dtypes}")
    return BACKENDS.choose(backend, *tensors).run(*tensors)
