"""float32 kernels stay within the budget where exponentials, divisions and erf err as much as a GPU's instructions may.

Elsewhere the interpreter rounds them correctly. Judged beside eager PyTorch on this CPU.
"""

import interpreter
import pytest
import torch
from helpers import assert_matches_reference, hostile_rows

import vitkernels as vk
from vitkernels import _select

pytestmark = pytest.mark.skipif(not interpreter._installed, reason="a GPU has its own instructions")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def check(function, inputs, *cotangents, plan="triton"):
    """Outputs and gradients of ``function(operators, *inputs)``."""

    def kernel(*args):
        with vk.backend("fused"), _select.planning(plan):
            return function(vk.ops, *args)

    with interpreter.checking(approximate=True):
        assert_matches_reference(kernel, lambda *args: function(vk.reference, *args), inputs, cotangents)


@pytest.mark.parametrize("biased", [False, True])
def test_attention(biased):
    qkv = torch.randn(2, 70, 3, 2, 64)
    qkv[:, :, 0] *= 3  # logits of std 3
    bias = torch.randn(1, 2, 70, 70) if biased else None
    check(lambda of, qkv, bias: of.attention_qkv(qkv, bias=bias), [qkv, bias], torch.randn(2, 70, 2, 64))


@pytest.mark.parametrize("plan", ["triton", "cublas"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_linear(act, plan):
    inputs = [torch.randn(2, 37, 48), torch.randn(80, 48) / 48**0.5, torch.randn(80)]
    check(lambda of, *args: of.linear(*args, act=act), inputs, torch.randn(2, 37, 80), plan=plan)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp(act):
    D, F = 48, 80
    layers = [torch.randn(F, D) / D**0.5, torch.randn(F), torch.randn(D, F) / F**0.5, torch.randn(D)]
    inputs = [hostile_rows(2, 37, D), 1 + 0.5 * torch.randn(D), torch.randn(D), *layers]
    check(lambda of, *args: of.mlp(*args, act=act), inputs, torch.randn(2, 37, D), plan="cublas")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [1, 192, 768])
def test_layer_norm(width, seed):
    """At one channel the mean is the input, whatever a division makes of it: the output is the bias."""
    torch.manual_seed(seed)
    inputs = [hostile_rows(2, 19, width), 1 + 0.5 * torch.randn(width), torch.randn(width)]
    check(lambda of, *args: of.layer_norm(*args), inputs, torch.randn(2, 19, width))


def test_add_layer_norm():
    inputs = [torch.randn(2, 19, 192), hostile_rows(2, 19, 192), 1 + 0.5 * torch.randn(192), torch.randn(192)]
    cotangents = [torch.randn(2, 19, 192) for _ in range(2)]
    check(lambda of, *args: of.add_layer_norm(*args), inputs, *cotangents)
