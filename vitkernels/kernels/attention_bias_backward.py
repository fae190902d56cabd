"""Gradient of the bias of attention: ds of eq. (6) in ``attention_backward.py``, summed over what the bias was broadcast to.

A kernel of its own, which computes ds once more: 2 products beside the 7 of dq, dk and dv, and it reads q, k, v and dout
again. In return nothing of size (B, H, N, M) is written unless the bias has it, and the order of the sum is fixed: a program
keeps one tile of the result in registers and loops over all that it sums. Where there are too few tiles to fill the chip,
several programs share a tile, each takes every num_programs-th term, and a second kernel adds up their float32 tiles.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import _bias_tile, _load_rows, _load_statistics, _p_and_ds
from ._device import multiprocessors

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {"_attention_dbias_kernel": ("dbias_ptr",), "_sum_partials_kernel": ("out_ptr",)}
FLOPS = {"_attention_dbias_kernel": lambda q_ptr, num_keys, **_: 4 * q_ptr.numel() * num_keys}


@triton.jit
def _attention_dbias_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    bias_ptr,
    dbias_ptr,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    dbias_strides,
    num_queries,
    num_keys,
    num_heads,
    num_images,
    scale,
    UNIT: tl.constexpr,
    KEY_ONLY: tl.constexpr,
    DH: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SUM_IMAGES: tl.constexpr,
    SUM_HEADS: tl.constexpr,
    SUM_QUERIES: tl.constexpr,
    SUM_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, split): a tile of dbias, or a split's share of its sum over (image, head, query block, key block)."""
    query_blocks, key_blocks = tl.cdiv(num_queries, QUERIES), tl.cdiv(num_keys, KEYS)
    tile = tl.program_id(0)
    out_key_block = 0 if SUM_KEYS else tile % key_blocks
    tile = tile if SUM_KEYS else tile // key_blocks
    out_query_block = 0 if SUM_QUERIES else tile % query_blocks
    tile = tile if SUM_QUERIES else tile // query_blocks
    out_head = 0 if SUM_HEADS else tile % num_heads
    out_image = tile if SUM_HEADS else tile // num_heads

    terms = (num_images if SUM_IMAGES else 1) * (num_heads if SUM_HEADS else 1)
    terms *= (query_blocks if SUM_QUERIES else 1) * (key_blocks if SUM_KEYS else 1)
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    for term in range(tl.program_id(1), terms, tl.num_programs(1)):
        key_block = term % key_blocks if SUM_KEYS else out_key_block
        rest = term // key_blocks if SUM_KEYS else term
        query_block = rest % query_blocks if SUM_QUERIES else out_query_block
        rest = rest // query_blocks if SUM_QUERIES else rest
        head = tl.cast(rest % num_heads if SUM_HEADS else out_head, tl.int64)
        image = tl.cast((rest // num_heads if SUM_HEADS else rest) if SUM_IMAGES else out_image, tl.int64)
        first_query, first_key = query_block * QUERIES, key_block * KEYS
        q_head = q_ptr + (image * q_strides[0] + head * q_strides[2]) * UNIT
        k_head = k_ptr + (image * k_strides[0] + head * k_strides[2]) * UNIT
        v_head = v_ptr + (image * v_strides[0] + head * v_strides[2]) * UNIT
        dout_head = dout_ptr + (image * dout_strides[0] + head * dout_strides[2]) * UNIT
        q = _load_rows(q_head, first_query, q_strides[1] * UNIT, num_queries, QUERIES, True, DH, PARTS)
        dout = _load_rows(dout_head, first_query, dout_strides[1] * UNIT, num_queries, QUERIES, True, DH, PARTS)
        k = _load_rows(k_head, first_key, k_strides[1] * UNIT, num_keys, KEYS, True, DH, PARTS)
        v = _load_rows(v_head, first_key, v_strides[1] * UNIT, num_keys, KEYS, True, DH, PARTS)
        row_max, log2_sum, delta = _load_statistics(
            statistics_ptr + (image * num_heads + head) * num_queries * 4, first_query, num_queries, QUERIES, True
        )
        pointers, mask = _bias_tile(
            bias_ptr + image * bias_strides[0] + head * bias_strides[1], bias_strides[2], bias_strides[3],
            first_query, first_key, num_queries, num_keys, QUERIES, KEYS, KEY_ONLY, False,
        )  # fmt: skip
        _, ds = _p_and_ds(
            q, k, dout, v, row_max[:, None], log2_sum[:, None], delta[:, None], pointers, mask, None, scale,
            True, PARTS, PRECISION,
        )  # fmt: skip
        total += ds

    if SUM_QUERIES:
        total = tl.sum(total, axis=0, keep_dims=True)
    if SUM_KEYS:
        total = tl.sum(total, axis=1, keep_dims=True)
    rows = out_query_block * QUERIES + tl.arange(0, 1 if SUM_QUERIES else QUERIES)
    cols = out_key_block * KEYS + tl.arange(0, 1 if SUM_KEYS else KEYS)
    mask = (rows < (1 if SUM_QUERIES else num_queries))[:, None] & (cols < (1 if SUM_KEYS else num_keys))[None, :]
    dbias_ptr += tl.program_id(1).to(tl.int64) * dbias_strides[0]
    dbias_ptr += tl.cast(out_image, tl.int64) * dbias_strides[1] + tl.cast(out_head, tl.int64) * dbias_strides[2]
    pointers = dbias_ptr + rows.to(tl.int64)[:, None] * dbias_strides[3] + cols[None, :]
    tl.store(pointers, total.to(dbias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_partials_kernel(partial_ptr, out_ptr, num_partials, num_elements, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < num_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(num_partials):
        total += tl.load(partial_ptr + tl.cast(i, tl.int64) * num_elements + elements, mask=mask, other=0.0)
    tl.store(out_ptr + elements, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch_dbias(common: dict[str, Any], bias: Tensor, queries: int, keys: int) -> Tensor:
    """Returns dbias, of ``bias``'s shape and dtype. ``common``: what the kernel shares with that of dq, dk and dv."""
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    # A program sums over what has size 1 in the bias, be it an only element.
    b, h, n, m = common["bias_ptr"].shape
    blocks = triton.cdiv(common["num_queries"], queries), triton.cdiv(common["num_keys"], keys)
    counts = (common["num_images"], common["num_heads"], *blocks)
    tiles = math.prod(count for count, size in zip(counts, (b, h, n, m), strict=True) if size > 1)
    terms = math.prod(counts) // tiles
    splits = min(terms, triton.cdiv(2 * multiprocessors(bias.device), tiles))
    target = dbias if splits == 1 else torch.empty(splits, dbias.numel(), dtype=torch.float32, device=bias.device)
    _attention_dbias_kernel[(tiles, splits)](
        **common,
        dbias_ptr=target,
        dbias_strides=(b * h * n * m, 0 if b == 1 else h * n * m, 0 if h == 1 else n * m, m),
        **{"SUM_IMAGES": b == 1, "SUM_HEADS": h == 1, "SUM_QUERIES": n == 1, "SUM_KEYS": m == 1},
        **{"QUERIES": queries, "KEYS": keys},
    )
    if splits > 1:
        _sum_partials_kernel[(triton.cdiv(dbias.numel(), 256),)](
            target, dbias, splits, dbias.numel(), BLOCK=256, num_warps=4, enable_fp_fusion=True
        )
    return dbias
