"""Softmax attention, backward. Equation numbers (1) to (3) are those of ``reference/attention.py``; for a row of queries:

(4)  p = exp((s - row_max) - log_sum)          recomputed; the two statistics come from the forward
(5)  delta = sum(dout * out)                   = sum_keys(p * dp)
(6)  ds = p * (dp - delta), dp = dout @ v^T    gradient of s, and of the bias before it is summed over what was broadcast
(7)  dq = scale * ds @ k,  dk = scale * ds^T @ q,  dv = p^T @ dout

dq is summed over keys and dk, dv over queries, so s and dp are computed twice: 7 products of 2 B H N M Dh FLOPs. Bytes, s an
element (statistics are 2% at Dh = 64):

    one program a head  8 B N H Dh s: read q k v out dout, write dq dk dv; what is read again, for each block, is in L1 or L2
    two launches        12 B N H Dh s: the second reads q k v dout again

ViT-B/16 at B = 256 in bfloat16 on an H200 (4.3 TB/s, 790 TFLOP/s) needs 144 us for the bytes of one program a head, 216 us for
those of two launches, and 135 us for the products, 185 us with the padding of 197 rows to 256 x 208.

One sweep with 5 products would have to keep dq of all queries in registers (4 warps: 104 a thread at N = 197, Dh = 64) beside
dk and dv of a key block (64) and two tiles (64): it spilled 270 to 750 bytes a thread in all shapes tried, the addresses in
shared memory of unrolled query blocks being another 100. No atomics, no float32 dq in memory: results are bitwise reproducible.

Where p is nearly one key's, dp - delta cancels, and what out was rounded by is left. With bfloat16 logits of std 3, 10 and 30
(N = 197) dq and dk have a relative L2 error of 3.1e-3, 5.3e-3 and 7.0e-3, as with PyTorch's flash attention, whose delta is
the same; an exact one would give 2.4e-3 throughout, at 9 products. PyTorch's unfused attention, which a trained bias takes on
a CPU, keeps p: at two tokens it has a hundredth of our error. So with a trained bias, and in float32, a sweep before that of dq
makes delta EXACT:

(8)  delta := delta + sum_keys(ds)             since sum_keys(p) = 1
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_configs import backward_config, backward_parts, backward_tail
from ._attention_tiles import (
    _add_parts,
    _bias_tile,
    _clear_rows,
    _delta,
    _image_of_block,
    _load_rows,
    _load_statistics,
    _p_and_ds,
    _statistics,
    _store_rows,
    _store_statistics,
    _zeros,
)
from ._device import architecture, gpu_of, multiprocessors
from .attention_bias_backward import launch_dbias

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {"_attention_bwd_kernel": ("statistics_ptr", "dq_ptr", "dk_ptr", "dv_ptr")}


def _flops(q_ptr, num_keys, num_images, cu_seqlens_ptr, dq_ptr, dk_ptr, EXACT, **_) -> int:
    """Three products for dq, or five, and four for dk and dv; packed images are taken to be equally long."""
    products = (5 if EXACT else 3) * (dq_ptr is not None) + 4 * (dk_ptr is not None)
    return 2 * products * q_ptr.numel() * (num_keys if cu_seqlens_ptr is None else num_keys // num_images)


FLOPS = {"_attention_bwd_kernel": _flops}


# One block of queries, or of keys.


@triton.jit
def _ds_and_k(
    q, dout, row_max, log2_sum, delta, first_key, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
    bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    NATURAL: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_ptr, first_key, k_stride, num_keys, KEYS, MASKED, DH, PARTS)
    v = _load_rows(v_ptr, first_key, v_stride, num_keys, KEYS, MASKED, DH, PARTS)
    if bias_ptr is None:
        pointers = None
        mask = None
        key_mask = (tl.arange(0, KEYS) < num_keys - first_key)[None, :] if MASKED else None
    else:
        pointers, mask = _bias_tile(
            bias_ptr, bias_query_stride, bias_key_stride, first_query, first_key, num_queries, num_keys,
            QUERIES, KEYS, KEY_ONLY, False,
        )  # fmt: skip
        key_mask = None
    _, ds = _p_and_ds(
        q, k, dout, v, row_max[:, None], log2_sum[:, None], delta[:, None], pointers, mask, key_mask, scale,
        NATURAL, PARTS, PRECISION,
    )  # fmt: skip
    return ds, k


@triton.jit
def _dq_block(
    first_query, dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, row_max_ptr, log_sum_ptr, bias_ptr, statistics_ptr, dq_ptr,
    dout_stride, q_stride, k_stride, v_stride, out_stride, dq_stride, bias_query_stride, bias_key_stride,
    num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KEY_TAIL: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    NATURAL: tl.constexpr, EXACT: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of QUERIES queries, and their statistics."""
    q = _load_rows(q_ptr, first_query, q_stride, num_queries, QUERIES, True, DH, PARTS)
    dout = _load_rows(dout_ptr, first_query, dout_stride, num_queries, QUERIES, True, DH, PARTS)
    out = _load_rows(out_ptr, first_query, out_stride, num_queries, QUERIES, True, DH, PARTS)
    delta = _delta(out, dout, PARTS)
    row_max, log2_sum = _statistics(row_max_ptr, log_sum_ptr, first_query, num_queries, NATURAL, QUERIES)
    full = num_keys if MASKED else num_keys // KEYS * KEYS
    if EXACT:  # eq. (8)
        error = tl.zeros((QUERIES,), tl.float32)
        for first_key in range(0, full, KEYS):
            ds, _ = _ds_and_k(
                q, dout, row_max, log2_sum, delta, first_key, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
                bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
                QUERIES, KEYS, MASKED, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
            )  # fmt: skip
            error += tl.sum(ds, axis=1)
        if KEY_TAIL > 0:
            last_ds, _ = _ds_and_k(
                q, dout, row_max, log2_sum, delta, full, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
                bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
                QUERIES, KEY_TAIL, True, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
            )  # fmt: skip
            error += tl.sum(last_ds, axis=1)
        delta += error
    _store_statistics(statistics_ptr, row_max, log2_sum, delta, first_query, num_queries, QUERIES)

    dq = _zeros(QUERIES, PARTS)
    for first_key in range(0, full, KEYS):
        ds, k = _ds_and_k(
            q, dout, row_max, log2_sum, delta, first_key, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEYS, MASKED, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
        )  # fmt: skip
        dq = _add_parts(dq, ds, k, PARTS, PRECISION)
    if KEY_TAIL > 0:
        last_ds, last_k = _ds_and_k(
            q, dout, row_max, log2_sum, delta, full, first_query, k_ptr, v_ptr, bias_ptr, k_stride, v_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEY_TAIL, True, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
        )  # fmt: skip
        dq = _add_parts(dq, last_ds, last_k, PARTS, PRECISION)
    _store_rows(dq_ptr, first_query, dq_stride, num_queries, dq, scale, QUERIES, DH, PARTS)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, first_query, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
    bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    NATURAL: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_ptr, first_query, q_stride, num_queries, QUERIES, MASKED, DH, PARTS)
    dout = _load_rows(dout_ptr, first_query, dout_stride, num_queries, QUERIES, MASKED, DH, PARTS)
    row_max, log2_sum, delta = _load_statistics(statistics_ptr, first_query, num_queries, QUERIES, MASKED)
    # A key that does not exist spoils nothing but its own dk and dv, which are not stored; only its bias must not be read.
    if bias_ptr is None:
        pointers = None
        mask = None
    else:
        pointers, mask = _bias_tile(
            bias_ptr, bias_query_stride, bias_key_stride, first_query, first_key, num_queries, num_keys,
            QUERIES, KEYS, KEY_ONLY, True,
        )  # fmt: skip
    # Keys x queries: p and ds are left operands straight from registers, and few last queries (197 = 3 * 64 + 5) are a
    # number of columns, which tensor cores take in steps of 8.
    p, ds = _p_and_ds(
        k, q, v, dout, row_max[None, :], log2_sum[None, :], delta[None, :], pointers, mask, None, scale,
        NATURAL, PARTS, PRECISION,
    )  # fmt: skip
    return _add_parts(dk, ds, q, PARTS, PRECISION), _add_parts(dv, p, dout, PARTS, PRECISION)


@triton.jit
def _dkdv_block(
    first_key, dout_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, statistics_ptr, dk_ptr, dv_ptr,
    dout_stride, q_stride, k_stride, v_stride, dkv_stride, bias_query_stride, bias_key_stride,
    num_queries, num_keys, scale,
    QUERIES: tl.constexpr, QUERY_TAIL: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, KEY_ONLY: tl.constexpr,
    NATURAL: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys."""
    k = _load_rows(k_ptr, first_key, k_stride, num_keys, KEYS, True, DH, PARTS)
    v = _load_rows(v_ptr, first_key, v_stride, num_keys, KEYS, True, DH, PARTS)
    dk = _zeros(KEYS, PARTS)
    dv = _zeros(KEYS, PARTS)
    full = num_queries if MASKED else num_queries // QUERIES * QUERIES
    for first_query in range(0, full, QUERIES):
        dk, dv = _dkdv_step(
            dk, dv, k, v, first_query, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERIES, KEYS, MASKED, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
        )  # fmt: skip
    if QUERY_TAIL > 0:
        dk, dv = _dkdv_step(
            dk, dv, k, v, full, first_key, q_ptr, dout_ptr, statistics_ptr, bias_ptr, q_stride, dout_stride,
            bias_query_stride, bias_key_stride, num_queries, num_keys, scale,
            QUERY_TAIL, KEYS, True, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
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
        block = program % programs_per_head
        return tl.cast(image, tl.int64), tl.cast(head % num_heads, tl.int64), tl.cast(0, tl.int64), 0, block
    else:
        block = program // num_heads
        image = _image_of_block(cu_seqlens_ptr, block, num_images, BLOCK)  # a spare block lies beyond its image's last row
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
    ALONE: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr, KEY_ONLY: tl.constexpr, NATURAL: tl.constexpr,
    EXACT: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_STEP: tl.constexpr, QUERY_TAIL: tl.constexpr, KEY_STEP: tl.constexpr, KEY_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, dk and dv of a block of keys, or, where a program has the head ALONE, of all blocks in turn."""
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
    # The last image's blocks, spare ones included, reach the last token: the gradients up to row `cleared` are theirs. Stored
    # after the loop: before it, the addresses would stay in registers for the stores of the loop.
    cleared = 0
    if cu_seqlens_ptr is not None:
        cleared = tl.where(image == num_images - 1, num_queries - packed_row.to(tl.int32), 0)
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
                BLOCK, KEY_STEP, KEY_TAIL, MASKED, KEY_ONLY, NATURAL, EXACT, DH, PARTS, PRECISION,
            )  # fmt: skip
        if cleared > packed_length:
            _clear_rows(dq_ptr, start, packed_length, cleared, dq_strides[1] * UNIT, BLOCK, DH, PARTS)
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
                QUERY_STEP, QUERY_TAIL, BLOCK, MASKED, KEY_ONLY, NATURAL, DH, PARTS, PRECISION,
            )  # fmt: skip
        if cleared > packed_length:
            _clear_rows(dk_ptr, start, packed_length, cleared, dkv_strides[1] * UNIT, BLOCK, DH, PARTS)
            _clear_rows(dv_ptr, start, packed_length, cleared, dkv_strides[1] * UNIT, BLOCK, DH, PARTS)


# Launchers.


def _rows(x: Tensor) -> Tensor:
    """``x`` itself if its channels are neighbours and 64 of its rows are within int32 offsets, else a copy."""
    near = x.stride(-3) < 2**24
    return x if near and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of x, 0 in dimensions of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _row_strides(x: Tensor) -> tuple[int, ...]:
    """Of image, row and head; of a packed tensor (total, H, Dh) the image's is 0."""
    return (0, *_strides(x)[:-1])[-3:]


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
        if bias is None or not need_dbias:
            return row_max.new_empty(0)
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    bias_view = None if bias is None else bias[(None,) * (4 - bias.dim())]  # (B or 1, H or 1, N or 1, M or 1)
    bias_strides = (0,) * 4 if bias_view is None else _strides(bias_view)
    strides = [_row_strides(t) for t in (dout, q, k, v, out, dq, dk)]
    unit = math.gcd(8, *(stride for group in strides for stride in group))
    *strides, out_strides, dq_strides, dkv_strides = (tuple(stride // unit for stride in group) for group in strides)
    packed = cu_seqlens is not None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    N, M, H, Dh = q.shape[-3], k.shape[-3], q.shape[-2], q.shape[-1]
    B = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    fills = 2 * multiprocessors(q.device)
    arch, biased = architecture(q.device), bias is not None and bias_strides[2] != 0  # a vector of keys is no burden
    heads = 0 if need_dbias else B * H  # one program a head would spill 8 bytes on sm_120, for one launch of three
    gpu, plain = gpu_of(q, f"sm_{arch}"), bias is None and not packed
    config = backward_config(arch, gpu, q.dtype, heads, N, M, Dh, fills, biased, plain, packed)
    common = {
        **{"dout_ptr": dout, "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": bias_view},
        "statistics_ptr": torch.empty(*row_max.shape, 4, dtype=torch.float32, device=q.device),
        **dict(zip(("dout_strides", "q_strides", "k_strides", "v_strides"), strides, strict=True)),
        **{"bias_strides": bias_strides, "KEY_ONLY": bias_strides[2] == 0},
        **{"num_queries": N, "num_keys": M, "num_heads": H, "num_images": B, "scale": scale},
        **{"UNIT": unit, "DH": Dh, "PARTS": backward_parts(arch, q.dtype, Dh, biased)},
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        **{"num_warps": config.num_warps, "num_stages": config.num_stages},
        "enable_fp_fusion": True,  # today's default, written down because Triton 3.10 flips it
    }

    # One loop whose every step has masks, instead of a loop and a tail: with the tail as large as a step, which it is where the
    # length is not known, what both need stays in registers (92 bytes of spills at Dh = 80; float32 784; with a key mask 84,
    # and 44 at Dh = 96 on sm_90, 16 at Dh = 32 on sm_120).
    in_registers = arch not in (90, 100)
    crowded = bias is not None and (in_registers or Dh > (64 if config.one_program else 80))
    masked = packed or q.dtype == torch.float32 or crowded
    dq_pass = {"out_ptr": out, "row_max_ptr": row_max, "log_sum_ptr": log_sum, "dq_ptr": dq}
    dkdv_pass = {"dk_ptr": dk, "dv_ptr": dv}
    absent = dict.fromkeys((*dq_pass, *dkdv_pass))
    # In Triton 3.6 ptxas would rather spill 4 bytes of float32 for a third program on an SM.
    dkdv_options = {"maxnreg": 128} if q.dtype == torch.float32 and 48 < Dh <= 64 else {}

    def launch(tensors: dict[str, Tensor], blocks: int, programs_per_head: int, **options: int) -> None:
        _attention_bwd_kernel[(blocks * H,)](
            **{**common, **absent, **tensors, **options},
            **{"cu_seqlens_ptr": cu_seqlens, "row_strides": (0, N) if packed else (H * N, N)},
            **{"out_strides": out_strides, "dq_strides": dq_strides, "dkv_strides": dkv_strides},
            **{"programs_per_head": programs_per_head, "ALONE": config.one_program and not packed},
            # As the forward: float32 keeps the largest logit exact.
            NATURAL=bias is not None or q.dtype == torch.float32,
            EXACT=need_dbias or q.dtype == torch.float32,
            **{"BLOCK": config.block, "QUERY_STEP": config.query_step, "KEY_STEP": config.key_step},
            **{"MASKED": masked, "QUERY_TAIL": 0 if masked else backward_tail(N, config.query_step)},
            KEY_TAIL=0 if masked else backward_tail(M, config.key_step),
        )

    query_blocks, key_blocks = triton.cdiv(N, config.block), triton.cdiv(M, config.block)
    if packed:
        blocks = N // config.block + B  # at least what images of any lengths fill
        launch(dq_pass, blocks, blocks)
        launch(dkdv_pass, blocks, blocks, **dkdv_options)
    elif config.one_program:
        launch(dq_pass | dkdv_pass, B, 1)
    else:
        launch(dq_pass, B * query_blocks, query_blocks)
        launch(dkdv_pass, B * key_blocks, key_blocks, **dkdv_options)
    if bias is None or not need_dbias:
        return q.new_empty(0)
    return launch_dbias(common, bias, config.block, config.key_step)


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
