"""The stem of a model: patch embedding, prefix tokens and positions in one operator, and from uint8 pixels.

``stem_kernel`` runs the stem's kernel (interpreted without a GPU) inside a model whose other operators run as ever.
"""

import copy
import functools
import inspect
import io

import pytest
import timm
import torch
from helpers import assert_within_budget
from PIL import Image
from sklearn.datasets import load_sample_image
from test_vit_pytorch import vit_pytorch_forward, vit_pytorch_weights
from timm.data import create_transform, resolve_data_config
from timm.layers import LayerNorm, PatchEmbed
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.vision_transformer import VisionTransformer as Stock
from torch import nn

import vitkernels as vk
from vitkernels import _select
from vitkernels.cli import _ledger
from vitkernels.cli._chips import CHIPS
from vitkernels.models import FusedNaFlexEmbeds, FusedPatchEmbed, FusedVisionTransformer, load_vit_pytorch
from vitkernels.models.patch_embed import linear_as_convolution

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "no_embed_class": {"reg_tokens": 4, "no_embed_class": True},
    "average": {"class_token": False, "global_pool": "avg"},
    "siglip": {"class_token": False, "global_pool": "map"},
    "no positions": {"pos_embed": "none"},
    "no positions, no prefix": {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    "pre_norm": {"pre_norm": True},
    "dynamic size": {"dynamic_img_size": True},
    "rectangular": {"img_size": (24, 40), "patch_size": (8, 4)},
    "crop": {"img_size": 35},
}


@pytest.fixture
def stem_kernel(monkeypatch):
    """The names of the operators that were asked to run; patch_embed runs its kernel."""
    asked, use = [], _select.use_kernel

    def use_kernel(op, x, why_not, *rest, **options):
        asked.append(op)
        return True if op == "patch_embed" and not why_not() else use(op, x, why_not, *rest, **options)

    monkeypatch.setattr("vitkernels._select.use_kernel", use_kernel)
    monkeypatch.setattr("vitkernels._settings.plan", "triton")
    return asked


def models(**arguments):
    """timm's model and a fused copy, no parameter zero."""
    stock = Stock(**{**SIZES, **arguments}).eval()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return stock, vk.fuse(copy.deepcopy(stock))


def images(model, batch=2, size=None):
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_logits_and_gradients_are_timms(kind, stem_kernel):
    stock, fused = models(**kind)
    assert type(fused) is FusedVisionTransformer
    assert fused.why_not_merged() == []
    x = images(stock, batch=8)  # of two images' 10 logits eager's error is luck, another on each kind of CPU
    oracle = copy.deepcopy(stock).double()
    results = {}
    for name, model, pixels in (("eager", stock, x), ("kernel", fused, x), ("oracle", oracle, x.double())):
        leaf = pixels.detach().requires_grad_()
        out = model(leaf)
        out.square().sum().backward()
        results[name] = {"logits": out.detach(), "images": leaf.grad}
        results[name] |= {key: p.grad for key, p in model.named_parameters() if key.startswith(("patch", "pos", "cls", "reg"))}
    assert stem_kernel.count("patch_embed") == 1
    for key, value in results["kernel"].items():
        assert_within_budget(key, value, results["eager"][key], results["oracle"][key])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_fallback_gives_timms_bits(kind):
    stock, fused = models(**kind)
    x = images(stock)
    torch.testing.assert_close(fused(x), stock(x), atol=2e-6, rtol=1e-5)
    for model in (stock, fused):
        model.train()
    torch.testing.assert_close(fused(x), stock(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"output_fmt": "NLC"}, {"return_prefix_tokens": True, "norm": True}], ids=str)
def test_intermediates_are_timms(arguments, stem_kernel):
    stock, fused = models(reg_tokens=4, dynamic_img_size=True)
    x = images(stock, size=(40, 24))
    (final, between), (expected_final, expected) = (m.forward_intermediates(x, **arguments) for m in (fused, stock))
    assert stem_kernel.count("patch_embed") == 1
    torch.testing.assert_close(final, expected_final, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(between, expected, atol=1e-5, rtol=1e-5)
    layers = [m.get_intermediate_layers(x, 2, reshape=True) for m in (fused, stock)]
    torch.testing.assert_close(*layers, atol=1e-5, rtol=1e-5)


def test_positions_are_resampled_for_another_size_and_get_their_gradient(stem_kernel):
    stock, fused = models(dynamic_img_size=True)
    x = images(stock, size=(48, 16))
    for model in (stock, fused):
        model(x).square().sum().backward()
    torch.testing.assert_close(fused.pos_embed.grad, stock.pos_embed.grad, atol=1e-5, rtol=1e-4)


def test_an_image_that_does_not_divide_into_patches_names_both_sizes_and_what_pads():
    stock, fused = models(dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"images of 30x48 do not divide into patches of 8x8.*dynamic_img_pad"):
        fused(images(stock, size=(30, 48)))
    stock, fused = models(dynamic_img_size=True, dynamic_img_pad=True)
    x = images(stock, size=(30, 48))
    torch.testing.assert_close(fused(x), stock(x), atol=2e-6, rtol=1e-5)


def test_position_and_patch_dropout_draw_as_timm_does():
    stock, fused = models(pos_drop_rate=0.3, patch_drop_rate=0.5)
    x = images(stock)
    outputs = []
    for model in (stock.train(), fused.train()):
        torch.manual_seed(1)
        outputs.append(model.forward_features(x))
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


def test_called_alone_the_patch_embedding_and_pos_embed_keep_timms_shapes(stem_kernel):
    for kind in ({"reg_tokens": 4}, {"dynamic_img_size": True}):
        stock, fused = models(**kind)
        x = images(stock)
        got, expected = fused.patch_embed(x), stock.patch_embed(x)
        assert got.shape == expected.shape
        torch.testing.assert_close(fused._pos_embed(got), stock._pos_embed(expected), atol=1e-5, rtol=1e-5)


def test_the_same_numbers_under_autocast(stem_kernel):
    stock, fused = models(reg_tokens=4)
    x = images(stock)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused._vk_embed(x), stock._pos_embed(stock.patch_embed(x))
    assert got.dtype == expected.dtype == torch.float32
    oracle = copy.deepcopy(stock).double()
    assert_within_budget("tokens", got, expected, oracle._pos_embed(oracle.patch_embed(x.double())))


# When timm's two steps run.


def hook(*_):
    return None


def doubled(forward, x):
    return 2 * forward(x)


def own_forward(model):
    model.patch_embed.forward = functools.partial(doubled, model.patch_embed.forward)


def own_pos_embed(model):
    model._pos_embed = functools.partial(doubled, model._pos_embed)


def wrapped_convolution(model):
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj)


REASONS = {
    "hook on patch_embed": (lambda m: m.patch_embed.register_forward_hook(hook), "patch_embed has hooks"),
    "hook on its convolution": (lambda m: m.patch_embed.proj.register_forward_hook(hook), "proj has hooks"),
    "hook on its norm": (lambda m: m.patch_embed.norm.register_forward_pre_hook(hook), "patch_embed.norm has hooks"),
    "patch norm": (lambda m: setattr(m.patch_embed, "norm", LayerNorm(64)), "norm is a timm LayerNorm, not Identity"),
    "own forward": (own_forward, "patch_embed overrides forward"),
    "own _pos_embed": (own_pos_embed, "_pos_embed was replaced"),
    "padding": (lambda m: setattr(m.patch_embed, "dynamic_img_pad", True), "dynamic_img_pad pads"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_what_the_merged_stem_would_skip_means_timms_steps_and_explain_says_so(change, reason):
    stock, fused = models(class_token=False, global_pool="avg")
    torch.manual_seed(2)
    change(stock)
    torch.manual_seed(2)
    change(fused)
    assert any(reason in found for found in fused.why_not_merged())
    x = images(stock)
    torch.testing.assert_close(fused(x), stock(x), atol=2e-6, rtol=1e-5)
    row = next(m for m in vk.explain(fused).modules if m.name == "patch_embed")
    assert reason in row.state


def test_a_hook_on_the_patch_embedding_sees_timms_output():
    stock, fused = models(reg_tokens=4)
    seen = []
    for model in (stock, fused):
        model.patch_embed.register_forward_hook(lambda module, args, out: seen.append(out))
        model(images(stock))
    assert seen[0].shape == seen[1].shape == (2, 16, 64)


def test_a_patched_class_takes_effect(monkeypatch):
    stock, fused = models()
    monkeypatch.setattr(Stock, "_pos_embed", lambda self, x: torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
    x = images(stock)
    torch.testing.assert_close(fused(x), stock(x), atol=2e-6, rtol=1e-5)
    assert "VisionTransformer._pos_embed was replaced" in fused.why_not_merged()


def test_other_models_keep_their_own_positions_and_explain_says_whose():
    model = vk.fuse(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=3))
    assert type(model.patch_embed) is FusedPatchEmbed
    (row,) = (m for m in vk.explain(model).modules if m.name == "patch_embed")
    assert row.fused
    assert "VisionTransformerDistilled has its own" in row.state


def test_a_hybrid_stem_keeps_timms_path_and_explain_names_it():
    fused = vk.fuse(timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1, num_classes=3))
    assert fused.why_not_merged() == ["patch_embed is a HybridEmbed"]
    (row,) = (m for m in vk.explain(fused).modules if m.name == "patch_embed")
    assert not row.fused
    assert "HybridEmbed" in row.state


def test_unfuse_gives_timms_class_and_bits_back():
    stock, fused = models()
    vk.unfuse(fused)
    assert type(fused) is Stock
    assert type(fused.patch_embed) is PatchEmbed
    x = images(stock)
    assert torch.equal(fused(x), stock(x))


# uint8.


def patch_norm(model):
    model.patch_embed.norm = LayerNorm(64)


def padding(model):
    model.patch_embed.dynamic_img_pad = True


def with_statistics(**arguments):
    stock, fused = models(**arguments)
    for model in (stock, fused):
        model.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return stock, vk.fuse(fused, input="uint8")


def normalised(pixels):
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.float() / 255 - mean) / std


def photographs(size):
    """Two, as PIL decodes them."""
    return [Image.fromarray(load_sample_image(name)).resize(size) for name in ("china.jpg", "flower.jpg")]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_photographs_as_uint8_give_the_logits_of_timms_transforms(name, stem_kernel):
    stock = timm.create_model(name, depth=1, embed_dim=64, num_heads=1, num_classes=10).eval()
    config = resolve_data_config(stock.pretrained_cfg)
    to_float, to_pixels = (create_transform(**config, is_training=False, normalize=flag) for flag in (True, False))
    photos = [photo.rotate(degrees) for photo in photographs((320, 240)) for degrees in (0, 90)]
    floats, pixels = (torch.stack([transform(photo) for photo in photos]) for transform in (to_float, to_pixels))
    assert pixels.dtype == torch.uint8
    fused = vk.fuse(copy.deepcopy(stock), input="uint8")
    oracle = copy.deepcopy(stock).double()
    with torch.inference_mode():
        expected, truth = stock(floats), oracle(floats.double())
        assert_within_budget("uint8", fused(pixels), expected, truth)
        channels_last = pixels.to(memory_format=torch.channels_last)
        assert_within_budget("uint8 channels_last", fused(channels_last), expected, truth)
        assert_within_budget("float", fused(floats), expected, truth)
    assert stem_kernel.count("patch_embed") == 3


def test_uint8_works_where_the_fallback_runs_and_float_images_mean_what_they_meant():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    hooked = lambda m: m.patch_embed.proj.register_forward_hook(hook)  # noqa: E731
    for change in (lambda m: None, hooked, own_forward, wrapped_convolution, patch_norm, padding):
        stock, fused = with_statistics()
        change(stock)
        change(fused)
        expected = stock(normalised(pixels))
        torch.testing.assert_close(fused(pixels), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused(normalised(pixels)), expected, atol=1e-5, rtol=1e-5)


def test_uint8_pixels_stay_where_they_are_while_the_weight_is_offloaded():
    """As accelerate does it: the weight is on meta, and hooks bring it for the convolution's own call."""
    _, fused = with_statistics()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = fused(pixels)
    proj = fused.patch_embed.proj
    weight, away = proj.weight, nn.Parameter(proj.weight.to("meta"))
    proj.weight = away
    proj.register_forward_pre_hook(lambda module, args: setattr(module, "weight", weight))
    proj.register_forward_hook(lambda module, args, output: setattr(module, "weight", away))
    torch.testing.assert_close(fused(pixels), expected, atol=1e-5, rtol=1e-5)


def test_uint8_statistics_survive_a_change_of_dtype_and_are_in_no_state_dict():
    stock, fused = with_statistics()
    assert fused.state_dict().keys() == stock.state_dict().keys()
    fused.load_state_dict(stock.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    half, stock_half, oracle = copy.deepcopy(fused).bfloat16(), copy.deepcopy(stock).bfloat16(), copy.deepcopy(stock).double()
    expected, truth = stock_half(normalised(pixels).bfloat16()), oracle(normalised(pixels).double())
    assert_within_budget("logits", half(pixels), expected, truth)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(again(pixels), fused(pixels))
    compiled = torch.compile(fused._vk_embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels), fused._vk_embed(pixels))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta", torch.bfloat16),
        lambda m: m.patch_embed.double(),
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
    ],
    ids=["bfloat16", "half", "to bfloat16", "to meta", "double", "to_empty", "deepcopy"],
)
def test_uint8_statistics_move_and_keep_their_bits(change):
    _, fused = with_statistics()
    expected = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    changed = change(fused)
    stem = getattr(changed, "patch_embed", changed)
    assert stem._vk_pixel_statistics.dtype == torch.float32
    assert stem._vk_pixel_statistics.device == stem.proj.weight.device
    assert stem._vk_pixel_statistics.is_meta or torch.equal(stem._vk_pixel_statistics, expected)


@pytest.mark.parametrize("how", ["assign", "assign, then to", "to_empty"])
def test_a_model_fused_on_meta_takes_uint8_when_it_is_loaded(how):
    stock, fused = with_statistics()
    empty = vk.fuse(copy.deepcopy(stock).to("meta"), input="uint8")
    if how == "to_empty":
        empty.to_empty(device="cpu")
    empty.load_state_dict(stock.state_dict(), assign=how != "to_empty")
    if how == "assign, then to":
        empty.to("cpu")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(empty(pixels), fused(pixels))


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_model_that_was_fused_and_evaluated_under_inference_mode_can_be_trained(stem_kernel, on_meta):
    stock, _ = with_statistics()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    fused = copy.deepcopy(stock).to("meta" if on_meta else "cpu")
    with torch.inference_mode():
        vk.fuse(fused, input="uint8")
    if on_meta:
        fused.load_state_dict(copy.deepcopy(stock.state_dict()), assign=True)
        fused.requires_grad_()
        with torch.inference_mode():
            fused(pixels)
    fused(pixels).sum().backward()
    assert fused.patch_embed.proj.weight.grad is not None


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace on itself and on checks of shapes
@pytest.mark.parametrize("change", [lambda m: None, patch_norm], ids=["fused", "timm's"])
def test_a_trace_takes_uint8(change):
    _, fused = with_statistics()
    change(fused)
    pixels, others = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    traced = torch.jit.trace(fused, pixels)
    torch.testing.assert_close(traced(others), fused(others))


def test_uint8_trains_the_weights(stem_kernel):
    stock, fused = with_statistics()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fused(pixels).square().sum().backward()
    stock(normalised(pixels)).square().sum().backward()
    for name, p in stock.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name).grad, p.grad, atol=1e-4, rtol=1e-4)


def test_explain_says_who_takes_uint8():
    _, fused = with_statistics()
    state = lambda model: next(m for m in vk.explain(model).modules if m.name == "patch_embed").state  # noqa: E731
    assert state(fused) == "fused; uint8 images too"
    own_forward(fused)
    assert state(fused) == "fused; uint8 images too; positions in timm's own step: patch_embed overrides forward"
    assert state(vk.fuse(fused)).startswith("fused; positions")


def test_unfuse_or_another_fuse_takes_uint8_back():
    for undo, error in (
        (vk.unfuse, pytest.raises(RuntimeError)),
        (vk.fuse, pytest.raises(ValueError, match=r"fuse\(model, input='uint8'\)")),
    ):
        _, fused = with_statistics()
        undo(fused)
        assert not list(fused.buffers())
        with error:
            fused(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: models()[0], {"input": "int8"}, "input must be one of 'float', 'uint8', got 'int8'"),
        (lambda: models()[0], {"input": "uint8"}, r"mean and std of the 3 channels of patch_embed .*got mean=\(\), std=\(\)"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1),
            {"input": "uint8"},
            r"mean and std of the 1 channels of patch_embed .*got mean=\(0.5",
        ),
        (
            lambda: timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1),
            {"input": "uint8"},
            "needs a timm PatchEmbed with a convolution",
        ),
        (
            lambda: nn.Sequential(*models()[0].blocks),
            {"input": "uint8"},
            "needs a timm PatchEmbed with a convolution",
        ),
    ],
)
def test_uint8_needs_to_know_mean_and_std(model, arguments, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        vk.fuse(model, **arguments)
    assert not any(type(m).__module__.startswith("vitkernels") for m in model.modules())


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.0)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, -0.5)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, float("inf"))),
        ((float("nan"), 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 0.5), ("0.5", 0.5, 0.5)),
    ],
    ids=str,
)
def test_uint8_needs_mean_and_std_of_pixels_in_0_to_1(mean, std):
    stock, _ = models()
    stock.pretrained_cfg = {"mean": mean, "std": std}
    with pytest.raises(
        ValueError, match=r"mean in 0..1 and std in 0..1 and not 0 for patch_embed, as timm has them .*has mean"
    ):
        vk.fuse(stock, input="uint8")
    assert not any(type(m).__module__.startswith("vitkernels") for m in stock.modules())


# Linear patchifiers.


def test_a_linear_patchifier_is_a_convolution_by_permutation(stem_kernel):
    """NaFlexVit's and vit-pytorch's order of a patch: (p_h, p_w, C)."""
    linear, x = nn.Linear(8 * 4 * 3, 48), torch.randn(2, 3, 24, 20)
    patches = x.unflatten(3, (5, 4)).unflatten(2, (3, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    weight = linear_as_convolution(linear.weight, (8, 4))
    assert weight.data_ptr() == linear.weight.data_ptr()  # a view: gradients reach the Linear
    got = vk.ops.patch_embed(x, weight, linear.bias)
    torch.testing.assert_close(got, linear(patches), atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    mine, linear.weight.grad = linear.weight.grad, None
    linear(patches).square().sum().backward()
    torch.testing.assert_close(mine, linear.weight.grad, atol=1e-3, rtol=1e-4)


NAFLEX = {
    "linear": {"proj_type": "linear"},
    "linear, channels first": {"proj_type": "linear", "channels_last": False},
    "convolution": {"proj_type": "conv"},
    "registers": {"proj_type": "linear", "reg_tokens": 2},
    "no prefix": {"proj_type": "linear", "class_token": False},
    "rectangular": {"proj_type": "linear", "patch_size": (8, 4)},
}


def naflex_embeds(**arguments):
    """timm's NaFlexEmbeds, and the fused one with the same parameters."""
    if "channels_last" in arguments and "channels_last" not in inspect.signature(NaFlexEmbeds).parameters:
        pytest.skip("this timm has one order of a patch")
    stock = NaFlexEmbeds(**{"patch_size": 8, "embed_dim": 48, "pos_embed_grid_size": (3, 5)} | arguments)
    fused = copy.deepcopy(stock)
    fused.__class__ = FusedNaFlexEmbeds
    return stock, fused


@pytest.mark.parametrize("size", [(24, 40), (16, 48)], ids=str)
@pytest.mark.parametrize("case", NAFLEX)
def test_naflex_embeddings_of_whole_images_are_one_operator(stem_kernel, case, size):
    """timm copies patches, projects, adds positions to the patches alone, puts tokens before them."""
    stock, fused = naflex_embeds(**NAFLEX[case])
    x = torch.randn(2, 3, *size)
    (got, grid), (expected, expected_grid) = fused(x), stock(x)
    assert grid == tuple(expected_grid)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(got)
    for out in (got, expected):
        out.backward(dout)
    for (name, a), b in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert stem_kernel.count("patch_embed") == 1


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_naflex_embeddings_in_bfloat16_have_timms_dtype(stem_kernel, autocast, class_token):
    dtype = torch.float32 if autocast else torch.bfloat16
    stock, fused = (module.to(dtype) for module in naflex_embeds(proj_type="linear", class_token=class_token))
    x = torch.randn(2, 3, 24, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = (module(x)[0] for module in (fused, stock))
    assert_within_budget("tokens", got, expected, stock.double()(x.double())[0])


def test_naflex_embeddings_leave_to_timm_what_is_no_whole_image(stem_kernel):
    coordinates = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], dim=1).expand(2, 6, 2)
    calls = {
        "conv": (torch.randn(2, 3, 22, 40),),  # padded; with a linear projection timm 1.0.26 cannot
        "linear": (torch.randn(2, 6, 192), coordinates),
    }
    for proj_type, args in calls.items():
        stock, fused = naflex_embeds(proj_type=proj_type, dynamic_img_pad=True)
        torch.testing.assert_close(fused(*args)[0], stock(*args)[0], atol=1e-5, rtol=1e-5)
    assert "patch_embed" not in stem_kernel


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"proj_norm_layer": LayerNorm}, "norm is a timm LayerNorm"),
        ({"input_norm_layer": LayerNorm}, "norm_input comes before proj"),
        ({"hook": True}, "proj has hooks"),
    ],
    ids=str,
)
def test_naflex_embeddings_with_other_layers_between_take_timms_steps(stem_kernel, arguments, reason):
    hooked = arguments.pop("hook", False)
    stock, fused = naflex_embeds(proj_type="linear", **arguments)
    for module in (stock, fused) if hooked else ():
        module.proj.register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(fused(x)[0], stock(x)[0], atol=1e-5, rtol=1e-5)
    assert "patch_embed" not in stem_kernel
    (found,) = fused.why_not_merged()
    assert reason in found


def test_a_naflexvit_runs_its_stem_as_one_operator_and_says_so(stem_kernel):
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 5, "pos_embed_grid_size": (4, 4)}
    stock = timm.create_model("naflexvit_base_patch16_gap", **sizes).eval()
    fused, x = vk.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(fused(x), stock(x), atol=2e-5, rtol=2e-5)
    assert stem_kernel.count("patch_embed") == 1
    (stem,) = (m for m in vk.explain(fused).modules if m.name == "embeds")
    assert stem.state == "fused"
    fused.embeds.proj.register_forward_hook(lambda *_: None)
    (stem,) = (m for m in vk.explain(fused).modules if m.name == "embeds")
    assert stem.state == "fused; positions in timm's own step: proj has hooks"


def test_weights_of_vit_pytorchs_linear_run_through_the_kernel(stem_kernel):
    weights = vit_pytorch_weights("0.x")
    model, x = load_vit_pytorch(weights, num_heads=2).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), vit_pytorch_forward(weights, x, 2), atol=2e-5, rtol=2e-5)
    assert stem_kernel.count("patch_embed") == 1


def test_a_linear_patchifier_has_whole_patches():
    with pytest.raises(ValueError, match=r"96 inputs are no patches of \(8, 5\)"):
        linear_as_convolution(torch.zeros(4, 96), (8, 5))


# Traffic.


def test_the_stem_moves_its_floor_and_nothing_else():
    """Counted by launch on meta tensors: the image once, the tokens once; in backward dout twice and the image once more."""
    stock = Stock(depth=1, dtype=torch.bfloat16, device="meta")
    fused = vk.fuse(stock)
    x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    count = _ledger.count(fused, (x,), {}, CHIPS["h200"], train=True)
    (forward,) = (op for op in count.forward if op.name.startswith("patch_embed"))
    assert count.forward[0] is forward  # no copy, no cast before it
    pixels, tokens, weight = x.numel(), 256 * 197 * 768, 768 * 768
    assert forward.flops == 2 * 256 * 196 * 768 * 768
    assert forward.read_bytes == 2 * (pixels + weight + 768 + 768 + 197 * 768)
    assert forward.written_bytes == 2 * tokens
    stem = [op for op in count.forward if op.shape == (256, 197, 768)]
    assert stem[0] is forward  # what follows is the block
    (backward,) = (op for op in count.backward if op.name.startswith("patch_embed"))
    assert backward.name == "patch_embed_dweight"
    assert backward.read_bytes == 2 * (pixels + tokens)
    assert backward.written_bytes <= 0.15 * backward.read_bytes  # partial sums, in float32
    assert backward.flops == forward.flops
