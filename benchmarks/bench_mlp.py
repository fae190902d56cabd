"""The second half of a block, LayerNorm to residual. ``pytest benchmarks/ --benchmark-only -k mlp``.

mlp: erf-GELU, timm's default; mlp_tanh: the form that Transformer Engine and cuBLASLt have.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, Unavailable, report
from providers import Function, KernelContest, dtype_on, need_compiler, need_gpu, optional, ours_on, quack_activation
from torch import Tensor
from workloads import Case, cases

import vitkernels as vk
from vitkernels import _select

# plan-*: ours with the plan forced; fused: as the tuned table says; recompute: saves nothing of the hidden width. Liger's
# MLPs are gated.
PROVIDERS = ("eager", "compile", "quack", "transformer_engine", "plan-cublas", "plan-triton", "recompute", "fused")
EPS = 1e-6
_ACT = {"mlp": "gelu", "mlp_tanh": "gelu_tanh"}


def CASES(size: str, device: str) -> list[Case]:
    return [case for kind in _ACT for case in cases(kind, size, device)]


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def contest(case: Case, device: torch.device, size: str) -> KernelContest:
    D, hidden, rows = case.workload.width, case.workload.hidden, (case.batch, case.workload.tokens)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype_on(device))

    inputs = [draw(*rows, D), draw(D), draw(D), draw(hidden, D, scale=D**-0.5), draw(hidden)]
    inputs += [draw(D, hidden, scale=hidden**-0.5), draw(D)]
    return KernelContest(_functions(_ACT[case.subject], device), inputs, [draw(*rows, D)], case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of the products, and what they make of the measured time."""
    flops = 4 * case.batch * case.workload.tokens * case.workload.width * case.workload.hidden
    flops *= 3 if case.mode == "train" else 1
    return {"flops": flops, "tflops": flops / (row["ms"] / 1000) / 1e12}


def _functions(act: str, device: torch.device) -> dict[str, Callable[[], tuple[Function, str]]]:
    def eager(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), fc1_weight, fc1_bias)
        hidden = F.gelu(hidden, approximate="tanh" if act == "gelu_tanh" else "none")
        return x + F.linear(hidden, fc2_weight, fc2_bias)

    def compiled() -> tuple[Function, str]:
        need_compiler(device)
        return torch.compile(eager, dynamic=False), "pytorch"

    def quack() -> tuple[Function, str]:
        need_gpu(device, "QuACK")
        name, mlp = quack_activation(act), optional("quack.mlp", "QuACK").mlp_func

        def function(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
            normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
            return x + mlp(normed, fc1_weight, fc2_weight, name, bias1=fc1_bias, bias2=fc2_bias)

        return function, "quack"

    def transformer_engine() -> tuple[Function, str]:
        need_gpu(device, "Transformer Engine")
        if act != "gelu_tanh":
            raise Unavailable("Transformer Engine's GELU is the tanh form")
        layer = optional("transformer_engine.pytorch", "Transformer Engine").LayerNormMLP
        names = ("layer_norm_weight", "layer_norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

        def function(x, *parameters):
            D, hidden = parameters[4].shape
            module = layer(D, hidden, eps=EPS, activation="gelu", device="meta", params_dtype=x.dtype)
            return x + torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        return function, "transformer_engine"

    def ours(plan: str, **options: bool) -> Callable[[], tuple[Function, str]]:
        def build() -> tuple[Function, str]:
            if plan != "auto" or options:
                need_gpu(device, "a plan of ours")
            return _ours(act, device, plan, **options), ours_on(device)[1]

        return build

    return {
        "eager": lambda: (eager, "pytorch"),
        "compile": compiled,
        "quack": quack,
        "transformer_engine": transformer_engine,
        "plan-cublas": ours("cublas"),
        "plan-triton": ours("triton"),
        "recompute": ours("auto", recompute=True),
        "fused": ours("auto"),
    }


def _ours(act: str, device: torch.device, plan: str, recompute: bool = False) -> Function:
    policy, _ = ours_on(device)

    def function(*inputs: Tensor) -> Tensor:
        with vk.backend(policy), _select.planning(plan):
            x, *weights = inputs
            return vk.ops.mlp(x, *weights, eps=EPS, act=act, recompute=recompute)

    return function


def test_mlp(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
