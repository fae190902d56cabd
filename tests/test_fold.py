"""``fuse(model, inference=True)``: LayerNorm and LayerScale folded into the weights, and what happens when those change."""

import contextlib
import copy
import importlib
import io
import pickle
import pydoc
import sys
import threading

import pytest
import timm
import torch
from helpers import KERNEL_TESTS, assert_within_budget, flat_rows
from test_fuse import IMAGES, SMALL, small
from test_linear import VARIANTS, user_table  # noqa: F401  a fixture
from timm.layers import create_feature_extractor
from torch import nn

import vitkernels as vk
from vitkernels import _select
from vitkernels.cli import _ledger
from vitkernels.cli._chips import CHIPS
from vitkernels.kernels import _recorder, _tuned, linear
from vitkernels.kernels import folded_linear as kernels
from vitkernels.models import FusedBlock, _fold, copies_of
from vitkernels.ops.folded_linear import fold_norm

pytestmark = KERNEL_TESTS
FUSED_PLANS = ("pointer", "descriptor")
HALF = (torch.float16, torch.bfloat16)
ON_GPU = torch.cuda.is_available()
on_a_cpu = pytest.mark.skipif(ON_GPU, reason="about modules, which behave alike on a GPU")


# The operator.


def parameters(N, K, dtype, norm_bias=True, bias=True):
    """norm_weight, norm_bias, weight, bias."""
    return (
        (1 + 0.3 * torch.randn(K)).to(dtype),
        (0.3 * torch.randn(K)).to(dtype) if norm_bias else None,
        (torch.randn(N, K) / K**0.5).to(dtype),
        torch.randn(N).to(dtype) if bias else None,
    )


def folded_and_others(x, gamma, beta, weight, bias, act, variant, eps=1e-6):
    """The folded result, the unfolded one in the same dtype and the float64 oracle."""
    plan, arch = VARIANTS[variant]
    arguments = (x, None, None, gamma, beta, eps, weight, bias, *fold_norm(gamma, beta, weight, bias), act, plan, arch)
    y = torch.ops.vitkernels.folded_linear_fwd(*arguments)
    eager = vk.reference.linear(x, weight, bias, act=act, norm=(gamma, beta, eps))
    wide = [None if t is None else t.double() for t in (x, weight, bias, gamma, beta)]
    return y, eager, vk.reference.linear(*wide[:3], act=act, norm=(*wide[3:], eps))


SHAPES = [((197,), 80, 72), ((2, 197), 272, 96), ((3, 7), 130, 75), ((1,), 64, 48)]
CASES = [*((variant, *shape) for variant in FUSED_PLANS for shape in SHAPES), ("cublas", *SHAPES[2])]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize(("variant", "leading", "N", "K"), CASES)
def test_the_operator_is_within_budget(leading, N, K, act, dtype, variant):
    x = (torch.randn(*leading, K) * torch.rand(*leading, 1) + torch.randn(*leading, 1)).to(dtype)
    y, eager, oracle = folded_and_others(x, *parameters(N, K, dtype), act, variant)
    assert_within_budget("y", y, eager, oracle)


@pytest.mark.parametrize("missing", ["norm_bias", "bias", "both"])
def test_biases_may_be_missing(missing):
    x = torch.randn(2, 9, 64).bfloat16()
    given = parameters(48, 64, x.dtype, norm_bias=missing == "bias", bias=missing == "norm_bias")
    assert_within_budget("y", *folded_and_others(x, *given, None, "pointer"))
    _, _, weight, bias = given
    assert_within_budget("y", *folded_and_others(x, None, None, weight, bias, None, "pointer"))


def hostile(rows, K, dtype):
    """Rows whose mean is 30 sigma, and whose eight outlier channels are 500."""
    x = torch.randn(rows, K) + 30.0
    x[:, :: K // 8] += 500.0 * torch.sign(torch.randn(rows, 8))
    return x.to(dtype)


@pytest.mark.parametrize("where", ["reference", *FUSED_PLANS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_hostile_rows_cost_at_most_a_tenth_of_accuracy(outliers, dtype, where, monkeypatch):
    rows, K, N = 197, 768, 256
    x = hostile(rows, K, dtype) if outliers else (torch.randn(rows, K) + 30.0).to(dtype)
    if where == "reference":
        monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    y, eager, oracle = folded_and_others(x, *parameters(N, K, dtype), None, "pointer" if where == "reference" else where)
    error, eager_error = ((t.double() - oracle).norm() for t in (y, eager))
    assert error <= 1.1 * eager_error, f"{error / oracle.norm():.2e}, unfolded {eager_error / oracle.norm():.2e}"


@pytest.mark.parametrize("where", ["reference", *FUSED_PLANS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_constant_rows_give_exactly_the_bias(eps, dtype, where, monkeypatch):
    """Although rstd, which multiplies what the product errs by, is up to 1e6."""
    if where == "reference":
        monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    x = torch.tensor([1e-3, 1.0, 100.0, 40000.3, -7.7]).to(dtype)[:, None].repeat(1, 1000)
    given = parameters(64, 1000, dtype)
    y, _, _ = folded_and_others(x, *given, None, "pointer" if where == "reference" else where, eps)
    assert torch.equal(y, fold_norm(*given).bias.to(dtype).expand_as(y))


@pytest.mark.parametrize("spread", ["one channel an ulp off", "few ulps", "outlier of 50x"])
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.bfloat16, 1.0), (torch.bfloat16, 100.0), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_nearly_constant_rows_are_within_budget(eps, dtype, magnitude, spread):
    """Of bfloat16, whatever they are; of float16, while their mean is below some thousands of their standard deviations."""
    x = flat_rows(33, 768, magnitude, spread, dtype)
    y, eager, oracle = folded_and_others(x, *parameters(64, 768, dtype), None, "pointer", eps)
    assert_within_budget("y", y, eager, oracle)


def test_colsum_is_that_of_the_rounded_product():
    gamma, beta, weight, bias = parameters(8, 64, torch.bfloat16)
    folded = fold_norm(gamma, beta, weight, bias)
    assert torch.equal(folded.weight, (weight.float() * gamma.float()).bfloat16())
    torch.testing.assert_close(folded.colsum.double(), folded.weight.double().sum(1), atol=1e-6, rtol=1e-6)
    exact = (weight.double() * gamma.double()).sum(1)
    assert not torch.allclose(folded.colsum.double(), exact, atol=1e-4, rtol=1e-4)


def opcheck_arguments():
    """Arguments for the operator of this stem, for test_registration."""
    arguments = []
    for dtype, act in ((torch.bfloat16, "gelu"), (torch.float16, None)):
        gamma, beta, weight, bias = parameters(32, 48, dtype)
        x = torch.randn(2, 9, 48).to(dtype)
        rows = (None, None) if act is None else (torch.randn(18), torch.rand(18))
        folded = fold_norm(gamma, beta, weight, bias)
        arguments.append((x, *rows, gamma, beta, 1e-6, weight, bias, *folded, act, "triton", "sm_80"))
    residual, scale = 2 + torch.randn(2, 9, 40), torch.rand(40)
    layer = residual.new_empty(2, 9, 48).normal_(), torch.randn(40, 48) / 7, torch.randn(40)
    with_statistics = [
        (*(t.to(dtype) for t in layer), gamma, residual.to(dtype), 1e-6, plan, arch)
        for dtype, gamma, (plan, arch) in (
            (torch.bfloat16, None, ("triton", "sm_90")),
            (torch.float16, scale.half(), ("triton", "sm_80")),
            (torch.bfloat16, None, ("cublas", "sm_90")),
        )
    ]
    return {"folded_linear_fwd": arguments, "linear_statistics_fwd": with_statistics}


def test_no_rows_give_no_rows():
    x = torch.randn(0, 48).bfloat16()
    y, eager, _ = folded_and_others(x, *parameters(32, 48, x.dtype), "gelu", "pointer")
    assert y.shape == eager.shape == (0, 32)


# Policy.


def launches(arch, plan="auto", act=None, dtype=torch.bfloat16):
    """The kernels of 300 rows, K = 64, N = 128."""
    x, weight, sums = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((300, 64), (128, 64), (128,)))
    found = []
    with _recorder.recording(lambda name, *_: found.append(name)):
        kernels.launch_folded_linear_fwd(x, None, None, None, None, 1e-6, weight, None, weight, sums, sums, act, plan, arch)
    return found


def test_a_measured_entry_decides_whether_to_fold(user_table):  # noqa: F811
    unfolded = ["_layer_norm_fwd_kernel", "_linear_epilogue_kernel"]
    assert launches("sm_90", act="gelu") == unfolded
    assert launches("sm_90") == unfolded[:1]
    config = linear.config_entry(linear.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3))
    user_table("sm_90", {_tuned.gemm_key("norm_act", torch.bfloat16, 128, 64, 300): config})
    assert launches("sm_90", act="gelu") == ["_row_statistics_kernel", "_linear_pointer_kernel"]
    assert launches("sm_90") == unfolded[:1]
    assert launches("sm_90", act="gelu", plan="cublas") == unfolded
    user_table("sm_90", {_tuned.gemm_key("act", torch.bfloat16, 128, 64, 300): config})
    assert launches("sm_90", act="gelu") == ["_layer_norm_fwd_kernel", "_linear_pointer_kernel"]
    assert launches("sm_90", plan="triton") == ["_row_statistics_kernel", "_linear_descriptor_kernel"]


def test_tune_measures_the_folded_gemms():
    from vitkernels.cli import tune

    keys = {case.key for case in tune._cases(["vit_base_patch16_224"], [256], "sm_90", torch.bfloat16)}
    assert {"norm_act/bfloat16/3072/768/65536", "norm/bfloat16/2304/768/65536"} <= keys


# The model.


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch):
    for stem in ("layer_norm", "linear", "mlp", "folded_linear"):
        monkeypatch.setattr(importlib.import_module(f"vitkernels.ops.{stem}"), "MIN_BYTES", 0)


def folded(**arguments):
    model = small(**arguments)
    return model, vk.fuse(copy.deepcopy(model), inference=True)


ARGUMENTS = [{}, {"init_values": 0.1}, {"qkv_bias": False, "proj_bias": False, "init_values": 0.1}, {"qk_norm": True}]


@on_a_cpu
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_on_a_cpu_float32_outputs_are_timms(arguments):
    stock, model = folded(**arguments)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), stock(IMAGES), atol=1e-5, rtol=1e-5)


@on_a_cpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS[1:3], ids=str)
def test_outputs_on_the_kernels_are_within_budget(arguments, dtype, variant):
    model = small(**arguments).to(dtype)
    images = IMAGES.to(dtype)
    with torch.no_grad():
        eager, oracle = model(images), copy.deepcopy(model).double()(images.double())
        vk.fuse(model, inference=True)
        plan, arch = VARIANTS[variant]
        with _select.planning(plan), _select.targeting(arch), vk.backend("auto"):
            got = model(images)
    assert_within_budget("logits", got, eager, oracle)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_parameters_and_state_dict_are_untouched_and_unfuse_leaves_nothing(dtype):
    model = small(init_values=0.1).to(dtype)
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    attributes = {name: {k: copy.copy(v) for k, v in d.items()} for name, d in attributes.items()}
    before = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    keys, pickled = list(model.state_dict()), len(pickle.dumps(model))
    assert vk.fuse(model, inference=True) is model
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    per_block = 4 + 6 * (dtype == torch.bfloat16) if dtype != torch.float16 else 6
    assert len(copies_of(model)) == 2 * per_block
    assert not any(copy.requires_grad for copy in copies_of(model).values())
    assert not list(model.buffers())
    vk.unfuse(model)
    assert copies_of(model) == {}
    assert len(pickle.dumps(model)) == pickled
    after = {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert {name: set(d) for name, d in after.items()} == {name: set(d) for name, d in attributes.items()}
    assert all(d["_non_persistent_buffers_set"] == set() and d["_buffers"] == {} for d in after.values())


@on_a_cpu
def test_float16_keeps_layer_scale_apart_which_would_underflow():
    model = vk.fuse(small(init_values=1e-5).half(), inference=True)
    assert {name.removeprefix("blocks.0.") for name in copies_of(model) if "blocks.0." in name} == {
        f"{layer}.{what}" for layer in ("qkv", "fc1") for what in ("weight", "colsum", "bias")
    }


@on_a_cpu
def test_layer_scale_of_another_dtype_stays_apart():
    """timm's stream takes the dtype of the promotion."""
    stock = timm.create_model("vit_tiny_patch16_224", init_values=0.1, **SMALL).eval().blocks[0].bfloat16()
    for layer in (stock.norm1, stock.norm2, stock.ls1, stock.ls2):
        layer.float()
    fused = vk.fuse(copy.deepcopy(stock), inference=True)
    x = torch.randn(2, 5, stock.norm1.weight.numel(), dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(x), fused(x)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)


def test_no_blocks_in_a_row_give_back_what_they_get():
    _, model = folded()
    model.blocks = model.blocks[:0]
    x = torch.randn(2, 5, 8)
    assert model.blocks(x) is x


def test_the_last_fuse_counts():
    _, model = folded(init_values=0.1)
    assert copies_of(model)
    assert copies_of(vk.fuse(model)) == {}
    assert copies_of(vk.fuse(model, inference=True))


@on_a_cpu
def test_a_model_in_training_mode_is_refused_and_unchanged():
    model = small().train()
    with pytest.raises(ValueError, match=r"in training mode: call model\.eval\(\) first"):
        vk.fuse(model, inference=True)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())


@on_a_cpu
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused before"])
def test_an_error_half_way_leaves_the_model_unchanged(fused, monkeypatch):
    model, made = small(init_values=0.1), []
    if fused:
        vk.fuse(model, inference=True, recompute="mlp")
    before = [(type(m), {**vars(m)}, {**m._buffers}, {*m._non_persistent_buffers_set}) for m in model.modules()]

    def second_fails(block):
        made.append(block)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no")
        return fold(block)

    fold = _fold._folded
    monkeypatch.setattr(_fold, "_folded", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        vk.fuse(model, inference=True)
    for module, (cls, attributes, held, transient) in zip(model.modules(), before, strict=True):
        assert type(module) is cls
        assert vars(module) == attributes
        assert module._buffers.keys() == held.keys()
        assert all(tensor is held[name] for name, tensor in module._buffers.items())
        assert module._non_persistent_buffers_set == transient


# When parameters change.


def uses_folded(model, dtype=torch.float32):
    """Whether the next call multiplies with folded weights: they are ruined, and the logits change."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IMAGES.to(dtype))
        for tensor in copies_of(model).values():
            tensor.add_(1.0)
        return not torch.equal(model(IMAGES.to(dtype)), before)


def assert_follows(model, stock, dtype=torch.float32):
    with torch.no_grad():
        got, expected = model(IMAGES.to(dtype)), stock(IMAGES.to(dtype))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def doubled(parameters):
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.5)


@on_a_cpu
def test_the_probe_of_these_tests_sees_whether_copies_are_used():
    _, model = folded(init_values=0.1)
    assert uses_folded(model)
    vk.fuse(model)
    assert not uses_folded(model)


@on_a_cpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_cast_folds_again_from_the_cast_parameters(dtype):
    stock, model = folded(init_values=0.1)
    assert_follows(model.to(dtype), stock.to(dtype), dtype)
    block = model.blocks[0]
    copies = copies_of(block)
    assert copies["qkv.weight"].dtype == dtype
    assert copies["qkv.colsum"].dtype == copies["qkv.bias"].dtype == torch.float32
    gamma = block.norm1.weight.float()
    assert torch.equal(copies["qkv.weight"], (block.attn.qkv.weight.float() * gamma).to(dtype))
    assert_follows(model.float(), stock.float())
    assert "qkv.weight" not in copies_of(block)


@on_a_cpu
def test_a_cast_to_the_same_dtype_keeps_the_sums_in_float32():
    model = vk.fuse(small().bfloat16(), inference=True)
    model.to(torch.bfloat16)
    assert copies_of(model)["blocks.0.qkv.colsum"].dtype == torch.float32


@on_a_cpu
def test_moving_to_another_device_takes_the_copies_along():
    _, model = folded(init_values=0.1)
    model.to("meta")
    assert {copy.device.type for copy in copies_of(model).values()} == {"meta"}
    with torch.no_grad():
        assert model(IMAGES.to("meta")).shape == (2, 5)


@on_a_cpu
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_folds_again(assign):
    stock, model = folded(init_values=0.1)
    doubled(stock.parameters())
    model.load_state_dict(copy.deepcopy(stock.state_dict()), assign=assign)
    assert model.blocks[0]._vk_folded is None, "told by the block, for compiled graphs"
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
@pytest.mark.parametrize(
    "change",
    [
        lambda block: doubled(block.norm1.parameters()),
        lambda block: doubled([block.ls2.gamma]),
        lambda block: block.attn.qkv.load_state_dict({k: 2 * v for k, v in block.attn.qkv.state_dict().items()}),
        lambda block: setattr(block.mlp.fc2, "weight", nn.Parameter(2 * block.mlp.fc2.weight.detach())),
        lambda block: setattr(block.attn.proj.weight, "data", 2 * block.attn.proj.weight.data),
    ],
    ids=["copy_", "gamma", "child's load_state_dict", "new parameter", "new data"],
)
def test_a_changed_part_of_a_block_folds_again(change):
    stock, model = folded(init_values=0.1)
    assert_follows(model, stock)
    change(stock.blocks[1])
    change(model.blocks[1])
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
def test_threads_that_call_a_changed_model_at_once_find_the_new_copies_each():
    """Six workers of a server whose weights are reloaded. They start together and are switched as often as can be."""
    stock, model = folded(init_values=0.1)
    interval, errors = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)

    def call():
        barrier.wait()
        try:
            assert_follows(model, stock)
        except BaseException as error:
            errors.append(error)

    try:
        for _ in range(20):
            doubled(stock.parameters()), doubled(model.parameters())
            for parameter, other in zip(stock.parameters(), model.parameters(), strict=True):
                parameter.data, other.data = (t / t.abs().max().clamp_min(1.0) for t in (parameter.data, other.data))
            barrier = threading.Barrier(6)
            threads = [threading.Thread(target=call) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert uses_folded(model)


@on_a_cpu
def test_weights_that_are_loaded_while_the_copies_are_made_are_not_missed(monkeypatch):
    stock, model = folded(init_values=0.1)
    doubled(stock.parameters())
    state, loaded, made = stock.state_dict(), [], _fold._folded

    def overtaken(block):
        copies = made(block)
        if not loaded:
            loaded.append(True)
            thread = threading.Thread(target=model.load_state_dict, args=(state,))
            thread.start()
            thread.join()
        return copies

    monkeypatch.setattr(_fold, "_folded", overtaken)
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        model(IMAGES)  # folds, and is overtaken
    assert loaded
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
@pytest.mark.parametrize("what", ["parameter", "data"])
def test_what_changes_twice_between_calls_folds_again_though_its_memory_is_reused(what):
    stock, model = folded(init_values=0.1)
    for factor in (2.0, 0.7) * 10:
        for network in (stock, model):
            layer = network.blocks[1].mlp.fc2
            for step in (0.5, 2 * factor):
                if what == "parameter":
                    layer.weight = nn.Parameter(step * layer.weight.detach())
                else:
                    layer.weight.data = step * layer.weight.data
        assert_follows(model, stock)
    assert uses_folded(model)


def transposed(block):
    block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.data.t())


def pruned(block):
    """Of the MLP's neurons the first three quarters."""
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    kept = fc1.out_features * 3 // 4
    fc1.weight, fc1.bias = nn.Parameter(fc1.weight.data[:kept]), nn.Parameter(fc1.bias.data[:kept])
    fc2.weight = nn.Parameter(fc2.weight.data[:, :kept])


@on_a_cpu
@pytest.mark.parametrize("change", [transposed, pruned])
def test_a_new_parameter_that_is_a_view_of_the_old_ones_memory_folds_again(change):
    stock, model = folded(init_values=0.1)
    for network in (stock, model):  # parameters that nobody has written to, as loaded from safetensors
        network.load_state_dict({name: t.clone() for name, t in network.state_dict().items()}, assign=True)
    assert_follows(model, stock)
    for network in (stock, model):
        change(network.blocks[1])
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
@pytest.mark.parametrize("path", ["ls2.gamma", "mlp.fc2.weight", "attn.proj.bias"])
def test_a_weight_that_is_a_buffer_is_followed(path):
    """As frozen weights are kept by some, out of reach of optimizers."""
    stock, model = folded(init_values=0.1)
    for network in (stock, model):
        owner, _, name = path.rpartition(".")
        layer = network.blocks[1].get_submodule(owner)
        value = getattr(layer, name).detach()
        delattr(layer, name)
        layer.register_buffer(name, value)
    assert_follows(model, stock)
    assert uses_folded(model)
    for network in (stock, model):
        network.blocks[1].get_buffer(path).mul_(1.5)
    assert_follows(model, stock)
    for network in (stock, model):
        layer = network.blocks[1].get_submodule(owner)
        layer.register_buffer(name, 0.7 * getattr(layer, name))
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
def test_a_copy_and_a_pickle_fold_again_and_hold_no_memory_of_the_original():
    stock, model = folded(init_values=0.1)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.blocks[0]._vk_folded is None
        assert_follows(copied, stock)
        assert uses_folded(copied)


@on_a_cpu
def test_a_saved_model_with_copies_loads_with_weights_only_as_timms():
    stock, model = folded(init_values=0.1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    with torch.serialization.safe_globals([pydoc.locate(name) for name in named]):
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    assert loaded.blocks[0]._vk_folded is None
    assert_follows(loaded, stock)


@on_a_cpu
@pytest.mark.parametrize("arguments", ARGUMENTS[:2], ids=str)
def test_only_a_model_that_is_fused_for_inference_asks_for_plans_that_leave_nothing_for_backward(arguments):
    plans = []

    class Plans(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "mlp_fwd":
                plans.append(args[-2])
            return func(*args, **(kwargs or {}))

    model = small(act_layer="gelu_tanh", **arguments).bfloat16()
    for options, plan in (({}, "auto"), ({"inference": True}, "inference")):
        plans.clear()
        with torch.no_grad(), vk.backend("fused"), Plans():
            vk.fuse(copy.deepcopy(model), **options)(IMAGES.bfloat16())
        assert set(plans) == {plan}


@on_a_cpu
def test_an_optimizers_step_folds_again_and_gradients_reach_the_parameters():
    stock, model = folded(init_values=0.1)
    for network in (stock, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        network(IMAGES).square().mean().backward()
        optimizer.step()
    for (name, p), q in zip(stock.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert_follows(model, stock)
    assert uses_folded(model)


@on_a_cpu
def test_train_drops_the_copies_and_eval_does_not_bring_them_back():
    stock, model = folded(init_values=0.1)
    model.eval()
    assert copies_of(model)
    model.train()
    assert copies_of(model) == {}
    assert not model.blocks[0]._vk_inference
    assert_follows(model.eval(), stock)
    assert copies_of(model) == {}


@on_a_cpu
def test_a_copy_and_a_pickle_fold_for_themselves():
    stock, model = folded(init_values=0.1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        doubled(twin.parameters())
        other = copy.deepcopy(stock)
        doubled(other.parameters())
        assert_follows(twin, other)
        assert uses_folded(twin)
    assert_follows(model, stock)


@on_a_cpu
def test_autocast_multiplies_with_the_parameters():
    """Under it the stream is float32, whose rounding to 16 bits LayerNorm has to come before."""
    _, model = folded(init_values=0.1)
    plain = vk.fuse(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IMAGES), plain(IMAGES))


@on_a_cpu
def test_hooks_still_run_timms_forward():
    stock, model = folded(init_values=0.1)
    seen = []
    handles = [block.mlp.register_forward_hook(lambda *_: seen.append(1)) for block in model.blocks]
    assert_follows(model, stock)
    assert len(seen) == 2
    model.half().float()
    for handle in handles:
        handle.remove()
    assert uses_folded(model)


@on_a_cpu
def test_functional_calls_use_the_parameters_that_they_are_given():
    stock, model = folded(init_values=0.1)
    given = {name: 1.5 * p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(stock, given, (IMAGES,))
        torch.testing.assert_close(torch.func.functional_call(model, given, (IMAGES,)), expected, atol=1e-5, rtol=1e-5)
        stacked = {name: torch.stack([p, p]) for name, p in given.items()}
        pair = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (IMAGES,)))(stacked)
    torch.testing.assert_close(pair, torch.stack([expected, expected]), atol=1e-4, rtol=1e-4)
    assert_follows(model, stock)


@on_a_cpu
def test_inference_mode_serves_and_later_gradients_do_too():
    stock, model = folded(init_values=0.1)
    doubled(stock.parameters())
    doubled(model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model(IMAGES), stock(IMAGES), atol=1e-5, rtol=1e-5)
    assert copies_of(model)
    assert not any(copy.is_inference() for copy in copies_of(model).values())
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def _written(model):
    model.blocks[0].mlp.fc2.weight.copy_(2 * model.blocks[0].mlp.fc2.weight)


def _loaded(model):
    model.blocks[1].attn.load_state_dict({name: 2 * t for name, t in model.blocks[1].attn.state_dict().items()})


def _other_layer(model):
    model.blocks[0].attn.proj = nn.Linear(*model.blocks[0].attn.proj.weight.shape)


def _loaded_whole(model):
    model.load_state_dict({name: 1.5 * t for name, t in model.state_dict().items()})


@on_a_cpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["compile", "export", "strict export"])
@pytest.mark.parametrize("change", [_written, _loaded, _other_layer, _loaded_whole])
def test_a_graph_that_is_made_after_parameters_changed_has_the_new_ones(change, how):
    model = vk.fuse(small(init_values=0.5), inference=True)  # LayerScale is folded into proj and fc2
    with torch.no_grad():
        before = model(IMAGES)
        change(model)
        if how == "compile":
            program = torch.compile(model, backend="eager", fullgraph=True)
        else:
            program = torch.export.export(model, (IMAGES,), strict=how.startswith("strict")).module()
        got = program(IMAGES)
        assert not torch.allclose(got, before, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(got, model(IMAGES), atol=1e-5, rtol=1e-5)
        if how != "compile":  # programs run on the parameters
            torch.testing.assert_close(program.double()(IMAGES.double()), got.double(), atol=1e-5, rtol=1e-5)


@on_a_cpu
def test_a_model_is_exported_while_the_copies_of_another_are_stale():
    _, other = folded()
    stock, model = folded(init_values=0.5)
    with torch.no_grad():
        other(IMAGES), model(IMAGES)
        doubled(other.parameters())
        program = torch.export.export(model, (IMAGES,)).module()
        torch.testing.assert_close(program(IMAGES), stock(IMAGES), atol=1e-5, rtol=1e-5)


@on_a_cpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_are_compiled_one_by_one_share_a_graph(dtype):
    """Dynamo allows eight for one piece of code, and a ViT has twelve blocks."""
    _, model = folded(init_values=0.1)
    model.to(dtype)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = model(IMAGES.to(dtype))
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        torch.testing.assert_close(model(IMAGES.to(dtype)), expected)
    assert len(graphs) == 1


@on_a_cpu
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True])
def test_models_of_several_widths_compile_to_one_graph_each_on_a_gpu(dynamic):
    """The sizes of copies are no more symbolic than those of parameters, which Dynamo takes as they are."""
    for width in (48, 96):
        stock, model = folded(init_values=0.1, embed_dim=width)
        stock.bfloat16(), model.bfloat16()
        images = IMAGES.bfloat16()
        with torch.no_grad(), _select.targeting("sm_90"):
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(compiled(images), stock(images), atol=0.1, rtol=0.1)


@on_a_cpu
def test_on_a_gpu_without_triton_a_folded_model_runs_on_pytorchs_operators(monkeypatch):
    """As on Windows."""
    stock, model = folded(init_values=0.1)
    stock.bfloat16(), model.bfloat16()
    monkeypatch.setattr("vitkernels._env.HAS_TRITON", False)
    monkeypatch.setitem(sys.modules, "vitkernels.kernels.folded_linear", None)
    with torch.no_grad(), _select.targeting("sm_90"):
        torch.testing.assert_close(model(IMAGES.bfloat16()), stock(IMAGES.bfloat16()), atol=0.1, rtol=0.1)


@on_a_cpu
def test_the_folded_model_compiles_to_one_graph():
    """On PyTorch's operators; test_fold_statistics.py has the graphs of ours."""
    _, model = folded(init_values=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_fx_traces_a_folded_model(dtype):
    """Its graphs run on the parameters, whose changes they see."""
    stock, model = folded(init_values=0.1)
    stock.to(dtype), model.to(dtype)
    images, tolerance = IMAGES.to(dtype), 1e-5 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        for traced in (torch.fx.symbolic_trace(model), create_feature_extractor(model, {"head": "head"})):
            names = {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
            assert {"linear", "residual_mlp"} <= names
            got = traced(images)
            got = got if isinstance(got, torch.Tensor) else got["head"]
            torch.testing.assert_close(got, stock(images), atol=tolerance, rtol=tolerance)


@on_a_cpu
def test_on_a_cpu_it_costs_no_more_calls_than_eager():
    """LayerScale's two multiplications are gone, and nothing is added."""
    stock, model = folded(init_values=0.1)
    counts = []
    for network in (stock, model):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            network(IMAGES)
        counts.append({e.key: e.count for e in profile.key_averages()})
    multiplications = [c.get("aten::mul", 0) for c in counts]
    assert multiplications[1] == multiplications[0] - 2 * SMALL["depth"]
    assert counts[1]["aten::linear"] == counts[0]["aten::linear"]


# Traffic.


def counted(plan, layer_scale=False, inference=True, **arguments):
    """Units of each launch of a block's forward."""
    return [units for units, _ in counted_with_flops(plan, layer_scale, inference, **arguments)]


def counted_with_flops(plan, layer_scale=False, inference=True, **arguments):
    """The same, and the FLOPs of each. Plan None: what the tables say."""
    batch, tokens, width = 64, 197, 768
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", depth=1, init_values=1e-5 if layer_scale else None, **arguments)
    block = vk.fuse(vit.to(torch.bfloat16).eval(), inference=inference).blocks[0]
    x = torch.empty(batch, tokens, width, dtype=torch.bfloat16, device="meta")
    with _select.planning(plan) if plan else contextlib.nullcontext():
        count = _ledger.count(block, (x,), {}, CHIPS["h200"])
    return [(o.activation_bytes / (batch * tokens * width * 2), o.flops) for o in count.forward]


def test_cublas_own_activation_saves_its_pass_and_multiplies_as_much(no_interpreter, monkeypatch, user_table):  # noqa: F811
    monkeypatch.setattr(vk._env, "ADDMM_COPIES", False)  # as in PyTorch 2.15
    user_table("sm_90", {_tuned.gemm_key("gelu_tanh", torch.bfloat16, 3072, 768, 64 * 197): {"plan": "cublaslt"}})
    apart, saved, trained = (
        counted_with_flops(plan, inference=inference, act_layer="gelu_tanh")
        for plan, inference in (("cublas", True), (None, True), (None, False))
    )
    assert [round(units) for units, _ in apart if units > 0] == [2, 4, 4, 3, 2, 5, 8, 6]
    assert [round(units) for units, _ in saved if round(units)] == [2, 4, 4, 3, 2, 5, 5, 3]
    assert trained == apart, "without fuse(inference=True) results do not depend on the grad mode"
    padding = 2 * 64 * 197 * 768 * 8  # of the biases' columns
    assert sum(flops for _, flops in apart) - padding == sum(flops for _, flops in saved)


def test_with_cublas_layer_norm_stays_and_folded_layer_scale_needs_no_pass(no_interpreter, monkeypatch):
    """cuBLAS adds into the residual stream, and biases go with the columns of the product."""
    monkeypatch.setattr(vk._env, "ADDMM_COPIES", False)  # as in PyTorch 2.15
    for arguments in ({}, {"layer_scale": True}, {"layer_scale": True, "proj_bias": False}):
        folded = counted("cublas", **arguments)
        assert [round(units) for units in folded if units > 0] == [2, 4, 4, 3, 2, 5, 8, 6]
        assert round(sum(folded)) == 34
    assert counted("cublas") == counted("cublas", inference=False)
    assert round(sum(counted("cublas", True, inference=False))) == 38


def test_where_addmm_copies_the_copies_count(no_interpreter, monkeypatch):
    monkeypatch.setattr(vk._env, "ADDMM_COPIES", True)  # as in PyTorch 2.11
    assert [round(units) for units in counted("cublas", proj_bias=False)] == [2, 4, 4, 2, 3, 2, 5, 8, 2, 6]
    assert [round(units) for units in counted("cublas")] == [2, 4, 4, 2, 3, 2, 5, 8, 5, 3]


@on_a_cpu
def test_copies_are_there_before_another_stream_can_see_them(monkeypatch):
    """Threads of a server have a stream each, and share the model."""
    model = vk.fuse(small().bfloat16().eval(), inference=True)
    block, seen = model.blocks[0], []

    class Stream:
        def synchronize(self):
            seen.append(block._vk_folded)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    before = block._vk_folded
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.Tensor, "is_cuda", True)
        on_gpu.setattr(torch.cuda, "is_initialized", lambda: True)
        after = _fold.fold(block)
    assert seen == [before]
    assert block._vk_folded is after is not before


@on_a_cpu
def test_what_a_cuda_graph_records_is_no_copy_for_other_calls(monkeypatch):
    """Nothing runs while it records: copies made then would be read before they are written."""
    model = vk.fuse(small().bfloat16().eval(), inference=True)
    block = model.blocks[0]
    before = block._vk_folded
    with torch.no_grad():
        block.norm1.weight.mul_(2)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(torch.Tensor, "is_cuda", True)
            on_gpu.setattr(torch.cuda, "is_initialized", lambda: True)
            assert _fold.current(block) is None
    assert block._vk_folded is before
