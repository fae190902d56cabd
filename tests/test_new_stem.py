"""What a new stem must add to appear in inspect, roofline, the benchmarks, the report and the GPU round: a toy one does.

``kernels/<stem>.py`` with ``WRITES``, ``aot_launches`` and ``launch_<operator>`` (and ``FLOPS`` where it multiplies matrices),
and ``benchmarks/bench_<stem>.py``. Nothing in the instruments names a stem.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")

KERNELS = """
import torch, triton, triton.language as tl

WRITES = {"_twice_kernel": ("y_ptr",)}
FLOPS = {"_twice_kernel": lambda N, **_: 2 * N**3}

@triton.jit
def _twice_kernel(x_ptr, y_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)
    offsets = rows[:, None] * N + rows[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x).to(y_ptr.dtype.element_ty))

def launch_twice(x):
    y = torch.empty_like(x)
    _twice_kernel[(1,)](x, y, x.shape[0])
    return y

def aot_launches(shape):
    yield "N=64 bf16", lambda: launch_twice(torch.empty(64, 64, dtype=torch.bfloat16, device="meta"))
"""
COMMANDS = """
import contextlib, io, json, sys, torch
import vitkernels, vitkernels.kernels
from vitkernels.ops._register import register
vitkernels.kernels.__path__.append(sys.argv[1])
register("twice(Tensor x) -> Tensor y", fake=torch.empty_like, stem="twice", reference=lambda x: x @ x)

from vitkernels.cli import _ledger, main
from vitkernels.cli._chips import CHIPS
class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.ops.vitkernels.twice(x)
count = _ledger.count(Twice(), (torch.empty(64, 64, dtype=torch.bfloat16, device="meta"),), {}, CHIPS["h200"])
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = main(["inspect", "twice", "--arch", "90", "--workload", "B/16", "--json", "--fail-on", "spills,smem,no-mma"])
(operator,) = count.forward
print(json.dumps({
    "code": code, "inspect": json.loads(out.getvalue()),
    "roofline": [operator.name, operator.kind, operator.flops, operator.read_bytes, operator.written_bytes],
}))
"""
BENCHMARK = """
import torch
from protocol import report
from providers import KernelContest
from workloads import cases

PROVIDERS = ("eager", "fused")

def CASES(size, device):
    return cases("twice", size, device)

def DTYPE(device):
    return "float32"

def contest(case, device, size):
    functions = {"eager": lambda: (lambda x: x @ x, "pytorch"), "fused": lambda: (lambda x: torch.mm(x, x), "kernel")}
    return KernelContest(functions, [torch.randn(64, 64)], [torch.randn(64, 64)], case.mode)

def extra(case, device, row):
    return {"bytes": 2 * 64 * 64 * 4, "flops": 2 * 64**3, "gb_per_s": 1.0}

def test_twice(outcomes, provider, benchmark):
    report(benchmark, outcomes[provider])
"""


def run(*command, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kernel_file_appears_in_inspect_and_roofline(tmp_path):
    (tmp_path / "twice.py").write_text(KERNELS)
    out = run(sys.executable, "-c", COMMANDS, str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    found = json.loads(out.splitlines()[-1])
    assert found["code"] == 0
    (row,) = found["inspect"]["rows"]
    assert (row["stem"], row["kernel"], row["config"]) == ("twice", "_twice_kernel", "N=64 bf16")
    assert row["mma"]["HGMMA"] > 0
    assert found["roofline"] == ["twice", "matrix products", 2 * 64**3, 8192, 8192]


def test_a_benchmark_file_appears_in_the_command_and_the_report(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks" / "bench_twice.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    pytest_ = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "benchmarks/")
    listed = run(*pytest_, "--collect-only", "--size", "small", "-k", "not test_model and not compile", cwd=tmp_path)
    assert "bench_twice.py::test_twice[" in listed
    assert "bench_layer_norm.py::test_layer_norm[" in listed
    assert "bench_models" not in listed
    file = tmp_path / "twice.json"
    run(*pytest_, "--benchmark-only", f"--benchmark-json={file}", "-k", "twice and S_16-infer", cwd=tmp_path)
    rows = json.loads(file.read_text())["benchmarks"]
    assert {row["extra_info"]["provider"] for row in rows} == {"eager", "fused"}
    table = run(sys.executable, str(tmp_path / "benchmarks" / "report.py"), str(file))
    assert table.count("| twice | S/16 | infer |") == 2
