"""Per-call guard: is a module still what its fused forward assumes?

A fused forward reads its children's weights and never calls the children. Hooks, replaced or parametrised layers (LoRA,
torchao), patched forwards and tensor subclasses would be skipped in silence, so each call asks here first, and runs timm's
forward when something is found. Nothing is cached: attributes are read straight from the instance dictionaries, which
costs 8 us a block (through ``nn.Module.__getattr__`` it was 26) and can never be stale.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Parts = tuple[tuple[str, tuple[type, ...]], ...]  # (child's name, accepted classes)


def global_hooks() -> list[str]:
    """A reason when a hook for all modules is registered: it would miss the children."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return ["a global module hook is registered"]
    return []


def children(owner: nn.Module, prefix: str, parts: Parts) -> list[str]:
    """Reasons why a child of ``owner`` has to be called: another class, hooks, its own ``forward``, a tensor subclass."""
    reasons = []
    modules = owner._modules
    for name, accepted in parts:
        child = modules.get(name)
        if type(child) not in accepted:
            wanted = " or ".join(dict.fromkeys(cls.__name__ for cls in accepted))
            reasons.append(f"{prefix}{name} is {_describe(child)}, not {wanted}")
        elif child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            reasons.append(f"{prefix}{name} has hooks")
        elif "forward" in child.__dict__:
            reasons.append(f"{prefix}{name} overrides forward")
        elif not _plain(child._parameters.values()):
            reasons.append(f"{prefix}{name} has a parameter of a tensor subclass")
    return reasons


def _plain(parameters: Iterable[Tensor | None]) -> bool:
    for p in parameters:
        kind = type(p)
        if p is not None and kind is not nn.Parameter and kind is not Tensor and is_traceable_wrapper_subclass(p):
            return False
    return True


def _describe(child: nn.Module | None) -> str:
    return "missing" if child is None else f"a {type(child).__module__.partition('.')[0]} {type(child).__name__}"


def patched(classes: Iterable[tuple[type, object]]) -> list[str]:
    """Reasons for classes whose ``forward`` is no longer the one that was imported (patched for all instances)."""
    return [f"{cls.__name__}.forward was replaced" for cls, forward in classes if cls.forward is not forward]


def active_dropout(module: nn.Dropout) -> bool:
    """Whether this dropout would change its input."""
    return module.training and module.p > 0.0
