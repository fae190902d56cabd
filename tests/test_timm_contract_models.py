"""timm's models, fused: architectures and their options, image sizes, NaFlex batches, masks."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from test_timm_contract import (
    assert_runs_fused,
    assert_same,
    build,
    counted,
    images,
    outputs_and_gradients,
    stock_and_fused,
)
from timm.layers import AttentionPoolLatent, RmsNorm, SwiGLUPacked
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

import vitkernels
from vitkernels.models import FUSED_CLASSES

# Architectures. The entry points' own options, at a small size.

OPTIONS = {
    "layer scale": {"init_values": 0.1},
    "qk norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no bias in proj and MLP": {"proj_bias": False},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "quick GELU": {"act_layer": "quick_gelu"},
    "SiLU": {"act_layer": "silu"},
    "plain nn.LayerNorm": {"norm_layer": nn.LayerNorm},
    "register tokens": {"reg_tokens": 4},
    "register tokens without positions": {"reg_tokens": 4, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no embed class": {"no_embed_class": True},
    "no position embedding": {"pos_embed": "none"},
    "pre norm": {"pre_norm": True},
    "average pooling with fc_norm": {"global_pool": "avg", "fc_norm": True},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "head dim 16 and mlp ratio 3": {"num_heads": 4, "mlp_ratio": 3},
    "rectangular image": {"img_size": (32, 64)},
    "dynamic image size": {"dynamic_img_size": True},
    "dynamic padding": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "embedding norm": {"embed_norm_layer": nn.LayerNorm},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_the_vision_transformer(option):
    arguments = OPTIONS[option]
    stock, fused = stock_and_fused(**arguments)
    x = images(size=arguments.get("img_size", 64))
    assert_runs_fused(fused, stock, x)


ENTRY_POINTS = [
    "deit_tiny_distilled_patch16_224",
    "flexivit_small",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_256",
    "vit_base_patch16_siglip_gap_256",
    "vit_medium_patch16_reg4_gap_256",
    "test_vit",
    "test_vit3",
]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_point(name):
    stock, fused = stock_and_fused(name)
    assert_runs_fused(fused, stock, images())


def test_patch_14_with_register_tokens():
    stock, fused = stock_and_fused("vit_small_patch14_reg4_dinov2", img_size=56)
    assert_runs_fused(fused, stock, images(size=56))


@pytest.mark.parametrize("img_size", [70, (64, 70)])
def test_image_size_that_patches_do_not_divide(img_size):
    """``vit_so400m_patch14_siglip_384``: timm's convolution leaves the last 6 of 384 pixels out."""
    stock, fused = stock_and_fused(img_size=img_size)
    assert_runs_fused(fused, stock, images(size=img_size))


def test_wrong_image_size_raises():
    for model in stock_and_fused():
        with pytest.raises(AssertionError, match="doesn't match model"):
            model(images(size=80))
    for model in stock_and_fused(dynamic_img_size=True):
        with pytest.raises((AssertionError, ValueError), match=r"divisible by patch size|do not divide into patches"):
            model(images(size=70))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 112)])
def test_dynamic_image_sizes(size):
    stock, fused = stock_and_fused(dynamic_img_size=True, reg_tokens=2)
    assert_runs_fused(fused, stock, images(size=size))


@pytest.mark.parametrize("size", [(70, 64), (65, 81)])
def test_dynamic_padding_of_odd_sizes(size):
    stock, fused = stock_and_fused(dynamic_img_size=True, dynamic_img_pad=True)
    assert_runs_fused(fused, stock, images(size=size))


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch):
    stock, fused = stock_and_fused()
    x = images(batch)
    out, ran = counted(fused, x)
    assert_same(out, stock(x))
    assert ran == 2


def test_channels_last_images():
    stock, fused = stock_and_fused()
    assert_runs_fused(fused, stock, images().contiguous(memory_format=torch.channels_last))


def test_channels_last_model():
    stock, fused = stock_and_fused()
    assert_runs_fused(fused.to(memory_format=torch.channels_last), stock, images())


@pytest.mark.parametrize("trained", ["norm", "attn.qkv.bias", "ls1", "mlp.fc1", "patch_embed.proj", "pos_embed", "blocks.1"])
def test_frozen_parameters_get_no_gradient_and_the_others_timms(trained):
    models = stock_and_fused(init_values=0.1)
    gradients = []
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        out = model(x := torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))
        out.square().sum().backward()
        assert x.grad is None
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert_same(gradients[1], gradients[0])


def test_distilled_model_returns_both_heads_in_training():
    stock, fused = stock_and_fused("deit_tiny_distilled_patch16_224")
    for model in (stock, fused):
        model.train().set_distilled_training(True)
    x = images()
    out, ran = counted(fused, x)
    assert isinstance(out, tuple)
    assert_same(out, stock(x))
    assert ran == 2


def test_flexivit_patch_size_changed_after_fuse():
    stock, fused = stock_and_fused("flexivit_small")
    for model in (stock, fused):
        model.set_input_size(img_size=64, patch_size=8)
    assert_runs_fused(fused, stock, images())


def test_pruned_heads():
    """What head pruning does: fewer heads of the same width, without new modules."""

    def prune(attn):
        attn.num_heads, attn.attn_dim = 1, attn.head_dim
        attn.qkv.weight = nn.Parameter(attn.qkv.weight.detach().unflatten(0, (3, 2, -1))[:, 1].flatten(0, 1).clone())
        attn.qkv.bias = nn.Parameter(attn.qkv.bias.detach().unflatten(0, (3, 2, -1))[:, 1].flatten(0, 1).clone())
        attn.proj.weight = nn.Parameter(attn.proj.weight.detach()[:, attn.head_dim :].clone())

    stock, fused = stock_and_fused()
    for model in (stock, fused):
        prune(model.blocks[0].attn)
    assert_runs_fused(fused, stock, images())


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"norm_layer": RmsNorm}, "norm1 is a timm RmsNorm"),
        ({"mlp_layer": SwiGLUPacked}, "mlp is a timm"),
        ({"attn_layer": "diff"}, "attn is a timm DiffAttention"),
        ({"scale_attn_norm": True}, "attn.norm is a timm LayerNorm"),
        ({"scale_mlp_norm": True}, "mlp.norm is a timm LayerNorm"),
        ({"act_layer": "relu"}, "mlp.act is a torch ReLU"),
    ],
)
def test_unsupported_layers_keep_timms_forward_and_say_why(kwargs, reason):
    stock = build(**kwargs)
    expected = outputs_and_gradients(stock, x := images())
    got, ran = counted(outputs_and_gradients, vitkernels.fuse(stock), x)
    assert_same(got, expected)
    assert ran == 0
    block = next(m for m in vitkernels.explain(stock).modules if m.name == "blocks.0")
    assert any(r.startswith(reason) for r in block.reasons), block.reasons


@pytest.mark.parametrize("block_fn", [ResPostBlock, ParallelThingsBlock])
def test_model_of_other_blocks_is_refused_by_name(block_fn):
    stock = build(block_fn=block_fn)
    with pytest.raises(ValueError, match=block_fn.__name__):
        vitkernels.fuse(stock)


# NaFlexVit: patches of images of different sizes in one padded batch.


def naflex_batch(patch: int = 16) -> dict[str, Tensor]:
    grids = [(4, 4), (3, 5), (2, 2)]
    longest = max(h * w for h, w in grids)
    batch = {
        "patches": torch.zeros(len(grids), longest, patch * patch * 3),
        "patch_coord": torch.zeros(len(grids), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), longest, dtype=torch.bool),
    }
    for i, (h, w) in enumerate(grids):
        rows = torch.arange(h * w)
        batch["patches"][i, : h * w] = torch.randn(h * w, patch * patch * 3)
        batch["patch_coord"][i, : h * w] = torch.stack([rows // w, rows % w], dim=1)
        batch["patch_valid"][i, : h * w] = True
    return batch


NAFLEX = {
    "average pooling": ("naflexvit_base_patch16_gap", {}),
    "attention pooling": ("naflexvit_base_patch16_map", {}),
    "key-only mask": ("naflexvit_base_patch16_gap", {"use_key_only_attn_mask": True}),
    "class token": ("naflexvit_base_patch16_gap", {"class_token": True, "global_pool": "token"}),
    "SigLIP 2": ("naflexvit_base_patch16_siglip", {}),
}


@pytest.mark.parametrize("case", NAFLEX)
def test_naflexvit_with_a_padded_batch(case):
    name, kwargs = NAFLEX[case]
    stock, fused = stock_and_fused(name, img_size=None, **kwargs)
    batch = naflex_batch()
    results = []
    for model in (stock, fused):
        out, ran = counted(model, batch)
        out.sum().backward()
        results.append(({"output": out} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ran))
    assert results[0][1] == 0
    assert results[1][1] == 2
    assert torch.isfinite(results[1][0]["output"]).all()
    assert_same(results[1][0], results[0][0])


def test_naflexvit_with_images():
    stock, fused = stock_and_fused("naflexvit_base_patch16_gap", img_size=None)
    assert_runs_fused(fused, stock, images(size=(64, 96)))


@pytest.mark.parametrize("approximate", ["none", "tanh", "bogus", "", None, 1], ids=repr)
def test_an_approximation_of_gelu_takes_effect_or_is_refused_as_in_timm(approximate):
    stock, fused = stock_and_fused()
    for model in (stock, fused):
        for block in model.blocks:
            block.mlp.act = nn.GELU()
            block.mlp.act.approximate = approximate
    x = images()
    try:
        expected = stock(x)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fused(x)
        assert "approximates by" in vitkernels.explain(fused).modules[-1].state
    else:
        assert_runs_fused(fused, stock, x)
        assert_same(fused(x), expected)


# Masks.


def additive_mask(batch: int, tokens: int) -> Tensor:
    """NaFlex's kind: ``finfo.min`` and no -inf, so that a fully masked row gives mean(v)."""
    mask = torch.zeros(batch, 1, tokens, tokens)
    mask[:, :, :, -3:] = torch.finfo(torch.float32).min
    mask[0, :, 2, :] = torch.finfo(torch.float32).min
    return mask


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "additive with a fully masked row": additive_mask,
    "per head": lambda batch, tokens: torch.randn(batch, 2, tokens, tokens),
    "shared by the batch": lambda batch, tokens: torch.randn(tokens, tokens),
    "-inf": lambda batch, tokens: torch.randn(1, 1, tokens, tokens).masked_fill(torch.eye(tokens).bool(), float("-inf")),
    "bool": lambda batch, tokens: torch.rand(batch, 1, tokens, tokens) > 0.4,
    "bool, keys only": lambda batch, tokens: (torch.arange(tokens) < tokens - 3).expand(batch, 1, 1, tokens),
    "bool with a fully masked row": lambda batch, tokens: (torch.arange(tokens) != 2)[:, None].expand(batch, 1, tokens, tokens),
}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_mask(mask, qk_norm):
    stock, fused = stock_and_fused(qk_norm=qk_norm)
    x, attn_mask = images(), MASKS[mask](2, 17)
    got, ran = counted(outputs_and_gradients, fused, x, attn_mask=attn_mask)
    expected = outputs_and_gradients(stock, x, attn_mask=attn_mask)
    assert torch.isfinite(expected["output"]).all()
    assert_same(got, expected)
    assert not torch.equal(stock(x), expected["output"])
    assert ran == 2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_causal_attention(qk_norm):
    stock, fused = stock_and_fused(qk_norm=qk_norm)
    x = images()
    got, ran = counted(outputs_and_gradients, fused, x, is_causal=True)
    assert_same(got, outputs_and_gradients(stock, x, is_causal=True))
    assert not torch.equal(stock(x), got["output"])
    assert ran == 2


def test_gradient_reaches_a_learned_mask():
    stock, fused = stock_and_fused()
    x = images()
    gradients = []
    for model in (stock, fused):
        mask = torch.linspace(-1, 1, 17 * 17).view(1, 1, 17, 17).requires_grad_()
        model(x, attn_mask=mask).sum().backward()
        gradients.append(mask.grad)
    assert_same(gradients[1], gradients[0])


def test_mask_of_a_shape_that_does_not_broadcast_raises():
    for model in stock_and_fused():
        with pytest.raises((RuntimeError, ValueError)):
            model(images(), attn_mask=torch.zeros(3, 1, 17, 17))


MASKS_OF_PYTORCH = {
    "float64": lambda: torch.randn(17, 17, dtype=torch.float64),
    "float16": lambda: torch.randn(17, 17, dtype=torch.float16),
    "bfloat16": lambda: torch.randn(17, 17, dtype=torch.bfloat16),
    "int": lambda: torch.ones(17, 17, dtype=torch.int32),
    "1-d": lambda: torch.randn(17),
    "0-d": lambda: torch.tensor(0.5),
    "1-d, bool": lambda: torch.arange(17) < 9,
    "1-d, trained": lambda: torch.randn(17, requires_grad=True),
    "0-d, trained": lambda: torch.tensor(0.5, requires_grad=True),
    "5-d": lambda: torch.zeros(1, 1, 1, 17, 17),
    "list": lambda: [[0.0] * 17] * 17,
}


def outcome(module: nn.Module, x: Tensor, mask: object, cast: torch.dtype | None) -> Tensor | Exception:
    with torch.no_grad(), torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        try:
            return module(x, attn_mask=mask)
        except Exception as error:
            return error


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.float64, None),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", MASKS_OF_PYTORCH)
@pytest.mark.parametrize("kind", ["block", "norms of q and k", "pooling"])
def test_a_mask_is_accepted_or_refused_as_by_pytorch(kind, mask, dtype, cast):
    if kind == "pooling":
        stock = AttentionPoolLatent(64, num_heads=2, mlp_ratio=2).to(dtype)
    else:
        stock = Block(64, 2, qk_norm=kind != "block").to(dtype)
    fused = copy.deepcopy(stock)
    fused.__class__ = FUSED_CLASSES[type(stock)]
    x, attn_mask = torch.randn(2, 17, 64).to(dtype), MASKS_OF_PYTORCH[mask]()
    expected, got = outcome(stock, x, attn_mask, cast), outcome(fused, x, attn_mask, cast)
    if isinstance(expected, Tensor):
        step = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=4 * step, atol=4 * step)
    else:
        assert (type(got), str(got)) == (type(expected), str(expected))
        assert "attn_mask" in f"{got} {got.__notes__}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_float32_mask_beside_another_dtype_takes_effect_as_in_timm(mask, dtype):
    stock, fused = (model.to(dtype) for model in stock_and_fused())
    x, attn_mask = images().to(dtype), MASKS[mask](2, 17)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(fused(x, attn_mask=attn_mask), stock(x, attn_mask=attn_mask), atol=4 * step, rtol=4 * step)
