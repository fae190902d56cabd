"""Linear layer with a LayerNorm before it and activation, LayerScale and residual after it. Parts as in ``layer_norm.py``."""

from torch import Tensor

from .. import _select, reference
from ..reference.linear import ACTIVATIONS
from . import _check
from .layer_norm import check_norm, dispatch_layer_norm


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[str]:
    """Reasons why the linear kernel cannot take these tensors; empty when it can."""
    return ["this version has no linear kernel", *_select.why_not_here(x, weight, bias, layer_scale, residual)]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Tensor:
    """Linear layer with prologue and epilogue: ``residual + layer_scale * act(LN?(x) @ weight^T + bias)``.

    Args:
        x: (..., K).
        weight: (N, K), bias: (N,) or None, as ``nn.Linear``.
        act: None, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` (x * sigmoid(1.702 x)) or ``"silu"``.
        layer_scale: (N,) or None.
        residual: (..., N) or None; may be wider than ``x`` (the float32 stream under autocast) and is never cast.
        norm: (weight, bias, eps) of a LayerNorm over K, or None.

    Returns:
        (..., N), of the dtype that PyTorch's promotion gives.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "linear"
    _check.tensor(op, "x", x)
    _check.tensor(op, "weight", weight)
    _check.shape(op, "weight", weight, ("N", _check.last_dim(op, "x", x)))
    _check.choice(op, "act", act, ACTIVATIONS)
    _check.vector(op, "bias", bias, weight.shape[0])
    _check.vector(op, "layer_scale", layer_scale, weight.shape[0])
    if residual is not None:
        _check.tensor(op, "residual", residual)
        _check.shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if norm is not None:
        if len(norm) != 3:
            raise ValueError(f"{op}: norm must be (weight, bias, eps), got {len(norm)} elements")
        check_norm(op, x, *norm[:2], x.dtype)
    return dispatch_linear(x, weight, bias, act, layer_scale, residual, norm)


def dispatch_linear(x, weight, bias=None, act=None, layer_scale=None, residual=None, norm=None) -> Tensor:
    """``linear`` without the checks, for callers that have made them."""
    _select.use_kernel(
        "linear", x, lambda: why_not(x, weight, bias, layer_scale, residual)
    )  # raises under "fused", never True yet
    if norm is not None:
        x = dispatch_layer_norm(x, *norm)  # its kernel runs even where this one has a reason not to
    return reference.linear(x, weight, bias, act=act, layer_scale=layer_scale, residual=residual)
