"""Pre-norm MLP with its residual connection (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3).

(1)  u = act(LN(x) @ fc1^T + b1)
(2)  y = x + drop_path * layer_scale * (u @ fc2^T + b2)
"""

import torch
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
    drop_path: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Equations (1) and (2). See ``vitkernels.ops.mlp``."""
    if recompute and torch.is_grad_enabled():
        from torch.utils.checkpoint import checkpoint

        arguments = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return checkpoint(
            mlp, *arguments, eps=eps, act=act, layer_scale=layer_scale, drop_path=drop_path,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    hidden = linear(x, fc1_weight, fc1_bias, act=act, norm=(norm_weight, norm_bias, eps))
    return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=x, drop_path=drop_path)
