"""``pytest benchmarks/ --benchmark-only`` works as typed, refuses wrong providers, and its report draws what it measured."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vitkernels
from vitkernels import _env

ROOT = Path(__file__).parents[1]
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what a CPU says of itself")
CASE = "layer_norm-S_16-infer"  # selects add_layer_norm as well
WRONG = """
import vitkernels
right = vitkernels.ops.layer_norm
vitkernels.ops.layer_norm = lambda *arguments: right(*arguments) * 1.001
"""


def environment(*folders):
    """Without this suite's interpreter, and without xdist's variables, under which pytest-benchmark measures nothing."""
    ours = ("TRITON_INTERPRET", "PYTEST_")
    path = os.pathsep.join([str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_benchmarks(tmp_path, *arguments, command=(sys.executable, "-m", "pytest"), folders=()):
    file = tmp_path / "result.json"
    typed = [*command, "benchmarks/", "--benchmark-only", f"--benchmark-json={file}", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(typed, cwd=ROOT, env=environment(*folders), capture_output=True, text=True, timeout=300)
    rows = json.loads(file.read_text())["benchmarks"] if file.exists() and file.stat().st_size else []
    return done, rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The literal command, restricted to two operators and one model at one shape."""
    folder = tmp_path_factory.mktemp("benchmarks")
    script = shutil.which("pytest", path=str(Path(sys.executable).parent))
    command = (script,) if script else (sys.executable, "-m", "pytest")
    selected = f"({CASE} and not compile) or (model and infer-b1 and (eager or fused or sdpa-math))"
    return *run_benchmarks(folder, "-k", selected, "-rs", command=command), folder / "result.json"


@ON_CPU
def test_the_command_runs_benchmarks_and_every_row_says_what_ran(measured):
    done, rows, _ = measured
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(row["extra_info"]["subject"], row["extra_info"]["provider"]) for row in rows}
    subjects = ("layer_norm", "add_layer_norm", "model")
    assert found == {(subject, provider) for subject in subjects for provider in ("eager", "fused")}
    for row in rows:
        extra = row["extra_info"]
        assert extra["path"] == ("reference" if extra["provider"] == "fused" else "pytorch")
        assert row["group"] == f"{extra['subject']} {extra['workload']} infer b1"
        assert extra["dtype"] == "float32"
        assert extra["ratio_to_eager_p10"] <= extra["ratio_to_eager"] <= extra["ratio_to_eager_p90"]
        assert extra["ratio_to_eager"] == 1 or extra["provider"] == "fused"
        assert extra["wall_us"] > 0
        assert extra["device_us"] is None
        assert extra["environment"]["torch"]
    assert "sdpa-math" not in str(found)
    assert "needs an NVIDIA GPU" in done.stdout  # a skip with its reason


@ON_CPU
def test_pytest_benchmark_shows_exactly_the_recorded_rounds(measured):
    for row in measured[1]:
        extra, stats = row["extra_info"], row["stats"]
        assert stats["rounds"] == extra["rounds"] >= 5
        assert stats["median"] * 1e6 == pytest.approx(extra["wall_us"], rel=1e-9)


@ON_CPU
def test_an_operator_says_what_it_must_move(measured):
    extra = {r["extra_info"]["subject"]: r["extra_info"] for r in measured[1]}
    assert extra["layer_norm"]["bytes"] == 2 * 197 * 384 * 4
    assert extra["add_layer_norm"]["bytes"] == 4 * 197 * 384 * 4


def test_a_wrong_provider_is_a_failure_and_not_a_number(tmp_path):
    (tmp_path / "wrong_provider.py").write_text(WRONG)
    selected = f"{CASE} and not add and (eager or fused)"
    done, rows = run_benchmarks(tmp_path, "-p", "wrong_provider", "-k", selected, folders=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fused is wrong at this shape: output 0: relative L2 error" in done.stdout
    assert {row["extra_info"]["provider"] for row in rows} == {"eager"}


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import protocol

    return protocol


def test_rounds_can_be_profiled(protocol):
    """``--benchmark-cprofile`` plays one round more than there are."""
    clock, times = protocol.ReplayClock(), []

    def pedantic(play, setup, rounds):
        for _ in range(rounds + 1):
            setup()
            play()
            times.append(clock.now())

    clock.replay(SimpleNamespace(pedantic=pedantic), [2.0, 3.0])
    assert times[:2] == [2.0, 3.0]


def test_what_is_measured_is_interleaved_and_what_fails_is_not(protocol):
    calls = []

    def build(name):
        def check():
            assert name != "wrong", "off by one"

        def step():
            calls.append(name)
            if name == "broken":
                raise RuntimeError("no image")

        if name == "absent":
            raise protocol.Unavailable("not installed")
        return protocol.Contender("pytorch", step, check, lambda: None)

    names = ["eager", "wrong", "absent", "broken", "other"]
    found = protocol.measure(names, build, torch.device("cpu"), batch=2, kernel=False)
    assert found["wrong"].failure == "wrong is wrong at this shape: off by one"
    assert found["absent"].unavailable == "not installed"
    assert found["broken"].failure == "broken does not run: RuntimeError: no image"
    assert not any(found[name].row or found[name].seconds for name in ("wrong", "absent", "broken"))
    assert len(found["other"].seconds) == protocol.ROUNDS
    rounds = [calls[i : i + 2] for i in range(len(calls) - 2 * protocol.ROUNDS, len(calls), 2)]
    assert all(sorted(one) == ["eager", "other"] for one in rounds)
    assert sum(one[0] == "eager" for one in rounds) == protocol.ROUNDS / 2


def test_a_model_that_cannot_be_fused_is_measured_by_the_others(protocol):
    import providers
    import workloads

    (workload,) = (w for w in workloads.WORKLOADS if w.name == "DINOv3-B/16@256")
    contest = providers.ModelContest(workloads.Case("model", workload, 1, "infer"), torch.device("cpu"), "small")
    contest.build("eager").check()
    contest.build("naive-attention").check()
    with pytest.raises(protocol.Unavailable, match="cannot be fused"):
        contest.build("fused")


@ON_CPU
@pytest.mark.skipif(_env.EXTENSION is None, reason="vitkernels._C is not built")
def test_resampling_measures_its_kernel_whatever_the_environment_says(protocol, monkeypatch):
    import bench_pos_embed

    def asked(*_):
        raise AssertionError("the reference was asked")

    monkeypatch.setattr("vitkernels.ops.pos_embed.reference.copies", asked)
    for case in bench_pos_embed.CASES("small", "cpu")[::6]:  # one size, and many
        function, path = bench_pos_embed._functions(case, torch.device("cpu"))["fused"]()
        assert path == "kernel"
        with vitkernels.backend("reference"):  # as VITKERNELS_BACKEND sets it
            function(torch.randn(1, 1 + case.old[0] * case.old[1], 8))


# What others' packages promise, on a CPU: shapes, order of arguments, defaults.


def _softmax_attention(q, k, v):  # (B, N, H, Dh) each
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)


class _Layer(torch.nn.Module):
    """Transformer Engine's: parameters of its names, made on ``meta`` and replaced."""

    def __init__(self, *sizes, eps=1e-5, activation="gelu", device, params_dtype):
        super().__init__()
        assert (device, activation) == ("meta", "gelu")
        self.eps = eps
        for name, size in self.shapes(*sizes).items():
            setattr(self, name, torch.nn.Parameter(torch.empty(size, device=device, dtype=params_dtype)))


class _LayerNorm(_Layer):
    def shapes(self, D):
        return {"weight": (D,), "bias": (D,)}

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _Linear(_Layer):
    def shapes(self, K, N):
        return {"weight": (N, K), "bias": (N,)}

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class _LayerNormMLP(_Layer):
    def shapes(self, D, hidden):
        norm = {"layer_norm_weight": (D,), "layer_norm_bias": (D,)}
        return norm | {"fc1_weight": (hidden, D), "fc1_bias": (hidden,), "fc2_weight": (D, hidden), "fc2_bias": (D,)}

    def forward(self, x):
        normed = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        hidden = F.gelu(F.linear(normed, self.fc1_weight, self.fc1_bias), approximate="tanh")
        return F.linear(hidden, self.fc2_weight, self.fc2_bias)


def _norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _quack_mlp(x, weight1, weight2, activation, bias1=None, bias2=None):
    assert activation == "gelu_tanh_approx"
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def _quack_linear_act(x, weight, activation, bias=None, store_preact=True):
    assert activation == "gelu_tanh_approx"
    preact = F.linear(x, weight, bias)
    return preact if store_preact else None, F.gelu(preact, approximate="tanh")


_QUACK = {
    "quack.gemm_interface": {"act_to_pytorch_fn_map": {"gelu_tanh_approx": F.gelu}},
    "quack.linear": {"linear_func": F.linear, "linear_act_func": _quack_linear_act},
    "quack.mlp": {"mlp_func": _quack_mlp},
}
_ENGINE = {"transformer_engine.pytorch": {"LayerNorm": _LayerNorm, "Linear": _Linear, "LayerNormMLP": _LayerNormMLP}}
_FLASH = {"flash_attn": {"flash_attn_qkvpacked_func": lambda qkv: _softmax_attention(*qkv.unbind(2))}}
_XFORMERS = {"memory_efficient_attention": _softmax_attention, "unbind": torch.unbind}
OTHERS = [
    ("attention_qkv", "flash-attn", _FLASH),
    ("attention_qkv", "xformers", {"xformers.ops": _XFORMERS}),
    ("layer_norm", "liger", {"liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": SimpleNamespace(apply=_norm)}}),
    ("add_layer_norm", "quack", {"quack.rmsnorm": {"layernorm_fwd": _norm}}),
    ("add_layer_norm", "transformer_engine", _ENGINE),
    ("proj", "quack", _QUACK),
    ("fc1_tanh", "quack", _QUACK),
    ("mlp_tanh", "quack", _QUACK),
    ("proj", "transformer_engine", _ENGINE),
    ("fc1", "transformer_engine", _ENGINE),
    ("mlp_tanh", "transformer_engine", _ENGINE),
]


def _functions_and_inputs(subject):
    """The providers' functions, as on a GPU, and inputs for a CPU."""
    import bench_attention
    import bench_layer_norm
    import bench_linear
    import bench_mlp

    cuda, x = torch.device("cuda"), torch.randn(2, 5, 16)
    if subject == "attention_qkv":
        return bench_attention._functions(cuda), [torch.randn(2, 5, 3, 2, 8) * 3]
    if "layer_norm" in subject:
        added = subject == "add_layer_norm"
        return bench_layer_norm._functions(added, cuda, "infer"), [*[x, x.flip(0)][: 1 + added], *torch.randn(2, 16)]
    if subject == "mlp_tanh":
        inputs = [x, *torch.randn(2, 16), torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)]
        return bench_mlp._functions("gelu_tanh", cuda), inputs
    epilogue = [torch.randn(16), x.flip(0)] if subject == "proj" else []
    return bench_linear._functions(subject, cuda, "infer"), [x, torch.randn(16, 16), torch.randn(16), *epilogue]


@pytest.mark.parametrize(("subject", "provider", "packages"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_another_package_is_asked_for_what_eager_computes(protocol, monkeypatch, subject, provider, packages):
    """Layout, scale and order of arguments, on stand-ins that keep to the package's documentation; without it, the reason."""
    functions, inputs = _functions_and_inputs(subject)
    with monkeypatch.context() as patch:
        for name in packages:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(protocol.Unavailable, match="cannot be imported"):
            functions[provider]()
    for name, members in packages.items():
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    function, path = functions[provider]()
    assert path == provider
    torch.testing.assert_close(function(*inputs), functions["eager"]()[0](*inputs), atol=1e-5, rtol=1e-5)


def test_an_activation_that_quack_lacks_is_a_skip(protocol, monkeypatch):
    import bench_mlp

    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    for name, members in _QUACK.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    with pytest.raises(protocol.Unavailable, match="this QuACK has no gelu_erf"):
        bench_mlp._functions("gelu", torch.device("cuda"))["quack"]()


def test_a_shape_that_xformers_has_no_operator_for_is_a_skip(protocol):
    import bench_attention

    def refuse(q, k, v):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query: ...")

    with pytest.raises(protocol.Unavailable, match=r"xformers: No operator found .* with inputs:$"):
        bench_attention._xformers(SimpleNamespace(memory_efficient_attention=refuse))(torch.zeros(1, 2, 3, 1, 8))


def test_nothing_is_measured_without_eager(protocol):
    def build(name):
        raise protocol.Unavailable("gone")

    with pytest.raises(RuntimeError, match="eager PyTorch failed"):
        protocol.measure(["eager"], build, torch.device("cpu"), batch=1, kernel=False)


def run_report(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_the_report_has_a_table_with_losses_and_plots_of_models(measured, tmp_path):
    _, rows, file = measured
    done = run_report(file, "--out", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| .* \| fused \(reference\) \| ", done.stdout, re.MULTILINE)) == len(rows) / 2
    assert not re.search(r"\| fused \|", done.stdout)  # the reference is never shown as a kernel
    assert "No kernel ran." in done.stdout
    assert "Floor:" not in done.stdout
    pictures = {path.name: path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"models-infer.png": b"\x89PNG"}  # of kernels there is nothing to draw


def test_the_report_of_a_gpu_shows_the_share_of_the_floor_and_losses(measured, tmp_path):
    """Rows as a GPU would write them: LayerNorm took twice the floor's time, and lost to eager."""
    document = json.loads(measured[2].read_text())
    gpu = {"device": "cuda:0", "name": "Some GPU", "driver": None, "sm": "sm_90", "memory_bytes": 1}
    for row in document["benchmarks"]:
        extra = row["extra_info"]
        extra["environment"] |= {"device": "cuda", "gpus": [gpu]}
        if extra["subject"] == "layer_norm" and extra["provider"] == "fused":
            microseconds = 2 * extra["bytes"] / 1000e9 * 1e6
            extra |= {"path": "kernel", "device_us": microseconds, "ratio_to_eager": 0.8}
        else:
            extra["device_us"] = extra["wall_us"]
        extra |= {"device_us_p10": extra["device_us"] * 0.9, "device_us_p90": extra["device_us"] * 1.1}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(document))
    done = run_report(file, "--out", tmp_path / "plots", "--gbs", "1000")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("| layer_norm |") and "| fused |" in line)
    assert "| 50% | 0.80x" in line
    assert "1,000 GB/s" in done.stdout
    # add_layer_norm still ran the reference: no plot of it.
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["layer_norm.png", "models-infer.png"]


def test_the_report_shows_images_per_s_against_the_roofline(measured, tmp_path, monkeypatch):
    """A model at a quarter of its roofline; on the CPU that really ran there is none."""
    assert all(row["extra_info"]["ideal_images_per_s"] is None for row in measured[1] if "model" in row["group"])
    assert "roofline" not in run_report(measured[2]).stdout.lower()
    document = json.loads(measured[2].read_text())
    models = [row for row in document["benchmarks"] if row["extra_info"]["subject"] == "model"]
    for row in models:
        extra = row["extra_info"]
        extra |= {"images_per_s": 500.0, "images_per_s_p10": 480.0, "images_per_s_p90": 510.0, "ideal_images_per_s": 2000.0}
    del models[0]["extra_info"]["ideal_images_per_s"]  # as in a file from before it was recorded
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"benchmarks": models}))
    done = run_report(file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 25% of 2,000 |") == len(models) - 1
    assert "Roofline: images/s" in done.stdout
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    pytest.importorskip("matplotlib")
    (figure,) = report.plots(report.load([file]), report.Rates()).values()
    images, ratio = figure.axes
    lines = [c for c in images.collections if c.get_label() == "roofline"]
    assert [float(segment[0][0]) for line in lines for segment in line.get_segments()] == [2000.0]
    assert images.get_xlim()[1] > 2000
    assert "roofline" not in [c.get_label() for c in ratio.collections]
    assert "roofline" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_model_on_a_known_gpu_records_its_roofline(protocol, monkeypatch):
    import bench_models
    import workloads

    from vitkernels.cli import _floor

    monkeypatch.setattr(_floor, "_gpu_name", lambda device: "NVIDIA H200")
    device = torch.device("cpu")
    found = {c.mode: bench_models.extra(c, device, {})["ideal_images_per_s"] for c in workloads.cases("model", "small", "cpu")}
    assert found["train"] is None
    assert 1e5 < found["infer"] < 989.5e12 / 2e9  # Ti/16: above 2 GFLOP an image


def test_the_floor_is_of_bytes_or_of_flops(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    rates = report.Rates(gbs=1000.0, tflops=100.0)
    row = {"path": "kernel", "device_us": 10.0, "bytes": 5e6, "environment": {"device": "cuda"}}
    assert report.floor_share(row, rates) == pytest.approx(0.5)
    assert report.floor_share({**row, "flops": 8e8}, rates) == pytest.approx(0.8)
    assert report.floor_share({**row, "flops": 1e8}, rates) == pytest.approx(0.5)
    assert report.floor_share({**row, "path": "reference"}, rates) is None


def test_the_report_refuses_a_file_without_rows(tmp_path):
    (tmp_path / "empty.json").write_text('{"benchmarks": []}')
    done = run_report(tmp_path / "empty.json")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no benchmark rows in these files\n")


def test_every_way_to_run_a_model_of_ours_passes_its_gate(protocol):
    import bench_models
    import providers
    from workloads import Case, Workload

    case = Case("model", Workload("test", "test_vit", 101, 64, 6, 2, 192, 16, 160, 2, 2), 2, "infer")
    contest = bench_models.contest(case, torch.device("cpu"), "small")
    assert set(providers.OURS) == {"fused", "plan-cublas", "plan-triton", "inference", "auto"}
    for name in (*providers.OURS, "inference-graph", "eager-graph"):
        contender = contest.build(name)
        contender.check()
        assert contender.step().shape == (2, 1000)
    with torch.no_grad():
        contest._models[-1].head.weight.mul_(2)  # after eager's result was kept
    with pytest.raises(AssertionError, match="output error"):
        contest.build("fused").check()


def test_a_backward_is_measured_without_its_forward(protocol):
    import providers

    calls = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            calls.append("backward")
            return 2 * dy * ctx.saved_tensors[0]

    x = torch.randn(4)
    functions = {"eager": lambda: (torch.square, "pytorch"), "fused": lambda: (Square.apply, "kernel")}
    contender = providers.KernelContest(functions, (x,), (torch.ones(4),), "backward").build("fused")
    contender.check()
    calls.clear()
    (gradient,) = contender.step()
    contender.step()
    assert calls == ["backward", "backward"]
    torch.testing.assert_close(gradient, 2 * x)


def test_nothing_is_checked_behind_a_driver_that_does_nothing(protocol):
    def check():
        raise AssertionError("nothing was computed")

    contenders = {
        name: protocol.Contender(path, lambda: None, check, lambda: None) for name, path in (("a", "stub"), ("b", "kernel"))
    }
    contenders["eager"] = protocol.Contender("pytorch", lambda: None, lambda: None, lambda: None)
    found = protocol.measure(contenders, contenders.__getitem__, torch.device("cpu"), 1, kernel=True)
    assert found["a"].row["path"] == "stub"
    assert found["b"].failure == "b is wrong at this shape: nothing was computed"


def test_sizes_and_devices_have_cases_and_ids_that_k_takes(protocol):
    import workloads

    for subject in ("model", "layer_norm"):
        for size in ("small", "full"):
            for device in ("cpu", "cuda"):
                cases = workloads.cases(subject, size, device)
                assert {case.mode for case in cases} == {"infer", "train"}
                assert len({str(case) for case in cases}) == len(cases)
                assert all(re.fullmatch(r"[\w.+-]+", str(case)) for case in cases)
    assert len({case.workload.name for case in workloads.cases("model", "full", "cuda")}) == len(workloads.WORKLOADS)
