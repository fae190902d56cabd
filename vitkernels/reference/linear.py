"""Linear layer with prologue and epilogue.

    (1)  h = LN(x) if norm is given, else x             (layer_norm.py, equations 2 to 5)
    (2)  z = h @ weight^T + bias
    (3)  y = residual + drop_path * layer_scale * act(z)

Backward, from dy, with g = drop_path * dy:

    (4)  dz           = layer_scale * g * act'(z)
    (5)  dlayer_scale = sum over rows of g * act(z)
    (6)  dbias        = sum over rows of dz
    (7)  dh           = dz @ weight,   dweight = dz^T @ h,   dresidual = dy

Without an activation LayerScale stays out of the activations, and its gradient needs neither z nor another pass:

    (8)  G = g^T @ h,   s = sum over rows of g
    (9)  dh = g @ (layer_scale * weight),   dweight = layer_scale * G,   dbias = layer_scale * s
    (10) dlayer_scale = sum over K of weight * G, + bias * s

Activations: gelu, x * Phi(x), and its tanh form (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415); quick_gelu,
x * sigmoid(1.702 x), of the same paper; silu, x * sigmoid(x).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_norm import layer_norm

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu")
Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias and eps of a LayerNorm


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """Equations (1) to (3). See ``vitkernels.ops.linear``."""
    return scriptable_linear(x, weight, bias, act, layer_scale, residual, norm, drop_path)


def scriptable_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    drop_path: Tensor | None,
) -> Tensor:
    """``linear`` for TorchScript, which compiles no function with keyword-only arguments."""
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        x = layer_norm(x, norm_weight, norm_bias, eps)
    y = activate(F.linear(x, weight, bias), act)
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path is not None:
        y = y * drop_path
    return y if residual is None else residual + y


def activate(z: Tensor, act: str | None) -> Tensor:
    """act(z)."""
    if act is None:
        return z
    if act == "gelu":
        return F.gelu(z)
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if act == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if act == "silu":
        return F.silu(z)
    raise ValueError(f"act must be one of None, gelu, gelu_tanh, quick_gelu, silu, got {act}")
