"""LayerNorm folded into a linear layer, for inference: ``kernels/folded_linear.py`` has the equations. Internal to blocks."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _select
from ..reference.linear import ACTIVATIONS
from ._register import register
from .linear import MIN_BYTES, PLANS, compute_dtype, flat, linear, why_not


class Folded(NamedTuple):
    """weight' (N, K) in the parameters' dtype, colsum and bias' (N,) in float32."""

    weight: Tensor
    colsum: Tensor
    bias: Tensor


def fold_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None) -> Folded:
    """Equation (1)."""
    wide = weight.float()
    folded = (wide if norm_weight is None else wide * norm_weight.float()).to(weight.dtype, copy=True)
    shift = wide.new_zeros(weight.shape[0]) if norm_bias is None else wide @ norm_bias.float()
    return Folded(folded, folded.float().sum(1), shift if bias is None else shift + bias.float())


def _fake(x, norm_weight, norm_bias, eps, weight, bias, folded_weight, colsum, folded_bias, act, plan, arch) -> Tensor:
    return x.new_empty(*x.shape[:-1], folded_weight.shape[0])


def _reference(x, norm_weight, norm_bias, eps, weight, bias, folded_weight, colsum, folded_bias, act, plan, arch) -> Tensor:
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    product = torch.nn.functional.linear(wide, folded_weight.to(wide.dtype))
    return ACTIVATIONS[act]((product - mean * colsum) * torch.rsqrt(variance + eps) + folded_bias).to(x.dtype)


register(
    "folded_linear_fwd(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias,"
    " Tensor folded_weight, Tensor colsum, Tensor folded_bias, str? act, str plan, str arch) -> Tensor",
    fake=_fake,
    stem="folded_linear",
    reference=_reference,
)


def folds(x: Tensor, folded: Folded, act: str | None) -> bool:
    """Whether a table has a folded GEMM for rows like ``x``'s. While compiling, which cannot ask, the launcher has to see."""
    if torch.compiler.is_compiling():
        return True
    plan, arch = _select.choose_plan(PLANS, lambda: "auto"), _select.target(x)
    if plan != "auto" or arch is None:
        return plan == "triton"
    kernels = importlib.import_module("vitkernels.kernels.folded_linear")  # Triton, on a GPU only
    return kernels.config(flat(x), folded.weight, act, plan, arch) is not None


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float],
    folded: Folded,
    act: str | None = None,
) -> Tensor:
    """``linear(x, weight, bias, act=act, norm=norm)`` without gradients, by ``folded`` where that is as accurate and faster.

    It is where ``x`` is float16 or bfloat16 itself: the float32 stream of autocast would be rounded before its mean is
    subtracted, and float32 has no rounding of LN(x) to save.
    """
    others = (bias, *norm[:2], *folded)
    here = compute_dtype(x) == x.dtype == folded.weight.dtype != torch.float32 and not torch.is_grad_enabled()
    if not here or not _select.use_kernel("linear", x, lambda: why_not(x, weight, *others, norm=True), MIN_BYTES):
        return linear(x, weight, bias, act=act, norm=norm)
    norm_weight, norm_bias, eps = norm
    settings = (act, _select.choose_plan(PLANS, lambda: "auto"), _select.target(x) or "")
    return torch.ops.vitkernels.folded_linear_fwd(x, norm_weight, norm_bias, eps, weight, bias, *folded, *settings)
