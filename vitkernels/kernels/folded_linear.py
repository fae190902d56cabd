"""LayerNorm folded into the linear layer that follows it, for inference.

    (1) weight' = round(weight * gamma),   colsum = sum over K of weight',   bias' = bias + weight @ beta
    (2) y = act(rstd * (x @ weight'^T - mean * colsum) + bias')

equals act(LN(x) @ weight^T + bias). colsum is that of the rounded product, in float32: then the mean cancels exactly, however
large it is, and the rounding of weight' is all that folding adds, in place of that of LN(x), which it saves. (2) subtracts in
the GEMM's accumulator, so a GEMM of cuBLAS, which rounds first, cannot take part: there LayerNorm runs as its own kernel.

mean and rstd come from the GEMM that wrote x, where its launcher was asked for them. Its epilogue has the rows of a tile in
registers, and writes of the n values v of a row that tile t stores, rounded as stored,

    (3) m_t = sum of v / n,   s_t = sum of (v - m_t)^2

A second kernel combines them by Chan's formula (Chan, Golub, LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115):

    (4) mean = sum of n m_t / K,   variance = (sum of s_t + n (m_t - mean)^2) / K,   rstd = (variance + eps)^-1/2

No difference of large sums: a mean of 30 sigma costs nothing. (3) needs no second mean, as LayerNorm's kernel does: if no v of
a tile is twice another, these 16-bit numbers have a common step of which all are at most 2^12, their sum fits in float32's 24
bits, and m_t is exact; else s_t is over 2^24 times what the rounding of m_t adds. The means of tiles are float32 numbers, so
(4) corrects its mean as LayerNorm does. Where x came from something else, or columns do not fill their tiles (D = 192), one
kernel reads x.

(2) subtracts in float32, so it errs by 1 to 5 times 2^-24 |mean| rstd, relative to LN(x) @ weight^T: 1.3 times in the tests'
interpreter at K = 768; 2 at K = 1152 and 5 at K = 3072 where the sums of 16 products are truncated, as a model of tensor cores.
Against a budget of a rounding step and twice the unfolded error, bfloat16 has room for |mean| rstd = 37,000 and float16 for
4,500 (K = 3072; 15,000 at K = 768). Rows of bfloat16 do not get there unless they are constant: one channel in 3072 that is an
ulp off makes 14,000. Rows of float16 do. In a constant row |mean| rstd grows without limit, 1e6 for 1.0 at eps = 1e-12, so
where the variance is exactly 0 the rstd stored is 0 too, and (2) gives act(bias'), as LayerNorm would.

Bytes, M rows: LayerNorm reads and writes M K s, the kernel that reads x moves M K s, and moments are 16 M a tile, written and
read: 0.06 M K s for K = 768 in 6 tiles. Floor at ViT-B/16, B = 256, bfloat16 on an H200 (4.3 TB/s): 36, 18 and 1 us.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layer_norm, linear

if TYPE_CHECKING:
    from ._aot import Shape

WRITES = {
    "_row_statistics_kernel": ("mean_ptr", "rstd_ptr"),
    "_combine_moments_kernel": ("mean_ptr", "rstd_ptr"),
}


@triton.jit
def _rstd(variance, eps):
    """Eq. (4): 0 where all channels are equal."""
    return tl.where(variance == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def _row_statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, num_rows, x_stride, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + (rows.to(tl.int64) * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean, _, variance = layer_norm.row_statistics(x, cols < D, D)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, _rstd(variance, eps), mask=rows < num_rows)


@triton.jit
def _combine_moments_kernel(
    moments_ptr, mean_ptr, rstd_ptr, num_rows, tiles, eps, WIDTH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr
):
    """Eq. (4). ``moments`` (tiles, 2, num_rows), of tiles of WIDTH columns; TILES: a power of two, at least ``tiles``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    mask = (tile < tiles)[:, None] & (rows < num_rows)[None, :]
    offsets = (tile.to(tl.int64) * 2 * num_rows)[:, None] + rows[None, :]
    means = tl.load(moments_ptr + offsets, mask=mask, other=0.0)
    squares = tl.load(moments_ptr + num_rows + offsets, mask=mask, other=0.0)
    first = tl.sum(means * (1.0 / tiles), axis=0)  # of quotients, so that it does not overflow
    distance = tl.where(mask, means - first[None, :], 0.0)
    rest = tl.div_rn(tl.sum(distance, axis=0), tiles * 1.0)
    distance = tl.where(mask, distance - rest[None, :], 0.0)
    variance = tl.sum(squares + distance * distance * WIDTH, axis=0) / (tiles * WIDTH)
    tl.store(mean_ptr + rows, first + rest, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, _rstd(variance, eps), mask=rows < num_rows)


def _per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each row of ``x`` (M, D), float32."""
    M, (mean, rstd), tile = x.shape[0], _per_row(x), layer_norm._tile(x.shape[1])
    if M > 0:
        _row_statistics_kernel[(triton.cdiv(M, tile["ROWS"]),)](x, mean, rstd, M, x.stride(0), eps, **tile)
    return mean, rstd


def _combined(moments: Tensor, y: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same of ``y`` from the moments of its tiles of ``width`` columns."""
    M, (mean, rstd), tiles = y.shape[0], _per_row(y), moments.shape[0]
    options = {"num_warps": 4, "enable_fp_fusion": True}
    _combine_moments_kernel[(triton.cdiv(M, 128),)](
        moments, mean, rstd, M, tiles, eps, WIDTH=width, TILES=triton.next_power_of_2(tiles), ROWS=128, **options
    )
    return mean, rstd


def config(x: Tensor, weight: Tensor, act: str | None, plan: str, arch: str) -> linear.GemmConfig | None:
    """Of the folded GEMM on ``x`` (M, K); None where LayerNorm runs before it."""
    return linear.config_of("norm" if act is None else "norm_act", x, weight, plan, arch)


def launch_linear_statistics_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor,
    eps: float,
    plan: str,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual + layer_scale * (x @ weight^T + bias), and mean and rstd of its rows by equations (3) and (4)."""
    rows, N = linear.matrix(x), weight.shape[0]
    gemm = linear._config(None, layer_scale, residual, rows, weight, plan, arch)
    if gemm is None or N % gemm.block_n or rows.shape[0] == 0:
        options = (residual.dtype, "none", False, plan, arch)
        y, _ = linear.launch_linear_fwd(x, weight, bias, None, layer_scale, None, residual, *options)
        return y, *_statistics(y.view(-1, N), eps)
    y = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    moments = torch.empty(N // gemm.block_n, 2, rows.shape[0], dtype=torch.float32, device=x.device)
    bias, layer_scale = (None if t is None else t.contiguous() for t in (bias, layer_scale))
    epilogue = (None, layer_scale, None, 1, linear.matrix(residual))
    linear.gemm(gemm, rows, weight, bias, epilogue, y, None, False, moments=moments)
    return y, *_combined(moments, y.view(-1, N), gemm.block_n, eps)


def launch_folded_linear_fwd(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    folded_weight: Tensor,
    colsum: Tensor,
    folded_bias: Tensor,
    act: str | None,
    plan: str,
    arch: str,
) -> Tensor:
    """act(LN(x) @ weight^T + bias), by equation (2) where the table says so, else by the parameters themselves.

    ``mean`` and ``rstd`` of x's rows, float32, or None where nobody has them yet.
    """
    rows = linear.matrix(x)
    gemm = config(rows, folded_weight, act, plan, arch)
    if gemm is None:
        h, _, _ = layer_norm.launch_layer_norm_fwd(x, norm_weight, norm_bias, eps, x.dtype)
        return linear.launch_linear_fwd(h, weight, bias, act, None, None, None, x.dtype, "none", False, plan, arch)[0]
    y = torch.empty(*x.shape[:-1], folded_weight.shape[0], dtype=x.dtype, device=x.device)
    if rows.shape[0] > 0:
        mean, rstd = _statistics(rows, eps) if mean is None else (mean, rstd)
        epilogue = (act, None, None, 1, None)
        linear.gemm(gemm, rows, folded_weight, folded_bias, epilogue, y, None, False, (mean, rstd, colsum))
    return y


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of the default configurations at the GEMMs of a ViT block of this shape."""
    M, D = shape.train_batch * shape.tokens, shape.width
    for name, N, act in (("qkv", 3 * D, None), ("fc1", shape.hidden, "gelu")):
        yield f"D={D} {name} folded", partial(_aot, M, N, D, act)
    for name, K in (("proj", D), ("fc2", shape.hidden)):
        yield f"D={D} {name} with statistics", partial(_aot_statistics, M, D, K)


def _aot(M: int, N: int, K: int, act: str | None) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    weight, sums = x.new_empty(N, K), x.new_empty(N, dtype=torch.float32)
    launch_folded_linear_fwd(x, None, None, None, None, 1e-6, weight, None, weight, sums, sums, act, "triton", arch)


def _aot_statistics(M: int, N: int, K: int) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    weight, residual, bias = x.new_empty(N, K), x.new_empty(M, N), x.new_empty(N)
    launch_linear_statistics_fwd(x, weight, bias, None, residual, 1e-6, "triton", arch)
