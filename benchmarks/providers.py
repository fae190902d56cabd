"""The contenders: for whole models, and what single operators share. One set of weights and inputs for all of a case."""

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from protocol import Contender, Unavailable, extra_memory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Case

from vitkernels.cli import _measure
from vitkernels.cli._output import CommandError
from vitkernels.cli._providers import Provider, _sharing_weights, fused_provider, stock_providers

Function = Callable[..., Tensor | tuple[Tensor, ...]]

_SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# "naive-attention" is timm with fused_attn off; not "unfused", which -k fused would select.
MODEL_PROVIDERS = ("eager", "autocast", "naive-attention", "compile", "max-autotune", *_SDPA, "fused")


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where few processors have fast bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def optional(module: str, package: str) -> Any:
    """A module of a package that nobody has to have."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that is installed but broken, or without its extension, raises anything
        raise Unavailable(f"{package} cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def quack_activation(act: str) -> str:
    """QuACK's name of a GELU; the erf form is new in it."""
    known = optional("quack.gemm_interface", "QuACK").act_to_pytorch_fn_map
    name = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh_approx"}[act]
    if name not in known:
        raise Unavailable(f"this QuACK has no {name}")
    return name


def need_gpu(device: torch.device, what: str) -> None:
    """Raise ``Unavailable`` on a CPU."""
    if device.type != "cuda":
        raise Unavailable(f"{what} needs an NVIDIA GPU")


def need_compiler(device: torch.device) -> None:
    """Raise ``Unavailable`` where torch.compile has nothing to compile its code with."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("torch.compile needs a C++ compiler on a CPU")


class ModelContest:
    """Builds the contenders of one model, batch and mode."""

    def __init__(self, case: Case, device: torch.device, size: str) -> None:
        self._device, self._size = device, size
        dtype = dtype_on(device)
        self._name = case.workload.timm_name
        found, self._oracle = stock_providers(self._name, device, dtype, case.mode)
        self._ready = {p.name: p for p in found}
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(case.batch, 3, case.workload.image, case.workload.image, generator=generator).to(device, dtype)
        classes = self._oracle.model.num_classes
        labels = torch.randint(max(classes, 1), (case.batch,), generator=generator).to(device)
        self._arguments = (images, labels, case.mode)
        eager = self._ready["eager"]
        self._base = _measure.outputs(eager, self._arguments)
        self._truth = self._base if dtype == torch.float32 else _measure.outputs(self._oracle, self._arguments)
        self._models: list[nn.Module] = [p.model for p in found]

    def build(self, name: str) -> Contender:
        """The contender, with its gate. Raises Unavailable."""
        provider = self._ready.get(name) or self._variant(name)
        self._models.append(provider.model)
        step = provider.step(*self._arguments)
        return Contender(
            provider.path,
            step,
            lambda: self._check(provider),
            lambda: _measure.peak_memory(step, provider.model, self._models, self._device),
        )

    def _variant(self, name: str) -> Provider:
        eager = self._ready["eager"]
        if name == "fused":
            try:
                return fused_provider(eager, self._name, self._device)
            except CommandError as error:
                raise Unavailable(str(error)) from error
        if name in _SDPA:
            need_gpu(self._device, "the choice among SDPA backends")
            return Provider(name, "pytorch", eager.model, eager.dtype, lambda: sdpa_kernel(_SDPA[name]))
        model = _sharing_weights(eager.model)
        if name == "naive-attention":
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
            return Provider(name, "pytorch", model, eager.dtype)
        if self._device.type == "cpu" and self._size != "full":
            raise Unavailable("compiling a model takes longer than all else on a CPU: --size full measures it")
        need_compiler(self._device)
        mode = {"compile": None, "max-autotune": "max-autotune"}[name]
        return Provider(name, "pytorch", torch.compile(model, dynamic=False, mode=mode), eager.dtype)

    def _check(self, provider: Provider) -> None:
        """bfloat16 autocast of a float32 model is judged beside a bfloat16 model, everything else beside eager."""
        try:
            mine = _measure.outputs(provider, self._arguments)
        except RuntimeError as error:
            if provider.name in _SDPA and "No available kernel" in str(error):
                raise Unavailable(f"{provider.name} does not take this shape or dtype") from error
            raise
        base, dtype = self._base, dtype_on(self._device)
        if provider.name == "autocast" and dtype == torch.float32:
            dtype = torch.bfloat16
            half = Provider("half", "pytorch", _copy_in(self._oracle.model, dtype), dtype)
            base = _measure.outputs(half, self._arguments)
        _, wrong = _measure.compare(mine, base, self._truth, dtype)
        assert not wrong, wrong


def _copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    import copy

    return copy.deepcopy(model).to(dtype)


class KernelContest:
    """Builds the contenders of one operator, shape and mode.

    Args:
        functions: by provider, a factory of ``(function, path)`` that raises Unavailable. ``eager`` is the oracle in float64.
        inputs: tensors or None; random, the same for all.
        cotangents: of each output, for ``train``.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[], tuple[Function, str]]],
        inputs: Sequence[Tensor | None],
        cotangents: Sequence[Tensor],
        mode: str,
    ) -> None:
        self._functions, self._inputs, self._cotangents, self._train = functions, inputs, cotangents, mode == "train"
        eager, _ = functions["eager"]()
        self._eager = self._results(eager, inputs)
        self._truth = self._results(eager, [None if t is None else t.double() for t in inputs])

    def build(self, name: str) -> Contender:
        """The contender, with its gate. Raises Unavailable."""
        function, path = self._functions[name]()
        step = self._step(function)
        device = next(t.device for t in self._inputs if t is not None)
        return Contender(path, step, lambda: self._check(function, name == "fused"), lambda: extra_memory(step, device))

    def _step(self, function: Function) -> Callable[[], object]:
        leaves = [None if t is None else t.detach().requires_grad_(self._train) for t in self._inputs]
        wanted = [t for t in leaves if t is not None]

        def infer() -> object:
            with torch.inference_mode():
                return function(*leaves)

        def train() -> object:
            outputs = function(*leaves)
            return torch.autograd.grad(outputs, wanted, self._cotangents[: len(_tuple(outputs))])

        return train if self._train else infer

    def _results(self, function: Function, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        from helpers import outputs_and_gradients

        if self._train:
            return outputs_and_gradients(function, inputs, self._cotangents)
        with torch.inference_mode():
            return {f"output {i}": t.clone() for i, t in enumerate(_tuple(function(*inputs)))}

    def _check(self, function: Function, ours: bool) -> None:
        """Ours is held to DESIGN's budget. Others too in 16 bit; in float32 they may order sums as they like."""
        from helpers import assert_within_budget

        mine = self._results(function, self._inputs)
        for name, eager in self._eager.items():
            if ours or eager.dtype != torch.float32:
                assert_within_budget(name, mine[name], eager, self._truth[name])
            else:
                _, wrong = _measure.compare([eager, mine[name]], [eager, eager], [eager, eager], torch.float32)
                assert not wrong, f"{name}: {wrong}"


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
