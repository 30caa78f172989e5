"""The depthwise convolution of the mixer (arXiv:2407.08083, equation 6) with its SiLU.

    y_t = silu(w_0 x_(t-1) + w_1 x_t + w_2 x_(t+1))      x = 0 outside the sequence

per channel, without bias. It is a regular ('same') convolution, not Mamba's causal one.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import Backends, check_shape, without_autocast

__all__ = ["BACKENDS", "depthwise_conv1d_silu"]

WIDTH = 3

BACKENDS = Backends(
    operator="depthwise_conv1d_silu",
    variable="MAMBAVISION_CONV_BACKEND",
    modules={
        "triton": f"{__name__}.triton_conv1d",
        "causal_conv1d": f"{__name__}.cuda_causal_conv1d",
        "torch": f"{__name__}.torch_conv1d",
        "reference": f"{__name__}.reference",
    },
    remedies={"causal_conv1d": "install it with `pip install causal-conv1d --no-build-isolation`"},
)


def depthwise_conv1d_silu(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Convolve each channel along its sequence with three weights, zero-padded, and apply SiLU.

    Differentiable in both tensors. The result has ``x``'s dtype, under autocast too.

    Args:
        x: (B, L, D) floating point, also a strided view.
        weight: (D, 3), for the token before, the token itself and the one after.
        backend: "triton", "causal_conv1d", "torch", "reference", or "auto"; None takes the
            environment variable MAMBAVISION_CONV_BACKEND, and without it "auto": the fastest for
            the device.

    Returns:
        (B, L, D) in ``x``'s dtype.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    sizes = {"W": WIDTH}
    check_shape("x", x, "B L D", sizes)
    check_shape("weight", weight, "D W", sizes)
    chosen = BACKENDS.choose(backend, x, weight)
    with without_autocast(x.device):
        return chosen.run(x, weight)
