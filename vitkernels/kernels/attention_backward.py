"""Softmax attention, backward. Equation numbers (1) to (3) are those of ``reference/attention.py``; for a row of queries:

(4)  p = exp((s - row_max) - log_sum)          recomputed; the two statistics come from the forward
(5)  delta = sum(dout * out)                   = sum_keys(p * dp)
(6)  ds = p * (dp - delta), dp = dout @ v^T    gradient of s, and of the bias before it is summed over what was broadcast
(7)  dv = p^T @ dout,  dk = scale * ds^T @ q,  dq = scale * ds @ k

Bytes and floor, s bytes an element (statistics and delta are 16 bytes a row, 2% at Dh = 64):

    one program a head  read q k v out dout, write dq dk dv: 8 B N H Dh s bytes, 5 products: 10 B H N M Dh FLOPs
    two kernels         dq: read q k v out dout, write dq; dk and dv: read q k v dout, write dk dv: 12 B N H Dh s bytes, 7 products

ViT-B/16 at B = 256 in bfloat16 on an H200 (4.3 TB/s, 790 TFLOP/s): 144 us of bytes and 97 us of products in one program, 216
and 135 us in two kernels. Hence one program a head as long as the float32 dq of all queries fits in registers: it walks over
the keys and keeps dk and dv of one key block, dq of all query blocks, while q and dout stay in shared memory.

The products of the key blocks are taken transposed, keys x queries: p^T and ds^T are then left operands from registers, and
the small last query block (197 = 3 * 64 + 16) is a column count, which tensor cores take in steps of 8.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import multiprocessors

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_attention_bwd_kernel": ("statistics_ptr", "dq_ptr", "dk_ptr", "dv_ptr"),
    "_attention_dbias_kernel": ("dbias_ptr",),
    "_sum_partials_kernel": ("out_ptr",),
}

LOG2E = tl.constexpr(1.4426950408889634)


# Rows of Dh channels are tuples of tiles, PARTS columns each, all powers of two: 72 and 80 are 64 + 16, not 128.


@triton.constexpr_function
def _width(parts, i):
    return parts[i]


@triton.constexpr_function
def _first(parts, i):
    return sum(parts[:i])


@triton.jit
def _mask(rows, cols, num_rows, END: tl.constexpr, DH: tl.constexpr, MASKED: tl.constexpr):
    if END > DH:
        if MASKED:
            return (rows < num_rows)[:, None] & (cols < DH)[None, :]
        else:
            return (cols < DH)[None, :]
    elif MASKED:
        return (rows < num_rows)[:, None]
    else:
        return None


# Row numbers count from the first row of the image and are multiplied anew for each tile: as an offset from a tile's first row,
# the product would be the same in every trip, and the compiler keeps what is the same in registers across all loops (90 of them).


@triton.jit
def _load_rows(
    ptr, first, stride, num_rows, ROWS: tl.constexpr, MASKED: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Rows ``first`` and up, zeros beyond the ``num_rows`` there are (if MASKED) and beyond DH."""
    tiles = ()
    rows = first + tl.arange(0, ROWS)
    for i in tl.static_range(len(PARTS)):
        cols = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        mask = _mask(rows, cols, num_rows, _first(PARTS, i + 1), DH, MASKED)
        pointers = ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        tile = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def _store_rows(ptr, first, stride, num_rows, tiles, factor, ROWS: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    for i in tl.static_range(len(PARTS)):
        cols = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        mask = _mask(rows, cols, num_rows, _first(PARTS, i + 1), DH, True)
        pointers = ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        tl.store(pointers, (tiles[i] * factor).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.zeros((ROWS, _width(PARTS, i)), tl.float32),)  # noqa: RUF005
    return tiles


@triton.jit
def _inner(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T, over the channels of all parts."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(PARTS)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_product(sums, a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a @ b, part by part."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.dot(a.to(b[i].dtype), b[i], sums[i], input_precision=PRECISION),)  # noqa: RUF005
    return tiles


@triton.jit
def _p_and_ds(
    a, b, da, db, row_max, log2_sum, delta, bias_pointers, bias_mask, key_mask, scale,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equations (4) and (6) for a tile a x b: queries x keys with da = dout, db = v, or keys x queries with da = v, db = dout.

    The statistics of a query that does not exist are 0 and +inf, which gives p = 0.
    """
    s = _inner(a, b, PARTS, PRECISION)
    if bias_pointers is None:
        p = tl.exp2(s * (scale * LOG2E) - log2_sum)
        if key_mask is not None:
            p = tl.where(key_mask, p, 0.0)
    else:
        # In natural units up to row_max: in those of log 2, finfo.min would be -inf. And row_max apart from log2_sum, which
        # a finfo.min would swallow. A row of -inf alone has 0 and +inf: p = 0.
        if bias_mask is None:
            bias = tl.load(bias_pointers)
        else:
            bias = tl.load(bias_pointers, mask=bias_mask, other=float("-inf"))
        p = tl.exp2((s * scale + bias.to(tl.float32) - row_max) * LOG2E - log2_sum)
    dp = _inner(da, db, PARTS, PRECISION)
    return p, p * (dp - delta)


# What a tile needs to know of its queries lies in rows of four: row_max, log2_sum, delta, nothing. Four, because Triton moves a
# load of at least as many elements as threads through shared memory; fewer, each thread fetches alone for all its columns (48
# loads and 64-bit addresses for 64 queries, which spill).


@triton.jit
def _store_statistics(
    statistics_ptr, row_max_ptr, log_sum_ptr, delta, first, num_rows, NATURAL: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Returns row_max and log2_sum; the latter includes the former unless NATURAL. 0 and +inf where there is no row."""
    rows = first + tl.arange(0, ROWS)
    mask = rows < num_rows
    row_max = tl.load(row_max_ptr + rows, mask=mask, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=mask, other=float("inf"))
    log2_sum = (log_sum if NATURAL else row_max + log_sum) * LOG2E
    tl.store(statistics_ptr + rows * 4, row_max, mask=mask)
    tl.store(statistics_ptr + rows * 4 + 1, log2_sum, mask=mask)
    tl.store(statistics_ptr + rows * 4 + 2, delta, mask=mask)
    return row_max, log2_sum


@triton.jit
def _load_statistics(statistics_ptr, first, num_rows, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """row_max, log2_sum and delta of ROWS queries."""
    rows, fields = first + tl.arange(0, ROWS), tl.arange(0, 4)
    pointers = statistics_ptr + rows[:, None] * 4 + fields[None, :]
    if MASKED:
        nothing = tl.where(fields == 1, float("inf"), 0.0)[None, :]
        tile = tl.load(pointers, mask=(rows < num_rows)[:, None], other=tl.broadcast_to(nothing, (ROWS, 4)))
    else:
        tile = tl.load(pointers)
    even, odd = tl.split(tl.reshape(tile, (ROWS, 2, 2)))
    row_max, delta = tl.split(even)
    log2_sum, _ = tl.split(odd)
    return row_max, log2_sum, delta


@triton.jit
def _delta(out, dout, PARTS: tl.constexpr):
    delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), axis=1)  # eq. (5)
    for i in tl.static_range(1, len(PARTS)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), axis=1)
    return delta


@triton.jit
def _bias_tile(
    bias_ptr, query_stride, key_stride, first_query, first_key, num_queries, num_keys,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a tile of the bias; one vector where queries share it."""
    if bias_ptr is None:
        return None, None
    else:
        queries = first_query + tl.arange(0, 1 if KEY_ONLY else QUERIES)
        keys = first_key + tl.arange(0, KEYS)
        # An absent query may read a key-only bias: its log2_sum makes p = 0.
        query_offsets, query_mask = queries.to(tl.int64) * query_stride, (queries < num_queries) | KEY_ONLY
        key_offsets, key_mask = keys.to(tl.int64) * key_stride, keys < num_keys
        if KEYS_FIRST:
            pointers = bias_ptr + key_offsets[:, None] + query_offsets[None, :]
            mask = key_mask[:, None] & query_mask[None, :]
        else:
            pointers = bias_ptr + query_offsets[:, None] + key_offsets[None, :]
            mask = query_mask[:, None] & key_mask[None, :]
        if MASKED:
            return pointers, mask
        else:
            return pointers, None


# One block of queries, or of keys.


@triton.jit
def _dq_step(
    dq, q, dout, row_max, log2_sum, delta, first_key, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
    bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_ptr, first_key, k_stride, num_keys, KEYS, MASKED, DH, PARTS)
    v = _load_rows(v_ptr, first_key, v_stride, num_keys, KEYS, MASKED, DH, PARTS)
    pointers, mask = _bias_tile(
        bias_ptr, bias_query_stride, bias_key_stride, first_query, first_key, num_queries, num_keys,
        QUERIES, KEYS, MASKED or not KEY_ONLY, KEY_ONLY, False,
    )  # fmt: skip
    key_mask = (tl.arange(0, KEYS) < num_keys - first_key)[None, :] if MASKED else None
    _, ds = _p_and_ds(
        q, k, dout, v, row_max[:, None], log2_sum[:, None], delta[:, None], pointers, mask, key_mask, scale, PARTS, PRECISION
    )
    return _add_product(dq, ds, k, PARTS, PRECISION)


@triton.jit
def _dq_block(
    first_query, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, row_max_ptr, log_sum_ptr, bias_ptr, statistics_ptr, dq_ptr,
    dout_stride, q_stride, k_stride, v_stride, out_stride, dq_stride, bias_query_stride, bias_key_stride,
    num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KEY_TAIL: tl.constexpr, KEY_ONLY: tl.constexpr,
    DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of QUERIES queries, and their statistics."""
    q = _load_rows(q_ptr, first_query, q_stride, num_queries, QUERIES, True, DH, PARTS)
    dout = _load_rows(dout_ptr, first_query, dout_stride, num_queries, QUERIES, True, DH, PARTS)
    out = _load_rows(out_ptr, first_query, out_stride, num_queries, QUERIES, True, DH, PARTS)
    delta = _delta(out, dout, PARTS)
    row_max, log2_sum = _store_statistics(
        statistics_ptr, row_max_ptr, log_sum_ptr, delta, first_query, num_queries, bias_ptr is not None, QUERIES
    )

    dq = _zeros(QUERIES, PARTS)
    full = num_keys // KEYS * KEYS
    for first_key in range(0, full, KEYS):
        dq = _dq_step(
            dq, q, dout, row_max, log2_sum, delta, first_key, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEYS, False, KEY_ONLY, DH, PARTS, PRECISION,
        )  # fmt: skip
    if KEY_TAIL > 0:
        dq = _dq_step(
            dq, q, dout, row_max, log2_sum, delta, full, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEY_TAIL, True, KEY_ONLY, DH, PARTS, PRECISION,
        )  # fmt: skip
    _store_rows(dq_ptr, first_query, dq_stride, num_queries, dq, scale, QUERIES, DH, PARTS)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, first_query, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
    bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_ptr, first_query, q_stride, num_queries, QUERIES, MASKED, DH, PARTS)
    dout = _load_rows(dout_ptr, first_query, dout_stride, num_queries, QUERIES, MASKED, DH, PARTS)
    row_max, log2_sum, delta = _load_statistics(statistics_ptr, first_query, num_queries, QUERIES, MASKED)
    # A key that does not exist spoils nothing but its own dk and dv, which are not stored; only its bias must not be read.
    pointers, mask = _bias_tile(
        bias_ptr, bias_query_stride, bias_key_stride, first_query, first_key, num_queries, num_keys,
        QUERIES, KEYS, True, KEY_ONLY, True,
    )  # fmt: skip
    # Keys x queries: p and ds are left operands straight from registers, and few last queries (197 = 3 * 64 + 5) are a
    # number of columns, which tensor cores take in steps of 8.
    p, ds = _p_and_ds(
        k, q, v, dout, row_max[None, :], log2_sum[None, :], delta[None, :], pointers, mask, None, scale, PARTS, PRECISION
    )
    return _add_product(dk, ds, q, PARTS, PRECISION), _add_product(dv, p, dout, PARTS, PRECISION)


@triton.jit
def _dkdv_block(
    first_key, dout_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, statistics_ptr, dk_ptr, dv_ptr,
    dout_stride, q_stride, k_stride, v_stride, dkv_stride, bias_query_stride, bias_key_stride,
    num_queries, num_keys, scale,
    QUERIES: tl.constexpr, QUERY_TAIL: tl.constexpr, KEYS: tl.constexpr, KEY_ONLY: tl.constexpr,
    DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys."""
    k = _load_rows(k_ptr, first_key, k_stride, num_keys, KEYS, True, DH, PARTS)
    v = _load_rows(v_ptr, first_key, v_stride, num_keys, KEYS, True, DH, PARTS)
    dk = _zeros(KEYS, PARTS)
    dv = _zeros(KEYS, PARTS)
    full = num_queries // QUERIES * QUERIES
    for first_query in range(0, full, QUERIES):
        dk, dv = _dkdv_step(
            dk, dv, k, v, first_query, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEYS, False, KEY_ONLY, DH, PARTS, PRECISION,
        )  # fmt: skip
    if QUERY_TAIL > 0:
        dk, dv = _dkdv_step(
            dk, dv, k, v, full, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERY_TAIL, KEYS, True, KEY_ONLY, DH, PARTS, PRECISION,
        )  # fmt: skip
    _store_rows(dk_ptr, first_key, dkv_stride, num_keys, dk, scale, KEYS, DH, PARTS)
    _store_rows(dv_ptr, first_key, dkv_stride, num_keys, dv, 1.0, KEYS, DH, PARTS)


@triton.jit
def _locate(cu_seqlens_ptr, num_heads, num_images, programs_per_head, BLOCK: tl.constexpr):
    """Image, head, the image's first row in packed tensors, its number of rows (packed), and which of its blocks."""
    program = tl.program_id(0)
    if cu_seqlens_ptr is None:
        head = program // programs_per_head  # programs of one head are neighbours: what they share is in L2
        image = head // num_heads
        return tl.cast(image, tl.int64), tl.cast(head % num_heads, tl.int64), tl.cast(0, tl.int64), 0, program % programs_per_head
    else:
        # Image b owns blocks cu_seqlens[b] // BLOCK + b and up: never fewer than it fills, and total // BLOCK + B of them
        # in all, which the host knows without reading a length. A spare one lies beyond the last row of its image.
        block = program // num_heads
        image = -1
        for first in range(0, num_images, 256):
            images = first + tl.arange(0, 256)
            exists = images < num_images
            starts = tl.load(cu_seqlens_ptr + images, mask=exists, other=0)
            image += tl.sum((exists & (starts // BLOCK + images <= block)).to(tl.int32), axis=0)
        start = tl.load(cu_seqlens_ptr + image)
        length = tl.load(cu_seqlens_ptr + image + 1) - start
        block = block - start // BLOCK - image
        return tl.cast(image, tl.int64), tl.cast(program % num_heads, tl.int64), start.to(tl.int64), length, block


@triton.jit
def _attention_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, row_max_ptr, log_sum_ptr, bias_ptr, cu_seqlens_ptr,
    statistics_ptr, dq_ptr, dk_ptr, dv_ptr,
    dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, dkv_strides, row_strides, bias_strides,
    num_queries, num_keys, num_heads, num_images, programs_per_head, scale,
    ALONE: tl.constexpr, UNIT: tl.constexpr, KEY_ONLY: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, QUERY_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of every programs_per_head-th block of queries, and then dk and dv of the blocks of keys if one program has them all."""
    image, head, packed_row, packed_length, first_block = _locate(
        cu_seqlens_ptr, num_heads, num_images, programs_per_head, BLOCK
    )
    dout_ptr += (image * dout_strides[0] + packed_row * dout_strides[1] + head * dout_strides[2]) * UNIT
    q_ptr += (image * q_strides[0] + packed_row * q_strides[1] + head * q_strides[2]) * UNIT
    k_ptr += (image * k_strides[0] + packed_row * k_strides[1] + head * k_strides[2]) * UNIT
    v_ptr += (image * v_strides[0] + packed_row * v_strides[1] + head * v_strides[2]) * UNIT
    statistics_ptr += (image * row_strides[0] + head * row_strides[1] + packed_row) * 4
    if bias_ptr is not None:
        bias_ptr += image * bias_strides[0] + head * bias_strides[1]
    # The compiler sees that there is one trip, unless the program has the head alone or the block may be a spare one.
    start = 0 if ALONE else first_block * BLOCK
    end = start + BLOCK
    if cu_seqlens_ptr is not None:
        num_queries = packed_length
        num_keys = packed_length
        end = tl.minimum(end, packed_length)

    if dq_ptr is not None:
        out_ptr += (image * out_strides[0] + packed_row * out_strides[1] + head * out_strides[2]) * UNIT
        dq_ptr += (image * dq_strides[0] + packed_row * dq_strides[1] + head * dq_strides[2]) * UNIT
        row_max_ptr += image * row_strides[0] + head * row_strides[1] + packed_row
        log_sum_ptr += image * row_strides[0] + head * row_strides[1] + packed_row
        for first_query in range(start, num_queries if ALONE else end, BLOCK):
            _dq_block(
                first_query, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, row_max_ptr, log_sum_ptr, bias_ptr, statistics_ptr,
                dq_ptr, dout_strides[1] * UNIT, q_strides[1] * UNIT, k_strides[1] * UNIT, v_strides[1] * UNIT,
                out_strides[1] * UNIT, dq_strides[1] * UNIT, bias_strides[2], bias_strides[3], num_queries, num_keys, scale,
                BLOCK, STEP, KEY_TAIL, KEY_ONLY, DH, PARTS, PRECISION,
            )  # fmt: skip
    if dq_ptr is not None and dk_ptr is not None:
        tl.debug_barrier()  # the statistics pass from thread to thread
    if dk_ptr is not None:
        dk_ptr += (image * dkv_strides[0] + packed_row * dkv_strides[1] + head * dkv_strides[2]) * UNIT
        dv_ptr += (image * dkv_strides[0] + packed_row * dkv_strides[1] + head * dkv_strides[2]) * UNIT
        for first_key in range(start, num_keys if ALONE else end, BLOCK):
            _dkdv_block(
                first_key, dout_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, statistics_ptr, dk_ptr, dv_ptr,
                dout_strides[1] * UNIT, q_strides[1] * UNIT, k_strides[1] * UNIT, v_strides[1] * UNIT,
                dkv_strides[1] * UNIT, bias_strides[2], bias_strides[3], num_queries, num_keys, scale,
                STEP, QUERY_TAIL, BLOCK, KEY_ONLY, DH, PARTS, PRECISION,
            )  # fmt: skip


# The bias: ds once more (2 products), summed over what was broadcast in a fixed order.


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
    """Program (tile, split): a tile of dbias, over every num_programs(1)-th of the (image, head, query block, key block) it sums."""
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
            first_query, first_key, num_queries, num_keys, QUERIES, KEYS, True, KEY_ONLY, False,
        )  # fmt: skip
        _, ds = _p_and_ds(
            q, k, dout, v, row_max[:, None], log2_sum[:, None], delta[:, None], pointers, mask, None, scale, PARTS, PRECISION
        )
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


# Launchers.


class _Config(NamedTuple):
    """How to run one shape. ``block``: rows of dq, or of dk and dv, at a time; ``step``: of what they are summed over."""

    one_program: bool
    block: int
    step: int
    num_warps: int
    num_stages: int
    registers: int | None = None


def _parts(Dh: int) -> tuple[int, ...]:
    """Widths that hold Dh channels: powers of two of 16 and more, largest first. 72 -> (64, 16), 96 -> (64, 32)."""
    padded = -(-Dh // 16) * 16
    return tuple(1 << bit for bit in range(8, 3, -1) if padded >> bit & 1)


def _config(device: torch.device, dtype: torch.dtype, heads: int, N: int, M: int, Dh: int) -> _Config:
    if dtype == torch.float32:
        return _Config(False, 32, 32, 4, 1)
    one_program = max(N, M) <= 320 and heads >= 2 * multiprocessors(device)
    return _Config(one_program, 64, 64, 4, 1)


def _tail(n: int, block: int) -> int:
    """The smallest tile for what full blocks leave of ``n`` rows: 16 for 197 = 3 * 64 + 5."""
    return max(16, triton.next_power_of_2(n % block)) if n % block else 0


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its channels are neighbours and 64 of its rows are within int32 offsets, else a copy."""
    near = x.stride(-3) < 2**24
    return x if near and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of x, 0 in dimensions of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, row and head; of a packed tensor (total, H, Dh) the image's is 0."""
    strides = _strides(x)[:-1]
    return strides if len(strides) == 3 else (0, *strides)


def launch_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    allow_tf32: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv and dbias; dbias is empty where it is not needed."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dbias = _launch(
        dout, q, k, v, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias, dq, dk, dv
    )
    return dq, dk, dv, dbias


def launch_attention_qkv_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    allow_tf32: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor]:
    """Returns dqkv, whose three parts the kernels write in place, and dbias."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(-3)
    dbias = _launch(
        dout, q, k, v, out, row_max, log_sum, bias, cu_seqlens, max_seqlen, scale, allow_tf32, need_dbias, *dqkv.unbind(-3)
    )
    return dqkv, dbias


def _launch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    allow_tf32: bool,
    need_dbias: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Fills dq, dk and dv and returns dbias."""
    need_dbias = need_dbias and bias is not None
    if q.numel() == 0 or k.numel() == 0:  # no token, or queries without a key
        for t in (dq, dk, dv):
            t.zero_()
        return torch.zeros_like(bias, memory_format=torch.contiguous_format) if need_dbias else row_max.new_empty(0)
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    bias_view = None if bias is None else bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, N or 1, M or 1)
    bias_strides = (0,) * 4 if bias is None else _strides(bias_view)
    strides = [_row_strides(t) for t in (dout, q, k, v, out, dq, dk)]
    unit = 8 if all(stride % 8 == 0 for group in strides for stride in group) else 1
    *strides, out_strides, dq_strides, dkv_strides = (tuple(stride // unit for stride in group) for group in strides)
    packed = cu_seqlens is not None
    N, M, H, Dh = q.shape[-3], k.shape[-3], q.shape[-2], q.shape[-1]
    B = cu_seqlens.numel() - 1 if packed else q.shape[0]
    config = _config(q.device, q.dtype, B * H, N, M, Dh)
    common = {
        **{"dout_ptr": dout, "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": bias_view},
        "statistics_ptr": torch.empty(*row_max.shape, 4, dtype=torch.float32, device=q.device),
        **dict(zip(("dout_strides", "q_strides", "k_strides", "v_strides"), strides, strict=True)),
        **{"bias_strides": bias_strides, "KEY_ONLY": bias_strides[2] == 0},
        **{"num_queries": N, "num_keys": M, "num_heads": H, "num_images": B, "scale": scale},
        **{"UNIT": unit, "DH": Dh, "PARTS": _parts(Dh), "PRECISION": "tf32" if allow_tf32 else "ieee"},
        **{"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.registers},
        "enable_fp_fusion": True,  # today's default, written down because Triton 3.10 flips it
    }

    dq_pass = {"out_ptr": out, "row_max_ptr": row_max, "log_sum_ptr": log_sum, "dq_ptr": dq}
    dkdv_pass = {"dk_ptr": dk, "dv_ptr": dv}
    absent = dict.fromkeys((*dq_pass, *dkdv_pass))

    def launch(tensors: dict[str, Tensor], blocks: int, programs_per_head: int) -> None:
        _attention_bwd_kernel[(blocks * H,)](
            **{**common, **absent, **tensors},
            **{"cu_seqlens_ptr": cu_seqlens, "row_strides": (0, N) if packed else (H * N, N)},
            **{"out_strides": out_strides, "dq_strides": dq_strides, "dkv_strides": dkv_strides},
            **{"programs_per_head": programs_per_head, "ALONE": config.one_program and not packed, "BLOCK": config.block, "STEP": config.step},
            QUERY_TAIL=config.step if packed else _tail(N, config.step),
            KEY_TAIL=config.step if packed else _tail(M, config.step),
        )

    query_blocks, key_blocks = triton.cdiv(N, config.block), triton.cdiv(M, config.block)
    if packed:
        blocks = N // config.block + B  # at least what images of any lengths fill
        launch(dq_pass, blocks, blocks)
        launch(dkdv_pass, blocks, blocks)
    elif config.one_program:
        launch(dq_pass | dkdv_pass, B, 1)
    else:
        launch(dq_pass, B * query_blocks, query_blocks)
        launch(dkdv_pass, B * key_blocks, key_blocks)
    return _launch_dbias(config, common, bias) if need_dbias else q.new_empty(0)


def _launch_dbias(config: _Config, common: dict[str, Any], bias: Tensor) -> Tensor:
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    # A program sums over what has size 1 in the bias, be it an only element.
    b, h, n, m = common["bias_ptr"].shape
    blocks = [triton.cdiv(common[name], config.step) for name in ("num_queries", "num_keys")]
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
        **{"QUERIES": config.step, "KEYS": config.step},
    )
    if splits > 1:
        _sum_partials_kernel[(triton.cdiv(dbias.numel(), 256),)](
            target, dbias, splits, dbias.numel(), BLOCK=256, num_warps=4, enable_fp_fusion=True
        )
    return dbias


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of every configuration that dispatch can choose for a ViT of this shape.

    bfloat16 and float32 without a bias, bfloat16 with a trained relative position bias (1, H, N, N), with a key mask
    (B, 1, 1, N), and with packed sequences.
    """
    N, H = shape.tokens, shape.num_heads
    name = f"N={N} Dh={shape.width // H}"
    yield f"{name} bf16", partial(_aot_dense, shape, torch.bfloat16, None)
    yield f"{name} fp32", partial(_aot_dense, shape, torch.float32, None)
    yield f"{name} bf16 bias", partial(_aot_dense, shape, torch.bfloat16, (1, H, N, N))
    yield f"{name} bf16 key mask", partial(_aot_dense, shape, torch.bfloat16, (shape.train_batch, 1, 1, N))
    yield f"{name} bf16 packed", partial(_aot_packed, shape, torch.bfloat16)


def _aot_dense(shape: "Shape", dtype: torch.dtype, bias_shape: tuple[int, ...] | None) -> None:
    B, N, H = shape.train_batch, shape.tokens, shape.num_heads
    qkv = torch.empty(B, N, 3, H, shape.width // H, dtype=dtype, device="meta")
    statistics = torch.empty(B, H, N, dtype=torch.float32, device="meta")
    out = torch.empty(B, N, H, shape.width // H, dtype=dtype, device="meta")
    bias = None if bias_shape is None else torch.empty(bias_shape, dtype=dtype, device="meta")
    need_dbias = bias_shape is not None and bias_shape[0] == 1
    launch_attention_qkv_bwd(out, qkv, out, statistics, statistics, bias, None, 0, 1.0, False, need_dbias)


def _aot_packed(shape: "Shape", dtype: torch.dtype) -> None:
    B, H = shape.train_batch, shape.num_heads
    total = B * shape.tokens
    qkv = torch.empty(total, 3, H, shape.width // H, dtype=dtype, device="meta")
    statistics = torch.empty(H, total, dtype=torch.float32, device="meta")
    out = torch.empty(total, H, shape.width // H, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device="meta")
    launch_attention_qkv_bwd(out, qkv, out, statistics, statistics, None, cu_seqlens, 0, 1.0, False, False)
