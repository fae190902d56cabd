"""How ``vitkernels tune`` measures: candidates compiled ahead, gated beside PyTorch's error, timed in interleaved rounds."""

import contextlib
import gc
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _env
from ..kernels import _tuned
from ..kernels._tuning import Case, Problem
from . import _environment, _measure
from ._output import CommandError

ROUNDS = 20
_WINS = 0.9  # of the rounds, in which a candidate has to be faster than the baseline: noise is not written down
_FLUSH_BYTES = 256 * 2**20  # twice the largest L2 (B200: 126 MB)
_HOLD_CYCLES = 2_000_000  # about 1 ms: the queue waits while the host launches, so that device time has no launch gaps

Sampler = Callable[[Callable[[], object]], float]  # seconds of one call


class _OutOfTime(Exception):
    """The deadline has passed."""


class _Failed(Exception):
    """A case that cannot be decided."""


@dataclass(frozen=True)
class Measured:
    """What became of a case.

    Attributes:
        row: for people and JSON; its ``entry`` is in the table. None where the case could not be decided.
        errors: what is wrong: results of candidates, or why there is no row.
    """

    case: Case
    row: dict[str, Any] | None
    errors: tuple[str, ...]


def known(path: Path) -> dict[str, Any]:
    """The table that is there; refuses, before any work, a file that is none, and a place that cannot be written."""
    _tuned.forget()
    table = _tuned.read(path)
    if os.path.exists(path) and not table:  # Path.exists raises where the folder cannot be searched
        raise CommandError(f"{path} exists and is no table of format {_tuned.FORMAT}: move it away")
    missing = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    try:  # as it will be written: a new table takes the old one's place
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error} (--output FILE.json is another place)") from error
    finally:  # where nothing is decided, nothing is left
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
    return table


def user_table(gpu: str) -> Path:
    """This user's table of the GPU that CUDA calls ``gpu``.

    Raises:
        CommandError: the user has no folder for it.
    """
    folder = _env.tuned_dir()
    if folder is None:
        raise CommandError("there is no home folder to write the table to: set VITKERNELS_CACHE=FOLDER")
    return folder / _tuned.file_name(gpu)


def measure(
    cases: Sequence[Case],
    device: torch.device,
    arch: str,
    path: Path,
    deadline: float = math.inf,
    compile_all: bool = False,
) -> Iterator[Measured]:
    """Measure the cases in turn, each yielded as soon as its entry is in the table ``path``.

    Args:
        device: on which; arch: its architecture, ``"sm_90"``.
        path: of the table; ask ``known`` before what is there.
        deadline: of ``time.monotonic()``, after which nothing is begun: the cases that are not yielded are left.
        compile_all: compile the candidates of all cases first, in one pool, and not those of each run of cases of one kind
            when it comes up.

    Raises:
        CommandError: the table cannot be written, or the GPU is in error.
    """
    groups = itertools.groupby(cases, (lambda case: None) if compile_all else _kind)
    with _current(device):
        sample = _sampler(device)
    with contextlib.suppress(_OutOfTime):
        for group in (list(alike) for _, alike in groups):
            if device.type == "cuda":
                _compile(group, arch, deadline)
            for case in group:
                with torch.inference_mode(), _current(device):  # not around the yield, whose caller would be in that mode, too
                    found = _measured(case, device, path, sample, deadline)
                yield found


def _kind(case: Case) -> tuple[str, str]:
    return case.stem, case.kind


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _measured(case: Case, device: torch.device, path: Path, sample: Sampler, deadline: float) -> Measured:
    name = f"{case.stem} {case.title}"
    try:
        row = _row(case, device, sample, deadline)
    except torch.OutOfMemoryError:
        return Measured(case, None, (f"{name}: out of GPU memory",))
    except _Failed as failure:
        return Measured(case, None, (f"{name}: {failure}",))
    _write(path, case, row["entry"])
    return Measured(case, row, tuple(f"{name}: {wrong} is wrong: {why}" for wrong, why in row["refused"].items()))


def _write(path: Path, case: Case, entry: dict[str, Any]) -> None:
    try:
        _tuned.write(path, case.stem, case.key, entry)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}", 1) from error


def _compile(cases: Sequence[Case], arch: str, deadline: float) -> None:
    """Fill Triton's cache, in as many processes as there are cores: compiling a candidate takes seconds, measuring it less.

    A task is a candidate at all cases of a kind, which compile it to nearly the same code.
    """
    if time.monotonic() > deadline:
        raise _OutOfTime
    kinds: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        kinds.setdefault(_kind(case), []).append(case)
    tasks = [(same, name) for same in kinds.values() for name in dict.fromkeys(name for case in same for name in case.entries)]
    left = None if deadline == math.inf else deadline - time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        contextlib.suppress(BrokenProcessPool, TimeoutError),  # what is missing is compiled when it is measured
        ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), context) as pool,
    ):
        list(pool.map(_compile_candidate, *zip(*tasks, strict=True), itertools.repeat(arch), timeout=left))


def _compile_candidate(cases: list[Case], name: str, arch: str) -> None:
    from ..kernels import _aot

    for case in cases:
        with contextlib.suppress(Exception):  # it will fail again, and be told, when it is measured
            capability = int(arch.removeprefix("sm_"))
            with _aot.dry_run(capability), _tuned.trying(case.stem, case.key, case.entries[name]):
                case.problem(torch.device("meta")).run()


def _row(case: Case, device: torch.device, sample: Sampler, deadline: float) -> dict[str, Any]:
    """Gate each candidate, time those that passed, decide."""
    problem = case.problem(device)
    steps, refused, broken = _admitted(case, problem, device, deadline)
    baseline = next(iter(case.entries))
    if baseline not in steps:
        raise _Failed(f"{baseline}, which runs without an entry, fails: {(refused | broken)[baseline]}")
    times = _times(steps, sample)
    chosen, fastest = decide(times, baseline)
    us = {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
    measured = {"rows": case.rows, "us": round(us[chosen], 2), "baseline_us": round(us[baseline], 2), **_on(device)}
    if fastest is not None:
        measured["fastest_other_us"] = round(us[fastest], 2)
    return {
        "stem": case.stem,
        "key": case.key,
        "title": case.title,
        "chosen": chosen,
        "baseline": baseline,
        "entry": {**case.entries[chosen], "measured": measured},
        "us": us,
        "ratio": us[baseline] / us[fastest] if fastest else None,
        "fastest": fastest,
        "refused": refused,
        "broken": broken,
    }


def _on(device: torch.device) -> dict[str, str | None]:
    versions = _environment.versions()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"gpu": gpu, "torch": versions["torch"], "triton": versions["triton"]}


def decide(times: dict[str, list[float]], baseline: str) -> tuple[str, str | None]:
    """The entry to write, and the fastest candidate beside the baseline: it is chosen if it won nearly every round."""
    others = {name: statistics.median(seconds) for name, seconds in times.items() if name != baseline}
    if not others:
        return baseline, None
    fastest = min(others, key=lambda name: others[name])
    wins = [mine < base for mine, base in zip(times[fastest], times[baseline], strict=True)]
    return (fastest if sum(wins) >= _WINS * len(wins) else baseline), fastest


def _admitted(
    case: Case, problem: Problem, device: torch.device, deadline: float
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, str]]:
    """Steps of the candidates that run and are right; why the others are wrong; why the others do not run."""
    oracle, eager = problem.oracle(), problem.eager()
    allowed = _budget(eager, oracle)
    steps: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name, entry in case.entries.items():
        if time.monotonic() > deadline:
            raise _OutOfTime
        step = _step(case, entry, problem)
        try:
            with _poisoned():
                got = step()
            why = _wrong(got, eager, oracle, allowed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # too much shared memory, a compiler that fails: many types, one meaning
            broken[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            _still_works(device, f"{case.title}, {name}: {broken[name]}")
            continue
        if why:
            refused[name] = why
        else:
            steps[name] = step
    return steps, refused, broken


def _step(case: Case, entry: dict[str, Any], problem: Problem) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with _tuned.trying(case.stem, case.key, entry):
            return problem.run()

    return step


def _still_works(device: torch.device, what: str) -> None:
    """An invalid access leaves nothing of the process to measure with."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise CommandError(f"the GPU is in error after {what}; the table has what was measured before", 1) from error


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is NaN: a candidate that leaves a tile out must not find the last one's result there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module of properties
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that cuBLAS was not configured for it
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill


def _errors(value: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Relative L2 and absolute maximum."""
    difference = value.double() - oracle
    return (difference.norm() / oracle.norm().clamp_min(1e-300)).item(), difference.abs().max().item()


def _budget(eager: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Twice eager PyTorch's error and one rounding step, in relative L2 and in the largest element."""
    step = torch.finfo(eager.dtype).eps
    l2, largest = _errors(eager, oracle)
    return 2 * l2 + step, 2 * largest + step * oracle.abs().max().item()


def _wrong(got: Tensor, eager: Tensor, oracle: Tensor, allowed: tuple[float, float]) -> str:
    """Why the result is not within budget; empty if it is."""
    if got.dtype != eager.dtype or got.shape != eager.shape:
        return f"{got.dtype} {tuple(got.shape)} instead of {eager.dtype} {tuple(eager.shape)}"
    for name, error, most in zip(("relative L2 error", "largest error"), _errors(got, oracle), allowed, strict=True):
        if not error <= most:  # NaN too
            return f"{name} {error:.1e}, allowed {most:.1e}"
    return ""


def _times(steps: dict[str, Callable[[], object]], sample: Sampler) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        sample(step)  # the clocks rise first
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(ROUNDS):
            for name in _measure.rotated(list(steps), done):
                times[name].append(sample(steps[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def _sampler(device: torch.device) -> Sampler:
    """Device time of a call that finds nothing in the L2 cache, by events; on a CPU the host's time."""
    if device.type == "cpu":
        return lambda step: _measure._seconds(step, 1, device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(step: Callable[[], object]) -> float:
        flush.zero_()
        torch.cuda._sleep(_HOLD_CYCLES)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return sample
