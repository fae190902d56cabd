"""LayerNorm and residual add + LayerNorm: the annotated example of the seam that every stem follows.

The parts of a stem's file in ``ops/``, in this order:

1. Registration: for forward and backward each a schema, a fake, and the reference that a CPU runs. ``kernels/`` is named, not
   imported. An output that a call does not want is an empty tensor of size 0, since a schema cannot return None.
2. ``why_not``: from metadata alone, the reasons why the kernel cannot take these arguments. Empty: it can.
3. ``autograd.Function``: saves what backward needs and calls the explicit backward operator.
4. The public function: checks its arguments, then asks ``_select`` for kernel or reference. Everything that depends on
   global state (policy, autocast) is decided here and passed down as an argument.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _select, reference
from . import _check
from ._autograd import first_order
from ._register import register

MAX_D = 8192
# A smaller x belongs to a ViT block that waits for the host: eager's ten launches (6 us each, assumed) take longer than the
# block's device time below 4 MB (B/16) to 9 MB (S/16), and our launch costs the host about 12 us more. Derived from the
# roofline, to be replaced by a measurement. Only the `auto` policy looks at it.
MIN_BYTES = 8 * 2**20
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# 1. Registration. Bytes per element of x, in its dtype: layer_norm reads 1 and writes 1, its backward reads 2 and writes 1;
# add_layer_norm reads 2 and writes 2, its backward reads 3 (dy, dstream, stream; x as well for dlayer_scale) and writes 1
# (2 when dx differs from dresidual). shift (D,) is added to each row of x, or of the stream in backward, in float32: what is
# stored lacks it, as the stream of a block lacks the bias of proj until fc2 has added it (mlp.py).


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(torch.float32, x.dtype))


def _empty_like_if(wanted: bool, like: Tensor | None, x: Tensor) -> Tensor:
    if like is None or not wanted:
        return x.new_empty(0)
    return like.new_empty(like.shape)


def _layer_norm_fwd_fake(x, weight, bias, eps, out_dtype, shift=None):
    return x.new_empty(x.shape, dtype=out_dtype), _statistics_like(x), _statistics_like(x)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + shift, not rounded."""
    compute = torch.promote_types(torch.float32, x.dtype)
    return x.to(compute) if shift is None else x.to(compute) + shift.to(compute)


def _layer_norm_fwd_reference(x, weight, bias, eps, out_dtype, shift=None):
    x = shifted(x, shift)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y.to(out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


register(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype, Tensor? shift=None)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_layer_norm_fwd_fake,
    stem="layer_norm",
    reference=_layer_norm_fwd_reference,
)


def _layer_norm_bwd_fake(dy, x, weight, bias, mean, rstd, need_dweight, need_dbias):
    return x.new_empty(x.shape), _empty_like_if(need_dweight, weight, x), _empty_like_if(need_dbias, bias, x)


def _layer_norm_bwd_reference(dy, x, weight, bias, mean, rstd, need_dweight, need_dbias):
    compute = torch.promote_types(torch.float32, x.dtype)
    wanted = [True, need_dweight and weight is not None, need_dbias and bias is not None]
    grads = torch.ops.aten.native_layer_norm_backward(
        dy.to(compute),
        x.to(compute),
        x.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        None if weight is None else weight.to(compute),
        None if bias is None else bias.to(compute),
        wanted,
    )
    likes = (x, weight, bias)
    return tuple(g.to(like.dtype) if want else x.new_empty(0) for g, like, want in zip(grads, likes, wanted, strict=True))


register(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_layer_norm_bwd_fake,
    stem="layer_norm",
    reference=_layer_norm_bwd_reference,
)


def _add_layer_norm_fwd_fake(x, residual, weight, bias, layer_scale, eps, stream_dtype, out_dtype):
    stream = x.new_empty(x.shape, dtype=stream_dtype)
    return x.new_empty(x.shape, dtype=out_dtype), stream, _statistics_like(stream), _statistics_like(stream)


def _add_layer_norm_fwd_reference(x, residual, weight, bias, layer_scale, eps, stream_dtype, out_dtype):
    compute = torch.promote_types(torch.float32, stream_dtype)
    branch = x.to(compute) if layer_scale is None else x.to(compute) * layer_scale.to(compute)
    stream = (residual.to(compute) + branch).to(stream_dtype).contiguous()
    y, mean, rstd = _layer_norm_fwd_reference(stream, weight, bias, eps, out_dtype)
    return y, stream, mean, rstd


register(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? layer_scale, float eps,"
    " ScalarType stream_dtype, ScalarType out_dtype) -> (Tensor y, Tensor stream, Tensor mean, Tensor rstd)",
    fake=_add_layer_norm_fwd_fake,
    stem="layer_norm",
    reference=_add_layer_norm_fwd_reference,
)


def _dx_is_dresidual(layer_scale: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> bool:
    return layer_scale is None and x_dtype == residual_dtype


def _add_layer_norm_bwd_fake(
    dy, dstream, stream, x, weight, bias, layer_scale, mean, rstd, x_dtype, residual_dtype, need_dweight, need_dbias, shift=None
):
    shared = _dx_is_dresidual(layer_scale, x_dtype, residual_dtype)
    return (
        stream.new_empty(stream.shape, dtype=residual_dtype),
        stream.new_empty(0 if shared else stream.shape, dtype=x_dtype),
        _empty_like_if(need_dweight, weight, stream),
        _empty_like_if(need_dbias, bias, stream),
        _empty_like_if(x is not None, layer_scale, stream),
    )


def _add_layer_norm_bwd_reference(
    dy, dstream, stream, x, weight, bias, layer_scale, mean, rstd, x_dtype, residual_dtype, need_dweight, need_dbias, shift=None
):
    ds, dweight, dbias = _layer_norm_bwd_reference(
        dy, shifted(stream, shift), weight, bias, mean, rstd, need_dweight, need_dbias
    )
    ds = ds + dstream
    dx = ds if layer_scale is None else ds * layer_scale
    dlayer_scale = stream.new_empty(0)
    if layer_scale is not None and x is not None:
        dlayer_scale = (ds * x).sum(dim=tuple(range(x.dim() - 1))).to(layer_scale.dtype)
    shared = _dx_is_dresidual(layer_scale, x_dtype, residual_dtype)
    dx = stream.new_empty(0, dtype=x_dtype) if shared else dx.to(x_dtype, copy=True)
    return ds.to(residual_dtype), dx, dweight, dbias, dlayer_scale


register(
    "add_layer_norm_bwd(Tensor dy, Tensor dstream, Tensor stream, Tensor? x, Tensor? weight, Tensor? bias,"
    " Tensor? layer_scale, Tensor mean, Tensor rstd, ScalarType x_dtype, ScalarType residual_dtype, bool need_dweight,"
    " bool need_dbias, Tensor? shift=None) -> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    fake=_add_layer_norm_bwd_fake,
    stem="layer_norm",
    reference=_add_layer_norm_bwd_reference,
)


# 2. Why not.


def why_not(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> list[str]:
    """Reasons why the LayerNorm kernels cannot take these tensors; empty when they can."""
    tensors = [t for t in (x, weight, bias, residual, layer_scale) if t is not None]
    reasons = _select.why_not_here(*tensors)
    unsupported = sorted({str(t.dtype) for t in tensors if t.dtype not in KERNEL_DTYPES})
    if unsupported:
        reasons.append(f"the LayerNorm kernels compute in float32, got {', '.join(unsupported)}")
    if not 1 <= x.shape[-1] <= MAX_D:
        reasons.append(f"the LayerNorm kernels take 1 to {MAX_D} channels, got {x.shape[-1]}")
    return reasons


# 3. Autograd.


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, out_dtype):
        y, mean, rstd = torch.ops.vitkernels.layer_norm_fwd(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dy):
        x, weight, bias, mean, rstd = saved
        _, need_dweight, need_dbias, _, _ = ctx.needs_input_grad
        dx, dweight, dbias = torch.ops.vitkernels.layer_norm_bwd(dy, x, weight, bias, mean, rstd, need_dweight, need_dbias)
        return dx, dweight if need_dweight else None, dbias if need_dbias else None, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, layer_scale, eps, stream_dtype, out_dtype):
        y, stream, mean, rstd = torch.ops.vitkernels.add_layer_norm_fwd(
            x, residual, weight, bias, layer_scale, eps, stream_dtype, out_dtype
        )
        need_dx, need_dresidual, _, _, need_dlayer_scale, *_ = ctx.needs_input_grad
        if not (need_dx or need_dresidual or need_dlayer_scale):
            ctx.mark_non_differentiable(stream)
        ctx.save_for_backward(stream, x if need_dlayer_scale else None, weight, bias, layer_scale, mean, rstd)
        ctx.dtypes = x.dtype, residual.dtype
        return y, stream

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dy, dstream):
        stream, x, weight, bias, layer_scale, mean, rstd = saved
        _, _, need_dweight, need_dbias, need_dlayer_scale = ctx.needs_input_grad[:5]
        dresidual, dx, dweight, dbias, dlayer_scale = torch.ops.vitkernels.add_layer_norm_bwd(
            dy, dstream, stream, x, weight, bias, layer_scale, mean, rstd, *ctx.dtypes, need_dweight, need_dbias
        )
        return (
            dresidual if _dx_is_dresidual(layer_scale, *ctx.dtypes) else dx,
            dresidual,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dlayer_scale if need_dlayer_scale else None,
            None,
            None,
            None,
        )


# 4. The public functions.


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., D), float32, float16, bfloat16 or float64, any strides.
        weight: (D,) or None (ones). Of ``x``'s dtype, or float32 when ``x`` is float16 or bfloat16; any under autocast.
        bias: (D,) or None (zeros), as ``weight``.
        eps: added to the variance.

    Returns:
        (..., D), contiguous from the kernel. ``x``'s dtype, or float32 under CUDA autocast, as ``F.layer_norm``. Statistics
        are float32. Twice differentiable only through the reference; kernels raise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    _check.tensor("layer_norm", "x", x)
    eps = check_norm("layer_norm", x, weight, bias, eps, x.dtype)
    return dispatch_layer_norm(x, weight, bias, eps)


def dispatch_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``layer_norm`` without the checks, for callers that have made them."""
    if _select.use_kernel("layer_norm", x, lambda: why_not(x, weight, bias), MIN_BYTES):
        return _LayerNorm.apply(x, weight, bias, eps, _select.norm_dtype(x, x.dtype))
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and LayerNorm in one pass: ``stream = residual + layer_scale * x``, returns ``(LN(stream), stream)``.

    Args:
        x: (..., D), the branch's output.
        residual: (..., D), the residual stream; may be wider than ``x`` (float32 beside bfloat16, as under autocast).
        weight, bias, eps: as in ``layer_norm``, of the stream.
        layer_scale: (D,) or None (ones), LayerScale's gamma (Touvron et al. 2021, https://arxiv.org/abs/2103.17239).

    Returns:
        ``LN(stream)`` and ``stream``, both (..., D). The stream has the promoted dtype of ``x`` and ``residual`` (and
        ``layer_scale``), which the kernel rounds once; its normalisation reads the rounded stream.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "add_layer_norm"
    _check.tensor(op, "x", x)
    _check.tensor(op, "residual", residual)
    _check.shape(op, "residual", residual, tuple(x.shape))
    _check.vector(op, "layer_scale", layer_scale, _check.last_dim(op, "x", x))
    stream_dtype = torch.promote_types(x.dtype, residual.dtype)
    if layer_scale is not None:
        stream_dtype = torch.promote_types(stream_dtype, layer_scale.dtype)
    eps = check_norm(op, x, weight, bias, eps, stream_dtype)
    if not _select.use_kernel(op, x, lambda: why_not(x, weight, bias, residual, layer_scale), MIN_BYTES):
        return reference.add_layer_norm(x, residual, weight, bias, eps, layer_scale=layer_scale)
    out_dtype = _select.norm_dtype(x, stream_dtype)
    return _AddLayerNorm.apply(x, residual, weight, bias, layer_scale, eps, stream_dtype, out_dtype)


def check_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    names: tuple[str, str, str] = ("weight", "bias", "eps"),
) -> float:
    """Check the parameters of a LayerNorm of ``dtype`` rows as wide as ``x``'s, by the names that messages give them.

    Returns ``eps``.
    """
    size = _check.last_dim(op, "x", x)
    weight_name, bias_name, eps_name = names
    _check.vector(op, weight_name, weight, size)
    _check.vector(op, bias_name, bias, size)
    eps = _check.number(op, eps_name, eps)
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return eps
    if _select.autocast_dtype(x) is not None:
        return eps
    accepted = (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)
    for name, param in ((weight_name, weight), (bias_name, bias)):
        if param is not None:
            _check.tensor(op, name, param, accepted)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"{op}: {weight_name} and {bias_name} must have one dtype, got {weight.dtype} and {bias.dtype}")
    return eps
