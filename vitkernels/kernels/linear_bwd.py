"""Backward of the linear layer beside its GEMMs, which are PyTorch's. Equation numbers are those of ``reference/linear.py``.

Bytes, M rows, s bytes an element: with an activation one pass reads dy and z and writes dz and act(z), 4 M N s; without one it
reads dy for the sum over rows, M N s, and writes g only where drop path or a wider dtype makes it differ from dy. LayerScale
then costs nothing of size M: its gradient comes from the product that dweight needs, reading 2 N K and writing N K.
ViT-B/16 at B = 128 on an H200 (4.3 TB/s): 144 us for the pass over the hidden width, 3 us for fc2's LayerScale.

No atomics: a program keeps the sums of its columns in registers and writes one partial sum, which a second kernel adds up in a
fixed order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activation_and_derivative
from ._device import multiprocessors
from .layer_norm import _parameter_gradients_kernel
from .linear import elementwise_tile, exact, samples, vector

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_linear_bwd_kernel": ("dz_ptr", "u_ptr", "dbias_ptr", "dlayer_scale_ptr"),
    "_parameter_gradients_kernel": ("dweight_ptr", "dbias_ptr", "dlayer_scale_ptr"),
    "_layer_scale_bwd_kernel": ("dweight_ptr", "dbias_ptr", "dlayer_scale_ptr"),
}


@triton.jit
def _linear_bwd_kernel(
    dy_ptr,
    z_ptr,
    layer_scale_ptr,
    drop_path_ptr,
    dz_ptr,
    u_ptr,
    dbias_ptr,
    dlayer_scale_ptr,
    M,
    N,
    rows_per_sample,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Kept per row of the tile and summed over its rows once at the end: no exchange between warps in the loop.
    dbias = tl.zeros((ROWS, BLOCK_N), tl.float32)
    dlayer_scale = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        offsets = (rows.to(tl.int64) * N)[:, None] + cols[None, :]
        g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if drop_path_ptr is not None:
            g *= tl.load(drop_path_ptr + rows // rows_per_sample, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        if z_ptr is not None:
            z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            u, slope = activation_and_derivative(z, ACT, EXACT)
            if u_ptr is not None:
                tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=mask)
            if dlayer_scale_ptr is not None:
                dlayer_scale += g * u  # eq. (5)
        if layer_scale_ptr is not None:
            g *= vector(layer_scale_ptr, cols, N)
        if z_ptr is not None:
            g *= slope  # eq. (4)
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, g.to(dz_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            dbias += g  # eq. (6)

    partial = tl.program_id(0) * N + cols
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=cols < N)
    if dlayer_scale_ptr is not None:
        tl.store(dlayer_scale_ptr + partial, tl.sum(dlayer_scale, axis=0), mask=cols < N)


@triton.jit
def _layer_scale_bwd_kernel(
    product_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    sums_ptr,
    dweight_ptr,
    dbias_ptr,
    dlayer_scale_ptr,
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    scale = tl.load(layer_scale_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (cols < K)[None, :]
        offsets = (rows.to(tl.int64) * K)[:, None] + cols[None, :]
        product = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + offsets, (product * scale[:, None]).to(dweight_ptr.dtype.element_ty), mask=mask)  # eq. (9)
        if dlayer_scale_ptr is not None:
            total += product * tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        sums = tl.load(sums_ptr + rows, mask=row_mask, other=0.0)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + rows, (sums * scale).to(dbias_ptr.dtype.element_ty), mask=row_mask)
    if dlayer_scale_ptr is not None:  # eq. (10)
        dlayer_scale = tl.sum(total, axis=1)
        if bias_ptr is not None:
            dlayer_scale += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32) * sums
        tl.store(dlayer_scale_ptr + rows, dlayer_scale.to(dlayer_scale_ptr.dtype.element_ty), mask=row_mask)


def launch_linear_bwd(
    dy: Tensor,
    z: Tensor | None,
    act: str | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype,
    need_dz: bool,
    need_u: bool,
    need_dbias: bool,
    need_dlayer_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dz, act(z) and the sums over rows, in float32, that are the gradients of bias and layer_scale."""
    N = dy.shape[-1]
    dy = dy.contiguous()
    M = dy.numel() // N
    empty = partial(torch.empty, device=dy.device)
    dz = empty(dy.shape, dtype=dtype) if need_dz else None
    u = empty(dy.shape, dtype=dtype) if need_u else None
    drop_path, rows_per_sample = samples(drop_path, M)
    tile = elementwise_tile(N)
    columns = triton.cdiv(N, tile["BLOCK_N"])
    # Four blocks of 4 warps an SM are 16 loads of 16 bytes in flight a thread; partial sums stay below 2% of the bytes.
    strips = min(triton.cdiv(M, tile["ROWS"]), max(1, 4 * multiprocessors(dy.device) // columns))
    sums = [empty(N, dtype=torch.float32) if need else None for need in (need_dbias, need_dlayer_scale)]
    partials = [None if t is None else empty(strips, N, dtype=torch.float32) for t in sums]
    if M > 0:
        _linear_bwd_kernel[(strips, columns)](
            dy,
            None if z is None else z.contiguous(),
            None if layer_scale is None else layer_scale.contiguous(),
            drop_path,
            dz,
            u,
            *partials,
            M,
            N,
            rows_per_sample,
            ACT=act,
            EXACT=exact(act, dtype),
            **tile,
        )
    if need_dbias or need_dlayer_scale:  # with no rows at all it writes the zeros
        _parameter_gradients_kernel[(triton.cdiv(N, 32), 3)](
            *partials, None, *sums, None, strips, N, BLOCK_P=32, BLOCK_D=32, num_warps=4, enable_fp_fusion=True
        )
    outputs = zip((dz, u, *sums), (dtype, dtype, torch.float32, torch.float32), strict=True)
    dz, u, dbias, dlayer_scale = (empty(0, dtype=kind) if t is None else t for t, kind in outputs)
    return dz, u, dbias, dlayer_scale


def launch_layer_scale_bwd(
    product: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor,
    need_dweight: bool,
    need_dbias: bool,
    need_dlayer_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dweight, dbias and dlayer_scale; what is not needed is empty."""
    N, K = product.shape
    block_k = min(max(triton.next_power_of_2(K), 16), 1024)
    tile = {"ROWS": max(2048 // block_k, 2), "BLOCK_K": block_k, "num_warps": 4, "enable_fp_fusion": True}
    wanted = ((need_dweight, weight), (need_dbias, bias), (need_dlayer_scale, layer_scale))
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None for need, t in wanted]
    _layer_scale_bwd_kernel[(triton.cdiv(N, tile["ROWS"]),)](
        product.contiguous(),
        weight.contiguous() if need_dlayer_scale else None,
        None if bias is None or not need_dlayer_scale else bias.contiguous(),
        layer_scale.contiguous(),
        sums if need_dbias or (need_dlayer_scale and bias is not None) else None,
        *grads,
        N,
        K,
        **tile,
    )
    kinds = (weight.dtype, weight.dtype if bias is None else bias.dtype, layer_scale.dtype)
    dweight, dbias, dlayer_scale = (
        torch.empty(0, dtype=kind, device=product.device) if t is None else t for t, kind in zip(grads, kinds, strict=True)
    )
    return dweight, dbias, dlayer_scale


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of the backward of every activation, and of layers with LayerScale."""
    D, rows = shape.width, shape.train_batch * shape.tokens
    for act in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        yield f"D={D} {act}", partial(_aot_backward, rows, shape.hidden, act, torch.bfloat16)
    for name, stream in (("bf16", torch.bfloat16), ("autocast", torch.float32)):
        yield f"D={D} no activation {name}", partial(_aot_backward, rows, D, None, stream)
        yield f"D={D} LayerScale {name}", partial(_aot_layer_scale, D, shape.hidden, stream)


def _aot_backward(M: int, N: int, act: str | None, stream: torch.dtype) -> None:
    dy = torch.empty(M, N, dtype=stream, device="meta")
    writes = act is not None, stream != torch.bfloat16 or act is not None
    launch_linear_bwd(dy, dy if act else None, act, None, None, torch.bfloat16, writes[1], writes[0], True, False)


def _aot_layer_scale(N: int, K: int, parameters: torch.dtype) -> None:
    weight = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
    scale = weight.new_empty(N, dtype=parameters)
    launch_layer_scale_bwd(weight, scale.float(), weight, scale, scale, True, True, True)
