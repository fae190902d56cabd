"""linear: the kernels of both plans against the float64 reference, GELU over every bfloat16, the operators' contract."""

import contextlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    KERNEL_TESTS,
    ON_GPU,
    assert_matches_reference,
    assert_within_budget,
    hostile_rows,
    outputs_and_gradients,
    slow_on_gpu,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import GELU, GELUTanh, LayerScale, QuickGELU
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels import _env, _select
from vitkernels.kernels import _device, _tuned, linear_bwd
from vitkernels.kernels import linear as kernels
from vitkernels.kernels._device import gpu_of
from vitkernels.ops.linear import gemm_plan, why_not

pytestmark = KERNEL_TESTS
ACTIVATIONS = {None: nn.Identity, "gelu": GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "silu": nn.SiLU}
# Plan and architecture: what runs the GEMM. On a GPU a newer chip runs the pointer kernel of an older one, not the reverse.
VARIANTS = {"cublas": ("cublas", "sm_90"), "pointer": ("triton", "sm_80"), "descriptor": ("triton", "sm_90")}
SHAPES = [((1,), 64, 48), ((197,), 80, 72), ((2, 197), 272, 96), ((3, 7), 130, 75)]  # leading, N, K; tails everywhere
EPILOGUES = list(itertools.product([False, True], repeat=3))  # LayerScale, drop path, residual


@contextlib.contextmanager
def running(variant):
    plan, arch = VARIANTS[variant]
    if ON_GPU and int(arch.removeprefix("sm_")) > _device.architecture(torch.device("cuda")):
        pytest.skip(f"this GPU is older than {arch}")
    with vk.backend("fused"), _select.planning(plan), _select.targeting(arch):
        yield


def tensors(leading, N, K, dtype, scale=True, drop=True, residual=True):
    """x, weight, bias, layer_scale, residual; and drop path, which takes no gradient."""
    drop = drop and len(leading) > 1
    return [
        torch.randn(*leading, K).to(dtype),
        (torch.randn(N, K) / math.sqrt(K)).to(dtype),
        torch.randn(N).to(dtype),
        (0.3 * torch.randn(N)).to(dtype) if scale else None,
        torch.randn(*leading, N).to(dtype) if residual else None,
    ], drop_path(leading).to(dtype) if drop else None


def drop_path(leading):
    kept = torch.arange(leading[0]) % 3 != 1
    return (kept / 0.75).view(-1, *(1,) * len(leading))


def check(variant, leading, N, K, dtype, act, scale=True, drop=True, residual=True):
    inputs, dropped = tensors(leading, N, K, dtype, scale, drop, residual)

    def of(function):
        def call(x, weight, bias, layer_scale, residual):
            factor = None if dropped is None else dropped.to(x.dtype)
            return function(x, weight, bias, act=act, layer_scale=layer_scale, residual=residual, drop_path=factor)

        return call

    def kernel(*args):
        with running(variant):
            return of(vk.ops.linear)(*args)

    assert_matches_reference(kernel, of(vk.reference.linear), inputs, [torch.randn(*leading, N)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_is_within_budget(act, dtype, variant):
    check(variant, (2, 37), 80, 48, dtype, act)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("scale", "drop", "residual"), EPILOGUES)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_every_subset_of_the_epilogue_is_within_budget(act, scale, drop, residual, variant):
    check(variant, (2, 37), 80, 48, torch.bfloat16, act, scale, drop, residual)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("leading", "N", "K"), SHAPES)
def test_tails_in_every_dimension_are_within_budget(leading, N, K, variant):
    check(variant, leading, N, K, torch.bfloat16, "gelu")


# K = 1024 in 16 bits only: a GPU adds 1024 float32 products one after the other, in cuBLAS as here, which errs three times as
# much as the blocked sums of a CPU's BLAS, with which this compares.
EVERY_SHAPE = [
    (*shape, dtype) for dtype in DTYPES for shape in (*SHAPES, ((2, 197), 768, 192), ((1, 50), 2730, 1024))
    if dtype != torch.float32 or shape[2] < 1024
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("leading", "N", "K", "dtype"), EVERY_SHAPE)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("scale", "drop", "residual"), EPILOGUES)
def test_everything_with_everything_is_within_budget(scale, drop, residual, act, dtype, leading, N, K, variant):
    check(variant, leading, N, K, dtype, act, scale, drop, residual)


@slow_on_gpu
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 70),  # fewer elements can all lie where silu' is zero, and rounding decides what is left of it
    N=st.integers(8, 150),
    K=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(list(ACTIVATIONS)),
    variant=st.sampled_from(list(VARIANTS)),
)
def test_random_shapes_are_within_budget(rows, N, K, dtype, act, variant):
    assume(N * K >= 64)  # of a weight of a few elements eager's error is luck
    check(variant, (1, rows), N, K, dtype, act)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_a_norm_trains_with_the_linear(act, variant):
    inputs, _ = tensors((2, 37), 80, 48, torch.bfloat16)
    inputs = [hostile_rows(2, 37, 48, dtype=torch.bfloat16), *inputs[1:4], *(1 + 0.5 * torch.randn(2, 48)).bfloat16().unbind()]

    def of(function):
        return lambda x, w, b, s, nw, nb: function(x, w, b, act=act, layer_scale=s, norm=(nw, nb, 1e-6))

    def kernel(*args):
        with running(variant):
            return of(vk.ops.linear)(*args)

    assert_matches_reference(kernel, of(vk.reference.linear), inputs, [torch.randn(2, 37, 80)])


@pytest.mark.parametrize("subtiles", [1, 2, 4])
@pytest.mark.parametrize("variant", ["pointer", "descriptor"])
def test_many_tiles_in_groups_store_every_element(variant, subtiles, monkeypatch):
    """5 x 3 tiles, groups of 2 rows of tiles, the last of them short, several steps in K."""
    config = kernels.GemmConfig(variant, 16, 32, 16, num_warps=4, num_stages=2, group_m=2, subtiles=subtiles)
    monkeypatch.setattr(kernels, "_default", lambda arch: config)
    check(variant, (2, 37), 80, 40, torch.bfloat16, "gelu")


def test_a_float32_residual_takes_a_bfloat16_gemm_and_stays_float32():
    """The dtypes of a block under autocast: the stream, LayerScale and bias are float32, the product bfloat16."""
    inputs, _ = tensors((2, 37), 80, 48, torch.float32)
    inputs[:2] = [t.bfloat16() for t in inputs[:2]]

    def reference(x, weight, bias, layer_scale, residual):
        y = torch.nn.functional.linear(x, weight, bias.to(x.dtype))
        return residual + y * layer_scale

    for variant in VARIANTS:

        def kernel(x, weight, bias, layer_scale, residual, variant=variant):
            with running(variant), torch.autocast(x.device.type, torch.bfloat16):
                return vk.ops.linear(x, weight, bias, layer_scale=layer_scale, residual=residual)

        assert_matches_reference(kernel, reference, inputs, [torch.randn(2, 37, 80)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_autocast_computes_as_eager_does(with_norm, variant):
    x, weight, bias, _, residual = tensors((2, 9), 48, 48, torch.float32)[0]
    norm = (torch.ones(48), torch.zeros(48), 1e-6) if with_norm else None

    def call(x, weight, bias, residual):
        with torch.autocast(x.device.type, torch.bfloat16):
            return vk.ops.linear(x, weight, bias, residual=residual, norm=norm)

    def kernel(*args):
        with running(variant):
            return call(*args)

    inputs, dy = [x, weight, bias, residual], [torch.randn(2, 9, 48)]
    got, eager = outputs_and_gradients(kernel, inputs, dy), outputs_and_gradients(call, inputs, dy)
    for name, value in eager.items():
        assert got[name].dtype == value.dtype == torch.float32
        torch.testing.assert_close(got[name], value, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(variant):
    wide, weight, residual = (
        torch.randn(3, 11, 96).bfloat16(),
        torch.randn(48, 64).bfloat16(),
        torch.randn(3, 64, 10).bfloat16(),
    )
    x, weight = wide[:, 1:, :48], weight.t()
    for strided in (residual.transpose(1, 2), torch.randn(3, 10, 80).bfloat16()[..., :64]):
        with running(variant):
            got = vk.ops.linear(x, weight, act="gelu", residual=strided)
            dense = vk.ops.linear(x.contiguous(), weight.contiguous(), act="gelu", residual=strided.contiguous())
        if ON_GPU:  # cuBLAS multiplies another layout by another kernel, and so may the compiler
            oracle = vk.reference.linear(x.double(), weight.double(), act="gelu", residual=strided.double())
            eager = vk.reference.linear(x, weight, act="gelu", residual=strided)
            assert_within_budget("strided", got, eager, oracle)
            assert_within_budget("contiguous", dense, eager, oracle)
        else:
            assert torch.equal(got, dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_bitwise_reproducible_and_do_not_depend_on_the_grad_mode(variant):
    (x, weight, bias, scale, residual), dropped = tensors((2, 37), 80, 48, torch.bfloat16)

    def call(x, weight, bias, scale, residual):
        with running(variant):
            return vk.ops.linear(x, weight, bias, act="gelu", layer_scale=scale, residual=residual, drop_path=dropped)

    inputs, dy = [x, weight, bias, scale, residual], [torch.randn(2, 37, 80)]
    first, again = outputs_and_gradients(call, inputs, dy), outputs_and_gradients(call, inputs, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(call(*inputs), first["output 0"])


def test_sums_over_rows_add_up_any_number_of_partial_sums(monkeypatch):
    monkeypatch.setattr(linear_bwd, "multiprocessors", lambda device: 12)
    check("cublas", (2, 200), 80, 48, torch.float32, "gelu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 4)])
def test_no_rows_give_zero_gradients(leading, variant):
    check(variant, leading, 24, 16, torch.float32, None)
    check(variant, leading, 24, 16, torch.bfloat16, "gelu")


def test_true_float32_unless_pytorch_allows_tf32():
    import interpreter

    if not interpreter._installed:
        pytest.skip("the interpreter shows which precision was asked for")
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            with running("pointer"), interpreter.checking(tf32=True):
                errors[setting] = (vk.ops.linear(x, weight) - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 2e-5 < 1e-3 < errors["tf32"]


# The polynomial of erf.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_is_right_to_the_rounding_at_every_finite_16_bit_input(dtype):
    """Correct rounding is half a step between neighbouring numbers; the polynomial's own error is 7.7e-5 of the value."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = every[every.isfinite()].view(1, -1)
    y = torch.empty_like(z)
    tile = kernels.elementwise_tile(z.shape[1])
    kernels._linear_epilogue_kernel[(1, -(-z.shape[1] // tile["BLOCK_N"]))](
        z, None, None, None, y, 1, z.shape[1], 0, 1, ACT="gelu", EXACT=False, **tile
    )
    assert torch.isfinite(y).all()
    exact = z.double() * torch.special.ndtr(z.double())
    info = torch.finfo(dtype)
    step = 2 ** torch.floor(torch.log2(exact.abs().clamp_min(info.tiny))) * info.eps
    error = (y.double() - exact).abs()
    near = z > -6.5
    assert (error / step)[near].max() < 0.5 + 7.7e-5 * 2 / info.eps
    assert error[~near].max() < 3e-10
    eager = (torch.nn.functional.gelu(z).double() - exact).abs()
    assert error.max() <= eager.max()


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_derivatives_pass_nan_on_and_stay_finite_far_out(act, dtype):
    z = torch.tensor([[float("nan"), -60.0, -20.0, 0.0, -0.0, 20.0, 60.0, 1e4]]).to(dtype)
    dy = torch.ones_like(z)
    ops = torch.ops.vitkernels
    dz, u, _, _ = ops.linear_bwd(dy, z, act, None, None, dtype, True, True, False, False)
    for value in (dz, u):
        assert value[0, 0].isnan()
        assert value[0, 1:].isfinite().all()
    torch.testing.assert_close(u[0, 1:], z[0, 1:].clamp_min(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(dz[0, 1:].float(), torch.tensor([0, 0, 0.5, 0.5, 1, 1, 1]), atol=1e-6, rtol=0)


# What is saved for backward.


def saved_elements(call):
    """Elements of distinct storages that autograd keeps, parameters aside (they are leaves)."""
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    return sum(kept.values()), out


def test_a_linear_with_a_norm_saves_its_input_and_row_statistics_only():
    x = torch.randn(2, 40, 48, requires_grad=True)
    weight, gamma, beta = (nn.Parameter(torch.randn(*s)) for s in ((96, 48), (48,), (48,)))
    for variant in VARIANTS:
        with running(variant):
            saved, _ = saved_elements(lambda: vk.ops.linear(x, weight, norm=(gamma, beta, 1e-6)))
            assert saved == x.numel() + 2 * 80
            saved, _ = saved_elements(lambda: vk.ops.linear(x, weight, act="gelu", norm=(gamma, beta, 1e-6)))
            assert saved == x.numel() + 2 * 80 + 80 * 96


# Policy.


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """Writes the user's tuned table of the chip that stands for an architecture, or of the GPU that ``like`` is on."""
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    _tuned.forget()

    def write(arch, content, like=torch.empty(0, device="meta")):  # noqa: B008
        (tmp_path / "tuned").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps({"format": _tuned.FORMAT, "linear": content})
        (tmp_path / "tuned" / _tuned.file_name(gpu_of(like, arch))).write_text(text)
        _tuned.forget()

    yield write
    _tuned.forget()


def launched(arch, *args, plan="auto", dtype=torch.bfloat16, **kwargs):
    """The kernels that a linear on 300 rows, K = 64, N = 128 launches on ``arch``."""
    from vitkernels.kernels import _recorder

    x, weight = torch.empty(300, 64, dtype=dtype, device="meta"), torch.empty(128, 64, dtype=dtype, device="meta")
    found = []
    with _recorder.recording(lambda name, *_: found.append(name)):
        options = {"act": "gelu", **kwargs}
        kernels.launch_linear_fwd(x, weight, None, options["act"], None, None, None, dtype, "none", False, plan, arch)
    return found


def test_without_an_entry_cublas_and_the_elementwise_kernel_run(user_table):
    assert launched("sm_90") == ["_linear_epilogue_kernel"]
    assert launched("sm_90", act=None) == []
    assert launched("sm_90", plan="triton") == ["_linear_descriptor_kernel"]
    assert launched("sm_80", plan="triton") == ["_linear_pointer_kernel"]


def test_an_entry_of_the_users_table_decides(user_table):
    key = _tuned.gemm_key("act", torch.bfloat16, 128, 64, 300)
    assert key == "act/bfloat16/128/64/512"
    config = kernels.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3)
    user_table("sm_90", {key: kernels.config_entry(config)})
    assert launched("sm_90") == ["_linear_pointer_kernel"]
    user_table("sm_90", {key: kernels.config_entry(kernels._DESCRIPTOR)})
    assert launched("sm_90") == ["_linear_descriptor_kernel"]
    assert launched("sm_90", plan="cublas") == ["_linear_epilogue_kernel"]
    assert launched("sm_100") == ["_linear_epilogue_kernel"]
    assert launched("sm_90", act=None) == []
    assert launched("sm_90", dtype=torch.float16) == launched("sm_90", dtype=torch.float32) == ["_linear_epilogue_kernel"]
    user_table("sm_90", {key: {"plan": "cublas"}})
    assert launched("sm_90") == ["_linear_epilogue_kernel"]


def operators(call):
    """The GEMMs and our kernels that ``call`` runs on ``meta`` tensors of a GPU, by name."""
    from vitkernels.kernels import _recorder

    found = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket._qualified_op_name.removeprefix("aten::") in ("mm", "addmm", "_addmm_activation"):
                found.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with _recorder.recording(lambda name, *_: found.append(name)), Names():
        call()
    return found


TANH = {_tuned.gemm_key("gelu_tanh", torch.bfloat16, 128, 64, 300): {"plan": "cublaslt"}}


def on_gpu(act="gelu_tanh", plan="inference", bias=True, layer_scale=False, dtype=torch.bfloat16):
    x, weight, vector = (torch.empty(*size, dtype=dtype, device="meta") for size in ((300, 64), (128, 64), (128,)))
    vectors = (vector if bias else None, act, vector if layer_scale else None)
    return operators(lambda: kernels.launch_linear_fwd(x, weight, *vectors, None, None, dtype, "none", False, plan, "sm_90"))


def test_cublas_applies_the_tanh_form_of_gelu_for_inference_where_a_table_says_so(user_table):
    apart = ["addmm", "_linear_epilogue_kernel"]
    assert on_gpu() == apart
    user_table("sm_90", TANH)
    assert on_gpu() == ["_addmm_activation"]
    assert on_gpu(plan="auto") == on_gpu(plan="cublas") == on_gpu(act="gelu") == on_gpu(layer_scale=True) == apart
    assert on_gpu(bias=False) == ["mm", "_linear_epilogue_kernel"]
    assert on_gpu(dtype=torch.float32) == apart
    assert on_gpu(plan="triton") == ["_linear_descriptor_kernel"]


def test_the_tanh_form_of_gelu_without_an_entry_takes_that_of_other_activations(user_table):
    act = {_tuned.gemm_key("act", torch.bfloat16, 128, 64, 300): kernels.config_entry(kernels._DESCRIPTOR)}
    user_table("sm_90", act)
    assert on_gpu() == ["_linear_descriptor_kernel"]
    user_table("sm_90", act | TANH)
    assert on_gpu() == ["_addmm_activation"]
    assert on_gpu(act="gelu") == on_gpu(plan="auto") == ["_linear_descriptor_kernel"]


def test_the_plan_does_not_depend_on_the_grad_mode():
    with torch.no_grad():
        assert gemm_plan() == "auto"
    assert gemm_plan() == "auto"
    assert gemm_plan(inference=True) == "inference"
    with _select.planning("cublas"):
        assert gemm_plan(inference=True) == "cublas"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the operator of a CPU")
def test_an_entry_for_cublas_own_epilogue_changes_nothing_on_a_cpu(user_table):
    """Where that operator applies the erf form."""
    user_table("sm_90", TANH)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((300, 64), (128, 64), (128,)))
    arguments = (x, weight, bias, "gelu_tanh", None, None, None, x.dtype, "none", False)
    got, expected = (kernels.launch_linear_fwd(*arguments, plan, "sm_90")[0] for plan in ("inference", "cublas"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}', '{"format": 0, "linear": {}}'])
def test_a_table_that_cannot_be_read_is_ignored_with_a_warning(user_table, content, caplog):
    user_table("sm_90", content)
    assert launched("sm_90") == ["_linear_epilogue_kernel"]
    assert "nvidia_h100_80gb_hbm3.json is ignored" in caplog.text


def test_the_users_table_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VITKERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _env.tuned_dir() == tmp_path / "vitkernels" / "tuned"


def test_rows_that_are_no_multiple_of_16_bytes_take_the_pointer_kernel():
    from vitkernels.kernels import _recorder

    for N, K, kernel in ((128, 64, "descriptor"), (130, 64, "pointer"), (128, 65, "pointer")):
        x, weight = (torch.empty(n, K, dtype=torch.bfloat16, device="meta") for n in (300, N))
        found = []
        with _recorder.recording(lambda name, *_, found=found: found.append(name)):
            kernels.launch_linear_fwd(x, weight, None, None, None, None, None, x.dtype, "none", False, "triton", "sm_90")
        assert found == [f"_linear_{kernel}_kernel"]


def test_overlapping_rows_take_the_pointer_kernel():
    assert not kernels._describable(torch.empty(1, 64).bfloat16().expand(5, 64), torch.empty(32, 64).bfloat16())
    assert not kernels._describable(torch.empty(5, 64).bfloat16(), torch.empty(1, 64).bfloat16().expand(32, 64))
    assert not kernels._describable(torch.empty(5, 72).bfloat16()[:, 1:65], torch.empty(32, 64).bfloat16())
    assert kernels._describable(torch.empty(5, 72).bfloat16()[:, 8:], torch.empty(32, 64).bfloat16())


# The operators' contract.


def opcheck_arguments():
    """Arguments for each operator of this stem, for test_registration."""
    (x, weight, bias, scale, residual), dropped = tensors((2, 9), 32, 48, torch.float32)
    z, dy = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "linear_fwd": [
            (x, weight, bias, "gelu", scale, dropped, residual, f32, "also", False, "triton", "sm_80"),
            (x.bfloat16(), weight.bfloat16(), bias, None, None, None, residual, f32, "none", False, "triton", "sm_90"),
            (x, weight, None, "silu", None, None, None, f32, "only", False, "cublas", "sm_90"),
            (x, weight, None, None, None, None, residual, f32, "none", False, "auto", ""),
        ],
        "linear_bwd": [
            (dy, z, "gelu", scale, dropped, bf16, True, True, True, True),
            (dy, z, "gelu_tanh", None, None, f32, True, True, False, False),
            (dy, z, "quick_gelu", None, None, f32, True, False, True, False),
            (dy, z, "silu", scale, None, f32, True, False, True, True),
            (dy, None, None, None, dropped, bf16, True, False, True, False),
            (dy, None, None, None, None, f32, False, False, True, False),
            (dy, z, None, scale, None, f32, True, False, True, True),
        ],
        "layer_scale_bwd": [
            (weight + 1, bias, weight, scale, scale, True, True, True),
            ((weight + 1).bfloat16(), bias, weight.bfloat16(), None, scale, True, False, True),
            (weight + 1, bias, weight, scale.bfloat16(), scale, False, True, False),
            (weight + 1, bias[:0], weight, scale, scale, True, False, False),  # no sums: only the weight is trained
        ],
    }


def test_autograd_wiring_passes_gradcheck_in_float64(no_interpreter):
    """The kernels have no float64; the operators' reference does, and takes the same road through autograd."""
    from vitkernels.ops.linear import _Linear

    def leaf(*size):
        return torch.randn(*size, dtype=torch.float64, requires_grad=True, device="cpu")

    x, residual, weight = leaf(2, 3, 4), leaf(2, 3, 5), leaf(5, 4)
    bias, scale, norm_weight, norm_bias = leaf(5), leaf(5), leaf(4), leaf(4)
    dropped = torch.tensor([0.0, 2.0], dtype=torch.float64, device="cpu").view(2, 1, 1)
    for act, eps, gamma in itertools.product(ACTIVATIONS, [None, 1e-5], [None, scale]):
        settings = (eps, act, torch.float64, torch.float64, True, False, "auto", "")
        norm = (norm_weight, norm_bias) if eps else (None, None)
        assert torch.autograd.gradcheck(
            lambda *a, settings=settings: _Linear.apply(*a[:6], dropped, a[6], *settings),
            (x, weight, bias, *norm, gamma, residual),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tiny_layer_scale_keeps_its_gradients(dtype):
    """gamma is 1e-5 at first: its product with a weight vanishes in float16, and what it has not scaled yet overflows."""
    inputs, _ = tensors((2, 500), 80, 48, dtype)
    inputs[0], inputs[1], inputs[2] = inputs[0] * 30, inputs[1] * 0.1, inputs[2] * 0.1
    inputs[3] = torch.full((80,), 1e-5, dtype=dtype)

    def of(function):
        return lambda x, weight, bias, scale, residual: function(x, weight, bias, layer_scale=scale, residual=residual)

    def kernel(*args):
        with running("cublas"):
            return of(vk.ops.linear)(*args)

    assert_matches_reference(kernel, of(vk.reference.linear), inputs, [100 * torch.randn(2, 500, 80).sign()])


def test_frozen_parameters_get_no_gradient():
    inputs, _ = tensors((2, 9), 32, 48, torch.float32)
    for trained, dtype in itertools.product(range(5), DTYPES):
        leaves = [t.to(dtype, copy=True).requires_grad_(i == trained) for i, t in enumerate(inputs)]
        with running("cublas"):
            vk.ops.linear(*leaves[:3], layer_scale=leaves[3], residual=leaves[4]).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == trained for i in range(5)]


def test_a_kernel_runs_under_compile_fullgraph_with_dynamic_shapes():
    weight, bias, scale = torch.randn(32, 48), torch.randn(32), torch.randn(32)

    def function(x, residual):
        return vk.ops.linear(x, weight, bias, act="gelu", layer_scale=scale, residual=residual, norm=(None, None, 1e-6))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with vk.backend("fused"):
        for rows in (3, 5):
            inputs, dy = [torch.randn(2, rows, 48), torch.randn(2, rows, 32)], [torch.ones(2, rows, 32)]
            want, got = outputs_and_gradients(function, inputs, dy), outputs_and_gradients(compiled, inputs, dy)
            assert all(torch.equal(want[name], got[name]) for name in want)


# The reference.


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_linear_is_bitwise_timms_modules(act, with_norm, with_scale, with_residual):
    with torch.device("cpu"):
        layer, norm, scale = nn.Linear(24, 40), nn.LayerNorm(24, eps=1e-6), LayerScale(40, 0.3)
        nn.init.normal_(norm.weight)
        x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    expected = ACTIVATIONS[act]()(layer(norm(x) if with_norm else x))
    expected = scale(expected) if with_scale else expected
    expected = residual + expected if with_residual else expected
    got = vk.ops.linear(
        x,
        layer.weight,
        layer.bias,
        act=act,
        norm=(norm.weight, norm.bias, norm.eps) if with_norm else None,
        layer_scale=scale.gamma if with_scale else None,
        residual=residual if with_residual else None,
    )
    assert torch.equal(got, expected)


def test_gradcheck_in_float64():
    f64 = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias, scale = torch.randn(3, 4, **f64), torch.randn(5, 4, **f64), torch.randn(5, **f64), torch.randn(5, **f64)
    residual, norm_weight, norm_bias = torch.randn(3, 5, **f64), torch.randn(4, **f64), torch.randn(4, **f64)

    def call(x, weight, bias, scale, residual, norm_weight, norm_bias):
        norm = (norm_weight, norm_bias, 1e-5)
        return vk.ops.linear(x, weight, bias, act="gelu", layer_scale=scale, residual=residual, norm=norm)

    assert torch.autograd.gradcheck(call, (x, weight, bias, scale, residual, norm_weight, norm_bias))


def test_autocast_leaves_a_float32_residual_in_float32():
    x, weight, residual = torch.randn(3, 8), torch.randn(8, 8), torch.randn(3, 8)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert vk.ops.linear(x, weight).dtype == torch.bfloat16
        assert vk.ops.linear(x, weight, residual=residual).dtype == torch.float32


# Choice of backend and wrong input.


def test_auto_on_a_cpu_is_bitwise_eager_pytorch():
    x, weight = torch.randn(3, 8, device="cpu"), torch.randn(4, 8, device="cpu")
    assert torch.equal(vk.ops.linear(x, weight, act="gelu"), nn.functional.gelu(nn.functional.linear(x, weight)))


def test_fused_on_a_cpu_without_the_interpreter_raises_with_the_reason(no_interpreter):
    with vk.backend("fused"), pytest.raises(RuntimeError, match="linear cannot run its kernel: kernels run on CUDA tensors"):
        vk.ops.linear(torch.zeros(2, 8, device="cpu"), torch.zeros(4, 8, device="cpu"))


def test_reasons_name_what_is_unsupported():
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    assert why_not(x, weight) == []
    assert "float64" in " ".join(why_not(x.double(), weight.double()))
    assert "x is torch.float32, its weight torch.bfloat16" in " ".join(why_not(x, weight.bfloat16()))
    assert "no elements" in " ".join(why_not(x, weight[:0]))
    assert "1 to 8192 channels, got 8193" in " ".join(why_not(torch.zeros(1, 8193), torch.zeros(1, 8193), norm=True))
    assert "different devices" in " ".join(why_not(x, weight, torch.zeros(4, device="meta")))


X, W, V = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.linear(X, W.T), ValueError, r"weight must have shape \(N, 8\), got \(8, 4\)"),
        (lambda: vk.ops.linear(X, W, X), ValueError, r"bias must have shape \(4\), got \(2, 8\)"),
        (lambda: vk.ops.linear(X, W, act="relu"), ValueError, "act must be one of None, 'gelu', .*got 'relu'"),
        (lambda: vk.ops.linear(X, W, act=np.array(["gelu", "silu"])), ValueError, "act must be one of .*got array"),
        (lambda: vk.ops.linear(X, W, act=["gelu"]), ValueError, r"act must be one of .*got \['gelu'\]"),
        (lambda: vk.ops.linear(X, W, act=torch.zeros(2)), ValueError, "act must be one of .*got tensor"),
        (lambda: vk.ops.linear(X, W, layer_scale=V[:2]), ValueError, "layer_scale must have shape"),
        (lambda: vk.ops.linear(X, W, residual=X), ValueError, r"residual must have shape \(2, 4\), got \(2, 8\)"),
        (lambda: vk.ops.linear(X, W, norm=(None, None)), ValueError, r"norm must be \(weight, bias, eps\)"),
        (lambda: vk.ops.linear(X, W, norm=1e-6), TypeError, r"norm must be \(weight, bias, eps\), got float"),
        (lambda: vk.ops.linear(X, W, norm=torch.nn.LayerNorm(8)), TypeError, r"norm must be .*, got LayerNorm"),
        (lambda: vk.ops.linear(X, W, norm=(None, None, None)), TypeError, "norm's eps must be a number, got NoneType"),
        (lambda: vk.ops.linear(X, W, norm=(1e-6, None, None)), TypeError, "norm's weight must be a Tensor, got float"),
        (lambda: vk.ops.linear(X, W, V.half()), TypeError, "bias must be of dtype float32, got float16"),
        (lambda: vk.ops.linear(X, W, norm=(V, None, 1e-6)), ValueError, r"weight must have shape \(8\), got \(4,\)"),
        (lambda: vk.ops.linear(X, W, drop_path=V), ValueError, r"drop_path must have shape \(2, 1\), got \(4,\)"),
        (lambda: vk.ops.linear(X[0], W, drop_path=V), ValueError, "drop_path needs an x of at least two dimensions"),
        (lambda: vk.ops.linear(X, W, drop_path=1.0), TypeError, "drop_path must be a Tensor, got float"),
        (lambda: vk.ops.linear(X, W, drop_path=V[:2, None].requires_grad_()), ValueError, "drop_path .* gets no gradient"),
        (lambda: vk.ops.linear(X.long(), W), TypeError, "x must be of dtype"),
        (lambda: vk.ops.linear(X, W.half()), TypeError, "weight must be of dtype float32, got float16"),
        (lambda: vk.ops.linear(X, None), TypeError, "weight must be a Tensor, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
