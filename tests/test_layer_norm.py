"""layer_norm and add_layer_norm: the kernels against the float64 reference, the operators' contract, their autograd."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    KERNEL_TESTS,
    ON_GPU,
    SPREADS,
    assert_matches_reference,
    assert_within_budget,
    flat_rows,
    hostile_rows,
    outputs_and_gradients,
    slow_on_gpu,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels.ops.layer_norm import MAX_D, why_not

WIDTHS = (1, 7, 192, 384, 768, 1000, 1280, 8192)
fused = vk.backend("fused")
pytestmark = KERNEL_TESTS


def parameters(width, dtype=torch.float32):
    return [(1 + 0.5 * torch.randn(width)).to(dtype), torch.randn(width).to(dtype)]


def kernel_layer_norm(x, weight, bias):
    with vk.backend("fused"):
        return vk.ops.layer_norm(x, weight, bias)


def kernel_add_layer_norm(x, residual, weight, bias, layer_scale):
    with vk.backend("fused"):
        return vk.ops.add_layer_norm(x, residual, weight, bias, layer_scale=layer_scale)


def reference_add_layer_norm(x, residual, weight, bias, layer_scale):
    return vk.reference.add_layer_norm(x, residual, weight, bias, layer_scale=layer_scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_is_within_budget_on_a_gpu_at_full_size(width, dtype):
    check_layer_norm((8, 1370), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_is_within_budget(width, dtype):
    check_layer_norm((2, 19), width, dtype)


def check_layer_norm(leading, width, dtype):
    x = hostile_rows(*leading, width, dtype=dtype)
    dy = torch.randn(*leading, width)
    assert_matches_reference(kernel_layer_norm, vk.reference.layer_norm, [x, *parameters(width, dtype)], [dy])


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layer_scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm_is_within_budget(width, dtype, scaled):
    x, residual = torch.randn(2, 9, width).to(dtype), hostile_rows(2, 9, width, dtype=dtype)
    layer_scale = (0.3 * torch.randn(width)).to(dtype) if scaled else None
    cotangents = [torch.randn(2, 9, width) for _ in range(2)]
    assert_matches_reference(
        kernel_add_layer_norm,
        reference_add_layer_norm,
        [x, residual, *parameters(width, dtype), layer_scale],
        cotangents,
    )


# Rows that are constant or nearly so: what the mean errs by must not pass for variance, which eps = 1e-12 does not hide.

FLAT_WIDTHS = (1, 2, 48, 192, 768, 1000, 1152)
MAGNITUDES = {
    torch.float32: (1e-3, 1.0, 40000.3, 1e8, -3e38),
    torch.float16: (1e-3, 1.0, 40000.3),
    torch.bfloat16: (1e-3, 1.0, 40000.3, 1e8, -3e38),
}


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", FLAT_WIDTHS)
def test_constant_rows_give_exactly_the_bias(width, dtype, eps):
    x = torch.tensor(MAGNITUDES[dtype]).to(dtype)[:, None].repeat(1, width)
    weight, bias = parameters(width, dtype)
    tenth = torch.full((width,), 0.1).to(dtype)
    ops, expected = torch.ops.vitkernels, bias.expand_as(x)
    for y, mean, rows in (
        (*ops.layer_norm_fwd(x, weight, bias, eps, dtype)[:2], x.float()),
        (*ops.layer_norm_fwd(x, weight, bias, eps, dtype, tenth)[:2], x.float() + tenth.float()),
        (*ops.add_layer_norm_fwd(x, x / 3, weight, bias, tenth, eps, dtype, dtype)[:3:2], None),
    ):
        assert torch.equal(y, expected)
        assert rows is None or torch.equal(mean, rows[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("width", [48, 768, 1000])
def test_nearly_constant_rows_are_within_budget(width, spread, dtype):
    """To four rounding steps with an outlier: one by one, the squares of the other channels hardly count in the sum.

    PyTorch on a CPU keeps the rstd of float16 in float16, which has no 1e6.
    """
    step = 4 * torch.finfo(dtype).eps if spread.startswith("outlier") else None
    dy = (1e-3 * torch.randn(5, width)).to(dtype).float()  # dx is up to 1e6 times as large, and float16 ends at 65504
    for magnitude in MAGNITUDES[dtype][:4]:
        inputs = [flat_rows(5, width, magnitude, spread, dtype), *parameters(width, dtype)]
        for eps in (1e-6, 1e-9 if dtype == torch.float16 else 1e-12):

            def kernel(*args, eps=eps):
                with fused:
                    return vk.ops.layer_norm(*args, eps=eps)

            def reference(*args, eps=eps):
                return vk.reference.layer_norm(*args, eps=eps)

            assert_matches_reference(kernel, reference, inputs, [dy], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [17, 1000])
def test_gradients_are_within_budget_where_mean_times_rstd_is_infinite(width, dtype):
    """Constant rows of 2^121 have an rstd of 1000, and PyTorch has NaN there. The oracle, rounded, takes its place.

    It needs a power of two: of 17 times 3e36 even the float64 mean errs by 1e20, which passes for variance.
    """
    inputs, dy = [torch.full((3, width), 2.0**121, dtype=dtype), *parameters(width, dtype)], torch.randn(3, width).to(dtype)
    got = outputs_and_gradients(kernel_layer_norm, inputs, [dy])
    oracle = outputs_and_gradients(vk.reference.layer_norm, [t.double() for t in inputs], [dy])
    for name, tensor in got.items():
        assert_within_budget(name, tensor, oracle[name].to(dtype), oracle[name])


@pytest.mark.parametrize("which", ["neither", "weight only", "bias only"])
def test_weight_and_bias_are_optional(which):
    weight, bias = parameters(192)
    weight, bias = weight if which == "weight only" else None, bias if which == "bias only" else None
    assert_matches_reference(
        kernel_layer_norm, vk.reference.layer_norm, [hostile_rows(5, 192), weight, bias], [torch.randn(5, 192)]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_takes_float32_parameters(dtype):
    inputs = [hostile_rows(5, 192, dtype=dtype), *parameters(192, torch.float32)]
    assert_matches_reference(kernel_layer_norm, vk.reference.layer_norm, inputs, [torch.randn(5, 192)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_gives_pytorchs_operator_one_dtype(monkeypatch, dtype):
    """Which on a GPU takes no other; that of a CPU does."""
    x, (weight, bias) = torch.randn(3, 48).to(dtype), parameters(48)
    expected = torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-6)
    seen, stock = set(), torch.nn.functional.layer_norm

    def watched(x, shape, weight, bias, eps):
        seen.update(t.dtype for t in (x, weight, bias))
        return stock(x, shape, weight, bias, eps)

    monkeypatch.setattr("torch.nn.functional.layer_norm", watched)
    assert torch.equal(vk.reference.layer_norm(x, weight, bias), expected)
    assert seen == {torch.float32}


def test_float32_residual_takes_a_bfloat16_branch_and_keeps_the_stream_in_float32():
    """The dtypes of a block under autocast: the stream is float32, the branch bfloat16."""
    x, residual = torch.randn(4, 3, 192).bfloat16(), hostile_rows(4, 3, 192)
    inputs = [x, residual, *parameters(192), torch.randn(192)]
    cotangents = [torch.randn(4, 3, 192) for _ in range(2)]
    assert_matches_reference(kernel_add_layer_norm, reference_add_layer_norm, inputs, cotangents)
    inputs[4] = None
    assert_matches_reference(kernel_add_layer_norm, reference_add_layer_norm, inputs, cotangents)


NON_CONTIGUOUS = {
    "tokens without the prefix": lambda: hostile_rows(3, 11, 192)[:, 1:],
    "every second row": lambda: hostile_rows(8, 192)[::2],
    "heads of a packed qkv": lambda: hostile_rows(2, 5, 3, 4, 48).unbind(2)[1],
    "three levels": lambda: hostile_rows(3, 4, 5, 48)[:, 1:, 1:],
    "channel-major": lambda: hostile_rows(2, 192, 9).transpose(1, 2),
    "expanded": lambda: hostile_rows(1, 5, 192).expand(3, 5, 192),
    "expanded over the inner level": lambda: hostile_rows(3, 1, 192).expand(3, 5, 192),
    "one row": lambda: hostile_rows(192),
    "odd stride": lambda: hostile_rows(4, 193)[:, :192],
}


@pytest.mark.parametrize("make", NON_CONTIGUOUS.values(), ids=NON_CONTIGUOUS)
def test_any_strides_give_the_bits_of_the_contiguous_input(make):
    """To 16 roundings of the largest on a GPU: other strides are another compilation, whose sums may have another order."""
    x = make()
    weight, bias = parameters(x.shape[-1])
    layer_scale, dy, dstream = torch.randn(x.shape[-1]), torch.randn(x.shape), torch.randn(x.shape)
    for inputs, call, cotangents in (
        ([weight, bias], lambda x, w, b: kernel_layer_norm(x, w, b), [dy]),
        ([weight, bias, layer_scale], lambda x, w, b, g: kernel_add_layer_norm(x, x, w, b, g), [dy, dstream]),
    ):
        strided = outputs_and_gradients(call, [x, *inputs], cotangents)
        dense = outputs_and_gradients(call, [x.contiguous(), *inputs], cotangents)
        for name, value in dense.items():
            atol = 16 * torch.finfo(value.dtype).eps * value.abs().max().item() if ON_GPU else 0
            torch.testing.assert_close(strided[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("shape", [(0, 192), (3, 0, 192), (1, 192), (1, 1, 1)])
def test_empty_and_single_rows(shape):
    inputs = [hostile_rows(*shape), *parameters(shape[-1])]
    assert_matches_reference(kernel_layer_norm, vk.reference.layer_norm, inputs, [torch.randn(shape)])


def test_parameter_gradients_add_up_any_number_of_partial_sums(monkeypatch):
    """As many programs as a large GPU runs: more partial sums than one step of the second kernel adds."""
    monkeypatch.setattr("vitkernels.kernels.layer_norm._num_backward_programs", lambda *_: 70)
    inputs = [hostile_rows(80, 1280), *parameters(1280)]
    assert_matches_reference(kernel_layer_norm, vk.reference.layer_norm, inputs, [torch.randn(80, 1280)])


def test_results_are_bitwise_reproducible():
    inputs, dy = [hostile_rows(50, 768), *parameters(768)], torch.randn(50, 768)
    first = outputs_and_gradients(kernel_layer_norm, inputs, [dy])
    again = outputs_and_gradients(kernel_layer_norm, inputs, [dy])
    assert all(torch.equal(first[name], again[name]) for name in first)


@slow_on_gpu
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_layer_norm_is_within_budget_at_random_shapes(rows, width, dtype, eps):
    """Of fewer than 16 channels to four rounding steps, and the same examples each time: with few numbers eager's error is a
    lucky one. In float32, random examples leave the budget of one step in 1 of 40 below 16 channels, and in 1 of 400 above.
    """
    step = 4 * torch.finfo(dtype).eps if width < 16 else None
    inputs = [hostile_rows(rows, width, dtype=dtype), *parameters(width, dtype)]

    def kernel(*args):
        with fused:
            return vk.ops.layer_norm(*args, eps=eps)

    assert_matches_reference(kernel, lambda *a: vk.reference.layer_norm(*a, eps=eps), inputs, [torch.randn(rows, width)], step)


# The operators' contract.


def opcheck_arguments():
    """Arguments for each operator of this stem, for test_registration."""
    x, weight, bias = hostile_rows(4, 48), *parameters(48)
    mean, rstd = torch.randn(4), torch.rand(4)
    dy, dstream, layer_scale = torch.randn(4, 48), torch.randn(4, 48), torch.randn(48)
    f32 = torch.float32
    return {
        "layer_norm_fwd": [
            (x, weight, bias, 1e-6, f32),
            (x[1:].bfloat16(), None, None, 1e-6, f32),
            (x.bfloat16(), weight, bias, 1e-6, torch.bfloat16, 3 * bias),
        ],
        "layer_norm_bwd": [
            (dy, x, weight, bias, mean, rstd, True, True),
            (dy, x, None, None, mean, rstd, False, False),
        ],
        "add_layer_norm_fwd": [
            (x, x + 1, weight, bias, layer_scale, 1e-6, f32, f32),
            (x.bfloat16(), x.bfloat16(), None, None, None, 1e-6, torch.bfloat16, f32),
        ],
        "add_layer_norm_bwd": [
            (dy, dstream, x, x + 1, weight, bias, layer_scale, mean, rstd, f32, f32, True, True),
            (dy, dstream, x, None, weight, None, None, mean, rstd, torch.bfloat16, f32, True, False),
            (dy, dstream, x, None, None, None, None, mean, rstd, f32, f32, False, False),
            (dy, dstream, x - 3 * bias, None, weight, bias, None, mean, rstd, f32, f32, True, True, 3 * bias),
        ],
    }


def test_autograd_wiring_passes_gradcheck_in_float64(no_interpreter):
    """The kernels have no float64; the operators' reference does, and takes the same road through autograd."""
    from vitkernels.ops.layer_norm import _AddLayerNorm, _LayerNorm

    f64 = {"dtype": torch.float64, "requires_grad": True, "device": "cpu"}
    x, residual = torch.randn(3, 5, **f64), torch.randn(3, 5, **f64)
    weight, bias, layer_scale = (torch.randn(5, **f64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *a: _LayerNorm.apply(*a, 1e-6, torch.float64), (x, weight, bias))
    for gamma in (layer_scale, None):
        assert torch.autograd.gradcheck(
            lambda *a: _AddLayerNorm.apply(*a, 1e-6, torch.float64, torch.float64), (x, residual, weight, bias, gamma)
        )


def test_frozen_parameters_get_no_gradient_and_the_input_still_does():
    x, (weight, bias) = hostile_rows(5, 48).requires_grad_(), parameters(48)
    kernel_layer_norm(x, weight, bias.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is not None


def test_double_backward_raises():
    x = hostile_rows(5, 48).requires_grad_()
    (grad,) = torch.autograd.grad(kernel_layer_norm(x, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_a_kernel_runs_under_compile_fullgraph_with_dynamic_shapes():
    def function(x, residual, weight, bias):
        y, stream = vk.ops.add_layer_norm(x, residual, weight, bias)
        return vk.ops.layer_norm(y, weight, bias) + stream

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with fused:
        for rows in (3, 5):
            inputs = [torch.randn(rows, 48), torch.randn(rows, 48), *parameters(48)]
            want = outputs_and_gradients(function, inputs, [torch.ones(rows, 48)])
            got = outputs_and_gradients(compiled, inputs, [torch.ones(rows, 48)])
            assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtype_that_eager_gives(dtype):
    x, (weight, bias) = hostile_rows(3, 48, dtype=dtype), parameters(48)
    with torch.autocast(x.device.type, torch.bfloat16):
        for call in (kernel_layer_norm, vk.ops.layer_norm):
            assert call(x, weight, bias).dtype == torch.nn.functional.layer_norm(x, (48,), weight, bias).dtype


# Choice of backend.


def test_auto_on_a_cpu_is_bitwise_eager_pytorch():
    x, weight, bias = (t.cpu() for t in (hostile_rows(5, 192), *parameters(192)))
    assert torch.equal(vk.ops.layer_norm(x, weight, bias), torch.nn.functional.layer_norm(x, (192,), weight, bias, eps=1e-6))


def test_reference_backend_is_bitwise_eager_pytorch_even_where_the_kernel_could_run():
    x, (weight, bias) = hostile_rows(5, 192), parameters(192)
    with vk.backend("reference"):
        y = vk.ops.layer_norm(x, weight, bias)
    assert torch.equal(y, torch.nn.functional.layer_norm(x, (192,), weight, bias, eps=1e-6))
    assert not torch.equal(y, kernel_layer_norm(x, weight, bias)), "the two must differ for this test to mean anything"


@pytest.mark.parametrize(("backend", "rows", "runs_kernel"), [("auto", 5461, False), ("auto", 5462, True), ("fused", 1, True)])
def test_auto_leaves_inputs_below_8_mib_to_pytorch_because_they_are_launch_bound(backend, rows, runs_kernel):
    """On a GPU; here tensors without data that are said to be on one, and the operators that run are listed."""
    x = torch.empty(rows, 768, dtype=torch.bfloat16, device="meta")
    ran = []

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    with vk._select.targeting("sm_90"), vk.backend(backend), Listing():
        vk.ops.layer_norm(x)
        vk.ops.add_layer_norm(x, x)
    assert ("vitkernels::layer_norm_fwd" in ran) == ("vitkernels::add_layer_norm_fwd" in ran) == runs_kernel
    assert ("aten::native_layer_norm" in ran) != runs_kernel


def test_fused_on_a_cpu_without_the_interpreter_raises_with_the_reason(no_interpreter):
    with fused, pytest.raises(RuntimeError, match="layer_norm cannot run its kernel: kernels run on CUDA tensors, got cpu"):
        vk.ops.layer_norm(torch.randn(2, 8, device="cpu"))


def test_reasons_name_what_is_unsupported():
    assert why_not(torch.randn(2, 8)) == []
    assert "float64" in " ".join(why_not(torch.randn(2, 8).double()))
    assert f"1 to {MAX_D} channels, got 8193" in " ".join(why_not(torch.randn(2, 8193)))
    assert "different devices" in " ".join(why_not(torch.randn(2, 8), torch.randn(8, device="meta")))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_transforms_take_the_reference(transform):
    x = torch.randn(3, 8)
    call = {
        "grad": lambda: torch.func.grad(lambda x: vk.ops.layer_norm(x).square().sum())(x),
        "vmap": lambda: torch.func.vmap(vk.ops.layer_norm)(x),
        "jvp": lambda: torch.func.jvp(vk.ops.layer_norm, (x,), (x,)),
    }[transform]
    call()
    with fused, pytest.raises(RuntimeError, match=r"torch\.func"):
        call()


# Wrong input.

X, W = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.layer_norm([1.0]), TypeError, "x must be a Tensor, got list"),
        (lambda: vk.ops.layer_norm(X.int()), TypeError, "x must be of dtype .*got int32"),
        (lambda: vk.ops.layer_norm(torch.tensor(1.0)), ValueError, "x must have at least one dimension"),
        (lambda: vk.ops.layer_norm(X, W[:7]), ValueError, r"weight must have shape \(8\), got \(7,\)"),
        (lambda: vk.ops.layer_norm(X, W, W[None]), ValueError, r"bias must have shape \(8\), got \(1, 8\)"),
        (lambda: vk.ops.layer_norm(X, W.bfloat16()), TypeError, "weight must be of dtype float32, got bfloat16"),
        (lambda: vk.ops.layer_norm(X.half(), W.bfloat16()), TypeError, "weight must be of dtype float16, float32"),
        (lambda: vk.ops.layer_norm(X.half(), W.half(), W), TypeError, "weight and bias must have one dtype"),
        (lambda: vk.ops.layer_norm(X, W, None, "1e-6"), TypeError, "eps must be a number, got str"),
        (lambda: vk.ops.layer_norm(X, W, None, 10**400), ValueError, "eps must be a number that a float can hold"),
        (lambda: vk.ops.add_layer_norm(X, X, W, None, None), TypeError, "eps must be a number, got NoneType"),
        (lambda: vk.ops.add_layer_norm(X, X[:1]), ValueError, r"residual must have shape \(2, 8\), got \(1, 8\)"),
        (lambda: vk.ops.add_layer_norm(X, None), TypeError, "residual must be a Tensor"),
        (lambda: vk.ops.add_layer_norm(X, X, layer_scale=W[:4]), ValueError, r"layer_scale must have shape \(8\)"),
        (lambda: vk.backend("fast"), ValueError, "backend must be one of auto, fused, reference, got 'fast'"),
        (
            lambda: vk.backend(np.array(["auto", "fused"])),
            ValueError,
            "backend must be one of auto, fused, reference, got array",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


EPS_OF = {
    "layer_norm": lambda x, w, eps: vk.ops.layer_norm(x, w, w, eps),
    "add_layer_norm": lambda x, w, eps: vk.ops.add_layer_norm(x, x, w, w, eps)[0],
    "linear": lambda x, w, eps: vk.ops.linear(x, torch.ones(8, 8), norm=(w, w, eps)),
    "mlp": lambda x, w, eps: vk.ops.mlp(x, w, w, torch.ones(8, 8), None, torch.ones(8, 8), None, eps=eps),
}


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    "number", [Fraction(1, 4), 1, np.float32(0.25), torch.tensor(0.25)], ids=["fraction", "int", "numpy", "0-d"]
)
@pytest.mark.parametrize("op", EPS_OF)
def test_an_eps_is_any_number(op, number, backend):
    x, w = torch.randn(2, 8), torch.ones(8)
    with vk.backend(backend):
        assert torch.equal(EPS_OF[op](x, w, number), EPS_OF[op](x, w, float(number)))
