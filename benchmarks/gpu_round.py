"""``python benchmarks/gpu_round.py --out DIR``: all that eight minutes on a GPU can tell, the most telling first.

Ten steps, each a process of its own (``round_steps.py``, or pytest) under a limit of its own:

    versions            the environment, and one LayerNorm
    operators           every registered operator, forward and backward, against its reference; one that is wrong ends the round
    host                host time of a block: fused, under auto, eager
    kernels             device time of attention, patch embedding and LayerNorm, beside SDPA's backends and the chip's ceilings
    gemms               the products of ViT-B/16 at 256 images: cuBLAS against each configuration; writes the tuned table
    models              B/16 and S/16 at 256 images with that table: eager, each plan, for inference, and each as a CUDA graph
    small_and_training  B/16 at one image, and a training step at 128
    compiled            torch.compile, default and reduce-overhead, at 64 images and one
    tests               pytest -m "gpu and not slow", the operators' files first
    memcheck            step ``operators`` under compute-sanitizer

DIR gets one file, ``round.tar``: ``round.json``, the tuned table and the log. It is replaced every second while results come,
so a round that is killed leaves what it had. ``round.json`` is {"format": 1, "environment": {...}, "steps": [{"name",
"state", "seconds", "rows"}]}; a state is ``ok``, ``wrong`` (a result of ours, or the step failed), ``cut`` (its time was over;
what it had found is there) or ``skipped``. The rows of a step are what ``round_steps.py`` says.

``--resume FILE.tar`` goes on with an earlier round: steps that were ok are not repeated, but for ``versions``, and one that was
cut does what is left. The extension is built first, for the GPU that is there, unless it is built already. ``--compile-only``
needs no GPU: it compiles what the steps launch on sm_90 into Triton's cache, which can be taken along (TRITON_CACHE_DIR).
``--dry-run`` takes the same steps without a GPU, at tiny shapes.

Exit code: 1 when something was wrong, 2 for bad arguments or no GPU, else 0, even where steps ran out of time.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
BUDGET = 480.0  # seconds, the build included
LEAST = 5.0  # seconds without which a step is not begun
BUILD_SECONDS = 90.0
LOG_BYTES = 4 * 2**20  # kept of the log, its end
SANITIZER_ERROR, NOTHING_SELECTED = 99, 5  # exit codes: the one that we ask for, and pytest's
_MEMORY_ERROR = re.compile(r"ERROR SUMMARY: [1-9]|========= Invalid ")


class Step(NamedTuple):
    """One thing to find out, and the most seconds that it takes."""

    name: str
    seconds: float


STEPS = (
    Step("versions", 20),
    Step("operators", 60),
    Step("host", 20),
    Step("kernels", 30),
    Step("gemms", 70),
    Step("models", 60),
    Step("small_and_training", 25),
    Step("compiled", 60),
    Step("tests", 90),
    Step("memcheck", 40),
)
COMPILES = ("versions", "operators", "host", "kernels", "gemms", "models", "small_and_training")  # for --compile-only
Row = dict[str, Any]


class Refused(Exception):
    """The round cannot be begun; the message says why."""


def command(name: str, rows: Path, mode: str) -> list[str]:
    """What runs for a step; ``mode`` is ``gpu``, ``dry-run`` or ``compile-only``."""
    python = sys.executable
    if name == "tests":
        smallest = ["tests/test_registration.py", "-k", "kernel_and_reference"]
        selected = smallest if mode == "dry-run" else ["-m", "gpu and not slow"]
        workers = 2 if mode == "dry-run" else max(1, min(12, (os.cpu_count() or 1) - 2))
        xdist = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        plugins = ["-p", "no:cacheprovider", "-p", "round_pytest"]
        return [python, "-m", "pytest", *plugins, "-q", *xdist, "--continue-on-collection-errors", *selected]
    step = "operators" if name == "memcheck" else name
    flags = [] if mode == "gpu" else [f"--{mode}"]
    plain = [python, str(ROOT / "benchmarks" / "round_steps.py"), step, "--rows", str(rows), *flags]
    if name != "memcheck" or mode != "gpu":
        return plain
    # PyTorch asks the driver things that it may refuse: errors of its calls are no errors of memory.
    tool = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
    return [*tool, "--error-exitcode", str(SANITIZER_ERROR), *plain]


def environment_of(name: str, scratch: Path, mode: str) -> dict[str, str]:
    """A child imports this tree, and finds and leaves the tuned table in ``scratch``."""
    dropped = ("TRITON_INTERPRET", "VITKERNELS_BACKEND")
    env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("PYTEST_")}
    paths = [str(ROOT), str(ROOT / "benchmarks"), env.get("PYTHONPATH")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "VITKERNELS_CACHE": str(scratch), "PYTHONUNBUFFERED": "1"}
    if name in ("tests", "memcheck"):
        env["VITKERNELS_CACHE"] = str(scratch / "empty")  # what they expect is without a table
    env["VITKERNELS_ROUND_ROWS"] = str(rows_file(scratch, name))
    if name == "memcheck":
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a cached block would hide an access beyond a tensor's end
    if mode != "gpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return env


def rows_file(scratch: Path, name: str) -> Path:
    return scratch / f"{name}.jsonl"


def read_rows(path: Path) -> list[Row]:
    """Whole lines; the last may have been cut."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


class Results:
    """What was found so far, and the archive that holds it."""

    def __init__(self, archive: Path, scratch: Path, environment: dict[str, Any]) -> None:
        self.scratch, self.log, self.environment = scratch, scratch / "round.log", environment
        self._archive = archive
        self.steps: dict[str, dict[str, Any]] = {}

    def record(self, name: str, state: str, seconds: float, rows: list[Row]) -> None:
        self.steps[name] = {"name": name, "state": state, "seconds": round(seconds, 1), "rows": rows}
        self.save()

    def document(self) -> dict[str, Any]:
        steps = [self.steps[step.name] for step in STEPS if step.name in self.steps]
        return {"format": FORMAT, "environment": self.environment, "steps": steps}

    def save(self) -> None:
        """Whoever reads, or kills us, finds a whole archive. A disk that is full costs the newest results, not the round."""
        unfinished = self._archive.with_suffix(f".{os.getpid()}")
        try:
            with tarfile.open(unfinished, "w") as tar:
                _add(tar, "round.json", json.dumps(self.document(), indent=1).encode())
                if self.log.exists():
                    _add(tar, "round.log", self.log.read_bytes()[-LOG_BYTES:])
                for table in sorted(self.scratch.glob("tuned/*.json")):
                    _add(tar, f"tuned/{table.name}", table.read_bytes())
            unfinished.replace(self._archive)
        except OSError as error:
            print(f"{self._archive} is not up to date: {error}", file=sys.stderr, flush=True)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def resume(self, file: Path) -> None:
        """Take over what an earlier round found; a step that was cut finds its rows there already, and adds to them.

        Raises:
            Refused: it is no archive of a round, or of another machine.
        """
        earlier, steps, tables = _read_archive(file)
        for key in ("gpu", "mode"):
            mine, other = self.environment[key], earlier.get(key)
            if mine != other:
                raise Refused(f"{file} is a round of {key} {other!r}, and this one is of {mine!r}")
        self.environment["resumed"] = earlier  # that of the steps which are not repeated
        for step in steps:
            self.steps[step["name"]] = step
            if step["state"] == "cut" and step["name"] != "versions":
                lines = "".join(json.dumps(row) + "\n" for row in step["rows"])
                rows_file(self.scratch, step["name"]).write_text(lines, encoding="utf-8")
        (self.scratch / "tuned").mkdir(exist_ok=True)
        for name, content in tables.items():
            (self.scratch / "tuned" / name).write_bytes(content)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), int(time.time())
    tar.addfile(info, io.BytesIO(content))


def _read_archive(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """Environment, steps, and the tuned tables by name."""
    names = {step.name for step in STEPS}
    try:
        with tarfile.open(file) as tar:
            contents = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
        document = json.loads(contents["round.json"])
        if document["format"] != FORMAT:
            raise Refused(f"{file} has format {document['format']}, expected {FORMAT}")
        steps = [step for step in document["steps"] if step["name"] in names]
        whole = all({"state", "seconds"} <= step.keys() and all("id" in row for row in step["rows"]) for step in steps)
        environment = dict(document["environment"])
    except (OSError, EOFError, tarfile.TarError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise Refused(f"{file} is no archive of a round: {type(error).__name__}: {error}") from error
    if not whole:
        raise Refused(f"{file} is no archive of a round: a step or a row of it is not whole")
    tables = {name.removeprefix("tuned/"): content for name, content in contents.items() if name.startswith("tuned/")}
    return environment, steps, {name: content for name, content in tables.items() if re.fullmatch(r"\w+\.json", name)}


def execute(
    arguments: list[str], env: dict[str, str], seconds: float, log: Path, every_second: Callable[[], None] = lambda: None
) -> tuple[int | None, str]:
    """Exit status, None when its time was over, and output, which the log gets as it comes."""
    code, end = None, time.monotonic() + seconds
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(arguments)}\n".encode())
        file.flush()
        start = file.tell()
        child = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
        try:
            while code is None and (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(min(1.0, left))
                every_second()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with what it started: compile workers outlive their parent
            with contextlib.suppress(subprocess.TimeoutExpired):  # inside the driver it may take a while to die
                child.wait(10)
    with log.open("rb") as file:
        file.seek(start)
        return code, file.read().decode(errors="replace")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no step goes on when the round was killed


def take(step: Step, seconds: float, results: Results, mode: str) -> None:
    """Run a step in at most so many seconds, and record what it found, each second too."""
    rows, start, seen = rows_file(results.scratch, step.name), time.monotonic(), -1
    known = rows.read_bytes() if rows.exists() else b""
    rows.with_suffix(".known").write_bytes(known)  # what stays out of this try, whatever comes to the rows meanwhile

    def note() -> None:
        nonlocal seen
        size = rows.stat().st_size if rows.exists() else 0
        if size != seen:
            results.record(step.name, "cut", time.monotonic() - start, read_rows(rows))
            seen = size

    note()
    try:
        env = environment_of(step.name, results.scratch, mode)
        code, output = execute(command(step.name, rows, mode), env, seconds, results.log, note)
    except BaseException:  # the round is being stopped
        results.record(step.name, "cut", time.monotonic() - start, read_rows(rows))
        raise
    found = read_rows(rows)
    state, why = verdict(step.name, code, found, output)
    if why:
        found.append({"id": "exit", "reason" if state == "skipped" else "wrong": why})
    results.record(step.name, state, time.monotonic() - start, found)


def verdict(name: str, code: int | None, rows: list[Row], output: str) -> tuple[str, str]:
    """The state of a step, and what is wrong with it beside its rows. Results that are not there are not right."""
    if name == "memcheck" and "Device not supported" in output:
        return "skipped", "compute-sanitizer does not support this machine"
    if name == "memcheck" and (code == SANITIZER_ERROR or _MEMORY_ERROR.search(output)):
        return "wrong", "compute-sanitizer found errors; they are in round.log"
    if any("wrong" in row for row in rows):
        return "wrong", ""
    if code is None:
        return "cut", ""
    if code not in ((0, NOTHING_SELECTED) if name == "tests" and rows else (0,)):
        lines = output.strip().splitlines() or ["no output"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return "wrong", f"exit status {code}: {(errors or lines)[-1][:200]}"
    return ("ok", "") if rows else ("wrong", "it ended well and left no result")


# The machine.


def gpu() -> tuple[str, str] | None:
    """Name and compute capability, ``90``, of the first GPU; PyTorch need not be imported for it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        name, _, capability = done.stdout.strip().splitlines()[0].rpartition(", ")
        return name, capability.replace(".", "")
    return None


def extension(arch: str, scratch: Path, log: Path, mode: str) -> dict[str, Any]:
    """``vitkernels._C`` with kernels for ``arch``: the one that is there, or else built now, for that alone. A dry run builds
    it without CUDA, outside the tree."""
    start, env = time.monotonic(), environment_of("build", scratch, mode)
    for suffix in EXTENSION_SUFFIXES:
        info = _build_info(ROOT / "vitkernels" / f"_C{suffix}", env)
        if info is not None and (mode != "gpu" or f"sm_{arch}" in info["architectures"]):
            return {"state": "there", **info}
    target = ["--inplace"] if mode == "gpu" else ["--build-lib", str(scratch / "lib")]
    env |= {"VITKERNELS_BUILD_CUDA": "1" if mode == "gpu" else "0", "CUDAARCHS": arch}
    build = [sys.executable, "setup.py", "build_ext", *target, "--build-temp", str(scratch / "build")]
    code, _ = execute(build, env, BUILD_SECONDS, log)
    state = {0: "built", None: "cut"}.get(code, "wrong")
    return {"state": state, "seconds": round(time.monotonic() - start, 1)}


def _build_info(file: Path, env: dict[str, str]) -> dict[str, Any] | None:
    """What a built extension says of itself; None if there is none that loads here."""
    script = (
        "import importlib.util as u, json, sys; s = u.spec_from_file_location('vitkernels._C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(json.dumps(m.build_info()))"
    )
    if not file.exists():
        return None
    done = subprocess.run([sys.executable, "-c", script, str(file)], env=env, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


# The round.


def run_round(archive: Path, budget: float, mode: str, resume: Path | None = None) -> int:
    """All steps; the exit code."""
    end = time.monotonic() + budget
    name, arch = (gpu() if mode == "gpu" else None) or ("none", "90")
    with tempfile.TemporaryDirectory() as folder:
        results = Results(archive, Path(folder), {"mode": mode, "gpu": name})
        if resume is not None:
            results.resume(resume)
        done = {name for name, step in results.steps.items() if step["state"] == "ok" and name != "versions"}
        results.save()
        results.environment["extension"] = extension(arch, results.scratch, results.log, mode)
        print(f"{name}; extension: {results.environment['extension']['state']}", flush=True)
        stop = ""
        for step in STEPS:
            left = end - time.monotonic()
            reason = stop or why_not(step, left, mode)
            if reason and results.steps.get(step.name, {}).get("state", "skipped") == "skipped":
                results.record(step.name, "skipped", 0.0, [{"id": "skipped", "reason": reason}])
            elif not reason and step.name not in done:
                take(step, min(step.seconds, left) if mode != "compile-only" else left, results, mode)
            found = results.steps[step.name]
            if step.name == "versions":
                rows = [row for row in found["rows"] if row["id"] == "environment"]
                results.environment.update(*({k: v for k, v in row.items() if k != "id"} for row in rows))
            if step.name == "operators" and found["state"] == "wrong":
                stop = "an operator is wrong"
            print(line(found, step.name in done), flush=True)
        results.save()
        print("\n".join(["", *ratios(results.document()), f"{archive} has every row."]))
        broken = results.environment["extension"]["state"] in ("wrong", "cut")
        return int(broken or any(step["state"] == "wrong" for step in results.steps.values()))


def why_not(step: Step, left: float, mode: str) -> str:
    """Why a step is not begun; empty if it is."""
    if mode == "compile-only" and step.name not in COMPILES:
        return "it compiles nothing ahead of time"
    if left < LEAST:
        return f"{max(left, 0):.0f} s are left"
    if step.name == "memcheck" and mode == "gpu" and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not here"
    return ""


def line(step: dict[str, Any], before: bool) -> str:
    wrong = [f"{row['id']}: {(row['wrong'].splitlines() or [''])[0]}" for row in step["rows"] if "wrong" in row]
    reasons = [row["reason"] for row in step["rows"] if "reason" in row]
    what = (reasons or [f"{len(step['rows'])} rows" + (", done before" if before else "")])[0]
    more = [f"{'':20}{text[:120]}" for text in wrong[:5]]
    return "\n".join([f"{step['name']:20}{step['state']:8}{step['seconds']:6.1f} s  {what}", *more])


def ratios(document: dict[str, Any]) -> list[str]:
    """Ours against eager, a line each, losses among them; none of a dry run, whose times mean nothing."""
    if document["environment"]["mode"] != "gpu":
        return []
    rows = [row for step in document["steps"] for row in step["rows"] if "ratio_to_eager" in row]
    ours = [row for row in rows if row["path"] != "pytorch"]
    return [f"{row['id']:60} {row['ratio_to_eager']:7.2f} times eager's speed" for row in ours]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where round.tar goes")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of the whole (default: %(default)g)")
    parser.add_argument("--resume", type=Path, metavar="FILE.tar", help="go on with this round")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="the same steps without a GPU, at tiny shapes")
    how.add_argument("--compile-only", action="store_true", help="without a GPU: fill Triton's cache for sm_90")
    args = parser.parse_args(arguments)
    mode = "dry-run" if args.dry_run else "compile-only" if args.compile_only else "gpu"
    if not args.budget > 0:
        parser.error("--budget must be more than 0 seconds")
    if mode == "gpu" and gpu() is None:
        parser.error("nvidia-smi finds no GPU here; --dry-run takes the same steps on the CPU")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # DIR may have any name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        return run_round(args.out.resolve() / "round.tar", args.budget, mode, args.resume)
    except (Refused, OSError) as reason:
        parser.error(str(reason))


if __name__ == "__main__":
    sys.exit(main())
