"""The contestants of ``vitkernels bench``: one set of weights, run by timm's modules and by the fused ones."""

import contextlib
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _select, backend, explain
from ..ops._availability import availability
from . import _models

# What a fused timm model calls: patch embedding, and per block LN + qkv, attention, projection, MLP.
_OPERATORS = ("patch_embed", "layer_norm", "attention_qkv", "linear", "mlp")


@dataclass(frozen=True)
class Provider:
    """One way to run the model.

    Attributes:
        name: ``eager``, ``autocast``, ``fused`` or ``compile``.
        path: ``pytorch``, or for the fused provider what its operators run: ``kernel``, ``mixed`` or ``reference``.
        dtype: of its weights and input.
        context: entered around every forward (a policy, autocast).
    """

    name: str
    path: str
    model: nn.Module
    dtype: torch.dtype
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def step(self, images: Tensor, labels: Tensor, mode: str) -> Callable[[], Tensor]:
        """The measured call: forward, or forward and backward of the cross entropy. It returns the logits (B, classes)."""
        images = images.to(self.dtype)
        parameters = list(self.model.parameters())

        def infer() -> Tensor:
            with torch.inference_mode(), self.context():
                return self.model(images)

        def train() -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            with self.context():
                logits = self.model(images)
            F.cross_entropy(logits.float(), labels).backward()
            return logits.detach()

        return train if mode == "train" else infer


def providers(
    name: str, device: torch.device, dtype: torch.dtype, mode: str, compiled: bool
) -> tuple[list[Provider], Provider]:
    """All providers of one model, and the float32 one that judges 16-bit outputs. They hold numerically equal weights."""
    (eager, autocast), oracle = stock_providers(name, device, dtype, mode)
    found = [eager, autocast, fused_provider(eager, name, device)]
    if compiled:
        found.append(Provider("compile", "pytorch", torch.compile(_sharing_weights(eager.model), dynamic=False), dtype))
    return found, oracle


def stock_providers(name: str, device: torch.device, dtype: torch.dtype, mode: str) -> tuple[list[Provider], Provider]:
    """Eager and autocast, and the oracle."""
    oracle = _random_model(name, device, dtype).train(mode == "train")
    eager = oracle if dtype == torch.float32 else copy.deepcopy(oracle).to(dtype)
    half = torch.bfloat16 if device.type == "cpu" or dtype == torch.float32 else dtype
    found = [
        Provider("eager", "pytorch", eager, dtype),
        Provider("autocast", "pytorch", oracle, torch.float32, lambda: torch.autocast(device.type, half)),
    ]
    return found, Provider("oracle", "pytorch", oracle, torch.float32)


def fused_provider(eager: Provider, name: str, device: torch.device) -> Provider:
    """The fused model on eager's weights. Raises CommandError when nothing of the model can be fused."""
    fused = _models.fuse(_sharing_weights(eager.model), name)
    policy, path = _policy_and_path(fused, device, eager.dtype)
    return Provider("fused", path, fused, eager.dtype, lambda: backend(policy))


def _random_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with device:  # drawing the weights of a large model takes long on a CPU
        model = _models.create(name).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            # timm starts biases at 0 and LayerScale near 0, which would hide an operator that drops them.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.copy_(parameter.to(dtype))  # so that the float32 copy has the same values
    return model


def _sharing_weights(model: nn.Module) -> nn.Module:
    """Another module tree on the very same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def _policy_and_path(fused: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The policy to time the fused model under, and what its operators run there."""
    if device.type == "cpu" or _select.policy() == "reference":
        return ("auto" if device.type == "cpu" else "reference"), "reference"
    missing = availability(device, dtype)
    kernels = sum(not missing[operator] for operator in _OPERATORS)
    if kernels == 0:
        return "auto", "reference"
    modules = explain(fused).modules
    if kernels == len(_OPERATORS) and all(m.fused for m in modules):
        return "fused", "kernel"  # a kernel that is missing after all fails instead of timing the fallback
    return "auto", "mixed"
