"""Softmax attention, forward. Equation numbers are those of ``reference/attention.py``; backward: ``attention_backward.py``.

Bytes and floor, s bytes an element, everything but q, k, v and o below 2%:

    forward   4 B N H Dh s bytes, 4 B H N M Dh FLOPs: N / s FLOPs a byte for N = M

ViT-B/16 at B = 256 in bfloat16 on an H200 (4.3 TB/s, 790 TFLOP/s) needs 72 us for its bytes and 31 us for its products:
device memory is the floor up to N of about 370. So K and V are read from it once. Where the logits of 64 queries and all keys
fit in registers (up to 257 keys and a little more), one program takes many query tiles of a head: K and V stay in shared
memory, and the maximum is known before the first exponential (no online rescaling). More keys are streamed.

Tensor cores multiply tiles of powers of two, and what is padded is wasted: 197 keys are 128 + 64 + 16 (95% useful, not 77%),
a head dim of 72 or 80 is 64 + 16. Only the last key block has masks.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_configs import forward_config, forward_constants, forward_parts
from ._attention_tiles import _image_of_block
from ._device import architecture, gpu_of, multiprocessors

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_attention_fwd_kernel": ("out_ptr", "row_max_ptr", "log_sum_ptr"),
    "_attention_stream_fwd_kernel": ("out_ptr", "row_max_ptr", "log_sum_ptr"),
}


def _flops(q_ptr, num_keys, cu_seqlens_ptr=None, num_images=1, **_) -> int:
    """Of both products; packed images are taken to be equally long."""
    return 4 * q_ptr.numel() * (num_keys if cu_seqlens_ptr is None else num_keys // num_images)


FLOPS = {"_attention_fwd_kernel": _flops, "_attention_stream_fwd_kernel": _flops}

LOG2E = tl.constexpr(1.4426950408889634)


# Rows of Dh channels are kept in up to three parts of D0, D1, D2 columns, all powers of two; 0 is no part. An absent part of a
# load is the first one again, an absent accumulator is 16 columns that never change: the compiler drops both.


@triton.jit
def _row(ptr, row, stride):
    # int64, since B*N*3*D can pass 2^31. Within a tile offsets are int32, which saves 20 registers.
    return ptr + tl.cast(row, tl.int64) * stride


@triton.jit
def _load_part(ptr, row_offsets, row_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, DH: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + row_offsets[:, None] + cols[None, :]
    if FIRST + WIDTH <= DH:
        if row_mask is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif row_mask is None:
        return tl.load(pointers, mask=(cols < DH)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=row_mask[:, None] & (cols < DH)[None, :], other=0.0)


@triton.jit
def _load_rows(
    ptr, row_stride, row_mask, ROWS: tl.constexpr, DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, ROWS) * row_stride
    first = _load_part(ptr, offsets, row_mask, 0, D0, DH)
    second = first
    third = first
    if D1 > 0:
        second = _load_part(ptr, offsets, row_mask, D0, D1, DH)
    if D2 > 0:
        third = _load_part(ptr, offsets, row_mask, D0 + D1, D2, DH)
    return first, second, third


@triton.jit
def _logits(q0, q1, q2, k0, k1, k2, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        s += tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        s += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
    return s


@triton.jit
def _accumulate(p, v0, v1, v2, o0, o1, o2, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr):
    p = p.to(v0.dtype)
    o0 = tl.dot(p, v0, o0, input_precision=PRECISION)  # eq. (3)
    if D1 > 0:
        o1 = tl.dot(p, v1, o1, input_precision=PRECISION)
    if D2 > 0:
        o2 = tl.dot(p, v2, o2, input_precision=PRECISION)
    return o0, o1, o2


@triton.jit
def _biased(
    s, scale, bias_ptr, bias_row_stride, bias_key_stride, first_row, first_key, num_rows, num_keys,
    MASKED: tl.constexpr, NATURAL: tl.constexpr, KEY_ONLY: tl.constexpr,
):  # fmt: skip
    # Natural units where there is a bias: in units of log 2, finfo.min would become -inf. Without one the scale waits for
    # the exponential, where it is free.
    rows = tl.arange(0, s.shape[0])
    cols = tl.arange(0, s.shape[1])
    if NATURAL:
        s = s * scale
    if bias_ptr is not None:  # eq. (1)
        bias_ptr = _row(bias_ptr, first_key, bias_key_stride)
        if KEY_ONLY:
            if MASKED:
                bias = tl.load(bias_ptr + cols * bias_key_stride, mask=first_key + cols < num_keys, other=0.0)
            else:
                bias = tl.load(bias_ptr + cols * bias_key_stride)
            s += bias.to(tl.float32)[None, :]
        else:
            pointers = _row(bias_ptr, first_row, bias_row_stride) + rows[:, None] * bias_row_stride
            mask = (first_row + rows < num_rows)[:, None]
            if MASKED:
                mask = mask & (first_key + cols < num_keys)[None, :]
            s += tl.load(pointers + cols[None, :] * bias_key_stride, mask=mask, other=0.0).to(tl.float32)
    if MASKED:
        s = tl.where((first_key + cols < num_keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def _exponentials(s, row_max, scale, NATURAL: tl.constexpr):
    if NATURAL:
        return tl.exp2((s - row_max[:, None]) * LOG2E)
    return tl.exp2(s * (scale * LOG2E) - (row_max * (scale * LOG2E))[:, None])


@triton.jit
def _update(
    row_max, row_sum, o0, o1, o2, s, v0, v1, v2, scale,
    MAY_BE_EMPTY: tl.constexpr, NATURAL: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in one more block of keys: rescale what was summed under a smaller maximum."""
    new_max = tl.maximum(row_max, tl.max(s, axis=1))
    finite_max = new_max
    if MAY_BE_EMPTY:  # a bias may have masked every key so far
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2((row_max - finite_max) * (LOG2E if NATURAL else scale * LOG2E))
    p = _exponentials(s, finite_max, scale, NATURAL)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    o0 = o0 * rescale[:, None]
    if D1 > 0:
        o1 = o1 * rescale[:, None]
    if D2 > 0:
        o2 = o2 * rescale[:, None]
    o0, o1, o2 = _accumulate(p, v0, v1, v2, o0, o1, o2, D1, D2, PRECISION)
    return new_max, row_sum, o0, o1, o2


@triton.jit
def _store_part(ptr, row_offsets, row_mask, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, DH: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    mask = row_mask[:, None]
    if FIRST + WIDTH > DH:
        mask = mask & (cols < DH)[None, :]
    tl.store(ptr + row_offsets[:, None] + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    out_ptr, row_max_ptr, log_sum_ptr, first_row, num_rows, row_stride, row_max, row_sum, o0, o1, o2, scale,
    NATURAL: tl.constexpr, DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    # A row of -inf alone has the sum 0: its logarithm is stored as +inf, so that backward finds p = 0 too.
    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)  # NaN stays NaN, as in PyTorch
    log_sum = tl.where(row_sum == 0.0, float("inf"), tl.log(row_sum))
    rows = tl.arange(0, o0.shape[0])
    mask = first_row + rows < num_rows
    out_ptr = _row(out_ptr, first_row, row_stride)
    offsets = rows * row_stride
    _store_part(out_ptr, offsets, mask, o0 * inverse[:, None], 0, D0, DH)
    if D1 > 0:
        _store_part(out_ptr, offsets, mask, o1 * inverse[:, None], D0, D1, DH)
    if D2 > 0:
        _store_part(out_ptr, offsets, mask, o2 * inverse[:, None], D0 + D1, D2, DH)
    if not NATURAL:
        row_max = row_max * scale
    tl.store(row_max_ptr + first_row + rows, row_max, mask=mask)
    tl.store(log_sum_ptr + first_row + rows, log_sum, mask=mask)


@triton.jit
def _clear(
    out_ptr, row_max_ptr, log_sum_ptr, first_row, begin, end, row_stride,
    ROWS: tl.constexpr, DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """What a tile has of rows ``begin`` to ``end``, tokens of no image: zeros, with the statistics of a row without a key."""
    rows = tl.arange(0, ROWS)
    mask = (first_row + rows >= begin) & (first_row + rows < end)
    out_ptr = _row(out_ptr, first_row, row_stride)
    offsets = rows * row_stride
    _store_part(out_ptr, offsets, mask, tl.zeros((ROWS, D0), tl.float32), 0, D0, DH)
    if D1 > 0:
        _store_part(out_ptr, offsets, mask, tl.zeros((ROWS, D1), tl.float32), D0, D1, DH)
    if D2 > 0:
        _store_part(out_ptr, offsets, mask, tl.zeros((ROWS, D2), tl.float32), D0 + D1, D2, DH)
    tl.store(row_max_ptr + first_row + rows, tl.zeros((ROWS,), tl.float32), mask=mask)
    tl.store(log_sum_ptr + first_row + rows, tl.full((ROWS,), float("inf"), tl.float32), mask=mask)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    row_max_ptr,
    log_sum_ptr,
    num_queries,
    num_keys,
    num_heads,
    num_splits,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    bias_key_stride,
    scale,
    UNIT: tl.constexpr,
    NATURAL: tl.constexpr,
    KEY_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    DH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS0: tl.constexpr,
    KEYS1: tl.constexpr,
    KEYS2: tl.constexpr,
    LAST_MASKED: tl.constexpr,
    ONLINE: tl.constexpr,
    TILES: tl.constexpr,
):
    """All keys at once, in up to three blocks (KEYS1 and KEYS2 may be 0); only the last one has masks."""
    # One axis, since only the first passes 65,535; programs of one head are neighbours, so that its K and V are in L2.
    program = tl.program_id(0)
    split = program % num_splits
    image = (program // num_splits // num_heads).to(tl.int64)
    head = (program // num_splits % num_heads).to(tl.int64)
    q_ptr += (image * q_batch_stride + head * q_head_stride) * UNIT
    k_ptr += (image * k_batch_stride + head * k_head_stride) * UNIT
    v_ptr += (image * v_batch_stride + head * v_head_stride) * UNIT
    if bias_ptr is not None:
        bias_ptr += image * bias_batch_stride + head * bias_head_stride
    out_ptr += (image * num_queries * num_heads + head) * DH
    row_max_ptr += (image * num_heads + head) * num_queries
    log_sum_ptr += (image * num_heads + head) * num_queries

    MASKED0: tl.constexpr = LAST_MASKED and KEYS1 == 0
    MASKED1: tl.constexpr = LAST_MASKED and KEYS1 > 0 and KEYS2 == 0
    MASKED2: tl.constexpr = LAST_MASKED and KEYS2 > 0
    k_row_stride = k_row_stride * UNIT
    v_row_stride = v_row_stride * UNIT
    mask0 = tl.arange(0, KEYS0) < num_keys if MASKED0 else None
    ka0, ka1, ka2 = _load_rows(k_ptr, k_row_stride, mask0, KEYS0, DH, D0, D1, D2)
    va0, va1, va2 = _load_rows(v_ptr, v_row_stride, mask0, KEYS0, DH, D0, D1, D2)
    if KEYS1 > 0:
        mask1 = KEYS0 + tl.arange(0, KEYS1) < num_keys if MASKED1 else None
        kb0, kb1, kb2 = _load_rows(_row(k_ptr, KEYS0, k_row_stride), k_row_stride, mask1, KEYS1, DH, D0, D1, D2)
        vb0, vb1, vb2 = _load_rows(_row(v_ptr, KEYS0, v_row_stride), v_row_stride, mask1, KEYS1, DH, D0, D1, D2)
    if KEYS2 > 0:
        mask2 = KEYS0 + KEYS1 + tl.arange(0, KEYS2) < num_keys if MASKED2 else None
        kc0, kc1, kc2 = _load_rows(_row(k_ptr, KEYS0 + KEYS1, k_row_stride), k_row_stride, mask2, KEYS2, DH, D0, D1, D2)
        vc0, vc1, vc2 = _load_rows(_row(v_ptr, KEYS0 + KEYS1, v_row_stride), v_row_stride, mask2, KEYS2, DH, D0, D1, D2)

    first = split * TILES
    # K and V go to shared memory before the loop and stay there. LLVM must not hoist the 25 to 50 descriptors of the
    # products' operands as well: at 257 keys of 80 channels they would spill 100 bytes a thread.
    for tile in tl.range(first, tl.minimum(first + TILES, tl.cdiv(num_queries, BLOCK_M)), num_stages=1, disable_licm=True):
        row = tile * BLOCK_M
        q_mask = row + tl.arange(0, BLOCK_M) < num_queries
        q0, q1, q2 = _load_rows(_row(q_ptr, row, q_row_stride * UNIT), q_row_stride * UNIT, q_mask, BLOCK_M, DH, D0, D1, D2)
        o0 = tl.zeros((BLOCK_M, D0), tl.float32)
        o1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
        o2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else 16), tl.float32)
        sa = _logits(q0, q1, q2, ka0, ka1, ka2, D1, D2, PRECISION)
        sa = _biased(
            sa, scale, bias_ptr, bias_row_stride, bias_key_stride, row, 0, num_queries, num_keys,
            MASKED0, NATURAL, KEY_ONLY,
        )  # fmt: skip
        if ONLINE:
            row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            row_sum = tl.zeros((BLOCK_M,), tl.float32)
            row_max, row_sum, o0, o1, o2 = _update(
                row_max, row_sum, o0, o1, o2, sa, va0, va1, va2, scale, bias_ptr is not None, NATURAL, D1, D2, PRECISION
            )
        if KEYS1 > 0:
            sb = _logits(q0, q1, q2, kb0, kb1, kb2, D1, D2, PRECISION)
            sb = _biased(
                sb, scale, bias_ptr, bias_row_stride, bias_key_stride, row, KEYS0, num_queries, num_keys,
                MASKED1, NATURAL, KEY_ONLY,
            )  # fmt: skip
            if ONLINE:
                row_max, row_sum, o0, o1, o2 = _update(
                    row_max, row_sum, o0, o1, o2, sb, vb0, vb1, vb2, scale, bias_ptr is not None, NATURAL, D1, D2, PRECISION
                )
        if KEYS2 > 0:
            sc = _logits(q0, q1, q2, kc0, kc1, kc2, D1, D2, PRECISION)
            sc = _biased(
                sc, scale, bias_ptr, bias_row_stride, bias_key_stride, row, KEYS0 + KEYS1, num_queries, num_keys,
                MASKED2, NATURAL, KEY_ONLY,
            )  # fmt: skip
            if ONLINE:
                row_max, row_sum, o0, o1, o2 = _update(
                    row_max, row_sum, o0, o1, o2, sc, vc0, vc1, vc2, scale, bias_ptr is not None, NATURAL, D1, D2, PRECISION
                )
        if not ONLINE:
            row_max = tl.max(sa, axis=1)
            if KEYS1 > 0:
                row_max = tl.maximum(row_max, tl.max(sb, axis=1))
            if KEYS2 > 0:
                row_max = tl.maximum(row_max, tl.max(sc, axis=1))
            if bias_ptr is not None:
                row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
            p = _exponentials(sa, row_max, scale, NATURAL)
            row_sum = tl.sum(p, axis=1)
            o0, o1, o2 = _accumulate(p, va0, va1, va2, o0, o1, o2, D1, D2, PRECISION)
            if KEYS1 > 0:
                p = _exponentials(sb, row_max, scale, NATURAL)
                row_sum += tl.sum(p, axis=1)
                o0, o1, o2 = _accumulate(p, vb0, vb1, vb2, o0, o1, o2, D1, D2, PRECISION)
            if KEYS2 > 0:
                p = _exponentials(sc, row_max, scale, NATURAL)
                row_sum += tl.sum(p, axis=1)
                o0, o1, o2 = _accumulate(p, vc0, vc1, vc2, o0, o1, o2, D1, D2, PRECISION)
        elif bias_ptr is not None:
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        _finish(
            out_ptr, row_max_ptr, log_sum_ptr, row, num_queries, num_heads * DH, row_max, row_sum, o0, o1, o2, scale,
            NATURAL, DH, D0, D1, D2,
        )  # fmt: skip


@triton.jit
def _stream_step(
    row_max, row_sum, o0, o1, o2, q0, q1, q2, k_ptr, v_ptr, bias_ptr, start, row, num_queries, num_keys,
    k_row_stride, v_row_stride, bias_row_stride, bias_key_stride, scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr, KEY_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    DH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    mask = start + tl.arange(0, BLOCK) < num_keys if MASKED else None
    k0, k1, k2 = _load_rows(_row(k_ptr, start, k_row_stride), k_row_stride, mask, BLOCK, DH, D0, D1, D2)
    v0, v1, v2 = _load_rows(_row(v_ptr, start, v_row_stride), v_row_stride, mask, BLOCK, DH, D0, D1, D2)
    s = _logits(q0, q1, q2, k0, k1, k2, D1, D2, PRECISION)
    s = _biased(
        s, scale, bias_ptr, bias_row_stride, bias_key_stride, row, start, num_queries, num_keys, MASKED, NATURAL, KEY_ONLY
    )
    return _update(row_max, row_sum, o0, o1, o2, s, v0, v1, v2, scale, bias_ptr is not None, NATURAL, D1, D2, PRECISION)


@triton.jit
def _attention_stream_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    cu_seqlens_ptr,
    out_ptr,
    row_max_ptr,
    log_sum_ptr,
    num_queries,
    num_keys,
    num_heads,
    num_images,
    num_tiles,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    bias_key_stride,
    scale,
    UNIT: tl.constexpr,
    NATURAL: tl.constexpr,
    KEY_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    DH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Keys in blocks of BLOCK_N with online rescaling, then blocks of TAIL (or 0) with masks."""
    program = tl.program_id(0)
    tile = program % num_tiles
    total = num_queries
    if cu_seqlens_ptr is None:
        image = (program // num_tiles // num_heads).to(tl.int64)
        head = (program // num_tiles % num_heads).to(tl.int64)
        first_row = image * num_queries
        statistics = (image * num_heads + head) * num_queries
        q_ptr += image * q_batch_stride * UNIT
        k_ptr += image * k_batch_stride * UNIT
        v_ptr += image * v_batch_stride * UNIT
        if bias_ptr is not None:
            bias_ptr += image * bias_batch_stride + head * bias_head_stride
    else:
        head = (program // num_tiles).to(tl.int64)
        image = _image_of_block(cu_seqlens_ptr, tile, num_images, BLOCK_M)
        first_row = tl.load(cu_seqlens_ptr + image).to(tl.int64)
        num_queries = tl.load(cu_seqlens_ptr + image + 1) - first_row.to(tl.int32)
        num_keys = num_queries
        tile -= first_row.to(tl.int32) // BLOCK_M + image
        statistics = head * total + first_row
        q_ptr += first_row * q_row_stride * UNIT
        k_ptr += first_row * k_row_stride * UNIT
        v_ptr += first_row * v_row_stride * UNIT
        if image == num_images - 1 and (tile + 1) * BLOCK_M > num_queries:
            # The last image's tiles, spare ones included, reach the last token: those beyond the image are theirs to clear.
            _clear(
                out_ptr + (first_row * num_heads + head) * DH, row_max_ptr + statistics, log_sum_ptr + statistics,
                tile * BLOCK_M, num_queries, total - first_row, num_heads * DH, BLOCK_M, DH, D0, D1, D2,
            )  # fmt: skip
        if tile * BLOCK_M >= num_queries:
            return
    q_ptr += head * q_head_stride * UNIT
    k_ptr += head * k_head_stride * UNIT
    v_ptr += head * v_head_stride * UNIT
    out_ptr += (first_row * num_heads + head) * DH

    row = tile * BLOCK_M
    q_mask = row + tl.arange(0, BLOCK_M) < num_queries
    q0, q1, q2 = _load_rows(_row(q_ptr, row, q_row_stride * UNIT), q_row_stride * UNIT, q_mask, BLOCK_M, DH, D0, D1, D2)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    o0 = tl.zeros((BLOCK_M, D0), tl.float32)
    o1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    o2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else 16), tl.float32)
    end = num_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, end, BLOCK_N):
        row_max, row_sum, o0, o1, o2 = _stream_step(
            row_max, row_sum, o0, o1, o2, q0, q1, q2, k_ptr, v_ptr, bias_ptr, start, row, num_queries, num_keys,
            k_row_stride * UNIT, v_row_stride * UNIT, bias_row_stride, bias_key_stride, scale,
            BLOCK_N, False, NATURAL, KEY_ONLY, PRECISION, DH, D0, D1, D2,
        )  # fmt: skip
    if TAIL > 0:
        for start in tl.range(end, num_keys, TAIL, num_stages=1):
            row_max, row_sum, o0, o1, o2 = _stream_step(
                row_max, row_sum, o0, o1, o2, q0, q1, q2, k_ptr, v_ptr, bias_ptr, start, row, num_queries, num_keys,
                k_row_stride * UNIT, v_row_stride * UNIT, bias_row_stride, bias_key_stride, scale,
                TAIL, True, NATURAL, KEY_ONLY, PRECISION, DH, D0, D1, D2,
            )  # fmt: skip
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    _finish(
        out_ptr, row_max_ptr + statistics, log_sum_ptr + statistics, row, num_queries, num_heads * DH, row_max, row_sum,
        o0, o1, o2, scale, NATURAL, DH, D0, D1, D2,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its channels are neighbours and a tile of its rows is within int32 offsets, else a copy."""
    near = x.stride(-3) < 2**24
    return x if near and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def launch_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, row_max and log_sum. ``max_seqlen`` is not needed: the grid follows from the tokens and images alone."""
    *images, num_queries, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = (*images, num_heads, num_queries)
    row_max, log_sum = (torch.empty(statistics, dtype=torch.float32, device=q.device) for _ in range(2))
    if out.numel() == 0:
        return out, row_max, log_sum
    q, k, v = (_rows(t) for t in (q, k, v))
    packed = cu_seqlens is not None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    num_keys = k.shape[-3]
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        if max(bias.stride()[-2:], default=0) >= 2**24:  # a tile of it is not within int32 offsets
            bias = bias.contiguous()
        bias_strides = bias.expand(*images, num_heads, num_queries, num_keys).stride()
    key_only = bias_strides[2] == 0 or num_queries == 1
    strides = [s for t in (q, k, v) for s in (0, *t.stride()[:-1])[-3:]]
    unit = math.gcd(8, *strides)
    arch, full_bias, size = architecture(q.device), bias is not None and not key_only, (num_queries, num_keys, head_dim)
    config = forward_config(arch, gpu_of(q, f"sm_{arch}"), q.dtype, *size, bias is not None, full_bias, packed)
    heads = num_heads * (1 if packed else images[0])
    parts = forward_parts(arch, q.dtype, head_dim, full_bias)
    constants = forward_constants(arch, config, heads, multiprocessors(q.device), parts, q.dtype, num_queries, num_keys, packed)
    tiles = triton.cdiv(num_queries, config.block_m)
    common = {
        **constants,
        "UNIT": unit,
        # Else the largest product is the largest logit. float32 as the backward needs it (_p_and_ds).
        "NATURAL": bias is not None or scale <= 0 or q.dtype == torch.float32,
        "KEY_ONLY": key_only,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "DH": head_dim,
        "enable_fp_fusion": True,  # today's default, written down because Triton 3.10 flips it
    }
    numbers = [*(s // unit for s in strides), *bias_strides, scale]
    # One axis of the grid, since only the first passes 65,535; neighbours share a head, so that its K and V are in L2.
    if config.resident:
        splits = triton.cdiv(tiles, constants["TILES"])
        _attention_fwd_kernel[(heads * splits,)](
            q, k, v, bias, out, row_max, log_sum, num_queries, num_keys, num_heads, splits, *numbers, **common
        )
        return out, row_max, log_sum
    num_images = images[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if packed:
        tiles = num_queries // config.block_m + num_images
    _attention_stream_fwd_kernel[(heads * tiles,)](
        q, k, v, bias, cu_seqlens, out, row_max, log_sum, num_queries, num_keys, num_heads, num_images, tiles, *numbers,
        **common,
    )  # fmt: skip
    return out, row_max, log_sum


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of every configuration that dispatch can choose for a ViT of this shape.

    Batch 1, where a program takes one query tile, and a batch that fills the chip; each kind of bias; images packed; one
    query (attention pooling); float32.
    """
    N, H, Dh = shape.tokens, shape.num_heads, shape.width // shape.num_heads
    name = f"N={N} Dh={Dh}"
    for batch in (1, 4096):
        yield f"{name} bf16 B={batch}", partial(_aot_dense, batch, N, H, Dh, None)
    yield f"{name} bf16 bias", partial(_aot_dense, 4096, N, H, Dh, (1, H, N, N))
    yield f"{name} bf16 key mask", partial(_aot_dense, 4096, N, H, Dh, (4096, 1, 1, N))
    yield f"Dh={Dh} bf16 packed", partial(_aot_packed, H, Dh)
    yield f"{name} bf16 pool", partial(_aot_dense, 4096, N, H, Dh, None, num_queries=1)
    yield f"{name} fp32", partial(_aot_dense, 4096, N, H, Dh, None, dtype=torch.float32)
    yield f"{name} fp32 bias", partial(_aot_dense, 4096, N, H, Dh, (1, H, N, N), dtype=torch.float32)


def _aot_dense(
    B: int,
    N: int,
    H: int,
    Dh: int,
    bias: tuple[int, ...] | None,
    num_queries: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    qkv = torch.empty(B, N, 3, H, Dh, dtype=dtype, device="meta")
    q, k, v = qkv.unbind(2)
    launch_attention_fwd(q[:, :num_queries], k, v, None if bias is None else qkv.new_empty(bias), None, 0, 1.0, False)


def _aot_packed(H: int, Dh: int) -> None:
    q, k, v = torch.empty(4096, 3, H, Dh, dtype=torch.bfloat16, device="meta").unbind(1)
    launch_attention_fwd(q, k, v, None, torch.empty(9, dtype=torch.int32, device="meta"), 0, 1.0, False)
