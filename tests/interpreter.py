"""Makes Triton's interpreter compute what the GPU computes, and refuse what the GPU only sometimes punishes.

The stock interpreter (3.6 to 3.9) keeps bf16 as raw uint16 and works on the bit patterns: `tl.dot`, arithmetic,
comparisons and most casts are silently wrong (https://github.com/triton-lang/triton/issues/11584, also 11585).
`install()` repairs that, and every launch is checked unless `checking()` says otherwise: each active lane must touch a
tensor that the launch was given, and no two programs may meet at one address unless both only load.

    os.environ["TRITON_INTERPRET"] = "1"      # at the very top of conftest.py, before torch and triton
    import interpreter; interpreter.install()
    with interpreter.checking(races=False, order="shuffle"): ...
    with interpreter.record_traffic() as traffic: ...
    with interpreter.record_dots() as dots: ...       # (rows, columns, inner) of each tl.dot

conftest.py also sets OPENBLAS_NUM_THREADS, OMP_NUM_THREADS and MKL_NUM_THREADS to 1 before the first import: a kernel
is thousands of tiny numpy calls, and waking threads for them costs more than they compute. Nothing here imports triton
before `install()`. Where a GPU runs the kernels, `checking`, `record_traffic` and
`record_dots` do nothing.
"""

import bisect
import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch

Order = Literal["forward", "reverse", "shuffle"]


@dataclasses.dataclass(frozen=True)
class Options:
    bounds: bool = True
    races: bool = True
    order: Order = "forward"
    tf32: bool = False
    approximate: bool = False


@dataclasses.dataclass
class Traffic:
    """Distinct bytes of each launch (kernel, read, written): what perfect caching would move, not the number of requests.

    What a launch reads back of its own writing is not read.
    """

    launches: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    @property
    def read_bytes(self) -> int:
        return sum(read for _, read, _ in self.launches)

    @property
    def written_bytes(self) -> int:
        return sum(written for _, _, written in self.launches)


_options = Options()
_traffic: Traffic | None = None
_dots: list[tuple[int, int, int]] | None = None
_memory: "_Memory | None" = None  # the tensors of the launch that is running
_installed = False


@contextlib.contextmanager
def checking(
    *, bounds: bool = True, races: bool = True, order: Order = "forward", tf32: bool = False, approximate: bool = False
) -> Iterator[None]:
    """Options for the launches inside. `tf32`: fp32 dots that allow TF32, Triton's default, get the inputs it sees.
    `approximate`: fp32 exponentials, divisions and erf err as much as the GPU's may.
    """
    global _options
    if order not in ("forward", "reverse", "shuffle"):
        raise ValueError(f"order must be 'forward', 'reverse' or 'shuffle', got {order!r}")
    before, _options = _options, Options(bounds, races, order, tf32, approximate)
    try:
        yield
    finally:
        _options = before


@contextlib.contextmanager
def record_traffic() -> Iterator[Traffic]:
    global _traffic
    before, _traffic = _traffic, Traffic()
    try:
        yield _traffic
    finally:
        _traffic = before


@contextlib.contextmanager
def record_dots() -> Iterator[list[tuple[int, int, int]]]:
    global _dots
    before, _dots = _dots, []
    try:
        yield _dots
    finally:
        _dots = before


def install() -> None:
    """Patches triton.runtime.interpreter and triton.language for the life of the process. Idempotent."""
    global _installed
    if _installed:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the tests interpret their kernels: set TRITON_INTERPRET=1 before triton is imported")
    import triton.language as tl
    import triton.runtime.interpreter as runtime

    if not isinstance(tl.standard._sum_combine, runtime.InterpretedFunction):
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set")
    for repair in (
        *(_arithmetic, _approximations, _casts, _reductions, _libdevice),
        *(_language, _arguments, _launches, _accesses, _order),
    ):
        repair(runtime, tl)
    _installed = True


# bf16 arithmetic


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even. NaN becomes the quiet NaN: adding to its bits could carry into infinity."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """What a tensor core sees of fp32: 10 bits of mantissa. Triton 3.6 to 3.9 emit no cvt.rna.tf32 before the mma."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _wide(handle: Any) -> np.ndarray:
    """The handle's values in a type that numpy computes with."""
    return bfloat16_to_float32(handle.data) if handle.dtype.scalar.is_bf16() else handle.data


def _narrow(runtime: types.ModuleType, tl: types.ModuleType, values: np.ndarray) -> Any:
    """fp32 results of a bf16 operation; comparisons stay booleans."""
    if values.dtype == np.bool_:
        return runtime.TensorHandle(values, tl.int1)
    return runtime.TensorHandle(float32_to_bfloat16(values), tl.bfloat16)


def _arithmetic(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    builder = runtime.InterpreterBuilder
    binary, unary, fma = builder.binary_op, builder.unary_op, builder.create_fma
    narrow = functools.partial(_narrow, runtime, tl)

    # Upstream these compute on bf16's bit patterns as if they were uint16.
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
        if lhs.dtype.scalar.is_bf16() and rhs.dtype.scalar.is_bf16():
            return narrow(op(_wide(lhs), _wide(rhs)))
        return binary(self, lhs, rhs, op)

    def unary_op(self: Any, value: Any, op: Callable) -> Any:
        return narrow(op(_wide(value))) if value.dtype.scalar.is_bf16() else unary(self, value, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return narrow(_wide(x) * _wide(y) + _wide(z)) if z.dtype.scalar.is_bf16() else fma(self, x, y, z)

    # Upstream: np.vectorize(math.erf), a Python call per element, and other last bits than the reference's.
    def create_erf(self: Any, value: Any) -> Any:
        return runtime.TensorHandle(_torch_function(torch.erf)(value.data), value.dtype.scalar)

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_fma, builder.create_erf = create_fma, create_erf
    # 3.6 has no bf16 constants, and its maximum and minimum return NaN where the GPU returns the other operand.
    builder.get_bf16 = lambda self, value: narrow(np.array([value], np.float32))
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    # The int32 overflow assertion repeats integer operations in int64: +50 % on a launch, and test tensors are small.
    runtime.interpreter_builder.options = runtime.InterpreterOptions(sanitize_overflow=False)


def _torch_function(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: function(torch.from_numpy(np.ascontiguousarray(values))).numpy()


# approximations

# Largest errors in ulp. Triton 3.6 and 3.8 compile tl.exp2, tl.exp and tl.erf to ex2.approx.ftz.f32 and what is around it,
# and `/` to div.full.f32. The PTX ISA (floating-point instructions, ex2 and div) gives ex2.approx a relative error of 2^-22,
# which is 2 ulp just above a power of two, and div.full 2 ulp over its whole range; CUDA's guide (mathematical functions)
# gives erff 2 ulp. tl.div_rn and tl.sqrt_rn round correctly, and tl.log calls logf, which errs by 1 ulp.
_APPROXIMATION_ULPS = 2.0
_SMALLEST_NORMAL = np.finfo(np.float32).tiny


def _noise(*operands: np.ndarray) -> np.ndarray:
    """Pseudo-random numbers from -1 to 1 that follow from the operands' bits: a GPU errs alike wherever it sees them again."""
    mixed = np.zeros((), np.uint32)
    for operand in operands:
        bits = np.ascontiguousarray(operand, np.float32).view(np.uint32).reshape(np.shape(operand))
        mixed = (mixed ^ bits) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> np.uint32(13))).astype(np.float64) * 2.0**-31 - 1.0


def _approximately(exact: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """float32 of the float64 results `exact`, off by up to `_APPROXIMATION_ULPS`, the rounding to float32 included."""
    ulps = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    ulps = np.where((exact == 0) | ~np.isfinite(ulps), 0.0, ulps)
    return (exact + (_APPROXIMATION_ULPS - 0.5) * ulps * _noise(*operands)).astype(np.float32)


def _exponential_of(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    def exponential(values: np.ndarray) -> np.ndarray:
        result = _approximately(function(values.astype(np.float64)), values)
        result = np.where(values == 0, np.float32(1), result)  # by the table of ex2's special values
        return np.where(result < _SMALLEST_NORMAL, np.float32(0), result)  # ftz; NaN is not smaller

    return exponential


def _quotient(lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    return _approximately(lhs.astype(np.float64) / rhs, *np.broadcast_arrays(lhs, rhs))


def _erf(values: np.ndarray) -> np.ndarray:
    exact = _torch_function(torch.erf)(values.astype(np.float64))
    # Far out CUDA's is 1: erff is 1 minus an exponential.
    return np.where(np.abs(exact.astype(np.float32)) == 1, exact.astype(np.float32), _approximately(exact, values))


def _approximations(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    builder = runtime.InterpreterBuilder

    def install(name: str, approximation: Callable) -> None:
        original = getattr(builder, name)

        def create(self: Any, *handles: Any) -> Any:
            if _options.approximate and all(handle.dtype.scalar.is_fp32() for handle in handles):
                return runtime.TensorHandle(approximation(*(handle.data for handle in handles)), tl.float32)
            return original(self, *handles)

        setattr(builder, name, create)

    install("create_exp2", _exponential_of(np.exp2))
    install("create_exp", _exponential_of(np.exp))
    install("create_fdiv", _quotient)
    install("create_erf", _erf)


# casts


def _casts(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    original = runtime.InterpreterBuilder.cast_impl

    # Upstream fp32 -> bf16 truncates, and int, fp64 <-> bf16 convert the bit pattern as if it were a uint16.
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar.is_bf16() and not source.dtype.scalar.is_bf16():
            return _narrow(runtime, tl, source.data.astype(np.float32))
        if source.dtype.scalar.is_bf16() and not target.scalar.is_bf16():
            return runtime.TensorHandle(_wide(source).astype(runtime._get_np_dtype(target)), target.scalar)
        return original(self, source, target)

    runtime.InterpreterBuilder.cast_impl = cast_impl


# products and reductions


def _sum_in_order(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """accumulator + a @ b as a GPU's ordinary units sum it: one fused multiply-add after the other, whatever the tile. BLAS
    rounds otherwise at a tile's edges, so that the logits of a forward and of a backward with other tiles would differ."""
    terms = np.moveaxis(a, -1, 0)[..., None].astype(np.float64) * np.moveaxis(b, -2, 0)[..., None, :]
    wide, narrow = accumulator.astype(np.float64), np.empty(accumulator.shape, np.float32)
    for term in terms:
        wide += term
        narrow[...] = wide
        wide[...] = narrow
    return narrow


def _reductions(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    dot, tf32 = runtime.InterpreterBuilder.create_dot, runtime._ir.INPUT_PRECISION.TF32

    # Upstream multiplies bf16's bit patterns as integers, and keeps all bits of fp32 where the tensor core has TF32.
    def create_dot(self: Any, lhs: Any, rhs: Any, accumulator: Any, input_precision: Any, *rest: Any) -> Any:
        if _dots is not None:
            _dots.append((*accumulator.data.shape[-2:], lhs.data.shape[-1]))
        if lhs.dtype.scalar.is_bf16():
            product = np.matmul(_wide(lhs), _wide(rhs)) + accumulator.data
        elif _options.tf32 and input_precision == tf32 and lhs.dtype.scalar.is_fp32():
            product = np.matmul(truncate_to_tf32(lhs.data), truncate_to_tf32(rhs.data)) + accumulator.data
        elif lhs.dtype.scalar.is_fp32() and accumulator.data.dtype == np.float32:
            product = _sum_in_order(lhs.data, rhs.data, accumulator.data)
        else:
            return dot(self, lhs, rhs, accumulator, input_precision, *rest)
        return runtime.TensorHandle(product, accumulator.dtype.scalar)

    runtime.InterpreterBuilder.create_dot = create_dot

    interface, reduce = runtime.ReduceScanOpInterface, runtime.ReduceScanOpInterface.apply

    # Upstream reduces and scans bf16's bit patterns as integers. Here in fp32 with one rounding at the end.
    def apply(self: Any, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        cast = runtime.interpreter_semantic.cast
        results = reduce(self, tuple(cast(t, tl.float32) if t.dtype.is_bf16() else t for t in inputs))
        return tuple(
            cast(result, tl.bfloat16) if source.dtype.is_bf16() and result.dtype.is_fp32() else result
            for result, source in zip(results, inputs, strict=False)
        )

    interface.apply = apply


# libdevice, which upstream refuses

LIBDEVICE: dict[str, Callable] = {  # what triton.language.math lacks, __nv_<name> and __nv_<name>f
    "fast_divide": np.divide,
    "fast_exp": np.exp,
    "fast_tanh": np.tanh,
    "normcdf": _torch_function(torch.special.ndtr),
    "tanh": np.tanh,
}


def _libdevice(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    from triton.language.extra import libdevice as generic
    from triton.language.extra.cuda import libdevice as cuda

    def create_extern_elementwise(self: Any, library: str, path: str, symbol: str, args: list, result: Any, _: Any) -> Any:
        name = symbol.removeprefix("__nv_")
        function = LIBDEVICE.get(name) or LIBDEVICE.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"tests/interpreter.py: add {symbol} to LIBDEVICE")
        values = function(*(argument.data for argument in args))
        return runtime.TensorHandle(values.astype(runtime._get_np_dtype(result)), result.scalar)

    runtime.InterpreterBuilder.create_extern_elementwise = create_extern_elementwise
    # triton.language.extra.libdevice is a table of stubs that the compiler maps to the target's module.
    for name, member in vars(cuda).items():
        if tl.core.is_builtin(member):
            setattr(generic, name, member)
    for module in (generic, cuda):
        runtime._patch_builtin(module, runtime.interpreter_builder, runtime._LangPatchScope())


# patch once


def _language(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    # Upstream patches triton.language again at every launch and every nested @triton.jit call (milliseconds each, and
    # the nested ones never undo it). Once is enough for a process that only interprets.
    runtime._patch_lang(types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    nothing_to_restore = runtime._LangPatchScope()
    runtime._patch_lang = lambda fn: nothing_to_restore
    # 3.6 calls int() on an array of one element, which numpy 2.4 refuses: tl.range over a runtime bound failed.
    tl.tensor.__index__ = lambda self: self.handle.data.item()


def _arguments(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    original = runtime._implicit_cvt

    # 3.6 takes a bool for an int and finds no type for it.
    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(runtime.TensorHandle(np.array([arg]), tl.int1), tl.int1)
        return original(arg)

    runtime._implicit_cvt = implicit_cvt


def _launches(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    executor, original = runtime.GridExecutor, runtime.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _memory
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"the interpreter takes CPU tensors, got one on {tensor.device}")
        _memory = _Memory(tensors)
        try:
            with np.errstate(all="ignore"):  # a masked-off lane may divide by zero; no GPU warns about it
                original(self, *args, **kwargs)
            if _traffic is not None:
                read, written = (sum(int(getattr(s, w).sum()) for s in _memory.spans) for w in ("loaded", "stored"))
                _traffic.launches.append((self.fn.__name__, read, written))
        finally:
            _memory = None

    executor.__call__ = call
    # Upstream rebuilds every argument on the host, by aten operators that a dispatch mode around a launch would count.
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda self, args, args_hst, kwargs, kwargs_hst: None


def _tensors(arg: Any) -> Iterator[torch.Tensor]:
    arg = getattr(arg, "base", arg)  # of a TensorDescriptor or a TensorWrapper
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from _tensors(item)


# bounds and races


class _Span:
    """A stretch of memory that the launch's tensors share, with one entry per byte.

    Races are kept at the first byte of each access: a launch is taken to access each address with one width.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        length = end - start
        self.accessible = np.zeros(length, np.bool_)  # False between the rows of a strided view
        self.gapless = False
        self.writer = np.zeros(length, np.int32)  # program + 1; 0 is nobody
        self.reader = np.zeros(length, np.int32)  # program + 1; -1 is more than one
        self.loaded = np.zeros(length, np.bool_)
        self.stored = np.zeros(length, np.bool_)

    def enter(self, kind: str, offsets: np.ndarray, program: int) -> None:
        """RuntimeError if another program's access makes the outcome depend on the order of programs."""
        writer, reader = self.writer[offsets], self.reader[offsets]
        others = writer[(writer != 0) & (writer != program)]
        if others.size:
            raise RuntimeError(f"race: program {others[0] - 1} stores there too")
        if kind == "load":
            self.reader[offsets] = np.where((reader == 0) | (reader == program), program, -1)
        elif ((reader != 0) & (reader != program)).any():
            raise RuntimeError("race: another program loads from there")
        else:
            self.writer[offsets] = program


class _Memory:
    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        tensors = sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr)
        extents: list[list[int]] = []
        for t in tensors:
            start = t.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            end = start + (1 + last) * t.element_size()
            if extents and start < extents[-1][1]:  # views of one storage, e.g. q, k and v of a packed qkv
                extents[-1][1] = max(end, extents[-1][1])
            else:
                extents.append([start, end])
        self.spans = [_Span(start, end) for start, end in extents]
        self.starts = [span.start for span in self.spans]
        for t in tensors:
            span, size = self.spans[bisect.bisect(self.starts, t.data_ptr()) - 1], t.element_size()
            elements = span.accessible[t.data_ptr() - span.start :]
            strides = (*(stride * size for stride in t.stride()), 1)
            np.lib.stride_tricks.as_strided(elements, (*t.shape, size), strides)[...] = True
        for span in self.spans:
            span.gapless = bool(span.accessible.all())

    def locate(self, addresses: np.ndarray, size: int) -> Iterator[tuple[_Span, np.ndarray]]:
        """The spans that hold these accesses, with their offsets. IndexError if one lies in no tensor."""
        found, low, high = 0, int(addresses.min()), int(addresses.max())
        for span in self.spans[max(0, bisect.bisect(self.starts, low) - 1) : bisect.bisect(self.starts, high)]:
            offsets = (addresses - np.uint64(span.start)).view(np.int64)  # negative below the span
            if low < span.start or high > span.end - size:
                offsets = offsets[(offsets >= 0) & (offsets <= span.end - span.start - size)]
            if not span.gapless:
                offsets = offsets[span.accessible[offsets]]
            found += offsets.size
            yield span, offsets
        if found < addresses.size and _options.bounds:
            raise IndexError(f"{addresses.size - found} of {addresses.size} active lanes out of bounds")

    def access(self, kind: str, pointers: Any, mask: np.ndarray, grid_index: tuple, grid: tuple) -> None:
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        program = 1 + grid_index[0] + grid[0] * (grid_index[1] + grid[1] * grid_index[2])
        try:
            for span, offsets in self.locate(addresses, size):
                if _options.races:
                    span.enter(kind, offsets, program)
                if _traffic is not None:
                    for byte in range(size):
                        if kind == "load":
                            span.loaded[offsets + byte] |= ~span.stored[offsets + byte]
                        else:
                            span.stored[offsets + byte] = True
        except (IndexError, RuntimeError) as error:
            raise type(error)(f"{kind} in program {program - 1} {grid_index} of {grid}: {error}") from None


def _accesses(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    builder = runtime.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(self: Any, kind: str, pointers: Any, mask: Any) -> Any:
        if not isinstance(mask, runtime.TensorHandle):  # 3.6 passes a descriptor's mask as a bare array
            mask = runtime.TensorHandle(mask, tl.int1)
        if _memory is not None and (_options.bounds or _options.races or _traffic is not None):
            _memory.access(kind, pointers, mask.data, self.grid_idx, self.grid_dim)
        return mask

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, pointers, check(self, "load", pointers, mask), other, *args, **kwargs)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return store(self, pointers, value, check(self, "store", pointers, mask), *args, **kwargs)

    def no_atomics(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no atomics: results are bitwise reproducible from run to run")

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_atomic_rmw = builder.create_atomic_cas = no_atomics


# program order


@functools.lru_cache
def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def _order(runtime: types.ModuleType, tl: types.ModuleType) -> None:
    # Upstream always runs programs in ascending order, so a kernel that relies on it passes.
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        width, height, depth = self.grid_dim
        index = x + width * (y + height * z)
        if _options.order == "reverse":
            index = width * height * depth - 1 - index
        elif _options.order == "shuffle":
            index = int(_shuffled(width * height * depth)[index])
        self.grid_idx = (index % width, index // width % height, index // (width * height))

    runtime.InterpreterBuilder.set_grid_idx = set_grid_idx
