"""How ``vitkernels bench`` measures: check first, then interleaved rounds, ratios within each round."""

import ctypes
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ._providers import Provider

DEFAULT_ROUNDS = 20
MIN_ROUNDS = 3
SECONDS_PER_ROW = 4.0  # a row stops early rather than take longer, unless the user gave a number of rounds
_SECONDS_PER_ROUND = 0.1  # enough calls of a small model that the clock and the scheduler do not show
_MAX_CALLS = 1000
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

Step = Callable[[], Tensor]
Arguments = tuple[Tensor, Tensor, str]  # images, labels, mode


def outputs(provider: Provider, arguments: Arguments) -> list[Tensor]:
    """Run once: the logits and, in training, all gradients as one vector; float32."""
    found = [provider.step(*arguments)().float()]
    if arguments[2] == "train":
        gradients = [p.grad.float().flatten() for p in provider.model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
        provider.model.zero_grad(set_to_none=True)
    return found


def compare(
    mine: list[Tensor], eager: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> tuple[dict[str, float | None], str]:
    """Compare what ``outputs`` gave for a provider, for eager, and for the float32 model (eager again if that is float32).

    float32: outputs within 1e-5 * max(1, |eager|) of eager's, gradients within 1e-4 in relative L2.
    16 bit: the error against float32 is at most twice eager's plus one rounding step of the dtype, in the largest element
    of the outputs and in relative L2 of the gradients.

    Returns:
        ``max_abs_diff`` and in training ``max_abs_grad_diff`` (against eager, None when not finite); and why it does not
        match, empty if it does.
    """
    step = torch.finfo(dtype).eps
    differences = {"max_abs_diff": _largest(mine[0] - eager[0])}
    if dtype == torch.float32:
        error = ((mine[0] - eager[0]).abs() / eager[0].abs().clamp_min(1.0)).max().item()
        allowed = 1e-5
    else:
        error = (mine[0] - truth[0]).abs().max().item()
        allowed = 2 * (eager[0] - truth[0]).abs().max().item() + step * max(1.0, truth[0].abs().max().item())
    wrong = [] if error <= allowed else [f"output error {error:.1e}, allowed {allowed:.1e}"]  # NaN is wrong
    if len(mine) > 1:
        differences["max_abs_grad_diff"] = _largest(mine[1] - eager[1])
        norm = truth[1].norm().clamp_min(1e-30)
        error = ((mine[1] - truth[1]).norm() / norm).item()
        allowed = 1e-4 if dtype == torch.float32 else 2 * ((eager[1] - truth[1]).norm() / norm).item() + step
        wrong += [] if error <= allowed else [f"gradient error {error:.1e}, allowed {allowed:.1e}"]
    return differences, "; ".join(wrong)


def _largest(difference: Tensor) -> float | None:
    value = difference.abs().max().item()
    return value if math.isfinite(value) else None


def interleaved(steps: dict[str, Step], device: torch.device, rounds: int | None) -> Iterator[dict[str, float]]:
    """Seconds per call of every step, one dictionary per round, A B A B. The steps have run before: nothing is warmed up.

    ``rounds`` None: DEFAULT_ROUNDS, fewer (at least MIN_ROUNDS) once SECONDS_PER_ROW per step have passed.
    """
    deadline = time.perf_counter() + SECONDS_PER_ROW * len(steps)
    calls = {name: _calls(step, device) for name, step in steps.items()}
    for done in range(rounds or DEFAULT_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS and time.perf_counter() > deadline:
            return
        yield {name: _seconds(steps[name], calls[name], device) for name in rotated(list(steps), done)}


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system: each tensor then page-faults anew, or not, by the luck of its
    address, which moved the ratio of two equal models on a CPU by 10% from process to process (0.5% with this)."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


def rotated(names: list[str], done: int) -> list[str]:
    """The order of round ``done``: each contender follows each other one equally often, and none pays for its neighbour."""
    start = done % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if done // len(names) % 2 else order


def _calls(step: Step, device: torch.device) -> int:
    """How many calls fill a round."""
    return min(_MAX_CALLS, max(1, round(_SECONDS_PER_ROUND / _seconds(step, 1, device))))


def _seconds(step: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def peak_memory(step: Step, model: nn.Module, others: list[nn.Module], device: torch.device) -> int | None:
    """Bytes of GPU memory at the peak of one call, less the weights that only other providers hold; None on a CPU."""
    if device.type != "cuda":
        return None
    mine = {p.data_ptr() for p in model.parameters()}
    foreign = {p.data_ptr(): p.nbytes for other in others for p in other.parameters() if p.data_ptr() not in mine}
    for other in others:  # gradients of the timed steps
        other.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - sum(foreign.values())


def statistics(seconds: list[float], eager: list[float], batch: int) -> dict[str, Any]:
    """Throughput and the ratio to eager, which is the median of the ratios within each round: drift cancels there."""
    low, middle, high = numpy.percentile(batch / numpy.array(seconds), [10, 50, 90])
    ratios = numpy.percentile(numpy.array(eager) / numpy.array(seconds), [10, 50, 90])
    return {
        "images_per_s": float(middle),
        "images_per_s_p10": float(low),
        "images_per_s_p90": float(high),
        "ms": float(numpy.median(seconds)) * 1000,
        "ratio_to_eager": float(ratios[1]),
        "ratio_to_eager_p10": float(ratios[0]),
        "ratio_to_eager_p90": float(ratios[2]),
        "rounds": len(seconds),
    }
