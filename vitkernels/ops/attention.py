"""Softmax attention over tokens-major heads, dense or packed. Parts as in ``layer_norm.py``."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _select, reference
from .._recording import cast
from ..reference.attention import dense
from . import _check
from ._autograd import first_order
from ._register import register
from .linear import allows_tf32

MAX_HEAD_DIM = 256
# As for layer_norm, and derived in the same way: a block whose tokens are below 8 MiB waits for the host, and our launch costs
# the host about 12 us more than PyTorch's. Of one of q, k and v, which are as large as the tokens. Packed images have no
# such limit: PyTorch would read the lengths back and launch once for each image.
MIN_BYTES = 8 * 2**20
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# 1. Registration. Bytes of one of q, k, v and o: forward reads 3 and writes 1; backward reads 5 and writes 3.


def _statistics_like(q: Tensor) -> Tensor:
    *images, queries, heads, _ = q.shape
    return q.new_empty((*images, heads, queries), dtype=torch.promote_types(torch.float32, q.dtype))


def _attention_fwd_fake(q, k, v, bias, cu_seqlens, max_seqlen, scale, allow_tf32):
    return q.new_empty(q.shape), _statistics_like(q), _statistics_like(q)


def _image_slices(cu_seqlens: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]


def _probabilities(s: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
    return ((s - row_max[..., None]) - log_sum[..., None]).exp()


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, N, H, Dh) as (B, H, N, Dh), in the dtype of the statistics."""
    return [t.transpose(1, 2).to(torch.promote_types(torch.float32, t.dtype)) for t in tensors]


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    s = scale * (q @ k.transpose(-1, -2))
    return s if bias is None else s + bias.to(s.dtype)


def _attention_fwd_reference(q, k, v, bias, cu_seqlens, max_seqlen, scale, allow_tf32):
    if cu_seqlens is not None:
        out, row_max, log_sum = _attention_fwd_fake(q, k, v, bias, cu_seqlens, max_seqlen, scale, allow_tf32)
        for t, nothing in ((out, 0), (row_max, 0), (log_sum, torch.inf)):  # tokens of no image keep these
            t.fill_(nothing)
        for rows in _image_slices(cu_seqlens):
            image = (t[None, rows] for t in (q, k, v))
            o, m, log = _attention_fwd_reference(*image, None, None, 0, scale, allow_tf32)
            out[rows], row_max[:, rows], log_sum[:, rows] = o[0], m[0], log[0]
        return out, row_max, log_sum
    if k.shape[1] == 0:
        out, row_max, log_sum = _attention_fwd_fake(q, k, v, bias, cu_seqlens, max_seqlen, scale, allow_tf32)
        return out.zero_(), row_max.zero_(), log_sum.fill_(torch.inf)
    qh, kh, vh = _heads_first(q, k, v)
    s = _logits(qh, kh, bias, scale)
    row_max = s.amax(-1)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    log_sum = (s - row_max[..., None]).exp().sum(-1).log()
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, torch.inf)
    out = _probabilities(s, row_max, log_sum) @ vh
    return out.transpose(1, 2).to(q.dtype).contiguous(), row_max, log_sum


register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cu_seqlens, int max_seqlen, float scale,"
    " bool allow_tf32) -> (Tensor out, Tensor row_max, Tensor log_sum)",
    fake=_attention_fwd_fake,
    stem="attention",
    reference=_attention_fwd_reference,
)


def _dbias_like(q: Tensor, bias: Tensor | None, wanted: bool) -> Tensor:
    return bias.new_empty(bias.shape) if wanted and bias is not None else q.new_empty(0)


def _attention_bwd_fake(
    dout, q, k, v, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias
):  # fmt: skip
    return *(t.new_empty(t.shape) for t in (q, k, v)), _dbias_like(q, bias, need_dbias)


def _attention_bwd_reference(
    dout, q, k, v, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias
):  # fmt: skip
    if cu_seqlens is not None:
        grads = [t.new_zeros(t.shape) for t in (q, k, v)]
        for rows in _image_slices(cu_seqlens):
            image = [t[None, rows] for t in (dout, q, k, v, out)]
            statistics = (row_max[None, :, rows], log_sum[None, :, rows])
            parts = _attention_bwd_reference(*image, *statistics, None, None, 0, scale, allow_tf32, False)
            for grad, part in zip(grads, parts, strict=False):
                grad[rows] = part[0]
        return *grads, q.new_empty(0)
    qh, kh, vh, dh, oh = _heads_first(q, k, v, dout, out)
    p = _probabilities(_logits(qh, kh, bias, scale), row_max, log_sum)
    ds = p * (dh @ vh.transpose(-1, -2) - (dh * oh).sum(-1, keepdim=True))
    grads = (scale * (ds @ kh), scale * (ds.transpose(-1, -2) @ qh), p.transpose(-1, -2) @ dh)
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype, copy=True) if need_dbias and bias is not None else q.new_empty(0)
    return *(g.transpose(1, 2).to(q.dtype).contiguous() for g in grads), dbias


register(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor row_max, Tensor log_sum, Tensor? bias,"
    " Tensor? cu_seqlens, int max_seqlen, float scale, bool allow_tf32, bool need_dbias)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    fake=_attention_bwd_fake,
    stem="attention_backward",
    reference=_attention_bwd_reference,
)


def _attention_qkv_bwd_fake(
    dout, qkv, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias
):  # fmt: skip
    return qkv.new_empty(qkv.shape), _dbias_like(qkv, bias, need_dbias)


def _attention_qkv_bwd_reference(
    dout, qkv, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias
):  # fmt: skip
    *grads, dbias = _attention_bwd_reference(
        dout, *qkv.unbind(-3), out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias
    )
    return torch.stack(grads, -3), dbias


register(
    "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor row_max, Tensor log_sum, Tensor? bias, Tensor? cu_seqlens,"
    " int max_seqlen, float scale, bool allow_tf32, bool need_dbias) -> (Tensor dqkv, Tensor dbias)",
    fake=_attention_qkv_bwd_fake,
    stem="attention_backward",
    reference=_attention_qkv_bwd_reference,
)


# 2. Why not.


def why_not(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, cu_seqlens: Tensor | None = None) -> list[str]:
    """Reasons why the attention kernels cannot take these tensors; empty when they can."""
    tensors = [t for t in (q, k, v, bias) if t is not None]
    reasons = _select.why_not_here(*tensors, cu_seqlens)
    unsupported = sorted({str(t.dtype) for t in tensors if t.dtype not in (*KERNEL_DTYPES, torch.bool)})
    if unsupported:
        reasons.append(f"the attention kernels compute in float32, got {', '.join(unsupported)}")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        reasons.append(f"the attention kernels take a head dim of 1 to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    return reasons


# 3. Autograd.


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, bias, cu_seqlens, max_seqlen, scale, allow_tf32):
        ctx.numbers = (max_seqlen, scale, allow_tf32)
        out, row_max, log_sum = torch.ops.vitkernels.attention_fwd(q, k, v, bias, cu_seqlens, *ctx.numbers)
        ctx.save_for_backward(q, k, v, out, row_max, log_sum, bias, cu_seqlens)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dout):
        need_dbias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = torch.ops.vitkernels.attention_bwd(dout, *saved, *ctx.numbers, need_dbias)
        return dq, dk, dv, dbias if need_dbias else None, None, None, None, None


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, bias, cu_seqlens, max_seqlen, scale, allow_tf32):
        ctx.numbers = (max_seqlen, scale, allow_tf32)
        out, row_max, log_sum = torch.ops.vitkernels.attention_fwd(*qkv.unbind(-3), bias, cu_seqlens, *ctx.numbers)
        ctx.save_for_backward(qkv, out, row_max, log_sum, bias, cu_seqlens)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, saved, dout):
        need_dbias = ctx.needs_input_grad[1]
        dqkv, dbias = torch.ops.vitkernels.attention_qkv_bwd(dout, *saved, *ctx.numbers, need_dbias)
        return dqkv, dbias if need_dbias else None, None, None, None, None


# 4. The public functions.


def takes_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Is ``mask`` None, or one that ``scaled_dot_product_attention`` takes in any case? Operators take a bias of more kinds.

    Of the others PyTorch refuses most, and some only where no gradient is recorded: they are for its own operator.
    """
    if mask is None:
        return True
    cast = _select.autocast_dtype(q) is not None and q.dtype != torch.float64
    dtypes = (torch.bool, *KERNEL_DTYPES) if cast else (torch.bool, torch.float32, q.dtype)
    if not isinstance(mask, Tensor) or mask.dtype not in dtypes or mask.dim() < 2:
        return False
    return _check.broadcasts(tuple(mask.shape), (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


def masked_as_in_pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """(B, N, H, Dh) of PyTorch's own operator, for what is not ``takes_mask``; its error, with a note that tells the mask."""
    try:
        return dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, mask)
    except (IndexError, RuntimeError, TypeError) as error:
        is_tensor = isinstance(mask, Tensor)
        error.add_note(f"attn_mask is a {mask.dtype} tensor of {tuple(mask.shape)}" if is_tensor else f"attn_mask is {mask!r}")
        raise


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Softmax attention, ``softmax(scale * q @ k^T + bias) @ v`` (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        q: (B, N, H, Dh), any strides; (total, H, Dh) with ``cu_seqlens``.
        k, v: (B, M, H, Dh) of ``q``'s dtype; (total, H, Dh) with ``cu_seqlens``.
        scale: default ``Dh ** -0.5``.
        bias: additive, of any float dtype, broadcastable to (B, H, N, M), or bool (True attends). ``-inf`` masks a key, and a
            row that masks every key gives zeros and zero gradients. A row of ``torch.finfo(dtype).min`` alone gives the mean
            of ``v``, as in timm. Read in its own strides and dtype: a key mask (B, 1, 1, M) is not expanded. Not with
            ``cu_seqlens``.
        cu_seqlens: int32 (B + 1,), ascending from 0, never beyond total: image b owns rows
            ``cu_seqlens[b]:cu_seqlens[b + 1]``, and attends to itself only. A length may be 0. Rows from ``cu_seqlens[-1]``
            on belong to no image (a batch padded to a fixed total): whatever they hold, their output and gradients are 0.
            The reference, which reads them, refuses others; the kernels read nothing back and do not look.
        max_seqlen: the longest of these lengths, if the caller knows it. The kernels do without: no length is read back.

    Returns:
        ``q``'s shape, contiguous; ``q``'s dtype, or autocast's. Softmax and sums are float32, products of float32 tensors
        true float32 unless ``torch.backends.cuda.matmul`` allows TF32. Twice differentiable only through the reference;
        kernels raise.

        Gradients of 16-bit inputs are as exact as those of PyTorch's flash attention, which like ours starts from the rounded
        output; with a trained bias, and in float32, as exact as those of its unfused attention.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "attention"
    _check.tensor(op, "q", q)
    dtypes = (q.dtype,) if _select.autocast_dtype(q) is None else _check.FLOATS  # autocast casts them all
    for name, t in (("k", k), ("v", v)):
        _check.tensor(op, name, t, dtypes)
    _check.shape(op, "q", q, ("B", "N", "H", "Dh") if cu_seqlens is None else ("total", "H", "Dh"))
    if cu_seqlens is None:
        _check.shape(op, "k", k, (q.shape[0], "M", *q.shape[2:]))
        _check.shape(op, "v", v, tuple(k.shape))
    else:
        for name, t in (("k", k), ("v", v)):
            _check.shape(op, name, t, tuple(q.shape))
    _check_masks(op, q, k, bias, cu_seqlens)
    scale, max_seqlen = _check_numbers(op, scale, max_seqlen)
    if _no_image(cu_seqlens) or not _use_kernel(op, k, lambda: why_not(q, k, v, bias, cu_seqlens), MIN_BYTES, cu_seqlens):
        return reference.attention(q, k, v, scale=scale, bias=bias, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    q, k, v = (_autocast(t) for t in (q, k, v))
    return _Attention.apply(q, k, v, _additive(bias, q), cu_seqlens, *_numbers(q, max_seqlen, scale))


def attention_qkv(
    qkv: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """``attention`` of a packed projection: what transformer blocks call. One packed gradient comes back.

    Args:
        qkv: (B, N, 3, H, Dh), or (total, 3, H, Dh) with ``cu_seqlens``.
        scale, bias, cu_seqlens, max_seqlen: as in ``attention``.

    Returns:
        (B, N, H, Dh), or (total, H, Dh).

    Raises:
        TypeError, ValueError, RuntimeError: as ``attention``.
    """
    op = "attention_qkv"
    _check.tensor(op, "qkv", qkv)
    _check.shape(op, "qkv", qkv, ("B", "N", 3, "H", "Dh") if cu_seqlens is None else ("total", 3, "H", "Dh"))
    if cu_seqlens is not None or bias is not None:
        q, k, _ = qkv.unbind(-3)
        _check_masks(op, q, k, bias, cu_seqlens)
    scale, max_seqlen = _check_numbers(op, scale, max_seqlen)

    def reasons() -> list[str]:
        q, k, v = qkv.unbind(-3)
        return why_not(q, k, v, bias, cu_seqlens)

    if _no_image(cu_seqlens) or not _use_kernel(op, qkv, reasons, 3 * MIN_BYTES, cu_seqlens):
        return reference.attention_qkv(qkv, scale=scale, bias=bias, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    qkv = _autocast(qkv)
    return _AttentionQKV.apply(qkv, _additive(bias, qkv), cu_seqlens, *_numbers(qkv, max_seqlen, scale))


def _no_image(cu_seqlens: Tensor | None) -> bool:
    """A packed batch of no image: zeros, for which there is nothing to launch."""
    return cu_seqlens is not None and cu_seqlens.shape[0] == 1


def _use_kernel(op: str, x: Tensor, why_not: Callable[[], list[str]], min_bytes: int, cu_seqlens: Tensor | None) -> bool:
    return _select.use_kernel(op, x, why_not, min_bytes if cu_seqlens is None else 0)


def _autocast(x: Tensor) -> Tensor:
    """As autocast casts the arguments of ``scaled_dot_product_attention``: all but float64."""
    dtype = _select.autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else cast(x, dtype)


def _additive(bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None or bias.dtype != torch.bool:
        return bias
    return torch.zeros(bias.shape, dtype=q.dtype, device=bias.device).masked_fill(~bias, -torch.inf)


def _numbers(q: Tensor, max_seqlen: int | None, scale: float | None) -> tuple[int, float, bool]:
    """The operators' last arguments: max_seqlen, scale, allow_tf32."""
    allow_tf32 = q.dtype == torch.float32 and allows_tf32()
    return max_seqlen or 0, q.shape[-1] ** -0.5 if scale is None else float(scale), allow_tf32


def _check_numbers(op: str, scale: float | None, max_seqlen: int | None) -> tuple[float | None, int | None]:
    if scale is not None:
        scale = _check.number(op, "scale", scale)
    if max_seqlen is not None:
        max_seqlen = _check.integer(op, "max_seqlen", max_seqlen)
    return scale, max_seqlen


def _check_masks(op: str, q: Tensor, k: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        _check.tensor(op, "cu_seqlens", cu_seqlens, (torch.int32,))
        _check.shape(op, "cu_seqlens", cu_seqlens, ("B + 1",))
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"{op}: cu_seqlens must have B + 1 elements, got 0")
        if bias is not None:
            raise ValueError(f"{op}: bias cannot be given together with cu_seqlens")
    elif bias is not None:
        batch, queries, heads, _ = q.shape
        _check.tensor(op, "bias", bias, (*_check.FLOATS, torch.bool))
        _check.broadcastable(op, "bias", bias, (batch, heads, queries, k.shape[1]))
