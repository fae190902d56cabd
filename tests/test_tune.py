"""``vitkernels tune``: what is written, when, and what never is. A fake clock stands for the GPU's, kernels are interpreted."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vitkernels.cli import _tuning, main, tune
from vitkernels.cli._workloads import WORKLOADS
from vitkernels.kernels import _tuned
from vitkernels.kernels._device import gpu_name
from vitkernels.kernels._tuning import Case, Problem

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("large", "small")
H100 = gpu_name(-1, "sm_90")  # which stands for its architecture
TABLE = "nvidia_h100_80gb_hbm3.json"
MAKERS = tune._makers
ENTRIES = {
    "cublas": {"plan": "cublas"},
    "block 64": {"plan": "triton", "block": 64},
    "block 128": {"plan": "triton", "block": 128},
}


def toy(**candidates):
    """``cases`` of a stem whose result is the square of a vector; candidates are functions of it, by name."""
    entries = {**ENTRIES, **{name: {"plan": "triton", "block": name} for name in candidates}}

    def problem(key, device):
        x = torch.randn(1000)

        def run():
            entry = _tuned.lookup(H100, "toy", key)
            return candidates.get(entry.get("block"), torch.square)(x)

        return Problem(run, lambda: x * x, lambda: x.double() * x.double())

    def cases(shape, batch, arch, dtype):
        for key in KEYS:
            rows = batch * (10 if key == "large" else 1)
            full = f"{key}/{_tuned.bucket(rows)}"
            yield Case("toy", full, key, key, rows, entries, functools.partial(problem, full))

    return cases


class Clock:
    """Says how long each candidate takes, by the entry that its launcher finds; 1 ms for those that nobody spoke of."""

    def __init__(self, monkeypatch, milliseconds):
        self.milliseconds, self.calls, self.interrupt_at = milliseconds, 0, None
        self.block, self.blocks, lookup = "cublas", {}, _tuned.lookup

        def noting(*key):
            entry = lookup(*key)
            config = (entry or {}).get("config", entry) or {}
            self.block = str(config.get("block", config.get("block_n", "cublas")))
            return entry

        monkeypatch.setattr(_tuned, "lookup", noting)

    def __call__(self, step):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        if step not in self.blocks:
            step()
            self.blocks[step] = self.block
        return self.milliseconds.get(self.blocks[step], 1.0) / 1000


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A GPU that is the CPU, this user's folder, and a clock: candidates of 64 are faster than cuBLAS."""
    clock = Clock(monkeypatch, {"64": 0.5})
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_gpu", lambda text: (torch.device("cpu"), "sm_90"))
    monkeypatch.setattr(_tuning, "_sampler", lambda device: clock)
    monkeypatch.setattr(tune, "_makers", lambda: {"toy": toy()})
    monkeypatch.setattr(tune, "WORKLOADS", WORKLOADS[:1])
    _tuned.forget()
    yield clock
    _tuned.forget()


def tuned(capsys, *arguments, code=0):
    """The document of a run."""
    assert main(["tune", "--batch-sizes", "100", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def table(path):
    return json.loads((path / "tuned" / TABLE).read_text())


# Where there is nothing to measure on.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--json"], ["vit_base_patch16_224"], ["--device", "cpu"]])
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(capsys, arguments):
    assert main(["tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "tune measures on an NVIDIA GPU, and there is none here" in err


# What is written.


def test_the_faster_candidate_is_written_and_found_by_the_launcher(clock, capsys, tmp_path):
    document = tuned(capsys)
    assert [(row["key"], row["chosen"]) for row in document["rows"]] == [("large/1024", "block 64"), ("small/128", "block 64")]
    assert (document["kept"], document["left"]) == (0, 0)
    assert document["table"] == str(tmp_path / "tuned" / TABLE)
    entry = _tuned.lookup(H100, "toy", "large/1024")
    assert entry["plan"] == "triton"
    assert entry["block"] == 64
    assert entry == table(tmp_path)["toy"]["large/1024"]
    measured = entry["measured"]
    assert (measured["rows"], measured["us"], measured["baseline_us"]) == (1000, 500.0, 1000.0)
    assert measured["torch"] == torch.__version__
    assert _tuned.lookup(H100, "toy", "large/2048") is None
    assert _tuned.lookup(gpu_name(-1, "sm_80"), "toy", "large/1024") is None


def test_where_nothing_is_faster_the_table_says_cublas_and_by_how_much(clock, capsys, tmp_path):
    clock.milliseconds = {"64": 1.25, "128": 1.5}
    document = tuned(capsys)
    entry = table(tmp_path)["toy"]["large/1024"]
    assert entry["plan"] == "cublas"
    assert (entry["measured"]["us"], entry["measured"]["fastest_other_us"]) == (1000.0, 1250.0)
    assert document["rows"][0]["ratio"] == pytest.approx(0.8)


@pytest.mark.parametrize(("won", "chosen"), [(20, "fast"), (18, "fast"), (17, "cublas"), (0, "cublas")])
def test_a_candidate_must_win_nine_rounds_in_ten(won, chosen):
    times = {"cublas": [1.0] * 20, "fast": [0.5] * won + [1.5] * (20 - won)}
    assert _tuning.decide(times, "cublas") == (chosen, "fast")
    assert _tuning.decide({"cublas": [1.0]}, "cublas") == ("cublas", None)


def test_rounds_are_interleaved(clock, capsys):
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in ENTRIES}
    times = _tuning._times(steps, lambda step: step() or 1.0)
    assert {len(seconds) for seconds in times.values()} == {_tuning.ROUNDS}
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # after one call of each that counts for nothing
    assert all(sorted(names) == sorted(ENTRIES) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "the order rotates"


def test_output_names_another_table_and_the_users_comes_first(clock, capsys, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(_tuned, "_SHIPPED", shipped)
    tuned(capsys, "--output", str(shipped / TABLE))
    assert not (tmp_path / "tuned").exists()
    assert _tuned.lookup(H100, "toy", "large/1024")["block"] == 64
    clock.milliseconds = {"128": 0.25}
    tuned(capsys)
    assert _tuned.lookup(H100, "toy", "large/1024")["block"] == 128
    assert json.loads((shipped / TABLE).read_text())["toy"]["large/1024"]["block"] == 64


@pytest.mark.parametrize(("arguments", "dtype"), [([], "bfloat16"), (["--dtype", "float16"], "float16")])
def test_the_dtype_goes_down_to_the_cases_and_is_told(clock, capsys, monkeypatch, arguments, dtype):
    seen, cases = [], toy()
    monkeypatch.setattr(tune, "_makers", lambda: {"toy": lambda *args: seen.append(args[2:]) or cases(*args)})
    environment = tuned(capsys, *arguments)["environment"]
    assert set(seen) == {("sm_90", getattr(torch, dtype))}
    assert (environment["gpu"], environment["dtype"]) == (H100, dtype)
    assert main(["tune", "--batch-sizes", "100", "--force", *arguments]) == 0
    assert f"tuned on {H100}, {dtype}" in capsys.readouterr().out


def test_a_table_of_format_1_stays_as_it_is(clock, capsys, tmp_path, caplog):
    old = json.dumps({"format": 1, "toy": {"large/1024": {"plan": "cublas"}}})
    (tmp_path / "tuned").mkdir()
    for name in (TABLE, "sm_90.json"):
        (tmp_path / "tuned" / name).write_text(old)
    assert main(["tune", "--batch-sizes", "100"]) == 2
    assert f"{TABLE} exists and is no table of format 2: move it away" in capsys.readouterr().err
    assert clock.calls == 0
    (tmp_path / "tuned" / TABLE).rename(tmp_path / "away.json")
    document = tuned(capsys)
    assert [row["chosen"] for row in document["rows"]] == ["block 64"] * 2
    assert table(tmp_path)["format"] == 2
    assert (tmp_path / "tuned" / "sm_90.json").read_text() == (tmp_path / "away.json").read_text() == old


# For others: one case after the other.


def toy_cases():
    return list(toy()(None, 100, "sm_90", torch.bfloat16))


def test_each_row_is_in_the_table_when_it_comes_and_who_stops_keeps_it(clock, tmp_path):
    path = tmp_path / "tuned" / TABLE
    results = _tuning.measure(toy_cases(), torch.device("cpu"), "sm_90", path)
    assert not path.exists()
    first = next(results)
    assert not torch.is_inference_mode_enabled()
    assert (first.case.key, first.row["chosen"], first.errors) == ("large/1024", "block 64", ())
    assert list(table(tmp_path)["toy"]) == ["large/1024"]
    assert table(tmp_path)["toy"]["large/1024"] == first.row["entry"]
    results.close()
    assert list(table(tmp_path)["toy"]) == ["large/1024"]


def test_what_is_wrong_comes_with_its_case(clock, tmp_path):
    cases = list(toy(wrong=lambda x: x * x * 1.001)(None, 100, "sm_90", torch.bfloat16))
    cases[1] = dataclasses.replace(cases[1], entries={"broken": {"plan": "triton", "block": "wrong"}})
    first, second = _tuning.measure(cases, torch.device("cpu"), "sm_90", tmp_path / "tuned" / TABLE)
    assert first.row["chosen"] == "block 64"
    assert [error.partition(": relative")[0] for error in first.errors] == ["toy large: wrong is wrong"]
    assert second.row is None
    assert second.errors[0].startswith("toy small: broken, which runs without an entry, fails")


def test_after_the_deadline_nothing_is_measured(clock, tmp_path):
    past = _tuning.time.monotonic() - 1
    assert list(_tuning.measure(toy_cases(), torch.device("cpu"), "sm_90", tmp_path / TABLE, past)) == []
    assert list(_tuning.measure([], torch.device("cpu"), "sm_90", tmp_path / TABLE, compile_all=True)) == []
    assert (clock.calls, (tmp_path / TABLE).exists()) == (0, False)


class Gpu:
    """A CPU that says it is a GPU: what is measured there is compiled before."""

    type = "cuda"


@pytest.mark.parametrize("compile_all", [False, True])
def test_candidates_are_compiled_before_their_kind_or_all_at_once(clock, tmp_path, monkeypatch, compile_all):
    made, order = tune.b16_gemms("sm_90", torch.bfloat16), []
    monkeypatch.setattr(_tuning, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_tuning, "_compile", lambda cases, *_: order.append([case.title for case in cases]))
    monkeypatch.setattr(_tuning, "_measured", lambda case, *_: order.append(case.title))
    list(_tuning.measure(made, Gpu(), "sm_90", tmp_path / TABLE, compile_all=compile_all))
    titles = [case.title for case in made]
    pairs = [[titles[0]], titles[1:3], *([title] for title in titles[3:])]  # fc2 and proj are of one kind
    expected = [titles, *titles] if compile_all else [item for same in pairs for item in (same, *same)]
    assert order == expected


def test_one_pool_compiles_each_candidate_of_each_kind(monkeypatch):
    pools, tasks = [], []
    monkeypatch.setattr(_tuning, "ProcessPoolExecutor", lambda n, _: pools.append(n) or ThreadPoolExecutor(1))
    monkeypatch.setattr(_tuning, "_compile_candidate", lambda *task: tasks.append(task))
    monkeypatch.setattr(_tuning.os, "cpu_count", lambda: 3)
    cases = tune.b16_gemms("sm_90", torch.float16)
    _tuning._compile(cases, "sm_90", float("inf"))
    assert pools == [3]
    assert sorted((case.title, name) for same, name, _ in tasks for case in same) == sorted(
        (case.title, name) for case in cases for name in case.entries
    )
    assert {len({case.kind for case in same}) for same, _, _ in tasks} == {1}
    assert {arch for _, _, arch in tasks} == {"sm_90"}


def test_what_is_not_compiled_at_the_deadline_is_left(monkeypatch):
    tasks = []
    monkeypatch.setattr(_tuning, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(1))
    monkeypatch.setattr(_tuning, "_compile_candidate", lambda *task: tasks.append(task) or _tuning.time.sleep(0.2))
    cases = tune.b16_gemms("sm_90", torch.float16)
    _tuning._compile(cases, "sm_90", _tuning.time.monotonic() + 0.3)
    assert 1 <= len(tasks) <= 3
    with pytest.raises(_tuning._OutOfTime):
        _tuning._compile(cases, "sm_90", _tuning.time.monotonic() - 1)


# Resuming.


def test_entries_that_are_there_are_kept_unless_forced(clock, capsys, tmp_path):
    tuned(capsys)
    calls, clock.milliseconds = clock.calls, {"128": 0.1}
    document = tuned(capsys)
    assert (document["rows"], document["kept"], clock.calls) == ([], 2, calls)
    document = tuned(capsys, "--batch-sizes", "100,1000")
    assert [row["key"] for row in document["rows"]] == ["large/16384", "small/1024"]
    assert table(tmp_path)["toy"]["large/1024"]["block"] == 64
    document = tuned(capsys, "--force")
    assert (len(document["rows"]), document["kept"]) == (2, 0)
    assert table(tmp_path)["toy"]["large/1024"]["block"] == 128


def test_an_interrupted_run_keeps_what_it_measured(clock, capsys, tmp_path):
    clock.interrupt_at = (_tuning.ROUNDS + 1) * len(ENTRIES) + 5  # within the second case
    assert main(["tune", "--batch-sizes", "100"]) == 130
    assert list(table(tmp_path)["toy"]) == ["large/1024"]
    clock.interrupt_at = None
    document = tuned(capsys)
    assert ([row["key"] for row in document["rows"]], document["kept"]) == (["small/128"], 1)


def test_a_budget_that_is_spent_leaves_the_rest_for_the_next_run(clock, capsys, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_tuning.time, "monotonic", lambda: now[0])

    def first_case_takes_a_minute(*arguments):
        now[0] += 60
        return {name: [1.0] * _tuning.ROUNDS for name in arguments[0]}

    monkeypatch.setattr(_tuning, "_times", first_case_takes_a_minute)
    document = tuned(capsys, "--budget", "30")
    assert ([row["key"] for row in document["rows"]], document["left"]) == (["large/1024"], 1)
    assert list(table(tmp_path)["toy"]) == ["large/1024"]
    document = tuned(capsys, "--budget", "30")
    assert ([row["key"] for row in document["rows"]], document["left"]) == (["small/128"], 0)


def test_who_reads_during_a_write_finds_a_whole_table(clock, capsys, tmp_path, monkeypatch):
    tuned(capsys)
    before, seen = table(tmp_path), []
    replace = Path.replace

    def watched(self, target):
        seen.append((table(tmp_path), json.loads(self.read_text())))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    _tuned.write(tmp_path / "tuned" / TABLE, "linear", "act/bfloat16/1/1/64", {"plan": "cublas"})
    (old, new), *_ = seen
    assert old == before
    assert new == table(tmp_path) == {**before, "linear": {"act/bfloat16/1/1/64": {"plan": "cublas"}}}


def test_a_write_that_fails_leaves_the_old_table_and_no_scraps(clock, capsys, tmp_path, monkeypatch):
    tuned(capsys)
    before = table(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["tune", "--batch-sizes", "1000"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert table(tmp_path) == before
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == [TABLE]


def a_read_only_disk(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    return tmp_path


def a_file(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    return tmp_path / "cache"


def a_long_name(tmp_path, monkeypatch):
    return tmp_path / ("x" * 5000)


@pytest.mark.parametrize("place", [a_read_only_disk, a_file, a_long_name])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(clock, capsys, tmp_path, monkeypatch, place):
    monkeypatch.setenv("VITKERNELS_CACHE", str(place(tmp_path, monkeypatch)))
    assert main(["tune", "--batch-sizes", "100"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), clock.calls) == ("", 1, 0)
    assert "cannot write" in err


def test_without_a_home_it_asks_for_a_place(clock, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vitkernels._env.tuned_dir", lambda: None)
    assert main(["tune", "--batch-sizes", "100"]) == 2
    assert "set VITKERNELS_CACHE" in capsys.readouterr().err
    assert clock.calls == 0
    assert main(["tune", "--batch-sizes", "100", "--output", str(tmp_path / "table.json")]) == 0


# What is never written.


def test_a_wrong_candidate_is_refused_however_fast(clock, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_makers", lambda: {"toy": toy(wrong=lambda x: x * x * 1.001)})
    clock.milliseconds = {"wrong": 0.001, "128": 0.75}
    document = tuned(capsys, code=1)
    assert len(document["errors"]) == 2
    assert "toy large: wrong is wrong: relative L2 error 1.0e-03" in document["errors"][0]
    assert "wrong" not in document["rows"][0]["us"]
    assert table(tmp_path)["toy"]["large/1024"]["block"] == 128


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (lambda x: torch.empty_like(x), "error nan"),
        (lambda x: (x * x).where(torch.arange(1000) < 999, x.new_tensor(float("nan"))), "error nan"),
        (lambda x: (x * x).where(torch.arange(1000) < 999, 1.0 + x * x), "relative L2 error"),
        (lambda x: (x * x).double(), "torch.float64 (1000,) instead of torch.float32"),
        (lambda x: (x * x)[:999], "(999,) instead of"),
    ],
    ids=["unwritten", "nan", "one element", "dtype", "shape"],
)
def test_the_gate_sees(clock, capsys, monkeypatch, candidate, why):
    monkeypatch.setattr(tune, "_makers", lambda: {"toy": toy(bad=candidate)})
    torch.use_deterministic_algorithms(False)  # the gate poisons memory itself
    document = tuned(capsys, code=1)
    assert why in document["rows"][0]["refused"]["bad"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_candidate_that_does_not_run_is_told_and_no_error(clock, capsys, tmp_path, monkeypatch):
    def too_large(x):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(tune, "_makers", lambda: {"toy": toy(large=too_large)})
    document = tuned(capsys)
    assert document["rows"][0]["broken"] == {"large": "RuntimeError: out of resource: shared memory"}
    assert table(tmp_path)["toy"]["large/1024"]["block"] == 64
    assert main(["tune", "--batch-sizes", "100", "--force"]) == 0
    out = capsys.readouterr().out
    assert "did not run: large (RuntimeError: out of resource: shared memory)" in out
    assert "block 64" in out
    assert "2.00x" in out


def test_without_a_baseline_nothing_is_decided(clock, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(ENTRIES, "cublas", {"plan": "cublas", "block": "cublas"})
    monkeypatch.setattr(tune, "_makers", lambda: {"toy": toy(cublas=lambda x: x)})
    document = tuned(capsys, code=1)
    assert "cublas, which runs without an entry, fails: relative L2 error" in document["errors"][0]
    assert not (tmp_path / "tuned").exists()


def test_a_case_that_does_not_fit_is_named_and_the_others_are_measured(clock, capsys, monkeypatch):
    cases = toy()

    def first_is_too_large(shape, batch, arch, dtype):
        first, second = cases(shape, batch, arch, dtype)

        def problem(device):
            raise torch.OutOfMemoryError

        yield Case("toy", first.key, first.kind, first.title, first.rows, first.entries, problem)
        yield second

    monkeypatch.setattr(tune, "_makers", lambda: {"toy": first_is_too_large})
    document = tuned(capsys, code=1)
    assert document["errors"] == ["toy large: out of GPU memory"]
    assert [row["key"] for row in document["rows"]] == ["small/128"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_of_my_dreams"], "unknown model 'vit_of_my_dreams'"),
        (["--budget", "0"], "not a positive number of seconds"),
        (["--batch-sizes", "0"], "not a positive whole number"),
        (["--dtype", "float32"], "invalid choice: 'float32'"),
        (["--output", str(ROOT / "README.md")], "exists and is no table of format 2"),
        (["resnet18"], "resnet18 cannot be fused"),
    ],
)
def test_bad_requests_are_one_line(clock, capsys, arguments, message):
    readme = (ROOT / "README.md").read_text()
    assert main(["tune", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err
    assert clock.calls == 0
    assert (ROOT / "README.md").read_text() == readme


# Which cases there are.


def test_a_models_gemms_are_its_cases():
    cases = [case for case in tune._cases(["test_vit"], [2], "sm_90", torch.bfloat16) if case.stem in ("linear", "patch_embed")]
    assert [case.key for case in cases] == [
        "act/bfloat16/192/64/256",
        "residual/bfloat16/64/192/256",
        "residual/bfloat16/64/64/256",
        "plain/bfloat16/192/64/256",
        "norm_act/bfloat16/192/64/256",
        "norm/bfloat16/192/64/256",
        "fwd/bfloat16/64/768/256",
        "fwd_uint8/bfloat16/64/768/256",
        "fwd_cast/bfloat16/64/768/256",
        "dweight/bfloat16/64/768/256",
        "dweight_uint8/bfloat16/64/768/256",
        "dweight_cast/bfloat16/64/768/256",
    ]
    assert {case.rows for case in cases if case.stem == "linear"} == {2 * 101}
    assert {case.rows for case in cases if case.stem == "patch_embed"} == {2 * 100}


def test_each_key_of_the_workloads_is_measured_once_at_the_most_rows_large_ones_first():
    every = tune._cases([], None, "sm_90", torch.bfloat16)
    assert len({(case.stem, case.key) for case in every}) == len(every)
    cases = [case for case in every if case.stem == "linear"]
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    assert keys[0].startswith("act/")
    by_key = {case.key: case for case in cases}
    assert by_key["act/bfloat16/3072/768/65536"].rows == 256 * 197
    assert by_key["act/bfloat16/4304/1152/16384"].rows == 64 * 256
    kinds = [case.kind for case in cases[6:]]
    assert kinds == sorted(kinds, key=["act", "residual", "plain", "norm_act", "norm"].index)
    rows = [case.rows for case in cases if case.kind == "act"]
    assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("models", "batches"), [([], None), (["test_vit", "vit_base_patch16_224"], [1, 256])])
def test_the_gemms_of_b16_at_256_images_come_first_then_linear_attention_and_patches(models, batches, dtype):
    cases = tune._cases(models, batches, "sm_90", dtype)
    first = [case.key for case in tune.b16_gemms("sm_90", dtype)]
    name = str(dtype).removeprefix("torch.")
    assert first == [
        f"act/{name}/3072/768/65536",
        f"residual/{name}/768/3072/65536",
        f"residual/{name}/768/768/65536",
        f"plain/{name}/2304/768/65536",
        f"norm_act/{name}/3072/768/65536",
        f"norm/{name}/2304/768/65536",
    ]
    assert [case.key for case in cases[:6]] == first
    assert {case.rows for case in cases[:6]} == {256 * 197}
    stems = [case.stem for case in cases]
    assert stems == sorted(stems, key=["linear", "attention", "patch_embed"].index)
    assert {case.key.split("/")[1] for case in cases} == {name}
    kinds = [(case.stem, case.kind) for case in cases[6:]]
    assert len(list(itertools.groupby(kinds))) == len(set(kinds)), "cases of one kind are neighbours"


def test_another_stem_comes_last(monkeypatch):
    monkeypatch.setattr(tune, "_makers", lambda: {"a_toy": toy(), **MAKERS()})
    stems = [case.stem for case in tune._cases(["test_vit"], [2], "sm_90", torch.bfloat16)]
    assert list(dict.fromkeys(stems)) == ["linear", "attention", "patch_embed", "toy"]


def test_both_forms_of_gelu_are_measured_one_after_the_other():
    models = ["vit_base_patch32_siglip_256", "vit_base_patch16_224"]
    cases = tune._cases(models, [256, 64], "sm_90", torch.bfloat16)
    kinds = [case.kind for case in cases if case.kind in ("act", "gelu_tanh")]
    assert kinds == ["act"] * 2 + ["gelu_tanh"] * 2


def test_gradients_of_patches_are_finite_in_float16_at_a_large_batch():
    shape = tune._ModelShape(tokens=56**2, width=64, num_heads=1, hidden=64, act="gelu", patch=4, image=224)
    cases = MAKERS()["patch_embed"](shape, 16, "sm_90", torch.float16)
    case = next(case for case in cases if case.key.startswith("dweight/"))
    largest = case.problem(torch.device("cpu")).oracle().abs().max().item()
    assert 1 < largest < torch.finfo(torch.float16).max / 4


def test_the_launcher_can_take_every_candidate():
    from vitkernels.kernels import _tuning_linear as linear

    assert {c.kernel for c in linear.candidates("sm_90", 3072, 768)} == {"descriptor"}
    assert {c.kernel for c in linear.candidates("sm_100", 3072, 768)} == {"descriptor"}
    for arch, N, K in (("sm_80", 3072, 768), ("sm_90", 2730, 1024), ("sm_90", 1024, 2730)):
        assert {c.kernel for c in linear.candidates(arch, N, K)} == {"pointer"}
    for arch in ("sm_80", "sm_90"):
        configs = linear.candidates(arch, 768, 768)
        assert len(set(configs)) == len(configs) == len({linear._name(c) for c in configs})


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels take CPU tensors")
def test_linear_is_tuned_for_a_model_and_its_launcher_follows(clock, capsys, monkeypatch):
    """Every candidate for Hopper runs in the interpreter and passes its gate."""
    from vitkernels.kernels import _recorder, linear

    clock.milliseconds = {"256": 0.5}
    monkeypatch.setattr(tune, "_makers", lambda: {"linear": MAKERS()["linear"]})
    document = tuned(capsys, "test_vit", "--batch-sizes", "1")
    assert len(document["rows"]) == 6
    for row in document["rows"]:
        assert row["refused"] == row["broken"] == {}
        # Folding has to beat LayerNorm and the GEMM as it was tuned just before.
        assert row["chosen"] == ("cublas" if row["key"].startswith("norm") else "descriptor 128x256x64 w8 s3 /4 x1")
        assert len(row["us"]) == 13
    found = []
    x, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (101, 192))
    with _recorder.recording(lambda name, *_: found.append(name)):
        linear.launch_linear_fwd(x, weight, None, "gelu", None, None, None, x.dtype, "none", False, "auto", "sm_90")
    assert found == ["_linear_descriptor_kernel"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels take CPU tensors")
def test_patch_embedding_is_tuned_for_a_model_and_its_launchers_follow(clock, capsys, monkeypatch):
    """Forward and weight gradient from pixels of each form: every candidate runs in the interpreter and passes its gate."""
    from vitkernels.kernels import _recorder, patch_embed, patch_embed_backward

    blocks = []
    monkeypatch.setattr(tune, "_makers", lambda: {"patch_embed": MAKERS()["patch_embed"]})
    clock.milliseconds = {"256": 0.5}
    document = tuned(capsys, "test_vit", "--batch-sizes", "1")
    assert [row["key"].partition("/")[0] for row in document["rows"]] == [
        f"{kind}{form}" for kind in ("fwd", "dweight") for form in ("", "_uint8", "_cast")
    ]
    for row in document["rows"]:
        assert row["refused"] == row["broken"] == {}
        assert (row["baseline"], row["chosen"]) == ("default", "128x256x64 w8 s3")
        assert "cublas" in row["us"]
    images = torch.empty(1, 3, 160, 160, dtype=torch.bfloat16, device="meta")
    weight, dout = images.new_empty(64, 3, 16, 16), images.new_empty(1, 100, 64)
    launched = _recorder._Recorded._launch
    monkeypatch.setattr(_recorder._Recorded, "_launch", lambda *a, **k: blocks.append(k["BLOCK_N"]) or launched(*a, **k))
    settings = (False, "auto", "sm_90")
    with _recorder.recording(lambda *_: None):
        patch_embed.launch_patch_embed_fwd(images, weight, None, None, None, True, None, None, dout.dtype, *settings)
        patch_embed_backward.launch_patch_embed_bwd(dout, images, weight, None, None, False, True, *settings)
    assert blocks == [256, 256]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels take CPU tensors")
@pytest.mark.parametrize("stem", ["linear", "attention", "patch_embed"])
def test_in_float16_the_launchers_run_every_candidate_and_it_is_right(clock, capsys, monkeypatch, tmp_path, stem):
    """The baseline and two others of each case, so that the interpreter is quick."""
    tried, found, lookup = [], [], _tuned.lookup

    def few(*arguments):
        for case in MAKERS()[stem](*arguments):
            baseline, *others = case.entries.items()
            yield dataclasses.replace(case, entries=dict([baseline, *others[-2:]]))
            tried.extend((case.key, entry) for _, entry in (baseline, *others[-2:]))

    def noting(gpu, stem, key):
        found.append((key, lookup(gpu, stem, key)))
        return found[-1][1]

    monkeypatch.setattr(_tuned, "lookup", noting)
    monkeypatch.setattr(tune, "_makers", lambda: {stem: few})
    document = tuned(capsys, "test_vit", "--batch-sizes", "1", "--dtype", "float16")
    assert len(document["rows"]) == {"linear": 6, "attention": 2, "patch_embed": 6}[stem]
    for row in document["rows"]:
        assert row["refused"] == row["broken"] == {}
        assert row["key"].split("/")[1] == "float16"
        assert len(row["us"]) == 3
    assert set(table(tmp_path)[stem]) == {row["key"] for row in document["rows"]}
    assert all(pair in found for pair in tried)


def test_a_model_with_the_tanh_form_of_gelu_tunes_cublas_own_epilogue_too(clock, capsys, monkeypatch):
    monkeypatch.setattr(tune, "_makers", lambda: {"linear": MAKERS()["linear"]})
    monkeypatch.setattr(tune, "_shape", lambda name: tune._ModelShape(10, 64, 1, 128, "gelu_tanh", patch=0, image=160))
    document = tuned(capsys, "test_vit", "--batch-sizes", "1")
    kinds = {row["key"].partition("/")[0]: row for row in document["rows"]}
    assert set(kinds) == {"gelu_tanh", "residual", "plain", "norm_act", "norm"}
    assert [kind for kind, row in kinds.items() if "cublaslt" in row["us"]] == ["gelu_tanh"]
    assert all(row["refused"] == row["broken"] == {} for row in kinds.values())


def test_the_shape_of_a_model_names_its_activation():
    assert tune._shape("vit_base_patch32_siglip_256").act == "gelu_tanh"
    assert tune._shape("vit_tiny_patch16_224").act == "gelu"


def test_a_model_without_a_fused_patch_embedding_tunes_its_blocks_alone(monkeypatch):
    monkeypatch.setattr(tune, "_shape", lambda name: tune._ModelShape(101, 64, 1, 192, "gelu", patch=0, image=160))
    assert {case.stem for case in tune._cases(["test_vit"], [2], "sm_90", torch.bfloat16)} == {"attention", "linear"}


@pytest.mark.slow
@pytest.mark.gpu
def test_this_gpu_is_tuned_for_a_small_model(capsys, tmp_path):
    path = tmp_path / "table.json"
    document = tuned(capsys, "test_vit", "--output", str(path))
    assert [row["stem"] for row in document["rows"]] == ["linear"] * 6 + ["attention"] * 2 + ["patch_embed"] * 6
    for row in document["rows"]:
        assert row["refused"] == {}
        assert all(us > 0 for us in row["us"].values())
    table = json.loads(path.read_text())
    assert {stem: len(table[stem]) for stem in ("attention", "linear")} == {"attention": 2, "linear": 6}
    assert sum(map(len, table["patch_embed"].values())) > 0
    assert tuned(capsys, "test_vit", "--output", str(path))["kept"] == 14


COMPILING = """
import torch
from vitkernels.cli import _tuning, tune

if __name__ == "__main__":
    cases = [case for case in tune._cases(["test_vit"], [2], "sm_80", torch.bfloat16) if case.kind == "act"]
    kept = list(cases[0].entries)[:3]
    for case in cases:
        for name in set(case.entries) - set(kept):
            del case.entries[name]
    _tuning._compile(cases, "sm_80", float("inf"))
    import triton
    compiled = []
    triton.compiler.compiler.ASTSource.make_ir = lambda *args: compiled.append(args)
    for name in kept:
        _tuning._compile_candidate(cases, name, "sm_80")
    print("compiled again:", len(compiled))
"""


@pytest.mark.slow
def test_candidates_are_compiled_by_other_processes_into_tritons_cache(tmp_path):
    script = tmp_path / "compiling.py"
    script.write_text(COMPILING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "compiled again: 0\n"
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 3
