"""Per-call guard: is a module still what its fused forward assumes?

A fused forward reads its children's weights and never calls the children. Hooks, replaced or parametrised layers (LoRA,
torchao), patched forwards and tensor subclasses would be skipped in silence, so each call asks here first, and runs timm's
forward when something is found. Nothing is cached: attributes are read straight from the instance dictionaries, which
costs 12 us a block and can never be stale.
"""

import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..ops import _availability

Parts = tuple[tuple[str, tuple[type, ...]], ...]  # (child's name, accepted classes)
# (class or module, name of a function, that function, its code). No function: it is replaced already; no code: it is C++.
Shipped = tuple[tuple[Any, str, Any, CodeType | None], ...]


def global_hooks() -> list[str]:
    """A reason when something is to see every call of a module: it would miss the children."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return ["a global module hook is registered"]
    if found := function_modes():
        return found
    if _unwrapped(nn.Module.__call__) is not nn.Module._wrapped_call_impl:
        return ["nn.Module.__call__ was replaced"]
    return patched(_SHIPPED_CALLS)


def function_modes() -> list[str]:
    """A reason when a TorchFunctionMode is on that is neither PyTorch's own, as ``torch.device`` and export are, nor ours."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:
        return []
    modes = [type(mode) for mode in torch.overrides._get_current_function_mode_stack()]
    foreign = [cls.__name__ for cls in modes if _package(cls.__module__) not in ("torch", "vitkernels")]
    return [f"{', '.join(foreign)} is on, which may change any function of PyTorch"] if foreign else []


def children(owner: nn.Module, prefix: str, parts: Parts) -> list[str]:
    """Reasons why a child of ``owner`` has to be called: another class, hooks, its own ``forward``, a tensor subclass."""
    reasons = []
    modules, compiling = owner._modules, torch.compiler.is_compiling()
    for name, accepted in parts:
        child = modules.get(name)
        if child is None or type(child) not in accepted:
            wanted = " or ".join(dict.fromkeys(cls.__name__ for cls in accepted))
            reasons.append(f"{prefix}{name} is {_describe(child)}, not {wanted}")
            continue
        if compiling:
            read(child, *_CALLED)
        state = child.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]:
            reasons.append(f"{prefix}{name} has hooks")
        elif "forward" in state or "_call_impl" in state:
            reasons.append(f"{prefix}{name} overrides forward")
        elif state.get("_compiled_call_impl") is not None:
            reasons.append(f"{prefix}{name} was compiled")
        elif type(child).__call__ is not nn.Module.__call__:
            reasons.append(f"{type(child).__name__}.__call__ was replaced")
        elif not plain(
            tensors(child)
            if "weight" in state or "bias" in state or "gamma" in state or state["_buffers"]
            else state["_parameters"].values()
        ):
            reasons.append(f"{prefix}{name} has a parameter that is a tensor subclass, sparse or no tensor")
    return reasons


_CALLED = ("forward", "_call_impl", "_compiled_call_impl")  # what nn.Module.__call__ looks for on the instance


def read(module: nn.Module, *names: str) -> None:
    """Let Dynamo guard these attributes of ``module``. It does where one is read, and not where a ``__dict__`` is."""
    for name in names:
        hasattr(module, name)


def has_own(module: nn.Module, *names: str) -> bool:
    """Has ``module`` one of these attributes itself, in place of its class's?"""
    if torch.compiler.is_compiling():
        read(module, *names)
    state = module.__dict__
    return any(name in state for name in names)


def acts(*inputs: Any) -> bool:
    """Is one of these a tensor subclass that has to see each function of PyTorch that timm calls?"""
    return any(isinstance(x, Tensor) and _availability.acts(x) for x in inputs)


def example(module: nn.Module, x: Any) -> Any:
    """``x``, whose device says where ``module`` runs; for the proxy that ``torch.fx`` traces with, one of the parameters."""
    return x if isinstance(x, Tensor) else next(module.parameters(), x)


def traced_as_timms(module: nn.Module, x: Any) -> bool:
    """Is this call traced where no kernel runs? What ``torch.fx`` and ``torch.jit`` make there is timm's: it loads anywhere."""
    traced = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()
    return traced and _availability.leaves_to_pytorch(example(module, x))


def attribute(module: nn.Module, name: str) -> Any:
    """``module.name`` for a tensor or None, found where ``nn.Module`` looks for it.

    A weight need not be a parameter: DataParallel's replicas, FSDP 1 and hypernetworks set plain tensors as attributes. Asked
    in the ordinary way, a module that ``torch.fx`` traces would answer with a proxy.
    """
    state = module.__dict__
    if name in state:
        return state[name]
    parameters = state["_parameters"]
    return parameters[name] if name in parameters else state["_buffers"].get(name)


def why_not_own(module: nn.Module, *names: str) -> list[str]:
    """Reasons where ``module.name`` is neither None nor its own plain tensor of floats: a number, a tensor subclass, or a
    property, as parametrize makes one."""
    reasons = []
    for name in names:
        value = attribute(module, name)
        if hasattr(type(module), name) or not plain([value]):
            reasons.append(f"{name} is not a plain tensor of the module's own")
        elif value is not None and not value.is_floating_point():
            reasons.append(f"{name} is of {value.dtype}")
    return reasons


def why_not_prefix(module: nn.Module, width: int) -> list[str]:
    """Reasons where class and register tokens are not (1, P, width): timm broadcasts some, and refuses others."""
    reasons = why_not_own(module, "cls_token", "reg_token")
    for name in () if reasons else ("cls_token", "reg_token"):
        token = attribute(module, name)
        if token is not None and (token.dim() != 3 or token.shape[0] != 1 or token.shape[2] != width):
            reasons.append(f"{name} has shape {tuple(token.shape)}, not (1, P, {width})")
    return reasons


def tensors(module: nn.Module) -> list[Tensor]:
    """The weights of one of timm's and PyTorch's layers, as parameters, as plain attributes or as buffers."""
    state = module.__dict__
    found = [*state["_parameters"].values(), state.get("weight"), state.get("bias"), state.get("gamma")]
    found += state["_buffers"].values()
    return [t for t in found if t is not None]


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """No subclass that acts on its own terms, no sparse tensor, and no number in the place of a tensor."""
    for t in tensors:
        if t is not None and (not isinstance(t, Tensor) or t.layout is not torch.strided or _availability.acts(t)):
            return False
    return True


def active_dropout(path: str, module: nn.Module | None) -> list[str]:
    """A reason if ``module``, found under this name, is a dropout that drops."""
    if module is None or type(module) is not nn.Dropout:
        return []
    return [f"{path} is active"] if module.training and module.p > 0.0 else []


def _describe(child: nn.Module | None) -> str:
    return "missing" if child is None else f"a {type(child).__module__.partition('.')[0]} {type(child).__name__}"


def shipped_forwards(owner: type[nn.Module], *parts: tuple[str, tuple[type, ...]]) -> Shipped:
    """The ``forward`` of ``owner`` and of every accepted class, as their own modules define it, and the ``F`` that it reads."""
    classes = list(dict.fromkeys([owner, *(cls for _, accepted in parts for cls in accepted)]))
    forwards = shipped(*((cls, "forward") for cls in classes))
    modules = dict.fromkeys(sys.modules[cls.__module__] for cls in classes)
    return forwards + shipped(*((module, "F") for module in modules if hasattr(module, "F")))


def shipped(*names: tuple[type | ModuleType, str]) -> Shipped:
    """Functions by their owners and names, as the owner's own source defines them, whenever somebody may have replaced them.

    Raises:
        RuntimeError: a class is none of timm's or PyTorch's: it has taken the place of one.
    """
    for owner, _ in names:
        known = isinstance(owner, ModuleType) or (isinstance(owner, type) and _package(owner.__module__) in ("timm", "torch"))
        if not known:
            what = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else repr(owner)
            raise RuntimeError(
                f"a class of timm or PyTorch was replaced by {what} before vitkernels was first used;"
                " put the class back, and replace it after vitkernels.fuse"
            )
    return tuple(_entry(owner, name) for owner, name in names)


def _entry(owner: Any, name: str) -> tuple[Any, str, Any, CodeType | None]:
    if not _as_defined(owner, name, None):
        return owner, name, None, None
    function = getattr(owner, name)
    return owner, name, function, getattr(_unwrapped(function), "__code__", None)


def patched(functions: Shipped) -> list[str]:
    """Reasons for functions that are not their owner's own now: replaced for all instances, as attention-map hacks do, or
    edited in place, as IPython's autoreload does."""
    return [
        f"{owner.__name__}.{name} was replaced"
        for owner, name, function, code in functions
        if (getattr(owner, name) is not function or (code is not None and function.__code__ is not code))
        and not _as_defined(owner, name, code)
    ]


@_availability.run_by_dynamo  # which cannot read code
def _as_defined(owner: Any, name: str, code: CodeType | None) -> bool:
    """Is ``owner.name`` the function that the source of its class or module defines under this name?"""
    definer = next(cls for cls in owner.__mro__ if name in cls.__dict__) if isinstance(owner, type) else owner
    function = _unwrapped(definer.__dict__[name])
    if name == "F":
        return function is torch.nn.functional
    if isinstance(function, BuiltinFunctionType):
        return function.__name__ == name
    if not isinstance(function, FunctionType):  # a partial, a compiled or a scripted function
        return False
    if code is not None and function.__code__ is not code:
        return False
    # What functools.wraps cannot copy: the globals that the code reads, and the code's own name.
    source = function.__globals__["__name__"]
    if isinstance(owner, type):
        return source == definer.__module__ and function.__code__.co_qualname == f"{definer.__qualname__}.{name}"
    return _package(source) == _package(owner.__name__) and function.__code__.co_qualname == name


def _unwrapped(function: Any) -> Any:
    """The function inside ``torch.compiler.disable``, or inside what FX puts around one while it traces."""
    while isinstance(function, FunctionType) and (
        getattr(function, "_torchdynamo_disable", False) or function.__globals__["__name__"] == "torch.fx._symbolic_trace"
    ):
        function = getattr(function, "__wrapped__", None)
    return function


def _package(module: str) -> str:
    return module.partition(".")[0]


_SHIPPED_CALLS = shipped((nn.Module, "_wrapped_call_impl"), (nn.Module, "_call_impl"))  # what nn.Module.__call__ goes through
