"""The one mechanism behind ``vitkernels.fuse``, ``unfuse`` and ``VisionTransformer``: assigning classes."""

import contextlib
import inspect
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from . import _fold
from .attention_pool import FusedAttentionPool
from .block import FusedBlock, FusedBlocks
from .naflexvit import FusedNaFlexEmbeds
from .patch_embed import FusedPatchEmbed, FusedVisionTransformer

# By exact class. Each fused class has `stock`, its timm class, and `why_not(module)`.
_FUSED = (FusedBlock, FusedPatchEmbed, FusedAttentionPool, FusedNaFlexEmbeds)
FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {cls.stock: cls for cls in _FUSED}

# timm's forwards as read (1.0.26 to 1.0.31); another signature means another meaning, which is not guessed.
_KNOWN_SIGNATURES: dict[type[nn.Module], tuple[str, ...]] = {
    FusedBlock: ("self", "x", "attn_mask", "is_causal"),
    FusedAttentionPool: ("self", "x", "attn_mask"),
}


def fuse_classes(model: nn.Module) -> None:
    """Give modules of an exact timm class the fused one; ``RuntimeError`` if a forward of timm's is not as known."""
    for cls, known in _KNOWN_SIGNATURES.items():
        signature = tuple(inspect.signature(cls.stock.forward).parameters)
        if signature != known:
            raise RuntimeError(f"this timm's {cls.stock.__name__}.forward takes {signature}, vitkernels knows {known}")
    _swap(model, _all_classes())


def unfuse_classes(model: nn.Module) -> None:
    """The reverse; ``RuntimeError`` if something else has put its own class over a fused one."""
    fused = tuple(_all_classes().values())
    for name, module in model.named_modules():
        if not isinstance(module, fused) or type(module) in fused or getattr(module, "fused_from_the_start", False):
            continue
        where = f"the class of {name or 'the model'}, a fused module, is {type(module).__name__} now"
        if parametrize.is_parametrized(module):
            raise RuntimeError(f"{where}: remove its parametrizations, or unfuse before parametrizing it")
        raise RuntimeError(f"{where}, which something else has made (as FSDP does): unfuse before wrapping the model")
    _swap(model, {cls: stock for stock, cls in _all_classes().items()})


def _all_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """With the one that ``explain`` does not list: the model, no part that can fail to fuse, only the place where patch
    embedding and positions become one operator."""
    return FUSED_CLASSES | {FusedVisionTransformer.stock: FusedVisionTransformer}


def set_recompute_mlp(model: nn.Module, on: bool) -> None:
    """Whether fused blocks compute fc1 again in backward. A block that does not has no attribute of ours."""
    for module in model.modules():
        if on and isinstance(module, FusedBlock):
            module._vk_recompute_mlp = True
        else:
            module.__dict__.pop("_vk_recompute_mlp", None)


def set_inference(model: nn.Module, on: bool) -> None:
    """Whether blocks multiply with folded copies of their parameters, and an ``nn.Sequential`` of blocks has them hand row
    statistics on. A block that does not has no attribute of ours."""
    for module in model.modules():
        if isinstance(module, FusedBlock.stock):
            _fold.drop(module)
        if type(module) is FusedBlocks:
            module.__class__ = FusedBlocks.stock
    if not on:
        return
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module._vk_inference = True
            _fold.fold(module)
        elif type(module) is FusedBlocks.stock and any(type(child) is FusedBlock for child in module.children()):
            module.__class__ = FusedBlocks


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """An error inside gives timm's modules their classes, attributes and buffers back. Until then they stay in memory."""
    ours: list[nn.Module] = [module for module in model.modules() if isinstance(module, (*_all_classes(), FusedBlocks.stock))]
    before = [(m, type(m), {**vars(m)}, {**m._buffers}, {*m._non_persistent_buffers_set}) for m in ours]
    try:
        yield
    except BaseException:
        for module, cls, attributes, buffers, transient in before:
            module.__class__ = cls
            for now, then in (
                (vars(module), attributes),
                (module._buffers, buffers),
                (module._non_persistent_buffers_set, transient),
            ):
                now.clear()
                now.update(then)
        raise


def _swap(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
