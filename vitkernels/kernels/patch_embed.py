"""Patch embedding as one GEMM that gathers its patches. Equation numbers are those of ``reference/patch_embed.py``.

M = B*Gh*Gw patches, K = C*p_h*p_w pixels of one, D channels, T = P + Gh*Gw tokens, s bytes an element, s_in of a pixel:

    forward        reads M K s_in + D K s, writes B T D s    2 M K D FLOPs
    d weight       reads B T D s + M K s_in, writes D K s    2 M K D FLOPs, and float32 partial sums
    d images       reads B T D s + D K s, writes M K s_in    2 M K D FLOPs; only if asked for
    d the others   one sum of dout over the batch: reads B T D s

ViT-B/16 at B = 256 in bfloat16 on an H200 (4.3 TB/s, 790 TFLOP/s): 77 + 78 MB are 36 us, 59 GFLOP are 75 us, the floor;
uint8 pixels save 9 us of the former. The road through cuBLAS writes and reads the patches (36 us) and the tokens once more
(bias, positions, class token: 36 us), so this GEMM breaks even at 75 / 147 = 0.51 of cuBLAS's speed (S/16 0.41, So400m/14
0.51). cuDNN's convolution pays for the second pass too, and often for a transposed copy of the image. Published Triton GEMMs
reach 0.86 to 0.97: without an entry in the tuned table 16-bit operands and TF32 take the kernel. In true float32, where no
tensor core helps, break-even is 0.87 and they take cuBLAS.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._device import architecture
from ._dot import add_product
from ._patch_tiles import (
    _config,
    _gather,
    _geometry,
    _in_order,
    _normalised,
    _options,
    _patch_offsets,
    _pixel_offsets,
    aot_kinds,
    aot_tensors,
    flops,
)
from ._tile_order import tile_at

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {"_patch_embed_fwd_kernel": ("out_ptr",)}
FLOPS = dict.fromkeys(WRITES, flops)


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,
    weight_ptr,
    bias_ptr,
    prefix_ptr,
    pos_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    num_images,
    num_patches,
    grid_w,
    num_prefix,
    image_stride,
    channel_stride,
    line_stride,
    POS_PREFIX: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    M = num_images * num_patches
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile = tl.program_id(0)
    is_patches = tile < tiles_m * tiles_n
    num_tokens = num_prefix + num_patches
    if is_patches:
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        image, patch = rows // num_patches, rows % num_patches
        # Beyond the edge the first image is read again instead of masked: only what is stored needs a mask.
        patches = _patch_offsets(
            tl.where(rows < M, image, 0), patch, patch // grid_w, grid_w, image_stride, line_stride,
            COLUMN_STRIDE, PATCH_H, PATCH_W, UNIT,
        )  # fmt: skip
        weight_ptrs = weight_ptr + (tl.where(cols < D, cols, 0) * K)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            pixels, channel = _pixel_offsets(
                depth, channel_stride, line_stride, COLUMN_STRIDE, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST, UNIT
            )
            if K % BLOCK_K:
                x = tl.load(images_ptr + patches[:, None] + pixels[None, :], mask=(depth < K)[None, :], other=0)
                weight = tl.load(weight_ptrs + depth[:, None], mask=(depth < K)[:, None], other=0.0)
            else:
                x = tl.load(images_ptr + patches[:, None] + pixels[None, :])
                weight = tl.load(weight_ptrs + depth[:, None])
            if mean_ptr is not None:
                x = _normalised(x, channel, depth < K, mean_ptr, std_ptr, CHANNELS, CHANNELS_LAST)
            x = x.to(weight_ptr.dtype.element_ty)
            acc = add_product(acc, x, weight, PRECISION)  # eq. (2)
        tokens = num_prefix + patch
        mask = (rows < M)[:, None] & (cols < D)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    else:  # prefix rows, in tiles of the same shape
        tile -= tiles_m * tiles_n
        rows = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens = rows % num_prefix
        image = rows // num_prefix
        mask = (rows < num_images * num_prefix)[:, None] & (cols < D)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if prefix_ptr is not None:
            acc += tl.load(prefix_ptr + tokens[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)

    if pos_ptr is not None:  # eq. (3)
        position = tokens if POS_PREFIX else tokens - num_prefix
        pos_mask = mask if POS_PREFIX else mask & (position >= 0)[:, None]
        acc += tl.load(pos_ptr + position[:, None] * D + cols[None, :], mask=pos_mask, other=0.0).to(tl.float32)
    out_rows = image.to(tl.int64) * num_tokens + tokens
    tl.store(out_ptr + (out_rows * D)[:, None] + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    pos_embed_prefix: bool,
    mean: Tensor | None,
    std: Tensor | None,
    out_dtype: torch.dtype,
    allow_tf32: bool,
    plan: str,
    arch: str,
) -> Tensor:
    """Returns the tokens (B, P + Gh*Gw, D)."""
    geometry = _geometry(images, weight)
    num_prefix, D = 0 if prefix_tokens is None else prefix_tokens.shape[1], weight.shape[0]
    out = torch.empty(geometry.batch, num_prefix + geometry.num_patches, D, dtype=out_dtype, device=images.device)
    if out.numel() == 0:
        return out
    flat = _in_order(weight, geometry)
    config = _config("fwd", geometry, images, weight, allow_tf32, plan, arch)
    if config is None:
        with torch._C._DisableAutocast():  # the operator's dtypes are its arguments'
            _cublas_fwd(out, _gather(images, geometry, mean, std, weight.dtype), flat, bias, prefix_tokens, pos_embed,
                        pos_embed_prefix)  # fmt: skip
        return out
    vectors = (None if t is None else t.contiguous() for t in (bias, prefix_tokens, pos_embed, mean, std))
    tiles_n = triton.cdiv(D, config.block_n)
    row_tiles = triton.cdiv(geometry.rows, config.block_m) + triton.cdiv(geometry.batch * num_prefix, config.block_m)
    # Four blocks of 4 warps fit an SM in any case. Not told so, ptxas of Triton 3.8 keeps to 80 registers and spills 32 bytes.
    small = architecture(images.device) // 10 == 10 and config.num_warps == 4 and config.block_m * config.block_n <= 64 * 64
    registers = {"maxnreg": 128} if small else {}
    _patch_embed_fwd_kernel[(row_tiles * tiles_n,)](
        images,
        flat,
        *vectors,
        out,
        geometry.batch,
        geometry.num_patches,
        geometry.grid[1],
        num_prefix,
        *geometry.strides,
        POS_PREFIX=pos_embed_prefix,
        D=D,
        GROUP_M=config.group_m,
        **geometry.constants(),
        **_options(config, allow_tf32),
        **registers,
    )
    return out


def _cublas_fwd(out, patches, flat, bias, prefix_tokens, pos_embed, pos_embed_prefix: bool) -> None:
    """Gathered patches through cuBLAS, then one pass over the tokens that adds positions beside the prefix."""
    batch, num_tokens, D = out.shape
    tokens = F.linear(patches, flat, None if bias is None else bias.to(flat.dtype)).view(batch, -1, D)
    num_prefix = num_tokens - tokens.shape[1]
    before, after = None, None
    if pos_embed is not None:
        before, after = pos_embed.split((pos_embed.shape[1] - tokens.shape[1], tokens.shape[1]), dim=1)
    if after is None:
        out[:, num_prefix:].copy_(tokens)
    else:
        torch.add(tokens, after, out=out[:, num_prefix:])
    if prefix_tokens is not None:
        prefix = prefix_tokens if before is None or not pos_embed_prefix else prefix_tokens + before
        out[:, :num_prefix].copy_(prefix.expand(batch, -1, -1))


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of what dispatch chooses at the patch embedding of a ViT of this shape."""
    for name, kind, batch in aot_kinds(shape):
        yield name, partial(_aot, shape, kind, batch)


def _aot(shape: "Shape", kind: str, batch: int) -> None:
    launch_patch_embed_fwd(**aot_tensors(shape, kind, batch))
