"""Patch embedding, positions and head: what stands around the blocks is hooked, replaced and patched as in timm."""

import re
import types

import pytest
import torch
from test_timm_contract import (
    assert_modified_alike,
    assert_same,
    images,
    stock_and_fused,
)
from test_timm_contract_guard import HOOKS, forward_hook
from timm.layers import Format, PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vitkernels


@pytest.mark.parametrize("register", HOOKS)
def test_hook_on_the_patch_projection_fires(register):
    logs: list[list[str]] = []

    def modify(model):
        logs.append([])
        register(model.patch_embed.proj, logs[-1])

    assert_modified_alike(modify, blocks=2)
    assert logs[0] == logs[1] != []


def test_hook_on_the_patch_norm_fires():
    assert_modified_alike(lambda model: forward_hook(model.patch_embed.norm, []), blocks=2)


def test_replaced_patch_projection_takes_effect():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def modify(model):
        model.patch_embed.proj.__class__ = Doubled

    assert_modified_alike(modify, blocks=2)


def test_patch_projection_with_its_own_forward_takes_effect():
    def modify(model):
        proj = model.patch_embed.proj
        proj.forward = lambda x: 2 * nn.Conv2d.forward(proj, x)

    assert_modified_alike(modify, blocks=2)


def test_class_wide_patched_patch_embed_takes_effect(monkeypatch):
    stock, fused = stock_and_fused()
    original = PatchEmbed.forward
    monkeypatch.setattr(PatchEmbed, "forward", lambda self, x: 2 * original(self, x))
    x = images()
    assert_same(fused(x), stock(x))


def test_overlapping_patches_by_a_smaller_stride_take_effect():
    """``patch_embed.proj.stride = (8, 8)`` is how dense descriptors are taken from a ViT (Amir et al. 2021)."""

    def modify(model):
        model.patch_embed.proj.stride = (8, 8)
        model.pos_embed = None

    assert_modified_alike(modify, blocks=2)


def test_padded_patch_projection_takes_effect():
    def modify(model):
        model.patch_embed.proj.padding = (8, 8)
        model.pos_embed = None

    assert_modified_alike(modify, blocks=2)


AROUND = [
    "patch_embed",
    "patch_embed.norm",
    "pos_drop",
    "patch_drop",
    "norm_pre",
    "blocks",
    "norm",
    "fc_norm",
    "head_drop",
    "head",
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("child", AROUND)
def test_hook_around_the_blocks_fires(child, register):
    logs: list[list[str]] = []

    def modify(model):
        logs.append([])
        register(model.get_submodule(child), logs[-1])

    assert_modified_alike(modify, blocks=2, pre_norm=True, class_token=False, global_pool="avg")
    assert logs[0] == logs[1] != []


@pytest.mark.parametrize("child", AROUND)
def test_module_around_the_blocks_with_its_own_forward_takes_effect(child):
    def modify(model):
        module = model.get_submodule(child)
        original = module.forward
        module.forward = lambda *args: 1.5 * original(*args)

    assert_modified_alike(modify, blocks=2, pre_norm=True, class_token=False, global_pool="avg")


@pytest.mark.parametrize("child", AROUND)
def test_replaced_module_around_the_blocks_takes_effect(child):
    class Scale(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)  # the model asks patch_embed for its grid

        def forward(self, x):
            return 1.5 * self.inner(x)

    def modify(model):
        model.set_submodule(child, Scale(model.get_submodule(child)))

    assert_modified_alike(modify, blocks=2, pre_norm=True, class_token=False, global_pool="avg")


def test_patched_method_of_the_instance_takes_effect():
    """How dense-feature code resizes positions: it binds its own ``_pos_embed`` to one model."""

    def own_pos_embed(self, x):
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def modify(model):
        model._pos_embed = types.MethodType(own_pos_embed, model)

    assert_modified_alike(modify, blocks=2)


def test_patched_method_of_the_class_takes_effect(monkeypatch):
    stock, fused = stock_and_fused()
    x = images()
    before = stock(x)
    original = VisionTransformer._pos_embed
    monkeypatch.setattr(VisionTransformer, "_pos_embed", lambda self, tokens: 1.5 * original(self, tokens))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x), expected)


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "reg_token", "pos_embed"])
def test_reassigned_parameter_around_the_blocks_takes_effect(name):
    def modify(model):
        owner, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).detach() * 2))

    assert_modified_alike(modify, blocks=2, reg_tokens=2)


# Forwards of the model itself.


def own_features(self, x, attn_mask=None, is_causal=False):
    """Adds the positions itself, and keeps something on the model: as code that visualises or masks tokens does."""
    x = self.patch_embed(x).flatten(1, -2)
    self.kept = x
    x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
    return self.norm(self.blocks(x))


def around(original):
    def forward(self, x, *args, **kwargs):
        self.kept = x
        return original(self, 2 * x, *args, **kwargs)

    return forward


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["forward_features", "forward_intermediates"])
@pytest.mark.parametrize("kind", ["own", "around"])
def test_a_replaced_forward_of_the_model_runs_on_the_model_itself(kind, name, dynamic, where, monkeypatch):
    stock, fused = stock_and_fused(dynamic_img_size=dynamic)
    replacement = own_features if kind == "own" else around(getattr(VisionTransformer, name))
    x = images()
    before = getattr(stock, name)(x)
    if where == "class":
        monkeypatch.setattr(VisionTransformer, name, replacement)
    else:
        for model in (stock, fused):
            setattr(model, name, types.MethodType(replacement, model))
    expected = getattr(stock, name)(x)
    assert_same(getattr(fused, name)(x), expected)
    assert_same(fused.kept, stock.kept)
    assert kind == "own" or not torch.equal(before[0], expected[0])


@pytest.mark.parametrize(
    "arguments", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2, "no_embed_class": True}, {"pos_embed": "none"}]
)
def test_the_steps_called_one_by_one_are_timms(arguments):
    stock, fused = stock_and_fused(**arguments)
    x = images()
    patches = fused.patch_embed(x)
    assert_same(patches, stock.patch_embed(x))
    assert_same(fused._pos_embed(patches), stock._pos_embed(stock.patch_embed(x)))
    assert_same(fused.blocks(fused._pos_embed(patches)), stock.blocks(stock._pos_embed(stock.patch_embed(x))))


def test_a_module_of_the_model_that_calls_its_stem_gets_timms_tokens():
    """The stem runs inside forward_features, but was not called by it."""

    class Again(nn.Module):
        def __init__(self, model, x):
            super().__init__()
            self.owner, self.x = [model], x

        def forward(self, tokens):
            (model,) = self.owner
            return tokens + model.patch_embed(self.x).flatten(1, -2).mean(1, keepdim=True)

    x = images()

    def modify(model):
        model.norm_pre = Again(model, x)

    assert_modified_alike(modify, blocks=2, x=x)


def test_a_subclass_may_wrap_the_steps():
    class Mine(vitkernels.VisionTransformer):
        def forward_features(self, x, **kwargs):
            self.seen = self._pos_embed(self.patch_embed(x))
            return super().forward_features(x, **kwargs)

    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = Mine(**arguments).eval()
    stock = VisionTransformer(**arguments).eval()
    stock.load_state_dict(model.state_dict())
    x = images()
    assert_same(model(x), stock(x))
    assert_same(model.seen, stock._pos_embed(stock.patch_embed(x)))
    assert model.why_not_merged() == []


# Sizes and tables that timm accepts, or refuses.


def assert_same_or_refused(fused: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    """What timm takes gives timm's output, and what timm refuses is refused."""
    try:
        expected = stock(x)
    except (RuntimeError, AssertionError):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            fused(x)
    else:
        assert_same(fused(x), expected)


@pytest.mark.parametrize("shape", [(1, 1, 64), (64,), (17, 64), (2, 17, 64), (1, 17, 1)])
def test_a_position_table_that_broadcasts_takes_effect(shape):
    table = torch.randn(shape)
    assert_modified_alike(lambda model: setattr(model, "pos_embed", nn.Parameter(table.clone())), blocks=2)


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 64), (1, 10, 64)])
def test_a_position_table_of_another_grid_takes_effect_with_dynamic_sizes(shape):
    """``patch_embed.grid_size`` no longer says what its grid is: timm broadcasts, resamples by the wrong grid, or raises."""
    stock, fused = stock_and_fused(dynamic_img_size=True)
    for model in (stock, fused):
        torch.manual_seed(1)
        model.pos_embed = nn.Parameter(torch.randn(shape))
    x = images()
    assert_same_or_refused(fused, stock, x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"img_size": (96, 96)},
        {"grid_size": (2, 2)},
        {"grid_size": (2, 8)},
        {"patch_size": (8, 8)},
        {"patch_size": (32, 32)},
        {"patch_size": (8, 8), "strict_img_size": False},
        {"img_size": (96, 96), "grid_size": (6, 6), "strict_img_size": False},
        {"img_size": (96, 96), "strict_img_size": False},
        {"img_size": None},
    ],
    ids=str,
)
def test_sizes_set_by_hand_take_effect_as_in_timm(sizes, dynamic):
    stock, fused = stock_and_fused(dynamic_img_size=dynamic)
    for model in (stock, fused):
        vars(model.patch_embed).update(sizes)
    for size in (64, 96, (96, 32), (80, 48), (72, 40)):
        assert_same_or_refused(fused, stock, images(size=size))


def test_a_table_for_larger_images_sees_all_of_them():
    """As checkpoints are adapted by hand: a larger ``img_size`` and table, and the grid forgotten."""
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        torch.manual_seed(1)
        model.patch_embed.img_size, model.pos_embed = (96, 96), nn.Parameter(torch.randn(1, 37, 64))
    x = images(size=96)
    assert_same(fused(x), stock(x))
    x[..., 64:] += 1
    assert_same(fused(x), stock(x))


@pytest.mark.parametrize("name", ["cls_token", "reg_token"])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 1)])
def test_prefix_tokens_of_another_shape_take_effect_or_are_refused_as_in_timm(shape, name):
    stock, fused = stock_and_fused(reg_tokens=1)
    for model in (stock, fused):
        torch.manual_seed(1)
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    x = images()
    assert_same_or_refused(fused, stock, x)


@pytest.mark.parametrize(
    "arguments", [{}, {"dynamic_img_size": True}, {"name": "naflexvit_base_patch16_gap", "img_size": None}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_dtype_are_refused_as_in_timm(dtype, arguments):
    stock, fused = stock_and_fused(**arguments)
    with pytest.raises(RuntimeError) as expected:
        stock(images().to(dtype))
    with pytest.raises(RuntimeError) as got:
        fused(images().to(dtype))
    assert str(got.value) == str(expected.value)
    with pytest.raises(RuntimeError):
        getattr(fused, "patch_embed", getattr(fused, "embeds", None))(images().to(dtype))


@pytest.mark.parametrize("size", [8, (8, 64), (64, 8), (0, 64), (64, 72)])
def test_an_image_that_is_no_whole_patches_is_refused_by_its_size(size):
    stock, fused = stock_and_fused(dynamic_img_size=True)
    height, width = images(size=size).shape[-2:]
    named = rf"\({height}\)|\({width}\)|\b{height} ?x ?{width}\b|\b{height}, {width}\b"
    for model in (stock, fused):
        with pytest.raises((RuntimeError, AssertionError, ValueError), match=named):
            model(images(size=size))


def test_an_array_of_numpy_is_refused_as_in_timm():
    for model in stock_and_fused():
        with pytest.raises(TypeError, match=r"conv2d\(\) received .*numpy.ndarray"):
            model(images().numpy())


@pytest.mark.parametrize("wrong", ["channels", "dimensions"])
def test_images_that_are_none_are_refused(wrong):
    stock, fused = stock_and_fused()
    x = images()[:, :2] if wrong == "channels" else images()[0]
    for model in (stock, fused):
        with pytest.raises((RuntimeError, ValueError)):
            model(x)


class _First(nn.Module):
    def forward(self, table):
        return table[:, :1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_parametrized_positions_take_effect(dynamic):
    """They are a property of the model's class then, not of the model."""
    stock, fused = stock_and_fused(dynamic_img_size=dynamic)
    for model in (stock, fused):
        torch.nn.utils.parametrize.register_parametrization(
            model, "pos_embed", nn.Softplus() if dynamic else _First(), unsafe=True
        )
    x = images()
    assert_same(fused(x), stock(x))
    assert_same(fused._pos_embed(fused.patch_embed(x)), stock._pos_embed(stock.patch_embed(x)))


def test_positions_of_one_channel_take_effect_with_dynamic_sizes():
    stock, fused = stock_and_fused(dynamic_img_size=True)
    for model in (stock, fused):
        model.pos_embed = nn.Parameter(torch.linspace(0, 1, 17).view(1, 17, 1))
    x = images()
    assert_same(fused(x), stock(x))


def test_a_number_in_the_place_of_positions_takes_effect():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        del model.pos_embed
        model.pos_embed = 0.5
    x = images()
    assert_same(fused(x), stock(x))


def test_an_image_size_that_is_one_number_takes_effect_as_in_timm():
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        model.patch_embed.strict_img_size, model.patch_embed.img_size = False, 64
    x = images()
    assert_same(fused(x), stock(x))


@pytest.mark.parametrize("kind", ["naflexvit", "map", "vit"])
def test_weights_that_are_there_only_inside_of_their_layers_calls_take_effect(kind):
    """As ZeRO-3 does: hooks gather a layer's weights before its forward, and leave empty ones behind it."""
    name = "naflexvit_base_patch16_gap" if kind == "naflexvit" else "vit_tiny_patch16_224"
    options = {"naflexvit": {"img_size": None}, "map": {"class_token": False, "global_pool": "map"}, "vit": {}}[kind]
    stock, fused = stock_and_fused(name, **options)
    x = images()
    expected = stock(x)
    for layer in [module for module in fused.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm))]:
        whole = {key: p.data for key, p in layer.named_parameters()}

        def gather(module, _inputs, whole=whole):
            for key, value in whole.items():
                getattr(module, key).data = value

        def release(module, _inputs, _output=None, whole=whole):
            for key, value in whole.items():
                getattr(module, key).data = value.new_empty(0)

        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(release)
        release(layer, None)
    with torch.no_grad():
        assert_same(fused(x), expected.detach())


def _always_flat(model):
    model.patch_embed.flatten = True


def _dynamic(model):
    model.dynamic_img_size, model.patch_embed.strict_img_size = True, False


def _static(model):
    model.dynamic_img_size = False


def _a_row(model):
    model.patch_embed.output_fmt = Format.NLC


def _a_grid(model):
    model.patch_embed.flatten, model.patch_embed.output_fmt = False, Format.NHWC


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({}, _dynamic),
        ({}, _a_grid),
        ({"dynamic_img_size": True}, _always_flat),
        ({"dynamic_img_size": True}, _static),
        ({"dynamic_img_size": True}, _a_row),
    ],
    ids=lambda value: getattr(value, "__name__", "dynamic" if value else "static"),
)
def test_tokens_of_another_layout_than_positions_expect_are_refused_as_in_timm(arguments, change, size):
    stock, fused = stock_and_fused(**arguments)
    for model in (stock, fused):
        change(model)
        with pytest.raises((ValueError, RuntimeError, AssertionError)):
            model(images(2, size))


def test_a_check_of_sizes_that_was_switched_off_is_off(monkeypatch):
    stock, fused = stock_and_fused(pos_embed="none")
    monkeypatch.setattr("timm.layers.patch_embed._assert", lambda condition, message: None)
    x = images(2, (48, 80))
    assert_same(fused(x), stock(x))


def test_positions_of_a_naflexvit_replaced_on_its_type_take_effect(monkeypatch):
    stock, fused = stock_and_fused("naflexvit_base_patch16_gap", img_size=None)
    x = images()
    before = stock(x)
    found = []
    for model in (stock, fused):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.embeds), "_apply_learned_pos_embed", lambda self, x, grid_size: x.add_(2.0))
            found.append(model(x))
    assert not torch.equal(found[0], before)
    assert_same(found[1], found[0])


class _Doubling(Tensor):
    """A subclass that acts where timm's forward uses it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return 2 * result if func in (Tensor.add, Tensor.__add__, Tensor.expand) else result


@pytest.mark.parametrize("change", ["integers", "a subclass"])
@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "reg_token"])
def test_positions_and_tokens_of_integers_or_a_subclass_take_effect(name, change):
    stock, fused = stock_and_fused(reg_tokens=2)
    x = images()
    before = stock(x)
    for model in (stock, fused):
        value = getattr(model, name).detach()
        value = (10 * value).long() if change == "integers" else value.as_subclass(_Doubling)
        setattr(model, name, nn.Parameter(value, requires_grad=False))
    expected = stock(x)
    assert not torch.equal(expected, before)
    assert_same(fused(x).as_subclass(Tensor), expected.as_subclass(Tensor))


def test_an_image_of_another_size_is_broadcast_or_refused_as_in_timm():
    stock, fused = stock_and_fused(no_embed_class=True)
    for model in (stock, fused):
        model.patch_embed.strict_img_size = False
        with pytest.raises(RuntimeError, match="must match the size"):
            model(images(2, 96))
    x = images(2, 16)
    assert_same(fused(x), stock(x))


@pytest.mark.parametrize("change", ["padding", "_conv_forward"])
def test_a_convolution_changed_by_hand_takes_effect(change):
    """As users do who want an image to wrap around."""
    stock, fused = stock_and_fused(dynamic_img_size=True)
    x = images()
    before = stock(x)
    for model in (stock, fused):
        proj = model.patch_embed.proj
        if change == "padding":
            proj.padding_mode, proj._reversed_padding_repeated_twice = "circular", [16, 0, 16, 0]
        else:
            original = proj._conv_forward
            proj._conv_forward = lambda *args, original=original: 2 * original(*args)
    assert not torch.equal(stock(x), before)
    assert_same(fused(x), stock(x))


# NaFlexVit's stem, whose fused forward sees whole images alone.


CHANGES = {
    "method of the instance": lambda embeds: setattr(embeds, "_apply_learned_pos_embed", lambda x, grid_size: x.add_(7.0)),
    "parametrized positions": lambda embeds: parametrize.register_parametrization(embeds, "pos_embed", nn.Tanh()),
    "bias that broadcasts": lambda embeds: setattr(embeds.proj, "bias", nn.Parameter(torch.ones(1))),
}


def naflex(kind: str) -> tuple[nn.Module, nn.Module]:
    return stock_and_fused("naflexvit_base_patch16_gap", img_size=None, embed_proj_type=kind)


@pytest.mark.parametrize(
    ("change", "kind"),
    [(change, kind) for change in CHANGES for kind in ("conv", "linear") if (change, kind) != ("bias that broadcasts", "conv")],
)
def test_what_is_changed_on_the_stem_of_a_naflexvit_takes_effect(change, kind):
    stock, fused = naflex(kind)
    x = images(size=(64, 96))
    before = stock(x)
    for model in (stock, fused):
        CHANGES[change](model.embeds)
    expected = stock(x)
    assert not torch.equal(before, expected)
    assert_same(fused(x), expected)
    assert "embeds" in [module.name for module in vitkernels.explain(fused).modules]


def linear_for_convolution(embeds):
    embeds.proj = nn.Linear(768, 768) if isinstance(embeds.proj, nn.Conv2d) else nn.Conv2d(3, 768, 16, 16)


FLIPS = {
    "is_linear": lambda embeds: setattr(embeds, "is_linear", not embeds.is_linear),
    "flatten": lambda embeds: setattr(embeds, "flatten", not embeds.flatten),
    "proj": linear_for_convolution,
    "proj and is_linear": lambda embeds: (linear_for_convolution(embeds), setattr(embeds, "is_linear", not embeds.is_linear)),
}


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("flip", FLIPS)
def test_another_way_of_projecting_on_the_stem_of_a_naflexvit_is_timms(flip, kind):
    stock, fused = naflex(kind)
    for model in (stock, fused):
        torch.manual_seed(1)
        FLIPS[flip](model.embeds)
    x = images(size=(64, 96))
    assert_same_or_refused(fused, stock, x)
    try:
        stock(x)
    except RuntimeError:
        assert fused.embeds.why_not_merged() != []


@pytest.mark.parametrize("patch_size", [16, None])
def test_a_patch_size_of_a_naflexvit_that_is_no_pair_takes_effect_as_in_timm(patch_size):
    stock, fused = naflex("conv")
    for model in (stock, fused):
        model.embeds.patch_size = patch_size
    x = images()
    assert_same(fused(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_coordinates_of_patches_may_be_of_any_dtype(dtype):
    stock, fused = naflex("linear")
    rows, cols = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    coordinates = torch.stack([rows, cols], -1).flatten(0, 1).expand(2, 12, 2).to(dtype)
    patches, valid = torch.randn(2, 12, 768), torch.ones(2, 12, dtype=torch.bool)
    assert_same(fused(patches, coordinates, valid), stock(patches, coordinates, valid))


@pytest.mark.parametrize("flag", ["pos_embed_ar_preserving", "pos_embed_antialias", "pos_embed_align_corners"])
@pytest.mark.parametrize("value", [0, 1, None, "yes"], ids=repr)
def test_a_flag_of_a_naflexvit_that_is_no_bool_takes_effect_or_is_refused_as_in_timm(flag, value):
    stock, fused = naflex("linear")
    for model in (stock, fused):
        setattr(model.embeds, flag, value)
    x = images(size=(64, 96))
    try:
        expected = stock(x)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fused(x)
    else:
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=2e-5)


COORDINATES = {
    "fewer images": lambda coordinates: coordinates[:2],
    "one image": lambda coordinates: coordinates[:1],
    "one image of several sizes": lambda coordinates: coordinates[2:],
    "more images": lambda coordinates: coordinates.repeat(2, 1, 1),
    "three columns": lambda coordinates: torch.cat([coordinates, coordinates[..., :1]], -1),
    "one column": lambda coordinates: coordinates[..., :1],
    "two dimensions": lambda coordinates: coordinates[0],
    "fewer patches": lambda coordinates: coordinates[:, :5],
}


@pytest.mark.parametrize("change", COORDINATES)
def test_coordinates_of_another_shape_take_effect_or_are_refused_as_in_timm(change):
    stock, fused = (model.embeds for model in naflex("linear"))
    grids, patches = [(3, 4), (2, 6), (4, 3)], torch.randn(3, 12, 768)
    coordinates = torch.stack([torch.tensor([(i // w, i % w) for i in range(12)]) for _, w in grids])
    patch_coord = COORDINATES[change](coordinates)
    try:
        expected = stock(patches, patch_coord)[0]
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fused(patches, patch_coord)
    else:
        torch.testing.assert_close(fused(patches, patch_coord)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("preserving", [False, True])
def test_coordinates_of_an_image_without_a_row_take_effect_or_are_refused_as_in_timm(preserving):
    stock, fused = (model.embeds for model in naflex("linear"))
    stock.pos_embed_ar_preserving = fused.pos_embed_ar_preserving = preserving
    patches, coordinates = torch.randn(2, 12, 768), torch.tensor([(i // 4, i % 4) for i in range(12)]).repeat(2, 1, 1)
    coordinates[1, :, 0] = -1
    try:
        expected = stock(patches, coordinates)[0]
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused(patches, coordinates)
    else:
        torch.testing.assert_close(fused(patches, coordinates)[0], expected, rtol=0, atol=2e-6)


def test_a_table_of_one_channel_is_refused_for_a_mixed_batch_as_in_timm():
    for model in naflex("linear"):
        model.embeds.pos_embed = nn.Parameter(torch.randn(1, 7, 7, 1))
        with pytest.raises((RuntimeError, IndexError)):
            model.embeds(torch.randn(1, 12, 768), torch.tensor([[(i // 4, i % 4) for i in range(12)]]))
