"""Softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), tokens-major.

(1)  s = scale * q @ k^T + bias          per image and head, (N, M)
(2)  p = softmax(s) over the keys        a row whose every s is -inf gives p = 0
(3)  o = p @ v                           (N, Dh)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Equations (1) to (3). See ``vitkernels.ops.attention``; ``max_seqlen`` is a hint that only kernels need."""
    if cu_seqlens is None:
        return dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, _accepted(bias, q))
    return _packed("attention", q, k, v, scale, cu_seqlens)


def _packed(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, cu_seqlens: Tensor) -> Tensor:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > q.shape[0]:
        raise ValueError(f"{op}: cu_seqlens must ascend from 0 to at most {q.shape[0]}, the tokens, got {ends}")
    ranges = list(itertools.pairwise(ends)) or [(0, 0)]  # without an image, one of no tokens: q, k and v get their gradients
    images = [attention(q[None, a:b], k[None, a:b], v[None, a:b], scale=scale)[0] for a, b in ranges]
    return torch.cat([*images, images[0].new_zeros(q.shape[0] - ends[-1], *q.shape[1:])])  # tokens of no image: zeros


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None, is_causal: bool = False) -> Tensor:
    """Heads first, (B, H, N, Dh), as views; returns (B, N, H, Dh). TorchScript can compile it."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous()  # (B, N, H, Dh)


def _accepted(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """In a shape and dtype that scaled_dot_product_attention accepts."""
    if bias is None:
        return None
    if bias.dim() < 2:
        bias = bias.reshape(1, -1)
    if bias.dtype in (torch.bool, q.dtype):
        return bias
    dtype, cast = q.dtype, not q.is_meta and torch.is_autocast_enabled(q.device.type)
    if cast and dtype != torch.float64:
        if bias.dtype != torch.float64:
            return bias  # autocast casts all but float64
        dtype = torch.get_autocast_dtype(q.device.type)
    elif q.is_cpu and not cast:  # there PyTorch takes float32 beside every dtype
        if bias.dtype == torch.float32:
            return bias
        dtype = torch.promote_types(torch.float32, dtype)
    least = torch.finfo(dtype).min
    if torch.finfo(bias.dtype).min < least:  # the least numbers stay finite: a row of them alone masks nothing
        bias = bias.masked_fill((bias < least) & (bias > -torch.inf), least)
    return bias.to(dtype)


def attention_qkv(
    qkv: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """``attention`` of a packed projection. See ``vitkernels.ops.attention_qkv``."""
    if cu_seqlens is None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # timm's own views, (B, H, N, Dh)
        return dense(q, k, v, scale, _accepted(bias, qkv))
    q, k, v = qkv.unbind(1)
    return _packed("attention_qkv", q, k, v, scale, cu_seqlens)
