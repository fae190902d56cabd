"""Attention on a packed qkv. ``pytest benchmarks/ --benchmark-only -k attention``; all workloads with ``--size full``.

Every contender starts from the output of the qkv projection and ends with what the next projection reads: eager's permute and
transpose copies are part of its work. ``eager`` leaves the choice of backend to PyTorch; ``sdpa-*`` make it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, Unavailable, report
from providers import _SDPA, Function, KernelContest, dtype_on, need_compiler, need_gpu, optional, ours_on
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from workloads import Case, cases

import vitkernels as vk

# "naive-attention" keeps the logits in memory; not "unfused", which -k fused would select.
PROVIDERS = ("eager", "compile", "naive-attention", *_SDPA, "flash-attn", "xformers", "fused")


def CASES(size: str, device: str) -> list[Case]:
    return cases("attention_qkv", size, device)


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def contest(case: Case, device: torch.device, size: str) -> KernelContest:
    workload, dtype = case.workload, dtype_on(device)
    generator = torch.Generator(device).manual_seed(0)
    heads = (workload.num_heads, workload.head_dim)
    qkv = torch.randn(case.batch, workload.tokens, 3, *heads, generator=generator, device=device)
    qkv[:, :, 0] *= 3  # logits of std 3
    cotangent = torch.randn(case.batch, workload.tokens, *heads, generator=generator, device=device)
    return KernelContest(_functions(device), (qkv.to(dtype),), (cotangent.to(dtype),), case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """Bytes and FLOPs that no implementation can avoid, and what they make of the measured time."""
    workload = case.workload
    unit = case.batch * workload.tokens * workload.width * dtype_on(device).itemsize
    product = 2 * case.batch * workload.tokens**2 * workload.width
    forward, backward = (4, 2), (8, 5)  # units and products: q k v o; q k v o do, dq dk dv
    both = tuple(map(sum, zip(forward, backward, strict=True)))
    units, products = {"infer": forward, "backward": backward, "train": both}[case.mode]
    seconds = row["ms"] / 1000
    moved, flops = units * unit, products * product
    return {"bytes": moved, "flops": flops, "gb_per_s": moved / seconds / 1e9, "tflop_per_s": flops / seconds / 1e12}


def _functions(device: torch.device) -> dict[str, Callable[[], tuple[Function, str]]]:
    def compiled() -> tuple[Function, str]:
        need_compiler(device)
        return torch.compile(_eager, dynamic=False), "pytorch"

    def flash_attn() -> tuple[Function, str]:
        need_gpu(device, "flash-attn")
        return optional("flash_attn", "flash-attn").flash_attn_qkvpacked_func, "flash-attn"

    def xformers() -> tuple[Function, str]:
        need_gpu(device, "xformers")
        return _xformers(optional("xformers.ops", "xformers")), "xformers"

    def sdpa(name: str) -> tuple[Function, str]:
        return _with_backend(name, device), "pytorch"

    return {
        "eager": lambda: (_eager, "pytorch"),
        "compile": compiled,
        "naive-attention": lambda: (_naive, "pytorch"),
        **{name: partial(sdpa, name) for name in _SDPA},
        "flash-attn": flash_attn,
        "xformers": xformers,
        "fused": lambda: (_ours(device), ours_on(device)[1]),
    }


def _eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # timm's own views
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def _naive(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    p = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    return (p @ v).transpose(1, 2).contiguous()


def _with_backend(name: str, device: torch.device) -> Function:
    need_gpu(device, "the choice among SDPA backends")

    def function(qkv: Tensor) -> Tensor:
        try:
            with sdpa_kernel(_SDPA[name]):
                return _eager(qkv)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Unavailable(f"{name} does not take this shape or dtype") from error
            raise

    return function


def _xformers(ops: Any) -> Function:
    """Its attention has our layout, and its ``unbind`` gives the gradient of a packed qkv without a copy."""
    unbind = getattr(ops, "unbind", torch.unbind)

    def function(qkv: Tensor) -> Tensor:
        try:
            return ops.memory_efficient_attention(*unbind(qkv, 2))
        except NotImplementedError as error:  # none of its operators takes these
            raise Unavailable(f"xformers: {str(error).splitlines()[0]}") from error

    return function


def _ours(device: torch.device) -> Function:
    policy, _ = ours_on(device)

    def attention(qkv: Tensor) -> Tensor:
        with vk.backend(policy):
            return vk.ops.attention_qkv(qkv)

    return attention


def test_attention(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
