"""mlp: the kernels of both plans against the float64 reference, what is saved, recomputation, argument checks."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import DTYPES, KERNEL_TESTS, assert_matches_reference, hostile_rows, outputs_and_gradients, slow_on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear import ACTIVATIONS, VARIANTS, drop_path, operators, running, saved_elements, user_table  # noqa: F401
from timm.layers import LayerScale, Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.kernels import _tuned
from vitkernels.kernels import linear as linear_kernels
from vitkernels.ops.mlp import projected_mlp, why_not

pytestmark = KERNEL_TESTS


def parameters(D, F, dtype=torch.float32):
    """Of LayerNorm, fc1 and fc2, and LayerScale."""
    values = (1 + 0.5 * torch.randn(D), torch.randn(D), torch.randn(F, D) / math.sqrt(D), torch.randn(F))
    values += (torch.randn(D, F) / math.sqrt(F), torch.randn(D), 0.3 * torch.randn(D))
    return [t.to(dtype) for t in values]


def of(function, drop=None, **options):
    def call(x, *parameters):
        factor = None if drop is None else drop.to(x.dtype)
        return function(x, *parameters[:6], layer_scale=parameters[6], drop_path=factor, **options)

    return call


def kernel(variant, drop=None, **options):
    def call(*args):
        with running(variant):
            return of(vk.ops.mlp, drop, **options)(*args)

    return call


def check(variant, leading, D, F, dtype, act="gelu", drop=True, without=(), **options):
    inputs = [hostile_rows(*leading, D, dtype=dtype), *parameters(D, F, dtype)]
    inputs = [None if i in without else t for i, t in enumerate(inputs)]
    drop = drop_path(leading) if drop else None
    dy = [torch.randn(*leading, D)]
    assert_matches_reference(kernel(variant, drop, act=act, **options), of(vk.reference.mlp, drop, act=act), inputs, dy)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_is_within_budget(act, dtype, variant):
    check(variant, (3, 37), 48, 80, dtype, act)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("without", [(1, 2), (4, 6), (7,), (1, 2, 4, 6, 7)], ids=["affine", "biases", "layer_scale", "all"])
@pytest.mark.parametrize("drop", [False, True], ids=["", "drop path"])
def test_optional_parts_can_be_missing(without, drop, variant):
    check(variant, (2, 37), 48, 80, torch.bfloat16, drop=drop, without=without)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("leading", "D", "F"), [((1, 1), 64, 256), ((1, 197), 72, 176), ((2, 197), 48, 130), ((3, 5), 25, 75)])
def test_tails_in_every_dimension_are_within_budget(leading, D, F, variant):
    check(variant, leading, D, F, torch.bfloat16)


@slow_on_gpu
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 50),
    D=st.integers(8, 100),
    F=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(list(VARIANTS)),
    recompute=st.booleans(),
)
def test_random_shapes_are_within_budget(rows, D, F, dtype, variant, recompute):
    check(variant, (2, rows), D, F, dtype, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("leading", "D", "F"), [((2, 197), 192, 768), ((1, 50), 1024, 2730)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_vit_sizes_are_within_budget(act, dtype, leading, D, F, variant):
    check(variant, leading, D, F, dtype, act)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_recompute_gives_the_bits_of_what_was_saved(act, dtype, variant):
    inputs, dy, drop = (
        [hostile_rows(2, 37, 48, dtype=dtype), *parameters(48, 80, dtype)],
        [torch.randn(2, 37, 48)],
        drop_path((2, 37)),
    )
    saved = outputs_and_gradients(kernel(variant, drop, act=act), inputs, dy)
    recomputed = outputs_and_gradients(kernel(variant, drop, act=act, recompute=True), inputs, dy)
    for name, value in saved.items():
        assert torch.equal(recomputed[name], value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_bitwise_reproducible_and_do_not_depend_on_the_grad_mode(variant):
    inputs, dy = [hostile_rows(2, 37, 48).bfloat16(), *parameters(48, 80, torch.bfloat16)], [torch.randn(2, 37, 48)]
    first, again = (outputs_and_gradients(kernel(variant), inputs, dy) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(kernel(variant)(*inputs), first["output 0"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_saves_its_input_row_statistics_and_the_pre_activation_or_not_even_that(variant):
    D, F, rows = 48, 80, 74
    x = hostile_rows(2, 37, D).requires_grad_()
    leaves = [nn.Parameter(t) for t in parameters(D, F)]
    for recompute, width in ((False, D + 2 + F), (True, D + 2)):
        saved, y = saved_elements(lambda recompute=recompute: kernel(variant, recompute=recompute)(x, *leaves))
        assert saved == rows * width
        y.sum().backward()
    with torch.no_grad():
        saved, _ = saved_elements(lambda: kernel(variant)(x, *leaves))
    assert saved == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_keeps_the_float32_stream_and_computes_as_eager_does(variant):
    inputs, dy = [torch.randn(2, 9, 48), *parameters(48, 80)], [torch.randn(2, 9, 48)]

    def under_autocast(call):
        def function(*args):
            with torch.autocast(args[0].device.type, torch.bfloat16):
                return call(*args)

        return function

    got = outputs_and_gradients(under_autocast(kernel(variant)), inputs, dy)
    eager = outputs_and_gradients(under_autocast(of(vk.reference.mlp)), inputs, dy)
    oracle = outputs_and_gradients(of(vk.reference.mlp), [t.double() for t in inputs], dy)
    for name, value in eager.items():
        assert got[name].dtype == value.dtype == torch.float32
        error, allowed = ((t.double() - oracle[name]).norm() for t in (got[name], value))
        assert error <= 2 * allowed + 2**-8 * oracle[name].norm(), name


def test_autograd_wiring_passes_gradcheck_in_float64(no_interpreter):
    from vitkernels.ops.mlp import _Mlp

    def leaves(tensors):
        return [t.double().cpu().requires_grad_() for t in tensors]

    x, *rest = leaves([torch.randn(2, 3, 4), *parameters(4, 6)])
    dropped = torch.tensor([0.0, 2.0], dtype=torch.float64, device="cpu").view(2, 1, 1)
    for act, recompute, gamma in itertools.product(ACTIVATIONS, [False, True], [None, rest[6]]):
        settings = (1e-5, act, recompute, torch.float64, True, False, "auto", "")
        assert torch.autograd.gradcheck(
            lambda *a, settings=settings: _Mlp.apply(*a, dropped, None, *settings), (x, *rest[:6], gamma)
        )


def test_each_input_alone_can_be_trained():
    inputs = [hostile_rows(2, 9, 48), *parameters(48, 80)]
    for act, trained in itertools.product(["gelu", None], range(len(inputs))):
        leaves = [t.clone().requires_grad_(i == trained) for i, t in enumerate(inputs)]
        kernel("cublas", act=act)(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == trained for i in range(len(inputs))]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_kernel_runs_under_compile_fullgraph_with_dynamic_shapes(recompute):
    p = parameters(16, 32)

    def function(x):
        return of(vk.ops.mlp, recompute=recompute)(x, *p)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with vk.backend("fused"):
        for rows in (3, 5):
            inputs, dy = [torch.randn(2, rows, 16)], [torch.ones(2, rows, 16)]
            want, got = outputs_and_gradients(function, inputs, dy), outputs_and_gradients(compiled, inputs, dy)
            assert all(torch.equal(want[name], got[name]) for name in want)


# Plan cublas: biases of fc2, and of the projection before, in fc2's product.


@pytest.fixture
def products(monkeypatch):
    """How many biases each product of fc2 took along."""
    from vitkernels.kernels import mlp as kernels

    found, original = [], kernels._add_fc2

    def add_fc2(x, u, weight, biases):
        found.append(len(biases))
        return original(x, u, weight, biases)

    monkeypatch.setattr("vitkernels._env.ADDMM_COPIES", False)  # as in PyTorch 2.15
    monkeypatch.setattr(kernels, "_add_fc2", add_fc2)
    return found


def second_half(function, act="gelu", recompute=False):
    """Of a block: of heads, x, proj's weight and bias, then LayerNorm's, fc1's and fc2's parameters."""

    def ours(heads, x, weight, bias, *parameters):
        with running("cublas"):
            return projected_mlp(heads, x, weight, bias, parameters, 1e-6, act, recompute)

    def reference(heads, x, weight, bias, *parameters):
        x = vk.reference.linear(heads, weight, bias, residual=x)
        return vk.reference.mlp(x, *parameters, eps=1e-6, act=act)

    return {"ours": ours, "reference": reference}[function]


def of_second_half(dtype, rows=37, D=48, F=56, heads=64, without=()):
    inputs = [torch.randn(2, rows, heads), hostile_rows(2, rows, D), torch.randn(D, heads) / heads**0.5, 2 * torch.randn(D)]
    inputs += parameters(D, F)[:6]
    return [None if i in without else t.to(dtype) for i, t in enumerate(inputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_biases_in_the_product_are_within_budget(act, dtype, products):
    inputs, dy = of_second_half(dtype), [torch.randn(2, 37, 48)]
    assert_matches_reference(second_half("ours", act), second_half("reference", act), inputs, dy)
    assert products == [2]


@pytest.mark.parametrize(("without", "taken"), [((3,), 1), ((9,), 1), ((3, 9), None), ((4, 5, 7), 2)])
def test_biases_may_be_missing_from_the_product(without, taken, products):
    inputs, dy = of_second_half(torch.bfloat16, without=without), [torch.randn(2, 37, 48)]
    assert_matches_reference(second_half("ours"), second_half("reference"), inputs, dy)
    assert products == ([] if taken is None else [taken])


@pytest.mark.parametrize(("rows", "D", "F"), [(28, 48, 56), (30, 25, 43), (99, 72, 197)])
def test_tails_and_the_smallest_batch_whose_biases_ride_along(rows, D, F, products):
    inputs, dy = of_second_half(torch.bfloat16, rows, D, F), [torch.randn(2, rows, D)]
    assert_matches_reference(second_half("ours"), second_half("reference"), inputs, dy)
    assert products == [2]


@pytest.mark.parametrize("why", ["rows", "dtype", "copies", "residual entry", "act entry"])
def test_biases_stay_apart_where_that_does_not_pay_and_results_are_within_budget(why, products, monkeypatch, user_table):  # noqa: F811
    dtype, rows = torch.float32 if why == "dtype" else torch.bfloat16, 27 if why == "rows" else 37
    monkeypatch.setattr("vitkernels._env.ADDMM_COPIES", why == "copies")
    inputs, dy = of_second_half(dtype, rows), [torch.randn(2, rows, 48)]
    if why.endswith("entry"):
        kind, N, K = ("residual", 48, 56) if why.startswith("residual") else ("act", 56, 48)
        config = linear_kernels.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3)
        key = _tuned.gemm_key(kind, dtype, N, K, 2 * rows)
        user_table("sm_90", {key: linear_kernels.config_entry(config)}, like=inputs[0])
        monkeypatch.setitem(VARIANTS, "cublas", ("auto", "sm_90"))
    assert_matches_reference(second_half("ours"), second_half("reference"), inputs, dy)
    assert products == []


def test_biases_stay_apart_where_cublas_applies_the_activation(products, user_table):  # noqa: F811
    """A pass over z that is saved is worth more."""
    from vitkernels.kernels.mlp import launch_mlp_fwd

    _, x, _, owed, *layers = [torch.empty_like(t, device="meta") for t in of_second_half(torch.bfloat16)]

    def forward():
        options = ("gelu_tanh", None, None, x.dtype, False, False, "inference", "sm_90")
        launch_mlp_fwd(x, owed, *layers[:2], 1e-6, *layers[2:], *options)

    assert operators(forward) == ["_layer_norm_fwd_kernel", "addmm", "_linear_epilogue_kernel", "addmm"]
    assert products == [2]
    user_table("sm_90", {_tuned.gemm_key("gelu_tanh", torch.bfloat16, 56, 48, 74): {"plan": "cublaslt"}})
    assert operators(forward) == ["_layer_norm_fwd_kernel", "_addmm_activation", "addmm", "_linear_epilogue_kernel"]
    assert products == [2]


def test_mlp_alone_takes_its_own_bias_along(products):
    inputs, dy = of_second_half(torch.bfloat16)[1:2] + of_second_half(torch.bfloat16)[4:], [torch.randn(2, 37, 48)]

    def ours(*args):
        with running("cublas"):
            return vk.ops.mlp(*args)

    assert_matches_reference(ours, vk.reference.mlp, inputs, dy)
    assert products == [1]


def test_biases_in_the_product_give_the_same_bits_in_every_mode(products):
    inputs, dy = of_second_half(torch.bfloat16), [torch.randn(2, 37, 48)]
    first, again = (outputs_and_gradients(second_half("ours"), inputs, dy) for _ in range(2))
    recomputed = outputs_and_gradients(second_half("ours", recompute=True), inputs, dy)
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], recomputed[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(second_half("ours")(*inputs), first["output 0"])
    assert products == [2] * 4


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_gradients_are_the_same_bits(variant, use_reentrant):
    inputs, dy = [torch.randn(2, 20, 24), *parameters(24, 40)], [torch.randn(2, 20, 24)]

    def plain(*args):
        return of(vk.ops.mlp)(*args)

    def checkpointed(*args):
        return checkpoint(plain, *args, use_reentrant=use_reentrant)

    with running(variant):
        expected, got = (outputs_and_gradients(function, inputs, dy) for function in (plain, checkpointed))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_biases_in_the_product_save_no_more(products):
    inputs = of_second_half(torch.bfloat16)
    inputs = [t.requires_grad_() if i < 2 else nn.Parameter(t) for i, t in enumerate(inputs)]
    for recompute, width in ((False, 64 + 48 + 4 + 56), (True, 64 + 48 + 4)):  # heads, x, statistics in float32, z
        saved, _ = saved_elements(lambda recompute=recompute: second_half("ours", recompute=recompute)(*inputs))
        assert saved <= 74 * width
    assert products == [2, 2]


def test_each_input_of_the_second_half_alone_can_be_trained(products):
    inputs = of_second_half(torch.bfloat16)
    for trained in range(len(inputs)):
        leaves = [t.clone().requires_grad_(i == trained) for i, t in enumerate(inputs)]
        second_half("ours")(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == trained for i in range(len(inputs))]


def test_an_owed_bias_passes_gradcheck_in_float64(no_interpreter):
    from vitkernels.ops.mlp import _Mlp

    tensors = [t.double().cpu().requires_grad_() for t in (torch.randn(2, 3, 4), torch.randn(4), *parameters(4, 6)[:6])]
    for act, recompute in itertools.product(ACTIVATIONS, [False, True]):
        settings = (1e-5, act, recompute, torch.float64, True, False, "auto", "")

        def call(x, owed, *p, settings=settings):
            return _Mlp.apply(x, *p, None, None, owed, *settings)

        assert torch.autograd.gradcheck(call, tensors)


def test_the_second_half_compiles_to_one_graph_with_the_owed_bias(products):
    inputs, dy = of_second_half(torch.bfloat16), [torch.randn(2, 37, 48)]

    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def graph(heads, x, weight, bias, *parameters):
        return projected_mlp(heads, x, weight, bias, parameters, 1e-6, "gelu")

    def compiled(*inputs):
        with running("cublas"):
            return graph(*inputs)

    want, got = (outputs_and_gradients(call, inputs, dy) for call in (second_half("ours"), compiled))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert products == [2, 2]


def opcheck_arguments():
    """Arguments for the operator of this stem, for test_registration."""
    norm_weight, norm_bias, *layers, scale = parameters(16, 24)
    norm = (norm_weight, norm_bias, 1e-6)
    x, dropped, f32, bf16 = torch.randn(2, 15, 16), drop_path((2, 15)), torch.float32, torch.bfloat16
    narrow = [t.bfloat16() for t in layers]
    return {
        "mlp_fwd": [
            (x, None, *norm, *layers, "gelu", scale, dropped, f32, True, False, "triton", "sm_80"),
            (x.bfloat16(), norm_bias.bfloat16(), *norm, *narrow, "gelu", None, None, bf16, True, False, "cublas", "sm_90"),
            (x.bfloat16(), norm_bias.bfloat16(), *norm, *narrow, None, None, None, bf16, False, False, "triton", "sm_80"),
            (x, None, *norm, *layers, None, None, None, f32, True, False, "auto", ""),
        ]
    }


# The reference.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_bitwise_timms_modules_forward_and_backward(bias, with_scale, recompute):
    with torch.device("cpu"):
        norm, layer, scale = nn.LayerNorm(24, eps=1e-6), Mlp(24, 48, bias=bias), LayerScale(24, 0.3)
        x = torch.randn(2, 5, 24, requires_grad=True)
    parameters = [norm.weight, norm.bias, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias]
    branch = layer(norm(x))
    expected = x + (scale(branch) if with_scale else branch)
    got = vk.ops.mlp(x, *parameters, eps=1e-6, layer_scale=scale.gamma if with_scale else None, recompute=recompute)
    assert torch.equal(got, expected)
    leaves = [x, *(p for p in parameters if p is not None)]
    dy = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert torch.equal(a, b)


def test_recompute_saves_nothing_of_width_f_on_a_cpu_either():
    with torch.device("cpu"):
        x, p = torch.randn(2, 5, 24, requires_grad=True), [nn.Parameter(t) for t in parameters(24, 96)]
    sizes = {r: saved_elements(lambda r=r: of(vk.ops.mlp, recompute=r)(x, *p))[0] for r in (False, True)}
    assert sizes[True] <= 10 * 24 < 10 * 96 < sizes[False]


def test_reference_is_the_same_function():
    with torch.device("cpu"):
        x, weight, bias = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16)
        arguments = (x, torch.randn(8), None, weight, bias, weight.T.contiguous(), None)
    assert torch.equal(vk.ops.mlp(*arguments, act="silu"), vk.reference.mlp(*arguments, act="silu"))


# Choice of backend and wrong input.


def test_fused_on_a_cpu_without_the_interpreter_raises_with_the_reason(no_interpreter):
    with torch.device("cpu"):
        arguments = (torch.zeros(2, 8), None, None, torch.zeros(16, 8), None, torch.zeros(8, 16), None)
    with vk.backend("fused"), pytest.raises(RuntimeError, match="mlp cannot run its kernel: kernels run on CUDA tensors"):
        vk.ops.mlp(*arguments)


def test_reasons_name_what_is_unsupported():
    x, fc1, fc2 = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(8, 16)
    assert why_not(x, fc1, fc2) == []
    assert "float64" in " ".join(why_not(x.double(), fc1.double(), fc2.double()))
    assert "fc1_weight is torch.float32, fc2_weight torch.bfloat16" in " ".join(why_not(x, fc1, fc2.bfloat16()))


X, FC1, FC2 = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.mlp(X, None, None, FC2, None, FC2, None), ValueError, r"fc1_weight must have shape \(F, 8\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC1, None), ValueError, r"fc2_weight must have shape \(8, 16\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, None, None), TypeError, "fc2_weight must be a Tensor"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, act="gelu "), ValueError, "act must be one of"),
        (lambda: vk.ops.mlp(X, X, None, FC1, None, FC2, None), ValueError, r"norm_weight must have shape \(8\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, act=np.zeros(2)), ValueError, "act must be one of"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, recompute="no"), TypeError, "recompute must be one of True"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, recompute=FC1), TypeError, "recompute must be one of True"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, eps=None), TypeError, "eps must be a number, got NoneType"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, X[0].half()), TypeError, "fc2_bias must be of dtype float32"),
        (lambda: vk.ops.mlp(X, None, None, FC1, X, FC2, None), ValueError, r"fc1_bias must have shape \(16\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, FC1), ValueError, r"fc2_bias must have shape \(8\)"),
        (
            lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, drop_path=X),
            ValueError,
            r"drop_path must have shape \(2, 1\)",
        ),
        (lambda: vk.ops.mlp(None, None, None, FC1, None, FC2, None), TypeError, "x must be a Tensor"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
