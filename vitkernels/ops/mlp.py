"""Pre-norm MLP with its residual connection. Parts as in ``layer_norm.py``."""

from torch import Tensor

from .. import _select
from ..reference.linear import ACTIVATIONS
from . import _check
from .layer_norm import check_norm
from .linear import dispatch_linear


def why_not(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> list[str]:
    """Reasons why the MLP kernels cannot take these tensors; empty when they can."""
    return ["this version has no MLP kernel", *_select.why_not_here(x, fc1_weight, fc2_weight)]


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    act: str | None = "gelu",
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Second half of a ViT block: ``x + layer_scale * (act(LN(x) @ fc1^T + b1) @ fc2^T + b2)``.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3.

    Args:
        x: (..., D), the residual stream.
        norm_weight, norm_bias: (D,) or None; eps: of the LayerNorm.
        fc1_weight: (F, D), fc1_bias: (F,) or None.
        fc2_weight: (D, F), fc2_bias: (D,) or None.
        act: as in ``linear``.
        layer_scale: (D,) or None.

    Returns:
        (..., D).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernels cannot run; the message lists why.
    """
    op = "mlp"
    _check.tensor(op, "x", x)
    width = _check.last_dim(op, "x", x)
    check_norm(op, x, norm_weight, norm_bias, x.dtype)
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        _check.tensor(op, name, weight)
    _check.shape(op, "fc1_weight", fc1_weight, ("F", width))
    _check.vector(op, "fc1_bias", fc1_bias, fc1_weight.shape[0])
    _check.shape(op, "fc2_weight", fc2_weight, (width, fc1_weight.shape[0]))
    _check.vector(op, "fc2_bias", fc2_bias, width)
    _check.vector(op, "layer_scale", layer_scale, width)
    _check.choice(op, "act", act, ACTIVATIONS)
    _select.use_kernel(op, x, lambda: why_not(x, fc1_weight, fc2_weight))  # raises under "fused", never True yet
    hidden = dispatch_linear(x, fc1_weight, fc1_bias, act=act, norm=(norm_weight, norm_bias, eps))
    return dispatch_linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=x)
