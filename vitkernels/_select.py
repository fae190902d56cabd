"""Backend policy: which implementation a public function runs, and why not the kernel.

``auto``       the kernel on a GPU that it supports, else the PyTorch reference (logged once per reason, shown by ``explain``);
               no kernel while ``torch.jit.trace`` or ``torch.onnx.export`` looks on
``fused``      the kernel, or ``RuntimeError`` with the reasons; on a CPU only under ``TRITON_INTERPRET=1``
               (operators of the extension, which has CPU kernels, run them on a CPU under ``auto`` too, but not in a program
               that ``torch.export``, ``torch.jit.trace`` or ``make_fx`` records: it may run where vitkernels is not installed)
``reference``  always the PyTorch reference
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _env, _settings
from ._recording import exporting, fx_tracing, holds

_logger = logging.getLogger("vitkernels")
_Function = TypeVar("_Function", bound=Callable)

_reported: set[tuple[str, str]] = set()

MIN_CAPABILITY = (8, 0)

# What a `with backend(...)` inside of code that Dynamo traces has set; None wherever that code runs. Traced code cannot take a
# lock, and a compiled function stores again, when it ends, what the traced code stored: None, which changes nothing.
_traced: str | None = None


class backend(_settings.Override):
    """Context manager that sets the backend policy.

    Inside, the thread or asyncio task that opened the block has this policy; where blocks are nested, the innermost one. A
    thread or task without a block of its own (autograd's threads, workers) has the policy of the block, of any thread, that
    was opened last and is still open. Without any block the default rules again, in whatever order blocks overlapped and
    ended. One object may be entered several times, also by several threads at once. Compiled code follows a change.

    A block inside of compiled code should have no graph break in it: what runs in the break shares the policy with all threads.
    A backward pass that runs the forward again (``torch.utils.checkpoint``) has to have the policy that the first one had.

    Args:
        name: ``"auto"``, ``"fused"`` or ``"reference"``. Outside, the environment variable ``VITKERNELS_BACKEND`` decides.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or name not in _env.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_env.BACKENDS)}, got {name!r}")
        super().__init__("backend", name)
        self.name = name
        self._traced_before: list[str | None] = []

    def __enter__(self) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            self._traced_before.append(_traced)
            _traced = self.name
        else:
            super().__enter__()

    def __exit__(self, *exc: object) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = self._traced_before.pop()
        else:
            super().__exit__(*exc)


class targeting(_settings.Override):
    """Pretend that every tensor lives on a GPU of architecture ``arch`` (``"sm_90"``): for tools on ``meta`` tensors.

    These then also follow CUDA's autocast. Threads see it as they see ``backend``.
    """

    def __init__(self, arch: str) -> None:
        super().__init__("target", arch)


class planning(_settings.Override):
    """Operators that have a plan of this name run it, whatever they would choose: for tools that compare plans.

    Threads see it as they see ``backend``.
    """

    def __init__(self, name: str | None) -> None:
        super().__init__("plan", name)


def policy() -> str:
    """The backend policy of the calling thread or task."""
    return _settings.backend if _traced is None else _traced


def choose_plan(plans: Sequence[str], choice: Callable[[], str]) -> str:
    """The plan of one call: ``choice()``, unless ``planning`` names one of ``plans``.

    A stem with several ways to compute the same (cuBLAS and a pass, or one kernel) lists their names as ``PLANS`` in its file
    in ``ops/``, asks here in its public function, and passes the answer to its operator as an argument.
    """
    plan = _settings.plan
    return plan if plan is not None and plan in plans else choice()


def target(x: Tensor) -> str | None:
    """The GPU architecture that ``x`` runs on, as ``"sm_90"``; ``None`` when it is not on an NVIDIA GPU.

    Policy and every ``why_not`` look at nothing else; tuned tables are those of the device's name.
    """
    arch = _settings.target
    if arch is not None:
        return arch
    if not x.is_cuda or torch.version.cuda is None:  # ROCm's tensors call themselves CUDA's
        return None
    return _architecture(x.get_device())


def takes_kernels(x: Tensor) -> bool:
    """Does ``auto`` run kernels on ``x``? It is on an NVIDIA GPU, and not recorded for a program that could not hold them."""
    return target(x) is not None and not torch.jit.is_tracing() and not _recorded_without_kernels()


def run_by_dynamo(function: _Function) -> _Function:
    """Decorator for what Dynamo cannot trace: while compiling it runs the function and takes the result as a constant.

    As ``torch.compiler.assume_constant_result``, which would import Dynamo, a second at import time.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@run_by_dynamo
def _recorded_without_kernels() -> bool:
    """Is this call recorded for ONNX, whose runtimes know no kernels of ours, or for a program that may be asked for gradients?

    The operators around kernels have none: those are in the functions of autograd that call them, which no program keeps.
    """
    if exporting():
        return torch.is_grad_enabled() or torch.onnx.is_in_onnx_export()
    return torch.is_grad_enabled() and fx_tracing()


@run_by_dynamo
def _architecture(device_index: int) -> str | None:
    try:
        major, minor = torch.cuda.get_device_capability(device_index)
    except (RuntimeError, AssertionError):  # a fake tensor may be on a GPU that is not there
        return None
    return f"sm_{major}{minor}"


@run_by_dynamo
def _why_not_launch() -> list[str]:
    reason = _env.triton_cannot_launch()
    return [] if reason is None else [reason]


def use_kernel(op: str, x: Tensor, why_not: Callable[[], list[str]], min_bytes: int = 0, has_cpu_kernel: bool = False) -> bool:
    """Decide between kernel (``True``) and reference (``False``) for one call of ``op`` on ``x``.

    Args:
        op: its name, for messages.
        x: the tensor whose device and size decide.
        why_not: reasons why the kernel cannot run.
        min_bytes: under ``auto``, smaller inputs run PyTorch's operator, which costs the host less to launch.
        has_cpu_kernel: ``auto`` may choose the kernel for tensors of a CPU.

    Raises:
        RuntimeError: the policy is ``fused`` and ``why_not()`` gave reasons.
        ValueError: ``VITKERNELS_BACKEND`` names no policy.
    """
    backend = policy()
    if backend == "reference" or (backend == "auto" and not takes_kernels(x) and not (has_cpu_kernel and x.is_cpu)):
        return False
    _env.check_backend(backend)
    reasons = why_not()
    if not reasons and backend == "auto" and holds(x.numel() * x.element_size() < min_bytes):
        reasons = [f"inputs below {min_bytes / 2**20:g} MiB are launch-bound"]
    if not reasons:
        return True
    if backend == "fused":
        raise RuntimeError(f"vitkernels.ops.{op} cannot run its kernel: " + "; ".join(reasons))
    _report_once(op, reasons)
    return False


def _report_once(op: str, reasons: list[str]) -> None:
    if torch.compiler.is_compiling():  # Dynamo cannot trace a logger
        return
    for reason in reasons:
        if (op, reason) not in _reported:
            _reported.add((op, reason))
            _logger.info("%s falls back to PyTorch: %s", op, reason)


def why_not_here(*tensors: Tensor | None) -> list[str]:
    """Reasons, common to all Triton kernels, why these tensors cannot be given to one."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    reasons = []
    if not _env.HAS_TRITON:
        reasons.append("Triton is not installed")
    if any(t.device != first.device for t in present):
        reasons.append("tensors on different devices: " + ", ".join(sorted({str(t.device) for t in present})))
    arch = target(first)
    if arch is None:
        if first.is_cuda:
            reasons.append("PyTorch has no NVIDIA GPU to run on")
        elif not (_env.INTERPRETING and first.device.type == "cpu"):
            reasons.append(f"kernels run on CUDA tensors, got {first.device.type} (TRITON_INTERPRET=1 interprets them on cpu)")
    else:
        reasons += why_not_arch(arch)
        if first.is_cuda and not reasons and not _env.INTERPRETING:
            reasons += _why_not_launch()
    return reasons + why_not_opaque(present)


def why_not_arch(arch: str) -> list[str]:
    """A reason when the GPU architecture is too old."""
    if int(arch.removeprefix("sm_")) < 10 * MIN_CAPABILITY[0] + MIN_CAPABILITY[1]:
        return [f"{arch} is older than sm_{MIN_CAPABILITY[0]}{MIN_CAPABILITY[1]}"]
    return []


def why_not_opaque(tensors: list[Tensor]) -> list[str]:
    """Reasons, common to all operators, why an opaque operator would not see what these tensors stand for."""
    reasons = []
    if any(map(acts, tensors)):
        reasons.append("a tensor subclass needs PyTorch's own operators")
    if any(t.layout is not torch.strided for t in tensors):
        reasons.append("a sparse tensor needs PyTorch's own operators")
    if _under_functorch(tensors):
        reasons.append("torch.func transforms and forward-mode derivatives need PyTorch's own operators")
    return reasons


# Of Tensor, and of Parameter and FakeTensor: a subclass with another one acts on its own terms.
_PLAIN_TORCH_FUNCTIONS = (Tensor.__torch_function__, nn.Parameter.__torch_function__)


def acts(t: Tensor) -> bool:
    """Is this a tensor subclass that acts on its own terms, and has to see each function of PyTorch?"""
    kind: Any = type(t)
    if kind is nn.Parameter or kind is Tensor:
        return False
    return is_traceable_wrapper_subclass(t) or kind.__torch_function__ not in _PLAIN_TORCH_FUNCTIONS


def _under_functorch(tensors: list[Tensor]) -> bool:
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _imagined(x: Tensor) -> bool:
    """Is ``x`` a tensor without data that ``targeting`` puts on a GPU?"""
    return _settings.target is not None and x.is_meta


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on ``x``'s device type, or ``None`` outside autocast."""
    device_type = "cuda" if _imagined(x) else x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which PyTorch returns a LayerNorm of a ``dtype`` tensor on ``x``'s device.

    That is float32 under CUDA autocast, else ``dtype``: CPU autocast leaves ``layer_norm`` alone, and float64 is never cast.
    """
    on_gpu = x.is_cuda or _imagined(x)
    return torch.float32 if on_gpu and dtype != torch.float64 and autocast_dtype(x) is not None else dtype
