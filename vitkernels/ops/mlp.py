"""Pre-norm MLP with its residual connection, on the operators of ``layer_norm.py`` and ``linear.py``. Parts as there.

One ``autograd.Function`` for LayerNorm and both layers: forward saves x, its row statistics and fc1's pre-activation z, or
x and the statistics alone, and backward adds the gradient of the residual connection in LayerNorm's own pass.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _env, _select, reference
from .._recording import cast
from ..reference.linear import ACTIVATIONS
from ..reference.mlp import Parameters
from . import _check
from ._autograd import first_order
from ._register import register
from .folded_linear import Folded, Statistics, folded_linear, folds, linear_statistics
from .layer_norm import check_norm, shifted
from .linear import (
    MIN_BYTES,
    check_bias,
    check_drop_path,
    compute_dtype,
    flat,
    gemm_plan,
    gemm_settings,
    incoming,
    linear,
    matmul,
    parameter_gradients,
    promoted,
    through_weight,
    weight_dtypes,
)
from .linear import why_not as linear_why_not


def why_not(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the MLP's kernels cannot take these tensors (``others``: whatever else goes in); empty when they can."""
    reasons = linear_why_not(x, fc1_weight, fc2_weight, *others, norm=True)
    if fc1_weight.dtype != fc2_weight.dtype and _select.autocast_dtype(x) is None:
        reasons.append(f"fc1_weight is {fc1_weight.dtype}, fc2_weight {fc2_weight.dtype}")
    return reasons


def _mlp_fwd_fake(
    x, owed, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, layer_scale, drop_path,
    out_dtype, keep, allow_tf32, plan, arch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.promote_types(torch.float32, x.dtype)) for _ in range(2))
    shape = (*x.shape[:-1], fc1_weight.shape[0]) if keep else 0
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd, fc1_weight.new_empty(shape)


def _mlp_fwd_reference(
    x, owed, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, layer_scale, drop_path,
    out_dtype, keep, allow_tf32, plan, arch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ops, gemm = torch.ops.vitkernels, (allow_tf32, plan, arch)
    h, mean, rstd = ops.layer_norm_fwd(x, norm_weight, norm_bias, eps, fc1_weight.dtype, owed)
    u, z = ops.linear_fwd(h, fc1_weight, fc1_bias, act, None, None, None, h.dtype, "also" if keep else "none", *gemm)
    residual = x if owed is None else shifted(x, owed)
    y, _ = ops.linear_fwd(u, fc2_weight, fc2_bias, None, layer_scale, drop_path, residual, out_dtype, "none", *gemm)
    return y, mean, rstd, z


register(
    "mlp_fwd(Tensor x, Tensor? owed, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias,"
    " Tensor fc2_weight, Tensor? fc2_bias, str? act, Tensor? layer_scale, Tensor? drop_path, ScalarType out_dtype, bool keep,"
    " bool allow_tf32, str plan, str arch) -> (Tensor y, Tensor mean, Tensor rstd, Tensor z)",
    fake=_mlp_fwd_fake,
    stem="mlp",
    reference=_mlp_fwd_reference,
)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop_path, owed,
        eps, act, recompute, out_dtype, trains, allow_tf32, plan, arch,
    ):  # fmt: skip
        gemm = (allow_tf32, plan, arch)
        keep = trains and not recompute and any(ctx.needs_input_grad)
        y, mean, rstd, z = torch.ops.vitkernels.mlp_fwd(
            x, owed, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, layer_scale, drop_path,
            out_dtype, keep, *gemm,
        )  # fmt: skip
        parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop_path, owed)
        ctx.save_for_backward(x, mean, rstd, z if keep else None, *parameters)
        ctx.settings = eps, act, gemm
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dy):
        x, mean, rstd, z, *parameters = saved
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop_path, owed = parameters
        eps, act, gemm = ctx.settings
        ops, dtype = torch.ops.vitkernels, fc1_weight.dtype
        need_dx, need_dnw, need_dnb, need_dw1, need_db1, need_dw2, need_db2, need_dls, _, need_dowed = ctx.needs_input_grad[:10]
        need_dh = need_dx or need_dnw or need_dnb or need_dowed
        need_u = need_dw2 or need_dls
        h: Any = None
        if need_dw1 or z is None:
            h, _, _ = ops.layer_norm_fwd(x, norm_weight, norm_bias, eps, dtype, owed)
        if z is None:  # the bits of the forward's z: the same kernel in the same configuration
            preact = "none" if act is None else "only"
            u, z = ops.linear_fwd(h, fc1_weight, fc1_bias, act, None, None, None, dtype, preact, *gemm)
            z = u if act is None else z

        g, s = incoming(dy, fc2_weight, layer_scale, drop_path, need_db2 or need_dls)
        du = through_weight(g, fc2_weight, layer_scale)
        if act is None:
            (dz, db1), u = incoming(du, fc1_weight, None, None, need_db1), z
        else:
            dz, u, db1, _ = ops.linear_bwd(du, z, act, None, None, dtype, True, need_u, need_db1, False)
        del du, z
        needs = (need_dw2, need_db2, need_dls)
        dw2, db2, dls = parameter_gradients(dy, g, s, u, fc2_weight, fc2_bias, layer_scale, drop_path, needs)
        del u
        dw1 = flat(dz).t() @ flat(h) if need_dw1 else None
        dx, dnw, dnb, dowed = None, None, None, None
        if need_dh:
            dx, _, dnw, dnb, _ = ops.add_layer_norm_bwd(
                matmul(dz, fc1_weight), dy, x, None, norm_weight, norm_bias, None, mean, rstd, x.dtype, x.dtype,
                need_dnw, need_dnb, owed,
            )  # fmt: skip
            if need_dowed:
                dowed = incoming(dx, fc1_weight, None, None, True, False)[1].to(owed.dtype)
        return (
            dx if need_dx else None,
            dnw if need_dnw else None,
            dnb if need_dnb else None,
            dw1,
            db1.to(fc1_bias.dtype) if need_db1 else None,
            dw2,
            db2,
            dls,
            None,
            dowed,
            *(None,) * 8,
        )


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
    """Second half of a ViT block: ``x + drop_path * layer_scale * (act(LN(x) @ fc1^T + b1) @ fc2^T + b2)``.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, equation 3.

    Args:
        x: (..., D), the residual stream.
        norm_weight, norm_bias: (D,) or None; eps: of the LayerNorm.
        fc1_weight: (F, D), fc1_bias: (F,) or None.
        fc2_weight: (D, F), fc2_bias: (D,) or None.
        act: as in ``linear``.
        layer_scale: (D,) or None.
        drop_path: as in ``linear``.
        recompute: save nothing of width F for backward, which computes fc1 again: bitwise the same gradients, 11% more FLOPs
            in the training of a block, 6 instead of 10 units saved.

    Returns:
        (..., D). Twice differentiable only through the reference; kernels raise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernels cannot run; the message lists why.
    """
    op = "mlp"
    _check.tensor(op, "x", x)
    width = _check.last_dim(op, "x", x)
    eps = check_norm(op, x, norm_weight, norm_bias, eps, x.dtype, ("norm_weight", "norm_bias", "eps"))
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        _check.tensor(op, name, weight, weight_dtypes(x))
    _check.shape(op, "fc1_weight", fc1_weight, ("F", width))
    _check.vector(op, "fc1_bias", fc1_bias, fc1_weight.shape[0])
    _check.shape(op, "fc2_weight", fc2_weight, (width, fc1_weight.shape[0]))
    _check.vector(op, "fc2_bias", fc2_bias, width)
    check_bias(op, "fc1_bias", fc1_bias, x)
    check_bias(op, "fc2_bias", fc2_bias, x)
    _check.vector(op, "layer_scale", layer_scale, width)
    _check.choice(op, "act", act, ACTIVATIONS)
    _check.flag(op, "recompute", recompute)
    if drop_path is not None:
        check_drop_path(op, drop_path, x)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _dispatch(x, parameters, eps, act, layer_scale, drop_path, recompute)


def _dispatch(x, parameters, eps, act, layer_scale, drop_path, recompute, inference=False) -> Tensor:
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters

    def reasons() -> list[str]:
        return why_not(x, fc1_weight, fc2_weight, norm_weight, norm_bias, fc1_bias, fc2_bias, layer_scale, drop_path)

    if not _select.use_kernel("mlp", x, reasons, MIN_BYTES):
        return reference.mlp(
            x, *parameters, eps=eps, act=act, layer_scale=layer_scale, drop_path=drop_path, recompute=recompute
        )
    return _run(x, None, parameters, eps, act, layer_scale, drop_path, recompute, inference)


def _run(x, owed, parameters, eps, act, layer_scale, drop_path, recompute, inference=False) -> Tensor:
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    dtype = compute_dtype(x)
    return _Mlp.apply(
        x, norm_weight, norm_bias, cast(fc1_weight, dtype), fc1_bias, cast(fc2_weight, dtype), fc2_bias, layer_scale, drop_path,
        owed, eps, act, recompute, promoted(dtype, layer_scale, drop_path, x), *gemm_settings(x, dtype, inference),
    )  # fmt: skip


def projected_mlp(
    heads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: Parameters,
    eps: float,
    act: str | None,
    recompute: bool = False,
    inference: bool = False,
) -> Tensor:
    """``mlp(x + heads @ weight^T + bias)``, the second half of a block without LayerScale and drop path. Internal to blocks.

    In 16 bits ``bias`` stays out of what proj writes, and fc2 adds it: ``kernels/mlp.py`` says why.

    Args:
        parameters: of LayerNorm, fc1 and fc2, in the order of ``mlp``.
        inference: as in ``gemm_plan``.
    """

    def reasons() -> list[str]:
        return why_not(heads, weight, parameters[4], x, bias, *parameters)

    narrow = x.dtype == heads.dtype == compute_dtype(x) != torch.float32
    owes = narrow and bias is not None and not _env.ADDMM_COPIES and gemm_plan() != "triton"
    if owes and _select.use_kernel("mlp", x, reasons, MIN_BYTES):
        return _run(linear(heads, weight, residual=x), bias, parameters, eps, act, None, None, recompute, inference)
    return _dispatch(linear(heads, weight, bias, residual=x), parameters, eps, act, None, None, recompute, inference)


def folded_mlp(
    heads: Tensor,
    x: Tensor,
    projection: tuple[Tensor, Tensor | None, Tensor | None],
    parameters: Parameters,
    layer_scale: Tensor | None,
    eps: float,
    act: str | None,
    folded: Folded,
    follower: tuple[Folded, float] | None,
) -> tuple[Tensor, Statistics | None]:
    """The second half of a block without gradients and drop path, by ``folded`` where a table says so. Internal to blocks.

    Args:
        projection: weight, bias and what is left of LayerScale; ``layer_scale``: the same of fc2.
        parameters: of LayerNorm, fc1 and fc2, in the order of ``mlp``.
        folded: fc1 with the LayerNorm in it.
        follower: the next block's qkv with its LayerNorm in it, and that one's eps.

    Returns:
        The block's output and, for a follower that folds, statistics of its rows.
    """
    weight, bias, gamma = projection
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    if folds(x, folded, act):
        x, statistics = linear_statistics(heads, weight, bias, gamma, x, eps)
        norm = (norm_weight, norm_bias, eps)
        hidden = folded_linear(x, fc1_weight, fc1_bias, norm, folded, act, statistics)
        if follower is not None and statistics is not None and folds(x, follower[0], None):
            return linear_statistics(hidden, fc2_weight, fc2_bias, layer_scale, x, follower[1])
        return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=x), None
    if gamma is None and layer_scale is None:
        return projected_mlp(heads, x, weight, bias, parameters, eps, act, inference=True), None
    x = linear(heads, weight, bias, layer_scale=gamma, residual=x)
    return _dispatch(x, parameters, eps, act, layer_scale, None, False, inference=True), None
