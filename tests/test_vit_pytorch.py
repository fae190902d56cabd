"""load_vit_pytorch: weights of lucidrains' ViT give its outputs, in every layout of its state dict."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_vision_transformer import images
from torch import nn

import vitkernels as vk
from vitkernels.models import load_vit_pytorch


def vit_pytorch_weights(version="current", width=64, heads=2, dim_head=32, class_token=True, depth=2, patch=8, grid=(4, 4)):
    """A state dict of vit_pytorch.ViT: "current" (1.17), "1.4" or "0.x"."""
    inner, hidden, pixels, tokens = heads * dim_head, 100, 3 * patch * patch, grid[0] * grid[1] + class_token
    leading = () if version == "current" else (1,)
    state = {"pos_embedding": (*leading, tokens, width), "cls_token": (*leading, int(class_token), width)}
    linears = {"to_patch_embedding.1" if version == "0.x" else "to_patch_embedding.2": (width, pixels)}
    norms = {} if version == "0.x" else {"to_patch_embedding.1": pixels, "to_patch_embedding.3": width}
    for i in range(depth):
        layer, wrapper = f"transformer.layers.{i}.", "fn." if version == "0.x" else ""
        state[f"{layer}0.{wrapper}to_qkv.weight"] = (3 * inner, width)
        norms[f"{layer}0.norm"] = width
        if heads > 1 or dim_head != width:
            linears[f"{layer}0.{wrapper}to_out.0"] = (width, inner)
        names = ("1.norm", "1.fn.net.0", "1.fn.net.3") if version == "0.x" else ("1.net.0", "1.net.1", "1.net.4")
        norms[layer + names[0]] = width
        linears[layer + names[1]], linears[layer + names[2]] = (hidden, width), (width, hidden)
    norms["mlp_head.0" if version == "0.x" else "transformer.norm"] = width
    linears["mlp_head.1" if version == "0.x" else "mlp_head"] = (5, width)
    state |= {f"{n}.weight": shape for n, shape in linears.items()} | {f"{n}.bias": shape[:1] for n, shape in linears.items()}
    tensors = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in state.items()}
    for name, size in norms.items():
        tensors |= {f"{name}.weight": 1 + 0.3 * torch.randn(size), f"{name}.bias": 0.3 * torch.randn(size)}
    return tensors


def vit_pytorch_forward(w, x, heads, pool="cls", patch=8):
    """vit_pytorch.ViT's forward in evaluation mode, written from its architecture."""
    linear = lambda x, n: F.linear(x, w[n + ".weight"], w.get(n + ".bias"))  # noqa: E731
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], w[n + ".weight"], w[n + ".bias"], 1e-5)  # noqa: E731
    old = "mlp_head.1.weight" in w
    x = F.unfold(x, patch, stride=patch).transpose(1, 2)  # (B, N, C*p*p)
    x = x.unflatten(2, (3, patch * patch)).transpose(2, 3).flatten(2)  # (B, N, p*p*C)
    if old:
        x = linear(x, "to_patch_embedding.1")
    else:
        x = norm(linear(norm(x, "to_patch_embedding.1"), "to_patch_embedding.2"), "to_patch_embedding.3")
    token = w["cls_token"].reshape(1, -1, x.shape[-1]).expand(len(x), -1, -1)
    x = torch.cat([token, x], dim=1) + w["pos_embedding"]
    for i in range(len([n for n in w if "to_qkv" in n])):
        layer, fn = f"transformer.layers.{i}.", "fn." if old else ""
        q, k, v = linear(norm(x, layer + "0.norm"), f"{layer}0.{fn}to_qkv").chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        a = a.transpose(1, 2).flatten(2)
        x = x + (linear(a, f"{layer}0.{fn}to_out.0") if f"{layer}0.{fn}to_out.0.weight" in w else a)
        names = ("1.norm", "1.fn.net.0", "1.fn.net.3") if old else ("1.net.0", "1.net.1", "1.net.4")
        x = x + linear(F.gelu(linear(norm(x, layer + names[0]), layer + names[1])), layer + names[2])
    if not old:
        x = norm(x, "transformer.norm")
    if not any("mlp_head" in n for n in w):
        return x
    x = x.mean(1) if pool == "mean" else x[:, 0]
    return linear(norm(x, "mlp_head.0"), "mlp_head.1") if old else linear(x, "mlp_head")


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("version", ["current", "1.4", "0.x"])
def test_vit_pytorch_weights_give_its_outputs(version, pool):
    weights = vit_pytorch_weights(version)
    pooling = {"global_pool": "avg"} if pool == "mean" else {}
    model = load_vit_pytorch(weights, num_heads=2, **pooling).eval()
    assert type(model) is vk.VisionTransformer
    assert all(m.fused for m in vk.explain(model).modules if m.name.startswith("blocks"))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    x = images()
    torch.testing.assert_close(model(x), vit_pytorch_forward(weights, x, 2, pool), atol=2e-5, rtol=2e-5)


def test_vit_pytorch_without_class_token_averages_the_patches():
    weights = vit_pytorch_weights(class_token=False)
    model = load_vit_pytorch(weights, num_heads=2).eval()
    assert (model.cls_token, model.global_pool) == (None, "avg")
    x = images()
    torch.testing.assert_close(model(x), vit_pytorch_forward(weights, x, 2, "mean"), atol=2e-5, rtol=2e-5)


def test_vit_pytorch_without_classes_returns_tokens():
    weights = {n: t for n, t in vit_pytorch_weights().items() if "mlp_head" not in n}
    x = images()
    y = load_vit_pytorch(weights, num_heads=2).eval()(x)
    assert y.shape == (2, 17, 64)
    torch.testing.assert_close(y, vit_pytorch_forward(weights, x, 2), atol=2e-5, rtol=2e-5)


def test_vit_pytorch_heads_are_64_wide_unless_told_and_need_not_fill_the_width():
    weights = vit_pytorch_weights(width=96, heads=3, dim_head=64)
    model = load_vit_pytorch(weights).eval()
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (3, 64, 192)
    x = images()
    torch.testing.assert_close(model(x), vit_pytorch_forward(weights, x, 3), atol=2e-5, rtol=2e-5)
    assert vk.explain(model).num_fused == 2
    assert load_vit_pytorch(weights, num_heads=6).blocks[0].attn.head_dim == 32


def test_vit_pytorch_single_head_without_output_projection():
    weights = vit_pytorch_weights(heads=1, dim_head=64)
    assert not any("to_out" in n for n in weights)
    x = images()
    y = load_vit_pytorch(weights).eval()(x)
    torch.testing.assert_close(y, vit_pytorch_forward(weights, x, 1), atol=2e-5, rtol=2e-5)


def test_vit_pytorch_gradients_reach_every_parameter_and_the_model_scripts_copies_and_compiles():
    model = load_vit_pytorch(vit_pytorch_weights(), num_heads=2, pos_drop_rate=0.0).train()
    x = images()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    torch._dynamo.reset()
    for other in (
        copy.deepcopy(model),
        torch.fx.symbolic_trace(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_a_vit_pytorch_model_scripts():
    model = load_vit_pytorch(vit_pytorch_weights(), num_heads=2).eval()
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=0)


def test_vit_pytorch_models_take_other_image_sizes_but_not_other_patches():
    weights = vit_pytorch_weights(grid=(2, 8))
    model = load_vit_pytorch(weights, num_heads=2, img_size=(16, 64)).eval()
    x = images(2, 3, 16, 64)
    torch.testing.assert_close(model(x), vit_pytorch_forward(weights, x, 2), atol=2e-5, rtol=2e-5)
    assert model.patch_embed.feat_ratio() == 8
    assert model.patch_embed.dynamic_feat_size((16, 64)) == (2, 8)
    assert model.get_intermediate_layers(x, reshape=True)[0].shape == (2, 64, 2, 8)
    with pytest.raises(AssertionError, match="Input height"):
        model(images())
    model.set_input_size(img_size=(32, 32))
    assert model(images()).shape == (2, 5)
    with pytest.raises(ValueError, match="one patch size"):
        model.set_input_size(patch_size=4)
    dynamic = load_vit_pytorch(vit_pytorch_weights(), num_heads=2, dynamic_img_size=True).eval()
    assert dynamic(images(2, 3, 40, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match="does not pad"):
        load_vit_pytorch(weights, num_heads=2, img_size=(16, 64), dynamic_img_pad=True)


def test_vit_pytorch_models_keep_the_dtype_of_the_weights():
    model = load_vit_pytorch({n: t.double() for n, t in vit_pytorch_weights().items()}, num_heads=2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("layout", ["missing", "unexpected", "timm"])
def test_another_layout_is_a_value_error_that_names_the_keys(layout):
    weights = vit_pytorch_weights()
    if layout == "missing":
        del weights["transformer.layers.1.0.to_qkv.weight"]
        message = r"missing \['transformer.layers.1.0.to_qkv.weight'\], unexpected none"
    elif layout == "unexpected":
        weights["dist_token"] = torch.zeros(1, 1, 64)
        message = r"missing none, unexpected \['dist_token'\]"
    else:
        weights = timm.create_model("test_vit").state_dict()
        message = r"missing .*'to_patch_embedding.1.weight'.*unexpected \['blocks.0.attn.proj.bias'"
    with pytest.raises(ValueError, match=message):
        load_vit_pytorch(weights, num_heads=2)


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        ({"dim_head": 24}, {}, "48 attention channels are not heads of 64: pass num_heads="),
        ({}, {"num_heads": 5}, "num_heads=5 does not divide the 64 attention channels"),
        ({"grid": (2, 8), "class_token": False}, {"num_heads": 2}, None),
        ({"grid": (2, 6)}, {"num_heads": 2}, "12 is no square, so img_size does not follow"),
        ({}, {"num_heads": 2, "in_chans": 1}, "192 is no square, so patch_size does not follow"),
        ({}, {"num_heads": 2, "patch_size": 7}, "do not have the 192 values"),
        ({"grid": (2, 6)}, {"num_heads": 2, "img_size": 64}, "do not fit together.*pos_embed"),
    ],
)
def test_sizes_that_weights_do_not_tell_are_value_errors_that_say_what_to_pass(made, arguments, message):
    weights = vit_pytorch_weights(**made)
    if message is None:
        assert load_vit_pytorch(weights, **arguments).patch_embed.grid_size == (4, 4)  # 16 patches look square
        return
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_vit_pytorch(weights, **arguments)
