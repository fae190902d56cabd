"""The one mechanism behind ``vitkernels.fuse``, ``unfuse`` and ``VisionTransformer``: assigning classes."""

import inspect

from torch import nn

from . import _fold
from .block import FusedBlock
from .patch_embed import FusedPatchEmbed

# By exact class. Each fused class has `stock`, its timm class, and `why_not(module)`.
FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {cls.stock: cls for cls in (FusedBlock, FusedPatchEmbed)}

# timm's Block.forward as read (1.0.26 to 1.0.31); another signature means another meaning, which is not guessed.
_KNOWN_SIGNATURE = ("self", "x", "attn_mask", "is_causal")


def fuse_classes(model: nn.Module) -> None:
    """Give modules of an exact timm class the fused one; ``RuntimeError`` if timm's block is not as known."""
    signature = tuple(inspect.signature(FusedBlock.stock.forward).parameters)
    if signature != _KNOWN_SIGNATURE:
        raise RuntimeError(f"this timm's Block.forward takes {signature}, vitkernels knows {_KNOWN_SIGNATURE}")
    _swap(model, FUSED_CLASSES)


def unfuse_classes(model: nn.Module) -> None:
    """The reverse; ``RuntimeError`` if something else has put its own class over a fused one."""
    fused = tuple(FUSED_CLASSES.values())
    if any(isinstance(module, fused) and type(module) not in fused for module in model.modules()):
        raise RuntimeError("a fused module's class was changed by something else (FSDP): unfuse before wrapping the model")
    _swap(model, {cls: stock for stock, cls in FUSED_CLASSES.items()})


def set_recompute_mlp(model: nn.Module, on: bool) -> None:
    """Whether fused blocks compute fc1 again in backward. A block that does not has no attribute of ours."""
    for module in model.modules():
        if on and isinstance(module, FusedBlock):
            module.recompute_mlp = True
        else:
            module.__dict__.pop("recompute_mlp", None)


def set_inference(model: nn.Module, on: bool) -> None:
    """Whether blocks multiply with folded copies of their parameters. A block that does not has no attribute of ours."""
    for module in model.modules():
        if isinstance(module, FusedBlock.stock):
            _fold.drop(module)
    if on:
        _fold.fold_all([module for module in model.modules() if isinstance(module, FusedBlock)])


def _swap(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Assign ``classes[type(module)]``. An error half way takes back what was done."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in model.modules():
            before = type(module)
            if before in classes:
                module.__class__ = classes[before]
                done.append((module, before))
    except BaseException:
        for module, before in done:
            module.__class__ = before
        raise
