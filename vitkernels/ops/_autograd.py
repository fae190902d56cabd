"""Derivatives of the kernels are of first order. Whoever asks for a second one gets an error, on every path to an input."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
_ERROR = (
    "trying to differentiate twice what a kernel of vitkernels has computed: kernels have first derivatives only;"
    ' for second ones run the forward pass inside `with vitkernels.backend("reference"):`'
)


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorates ``backward(ctx, saved, *incoming)`` of a ``torch.autograd.Function``; ``saved`` are ``ctx.saved_tensors``.

    With ``create_graph=True`` the gradients require grad: they depend on the saved tensors and on the incoming gradients, and a
    derivative of them raises. PyTorch's ``once_differentiable`` ties them to none of these, so ``torch.autograd.grad`` with
    respect to inputs misses its error, and misses in silence what flows through the operator.

    What a gradient depends on has to be saved. An input that is not, such as a residual, has to be one in which the operator
    is linear and apart from the others.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *incoming: Tensor) -> Gradients:
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives them out once
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *incoming)
        if any(map(torch._C._functorch.is_legacy_batchedtensor, incoming)):  # is_grads_batched: it would drop what is tied here
            raise RuntimeError(_ERROR)
        return _FirstOrder.apply(lambda: backward(ctx, saved, *incoming), *incoming, *saved)

    return run


class _FirstOrder(torch.autograd.Function):
    """What ``compute`` returns, as a function of these tensors."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Gradients], *tensors: Tensor | None) -> Gradients:
        return compute()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Gradients:
        raise RuntimeError(_ERROR)
