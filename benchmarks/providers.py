"""The contenders: for whole models, and what single operators share. One set of weights and inputs for all of a case."""

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from protocol import Contender, Unavailable, extra_memory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Case

import vitkernels as vk
from vitkernels import _select
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
# Ours: under policy ``fused`` with what the tuned table says, with a plan forced, folded for inference, and as users have it.
OURS = ("fused", "plan-cublas", "plan-triton", "inference", "auto")
MODEL_PROVIDERS = ("eager", "autocast", "naive-attention", "compile", "max-autotune", *_SDPA, "fused")


STUBBED = False  # a driver that does nothing stands for a GPU (tests/stub_driver): gpu_round's dry run


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where few processors have fast bfloat16."""
    return torch.bfloat16 if device.type == "cuda" or STUBBED else torch.float32


def ours_on(device: torch.device) -> tuple[str, str]:
    """The policy to run our operators under, and the path that their rows name.

    On a GPU the policy is ``fused``: a kernel that is missing fails instead of timing the fallback.
    """
    if STUBBED:
        return "fused", "stub"
    return ("fused", "kernel") if device.type == "cuda" else ("auto", "reference")


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


class Graphed(Provider):
    """Its call replays a CUDA graph; where there is no GPU it is the call itself."""

    def step(self, images: Tensor, labels: Tensor, mode: str) -> Callable[[], Tensor]:
        call = super().step(images, labels, mode)
        if images.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and asks cuBLAS for its workspace, neither of which can be captured
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The stream inside is left current when a capture fails (torch 2.11); the one outside brings ours back.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            output = call()

        def replay(_: object = call) -> Tensor:  # the graph reads the call's images, so they must live as long
            graph.replay()
            return output

        return replay


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
        self._models: list[nn.Module] = [p.model for p in found]

    @functools.cached_property
    def _base(self) -> list[Tensor]:
        return _measure.outputs(self._ready["eager"], self._arguments)

    @functools.cached_property
    def _truth(self) -> list[Tensor]:
        exact = dtype_on(self._device) == torch.float32
        return self._base if exact else _measure.outputs(self._oracle, self._arguments)

    def build(self, name: str) -> Contender:
        """The contender, with its gate. ``NAME-graph``: contender NAME as a CUDA graph. Raises Unavailable."""
        plain = name.removesuffix("-graph")
        provider = self._ready.get(plain) or self._variant(plain)
        graphed = plain != name
        if graphed:
            provider = Graphed(**{**vars(provider), "name": name})
        self._models.append(provider.model)
        step = provider.step(*self._arguments)

        def peak() -> int | None:  # a replay allocates nothing, and what the graph holds counts as free
            return None if graphed else _measure.peak_memory(step, provider.model, self._models, self._device)

        return Contender(provider.path, step, lambda: self._check(provider, step if graphed else None), peak)

    def _variant(self, name: str) -> Provider:
        eager = self._ready["eager"]
        if name in OURS:
            return self._fused(name)
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
        mode = None if name == "compile" else name
        how = {"backend": "aot_eager"} if STUBBED else {"mode": mode}  # seconds instead of a minute
        return Provider(name, "pytorch", torch.compile(model, dynamic=False, **how), eager.dtype)

    def _fused(self, name: str) -> Provider:
        eager, plan = self._ready["eager"], name.removeprefix("plan-")
        try:
            found = fused_provider(eager, self._name, self._device)
        except CommandError as error:
            raise Unavailable(str(error)) from error
        policy, path = found.context, found.path
        if STUBBED:
            policy, path = (lambda: vk.backend("fused")), "stub"
        if name == "auto":
            policy, path = (lambda: vk.backend("auto")), path if path == "stub" else "mixed"

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with policy(), _select.planning(plan):
                yield

        model = vk.fuse(found.model, inference=True) if name == "inference" else found.model
        return Provider(name, path, model, eager.dtype, context)

    def _check(self, provider: Provider, graph: Callable[[], Tensor] | None) -> None:
        """bfloat16 autocast of a float32 model is judged beside a bfloat16 model, everything else beside eager.

        ``graph``: the very one that is timed, of a provider that has one.
        """
        try:
            mine = [graph().float()] if graph else _measure.outputs(provider, self._arguments)
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
        cotangents: of each output, where there is a backward.
        mode: ``infer``: forward without gradients; ``train``: forward and backward; ``backward``: that alone.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[], tuple[Function, str]]],
        inputs: Sequence[Tensor | None],
        cotangents: Sequence[Tensor],
        mode: str,
    ) -> None:
        self._functions, self._inputs, self._cotangents, self._mode = functions, inputs, cotangents, mode

    @functools.cached_property
    def _eager(self) -> dict[str, Tensor]:
        return self._results(self._functions["eager"]()[0], self._inputs)

    @functools.cached_property
    def _truth(self) -> dict[str, Tensor]:
        return self._results(self._functions["eager"]()[0], [None if t is None else t.double() for t in self._inputs])

    def build(self, name: str) -> Contender:
        """The contender, with its gate. Raises Unavailable."""
        function, path = self._functions[name]()
        step = self._step(function)
        device = next(t.device for t in self._inputs if t is not None)
        return Contender(path, step, lambda: self._check(function, name == "fused"), lambda: extra_memory(step, device))

    def _step(self, function: Function) -> Callable[[], object]:
        leaves = [None if t is None else t.detach().requires_grad_(self._mode != "infer") for t in self._inputs]
        wanted = [t for t in leaves if t is not None]

        def infer() -> object:
            with torch.inference_mode():
                return function(*leaves)

        def gradients(outputs: tuple[Tensor, ...], **options: bool) -> object:
            return torch.autograd.grad(outputs, wanted, self._cotangents[: len(outputs)], **options)

        def train() -> object:
            return gradients(_tuple(function(*leaves)))

        if self._mode != "backward":
            return infer if self._mode == "infer" else train
        outputs = _tuple(function(*leaves))
        return lambda: gradients(outputs, retain_graph=True)

    def _results(self, function: Function, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        from helpers import outputs_and_gradients

        if self._mode != "infer":
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
