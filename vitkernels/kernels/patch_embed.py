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

d weight is a product over M: each program sums a range of rows, and the partial sums (36 tiles of 64 KB and a split in 8: 19
MB, 9 us) are added in a fixed order. Gathering for cuBLAS would move the patches twice (36 us) and dout, whose rows the
prefix interrupts, twice as well (36 us): break-even is again near one half.

A pixel's address is a row's offset plus a column's: (image, patch) + (channel, line, column of the patch). K runs in the
order (C, p_h, p_w) of the convolution's weight; for channels_last images in the order (p_h, p_w, C), where a patch's line is
one run of p_w*C elements, and the weight (1% of the bytes) follows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._device import multiprocessors

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_patch_embed_fwd_kernel": ("out_ptr",),
    "_patch_embed_dweight_kernel": ("partial_ptr",),
    "_patch_embed_dimages_kernel": ("dimages_ptr",),
}


def _flops(num_patches, D, CHANNELS, PATCH_H, PATCH_W, num_images=None, M=None, **_) -> int:
    rows = num_images * num_patches if M is None else M
    return 2 * rows * D * CHANNELS * PATCH_H * PATCH_W


FLOPS = dict.fromkeys(WRITES, _flops)


@dataclass(frozen=True)
class PatchConfig:
    """A configuration of the three GEMMs, as a tuned table holds it: block_m of patches, block_n of D, block_k of pixels."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


# Where a table has none; a test compiles them for every chip. _FEW: where _LARGE has too few tiles to fill the GPU. _CONVERTED:
# for pixels that are not in the dtype of the product, and pass through registers on their way (with 64 uint8 ones spill).
_LARGE = PatchConfig(128, 128, 64, num_warps=8, num_stages=3)
_CONVERTED = PatchConfig(128, 128, 32, num_warps=8, num_stages=3)
_FEW = PatchConfig(64, 64, 64, num_warps=4, num_stages=3)
_FEW_CONVERTED = PatchConfig(64, 64, 32, num_warps=4, num_stages=3)
_FLOAT32 = PatchConfig(64, 64, 32, num_warps=8, num_stages=3)  # with 4 warps it spills on sm_80


@triton.jit
def _tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile index to its row and column; GROUP_M rows of tiles share their columns of the second operand in the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def _patch_offsets(
    image, patch, line, grid_w, image_stride, line_stride,
    COLUMN_STRIDE: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Offset of each patch's first pixel, patch being line * grid_w + column.

    Strides come divided by UNIT: multiplying back tells the compiler the alignment.
    """
    first = (line * PATCH_H).to(tl.int64) * line_stride
    return (image.to(tl.int64) * image_stride + first) * UNIT + (patch - line * grid_w) * (PATCH_W * COLUMN_STRIDE)


@triton.jit
def _over(n, magic, shift):
    """n // d for 0 <= n < 2^30, from the numbers of ``_magic(d)``: 4 instructions, a division by a variable takes 20."""
    return ((n.to(tl.int64) * magic) >> shift).to(tl.int32)


@triton.jit
def _pixel_offsets(
    depth, channel_stride, line_stride, COLUMN_STRIDE: tl.constexpr, CHANNELS: tl.constexpr, PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Offset of each pixel within its patch, and its channel."""
    if CHANNELS_LAST:
        run = PATCH_W * CHANNELS
        return (depth // run).to(tl.int64) * line_stride * UNIT + depth % run, depth % CHANNELS
    channel = depth // (PATCH_H * PATCH_W)
    line = (depth // PATCH_W) % PATCH_H
    offsets = (channel.to(tl.int64) * channel_stride + line.to(tl.int64) * line_stride) * UNIT
    return offsets + (depth % PATCH_W) * COLUMN_STRIDE, channel


@triton.jit
def _quotient(n, d, r):
    """n / d, correctly rounded, from r = 1 / d (Markstein 1990): three instructions where a division takes ten and a branch."""
    q = n * r
    return tl.fma(tl.fma(-q, d, n), r, q)


@triton.jit
def _normalised(pixels, channel, mask, mean_ptr, std_ptr):
    """Eq. (1) of a tile of uint8 pixels, channels along its last axis, in float32."""
    mean = tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + channel, mask=mask, other=1.0).to(tl.float32)
    pixels = pixels.to(tl.float32)
    pixels = _quotient(pixels, tl.full(pixels.shape, 255.0, tl.float32), 1.0 / 255.0)
    inverse = tl.broadcast_to(tl.div_rn(tl.full(std.shape, 1.0, tl.float32), std)[None, :], pixels.shape)
    return _quotient(pixels - mean[None, :], tl.broadcast_to(std[None, :], pixels.shape), inverse)


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
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP_M)
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
                x = _normalised(x, channel, depth < K, mean_ptr, std_ptr)
            x = x.to(weight_ptr.dtype.element_ty)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)  # eq. (2)
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
            x = _normalised(x, channel, depth < K, mean_ptr, std_ptr)
        acc = tl.dot(tl.trans(g), x.to(DTYPE), acc, input_precision=PRECISION)  # eq. (4)
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
    tile_m, tile_k = _tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
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
        acc = tl.dot(g.to(weight.dtype), weight, acc, input_precision=PRECISION)  # eq. (5)
    patches = _patch_offsets(
        image, patch, patch // grid_w, grid_w, image_stride, line_stride, COLUMN_STRIDE, PATCH_H, PATCH_W, UNIT
    )
    pixels, _ = _pixel_offsets(
        depth, channel_stride, line_stride, COLUMN_STRIDE, CHANNELS, PATCH_H, PATCH_W, CHANNELS_LAST, UNIT
    )
    mask = (rows < M)[:, None] & (depth < K)[None, :]
    tl.store(dimages_ptr + patches[:, None] + pixels[None, :], acc.to(dimages_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Geometry:
    """An image tensor as patches: sizes, strides divided by ``unit``, and the order in which K runs."""

    batch: int
    channels: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    channels_last: bool
    strides: tuple[int, int, int]  # of image, channel and line
    column_stride: int
    unit: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.batch * self.num_patches

    @property
    def depth(self) -> int:
        return self.channels * self.patch[0] * self.patch[1]

    def constants(self) -> dict[str, Any]:
        return {
            "CHANNELS": self.channels,
            "PATCH_H": self.patch[0],
            "PATCH_W": self.patch[1],
            "CHANNELS_LAST": self.channels_last,
            "COLUMN_STRIDE": self.column_stride,
            "UNIT": self.unit,
        }


def _geometry(images: Tensor, weight: Tensor) -> _Geometry:
    _, channels, p_h, p_w = weight.shape
    batch, _, height, width = images.shape
    # The stride of a dimension of size 1 means nothing, and 0 is a multiple of everything.
    strides = [0 if size == 1 else stride for size, stride in zip(images.shape, images.stride(), strict=True)]
    channels_last = channels > 1 and strides[1] == 1 and strides[3] == channels
    outer = (strides[0], 0 if channels_last else strides[1], strides[2])
    unit = math.gcd(16, *outer)
    outer = tuple(stride // unit for stride in outer)
    column = channels if channels_last else max(strides[3], 1)
    return _Geometry(batch, channels, (p_h, p_w), (height // p_h, width // p_w), channels_last, outer, column, unit)


def _in_order(weight: Tensor, geometry: _Geometry) -> Tensor:
    """The weight as (D, K) with K in the images' order; a copy only where its own layout is another one."""
    if geometry.channels_last:
        weight = weight.permute(0, 2, 3, 1)
    return weight.contiguous().view(weight.shape[0], geometry.depth)


def _out_of_order(flat: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """(D, K) back in the shape of ``weight``, contiguous."""
    if not geometry.channels_last:
        return flat.view(weight.shape)
    return flat.view(weight.shape[0], *geometry.patch, geometry.channels).permute(0, 3, 1, 2).contiguous()


def gather(images: Tensor, geometry: _Geometry, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Patches (M, K) in ``dtype``, K in the geometry's order: the copy that the cuBLAS plan pays for."""
    if mean is not None and std is not None:
        mean, std = (t.to(torch.float32).view(-1, 1, 1) for t in (mean, std))
        images = (images.to(torch.float32) / 255 - mean) / std  # eq. (1)
    x = images.unflatten(3, (-1, geometry.patch[1])).unflatten(2, (-1, geometry.patch[0]))  # (B, C, Gh, p_h, Gw, p_w)
    x = x.permute((0, 2, 4, 3, 5, 1) if geometry.channels_last else (0, 2, 4, 1, 3, 5))
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(geometry.rows, geometry.depth)


def _config(geometry: _Geometry, images: Tensor, weight: Tensor, allow_tf32: bool, plan: str, arch: str) -> PatchConfig | None:
    """The kernels' configuration; None for cuBLAS. It depends on shape and dtype alone."""
    D, K = weight.shape[0], geometry.depth
    entry = _tuned.lookup(arch, "patch_embed", _tuned.gemm_key("plain", D, K, geometry.rows))
    float32 = weight.dtype == torch.float32
    if plan == "cublas" or (plan == "auto" and (entry["plan"] == "cublas" if entry else float32 and not allow_tf32)):
        return None
    if entry is not None and "config" in entry and not float32:
        return PatchConfig(**entry["config"])
    if float32:
        config = _FLOAT32
    else:
        tiles = triton.cdiv(geometry.rows, _LARGE.block_m) * triton.cdiv(D, _LARGE.block_n)
        large, few = (_LARGE, _FEW) if images.dtype == weight.dtype else (_CONVERTED, _FEW_CONVERTED)
        config = large if tiles >= multiprocessors(weight.device) else few
    block_n, block_k = (max(16, triton.next_power_of_2(size)) for size in (D, K))
    return PatchConfig(
        config.block_m, min(config.block_n, block_n), min(config.block_k, block_k), config.num_warps, config.num_stages
    )


def _options(config: PatchConfig, allow_tf32: bool) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Today's default, written down because Triton 3.10 flips it.
        "enable_fp_fusion": True,
    }


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
    config = _config(geometry, images, weight, allow_tf32, plan, arch)
    if config is None:
        with torch._C._DisableAutocast():  # the operator's dtypes are its arguments'
            _cublas_fwd(out, gather(images, geometry, mean, std, weight.dtype), flat, bias, prefix_tokens, pos_embed,
                        pos_embed_prefix)  # fmt: skip
        return out
    vectors = (None if t is None else t.contiguous() for t in (bias, prefix_tokens, pos_embed, mean, std))
    tiles_n = triton.cdiv(D, config.block_n)
    row_tiles = triton.cdiv(geometry.rows, config.block_m) + triton.cdiv(geometry.batch * num_prefix, config.block_m)
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


def launch_patch_embed_bwd(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    need_dimages: bool,
    need_dweight: bool,
    need_dtokens: bool,
    allow_tf32: bool,
    plan: str,
    arch: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dimages, dweight and the float32 sum of dout over the batch (P + Gh*Gw, D); what is not needed is empty."""
    geometry = _geometry(images, weight)
    config = _config(geometry, images, weight, allow_tf32, plan, arch)
    dout = dout.contiguous()
    with torch._C._DisableAutocast():
        dimages = dweight = None
        if need_dimages:
            dimages = _dimages(dout, images, weight, config, allow_tf32)
        if need_dweight:
            dweight = _dweight(dout, images, weight, mean, std, geometry, config, allow_tf32)
        dtokens = dout.sum(0, dtype=torch.float32) if need_dtokens else dout.new_empty(0, dtype=torch.float32)
    return (
        images.new_empty(0) if dimages is None else dimages,
        weight.new_empty(0) if dweight is None else dweight,
        dtokens,
    )


def _patch_rows(dout: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
    return dout[:, dout.shape[1] - geometry.num_patches :].to(dtype).reshape(geometry.rows, -1)  # (M, D)


def _dweight(dout, images, weight, mean, std, geometry: _Geometry, config: PatchConfig | None, allow_tf32: bool) -> Tensor:
    D, K = weight.shape[0], geometry.depth
    if geometry.rows == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if config is None:
        patches = gather(images, geometry, mean, std, weight.dtype)
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
    """Name and launch on ``meta`` tensors of every default configuration at the patch embedding of a ViT of this shape.

    Forward, dweight and dimages: bfloat16, autocast's float32 pixels and stream, uint8 (no dimages), channels_last, a small
    batch, and TF32 (true float32, by default cuBLAS's, uses no tensor core, which inspect would report).
    """
    name = f"D={shape.width} p={shape.patch} {shape.image}"
    for kind in ("bf16", "bf16 channels_last", "autocast", "uint8", "uint8 channels_last", "tf32"):
        yield f"{name} {kind}", partial(_aot, shape, kind, shape.train_batch)
    for kind in ("bf16", "uint8"):
        yield f"{name} {kind} B=1", partial(_aot, shape, kind, 1)


def _aot(shape: "Shape", kind: str, batch: int) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    first, _, layout = kind.partition(" ")
    pixel, compute, stream = {
        "bf16": (torch.bfloat16,) * 3,
        "autocast": (torch.float32, torch.bfloat16, torch.float32),
        "uint8": (torch.uint8, torch.bfloat16, torch.bfloat16),
        "float32": (torch.float32,) * 3,
        "tf32": (torch.float32,) * 3,
    }[first]
    tf32, side = first == "tf32", shape.image // shape.patch * shape.patch
    images = torch.empty(batch, 3, side, side, dtype=pixel, device="meta")
    if layout:
        images = images.to(memory_format=torch.channels_last)
    weight = images.new_empty(shape.width, 3, shape.patch, shape.patch, dtype=compute)
    num_patches = (side // shape.patch) ** 2
    bias, prefix = weight.new_empty(shape.width, dtype=stream), weight.new_empty(1, 1, shape.width, dtype=stream)
    pos = weight.new_empty(1, 1 + num_patches, shape.width, dtype=stream)
    mean = std = bias.new_empty(3, dtype=torch.float32) if first == "uint8" else None
    settings = (tf32, "triton", arch)
    out = launch_patch_embed_fwd(images, weight, bias, prefix, pos, True, mean, std, stream, *settings)
    launch_patch_embed_bwd(out, images, weight, mean, std, first != "uint8", True, False, *settings)
