"""LayerNorm folded into the linear layer that follows it, for inference.

    (1) weight' = round(weight * gamma),   colsum = sum over K of weight',   bias' = bias + weight @ beta
    (2) y = act(rstd * (x @ weight'^T - mean * colsum) + bias')

equals act(LN(x) @ weight^T + bias). colsum is that of the rounded product, in float32: then the mean cancels exactly, however
large it is, and the rounding of weight' is all that folding adds, in place of that of LN(x), which it saves. (2) subtracts in
the GEMM's accumulator, so a GEMM of cuBLAS, which rounds first, cannot take part: there LayerNorm runs as its own kernel.

Bytes, M rows: statistics read M K s and write 8 M, where LayerNorm reads and writes M K s. Floor at ViT-B/16, B = 256, bfloat16
on an H200 (4.3 TB/s): 18 us instead of 36.
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

WRITES = {"_row_statistics_kernel": ("mean_ptr", "rstd_ptr")}


@triton.jit
def _row_statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, num_rows, x_stride, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + (rows.to(tl.int64) * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / D + eps), mask=rows < num_rows)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each row of ``x`` (M, D), float32."""
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    tile = layer_norm._tile(x.shape[1])
    _row_statistics_kernel[(triton.cdiv(x.shape[0], tile["ROWS"]),)](x, mean, rstd, x.shape[0], x.stride(0), eps, **tile)
    return mean, rstd


def config(x: Tensor, weight: Tensor, act: str | None, plan: str, arch: str) -> linear.GemmConfig | None:
    """Of the folded GEMM on ``x`` (M, K); None where LayerNorm runs before it."""
    return linear.config_of("norm" if act is None else "norm_act", x, weight, plan, arch)


def launch_folded_linear_fwd(
    x: Tensor,
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
    """act(LN(x) @ weight^T + bias), by equation (2) where the table says so, else by the parameters themselves."""
    rows = linear.matrix(x)
    gemm = config(rows, folded_weight, act, plan, arch)
    if gemm is None:
        h, _, _ = layer_norm.launch_layer_norm_fwd(x, norm_weight, norm_bias, eps, x.dtype)
        return linear.launch_linear_fwd(h, weight, bias, act, None, None, None, x.dtype, "none", False, plan, arch)[0]
    y = torch.empty(rows.shape[0], folded_weight.shape[0], dtype=x.dtype, device=x.device)
    if rows.shape[0] > 0:
        norm = (*_statistics(rows, eps), colsum)
        linear.gemm(gemm, rows, folded_weight, folded_bias, (act, None, None, 1, None), y, None, False, norm)
    return y.view(*x.shape[:-1], folded_weight.shape[0])


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of the default configurations at qkv and fc1 of a ViT block of this shape."""
    M, D = shape.train_batch * shape.tokens, shape.width
    for name, N, act in (("qkv", 3 * D, None), ("fc1", shape.hidden, "gelu")):
        yield f"D={D} {name} folded", partial(_aot, M, N, D, act)


def _aot(M: int, N: int, K: int, act: str | None) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    weight, sums = x.new_empty(N, K), x.new_empty(N, dtype=torch.float32)
    launch_folded_linear_fwd(x, None, None, 1e-6, weight, None, weight, sums, sums, act, "triton", arch)
