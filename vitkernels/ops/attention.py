"""Softmax attention over tokens-major heads, dense or packed. Parts as in ``layer_norm.py``."""

import torch
from torch import Tensor

from .. import _select, reference
from . import _check


def why_not(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, cu_seqlens: Tensor | None = None) -> list[str]:
    """Reasons why the attention kernel cannot take these tensors; empty when it can."""
    return ["this version has no attention kernel", *_select.why_not_here(q, k, v, bias, cu_seqlens)]


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
        bias: additive, broadcastable to (B, H, N, M), or bool (True attends). ``-inf`` masks a key, and a row that masks every
            key gives zeros. Not with ``cu_seqlens``.
        cu_seqlens: int32 (B + 1,), ascending from 0 to total: image b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``, and
            attends to itself only. A length may be 0.
        max_seqlen: the longest of these lengths, if the caller knows it (spares kernels a host synchronisation).

    Returns:
        ``q``'s shape, contiguous; ``q``'s dtype, or autocast's.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "attention"
    _check.tensor(op, "q", q)
    for name, t in (("k", k), ("v", v)):
        _check.tensor(op, name, t, (q.dtype,))
    _check.shape(op, "q", q, ("B", "N", "H", "Dh") if cu_seqlens is None else ("total", "H", "Dh"))
    if cu_seqlens is None:
        _check.shape(op, "k", k, (q.shape[0], "M", *q.shape[2:]))
        _check.shape(op, "v", v, tuple(k.shape))
    else:
        for name, t in (("k", k), ("v", v)):
            _check.shape(op, name, t, tuple(q.shape))
    _check_masks(op, q, k, bias, cu_seqlens)
    _select.use_kernel("attention", q, lambda: why_not(q, k, v, bias, cu_seqlens))  # raises under "fused", never True yet
    return reference.attention(q, k, v, scale=scale, bias=bias, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


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
    _check.tensor("attention_qkv", "qkv", qkv)
    expected = ("B", "N", 3, "H", "Dh") if cu_seqlens is None else ("total", 3, "H", "Dh")
    _check.shape("attention_qkv", "qkv", qkv, expected)
    if cu_seqlens is not None or bias is not None:
        q, k, _ = qkv.unbind(-3)
        _check_masks("attention_qkv", q, k, bias, cu_seqlens)
    # raises under "fused", never True yet
    _select.use_kernel("attention_qkv", qkv, lambda: why_not(*qkv.unbind(-3), bias, cu_seqlens))
    return reference.attention_qkv(qkv, scale=scale, bias=bias, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def _check_masks(op: str, q: Tensor, k: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        _check.tensor(op, "cu_seqlens", cu_seqlens, (torch.int32,))
        _check.shape(op, "cu_seqlens", cu_seqlens, ("B + 1",))
        if bias is not None:
            raise ValueError(f"{op}: bias cannot be given together with cu_seqlens")
    elif bias is not None:
        batch, queries, heads, _ = q.shape
        _check.tensor(op, "bias", bias, (*_check.FLOATS, torch.bool))
        _check.broadcastable(op, "bias", bias, (batch, heads, queries, k.shape[1]))
