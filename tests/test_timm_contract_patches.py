"""Patched forwards take effect, random numbers are timm's, and explain says what runs: the rest of the per-call guard."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_timm_contract import (
    assert_modified_alike,
    assert_runs_fused,
    assert_same,
    build,
    counted,
    fused_calls,
    images,
    outputs_and_gradients,
    reasons,
    stock_and_fused,
)
from test_timm_contract_guard import CHILDREN, FULL, NEVER_CALLED
from timm.layers import GELU, Attention, AttentionPoolLatent, DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed, activations
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import vitkernels

# Patched forwards.


def _attention_that_keeps_its_map(self, x, attn_mask=None, is_causal=False):
    batch, tokens, width = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    self.attention_map = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return self.proj((self.attention_map @ v).transpose(1, 2).reshape(batch, tokens, width))


def test_attention_map_hack_still_fills_its_map():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        attn = model.blocks[1].attn
        attn.forward = types.MethodType(_attention_that_keeps_its_map, attn)
    x = images()
    out, ran = counted(fused, x)
    assert torch.equal(out, stock(x))
    assert ran == 1
    assert torch.equal(fused.blocks[1].attn.attention_map, stock.blocks[1].attn.attention_map)


@pytest.mark.parametrize("child", [name for name in CHILDREN if name not in NEVER_CALLED])
def test_child_with_its_own_forward_takes_effect(child):
    def modify(model):
        module = model.blocks[1].get_submodule(child)
        original = module.forward
        module.forward = lambda *args, **kwargs: 1.5 * original(*args, **kwargs)

    assert_modified_alike(modify, **FULL)


def test_block_with_its_own_forward_runs_it_around_the_fused_one():
    """As accelerate's hooks do: the instance's forward calls the one that it found."""
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        block = model.blocks[1]
        block.forward = lambda x, block=block, **kwargs: 2 * type(block).forward(block, x, **kwargs)
    assert_runs_fused(fused, stock, images())


PATCHED = [Attention, Mlp, Block, nn.Linear, LayerNorm, LayerScale, DropPath, nn.GELU, GELU, nn.Dropout]


@pytest.mark.parametrize("cls", PATCHED, ids=lambda cls: f"{cls.__module__.partition('.')[0]}-{cls.__name__}")
def test_class_wide_patched_forward_takes_effect(cls, monkeypatch):
    stock, fused = stock_and_fused(act_layer=GELU if cls is GELU else nn.GELU, **FULL)
    x = images()
    before = stock(x)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: 1.5 * original(self, *args, **kwargs))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x), expected)


@pytest.mark.parametrize("cls", [Attention, nn.Linear, LayerNorm, nn.GELU, Block, PatchEmbed], ids=lambda cls: cls.__name__)
def test_a_call_replaced_for_a_class_takes_effect(cls, monkeypatch):
    stock, fused = stock_and_fused(class_token=False, global_pool="avg")
    x, original = images(), cls.__call__
    before = stock(x)
    monkeypatch.setattr(cls, "__call__", lambda self, *args, **kwargs: 1.5 * original(self, *args, **kwargs))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x), expected)


def test_a_call_replaced_on_an_instance_takes_effect():
    def modify(model):
        layer = model.blocks[1].mlp.fc1
        layer._call_impl = lambda x: 1.5 * nn.Linear.forward(layer, x)

    assert_modified_alike(modify)


def test_class_wide_patch_taken_back_leaves_the_model_fused(monkeypatch):
    stock, fused = stock_and_fused()
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", _attention_that_keeps_its_map)
        assert counted(fused, images())[1] == 0
    assert_runs_fused(fused, stock, images())


def _edited_block(self, x, attn_mask=None, is_causal=False):
    x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
    return x + 3 * self.mlp(self.norm2(x))


def _edited_stem(self, x):
    return self.norm(self.proj(2 * x).flatten(2).transpose(1, 2))


def _edited_activation(x, inplace=False):
    return x.relu()


EDITED = {
    "Block.forward": (Block.forward, _edited_block),
    "PatchEmbed.forward": (PatchEmbed.forward, _edited_stem),
    "quick_gelu": (activations.quick_gelu, _edited_activation),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", EDITED)
def test_a_function_edited_in_place_takes_effect_and_can_be_edited_back(name, compiled, monkeypatch):
    """As IPython's autoreload does with a file that was changed."""
    stock, fused = stock_and_fused(act_layer=activations.QuickGELU)
    x, (function, edited) = images(), EDITED[name]
    before = stock(x)
    with monkeypatch.context() as patch:
        patch.setattr(function, "__code__", edited.__code__)
        expected = stock(x)
        assert not torch.equal(expected, before)
        assert_same((torch.compile(fused, backend="eager") if compiled else fused)(x), expected)
    assert_runs_fused(fused, stock, x)


# Methods that were replaced for all models by ones with other arguments.


def _plain_block(self, x):
    return x + self.mlp(self.norm2(x + self.attn(self.norm1(x))))


def _block_that_returns_a_pair(self, x, return_attention=False):
    return (_plain_block(self, x), x) if return_attention else _plain_block(self, x)


def _features(self, x, masks=None):
    x = self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))
    return x if masks is None else x * masks


_OF_A_PATCH_EMBED, _OF_A_POOL = PatchEmbed.forward, AttentionPoolLatent.forward
_SET_INPUT_SIZE = VisionTransformer.set_input_size
WITH_OTHER_ARGUMENTS = {
    "block": (Block, "forward", _plain_block, lambda model, x: model(x)),
    "block, one more": (
        Block,
        "forward",
        _block_that_returns_a_pair,
        lambda model, x: model.blocks[0](x[:, 0], return_attention=True)[0],
    ),
    "features": (VisionTransformer, "forward_features", _features, lambda model, x: model.forward_features(x)),
    "features, one more": (
        VisionTransformer,
        "forward_features",
        _features,
        lambda model, x: model.forward_features(x, masks=3.0),
    ),
    "positions": (
        VisionTransformer,
        "_pos_embed",
        lambda self, x, scale: x * scale,
        lambda model, x: model._pos_embed(model.patch_embed(x), 3.0),
    ),
    "patch embedding": (
        PatchEmbed,
        "forward",
        lambda self, x, mask=2.0: _OF_A_PATCH_EMBED(self, x) * mask,
        lambda model, x: model.patch_embed(x, mask=3.0),
    ),
    "attention pooling": (AttentionPoolLatent, "forward", lambda self, x: 2 * _OF_A_POOL(self, x), lambda model, x: model(x)),
    "input size": (
        VisionTransformer,
        "set_input_size",
        lambda self, size, verbose: _SET_INPUT_SIZE(self, size),
        lambda model, x: (model.set_input_size((64, 128), verbose=False), model(torch.cat([x, x], 3)))[1],
    ),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WITH_OTHER_ARGUMENTS)
def test_a_replaced_method_is_called_with_the_arguments_that_were_given(name, inference, monkeypatch):
    owner, method, replacement, call = WITH_OTHER_ARGUMENTS[name]
    stock, fused = stock_and_fused(**({"class_token": False, "global_pool": "map"} if "pool" in name else {}))
    vitkernels.fuse(fused, inference=inference)
    monkeypatch.setattr(owner, method, replacement)
    x = images()
    with torch.no_grad():
        assert_same(call(fused, x), call(stock, x))


def test_what_a_stock_method_does_not_take_is_refused():
    _, fused = stock_and_fused(dynamic_img_size=True)
    x = images()
    for call in (fused.blocks[0], fused.patch_embed, fused.forward_features, fused._pos_embed):
        with pytest.raises(TypeError):
            call(x, foo=1)


FUNCTIONS = ["linear", "layer_norm", "scaled_dot_product_attention", "gelu", "conv2d", "dropout"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_replaced_function_of_torch_takes_effect(name, monkeypatch):
    """As SageAttention's users replace ``F.scaled_dot_product_attention``."""
    stock, fused = stock_and_fused()
    x = images()
    before = stock(x)
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: 1.5 * original(*args, **kwargs))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x), expected)


def test_a_replaced_function_of_drop_path_takes_effect(monkeypatch):
    stock, fused = stock_and_fused(drop_path_rate=0.5)
    x = images()
    before = stock.train()(x)
    monkeypatch.setattr("timm.layers.drop.drop_path", lambda x, *args: x * (x.shape[1] - torch.arange(x.shape[1]))[:, None])
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused.train()(x), expected)


def test_another_class_by_the_name_of_timms_does_not_reach_models_that_are_there(monkeypatch):
    """As packages do that install a class of their own for ``timm.create_model`` to build."""
    stock, fused = stock_and_fused()

    class Other(VisionTransformer):
        def forward_features(self, x):
            return 0 * super().forward_features(x)

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer", Other)
    x = images()
    assert_runs_fused(fused, stock, x)
    assert_same(fused.forward_intermediates(x)[0], stock.forward_intermediates(x)[0])


_REPLACEMENTS = {
    "forward": lambda self, x: 1.5 * self.proj(x).flatten(2).transpose(1, 2),
    "_pos_embed": lambda self, x: torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + 2 * self.pos_embed,
}


@pytest.mark.parametrize("path", ["", "patch_embed"])
def test_a_method_replaced_on_the_type_of_a_module_takes_effect(path, monkeypatch):
    stock, fused = stock_and_fused()
    x, name = images(), "forward" if path else "_pos_embed"
    before = stock(x)
    expected = None
    for model in (stock, fused):
        cls = type(model.get_submodule(path))
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, _REPLACEMENTS[name])
            got = model(x)
        expected = got if model is stock else expected
    assert not torch.equal(expected, before)
    assert_same(got, expected)


NAMESPACES = {
    "timm.layers.attention": "scaled_dot_product_attention",
    "timm.layers.norm": "layer_norm",
    "timm.layers.activations": "gelu",
    "torch.nn.modules.linear": "linear",
    "torch.nn.modules.conv": "conv2d",
    "torch.nn.modules.dropout": "dropout",
}


@pytest.mark.parametrize("module", NAMESPACES)
def test_functions_replaced_for_one_module_take_effect(module, monkeypatch):
    """By another ``F`` in ``timm.layers.attention``, say, which leaves ``torch.nn.functional`` as it is."""
    stock, fused = stock_and_fused(act_layer=GELU)
    x, name = images(), NAMESPACES[module]
    before = stock(x)
    changed = {name: lambda *args, **kwargs: 1.5 * getattr(F, name)(*args, **kwargs)}
    monkeypatch.setattr(sys.modules[module], "F", types.SimpleNamespace(**{**vars(F), **changed}))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x), expected)


def test_interpolation_replaced_for_timms_positions_takes_effect(monkeypatch):
    stock, fused = stock_and_fused(dynamic_img_size=True)
    x = images(2, (96, 64))
    before = stock(x)
    changed = {"interpolate": lambda *args, **kwargs: F.interpolate(*args, **{**kwargs, "antialias": False})}
    monkeypatch.setattr(sys.modules["timm.layers.pos_embed"], "F", types.SimpleNamespace(**{**vars(F), **changed}))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert torch.equal(fused(x), expected)


def test_a_replaced_interpolation_takes_effect_on_positions(monkeypatch):
    """As users do whose ONNX exporter has no antialiasing."""
    stock, fused = stock_and_fused(dynamic_img_size=True)
    x, original = images(2, (96, 64)), F.interpolate
    before = stock(x)
    monkeypatch.setattr(F, "interpolate", lambda *args, **kwargs: original(*args, **{**kwargs, "antialias": False}))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("name", ["_call_impl", "_wrapped_call_impl"])
def test_a_replaced_call_of_modules_takes_effect(name, monkeypatch):
    stock, fused = stock_and_fused()
    original, called = getattr(nn.Module, name), []
    monkeypatch.setattr(nn.Module, name, lambda self, *args, **kw: (called.append(type(self)), original(self, *args, **kw))[1])
    if name == "_wrapped_call_impl":
        monkeypatch.setattr(nn.Module, "__call__", nn.Module._wrapped_call_impl)
    found = []
    for model in (stock, fused):
        called.clear()
        model(images())
        found.append(len(called))
    assert found[1] == found[0] > 20


# What was patched before vitkernels was first used. The models are imported anew for each, in a process of their own.
BEFORE = """
import copy, functools, importlib, json, sys
import timm, torch, torch.nn.functional as F
from timm import layers
from timm.models import naflexvit, vision_transformer as vit
import vitkernels

vitkernels.ops._availability.leaves_to_pytorch = lambda x: False  # as on a GPU

def mixing(original):
    @functools.wraps(original)
    def patched(*args, **kwargs):
        result = original(*args, **kwargs)
        return (mixed(result[0]), result[1]) if isinstance(result, tuple) else mixed(result)
    return patched

def mixed(x):
    return x + x.roll(1, -1)

def bilinear(original):
    return functools.partial(original, interpolation="bilinear")

def positions(self, x, grid_size):
    x.add_(2.0)

torch.manual_seed(0)
SMALL = {"img_size": 64, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, init_values=0.1, **SMALL).eval()
pooled = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="map", **SMALL).eval()
naflex = timm.create_model("naflexvit_base_patch16_gap", **{**SMALL, "img_size": None}).eval()
with torch.no_grad():
    for p in [*model.parameters(), *pooled.parameters(), *naflex.parameters()]:
        p.add_(torch.randn_like(p), alpha=0.1)
x = torch.randn(1, 3, 96, 96)
CASES = {
    "Block": (vit.Block, "forward", mixing, model),
    "Attention": (layers.Attention, "forward", mixing, model),
    "Mlp": (layers.Mlp, "forward", mixing, model),
    "PatchEmbed": (layers.PatchEmbed, "forward", mixing, model),
    "LayerNorm": (layers.LayerNorm, "forward", mixing, model),
    "LayerScale": (layers.LayerScale, "forward", mixing, model),
    "Linear": (torch.nn.Linear, "forward", mixing, model),
    "Conv2d": (torch.nn.Conv2d, "_conv_forward", mixing, model),
    "partial": (layers.Attention, "forward", lambda original: functools.partialmethod(mixing(original)), model),
    "_pos_embed": (vit.VisionTransformer, "_pos_embed", mixing, model),
    "forward_features": (vit.VisionTransformer, "forward_features", mixing, model),
    "resample_abs_pos_embed": (vit, "resample_abs_pos_embed", bilinear, model),
    "scaled_dot_product_attention": (F, "scaled_dot_product_attention", mixing, model),
    "linear": (F, "linear", mixing, model),
    "AttentionPoolLatent": (layers.AttentionPoolLatent, "forward", mixing, pooled),
    "NaFlexEmbeds": (naflexvit.NaFlexEmbeds, "forward", mixing, naflex),
    "_apply_learned_pos_embed": (naflexvit.NaFlexEmbeds, "_apply_learned_pos_embed", lambda original: positions, naflex),
}
found = {}
for case, (owner, name, patch, stock) in CASES.items():
    pixels = x if stock is not pooled else x[..., :64, :64]
    with torch.no_grad():
        before, original = stock(pixels), getattr(owner, name)
        setattr(owner, name, patch(original))
        for module in [module for module in sys.modules if module.startswith("vitkernels.models")]:
            del sys.modules[module]
        vars(vitkernels).pop("models", None)
        expected = stock(pixels)
        fused = vitkernels.fuse(copy.deepcopy(stock))
        patched = fused(pixels)
        setattr(owner, name, original)
        restored, ran = fused(pixels), all(module.fused for module in vitkernels.explain(fused).modules)
    close = lambda a, b: bool(torch.allclose(a, b, atol=1e-5, rtol=1e-5))
    found[case] = [close(expected, before), close(patched, expected), close(restored, before), ran]

importlib.reload(vit)
try:
    vitkernels.fuse(vit.VisionTransformer(**SMALL))
except ValueError as error:
    found["loaded again"] = str(error)
OTHERS = {
    "a class": (vit, "Block", type("Block", (), {"forward": None, "__module__": "mine"})),
    "a function": (torch.nn, "GELU", lambda: torch.nn.modules.activation.GELU("tanh")),
    "a partial": (layers, "Mlp", functools.partial(layers.Mlp, bias=False)),
}
for case, (owner, name, other) in OTHERS.items():
    for module in [module for module in sys.modules if module.startswith("vitkernels.models")]:
        del sys.modules[module]
    vars(vitkernels).pop("models", None)
    original = getattr(owner, name)
    setattr(owner, name, other)
    try:
        vitkernels.fuse(copy.deepcopy(model))
    except RuntimeError as error:
        found[case] = str(error)
    setattr(owner, name, original)
json.dump(found, sys.stdout)
"""


def test_what_was_patched_before_the_first_use_takes_effect_and_can_be_taken_back():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", BEFORE], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "timm.models.vision_transformer was loaded again after vitkernels was first used" in found.pop("loaded again")
    for case, what in (("a class", "mine.Block"), ("a function", "<function <lambda>"), ("a partial", "functools.partial(")):
        assert re.search(f"was replaced by {re.escape(what)}.* before vitkernels was first used", found.pop(case))
    assert len(found) == 17
    wrong = {case: flags for case, flags in found.items() if flags != [False, True, True, True]}
    assert not wrong, "[no effect in timm, as timm when patched, as timm when restored, fused then]"


# Random numbers: as many draws as timm, of the same shapes, in the same order.


def assert_same_random_stream(stock: nn.Module, fused: nn.Module, x: Tensor) -> int:
    results, states = [], []
    for model in (stock, fused):
        torch.manual_seed(11)
        with fused_calls() as calls:
            results.append(outputs_and_gradients(model, x))
        states.append(torch.get_rng_state())
    assert_same(results[1], results[0])
    assert torch.equal(*states)
    torch.manual_seed(12)
    assert not torch.equal(outputs_and_gradients(stock, x)["output"], results[0]["output"])  # it drops at all
    return calls.linear


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_rate", "pos_drop_rate"])
def test_active_dropout_draws_timms_random_stream(rate):
    stock, fused = stock_and_fused(**{rate: 0.3})
    assert_same_random_stream(stock.train(), fused.train(), images())


WITHOUT_PREFIX = {
    "static": {"class_token": False, "global_pool": "avg"},
    "dynamic": {"class_token": False, "global_pool": "avg", "dynamic_img_size": True},
    "uint8": {"class_token": False, "global_pool": "avg"},
    "NaFlex": {"name": "naflexvit_base_patch16_gap", "img_size": None, "reg_tokens": 0, "embed_proj_type": "conv"},
}


@pytest.mark.parametrize("case", WITHOUT_PREFIX)
def test_dropout_of_tokens_without_prefix_draws_timms_random_stream(case):
    """timm's convolution leaves these channel by channel in memory, in whose order dropout draws."""
    stock, fused = stock_and_fused(pos_drop_rate=0.3, **WITHOUT_PREFIX[case])
    if case == "uint8":
        vitkernels.fuse(fused, input="uint8")
    assert_same_random_stream(stock.train(), fused.train(), images(2, (96, 64) if case == "dynamic" else 64))


def test_active_drop_path_stays_fused_and_draws_timms_random_stream():
    stock, fused = stock_and_fused(drop_path_rate=0.5, init_values=0.1)
    linears = assert_same_random_stream(stock.train(), fused.train(), images(8))
    assert linears > 0
    assert all(m.fused for m in vitkernels.explain(fused).modules)


def test_patch_dropout_of_the_model_draws_timms_random_stream():
    stock, fused = stock_and_fused(patch_drop_rate=0.5)
    assert_same_random_stream(stock.train(), fused.train(), images())
    assert_runs_fused(fused.eval(), stock.eval(), images())


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_is_inactive_in_evaluation(rate):
    stock, fused = stock_and_fused(**{rate: 0.3})
    assert_runs_fused(fused, stock, images())


def test_attention_dropout_follows_the_mode_of_attention_as_in_timm():
    """timm passes ``attn_drop.p if attn.training`` to scaled_dot_product_attention, whatever mode attn_drop itself is in."""
    stock, fused = stock_and_fused(attn_drop_rate=0.3)
    for model in (stock.train(), fused.train()):
        for block in model.blocks:
            block.attn.attn_drop.eval()
    assert_same_random_stream(stock, fused, images())


def test_monte_carlo_dropout_in_an_evaluated_model():
    stock, fused = stock_and_fused(proj_drop_rate=0.3)
    for model in (stock, fused):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    assert_same_random_stream(stock, fused, images())


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
def test_model_fused_in_training_mode_with_dropout_runs_fused_in_evaluation(rate):
    """timm.create_model returns a model in training mode: an active dropout is a reason of a call, not of the class."""
    stock = build(**{rate: 0.3})
    fused = build(**{rate: 0.3}).train()
    fused.load_state_dict(stock.state_dict())
    vitkernels.fuse(fused)
    assert_runs_fused(fused.eval(), stock, images())


# What explain says agrees with what runs.


def test_explain_names_the_reason_of_every_kind():
    _, fused = stock_and_fused(**FULL)
    block = fused.blocks[1]
    block.attn.proj.register_forward_hook(lambda *_: None)
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1)
    block.attn.fused_attn = False
    block.ls1.forward = lambda x: x
    found = " | ".join(reasons(fused))
    for part in ("attn.proj has hooks", "mlp.fc1 is a", "fused_attn", "ls1 overrides forward"):
        assert part in found
    assert reasons(fused, "blocks.0") == ()
