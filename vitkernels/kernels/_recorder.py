"""Records the tensors that launches read and write, instead of launching: ``vitkernels roofline`` on ``meta`` tensors.

A kernel file declares ``WRITES``: for each kernel that a launcher starts, the names of the arguments that it stores to. It
loads from every other tensor argument. A file whose kernels multiply matrices (``tl.dot``, ``add_product``) also declares
``FLOPS``: by kernel, a function of the launch's arguments by name that gives the FLOPs of its products, masked work left out.
Nothing here touches a GPU or compiles.
"""

import contextlib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from . import _device

Flops = Callable[..., int]
Record = Callable[[str, list[Tensor], list[Tensor], int], None]  # (kernel, tensors read, tensors written, FLOPs)


def modules() -> dict[str, ModuleType]:
    """The kernel files, by stem."""
    package = importlib.import_module(__package__)
    names = (info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    return {name: importlib.import_module(f"{__package__}.{name}") for name in names}


def launcher(name: str) -> Callable[..., Any] | None:
    """``launch_<name>``, of whichever kernel file has it; None for an operator of the extension."""
    found = (getattr(module, f"launch_{name}", None) for module in modules().values())
    return next((launch for launch in found if launch is not None), None)


class _Recorded:
    """Stands for a kernel: ``kernel[grid](...)`` records."""

    def __init__(self, name: str, kernel: Any, writes: Sequence[str], flops: Flops | None, record: Record) -> None:
        while hasattr(kernel, "fn"):  # autotuners and heuristics wrap the jitted function, that wraps Python's
            kernel = kernel.fn
        self._name, self._writes, self._flops, self._record = name, writes, flops, record
        self._parameters = tuple(inspect.signature(kernel).parameters)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        bound = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        reads = [t for name, t in tensors.items() if name not in self._writes]
        flops = self._flops(**bound) if self._flops else 0
        self._record(self._name, reads, [t for name, t in tensors.items() if name in self._writes], flops)


@contextlib.contextmanager
def recording(record: Record, multiprocessors: int = 1, architecture: int = 90) -> Iterator[None]:
    """Launches inside call ``record`` instead of running.

    Args:
        record: called with the kernel's name, the tensors that it reads, those that it writes, and its FLOPs.
        multiprocessors, architecture: of the chip that is imagined; kernels and the size of some scratch depend on them.

    Raises:
        RuntimeError: a kernel file has a kernel, by its name, that ``WRITES`` does not declare, or products and no ``FLOPS``.
    """
    with contextlib.ExitStack() as stack:
        for module in modules().values():
            writes, flops = getattr(module, "WRITES", {}), getattr(module, "FLOPS", {})
            undeclared = [n for n in vars(module) if n.endswith("_kernel") and n not in writes]
            if undeclared:
                raise RuntimeError(f"{module.__name__}.WRITES does not declare {', '.join(undeclared)}")
            if not flops and re.search(r"tl\.dot|\badd_product\(", inspect.getsource(module)):
                raise RuntimeError(f"{module.__name__} multiplies matrices and declares no FLOPS")
            for name, arguments in writes.items():
                _replace(stack, module, name, _Recorded(name, getattr(module, name), arguments, flops.get(name), record))
        _replace(stack, _device, "_dry_run_multiprocessors", multiprocessors)
        _replace(stack, _device, "_dry_run_architecture", architecture)
        yield


def _replace(stack: contextlib.ExitStack, module: ModuleType, name: str, value: Any) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
