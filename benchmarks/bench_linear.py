"""The four GEMMs of a block with their epilogues. ``pytest benchmarks/ --benchmark-only -k "qkv or proj or fc1 or fc2"``.

qkv: bias; proj, fc2: bias, LayerScale, residual; fc1: bias, erf-GELU; fc1_tanh: the GELU that cuBLASLt has an epilogue for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, Unavailable, report
from providers import Function, KernelContest, dtype_on, need_compiler, need_gpu, optional, ours_on, quack_activation
from torch import Tensor
from workloads import Case, cases

import vitkernels as vk
from vitkernels import _select

KINDS = ("qkv", "proj", "fc1", "fc1_tanh", "fc2")
# plan-*: ours with the plan forced; fused: as the tuned table says. gelu-epilogue is torch._addmm_activation. Liger has no
# linear layer of this kind: its MLPs are gated.
PROVIDERS = ("eager", "compile", "gelu-epilogue", "quack", "transformer_engine", "plan-cublas", "plan-triton", "fused")
_ACT = {"fc1": "gelu", "fc1_tanh": "gelu_tanh"}


def CASES(size: str, device: str) -> list[Case]:
    return [case for kind in KINDS for case in cases(kind, size, device)]


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def _sizes(case: Case) -> tuple[int, int]:
    """N and K."""
    D, hidden = case.workload.width, case.workload.hidden
    return {"qkv": (3 * D, D), "proj": (D, D), "fc1": (hidden, D), "fc1_tanh": (hidden, D), "fc2": (D, hidden)}[case.subject]


def contest(case: Case, device: torch.device, size: str) -> KernelContest:
    (N, K), rows = _sizes(case), (case.batch, case.workload.tokens)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype_on(device))

    inputs = [draw(*rows, K), draw(N, K, scale=K**-0.5), draw(N)]
    if case.subject in ("proj", "fc2"):
        inputs += [draw(N, scale=0.3), draw(*rows, N)]
    return KernelContest(_functions(case.subject, device, case.mode), inputs, [draw(*rows, N)], case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of the products, and what they make of the measured time."""
    N, K = _sizes(case)
    flops = 2 * case.batch * case.workload.tokens * N * K * (3 if case.mode == "train" else 1)
    return {"flops": flops, "tflops": flops / (row["ms"] / 1000) / 1e12}


def _functions(kind: str, device: torch.device, mode: str) -> dict[str, Callable[[], tuple[Function, str]]]:
    act = _ACT.get(kind)

    def eager(x, weight, bias, layer_scale=None, residual=None, linear=F.linear):
        y = linear(x, weight, bias)
        y = y if act is None else F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
        return y if residual is None else residual + y * layer_scale

    def compiled() -> tuple[Function, str]:
        need_compiler(device)
        return torch.compile(eager, dynamic=False), "pytorch"

    def gelu_epilogue() -> tuple[Function, str]:
        need_gpu(device, "cuBLASLt")
        if act != "gelu_tanh":
            raise Unavailable("cuBLASLt's only GELU is the tanh form")

        def function(x, weight, bias):
            return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).view(*x.shape[:-1], -1)

        return function, "pytorch"

    def quack() -> tuple[Function, str]:
        need_gpu(device, "QuACK")
        if act is None:
            linear = optional("quack.linear", "QuACK").linear_func
            return partial(eager, linear=linear), "quack"
        if mode == "train":
            raise Unavailable("QuACK differentiates an activation together with the layer after it: mlp has it")
        name, linear_act = quack_activation(act), optional("quack.linear", "QuACK").linear_act_func
        return lambda x, weight, bias: linear_act(x, weight, name, bias=bias, store_preact=False)[1], "quack"

    def transformer_engine() -> tuple[Function, str]:
        need_gpu(device, "Transformer Engine")
        layer = optional("transformer_engine.pytorch", "Transformer Engine").Linear

        def linear(x, weight, bias):
            module = layer(weight.shape[1], weight.shape[0], device="meta", params_dtype=x.dtype)
            return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

        return partial(eager, linear=linear), "transformer_engine"

    def plan(name: str) -> Callable[[], tuple[Function, str]]:
        def build() -> tuple[Function, str]:
            need_gpu(device, "a plan of ours")
            return _ours(act, device, name), "kernel"

        return build

    return {
        "eager": lambda: (eager, "pytorch"),
        "compile": compiled,
        "gelu-epilogue": gelu_epilogue,
        "quack": quack,
        "transformer_engine": transformer_engine,
        "plan-cublas": plan("cublas"),
        "plan-triton": plan("triton"),
        "fused": lambda: (_ours(act, device, "auto"), ours_on(device)[1]),
    }


def _ours(act: str | None, device: torch.device, plan: str) -> Function:
    policy, _ = ours_on(device)

    def function(x, weight, bias, layer_scale=None, residual=None):
        with vk.backend(policy), _select.planning(plan):
            return vk.ops.linear(x, weight, bias, act=act, layer_scale=layer_scale, residual=residual)

    return function


def test_linear(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
