"""fuse, unfuse and explain: walk a model and swap the classes of timm's modules.

``module.__class__ = FusedBlock`` adds no parameter, buffer or copy. State dict, optimizer, hooks and checkpoints keep
working, and the reverse assignment undoes it. timm is imported on the first call.
"""

import inspect
import io
import logging
from dataclasses import dataclass

import torch
from torch import nn

from .ops._availability import availability

_logger = logging.getLogger("vitkernels")

# timm's Block.forward as read; another signature means another meaning, which fuse does not guess.
_KNOWN_SIGNATURE = ("self", "x", "attn_mask", "is_causal")


@dataclass(frozen=True)
class ModuleReport:
    """One patch embedding or transformer block of a model."""

    name: str
    kind: str
    fused: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class FusionReport:
    """What ``explain`` found. ``print(report)`` shows tables.

    Attributes:
        modules: one entry per patch embedding and transformer block, fused or with the reasons why not.
        operators: for each operator the reasons why it runs PyTorch's code instead of its kernel on this model's device and
            dtype; an empty tuple means the kernel.
    """

    modules: tuple[ModuleReport, ...]
    operators: dict[str, tuple[str, ...]]

    @property
    def num_fused(self) -> int:
        """How many modules run their fused forward."""
        return sum(m.fused for m in self.modules)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        modules = Table("module", "class", "state", title=f"{self.num_fused} of {len(self.modules)} modules fused")
        for m in self.modules:
            modules.add_row(m.name, m.kind, "fused" if m.fused else "; ".join(m.reasons))
        operators = Table("operator", "runs", title="operators on this model's device and dtype")
        for name, reasons in self.operators.items():
            operators.add_row(name, "kernel" if not reasons else "PyTorch: " + "; ".join(reasons))
        console = Console(file=io.StringIO(), width=120)
        console.print(modules, operators)
        return console.file.getvalue()


def fuse(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Swap the transformer blocks and patch embeddings of timm models inside ``model`` for fused ones, in place.

    Parameters, state dict, outputs and gradients stay the same. A block that cannot be fused is left alone (``explain`` says
    why), and a fused block runs timm's forward whenever a call needs it (hooks on its children, active dropout, ...).
    Fusing twice is harmless. Fuse before FSDP, DDP or ``torch.compile`` wrap the model.

    Args:
        model: any module that contains ``timm.models.vision_transformer.Block``.
        strict: raise if any transformer block or patch embedding cannot be fused.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it contains no block of timm's ``vision_transformer``.
        RuntimeError: ``strict`` and something cannot be fused, or timm's ``Block.forward`` has an unknown signature.

        The model is unchanged after an error.
    """
    report = explain(model)
    from .models import FUSED_CLASSES, FusedBlock

    signature = tuple(inspect.signature(FusedBlock.stock.forward).parameters)
    if signature != _KNOWN_SIGNATURE:
        raise RuntimeError(f"this timm's Block.forward takes {signature}, vitkernels knows {_KNOWN_SIGNATURE}")
    if not any(isinstance(module, FusedBlock.stock) for module in model.modules()):
        found = sorted({m.kind for m in report.modules}) or ["none"]
        raise ValueError(f"model contains no timm.models.vision_transformer.Block to fuse (blocks found: {', '.join(found)})")
    unfusable = [m for m in report.modules if not m.fused and m.reasons != (_NOT_YET,)]
    if strict and unfusable:
        raise RuntimeError("cannot fuse " + "; ".join(f"{m.name}: {', '.join(m.reasons)}" for m in unfusable))
    _swap([(m, FUSED_CLASSES[type(m)]) for m in model.modules() if type(m) in FUSED_CLASSES and _fusable(m)])
    if unfusable:
        _logger.info("%d of %d modules are not fused, vitkernels.explain(model) says why", len(unfusable), len(report.modules))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module of ``model`` its timm class back, in place. Harmless on a model that is not fused.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_module(model)
    from .models import FUSED_CLASSES

    _swap([(m, type(m).stock) for m in model.modules() if type(m) in FUSED_CLASSES.values()])
    return model


def explain(model: nn.Module) -> FusionReport:
    """Say of each transformer block and patch embedding whether it is fused, or why not, and what each operator runs.

    The state is that of a call now: a fused block with a hook on its ``attn`` is reported as not fused, with that reason.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_module(model)
    reports = tuple(
        ModuleReport(name or "(model)", type(module).__name__, not reasons, tuple(reasons))
        for name, module in model.named_modules()
        if (reasons := _reasons(module)) is not None
    )
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    operators = {op: tuple(why) for op, why in availability(example.device, example.dtype).items()}
    return FusionReport(reports, operators)


_NOT_YET = "vitkernels.fuse would fuse it"


def _reasons(module: nn.Module) -> list[str] | None:
    """Why ``module`` does not run fused, empty if it does; None for a module that is neither block nor patch embedding."""
    from .models import FUSED_CLASSES

    for stock, fused in FUSED_CLASSES.items():
        if isinstance(module, fused):
            return fused.why_not(module)
        if type(module) is stock:
            return fused.why_not(module) or [_NOT_YET]
    if isinstance(module, tuple(FUSED_CLASSES)) or _looks_like_a_block(module):
        return [f"{type(module).__module__}.{type(module).__name__} is not a class that vitkernels knows"]
    return None


def _looks_like_a_block(module: nn.Module) -> bool:
    children = module._modules
    return ("attn" in children or "attns" in children) and any(name in children for name in ("mlp", "ffns", "norm1"))


def _fusable(module: nn.Module) -> bool:
    from .models import FUSED_CLASSES

    return not FUSED_CLASSES[type(module)].why_not(module)


def _swap(assignments: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Assign classes; an error half way takes back what was done."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, cls in assignments:
            before = type(module)
            module.__class__ = cls
            done.append((module, before))
    except BaseException:
        for module, before in done:
            module.__class__ = before
        raise


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
