"""LayerNorm and residual add + LayerNorm, forward and backward. Equation numbers are those of ``reference/layer_norm.py``.

Bytes and floor, D channels, s bytes an element, M rows (weights and statistics are below 2% at D >= 192):

    layer_norm      forward 2 M D s    backward 3 M D s
    add_layer_norm  forward 4 M D s    backward 4 M D s (5 when dx is not dresidual, 6 with dlayer_scale)

About 10 FLOPs an element, far below the ridge point: device memory is the floor. ViT-B/16 at B = 256 in bfloat16 on an H200
(4.3 TB/s) gives 36 us for the forward and 54 us for the backward of layer_norm. Hence one read of each row into registers,
three-pass statistics there, 16-byte accesses, and no atomics: a backward program keeps the parameter gradients of all its rows
in registers and writes one partial sum, which a second kernel adds up in a fixed order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import multiprocessors

if TYPE_CHECKING:
    from ._aot import Shape

# float32 elements of one tensor that a thread holds: 16 keeps the backward (six live tensors) near 128 registers.
ELEMENTS_PER_THREAD = 16

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_layer_norm_fwd_kernel": ("y_ptr", "stream_ptr", "mean_ptr", "rstd_ptr"),
    "_layer_norm_bwd_kernel": ("dresidual_ptr", "dx_ptr", "dweight_ptr", "dbias_ptr", "dlayer_scale_ptr"),
    "_parameter_gradients_kernel": ("dweight_ptr", "dbias_ptr", "dlayer_scale_ptr"),
}


@triton.jit
def _row_offsets(rows, inner_rows, outer_stride, inner_stride, NESTED: tl.constexpr, UNIT: tl.constexpr):
    # Strides come divided by UNIT: multiplying back tells the compiler that they are aligned, which Triton's own
    # specialisation (multiples of 16 only) would miss at D = 1000. int64, since B*N*3*D can pass 2^31.
    if NESTED:
        outer = (rows // inner_rows).to(tl.int64)
        inner = (rows % inner_rows).to(tl.int64)
        return (outer * outer_stride + inner * inner_stride) * UNIT
    return rows.to(tl.int64) * inner_stride * UNIT


@triton.jit
def row_statistics(s, col_mask, D: tl.constexpr):
    """Mean, ``s`` less its mean, and variance of each row: eq. (2) and (3) without eps.

    A sum errs by a few roundings of the mean, more than the spread of a nearly constant row. So a first mean is subtracted, and
    the mean of what is left is found and subtracted too. In a constant row the rest is the same few ulps in every channel:
    their sum is exact and div_rn gives them back, so that exactly 0 remains. Neither a product with 1 / D nor `/`, which is
    div.full on a GPU and may err by 2 ulp, would do. The first sum is of quotients, so that it does not overflow.
    """
    first = tl.sum(s * (1.0 / D), axis=1)
    centred = tl.where(col_mask[None, :], s - first[:, None], 0.0)
    rest = tl.div_rn(tl.sum(centred, axis=1), D * 1.0)
    centred = tl.where(col_mask[None, :], centred - rest[:, None], 0.0)
    return first + rest, centred, tl.sum(centred * centred, axis=1) * (1.0 / D)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    layer_scale_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stream_ptr,
    mean_ptr,
    rstd_ptr,
    shift_ptr,
    num_rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    X_NESTED: tl.constexpr,
    X_UNIT: tl.constexpr,
    RESIDUAL_NESTED: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask = rows < num_rows
    col_mask = cols < D
    mask = row_mask[:, None] & col_mask[None, :]
    out_offsets = (rows.to(tl.int64) * D)[:, None] + cols[None, :]

    x_offsets = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride, X_NESTED, X_UNIT)
    s = tl.load(x_ptr + x_offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if layer_scale_ptr is not None:
        s *= tl.load(layer_scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:  # eq. (1)
        residual_offsets = _row_offsets(
            rows, residual_inner, residual_outer_stride, residual_inner_stride, RESIDUAL_NESTED, RESIDUAL_UNIT
        )
        s += tl.load(residual_ptr + residual_offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + out_offsets, rounded, mask=mask)
        s = rounded.to(tl.float32)  # the statistics of what eager, and our backward, read
    if shift_ptr is not None:
        s += tl.load(shift_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]

    mean, centred, variance = row_statistics(s, col_mask, D)  # eq. (2)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))  # eq. (3)
    y = centred * rstd[:, None]  # eq. (4)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]  # eq. (5)

    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dstream_ptr,
    stream_ptr,
    x_ptr,
    weight_ptr,
    layer_scale_ptr,
    mean_ptr,
    rstd_ptr,
    shift_ptr,
    dresidual_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dlayer_scale_ptr,
    num_rows,
    stream_inner,
    stream_outer_stride,
    stream_inner_stride,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    STREAM_NESTED: tl.constexpr,
    STREAM_UNIT: tl.constexpr,
    X_NESTED: tl.constexpr,
    X_UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    # Accumulated per row of the tile and summed over the tile's rows once at the end: no exchange between warps in the loop.
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dlayer_scale = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        offsets = (rows.to(tl.int64) * D)[:, None] + cols[None, :]

        stream_offsets = _row_offsets(rows, stream_inner, stream_outer_stride, stream_inner_stride, STREAM_NESTED, STREAM_UNIT)
        s = tl.load(stream_ptr + stream_offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            s += tl.load(shift_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        # Eq. (4). Where channels differ by single ulps, the rounding of the saved mean shows here, as in PyTorch's backward.
        # The mean is taken as 0 beyond D, where s is 0, so that x_hat is 0 there too and not infinite, which times g is NaN.
        x_hat = (s - tl.where(mask, mean[:, None], 0.0)) * rstd[:, None]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            dweight += dy * x_hat  # eq. (8)
        if dbias_ptr is not None:
            dbias += dy

        g = dy
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]  # eq. (6)
        g_mean = tl.sum(g, axis=1) * (1.0 / D)
        gx_mean = tl.sum(g * x_hat, axis=1) * (1.0 / D)
        ds = (g - g_mean[:, None] - x_hat * gx_mean[:, None]) * rstd[:, None]  # eq. (7)
        if dstream_ptr is not None:
            ds += tl.load(dstream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + offsets, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dlayer_scale_ptr is not None:
            x_offsets = _row_offsets(rows, x_inner, x_outer_stride, x_inner_stride, X_NESTED, X_UNIT)
            x = tl.load(x_ptr + x_offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            dlayer_scale += ds * x
        if dx_ptr is not None:  # eq. (9)
            if layer_scale_ptr is not None:
                ds *= tl.load(layer_scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            tl.store(dx_ptr + offsets, ds.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0) * D + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=col_mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=col_mask)
    if dlayer_scale_ptr is not None:
        tl.store(dlayer_scale_ptr + partial, tl.sum(dlayer_scale, axis=0), mask=col_mask)


@triton.jit
def _column_sum(partial_ptr, out_ptr, num_partials, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.range(0, num_partials, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < num_partials)[:, None] & (cols < D)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _parameter_gradients_kernel(
    dweight_partial_ptr,
    dbias_partial_ptr,
    dlayer_scale_partial_ptr,
    dweight_ptr,
    dbias_ptr,
    dlayer_scale_ptr,
    num_partials,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    parameter = tl.program_id(1)
    if dweight_ptr is not None:  # noqa: SIM102  the outer test is the compiler's, the inner one the program's
        if parameter == 0:
            _column_sum(dweight_partial_ptr, dweight_ptr, num_partials, D, BLOCK_P, BLOCK_D)
    if dbias_ptr is not None:  # noqa: SIM102
        if parameter == 1:
            _column_sum(dbias_partial_ptr, dbias_ptr, num_partials, D, BLOCK_P, BLOCK_D)
    if dlayer_scale_ptr is not None:  # noqa: SIM102
        if parameter == 2:
            _column_sum(dlayer_scale_partial_ptr, dlayer_scale_ptr, num_partials, D, BLOCK_P, BLOCK_D)


class _Rows(NamedTuple):
    """A tensor seen as M rows of D unit-stride elements, rows nested in at most two levels."""

    tensor: Tensor
    nested: bool
    inner: int  # rows of the inner level
    outer_stride: int  # in elements / unit
    inner_stride: int
    unit: int


def _as_rows(x: Tensor) -> _Rows:
    """View ``x`` (..., D) as rows. Copies only where neither a flat nor a two-level walk covers it, as eager would."""
    D = x.shape[-1]
    if x.stride(-1) != 1 and D > 1:
        x = x.contiguous()
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first, mergeable neighbours merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        x, levels = x.contiguous(), [(x.numel() // D, D)]
    inner, inner_stride = levels[-1] if levels else (1, D)
    nested = len(levels) == 2
    outer_stride = levels[0][1] if nested else 0
    unit = 8 if inner_stride % 8 == 0 and outer_stride % 8 == 0 else 1
    return _Rows(x, nested, inner, outer_stride // unit, inner_stride // unit, unit)


def _tile(D: int) -> dict[str, int]:
    """Tile of ROWS x BLOCK_D and the warps that hold it, ELEMENTS_PER_THREAD a thread."""
    block_d = max(triton.next_power_of_2(D), 16)
    elements = max(block_d, 2048)
    num_warps = min(max(elements // (32 * ELEMENTS_PER_THREAD), 4), 16)
    # enable_fp_fusion is today's default, written down because Triton 3.10 flips it.
    return {
        "D": D,
        "BLOCK_D": block_d,
        "ROWS": elements // block_d,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


def _num_backward_programs(device: torch.device, num_tiles: int, num_warps: int) -> int:
    # One wave: 12 warps an SM are what the register file holds of the widest variant (168 registers a thread: autocast with
    # LayerScale). Their loads in flight (24 KB) cover the latency, and their partial sums are below 3% of the bytes.
    return min(num_tiles, multiprocessors(device) * max(1, 12 // num_warps))


def launch_layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, mean and rstd; with ``shift`` those of x + shift, which is not rounded."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = _launch_fwd(x, None, None, weight, bias, y, None, eps, shift)
    return y, mean, rstd


def launch_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
    stream_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, stream, mean and rstd."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    stream = torch.empty(x.shape, dtype=stream_dtype, device=x.device)
    mean, rstd = _launch_fwd(x, residual, layer_scale, weight, bias, y, stream, eps)
    return y, stream, mean, rstd


def _launch_fwd(x, residual, layer_scale, weight, bias, y, stream, eps, shift=None) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    tile = _tile(x.shape[-1])
    num_rows = mean.numel()
    x_rows = _as_rows(x)
    residual_rows = x_rows if residual is None else _as_rows(residual)
    layer_scale, weight, bias, shift = (None if t is None else t.contiguous() for t in (layer_scale, weight, bias, shift))
    if num_rows > 0:
        _layer_norm_fwd_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            x_rows.tensor,
            None if residual is None else residual_rows.tensor,
            layer_scale,
            weight,
            bias,
            y,
            stream,
            mean,
            rstd,
            shift,
            num_rows,
            x_rows.inner,
            x_rows.outer_stride,
            x_rows.inner_stride,
            residual_rows.inner,
            residual_rows.outer_stride,
            residual_rows.inner_stride,
            eps,
            X_NESTED=x_rows.nested,
            X_UNIT=x_rows.unit,
            RESIDUAL_NESTED=residual_rows.nested,
            RESIDUAL_UNIT=residual_rows.unit,
            **tile,
        )
    return mean, rstd


def launch_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight and dbias; what is not needed is empty."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias, _ = _launch_bwd(dy, None, x, None, weight, bias, None, mean, rstd, dx, None, need_dweight, need_dbias)
    return dx, dweight, dbias


def launch_add_layer_norm_bwd(
    dy: Tensor,
    dstream: Tensor,
    stream: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_dweight: bool,
    need_dbias: bool,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dresidual, dx (empty where dresidual serves as both), dweight, dbias and dlayer_scale (needed if x is given)."""
    dresidual = torch.empty(stream.shape, dtype=residual_dtype, device=stream.device)
    own_dx = layer_scale is not None or x_dtype != residual_dtype
    dx = torch.empty(stream.shape if own_dx else 0, dtype=x_dtype, device=stream.device)
    sums = _launch_bwd(
        dy, dstream, stream, x, weight, bias, layer_scale, mean, rstd, dresidual, dx if own_dx else None,
        need_dweight, need_dbias, shift,
    )  # fmt: skip
    return dresidual, dx, *sums


def _launch_bwd(
    dy, dstream, stream, x, weight, bias, layer_scale, mean, rstd, dresidual, dx, need_dweight, need_dbias, shift=None
) -> tuple[Tensor, Tensor, Tensor]:
    D = stream.shape[-1]
    tile = _tile(D)
    num_rows = mean.numel()
    programs = _num_backward_programs(stream.device, triton.cdiv(num_rows, tile["ROWS"]), tile["num_warps"])
    wanted = (need_dweight, need_dbias, x is not None)
    sums = [
        torch.empty(D, dtype=p.dtype, device=p.device) if want and p is not None else None
        for p, want in zip((weight, bias, layer_scale), wanted, strict=True)
    ]
    partials = [None if t is None else torch.empty(programs, D, dtype=torch.float32, device=t.device) for t in sums]
    stream_rows = _as_rows(stream)
    x_rows = stream_rows if x is None else _as_rows(x)
    weight, layer_scale, shift = (None if t is None else t.contiguous() for t in (weight, layer_scale, shift))
    if num_rows > 0:
        _layer_norm_bwd_kernel[(programs,)](
            dy.contiguous(),
            None if dstream is None else dstream.contiguous(),
            stream_rows.tensor,
            None if x is None else x_rows.tensor,
            weight,
            layer_scale,
            mean,
            rstd,
            shift,
            dresidual,
            dx,
            *partials,
            num_rows,
            stream_rows.inner,
            stream_rows.outer_stride,
            stream_rows.inner_stride,
            x_rows.inner,
            x_rows.outer_stride,
            x_rows.inner_stride,
            STREAM_NESTED=stream_rows.nested,
            STREAM_UNIT=stream_rows.unit,
            X_NESTED=x_rows.nested,
            X_UNIT=x_rows.unit,
            **tile,
        )
    if any(t is not None for t in sums):  # with no rows at all it writes the zeros
        block_d = 32
        _parameter_gradients_kernel[(triton.cdiv(D, block_d), 3)](
            *partials, *sums, programs, D, BLOCK_P=32, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=True
        )
    empty = torch.empty(0, dtype=stream.dtype, device=stream.device)
    dweight, dbias, dlayer_scale = (empty.clone() if t is None else t for t in sums)
    return dweight, dbias, dlayer_scale


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of every configuration that dispatch can choose for a ViT of this shape.

    Each launch is forward and backward: bfloat16 throughout (float16 has the same ones: ``cli/inspect.py``), and autocast's mix
    of a bfloat16 branch, a float32 stream and float32 parameters; alone, with the residual add, and with LayerScale too.
    """
    for dtypes, dtype in (("bf16", torch.bfloat16), ("autocast", torch.float32)):
        name = f"D={shape.width} {dtypes}"
        stream = torch.empty(shape.train_batch, shape.tokens, shape.width, dtype=dtype, device="meta")
        yield name, partial(_aot_layer_norm, stream)
        yield f"{name} add", partial(_aot_add_layer_norm, stream, layer_scale=False)
        yield f"{name} add scaled", partial(_aot_add_layer_norm, stream, layer_scale=True)


def _aot_layer_norm(x: Tensor) -> None:
    weight = bias = x.new_empty(x.shape[-1])
    y, mean, rstd = launch_layer_norm_fwd(x, weight, bias, 1e-6, x.dtype)
    launch_layer_norm_bwd(y, x, weight, bias, mean, rstd, True, True)


def _aot_add_layer_norm(residual: Tensor, layer_scale: bool) -> None:
    x = residual.new_empty(residual.shape, dtype=torch.bfloat16)
    weight = bias = x.new_empty(x.shape[-1], dtype=residual.dtype)
    gamma = weight if layer_scale else None
    y, stream, mean, rstd = launch_add_layer_norm_fwd(x, residual, weight, bias, gamma, 1e-6, residual.dtype, residual.dtype)
    launch_add_layer_norm_bwd(
        y, stream, stream, x if layer_scale else None, weight, bias, gamma, mean, rstd, x.dtype, residual.dtype, True, True
    )
