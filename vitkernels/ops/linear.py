"""Linear layer with a LayerNorm before it and activation, LayerScale, drop path and residual after it.

Parts as in ``layer_norm.py``. Forward is one operator (``kernels/linear.py`` plans it: one fused GEMM, or cuBLAS and an
elementwise kernel); backward is one elementwise operator between PyTorch's GEMMs.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _select, reference
from .._recording import cast
from ..reference.linear import ACTIVATIONS, activate
from . import _check
from ._autograd import first_order
from ._register import register
from .layer_norm import KERNEL_DTYPES, MAX_D, check_norm

# As for layer_norm, whose comment derives it: a smaller x belongs to a block that waits for the host.
MIN_BYTES = 8 * 2**20
PLANS = ("cublas", "triton")  # of a GEMM with its epilogue


# 1. Registration. Bytes per element of y: forward as in kernels/linear.py; backward with an activation reads 2 and writes 2,
# without one it reads 1, and writes 1 where dz is not dy.


def _linear_fwd_fake(
    x, weight, bias, act, layer_scale, drop_path, residual, out_dtype, preact, allow_tf32, plan, arch
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    y = x.new_empty(0 if preact == "only" else shape, dtype=x.dtype if preact == "only" else out_dtype)
    return y, x.new_empty(0 if preact == "none" else shape)


def _linear_fwd_reference(
    x, weight, bias, act, layer_scale, drop_path, residual, out_dtype, preact, allow_tf32, plan, arch
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    tensors = (x, weight, bias, layer_scale, drop_path, residual)
    compute = torch.promote_types(torch.float32, dtype)
    x, weight, bias, layer_scale, drop_path, residual = (None if t is None else t.to(compute) for t in tensors)
    z = torch.nn.functional.linear(x, weight, bias)
    if preact == "only":
        return z.new_empty(0, dtype=dtype), z.to(dtype)
    y = activate(z, act)
    y = y if layer_scale is None else y * layer_scale
    y = y if drop_path is None else y * drop_path
    y = y if residual is None else residual + y
    return y.to(out_dtype).contiguous(), z.to(dtype, copy=True) if preact == "also" else z.new_empty(0, dtype=dtype)


register(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, str? act, Tensor? layer_scale, Tensor? drop_path, Tensor? residual,"
    " ScalarType out_dtype, str preact, bool allow_tf32, str plan, str arch) -> (Tensor y, Tensor z)",
    fake=_linear_fwd_fake,
    stem="linear",
    reference=_linear_fwd_reference,
)


def _linear_bwd_fake(dy, z, act, layer_scale, drop_path, dtype, need_dz, need_u, need_dbias, need_dlayer_scale):
    sums = torch.promote_types(torch.float32, dy.dtype)
    return (
        *(dy.new_empty(dy.shape if need else 0, dtype=dtype) for need in (need_dz, need_u)),
        *(dy.new_empty(dy.shape[-1] if need else 0, dtype=sums) for need in (need_dbias, need_dlayer_scale)),
    )


def _derivative(act: str | None, z: Tensor) -> Tensor:
    """act'(z) by PyTorch's own backward operators."""
    one = torch.ones_like(z)
    if act is None:
        return one
    if act in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_backward(one, z, approximate="tanh" if act == "gelu_tanh" else "none")
    if act == "silu":
        return torch.ops.aten.silu_backward(one, z)
    s = torch.sigmoid(1.702 * z)
    return s + 1.702 * z * s * (1 - s)


def _linear_bwd_reference(dy, z, act, layer_scale, drop_path, dtype, need_dz, need_u, need_dbias, need_dlayer_scale):
    compute = torch.promote_types(torch.float32, dy.dtype)
    g = dy.to(compute) if drop_path is None else dy.to(compute) * drop_path.to(compute)
    dz, u = g if layer_scale is None else g * layer_scale.to(compute), g
    if z is not None:
        z = z.to(compute)
        u, dz = activate(z, act), dz * _derivative(act, z)
    nothing, layout = dy.new_empty(0), torch.contiguous_format
    return (
        dz.to(dtype, copy=True, memory_format=layout) if need_dz else nothing.to(dtype, copy=True),
        u.to(dtype, copy=True, memory_format=layout) if need_u else nothing.to(dtype, copy=True),
        flat(dz).sum(0) if need_dbias else nothing.to(compute, copy=True),
        flat(g * u).sum(0) if need_dlayer_scale else nothing.to(compute, copy=True),
    )


register(
    "linear_bwd(Tensor dy, Tensor? z, str? act, Tensor? layer_scale, Tensor? drop_path, ScalarType dtype, bool need_dz,"
    " bool need_u, bool need_dbias, bool need_dlayer_scale) -> (Tensor dz, Tensor u, Tensor dbias, Tensor dlayer_scale)",
    fake=_linear_bwd_fake,
    stem="linear_bwd",
    reference=_linear_bwd_reference,
)


def _layer_scale_bwd_fake(product, sums, weight, bias, layer_scale, need_dweight, need_dbias, need_dlayer_scale):
    return tuple(
        weight.new_empty(0, dtype=(weight if like is None else like).dtype) if not need else like.new_empty(like.shape)
        for like, need in ((weight, need_dweight), (bias, need_dbias), (layer_scale, need_dlayer_scale))
    )


def _layer_scale_bwd_reference(product, sums, weight, bias, layer_scale, need_dweight, need_dbias, need_dlayer_scale):
    scale, product = layer_scale.to(sums.dtype), product.to(sums.dtype)
    nothing = weight.new_empty(0)
    dweight, dbias, dlayer_scale = nothing, nothing, nothing
    if need_dweight:
        dweight = product * scale[:, None]
    if need_dbias:
        dbias = sums * scale
    if need_dlayer_scale:
        dlayer_scale = (weight.to(sums.dtype) * product).sum(1)
        dlayer_scale = dlayer_scale if bias is None else dlayer_scale + bias.to(sums.dtype) * sums
    return tuple(
        value.to((weight if like is None else like).dtype, copy=True, memory_format=torch.contiguous_format)
        for value, like in ((dweight, weight), (dbias, bias), (dlayer_scale, layer_scale))
    )


register(
    "layer_scale_bwd(Tensor product, Tensor sums, Tensor weight, Tensor? bias, Tensor layer_scale, bool need_dweight,"
    " bool need_dbias, bool need_dlayer_scale) -> (Tensor dweight, Tensor dbias, Tensor dlayer_scale)",
    fake=_layer_scale_bwd_fake,
    stem="linear_bwd",
    reference=_layer_scale_bwd_reference,
)


# 2. Why not.


def why_not(x: Tensor, weight: Tensor, *others: Tensor | None, norm: bool = False) -> list[str]:
    """Reasons why the linear kernels cannot take these tensors (``others``: whatever else goes in); empty when they can."""
    tensors = [t for t in (x, weight, *others) if t is not None]
    reasons = _select.why_not_here(*tensors)
    unsupported = sorted({str(t.dtype) for t in tensors if t.dtype not in KERNEL_DTYPES})
    if unsupported:
        reasons.append(f"the linear kernels take float32, float16 and bfloat16, got {', '.join(unsupported)}")
    if _select.autocast_dtype(x) is None and weight.dtype != x.dtype:
        reasons.append(f"x is {x.dtype}, its weight {weight.dtype}")
    if 0 in weight.shape:
        reasons.append(f"a weight of shape {tuple(weight.shape)} has no elements")
    if norm and x.shape[-1] > MAX_D:
        reasons.append(f"the LayerNorm kernels take 1 to {MAX_D} channels, got {x.shape[-1]}")
    return reasons


# 3. Autograd.


def flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a`` (..., N) @ ``b`` (N, K) as one GEMM of two matrices."""
    return (flat(a) @ b).view(*a.shape[:-1], b.shape[1])


# Without an activation LayerScale stays out of the activations, equations (8) to (10), in bfloat16 and float32. In float16 G,
# which gamma has not made small yet, could overflow, and gamma times a weight vanish: there g is scaled, and dlayer_scale costs
# one more GEMM for z.


def gamma_in_g(weight: Tensor) -> bool:
    """Is it scaled there? The dtype of g itself does not say: where only the bias is trained, g is dy, in another dtype."""
    return weight.dtype == torch.float16


def incoming(
    dy: Tensor, weight: Tensor, layer_scale: Tensor | None, drop_path: Tensor | None, need_sum: bool, need_g: bool = True
) -> tuple[Tensor, Tensor]:
    """g and s of a layer without activation. g is ``dy`` itself where nothing changes it."""
    scale = layer_scale if gamma_in_g(weight) else None
    changed = need_g and (drop_path is not None or scale is not None or dy.dtype != weight.dtype)
    if not changed and not need_sum:
        return dy, dy
    g, _, s, _ = torch.ops.vitkernels.linear_bwd(
        dy, None, None, scale, drop_path, weight.dtype, changed, False, need_sum, False
    )
    return g if changed else dy, s


def through_weight(g: Tensor, weight: Tensor, layer_scale: Tensor | None) -> Tensor:
    """dh of a layer without activation."""
    if layer_scale is not None and not gamma_in_g(weight):
        weight = (weight * layer_scale[:, None]).to(weight.dtype)
    return matmul(g, weight)


def parameter_gradients(
    dy: Tensor,
    g: Tensor,
    s: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dbias and dlayer_scale of a layer without activation, where ``needs`` says so."""
    need_dweight, need_dbias, need_dlayer_scale = needs
    ops = torch.ops.vitkernels
    if layer_scale is None or gamma_in_g(weight):
        dweight = flat(g).t() @ flat(h) if need_dweight else None
        dlayer_scale = None
        if need_dlayer_scale and layer_scale is not None:
            z = torch.nn.functional.linear(h, weight, None if bias is None else bias.to(h.dtype))
            *_, dlayer_scale = ops.linear_bwd(dy, z, None, None, drop_path, h.dtype, False, False, False, True)
            dlayer_scale = dlayer_scale.to(layer_scale.dtype)
        dbias = s.to(bias.dtype) if need_dbias and bias is not None else None
        return dweight, dbias, dlayer_scale
    if not any(needs):
        return None, None, None
    product = flat(g).t() @ flat(h) if need_dweight or need_dlayer_scale else weight
    s = s.to(torch.promote_types(torch.float32, s.dtype))
    dweight, dbias, dlayer_scale = ops.layer_scale_bwd(product, s, weight, bias, layer_scale, *needs)
    return dweight if need_dweight else None, dbias if need_dbias else None, dlayer_scale if need_dlayer_scale else None


class _Linear(torch.autograd.Function):
    """Saves x if what is trained needs it (with a norm also mean and rstd, not LN(x), which backward rebuilds), and, for an
    activation, z."""

    @staticmethod
    def forward(
        ctx: Any,
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        layer_scale,
        drop_path,
        residual,
        eps,
        act,
        dtype,
        out_dtype,
        trains,
        allow_tf32,
        plan,
        arch,
    ):
        h, mean, rstd = x, None, None
        if eps is not None:
            h, mean, rstd = torch.ops.vitkernels.layer_norm_fwd(x, norm_weight, norm_bias, eps, dtype)
        keep = trains and act is not None and any(ctx.needs_input_grad)
        y, z = torch.ops.vitkernels.linear_fwd(
            h,
            weight,
            bias,
            act,
            layer_scale,
            drop_path,
            residual,
            out_dtype,
            "also" if keep else "none",
            allow_tf32,
            plan,
            arch,
        )
        _, need_dw, _, _, _, need_dls, *_ = ctx.needs_input_grad
        x, z = x if eps is not None or need_dw or need_dls else None, z if keep else None
        ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, layer_scale, drop_path, mean, rstd, z)
        ctx.settings = eps, act, None if residual is None else residual.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dy):
        x, weight, bias, norm_weight, norm_bias, layer_scale, drop_path, mean, rstd, z = saved
        eps, act, residual_dtype = ctx.settings
        need_dx, need_dw, need_db, need_dnw, need_dnb, need_dls, _, need_dr = ctx.needs_input_grad[:8]
        need_dh = need_dx or need_dnw or need_dnb
        h = x
        if eps is not None and (need_dw or (need_dls and act is None)):
            h, _, _ = torch.ops.vitkernels.layer_norm_fwd(x, norm_weight, norm_bias, eps, weight.dtype)
        if act is None:
            g, s = incoming(dy, weight, layer_scale, drop_path, need_db or need_dls, need_dh or need_dw or need_dls)
            dh = through_weight(g, weight, layer_scale) if need_dh else None
            needs = (need_dw, need_db, need_dls)
            dw, db, dls = parameter_gradients(dy, g, s, h, weight, bias, layer_scale, drop_path, needs)
        else:
            dz, _, db, dls = torch.ops.vitkernels.linear_bwd(
                dy, z, act, layer_scale, drop_path, weight.dtype, True, False, need_db, need_dls
            )
            dh = matmul(dz, weight) if need_dh else None
            dw = flat(dz).t() @ flat(h) if need_dw else None
            db = db.to(bias.dtype) if need_db else None
            dls = dls.to(layer_scale.dtype) if need_dls else None
        dx, dnw, dnb = dh, None, None
        if eps is not None and need_dh:
            dx, dnw, dnb = torch.ops.vitkernels.layer_norm_bwd(dh, x, norm_weight, norm_bias, mean, rstd, need_dnw, need_dnb)
        return (
            dx if need_dx else None,
            dw,
            db,
            dnw if need_dnw else None,
            dnb if need_dnb else None,
            dls,
            None,
            dy.to(residual_dtype) if need_dr else None,
            *(None,) * 8,
        )


# 4. The public function.


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
    """Linear layer with prologue and epilogue: ``residual + drop_path * layer_scale * act(LN?(x) @ weight^T + bias)``.

    Args:
        x: (..., K).
        weight: (N, K), bias: (N,) or None, as ``nn.Linear``: of ``x``'s dtype outside autocast.
        act: None, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` (x * sigmoid(1.702 x)) or ``"silu"``. No gated form: its
            tile needs two accumulators. Blocks with a gated MLP run timm's forward, and ``explain`` says so.
        layer_scale: (N,) or None.
        residual: (..., N) or None; may be wider than ``x`` (the float32 stream under autocast) and is never cast.
        norm: (weight, bias, eps) of a LayerNorm over K, or None.
        drop_path: (B, 1, ..., 1) as timm draws it, of ``x``'s rank and leading size, or None. No gradient.

    Returns:
        (..., N), of the dtype that PyTorch's promotion gives. Twice differentiable only through the reference; kernels raise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "linear"
    _check.tensor(op, "x", x)
    _check.tensor(op, "weight", weight, weight_dtypes(x))
    _check.shape(op, "weight", weight, ("N", _check.last_dim(op, "x", x)))
    _check.choice(op, "act", act, ACTIVATIONS)
    _check.vector(op, "bias", bias, weight.shape[0])
    check_bias(op, "bias", bias, x)
    _check.vector(op, "layer_scale", layer_scale, weight.shape[0])
    if residual is not None:
        _check.tensor(op, "residual", residual)
        _check.shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if norm is not None:
        if not isinstance(norm, (tuple, list)):
            raise TypeError(f"{op}: norm must be (weight, bias, eps), got {type(norm).__name__}")
        if len(norm) != 3:
            raise ValueError(f"{op}: norm must be (weight, bias, eps), got {len(norm)} elements")
        norm = (*norm[:2], check_norm(op, x, *norm, x.dtype, ("norm's weight", "norm's bias", "norm's eps")))
    if drop_path is not None:
        check_drop_path(op, drop_path, x)

    def reasons() -> list[str]:
        return why_not(x, weight, bias, layer_scale, residual, drop_path, *(norm or ())[:2], norm=norm is not None)

    if not _select.use_kernel(op, x, reasons, MIN_BYTES):
        return reference.linear(
            x, weight, bias, act=act, layer_scale=layer_scale, residual=residual, norm=norm, drop_path=drop_path
        )
    dtype = compute_dtype(x)
    norm_weight, norm_bias, eps = (None, None, None) if norm is None else norm
    return _Linear.apply(
        x if norm is not None else cast(x, dtype),
        cast(weight, dtype),
        bias,
        norm_weight,
        norm_bias,
        layer_scale,
        drop_path,
        residual,
        eps,
        act,
        dtype,
        promoted(dtype, layer_scale, drop_path, residual),
        *gemm_settings(x, dtype),
    )


def weight_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What a weight that ``x`` is multiplied with may be; autocast casts both."""
    return (x.dtype,) if _select.autocast_dtype(x) is None else _check.FLOATS


def check_bias(op: str, name: str, bias: Tensor | None, x: Tensor) -> None:
    """``bias`` is of ``x``'s dtype, unless autocast casts it: PyTorch adds no other."""
    if bias is not None and bias.dtype != x.dtype:
        _check.tensor(op, name, bias, weight_dtypes(x))


def check_drop_path(op: str, drop_path: Tensor, x: Tensor) -> None:
    """``drop_path`` has one element for each sample of ``x``."""
    _check.tensor(op, "drop_path", drop_path)
    if x.dim() < 2:
        raise ValueError(f"{op}: drop_path needs an x of at least two dimensions, got {tuple(x.shape)}")
    _check.shape(op, "drop_path", drop_path, (x.shape[0], *(1,) * (x.dim() - 1)))
    if drop_path.requires_grad:
        raise ValueError(f"{op}: drop_path is a random draw and gets no gradient, but it requires one")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch multiplies ``x`` now."""
    return _select.autocast_dtype(x) or x.dtype


def promoted(dtype: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    """What PyTorch's promotion makes of ``dtype`` and these tensors."""
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def gemm_settings(x: Tensor, dtype: torch.dtype, inference: bool = False) -> tuple[bool, bool, str, str]:
    """The global state that a GEMM depends on: does autograd record, may float32 be TF32, plan and architecture."""
    allow_tf32 = dtype == torch.float32 and allows_tf32()
    return torch.is_grad_enabled(), allow_tf32, gemm_plan(inference), _select.target(x) or ""


def gemm_plan(inference: bool = False) -> str:
    """``auto``: what the tuned table says, or what is forced.

    ``inference``: with cuBLASLt's activation, too, which leaves no z for backward. Bits would depend on the grad mode, so only
    ``fuse(model, inference=True)`` asks for it.
    """
    return _select.choose_plan(PLANS, lambda: "inference" if inference else "auto")


@_select.run_by_dynamo
def allows_tf32() -> bool:
    """May a matrix product of float32 tensors run in TF32?"""
    # Not allow_tf32: reading that raises once a program has used the newer setting.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
