"""Tiles of the backward kernels of attention: rows in and out, the bias, the probabilities and the gradient of the logits; and
which packed image a block belongs to, of both directions.

Equations are those of ``attention_backward.py``.
"""

import triton
import triton.language as tl

from ._dot import add_product

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
    if not MASKED:
        return (cols < DH)[None, :]
    elif END > DH:
        return (rows < num_rows)[:, None] & (cols < DH)[None, :]
    else:
        return (rows < num_rows)[:, None]


# Row numbers count from the first row of the image and are multiplied anew for each tile. Counted from a tile's first row, the
# products would be the same in every trip, and the compiler keeps what is the same in registers across all loops (90 of them).


@triton.jit
def _load_rows(
    ptr, first, stride, num_rows, ROWS: tl.constexpr, MASKED: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Rows ``first`` and up, zeros beyond the ``num_rows`` there are (if MASKED) and beyond DH."""
    tiles = ()
    rows = first + tl.arange(0, ROWS)
    for i in tl.static_range(len(PARTS)):
        cols = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        pointers = ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        if MASKED or _first(PARTS, i + 1) > DH:
            tile = tl.load(pointers, mask=_mask(rows, cols, num_rows, _first(PARTS, i + 1), DH, MASKED), other=0.0)
        else:
            tile = tl.load(pointers)
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
def _clear_rows(ptr, first, begin, end, stride, ROWS: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr):
    """Zeros in rows ``begin`` to ``end``, as far as they are among the ROWS rows from ``first`` on."""
    rows = first + tl.arange(0, ROWS)
    for i in tl.static_range(len(PARTS)):
        cols = _first(PARTS, i) + tl.arange(0, _width(PARTS, i))
        mask = (rows >= begin)[:, None] & _mask(rows, cols, end, _first(PARTS, i + 1), DH, True)
        pointers = ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        tl.store(pointers, tl.zeros((ROWS, _width(PARTS, i)), ptr.dtype.element_ty), mask=mask)


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
        product += tl.dot(a[i], tl.trans(b[i]), input_precision=PRECISION)
    return product


@triton.jit
def _add_parts(sums, a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a @ b, part by part."""
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (add_product(sums[i], a.to(b[i].dtype), b[i], PRECISION),)  # noqa: RUF005
    return tiles


@triton.jit
def _p_and_ds(
    a, b, da, db, row_max, log2_sum, delta, bias_pointers, bias_mask, key_mask, scale,
    NATURAL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Equations (4) and (6) for a tile a x b: queries x keys with da = dout, db = v, or keys x queries with da = v, db = dout.

    The statistics of a query that does not exist are 0 and +inf, which gives p = 0.
    """
    s = _inner(a, b, PARTS, PRECISION)
    if NATURAL:
        # In natural units up to row_max: in those of log 2, finfo.min would be -inf. And row_max apart from log2_sum, which
        # a finfo.min would swallow. A row of -inf alone has 0 and +inf: p = 0. Without a bias for float32, whose largest p
        # would be off by the rounding of a logit of 10 instead of exactly as in the forward: eager's dv, 3 times its error.
        s = s * scale
        if bias_pointers is not None:
            s += tl.load(bias_pointers, mask=bias_mask, other=float("-inf")).to(tl.float32)
        p = tl.exp2((s - row_max) * LOG2E - log2_sum)
    else:
        p = tl.exp2(s * (scale * LOG2E) - log2_sum)
    if key_mask is not None:
        p = tl.where(key_mask, p, 0.0)
    dp = _inner(da, db, PARTS, PRECISION)
    return p, p * (dp - delta)


# What a tile needs to know of its queries lies in rows of four: row_max, log2_sum, delta, nothing. Four, because Triton moves a
# load of at least as many elements as threads through shared memory; fewer, each thread fetches alone for all its columns (48
# loads and 64-bit addresses for 64 queries, which spill).


@triton.jit
def _statistics(row_max_ptr, log_sum_ptr, first, num_rows, NATURAL: tl.constexpr, ROWS: tl.constexpr):
    """row_max and log2_sum as the forward left them; the latter includes the former unless NATURAL."""
    rows = first + tl.arange(0, ROWS)
    mask = rows < num_rows
    row_max = tl.load(row_max_ptr + rows, mask=mask, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=mask, other=float("inf"))
    return row_max, (log_sum if NATURAL else row_max + log_sum) * LOG2E


@triton.jit
def _store_statistics(statistics_ptr, row_max, log2_sum, delta, first, num_rows, ROWS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    mask = rows < num_rows
    tl.store(statistics_ptr + rows * 4, row_max, mask=mask)
    tl.store(statistics_ptr + rows * 4 + 1, log2_sum, mask=mask)
    tl.store(statistics_ptr + rows * 4 + 2, delta, mask=mask)


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
    QUERIES: tl.constexpr, KEYS: tl.constexpr, KEY_ONLY: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a tile of the bias; one vector where queries share it."""
    queries = first_query + tl.arange(0, 1 if KEY_ONLY else QUERIES)
    keys = first_key + tl.arange(0, KEYS)
    # An absent query may read a key-only bias: its log2_sum makes p = 0.
    query_offsets, query_mask = queries.to(tl.int64) * query_stride, (queries < num_queries) | KEY_ONLY
    key_offsets, key_mask = keys.to(tl.int64) * key_stride, keys < num_keys
    if KEYS_FIRST:
        return (
            bias_ptr + key_offsets[:, None] + query_offsets[None, :],
            key_mask[:, None] & query_mask[None, :],
        )
    else:
        return (
            bias_ptr + query_offsets[:, None] + key_offsets[None, :],
            query_mask[:, None] & key_mask[None, :],
        )


@triton.jit
def _image_of_block(cu_seqlens_ptr, block, num_images, BLOCK: tl.constexpr):
    # Image b owns blocks cu_seqlens[b] // BLOCK + b and up: never fewer than it fills, for any lengths, and total // BLOCK + B
    # of them in all, which the host knows without reading a length.
    image = -1
    for first in tl.range(0, num_images, 256):
        images = first + tl.arange(0, 256)
        exists = images < num_images
        starts = tl.load(cu_seqlens_ptr + images, mask=exists, other=0)
        image += tl.sum((exists & (starts // BLOCK + images <= block)).to(tl.int32), axis=0)
    return image
