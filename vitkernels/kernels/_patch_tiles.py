"""What the patch embedding's kernels share: addresses of pixels, equation (1), the order of K, and which plan runs.

A pixel's address is a row's offset plus a column's: (image, patch) + (channel, line, column of the patch). K runs in the
order (C, p_h, p_w) of the convolution's weight; for channels_last images in the order (p_h, p_w, C), where a patch's line is
one run of p_w*C elements, and the weight (1% of the bytes) follows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._device import gpu_of, multiprocessors

if TYPE_CHECKING:
    from ._aot import Shape


def flops(num_patches, D, CHANNELS, PATCH_H, PATCH_W, num_images=None, M=None, **_) -> int:
    """Of a launch, by its arguments' names: forward counts images, backward rows."""
    rows = num_images * num_patches if M is None else M
    return 2 * rows * D * CHANNELS * PATCH_H * PATCH_W


@dataclass(frozen=True)
class PatchConfig:
    """Configuration of a GEMM, as a tuned table holds it: block_m of patches, block_n of D, block_k of pixels.

    d weight sums over the patches: there block_k is of patches and block_m of pixels.
    """

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
_TF32 = PatchConfig(64, 64, 32, num_warps=8, num_stages=3)  # with 4 warps it spills on sm_80
_FLOAT32 = PatchConfig(64, 64, 16, num_warps=8, num_stages=4)  # a tile's terms are one chain of additions: better short


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
def _normalised(pixels, channel, mask, mean_ptr, std_ptr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Eq. (1) of a tile of uint8 pixels, channels along its last axis, in float32."""
    if CHANNELS_LAST and CHANNELS <= 4:
        # A thread's 16 pixels take turns through the channels. Loaded for each pixel, Triton 3.6 would keep 16 pointers to both
        # statistics in registers, and spill 220 bytes on sm_80, 104 on sm_90, 84 on sm_120 (3.8 and 3.9 none).
        mean = tl.zeros(channel.shape, tl.float32)
        std = tl.full(channel.shape, 1.0, tl.float32)
        inverse = std
        for c in tl.static_range(CHANNELS):
            channel_std = tl.load(std_ptr + c).to(tl.float32)
            mean = tl.where(channel == c, tl.load(mean_ptr + c).to(tl.float32), mean)
            std = tl.where(channel == c, channel_std, std)
            inverse = tl.where(channel == c, tl.div_rn(1.0, channel_std), inverse)
    else:
        mean = tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        std = tl.load(std_ptr + channel, mask=mask, other=1.0).to(tl.float32)
        inverse = tl.div_rn(tl.full(std.shape, 1.0, tl.float32), std)
    pixels = pixels.to(tl.float32)
    pixels = _quotient(pixels, tl.full(pixels.shape, 255.0, tl.float32), 1.0 / 255.0)
    inverse = tl.broadcast_to(inverse[None, :], pixels.shape)
    return _quotient(pixels - mean[None, :], tl.broadcast_to(std[None, :], pixels.shape), inverse)


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
    image, channel, line = strides[0], 0 if channels_last else strides[1], strides[2]
    unit = math.gcd(16, image, channel, line)
    outer = image // unit, channel // unit, line // unit
    column = channels if channels_last else strides[3]
    return _Geometry(batch, channels, (p_h, p_w), (height // p_h, width // p_w), channels_last, outer, column, unit)


def _in_order(weight: Tensor, geometry: _Geometry) -> Tensor:
    """The weight as (D, K) with K in the images' order; a copy only where its own layout is another one."""
    if geometry.channels_last:
        weight = weight.permute(0, 2, 3, 1)
    return weight.contiguous().view(weight.shape[0], geometry.depth)


def _gather(images: Tensor, geometry: _Geometry, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Patches (M, K) in ``dtype``, K in the geometry's order: the copy that the cuBLAS plan pays for."""
    if mean is not None and std is not None:
        mean, std = (t.to(torch.float32).view(-1, 1, 1) for t in (mean, std))
        images = (images.to(torch.float32) / 255 - mean) / std  # eq. (1)
    x = images.unflatten(3, (-1, geometry.patch[1])).unflatten(2, (-1, geometry.patch[0]))  # (B, C, Gh, p_h, Gw, p_w)
    x = x.permute((0, 2, 4, 3, 5, 1) if geometry.channels_last else (0, 2, 4, 1, 3, 5))
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(geometry.rows, geometry.depth)


def _config(
    kind: str, geometry: _Geometry, images: Tensor, weight: Tensor, allow_tf32: bool, plan: str, arch: str
) -> PatchConfig | None:
    """The configuration of the kernel of this ``kind``; None for cuBLAS. It depends on shape and dtype alone.

    Tables hold 16-bit products.
    """
    D, K = weight.shape[0], geometry.depth
    float32 = weight.dtype == torch.float32
    key = table_key(kind, images.dtype, weight.dtype, D, K, geometry.rows)
    entry = None if float32 else _tuned.lookup(gpu_of(weight, arch), "patch_embed", key)
    if plan == "auto":
        plan = ("triton" if allow_tf32 or not float32 else "cublas") if entry is None else entry["plan"]
    if plan == "cublas":
        return None
    if entry is not None and "config" in entry:
        return PatchConfig(**entry["config"])
    if float32:
        config = _TF32 if allow_tf32 else _FLOAT32
    else:
        tiles = triton.cdiv(geometry.rows, _LARGE.block_m) * triton.cdiv(D, _LARGE.block_n)
        large, few = (_LARGE, _FEW) if images.dtype == weight.dtype else (_CONVERTED, _FEW_CONVERTED)
        config = large if tiles >= multiprocessors(weight.device) else few
    block_n, block_k = (max(16, triton.next_power_of_2(size)) for size in (D, K))
    return replace(config, block_n=min(config.block_n, block_n), block_k=min(config.block_k, block_k))


def table_key(kind: str, pixel: torch.dtype, compute: torch.dtype, D: int, K: int, rows: int) -> str:
    """Key in a tuned table of the kernel of this ``kind``, ``fwd`` or ``dweight`` (``dimages`` is never tuned).

    Pixels that are not in the dtype of the product pass through registers, which other tiles suit.
    """
    form = "" if pixel == compute else "_uint8" if pixel == torch.uint8 else "_cast"
    return _tuned.gemm_key(kind + form, compute, D, K, rows)


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


_AOT_DTYPES = {  # of pixels, product and stream
    "bf16": (torch.bfloat16,) * 3,
    "autocast": (torch.float32, torch.bfloat16, torch.float32),
    "uint8": (torch.uint8, torch.bfloat16, torch.bfloat16),
    "tf32": (torch.float32,) * 3,
}


def aot_kinds(shape: "Shape") -> Iterator[tuple[str, str, int]]:
    """Name, kind and batch of what dispatch chooses for a ViT of this shape: each default configuration and form of pixels.

    bfloat16 for every shape. The others differ by the patch alone, which their name says, so that ``inspect``, which takes
    each name once, compiles them once. True float32 is by default cuBLAS's, and float16 has bfloat16's (``cli/inspect.py``).
    """
    patch = f"p={shape.patch}"
    yield f"D={shape.width} {patch} {shape.image} P={shape.tokens - _patches(shape)} bf16", "bf16", shape.train_batch
    for kind in ("bf16 channels_last", "autocast", "uint8", "uint8 channels_last", "tf32"):
        yield f"{patch} {kind}", kind, shape.train_batch
    for kind in ("bf16", "uint8"):
        yield f"{patch} {kind} B=1", kind, 1


def _patches(shape: "Shape") -> int:
    return (shape.image // shape.patch) ** 2


def aot_tensors(shape: "Shape", kind: str, batch: int) -> dict[str, Any]:
    """Arguments of the forward for one of ``aot_kinds``, on ``meta``; of the backward, too, where they have the same name."""
    first, _, layout = kind.partition(" ")
    pixel, compute, stream = _AOT_DTYPES[first]
    side = shape.image // shape.patch * shape.patch
    images = torch.empty(batch, 3, side, side, dtype=pixel, device="meta")
    weight = images.new_empty(shape.width, 3, shape.patch, shape.patch, dtype=compute)
    num_prefix = shape.tokens - _patches(shape)
    statistics = images.new_empty(3, dtype=torch.float32) if first == "uint8" else None
    return {
        "images": images.to(memory_format=torch.channels_last) if layout else images,
        "weight": weight,
        "bias": weight.new_empty(shape.width, dtype=stream),
        "prefix_tokens": weight.new_empty(1, num_prefix, shape.width, dtype=stream) if num_prefix else None,
        "pos_embed": weight.new_empty(1, shape.tokens, shape.width, dtype=stream),
        "pos_embed_prefix": True,
        "mean": statistics,
        "std": statistics,
        "out_dtype": stream,
        "allow_tf32": first == "tf32",
        "plan": "triton",
        "arch": f"sm_{triton.runtime.driver.active.get_current_target().arch}",
    }
