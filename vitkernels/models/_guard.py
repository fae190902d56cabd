"""Per-call guard: is a module still what its fused forward assumes?

A fused forward reads its children's weights and never calls the children. Hooks, replaced or parametrised layers (LoRA,
torchao), patched forwards and tensor subclasses would be skipped in silence, so each call asks here first, and runs timm's
forward when something is found. Nothing is cached: attributes are read straight from the instance dictionaries, which
costs 8 us a block (through ``nn.Module.__getattr__`` it was 26) and can never be stale.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of Tensor, and of Parameter and FakeTensor: a subclass with another one acts on its own terms.
_PLAIN_TORCH_FUNCTIONS = (Tensor.__torch_function__, nn.Parameter.__torch_function__)

_Forwards = tuple[tuple[type[nn.Module], object], ...]  # of classes, as imported
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
            continue
        state = child.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]:
            reasons.append(f"{prefix}{name} has hooks")
        elif "forward" in state:
            reasons.append(f"{prefix}{name} overrides forward")
        elif state["_parameters"] and not _plain(state["_parameters"].values()):
            reasons.append(f"{prefix}{name} has a parameter of a tensor subclass")
    return reasons


def _plain(parameters: Iterable[Tensor | None]) -> bool:
    for p in parameters:
        kind: Any = type(p)
        if p is None or kind is nn.Parameter or kind is Tensor:
            continue
        if is_traceable_wrapper_subclass(p) or kind.__torch_function__ not in _PLAIN_TORCH_FUNCTIONS:
            return False
    return True


def _describe(child: nn.Module | None) -> str:
    return "missing" if child is None else f"a {type(child).__module__.partition('.')[0]} {type(child).__name__}"


def shipped_forwards(owner: type[nn.Module], *parts: tuple[str, tuple[type[nn.Module], ...]]) -> _Forwards:
    """The ``forward`` of ``owner`` and of every accepted class, as imported."""
    classes = dict.fromkeys([owner, *(cls for _, accepted in parts for cls in accepted)])
    return tuple((cls, cls.forward) for cls in classes)


def patched(shipped: _Forwards) -> list[str]:
    """Reasons for classes whose ``forward`` was replaced since, for all instances (attention-map hacks do)."""
    return [f"{cls.__name__}.forward was replaced" for cls, forward in shipped if cls.forward is not forward]
