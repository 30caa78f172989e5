"""The selective scan (arXiv:2312.00752, equation 2 and section 3.2):

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t      h_0 = 0
    y_t = C_t h_t + D u_t

left to right over the sequence, with a state of N numbers per image and channel. For shapes see
``ops``.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import Backends, check_shape, without_autocast

__all__ = ["BACKENDS", "selective_scan"]

BACKENDS = Backends(
    operator="selective_scan",
    variable="MAMBAVISION_SCAN_BACKEND",
    modules={
        "triton": f"{__name__}.triton_scan",
        "mamba_ssm": f"{__name__}.cuda_mamba_ssm",
        "torch": f"{__name__}.torch_chunked",
        "reference": f"{__name__}.reference",
    },
    remedies={"mamba_ssm": "install it with `pip install mamba-ssm --no-build-isolation`"},
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Scan sequences with an input-dependent linear recurrence; differentiable in every tensor.

    The state is float32 whatever the inputs' dtypes (float64 if ``u`` is), under autocast too.
    ``u``, ``delta``, ``B`` and ``C`` may be strided views and may differ in dtype.

    Args:
        u: (B, L, D) input, floating point.
        delta: (B, L, D) step sizes, before bias and softplus.
        A: (D, N) real decay rates, negative in a stable model.
        B: (B, L, N) input weights, shared by the channels.
        C: (B, L, N) output weights, shared by the channels.
        D: (D,) weight of the path past the state, or None for no such path.
        delta_bias: (D,) added to ``delta`` first, or None.
        delta_softplus: put ``delta`` through softplus after the bias.
        backend: "triton", "mamba_ssm", "torch", "reference", or "auto"; None takes the environment
            variable MAMBAVISION_SCAN_BACKEND, and without it "auto": the fastest for the device.

    Returns:
        (B, L, D) in ``u``'s dtype.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        UserError: the backend asked for cannot be used.
    """
    sizes: dict[str, int] = {}
    check_shape("u", u, "B L D", sizes)
    check_shape("delta", delta, "B L D", sizes)
    check_shape("A", A, "D N", sizes)
    check_shape("B", B, "B L N", sizes)
    check_shape("C", C, "B L N", sizes)
    if D is not None:
        check_shape("D", D, "D", sizes)
    if delta_bias is not None:
        check_shape("delta_bias", delta_bias, "D", sizes)
    tensors = (u, delta, A, B, C, D, delta_bias)
    chosen = BACKENDS.choose(backend, *tensors, states=A.shape[1])
    with without_autocast(u.device):
        return chosen.run(*tensors, delta_softplus=delta_softplus)
