"""Patch embedding, positions and head: what stands around the blocks is hooked, replaced and patched as in timm."""

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
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import nn


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
