"""What tests share: the error budget, hostile inputs, poisoned memory."""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A module whose tests run kernels has `pytestmark = KERNEL_TESTS`: interpreted without a GPU, run by `-m gpu` with one.
ON_GPU = torch.cuda.is_available()
KERNEL_TESTS = [pytest.mark.gpu] if ON_GPU else []


def slow_on_gpu(test: Callable) -> Callable:
    """Marks ``slow``, where there is a GPU, a test whose every case or example has a shape of its own.

    There each shape compiles kernels of its own, a second or more; the interpreter, which compiles nothing, is as fast as ever.
    """
    return pytest.mark.slow(test) if ON_GPU else test


def timm_since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test of something that timm has since ``version`` (we support it from 1.0.26 on)."""
    mine, wanted = (tuple(int(part) for part in v.split(".")[:3]) for v in (metadata.version("timm"), version))
    return pytest.mark.skipif(mine < wanted, reason=f"timm {version} brought {what}")


@functools.cache
def seconds_to_import_torch() -> float:
    """How fast this machine is, in processor time, which does not grow under load; 3.1 on an EPYC without AVX-512."""
    script = "import time; start = time.process_time(); import torch; print(time.process_time() - start)"
    # The first may find cold caches.
    return min(float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(2))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` returns NaN (largest value for integers) inside, PyTorch's own debug mode for uninitialised memory."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _errors(value: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Relative L2 and absolute maximum."""
    difference = value.double() - oracle
    return (difference.norm() / oracle.norm().clamp_min(1e-300)).item(), difference.abs().max().item()


def assert_within_budget(name: str, kernel: Tensor, eager: Tensor, oracle: Tensor, step: float | None = None) -> None:
    """DESIGN's budget: error(kernel) <= 2 * error(eager PyTorch, same dtype) + one rounding step, in relative L2 and max-abs.

    One rounding step of the output dtype is eps, relative to the tensor's norm and to its largest element, or ``step``.
    """
    assert kernel.dtype == eager.dtype, f"{name}: dtype {kernel.dtype}, eager has {eager.dtype}"
    assert kernel.shape == eager.shape, f"{name}: shape {tuple(kernel.shape)}, eager has {tuple(eager.shape)}"
    if oracle.numel() == 0:
        return
    assert torch.isfinite(oracle).all(), f"{name}: the oracle is not finite, list this case instead of testing it"
    assert torch.isfinite(eager).all(), f"{name}: eager is not finite, list this case instead of testing it"
    assert torch.isfinite(kernel).all(), f"{name}: {int((~torch.isfinite(kernel)).sum())} elements are not finite"
    step = torch.finfo(kernel.dtype).eps if step is None else step
    (l2, largest), (eager_l2, eager_largest) = _errors(kernel, oracle), _errors(eager, oracle)
    allowed_l2, allowed_largest = 2 * eager_l2 + step, 2 * eager_largest + step * oracle.abs().max().item()
    assert l2 <= allowed_l2, f"{name}: relative L2 error {l2:.3e} > {allowed_l2:.3e} (eager has {eager_l2:.3e})"
    assert largest <= allowed_largest, f"{name}: error {largest:.3e} > {allowed_largest:.3e} (eager has {eager_largest:.3e})"


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run ``function`` on fresh leaves of ``inputs``; its outputs and the gradient of each float input, by name."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    results |= {f"gradient of input {i}": t.grad for i, t in enumerate(leaves) if t is not None and t.requires_grad}
    return results


def beside_reference(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Of each output and gradient its name, what ``kernel`` and eager ``reference`` give, and ``reference`` in float64."""
    got = outputs_and_gradients(kernel, inputs, cotangents)
    eager = outputs_and_gradients(reference, inputs, cotangents)
    oracle = outputs_and_gradients(reference, [None if t is None else t.double() for t in inputs], cotangents)
    assert got.keys() == eager.keys()
    for name in got:
        yield name, got[name], eager[name], oracle[name]


def assert_matches_reference(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
    step: float | None = None,
) -> None:
    """Outputs and gradients of ``kernel`` are within budget of the float64 ``reference``, judged beside eager ``reference``."""
    for name, got, eager, oracle in beside_reference(kernel, reference, inputs, cotangents):
        assert_within_budget(name, got, eager, oracle, step)


def hostile_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """LayerNorm inputs that bite: every row has a mean of 5 sigma, and eight channels are 50x outliers."""
    x = torch.randn(shape) + 5.0
    x[..., :: max(shape[-1] // 8, 2)] *= 50.0
    return x.to(dtype)


# What ``flat_rows`` adds to a constant row: whole ulps, or one channel that is a large multiple of the others.
SPREADS = ("one channel an ulp off", "few ulps", "a thousandth", "outlier of 50x", "outlier of 1e4x")


def flat_rows(rows: int, width: int, magnitude: float, spread: str, dtype: torch.dtype) -> Tensor:
    """Nearly constant rows around ``magnitude``, in which the rounding of a mean is as large as the spread."""
    x = torch.full((rows, width), magnitude).to(dtype)
    ulp = torch.nextafter(x, torch.full_like(x, torch.inf)) - x
    if spread == "one channel an ulp off":
        x[:, width // 2] += ulp[:, 0]
    elif spread == "a thousandth":
        x = (magnitude * (1 + 1e-3 * torch.randn(rows, width))).to(dtype)
    else:
        x += torch.randint(-4, 5, x.shape).to(dtype) * ulp
    if spread.startswith("outlier"):
        x[:, width // 3] = min(magnitude * (50 if spread == "outlier of 50x" else 1e4), torch.finfo(dtype).max / 2)
    return x


_ELSEWHERE = """
import sys
sys.modules["vitkernels"] = None  # an import of it fails
import torch
_, how, path = sys.argv
load = {
    "torch.export": lambda file: torch.export.load(file).module(),
    "torch.jit": torch.jit.load,
    "AOTInductor": torch._inductor.aoti_load_package,
}[how]
for name, inputs in torch.load(f"{path}/inputs.pt").items():
    program = load(f"{path}/{name}.pt2")
    with torch.no_grad():
        torch.save([program(x) for x in inputs], f"{path}/{name}.outputs")
"""


def elsewhere(how: str, path: Path, inputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """What the programs ``path``/NAME.pt2 give for their inputs in a process that cannot import vitkernels.

    ``how`` they were saved: ``"torch.export"``, ``"torch.jit"`` or ``"AOTInductor"``.
    """
    torch.save(inputs, path / "inputs.pt")
    command = [sys.executable, "-c", _ELSEWHERE, how, str(path)]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: torch.load(path / f"{name}.outputs") for name in inputs}
