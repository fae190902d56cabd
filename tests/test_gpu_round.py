"""``benchmarks/gpu_round.py``: a dry run takes every step, and however a round ends, what it had found is in its archive."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import seconds_to_import_torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ["versions", "operators", "host", "kernels", "gemms", "models", "small_and_training", "compiled", "tests", "memcheck"]
STUBBED = ("versions", "kernels", "models", "small_and_training", "compiled")


@pytest.fixture
def gpu_round(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_round

    return gpu_round


def contents(archive):
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def document(archive):
    return json.loads(contents(archive)["round.json"])


def started(scratch, *arguments):
    """A dry run; all that it starts has the folder ``scratch`` in its environment."""
    command = [sys.executable, str(FOLDER / "gpu_round.py"), "--dry-run", *map(str, arguments)]
    env = {**os.environ, "TMPDIR": str(scratch)}

    def interruptible():  # a suite that runs in a shell's background ignores SIGINT, and so would this
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, preexec_fn=interruptible, **pipes)


def running(scratch):
    """Command lines of the processes that a round with this scratch folder has left."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(scratch).encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
    return found


def written(path, **steps):
    """An archive of a dry run; the steps by name: (state, rows)."""
    steps = [{"name": name, "state": state, "seconds": 1.0, "rows": rows} for name, (state, rows) in steps.items()]
    found = {"format": 1, "environment": {"mode": "dry-run", "gpu": "none"}, "steps": steps}
    (path.parent / "round.json").write_text(json.dumps(found))
    with tarfile.open(path, "w") as tar:
        tar.add(path.parent / "round.json", "round.json")
    return path


# The real steps.


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is dry is the GPU")
def test_a_dry_run_takes_every_step_and_leaves_one_archive(tmp_path):
    """It has two minutes on a machine that imports torch in 1.2 s; here, beside another test, twice as long."""
    limit = 200 * seconds_to_import_torch()
    done = started(tmp_path, "--out", tmp_path / "out")
    output, _ = done.communicate(timeout=limit)
    assert done.returncode == 0, output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["round.tar"]
    found = contents(tmp_path / "out" / "round.tar")
    assert sorted(found) == ["round.json", "round.log", "tuned/nvidia_h100_80gb_hbm3.json"]
    assert sum(map(len, found.values())) < 2**20
    whole = json.loads(found["round.json"])
    assert set(whole) == {"format", "environment", "steps"}
    assert whole["environment"]["torch"] == torch.__version__
    assert whole["environment"]["mode"] == "dry-run"
    assert [step["name"] for step in whole["steps"]] == NAMES
    assert all(set(step) == {"name", "state", "seconds", "rows"} for step in whole["steps"])
    assert {step["name"]: step["state"] for step in whole["steps"]} == dict.fromkeys(NAMES, "ok"), output
    rows = {step["name"]: {row["id"]: row for row in step["rows"]} for step in whole["steps"]}
    assert all(len(rows[step["name"]]) == len(step["rows"]) for step in whole["steps"])  # no id twice
    assert rows["operators"].keys() == rows["memcheck"].keys() >= {"layer_norm_fwd", "attention_qkv_bwd", "mlp_fwd"}
    for name in STUBBED:
        assert [row for row in rows[name].values() if row.get("path") == "stub"], name
    assert rows["models"].keys() >= {"model-test-infer-b2 inference-graph", "model-test-infer-b2 plan-triton"}
    assert rows["kernels"].keys() >= {"copy", "gemm", "attention_qkv-test-backward-b2 fused"}
    table = json.loads(found["tuned/nvidia_h100_80gb_hbm3.json"])
    assert {f"linear {key}" for key in table["linear"]} == rows["gemms"].keys()
    assert len(rows["tests"]) == 17
    assert "times eager" not in output  # the times of a dry run mean nothing
    report = [sys.executable, str(FOLDER / "report.py"), str(tmp_path / "out" / "round.tar")]
    tables = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\| test \| infer \| 2 \| bfloat16 \| inference-graph \(stub\) \|", tables)
    assert re.search(r"\| attention_qkv \| test \| backward \| 2 \| bfloat16 \| fused \(stub\) \|", tables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is dry is the GPU")
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes there")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("operators", signal.SIGKILL),  # Python, interpreted
        ("kernels", signal.SIGTERM),  # Python, with the stub driver
        ("gemms", signal.SIGKILL),  # which leaves a table, too
        ("tests", signal.SIGKILL),  # pytest, in several processes
        ("memcheck", signal.SIGINT),
    ],
)
def test_a_round_that_is_killed_in_the_middle_of_a_step_leaves_what_that_had_found(tmp_path, name, how):
    earlier = {other: ("ok", [{"id": "earlier"}]) for other in NAMES if other != name}
    child = started(tmp_path, "--out", tmp_path / "out", "--resume", written(tmp_path / "earlier.tar", **earlier))
    archive, deadline, steps = tmp_path / "out" / "round.tar", time.monotonic() + 120, {}
    while not steps.get(name, {}).get("rows") and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if archive.exists():
            steps = {step["name"]: step for step in document(archive)["steps"]}
    child.send_signal(how)
    output = child.communicate(timeout=60)[0]
    found = {step["name"]: step for step in document(archive)["steps"]}
    assert found[name]["state"] == "cut", output
    assert found[name]["rows"][: len(steps[name]["rows"])] == steps[name]["rows"] != []
    assert all(found[other]["state"] == "ok" for other in NAMES if other != name)
    assert ("tuned/nvidia_h100_80gb_hbm3.json" in contents(archive)) == (name == "gemms")
    assert child.returncode in (-how, 128 + how, 1)
    deadline = time.monotonic() + (
        15 if name == "tests" else 3
    )  # xdist's workers end their test first; the others had 5 s to go
    while (left := running(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left  # nothing of it goes on


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles with the stub driver")
def test_kernels_can_be_compiled_beforehand(tmp_path):
    rows = tmp_path / "rows"
    command = [sys.executable, str(FOLDER / "round_steps.py"), "versions", "--rows", str(rows), "--compile-only"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command, env=env, check=True, timeout=120)
    (kernel,) = (tmp_path / "cache").rglob("_layer_norm_fwd_kernel.json")
    assert json.loads(kernel.read_text())["target"]["arch"] == 90
    assert kernel.with_suffix(".cubin").exists()
    assert [json.loads(line)["id"] for line in rows.read_text().splitlines()][1:] == ["layer_norm-B_16-infer-b256 fused"]


# Scripted steps.


@pytest.fixture
def play(gpu_round, monkeypatch, tmp_path):
    """Play a round whose steps run the given scripts, by name, and the others nothing; exit code and steps by name.

    A script can ``tell(id, ...)``.
    """

    def command(name, rows, mode):
        tell = "def tell(id, **row):\n with ROWS.open('a') as f: f.write(json.dumps({'id': id, **row}) + '\\n')\n"
        head = f"import json, pathlib, time\nROWS = pathlib.Path({str(rows)!r})\n{tell}"
        return [sys.executable, "-c", head + scripts.get(name, "tell('done')")]

    scripts = {}

    def play(budget=60.0, limits=None, resume=None, **by_name):
        scripts.clear()
        scripts.update(by_name)
        if limits:
            monkeypatch.setattr(gpu_round, "STEPS", tuple(gpu_round.Step(n, limits.get(n, 20.0)) for n in by_name))
        monkeypatch.setattr(gpu_round, "command", command)
        monkeypatch.setattr(gpu_round, "extension", lambda *_: {"state": "there"})
        archive = tmp_path / "round.tar"
        code = gpu_round.run_round(archive, budget, "dry-run", resume)
        return code, {step["name"]: step for step in document(archive)["steps"]}

    return play


def test_a_step_over_its_time_is_cut_and_keeps_what_it_had_found(play):
    code, steps = play(limits={"kernels": 1.5}, kernels="tell('a', us=1); time.sleep(60)", models="tell('b')")
    assert code == 0
    assert (steps["kernels"]["state"], steps["kernels"]["rows"]) == ("cut", [{"id": "a", "us": 1}])
    assert steps["models"]["state"] == "ok"


@pytest.mark.parametrize(
    ("script", "row"),
    [
        ("tell('a', wrong='3 is not 4')", {"id": "a", "wrong": "3 is not 4"}),
        ("tell('a'); raise SystemExit(3)", {"id": "exit", "wrong": "exit status 3: no output"}),
        ("import os; tell('a'); os.abort()", {"id": "exit", "wrong": "exit status -6: no output"}),
        ("raise ValueError('no nails')", {"id": "exit", "wrong": "exit status 1: ValueError: no nails"}),
        ("pass", {"id": "exit", "wrong": "it ended well and left no result"}),
    ],
)
def test_what_is_wrong_is_told_and_the_round_goes_on(play, capsys, script, row):
    code, steps = play(limits={"kernels": 20.0}, kernels=script, models="tell('b')")
    assert (code, steps["kernels"]["state"], steps["kernels"]["rows"][-1]) == (1, "wrong", row)
    assert steps["models"]["state"] == "ok"
    assert row["wrong"] in capsys.readouterr().out


def test_a_wrong_row_is_wrong_even_where_time_ran_out(play):
    code, steps = play(limits={"kernels": 1.5}, kernels="tell('a', wrong='nan'); time.sleep(60)")
    assert (code, steps["kernels"]["state"]) == (1, "wrong")


def test_a_wrong_operator_ends_the_round(play):
    code, steps = play(limits={"operators": 20.0}, versions="tell('v')", operators="tell('a', wrong='nan')", host="tell('h')")
    assert (code, steps["versions"]["state"], steps["operators"]["state"]) == (1, "ok", "wrong")
    assert (steps["host"]["state"], steps["host"]["rows"]) == ("skipped", [{"id": "skipped", "reason": "an operator is wrong"}])


def test_time_that_is_short_is_missing_at_the_end(gpu_round, monkeypatch, tmp_path):
    """Every step takes all that it is given, and a clock stands for the minutes."""
    now, given = [0.0], {}

    def take(step, seconds, results, mode):
        given[step.name] = seconds
        now[0] += seconds
        results.record(step.name, "cut", seconds, [])

    def extension(*_):
        now[0] += 7.0
        return {"state": "built"}

    monkeypatch.setattr(gpu_round.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_round, "take", take)
    monkeypatch.setattr(gpu_round, "extension", extension)
    gpu_round.run_round(tmp_path / "round.tar", gpu_round.BUDGET, "dry-run")
    limits = {step.name: step.seconds for step in gpu_round.STEPS}
    assert list(limits) == NAMES
    assert gpu_round.BUDGET == 8 * 60 >= now[0]
    assert {name: given[name] for name in NAMES[:-1]} == {name: limits[name] for name in NAMES[:-1]}
    assert gpu_round.LEAST < given["memcheck"] < limits["memcheck"]


def test_a_step_without_time_is_skipped_with_the_reason(play):
    code, steps = play(budget=1.0, limits={"kernels": 20.0}, kernels="tell('a')")
    assert (code, steps["kernels"]["state"], steps["kernels"]["rows"][0]["reason"]) == (0, "skipped", "1 s are left")


def test_a_resumed_round_repeats_what_was_wrong_and_goes_on_where_it_was_cut(play, tmp_path):
    earlier = {
        "versions": ("ok", [{"id": "environment", "torch": "8.8"}]),
        "host": ("wrong", [{"id": "h", "wrong": "nan"}]),
        "kernels": ("cut", [{"id": "a"}]),
        "models": ("skipped", [{"id": "skipped", "reason": "0 s are left"}]),
        "compiled": ("ok", [{"id": "c"}]),
    }
    file = written(tmp_path / "earlier.tar", **earlier)
    known = "known = {json.loads(line)['id'] for line in ROWS.read_text().splitlines()}; "
    go_on = known + "[tell(id) for id in 'ab' if id not in known]"
    scripts = {"versions": "tell('environment', torch='9.9')", "host": "tell('h')", "kernels": go_on, "models": "tell('m')"}
    code, steps = play(limits={"versions": 20.0}, resume=file, compiled="raise SystemExit(1)", **scripts)
    assert (code, {step["state"] for step in steps.values()}) == (0, {"ok"})
    rows = {name: [row["id"] for row in step["rows"]] for name, step in steps.items()}
    assert rows == {"versions": ["environment"], "host": ["h"], "kernels": ["a", "b"], "models": ["m"], "compiled": ["c"]}
    environment = document(tmp_path / "round.tar")["environment"]
    assert environment["torch"] == "9.9"  # of this machine: its versions are always asked for
    assert environment["resumed"] == {"mode": "dry-run", "gpu": "none"}


def test_what_a_resumed_round_does_not_come_to_stands(play, tmp_path):
    earlier = {"kernels": ("cut", [{"id": "a"}]), "models": ("wrong", [{"id": "m", "wrong": "nan"}])}
    file = written(tmp_path / "earlier.tar", **earlier)
    code, steps = play(budget=1.0, limits={"kernels": 20.0}, resume=file, kernels="", models="", compiled="")
    assert code == 1
    assert {name: step["state"] for name, step in steps.items()} == {"kernels": "cut", "models": "wrong", "compiled": "skipped"}
    assert steps["kernels"]["rows"] == [{"id": "a"}]


def test_a_resumed_round_that_is_stopped_at_once_has_lost_nothing(gpu_round, monkeypatch, tmp_path):
    def stopped(*_):
        raise SystemExit(143)

    monkeypatch.setattr(gpu_round, "extension", stopped)
    file = written(tmp_path / "earlier.tar", kernels=("cut", [{"id": "a"}]), models=("ok", [{"id": "m"}]))
    with pytest.raises(SystemExit):
        gpu_round.run_round(tmp_path / "round.tar", 60.0, "dry-run", file)
    assert document(tmp_path / "round.tar")["steps"] == document(file)["steps"]


def test_a_tuned_table_goes_along(gpu_round, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "gpu.json").write_text("{}")
    environment = {"mode": "dry-run", "gpu": "none"}
    gpu_round.Results(tmp_path / "a.tar", tmp_path, environment).save()
    (tmp_path / "next").mkdir()
    gpu_round.Results(tmp_path / "b.tar", tmp_path / "next", environment).resume(tmp_path / "a.tar")
    assert (tmp_path / "next" / "tuned" / "gpu.json").read_text() == "{}"


def test_a_round_of_another_machine_or_another_file_is_refused(gpu_round, tmp_path):
    found = gpu_round.Results(tmp_path / "a.tar", tmp_path, {"mode": "gpu", "gpu": "NVIDIA H200"})
    with pytest.raises(gpu_round.Refused, match="is a round of gpu 'none', and this one is of 'NVIDIA H200'"):
        found.resume(written(tmp_path / "earlier.tar"))
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(gpu_round.Refused, match="is no archive of a round"):
        found.resume(tmp_path / "text")
    with pytest.raises(gpu_round.Refused, match="is no archive of a round"):
        found.resume(tmp_path / "missing.tar")
    for content in (
        "[]",
        "{}",
        '{"format": 1, "steps": [], "environment": 3}',
        '{"format": 2}',
        '{"format": 1, "steps": [{"name": "host"}]}',
    ):
        (tmp_path / "round.json").write_text(content)
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            tar.add(tmp_path / "round.json", "round.json")
        with pytest.raises(gpu_round.Refused, match=r"is no archive of a round|has format 2, expected 1"):
            found.resume(tmp_path / "bad.tar")


def test_nothing_of_an_archive_is_written_elsewhere(gpu_round, tmp_path):
    (tmp_path / "evil").write_text("evil")
    file = written(tmp_path / "earlier.tar", **{"../../evil": ("cut", [{"id": "a"}])})
    with tarfile.open(file, "a") as tar:
        tar.add(tmp_path / "evil", "tuned/../../evil.json")
    scratch = tmp_path / "a" / "scratch"
    scratch.mkdir(parents=True)
    gpu_round.Results(tmp_path / "b.tar", scratch, {"mode": "dry-run", "gpu": "none"}).resume(file)
    assert not list(tmp_path.rglob("evil.json*"))


@pytest.mark.parametrize(
    ("code", "output", "state"),
    [
        (99, "", "wrong"),
        (None, "========= Invalid __global__ read of size 2 bytes", "wrong"),
        (1, "========= ERROR SUMMARY: 2 errors", "wrong"),
        (None, "========= COMPUTE-SANITIZER", "cut"),
        (1, '========= Error: Device not supported. Please refer to the "Supported Devices" section', "skipped"),
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
    ],
)
def test_what_the_sanitizer_found_makes_a_round_wrong(gpu_round, code, output, state):
    assert gpu_round.verdict("memcheck", code, [{"id": "a"}], output)[0] == state


def test_commands_on_a_gpu(gpu_round, tmp_path):
    memcheck = gpu_round.command("memcheck", tmp_path / "rows", "gpu")
    assert memcheck[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert memcheck[memcheck.index(sys.executable) + 2] == "operators"
    tests = gpu_round.command("tests", tmp_path / "rows", "gpu")
    assert tests[-2:] == ["-m", "gpu and not slow"]
    assert "round_pytest" in tests
    assert gpu_round.command("models", tmp_path / "rows", "gpu")[-1] == str(tmp_path / "rows")


def test_the_gpu_is_what_its_driver_says(gpu_round, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\necho 'NVIDIA H200, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_round.gpu() == ("NVIDIA H100 80GB HBM3", "90")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_round.gpu() is None


def test_the_extension_is_built_for_the_gpu_that_is_there(gpu_round, monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(gpu_round, "execute", lambda arguments, env, *_: built.append((arguments, env)) or (0, ""))
    for architectures, state in ((["sm_80", "sm_90"], "there"), (["sm_80"], "built"), ([], "built")):
        monkeypatch.setattr(gpu_round, "_build_info", lambda *_, found=architectures: {"architectures": found})
        assert gpu_round.extension("90", tmp_path, tmp_path / "log", "gpu")["state"] == state
    assert [(env["VITKERNELS_BUILD_CUDA"], env["CUDAARCHS"]) for _, env in built] == [("1", "90")] * 2
    monkeypatch.setattr(gpu_round, "execute", lambda *_: (1, ""))
    assert gpu_round.extension("90", tmp_path, tmp_path / "log", "gpu")["state"] == "wrong"


def test_the_log_is_bounded(gpu_round, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_round, "LOG_BYTES", 100)
    (tmp_path / "round.log").write_text("a" * 1000 + "end")
    gpu_round.Results(tmp_path / "a.tar", tmp_path, {}).save()
    assert contents(tmp_path / "a.tar")["round.log"].decode() == "a" * 97 + "end"


def test_a_disk_that_is_full_does_not_end_a_round(gpu_round, monkeypatch, tmp_path, capsys):
    results = gpu_round.Results(tmp_path / "a.tar", tmp_path, {})
    results.record("kernels", "ok", 1.0, [{"id": "a"}])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_round, "_add", full)
        results.record("models", "ok", 1.0, [{"id": "m"}])
    assert "No space left on device" in capsys.readouterr().err
    assert [step["name"] for step in document(tmp_path / "a.tar")["steps"]] == ["kernels"]
    results.save()
    assert [step["name"] for step in document(tmp_path / "a.tar")["steps"]] == ["kernels", "models"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_a_round_that_is_stopped_while_it_writes_loses_no_row(gpu_round, monkeypatch, tmp_path):
    results, add, stop = gpu_round.Results(tmp_path / "a.tar", tmp_path, {}), gpu_round._add, []

    def execute(arguments, env, seconds, log, note):
        gpu_round.rows_file(tmp_path, "kernels").write_text('{"id": "a"}\n')
        stop.append(SystemExit(143))
        note()

    def stopped(*arguments):
        if stop:
            raise stop.pop()
        add(*arguments)

    monkeypatch.setattr(gpu_round, "execute", execute)
    monkeypatch.setattr(gpu_round, "_add", stopped)
    with pytest.raises(SystemExit):
        gpu_round.take(gpu_round.Step("kernels", 9.0), 9.0, results, "dry-run")
    assert document(tmp_path / "a.tar")["steps"][0]["rows"] == [{"id": "a"}]
    assert not list(tmp_path.glob("a.[0-9]*"))


def test_losses_are_in_the_table(gpu_round):
    rows = [
        {"id": f"a {name}", "path": path, "ratio_to_eager": ratio}
        for name, path, ratio in (("fused", "kernel", 0.9), ("eager", "pytorch", 1.0), ("sdpa-math", "pytorch", 0.1))
    ]
    found = {"environment": {"mode": "gpu"}, "steps": [{"rows": rows}]}
    assert [re.sub(r"\s+", " ", text) for text in gpu_round.ratios(found)] == ["a fused 0.90 times eager's speed"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--budget", "0"], ["--out", "x", "--what"], ["--out", "/dev/null/x", "--dry-run"]],
)
def test_bad_arguments(gpu_round, arguments):
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main(arguments)


def test_no_gpu(gpu_round, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main(["--out", str(tmp_path / "out")])
    assert "--dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_may_have_a_name_that_standard_output_cannot_encode(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = started(tmp_path, "--out", tmp_path / "f\udcfcnf", "--budget", 0.001)  # "fünf" in Latin-1; no step is begun
    output, _ = done.communicate(timeout=240)
    assert done.returncode == 0, output
    assert f"{tmp_path}/f\\udcfcnf/round.tar has every row." in output


def test_imports_nothing_but_python():
    code = "import sys; sys.modules.update(dict.fromkeys(('timm', 'torch', 'vitkernels'))); import gpu_round"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(FOLDER)}, check=True, timeout=60)


# What a step tells.


@pytest.fixture
def round_steps(gpu_round):
    import round_steps

    return round_steps


def test_only_ours_can_be_wrong(round_steps, monkeypatch, tmp_path):
    import protocol

    found = {
        "eager": protocol.Outcome(row={"us": 2.0}),
        "sdpa-cudnn": protocol.Outcome(failure="sdpa-cudnn does not run: RuntimeError"),
        "sdpa-flash": protocol.Outcome(unavailable="needs another shape"),
        "fused": protocol.Outcome(failure="fused is wrong at this shape"),
        "inference-graph": protocol.Outcome(failure="inference-graph does not run"),
    }
    monkeypatch.setattr(protocol, "measure", lambda names, *_, **__: {name: found[name] for name in names})
    case = SimpleNamespace(subject="model", workload=SimpleNamespace(name="S/16"), batch=1, mode="infer")
    module = SimpleNamespace(contest=lambda *_: SimpleNamespace(build=None), DTYPE=lambda device: "bfloat16")
    context = round_steps.Context(tmp_path / "rows", "dry-run")
    context.contest(module, case, list(found), beside="x")
    rows = {row["id"].split(" ")[-3]: row for row in round_steps.read_rows(tmp_path / "rows")}
    assert [name for name, row in rows.items() if "wrong" in row] == ["fused", "inference-graph"]
    assert [name for name, row in rows.items() if "unavailable" in row] == ["sdpa-cudnn", "sdpa-flash"]
    assert rows["eager"]["us"] == 2.0
    assert rows["eager"]["dtype"] == "bfloat16"


def test_a_case_without_eager_does_not_end_the_step(round_steps, tmp_path):
    def build(name):
        raise MemoryError("80 GB")

    module = SimpleNamespace(contest=lambda *_: SimpleNamespace(build=build))
    case = SimpleNamespace(subject="model", batch=1)
    round_steps.Context(tmp_path / "rows", "dry-run").contest(module, case, ["eager", "fused"])
    (row,) = round_steps.read_rows(tmp_path / "rows")
    assert row["id"].endswith(" eager")
    assert "80 GB" in row["wrong"]  # what is lost is not right


def test_a_case_that_is_known_is_not_measured_again(round_steps, tmp_path):
    (tmp_path / "rows").write_text('{"id": "case eager"}\n{"id": "case fused"}\n')
    context = round_steps.Context(tmp_path / "rows", "dry-run")
    context.contest(None, "case", ["eager", "fused"])  # would need a module
    assert context.knows("case eager", "case fused")
    assert not context.knows("case eager", "case compile")


# The plugin of step tests.


def test_tests_are_taken_in_turns_those_of_operators_first_and_told_one_by_one(tmp_path):
    for name, count in (("test_cli", 2), ("test_linear", 2), ("test_mlp", 3)):
        lines = [f"def test_{i}(): assert {i} < 2" for i in range(count)]
        (tmp_path / f"{name}.py").write_text("\n".join(lines))
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "rows.known").write_text(json.dumps({"id": "test_linear.py::test_0"}) + "\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(FOLDER), "VITKERNELS_ROUND_ROWS": str(rows)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "round_pytest", "-c", os.devnull]
    done = subprocess.run([*command, "--rootdir", str(tmp_path), str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    linear, mlp, cli = ([f"{name}.py::test_{i}" for i in range(3)] for name in ("test_linear", "test_mlp", "test_cli"))
    assert [row["id"] for row in found] == [linear[1], *mlp, *cli[:2]]  # test 0 of linear was known
    assert [row["id"] for row in found if "wrong" in row] == [mlp[2]]


def test_a_test_that_takes_its_process_along_does_not_end_the_others(tmp_path):
    """xdist starts another worker, which has to collect the very tests of the first."""
    lines = [f"def test_{i}(): " + ("__import__('os')._exit(1)" if i in (2, 5) else "pass") for i in range(10)]
    (tmp_path / "test_mlp.py").write_text("\n".join(lines))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(FOLDER), "VITKERNELS_ROUND_ROWS": str(tmp_path / "rows.jsonl")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-p",
        "round_pytest",
        "-c",
        os.devnull,
    ]
    done = subprocess.run([*command, "--rootdir", str(tmp_path), str(tmp_path)], env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows if "wrong" in row} == {"test_mlp.py::test_2", "test_mlp.py::test_5"}, done.stdout
    assert len({row["id"] for row in rows}) == 10
