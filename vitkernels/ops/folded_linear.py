"""LayerNorm folded into a linear layer, for inference: ``kernels/folded_linear.py`` has the equations. Internal to blocks."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _env, _select
from ..reference.linear import activate
from ._register import register
from .linear import MIN_BYTES, PLANS, compute_dtype, flat, gemm_plan, linear, why_not


class Statistics(NamedTuple):
    """Mean and rstd of rows, (M,) each, float32. rstd is 0 where all channels of a row are equal, whatever eps is."""

    mean: Tensor
    rstd: Tensor


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


def _fake(
    x, mean, rstd, norm_weight, norm_bias, eps, weight, bias, folded_weight, colsum, folded_bias, act, plan, arch
) -> Tensor:
    return x.new_empty(*x.shape[:-1], folded_weight.shape[0])


def _reference(
    x, mean, rstd, norm_weight, norm_bias, eps, weight, bias, folded_weight, colsum, folded_bias, act, plan, arch
) -> Tensor:
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    if mean is None:
        mean, rstd = _row_statistics(wide, eps)
    mean, rstd = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    product = torch.nn.functional.linear(wide, folded_weight.to(wide.dtype))
    return activate((product - mean * colsum) * rstd + folded_bias, act).to(x.dtype)


def _row_statistics(wide: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(flat(wide), -1, correction=0)
    return mean, torch.where(variance == 0, 0, torch.rsqrt(variance + eps))


register(
    "folded_linear_fwd(Tensor x, Tensor? mean, Tensor? rstd, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight,"
    " Tensor? bias, Tensor folded_weight, Tensor colsum, Tensor folded_bias, str? act, str plan, str arch) -> Tensor",
    fake=_fake,
    stem="folded_linear",
    reference=_reference,
)


def _statistics_fake(x, weight, bias, layer_scale, residual, eps, plan, arch) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (residual.new_empty(residual.numel() // residual.shape[-1], dtype=torch.float32) for _ in range(2))
    return residual.new_empty(residual.shape), mean, rstd


def _statistics_reference(x, weight, bias, layer_scale, residual, eps, plan, arch) -> tuple[Tensor, Tensor, Tensor]:
    options = (residual.dtype, "none", False, plan, arch)
    y, _ = torch.ops.vitkernels.linear_fwd(x, weight, bias, None, layer_scale, None, residual, *options)
    return y, *_row_statistics(y.float(), eps)


register(
    "linear_statistics_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor residual, float eps, str plan,"
    " str arch) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_statistics_fake,
    stem="folded_linear",
    reference=_statistics_reference,
)


def folds(x: Tensor, folded: Folded, act: str | None) -> bool:
    """Whether a table has a folded GEMM for as many rows as ``x``'s; while compiling, for any number of rows."""
    weight = folded.weight
    # The float32 stream of autocast would be rounded before its mean is subtracted; float32 has no rounding of LN(x) to save.
    if not compute_dtype(x) == x.dtype == weight.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if not _env.HAS_TRITON:
        return False
    plan, arch = gemm_plan(inference=True), _select.target(x)
    if plan in PLANS or arch is None:
        return plan == "triton"
    N, K = weight.shape
    if torch.compiler.is_compiling():
        return _any_rows(x.get_device() if x.is_cuda else -1, arch, x.dtype, N, K, act)
    kernels = importlib.import_module("vitkernels.kernels.folded_linear")  # Triton, on a GPU only
    rows = x.new_empty((x.numel() // K, K), device="meta")  # contiguous, as what a GEMM of ours writes, and its next one reads
    return kernels.config(rows, weight, act, plan, arch) is not None


@_select.run_by_dynamo  # which reads no files and asks no driver
def _any_rows(device_index: int, arch: str, dtype: torch.dtype, N: int, K: int, act: str | None) -> bool:
    device, tables = (importlib.import_module(f"vitkernels.kernels.{name}") for name in ("_device", "_tuned"))
    gpu = device.gpu_name(device_index, arch)
    return tables.any_gemm(gpu, "norm" if act is None else "norm_act", dtype, N, K)


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float],
    folded: Folded,
    act: str | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """``linear(x, weight, bias, act=act, norm=norm)`` without gradients, by ``folded`` where that is as accurate and faster.

    ``statistics``: of ``x``'s rows, from ``linear_statistics`` with the norm's eps, for a caller who knows that this ``folds``.
    """
    others = (bias, *norm[:2], *folded)
    here = statistics is not None or folds(x, folded, act)
    if not here or not _select.use_kernel("linear", x, lambda: why_not(x, weight, *others, norm=True), MIN_BYTES):
        return linear(x, weight, bias, act=act, norm=norm)
    norm_weight, norm_bias, eps = norm
    settings = (act, gemm_plan(inference=True), _select.target(x) or "")
    rows = (None, None) if statistics is None else statistics
    return torch.ops.vitkernels.folded_linear_fwd(x, *rows, norm_weight, norm_bias, eps, weight, bias, *folded, *settings)


def linear_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, residual: Tensor, eps: float
) -> tuple[Tensor, Statistics | None]:
    """``linear(x, weight, bias, layer_scale=layer_scale, residual=residual)`` without gradients, and statistics of its rows.

    No statistics where PyTorch's operators run. For callers whose next LayerNorm, of this eps, ``folds``.
    """

    def reasons() -> list[str]:
        return why_not(x, weight, bias, layer_scale, residual)

    of_one_dtype = x.dtype == residual.dtype == (residual if layer_scale is None else layer_scale).dtype
    if not of_one_dtype or not _select.use_kernel("linear", x, reasons, MIN_BYTES):
        return linear(x, weight, bias, layer_scale=layer_scale, residual=residual), None
    plan, arch = gemm_plan(inference=True), _select.target(x) or ""
    y, *rows = torch.ops.vitkernels.linear_statistics_fwd(x, weight, bias, layer_scale, residual, eps, plan, arch)
    return y, Statistics(*rows)
