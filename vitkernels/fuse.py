"""fuse, unfuse and explain: walk a model and swap the classes of timm's modules.

``module.__class__ = FusedBlock`` adds no parameter, buffer or copy. State dict, optimizer, hooks and checkpoints keep
working, and the reverse assignment undoes it. timm is imported on the first call.
"""

import io
import logging
from dataclasses import dataclass

import torch
from torch import nn

from .ops._availability import availability

_logger = logging.getLogger("vitkernels")


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


RECOMPUTE = (None, "mlp")


def fuse(model: nn.Module, *, strict: bool = False, recompute: str | None = None, inference: bool = False) -> nn.Module:
    """Swap the transformer blocks and patch embeddings of timm models inside ``model`` for fused ones, in place.

    Parameters, state dict, outputs and gradients stay the same. Each call decides anew: while a block has a part that
    vitkernels does not know (RMSNorm, a LoRA layer), hooks on its children or active dropout, it runs timm's forward, and
    ``explain`` says why. Fusing twice is harmless. Fuse before FSDP, DDP or ``torch.compile`` wrap the model.

    Args:
        model: any module that contains ``timm.models.vision_transformer.Block``.
        strict: raise if any transformer block or patch embedding would run timm's forward now.
        recompute: ``"mlp"``: blocks save nothing of the MLP's width for backward and compute fc1 again there. The gradients
            are bitwise the same; a block saves 6 units instead of 10 (one unit is its input) and costs 11% more FLOPs in
            training. The switch is an attribute of each block, not in the state dict; the last ``fuse`` or ``unfuse`` counts.
        inference: take the parameters as frozen, and give each block copies of its weights with LayerNorm (in float16 and
            bfloat16) and LayerScale multiplied in. Calls without gradients and autocast use them. The copies are buffers that
            no state dict has; the parameters stay as they are. Changed parameters (``load_state_dict``, ``.half()``, a step of
            an optimizer) are folded again at the next call, but a graph that ``torch.compile`` has made does not see them, and
            nobody sees writes through ``parameter.data``.
            ``train()``, ``unfuse`` and a ``fuse`` without this argument drop the copies.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it contains no block of timm's ``vision_transformer``, ``recompute`` is unknown, or a block is in training
            mode and ``inference`` was asked for.
        RuntimeError: ``strict`` and something would not run fused, or timm's ``Block.forward`` has an unknown signature.

        The model is unchanged after an error.
    """
    report = explain(model)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(map(repr, RECOMPUTE))}, got {recompute!r}")
    from .models import FusedBlock, fuse_classes, set_inference, set_recompute_mlp

    blocks = [module for module in model.modules() if isinstance(module, FusedBlock.stock)]
    if inference and any(block.training for block in blocks):
        raise ValueError(
            "inference=True takes the parameters as frozen, but the model is in training mode: call model.eval() first"
        )
    if not blocks:
        found = ", ".join(sorted({m.kind for m in report.modules})) or "none"
        raise ValueError(f"model contains no timm.models.vision_transformer.Block to fuse (blocks found: {found})")
    not_fused = [m for m in report.modules if not m.fused and m.reasons != (_NOT_YET,)]
    if strict and not_fused:
        raise RuntimeError("cannot fuse " + "; ".join(f"{m.name}: {', '.join(m.reasons)}" for m in not_fused))
    fuse_classes(model)
    set_recompute_mlp(model, recompute == "mlp")
    set_inference(model, inference)
    if not_fused:
        counts = f"{len(not_fused)} of {len(report.modules)} modules still run timm's forward"
        _logger.log(
            logging.WARNING if len(not_fused) == len(report.modules) else logging.INFO,
            "%s, e.g. %s: %s (vitkernels.explain(model) shows all)",
            counts,
            not_fused[0].name,
            "; ".join(not_fused[0].reasons),
        )
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module of ``model`` its timm class back, in place. Harmless on a model that is not fused.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: FSDP has changed the classes of fused modules.
    """
    _check_module(model)
    from .models import set_inference, set_recompute_mlp, unfuse_classes

    unfuse_classes(model)
    set_inference(model, False)
    set_recompute_mlp(model, False)
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
        if (reasons := _reasons(name, module)) is not None
    )
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    operators = {op: tuple(why) for op, why in availability(example.device, example.dtype).items()}
    return FusionReport(reports, operators)


_NOT_YET = "vitkernels.fuse would fuse it"


def _reasons(name: str, module: nn.Module) -> list[str] | None:
    """Why ``module`` does not run fused, empty if it does; None for a module that is neither block nor patch embedding."""
    from .models import FUSED_CLASSES

    for stock, fused in FUSED_CLASSES.items():
        if isinstance(module, fused):
            return fused.why_not(module)
        if type(module) is stock:
            return fused.why_not(module) or [_NOT_YET]
    if isinstance(module, tuple(FUSED_CLASSES)) or _looks_like_a_block(module) or _is_stem(name):
        return [f"vitkernels has no fused form of {type(module).__module__}.{type(module).__name__}"]
    return None


def _is_stem(name: str) -> bool:
    return name.rpartition(".")[2] in ("patch_embed", "embeds")  # timm's names, of HybridEmbed and NaFlexEmbeds too


def _looks_like_a_block(module: nn.Module) -> bool:
    cls, children = type(module), module._modules
    if cls.__module__ == "timm.models.vision_transformer" and cls.__name__.endswith("Block"):
        return True
    return "attn" in children and ("mlp" in children or "norm1" in children)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
