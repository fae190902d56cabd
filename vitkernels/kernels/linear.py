"""Linear layer with a fused epilogue, and the elementwise kernel of its cuBLAS plan. The backward is in ``linear_bwd.py``.

Equation numbers are those of ``reference/linear.py``: (2) is z = h @ weight^T + bias, (3) is y = residual + drop_path *
layer_scale * act(z). Bytes and floor, M rows, s bytes an element, p = 2 M N K FLOPs:

    plan triton   one kernel         reads M K + N K (+ M N of the residual), writes M N (+ M N of z for training)
    plan cublas   F.linear, then     the same GEMM without its epilogue, then reads M N (+ M N), writes M N

ViT-B/16 at B = 256, fc1 on an H200 (790 TFLOP/s, 4.3 TB/s): p = 238 GFLOP, 301 us; the pass over z that the epilogue saves
costs 144 us, so a GEMM at 0.68 of cuBLAS's speed breaks even. A tuned table decides (``_tuned.py``); no entry is cuBLAS.
cuBLASLt has an epilogue of its own, ``torch._addmm_activation``, for the tanh form of GELU (SigLIP 2): where a table says
``cublaslt``, plan cublas of ``fuse(model, inference=True)`` has no pass over z. Elsewhere it would have no z to save.

The epilogue works on the float32 accumulator and rounds once. erf is a polynomial (``_activation.py``), since ``erf`` costs
more instructions than the tensor cores leave idle. The descriptor kernel (sm_90 on) is persistent, and stores the tile in
quarters, so that staging it takes 8 instead of 32 KB of shared memory and two blocks fit on an SM: one multiplies while the
other is in its epilogue. Below sm_90 descriptors turn into scalar code, so the pointer kernel runs there, and where rows are no
multiple of 16 bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _tuned
from ._activation import activation
from ._device import gpu_of, multiprocessors
from ._dot import add_product
from ._tile_order import tile_at

if TYPE_CHECKING:
    from ._aot import Shape

# The arguments that each kernel stores to; it loads from its other tensors (_recorder.py counts bytes by this).
WRITES = {
    "_linear_pointer_kernel": ("y_ptr", "z_ptr", "moments_ptr"),
    "_linear_descriptor_kernel": ("y_ptr", "z_ptr", "moments_ptr"),
    "_linear_epilogue_kernel": ("y_ptr",),
}


def _flops(M, N, K, **_) -> int:
    return 2 * M * N * K


FLOPS = {"_linear_pointer_kernel": _flops, "_linear_descriptor_kernel": _flops}


@dataclass(frozen=True)
class GemmConfig:
    """A configuration of the fused GEMM, as a tuned table holds it.

    Attributes:
        kernel: ``pointer``, or ``descriptor`` (TMA, persistent).
        block_m, block_n, block_k: the tile; group_m: tiles of M that are walked together, for the L2 cache.
        subtiles: parts in which the descriptor kernel stores its tile, 1, 2 or 4.
        programs_per_sm: of the descriptor kernel's grid.
    """

    kernel: Literal["pointer", "descriptor"]
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    subtiles: int = 4
    programs_per_sm: int = 2


EXTRA = 8  # columns: 16 bytes, so that rows stay aligned for vector and TMA loads

# Where a table has no configuration and the plan is forced; a test compiles them for every chip. All but the last: 16-bit.
_DESCRIPTOR = GemmConfig("descriptor", 128, 128, 64, num_warps=8, num_stages=3)
_POINTER = GemmConfig("pointer", 128, 128, 32, num_warps=8, num_stages=4)
_POINTER_UNALIGNED = GemmConfig("pointer", 128, 64, 32, num_warps=8, num_stages=3)  # narrow accesses take registers
_POINTER_FLOAT32 = GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3)


@triton.jit
def vector(ptr, cols, N):
    return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normalised(acc, rows, cols, mean_ptr, rstd_ptr, colsum_ptr, M, N):
    """Eq. (2) of folded_linear.py without the bias: x @ weight^T becomes LN(x) @ weight^T."""
    mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    return (acc - mean[:, None] * vector(colsum_ptr, cols, N)) * rstd[:, None]


@triton.jit
def _epilogue(
    z, rows, cols, layer_scale_ptr, drop_path_ptr, residual_ptr, M, N, residual_stride, rows_per_sample,
    ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Eq. (3) on a tile, in float32."""
    y = activation(z, ACT, EXACT)
    if layer_scale_ptr is not None:
        y *= vector(layer_scale_ptr, cols, N)
    if drop_path_ptr is not None:
        y *= tl.load(drop_path_ptr + rows // rows_per_sample, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        offsets = (rows.to(tl.int64) * residual_stride)[:, None] + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _moments(y):
    """Of each row of a tile, as stored in 16 bits: mean and sum of squared distances from it, eq. (3) of folded_linear.py.

    A sum of quotients does not overflow, and they are exact, since a tile's width is a power of two. Both sums are of quotients
    because sm_100 adds in pairs then: 400 instructions fewer of 4000, in Triton 3.8.
    """
    quotient = y.to(tl.float32) * (1.0 / y.shape[1])
    mean = tl.sum(quotient, axis=1)
    centred = quotient - mean[:, None] * (1.0 / y.shape[1])
    return mean, tl.sum(centred * centred, axis=1) * (1.0 * y.shape[1] * y.shape[1])


@triton.jit
def _joined(mean, square, right_mean, right_square, WIDTH: tl.constexpr):
    """Moments of a tile from those of its halves, WIDTH columns each: eq. (4) there, for two."""
    step = right_mean - mean
    return mean + step * 0.5, square + right_square + step * step * (WIDTH / 2)


@triton.jit
def _store_moments(moments_ptr, mean, square, tile_n, rows, M):
    ptrs = moments_ptr + tile_n.to(tl.int64) * (2 * M) + rows
    tl.store(ptrs, mean, mask=rows < M)
    tl.store(ptrs + M, square, mask=rows < M)


@triton.jit
def _store(ptr, value, rows, cols, M, N):
    offsets = (rows.to(tl.int64) * N)[:, None] + cols[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _linear_pointer_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    drop_path_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    rows_per_sample,
    mean_ptr,
    rstd_ptr,
    colsum_ptr,
    moments_ptr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Beyond the edge row 0 is read again instead of masked: only what is stored needs a mask.
    x_ptrs = x_ptr + (tl.where(rows < M, rows, 0).to(tl.int64) * x_stride)[:, None] + depth[None, :]
    weight_ptrs = weight_ptr + (tl.where(cols < N, cols, 0).to(tl.int64) * weight_stride)[None, :] + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(depth < K - k)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(depth < K - k)[:, None], other=0.0)
        acc = add_product(acc, x, weight, PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if colsum_ptr is not None:
        acc = _normalised(acc, rows, cols, mean_ptr, rstd_ptr, colsum_ptr, M, N)
    if bias_ptr is not None:
        acc += vector(bias_ptr, cols, N)  # eq. (2)
    if z_ptr is not None:
        _store(z_ptr, acc, rows, cols, M, N)
    y = _epilogue(
        acc, rows, cols, layer_scale_ptr, drop_path_ptr, residual_ptr, M, N, residual_stride, rows_per_sample, ACT, EXACT
    )
    y = y.to(y_ptr.dtype.element_ty)
    _store(y_ptr, y, rows, cols, M, N)
    if moments_ptr is not None:
        mean, square = _moments(y)
        _store_moments(moments_ptr, mean, square, tile_n, rows, M)


@triton.jit
def _store_part(
    part, first_row, first_col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
    M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr,
    ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Returns the moments of what it stores, zeros where nobody wants them."""
    rows = first_row + tl.arange(0, part.shape[0])
    cols = first_col + tl.arange(0, part.shape[1])
    if colsum_ptr is not None:
        part = _normalised(part, rows, cols, mean_ptr, rstd_ptr, colsum_ptr, M, N)
    if bias_ptr is not None:
        part += vector(bias_ptr, cols, N)  # eq. (2)
    if z_desc is not None:
        z_desc.store([first_row, first_col], part.to(z_desc.dtype))
    y = _epilogue(
        part, rows, cols, layer_scale_ptr, drop_path_ptr, residual_ptr, M, N, residual_stride, rows_per_sample, ACT, EXACT
    )
    y = y.to(y_desc.dtype)
    y_desc.store([first_row, first_col], y)
    mean = tl.zeros((part.shape[0],), tl.float32)
    square = mean
    if moments_ptr is not None:
        mean, square = _moments(y)
    return mean, square


@triton.jit
def _halves(tile):
    """Its left and right half."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_parts(
    half, row, col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
    M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr,
    ACT: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    if PARTS == 1:
        mean, square = _store_part(
            half, row, col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
            M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
        )  # fmt: skip
    else:
        left, right = _halves(half)
        mean, square = _store_part(
            left, row, col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
            M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
        )  # fmt: skip
        right_mean, right_square = _store_part(
            right, row, col + half.shape[1] // 2, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
            M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
        )  # fmt: skip
        if moments_ptr is not None:
            mean, square = _joined(mean, square, right_mean, right_square, half.shape[1] // 2)
    return mean, square


@triton.jit
def _linear_descriptor_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    drop_path_ptr,
    residual_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    rows_per_sample,
    mean_ptr,
    rstd_ptr,
    colsum_ptr,
    moments_ptr,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    weight_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [weight_stride, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // SUBTILES])
    z_desc = None
    if z_ptr is not None:
        z_desc = tl.make_tensor_descriptor(z_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // SUBTILES])

    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):  # what lies beyond an edge arrives as zero
            x = x_desc.load([row, k])
            weight = weight_desc.load([col, k])
            acc = tl.dot(x, weight.T, acc)

        if SUBTILES == 1:
            mean, square = _store_part(
                acc, row, col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
                M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
            )  # fmt: skip
        else:
            left, right = _halves(acc)
            mean, square = _store_parts(
                left, row, col, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
                M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
                SUBTILES // 2,
            )  # fmt: skip
            right_mean, right_square = _store_parts(
                right, row, col + BLOCK_N // 2, y_desc, z_desc, bias_ptr, layer_scale_ptr, drop_path_ptr, residual_ptr,
                M, N, residual_stride, rows_per_sample, mean_ptr, rstd_ptr, colsum_ptr, moments_ptr, ACT, EXACT,
                SUBTILES // 2,
            )  # fmt: skip
            if moments_ptr is not None:
                mean, square = _joined(mean, square, right_mean, right_square, BLOCK_N // 2)
        if moments_ptr is not None:
            _store_moments(moments_ptr, mean, square, tile_n, row + tl.arange(0, BLOCK_M), M)


@triton.jit
def _linear_epilogue_kernel(
    z_ptr,
    layer_scale_ptr,
    drop_path_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    residual_stride,
    rows_per_sample,
    ACT: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONES: tl.constexpr = 0,
    EXTRA: tl.constexpr = 0,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(z_ptr + (rows.to(tl.int64) * N)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _epilogue(
        z, rows, cols, layer_scale_ptr, drop_path_ptr, residual_ptr, M, N, residual_stride, rows_per_sample, ACT, EXACT
    )
    y_ptrs = y_ptr + (rows.to(tl.int64) * (N + EXTRA))[:, None]
    tl.store(y_ptrs + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if EXTRA > 0:  # noqa: SIM102  the outer test is the compiler's, the inner one the program's
        if tl.program_id(1) == tl.num_programs(1) - 1:
            extra = tl.arange(0, EXTRA)[None, :] + tl.zeros((ROWS, EXTRA), tl.int32)
            ones = tl.where(extra < ONES, 1.0, 0.0).to(y_ptr.dtype.element_ty)
            tl.store(y_ptrs + N + extra, ones, mask=(rows < M)[:, None] & (extra >= 0))


def elementwise_tile(N: int) -> dict[str, int]:
    """16 float32 elements a thread of each tensor: 8 rows of 256 columns at a ViT's widths."""
    block_n = min(max(triton.next_power_of_2(N), 16), 256)
    # enable_fp_fusion is today's default, written down because Triton 3.10 flips it.
    return {"ROWS": min(2048 // block_n, 16), "BLOCK_N": block_n, "num_warps": 4, "enable_fp_fusion": True}


def matrix(x: Tensor) -> Tensor:
    """``x`` (..., K) as (M, K) with unit last stride; copies only where strides forbid the view, as cuBLAS's caller does."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def shaped(product: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``product``, which nobody else holds, in this shape.

    Not as a view: what an ``autograd.Function`` returns can be changed in place unless it is one.
    """
    return torch.ops.aten._unsafe_view(product, shape)


def samples(drop_path: Tensor | None, M: int) -> tuple[Tensor | None, int]:
    """drop_path as one contiguous vector, and how many rows one of its elements scales."""
    if drop_path is None:
        return None, 1
    return drop_path.reshape(-1).contiguous(), max(M // max(drop_path.numel(), 1), 1)


def exact(act: str | None, dtype: torch.dtype) -> bool:
    return act == "gelu" and dtype == torch.float32


def launch_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    preact: str,
    allow_tf32: bool,
    plan: str,
    arch: str,
) -> tuple[Tensor, Tensor]:
    """Returns y and z, each empty where ``preact`` (``none``, ``also``, ``only``) does not ask for it."""
    rows = matrix(x)
    config = _config(act, layer_scale, residual, rows, weight, plan, arch)
    shape, M = (*x.shape[:-1], weight.shape[0]), rows.shape[0]
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    bias, layer_scale = (None if t is None else t.contiguous() for t in (bias, layer_scale))
    epilogue = (act, layer_scale, *samples(drop_path, M), None if residual is None else matrix(residual))
    with torch._C._DisableAutocast():  # the operator's dtypes are its arguments'
        if config is None:
            in_cublas = gelu_in_cublas(act, rows, weight, bias, plan, arch)
            y, z = _cublas(rows, weight, bias, epilogue, out_dtype, preact, in_cublas)
            y, z = None if y is None else shaped(y, shape), None if z is None else shaped(z, shape)
        else:
            z = torch.empty(shape, dtype=x.dtype, device=x.device) if preact != "none" else None
            y = torch.empty(shape, dtype=out_dtype, device=x.device) if preact != "only" else None
            if M > 0:
                gemm(config, rows, weight, bias, epilogue, y, z, allow_tf32)
    return nothing if y is None else y, nothing.clone() if z is None else z


def _config(act, layer_scale, residual, x: Tensor, weight: Tensor, plan: str, arch: str) -> GemmConfig | None:
    kind = "plain" if residual is None and layer_scale is None else "residual"
    return config_of(kind if act is None else kind_of(act), x, weight, plan, arch)


def kind_of(act: str) -> str:
    """The tanh form of GELU has a kind of its own, for cuBLASLt has it too."""
    return "gelu_tanh" if act == "gelu_tanh" else "act"


def _entry(kind: str, x: Tensor, weight: Tensor, plan: str, arch: str) -> dict[str, Any] | None:
    """The table's. What was measured with another activation stands for the tanh form where that says nothing."""
    kinds = ("gelu_tanh", "act") if kind == "gelu_tanh" else (kind,)
    gpu = gpu_of(weight, arch)  # x may stand for its shape alone, on meta
    N, K = weight.shape
    found = (_tuned.lookup(gpu, "linear", _tuned.gemm_key(kind, x.dtype, N, K, x.shape[0])) for kind in kinds)
    usable = (entry for entry in found if entry is not None and (entry["plan"] != "cublaslt" or plan == "inference"))
    return next(usable, None)


def config_of(kind: str, x: Tensor, weight: Tensor, plan: str, arch: str) -> GemmConfig | None:
    """The fused GEMM's configuration; None for cuBLAS. It depends on the shape alone, not on what is saved for backward."""
    forced = plan == "triton"
    if plan == "cublas" or (not forced and x.dtype == torch.float32):  # no tensor core multiplies float32
        return None
    entry = _entry(kind, x, weight, plan, arch)
    if not forced and (entry is None or entry["plan"] != "triton"):
        return None
    if x.dtype == torch.float32:
        return _POINTER_FLOAT32
    aligned = _describable(x, weight)
    if entry is None or "config" not in entry:
        return _default(arch) if aligned else _POINTER_UNALIGNED
    config = GemmConfig(**entry["config"])
    if config.kernel == "descriptor" and not aligned:
        return _POINTER_UNALIGNED if forced else None  # what was measured cannot run
    return config


def gelu_in_cublas(act: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, plan: str, arch: str) -> bool:
    """Whether cuBLASLt's epilogue applies ``act``. On a CPU PyTorch's operator applies the erf form."""
    if act != "gelu_tanh" or plan != "inference" or bias is None or x.is_cpu or x.dtype == torch.float32:
        return False
    entry = _entry("gelu_tanh", x, weight, plan, arch)
    return entry is not None and entry["plan"] == "cublaslt"


def _default(arch: str) -> GemmConfig:
    return _DESCRIPTOR if arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90 else _POINTER


def _describable(x: Tensor, weight: Tensor) -> bool:
    """Tensor descriptors need 16-byte addresses and row strides, of y (N wide) too, and rows that do not overlap."""
    strides = (x.stride(0), weight.stride(0), weight.shape[0])
    addresses = (x.data_ptr(), weight.data_ptr()) if x.device.type != "meta" else ()
    return (
        weight.stride(1) == 1
        and min(strides[:2]) >= x.shape[1]
        and all(n * x.element_size() % 16 == 0 for n in strides)
        and all(a % 16 == 0 for a in addresses)
    )


def _cublas(x, weight, bias, epilogue, out_dtype, preact: str, in_cublas: bool) -> tuple[Tensor | None, Tensor | None]:
    act, layer_scale, drop_path, rows_per_sample, residual = epilogue
    scaled = layer_scale is not None or drop_path is not None
    if in_cublas and not scaled and residual is None and out_dtype == x.dtype and preact == "none":
        return torch._addmm_activation(bias.to(x.dtype), x, weight.t(), use_gelu=True), None
    plain = act is None and not scaled
    if plain and bias is None and residual is not None and residual.dtype == x.dtype == out_dtype and preact == "none":
        return torch.addmm(residual, x, weight.t()), None
    z = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if preact == "only":
        return None, z
    if plain and residual is None:
        return z, z.clone() if preact == "also" else None
    in_place = preact == "none" and z.dtype == out_dtype
    y = z if in_place else torch.empty(z.shape, dtype=out_dtype, device=x.device)
    _elementwise(z, act, layer_scale, drop_path, rows_per_sample, residual, y)
    return y, z if preact == "also" else None


def _elementwise(z, act, layer_scale, drop_path, rows_per_sample, residual, y: Tensor, ones: int = 0) -> None:
    """Equation (3) from ``z`` (M, N) into ``y``, whose further columns, if any, are ``ones`` times 1, then 0."""
    M, N = z.shape
    tile = elementwise_tile(N)
    if M > 0:
        _linear_epilogue_kernel[(triton.cdiv(M, tile["ROWS"]), triton.cdiv(N, tile["BLOCK_N"]))](
            z,
            layer_scale,
            drop_path,
            residual,
            y,
            M,
            N,
            0 if residual is None else residual.stride(0),
            rows_per_sample,
            ACT=act,
            EXACT=exact(act, y.dtype),
            ONES=ones,
            EXTRA=y.shape[1] - N,
            **tile,
        )


def activate(z: Tensor, act: str | None, ones: int) -> Tensor:
    """act(z) (M, N), and EXTRA columns after it, the first ``ones`` of which are 1: a GEMM's weight has biases in its place."""
    y = torch.empty(z.shape[0], z.shape[1] + EXTRA, dtype=z.dtype, device=z.device)
    _elementwise(z, act, None, None, 1, None, y, ones)
    return y


def gemm(
    config: GemmConfig, x, weight, bias, epilogue, y: Tensor | None, z: Tensor | None, allow_tf32: bool,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), moments: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, z and the ``moments`` (tiles, 2, M) of y's rows in each tile of columns, which have to fill their tiles.

    ``epilogue``: act, layer_scale, drop_path, its rows, residual; ``norm``: mean, rstd, colsum.
    """
    act, layer_scale, drop_path, rows_per_sample, residual = epilogue
    if y is None:  # z alone is a GEMM with no epilogue but the bias
        assert z is not None
        y, z, act, layer_scale, drop_path, residual = z, None, None, None, None, None
    weight = weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    tensors = (x, weight, bias, layer_scale, drop_path, residual, y, z)
    sizes = (M, N, K, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), rows_per_sample)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    options = {
        "ACT": act,
        "EXACT": exact(act, y.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if config.kernel == "descriptor":
        triton.set_allocator(_scratch)  # each launch: it is kept in a context variable, which autograd's threads do not share
        programs = min(tiles, multiprocessors(x.device) * config.programs_per_sm)
        _linear_descriptor_kernel[(programs,)](*tensors, *sizes, *norm, moments, SUBTILES=config.subtiles, **options)
    else:
        precision = "tf32" if allow_tf32 else "ieee"
        even_k = K % config.block_k == 0
        _linear_pointer_kernel[(tiles,)](*tensors, *sizes, *norm, moments, PRECISION=precision, EVEN_K=even_k, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel builds, 128 bytes each and program."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def config_entry(config: GemmConfig) -> dict[str, object]:
    """A tuned table's entry that chooses ``config``."""
    return {"plan": "triton", "config": asdict(config)}


def aot_launches(shape: "Shape") -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and launch on ``meta`` tensors of the default configurations at the GEMMs of a ViT block of this shape.

    The fused GEMMs of both kernels (the descriptor one from sm_90 on), in bfloat16 and with autocast's float32 stream, and
    the elementwise kernel of the cuBLAS plan.
    """
    D, hidden = shape.width, shape.hidden
    M = shape.train_batch * shape.tokens
    for N, K, name in ((3 * D, D, "qkv"), (D, D, "proj"), (hidden, D, "fc1"), (D, hidden, "fc2")):
        acts = ("gelu", "gelu_tanh", "quick_gelu", "silu") if name == "fc1" else (None,)
        for act in acts:
            for kind in ("bf16", "autocast") if name in ("proj", "fc2") else ("bf16", "bf16 train")[: 1 + (name == "fc1")]:
                title = f"D={D} {name} {act + ' ' if act else ''}{kind}"
                yield title, partial(_aot_gemm, M, N, K, name, act, kind, "triton")
        yield f"D={D} {name} cublas", partial(_aot_gemm, M, N, K, name, acts[0], "bf16 train", "cublas")


def _aot_gemm(M: int, N: int, K: int, name: str, act: str | None, kind: str, plan: str) -> None:
    arch = f"sm_{triton.runtime.driver.active.get_current_target().arch}"
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    stream = torch.float32 if kind == "autocast" else torch.bfloat16
    weight, bias = x.new_empty(N, K), x.new_empty(N)
    residual = x.new_empty(M, N, dtype=stream) if name in ("proj", "fc2") else None
    scale = None if residual is None else residual.new_empty(N)
    preact = "also" if act is not None and kind == "bf16 train" else "none"
    launch_linear_fwd(x, weight, bias, act, scale, None, residual, stream, preact, False, plan, arch)
