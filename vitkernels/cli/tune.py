"""``vitkernels tune``: measures which plan and configuration is fastest on this GPU, and writes it into its tuned table."""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import itertools
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _env, _select, kernels
from ..kernels import _tuned
from ..kernels._device import gpu_of
from ..kernels._tuning import Case, Problem, Shape
from . import _environment, _measure, _models
from ._output import CommandError, console, progress
from ._workloads import WORKLOADS

BATCHES = (256, 128, 64, 32, 16, 8, 1)
DTYPES = ("bfloat16", "float16")
_B16 = next(workload for workload in WORKLOADS if workload.name == "B/16")
_STEMS = ("linear", "attention", "patch_embed")  # by what tuning them gains; others come after these
ROUNDS = 20
_WINS = 0.9  # of the rounds, in which a candidate has to be faster than the baseline: noise is not written down
_FLUSH_BYTES = 256 * 2**20  # twice the largest L2 (B200: 126 MB)
_HOLD_CYCLES = 2_000_000  # about 1 ms: the queue waits while the host launches, so that device time has no launch gaps

_DESCRIPTION = """
Measure, for each operator that has a choice, every candidate at the shapes of the models: first its result at that very shape,
within the error budget beside PyTorch's, then its time, in interleaved rounds. What was faster than the plan without an entry
(of a linear layer: cuBLAS, then an elementwise pass) in nine of ten rounds is written into the table of this GPU's name, after
each case; the GEMMs of ViT-B/16 at 256 images are measured first. Started again, the command measures what the table lacks.
"""

Sampler = Callable[[Callable[[], object]], float]  # seconds of one call


class _OutOfTime(Exception):
    """The budget is spent."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command."""
    text = "measure plans and block sizes on this GPU, and write the table that decides"
    parser = subparsers.add_parser("tune", help=text, description=_DESCRIPTION, allow_abbrev=False)
    names = f"timm names or sizes ({', '.join(_models.SIZES)}) (default: every workload)"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=names)
    batches = f"images, comma-separated (default: {','.join(map(str, BATCHES))}; of a workload at most what fills a GPU)"
    parser.add_argument("--batch-sizes", type=_models.listed(_models.positive), metavar="A,B", help=batches)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the products (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1 (default: the GPU)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the table (default: this user's of the GPU's name)")
    parser.add_argument("--force", action="store_true", help="also measure what the table has")
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="begin nothing after this time")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case. A wrong result, or a case that cannot be decided, is named under ``errors``."""
    deadline = time.monotonic() + (args.budget or float("inf"))
    device, arch = _gpu(args.device)
    gpu = gpu_of(torch.empty(0, device=device), arch)
    path = args.output or _env.tuned_dir() / _tuned.file_name(gpu)
    known = _known(path)
    cases = _cases(args.models, args.batch_sizes, arch, getattr(torch, args.dtype))
    todo = [case for case in cases if args.force or case.key not in known.get(case.stem, {})]
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    left = 0
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with progress() as bar, torch.inference_mode(), on_device:
        sample = _sampler(device)
        task = bar.add_task("", total=len(cases), completed=len(cases) - len(todo))
        for index, case in enumerate(todo):
            bar.update(task, description=f"{case.stem} {case.title}")
            try:
                if device.type == "cuda" and _kind(case) not in map(_kind, todo[:index]):
                    _compile([c for c in todo if _kind(c) == _kind(case)], arch, deadline)
                rows.append(_row(case, device, sample, deadline))
                _write(path, case, rows[-1]["entry"])
                errors += [f"{case.stem} {case.title}: {name} is wrong: {why}" for name, why in rows[-1]["refused"].items()]
            except _OutOfTime:
                left = len(todo) - index
                break
            except torch.OutOfMemoryError:
                errors.append(f"{case.stem} {case.title}: out of GPU memory")
            except _Failed as failure:
                errors.append(f"{case.stem} {case.title}: {failure}")
            bar.advance(task)
    environment = {**_environment.environment(), "device": str(device), "arch": arch, "gpu": gpu, "dtype": args.dtype}
    counts = {"kept": len(cases) - len(todo), "left": left}
    return {"environment": environment, "table": str(path), "rows": rows, **counts, **({"errors": errors} if errors else {})}


def _kind(case: Case) -> tuple[str, str]:
    return case.stem, case.kind


class _Failed(Exception):
    """A case that cannot be decided."""


def _gpu(text: str | None) -> tuple[torch.device, str]:
    """The GPU and its architecture, or why there is nothing to measure on."""
    device = _models.pick_device(text)
    arch = _select.target(torch.empty(0, device=device))
    if arch is None:
        raise CommandError("tune measures on an NVIDIA GPU, and there is none here: without a table cuBLAS's plan runs")
    with torch.cuda.device(device):
        reasons = _select.why_not_here(torch.empty(1, device=device))
    if _env.INTERPRETING:
        reasons.append("TRITON_INTERPRET is set")
    if reasons:
        raise CommandError(f"no kernel runs on {device}: {'; '.join(reasons)}")
    return device, arch


def _known(path: Path) -> dict[str, Any]:
    """The table that is there; refuses, before any work, a file that is none, and a place that cannot be written."""
    _tuned.forget()
    known = _tuned.read(path)
    if path.exists() and not known:
        raise CommandError(f"{path} exists and is no table of format {_tuned.FORMAT}: move it away")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")
    return known


def _write(path: Path, case: Case, entry: dict[str, Any]) -> None:
    try:
        _tuned.write(path, case.stem, case.key, entry)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}", 1) from error


# What is measured.


def b16_gemms(arch: str, dtype: torch.dtype) -> list[Case]:
    """The GEMMs of a block of ViT-B/16 at 256 images, also with a LayerNorm folded in."""
    module = importlib.import_module(f"{kernels.__name__}._tuning_linear")  # imports Triton
    return list(module.cases(_B16, 256, arch, dtype))


def _makers() -> dict[str, Callable[[Shape, int, str, torch.dtype], Iterator[Case]]]:
    """``cases`` of each stem that can be tuned: of every ``kernels/_tuning_<stem>.py``."""
    prefix = "_tuning_"
    names = sorted(file.stem for file in Path(kernels.__file__).parent.glob(f"{prefix}*.py"))
    return {name.removeprefix(prefix): importlib.import_module(f"{kernels.__name__}.{name}").cases for name in names}


def _cases(models: list[str], batches: list[int] | None, arch: str, dtype: torch.dtype) -> list[Case]:
    """Each key once, at the most rows that share it. By stem and kind of case, large ones first: they compile the same code,
    and an interrupted run has measured what matters most. So do the GEMMs of ViT-B/16 at 256 images, before all others."""
    if models:
        shapes = [(_shape(name), batches or BATCHES) for name in dict.fromkeys(map(_models.check_name, models))]
    else:
        shapes = [(w, batches or [b for b in BATCHES if b <= w.infer_batch]) for w in WORKLOADS]
    makers = sorted(_makers().items(), key=lambda item: _STEMS.index(item[0]) if item[0] in _STEMS else len(_STEMS))
    made = [[list(cases(shape, b, arch, dtype)) for shape, several in shapes for b in several] for _, cases in makers]
    found: dict[tuple[str, str], Case] = {}
    for stem in made:
        for same_kind in itertools.zip_longest(*stem):
            for case in sorted(filter(None, same_kind), key=lambda case: (case.kind, -case.rows)):
                found.setdefault((case.stem, case.key), case)
    first = {(case.stem, case.key) for case in b16_gemms(arch, dtype)}
    return sorted(found.values(), key=lambda case: (case.stem, case.key) not in first)


@dataclasses.dataclass(frozen=True)
class _ModelShape:
    tokens: int
    width: int
    num_heads: int
    hidden: int
    act: str
    patch: int
    image: int


def _shape(name: str) -> Shape:
    """Of a model's blocks, which are alike in every ViT that can be fused, and of its patch embedding."""
    from ..models import FusedBlock, FusedPatchEmbed
    from ..models.block import activation_name
    from . import roofline

    model = _models.fuse(roofline._on_meta(name), name)
    images = roofline._images(1, model.default_cfg["input_size"], torch.float32)
    (arguments, _), _ = roofline._block_arguments(model, images, name)
    block = next(module for module in model.modules() if isinstance(module, FusedBlock))
    _, tokens, width = arguments[0].shape
    stem = next((module for module in model.modules() if isinstance(module, FusedPatchEmbed)), None)
    patches = {0} if stem is None else set(stem.patch_size)
    patch, image = (patches.pop() if len(patches) == 1 else 0), model.default_cfg["input_size"][-1]
    act = activation_name(block.mlp.act)
    return _ModelShape(tokens, width, block.attn.num_heads, block.mlp.fc1.weight.shape[0], act, patch, image)


# How.


def _compile(cases: list[Case], arch: str, deadline: float) -> None:
    """Fill Triton's cache for cases of one kind, a process for each candidate: compiling takes seconds, measuring less."""
    if time.monotonic() > deadline:
        raise _OutOfTime
    names = list(dict.fromkeys(name for case in cases for name in case.entries))
    context = multiprocessing.get_context("spawn")
    with (
        contextlib.suppress(BrokenProcessPool),  # what is missing is compiled when it is measured
        ProcessPoolExecutor(min(len(names), os.cpu_count() or 1), context) as pool,
    ):
        list(pool.map(_compile_candidate, itertools.repeat(cases), names, itertools.repeat(arch)))


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
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that cuBLAS was not configured for it
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


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
    """Device time of a call that finds nothing in the L2 cache, by events."""
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


def show(document: dict[str, Any]) -> None:
    """Print what was decided, and where it stands."""
    from rich.table import Table

    out, rows, environment = console(), document["rows"], document["environment"]
    if rows:
        table = Table(title=f"tuned on {environment['gpu']}, {environment['dtype']}", title_justify="left")
        for column in ("operator", "case", "runs", "us", "us of baseline", "fastest / baseline"):
            table.add_column(column, justify="right" if "us" in column or "/" in column else "left", no_wrap=True)
        for row in rows:
            chosen, baseline = (f"{row['us'][row[key]]:.1f}" for key in ("chosen", "baseline"))
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "-"
            table.add_row(row["stem"], row["title"], row["chosen"], chosen, baseline, ratio)
        out.print(table)
    counts = [f"{len(rows)} measured", f"{document['kept']} were there"]
    counts += [f"{document['left']} left for the next run"] if document["left"] else []
    broken = sorted({f"{name} ({why})" for row in rows for name, why in row["broken"].items()})
    out.print(f"{document['table']}: {', '.join(counts)}")
    for line in broken:
        out.print(f"did not run: {line}")
