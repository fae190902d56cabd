"""LayerNorm and residual add + LayerNorm. ``pytest benchmarks/ --benchmark-only -k layer_norm``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, report
from providers import Function, KernelContest, dtype_on, need_compiler, need_gpu, optional, ours_on
from torch import Tensor
from workloads import Case, cases

import vitkernels as vk

PROVIDERS = ("eager", "compile", "apex", "liger", "quack", "transformer_engine", "fused")
EPS = 1e-6
# Units (bytes of x) that no implementation can avoid to move, as counted at the registration in vitkernels/ops/layer_norm.py.
UNITS = {
    ("layer_norm", "infer"): 2,
    ("layer_norm", "train"): 2 + 3,
    ("layer_norm", "backward"): 3,
    ("add_layer_norm", "infer"): 4,
    ("add_layer_norm", "train"): 4 + 4,
    ("add_layer_norm", "backward"): 4,
}


def CASES(size: str, device: str) -> list[Case]:
    return [case for op in ("layer_norm", "add_layer_norm") for case in cases(op, size, device)]


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def contest(case: Case, device: torch.device, size: str) -> KernelContest:
    shape, dtype = (case.batch, case.workload.tokens, case.workload.width), dtype_on(device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    added = case.subject == "add_layer_norm"
    inputs = (draw(*shape), *((draw(*shape),) if added else ()), draw(shape[-1]), draw(shape[-1]))
    cotangents = (draw(*shape), *((draw(*shape),) if added else ()))
    return KernelContest(_functions(added, device, case.mode), inputs, cotangents, case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the floor, and what they make of the measured time."""
    elements = case.batch * case.workload.tokens * case.workload.width
    moved = UNITS[case.subject, case.mode] * elements * dtype_on(device).itemsize
    return {"bytes": moved, "gb_per_s": moved / (row["ms"] / 1000) / 1e9}


def _functions(added: bool, device: torch.device, mode: str) -> dict[str, Callable[[], tuple[Function, str]]]:
    """Others have no add + LayerNorm with both outputs: theirs follows PyTorch's add."""

    def of(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
        def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            stream = residual + x
            return norm(stream, weight, bias), stream

        return add_norm if added else norm

    def compiled() -> tuple[Function, str]:
        need_compiler(device)
        return torch.compile(of(_eager), dynamic=False), "pytorch"

    def other(name: str, norm: Callable[[torch.device, str], Callable]) -> Callable[[], tuple[Function, str]]:
        return lambda: (of(norm(device, mode)), name)

    others = {"apex": _apex, "liger": _liger, "quack": _quack, "transformer_engine": _transformer_engine}
    return {
        "eager": lambda: (of(_eager), "pytorch"),
        "compile": compiled,
        **{name: other(name, norm) for name, norm in others.items()},
        "fused": lambda: (_ours(added, device), ours_on(device)[1]),
    }


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _ours(added: bool, device: torch.device) -> Function:
    policy, _ = ours_on(device)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with vk.backend(policy):
            return vk.ops.layer_norm(x, weight, bias, EPS)

    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with vk.backend(policy):
            return vk.ops.add_layer_norm(x, residual, weight, bias, EPS)

    return add_layer_norm if added else layer_norm


def _apex(device: torch.device, mode: str) -> Callable:
    need_gpu(device, "apex")
    function = optional("apex.normalization.fused_layer_norm", "apex").fused_layer_norm_affine
    optional("fused_layer_norm_cuda", "apex's extension")
    return lambda x, weight, bias: function(x, weight, bias, tuple(x.shape[-1:]), EPS)


def _liger(device: torch.device, mode: str) -> Callable:
    need_gpu(device, "Liger")
    function = optional("liger_kernel.ops.layer_norm", "Liger").LigerLayerNormFunction
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)


def _quack(device: torch.device, mode: str) -> Callable:
    from protocol import Unavailable

    need_gpu(device, "QuACK")
    if mode == "train":
        raise Unavailable("QuACK's LayerNorm has no backward")
    function = optional("quack.rmsnorm", "QuACK").layernorm_fwd
    parameters: list[Tensor] = []  # it takes them in float32; converted once, as its user would hold them

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not parameters:
            parameters.extend((weight.float(), bias.float()))
        return function(x.flatten(0, -2), *parameters, eps=EPS).view_as(x)

    return norm


def _transformer_engine(device: torch.device, mode: str) -> Callable:
    need_gpu(device, "Transformer Engine")
    layer = optional("transformer_engine.pytorch", "Transformer Engine").LayerNorm

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module = layer(x.shape[-1], eps=EPS, device="meta", params_dtype=x.dtype)
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return norm


def test_layer_norm(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
