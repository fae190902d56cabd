"""Candidates of the fused GEMM, and the four GEMMs of a block at which ``vitkernels tune`` measures them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _tuned
from ._tuning import Case, Problem, Shape
from .folded_linear import launch_folded_linear_fwd
from .linear import GemmConfig, config_entry, kind_of, launch_linear_fwd

# Tile, warps, stages, quarters or halves of the store, blocks an SM. Two blocks an SM hide one's epilogue behind the other's
# products; the larger tiles read less and leave room for one. What does not fit a chip's shared memory is not measured.
_DESCRIPTOR = tuple(
    GemmConfig("descriptor", *tile, num_warps=warps, num_stages=stages, subtiles=subtiles, programs_per_sm=programs)
    for tile, warps, stages, subtiles, programs in (
        ((128, 128, 64), 8, 3, 4, 2),
        ((128, 128, 64), 8, 2, 4, 2),  # with a residual three stages are 24 bytes too many for two blocks on sm_90
        ((128, 128, 64), 8, 4, 2, 1),
        ((128, 128, 64), 4, 3, 4, 2),
        ((128, 128, 128), 8, 2, 4, 1),
        ((128, 256, 64), 8, 3, 4, 1),
        ((128, 256, 64), 8, 4, 4, 1),
        ((256, 128, 64), 8, 3, 2, 1),
        ((256, 128, 64), 8, 4, 4, 1),
        ((128, 64, 64), 4, 4, 2, 2),
        ((64, 128, 64), 4, 4, 4, 2),
        ((64, 64, 128), 4, 3, 2, 2),
    )
)
_EPS = 1e-6
_POINTER = tuple(
    GemmConfig("pointer", *tile, num_warps=warps, num_stages=stages)
    for tile, warps, stages in (
        ((128, 128, 32), 8, 4),
        ((128, 128, 32), 4, 4),
        ((128, 128, 64), 8, 3),
        ((128, 256, 32), 8, 3),
        ((256, 128, 32), 8, 3),
        ((128, 64, 32), 4, 4),
        ((64, 128, 32), 4, 4),
        ((64, 64, 64), 4, 4),
    )
)


def candidates(arch: str, N: int, K: int) -> tuple[GemmConfig, ...]:
    """Descriptors from sm_90 on, where rows are multiples of 16 bytes; else pointers: what the launcher would take."""
    described = int(arch.removeprefix("sm_")) >= 90 and N % 8 == 0 and K % 8 == 0
    return _DESCRIPTOR if described else _POINTER


def cases(shape: Shape, batch: int, arch: str, dtype: torch.dtype) -> Iterator[Case]:
    """A block's GEMMs in ``dtype``, bfloat16 or float16, those that save most first."""
    D, hidden, rows = shape.width, shape.hidden, batch * shape.tokens
    act = kind_of(shape.act)
    gemms = (
        ("fc1", act, hidden, D),
        ("fc2", "residual", D, hidden),
        ("proj", "residual", D, D),
        ("qkv", "plain", 3 * D, D),
        ("LayerNorm and fc1", "norm_act", hidden, D),  # after what they are compared with
        ("LayerNorm and qkv", "norm", 3 * D, D),
    )
    for name, kind, N, K in gemms:
        entries: dict[str, dict[str, Any]] = {"cublas": {"plan": "cublas"}}
        entries |= {_name(c): config_entry(c) for c in candidates(arch, N, K)}
        if kind == "gelu_tanh":
            entries["cublaslt"] = {"plan": "cublaslt"}
        title = f"{name} {N} x {K}, {rows} rows"
        problem = partial(_problem, kind, shape.act == "gelu_tanh", rows, N, K, arch, dtype)
        yield Case("linear", _tuned.gemm_key(kind, dtype, N, K, rows), kind, title, rows, entries, problem)


def _name(config: GemmConfig) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    name = f"{config.kernel} {tile} w{config.num_warps} s{config.num_stages}"
    return name + (f" /{config.subtiles} x{config.programs_per_sm}" if config.kernel == "descriptor" else "")


def _problem(kind: str, tanh: bool, rows: int, N: int, K: int, arch: str, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    x, weight, bias = draw(rows, K), draw(N, K, scale=K**-0.5), draw(N)
    residual = draw(rows, N) if kind == "residual" else None
    act = None
    if kind in ("act", "gelu_tanh", "norm_act"):
        act = "gelu_tanh" if tanh else "gelu"  # which stands for the other forms
    norm = (1 + draw(K, scale=0.3), draw(K, scale=0.3)) if kind in ("norm", "norm_act") else None
    folded = None if norm is None else _fold(weight, bias, *norm)

    def run() -> Tensor:
        if norm is not None and folded is not None:
            return launch_folded_linear_fwd(x, None, None, *norm, _EPS, weight, bias, *folded, act, "inference", arch)
        y, _ = launch_linear_fwd(x, weight, bias, act, None, None, residual, x.dtype, "none", False, "inference", arch)
        return y

    def expected(dtype: torch.dtype) -> Tensor:
        h = x.to(dtype) if norm is None else F.layer_norm(x.to(dtype), (K,), norm[0].to(dtype), norm[1].to(dtype), _EPS)
        y = F.linear(h, weight.to(dtype), bias.to(dtype))
        y = F.gelu(y, approximate="tanh" if tanh else "none") if act else y
        return y if residual is None else residual.to(dtype) + y

    return Problem(run, partial(expected, x.dtype), partial(expected, torch.float64))


def _fold(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (1) of ``folded_linear.py``."""
    folded = weight * gamma
    return folded, folded.float().sum(1), bias.float() + weight.float() @ beta.float()
