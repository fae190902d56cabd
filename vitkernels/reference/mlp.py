"""Pre-norm MLP with its residual connection (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3).

(1)  u = act(LN(x) @ fc1^T + b1)
(2)  y = x + layer_scale * (u @ fc2^T + b2)
"""

from torch import Tensor

from .linear import linear


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
    """Equations (1) and (2). See ``vitkernels.ops.mlp``."""
    hidden = linear(x, fc1_weight, fc1_bias, act=act, norm=(norm_weight, norm_bias, eps))
    return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=x)
