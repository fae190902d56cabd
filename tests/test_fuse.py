"""fuse, unfuse and explain: what is swapped, what is refused, and that nothing is left half done."""

import copy
import io
import logging
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import vitkernels as vk
from vitkernels import _env, _select
from vitkernels.models import FUSED_CLASSES, FusedAttentionPool, FusedBlock, FusedPatchEmbed
from vitkernels.ops import _availability

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
ON_GPU = torch.cuda.is_available()


def small(**arguments):
    """A tiny ViT whose zero-initialised and tiny parameters are perturbed, so that each has an effect."""
    model = VisionTransformer(**{**SMALL, **arguments})
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def outputs_and_gradients(model, images):
    model.zero_grad()
    out = model(images)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


IMAGES = torch.randn(2, 3, 32, 32)
LEAVES_TO_PYTORCH = _availability.leaves_to_pytorch


def test_fuse_is_in_place_and_changes_classes_only():
    model = small()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    instance_dicts = {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert vk.fuse(model) is model
    assert [type(b) for b in model.blocks] == [FusedBlock, FusedBlock]
    assert type(model.patch_embed) is FusedPatchEmbed
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == instance_dicts


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"qkv_bias": False, "proj_bias": False},
        {"qk_norm": True},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "quick_gelu"},
        {"act_layer": nn.SiLU},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4, "no_embed_class": True},
        {"pre_norm": True},
        {"dynamic_img_size": True},
        {"pos_embed": "none"},
        {"norm_layer": nn.LayerNorm},
    ],
    ids=str,
)
def test_outputs_and_gradients_of_a_fused_model_are_timms(arguments):
    model = small(**arguments)
    stock = outputs_and_gradients(model, IMAGES)
    fused = outputs_and_gradients(vk.fuse(model, strict=True), IMAGES)
    for a, b in zip(fused, stock, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_tokens_leave_the_patch_embedding_contiguous():
    model = small(class_token=False, global_pool="avg")
    assert not model.patch_embed(IMAGES).is_contiguous()
    assert vk.fuse(model).patch_embed(IMAGES).is_contiguous()


def test_unfuse_gives_the_original_classes_back():
    model = small()
    stock = outputs_and_gradients(model, IMAGES)
    vk.unfuse(vk.fuse(model))
    assert [type(b) for b in model.blocks] == [Block, Block]
    assert type(model.patch_embed) is PatchEmbed
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(model, IMAGES), stock, strict=True))
    assert vk.unfuse(model) is model


BOUND = ["forward_features", "forward_intermediates", "_pos_embed", "set_input_size"]


def bind_methods(model):
    """As accelerate's hooks do: each module's ``forward`` on the instance is a wrapper of the method found there."""

    def wrapper(method):
        return lambda *args, **kwargs: method(*args, **kwargs)

    for module in model.modules():
        module.forward = wrapper(module.forward)
        for name in BOUND:
            if hasattr(module, name):
                setattr(module, name, wrapper(getattr(module, name)))


@pytest.mark.parametrize("kind", ["plain", "dynamic", "inference", "attention pooling", "NaFlexVit"])
def test_methods_that_were_bound_before_unfuse_are_timms_after_it(kind):
    naflex = {"num_classes": 5, "embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
    model = {
        "attention pooling": siglip,
        "NaFlexVit": lambda: timm.create_model("naflexvit_base_patch16_gap", **naflex).eval(),
    }.get(kind, lambda: small(dynamic_img_size=kind == "dynamic"))()
    stock = copy.deepcopy(model)
    vk.fuse(model, inference=kind == "inference")
    bind_methods(model)
    vk.unfuse(model)
    assert torch.equal(model(IMAGES), stock(IMAGES))
    if hasattr(model, "set_input_size"):
        for either in (model, stock):
            either.set_input_size(img_size=(64, 48))
        images = torch.randn(2, 3, 64, 48)
        assert torch.equal(model(images), stock(images))
        assert torch.equal(model.forward_intermediates(images)[0], stock.forward_intermediates(images)[0])


def test_unfuse_names_the_module_whose_class_is_no_longer_ours_and_who_changed_it():
    model = vk.fuse(small())
    parametrize.register_parametrization(model, "pos_embed", nn.Tanh())
    message = "the class of the model, a fused module, is Parametrized.*VisionTransformer now: remove its parametrizations"
    with pytest.raises(RuntimeError, match=message):
        vk.unfuse(model)
    assert type(model.blocks[0]) is FusedBlock
    parametrize.remove_parametrizations(model, "pos_embed")
    vk.unfuse(model)
    assert type(model) is VisionTransformer
    vk.fuse(model).blocks[1].__class__ = type("FSDPBlock", (FusedBlock,), {})
    with pytest.raises(RuntimeError, match=r"blocks\.1, a fused module, is FSDPBlock now.* unfuse before wrapping"):
        vk.unfuse(model)


NAMES = ["embed", "fused", "inference", "folded", "recompute_mlp", "pixel_statistics"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [True, False])
def test_names_of_a_users_own_stay_the_users(name, after):
    model = small(init_values=0.1)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    expected = model(IMAGES)
    options = {"inference": True, "recompute": "mlp", "input": "uint8"}
    if after:
        vk.fuse(model, **options)
    for module in model.modules():
        module.register_buffer(name, torch.ones(3))
    names = list(model.state_dict())
    if not after:
        vk.fuse(model, **options)
    for _ in range(2):
        assert list(model.state_dict()) == names
        assert all(torch.equal(getattr(module, name), torch.ones(3)) for module in model.modules())
        torch.testing.assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-5)
        vk.unfuse(model)


def test_fusing_twice_is_harmless():
    model = vk.fuse(small())
    once = outputs_and_gradients(model, IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(vk.fuse(model), IMAGES), once, strict=True))
    assert type(model.blocks[0]) is FusedBlock


def test_nested_models_are_found():
    wrapped = nn.ModuleDict({"backbone": small(), "head": nn.Linear(5, 2)})
    vk.fuse(wrapped)
    assert type(wrapped["backbone"].blocks[1]) is FusedBlock
    features = timm.create_model("test_vit", features_only=True)
    vk.fuse(features)
    assert vk.explain(features).num_fused == len(vk.explain(features).modules) > 0


def test_a_model_without_a_vit_block_is_refused_with_what_was_found():
    with pytest.raises(ValueError, match=r"contains no timm.models.vision_transformer.Block .*\(modules found: none\)"):
        vk.fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"modules found: .*EvaBlock"):
        vk.fuse(timm.create_model("eva02_tiny_patch14_224", depth=1))


@pytest.mark.parametrize("function", [vk.fuse, vk.unfuse, vk.explain])
def test_something_that_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        function("vit_base_patch16_224")


@pytest.mark.parametrize("value", [np.array(["mlp", "uint8"]), ["mlp"], 1], ids=repr)
@pytest.mark.parametrize("argument", ["recompute", "input"])
def test_a_choice_that_is_no_name_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be one of"):
        vk.fuse(small(), **{argument: value})


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_module_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"RecursiveScriptModule, whose forward is compiled already: fuse before torch.jit"):
        vk.fuse(scripted)


def test_a_list_of_stems_is_no_module_that_runs():
    model = nn.Module()
    model.patch_embed, model.vit = nn.ModuleList([small().patch_embed]), small()
    vk.fuse(model, strict=True)
    assert [m.name for m in vk.explain(model).modules] == ["patch_embed.0", "vit.patch_embed", "vit.blocks.0", "vit.blocks.1"]


def partly_fusable():
    model = small()
    model.blocks[1].norm2 = RmsNorm(48)
    return model


def test_a_block_that_cannot_be_fused_keeps_timms_forward_and_is_explained():
    model = partly_fusable()
    stock = outputs_and_gradients(model, IMAGES)
    fused = outputs_and_gradients(vk.fuse(model), IMAGES)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, stock, strict=True))
    report = {m.name: m for m in vk.explain(model).modules}
    assert report["blocks.0"].fused
    assert report["blocks.1"].reasons == ("norm2 is a timm RmsNorm, not LayerNorm",)
    model.blocks[1].norm2 = nn.LayerNorm(48)
    assert vk.explain(model).num_fused == 3, "each call decides anew"


def test_strict_refuses_it_and_leaves_the_model_unchanged():
    model = partly_fusable()
    with pytest.raises(RuntimeError, match=r"cannot fuse blocks.1: norm2 is a timm RmsNorm"):
        vk.fuse(model, strict=True)
    assert [type(b) for b in model.blocks] == [Block, Block]


def test_an_error_half_way_leaves_the_model_unchanged(monkeypatch):
    model = small()

    class Incompatible(FusedBlock):
        __slots__ = ("extra",)  # Python refuses this class for an existing instance

    monkeypatch.setitem(FUSED_CLASSES, Block, Incompatible)
    with pytest.raises(TypeError, match="layout"):
        vk.fuse(model)
    assert type(model.patch_embed) is PatchEmbed
    assert [type(b) for b in model.blocks] == [Block, Block]


def test_a_block_forward_with_an_unknown_signature_is_refused(monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x, mask=None: x)
    with pytest.raises(RuntimeError, match=r"Block.forward takes \('self', 'x', 'mask'\), vitkernels knows"):
        vk.fuse(small())


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("path", ["patch_embed", "blocks.0.mlp.act", "norm", "head", "blocks.0"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_part_that_torchscript_compiled_is_called_as_it_is(path, when):
    stock, model = small(), small()
    model.load_state_dict(stock.state_dict())
    if when == "after":
        vk.fuse(model)
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, torch.jit.script(model.get_submodule(path)))
    if when == "before":
        vk.fuse(model)
    torch.testing.assert_close(model(IMAGES), stock(IMAGES))
    assert "blocks.1" in {m.name for m in vk.explain(model).modules if m.fused}
    wrapped = vk.fuse(nn.Sequential(torch.jit.script(nn.Identity()), small()))
    assert isinstance(wrapped[1].blocks[0], FusedBlock)


def test_a_subclass_of_block_is_not_swapped_and_says_so():
    class MyBlock(Block):
        pass

    model = small(block_fn=MyBlock)
    model.blocks.append(copy.deepcopy(small().blocks[0]))
    vk.fuse(model)
    assert [type(b).__name__ for b in model.blocks] == ["MyBlock", "MyBlock", "FusedBlock"]
    assert "has no fused form of" in vk.explain(model).modules[1].reasons[0]


def test_a_model_in_which_nothing_runs_fused_is_warned_about(caplog):
    model = small(norm_layer=RmsNorm, embed_norm_layer=RmsNorm)
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj)
    vk.fuse(model)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "3 of 3 modules still run timm's forward, e.g. patch_embed: proj is a torch Sequential" in record.getMessage()


def test_explain_says_fused_or_why_not_for_every_block_and_prints_a_table():
    model = small()
    assert [m.reasons for m in vk.explain(model).modules] == [("vitkernels.fuse would fuse it",)] * 3
    vk.fuse(model)
    report = vk.explain(model)
    assert [(m.name, m.fused) for m in report.modules] == [("patch_embed", True), ("blocks.0", True), ("blocks.1", True)]
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    table = str(vk.explain(model))
    assert "2 of 3 modules fused" in table
    assert "attn.qkv has hooks" in table
    assert set(report.operators) == set(vk.ops.__all__)
    assert "PyTorch: " in str(vk.explain(model.double()))


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "utf-8"])
def test_a_report_has_only_characters_that_standard_output_has(monkeypatch, encoding):
    model = nn.ModuleDict({"gr\xf6\xdfe \u2501": vk.fuse(small())})
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    table = str(vk.explain(model))
    assert "3 of 3 modules fused" in table
    assert ("gr\xf6\xdfe" in table) == (encoding != "ascii")
    assert ("\u2501" in table) == (encoding == "utf-8")
    table.encode(encoding)
    print(vk.explain(model), flush=True)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_report_is_plain_text_where_terminals_are_promised_colours(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert "\x1b" not in str(vk.explain(vk.fuse(small())))


@pytest.mark.parametrize(
    "stream", [None, io.StringIO(), types.SimpleNamespace(write=len)], ids=["none", "memory", "write only"]
)
def test_a_report_is_a_string_whatever_standard_output_is(monkeypatch, stream):
    report = vk.explain(vk.fuse(small()))
    monkeypatch.setattr("sys.stdout", stream)
    assert "\u2501" in str(report)


def siglip(**arguments):
    return small(class_token=False, global_pool="map", **arguments)


def test_attention_pooling_is_fused_and_explained():
    model = siglip()
    stock = outputs_and_gradients(model, IMAGES)
    vk.fuse(model, strict=True)
    assert type(model.attn_pool) is FusedAttentionPool
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(model, IMAGES), stock, strict=True))
    report = {m.name: m for m in vk.explain(model).modules}
    assert report["attn_pool"].fused
    model.attn_pool.fused_attn = False
    assert vk.explain(model).modules[-1].reasons == ("fused_attn is False",)
    torch.testing.assert_close(outputs_and_gradients(model, IMAGES)[0], stock[0], atol=1e-5, rtol=1e-5)
    vk.unfuse(model)
    assert type(model.attn_pool) is AttentionPoolLatent


POOLS = {
    "plain": {},
    "several queries": {"latent_len": 3, "pool_type": ""},
    "average of several queries": {"latent_len": 3, "pool_type": "avg"},
    "normed": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "positions": {"pos_embed": "abs", "feat_size": 17},
    "no projection": {"out_features": 0},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("arguments", POOLS.values(), ids=POOLS)
def test_options_of_attention_pooling(arguments, masked):
    pool = AttentionPoolLatent(48, num_heads=3, **arguments)
    for p in pool.parameters():
        nn.init.normal_(p, std=0.2)
    fused = copy.deepcopy(pool)
    fused.__class__ = FusedAttentionPool
    x = torch.randn(2, 17, 48)
    mask = torch.zeros(2, 1, 1, 17).masked_fill(torch.rand(2, 1, 1, 17) < 0.3, -1e4) if masked else None
    want, got = pool(x, attn_mask=mask), fused(x, attn_mask=mask)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    got.square().sum().backward()
    want.square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), pool.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "sizes",
    [{"latent_len": 2}, {"latent_len": 4}, {"num_heads": 2}, {"head_dim": 8}, {"num_heads": 4, "head_dim": 12}],
    ids=str,
)
def test_sizes_of_attention_pooling_set_by_hand_take_effect_or_are_refused_as_in_timm(sizes):
    pool = AttentionPoolLatent(48, num_heads=3, latent_len=3)
    for name, size in sizes.items():
        setattr(pool, name, size)
    fused = copy.deepcopy(pool)
    fused.__class__ = FusedAttentionPool
    x = torch.randn(2, 17, 48)
    try:
        want = pool(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused(x)
    else:
        torch.testing.assert_close(fused(x), want, atol=1e-6, rtol=1e-6)


def test_positions_of_attention_pooling_that_would_add_keys_are_refused_as_in_timm():
    pool = AttentionPoolLatent(48, num_heads=3, pos_embed="abs", feat_size=17)
    fused = copy.deepcopy(pool)
    fused.__class__ = FusedAttentionPool
    for module in (pool, fused):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            module(torch.randn(2, 1, 48))


@pytest.mark.parametrize("child", ["q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp", "mlp.fc1"])
def test_hooks_inside_attention_pooling_take_effect_as_in_timm(child):
    outputs = []
    for model in (siglip(), vk.fuse(siglip())):
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        before = model(IMAGES)
        model.attn_pool.get_submodule(child).register_forward_hook(lambda _module, _args, out: out * 1.5)
        outputs.append(model(IMAGES))
        assert not torch.equal(before, outputs[-1]) or child == "k_norm"
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_a_subclass_of_attention_pooling_is_not_swapped_and_says_so():
    class MyPool(AttentionPoolLatent):
        pass

    model = siglip()
    model.attn_pool.__class__ = MyPool
    vk.fuse(model)
    assert "has no fused form of" in vk.explain(model).modules[-1].reasons[0]


def test_an_attention_pooling_with_an_unknown_signature_is_refused(monkeypatch):
    monkeypatch.setattr(AttentionPoolLatent, "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"AttentionPoolLatent.forward takes \('self', 'x'\), vitkernels knows"):
        vk.fuse(small())


def test_explain_of_other_block_classes_names_them():
    report = vk.explain(timm.create_model("eva02_tiny_patch14_224", depth=1))
    assert any("has no fused form of timm.models.eva.EvaBlock" in r for m in report.modules for r in m.reasons)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_explain_of_a_scripted_model_finds_nothing_fused():
    assert not any(module.fused for module in vk.explain(torch.jit.script(vk.fuse(small()))).modules)


def test_a_hybrid_stem_keeps_timms_path_and_its_blocks_are_fused():
    model = timm.create_model("vit_tiny_r_s16_p8_224", depth=2, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    stock = model(images)
    vk.fuse(model)
    torch.testing.assert_close(model(images), stock, atol=1e-5, rtol=1e-5)
    assert all(type(b) is FusedBlock for b in model.blocks)


def test_fallbacks_are_logged_once_at_info(caplog, monkeypatch):
    """On a GPU, where the kernel is not worth its launch; here a tensor that claims to be on one."""
    monkeypatch.setattr("vitkernels._select._reported", set())
    x = torch.empty(5, 16, device="meta")
    with caplog.at_level("INFO", logger="vitkernels"), vk._select.targeting("sm_90"):
        vk.ops.layer_norm(x)
        vk.ops.layer_norm(x)
    assert [r.getMessage() for r in caplog.records] == ["layer_norm falls back to PyTorch: inputs below 8 MiB are launch-bound"]


def on_a_gpu_that_is_not_there(model):
    """``model`` with fake CUDA parameters, and fake images: how memory is planned on a machine without a GPU."""
    with FakeTensorMode() as mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake
        return mode, model, torch.empty(2, 3, 32, 32, device="cuda")


@pytest.mark.skipif(ON_GPU, reason="about a machine without a GPU")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("when", ["fused before", "fused on it"])
def test_a_model_on_a_gpu_that_is_not_there_runs_as_timms(when, inference):
    stock, fused = small(), small()
    mode, model, images = on_a_gpu_that_is_not_there(vk.fuse(fused, inference=inference) if when == "fused before" else fused)
    with mode, torch.set_grad_enabled(not inference):
        out = vk.fuse(model, inference=inference)(images)  # PyTorch itself runs no backward pass there
    assert (out.shape, out.device.type) == (stock(torch.zeros(2, 3, 32, 32)).shape, "cuda")


def test_where_triton_cannot_launch_pytorchs_operators_run_and_the_log_says_why(monkeypatch, caplog):
    """As in a container without a C compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_env, "triton_cannot_launch", lambda: "Triton cannot launch here: no compiler")
    monkeypatch.setattr(_env, "INTERPRETING", False)
    monkeypatch.setattr(_select, "_reported", set())
    with FakeTensorMode(), caplog.at_level(logging.INFO, "vitkernels"):
        x = torch.empty(16384, 768, device="cuda")  # large enough for a kernel
        for _ in range(2):
            assert vk.ops.layer_norm(x).device == x.device
        assert vk.ops._availability.availability("cuda")["linear"] == ["Triton cannot launch here: no compiler"]
        with vk.backend("fused"), pytest.raises(RuntimeError, match="cannot run its kernel: Triton cannot launch here"):
            vk.ops.layer_norm(x)
    assert caplog.messages == ["layer_norm falls back to PyTorch: Triton cannot launch here: no compiler"]


def test_whether_triton_can_launch_is_a_constant_to_dynamo(monkeypatch):
    monkeypatch.setattr(_env, "triton_cannot_launch", lambda: "no compiler")
    compiled = torch.compile(lambda x: x + len(_select._why_not_launch()), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1


def test_triton_is_asked_whether_it_can_launch(tmp_path):
    """Its own words, once: there is no C compiler on the path, and nothing in its cache."""
    code = """
import torch
from vitkernels import _env
torch.cuda.is_available = lambda: True
print(_env.triton_cannot_launch())
assert _env.triton_cannot_launch() is _env.triton_cannot_launch()
"""
    places = {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment | places, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(
        "Triton cannot launch here, which takes a C compiler and Python.h: RuntimeError: Failed to find"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_auto_leaves_the_blocks_of_a_cpu_to_timms_forward_and_keeps_a_promise_to_save_memory(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("an operator was asked")

    monkeypatch.setattr("vitkernels.ops._availability.leaves_to_pytorch", LEAVES_TO_PYTORCH)  # the suite replaces it
    monkeypatch.setattr("vitkernels.models.block.linear", asked)
    model = small()
    expected = model(IMAGES)
    vk.fuse(model)
    assert torch.equal(model(IMAGES), expected)
    assert "on a CPU under 'auto' fused blocks run timm's forward" in " ".join(str(vk.explain(model)).split())
    with vk.backend("reference"):
        assert vk.explain(model).note == ""
    with vk.backend("reference"), pytest.raises(AssertionError, match="an operator was asked"):
        model(IMAGES)
    vk.fuse(vk.unfuse(model), recompute="mlp")
    assert vk.explain(model).note == ""
    with pytest.raises(AssertionError, match="an operator was asked"):
        model(IMAGES)
