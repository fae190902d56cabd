"""Patch embedding, backward. Equation numbers are those of ``reference/patch_embed.py``, sizes those of ``patch_embed.py``.

d weight is a product over M: each program sums a range of rows, and the partial sums (36 tiles of 64 KB and a split in 8: 19
MB, 9 us) are added in a fixed order. Gathering for cuBLAS would move the patches twice (36 us) and dout, whose rows the
prefix interrupts, twice as well (36 us): break-even is again near one half.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import multiprocessors
from ._dot import add_product
from ._patch_tiles import (
    PatchConfig,
    _config,
    _gather,
    _Geometry,
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
WRITES = {"_patch_embed_dweight_kernel": ("partial_ptr",), "_patch_embed_dimages_kernel": ("dimages_ptr",)}
FLOPS = dict.fromkeys(WRITES, flops)


@triton.jit
def _over(n, magic, shift):
    """n // d for 0 <= n < 2^30, from the numbers of ``_magic(d)``: 4 instructions, a division by a variable takes 20."""
    return ((n.to(tl.int64) * magic) >> shift).to(tl.int32)


@triton.jit
def _patch_embed_dweight_kernel(
    dout_ptr,
    images_ptr,
    mean_ptr,
    std_ptr,
    partial_ptr,
    M,
    num_patches,
    patches_magic,
    patches_shift,
    grid_w,
    grid_magic,
    grid_shift,
    num_prefix,
    rows_per_split,
    image_stride,
    channel_stride,
    line_stride,
    DTYPE: tl.constexpr,
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
):
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # of D
    depth = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    pixels, channel = _pixel_offsets(
        depth, channel_stride, line_stride, COLUMN_STRIDE, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST, UNIT
    )
    first = tl.program_id(2) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < last
        image = _over(rows, patches_magic, patches_shift)
        patch = rows - image * num_patches
        patches = _patch_offsets(
            image, patch, _over(patch, grid_magic, grid_shift), grid_w, image_stride, line_stride,
            COLUMN_STRIDE, PATCH_H, PATCH_W, UNIT,
        )  # fmt: skip
        tokens = (rows + (image + 1) * num_prefix).to(tl.int64) * D
        g = tl.load(dout_ptr + tokens[:, None] + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0)
        g = g.to(DTYPE)
        x = tl.load(images_ptr + patches[:, None] + pixels[None, :], mask=inside[:, None] & (depth < K)[None, :], other=0)
        if mean_ptr is not None:  # beyond the last row no longer zero, but there g is
            x = _normalised(x, channel, depth < K, mean_ptr, std_ptr, CHANNELS, CHANNELS_LAST)
        acc = add_product(acc, tl.trans(g), x.to(DTYPE), PRECISION)  # eq. (4)
    offsets = ((tl.program_id(2) * D + cols).to(tl.int64) * K)[:, None] + depth[None, :]
    tl.store(partial_ptr + offsets, acc, mask=(cols < D)[:, None] & (depth < K)[None, :])


@triton.jit
def _patch_embed_dimages_kernel(
    dout_ptr,
    weight_ptr,
    dimages_ptr,
    M,
    num_patches,
    grid_w,
    num_prefix,
    image_stride,
    channel_stride,
    line_stride,
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
    tile_m, tile_k = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    image, patch = rows // num_patches, rows % num_patches
    image = tl.where(rows < M, image, 0)
    tokens = (image * (num_prefix + num_patches) + num_prefix + patch).to(tl.int64) * D
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in tl.range(0, D, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        g = tl.load(dout_ptr + tokens[:, None] + cols[None, :], mask=(cols < D)[None, :], other=0.0)
        weight_mask = (cols < D)[:, None] & (depth < K)[None, :]
        weight = tl.load(weight_ptr + (cols * K)[:, None] + depth[None, :], mask=weight_mask, other=0.0)
        acc = add_product(acc, g.to(weight.dtype), weight, PRECISION)  # eq. (5)
    patches = _patch_offsets(
        image, patch, patch // grid_w, grid_w, image_stride, line_stride, COLUMN_STRIDE, PATCH_H, PATCH_W, UNIT
    )
    pixels, _ = _pixel_offsets(
        depth, channel_stride, line_stride, COLUMN_STRIDE, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST, UNIT
    )
    mask = (rows < M)[:, None] & (depth < K)[None, :]
    tl.store(dimages_ptr + patches[:, None] + pixels[None, :], acc.to(dimages_ptr.dtype.element_ty), mask=mask)


def launch_patch_embed_bwd(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    need_dimages: bool,
    need_dweight: bool,
    allow_tf32: bool,
    plan: str,
    arch: str,
) -> tuple[Tensor, Tensor]:
    """Returns dimages and dweight; what is not needed is empty."""
    geometry = _geometry(images, weight)
    settings = geometry, images, weight, allow_tf32, plan, arch
    dout = dout.contiguous()
    with torch._C._DisableAutocast():
        dimages = dweight = None
        if need_dimages:
            dimages = _dimages(dout, images, weight, _config("dimages", *settings), allow_tf32)
        if need_dweight:
            config = _config("dweight", *settings)
            dweight = _dweight(dout, images, weight, mean, std, geometry, config, allow_tf32)
    return (
        images.new_empty(0) if dimages is None else dimages,
        weight.new_empty(0) if dweight is None else dweight,
    )


def _out_of_order(flat: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """(D, K) back in the shape of ``weight``, contiguous."""
    if not geometry.channels_last:
        return flat.view(weight.shape)
    return flat.view(weight.shape[0], *geometry.patch, geometry.channels).permute(0, 3, 1, 2).contiguous()


def _patch_rows(dout: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
    return dout[:, dout.shape[1] - geometry.num_patches :].to(dtype).reshape(geometry.rows, -1)  # (M, D)


def _dweight(dout, images, weight, mean, std, geometry: _Geometry, config: PatchConfig | None, allow_tf32: bool) -> Tensor:
    D, K = weight.shape[0], geometry.depth
    if geometry.rows == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if config is None:
        patches = _gather(images, geometry, mean, std, weight.dtype)
        return _out_of_order(_patch_rows(dout, geometry, weight.dtype).t() @ patches, weight, geometry)
    block_m, block_n, block_k = _dweight_tile(config)
    tiles = triton.cdiv(D, block_n) * triton.cdiv(K, block_k)
    # Two programs an SM; a split of fewer than 8 blocks of rows would cost more in partial sums than it hides.
    splits = max(1, min(2 * multiprocessors(weight.device) // tiles, triton.cdiv(geometry.rows, 8 * block_m)))
    rows_per_split = triton.cdiv(triton.cdiv(geometry.rows, splits), block_m) * block_m
    splits = triton.cdiv(geometry.rows, rows_per_split)
    partials = torch.empty(splits, D, K, dtype=torch.float32, device=weight.device)
    options = {**_options(config, allow_tf32), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    _patch_embed_dweight_kernel[(triton.cdiv(D, block_n), triton.cdiv(K, block_k), splits)](
        dout,
        images,
        mean,
        std,
        partials,
        geometry.rows,
        geometry.num_patches,
        *_magic(geometry.num_patches),
        geometry.grid[1],
        *_magic(geometry.grid[1]),
        dout.shape[1] - geometry.num_patches,
        rows_per_split,
        *geometry.strides,
        DTYPE=_TRITON_DTYPES[weight.dtype],
        D=D,
        **geometry.constants(),
        **options,
    )
    total = partials[0] if splits == 1 else partials.sum(0)
    return _out_of_order(total.to(weight.dtype), weight, geometry)


def _magic(d: int) -> tuple[int, int]:
    """(m, s) with n // d == (n * m) >> s for 0 <= n < 2^30, m below 2^31 (Granlund and Montgomery 1994)."""
    shift = 30 + (d - 1).bit_length()
    return (1 << shift) // d + 1, shift


def _dweight_tile(config: PatchConfig) -> tuple[int, int, int]:
    """The forward's tile turned: M is what is summed over, so it takes the place of K."""
    return config.block_k, config.block_n, config.block_m


def _dimages(dout, images, weight, config: PatchConfig | None, allow_tf32: bool) -> Tensor:
    dimages = torch.empty_like(images)
    geometry = _geometry(dimages, weight)  # of what is written: images may be a crop, or expanded
    if geometry.rows == 0:
        return dimages
    flat, D = _in_order(weight, geometry), weight.shape[0]
    if config is None:
        patches = _patch_rows(dout, geometry, weight.dtype) @ flat
        (gh, gw), (ph, pw), channels = geometry.grid, geometry.patch, geometry.channels
        if geometry.channels_last:
            x = patches.view(geometry.batch, gh, gw, ph, pw, channels).permute(0, 5, 1, 3, 2, 4)
        else:
            x = patches.view(geometry.batch, gh, gw, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
        return dimages.copy_(x.reshape(dimages.shape))
    # D is what is summed over: the blocks of N and K change places. Few ask for this gradient: one small tile for all.
    block_m, block_k = min(config.block_m, 64), min(config.block_n, 64)
    options = {
        **_options(config, allow_tf32),
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_k,
        "BLOCK_K": block_k,
        "num_warps": 8,  # with 4, ptxas spills a few bytes on sm_80 and sm_120
    }
    tiles = triton.cdiv(geometry.rows, block_m) * triton.cdiv(geometry.depth, block_k)
    _patch_embed_dimages_kernel[(tiles,)](
        dout,
        flat,
        dimages,
        geometry.rows,
        geometry.num_patches,
        geometry.grid[1],
        dout.shape[1] - geometry.num_patches,
        *geometry.strides,
        D=D,
        GROUP_M=config.group_m,
        **geometry.constants(),
        **options,
    )
    return dimages


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of what dispatch chooses at the patch embedding of a ViT of this shape."""
    for name, kind, batch in aot_kinds(shape):
        yield name, partial(_aot, shape, kind, batch)


def _aot(shape: "Shape", kind: str, batch: int) -> None:
    arguments = aot_tensors(shape, kind, batch)
    names = ("images", "weight", "mean", "std", "allow_tf32", "plan", "arch")
    dout = torch.empty(batch, shape.tokens, shape.width, dtype=arguments["out_dtype"], device="meta")
    launch_patch_embed_bwd(
        dout,
        **{name: arguments[name] for name in names},
        need_dimages=not kind.startswith("uint8"),
        need_dweight=True,
    )
