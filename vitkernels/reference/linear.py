"""Linear layer with prologue and epilogue.

    (1)  h = LN(x) if norm is given, else x             (layer_norm.py, equations 2 to 5)
    (2)  z = h @ weight^T + bias
    (3)  y = residual + layer_scale * act(z)

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
) -> Tensor:
    """Equations (1) to (3). See ``vitkernels.ops.linear``."""
    if norm is not None:
        x = layer_norm(x, *norm)
    y = ACTIVATIONS[act](F.linear(x, weight, bias))
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None else residual + y
