"""``python benchmarks/gpu_round.py --out DIR [--budget SECONDS] [--force] [--dry-run]``: what ten minutes on a GPU can tell.

The steps, in an order where each is useful if the next never runs: build ``vitkernels._C`` when it is missing; environment
and measured ceilings; ``pytest -m gpu``; compute-sanitizer; tuning (``vitkernels tune``); benchmarks of kernels,
of models, of compiled models; the slow tests of ``-m gpu``; a summary. Each has a limit, which is cut to what the budget leaves
after the least time that every later step needs. One that is over it is interrupted and what it had measured is kept.

DIR gets one JSON file per step, ``tuned/<GPU>.json`` and ``round.log``. Started again, a step whose file says ok is not
repeated (``--force`` repeats it), and one that was interrupted adds to what it had measured. ``--dry-run`` takes the same
steps without a GPU, at tiny shapes. ``benchmarks/report.py`` reads the ``kernels.json``, ``models.json`` and
``compiled.json`` of a round.

Exit code: 1 when correctness failed (a test, the sanitizer, a candidate of tuning, or our provider at a benchmark's shape), 2
for bad arguments or no GPU, else 0, even where steps ran out of time: the table at the end says so.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
GRACE = 10.0  # seconds that an interrupted step has to write its results
LOG_BYTES, OUTPUT_BYTES = 4 * 2**20, 2**18  # kept of earlier rounds' log, and of the output of one command
SANITIZER_ERROR, NOTHING_SELECTED = 99, 5  # exit codes: the one that we ask for, and pytest's
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")


@dataclass(frozen=True)
class Step:
    """One thing to find out.

    Attributes:
        name: also of its file, ``<name>.json``.
        commands: run in turn, the later even when an earlier failed; they share the step's time.
        seconds: the most that it takes; least: without which it is not begun, and which earlier steps leave to it.
        needs: programs, Python modules or files of this tree without which there is nothing to run.
        read: makes the file's contents from the results that the commands left in the scratch folder.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    least: float
    needs: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    read: Callable[[Path], dict[str, Any]] = lambda scratch: {}


def steps(dry: bool, scratch: Path) -> list[Step]:
    """What runs; ``dry`` makes every part as small as it can be."""
    target = ("--build-lib", str(scratch), "--build-temp", str(scratch)) if dry else ("--inplace",)  # dry: the tree stays
    ceilings = (sys.executable, __file__, "--ceilings", str(scratch / "environment.json"), *(["--dry-run"] if dry else []))
    tune = (sys.executable, "-m", "vitkernels", "tune", *(["--help"] if dry else []))
    tools = [("compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)) for tool in _TOOLS]
    # Every registered operator once, at the smallest shapes: forward and backward are operators of their own.
    smallest = (*PYTEST, "tests/test_registration.py", "-k")
    smallest += ("kernel_and_reference and layer_norm",) if dry else ("kernel_and_reference", "-m", "gpu")
    return [
        Step(
            "build",
            ((sys.executable, "setup.py", "build_ext", *target),),
            90,
            20,
            ("pybind11", "cmake", "ninja"),
            {"VITKERNELS_BUILD_CUDA": "0"} if dry else {},
        ),
        Step("environment", (ceilings,), 40, 15, read=lambda scratch: _json(scratch / "environment.json")),
        _tests("tests", 150, 60, scratch, ("tests/test_layer_norm.py", "-k", "empty_and_single_rows") if dry else _ON_GPU),
        Step(
            "sanitizer",
            (smallest,) if dry else tuple((*tool, *smallest) for tool in tools),
            60,
            20,
            ("pytest",) if dry else ("pytest", "compute-sanitizer"),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # a cached block would hide an access beyond a tensor's end
        ),
        Step("tune", (tune,), 90, 30, ("vitkernels/cli/tune.py",)),
        _benchmarks("kernels", 150, 60, scratch, _TINY_KERNELS if dry else _KERNELS),
        _benchmarks("models", 120, 50, scratch, [_tiny("eager or fused")] if dry else _MODELS),
        _benchmarks("compiled", 150, 50, scratch, [_tiny("compile or fused")] if dry else _COMPILED),
        _tests("sweeps", 150, 20, scratch, ("tests/test_workloads.py", "-k", "S/16") if dry else _SLOW_ON_GPU),
    ]


# What pytest selects. A new stem needs no line here. The rest of `pytest -m gpu` comes last, with the time that is left.
_ON_GPU = ("-m", "gpu and not slow")
_SLOW_ON_GPU = ("-m", "gpu and slow")
# (--size, -k), the most telling first: each is a process of its own, and what an interrupted one has measured is kept.
_KERNELS = [
    ("small", "not test_model and not compile"),
    ("full", "not test_model and not compile"),
    ("small", "not test_model and (compile or fused)"),
]
_TINY_KERNELS = [("small", "layer_norm-S_16-infer-b1 and not add and (eager or fused)")]
_MODELS = [("small", "test_model and not compile and not max-autotune")]
_COMPILED = [
    ("small", "test_model and B_16-infer and (compile or fused)"),
    ("small", "test_model and (So400m_14-infer or S_16-infer) and (compile or fused)"),
    ("small", "test_model and B_16-infer and (max-autotune or fused)"),
    ("small", "test_model and So400m_14-infer and (max-autotune or fused)"),
    ("small", "test_model and train and (compile or fused)"),
]


def _tiny(providers: str) -> tuple[str, str]:
    return "small", f"model-Ti_16-infer-b1 and ({providers})"


_TESTS = ("tests", "sweeps")
_TOOLS = ("memcheck", "racecheck")
_DRY = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # at these sizes threads only cost


def _tests(name: str, seconds: float, least: float, scratch: Path, selected: tuple[str, ...]) -> Step:
    """Compiling is most of it, so several processes where pytest-xdist is there; one broken file must not hide the others."""
    cores = os.cpu_count() or 1
    many = ("-n", str(min(6, cores // 2))) if cores >= 8 and importlib.util.find_spec("xdist") else ()
    file = scratch / f"{name}.xml"
    command = (*PYTEST, *many, "--continue-on-collection-errors", *selected, f"--junitxml={file}")
    return Step(name, (command,), seconds, least, ("pytest",), read=lambda _: _counts(file))


def _benchmarks(name: str, seconds: float, least: float, scratch: Path, selections: list[tuple[str, str]]) -> Step:
    files = [scratch / f"{name}-{i}.json" for i in range(len(selections))]
    commands = tuple(
        (*PYTEST, "benchmarks/", "--benchmark-only", f"--benchmark-json={file}", "-rfs", "--size", size, "-k", expression)
        for file, (size, expression) in zip(files, selections, strict=True)
    )

    def read(_: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for file in files:
            found = merged(found, _json(file))
        return found

    return Step(name, commands, seconds, least, ("pytest", "pytest_benchmark", "timm"), read=read)


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """``after`` with the benchmarks that only ``before`` has; a benchmark is named by its file, function and parameters."""
    rows = [*before.get("benchmarks", []), *after.get("benchmarks", [])]
    if not rows:
        return {**before, **after}
    return {**before, **after, "benchmarks": list({row.get("fullname", i): row for i, row in enumerate(rows)}.values())}


def _json(path: Path) -> dict[str, Any]:
    """The file's contents; nothing for a file that a killed step never wrote, or only half."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _counts(file: Path) -> dict[str, Any]:
    try:
        suites = list(ET.parse(file).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return {}
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
    return {**counts, "passed": counts["tests"] - sum(counts[name] for name in names[1:])}


def environment_of(step: Step, dry: bool) -> dict[str, str]:
    """The subprocess imports this tree; a test suite around us must not switch on its interpreter or its plugins."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return {**env, **(_DRY if dry else {}), **step.env}


def execute(command: tuple[str, ...], env: dict[str, str], seconds: float, log: Path) -> tuple[int | None, str]:
    """Exit status (None: over its time) and output, which the log gets as it comes: it survives if the round is killed."""
    _trim(log, 0, LOG_BYTES)
    with log.open("ab") as file:
        shown = " ".join(part if "\n" not in part else "..." for part in command)
        file.write(f"\n$ {shown}\n".encode())
        file.flush()
        start = log.stat().st_size
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A round in a shell's background ignores Ctrl-C, and its steps would inherit that: they are interrupted by it.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = _wait(child, seconds)
        finally:
            _kill(child)
    _trim(log, start, OUTPUT_BYTES)
    return code, log.read_bytes()[start:].decode(errors="replace")


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # pytest then ends as after Ctrl-C, with its files written
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    return None


def _kill(child: subprocess.Popen) -> None:
    """With what it started: compile workers outlive their parent."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _trim(log: Path, start: int, most: int) -> None:
    """Keep the last ``most`` bytes of what follows ``start``."""
    data = log.read_bytes() if log.exists() else b""
    if len(data) - start > most:
        log.write_bytes(data[:start] + b"[...]\n" + data[-most:])


def absent(step: Step) -> list[str]:
    """What the step needs and is not here."""
    return [name for name in step.needs if not _is_here(name)]


def _is_here(name: str) -> bool:
    if "/" in name:
        return (ROOT / name).exists()
    return shutil.which(name) is not None or importlib.util.find_spec(name) is not None


def take(step: Step, dry: bool, left: float, scratch: Path, log: Path) -> dict[str, Any]:
    """Run a step in at most the seconds ``left`` to it; what its file holds. ``step`` in it says how it went."""
    if absent(step):
        return _record(step, "skipped", f"not here: {', '.join(absent(step))}")
    if left < step.least:
        return _record(step, "skipped", f"{max(left, 0):.0f} s are left to it")
    begin = time.monotonic()
    limit = min(step.seconds, left)
    end = begin + limit
    codes, text = [], ""
    for command in step.commands:
        code, output = execute(command, environment_of(step, dry), max(end - time.monotonic(), 0.1), log)
        codes.append(code)
        text += output
        if code is None:
            break
    found = step.read(scratch)
    wrong = is_wrong(step.name, codes, text, found)
    failures = [code for code in codes if code and not (code == NOTHING_SELECTED and step.name == "sweeps")]
    status = "failed" if wrong or failures else "timeout" if None in codes else "ok"
    lines = text.strip().splitlines() or ["no output"]
    reason = "" if status == "ok" and step.name not in _TESTS else lines[-1][:100]
    if status == "timeout":
        reason = f"interrupted after {limit:.0f} s; what it had measured is kept"
    return {**found, **_record(step, status, reason, time.monotonic() - begin, wrong)}


def _record(step: Step, status: str, reason: str, seconds: float = 0.0, wrong: bool = False) -> dict[str, Any]:
    record = {"name": step.name, "status": status, "ok": status == "ok", "wrong": wrong}
    return {"step": {**record, "seconds": round(seconds, 1), "reason": reason}}


def is_wrong(name: str, codes: list[int | None], text: str, found: dict[str, Any]) -> bool:
    """Whether correctness failed, as opposed to a step that could not run or had no time."""
    if name in _TESTS:  # a crash is no pass, nor is an empty selection, except of the sweeps
        passes = (0, None) if name == "tests" else (0, None, NOTHING_SELECTED)
        return bool(found.get("failures") or found.get("errors")) or codes[0] not in passes
    if name == "sanitizer":
        errors = re.search(r"ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: .*\([1-9]\d* error", text)
        return SANITIZER_ERROR in codes or errors is not None
    if name == "tune":
        return " is wrong: " in text
    return name in ("kernels", "models", "compiled") and "fused is wrong at this shape" in text


def ceilings(path: Path, dry: bool) -> None:
    """Write the environment and what this device reaches: a copy far larger than its L2, and a bfloat16 GEMM."""
    import torch

    from vitkernels.cli import _environment

    device = "cpu" if dry else "cuda"
    numbers, side = (2**18, 128) if dry else (2**28, 8192)
    source = torch.randn(numbers, device=device)
    copy = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))  # zeros would draw less power
    moved, flops = 2 * source.nbytes, 2 * side**3
    result = {
        "device": device,
        "copy_bytes": moved,  # read and written
        "copy_gb_per_s": moved / _median_seconds(lambda: copy.copy_(source), device) / 1e9,
        "gemm_side": side,
        "gemm_bf16_tflops": flops / _median_seconds(lambda: a @ b, device) / 1e12,
    }
    print(json.dumps(result))
    path.write_text(json.dumps({"environment": _environment.environment(), "ceilings": result}, indent=1))


def _median_seconds(call: Callable[[], object], device: str, rounds: int = 20) -> float:
    import torch

    for _ in range(10):  # the clocks rise first
        call()
    if device == "cpu":
        marks = [time.perf_counter() for _ in range(rounds) if call() is not None]
        return statistics.median(b - a for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1000


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How each step went, and every row that was measured, losses among them."""
    keys = ("subject", "workload", "mode", "batch", "provider", "path", "ms", "ratio_to_eager")
    extras = [benchmark["extra_info"] for result in results for benchmark in result.get("benchmarks", [])]
    return {
        "steps": [result["step"] for result in results],
        "ceilings": next((r["ceilings"] for r in results if "ceilings" in r), None),
        "rows": [{key: extra.get(key) for key in keys} for extra in extras if "provider" in extra],
    }


def table(found: dict[str, Any]) -> str:
    """Steps, ceilings, and our rows; the other providers' are in ``summary.json``."""
    lines = [f"{s['name']:12} {s['status']:8} {s['seconds']:6.1f} s  {s['reason']}".rstrip() for s in found["steps"]]
    if found["ceilings"]:
        c = found["ceilings"]
        lines += ["", f"{c['device']}: copy {c['copy_gb_per_s']:.0f} GB/s, bf16 GEMM {c['gemm_bf16_tflops']:.3g} TFLOP/s"]
    ours = [row for row in found["rows"] if row["provider"] == "fused"]
    if ours:
        lines += ["", f"{'subject':15} {'workload':16} {'mode':6} {'batch':>5} {'path':10} {'ms':>10}  times eager's speed"]
    for r in ours:
        loss = "  slower" if r["ratio_to_eager"] < 1 else ""
        head = f"{r['subject']:15} {r['workload']:16} {r['mode']:6} {r['batch']:5} {r['path']:10}"
        lines.append(f"{head} {r['ms']:10.4f}  {r['ratio_to_eager']:.2f}{loss}")
    return "\n".join(lines)


def run_round(out: Path, budget: float, force: bool, dry: bool) -> int:
    """All steps; the exit code. ``summary.json`` is rewritten after each, so that a killed round leaves one."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    results = []
    with tempfile.TemporaryDirectory() as folder:
        # Tuned tables go to DIR/tuned, and the benchmarks after them look there.
        tables = {"VITKERNELS_CACHE": str(out.resolve())}
        todo = [dataclasses.replace(step, env={**tables, **step.env}) for step in steps(dry, Path(folder))]
        for index, step in enumerate(todo):
            file, before = out / f"{step.name}.json", _before(step, out, dry)
            if _is_done(step, before, force):
                result = _kept(before, "done before") if before else _record(step, "ok", "vitkernels._C is there")
            else:
                print(f"{step.name} ...", flush=True)
                later = [s for s in todo[index + 1 :] if not absent(s) and not _is_done(s, _before(s, out, dry), force)]
                reserved = GRACE + sum(s.least + GRACE for s in later)  # each may be interrupted and write its results
                left = end - time.monotonic() - reserved
                result = {"dry_run": dry, **take(step, dry, left, Path(folder), out / "round.log")}
                if before and result["step"]["status"] == "skipped":  # this time; an earlier verdict and its rows stand
                    result = _kept(before, f"earlier; now skipped: {result['step']['reason']}")
                elif step.name != "build":  # has no file: the extension itself shows that it was built
                    if before.get("step", {}).get("status") == "timeout" and not force:
                        result = merged(before, result)
                    file.write_text(json.dumps(result, indent=1))
            results.append(result)
            found = summary(results)
            (out / "summary.json").write_text(json.dumps(found, indent=1))
    print(f"\n{table(found)}\n\n{out / 'summary.json'} has every row.")
    return int(any(result["step"]["wrong"] for result in results))


def _before(step: Step, out: Path, dry: bool) -> dict[str, Any]:
    """What an earlier round left; a dry one says nothing about a GPU."""
    found = _json(out / f"{step.name}.json")
    return found if found.get("dry_run") == dry else {}


def _is_done(step: Step, before: dict[str, Any], force: bool) -> bool:
    if step.name == "build":
        return any((ROOT / "vitkernels" / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
    return not force and before.get("step", {}).get("ok", False)


def _kept(before: dict[str, Any], reason: str) -> dict[str, Any]:
    return {**before, "step": {**before["step"], "reason": reason}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go; the same DIR resumes a round")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of all steps (default: %(default)g)")
    parser.add_argument("--force", action="store_true", help="repeat steps that are done")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on the CPU, at tiny shapes")
    parser.add_argument("--ceilings", type=Path, help=argparse.SUPPRESS)  # the step `environment`, in its own process
    args = parser.parse_args(arguments)
    if args.ceilings:
        ceilings(args.ceilings, args.dry_run)
        return 0
    if args.out is None or not args.budget > 0:
        parser.error("--out DIR is required" if args.out is None else "--budget must be more than 0 seconds")
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU here; --dry-run takes the same steps on the CPU")
    return run_round(args.out.resolve(), args.budget, args.force, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
