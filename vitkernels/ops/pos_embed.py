"""Resampling of position embeddings. Parts as in ``layer_norm.py``; the kernels are C++ and CUDA C++, in ``vitkernels._C``.

On a CPU the C++ kernel is 4 to 40 times as fast as ``F.interpolate`` at D = 768, 1.1 to 1.5 times in bilinear mode without
antialias, so here ``auto`` takes it there too. What ``torch.export``, ``torch.jit.trace`` and ``make_fx`` record on a CPU is
PyTorch's own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _env, _select
from .._recording import exporting, fx_tracing
from ..reference import pos_embed as reference
from . import _check
from ._register import register

INTERPOLATIONS = ("bicubic", "bilinear")
MAX_SIDE = 512  # of a grid, for the CUDA kernel: a row of the grid and its weights have to fit into shared memory
MAX_SIZES = 448  # of one launch: they are kernel arguments, 4 kB, and so need no copy to the device
_UNORDERED = (set, frozenset, dict)  # hold no pair of sizes: none of the two comes first
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # vitkernels::Dtype

# 1. Registration. Both operators are linear and each is the other's transpose. `sizes` is flat: h, w of each copy. Bytes: the
# table is read and the copies are written once; backward the other way round.

_ARGUMENTS = (
    "SymInt[] old_size, SymInt[] sizes, int num_prefix_tokens, str interpolation, bool antialias, bool align_corners,"
    " bool preserve_aspect_ratio, SymInt? pad_to"
)


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _total_rows(sizes: Sequence[int], num_prefix_tokens: int, pad_to: int | None) -> int:
    if pad_to is not None:
        return len(sizes) // 2 * pad_to
    if len(sizes) == 2:
        return num_prefix_tokens + sizes[0] * sizes[1]
    return sum(num_prefix_tokens + h * w for h, w in _pairs(sizes))


def _fwd_fake(
    posemb, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    return posemb.new_empty(_total_rows(sizes, num_prefix_tokens, pad_to), posemb.shape[-1])


def _fwd_reference(
    posemb, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    arguments = (posemb, _pairs(sizes), old_size, num_prefix_tokens, interpolation, antialias, align_corners)
    return reference.copies(*arguments, preserve_aspect_ratio, pad_to, torch.float32)


def launch_resample_pos_embed_fwd(
    posemb, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    copies = posemb.new_empty((_total_rows(sizes, num_prefix_tokens, pad_to), posemb.shape[-1]))
    problem = (old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to)
    _launch("resample_forward", posemb.contiguous(), copies, *problem)
    return copies


register(
    f"resample_pos_embed_fwd(Tensor posemb, {_ARGUMENTS}) -> Tensor",
    fake=_fwd_fake,
    stem="pos_embed",
    reference=_fwd_reference,
    extension=launch_resample_pos_embed_fwd,
)


def _bwd_fake(
    dcopies, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    return dcopies.new_empty(1, num_prefix_tokens + old_size[0] * old_size[1], dcopies.shape[-1])


def _bwd_reference(
    dcopies, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    """Equation (4). Prefix gradients are summed in the dtype of the gradients or float32, whichever is wider."""
    h, w = old_size
    dposemb = dcopies.new_zeros(num_prefix_tokens + h * w, dcopies.shape[-1], dtype=torch.float32)
    dprefix = dposemb[:num_prefix_tokens].to(torch.promote_types(torch.float32, dcopies.dtype))
    start = 0
    for height, width in _pairs(sizes):
        rows = num_prefix_tokens + height * width
        copy = dcopies[start : start + min(rows, pad_to or rows)]
        start += pad_to or rows
        dprefix += copy[:num_prefix_tokens]
        image = dcopies.new_zeros(height * width, dcopies.shape[-1], dtype=torch.float32)
        image[: copy.shape[0] - num_prefix_tokens] = copy[num_prefix_tokens:]
        full = (height, width) if [height, width] == list(old_size) or not preserve_aspect_ratio else (max(height, width),) * 2
        along_h = reference.resampling_matrix(h, full[0], interpolation, antialias, align_corners)[:height]
        along_w = reference.resampling_matrix(w, full[1], interpolation, antialias, align_corners)[:width]
        image = image.unflatten(0, (height, width))
        matrices = (along_h.to(image.device), along_w.to(image.device))
        dposemb[num_prefix_tokens:] += torch.einsum("ir,jc,ijd->rcd", *matrices, image).flatten(0, 1)
    return torch.cat([dprefix.to(dcopies.dtype), dposemb[num_prefix_tokens:].to(dcopies.dtype)])[None]


def launch_resample_pos_embed_bwd(
    dcopies, old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to
):
    dposemb = dcopies.new_empty((1, num_prefix_tokens + old_size[0] * old_size[1], dcopies.shape[-1]))
    problem = (old_size, sizes, num_prefix_tokens, interpolation, antialias, align_corners, preserve_aspect_ratio, pad_to)
    if not sizes:
        return dposemb.zero_()
    _launch("resample_backward", dposemb, dcopies.contiguous(), *problem)
    return dposemb


register(
    f"resample_pos_embed_bwd(Tensor dcopies, {_ARGUMENTS}) -> Tensor",
    fake=_bwd_fake,
    stem="pos_embed",
    reference=_bwd_reference,
    extension=launch_resample_pos_embed_bwd,
)


def _launch(
    function: str,
    table: Tensor,
    copies: Tensor,
    old_size: Sequence[int],
    sizes: Sequence[int],
    num_prefix_tokens: int,
    interpolation: str,
    antialias: bool,
    align_corners: bool,
    preserve_aspect_ratio: bool,
    pad_to: int | None,
) -> None:
    """Call ``function`` of the extension, ``_cpu`` or ``_cuda``, on contiguous tensors."""
    if copies.numel() == 0:
        return
    if table.is_cuda:
        index = table.get_device()
        where: tuple[int, ...] = (index, torch._C._cuda_getCurrentRawStream(index))
        function += "_cuda"
    else:
        where = (torch.get_num_threads(),)
        function += "_cpu"
    getattr(_env.EXTENSION, function)(
        table.data_ptr(),
        copies.data_ptr(),
        _DTYPES[table.dtype],
        *old_size,
        table.shape[-1],
        num_prefix_tokens,
        pad_to or 0,
        interpolation == "bicubic",
        antialias,
        align_corners,
        preserve_aspect_ratio,
        sizes,
        *where,
    )


# 2. Why not.


def why_not(posemb: Tensor, side: int = 1) -> list[str]:
    """Reasons why the resampling kernels cannot take this tensor and grids of up to ``side``; empty when they can."""
    reasons = _select.why_not_opaque([posemb])
    arch = _select.target(posemb)
    if _env.EXTENSION is None:
        reasons.append("the extension vitkernels._C is not built (no C++ compiler at installation?) or does not load")
    elif arch is not None:
        reasons += _select.why_not_arch(arch)
        reasons += _why_not_built_for(arch)
        if posemb.is_cuda and not reasons:
            reasons += _driver_reasons()
        if side > MAX_SIDE:
            reasons.append(f"the resampling kernel takes grids of up to {MAX_SIDE} a side, got {side}")
    elif not posemb.is_cpu:
        reasons.append(f"the resampling kernels run on CUDA and CPU tensors, got {posemb.device.type}")
    return reasons


def _why_not_built_for(arch: str) -> list[str]:
    """A reason when the extension holds no code that ``arch`` runs: a binary of its generation or PTX, not newer."""
    if not _env.EXTENSION_ARCHITECTURES:
        return ["the extension vitkernels._C was built without CUDA"]
    number = int(arch.removeprefix("sm_"))
    for built_for in _env.EXTENSION_ARCHITECTURES:
        kind, _, version = built_for.partition("_")
        if int(version) <= number and (kind == "compute" or int(version) // 10 == number // 10):
            return []
    return [f"the extension vitkernels._C was built for {' '.join(_env.EXTENSION_ARCHITECTURES)}, not for {arch}"]


def _records_a_program() -> bool:
    """Is this call recorded to be saved, and so to run where there may be no vitkernels?"""
    return exporting() or _jit_tracing() or fx_tracing()


def _jit_tracing() -> bool:
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _why_not_traced(*sizes: Any) -> list[str]:
    """While ``torch.jit.trace`` records, a size read from a shape is a 0-d tensor, which no operator takes in a list."""
    if not _jit_tracing() or not any(isinstance(size, Tensor) for size in sizes):
        return []
    return ["torch.jit.trace records these sizes as functions of the input, and the kernel's operator takes integers"]


@_select.run_by_dynamo
def _driver_reasons() -> list[str]:
    runtime, driver = _env.EXTENSION.cuda_versions()
    if driver is None or driver // 1000 < runtime // 1000:
        return [f"the driver supports CUDA {driver}, the extension vitkernels._C was built with {runtime}"]
    return []


# 3. Autograd. Each operator's derivative is the other, so derivatives of any order are theirs.


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, posemb, *problem):
        ctx.problem = problem
        return torch.ops.vitkernels.resample_pos_embed_fwd(posemb, *problem)

    @staticmethod
    def backward(ctx: Any, dcopies):
        # The function only under create_graph: Dynamo would follow the two into each other.
        recorded = torch.is_grad_enabled() and dcopies.requires_grad
        transpose = _Transpose.apply if recorded else torch.ops.vitkernels.resample_pos_embed_bwd
        return transpose(dcopies, *ctx.problem), *(None for _ in ctx.problem)


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dcopies, *problem):
        ctx.problem = problem
        return torch.ops.vitkernels.resample_pos_embed_bwd(dcopies, *problem)

    @staticmethod
    def backward(ctx: Any, dposemb):
        return _Resample.apply(dposemb, *ctx.problem), *(None for _ in ctx.problem)


# 4. The public functions.


def resample_pos_embed(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    verbose: bool = False,
    align_corners: bool | None = None,
) -> Tensor:
    """Resample a position embedding to another grid, as ``timm.layers.resample_abs_pos_embed``.

    Args:
        posemb: (1, P + h*w, D), any float dtype; computed in float32 and cast back once.
        new_size: (h', w') of the new grid.
        old_size: (h, w); default: the square of as many tokens.
        num_prefix_tokens: P, rows that pass through untouched.
        interpolation: ``"bicubic"`` (a = -0.5 with antialias, -0.75 without) or ``"bilinear"``.
        antialias: widen the filter when downsampling.
        verbose: log the two grids at INFO when they differ.
        align_corners: the corners of both grids are the same points, else the edges of their corner cells.

    Returns:
        (1, P + h'*w', D); ``posemb`` itself when nothing changes. Derivatives of any order are deterministic.

    In float32 the kernel gives, with antialias on a CPU with AVX2, the very bits of ``F.interpolate``; otherwise it is within
    2e-6 * max(1, max|posemb|) of ``F.interpolate`` on a channels-last image of 4 or more channels, which is timm's layout.
    (Of a bilinear image without antialias PyTorch's own layouts differ from each other, by up to 3e-5 at 512 a side.)

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "resample_pos_embed"
    old_size, num_prefix_tokens = _check_table(op, posemb, old_size, num_prefix_tokens, interpolation, antialias, align_corners)
    _check.flag(op, "verbose", verbose)
    new_size = _pair(op, "new_size", new_size)
    _check_elements(op, "new_size", new_size[0] * new_size[1], posemb.shape[-1])
    if reference.unchanged(posemb, new_size, old_size, num_prefix_tokens):
        return posemb
    if verbose:
        reference.log_resizing(reference.grid_of(posemb, old_size, num_prefix_tokens), new_size)
    options = (interpolation, antialias, bool(align_corners), False, None)
    return _dispatch(op, posemb, (new_size,), old_size, num_prefix_tokens, *options).unsqueeze(0)


def resample_pos_embed_many(
    posemb: Tensor,
    sizes: Sequence[tuple[int, int]],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    interpolation: str = "bicubic",
    antialias: bool = True,
    *,
    align_corners: bool = False,
    preserve_aspect_ratio: bool = False,
    pad_to: int | None = None,
) -> Tensor:
    """Resample a position embedding to the grids of all images of a batch, in one launch (up to 448 of them).

    Args:
        posemb, old_size, num_prefix_tokens, interpolation, antialias, align_corners: as in ``resample_pos_embed``.
        sizes: (h', w') of each image, a list on the host.
        preserve_aspect_ratio: resample to the square of the larger side and take its upper left h' x w', as timm's
            NaFlexVit (an image of the table's own size stays as it is).
        pad_to: rows of each image: longer ones are cut, shorter ones filled with zeros.

    Returns:
        (total, D), the P + h'*w' rows of one image after those of the other: packed as ``attention`` with ``cu_seqlens``
        takes them. With ``pad_to``: (images, pad_to, D).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: the backend is ``fused`` and the kernel cannot run; the message lists why.
    """
    op = "resample_pos_embed_many"
    old_size, num_prefix_tokens = _check_table(op, posemb, old_size, num_prefix_tokens, interpolation, antialias, align_corners)
    _check.flag(op, "preserve_aspect_ratio", preserve_aspect_ratio)
    # The class of tensors and arrays is iterable, those of no dimension are not.
    if not isinstance(sizes, Iterable) or isinstance(sizes, _UNORDERED) or getattr(sizes, "ndim", 1) == 0:
        raise TypeError(f"{op}: sizes must be a sequence of (h, w), got {sizes!r}")
    sizes = [_pair(op, "sizes", size) for size in sizes]
    _check_elements(op, "sizes", sum(h * w for h, w in sizes if type(h) is type(w) is int), posemb.shape[-1])
    if pad_to is not None:
        pad_to = _check.integer(op, "pad_to", pad_to)
        _check_elements(op, "pad_to", pad_to * max(len(sizes), 1), posemb.shape[-1])
        if pad_to < max(1, num_prefix_tokens):
            raise ValueError(f"{op}: pad_to must hold the {num_prefix_tokens} prefix rows and at least one, got {pad_to}")
    options = (interpolation, antialias, bool(align_corners), preserve_aspect_ratio, pad_to)
    parts = [
        _dispatch(op, posemb, sizes[i : i + MAX_SIZES], old_size, num_prefix_tokens, *options)
        for i in range(0, max(len(sizes), 1), MAX_SIZES)
    ]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows if pad_to is None else rows.view(len(sizes), pad_to, posemb.shape[-1])


def _dispatch(op: str, posemb: Tensor, sizes: Sequence[tuple[int, int]], old_size, num_prefix_tokens: int, *options) -> Tensor:
    old_size = reference.grid_of(posemb, old_size, num_prefix_tokens)
    flat = [side for size in sizes for side in size]

    def reasons() -> list[str]:
        return why_not(posemb, max([*old_size, *flat])) + _why_not_traced(*old_size, *flat, num_prefix_tokens, options[-1])

    if not _select.use_kernel(op, posemb, reasons, has_cpu_kernel=not _records_a_program()):
        # timm computes in float32 whatever the dtype; the reference keeps float64 for being the oracle.
        settings: tuple[Any, ...] = (*options, torch.float32)
        return reference.copies(posemb, list(sizes), old_size, num_prefix_tokens, *settings)
    problem = (list(old_size), flat, num_prefix_tokens, *options)
    if torch.is_grad_enabled() and posemb.requires_grad:
        return _Resample.apply(posemb, *problem)
    if _unwatched(posemb):
        return launch_resample_pos_embed_fwd(posemb, *problem)
    return torch.ops.vitkernels.resample_pos_embed_fwd(posemb, *problem)


def _unwatched(posemb: Tensor) -> bool:
    """Whether the operator would do nothing but call its CPU kernel: then that is called, 6 us less for a small table.

    Compilers, tracers, modes and profilers see operators, so for them there has to be one.
    """
    return (
        not torch.compiler.is_compiling()
        and posemb.is_cpu
        and type(posemb) in (Tensor, torch.nn.Parameter)
        and not (posemb.is_neg() or posemb._is_zerotensor())  # the dispatcher makes their values
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch.autograd._profiler_enabled()
    )


def _check_table(
    op: str, posemb: Tensor, old_size: Any, num_prefix_tokens: int, interpolation: str, antialias: bool, align_corners: Any
) -> tuple[tuple[int, int] | None, int]:
    """All but the new sizes; returns ``old_size`` and ``num_prefix_tokens``."""
    _check.tensor(op, "posemb", posemb)
    if posemb.layout is not torch.strided:
        raise TypeError(f"{op}: posemb must be of layout torch.strided, got {posemb.layout}")
    shape = posemb.shape
    if len(shape) != 3 or shape[0] != 1:
        _check.shape(op, "posemb", posemb, (1, "P + h*w", "D"))
    if type(interpolation) is not str or interpolation not in INTERPOLATIONS:
        _check.choice(op, "interpolation", interpolation, INTERPOLATIONS)
    _check.flag(op, "antialias", antialias)
    if align_corners is not None:
        _check.flag(op, "align_corners", align_corners)
    if type(num_prefix_tokens) is not int:
        num_prefix_tokens = _check.integer(op, "num_prefix_tokens", num_prefix_tokens)
    tokens = shape[1] - num_prefix_tokens
    if num_prefix_tokens < 0 or tokens < 1:
        raise ValueError(f"{op}: num_prefix_tokens must leave at least one of {shape[1]} rows, got {num_prefix_tokens}")
    if old_size is None:
        if reference.grid_of(posemb, None, num_prefix_tokens)[0] ** 2 != tokens:
            raise ValueError(f"{op}: old_size is needed, since {tokens} tokens are not a square grid")
        return None, num_prefix_tokens
    old_size = _pair(op, "old_size", old_size)
    if old_size[0] * old_size[1] != tokens:
        raise ValueError(f"{op}: old_size must be two positive integers with product {tokens}, got {old_size}")
    return old_size, num_prefix_tokens


def _pair(op: str, name: str, size: Any) -> tuple[int, int]:
    """``size`` as (h, w). What fails costs nothing where nothing does: a small table takes 9 us in all."""
    wrong: type[Exception] = ValueError
    try:
        if isinstance(size, _UNORDERED):
            raise TypeError
        height, width = size
        if type(height) is not int or type(width) is not int:
            height, width = _check.integer(op, name, height), _check.integer(op, name, width)
        if height >= 1 and width >= 1:
            return height, width
    except (TypeError, ValueError) as error:
        wrong = type(error)
    raise wrong(f"{op}: {name} must be two positive integers, got {size!r}")


def _check_elements(op: str, name: str, rows: Any, channels: Any) -> None:
    """Copies that no memory could hold are named here; those too large for this machine's, by PyTorch's allocator."""
    if not torch.compiler.is_compiling() and type(rows) is int and type(channels) is int and rows * channels >= 2**63:
        raise ValueError(f"{op}: {name} must ask for less than 2^63 elements, got more")
