"""Each test shows one behaviour of the GPU that the stock interpreter lacks, in a kernel as small as the claim."""

import os
import warnings

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)
interpreter.install()

TIES = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.3895e38, float("inf"), float("-inf"), float("nan")]


def _values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# bf16


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(a, b, input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty))


def _dot(a, b, precision="ieee", dtype=torch.float32):
    out = torch.full(a.shape, float("nan"), dtype=dtype)
    _dot_kernel[(1,)](a, b, out, a.shape[0], precision)
    return out


def test_bf16_dot_is_the_fp32_dot_of_the_values():
    a, b = _values(32, 32, dtype=torch.bfloat16), _values(32, 32, dtype=torch.bfloat16, seed=1)
    torch.testing.assert_close(_dot(a, b), a.float() @ b.float())


def test_fp16_dot_accumulates_in_fp32():
    a, b = torch.ones(32, 32, dtype=torch.float16), torch.ones(32, 32, dtype=torch.float16)
    a[:, 0], b[0] = 2048, 1  # in fp16 2048 + 1 = 2048: the running sum would stay there
    _same(_dot(a, b), a.float() @ b.float())
    _same(_dot(a, b, dtype=torch.float16), (a.float() @ b.float()).half())


def test_tf32_truncates_the_inputs_only_when_asked():
    a, b = torch.eye(16), torch.full((16, 16), 1 + 2**-10 + 2**-11 + 2**-12)
    _same(_dot(a, b, "tf32"), b)
    with interpreter.checking(tf32=True):
        _same(_dot(a, b, "tf32"), torch.full_like(b, 1 + 2**-10))
        _same(_dot(a, b, "ieee"), b)
    _same(_dot(a, b, "tf32"), b)


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, flags_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x + y)
    tl.store(out_ptr + SIZE + offsets, x * y)
    tl.store(out_ptr + 2 * SIZE + offsets, x - y)
    tl.store(out_ptr + 3 * SIZE + offsets, tl.maximum(x, y))
    tl.store(out_ptr + 4 * SIZE + offsets, tl.minimum(x, y))
    tl.store(out_ptr + 5 * SIZE + offsets, -x)
    tl.store(out_ptr + 6 * SIZE + offsets, tl.abs(x))
    tl.store(out_ptr + 7 * SIZE + offsets, tl.where(x < y, x, y))
    tl.store(out_ptr + 8 * SIZE + offsets, tl.clamp(x, -0.5, 0.5))
    tl.store(flags_ptr + offsets, x < y)
    tl.store(flags_ptr + SIZE + offsets, (x >= 0.0) & (y == y))


def test_bf16_arithmetic_and_comparisons():
    x, y = _values(64, dtype=torch.bfloat16), _values(64, dtype=torch.bfloat16, seed=1)
    out, flags = torch.full((9, 64), float("nan"), dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.bool)
    _binary_kernel[(1,)](x, y, out, flags, 64)
    expected = [x + y, x * y, x - y, x.maximum(y), x.minimum(y), -x, x.abs(), x.minimum(y), x.clamp(-0.5, 0.5)]
    for actual, wanted in zip(out, expected, strict=True):
        _same(actual, wanted)
    assert torch.equal(flags, torch.stack([x < y, x >= 0]))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.fma(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)))


def test_bf16_fma():
    x, y, z = (_values(64, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    out = torch.full_like(x, float("nan"))
    _fma_kernel[(1,)](x, y, z, out, 64)
    _same(out, (x.float() * y.float() + z.float()).bfloat16())


@triton.jit
def _maximum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.maximum(x, 0.0))
    tl.store(out_ptr + SIZE + offsets, tl.minimum(x, 0.0))


def test_maximum_and_minimum_return_the_operand_that_is_a_number():
    out = torch.full((2, 2), 5.0)
    _maximum_kernel[(1,)](torch.tensor([float("nan"), 1.0]), out, 2)
    _same(out, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@triton.jit
def _constant_kernel(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), tl.full((SIZE,), 1.005859375, tl.bfloat16))


def test_bf16_constant():
    out = torch.zeros(4, dtype=torch.bfloat16)
    _constant_kernel[(1,)](out, 4)
    _same(out, torch.full((4,), 1.005859375).bfloat16())


# casts


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


def _cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, out, x.numel())
    return out


def test_fp32_to_bf16_rounds_to_nearest_even():
    x = torch.tensor(TIES)
    _same(_cast(x, torch.bfloat16), x.bfloat16())
    noise = _values(1024)
    _same(_cast(noise, torch.bfloat16), noise.bfloat16())


def test_a_nan_whose_payload_would_round_to_infinity_stays_nan():
    x = torch.from_numpy(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32))
    assert _cast(x, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("other", [torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64])
def test_casts_to_and_from_bf16(other):
    x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 2.0, 3.0, 64.0, 127.0])
    _same(_cast(x.to(other), torch.bfloat16), x.bfloat16())
    _same(_cast(x.bfloat16(), other), x.to(other))


# reductions


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out_ptr + rows, tl.sum(x, axis=1))
    tl.store(out_ptr + ROWS + rows, tl.max(x, axis=1))
    tl.store(out_ptr + 2 * ROWS + rows, tl.min(x, axis=1))
    tl.store(out_ptr + 3 * ROWS, tl.sum(x))


def test_bf16_sum_and_max():
    x = _values(8, 32, dtype=torch.bfloat16)
    out = torch.full((25,), float("nan"), dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, out, 8, 32)
    wide = x.float()
    expected = torch.cat([wide.sum(1), wide.amax(1), wide.amin(1), wide.sum()[None]]).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=0)


# mathematical functions


@triton.jit
def _functions_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.erf(x))
    tl.store(out_ptr + SIZE + offsets, tl.rsqrt(tl.abs(x)))
    tl.store(out_ptr + 2 * SIZE + offsets, libdevice.tanh(x))
    tl.store(out_ptr + 3 * SIZE + offsets, libdevice.normcdf(x))


def test_erf_rsqrt_and_libdevice():
    x = _values(256)
    out = torch.full((4, 256), float("nan"))
    _functions_kernel[(1,)](x, out, 256)
    _same(out[0], torch.erf(x))
    torch.testing.assert_close(out[1], x.abs().rsqrt())
    torch.testing.assert_close(out[2], x.tanh())
    torch.testing.assert_close(out[3], torch.special.ndtr(x))


@triton.jit
def _unknown_function_kernel(x_ptr):
    tl.store(x_ptr, libdevice.j0(tl.load(x_ptr)))


def test_an_unknown_libdevice_function_says_where_to_add_it():
    with pytest.raises(Exception, match="add __nv_j0f to LIBDEVICE"):
        _unknown_function_kernel[(1,)](torch.ones(1))


# approximations


@triton.jit
def _approximations_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.exp2(x))
    tl.store(out_ptr + SIZE + offsets, tl.exp(x))
    tl.store(out_ptr + 2 * SIZE + offsets, x / y)
    tl.store(out_ptr + 3 * SIZE + offsets, tl.erf(x))
    tl.store(out_ptr + 4 * SIZE + offsets, tl.div_rn(x, y))
    tl.store(out_ptr + 5 * SIZE + offsets, tl.sqrt_rn(tl.abs(x)))


def _approximations(x, y):
    out = torch.full((6, x.numel()), float("nan"))
    with interpreter.checking(approximate=True):
        _approximations_kernel[(1,)](x, y, out, x.numel())
    return out


def test_exponentials_quotients_and_erf_err_as_much_as_a_gpus_may():
    x, y = 3 * _values(4096), _values(4096, seed=1)
    out = _approximations(x, y)
    wide = x.double()
    exact = torch.stack([wide.exp2(), wide.exp(), wide / y.double(), wide.erf()])
    step = torch.from_numpy(np.spacing(exact.float().abs().numpy()))
    ulps = (out[:4].double() - exact).abs() / step
    assert (ulps.amax(1) <= 2).all()
    assert (ulps.amax(1) > 1.5).all(), "as large as they may be"
    assert (ulps.mean(1) > 0.5).all(), "everywhere"
    _same(out[4], x / y)
    _same(out[5], wide.abs().sqrt().float())
    _same(out, _approximations(x, y))
    _same(out.flip(1), _approximations(x.flip(0), y.flip(0)))  # the error is the operands', not the place's
    _approximations_kernel[(1,)](x, y, out, 4096)
    assert ((out[:4].double() - exact).abs() / step).mean(1).max() < 0.5, "not unless it is asked for"


def test_approximations_keep_what_a_gpu_has_exactly():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 200.0, -130.0, 127.9])
    exp2, exp, quotient, erf = _approximations(x, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, inf, 0.0, 1.0]))[:4]
    _same(exp2[:7], torch.tensor([1.0, 1.0, inf, 0.0, nan, inf, 0.0]))  # 2^-130 is subnormal: .ftz
    assert exp2[7].isfinite()
    _same(exp[:6], torch.tensor([1.0, 1.0, inf, 0.0, nan, inf]))
    _same(quotient[:7], torch.tensor([0.0, -0.0, inf, -inf, nan, 0.0, -inf]))
    _same(erf[:7], torch.tensor([0.0, -0.0, 1.0, -1.0, nan, 1.0, -1.0]))


# launches


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _runtime_arguments_kernel(out_ptr, trips, negate, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    for trip in tl.range(0, trips, num_stages=2):
        total += _double(1.0 + trip)
    if negate:
        total = -total
    tl.store(out_ptr + tl.arange(0, SIZE), total)


@pytest.mark.parametrize("negate", [False, True])
def test_runtime_bound_nested_call_and_bool_argument(negate):
    out = torch.zeros(4)
    _runtime_arguments_kernel[(1,)](out, 3, negate, 4)
    _same(out, torch.full((4,), -12.0 if negate else 12.0))


@triton.jit
def _masked_division_kernel(x_ptr, out_ptr, length, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets, mask=offsets < length, other=0.0)
    tl.store(out_ptr + offsets, 1.0 / x, mask=offsets < length)


def test_masked_off_lanes_do_not_warn():
    out = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _masked_division_kernel[(1,)](torch.ones(3), out, 3, 4)
    _same(out, torch.ones(3))


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_launch_runs_no_aten_operator():
    x, out = torch.ones(4), torch.zeros(4)
    with _Operators() as operators:
        _cast_kernel[(1,)](x, out, 4)
    assert operators.seen == []


def test_a_tensor_that_is_not_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="takes CPU tensors, got one on meta"):
        _cast_kernel[(1,)](torch.ones(4, device="meta"), torch.ones(4), 4)


def test_install_refuses_a_process_that_does_not_interpret(monkeypatch):
    interpreter.install()
    monkeypatch.setattr(interpreter, "_installed", False)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        interpreter.install()


# bounds


@triton.jit
def _copy_kernel(x_ptr, out_ptr, x_length, out_length, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets, mask=offsets < x_length, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets < out_length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_active_lane_out_of_bounds_raises(dtype):
    x, out = torch.ones(6, dtype=dtype), torch.zeros(6, dtype=dtype)
    _copy_kernel[(2,)](x, out, 6, 6, 4)
    _same(out, x)
    with pytest.raises(Exception, match=r"load in program 1 \(1, 0, 0\) .* 1 of 3 active lanes out of bounds"):
        _copy_kernel[(2,)](x, out, 7, 6, 4)
    with pytest.raises(Exception, match=r"store in program 1 .* 2 of 4 active lanes out of bounds"):
        _copy_kernel[(2,)](x, out, 6, 8, 4)


def test_the_gap_between_the_rows_of_a_view_is_out_of_bounds():
    storage = torch.zeros(4, 8)
    with pytest.raises(Exception, match=r"store in program 0 .* 4 of 8 active lanes out of bounds"):
        _copy_kernel[(1,)](torch.ones(8), storage[:, :4], 8, 8, 8)


def test_views_of_one_storage_share_their_bounds():
    storage = torch.zeros(8)
    with pytest.raises(Exception, match=r"load in program 0 .* 2 of 8 active lanes out of bounds"):
        _copy_kernel[(1,)](storage[:6], storage[1:6], 8, 5, 8)


def test_an_empty_tensor_has_no_bounds_to_be_in():
    with pytest.raises(Exception, match=r"load in program 0 .* 4 of 4 active lanes out of bounds"):
        _copy_kernel[(1,)](torch.ones(0), torch.ones(4), 4, 4, 4)


@triton.jit
def _two_tensors_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(tl.where(offsets < 2, x_ptr + offsets, y_ptr + offsets)))


def test_one_load_may_touch_two_tensors():
    x, y, out = torch.zeros(2), torch.ones(4), torch.zeros(4)
    _two_tensors_kernel[(1,)](x, y, out, 4)
    _same(out, torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_bounds_can_be_switched_off():
    storage = torch.zeros(8)
    with interpreter.checking(bounds=False):
        _copy_kernel[(1,)](torch.ones(8), storage[:4], 8, 8, 8)
    _same(storage, torch.ones(8))


@triton.jit
def _descriptor_kernel(source, target, row):
    target.store([row, 0], source.load([row, 0]) + 1)


def test_descriptors_pad_at_the_edge_and_are_checked():
    x, out = torch.ones(6, 8), torch.zeros(6, 8)
    source, target = (TensorDescriptor.from_tensor(t, [4, 8]) for t in (x, out))
    _descriptor_kernel[(1,)](source, target, 4)
    _same(out, torch.cat([torch.zeros(4, 8), torch.full((2, 8), 2.0)]))
    lying = TensorDescriptor(out[:5], [6, 8], [8, 1], [4, 8])
    with pytest.raises(Exception, match=r"store in program 0 .* 8 of 16 active lanes out of bounds"):
        _descriptor_kernel[(1,)](source, lying, 4)


# races


@triton.jit
def _shifted_copy_kernel(x_ptr, out_ptr, load_shift, store_shift, SIZE: tl.constexpr):
    start = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + (start + load_shift) % (2 * SIZE))
    tl.store(out_ptr + (start + store_shift) % (2 * SIZE), x + 1)


@triton.jit
def _same_address_kernel(out_ptr):
    tl.store(out_ptr, 1.0)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_programs_that_meet_at_one_address_race(order):
    with interpreter.checking(order=order):
        with pytest.raises(Exception, match=r"store in program .* race: program [01] stores there too"):
            _same_address_kernel[(2,)](torch.zeros(1))
        x = torch.zeros(8)
        with pytest.raises(Exception, match=r"race: (program [01] stores|another program loads)"):
            _shifted_copy_kernel[(2,)](x, x, 4, 0, 4)  # in place, each program loads the other's half
        qkv = torch.zeros(9)
        with pytest.raises(Exception, match=r"race: (program [01] stores|another program loads)"):
            _shifted_copy_kernel[(2,)](qkv, qkv[1:], 0, 0, 4)  # the same memory through two arguments


def test_programs_that_load_together_and_store_apart_do_not_race():
    x, out = torch.arange(8.0), torch.zeros(8)
    _shifted_copy_kernel[(2,)](x, x, 0, 0, 4)  # in place, each program its own half
    _same(x, torch.arange(8.0) + 1)
    _shifted_copy_kernel[(2,)](x, out, 2, 0, 4)
    _same(out, x.roll(-2) + 1)
    _copy_kernel[(2,)](x.expand(8), out, 4, 8, 4)


def test_a_store_to_what_several_programs_loaded_races():
    out = torch.zeros(4)
    with pytest.raises(Exception, match=r"store in program 2 .* race: another program loads"):
        _broadcast_then_store_kernel[(3,)](out)


@triton.jit
def _broadcast_then_store_kernel(x_ptr):
    first = tl.load(x_ptr)
    if tl.program_id(0) == 2:
        tl.store(x_ptr, first + 1)


@triton.jit
def _atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_atomics_are_refused():
    with pytest.raises(Exception, match="no atomics"):
        _atomic_kernel[(1,)](torch.zeros(1))


# program order


@triton.jit
def _last_program_wins_kernel(out_ptr):
    program = tl.program_id(0) + 2 * tl.program_id(1)
    tl.store(out_ptr + program, program)
    tl.store(out_ptr + 6, program)


def test_the_order_changes_only_what_depends_on_it():
    last = []
    for order in ("forward", "reverse", "shuffle"):
        out = torch.full((7,), -1)
        with interpreter.checking(races=False, order=order):
            _last_program_wins_kernel[(2, 3)](out)
        _same(out[:6], torch.arange(6))
        last.append(out[6].item())
    assert last[:2] == [5, 0]
    assert last[2] not in last[:2]


def test_options_are_restored_and_checked():
    with pytest.raises(ZeroDivisionError), interpreter.checking(bounds=False, races=False, order="reverse", tf32=True):
        raise ZeroDivisionError
    assert interpreter._options == interpreter.Options()
    with pytest.raises(ValueError, match="order"), interpreter.checking(order="random"):
        pass


# traffic


def test_traffic_counts_distinct_bytes_per_launch():
    x, out = torch.ones(8), torch.zeros(8)
    with interpreter.record_traffic() as traffic:
        _copy_kernel[(2,)](x, out, 6, 8, 4)
    assert (traffic.read_bytes, traffic.written_bytes) == (24, 32)
    with interpreter.record_traffic() as traffic:
        _copy_kernel[(2,)](x, out, 8, 8, 4)
        _copy_kernel[(2,)](x[:1].expand(8), out, 1, 8, 4)
    assert (traffic.read_bytes, traffic.written_bytes) == (32 + 4, 64)
