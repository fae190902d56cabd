"""Resampling of position embeddings, one size and 32. ``pytest benchmarks/ --benchmark-only -k pos_embed``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from protocol import Outcome, report
from providers import Function, KernelContest
from torch import Tensor

import vitkernels as vk
from vitkernels.ops.pos_embed import why_not

PROVIDERS = ("eager", "interpolate", "fused")
# Grids of a NaFlex batch: up to 576 patches at 32 aspect ratios.
MANY = tuple((h, min(48, 576 // h)) for h in range(12, 44))
_ONE = (((14, 14), (24, 24)), ((16, 16), (37, 37)), ((37, 37), (16, 16)))


@dataclass(frozen=True)
class _Workload:
    name: str


@dataclass(frozen=True)
class Case:
    """One group of the table: ``old`` resampled to every one of ``sizes``, bicubic with antialias, one prefix row."""

    old: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    width: int
    mode: str
    subject: str = "pos_embed"

    @property
    def batch(self) -> int:
        return len(self.sizes)

    @property
    def workload(self) -> _Workload:
        (h, w), (new_h, new_w) = self.old, self.sizes[0]
        target = f"{new_h}x{new_w}" if len(self.sizes) == 1 else f"{len(self.sizes)}-sizes"
        return _Workload(f"{h}x{w}-{target}-D{self.width}")

    def __str__(self) -> str:
        return f"{self.subject}-{self.workload.name}-{self.mode}"


def CASES(size: str, device: str) -> list[Case]:
    """The three size pairs of the issue and the batch of 32; full: both widths."""
    widths = (768,) if size == "small" else (768, 1024)
    problems = [(old, (new,)) for old, new in _ONE] + [((16, 16), MANY)]
    return [Case(old, new, width, mode) for width in widths for old, new in problems for mode in ("infer", "train")]


def DTYPE(device: torch.device) -> str:
    return "float32"  # of the parameter, also under autocast


def contest(case: Case, device: torch.device, size: str) -> KernelContest:
    generator = torch.Generator(device).manual_seed(0)
    rows = sum(1 + h * w for h, w in case.sizes)
    table = torch.randn(1, 1 + case.old[0] * case.old[1], case.width, generator=generator, device=device)
    cotangent = torch.randn(rows, case.width, generator=generator, device=device)
    return KernelContest(_functions(case, device), (table,), (cotangent,), case.mode)


def extra(case: Case, device: torch.device, row: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the floor: the table read and the copies written once, and the other way round for the gradient."""
    rows = 1 + case.old[0] * case.old[1] + sum(1 + h * w for h, w in case.sizes)
    moved = 4 * rows * case.width * (2 if case.mode == "train" else 1)
    return {"bytes": moved, "gb_per_s": moved / (row["ms"] / 1000) / 1e9}


def _functions(case: Case, device: torch.device) -> dict[str, Callable[[], tuple[Function, str]]]:
    path = "reference" if why_not(torch.empty(1, 2, 1, device=device)) else "kernel"
    return {
        "eager": lambda: (_each(case, _timm(case)), "pytorch"),
        "interpolate": lambda: (_each(case, _interpolate(case)), "pytorch"),
        "fused": lambda: (_ours(case, path), path),
    }


def _each(case: Case, one: Callable[[Tensor, tuple[int, int]], Tensor]) -> Function:
    if len(case.sizes) == 1:
        return lambda table: one(table, case.sizes[0])[0]
    return lambda table: torch.cat([one(table, size)[0] for size in case.sizes])


def _timm(case: Case) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """timm's function, but float64 stays so: as the oracle."""
    from timm.layers import resample_abs_pos_embed

    def one(table: Tensor, size: tuple[int, int]) -> Tensor:
        if table.dtype == torch.float64:
            return vk.reference.resample_pos_embed(table, size, case.old)
        return resample_abs_pos_embed(table, size, case.old)

    return one


def _interpolate(case: Case) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """F.interpolate and the least around it: no copy that is not needed."""

    def one(table: Tensor, size: tuple[int, int]) -> Tensor:
        image = table[:, 1:].unflatten(1, case.old).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
        return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2)], dim=1)

    return one


def _ours(case: Case, path: str) -> Function:
    """Where there is a kernel, on a CPU too, under ``fused``: what the row says ran."""
    policy = "fused" if path == "kernel" else "auto"

    def resample(table: Tensor) -> Tensor:
        with vk.backend(policy):
            if len(case.sizes) == 1:
                return vk.ops.resample_pos_embed(table, case.sizes[0], case.old)[0]
            return vk.ops.resample_pos_embed_many(table, case.sizes, case.old, num_prefix_tokens=1)

    return resample


def test_pos_embed(outcomes: dict[str, Outcome], provider: str, benchmark: Any) -> None:
    report(benchmark, outcomes[provider])
