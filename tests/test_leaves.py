"""``torch.fx`` graphs of fused models hold the operators as leaves, and can be scripted wherever the graphs of timm's can."""

import inspect
import operator
import pickle

import pytest
import torch
import torch.fx
from helpers import elsewhere
from test_timm_contract import SMALL, assert_same, images, stock_and_fused
from timm.layers import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.ops import _leaves

# torch deprecates TorchScript, which timm's users have.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::torch.jit.TracerWarning")

STEM, BLOCK = {"patch_embed"}, {"linear", "attention_packed", "projected_mlp"}
APART = {"linear", "attention_packed", "residual_mlp"}  # LayerScale or drop path between the two linear layers of a half

# Name -> arguments of the model, arguments of fuse, leaves of the graph.
CASES = {
    "class token": ({}, {}, STEM | BLOCK),
    "registers": ({"reg_tokens": 2}, {}, STEM | BLOCK),
    "positions without registers": ({"reg_tokens": 2, "no_embed_class": True}, {}, STEM | BLOCK),
    "no prefix": ({"class_token": False, "global_pool": "avg"}, {}, STEM | BLOCK),
    "no positions": ({"pos_embed": "none"}, {}, STEM | BLOCK),
    "part of a patch": ({"img_size": (72, 64)}, {}, STEM | BLOCK),
    "a norm after the stem": ({"pre_norm": True, "embed_norm_layer": "layernorm"}, {}, STEM | BLOCK),
    "dynamic": ({"dynamic_img_size": True}, {}, STEM | BLOCK | {"resample_pos_embed"}),
    "dynamic, apart": (
        {"dynamic_img_size": True, "embed_norm_layer": "layernorm"}, {}, STEM | BLOCK | {"resample_pos_embed"},
    ),
    "dynamic, padded": (
        {"dynamic_img_size": True, "dynamic_img_pad": True}, {"input": "uint8"}, BLOCK | {"resample_pos_embed", "float_pixels"},
    ),
    "LayerScale": ({"init_values": 0.1}, {}, STEM | APART),
    "drop path": ({"init_values": 0.1, "drop_path_rate": 0.5}, {}, STEM | APART | {"ones"}),
    "q and k norm": ({"qk_norm": True}, {}, STEM | {"linear", "attention", "projected_mlp"}),
    "tanh": ({"act_layer": "gelu_tanh"}, {}, STEM | BLOCK),
    "quick": ({"act_layer": "quick_gelu"}, {}, STEM | BLOCK),
    "silu": ({"act_layer": "silu"}, {}, STEM | BLOCK),
    "attention pooling": ({"name": "vit_base_patch16_siglip_224"}, {}, STEM | BLOCK | {"attention"}),
    "uint8": ({}, {"input": "uint8"}, STEM | BLOCK),
    "recompute": ({}, {"recompute": "mlp"}, STEM | BLOCK),
    "inference": ({"init_values": 0.1}, {"inference": True}, STEM | APART),
    # timm's own embedding of a NaFlexVit cannot be traced; its blocks can.
    "NaFlexVit": ({"name": "naflexvit_base_patch16_gap", "img_size": None}, {}, APART),
}  # fmt: skip


def models(case: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """timm's model, ours, and inputs: float images, or tokens of a NaFlexVit."""
    arguments, options, _ = CASES[case]
    stock, fused = stock_and_fused(**arguments)
    vk.fuse(fused, **options)
    if case == "drop path":
        stock.train(), fused.train()
    if case == "NaFlexVit":
        return stock.blocks, fused.blocks, [torch.randn(2, 17, SMALL["embed_dim"])]
    if "dynamic_img_size" in arguments:
        return stock, fused, [images(2, 64), images(3, (96, 64)), images(1, (32, 112))]
    return stock, fused, [images(2, arguments.get("img_size", 64))]


def traced(model: nn.Module) -> torch.fx.GraphModule:
    with torch.no_grad():
        return torch.fx.symbolic_trace(model)


def leaves(graph: torch.fx.Graph) -> set[str]:
    """Names of the functions of vitkernels that a graph calls."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    return {f.__name__ for f in targets if getattr(f, "__module__", "").startswith("vitkernels.")}


@torch.no_grad()
def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return model(x)


@pytest.mark.parametrize("case", CASES)
def test_the_graph_of_a_fused_model_runs_our_operators_and_scripted_it_gives_timms_numbers(case):
    stock, fused, inputs = models(case)
    graph = traced(fused)
    assert leaves(graph.graph) == CASES[case][2]
    scripted = torch.jit.script(graph)
    if "dynamic" not in case:  # timm's with a dynamic size needs its own tracer, below
        assert_same(seeded(torch.jit.script(traced(stock)), inputs[0]), seeded(stock, inputs[0]))
    for x in inputs:
        assert_same(seeded(graph, x), seeded(fused, x))
        for _ in range(3):  # TorchScript optimises at the second call
            assert_same(seeded(scripted, x), seeded(stock, x))


def test_scripted_graphs_load_and_run_where_vitkernels_is_not_installed(tmp_path):
    inputs, expected = {}, {}
    for case in CASES:
        if case == "drop path":  # a random draw
            continue
        stock, fused, inputs[case] = models(case)
        expected[case] = [seeded(stock, x) for x in inputs[case]]
        torch.jit.save(torch.jit.script(traced(fused)), tmp_path / f"{case}.pt2")
    assert_same(elsewhere("torch.jit", tmp_path, inputs), expected)


@pytest.mark.parametrize("case", ["class token", "dynamic", "LayerScale", "attention pooling"])
def test_timms_feature_extractors_of_a_fused_model_can_be_scripted_like_its_own(case):
    stock, fused, inputs = models(case)
    results = []
    for model in (stock, fused):
        names = get_graph_node_names(model)[1]
        last = next(name for name in reversed(names) if name.startswith("blocks.1."))
        extractor = torch.jit.script(create_feature_extractor(model, {last: "block", "norm": "norm"}).eval())
        results.append([extractor(x) for x in inputs])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_of_a_model_for_inference_runs_on_the_parameters_and_sees_that_they_change(dtype):
    stock, fused = stock_and_fused(init_values=0.1)
    stock, fused = stock.to(dtype), vk.fuse(fused.to(dtype), inference=True)
    attributes = set(vars(fused))
    graph, x = traced(fused), images().to(dtype)
    assert set(vars(fused)) == attributes, "torch.fx stores tensors that it does not know on the model"
    assert leaves(graph.graph) == STEM | APART
    for model in (stock, fused):
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.mul_(2)
    assert torch.equal(seeded(graph, x), seeded(stock, x))
    assert torch.equal(seeded(torch.jit.script(graph), x), seeded(stock, x))


def test_mask_and_causal_flag_are_arguments_of_a_blocks_script():
    stock, fused = (model.blocks[0] for model in stock_and_fused())
    scripted = torch.jit.script(torch.fx.symbolic_trace(fused))
    x, mask = torch.randn(2, 17, SMALL["embed_dim"]), torch.randn(2, 1, 17, 17)
    assert_same(scripted(x), stock(x))
    assert_same(scripted(x, mask), stock(x, mask))
    assert_same(scripted(x, mask > 0), stock(x, mask > 0))
    assert_same(scripted(x, None, True), stock(x, None, True))


def test_a_script_of_a_uint8_model_takes_both_kinds_of_images():
    _, fused = stock_and_fused()
    vk.fuse(fused, input="uint8")
    scripted, pixels = torch.jit.script(traced(fused)), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert_same(seeded(scripted, pixels), seeded(fused, pixels))


@pytest.mark.parametrize("case", ["dynamic", "LayerScale", "attention pooling"])
def test_a_graph_survives_pickling(case):
    _, fused, inputs = models(case)
    graph = pickle.loads(pickle.dumps(traced(fused)))
    assert leaves(graph.graph) == CASES[case][2]
    assert torch.equal(seeded(graph, inputs[0]), seeded(fused, inputs[0]))


def functions_of(module) -> list:
    own = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return sorted(own, key=operator.attrgetter("__name__"))


@pytest.mark.parametrize("leaf", functions_of(_leaves), ids=operator.attrgetter("__name__"))
def test_a_leaf_is_positional_and_torchscript_compiles_it(leaf):
    for parameter in inspect.signature(leaf).parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is inspect.Parameter.empty
    assert "vitkernels::" not in str(torch.jit.script(leaf).inlined_graph)
