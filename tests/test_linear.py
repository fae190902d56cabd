"""linear: the reference against nn.Linear with timm's modules around it, argument checks."""

import pytest
import torch
from timm.layers import GELU, GELUTanh, LayerScale, QuickGELU
from torch import nn

import vitkernels as vk

ACTIVATIONS = {None: nn.Identity, "gelu": GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "silu": nn.SiLU}


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_linear_is_bitwise_timms_modules(act, with_norm, with_scale, with_residual):
    layer, norm, scale = nn.Linear(24, 40), nn.LayerNorm(24, eps=1e-6), LayerScale(40, 0.3)
    nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    expected = ACTIVATIONS[act]()(layer(norm(x) if with_norm else x))
    expected = scale(expected) if with_scale else expected
    expected = residual + expected if with_residual else expected
    got = vk.ops.linear(
        x,
        layer.weight,
        layer.bias,
        act=act,
        norm=(norm.weight, norm.bias, norm.eps) if with_norm else None,
        layer_scale=scale.gamma if with_scale else None,
        residual=residual if with_residual else None,
    )
    assert torch.equal(got, expected)


def test_gradcheck_in_float64():
    f64 = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias, scale = torch.randn(3, 4, **f64), torch.randn(5, 4, **f64), torch.randn(5, **f64), torch.randn(5, **f64)
    residual, norm_weight, norm_bias = torch.randn(3, 5, **f64), torch.randn(4, **f64), torch.randn(4, **f64)

    def call(x, weight, bias, scale, residual, norm_weight, norm_bias):
        norm = (norm_weight, norm_bias, 1e-5)
        return vk.ops.linear(x, weight, bias, act="gelu", layer_scale=scale, residual=residual, norm=norm)

    assert torch.autograd.gradcheck(call, (x, weight, bias, scale, residual, norm_weight, norm_bias))


def test_autocast_leaves_a_float32_residual_in_float32():
    x, weight, residual = torch.randn(3, 8), torch.randn(8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert vk.ops.linear(x, weight).dtype == torch.bfloat16
        assert vk.ops.linear(x, weight, residual=residual).dtype == torch.float32


def test_fused_raises_and_says_that_there_is_no_kernel_yet():
    with vk.backend("fused"), pytest.raises(RuntimeError, match="this version has no linear kernel"):
        vk.ops.linear(torch.zeros(2, 8), torch.zeros(4, 8))


X, W, V = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.linear(X, W.T), ValueError, r"weight must have shape \(N, 8\), got \(8, 4\)"),
        (lambda: vk.ops.linear(X, W, X), ValueError, r"bias must have shape \(4\), got \(2, 8\)"),
        (lambda: vk.ops.linear(X, W, act="relu"), ValueError, "act must be one of None, 'gelu', .*got 'relu'"),
        (lambda: vk.ops.linear(X, W, layer_scale=V[:2]), ValueError, "layer_scale must have shape"),
        (lambda: vk.ops.linear(X, W, residual=X), ValueError, r"residual must have shape \(2, 4\), got \(2, 8\)"),
        (lambda: vk.ops.linear(X, W, norm=(None, None)), ValueError, r"norm must be \(weight, bias, eps\)"),
        (lambda: vk.ops.linear(X, W, norm=(V, None, 1e-6)), ValueError, r"weight must have shape \(8\), got \(4,\)"),
        (lambda: vk.ops.linear(X.long(), W), TypeError, "x must be of dtype"),
        (lambda: vk.ops.linear(X, None), TypeError, "weight must be a Tensor, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
