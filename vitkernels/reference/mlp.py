"""Pre-norm MLP with its residual connection (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3).

(1)  u = act(LN(x) @ fc1^T + b1)
(2)  y = x + drop_path * layer_scale * (u @ fc2^T + b2)
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._recording import exporting
from .linear import scriptable_linear

# Weight and bias of LayerNorm, fc1 and fc2.
Parameters = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]


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
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    # Neither torch.func nor forward-mode takes derivatives of a function that says what to save, and no program has a place
    # for it.
    differentiated = torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    if recompute and torch.is_grad_enabled() and not (exporting() or torch.jit.is_tracing() or differentiated):
        from torch.utils.checkpoint import checkpoint

        arguments = (x, parameters, eps, act, layer_scale, drop_path)
        return checkpoint(scriptable_mlp, *arguments, use_reentrant=False, preserve_rng_state=False)
    return scriptable_mlp(x, parameters, eps, act, layer_scale, drop_path)


def scriptable_mlp(
    x: Tensor, parameters: Parameters, eps: float, act: str | None, layer_scale: Tensor | None, drop_path: Tensor | None
) -> Tensor:
    """``mlp`` for TorchScript, which compiles no function with keyword-only arguments."""
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    hidden = scriptable_linear(x, fc1_weight, fc1_bias, act, None, None, (norm_weight, norm_bias, eps), None)
    return scriptable_linear(hidden, fc2_weight, fc2_bias, None, layer_scale, x, None, drop_path)
