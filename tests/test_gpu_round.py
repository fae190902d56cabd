"""``benchmarks/gpu_round.py``: a dry run takes every step, and what goes wrong in one is told and does not end the round."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_round.py"
STEPS = ["build", "environment", "tests", "sanitizer", "tune", "kernels", "models", "compiled", "sweeps"]


@pytest.fixture
def gpu_round(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_round

    return gpu_round


@pytest.fixture
def play(gpu_round, monkeypatch, tmp_path):
    """Play a round of scripted steps; its exit code, and what the summary says of each."""

    def play(*scripts, budget=60.0, force=False, name="tests", seconds=20.0, least=5.0, **more):
        commands = tuple((sys.executable, "-c", script) for script in scripts)

        def steps(dry, scratch):
            def read(folder):
                return gpu_round._json(folder / "result.json")

            return [gpu_round.Step(name, commands, seconds, least, env={"SCRATCH": str(scratch)}, read=read, **more)]

        monkeypatch.setattr(gpu_round, "steps", steps)
        code = gpu_round.run_round(tmp_path, budget, force, dry=True)
        return code, json.loads((tmp_path / "summary.json").read_text())["steps"][0]

    return play


def test_a_dry_run_takes_every_step(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    log = (tmp_path / "round.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [step["name"] for step in found["steps"]] == STEPS
    assert {step["name"]: step["status"] for step in found["steps"]} == dict.fromkeys(STEPS, "ok"), log
    assert {(row["subject"], row["provider"]) for row in found["rows"]} >= {("layer_norm", "fused"), ("model", "fused")}
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert found["ceilings"]["gemm_bf16_tflops"] > 0
    assert json.loads((tmp_path / "tests.json").read_text())["passed"] == 4
    assert re.search(r"^tests +ok .* 4 passed", done.stdout, re.MULTILINE)
    files = list(tmp_path.iterdir())
    assert len(files) <= len(STEPS) + 1
    assert sum(file.stat().st_size for file in files) < 2**20
    assert all(re.fullmatch(r"[\w.-]+", file.name) and file.stat().st_size < 16 * 2**20 for file in files)


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--budget", "0"], ["--out", "x", "--what"]])
def test_bad_arguments(gpu_round, arguments):
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(gpu_round, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main(["--out", str(tmp_path / "out")])
    assert "--dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_imports_nothing_but_python():
    code = "import sys; sys.modules.update(dict.fromkeys(('timm', 'torch', 'vitkernels'))); import gpu_round"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, check=True, timeout=60)


def test_what_is_done_is_not_repeated(play, tmp_path):
    count = "import os; open({!r}, 'a').write('x')".format(str(tmp_path / "count"))
    assert play(count)[1]["status"] == "ok"
    assert play(count)[1]["reason"] == "done before"
    assert (tmp_path / "count").read_text() == "x"
    play(count, force=True)
    assert (tmp_path / "count").read_text() == "xx"


def test_what_failed_is_repeated(play):
    code, step = play("raise SystemExit('no nails')", name="models")
    assert (code, step["status"], step["reason"], step["ok"]) == (0, "failed", "no nails", False)
    assert play("", name="models")[1]["status"] == "ok"


@pytest.mark.parametrize("in_background", [False, True])  # where shells have Ctrl-C ignored
def test_a_step_over_its_time_is_interrupted_and_keeps_what_it_has(play, tmp_path, in_background):
    script = """
import os, pathlib, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(os.environ["SCRATCH"], "result.json").write_text('{"benchmarks": [], "kept": 1}')
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        code, step = play(script, "print('never')", name="kernels", seconds=2.0, least=1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, step["status"], step["ok"]) == (0, "timeout", False)
    assert json.loads((tmp_path / "kernels.json").read_text())["kept"] == 1
    assert "never" not in (tmp_path / "round.log").read_text()  # its time is over, so the next command is not begun


def test_a_step_that_does_not_fit_is_skipped(play):
    code, step = play("", budget=1.0)
    assert (code, step["status"], step["reason"]) == (0, "skipped", "0 s are left to it")


def test_the_default_round_ends_within_nine_minutes_and_every_step_gets_its_least(gpu_round, monkeypatch, tmp_path):
    """Every step takes all that it is given, a clock stands for the hours, and the extension is missing."""
    now, given = [0.0], {}

    def take(step, dry, left, scratch, log):
        given[step.name] = min(left, step.seconds)
        assert given[step.name] >= step.least
        now[0] += given[step.name] + gpu_round.GRACE  # interrupted, and slow to write
        return gpu_round._record(step, "ok", "")

    monkeypatch.setattr(gpu_round.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_round, "take", take)
    monkeypatch.setattr(gpu_round, "absent", lambda step: [])
    monkeypatch.setattr(gpu_round, "_is_done", lambda *_: False)
    gpu_round.run_round(tmp_path, gpu_round.BUDGET, False, dry=False)
    assert list(given) == STEPS
    assert now[0] <= gpu_round.BUDGET
    assert gpu_round.BUDGET < 9 * 60
    assert any(given[step.name] < step.seconds for step in gpu_round.steps(False, tmp_path))


def test_the_least_of_a_later_step_is_kept_for_it(gpu_round, monkeypatch, tmp_path):
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(gpu_round, "GRACE", 1.0)
    monkeypatch.setattr(
        gpu_round,
        "steps",
        lambda dry, scratch: [
            gpu_round.Step("kernels", (sleep,), 60, 1),
            gpu_round.Step("absent", (sleep,), 60, 50, ("no-such-tool",)),  # nothing is kept for what cannot run
            gpu_round.Step("models", ((sys.executable, "-c", ""),), 60, 6),
        ],
    )
    assert gpu_round.run_round(tmp_path, 12.0, False, dry=True) == 0
    first, _, last = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert first["status"] == "timeout"
    assert 1 < first["seconds"] < 8
    assert last["status"] == "ok"


def test_an_interrupted_step_adds_to_what_it_had_measured(play, tmp_path):
    script = """
import json, os, pathlib, time
rows = [{{"fullname": name, "extra_info": {{}}}} for name in {names!r}]
pathlib.Path(os.environ["SCRATCH"], "result.json").write_text(json.dumps({{"benchmarks": rows}}))
time.sleep({seconds})
"""
    play(script.format(names=["a", "b"], seconds=60), name="models", seconds=2.0, least=1.0)
    assert play(script.format(names=["b", "c"], seconds=0), name="models")[1]["status"] == "ok"
    rows = json.loads((tmp_path / "models.json").read_text())["benchmarks"]
    assert [row["fullname"] for row in rows] == ["a", "b", "c"]


def test_ctrl_c_leaves_the_benchmarks_that_pytest_had_measured(gpu_round, tmp_path):
    """What a time limit sends to pytest-benchmark: the file is written, with the case that was done."""
    (tmp_path / "bench_two.py").write_text(
        "import os, signal, time\n"
        "def test_first(benchmark): benchmark(lambda: 0)\n"
        "def test_second(): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    file = tmp_path / "two.json"
    command = (*gpu_round.PYTEST, str(tmp_path / "bench_two.py"), "-c", "/dev/null", f"--benchmark-json={file}")
    env = gpu_round.environment_of(gpu_round.Step("models", (), 1, 1), dry=True)
    code, _ = gpu_round.execute(command, env, 120.0, tmp_path / "round.log")
    assert code == 2
    assert [row["name"] for row in json.loads(file.read_text())["benchmarks"]] == ["test_first"]


def test_the_tuned_table_of_a_round_lies_in_its_folder(play, tmp_path):
    code, step = play("import os; print(os.environ['VITKERNELS_CACHE']); exit(3)", name="tune")
    assert (code, step["reason"]) == (0, str(tmp_path))


def test_a_wrong_candidate_of_tuning_fails_the_round(play):
    code, step = play("print('vitkernels: error: linear fc1: pointer 64x64x32 is wrong: error nan'); exit(1)", name="tune")
    assert (code, step["wrong"]) == (1, True)


def test_a_skip_does_not_hide_an_earlier_failure(play, tmp_path):
    assert play("raise SystemExit(1)")[0] == 1
    before = (tmp_path / "tests.json").read_text()
    code, step = play("", budget=1.0)
    assert (code, step["status"], step["reason"]) == (1, "failed", "earlier; now skipped: 0 s are left to it")
    assert (tmp_path / "tests.json").read_text() == before


def test_a_dry_run_does_not_stand_for_a_round_on_a_gpu(play, tmp_path):
    play("")
    file = tmp_path / "tests.json"
    file.write_text(file.read_text().replace('"dry_run": true', '"dry_run": false'))
    assert play("raise SystemExit(1)")[0] == 1


def test_a_missing_tool_is_a_reason(play):
    code, step = play("", needs=("no-such-tool",))
    assert (code, step["status"], step["reason"]) == (0, "skipped", "not here: no-such-tool")


@pytest.mark.parametrize(
    ("name", "script", "code"),
    [
        ("tests", "raise SystemExit(1)", 1),
        ("tests", "import os; os.abort()", 1),
        ("tests", "raise SystemExit(5)", 1),  # nothing was selected: no pass
        ("sanitizer", "raise SystemExit(99)", 1),
        ("sanitizer", "print('========= ERROR SUMMARY: 2 errors'); raise SystemExit(1)", 1),
        ("sanitizer", "print('RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)')", 1),
        ("sanitizer", "print('RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)')", 0),
        ("sanitizer", "print('========= ERROR SUMMARY: 0 errors'); raise SystemExit(1)", 0),
        ("kernels", "print('FAILED - Failed: fused is wrong at this shape: output 0'); raise SystemExit(1)", 1),
        ("kernels", "print('FAILED - Failed: compile is wrong at this shape: output 0'); raise SystemExit(1)", 0),
        ("sweeps", "raise SystemExit(1)", 1),
        ("sweeps", "raise SystemExit(5)", 0),  # no slow test needs a GPU
        ("build", "raise SystemExit(1)", 0),
    ],
)
def test_the_exit_code_says_whether_correctness_failed(play, gpu_round, monkeypatch, name, script, code):
    monkeypatch.setattr(gpu_round, "_is_done", lambda *_: False)
    assert play(script, name=name)[0] == code


def test_the_log_is_bounded(play, tmp_path, gpu_round):
    play("print('a' * 10**6); print('end')", name="models")
    log = (tmp_path / "round.log").read_text()
    assert len(log) < gpu_round.OUTPUT_BYTES + 1000
    assert log.endswith("end\n")


def test_losses_are_in_the_table(gpu_round):
    row = {"subject": "layer_norm", "workload": "B/16", "mode": "infer", "batch": 1, "path": "kernel", "ms": 0.1}
    rows = [{**row, "provider": "fused", "ratio_to_eager": 0.9}, {**row, "provider": "eager", "ratio_to_eager": 1.0}]
    found = gpu_round.summary([{"step": {"name": "kernels"}, "benchmarks": [{"extra_info": r} for r in rows]}])
    assert [r["provider"] for r in found["rows"]] == ["fused", "eager"]
    assert gpu_round.table({**found, "steps": []}).endswith("0.90  slower")
