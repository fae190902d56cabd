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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_norm import layer_norm

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """Equations (1) to (3). See ``vitkernels.ops.linear``."""
    if norm is not None:
        x = layer_norm(x, *norm)
    y = ACTIVATIONS[act](F.linear(x, weight, bias))
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path is not None:
        y = y * drop_path
    return y if residual is None else residual + y
