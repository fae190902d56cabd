"""LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) and residual add + LayerNorm.

Forward, over the last dimension D of each row s:

    (1)  s      = residual + layer_scale * x            (layer_norm: s = x)
    (2)  mean   = sum(s) / D
    (3)  rstd   = 1 / sqrt(sum((s - mean)^2) / D + eps)
    (4)  x_hat  = (s - mean) * rstd
    (5)  y      = x_hat * weight + bias

Backward, from dy and (for add_layer_norm) the gradient ds that reaches the stream directly:

    (6)  g       = dy * weight
    (7)  ds     += rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    (8)  dweight = sum over rows of dy * x_hat,   dbias = sum over rows of dy
    (9)  dresidual = ds,   dx = layer_scale * ds,   dlayer_scale = sum over rows of ds * x
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Equations (2) to (5). See ``vitkernels.ops.layer_norm``."""
    # To converters of traced programs (ONNX) the weight's shape is a constant, as in PyTorch's module, and that of x is not.
    shape = x.shape[-1:] if weight is None else weight.shape
    mixed = (weight is not None and weight.dtype != x.dtype) or (bias is not None and bias.dtype != x.dtype)
    if mixed and x.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled():
        # PyTorch's operator on a GPU takes one dtype; its autocast, which this asks for, would see to that.
        weight, bias = None if weight is None else weight.float(), None if bias is None else bias.float()
        return F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations (1) to (5); returns ``(y, s)``. See ``vitkernels.ops.add_layer_norm``."""
    stream = residual + (x if layer_scale is None else x * layer_scale)
    return layer_norm(stream, weight, bias, eps), stream
