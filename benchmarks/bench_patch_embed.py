"""Patch embedding. ``pytest benchmarks/ --benchmark-only -k patch_embed``.

Subject ``patch_embed``: images in the dtype of the product, on the device. Subject ``patch_embed_uint8`` (inference): uint8
pixels in pinned host memory; every provider copies them to the device, normalises and embeds, so the copy is measured too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, report
from providers import Function, KernelContest, dtype_on, need_compiler, ours_on
from torch import Tensor
from workloads import Case, cases

import vitkernels as vk

PROVIDERS = ("eager", "unfold-linear", "compile", "fused")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def CASES(size: str, device: str) -> list[Case]:
    pixels = [case for case in cases("patch_embed_uint8", size, device) if case.mode == "infer"]
    return cases("patch_embed", size, device) + pixels


def DTYPE(device: torch.device) -> str:
    return str(dtype_on(device)).removeprefix("torch.")


def contest(case: Case, device: torch.device, size: str, pinned: bool = True) -> KernelContest:
    """``pinned``: uint8 pixels start in pinned host memory; else on the device."""
    w, dtype = case.workload, dtype_on(device)
    side = w.image // w.patch * w.patch  # timm's convolution leaves out what does not fill a patch
    grid = (side // w.patch) ** 2
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    weight = draw(w.width, 3, w.patch, w.patch) / (3 * w.patch * w.patch) ** 0.5
    prefix = [draw(1, w.tokens - grid, w.width)] if w.tokens > grid else [None]
    inputs = (weight, draw(w.width), *prefix, draw(1, w.tokens, w.width))
    if case.subject == "patch_embed":  # not among the inputs: training asks for no gradient of the images
        images = draw(case.batch, 3, side, side)
    else:
        images = torch.randint(0, 256, (case.batch, 3, side, side), dtype=torch.uint8)
        if device.type == "cuda":
            images = images.pin_memory() if pinned else images.to(device)
    cotangents = (draw(case.batch, w.tokens, w.width),)
    return KernelContest(_functions(images, device), inputs, cotangents, case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """Bytes and FLOPs that no implementation can avoid, as counted in kernels/patch_embed.py; the images get no gradient."""
    w, s = case.workload, dtype_on(device).itemsize
    pixels, tokens = case.batch * 3 * (w.image // w.patch * w.patch) ** 2, case.batch * w.tokens * w.width
    pixel_bytes = 1 if case.subject == "patch_embed_uint8" else s
    train = case.mode == "train"
    moved = (1 + train) * (pixels * pixel_bytes + tokens * s) + train * pixels * s
    return {"bytes": moved, "gb_per_s": moved / (row["ms"] / 1000) / 1e9, "flops": (1 + 2 * train) * 2 * pixels * w.width}


def _functions(source: Tensor, device: torch.device) -> dict[str, Callable[[], tuple[Function, str]]]:
    def compiled() -> tuple[Function, str]:
        need_compiler(device)
        return _from(source, torch.compile(_eager, dynamic=False)), "pytorch"

    return {
        "eager": lambda: (_from(source, _eager), "pytorch"),
        "unfold-linear": lambda: (_from(source, _unfold_linear), "pytorch"),
        "compile": compiled,
        "fused": lambda: (_fused(source, device), ours_on(device)[1]),
    }


def _statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN, device=device).to(dtype), torch.tensor(STD, device=device).to(dtype)


def _from(source: Tensor, embed: Callable[..., Tensor]) -> Function:
    """``embed`` on float images, or on uint8 ones after the copy and the normalisation, in float32, that a user writes."""
    statistics: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def call(weight: Tensor, *rest: Tensor | None) -> Tensor:
        if source.dtype != torch.uint8:
            return embed(source.to(weight.dtype), weight, *rest)  # a cast for the float64 oracle only
        compute = torch.promote_types(torch.float32, weight.dtype)
        if compute not in statistics:
            statistics[compute] = tuple(t.view(-1, 1, 1) for t in _statistics(weight.device, compute))
        mean, std = statistics[compute]
        images = source.to(weight.device, non_blocking=True).to(compute).div_(255).sub_(mean).div_(std)
        return embed(images.to(weight.dtype), weight, *rest)

    return call


def _eager(images: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor | None, positions: Tensor) -> Tensor:
    """timm's: convolution, flatten, transpose, concatenate, add."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    return _positioned(tokens, prefix, positions)


def _unfold_linear(images: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor | None, positions: Tensor) -> Tensor:
    p = weight.shape[-1]
    patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return _positioned(F.linear(patches, weight.flatten(1), bias), prefix, positions)


def _positioned(tokens: Tensor, prefix: Tensor | None, positions: Tensor) -> Tensor:
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens + positions


def _fused(source: Tensor, device: torch.device) -> Function:
    policy, _ = ours_on(device)
    mean, std = _statistics(device, torch.float32)
    normalise: dict[str, Any] = {"mean": mean, "std": std} if source.dtype == torch.uint8 else {}

    def call(weight: Tensor, bias: Tensor, prefix: Tensor | None, positions: Tensor) -> Tensor:
        images = source.to(weight.device, non_blocking=True)
        with vk.backend(policy):
            return vk.ops.patch_embed(images, weight, bias, prefix_tokens=prefix, pos_embed=positions, **normalise)

    return call


def test_patch_embed(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
