"""``benchmarks/host_overhead.py``: its rows, its JSON, and what stands for cuBLAS."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stub_driver
import torch
from torch.nn.functional import linear

from vitkernels import ops

FOLDER = Path(__file__).parents[1] / "benchmarks"
BLOCKS = {"block_inference", "block_folded", "block_train", "block_small", "block_compiled"}


@pytest.fixture
def host_overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import host_overhead

    return host_overhead


def run(seconds, *arguments, **variables):
    """The script, with less time for each row."""
    script = f"import sys, host_overhead; host_overhead.SECONDS = {seconds}; sys.exit(host_overhead.main())"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=FOLDER, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU, and there is one")
@pytest.mark.skipif(stub_driver.compiler() is None and "CI" not in os.environ, reason="needs a C compiler")
def test_json_has_a_row_for_every_operator_and_kind_of_block():
    done = run(0.02, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and nothing else
    assert set(found) == {"environment", "rows"}
    assert found["environment"]["torch"] == torch.__version__
    assert "no figure is the time of a GPU" in found["environment"]["driver"]
    rows = {row["call"]: row for row in found["rows"]}
    assert set(rows) == BLOCKS | set(ops.__all__)
    for name, row in rows.items():
        assert list(row) == ["call", "us", "launches", "python_calls", "timm_us", "ratio"]
        assert row["us"] > 0
        assert row["python_calls"] > 0
        assert (row["launches"] == 0) == (name == "block_small" or name.startswith("resample"))
        if name in BLOCKS:
            assert row["ratio"] == pytest.approx(row["us"] / row["timm_us"])
        else:
            assert row["timm_us"] is row["ratio"] is None
    assert rows["block_train"]["launches"] > 2 * rows["block_inference"]["launches"]
    assert rows["block_compiled"]["launches"] == rows["block_inference"]["launches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU, and there is one")
def test_a_process_that_interprets_is_refused():
    done = run(0.02, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET" in done.stderr


def test_products_are_counted_and_come_back_with_their_shape(host_overhead):
    cublas, x, weight = host_overhead.Cublas(), torch.randn(6, 4), torch.randn(5, 4)
    with cublas.replaced():
        results = [torch.nn.functional.linear(x, weight), x @ weight.t(), torch.addmm(x.new_zeros(6, 5), x, weight.t())]
        assert (torch.randn(2, 3, 4, 7) @ torch.randn(2, 3, 7, 5)).shape == (2, 3, 4, 5)
        assert (x @ torch.randn(4)).shape == (6,)
    assert [t.shape for t in results] == [(6, 5)] * 3
    assert cublas.products == 5
    assert len({t.data_ptr() for t in results}) == 3
    assert torch.nn.functional.linear is linear
    torch.testing.assert_close(x @ weight.t(), linear(x, weight))
    assert cublas.products == 5


def test_the_least_of_alternating_calls(host_overhead, monkeypatch):
    clock, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]

        return host_overhead.Contender(run, ())

    monkeypatch.setattr(host_overhead, "SECONDS", 0.0)
    monkeypatch.setattr(host_overhead.time, "perf_counter", lambda: clock[0])
    found = host_overhead.least_us([call("a", [3e-6, 2e-6, 4e-6]), call("b", [5e-6])])
    assert found == pytest.approx([2, 5])
    assert order[:4] == ["a", "b", "a", "b"]
    assert len(order) == 2 * host_overhead.LEAST_CALLS


def test_python_calls_of_the_instrument_are_not_counted(host_overhead):
    def inner():
        return 1

    assert host_overhead.python_calls(inner) == 1
    assert host_overhead.python_calls(lambda: [inner() for _ in range(3)]) >= 4
    cublas = host_overhead.Cublas()
    with cublas.replaced():
        assert host_overhead.python_calls(lambda: torch.ones(2, 2) @ torch.ones(2, 2)) == 1


def test_a_product_counts_what_cublas_costs_the_host(host_overhead):
    stub, (x, weight) = SimpleNamespace(launches=lambda: 0), (torch.randn(6, 4), torch.randn(5, 4))
    one, three = (
        host_overhead.Contender(lambda count=count: [torch.nn.functional.linear(x, weight) for _ in range(count)], ())
        for count in (1, 3)
    )
    rows = [host_overhead.measure("a", stub, contender) for contender in (one, three)]
    assert 5 < rows[0].us < 5 + 100
    assert 15 < rows[1].us < 15 + 100
    free = host_overhead._row("a", stub, one, one, host_overhead.Cublas())
    assert free.us < 100
    assert free.ratio == free.us / free.timm_us


def test_the_basis_of_a_ratio(host_overhead, monkeypatch):
    """timm's block in float32 on one token; ours in bfloat16, but for the small call, which is timm's."""
    seen = {}

    def row(name, stub, ours, timm=None, cublas=None):
        for contender in (ours, timm):
            block = next(
                cell.cell_contents for cell in contender.call.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
            )
            leaf = [cell.cell_contents for cell in contender.call.__closure__ if isinstance(cell.cell_contents, torch.Tensor)][
                -1
            ]
            seen.setdefault(name, []).append((type(block).__name__, leaf.dtype, tuple(leaf.shape)))

    monkeypatch.setattr(host_overhead, "measure", row)
    monkeypatch.setattr(host_overhead, "_row", row)
    list(host_overhead.block_rows(None))
    timm = ("Block", torch.float32, (1, 1, 64))
    ours = ("FusedBlock", torch.bfloat16, (2, 16, 64))
    assert set(seen) == BLOCKS
    assert all(found[1] == timm for found in seen.values())
    assert seen["block_small"][0] == ("FusedBlock", torch.float32, (1, 1, 64))
    assert all(seen[name][0] == ours for name in ("block_inference", "block_folded", "block_train"))
    assert seen["block_compiled"][0][1:] == ours[1:]
