"""The one mechanism behind ``vitkernels.fuse``, ``unfuse`` and ``VisionTransformer``: assigning classes."""

import inspect

from torch import nn

from .block import FusedBlock
from .patch_embed import FusedPatchEmbed, FusedVisionTransformer

# By exact class. Each fused class has `stock`, its timm class, and `why_not(module)`.
FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {cls.stock: cls for cls in (FusedBlock, FusedPatchEmbed)}
# The model around them: not a part that can fail to fuse, only the place where two parts become one operator.
_MODEL = {FusedVisionTransformer.stock: FusedVisionTransformer}

# timm's Block.forward as read (1.0.26 to 1.0.31); another signature means another meaning, which is not guessed.
_KNOWN_SIGNATURE = ("self", "x", "attn_mask", "is_causal")


def fuse_classes(model: nn.Module) -> None:
    """Give modules of an exact timm class the fused one; ``RuntimeError`` if timm's block is not as known."""
    signature = tuple(inspect.signature(FusedBlock.stock.forward).parameters)
    if signature != _KNOWN_SIGNATURE:
        raise RuntimeError(f"this timm's Block.forward takes {signature}, vitkernels knows {_KNOWN_SIGNATURE}")
    _swap(model, {**FUSED_CLASSES, **_MODEL})


def unfuse_classes(model: nn.Module) -> None:
    """The reverse; ``RuntimeError`` if something else has put its own class over a fused one."""
    fused = tuple(FUSED_CLASSES.values())
    if any(isinstance(module, fused) and type(module) not in fused for module in model.modules()):
        raise RuntimeError("a fused module's class was changed by something else (FSDP): unfuse before wrapping the model")
    _swap(model, {cls: stock for stock, cls in {**FUSED_CLASSES, **_MODEL}.items()})


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
