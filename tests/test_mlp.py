"""mlp: the reference against the second half of timm's block, argument checks."""

import pytest
import torch
from timm.layers import LayerScale, Mlp
from torch import nn

import vitkernels as vk


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_bitwise_timms_modules_forward_and_backward(bias, with_scale):
    norm, layer, scale = nn.LayerNorm(24, eps=1e-6), Mlp(24, 48, bias=bias), LayerScale(24, 0.3)
    x = torch.randn(2, 5, 24, requires_grad=True)
    parameters = [norm.weight, norm.bias, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias]
    branch = layer(norm(x))
    expected = x + (scale(branch) if with_scale else branch)
    got = vk.ops.mlp(x, *parameters, eps=1e-6, layer_scale=scale.gamma if with_scale else None)
    assert torch.equal(got, expected)
    leaves = [x, *(p for p in parameters if p is not None)]
    dy = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert torch.equal(a, b)


def test_reference_is_the_same_function():
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16)
    arguments = (x, torch.randn(8), None, weight, bias, weight.T.contiguous(), None)
    assert torch.equal(vk.ops.mlp(*arguments, act="silu"), vk.reference.mlp(*arguments, act="silu"))


def test_fused_raises_and_says_that_there_is_no_kernel_yet():
    with vk.backend("fused"), pytest.raises(RuntimeError, match="this version has no MLP kernel"):
        vk.ops.mlp(torch.zeros(2, 8), None, None, torch.zeros(16, 8), None, torch.zeros(8, 16), None)


X, FC1, FC2 = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vk.ops.mlp(X, None, None, FC2, None, FC2, None), ValueError, r"fc1_weight must have shape \(F, 8\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC1, None), ValueError, r"fc2_weight must have shape \(8, 16\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, None, None), TypeError, "fc2_weight must be a Tensor"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, None, act="gelu "), ValueError, "act must be one of"),
        (lambda: vk.ops.mlp(X, X, None, FC1, None, FC2, None), ValueError, r"weight must have shape \(8\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, X, FC2, None), ValueError, r"fc1_bias must have shape \(16\)"),
        (lambda: vk.ops.mlp(X, None, None, FC1, None, FC2, FC1), ValueError, r"fc2_bias must have shape \(8\)"),
        (lambda: vk.ops.mlp(None, None, None, FC1, None, FC2, None), TypeError, "x must be a Tensor"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
