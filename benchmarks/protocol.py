"""How a contender is measured: gate first, then interleaved rounds, and each test replays its own into pytest-benchmark.

Not ``vitkernels.cli._measure.interleaved``: single kernels need the L2 cache flushed before each call, and a GPU two clocks.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vitkernels.cli import _measure

ROUNDS = 20
CPU_SECONDS = 1.5  # per contender; on a CPU a row that would take longer ends after MIN_ROUNDS
MIN_ROUNDS = 5
_KERNEL_SECONDS = 0.003  # a round of a single operator on a CPU: the clock and the scheduler must not show
_FLUSH_BYTES = 256 * 2**20  # twice the largest L2 (B200: 126 MB)
_HOLD_CYCLES = 2_000_000  # about 1 ms: the queue is held while the host launches, so that device time has no launch gaps

Step = Callable[[], object]


class Unavailable(Exception):
    """A contender cannot run here: not installed, no GPU, a backend that refuses the shape. The message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        path: ``pytorch``, a package's name, or for ours ``kernel``, ``mixed``, ``reference`` or ``stub``: nothing is computed
            behind a driver that does nothing, and there is nothing to check.
        step: the timed call.
        check: the gate at the very shape; raises AssertionError when results are not within the budget.
        peak: bytes of GPU memory of one call; None on a CPU.
    """

    path: str
    step: Step
    check: Callable[[], None]
    peak: Callable[[], int | None]


@dataclass
class Outcome:
    """What became of a contender: a reason to skip, a reason to fail, or its rounds and its row."""

    unavailable: str = ""
    failure: str = ""
    seconds: list[float] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)


def measure(
    names: Iterable[str], build: Callable[[str], Contender], device: torch.device, batch: int, kernel: bool
) -> dict[str, Outcome]:
    """Gate every contender, then time those that passed, A B A B. ``eager`` must be among them: it is the ratios' base."""
    outcomes = {name: Outcome() for name in names}
    passed = {}
    for name, outcome in outcomes.items():
        contender = _admitted(name, build, device, outcome)
        if contender is not None:
            passed[name] = contender
    if "eager" not in passed:
        raise RuntimeError(f"eager PyTorch failed, so nothing can be compared: {outcomes['eager']}")
    steps = {name: contender.step for name, contender in passed.items()}
    times = _rounds(steps, device, kernel)
    eager = [device_s for device_s, _ in times["eager"]]
    for name, contender in passed.items():
        seconds = [device_s for device_s, _ in times[name]]
        outcomes[name].seconds = seconds
        outcomes[name].row = {
            "provider": name,
            "path": contender.path,
            "clock": "CUDA events" if device.type == "cuda" else "host",
            **_measure.statistics(seconds, eager, batch),
            **_microseconds("device", seconds if device.type == "cuda" else None),
            **_microseconds("wall", [wall_s for _, wall_s in times[name]]),
            "peak_mem_bytes": contender.peak(),
        }
    return outcomes


def _admitted(name: str, build: Callable[[str], Contender], device: torch.device, outcome: Outcome) -> Contender | None:
    """The contender if it runs and is right; else the outcome says why not."""
    try:
        contender = build(name)
        if contender.path != "stub":
            contender.check()
        for _ in range(3 if device.type == "cuda" else 1):  # max-autotune records its CUDA graph on the second call
            contender.step()
        return contender
    except Unavailable as reason:
        outcome.unavailable = str(reason)
    except AssertionError as wrong:
        outcome.failure = f"{name} is wrong at this shape: {_first_line(wrong)}"
    except Exception as error:  # a kernel that does not launch, a compiler that fails: many types, one meaning
        outcome.failure = f"{name} does not run: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _rounds(steps: dict[str, Step], device: torch.device, kernel: bool) -> dict[str, list[tuple[float, float]]]:
    """(device seconds, wall seconds) per call and round; on a CPU both are the host's clock."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    sample = _gpu_sampler(device, kernel) if device.type == "cuda" else _cpu_sampler(steps, kernel)
    deadline = time.perf_counter() + CPU_SECONDS * len(steps)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(ROUNDS):
            if device.type == "cpu" and done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in _measure.rotated(list(steps), done):
                times[name].append(sample(name, steps[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def _cpu_sampler(steps: dict[str, Step], kernel: bool) -> Callable[[str, Step], tuple[float, float]]:
    calls = {name: max(1, round(_KERNEL_SECONDS / _host_seconds(step, 3))) if kernel else 1 for name, step in steps.items()}

    def sample(name: str, step: Step) -> tuple[float, float]:
        seconds = _host_seconds(step, calls[name])
        return seconds, seconds

    return sample


def _host_seconds(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _gpu_sampler(device: torch.device, kernel: bool) -> Callable[[str, Step], tuple[float, float]]:
    flush = torch.empty(_FLUSH_BYTES if kernel else 0, dtype=torch.int8, device=device)

    def sample(_: str, step: Step) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if kernel:
            flush.zero_()
            torch.cuda._sleep(_HOLD_CYCLES)
        else:
            torch.cuda.synchronize()  # a model keeps its launch gaps: at small batches they are the cost
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if kernel:
            flush.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, time.perf_counter() - start

    return sample


def describe(outcomes: dict[str, Outcome], module: Any, case: Any, device: torch.device, environment: dict[str, Any]) -> None:
    """Add to each row what work it is about, and what the case's module says of it."""
    work = {"subject": case.subject, "workload": case.workload.name, "batch": case.batch, "mode": case.mode}
    for row in (outcome.row for outcome in outcomes.values() if outcome.row):
        extra = module.extra(case, device, row) if hasattr(module, "extra") else {}
        row.update({**work, "dtype": module.DTYPE(device), **extra, "environment": environment})


def _microseconds(clock: str, seconds: list[float] | None) -> dict[str, float | None]:
    """Median, p10 and p90; None where the clock does not exist."""
    keys = (f"{clock}_us_p10", f"{clock}_us", f"{clock}_us_p90")
    if seconds is None:
        return dict.fromkeys(keys)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    values = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles) * 1e6
    return dict(zip(keys, values.tolist(), strict=True))


def extra_memory(step: Step, device: torch.device) -> int | None:
    """Bytes that one call allocates at its peak, on top of what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class ReplayClock:
    """A clock that only recorded rounds move, given to pytest-benchmark as its ``timer`` (its public option for that).

    pytest-benchmark times one test at a time, so providers would never be interleaved. They are measured beforehand, and
    ``benchmark.pedantic(clock.play, setup=clock.load, rounds=n)`` reads exactly the recorded durations: every round starts at
    0 and ``play`` sets the clock to the round's duration. Nothing runs and nothing is made up.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterable[float] = iter(())

    def now(self) -> float:
        """The timer."""
        return self._now

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Hand the rounds to the ``benchmark`` fixture."""
        durations = iter(seconds)

        def load() -> None:
            self._now = 0.0

        def play() -> None:
            self._now = next(durations, 0.0)  # --benchmark-cprofile calls it once more

        benchmark.pedantic(play, setup=load, rounds=len(seconds))


CLOCK = ReplayClock()


def report(benchmark: Any, outcome: Outcome) -> None:
    """End a test with its contender's outcome: skipped, failed, or its rounds and its row in pytest-benchmark."""
    import pytest

    if outcome.unavailable:
        pytest.skip(outcome.unavailable)
    if outcome.failure:
        pytest.fail(outcome.failure, pytrace=False)
    benchmark.group = f"{outcome.row['subject']} {outcome.row['workload']} {outcome.row['mode']} b{outcome.row['batch']}"
    benchmark.extra_info.update(outcome.row)
    CLOCK.replay(benchmark, outcome.seconds)
