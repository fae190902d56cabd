"""Features, slices and reduced precision of fused models."""

from collections.abc import Callable

import pytest
import timm
import torch
from helpers import assert_within_budget, timm_since
from test_timm_contract import (
    SMALL,
    assert_same,
    build,
    counted,
    images,
    outputs_and_gradients,
    perturbed,
    stock_and_fused,
)
from test_timm_contract_models import additive_mask, naflex_batch
from torch import Tensor, nn

import vitkernels

# Features and slices.


@pytest.mark.parametrize("model_kwargs", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"norm": True, "return_prefix_tokens": True},
        {"output_fmt": "NLC", "intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ],
)
def test_forward_intermediates(kwargs, model_kwargs):
    stock, fused = stock_and_fused(**model_kwargs)
    x = images()
    got, ran = counted(fused.forward_intermediates, x, **kwargs)
    assert_same(got, stock.forward_intermediates(x, **kwargs))
    assert ran == 2


def test_forward_intermediates_with_a_mask():
    stock, fused = stock_and_fused()
    x, mask = images(), additive_mask(2, 17)
    got, ran = counted(fused.forward_intermediates, x, attn_mask=mask)
    assert_same(got, stock.forward_intermediates(x, attn_mask=mask))
    assert ran == 2


@timm_since("1.0.28", "intermediates of packed patches")
def test_forward_intermediates_of_a_naflexvit():
    stock, fused = stock_and_fused("naflexvit_base_patch16_gap", img_size=None)
    batch = naflex_batch()
    got, ran = counted(fused.forward_intermediates, batch, output_fmt="NLC")
    assert_same(got, stock.forward_intermediates(batch, output_fmt="NLC"))
    assert ran == 2


def test_forward_intermediates_stops_early():
    stock, fused = stock_and_fused(depth=3)
    x = images()
    kwargs = {"indices": [0], "intermediates_only": True}
    got, ran = counted(fused.forward_intermediates, x, stop_early=True, **kwargs)
    assert ran == 1
    assert torch.equal(got[0], fused.forward_intermediates(x, **kwargs)[0])
    assert_same(got, stock.forward_intermediates(x, stop_early=True, **kwargs))


def test_get_intermediate_layers():
    stock, fused = stock_and_fused()
    x = images()
    kwargs = {"n": 2, "reshape": True, "return_prefix_tokens": True, "norm": True}
    got, ran = counted(fused.get_intermediate_layers, x, **kwargs)
    assert_same(got, stock.get_intermediate_layers(x, **kwargs))
    assert ran == 2


@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only_model(feature_cls):
    kwargs = {} if feature_cls is None else {"feature_cls": feature_cls}
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
    arguments |= {"features_only": True, "out_indices": (0, 1)}
    stock = perturbed(timm.create_model("vit_tiny_patch16_224", **arguments, **kwargs).eval())
    x = images()
    expected = stock(x)
    got, ran = counted(vitkernels.fuse(stock), x)
    assert_same(got, expected)
    assert ran == 2
    assert list(stock.feature_info.channels()) == [SMALL["embed_dim"]] * len(got)


def test_pruned_intermediate_layers():
    stock, fused = stock_and_fused(depth=3)
    for model in (stock, fused):
        model.prune_intermediate_layers(1, prune_head=True)
    x = images()
    assert_same(fused(x), stock(x))


def test_results_of_a_block_do_not_depend_on_what_follows():
    _, fused = stock_and_fused(depth=3)
    tokens = torch.randn(2, 17, SMALL["embed_dim"])
    alone = fused.blocks[0](tokens)
    seen = []
    fused.blocks[0].register_forward_hook(lambda _module, _args, out: seen.append(out.clone()))
    fused.blocks(tokens)
    fused.blocks[:1](tokens)
    fused.blocks[1] = nn.Identity()
    fused.blocks(tokens)
    assert len(seen) == 3
    assert all(torch.equal(out, alone) for out in seen)


def test_a_block_gives_bitwise_the_same_with_and_without_gradients():
    _, fused = stock_and_fused(init_values=0.1)
    x = images()
    out = fused(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fused(x), out)


def test_a_block_leaves_its_input_as_it_was():
    _, fused = stock_and_fused(init_values=0.1)
    tokens = torch.randn(2, 17, SMALL["embed_dim"])
    before = tokens.clone()
    with torch.no_grad():
        fused.blocks[0](tokens)
    assert torch.equal(tokens, before)


def test_second_derivatives_on_the_reference():
    stock, fused = stock_and_fused(depth=1)
    x = images(1)
    norms = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # flash has no second derivative
        for model in (stock, fused):
            image = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(image).sum(), image, create_graph=True)
            norms.append(torch.autograd.grad(gradient.square().sum(), image)[0])
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-4)


# Reduced precision, judged by float64.


def assert_model_within_budget(stock: nn.Module, fused: nn.Module, x: Tensor, run: Callable[..., dict[str, Tensor]]) -> None:
    eager = run(stock, x)
    got, ran = counted(run, fused, x)
    assert ran == 2
    assert got.keys() == eager.keys()
    oracle = outputs_and_gradients(stock.double(), x.double())
    for name in eager:
        assert_within_budget(name, got[name], eager[name], oracle[name])


PRECISION = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "pre norm, quick GELU": {"pre_norm": True, "act_layer": "quick_gelu"},
}


@pytest.mark.parametrize("option", PRECISION)
def test_autocast_is_within_budget(option):
    stock, fused = stock_and_fused(**PRECISION[option])

    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_and_gradients(model, x)

    assert_model_within_budget(stock, fused, images(), run)


@pytest.mark.parametrize("option", PRECISION)
def test_pure_bfloat16_is_within_budget(option):
    stock, _ = stock_and_fused(**PRECISION[option])
    stock = stock.bfloat16()
    fused = build(**PRECISION[option]).bfloat16()
    fused.load_state_dict(stock.state_dict())
    assert_model_within_budget(stock, vitkernels.fuse(fused), images().bfloat16(), outputs_and_gradients)


def test_autocast_keeps_the_residual_stream_in_float32():
    streams = []
    for model in stock_and_fused(init_values=0.1):
        model.blocks[1].register_forward_pre_hook(lambda _module, args: streams.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(images())
    assert streams == [torch.float32] * 2


def test_autocast_with_a_mask():
    stock, fused = stock_and_fused()
    x, mask = images(), additive_mask(2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        got, ran = counted(fused, x, attn_mask=mask)
        assert_same(got, stock(x, attn_mask=mask))
    assert ran == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_naflexvit_masks_in_reduced_precision(dtype):
    """Under autocast the mask is float32 beside bfloat16 heads; in a bfloat16 model it is bfloat16."""
    stock, fused = stock_and_fused("naflexvit_base_patch16_gap", img_size=None)
    batch = naflex_batch()
    batch["patches"] = batch["patches"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        got, ran = counted(fused.to(dtype), batch)
        assert_same(got, stock.to(dtype)(batch))
    assert ran == 2


def test_mixed_precision_training_step():
    """As timm's train.py: autocast forward, float32 parameters and gradients, one optimizer step."""
    stock, fused = stock_and_fused(init_values=0.1)
    x, labels = images(4), torch.tensor([0, 1, 2, 3])
    for model in (stock, fused):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert_same(dict(fused.named_parameters()), dict(stock.named_parameters()))
