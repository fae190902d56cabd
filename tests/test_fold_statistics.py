"""Row statistics that a GEMM leaves for the LayerNorm after it: their values, and who hands them to whom."""

import copy
import importlib
import pickle

import pytest
import timm
import torch
from helpers import KERNEL_TESTS, flat_rows
from test_fold import hostile, parameters
from test_fuse import IMAGES, small
from test_linear import VARIANTS, user_table  # noqa: F401  a fixture
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import vitkernels as vk
from vitkernels import _select
from vitkernels.cli import _ledger
from vitkernels.cli._chips import CHIPS
from vitkernels.kernels import _tuned, linear
from vitkernels.kernels import folded_linear as kernels
from vitkernels.models import FusedBlock, FusedBlocks
from vitkernels.ops.folded_linear import fold_norm

pytestmark = KERNEL_TESTS
HALF = (torch.float16, torch.bfloat16)
STREAM = torch.randn(2, 17, 48).bfloat16()
EPS = 1e-6
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about modules, which behave alike on a GPU")

# The operator. What of it runs: tiles of 128 columns, in parts as the descriptor kernel stores them.
CONFIGS = {
    "pointer": linear.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=2),
    "whole": linear.GemmConfig("descriptor", 128, 128, 64, num_warps=8, num_stages=2, subtiles=1),
    "halves": linear.GemmConfig("descriptor", 128, 128, 64, num_warps=8, num_stages=2, subtiles=2),
    "quarters": linear.GemmConfig("descriptor", 128, 128, 64, num_warps=8, num_stages=2, subtiles=4),
    "cublas": None,
}


def layer(rows, N, K, residual):
    """weight, bias and layer_scale, and x."""
    dtype = residual.dtype
    weight, bias, scale = torch.randn(N, K) / K**0.5, torch.randn(N), torch.rand(N)
    return [t.to(dtype) for t in (torch.randn(rows, K), weight, bias, scale)]


def with_statistics(config, x, weight, bias, scale, residual, eps=EPS):
    """y, mean and rstd under a table that has only ``config``."""
    entry = {"plan": "cublas"} if config is None else linear.config_entry(config)
    key = _tuned.gemm_key("residual", x.dtype, *weight.shape, x.shape[0])
    with _tuned.trying("linear", key, entry):
        return torch.ops.vitkernels.linear_statistics_fwd(x, weight, bias, scale, residual, eps, "auto", "sm_90")


def assert_statistics(y, mean, rstd, eps=EPS):
    """Of y as it was written, to float32's rounding."""
    wide = y.double()
    exact, std = wide.mean(1), wide.std(1, correction=0)
    assert ((mean.double() - exact).abs() <= 2**-24 * exact.abs() + 1e-6 * std).all()
    torch.testing.assert_close(rstd.double(), (std.square() + eps).rsqrt(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("outliers", [False, True])
def test_statistics_are_those_of_what_was_written(outliers, config):
    residual = hostile(197, 384, torch.bfloat16) if outliers else (torch.randn(197, 384) + 30.0).bfloat16()
    inputs = layer(197, 384, 64, residual)
    y, mean, rstd = with_statistics(CONFIGS[config], *inputs, residual)
    assert_statistics(y, mean, rstd)
    x, weight, bias, scale = (t.double() for t in inputs)
    torch.testing.assert_close(y.double(), residual.double() + scale * (x @ weight.T + bias), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("config", [*CONFIGS, "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_constant_rows_have_an_rstd_of_zero(dtype, config, monkeypatch):
    """So that the folded product gives exactly the bias. Columns as in six and in three tiles."""
    if config == "reference":
        monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    largest = [1e37, -3e38] if dtype == torch.bfloat16 else [-65504.0]
    residual = torch.tensor([1e-3, 1.0, 1000.3, 40000.3, -7.7, *largest]).to(dtype)[:, None].repeat(1, 384)
    rows = len(residual)
    nothing = torch.zeros(rows, 64, dtype=dtype), torch.zeros(384, 64, dtype=dtype), None, None
    y, mean, rstd = with_statistics(CONFIGS.get(config), *nothing, residual, 1e-12)
    assert torch.equal(y, residual)
    assert torch.equal(mean, residual[:, 0].float())
    assert torch.equal(rstd, torch.zeros(rows))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("spread", ["one channel an ulp off", "few ulps", "outlier of 1e4x"])
def test_nearly_constant_rows_have_the_statistics_of_what_was_written(spread, config):
    for dtype in HALF:
        residual = torch.cat([flat_rows(3, 384, magnitude, spread, dtype) for magnitude in (1e-3, 1.0, 1000.3)])
        nothing = torch.zeros(9, 64, dtype=dtype), torch.zeros(384, 64, dtype=dtype), None, None
        y, mean, rstd = with_statistics(CONFIGS[config], *nothing, residual, 1e-12)
        assert torch.equal(y, residual)
        assert_statistics(y, mean, rstd, 1e-12)


@pytest.mark.parametrize("N", [64, 192, 320, 80])
def test_columns_that_do_not_fill_their_tiles_are_read_again(N, monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "_statistics", lambda *a: launched.append(1) or statistics(*a))
    residual = torch.randn(9, N).half()
    y, mean, rstd = with_statistics(CONFIGS["pointer"], *layer(9, N, 48, residual), residual)
    assert_statistics(y, mean, rstd)
    assert len(launched) == (N % 64 != 0)


statistics = kernels._statistics


def test_no_rows_have_no_statistics():
    residual = torch.randn(0, 128).half()
    y, mean, rstd = with_statistics(CONFIGS["pointer"], *layer(0, 128, 64, residual), residual)
    assert y.shape == (0, 128)
    assert mean.shape == rstd.shape == (0,)


@pytest.mark.parametrize("variant", ["reference", "pointer", "descriptor"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_hostile_rows_cost_at_most_a_tenth_of_accuracy(outliers, dtype, variant, monkeypatch):
    """A GEMM that leaves its statistics and a folded one that takes them, against LayerNorm between the same two."""
    K, N = 768, 128
    residual = hostile(197, K, dtype) if outliers else (torch.randn(197, K) + 30.0).to(dtype)
    x, weight, bias, _ = layer(197, K, 64, residual)
    gamma, beta, next_weight, next_bias = parameters(N, K, dtype)
    plan, arch = VARIANTS["pointer" if variant == "reference" else variant]
    if variant == "reference":
        monkeypatch.setattr("vitkernels._env.INTERPRETING", False)
    ops = torch.ops.vitkernels
    stream, *rows = ops.linear_statistics_fwd(x, weight, bias, None, residual, EPS, plan, arch)
    folded = fold_norm(gamma, beta, next_weight, next_bias)
    arguments = (stream, *rows, gamma, beta, EPS, next_weight, next_bias, *folded, None, plan, arch)
    y = ops.folded_linear_fwd(*arguments)
    eager = vk.reference.linear(stream, next_weight, next_bias, norm=(gamma, beta, EPS))
    wide = [t.double() for t in (stream, next_weight, next_bias, gamma, beta)]
    oracle = vk.reference.linear(*wide[:3], norm=(*wide[3:], EPS))
    error, eager_error = ((t.double() - oracle).norm() for t in (y, eager))
    assert error <= 1.1 * eager_error, f"{error / oracle.norm():.2e}, unfolded {eager_error / oracle.norm():.2e}"


# Between blocks.


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch):
    for stem in ("layer_norm", "attention", "linear", "mlp", "folded_linear"):
        monkeypatch.setattr(importlib.import_module(f"vitkernels.ops.{stem}"), "MIN_BYTES", 0)


@pytest.fixture
def on_the_plan(no_interpreter):
    """Blocks fold on a CPU, which runs the operators' references."""
    with _select.planning("triton"), _select.targeting("sm_90"):
        yield


def folded(depth=3, **arguments):
    return vk.fuse(small(depth=depth, **arguments).bfloat16(), inference=True)


def operators(model, images):
    """Those of ours that a call runs, in order, and its result."""
    found = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vitkernels":
                found.append((func._schema.name.partition("::")[2], None if len(args) < 2 else args[1] is not None))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        out = model(images)
    return found, out


def handed_over(found):
    """By folded GEMM, which are qkv and fc1 of each block: whether it was given statistics."""
    return [given for name, given in found if name == "folded_linear_fwd"]


@on_a_cpu
def test_every_norm_but_the_first_is_told_by_the_gemm_before_it(on_the_plan):
    found, _ = operators(folded(), IMAGES.bfloat16())
    assert handed_over(found) == [False, True, True, True, True, True]
    assert sum(name == "linear_statistics_fwd" for name, _ in found) == 5, "nobody asks the last block"


@on_a_cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_is_handed_over_changes_no_result(mode, on_the_plan):
    """Beyond the rounding of statistics taken twice: blocks one by one take them from the stream."""
    model = folded(init_values=0.1)
    x = STREAM
    with mode():
        expected = x
        for block in model.blocks:
            expected = block(expected)
        torch.testing.assert_close(model.blocks(x), expected, atol=1e-2, rtol=2e-2)


def write(module, args, out):
    out.data.mul_(3).add_(1)  # no version counts this


HOOKS = {
    "forward hook that writes": lambda block: block.register_forward_hook(write),
    "forward hook that replaces": lambda block: block.register_forward_hook(lambda m, args, out: 3 * out + 1),
    "forward of its own": lambda block: setattr(block, "forward", lambda x: 3 * FusedBlock.forward(block, x) + 1),
    "backward hook": lambda block: block.register_full_backward_hook(lambda *_: None),
}


@on_a_cpu
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_block_that_is_more_than_its_forward_gets_and_hands_on_nothing(hook, place, on_the_plan):
    """Also in inference_mode, where nothing counts writes to a tensor."""
    model = folded()
    HOOKS[hook](model.blocks[place])
    x = STREAM
    with torch.inference_mode():
        expected = x
        for block in model.blocks:
            expected = block(expected)
        torch.testing.assert_close(model.blocks(x), expected, atol=5e-2, rtol=2e-2)
    found, _ = operators(model.blocks, x)
    assert handed_over(found)[2::2] == ([False, True] if place == 0 else [False, False])


@on_a_cpu
def test_a_block_that_is_compiled_by_itself_is_called(on_the_plan):
    blocks, compiled = folded(depth=2).blocks, []
    blocks[1].compile(backend=lambda graph, _: compiled.append(graph) or graph)
    with torch.no_grad():
        blocks(STREAM)
    assert compiled


@on_a_cpu
def test_a_pre_hook_may_change_what_a_block_reads(on_the_plan):
    model = folded()
    model.blocks[1].register_forward_pre_hook(lambda m, args: (3 * args[0] + 1,))
    found, out = operators(model.blocks, STREAM)
    assert handed_over(found) == [False, True, False, True, False, True]
    assert out.isfinite().all()


@on_a_cpu
def test_a_block_that_is_not_ours_stands_between(on_the_plan):
    model = folded()
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1)  # timm's forward
    found, _ = operators(model.blocks, STREAM)
    assert handed_over(found) == [False, True, False, True]


@on_a_cpu
def test_a_replaced_forward_of_sequential_takes_effect(on_the_plan, monkeypatch):
    model, original = folded(), nn.Sequential.forward
    expected = 2 * model.blocks(STREAM)
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: 2 * original(self, x))
    torch.testing.assert_close(model.blocks(STREAM), expected, atol=2e-2, rtol=2e-2)


@on_a_cpu
def test_changed_parameters_of_the_next_block_are_seen(on_the_plan):
    model = folded()
    x = STREAM
    with torch.no_grad():
        model.blocks(x)
        model.blocks[1].norm1.weight.mul_(2)
        model.blocks[1].norm1.eps = 10.0
        expected = x
        for block in model.blocks:
            expected = block(expected)
        torch.testing.assert_close(model.blocks(x), expected, atol=1e-2, rtol=2e-2)


@on_a_cpu
def test_gradients_and_autocast_hand_over_nothing(on_the_plan):
    model, x = folded(), STREAM
    model.blocks(x).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        found, _ = operators(model.float().blocks, x.float())
    assert handed_over(found) == []


@on_a_cpu
def test_a_graph_of_torch_fx_runs_on_the_parameters_and_trains(on_the_plan):
    blocks = folded(depth=2).blocks
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(blocks)
        names = {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
        assert torch.equal(traced(STREAM), vk.fuse(copy.deepcopy(blocks))(STREAM))
    assert names == {"attention_packed", "linear", "projected_mlp"}
    traced(STREAM).sum().backward()
    assert all(p.grad is not None for p in blocks.parameters())


@on_a_cpu
def test_inputs_that_are_too_small_for_a_kernel_leave_no_statistics(on_the_plan, monkeypatch):
    """fc2's input may be large enough, but who would read its output's statistics is not."""
    monkeypatch.setattr(importlib.import_module("vitkernels.ops.folded_linear"), "MIN_BYTES", 2 * STREAM.numel() * 2)
    found, _ = operators(folded(depth=2).blocks, STREAM)
    assert not {"linear_statistics_fwd", "folded_linear_fwd"} & {name for name, _ in found}


# The class of what holds the blocks.


@on_a_cpu
def test_the_sequential_of_the_blocks_is_swapped_and_given_back(on_the_plan):
    model = folded()
    assert type(model.blocks) is FusedBlocks
    assert isinstance(model.blocks, nn.Sequential)
    assert [type(m) for m in model.modules()].count(FusedBlocks) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(handed_over(operators(twin, IMAGES.bfloat16())[0])) == 6
    part = model.blocks[:2]
    assert handed_over(operators(part, STREAM)[0]) == [False, True, True, True]
    assert type(vk.fuse(model).blocks) is nn.Sequential
    assert type(vk.unfuse(vk.fuse(model, inference=True)).blocks) is nn.Sequential


@on_a_cpu
def test_an_error_half_way_swaps_nothing(monkeypatch):
    model = small().bfloat16()
    monkeypatch.setattr("vitkernels.models._fold._folded", lambda block: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vk.fuse(model, inference=True)
    assert type(model.blocks) is nn.Sequential


# Compiled.


def compiled_operators(module, x, dynamic=False):
    found = []

    def look(graph, _):
        targets = [n.target for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "vitkernels"]
        found.extend(target._schema.name.partition("::")[2] for target in targets)
        return graph

    backend = aot_autograd(fw_compiler=look)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        return compiled(x), found


@on_a_cpu
def test_a_compiled_graph_hands_over_too(on_the_plan):
    blocks = folded(depth=2).blocks
    out, found = compiled_operators(blocks, STREAM, dynamic=True)
    assert found.count("linear_statistics_fwd") == 3
    with torch.no_grad():
        torch.testing.assert_close(out, blocks(STREAM), atol=1e-2, rtol=2e-2)


@on_a_cpu
def test_a_compiled_graph_folds_what_a_table_has_for_any_number_of_rows(no_interpreter, user_table, monkeypatch):  # noqa: F811
    """Else it is the graph of a model that was fused without ``inference``: on plan cublas 34 units, not 38."""
    monkeypatch.setattr(vk._env, "ADDMM_COPIES", False)
    model = folded(depth=1)
    config = linear.config_entry(linear.GemmConfig("pointer", 64, 64, 32, num_warps=4, num_stages=3))
    with _select.targeting("sm_90"):
        _, found = compiled_operators(model.blocks, STREAM)
        assert found == compiled_operators(vk.fuse(copy.deepcopy(model)).blocks, STREAM)[1]
        assert found.count("mlp_fwd") == 1
        shapes = (("norm", 144), ("norm_act", 192))
        user_table("sm_90", {_tuned.gemm_key(kind, STREAM.dtype, N, 48, 64): config for kind, N in shapes})
        names = ["folded_linear_fwd", "attention_fwd", "linear_statistics_fwd", "folded_linear_fwd", "linear_fwd"]
        assert compiled_operators(model.blocks, STREAM)[1] == names


# Traffic.

BATCH, TOKENS, WIDTH = 64, 197, 768
OF_HEADS = 12 * 8 / (2 * WIDTH)  # written by attention, maximum and sum
MOMENTS = 6 * 8 / (2 * WIDTH)  # of six tiles of a row: mean and squares, float32
OF_ROWS = 8 / (2 * WIDTH)  # mean and rstd


def moved(layer_scale=False, depth=2, how=lambda blocks: blocks):
    """Launches and their units, of blocks as ``how`` runs them."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", depth=depth, init_values=1e-5 if layer_scale else None)
    blocks = vk.fuse(vit.to(torch.bfloat16).eval(), inference=True).blocks
    x = torch.empty(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16, device="meta")
    with _select.planning("triton"):
        launches = _ledger.count(how(blocks), (x,), {}, CHIPS["h200"]).forward
    return [(o.name, o.activation_bytes / (BATCH * TOKENS * WIDTH * 2)) for o in launches]


@pytest.mark.parametrize("layer_scale", [False, True])
def test_a_folded_block_inside_a_model_moves_22_units(layer_scale, no_interpreter):
    """qkv 1 + 3, attention 3 + 1, proj 1 + 1 + 1, fc1 1 + 4, fc2 4 + 1 + 1; a LayerNorm's statistics are no pass any more."""
    inner = moved(layer_scale, 3)
    first, last = moved(layer_scale, 1)[0], moved(layer_scale, 1)[1:]
    inner = inner[len(inner) // 3 + 1 : -len(last)]  # blocks of 8, 7 and 6 launches
    assert [round(units) for _, units in inner] == [4, 4, 3, 0, 5, 6, 0]
    assert [name for name, _ in inner if name.endswith(("statistics", "moments"))] == ["combine_moments"] * 2
    exact = 22 + OF_HEADS + 2 * (2 * MOMENTS + 2 * OF_ROWS)
    assert sum(units for _, units in inner) == pytest.approx(exact)
    assert first[0] == "row_statistics"


class Loop(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_that_is_called_by_itself_moves_23(no_interpreter):
    """As in forward_intermediates: norm1's statistics read the stream."""
    launches = moved(how=Loop)
    assert [round(units) for _, units in launches] == [1, 4, 4, 3, 0, 5, 6] * 2
    exact = 23 + OF_HEADS + 2 * MOMENTS + 4 * OF_ROWS
    assert sum(units for _, units in launches) == pytest.approx(2 * exact)
